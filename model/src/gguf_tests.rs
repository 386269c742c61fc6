//! What the GGUF reader promises about files nobody vouches for.

use openlora_kernels::BlockFormat;
use openlora_types::Limits;

use crate::config::ModelConfig;
use crate::error::ModelError;
use crate::files::read_gguf;
use crate::gguf::{GgufFile, GgufValue};
use crate::roles::Layout;
use crate::rope::RopeScaling;
use crate::testing::{GgufBuilder, string};

/// Everything [`crate::ModelFiles::open`] does with a GGUF file's bytes.
fn read(bytes: &[u8]) -> Result<ModelConfig, ModelError> {
    let (_, tensors, config) = read_gguf(bytes, "tiny", &Limits::default())?;
    Layout::Gguf.assign(&config, &tensors)?;
    Ok(config)
}

/// A valid file made wrong must be refused with all of `words` in the message.
fn refused(words: &[&str], change: impl FnOnce(&mut GgufBuilder)) {
    let mut file = GgufBuilder::tiny_llama();
    change(&mut file);
    let message = read(&file.build()).expect_err(&format!("{words:?}")).to_string();
    assert!(words.iter().all(|word| message.contains(word)), "{message:?} does not say {words:?}");
}

#[test]
fn a_small_valid_file_is_read() {
    let config = read(&GgufBuilder::tiny_llama().build()).expect("valid");
    assert_eq!((config.shape.hidden, config.shape.vocab, config.shape.tied_head), (32, 8, true));
    assert_eq!(config.eos_tokens, [7]);
    assert_eq!(config.rope.scaling, RopeScaling::None);
    let mut older = GgufBuilder::tiny_llama();
    older.version = 2;
    read(&older.build()).expect("version 2 is the same layout");
}

#[test]
fn metadata_of_every_type_is_read_and_mistyped_access_is_refused() {
    let mut file = GgufBuilder::tiny_llama();
    for (kind, value) in [
        (0, vec![200]),
        (1, vec![0xfe]),
        (2, 60_000_u16.to_le_bytes().to_vec()),
        (3, (-3_i16).to_le_bytes().to_vec()),
        (5, (-4_i32).to_le_bytes().to_vec()),
        (7, vec![1]),
        (10, u64::MAX.to_le_bytes().to_vec()),
        (11, i64::MIN.to_le_bytes().to_vec()),
        (12, 0.5_f64.to_le_bytes().to_vec()),
    ] {
        file.key(&format!("x.{kind}"), kind, &value);
    }
    let array = |kind: u32, count: u64, data: &[u8]| [&kind.to_le_bytes(), &count.to_le_bytes()[..], data].concat();
    file.key("x.ints", 9, &array(5, 2, &[1, 0, 0, 0, 0xff, 0xff, 0xff, 0xff]));
    file.key("x.floats", 9, &array(6, 1, &0.25_f32.to_le_bytes()));
    file.key("x.strings", 9, &array(8, 2, &[string("a"), string("")].concat()));
    file.key("x.none", 9, &array(8, 0, &[]));
    let bytes = file.build();
    let gguf = GgufFile::parse(&bytes, &Limits::default()).expect("valid");
    for (kind, value) in [
        (0, GgufValue::Uint(200)),
        (1, GgufValue::Int(-2)),
        (2, GgufValue::Uint(60_000)),
        (3, GgufValue::Int(-3)),
        (5, GgufValue::Int(-4)),
        (7, GgufValue::Bool(true)),
        (10, GgufValue::Uint(u64::MAX)),
        (11, GgufValue::Int(i64::MIN)),
        (12, GgufValue::Float(0.5)),
    ] {
        assert_eq!(gguf.value(&format!("x.{kind}")), Some(&value));
    }
    assert_eq!(gguf.ints("x.ints").expect("ints"), Some([1, -1].as_slice()));
    assert_eq!(gguf.floats("x.floats").expect("floats"), Some([0.25].as_slice()));
    assert_eq!(gguf.strings("x.strings").expect("strings"), Some(["a".to_owned(), String::new()].as_slice()));
    assert_eq!(gguf.strings("x.none").expect("strings"), Some([].as_slice()));
    assert_eq!(gguf.uint("x.absent").expect("absent"), None);
    let message = gguf.uint("x.1").expect_err("negative").to_string();
    assert!(message.contains("x.1"), "{message}");
    assert!(gguf.string("x.ints").is_err() && gguf.uint("x.strings").is_err() && gguf.boolean("x.0").is_err());
}

