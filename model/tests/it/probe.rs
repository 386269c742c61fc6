//! Adapters tried before they are served: what is sound passes in every precision, what is not is named.

use std::sync::Arc;

use openlora_kernels::cpu::{Cpu, Isa};
use openlora_kernels::{Backend, LoraRows, Precision, SequenceRows, StepRows};
use openlora_model::{LoadOptions, Model, ModelFiles, PROBE_DIVERGENCE_MAX, Probe, ProbeReport};
use openlora_types::{AdapterWeights, Classify, Elements, Fault, Limits, Module, SiteWeights};

use crate::support::{fixture, folders, read_adapter, real_model};

/// A probe of a model in a precision, and the adapters it tries.
struct Bench {
    probe: Probe<Cpu, Cpu>,
    serving: Arc<Model<Cpu>>,
    files: Arc<ModelFiles>,
}

impl Bench {
    fn open(path: &std::path::Path, precision: Precision) -> Self {
        let files = Arc::new(ModelFiles::open(path, &Limits::default()).expect("a model"));
        let backend = Arc::new(Cpu::new(2, precision, Isa::detect()).expect("threads start"));
        // Steps smaller than the probe's prompt: its buffers are its own.
        let options = LoadOptions { max_rows: 4, max_logit_rows: 1, max_position: 64, block_size: 16 };
        let model = Model::load(backend, Arc::clone(&files), &options, &mut |_, _| {}).expect("loads");
        let reference = Arc::new(Cpu::new(1, Precision::F32, Isa::Portable).expect("threads start"));
        let serving = Arc::new(model);
        Self { probe: Probe::new(Arc::clone(&serving), reference).expect("loads"), serving, files }
    }

    fn run(
        &mut self,
        folder: &str,
        change: impl Fn(&mut SiteWeights),
    ) -> Result<ProbeReport, openlora_model::ModelError> {
        let mut weights = AdapterWeights::clone(&read_adapter(&fixture(folder), &self.files));
        weights.sites.iter_mut().for_each(change);
        self.probe.run(&weights)
    }
}

/// The bits of the last logits of a small step, as the step thread would compute it.
fn step(model: &Model<Cpu>) -> Vec<u32> {
    let (backend, spec) = (model.backend(), model.attention_spec());
    let mut act = model.new_activations().expect("memory");
    let mut pages = backend.new_pages(spec, model.layers(), 1).expect("memory");
    let sequences = [SequenceRows { row: 0, rows: 4, table: 0, blocks: 1 }];
    let (tokens, positions) = ([5, 9, 2, 7], [0, 1, 2, 3]);
    let rows =
        StepRows { tokens: &tokens, drawn: &[], positions: &positions, sequences: &sequences, block_tables: &[0] };
    let none = LoraRows { segments: &[] };
    model.forward(&mut act, &rows, &none, (&[3], &none), &mut pages).expect("fits");
    let logits = model.logits(&mut act, &[0], &none).expect("fits");
    backend.read_tensor(logits).iter().map(|logit| logit.to_bits()).collect()
}

fn passes(folder: &str, precision: Precision, report: &ProbeReport) {
    println!("{folder}, {precision:?}: {report:?}");
    report.verdict().unwrap_or_else(|why| panic!("{folder}, {precision:?}: {why}"));
    assert!(report.effect_max > 1e-4, "{folder} changes nothing: {report:?}");
    if precision == Precision::F32 {
        // Other kernels, the same numbers up to rounding.
        assert!(report.adapter.divergence.abs() < 1e-6 && report.base.divergence.abs() < 1e-6, "{folder}: {report:?}");
        assert!(report.adapter.same_top + 1 >= report.tokens, "{folder}: {report:?}");
    }
}

#[test]
fn adapters_on_every_family_pass_in_both_precisions() {
    for base in folders("adapters-tiny") {
        for precision in [Precision::Quantised, Precision::F32] {
            let mut bench = Bench::open(&fixture(&format!("models/{base}")), precision);
            for name in folders(&format!("adapters-tiny/{base}")) {
                let folder = format!("adapters-tiny/{base}/{name}");
                passes(&folder, precision, &bench.run(&folder, |_| ()).expect("fits"));
            }
        }
    }
}

