//! How fast a device is: what its memory and its tensor cores can do, each kernel beside its floor, whole steps beside theirs. What goals
//! are for comes first; what the budget leaves no time for is named and left out.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use openlora_kernels::cuda::device::{Device, Element};
use openlora_kernels::cuda::lora::CudaAdapter;
use openlora_kernels::cuda::measure::{Effort, Measure, Part, Timing, Work};
use openlora_types::{AdapterWeights, Module};
use rand::SeedableRng;
use rand::rngs::StdRng;
use rand_distr::{Distribution, Zipf};

use super::model_steps::{Rig, Room, Size, StepTiming};
use super::report::{Report, Row};
use crate::adapters::random_weights;
use crate::shapes::Shape;

/// Rank of the adapters of steps.
const RANK: usize = 16;

/// What is measured.
#[derive(Clone, Debug)]
pub struct Options {
    /// Numbers of weights and activations.
    pub element: Element,
    /// Models; kernels are measured in the sizes of the first.
    pub shapes: Vec<Shape>,
    /// Nothing is begun after this long.
    pub budget: Duration,
    /// Where weights are written while they are loaded.
    pub scratch: PathBuf,
    /// How carefully.
    pub effort: Effort,
    /// How much.
    pub sizes: Sizes,
}

/// How much is measured.
#[derive(Clone, Debug)]
pub struct Sizes {
    /// Bytes that are copied for the ceiling.
    pub copy_bytes: usize,
    /// Rows, inputs and outputs of the product for the ceiling.
    pub product: usize,
    /// Rows of small kernels and products.
    pub rows: Vec<usize>,
    /// Rows of shrink and expand.
    pub lora_rows: Vec<usize>,
    /// Ranks of shrink and expand.
    pub ranks: Vec<usize>,
    /// Distinct adapters beside one.
    pub distinct: usize,
    /// Attention alone.
    pub attention: Vec<Size>,
    /// Sequences of decode steps.
    pub decode: Vec<usize>,
    /// Tokens of their sequences.
    pub context: usize,
    /// Sequences that are prefilled at once, whole.
    pub prefill: usize,
    /// Adapters of which a Zipf distribution draws, and rows of such a step.
    pub zipf: (usize, usize),
    /// Steps that count.
    pub steps: usize,
    /// Bytes that stay free beside weights and pool, for what the first passes take.
    pub spare_bytes: usize,
}

impl Sizes {
    /// For a GPU of 80 GB and more.
    #[must_use]
    pub fn gpu() -> Self {
        let decode = |sequences, context| Size { sequences, rows: 1, context };
        Self {
            copy_bytes: 2 << 30,
            product: 8_192,
            rows: vec![1, 8, 64, 8_192],
            lora_rows: vec![64, 1, 8, 256],
            ranks: vec![16, 8, 64],
            distinct: 64,
            attention: vec![decode(64, 1_024), decode(1, 32_768), Size { sequences: 8, rows: 1_024, context: 1_024 }],
            decode: vec![64, 1, 8, 32, 128],
            context: 1_024,
            prefill: 8,
            zipf: (2_000, 64),
            steps: 15,
            spare_bytes: 8 << 30,
        }
    }

    /// For tests: every row, as small as can be.
    #[must_use]
    pub fn tiny() -> Self {
        Self {
            copy_bytes: 2 << 20,
            product: 32,
            rows: vec![2],
            lora_rows: vec![2],
            ranks: vec![4],
            distinct: 2,
            attention: vec![Size { sequences: 2, rows: 1, context: 20 }, Size { sequences: 1, rows: 8, context: 8 }],
            decode: vec![2],
            context: 24,
            prefill: 2,
            zipf: (3, 2),
            steps: 1,
            spare_bytes: 1 << 30,
        }
    }
}

/// A run.
struct Run<'a, D: Device> {
    device: &'a Arc<D>,
    options: &'a Options,
    began: Instant,
    report: Report,
    told: &'a mut dyn FnMut(&Report),
}

