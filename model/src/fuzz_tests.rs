//! Fuzz targets of the parsers (bolero): no input makes them panic, hang or allocate without bound. A short run is part of
//! the tests; `cargo bolero test` with a target's name runs one for as long as wished.

use openlora_types::Limits;

use crate::config::hf as hf_config;
use crate::files::read_gguf;
use crate::hf::read_safetensors;
use crate::roles::Layout;
use crate::testing::GgufBuilder;

/// Changes to a valid input: bytes replaced, then cut to a length. Plain random bytes rarely pass the first magic.
type Changes = (Vec<(u16, u8)>, Option<u16>);

fn changed(valid: &[u8], (replaced, length): &Changes) -> Vec<u8> {
    let mut bytes = valid.to_vec();
    for (at, value) in replaced {
        let at = usize::from(*at) % bytes.len();
        bytes[at] = *value;
    }
    if let Some(length) = length {
        bytes.truncate(usize::from(*length));
    }
    bytes
}

fn gguf(bytes: &[u8]) {
    if let Ok((file, tensors, config)) = read_gguf(bytes, "fuzz", &Limits::default()) {
        assert!(file.tensors().iter().all(|tensor| tensor.range.end <= bytes.len()));
        if Layout::Gguf.assign(&config, &tensors).is_ok() {
            let table = config.rope.table(16);
            assert_eq!(table.cos.len(), 16 * table.rotary_dim / 2);
        }
    }
}

#[test]
fn fuzz_gguf_bytes() {
    bolero::check!().with_type::<Vec<u8>>().for_each(|bytes| gguf(bytes));
}

#[test]
fn fuzz_gguf_changed() {
    let valid = GgufBuilder::tiny_llama().build();
    // Only the header: changes of weights say nothing.
    let header = valid.len() - 8 * 32 * 4;
    bolero::check!().with_type::<Changes>().for_each(|changes| {
        let mut bytes = changed(&valid[..header.min(2_048)], changes);
        if changes.1.is_none() {
            bytes.extend(&valid[header.min(2_048)..]);
        }
        gguf(&bytes);
    });
}

fn safetensors(bytes: &[u8]) {
    if let Ok(tensors) = read_safetensors("fuzz", bytes, 0, &Limits::default()) {
        assert!(tensors.iter().all(|tensor| tensor.range.end <= bytes.len()));
    }
}

#[test]
fn fuzz_safetensors_bytes() {
    bolero::check!().with_type::<Vec<u8>>().for_each(|bytes| safetensors(bytes));
}

#[test]
fn fuzz_safetensors_changed() {
    let header = br#"{"a":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]},"b":{"dtype":"BF16","shape":[3],"data_offsets":[16,22]}}"#;
    let valid = [&(header.len() as u64).to_le_bytes()[..], header, &[0; 22]].concat();
    assert_eq!(read_safetensors("fuzz", &valid, 0, &Limits::default()).expect("valid").len(), 2);
    bolero::check!().with_type::<Changes>().for_each(|changes| safetensors(&changed(&valid, changes)));
}

#[test]
fn fuzz_hugging_face_config() {
    let valid = std::fs::read(concat!(env!("CARGO_MANIFEST_DIR"), "/../fixtures/models/qwen2-window-yarn/config.json"))
        .expect("a fixture");
    hf_config::read(&valid, None, "fuzz", &Limits::default()).expect("valid");
    bolero::check!().with_type::<Changes>().for_each(|changes| {
        let bytes = changed(&valid, changes);
        if let Ok(config) = hf_config::read(&bytes, None, "fuzz", &Limits::default()) {
            assert_eq!(config.windows.len(), config.shape.layers);
            let (frequencies, _) = config.rope.frequencies();
            assert_eq!(frequencies.len(), config.shape.head_dim / 2);
        }
    });
}
