//! What is promised about Hugging Face folders that are incomplete, of another kind, or ask for what is not computed.

use std::path::{Path, PathBuf};

use openlora_types::Limits;
use serde_json::{Value, json};

use crate::files::ModelFiles;
use crate::rope::{RopeScaling, YarnAttention};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures/models").join(name)
}

/// A copy of a fixture folder to be changed.
fn copy(name: &str) -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("temporary folder");
    for entry in std::fs::read_dir(fixture(name)).expect("a fixture") {
        let path = entry.expect("readable").path();
        std::fs::copy(&path, folder.path().join(path.file_name().expect("named"))).expect("copied");
    }
    folder
}

fn edit(folder: &Path, file: &str, change: impl FnOnce(&mut Value)) {
    let path = folder.join(file);
    let mut value: Value = serde_json::from_slice(&std::fs::read(&path).expect("there")).expect("JSON");
    change(&mut value);
    std::fs::write(path, value.to_string()).expect("written");
}

fn refused(folder: &Path, words: &[&str]) {
    let message = match ModelFiles::open(folder, &Limits::default()) {
        Ok(_) => panic!("{words:?} was accepted"),
        Err(error) => error.to_string(),
    };
    assert!(words.iter().all(|word| message.contains(word)), "{message:?} does not say {words:?}");
}

/// Sets `field` of config.json (a JSON pointer's last part) to each value; each must be refused with its words.
fn refused_configs(name: &str, cases: &[(&str, Value, &[&str])]) {
    for (field, value, words) in cases {
        let folder = copy(name);
        edit(folder.path(), "config.json", |config| config[*field] = value.clone());
        refused(folder.path(), words);
    }
}

#[test]
fn configurations_that_are_not_computed_are_refused_by_field() {
    refused_configs(
        "llama3",
        &[
            ("model_type", json!("gemma3"), &["model_type", "gemma3"]),
            ("model_type", Value::Null, &["model_type", "missing"]),
            ("architectures", json!(["LlamaForSequenceClassification"]), &["architectures", "SequenceClassification"]),
            ("hidden_act", json!("gelu"), &["hidden_act", "gelu"]),
            ("quantization_config", json!({"quant_method": "awq"}), &["quantization_config", "awq"]),
            ("rope_scaling", json!({"rope_type": "longrope", "factor": 2}), &["rope_scaling.rope_type", "longrope"]),
            ("rope_scaling", json!({"type": "dynamic", "factor": 2}), &["rope_scaling.rope_type", "dynamic"]),
            ("rope_scaling", json!({"type": "linear"}), &["rope_scaling.factor", "missing"]),
            ("rope_scaling", json!({"type": "linear", "factor": -1}), &["rope factor", "-1"]),
            ("rope_scaling", json!({"type": "linear", "factor": "2"}), &["rope_scaling", "malformed"]),
            ("rope_theta", json!(0), &["theta"]),
            ("partial_rotary_factor", json!(0.5), &["partial_rotary_factor", "0.5"]),
            ("num_local_experts", json!(8), &["num_local_experts", "8"]),
            ("hidden_size", json!(0), &["hidden size"]),
            ("hidden_size", json!(u64::MAX), &["hidden size"]),
            ("num_attention_heads", json!(0), &["heads"]),
            ("num_attention_heads", json!(-1), &["config.json"]),
            ("num_key_value_heads", json!(3), &["key-value heads"]),
            ("num_hidden_layers", json!(1_000_000), &["model_layers_max"]),
            ("num_hidden_layers", json!(4), &["model.layers.3.", "missing"]),
            ("num_hidden_layers", json!(2), &["model.layers.2.", "not part of"]),
            ("head_dim", json!(15), &["head size"]),
            ("intermediate_size", json!(64), &["mlp.gate_proj.weight", "[64, 64]", "[128, 64]"]),
            ("attention_bias", json!(true), &["self_attn.q_proj.bias", "missing"]),
            ("mlp_bias", json!(true), &["mlp.gate_proj.bias", "missing"]),
            ("tie_word_embeddings", json!(true), &["lm_head.weight", "differs"]),
            ("rms_norm_eps", json!(-1.0), &["epsilon"]),
        ],
    );
    refused_configs("mistral-window", &[("sliding_window", json!(0), &["sliding window"])]);
    refused_configs("mistral-window", &[("layer_types", json!(["full_attention"]), &["layer_types"])]);
    refused_configs(
        "qwen3-layer-types",
        &[
            ("layer_types", json!(["full_attention"]), &["layer_types", "3 layers"]),
            ("layer_types", json!(["full_attention", "chunked_attention", "full_attention"]), &["chunked_attention"]),
            ("use_sliding_window", json!(false), &["layer_types", "no window"]),
        ],
    );
}

#[test]
fn folders_without_usable_weights_say_what_is_wrong() {
    let folder = copy("llama-yarn");
    let weights = folder.path().join("model.safetensors");
    std::fs::rename(&weights, folder.path().join("kept")).expect("renamed");
    refused(folder.path(), &["neither model.safetensors nor"]);
    std::fs::write(folder.path().join("pytorch_model.bin"), b"").expect("written");
    refused(folder.path(), &["pickled", "safetensors"]);
    let bytes = std::fs::read(folder.path().join("kept")).expect("there");
    std::fs::write(&weights, &bytes[..bytes.len() - 1]).expect("written");
    refused(folder.path(), &["model.safetensors"]);
    let mut huge = bytes;
    huge[..8].copy_from_slice(&(1_u64 << 63).to_le_bytes());
    std::fs::write(&weights, &huge).expect("written");
    refused(folder.path(), &["model_json_bytes_max"]);
    std::fs::remove_file(folder.path().join("config.json")).expect("removed");
    refused(folder.path(), &["config.json"]);
    refused(Path::new("/nonexistent/model.gguf"), &["/nonexistent/model.gguf"]);
}

