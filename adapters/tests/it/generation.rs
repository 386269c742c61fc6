//! The generation is the documented hash of what the adapter computes, and of nothing else.

use openlora_adapters::inspect_folder;
use openlora_types::Limits;
use serde_json::json;
use tempfile::TempDir;

use crate::make::{Adapter, shape, write_files};

fn generation_of(config: &[u8], tensors: &[u8]) -> String {
    let dir = TempDir::new().expect("a temporary folder");
    write_files(dir.path(), config, tensors);
    let found = inspect_folder(dir.path(), &shape(), &Limits::default()).expect("readable");
    found.generation.unwrap_or_else(|| panic!("refused: {:?}", found.problems))
}

fn generation(adapter: &Adapter) -> String {
    generation_of(&adapter.config_bytes(), &adapter.tensor_bytes())
}

#[test]
fn the_generation_is_the_documented_encoding() {
    // docs/generation.md, written out a second time.
    let mut adapter = Adapter::bare(
        json!({"peft_type": "LORA", "r": 2, "lora_alpha": 3, "use_dora": true, "target_modules": ["down_proj"],
                             "layers_to_transform": [1]}),
    );
    adapter.linear("model.layers.1.mlp.down_proj", 2, (12, 8), 5);
    adapter.tensor("model.layers.1.mlp.down_proj.lora_magnitude_vector", &[8]);
    let mut text = b"openlora adapter generation v1\0".to_vec();
    text.extend(1_u32.to_le_bytes()); // sites
    text.extend(1_u32.to_le_bytes()); // layer
    text.push(6); // down_proj
    text.extend(2_u32.to_le_bytes()); // rank
    text.extend(1.5_f32.to_bits().to_le_bytes()); // scale
    text.push(0b10); // magnitude, no bias
    for (tensor, shape) in adapter.tensors.iter().zip([&[2_u64, 12][..], &[8, 2], &[8]]) {
        text.push(0); // F32
        text.push(shape.len() as u8);
        shape.iter().for_each(|dim| text.extend(dim.to_le_bytes()));
        text.extend(&tensor.bytes);
    }
    assert_eq!(generation(&adapter), blake3::hash(&text).to_hex().to_string());
}

#[test]
fn the_same_arithmetic_has_the_same_generation_however_it_is_written() {
    let adapter = Adapter::qv(2, 1);
    let expected = generation(&adapter);
    let tensors = adapter.tensor_bytes();

    let compact = adapter.config.to_string();
    assert_eq!(generation_of(compact.as_bytes(), &tensors), expected, "formatting");
    let mut reordered: Vec<_> = adapter.config.as_object().expect("an object").clone().into_iter().collect();
    reordered.reverse();
    let reordered = serde_json::Value::Object(reordered.into_iter().collect());
    assert_eq!(generation_of(reordered.to_string().as_bytes(), &tensors), expected, "order of fields");

    let mut shuffled = adapter.clone();
    shuffled.tensors.reverse();
    assert_eq!(generation(&shuffled), expected, "order of tensors");
    let mut renamed = adapter.clone();
    for tensor in &mut renamed.tensors {
        tensor.name = tensor.name.replace(".weight", ".default.weight");
    }
    assert_eq!(generation(&renamed), expected, "the adapter's name in the tensors' names");

    for (field, value) in [
        ("target_modules", json!(r".*\.(q|v)_proj")),
        ("target_modules", json!(["self_attn.v_proj", "q_proj"])),
        ("rank_pattern", json!({"q_proj": 2})),
        ("alpha_pattern", json!({"v_proj": 4.0})),
        ("r", json!(2)),
    ] {
        let mut other = adapter.clone();
        other.set(field, value);
        assert_eq!(generation(&other), expected, "{field}");
    }
    let mut rslora = adapter.clone();
    rslora.set("use_rslora", json!(true));
    rslora.set("lora_alpha", json!(2.0 * 2.0_f64.sqrt()));
    assert_eq!(generation(&rslora), expected, "rsLoRA of the same scale");
}

#[test]
fn every_difference_in_arithmetic_is_another_generation() {
    let adapter = Adapter::qv(2, 1);
    let mut seen = vec![generation(&adapter)];
    let mut differs = |what: &str, other: &Adapter| {
        let generation = generation(other);
        assert!(!seen.contains(&generation), "{what} does not show");
        seen.push(generation);
    };
    for index in 0..adapter.tensors.len() {
        let mut other = adapter.clone();
        other.tensors[index].bytes[0] ^= 1;
        differs(&format!("one bit of tensor {index}"), &other);
    }
    let mut other = adapter.clone();
    other.set("lora_alpha", json!(5));
    differs("the scale", &other);
    let mut other = adapter.clone();
    other.set("alpha_pattern", json!({"layers.1.self_attn.q_proj": 5}));
    differs("one site's scale", &other);
    let mut other = adapter.clone();
    for tensor in &mut other.tensors {
        tensor.name =
            tensor.name.replace("layers.0", "layers.x").replace("layers.1", "layers.0").replace("layers.x", "layers.1");
    }
    differs("factors on other layers", &other);
    let mut other = adapter.clone();
    other.set("layers_to_transform", json!([0]));
    other.tensors.retain(|tensor| tensor.name.contains("layers.0"));
    differs("fewer sites", &other);
    differs("other ranks", &Adapter::qv(3, 1));
}
