//! The CUDA backend on the emulated device (the kernels' own sources, compiled for the host), as a whole model: what transformers and
//! PEFT answer, eager and replayed.

use std::path::Path;
use std::sync::Arc;

use openlora_kernels::Backend;
use openlora_kernels::cuda::Cuda;
use openlora_kernels::cuda::device::Element;
use openlora_kernels::cuda::emulated::Emulated;
use openlora_model::conformance::replayed_passes_have_the_bits_of_run_ones;

use crate::support::{Host, fixture, folders, load_adapter, open_on, read_cases};

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