#[test]
fn an_index_cannot_reach_outside_its_folder_or_lie() {
    for shard in ["../model.safetensors", "/etc/passwd", "a/b", "", ".", "..", "x\0"] {
        let folder = copy("llama3");
        edit(folder.path(), "model.safetensors.index.json", |index| {
            index["weight_map"]["model.norm.weight"] = json!(shard);
        });
        refused(folder.path(), &["model.norm.weight", "file name"]);
    }
    let folder = copy("llama3");
    edit(folder.path(), "model.safetensors.index.json", |index| {
        index["weight_map"]["extra.weight"] = json!("model-00001-of-00004.safetensors");
    });
    refused(folder.path(), &["extra.weight", "model-00001-of-00004.safetensors"]);
    let folder = copy("llama3");
    std::fs::remove_file(folder.path().join("model-00002-of-00004.safetensors")).expect("removed");
    refused(folder.path(), &["model-00002-of-00004.safetensors"]);
}

#[test]
fn special_tokens_come_from_the_generation_configuration_first() {
    let folder = copy("llama3");
    edit(folder.path(), "generation_config.json", |config| config["eos_token_id"] = json!([7, 3, 7]));
    let files = ModelFiles::open(folder.path(), &Limits::default()).expect("valid");
    assert_eq!(files.config().eos_tokens, [3, 7]);
    std::fs::remove_file(folder.path().join("generation_config.json")).expect("removed");
    let files = ModelFiles::open(folder.path(), &Limits::default()).expect("valid");
    assert_eq!(files.config().eos_tokens, [1, 2]);
    assert_eq!(files.config().bos, Some(0));
    for value in [json!("2"), json!([-1]), json!(4_294_967_296_u64), json!(288)] {
        edit(folder.path(), "config.json", |config| config["eos_token_id"] = value);
        refused(folder.path(), &["token"]);
    }
}

#[test]
fn rope_is_read_from_the_old_and_the_new_field() {
    let read = |name: &str| ModelFiles::open(&fixture(name), &Limits::default()).expect(name).config().rope.clone();
    let RopeScaling::Yarn(new) = read("llama-yarn").scaling else { panic!("llama-yarn has yarn") };
    assert_eq!((new.factor, new.original_context, new.beta_fast), (4.0, 64, 32.0));
    assert_eq!(new.attention, YarnAttention::FromFactor { times: 1.0 });
    let RopeScaling::Yarn(old) = read("qwen2-window-yarn").scaling else { panic!("qwen2-window-yarn has yarn") };
    assert_eq!((old.factor, old.beta_fast, old.beta_slow), (2.0, 16.0, 2.0));
    assert!(matches!(read("llama3").scaling, RopeScaling::Llama3 { original_context: 32, .. }));
    assert!(read("tiny-llama3.gguf").factors.is_some());
}

#[test]
fn windows_follow_each_familys_rule() {
    let windows =
        |name: &str| ModelFiles::open(&fixture(name), &Limits::default()).expect(name).config().windows.clone();
    assert_eq!(windows("mistral-window"), [Some(8); 3]);
    assert_eq!(windows("mistral"), [None; 3]);
    assert_eq!(windows("qwen2"), [None; 3]);
    assert_eq!(windows("qwen2-window-yarn"), [None, Some(8), Some(8)]);
    assert_eq!(windows("qwen3-layer-types"), [Some(8), None, Some(8)]);
}

#[test]
fn a_tied_model_may_store_its_head_if_it_equals_the_embedding() {
    let folder = copy("llama3");
    // An untied model made tied, its head's bytes replaced by the embedding's.
    edit(folder.path(), "config.json", |config| config["tie_word_embeddings"] = json!(true));
    refused(folder.path(), &["lm_head.weight", "differs"]);
    let bytes_of = |name: &str| {
        let index: Value =
            serde_json::from_slice(&std::fs::read(folder.path().join("model.safetensors.index.json")).expect("there"))
                .expect("JSON");
        let path = folder.path().join(index["weight_map"][name].as_str().expect("mapped"));
        let bytes = std::fs::read(&path).expect("there");
        let tensors = crate::hf::read_safetensors("shard", &bytes, 0, &Limits::default()).expect("valid");
        let range = tensors.into_iter().find(|tensor| tensor.name == name).expect("promised").range;
        (path, bytes, range)
    };
    let (_, embedding_file, embedding) = bytes_of("model.embed_tokens.weight");
    let (path, mut head_file, head) = bytes_of("lm_head.weight");
    head_file[head].copy_from_slice(&embedding_file[embedding]);
    std::fs::write(path, head_file).expect("written");
    let files = ModelFiles::open(folder.path(), &Limits::default()).expect("equal bytes");
    assert!(files.tensors().all(|tensor| tensor.name != "lm_head.weight"));
    let summary = files.summary();
    assert_eq!(summary.bytes, files.tensors().map(|tensor| tensor.bytes).sum::<u64>());
}