#[test]
fn headers_that_lie_are_refused_before_anything_is_allocated_for_them() {
    assert!(read(b"GGML\0\0\0\0").expect_err("another magic").to_string().contains("does not start"));
    refused(&["big-endian"], |file| file.version = 3_u32.swap_bytes());
    refused(&["version 1"], |file| file.version = 1);
    refused(&["version 4"], |file| file.version = 4);
    refused(&["model_tensors_max"], |file| file.lie.0 = u64::MAX / 2);
    refused(&["model_metadata_keys_max"], |file| file.lie.1 = 1 << 40);
    refused(&["cannot fit"], |file| file.lie.0 = 60_000);
    // One tensor more than there are: its description is read from the padding and the weights.
    refused(&["dimensions"], |file| file.lie.0 = 1);
    refused(&["a metadata key", "bytes"], |file| {
        // The next key's length is read from this value.
        file.keys.insert(0, ("k".into(), [&4_u32.to_le_bytes()[..], &[0; 4], &u64::MAX.to_le_bytes()].concat()));
    });
    refused(&["big", "bytes"], |file| file.key("big", 8, &(1_u64 << 62).to_le_bytes()));
    refused(&["wide", "elements"], |file| {
        file.key("wide", 9, &[&10_u32.to_le_bytes()[..], &(1_u64 << 20).to_le_bytes()].concat())
    });
    refused(&["wide", "model_metadata_bytes_max"], |file| {
        file.key("wide", 9, &[&10_u32.to_le_bytes()[..], &(u64::MAX / 8).to_le_bytes()].concat());
    });
    refused(&["deep", "array of arrays"], |file| file.key("deep", 9, &[&9_u32.to_le_bytes()[..], &[0; 8]].concat()));
    refused(&["odd", "unknown GGUF type 99"], |file| file.key("odd", 99, &[0; 8]));
    refused(&["flag", "boolean of value 2"], |file| file.key("flag", 7, &[2]));
    refused(&["UTF-8"], |file| file.key("text", 8, &[&1_u64.to_le_bytes()[..], &[0xff]].concat()));
    refused(&["general.architecture", "twice"], |file| file.string("general.architecture", "llama"));
    refused(&["general.alignment"], |file| file.u32("general.alignment", 0));
    refused(&["general.alignment"], |file| file.u32("general.alignment", 48));
}

#[test]
fn tensors_that_leave_the_file_overlap_or_repeat_are_refused_by_name() {
    let name = "blk.0.attn_q.weight";
    refused(&[name, "twice"], |file| file.matrix(name, 32, 32));
    refused(&[name, "truncated"], |file| file.named(name).offset = Some(1 << 40));
    refused(&[name, "truncated"], |file| file.named(name).offset = Some(u64::MAX / 32 * 32));
    refused(&[name, "alignment"], |file| file.named(name).offset = Some(7));
    refused(&["overlap", "token_embd.weight", name], |file| file.named(name).offset = Some(0));
    refused(&[name, "overflows"], |file| file.named(name).dims = vec![1 << 40, 1 << 40]);
    refused(&[name, "dimension"], |file| file.named(name).dims = vec![0, 32]);
    refused(&[name, "dimensions"], |file| file.named(name).dims = vec![1; 5]);
    refused(&[name, "dimensions"], |file| file.named(name).dims = vec![]);
    refused(&[name, "Q4_K", "256"], |file| file.named(name).ggml_type = 12);
    for (ggml_type, type_name) in [(10, "Q2_K"), (13, "Q5_K"), (20, "IQ4_NL"), (39, "MXFP4"), (777, "number 777")] {
        refused(&[name, type_name], |file| file.named(name).ggml_type = ggml_type);
    }
}

