//! The CUDA backend on the emulated device (the kernels' own sources, compiled for the host), as a whole model: what transformers and
//! PEFT answer, eager and replayed.

use std::path::Path;
use std::sync::Arc;

use openlora_kernels::Backend;
use openlora_kernels::cuda::Cuda;
use openlora_kernels::cuda::device::Element;
use openlora_kernels::cuda::emulated::Emulated;
use openlora_model::conformance::{
    drawn_tokens_give_the_bits_of_written_ones, replayed_passes_have_the_bits_of_run_ones,
};

use crate::support::{Host, Rows, blocks_for, fixture, folders, load_adapter, open_on, read_cases};

type Adapter = <Cuda<Emulated> as Backend>::Adapter;

fn open(model: &Path, element: Element) -> Host<Cuda<Emulated>> {
    let device = Emulated::new(7).expect("the emulated device");
    let backend = Arc::new(Cuda::new(device, element).expect("memory"));
    open_on(backend, model, |pages| pages.poison().expect("a sound device"))
}

#[test]
fn every_family_answers_as_transformers_does() {
    for name in folders("models") {
        let mut host = open(&fixture(&format!("models/{name}")), Element::F32);
        host.check(&read_cases(&format!("models/{name}/expected.json"), None));
        assert!(host.model.backend().recorded() > 0, "{name}: no step was recorded");
    }
}

#[test]
fn adapters_on_every_family_answer_as_peft_does() {
    for base in folders("adapters-tiny") {
        let mut host = open(&fixture(&format!("models/{base}")), Element::F32);
        let root = format!("adapters-tiny/{base}");
        let names: Vec<String> = folders(&root).iter().map(|name| format!("{root}/{name}")).collect();
        let adapters: Vec<Adapter> = names.iter().map(|folder| load_adapter(&host, folder)).collect();
        let cases = names.iter().zip(&adapters);
        let cases: Vec<_> =
            cases.flat_map(|(folder, adapter)| read_cases(&format!("{folder}/expected.json"), Some(adapter))).collect();
        host.check(&cases);
        assert!(host.model.backend().recorded() > 0, "{base}: no step was recorded");
    }
}

#[test]
fn a_replayed_pass_has_the_bits_of_an_eager_one_whatever_adapters_are_in_it() {
    for element in [Element::F32, Element::Bf16, Element::F16] {
        let mut host = open(&fixture("models/llama3"), element);
        let adapters =
            ["all-linear", "embed-head"].map(|name| load_adapter(&host, &format!("adapters-tiny/llama3/{name}")));
        replayed_passes_have_the_bits_of_run_ones(&mut host, &adapters);
        // One recording without adapters and one with any, for all counts and mixes.
        assert_eq!(host.model.backend().recorded(), 2, "{element:?}");
    }
}

#[test]
fn a_step_with_drawn_tokens_has_the_bits_of_one_that_is_given_them_eager_and_replayed() {
    for element in [Element::F32, Element::Bf16] {
        let mut host = open(&fixture("models/llama3"), element);
        let adapters =
            ["all-linear", "embed-head"].map(|name| load_adapter(&host, &format!("adapters-tiny/llama3/{name}")));
        assert_eq!(drawn_tokens_give_the_bits_of_written_ones(&mut host, &adapters), 14);
        // The steps with a chunk in them ran; the others were replayed.
        assert_eq!(host.model.backend().recorded(), 2, "{element:?}");
    }
}

/// Decode steps of several sizes with steps of other kinds between them: the logits' bits, all of finite numbers.
fn mixed_steps(host: &mut Host<Cuda<Emulated>>) -> Vec<u32> {
    let [all_linear, embed_head] =
        ["all-linear", "embed-head"].map(|name| load_adapter(host, &format!("adapters-tiny/llama3/{name}")));
    let adapters = [Some(&all_linear), None, None, Some(&embed_head)];
    let prompts: [&[u32]; 4] = [&[1, 2, 3, 4, 5], &[9], &[7; 20], &[30, 29, 28]];
    let tables: Vec<Vec<u32>> = (0..4).map(|i| blocks_for(32, i * 2)).collect();
    let prompt = |i: usize| Rows { tokens: prompts[i], start: 0, blocks: &tables[i], adapter: adapters[i] };
    let next = |i: usize, step: usize| {
        let start = prompts[i].len() + step;
        Rows { tokens: &[11], start, blocks: &tables[i], adapter: adapters[i] }
    };
    host.forget();
    let mut logits = host.step(&[prompt(0), prompt(1), prompt(2), prompt(3)]);
    logits.extend(host.step(&[next(0, 0), next(1, 0), next(2, 0), next(3, 0)]));
    // Fewer rows are wanted than the replayed pass after it has.
    logits.push(host.step_wanted(&[prompt(2)], &[19]));
    logits.extend(host.step(&[next(0, 1), next(1, 1), next(2, 0)]));
    logits.extend(host.step(&[next(1, 2)]));
    logits.extend(host.step(&[next(1, 3), next(2, 1)]));
    let logits = logits.concat();
    assert!(logits.iter().all(|logit| logit.is_finite()));
    logits.into_iter().map(f32::to_bits).collect()
}

#[test]
fn passes_recorded_before_they_are_needed_give_the_same_bits_and_no_other_is_recorded() {
    for element in [Element::F32, Element::Bf16] {
        let [mut lazy, mut ready] = [(); 2].map(|()| open(&fixture("models/llama3"), element));
        // Of one, two and four rows, without adapters and with.
        assert_eq!(ready.get_ready(3), 6);
        assert_eq!(ready.model.backend().recorded(), 6, "{element:?}");
        assert_eq!(mixed_steps(&mut ready), mixed_steps(&mut lazy), "{element:?}");
        assert_eq!(ready.model.backend().recorded(), 6, "{element:?}");
    }
}
