//! Adapters that PEFT made: sites, ranks, scales and bytes.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use openlora_adapters::{Actor, AdapterStore, BaseRows, StoreConfig, inspect_folder};
use openlora_types::{Elements, Limits, Matrix, ModelShape, Module, Site};
use safetensors::SafeTensors;
use tempfile::TempDir;

use crate::make::alias;

fn fixtures() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../fixtures"))
}

fn smollm2() -> ModelShape {
    ModelShape {
        name: "SmolLM2-135M-Instruct".into(),
        hidden: 576,
        intermediate: 1536,
        layers: 30,
        heads: 9,
        kv_heads: 3,
        head_dim: 64,
        vocab: 49_152,
        tied_head: true,
        context: 8_192,
    }
}

/// The shape of one of the small models, from its own config.json.
fn tiny(base: &str) -> ModelShape {
    let text = fs::read(fixtures().join("models").join(base).join("config.json")).expect("the model's config.json");
    let config: serde_json::Value = serde_json::from_slice(&text).expect("JSON");
    let size = |field: &str| config[field].as_u64().map(|size| size as usize);
    let (hidden, heads) = (size("hidden_size").expect("hidden_size"), size("num_attention_heads").expect("heads"));
    ModelShape {
        name: base.into(),
        hidden,
        intermediate: size("intermediate_size").expect("intermediate_size"),
        layers: size("num_hidden_layers").expect("num_hidden_layers"),
        heads,
        kv_heads: size("num_key_value_heads").expect("num_key_value_heads"),
        head_dim: size("head_dim").unwrap_or(hidden / heads),
        vocab: size("vocab_size").expect("vocab_size"),
        tied_head: config["tie_word_embeddings"].as_bool().unwrap_or(false),
        context: size("max_position_embeddings").expect("max_position_embeddings"),
    }
}

type Rule = fn(u32, Module) -> Option<(usize, f64)>;

/// Folder and, for each site, its rank and scale, worked out by hand from the configuration.
const EXPECTED: &[(&str, Rule)] = {
    use Module::{Down, Embed, Gate, K, LmHead, O, Q, Up, V};
    &[
        ("golden/adapters/qv-r8", |_, m| matches!(m, Q | V).then_some((8, 2.0))),
        ("golden/adapters/all-linear-r4-rslora", |_, m| (!matches!(m, Embed | LmHead)).then_some((4, 4.0))),
        ("golden/adapters/patterns", |layer, m| {
            if ![0, 1, 2, 13, 14, 28, 29].contains(&layer) || !matches!(m, Q | K | V | O) {
                return None;
            }
            let rank = if m == Q && layer == 1 {
                2
            } else if m == V {
                16
            } else {
                8
            };
            let alpha = if m == K {
                4.0
            } else if m == V && layer == 13 {
                64.0
            } else {
                16.0
            };
            Some((rank, alpha / rank as f64))
        }),
        ("golden/adapters/regex", |layer, m| {
            (matches!(m, Up | Down) && [3, 17, 29].contains(&layer)).then_some((6, 1.5))
        }),
        ("golden/adapters/odd-rank", |layer, m| {
            (matches!(m, Gate | O) && (5..=8).contains(&layer)).then_some((13, 7.0 / 13.0))
        }),
        ("golden/adapters/dora", |layer, m| {
            (matches!(m, Q | Down) && [0, 10, 20].contains(&layer)).then_some((4, 2.0))
        }),
        ("golden/adapters/r1", |_, m| (m == Down).then_some((1, 1.0))),
        ("golden/adapters/r64", |layer, m| (matches!(m, V | O) && [11, 12, 27].contains(&layer)).then_some((64, 1.0))),
        ("golden/trained/cwe-r8", |_, m| matches!(m, Q | V).then_some((8, 2.0))),
        ("golden/trained/wordnet-r8", |_, m| matches!(m, Q | V).then_some((8, 2.0))),
        ("adapters/alpha-odd", |layer, m| {
            if ![4, 9, 14, 19].contains(&layer) || !matches!(m, Q | V) {
                return None;
            }
            let alpha = if layer == 14 && m == V {
                0.0
            } else if layer == 9 {
                -1.5
            } else {
                7.7
            };
            Some((3, alpha / 3.0))
        }),
        ("adapters/bf16", |layer, m| (matches!(m, O | V) && layer % 3 == 0).then_some((4, 2.0))),
        ("adapters/f32", |layer, m| (matches!(m, O | V) && layer % 3 == 0).then_some((4, 2.0))),
        ("adapters/dora-embed-head", |_, m| matches!(m, Embed | LmHead).then_some((1, 1.0))),
        ("adapters/dora-rslora", |layer, m| {
            if ![0, 7, 29].contains(&layer) || !matches!(m, Gate | K | O) {
                return None;
            }
            let rank = if m == Gate && layer == 7 {
                9
            } else if m == O {
                2
            } else {
                4
            };
            let alpha = if layer == 29 && m == Gate {
                11.0
            } else if m == K {
                3.0
            } else {
                5.0
            };
            Some((rank, alpha / (rank as f64).sqrt()))
        }),
        ("adapters/embed-head", |_, m| matches!(m, Embed | LmHead | Q).then_some((2, 2.0))),
        ("adapters/embed-only", |_, m| (m == Embed).then_some((3, 5.0 / 3.0))),
        ("adapters/lm-head-only", |_, m| (m == LmHead).then_some((2, 1.5))),
        ("adapters/exact-names", |layer, m| {
            let in_layers = m == V && [2, 5].contains(&layer);
            (m == LmHead || (m == Q && layer == 0) || in_layers).then_some((2, 3.0))
        }),
        ("adapters/exclude", |layer, m| {
            let targeted = matches!(m, Q | Up) && [0, 3, 10].contains(&layer);
            (targeted && !(m == Q && layer == 3)).then_some((4, 2.0))
        }),
        ("adapters/exclude-regex", |layer, m| {
            let excluded = layer >= 5 || m == Down;
            (!excluded && !matches!(m, Embed | LmHead)).then_some((2, 2.0))
        }),
        ("adapters/layers-int", |layer, m| (layer == 0 && matches!(m, Up | V)).then_some((4, 2.0))),
        ("adapters/layers-pattern", |layer, m| (matches!(m, Q | Up) && [2, 11].contains(&layer)).then_some((4, 6.0))),
        ("adapters/lora-bias", |layer, m| (matches!(m, Q | Down) && [1, 12, 29].contains(&layer)).then_some((4, 1.5))),
        ("adapters/pattern-order", |layer, m| match (layer, m) {
            (0 | 1 | 10, Q) => Some((4, 3.0 / 4.0)),
            (10, V) => Some((3, 24.0 / 3.0)),
            (0 | 1, V) => Some((3, 6.0 / 3.0)),
            _ => None,
        }),
    ]
};

