//! `openlora gpu-check`: whether a GPU's answers are right.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Result, ensure};
use clap::Args;
use openlora_benches::gpu::check::{self, Finding, Options};
use openlora_kernels::cuda::device::{Device, Element};
use serde_json::json;

use crate::{Global, gpu};

#[derive(Args)]
#[command(after_help = "Examples:
  openlora gpu-check
  openlora gpu-check --device cuda:1 --steps 1000 --out benches/runs/today")]
pub(crate) struct GpuCheckArgs {
    /// Which GPU
    #[arg(long, default_value = "cuda:0", value_name = "cuda:N")]
    device: String,
    /// Random steps with adapters that come and go; a tenth of them each in f16 and f32
    #[arg(long, default_value_t = 10_000)]
    steps: usize,
    /// Seconds for the random steps; a check that does not get through them fails
    #[arg(long, default_value_t = 240)]
    budget: u64,
    /// What the random steps start from
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Small models and recorded answers: the repository's folder `fixtures`
    #[arg(long, default_value = "fixtures", value_name = "FOLDER")]
    fixtures: PathBuf,
    /// Write check.json and check.md into this folder, anew after each check
    #[arg(long, value_name = "FOLDER")]
    out: Option<PathBuf>,
}

pub(crate) fn run(global: &Global, args: &GpuCheckArgs) -> Result<ExitCode> {
    ensure!(
        args.fixtures.join("models").is_dir(),
        "{} has no models; --fixtures names the repository's folder of that name",
        args.fixtures.display()
    );
    let device = gpu::open(&args.device)?;
    let properties = device.properties().clone();
    eprintln!("{}, compute capability {}.{}", properties.name, properties.compute.0, properties.compute.1);
    let options = Options {
        elements: vec![Element::Bf16, Element::F16, Element::F32],
        fixtures: args.fixtures.clone(),
        models_max: usize::MAX,
        steps: args.steps,
        budget: Duration::from_secs(args.budget),
        seed: args.seed,
    };
    let mut so_far: Vec<Finding> = Vec::new();
    let mut told = |finding: &Finding| {
        let verdict = if finding.failure.is_some() { "FAIL" } else { "pass" };
        eprintln!("{verdict} {} ({:.1} s)", finding.check, finding.seconds);
        so_far.push(finding.clone());
        if let Some(out) = &args.out
            && let Err(error) = write(out, &properties.name, &so_far)
        {
            eprintln!("{error:#}");
        }
    };
    let findings = check::run(&device, &options, &mut told);
    let failed = findings.iter().filter(|finding| finding.failure.is_some()).count();
    if global.json {
        println!("{}", results(&properties.name, &findings));
    } else {
        print!("{}", check::table(&findings));
    }
    if let Some(out) = &args.out {
        write(out, &properties.name, &findings)?;
    }
    Ok(if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn results(device: &str, findings: &[Finding]) -> serde_json::Value {
    json!({"device": device, "ok": findings.iter().all(|finding| finding.failure.is_none()), "checks": findings})
}

fn write(out: &std::path::Path, device: &str, findings: &[Finding]) -> Result<()> {
    gpu::write(out, "check.json", &serde_json::to_string_pretty(&results(device, findings))?)?;
    gpu::write(out, "check.md", &check::table(findings))
}