/// Measures everything that the budget has time for; `told` is called with the report so far after every row, and at the end.
///
/// # Errors
/// The ceilings cannot be measured, or the device is lost. What fails otherwise is among what was left out.
pub fn run<D: Device>(device: &Arc<D>, options: &Options, told: &mut dyn FnMut(&Report)) -> Result<Report> {
    ensure!(!options.shapes.is_empty(), "no shape to measure");
    let report = Report {
        device: device.properties().name.clone(),
        element: options.element.suffix().to_owned(),
        ..Report::default()
    };
    let mut run = Run { device, options, began: Instant::now(), report, told };
    run.ceilings()?;
    for (i, shape) in options.shapes.iter().enumerate() {
        run.part(format!("steps of {}", shape.name), |run| run.steps(shape));
        if i == 0 {
            run.kernels(shape);
        }
    }
    run.report.hold_to_goals();
    (run.told)(&run.report);
    Ok(run.report)
}

impl<D: Device> Run<'_, D> {
    fn add(&mut self, row: Row) {
        self.report.rows.push(row);
        self.report.hold_to_goals();
        (self.told)(&self.report);
    }

    /// Runs a part unless the time is over; a failure is noted.
    fn part(&mut self, what: String, body: impl FnOnce(&mut Self) -> Result<()>) {
        let spent = self.began.elapsed();
        if spent >= self.options.budget {
            self.report.skipped.push(format!("{what}: the budget of {} s is over", self.options.budget.as_secs()));
        } else if let Err(error) = body(self) {
            eprintln!("{what}: {error:#}");
            self.report.skipped.push(format!("{what}: {error:#}"));
        }
        (self.told)(&self.report);
    }

    fn ceilings(&mut self) -> Result<()> {
        let Options { element, effort, sizes, .. } = self.options;
        let measure = Measure::new(self.device, *element, self.options.shapes[0].sizes(), *effort);
        let n = sizes.product;
        let copy = measure.copy(sizes.copy_bytes)?;
        self.report.ceilings.copy_bytes_per_s = copy.work.bytes / copy.milliseconds * 1e3;
        let product = measure.product(n, n, n, false)?;
        self.report.ceilings.product_flops_per_s = product.work.flops / product.milliseconds * 1e3;
        let what = [format!("copy of {} MiB", sizes.copy_bytes >> 20), format!("product {n} x {n} x {n}")];
        for (what, timing) in what.into_iter().zip([copy, product]) {
            let row = Row::kernel("", what, timing, &self.report.ceilings);
            self.add(Row { part: "ceiling", floor_ms: None, ..row });
        }
        Ok(())
    }

    fn kernel(&mut self, shape: &Shape, what: String, measured: impl FnOnce() -> Result<Timing>) {
        let name = shape.name;
        self.part(format!("{name}, {what}"), |run| {
            let row = Row::kernel(name, what, measured()?, &run.report.ceilings);
            run.add(row);
            Ok(())
        });
    }

    fn kernels(&mut self, shape: &Shape) {
        let Options { element, effort, sizes, .. } = self.options;
        let measure = Measure::new(self.device, *element, shape.sizes(), *effort);
        self.lora(shape, &measure);
        for Size { sequences, rows, context } in sizes.attention.iter().copied() {
            let what = if rows == 1 { "decode" } else { "prefill" };
            let what = format!("attention, {what}, {sequences} x {context}");
            self.kernel(shape, what, || Ok(measure.attention(sequences, rows, context)?));
        }
        let dims = shape.sizes();
        let outputs = |modules: &[Module]| modules.iter().map(|module| dims.dims(*module).1).sum::<usize>();
        let linears = [
            ("qkv", dims.hidden, outputs(&[Module::Q, Module::K, Module::V])),
            ("o", dims.dims(Module::O).0, dims.hidden),
            ("gate and up", dims.hidden, 2 * dims.intermediate),
            ("down", dims.intermediate, dims.hidden),
        ];
        for &rows in &sizes.rows {
            for (what, inputs, outputs) in linears {
                let what = format!("product {what}, {rows} rows");
                self.kernel(shape, what, || Ok(measure.product(rows, inputs, outputs, false)?));
            }
            // Logits are of the rows that end a sequence.
            if rows <= 256 {
                let what = format!("product head, {rows} rows");
                self.kernel(shape, what, || Ok(measure.product(rows, dims.hidden, dims.vocab, true)?));
                self.kernel(shape, format!("sampling, {rows} rows"), || Ok(measure.sample(rows)?));
            }
            self.kernel(shape, format!("norm, {rows} rows"), || Ok(measure.norm(rows)?));
            self.kernel(shape, format!("rotary embedding, {rows} rows"), || Ok(measure.rope(rows)?));
            self.kernel(shape, format!("SwiGLU, {rows} rows"), || Ok(measure.swiglu(rows)?));
        }
    }

    fn lora(&mut self, shape: &Shape, measure: &Measure<D>) {
        let sizes = &self.options.sizes;
        for &rank in &sizes.ranks {
            let weights = random_weights(&shape.sizes(), rank, &Module::IN_LAYER, rank as u64);
            for &rows in &sizes.lora_rows {
                for distinct in [1, sizes.distinct].into_iter().filter(|distinct| *distinct <= rows) {
                    let of = format!("{rows} rows, {distinct} x r{rank}");
                    self.part(format!("{}, SGMV {of}", shape.name), |run| {
                        let mut rig = measure.lora(&weights, distinct, rows)?;
                        for (part, what) in [(Part::All, "SGMV"), (Part::Shrink, "shrink"), (Part::Expand, "expand")] {
                            let timing = rig.time(part)?;
                            run.add(Row::kernel(shape.name, format!("{what} {of}"), timing, &run.report.ceilings));
                        }
                        Ok(())
                    });
                }
            }
        }
    }

    fn steps(&mut self, shape: &Shape) -> Result<()> {
        let Options { element, sizes, scratch, .. } = self.options;
        let most = sizes.decode.iter().copied().max().unwrap_or(1);
        let room = Room {
            sequences: most.max(sizes.prefill),
            context: sizes.context,
            rows: sizes.prefill * sizes.context,
            logit_rows: most.max(256.min(sizes.prefill * sizes.context)),
            spare_bytes: sizes.spare_bytes,
        };
        let dims = shape.sizes();
        let all_seven = random_weights(&dims, RANK, &Module::IN_LAYER, 1);
        let q_and_v = random_weights(&dims, RANK, &[Module::Q, Module::V], 2);
        let mut rig = Rig::new(self.device, *element, shape, scratch, room, &|model| {
            let all_seven = most * model.adapter_pages(&all_seven.sizes());
            // One after the other in the same pages.
            all_seven.max(sizes.zipf.0 * model.adapter_pages(&q_and_v.sizes()))
        })?;
        let adapters = rig.load(&all_seven, most)?;
        ensure!(!adapters.is_empty(), "no room for an adapter");
        for &sequences in &sizes.decode {
            let size = Size { sequences, rows: 1, context: sizes.context };
            self.mixes(&mut rig, "decode", size, (&all_seven, &adapters))?;
        }
        let size = Size { sequences: sizes.prefill, rows: sizes.context, context: sizes.context };
        self.mixes(&mut rig, "prefill", size, (&all_seven, &adapters))?;
        let (seconds, passes) = rig.record_all(&adapters[0])?;
        eprintln!("{}: {passes} passes recorded in {seconds:.2} s", shape.name);
        let ms = seconds * 1e3;
        let timing = StepTiming { milliseconds: ms, best: ms, worst: ms, wall_ms: ms };
        self.add_step(shape.name, "recording all passes".into(), timing, None);
        drop(adapters);
        self.zipf(&mut rig, &q_and_v)
    }

    fn add_step(&mut self, shape: &str, what: String, timing: StepTiming, work: Option<Work>) {
        let StepTiming { milliseconds, best, worst, wall_ms } = timing;
        let (wall_ms, floor_ms) = (Some(wall_ms), work.map(|work| self.report.ceilings.floor_ms(work)));
        let work = work.unwrap_or_default();
        let (bytes, flops) = (work.bytes, work.flops);
        let shape = shape.to_owned();
        self.add(Row { part: "step", shape, what, milliseconds, best, worst, wall_ms, bytes, flops, floor_ms });
    }

    /// Steps of one size with no adapter, with one, and with as many distinct ones as rows decode.
    fn mixes(
        &mut self,
        rig: &mut Rig<D>,
        what: &str,
        size: Size,
        (weights, adapters): (&AdapterWeights, &[CudaAdapter<D>]),
    ) -> Result<()> {
        let (steps, element, name) = (self.options.sizes.steps, self.options.element, rig.shape().name.clone());
        let Size { sequences, rows, .. } = size;
        let of = if rows == 1 { format!("{what} {sequences}") } else { format!("{what} {sequences} x {rows}") };
        let mut mixes = vec![(0, "no adapter".to_owned()), (1, format!("one r{RANK}"))];
        if sequences > 1 && rows == 1 {
            mixes.push((sequences, format!("{sequences} x r{RANK}")));
        }
        for (distinct, mix) in mixes {
            let what = format!("{of}, {mix}");
            if distinct > adapters.len() {
                self.report.skipped.push(format!("{name}, {what}: memory has room for {} adapters", adapters.len()));
                continue;
            }
            let each: Vec<_> =
                (0..sequences).map(|i| (distinct > 0).then(|| &adapters[i * distinct / sequences])).collect();
            self.part(format!("{name}, {what}"), |run| {
                let timing = rig.time(size, steps, &mut |_| each.clone())?;
                let work = rig.work(element, size, &[(weights, distinct)]);
                run.add_step(&name, what, timing, Some(work));
                Ok(())
            });
        }
        Ok(())
    }

    /// Decode steps whose rows draw their adapter anew each step, by Zipf's law, against steps of one adapter.
    fn zipf(&mut self, rig: &mut Rig<D>, weights: &AdapterWeights) -> Result<()> {
        let Sizes { zipf: (count, rows), context, steps, .. } = self.options.sizes;
        let name = rig.shape().name.clone();
        let what = format!("decode {rows}, Zipf(1.0) of {count} r{RANK} q,v");
        self.part(format!("{name}, {what}"), |run| {
            let began = Instant::now();
            let adapters = rig.load(weights, count)?;
            ensure!(adapters.len() == count, "memory has room for {} of {count} adapters", adapters.len());
            eprintln!("{name}: {count} adapters loaded in {:.1} s", began.elapsed().as_secs_f64());
            let size = Size { sequences: rows, rows: 1, context };
            let one = rig.time(size, steps, &mut |_| vec![Some(&adapters[0]); rows])?;
            let work = rig.work(run.options.element, size, &[(weights, 1)]);
            run.add_step(&name, format!("decode {rows}, one r{RANK} q,v"), one, Some(work));
            let mut rng = StdRng::seed_from_u64(1);
            let popularity = Zipf::new(count as f64, 1.0)?;
            let mut distinct = Vec::new();
            let mut drawn = |_| {
                let mut chosen: Vec<usize> = (0..rows).map(|_| popularity.sample(&mut rng) as usize - 1).collect();
                chosen.sort_unstable();
                let each = chosen.iter().map(|i| Some(&adapters[*i])).collect();
                chosen.dedup();
                distinct.push(chosen.len());
                each
            };
            // Each step is another draw: more of them.
            let timing = rig.time(size, steps * 4, &mut drawn)?;
            let typical = distinct.iter().sum::<usize>() / distinct.len();
            let work = rig.work(run.options.element, size, &[(weights, typical)]);
            run.add_step(&name, what, timing, Some(work));
            Ok(())
        });
        Ok(())
    }
}
