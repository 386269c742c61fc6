//! Checks of a device: every operation against its reference, whole models against transformers and PEFT, replayed passes against run
//! ones, random steps with adapters that come and go. A check that fails is a line of the table; the others go on.

use std::any::Any;
use std::fmt::Write as _;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use openlora_kernels::Precision;
use openlora_kernels::conformance::{self as operations_of_backends, Rounding, operations, pages};
use openlora_kernels::cpu::{Cpu, Isa};
use openlora_kernels::cuda::Cuda;
use openlora_kernels::cuda::device::{Device, Element};
use openlora_kernels::cuda::lora::CudaAdapter;
use openlora_kernels::cuda::pages::CudaPages;
use openlora_model::ModelFiles;
use openlora_model::conformance::{
    Case, Host, Tolerance, drawn_tokens_give_the_bits_of_written_ones, replayed_passes_have_the_bits_of_run_ones,
};
use openlora_types::Limits;
use serde::Serialize;

use super::steps;
use crate::adapters::read_folder;
use crate::shapes::SMALL;

/// What is checked.
#[derive(Clone, Debug)]
pub struct Options {
    /// Numbers of the backends; the first serves.
    pub elements: Vec<Element>,
    /// The repository's `fixtures`.
    pub fixtures: PathBuf,
    /// Models of it at most.
    pub models_max: usize,
    /// Random steps.
    pub steps: usize,
    /// No random step is begun after this long.
    pub budget: Duration,
    /// What random steps start from.
    pub seed: u64,
}

/// A line of the table.
#[derive(Clone, Debug, Serialize)]
pub struct Finding {
    /// What was checked, with the element.
    pub check: String,
    /// How many cases.
    pub cases: usize,
    /// The largest difference, where there is one to tell.
    pub worst: Option<f64>,
    /// What it is a difference of.
    pub of: &'static str,
    /// How long it took.
    pub seconds: f64,
    /// What failed.
    pub failure: Option<String>,
}

/// What a check that passed has to say.
struct Passed {
    cases: usize,
    worst: Option<f64>,
    of: &'static str,
}

impl Passed {
    fn bits(cases: usize) -> Self {
        Self { cases, worst: None, of: "bit for bit" }
    }

    fn within(cases: usize, share: f32) -> Self {
        Self { cases, worst: Some(share.into()), of: "share of what is allowed" }
    }
}

struct Checks<'a> {
    findings: Vec<Finding>,
    told: &'a mut dyn FnMut(&Finding),
}

impl Checks<'_> {
    fn run(&mut self, check: String, body: impl FnOnce() -> Result<Passed>) {
        let began = Instant::now();
        let (passed, failure) = match catch_unwind(AssertUnwindSafe(body)) {
            Ok(Ok(passed)) => (passed, None),
            Ok(Err(error)) => (Passed { cases: 0, worst: None, of: "" }, Some(format!("{error:#}"))),
            Err(panic) => (Passed { cases: 0, worst: None, of: "" }, Some(message(&*panic))),
        };
        let Passed { cases, worst, of } = passed;
        let finding = Finding { check, cases, worst, of, seconds: began.elapsed().as_secs_f64(), failure };
        (self.told)(&finding);
        self.findings.push(finding);
    }
}

fn message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
    text.unwrap_or("a panic without a message").to_owned()
}

fn rounding(element: Element) -> Rounding {
    match element {
        Element::F32 => Rounding::F32,
        Element::Bf16 => Rounding::Floats(8),
        Element::F16 => Rounding::Floats(11),
    }
}

/// Of recorded answers, which are f32's: with numbers of 16 bits log-probabilities of the small models are this near.
fn tolerance(element: Element) -> Tolerance {
    match element {
        Element::F32 => Tolerance::F32,
        Element::Bf16 => Tolerance { logprob: 1.5, margin: 3.0 },
        Element::F16 => Tolerance { logprob: 0.1, margin: 0.2 },
    }
}

/// Of random steps from the exact backend.
fn distance(element: Element) -> f64 {
    match element {
        Element::F32 => 1e-4,
        Element::Bf16 => 5e-2,
        Element::F16 => 1e-2,
    }
}

fn poison<D: Device>(pages: &mut CudaPages<D>) {
    pages.poison().expect("a sound device");
}

fn backend<D: Device>(device: &Arc<D>, element: Element) -> Cuda<D> {
    Cuda::new(Arc::clone(device), element).expect("memory")
}