#[test]
fn golden_and_trained_adapters_pass_on_the_real_model() {
    let mut bench = Bench::open(&real_model(), Precision::Quantised);
    for root in ["golden/adapters", "golden/trained"] {
        for name in folders(root) {
            let folder = format!("{root}/{name}");
            passes(&folder, Precision::Quantised, &bench.run(&folder, |_| ()).expect("fits"));
        }
    }
}

const ALL: &str = "adapters-tiny/llama3/all-linear";

fn tiny(precision: Precision) -> Bench {
    Bench::open(&fixture("models/llama3"), precision)
}

#[test]
fn a_scale_that_overflows_is_refused_whether_nan_comes_out_or_nothing() {
    for precision in [Precision::Quantised, Precision::F32] {
        // The residual stream overflows first in its norm's sum of squares, then itself.
        for scale in [1e7, 1e22, 1e30, 1e38] {
            let report = tiny(precision).run(ALL, |site| site.scale = scale).expect("fits");
            println!("scale {scale}: {report:?}");
            assert!(report.reference_lost > 0, "{report:?}");
            let why = report.verdict().expect_err("no next token");
            assert!(why.contains(&format!("in {} of 32 rows", report.lost)) && why.contains("too large"), "{why}");
        }
    }
}

#[test]
fn an_adapter_served_far_from_its_reference_is_refused_with_figure_and_bound() {
    // Keys that f32 holds and the f16 of the serving model's cache does not.
    let huge = |site: &mut SiteWeights| site.scale *= if site.site.module == Module::K { 1e8 } else { 1.0 };
    let report = tiny(Precision::Quantised).run(ALL, huge).expect("fits");
    println!("{report:?}");
    assert_eq!((report.lost, report.reference_lost), (0, 0), "the figures alone say it: {report:?}");
    let (figure, why) = (report.adapter.divergence, report.verdict().expect_err("far"));
    assert!(figure > 2.0 * PROBE_DIVERGENCE_MAX, "{report:?}");
    assert!(why.contains(&format!("{figure:.3} nats")) && why.contains(&PROBE_DIVERGENCE_MAX.to_string()), "{why}");
    tiny(Precision::F32).run(ALL, huge).expect("fits").verdict().expect("f32 holds them");
}

#[test]
fn factors_beyond_the_devices_format_are_refused_by_their_site() {
    let huge = |site: &mut SiteWeights| {
        let mut numbers = site.b.elements.to_f32_vec();
        numbers[0] = 1e6;
        site.b.elements = Elements::F32(numbers);
    };
    let error = tiny(Precision::Quantised).run(ALL, huge).expect_err("f16 cannot hold it");
    assert_eq!(error.fault(), Fault::Client);
    assert!(error.to_string().contains("proj") && error.to_string().contains("1000000"), "{error}");
}

#[test]
fn an_adapter_that_changes_nothing_says_so() {
    let zero = |site: &mut SiteWeights| site.b.elements = Elements::F32(vec![0.0; site.b.elements.len()]);
    let report = tiny(Precision::Quantised).run(ALL, zero).expect("fits");
    report.verdict().expect("the base model");
    assert_eq!((report.effect_max, report.adapter), (0.0, report.base));
}

#[test]
fn the_probe_gives_the_same_figures_every_time() {
    let mut bench = tiny(Precision::Quantised);
    let first = bench.run(ALL, |_| ()).expect("fits");
    bench.run(ALL, |site| site.scale = 1e30).expect("fits");
    assert_eq!(bench.run(ALL, |_| ()).expect("fits"), first);
}

#[test]
fn a_probe_beside_steps_of_the_same_model_changes_no_bit_of_either() {
    let mut bench = tiny(Precision::Quantised);
    let serving = Arc::clone(&bench.serving);
    let (logits, report) = (step(&serving), bench.run(ALL, |_| ()).expect("fits"));
    let weights = read_adapter(&fixture(ALL), &bench.files);
    std::thread::scope(|scope| {
        let steps = scope.spawn(|| (0..40).all(|_| step(&serving) == logits));
        loop {
            assert_eq!(bench.probe.run(&weights).expect("fits"), report);
            if steps.is_finished() {
                break;
            }
        }
        assert!(steps.join().expect("no panic"), "a step's logits changed");
    });
}
