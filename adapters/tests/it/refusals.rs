//! What is wrong with an adapter is refused, and the field or tensor is named.

use std::{fs, time::Instant};

use openlora_adapters::{AdapterError, Header, LoraConfig, inspect_folder};
use openlora_types::{Classify, Fault, Limits};
use serde_json::json;
use tempfile::TempDir;

use crate::make::{Adapter, Tensor, safetensors_raw, shape, write_files};

/// The field and the whole message of a refusal.
fn refused(error: AdapterError) -> (String, String) {
    assert_eq!((error.fault(), error.is_retryable()), (Fault::Client, false), "{error}");
    let text = error.to_string();
    match error {
        AdapterError::Invalid(field) => (field.field, text),
        other => panic!("not a refused field: {other}"),
    }
}

#[test]
fn a_configuration_is_refused_by_the_name_of_its_field() {
    // Field to set, its value as JSON text, the field named, words of the reason.
    const CASES: &[(&str, &str, &str, &str)] = &[
        ("r", "0", "r", "at least 1"),
        ("r", "-5", "r", "at least 1"),
        ("r", "2147483648", "r", "lora_rank_max"),
        ("r", "1e400", "r", "JSON"),
        ("r", "8.0", "r", "whole number"),
        ("r", "true", "r", "whole number"),
        ("r", "\"8\"", "r", "whole number"),
        ("lora_alpha", "NaN", "lora_alpha", "NaN"),
        ("lora_alpha", "-Infinity", "lora_alpha", "Infinity"),
        ("lora_alpha", "\"16\"", "lora_alpha", "number"),
        ("lora_alpha", "true", "lora_alpha", "number"),
        ("lora_alpha", "1e300", "lora_alpha", "not finite"),
        ("rank_pattern", r#"{"q_proj": 0}"#, "rank_pattern[q_proj]", "at least 1"),
        ("rank_pattern", r#"{"q_proj": 1000}"#, "rank_pattern[q_proj]", "lora_rank_max"),
        ("rank_pattern", r#"{"q_proj": 2, "q_proj": 4}"#, "rank_pattern.q_proj", "twice"),
        ("rank_pattern", r#"{"(": 2}"#, "rank_pattern", "not closed"),
        ("rank_pattern", "[]", "rank_pattern", "object"),
        ("alpha_pattern", r#"{"q_proj": NaN}"#, "alpha_pattern.q_proj", "NaN"),
        ("alpha_pattern", r#"{"q_proj": null}"#, "alpha_pattern[q_proj]", "number"),
        ("peft_type", "\"LOHA\"", "peft_type", "LORA"),
        ("peft_type", "null", "peft_type", "PEFT"),
        ("task_type", "\"SEQ_CLS\"", "task_type", "CAUSAL_LM"),
        ("bias", "\"all\"", "bias", "none"),
        ("bias", "\"lora_only\"", "bias", "none"),
        ("modules_to_save", r#"["lm_head"]"#, "modules_to_save", "replaces"),
        ("alora_invocation_tokens", "[1, 2]", "alora_invocation_tokens", "aLoRA"),
        ("trainable_token_indices", "[5]", "trainable_token_indices", "embedding"),
        ("layer_replication", "[[0, 1]]", "layer_replication", "layers"),
        ("target_parameters", r#"["mlp.experts"]"#, "target_parameters", "parameters"),
        ("use_qalora", "true", "use_qalora", "QA-LoRA"),
        ("use_bdlora", r#"{"nblocks": 2}"#, "use_bdlora", "BD-LoRA"),
        ("arrow_config", r#"{"top_k": 3}"#, "arrow_config", "Arrow"),
        ("kasa_config", r#"{"beta": 1}"#, "kasa_config", "KaSA"),
        ("velora_config", r#"{"scale": 1}"#, "velora_config", "VeLoRA"),
        ("monteclora_config", r#"{"a": 1}"#, "monteclora_config", "MonteCLoRA"),
        ("megatron_config", r#"{"a": 1}"#, "megatron_config", "Megatron"),
        ("init_lora_weights", "\"pissa\"", "init_lora_weights", "path_initial_model_for_weight_conversion"),
        ("init_lora_weights", "\"pissa_niter_16\"", "init_lora_weights", "base weights"),
        ("init_lora_weights", "\"olora\"", "init_lora_weights", "base weights"),
        ("init_lora_weights", "\"loftq\"", "init_lora_weights", "base weights"),
        ("init_lora_weights", "\"corda\"", "init_lora_weights", "base weights"),
        ("init_lora_weights", "\"lora_ga\"", "init_lora_weights", "base weights"),
        ("init_lora_weights", "\"tomorrow\"", "init_lora_weights", "tomorrow"),
        ("use_quantum_lora", "true", "use_quantum_lora", "not known"),
        ("use_quantum_lora", r#"{"depth": 1}"#, "use_quantum_lora", "not known"),
        ("use_dora", "1", "use_dora", "true or false"),
        ("target_modules", "[]", "target_modules", "empty"),
        ("target_modules", "[1]", "target_modules", "strings"),
        ("target_modules", "{}", "target_modules", "list"),
        ("target_modules", r#"[["q_proj"]]"#, "target_modules", "strings"),
        ("target_modules", "\"q_proj\"", "target_modules", "selects no module"),
        ("target_modules", r#"["c_attn"]"#, "target_modules", "selects no module"),
        ("target_modules", r#"["self_attn"]"#, "target_modules", "not a linear"),
        ("target_modules", "\".*norm\"", "target_modules", "not a linear"),
        ("target_modules", r#""(q_proj""#, "target_modules", "not closed"),
        ("target_modules", r#""(?i).*Q_PROJ""#, "target_modules", "flags"),
        ("target_modules", r#""((?=.*a)(.*)*)*b""#, "target_modules", "steps"),
        ("exclude_modules", "\"[\"", "exclude_modules", "not closed"),
        ("exclude_modules", "7", "exclude_modules", "list"),
        ("layers_to_transform", "[0.5]", "layers_to_transform", "whole numbers"),
        ("layers_to_transform", "[7]", "target_modules", "selects no module"),
        ("layers_pattern", "\"layers\"", "layers_pattern", "layers_to_transform"),
        (
            "lora_dropout",
            r#"{"a": {"a": {"a": {"a": {"a": {"a": {"a": {"a": {"a": {"a": {"a": {"a": {"a": {"a": {"a":
            {"a": {"a": 1}}}}}}}}}}}}}}}}}"#,
            "lora_dropout.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a",
            "deep",
        ),
    ];
    let dir = TempDir::new().expect("a temporary folder");
    let good = Adapter::qv(2, 1);
    for &(field, value, named, words) in CASES {
        let mut fields = good.config.as_object().expect("an object").clone();
        fields.remove(field);
        let rest = serde_json::Value::Object(fields).to_string();
        let config = format!("{{\"{field}\": {value}, {}", &rest[1..]);
        write_files(dir.path(), config.as_bytes(), &good.tensor_bytes());
        let found = inspect_folder(dir.path(), &shape(), &Limits::default());
        let (at, text) = match found {
            Err(error) => refused(error),
            Ok(found) => {
                assert_eq!(found.generation, None, "{field} = {value} is accepted");
                let text = found.problems[0].clone();
                (text.split(" selects ").next().unwrap_or(&text).to_owned(), text)
            }
        };
        assert!(
            at.starts_with(&format!("adapter_config.json: {named}")) && text.contains(words),
            "{field} = {value}: {text}"
        );
    }
}

#[test]
fn combinations_that_peft_does_not_have_are_refused() {
    for (fields, named) in [
        (json!({"lora_bias": true, "use_dora": true}), "lora_bias"),
        (json!({"target_modules": ".*q_proj", "layers_to_transform": [0]}), "layers_to_transform"),
        (json!({"target_modules": "all-linear", "layers_to_transform": 0}), "layers_to_transform"),
        (json!({"lora_bias": true, "target_modules": ["embed_tokens"]}), "lora_bias"),
        (json!({"ensure_weight_tying": true, "target_modules": ["lm_head"]}), "ensure_weight_tying"),
    ] {
        let dir = TempDir::new().expect("a temporary folder");
        let mut adapter = Adapter::qv(2, 1);
        for (field, value) in fields.as_object().expect("an object") {
            adapter.set(field, value.clone());
        }
        adapter.write(dir.path());
        let text = match inspect_folder(dir.path(), &shape(), &Limits::default()) {
            Err(error) => refused(error).1,
            Ok(found) => found.problems[0].clone(),
        };
        assert!(text.starts_with(&format!("adapter_config.json: {named} ")), "{text}");
    }
}

#[test]
fn fields_that_change_nothing_at_inference_are_accepted() {
    let dir = TempDir::new().expect("a temporary folder");
    let mut plain = Adapter::qv(2, 1);
    plain.write(dir.path());
    let generation = inspect_folder(dir.path(), &shape(), &Limits::default()).expect("plain").generation;
    assert!(generation.is_some());
    for (field, value) in [
        ("inference_mode", json!(false)),
        ("lora_dropout", json!(0.1)),
        ("fan_in_fan_out", json!(true)),
        ("base_model_name_or_path", json!("someone/else")),
        ("revision", json!("main")),
        ("auto_mapping", json!({"base_model_class": "LlamaForCausalLM"})),
        ("peft_version", json!("0.99.0")),
        ("megatron_core", json!("megatron.core")),
        ("qalora_group_size", json!(32)),
        ("loftq_config", json!({"loftq_bits": 4})),
        ("eva_config", json!({"rho": 2.0})),
        ("init_lora_weights", json!("eva")),
        ("init_lora_weights", json!("gaussian")),
        ("init_lora_weights", json!(false)),
        ("runtime_config", json!({"ephemeral_gpu_offload": true})),
        ("ensure_weight_tying", json!(true)),
        ("modules_to_save", json!([])),
        ("alora_invocation_tokens", json!([])),
        ("rank_pattern", json!(null)),
        ("exclude_modules", json!("")),
        ("layers_to_transform", json!([])),
        ("layers_pattern", json!([])),
        ("a_field_of_the_future", json!(null)),
        ("use_something_of_the_future", json!(false)),
    ] {
        plain.set(field, value);
        plain.write(dir.path());
        let found = inspect_folder(dir.path(), &shape(), &Limits::default()).expect(field);
        assert_eq!(found.generation, generation, "{field} changes the adapter");
    }
}

#[test]
fn long_lists_and_files_run_into_their_named_limits() {
    let limits = Limits { adapter_list_max: 4, adapter_config_bytes_max: 4_096, ..Limits::default() };
    let config = |field: &str, value: serde_json::Value| {
        let mut adapter = Adapter::qv(2, 1);
        adapter.set(field, value);
        LoraConfig::parse(&adapter.config_bytes(), &limits).expect_err(field)
    };
    for field in ["target_modules", "exclude_modules", "layers_pattern"] {
        assert!(config(field, json!(vec!["a"; 5])).to_string().contains("adapter_list_max is 4"), "{field}");
    }
    assert!(config("layers_to_transform", json!(vec![0; 5])).to_string().contains("adapter_list_max"));
    let many: serde_json::Map<_, _> = (0..5).map(|i| (format!("p{i}"), json!(1))).collect();
    assert!(config("rank_pattern", json!(many)).to_string().contains("adapter_list_max"));
    assert!(config("revision", json!("x".repeat(5_000))).to_string().contains("adapter_config_bytes_max is 4096"));
}

/// A header of one F32 tensor `t` of 4 numbers, with `entry` in place of its description.
fn one(entry: &str) -> (String, usize) {
    (format!(r#"{{"t": {entry}}}"#), 16)
}

#[test]
fn a_broken_safetensors_header_is_refused_by_the_name_of_its_tensor() {
    let two = |a: &str, b: &str| {
        let tensor = |offsets: &str| format!(r#"{{"dtype": "F32", "shape": [2], "data_offsets": {offsets}}}"#);
        (format!(r#"{{"a": {}, "b": {}}}"#, tensor(a), tensor(b)), 16)
    };
    let good = r#"{"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}"#;
    let cases: Vec<((String, usize), &str, &str)> = vec![
        (one(r#"{"dtype": "F32", "shape": [4], "data_offsets": [0, 12]}"#), "t", "spans bytes 0 to 12"),
        (one(r#"{"dtype": "F32", "shape": [4], "data_offsets": [16, 0]}"#), "t", "spans"),
        (one(r#"{"dtype": "F32", "shape": [4], "data_offsets": [-1, 15]}"#), "t", "bad header"),
        (one(r#"{"dtype": "F32", "shape": [4], "data_offsets": [0]}"#), "t", "bad header"),
        (one(r#"{"dtype": "F32", "shape": [4294967296, 4294967296], "data_offsets": [0, 16]}"#), "t", "overflows"),
        (one(r#"{"dtype": "F32", "shape": [4611686018427387904], "data_offsets": [0, 16]}"#), "t", "overflows"),
        (one(r#"{"dtype": "F32", "shape": [1e30], "data_offsets": [0, 16]}"#), "t", "bad header"),
        (one(r#"{"dtype": "F32", "shape": [1,1,1,1,1,1,1,1,1,4], "data_offsets": [0, 16]}"#), "t", "dimensions"),
        (one(r#"{"dtype": "I64", "shape": [2], "data_offsets": [0, 16]}"#), "t", "I64"),
        (one(r#"{"dtype": "F8_E4M3", "shape": [16], "data_offsets": [0, 16]}"#), "t", "F8_E4M3"),
        (one(r#"{"dtype": "F32", "shape": [4]}"#), "t", "data_offsets"),
        (one(r#"{"dtype": "F32", "dtype": "F16", "shape": [4], "data_offsets": [0, 16]}"#), "t", "twice"),
        (one(r#"{"dtype": "F32", "shape": [4], "data_offsets": [0, 16], "strides": [1]}"#), "t", "strides"),
        (one("null"), "t", "bad header"),
        (two("[0, 8]", "[4, 12]"), "b", "overlaps"),
        (two("[0, 8]", "[0, 8]"), "b", "overlaps"),
        (two("[0, 8]", "[12, 20]"), "b", "gap"),
        (two("[4, 12]", "[12, 20]"), "a", "gap"),
        (two("[0, 8]", "[8, 16]"), "", ""),
        ((format!(r#"{{"t": {good}, "t": {good}}}"#), 16), "t", "twice"),
        ((format!(r#"{{"t": {good}}}"#), 12), "t", "truncated"),
        ((format!(r#"{{"t": {good}}}"#), 20), "t", "no tensor"),
        ((format!(r#"{{"{}": {good}}}"#, "n".repeat(600)), 16), "nnn", "longer"),
        ((r#"{"__metadata__": {"format": 7}}"#.into(), 0), "__metadata__", "bad header"),
        (("{}".into(), 4), "", "no tensor"),
        (("[]".into(), 0), "", "not a JSON object"),
        ((format!(r#"{{"t": {good}"#), 16), "", "bad header"),
        (("{".repeat(100_000), 0), "", "bad header"),
    ];
    for ((header, data), tensor, words) in cases {
        let parsed = Header::parse(header.as_bytes(), data as u64, &Limits::default());
        if words.is_empty() {
            parsed.expect("two tensors side by side");
            continue;
        }
        let (field, text) = refused(parsed.expect_err(&header));
        let wanted = if tensor.is_empty() {
            "adapter_model.safetensors".into()
        } else {
            format!("adapter_model.safetensors: {tensor}")
        };
        assert!(
            field.starts_with(&wanted) && text.contains(words) && text.len() < 1_000,
            "{header:.200}: {text:.1000}"
        );
    }
}

#[test]
fn a_safetensors_file_with_a_lying_length_is_refused_before_anything_is_allocated() {
    let dir = TempDir::new().expect("a temporary folder");
    let good = Adapter::qv(2, 1);
    let whole = good.tensor_bytes();
    let length = |claimed: u64| {
        let mut bytes = whole.clone();
        bytes[..8].copy_from_slice(&claimed.to_le_bytes());
        bytes
    };
    for (bytes, words) in [
        (Vec::new(), "too short"),
        (vec![1, 2, 3], "too short"),
        (length(1 << 63), "safetensors_header_bytes_max"),
        (length(u64::MAX), "safetensors_header_bytes_max"),
        (length(1 << 20), "truncated"),
        (length(0), "not a JSON object"),
        (length(10), "bad header"),
        (whole[..whole.len() - 1].to_vec(), "truncated"),
        (whole[..40].to_vec(), "truncated"),
    ] {
        write_files(dir.path(), &good.config_bytes(), &bytes);
        let (field, text) = refused(inspect_folder(dir.path(), &shape(), &Limits::default()).expect_err(words));
        assert!(field.starts_with("adapter_model.safetensors") && text.contains(words), "{text}");
    }
}

#[test]
fn a_hundred_thousand_tensors_run_into_the_named_limit() {
    let entries: Vec<_> =
        (0..100_000).map(|i| format!(r#""t{i}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}"#)).collect();
    let header = format!("{{{}}}", entries.join(","));
    let (_, text) = refused(Header::parse(header.as_bytes(), 0, &Limits::default()).expect_err("too many"));
    assert!(text.contains("adapter_tensors_max, 32768"), "{text}");
    let bytes = safetensors_raw(&header, &[]);
    let dir = TempDir::new().expect("a temporary folder");
    write_files(dir.path(), &Adapter::qv(2, 1).config_bytes(), &bytes);
    let small = Limits { safetensors_header_bytes_max: 1 << 20, ..Limits::default() };
    let (_, text) = refused(inspect_folder(dir.path(), &shape(), &small).expect_err("too long"));
    assert!(text.contains("safetensors_header_bytes_max is 1048576"), "{text}");
}

type Change = fn(&mut Adapter);

#[test]
fn a_tensor_that_does_not_fit_is_refused_by_name() {
    const Q0: &str = "base_model.model.model.layers.0.self_attn.q_proj";
    let cases: &[(&str, Change, &str, &str)] = &[
        (
            "rank of A",
            |a| a.find("0.self_attn.q_proj.lora_A.weight").shape = vec![1, 16],
            "0.self_attn.q_proj.lora_A",
            "[1, 16]",
        ),
        (
            "transposed A",
            |a| a.find("0.self_attn.q_proj.lora_A.weight").shape = vec![8, 2],
            "0.self_attn.q_proj.lora_A",
            "[8, 2]",
        ),
        ("flat B", |a| a.find("1.self_attn.v_proj.lora_B.weight").shape = vec![8], "1.self_attn.v_proj.lora_B", "[8]"),
        ("rank of the configuration", |a| a.set("r", json!(4)), "lora_A.weight", "must have [4, 8]"),
        (
            "NaN",
            |a| a.find("0.self_attn.v_proj.lora_B.weight").bytes[..4].copy_from_slice(&f32::NAN.to_le_bytes()),
            "0.self_attn.v_proj.lora_B.weight",
            "NaN",
        ),
        (
            "infinity in the last number",
            |a| {
                let tensor = a.find("1.self_attn.v_proj.lora_A.weight");
                let end = tensor.bytes.len();
                tensor.bytes[end - 4..].copy_from_slice(&f32::NEG_INFINITY.to_le_bytes());
            },
            "1.self_attn.v_proj.lora_A.weight",
            "infinity",
        ),
        (
            "half NaN",
            |a| {
                let tensor = a.find("0.self_attn.q_proj.lora_A.weight");
                (tensor.dtype, tensor.bytes) = ("F16", vec![0; 32]);
                tensor.bytes[30..].copy_from_slice(&[0x01, 0x7c]);
            },
            "0.self_attn.q_proj.lora_A.weight",
            "NaN",
        ),
        (
            "bfloat infinity",
            |a| {
                let tensor = a.find("0.self_attn.q_proj.lora_A.weight");
                (tensor.dtype, tensor.bytes) = ("BF16", vec![0; 32]);
                tensor.bytes[..2].copy_from_slice(&[0x80, 0x7f]);
            },
            "0.self_attn.q_proj.lora_A.weight",
            "infinity",
        ),
        (
            "A missing",
            |a| a.tensors.retain(|t| t.name != format!("{Q0}.lora_A.weight")),
            "0.self_attn.q_proj.lora_A",
            "missing",
        ),
        ("a site missing", |a| a.tensors.retain(|t| !t.name.starts_with(Q0)), "0.self_attn.q_proj.lora_A", "missing"),
        (
            "a site too many",
            |a| a.linear("model.layers.0.self_attn.k_proj", 2, (8, 4), 9),
            "k_proj.lora_A",
            "does not target",
        ),
        (
            "another model's layer",
            |a| a.linear("model.layers.2.self_attn.q_proj", 2, (8, 8), 9),
            "layers.2.",
            "trained on another",
        ),
        (
            "another model's module",
            |a| a.linear("model.layers.0.attn.c_attn", 2, (8, 8), 9),
            "c_attn",
            "matches no module",
        ),
        (
            "no prefix",
            |a| {
                a.find("0.self_attn.q_proj.lora_A.weight").name = "model.layers.0.self_attn.q_proj.lora_A.weight".into()
            },
            "model.layers.0.self_attn.q_proj.lora_A.weight",
            "does not start with",
        ),
        (
            "twice",
            |a| {
                let mut again = a.find("0.self_attn.q_proj.lora_A.weight").clone();
                again.name = format!("{Q0}.lora_A.default.weight");
                a.tensors.push(again);
            },
            "0.self_attn.q_proj.lora_A.default.weight",
            "second time",
        ),
        (
            "another adapter's name",
            |a| a.find("0.self_attn.q_proj.lora_A.weight").name = format!("{Q0}.lora_A.other.weight"),
            "lora_A.other.weight",
            "not a factor",
        ),
        (
            "magnitudes without DoRA",
            |a| a.tensor("model.layers.0.self_attn.q_proj.lora_magnitude_vector", &[8]),
            "0.self_attn.q_proj.lora_magnitude_vector",
            "switched off",
        ),
        ("DoRA without magnitudes", |a| a.set("use_dora", json!(true)), "lora_magnitude_vector", "missing"),
        (
            "bias without lora_bias",
            |a| a.tensor("model.layers.0.self_attn.q_proj.lora_B.bias", &[8]),
            "lora_B.bias",
            "switched off",
        ),
        ("lora_bias without bias", |a| a.set("lora_bias", json!(true)), "lora_B.bias", "missing"),
        (
            "a trained base bias",
            |a| a.tensor("model.layers.0.self_attn.q_proj.base_layer.bias", &[8]),
            "base_layer.bias",
            "not a factor",
        ),
        ("modules_to_save", |a| a.tensor("model.norm.weight", &[8]), "model.norm.weight", "not a factor"),
        (
            "trained tokens",
            |a| a.tensor("model.embed_tokens.token_adapter.trainable_tokens_delta", &[1, 8]),
            "delta",
            "not a factor",
        ),
        ("a resized vocabulary", |a| a.tensor("lm_head.weight", &[17, 8]), "lm_head.weight", "resized"),
        (
            "embedding factors on a linear",
            |a| a.tensor("model.layers.0.self_attn.k_proj.lora_embedding_A", &[2, 8]),
            "k_proj",
            "embedding",
        ),
        (
            "linear factors on the embedding",
            |a| a.tensor("model.embed_tokens.lora_A.weight", &[2, 16]),
            "embed_tokens",
            "linear",
        ),
    ];
    let dir = TempDir::new().expect("a temporary folder");
    for (what, change, tensor, words) in cases {
        let mut adapter = Adapter::qv(2, 1);
        change(&mut adapter);
        adapter.write(dir.path());
        let found = inspect_folder(dir.path(), &shape(), &Limits::default()).expect(what);
        assert_eq!(found.generation, None, "{what} is accepted");
        let named = |problem: &String| {
            problem.starts_with("adapter_model.safetensors: ") && problem.contains(tensor) && problem.contains(words)
        };
        assert!(found.problems.iter().any(named), "{what}: {:?}", found.problems);
    }
}

#[test]
fn a_rank_over_the_limit_is_refused_by_the_tensor_too() {
    let limits = Limits { lora_rank_max: 4, ..Limits::default() };
    let mut adapter = Adapter::bare(json!({"peft_type": "LORA", "r": 4, "target_modules": ["lm_head"]}));
    adapter.linear("lm_head", 5, (8, 16), 1);
    let dir = TempDir::new().expect("a temporary folder");
    adapter.write(dir.path());
    let found = inspect_folder(dir.path(), &shape(), &limits).expect("readable");
    assert!(
        found.problems.iter().all(|p| p.contains("lm_head.lora_") && p.contains("lora_rank_max is 4")),
        "{:?}",
        found.problems
    );
    assert_eq!(found.problems.len(), 2);
}

#[test]
fn patterns_decide_ranks_in_the_files_order() {
    let rank = |pattern: serde_json::Value| {
        let mut adapter = Adapter::qv(2, 1);
        adapter.set("rank_pattern", pattern);
        let dir = TempDir::new().expect("a temporary folder");
        adapter.write(dir.path());
        inspect_folder(dir.path(), &shape(), &Limits::default()).expect("readable").problems.join("\n")
    };
    let first = rank(json!({"layers.0.self_attn.q_proj": 3, "q_proj": 5}));
    let second = rank(json!({"q_proj": 5, "layers.0.self_attn.q_proj": 3}));
    assert!(first.contains("must have [3, 8]") && first.contains("must have [5, 8]"), "{first}");
    assert!(!second.contains("must have [3, 8]") && second.contains("must have [5, 8]"), "{second}");
}

#[test]
fn thousands_of_patterns_are_looked_up_without_holding_them_compiled() {
    let mut adapter = Adapter::qv(2, 1);
    let many: serde_json::Map<_, _> =
        (0..4_000).map(|i| (format!(r"model\.layers\.{i}\d\..*_proj"), json!(7))).collect();
    adapter.set("rank_pattern", json!(many));
    let dir = TempDir::new().expect("a temporary folder");
    adapter.write(dir.path());
    let begun = Instant::now();
    let found = inspect_folder(dir.path(), &shape(), &Limits::default()).expect("readable");
    assert_eq!(found.problems, Vec::<String>::new(), "after {:?}", begun.elapsed());
}

#[test]
fn a_tensor_of_the_wrong_kind_is_listed_by_inspect() {
    let mut adapter = Adapter::qv(2, 1);
    adapter.tensors.push(Tensor::f32("base_model.model.surprise", &[2], 1));
    let dir = TempDir::new().expect("a temporary folder");
    adapter.write(dir.path());
    let found = inspect_folder(dir.path(), &shape(), &Limits::default()).expect("readable");
    assert_eq!(found.unmatched_tensors, ["base_model.model.surprise"]);
    assert_eq!((found.matched.len(), found.rank_max, found.unmatched_modules.len()), (4, 2, 12));
    assert!(fs::metadata(dir.path()).is_ok());
}