#[test]
fn every_adapter_of_peft_has_the_sites_ranks_and_scales_of_its_configuration() {
    let shape = smollm2();
    for &(folder, rule) in EXPECTED {
        let path = fixtures().join(folder);
        let found = inspect_folder(&path, &shape, &Limits::default()).expect(folder);
        assert_eq!(found.problems, Vec::<String>::new(), "{folder}");
        let expected: BTreeMap<String, (usize, f32)> = shape
            .sites()
            .filter_map(|site| Some((site.to_string(), rule(site.layer, site.module)?)))
            .map(|(name, (rank, scale))| (name, (rank, scale as f32)))
            .collect();
        let matched: BTreeMap<_, _> =
            found.matched.iter().map(|module| (module.module.clone(), (module.rank, module.scale))).collect();
        assert_eq!(matched, expected, "{folder}");
        assert_eq!(found.unmatched_tensors, Vec::<String>::new(), "{folder}");
        assert_eq!(found.unmatched_modules.len() + found.matched.len(), Site::count(shape.layers), "{folder}");
        assert!(found.generation.is_some(), "{folder}");
    }
}

#[test]
fn every_fixture_is_in_the_table() {
    for dir in ["golden/adapters", "golden/trained", "adapters"] {
        for entry in fs::read_dir(fixtures().join(dir)).expect(dir) {
            let entry = entry.expect("readable");
            if entry.path().is_dir() {
                let name = format!("{dir}/{}", entry.file_name().to_string_lossy());
                assert!(EXPECTED.iter().any(|(known, _)| *known == name), "{name} has no expected ranks and scales");
            }
        }
    }
}

fn store(dir: &TempDir, shape: ModelShape) -> AdapterStore {
    let config = StoreConfig {
        data_dir: dir.path().join("data"),
        allowed_roots: vec![fixtures()],
        host_cache_bytes: 256 << 20,
        ..StoreConfig::default()
    };
    AdapterStore::open(config, shape, Limits::default()).expect("the store opens")
}

fn bytes(matrix: &Matrix) -> Vec<u8> {
    match &matrix.elements {
        Elements::F32(values) => bytemuck::cast_slice(values).to_vec(),
        Elements::F16(values) => bytemuck::cast_slice(values).to_vec(),
        Elements::Bf16(values) => bytemuck::cast_slice(values).to_vec(),
    }
}

