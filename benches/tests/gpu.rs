//! The check and the timings of a GPU, on the emulated device.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use openlora_benches::gpu::check::{self, Options};
use openlora_benches::gpu::{bench, report::Report, steps};
use openlora_benches::shapes::SMALL;
use openlora_kernels::Precision;
use openlora_kernels::cpu::pages::CpuPages;
use openlora_kernels::cpu::{Cpu, Isa};
use openlora_kernels::cuda::device::Element;
use openlora_kernels::cuda::emulated::Emulated;
use openlora_kernels::cuda::measure::Effort;
use openlora_model::ModelFiles;
use openlora_model::conformance::Host;
use openlora_types::Limits;

fn device() -> Arc<Emulated> {
    Emulated::new(7).expect("the emulated device")
}

#[test]
fn slow_a_sound_device_passes_every_check() {
    let options = Options {
        elements: vec![Element::Bf16],
        fixtures: Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures"),
        models_max: 2,
        steps: 40,
        budget: Duration::from_secs(3600),
        seed: 7,
    };
    let mut told = 0;
    let findings = check::run(&device(), &options, &mut |_| told += 1);
    println!("{}", check::table(&findings));
    assert_eq!((told, findings.len()), (14, 14));
    for finding in &findings {
        assert!(finding.failure.is_none() && finding.cases > 0, "{finding:?}");
    }
}

/// What the check expects of a GPU holds of the processor, whose sums have one order in steps of any size.
#[test]
fn random_steps_are_what_they_are_alone_and_from_the_first_token_on_the_processor() {
    let scratch = tempfile::tempdir().expect("temporary folder");
    let path = scratch.path().join("small.gguf");
    SMALL.write(&path).expect("written");
    let files = Arc::new(ModelFiles::open(&path, &Limits::default()).expect("a model"));
    let poison = |pages: &mut CpuPages| pages.fill(f32::NAN);
    let cpu = |precision| Arc::new(Cpu::new(2, precision, Isa::detect()).expect("threads start"));
    let mut exact = Host::new(cpu(Precision::F32), Arc::clone(&files), poison);
    let mut host = Host::with_pages(cpu(Precision::Quantised), files, poison, steps::PAGES);
    let until = Instant::now() + Duration::from_secs(3600);
    let outcome = steps::run(&mut host, &mut exact, steps::Limits { steps: 300, until, distance: 0.2, seed: 3 });
    println!("{outcome:?}");
    assert_eq!(outcome.steps, 300);
    assert!(outcome.compared > 300 && outcome.exact > 0 && outcome.loads > 10, "{outcome:?}");
    assert!(outcome.distance > 0.0, "the backends are two: {outcome:?}");
}

fn bench_options(budget: Duration, scratch: &Path) -> bench::Options {
    let (shapes, scratch, sizes) = (vec![SMALL], scratch.to_owned(), bench::Sizes::tiny());
    bench::Options { element: Element::Bf16, shapes, budget, scratch, effort: Effort::ONCE, sizes }
}

#[test]
fn every_row_of_the_bench_is_measured_and_told_at_once() {
    let scratch = tempfile::tempdir().expect("temporary folder");
    let mut told = Vec::new();
    let mut tell = |report: &Report| told.push(report.rows.len());
    let options = bench_options(Duration::from_secs(3600), scratch.path());
    let report = bench::run(&device(), &options, &mut tell).expect("ceilings");
    println!("{}", report.table());
    assert_eq!(report.skipped, Vec::<String>::new());
    assert!(told.is_sorted() && told.len() > report.rows.len(), "{told:?}");
    for row in &report.rows {
        let figures = [row.milliseconds, row.best, row.worst].into_iter().chain(row.wall_ms).chain(row.floor_ms);
        assert!(figures.into_iter().all(|figure| figure.is_finite() && figure > 0.0), "{row:?}");
        assert!(row.best <= row.milliseconds && row.milliseconds <= row.worst, "{row:?}");
    }
    let what: Vec<&str> = report.rows.iter().map(|row| row.what.as_str()).collect();
    for expected in [
        "SGMV 2 rows, 1 x r4",
        "expand 2 rows, 2 x r4",
        "attention, decode, 2 x 20",
        "attention, prefill, 1 x 8",
        "product gate and up, 2 rows",
        "product head, 2 rows",
        "norm, 2 rows",
        "rotary embedding, 2 rows",
        "SwiGLU, 2 rows",
        "sampling, 2 rows",
        "decode 2, no adapter",
        "decode 2, one r16",
        "decode 2, 2 x r16",
        "prefill 2 x 24, one r16",
        "recording all passes",
        "decode 2, Zipf(1.0) of 3 r16 q,v",
    ] {
        assert!(what.contains(&expected), "{expected} is missing in {what:?}");
    }
}

#[test]
fn what_the_budget_has_no_time_for_is_named_and_has_no_figure() {
    let scratch = tempfile::tempdir().expect("temporary folder");
    let report = bench::run(&device(), &bench_options(Duration::ZERO, scratch.path()), &mut |_| {}).expect("ceilings");
    assert_eq!(report.rows.iter().filter(|row| row.part != "ceiling").count(), 0);
    assert!(report.skipped.len() > 10 && report.skipped.iter().all(|why| why.contains("budget")), "{report:?}");
    assert!(report.goals.iter().all(|goal| goal.measured.is_none() && goal.reached.is_none()));
    assert!(report.table().contains("not measured"));
}
