//! `openlora bench --device cuda`: kernels and whole steps on a GPU, beside their floors.

use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Result;
use openlora_benches::gpu::bench::{self, Options, Sizes};
use openlora_benches::gpu::report::{Report, line};
use openlora_benches::shapes::Shape;
use openlora_kernels::cuda::device::Element;
use openlora_kernels::cuda::measure::Effort;

use crate::{Global, gpu};

/// What goals are for first.
const SHAPES: [&str; 3] = ["llama-3.1-8b", "qwen2.5-7b", "smollm2-135m"];

/// Measures `device` for at most `budget` seconds.
pub(crate) fn run(global: &Global, device: &str, budget: u64, out: Option<&Path>) -> Result<ExitCode> {
    let scratch = tempfile::tempdir()?;
    let device = gpu::open(device)?;
    let options = Options {
        element: Element::Bf16,
        shapes: SHAPES.into_iter().map(Shape::named).collect::<Result<_>>()?,
        budget: Duration::from_secs(budget),
        scratch: scratch.path().to_owned(),
        effort: Effort::GPU,
        sizes: Sizes::gpu(),
    };
    let mut rows = 0;
    let mut told = |report: &Report| {
        report.rows[rows..].iter().for_each(|row| eprint!("{}", line(row)));
        rows = report.rows.len();
        if let Some(Err(error)) = out.map(|out| write(out, report)) {
            eprintln!("{error:#}");
        }
    };
    let report = bench::run(&device, &options, &mut told)?;
    if global.json {
        println!("{}", serde_json::to_string(&report)?);
    } else {
        print!("{}", report.table());
    }
    out.map_or(Ok(()), |out| write(out, &report))?;
    Ok(ExitCode::SUCCESS)
}

fn write(out: &Path, report: &Report) -> Result<()> {
    gpu::write(out, "results.json", &serde_json::to_string_pretty(report)?)?;
    gpu::write(out, "table.md", &report.table())
}
