//! Tiny random models of every family, from both containers, in f32 mode: what transformers answers.

use openlora_kernels::Precision;

use crate::support::{Adapter, Case, fixture, folders, load_adapter, open, read_cases};

fn check(model: &str, answers: &str) {
    open(&fixture(model), Precision::F32).check(&read_cases(answers, None));
}

#[test]
fn hugging_face_folders_of_every_family_answer_as_transformers_does() {
    let names = folders("models");
    for name in [
        "llama-yarn",
        "llama3",
        "mistral",
        "mistral-window",
        "qwen2",
        "qwen2-window-yarn",
        "qwen3",
        "qwen3-layer-types",
    ] {
        assert!(names.iter().any(|found| found == name), "fixtures/models/{name} is missing");
    }
    for name in names {
        check(&format!("models/{name}"), &format!("models/{name}/expected.json"));
    }
}

#[test]
fn gguf_files_answer_as_the_folders_they_were_converted_from() {
    for name in ["llama-yarn", "llama3", "mistral", "qwen2", "qwen3"] {
        check(&format!("models/tiny-{name}.gguf"), &format!("models/{name}/expected.json"));
    }
}

#[test]
fn a_gguf_file_with_every_format_answers_as_its_dequantised_numbers_do() {
    check("models/tiny-llama-mixed.gguf", "models/tiny-llama-mixed.expected.json");
}

#[test]
fn adapters_on_every_family_answer_as_peft_does() {
    let bases = folders("adapters-tiny");
    for base in ["llama-yarn", "llama3", "mistral-window", "qwen2", "qwen3"] {
        assert!(bases.iter().any(|found| found == base), "fixtures/adapters-tiny/{base} is missing");
    }
    for base in bases {
        let mut host = open(&fixture(&format!("models/{base}")), Precision::F32);
        let root = format!("adapters-tiny/{base}");
        let names: Vec<String> = folders(&root).iter().map(|name| format!("{root}/{name}")).collect();
        let adapters: Vec<Adapter> = names.iter().map(|folder| load_adapter(&host, folder)).collect();
        let cases = names.iter().zip(&adapters);
        let cases: Vec<Case<'_>> =
            cases.flat_map(|(folder, adapter)| read_cases(&format!("{folder}/expected.json"), Some(adapter))).collect();
        host.check(&cases);
    }
}
