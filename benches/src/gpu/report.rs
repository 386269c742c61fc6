//! What was measured: rows, written as they come, and the goals they are held to. A figure that was not measured is said to be so.

use std::fmt::Write as _;

use openlora_kernels::cuda::measure::{Timing, Work};
use serde::Serialize;

/// What the device can do, measured in the same run.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Ceilings {
    /// Bytes read and bytes written by a copy, per second.
    pub copy_bytes_per_s: f64,
    /// Floating-point operations of a large product, per second.
    pub product_flops_per_s: f64,
}

impl Ceilings {
    /// The least milliseconds that the work takes.
    #[must_use]
    pub fn floor_ms(&self, work: Work) -> f64 {
        (work.bytes / self.copy_bytes_per_s).max(work.flops / self.product_flops_per_s) * 1e3
    }
}

/// A measured figure.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// `ceiling`, `kernel` or `step`.
    pub part: &'static str,
    /// The model's shape.
    pub shape: String,
    /// What was timed.
    pub what: String,
    /// Median, by the device's clock.
    pub milliseconds: f64,
    /// The fastest.
    pub best: f64,
    /// The slowest.
    pub worst: f64,
    /// Median by the host's clock, where the host takes part.
    pub wall_ms: Option<f64>,
    /// Bytes that have to be moved.
    pub bytes: f64,
    /// Operations that have to be done.
    pub flops: f64,
    /// The least that this takes by the ceilings of the run.
    pub floor_ms: Option<f64>,
}

impl Row {
    /// A kernel's.
    #[must_use]
    pub fn kernel(shape: &str, what: String, timing: Timing, ceilings: &Ceilings) -> Self {
        let Timing { milliseconds, best, worst, work } = timing;
        Self {
            part: "kernel",
            shape: shape.to_owned(),
            what,
            milliseconds,
            best,
            worst,
            wall_ms: None,
            bytes: work.bytes,
            flops: work.flops,
            floor_ms: Some(ceilings.floor_ms(work)),
        }
    }

    /// Time over floor.
    #[must_use]
    pub fn ratio(&self) -> Option<f64> {
        self.floor_ms.map(|floor| self.milliseconds / floor)
    }
}

/// What is to be reached, and what was.
#[derive(Clone, Debug, Serialize)]
pub struct Goal {
    /// Of which work.
    pub what: &'static str,
    /// The figure's bound.
    pub goal: String,
    /// The figure; none where it was not measured.
    pub measured: Option<f64>,
    /// Whether it is within the bound.
    pub reached: Option<bool>,
}

/// All of a run.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Report {
    /// The device's name.
    pub device: String,
    /// Numbers that were multiplied.
    pub element: String,
    /// What the device can do.
    pub ceilings: Ceilings,
    /// Figures.
    pub rows: Vec<Row>,
    /// Goals.
    pub goals: Vec<Goal>,
    /// What was left out, and why.
    pub skipped: Vec<String>,
}

/// The shape that goals are for.
const OF: &str = "llama-3.1-8b";

impl Report {
    fn row(&self, what: &str) -> Option<&Row> {
        self.rows.iter().find(|row| row.shape == OF && row.what == what)
    }

    /// Works out the goals from the rows there are.
    pub fn hold_to_goals(&mut self) {
        let ms = |what: &str| self.row(what).map(|row| row.milliseconds);
        let ratio = |what: &str| self.row(what).and_then(Row::ratio);
        let share = |what: &str, of: &str| Some(ms(what)? / ms(of)?);
        let most = |what, value: Option<f64>, bound: f64, unit: &str| Goal {
            what,
            goal: format!("<= {bound}{unit}"),
            measured: value,
            reached: value.map(|value| value <= bound),
        };
        let least = |what, value: Option<f64>, bound: f64, unit: &str| Goal {
            what,
            goal: format!(">= {bound}{unit}"),
            measured: value,
            reached: value.map(|value| value >= bound),
        };
        let peak = |what: &str| {
            let row = self.row(what)?;
            Some(row.flops / (row.milliseconds / 1e3) / self.ceilings.product_flops_per_s)
        };
        let zipf = share("decode 64, one r16 q,v", "decode 64, Zipf(1.0) of 2000 r16 q,v");
        self.goals = vec![
            most("SGMV, all sites, 64 rows, 64 distinct r16", ratio("SGMV 64 rows, 64 x r16"), 1.3, "x its floor"),
            most("SGMV, all sites, 64 rows, 1 adapter r16", ratio("SGMV 64 rows, 1 x r16"), 1.3, "x its floor"),
            most("decode, batch 64, no adapters", ratio("decode 64, no adapter"), 1.2, "x weights + KV"),
            most("one r16 in the whole batch", share("decode 64, one r16", "decode 64, no adapter"), 1.05, "x none"),
            most("64 distinct r16, all seven linears", ratio("decode 64, 64 x r16"), 1.15, "x weights + KV + adapters"),
            least("prefill 8 x 1024 with LoRA", peak("prefill 8 x 1024, one r16"), 0.6, " of the product peak"),
            most(
                "prefill with LoRA over without",
                share("prefill 8 x 1024, one r16", "prefill 8 x 1024, no adapter"),
                1.05,
                "x none",
            ),
            most("recording all passes", ms("recording all passes").map(|ms| ms / 1e3), 5.0, " s"),
            least("2,000 adapters, Zipf(1.0), over one", zipf, 0.95, "x"),
        ];
    }