#[test]
fn truncation_at_every_byte_is_an_error() {
    let bytes = GgufBuilder::tiny_llama().build();
    // The last tensor's padding may go.
    for length in 0..bytes.len() - 32 {
        assert!(read(&bytes[..length]).is_err(), "{length} of {} bytes were accepted", bytes.len());
    }
}

#[test]
fn what_the_architecture_lacks_or_does_not_know_is_named() {
    refused(&["general.architecture", "gemma3"], |file| file.set("general.architecture", 8, &string("gemma3")));
    refused(&["general.architecture", "missing"], |file| file.keys.remove(0).0.clear());
    refused(&["llama.embedding_length", "missing"], |file| {
        file.keys.retain(|(key, _)| key != "llama.embedding_length")
    });
    refused(&["llama.block_count", "integer"], |file| file.set("llama.block_count", 8, &string("1")));
    refused(&["model_layers_max"], |file| file.set("llama.block_count", 4, &100_000_u32.to_le_bytes()));
    refused(&["blk.1.attn_norm.weight", "missing"], |file| file.set("llama.block_count", 4, &2_u32.to_le_bytes()));
    refused(&["layers", "is 0"], |file| file.set("llama.block_count", 4, &0_u32.to_le_bytes()));
    refused(&["heads", "is 0"], |file| file.set("llama.attention.head_count", 4, &0_u32.to_le_bytes()));
    refused(&["hidden size"], |file| file.set("llama.embedding_length", 10, &u64::MAX.to_le_bytes()));
    refused(&["key-value heads", "divide"], |file| file.set("llama.attention.head_count_kv", 4, &3_u32.to_le_bytes()));
    refused(&["head_count_kv", "array"], |file| {
        let per_layer = [&4_u32.to_le_bytes()[..], &1_u64.to_le_bytes(), &1_u32.to_le_bytes()].concat();
        file.set("llama.attention.head_count_kv", 9, &per_layer);
    });
    refused(&["rotary dimensions", "8"], |file| file.set("llama.rope.dimension_count", 4, &8_u32.to_le_bytes()));
    refused(&["llama.expert_count", "8"], |file| file.u32("llama.expert_count", 8));
    refused(&["llama.attention.logit_softcap"], |file| file.f32("llama.attention.logit_softcap", 30.0));
    refused(&["llama.rope.scaling.type", "longrope"], |file| file.string("llama.rope.scaling.type", "longrope"));
    refused(&["special token", "8"], |file| file.u32("tokenizer.ggml.bos_token_id", 8));
    refused(&["blk.0.attn_q.weight", "missing", "llama"], |file| {
        file.tensors.retain(|tensor| tensor.name != "blk.0.attn_q.weight");
    });
    refused(&["blk.0.attn_q_norm.weight", "not part of"], |file| {
        file.tensor("blk.0.attn_q_norm.weight", &[16], BlockFormat::F32);
    });
    refused(&["blk.0.attn_k.bias", "missing"], |file| file.tensor("blk.0.attn_q.bias", &[32], BlockFormat::F32));
    refused(&["blk.0.attn_q.weight", "[32, 32]", "[16, 64]"], |file| {
        file.named("blk.0.attn_q.weight").dims = vec![64, 16];
    });
    refused(&["rope_freqs.weight", "8"], |file| file.tensor("rope_freqs.weight", &[4], BlockFormat::F32));
    refused(&["rope factors", "0"], |file| file.tensor("rope_freqs.weight", &[8], BlockFormat::F32));
    refused(&["theta"], |file| file.f32("llama.rope.freq_base", f32::NAN));
}
