//! Parsers against bytes from strangers: no panic, no unbounded work, and never more lenient than the reference.

use bolero::check;
use openlora_adapters::{Header, LoraConfig};
use openlora_types::Limits;
use safetensors::SafeTensors;
use serde_json::json;

use crate::make::{Adapter, safetensors_raw};

/// Applies edits to `bytes`: each replaces, inserts or removes one byte, or repeats a stretch.
fn mutate(mut bytes: Vec<u8>, edits: &[(u16, u8, u8)]) -> Vec<u8> {
    for &(at, kind, value) in edits.iter().take(12) {
        let at = usize::from(at) % bytes.len().max(1);
        match kind % 4 {
            _ if bytes.is_empty() => bytes.push(value),
            0 => bytes[at] = value,
            1 => bytes.insert(at, value),
            2 => drop(bytes.remove(at)),
            _ => {
                let end = (at + usize::from(value) + 1).min(bytes.len());
                let stretch = bytes[at..end].to_vec();
                bytes.splice(at..at, stretch);
            }
        }
    }
    bytes
}

#[test]
fn a_configuration_never_panics_the_parser() {
    let full = json!({
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 8, "lora_alpha": 16.5, "use_rslora": true, "use_dora": false,
        "lora_bias": false, "bias": "none", "target_modules": ".*\\.(q|v)_proj|(?!x)[a-z]{1,3}?\\d+", "exclude_modules": ["k", "m.v"],
        "layers_to_transform": null, "rank_pattern": {"^model\\.layers\\.(1|2).*": 4, "v_proj": 2}, "alpha_pattern": {"x": -1.5e3},
        "modules_to_save": null, "init_lora_weights": "gaussian", "loftq_config": {}, "ensure_weight_tying": false
    });
    let limits = Limits::default();
    check!().with_iterations(20_000).with_type::<(Vec<(u16, u8, u8)>, bool)>().for_each(|(edits, raw)| {
        let bytes = if *raw {
            edits.iter().flat_map(|&(at, a, b)| [at as u8, a, b]).collect()
        } else {
            mutate(full.to_string().into_bytes(), edits)
        };
        if let Err(error) = LoraConfig::parse(&bytes, &limits) {
            assert!(error.to_string().starts_with("adapter_config.json"), "{error}");
        }
    });
}

#[test]
fn a_header_is_never_accepted_where_the_reference_refuses_it() {
    let file = Adapter::qv(2, 1).tensor_bytes();
    let length = u64::from_le_bytes(file[..8].try_into().expect("eight bytes")) as usize;
    let (header, data) = (file[8..8 + length].to_vec(), &file[8 + length..]);
    let limits = Limits::default();
    let mut accepted = 0;
    check!().with_iterations(20_000).with_type::<Vec<(u16, u8, u8)>>().for_each(|edits| {
        let header = mutate(header.clone(), edits);
        let Ok(parsed) = Header::parse(&header, data.len() as u64, &limits) else { return };
        accepted += 1;
        // The reference reads UTF-8 only, and so does this one, or the header would not have passed.
        let text = String::from_utf8(header).expect("accepted headers are UTF-8");
        let whole = safetensors_raw(&text, data);
        let reference = SafeTensors::deserialize(&whole).expect("the reference refuses it");
        assert_eq!(reference.len(), parsed.tensors.len());
        for tensor in &parsed.tensors {
            let view = reference.tensor(&tensor.name).expect("the same names");
            assert_eq!(view.shape(), tensor.shape);
            let start = view.data().as_ptr() as usize - whole.as_ptr() as usize;
            assert_eq!((start as u64, view.data().len() as u64), (parsed.data_start + tensor.start, tensor.bytes));
        }
    });
    assert!(accepted > 0, "no header passed: the test compares nothing");
}