/// Runs all checks, telling each as it ends.
pub fn run<D: Device>(device: &Arc<D>, options: &Options, told: &mut dyn FnMut(&Finding)) -> Vec<Finding> {
    let mut checks = Checks { findings: Vec::new(), told };
    for &element in &options.elements {
        conformance(&mut checks, device, element);
    }
    for &element in &options.elements {
        golden(&mut checks, device, element, options);
    }
    for &element in &options.elements {
        checks.run(format!("replay against run, {}", element.suffix()), || replay(device, element, &options.fixtures));
        checks.run(format!("tokens taken on the device, {}", element.suffix()), || {
            drawn(device, element, &options.fixtures)
        });
    }
    for (i, &element) in options.elements.iter().enumerate() {
        // The numbers that serve get most of the steps; what the steps are compared with takes as long for all.
        let share = if i == 0 { (1.0, 1.0) } else { (0.1, 0.3) };
        checks.run(format!("random steps, {}", element.suffix()), || random_steps(device, element, share, options));
    }
    checks.findings
}

fn conformance<D: Device>(checks: &mut Checks<'_>, device: &Arc<D>, element: Element) {
    let (rounding, suffix) = (rounding(element), element.suffix());
    let new = || backend(device, element);
    let mut run = |what: &str, body: &dyn Fn() -> Passed| checks.run(format!("{what}, {suffix}"), || Ok(body()));
    run("linears against the reference", &|| {
        Passed::within(14 * 6, operations_of_backends::linear_agrees_with_reference(&new(), rounding))
    });
    run("rows of a linear alone and together", &|| {
        operations_of_backends::linear_rows_do_not_depend_on_up_to(&new(), steps::ROWS_MAX);
        Passed::bits(40)
    });
    run("norm, SwiGLU, picked rows", &|| {
        Passed::within(4 * 4, operations::row_operations_agree_with_reference(&new(), rounding))
    });
    run("rotary embedding and attention", &|| {
        Passed::within(5 * 2, operations::attention_agrees_with_reference(&new, rounding, poison))
    });
    run("adapters against the reference", &|| {
        Passed::within(9, operations::adapters_agree_with_reference(&new(), rounding, poison))
    });
    run("adapted rows alone and together", &|| {
        operations::adapted_rows_do_not_depend_on_each_other(&new(), poison);
        Passed::bits(6 * 40)
    });
    run("sampling", &|| Passed::within(2 * 9, operations::samples_agree_with_reference(&new())));
    run("pages that change owner", &|| {
        pages::pages_that_change_owner_give_the_same_bits_as_fresh_ones(&new(), poison);
        pages::a_page_has_one_owner(&new(), poison);
        Passed::bits(2)
    });
    run("adapters loaded beside steps", &|| {
        pages::adapters_are_loaded_on_other_threads_while_steps_run(&new(), poison);
        Passed::bits(40)
    });
}

fn open<D: Device>(device: &Arc<D>, element: Element, model: &Path) -> Result<Host<Cuda<D>>> {
    let files = ModelFiles::open(model, &Limits::default()).with_context(|| model.display().to_string())?;
    let mut host = Host::new(Arc::new(backend(device, element)), Arc::new(files), poison);
    host.tolerance = tolerance(element);
    Ok(host)
}

/// The subfolders of a folder, by name.
fn folders(path: &Path) -> Result<Vec<PathBuf>> {
    let entries = std::fs::read_dir(path).with_context(|| path.display().to_string())?;
    let mut found: Vec<PathBuf> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
    found.retain(|path| path.is_dir());
    found.sort();
    Ok(found)
}

fn golden<D: Device>(checks: &mut Checks<'_>, device: &Arc<D>, element: Element, options: &Options) {
    let suffix = element.suffix();
    let models = options.fixtures.join("models");
    checks.run(format!("models against transformers, {suffix}"), || {
        let (mut cases, mut worst) = (0, 0.0_f64);
        for model in folders(&models)?.into_iter().take(options.models_max) {
            let mut host = open(device, element, &model)?;
            let answers = Case::read(&model.join("expected.json"), None);
            worst = worst.max(host.check(&answers));
            cases += answers.len();
        }
        Ok(Passed { cases, worst: Some(worst), of: "log-probability" })
    });
    checks.run(format!("adapters against PEFT, {suffix}"), || {
        let (mut cases, mut worst) = (0, 0.0_f64);
        for base in folders(&options.fixtures.join("adapters-tiny"))?.into_iter().take(options.models_max) {
            let mut host = open(device, element, &models.join(base.file_name().context("a named folder")?))?;
            let folders = folders(&base)?;
            let loaded = folders.iter().map(|folder| Ok(host.load(&*read_folder(folder, host.files())?)));
            let loaded = loaded.collect::<Result<Vec<_>>>()?;
            let answers: Vec<_> = folders
                .iter()
                .zip(&loaded)
                .flat_map(|(folder, adapter)| Case::read(&folder.join("expected.json"), Some(adapter)))
                .collect();
            worst = worst.max(host.check(&answers));
            cases += answers.len();
        }
        Ok(Passed { cases, worst: Some(worst), of: "log-probability" })
    });
}

