//! The real model in f32 mode: what transformers and PEFT answer.

use openlora_kernels::Precision;

use crate::support::{Adapter, Case, folders, load_adapter, open, read_cases, real_model};

#[test]
fn the_base_model_answers_as_transformers_does() {
    let cases = read_cases("golden/base.json", None);
    assert_eq!(cases.len(), 6);
    open(&real_model(), Precision::F32).check(&cases);
}

/// Checks adapters given as `(folder, answers)`.
fn check_adapters(names: &[(String, String)]) {
    let mut host = open(&real_model(), Precision::F32);
    let adapters: Vec<Adapter> = names.iter().map(|(folder, _)| load_adapter(&host, folder)).collect();
    let cases: Vec<Case<'_>> =
        names.iter().zip(&adapters).flat_map(|((_, answers), adapter)| read_cases(answers, Some(adapter))).collect();
    host.check(&cases);
}

fn inside(root: &str) -> Vec<(String, String)> {
    folders(root).iter().map(|name| (format!("{root}/{name}"), format!("{root}/{name}/expected.json"))).collect()
}

#[test]
fn golden_adapters_answer_as_peft_does() {
    let names = inside("golden/adapters");
    assert_eq!(names.len(), 8);
    check_adapters(&names);
}

#[test]
fn trained_adapters_answer_as_peft_does() {
    let root = "golden/trained";
    let names = folders(root);
    assert_eq!(names, ["cwe-r8", "wordnet-r8"]);
    let pairs: Vec<_> =
        names.iter().map(|name| (format!("{root}/{name}"), format!("{root}/{name}.expected.json"))).collect();
    check_adapters(&pairs);
}

#[test]
fn adapters_of_every_configuration_answer_as_peft_does() {
    let names = inside("adapters");
    let known = [
        "alpha-odd",
        "bf16",
        "dora-embed-head",
        "dora-rslora",
        "embed-head",
        "embed-only",
        "exact-names",
        "exclude",
        "exclude-regex",
        "f32",
        "layers-int",
        "layers-pattern",
        "lm-head-only",
        "lora-bias",
        "pattern-order",
    ];
    for name in known {
        assert!(names.iter().any(|(folder, _)| folder.ends_with(&format!("/{name}"))), "{name} is missing");
    }
    check_adapters(&names);
}