#[test]
fn resolved_weights_are_the_files_own_bytes() {
    let dir = TempDir::new().expect("a temporary folder");
    let store = store(&dir, smollm2());
    let admin = Actor { name: "tests".into(), admin: true };
    for &(folder, _) in EXPECTED {
        let path = fixtures().join(folder);
        let name = alias(folder);
        let info = store.register_folder(&name, &path, &admin, false).expect(folder);
        let lease = store.resolve(folder).expect(folder);
        let weights = lease.load().expect(folder);
        assert_eq!(**lease.sizes(), weights.sizes(), "{folder}: sizes are known without the weights");
        assert_eq!((weights.generation, weights.byte_len() as u64), (info.generation, info.bytes), "{folder}");
        let raw = fs::read(path.join("adapter_model.safetensors")).expect(folder);
        let file = SafeTensors::deserialize(&raw).expect(folder);
        let mut used = 0;
        for site in &weights.sites {
            let (a, b) = if site.site.module == Module::Embed {
                ("lora_embedding_A", "lora_embedding_B")
            } else {
                ("lora_A.weight", "lora_B.weight")
            };
            let tensor = |part: &str| file.tensor(&format!("base_model.model.{}.{part}", site.site));
            for (matrix, part) in [(&site.a, a), (&site.b, b)] {
                let wanted = tensor(part).expect(part);
                assert_eq!(vec![matrix.rows, matrix.cols], wanted.shape(), "{folder}: {}.{part}", site.site);
                assert!(bytes(matrix) == wanted.data(), "{folder}: {}.{part} holds other bytes", site.site);
                used += 1;
            }
            for (vector, part) in [(&site.b_bias, "lora_B.bias"), (&site.magnitude, "lora_magnitude_vector")] {
                let Some(vector) = vector else { continue };
                let wanted = tensor(part).expect(part);
                // Every vector among the fixtures is F16.
                let halves = wanted.data().chunks_exact(2).map(|b| half::f16::from_le_bytes([b[0], b[1]]).to_f32());
                assert_eq!(*vector, halves.collect::<Vec<_>>(), "{folder}: {}.{part}", site.site);
                used += 1;
            }
        }
        assert_eq!(used, file.len(), "{folder}: tensors left unused");
    }
}

#[test]
fn adapters_of_the_small_models_fit_their_own_model_alone() {
    let limits = Limits::default();
    let bases: Vec<_> =
        ["llama3", "llama-yarn", "mistral-window", "qwen2", "qwen3"].map(|base| (base, tiny(base))).into();
    let mut seen = 0;
    for (base, shape) in &bases {
        for entry in fs::read_dir(fixtures().join("adapters-tiny").join(base)).expect(base) {
            let path = entry.expect("readable").path();
            let found = inspect_folder(&path, shape, &limits).expect(base);
            assert_eq!(found.problems, Vec::<String>::new(), "{}", path.display());
            let other = inspect_folder(&path, &smollm2(), &limits).expect(base);
            assert!(!other.problems.is_empty() && other.generation.is_none(), "{} fits SmolLM2", path.display());
            seen += 1;
        }
    }
    assert!(seen >= 5, "only {seen} adapters of small models");
}

/// The embedding of a small model, read with the safetensors crate; `changed` is added to one number.
struct Rows {
    rows: Vec<Vec<f32>>,
}

impl Rows {
    fn read(model: &Path, changed: f32) -> Self {
        let raw = fs::read(model.join("model.safetensors")).expect("the model's tensors");
        let file = SafeTensors::deserialize(&raw).expect("safetensors");
        let table = file.tensor("model.embed_tokens.weight").expect("an embedding");
        assert_eq!(table.dtype(), safetensors::Dtype::F32);
        let numbers: Vec<f32> =
            table.data().chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
        let mut rows: Vec<_> = numbers.chunks_exact(table.shape()[1]).map(<[f32]>::to_vec).collect();
        rows[7][3] += changed;
        Self { rows }
    }
}

impl BaseRows for Rows {
    fn read_row(&self, _tied: Module, row: usize, out: &mut [f32]) {
        out.copy_from_slice(&self.rows[row]);
    }
}

#[test]
fn a_copy_of_the_base_weights_is_accepted_only_where_it_equals_the_base() {
    let (path, model) =
        (fixtures().join("adapters-tiny/llama-yarn/base-layer-copies"), fixtures().join("models/llama-yarn"));
    let (name, admin) = (alias("copies"), Actor { name: "tests".into(), admin: true });
    let register = |base: Option<Rows>| {
        let dir = TempDir::new().expect("a temporary folder");
        let mut store = store(&dir, tiny("llama-yarn"));
        if let Some(base) = base {
            store = store.with_base(Arc::new(base));
        }
        let registered = store.register_folder(&name, &path, &admin, false);
        registered.and_then(|_| store.resolve("copies")?.load().map(|weights| weights.sites.len()))
    };
    assert!(register(Some(Rows::read(&model, 0.0))).expect("the copies are the base's") >= 2);
    let without = register(None).expect_err("nobody to ask").to_string();
    assert!(without.contains("base_layer.weight") && without.contains("save_embedding_layers=False"), "{without}");
    let other = register(Some(Rows::read(&model, 0.01))).expect_err("one number differs").to_string();
    assert!(other.contains("base_layer.weight") && other.contains("row 7"), "{other}");
}