/// A model and two adapters of its.
type Adapted<D> = (Host<Cuda<D>>, [CudaAdapter<D>; 2]);

fn adapted<D: Device>(device: &Arc<D>, element: Element, fixtures: &Path) -> Result<Adapted<D>> {
    let host = open(device, element, &fixtures.join("models/llama3"))?;
    let load = |name: &str| -> Result<_> {
        Ok(host.load(&*read_folder(&fixtures.join("adapters-tiny/llama3").join(name), host.files())?))
    };
    let adapters = [load("all-linear")?, load("embed-head")?];
    Ok((host, adapters))
}

fn drawn<D: Device>(device: &Arc<D>, element: Element, fixtures: &Path) -> Result<Passed> {
    let (mut host, adapters) = adapted(device, element, fixtures)?;
    Ok(Passed::bits(drawn_tokens_give_the_bits_of_written_ones(&mut host, &adapters)))
}

fn replay<D: Device>(device: &Arc<D>, element: Element, fixtures: &Path) -> Result<Passed> {
    let (mut host, adapters) = adapted(device, element, fixtures)?;
    let compared = replayed_passes_have_the_bits_of_run_ones(&mut host, &adapters);
    let recorded = host.model.backend().recorded();
    anyhow::ensure!(recorded == 2, "{recorded} passes were recorded, not one without and one with adapters");
    Ok(Passed::bits(compared))
}

fn random_steps<D: Device>(
    device: &Arc<D>,
    element: Element,
    (steps, time): (f64, f64),
    options: &Options,
) -> Result<Passed> {
    let scratch = tempfile::tempdir()?;
    let path = scratch.path().join("model.gguf");
    SMALL.write(&path)?;
    let files = Arc::new(ModelFiles::open(&path, &Limits::default())?);
    let cpu = Arc::new(Cpu::new(2, Precision::F32, Isa::detect())?);
    let mut exact = Host::new(cpu, Arc::clone(&files), |pages| pages.fill(f32::NAN));
    let mut host = Host::with_pages(Arc::new(backend(device, element)), files, poison, steps::PAGES);
    let limits = steps::Limits {
        steps: (options.steps as f64 * steps).ceil() as usize,
        until: Instant::now() + options.budget.mul_f64(time),
        distance: distance(element),
        seed: options.seed,
    };
    let outcome = steps::run(&mut host, &mut exact, limits);
    let steps::Outcome { steps, compared, exact, loads, distance } = outcome;
    anyhow::ensure!(steps > 0 && compared >= steps && loads > 0, "{outcome:?}");
    anyhow::ensure!(host.model.backend().recorded() > 0, "no pass was recorded in {steps} steps");
    anyhow::ensure!(steps == limits.steps, "{steps} of {} steps were done in time: {outcome:?}", limits.steps);
    Ok(Passed { cases: steps, worst: (exact > 0).then_some(distance), of: "||logits - exact|| / ||exact||" })
}

/// All findings as a table in Markdown.
#[must_use]
pub fn table(findings: &[Finding]) -> String {
    let mut text = String::from("| check | cases | worst difference | seconds | |\n|---|---:|---|---:|---|\n");
    for Finding { check, cases, worst, of, seconds, failure } in findings {
        let worst = worst.map_or_else(|| (*of).to_owned(), |worst| format!("{worst:.2e} {of}"));
        let verdict = failure.as_ref().map_or_else(|| "pass".to_owned(), |why| format!("**FAIL** {}", one_line(why)));
        // Writing to a string does not fail.
        let _ = writeln!(text, "| {check} | {cases} | {worst} | {seconds:.1} | {verdict} |");
    }
    text
}

fn one_line(text: &str) -> String {
    text.replace('|', "/").split_whitespace().collect::<Vec<_>>().join(" ")
}