    /// All of it in Markdown.
    #[must_use]
    pub fn table(&self) -> String {
        let mut text = format!(
            "{}, {}: copy {:.0} GB/s (read and written), product {:.0} TFLOP/s\n\n",
            self.device,
            self.element,
            self.ceilings.copy_bytes_per_s / 1e9,
            self.ceilings.product_flops_per_s / 1e12
        );
        text.push_str("| goal | bound | measured | |\n|---|---|---:|---|\n");
        for Goal { what, goal, measured, reached } in &self.goals {
            let measured = measured.map_or_else(|| "not measured".to_owned(), |value| format!("{value:.3}"));
            let reached = reached.map_or("", |reached| if reached { "reached" } else { "missed" });
            // Writing to a string does not fail.
            let _ = writeln!(text, "| {what} | {goal} | {measured} | {reached} |");
        }
        text.push_str("\n| shape | work | ms (best) | wall ms | floor ms | x floor | GB/s | TFLOP/s |\n");
        text.push_str("|---|---|---:|---:|---:|---:|---:|---:|\n");
        for row in &self.rows {
            text.push_str(&line(row));
        }
        for skipped in &self.skipped {
            let _ = writeln!(text, "\nnot measured: {skipped}");
        }
        text
    }
}

/// A row of the table.
#[must_use]
pub fn line(row: &Row) -> String {
    let optional =
        |value: Option<f64>, digits: usize| value.map_or_else(String::new, |value| format!("{value:.digits$}"));
    let seconds = row.milliseconds / 1e3;
    format!(
        "| {} | {} | {:.4} ({:.4}) | {} | {} | {} | {:.0} | {:.1} |\n",
        row.shape,
        row.what,
        row.milliseconds,
        row.best,
        optional(row.wall_ms, 3),
        optional(row.floor_ms, 4),
        optional(row.ratio(), 2),
        row.bytes / seconds / 1e9,
        row.flops / seconds / 1e12
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(what: &str, milliseconds: f64, floor_ms: f64) -> Row {
        let (best, worst, shape) = (milliseconds, milliseconds, OF.to_owned());
        Row {
            part: "step",
            shape,
            what: what.into(),
            milliseconds,
            best,
            worst,
            wall_ms: None,
            bytes: 1e9,
            flops: 1e12,
            floor_ms: Some(floor_ms),
        }
    }

    #[test]
    fn goals_are_reached_missed_or_not_measured() {
        let rows = vec![step("decode 64, no adapter", 6.0, 5.5), step("decode 64, one r16", 6.6, 5.5)];
        let mut report = Report { rows, ..Report::default() };
        report.hold_to_goals();
        let of = |what: &str| report.goals.iter().find(|goal| goal.what == what).map(|goal| goal.reached);
        assert_eq!(of("decode, batch 64, no adapters"), Some(Some(true)));
        assert_eq!(of("one r16 in the whole batch"), Some(Some(false)));
        assert_eq!(of("recording all passes"), Some(None));
        assert!(report.table().contains("| recording all passes | <= 5 s | not measured |  |"));
    }

    #[test]
    fn a_floor_is_the_slower_of_moving_and_computing() {
        let ceilings = Ceilings { copy_bytes_per_s: 1e12, product_flops_per_s: 1e14 };
        assert_eq!(ceilings.floor_ms(Work { bytes: 1e9, flops: 1e9 }), 1.0);
        assert_eq!(ceilings.floor_ms(Work { bytes: 1e9, flops: 1e12 }), 10.0);
    }
}
