//! Adapters made by hand, byte by byte, for a base model small enough to think about.

use std::{fs, path::Path, sync::Arc};

use openlora_adapters::{Actor, AdapterError, AdapterInfo, AdapterStore, StoreConfig};
use openlora_database::testing::postgres_schema;
use openlora_types::{AdapterWeights, Alias, Limits, ModelShape};
use serde_json::{Value, json};
use tempfile::TempDir;

/// Two layers, 8 wide, two heads of 4, one key and value head, tied.
pub(crate) fn shape() -> ModelShape {
    ModelShape {
        name: "tiny".into(),
        hidden: 8,
        intermediate: 12,
        layers: 2,
        heads: 2,
        kv_heads: 1,
        head_dim: 4,
        vocab: 16,
        tied_head: true,
        context: 64,
    }
}

/// A tensor to write.
#[derive(Clone, Debug)]
pub(crate) struct Tensor {
    pub(crate) name: String,
    pub(crate) dtype: &'static str,
    pub(crate) shape: Vec<usize>,
    pub(crate) bytes: Vec<u8>,
}

impl Tensor {
    /// F32 with small numbers that depend on `seed`.
    pub(crate) fn f32(name: &str, shape: &[usize], seed: u64) -> Self {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            ((state % 2_001) as f32 - 1_000.0) / 1_000.0
        };
        let numbers: Vec<f32> = std::iter::repeat_with(next).take(shape.iter().product()).collect();
        Self::of(name, shape, &numbers)
    }

    /// F32 with the given numbers.
    pub(crate) fn of(name: &str, shape: &[usize], numbers: &[f32]) -> Self {
        let bytes = numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
        Self { name: name.into(), dtype: "F32", shape: shape.to_vec(), bytes }
    }
}

/// The bytes of a safetensors file: `header` after its length, then `data`.
pub(crate) fn safetensors_raw(header: &str, data: &[u8]) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header.as_bytes());
    bytes.extend_from_slice(data);
    bytes
}

/// The bytes of a safetensors file of `tensors`, in that order.
pub(crate) fn safetensors(tensors: &[Tensor]) -> Vec<u8> {
    let mut header = serde_json::Map::new();
    header.insert("__metadata__".into(), json!({"format": "pt"}));
    let mut data = Vec::new();
    for tensor in tensors {
        let start = data.len();
        data.extend_from_slice(&tensor.bytes);
        let entry = json!({"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [start, data.len()]});
        header.insert(tensor.name.clone(), entry);
    }
    safetensors_raw(&Value::Object(header).to_string(), &data)
}

/// A configuration and its tensors.
#[derive(Clone, Debug)]
pub(crate) struct Adapter {
    pub(crate) config: Value,
    pub(crate) tensors: Vec<Tensor>,
}

impl Adapter {
    /// Rank `rank` on q_proj and v_proj of both layers; alpha 4.
    pub(crate) fn qv(rank: usize, seed: u64) -> Self {
        let mut adapter = Self {
            config: json!({"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 4,
                           "target_modules": ["q_proj", "v_proj"]}),
            tensors: Vec::new(),
        };
        for layer in 0..2 {
            for (i, (module, outputs)) in [("q_proj", 8), ("v_proj", 4)].into_iter().enumerate() {
                let seed = seed * 100 + layer * 10 + i as u64;
                adapter.linear(&format!("model.layers.{layer}.self_attn.{module}"), rank, (8, outputs), seed);
            }
        }
        adapter
    }

    /// An adapter of `config` without tensors yet.
    pub(crate) fn bare(config: Value) -> Self {
        Self { config, tensors: Vec::new() }
    }

    /// Adds a linear's factors.
    pub(crate) fn linear(&mut self, module: &str, rank: usize, (inputs, outputs): (usize, usize), seed: u64) {
        let name = |part: &str| format!("base_model.model.{module}.{part}");
        self.tensors.push(Tensor::f32(&name("lora_A.weight"), &[rank, inputs], seed * 2 + 1));
        self.tensors.push(Tensor::f32(&name("lora_B.weight"), &[outputs, rank], seed * 2 + 2));
    }

    /// Adds a tensor.
    pub(crate) fn tensor(&mut self, name: &str, shape: &[usize]) {
        self.tensors.push(Tensor::f32(&format!("base_model.model.{name}"), shape, name.len() as u64));
    }

    /// The one tensor whose name ends so.
    pub(crate) fn find(&mut self, end: &str) -> &mut Tensor {
        self.tensors.iter_mut().find(|tensor| tensor.name.ends_with(end)).expect(end)
    }

    /// Sets a field of the configuration.
    pub(crate) fn set(&mut self, field: &str, value: Value) {
        self.config.as_object_mut().expect("an object").insert(field.into(), value);
    }

    pub(crate) fn config_bytes(&self) -> Vec<u8> {
        serde_json::to_vec_pretty(&self.config).expect("a value serialises")
    }

    pub(crate) fn tensor_bytes(&self) -> Vec<u8> {
        safetensors(&self.tensors)
    }

    /// Writes the folder.
    pub(crate) fn write(&self, dir: &Path) {
        write_files(dir, &self.config_bytes(), &self.tensor_bytes());
    }
}

/// Writes an adapter's folder from bytes.
pub(crate) fn write_files(dir: &Path, config: &[u8], tensors: &[u8]) {
    fs::create_dir_all(dir).expect("the folder is created");
    fs::write(dir.join("adapter_config.json"), config).expect("the configuration is written");
    fs::write(dir.join("adapter_model.safetensors"), tensors).expect("the tensors are written");
}

/// A store in a temporary folder, with a root that adapters may be registered from.
pub(crate) struct Bench {
    pub(crate) store: AdapterStore,
    pub(crate) dir: TempDir,
}

impl Bench {
    pub(crate) fn new() -> Self {
        Self::with(Limits::default(), 1 << 20)
    }

    pub(crate) fn with(limits: Limits, host_cache_bytes: u64) -> Self {
        let dir = TempDir::new().expect("a temporary folder");
        fs::create_dir_all(dir.path().join("root")).expect("the root is created");
        let store = open(dir.path(), limits, host_cache_bytes);
        Self { store, dir }
    }

    /// The same folder opened again, as after a restart.
    pub(crate) fn reopen(self) -> Self {
        let Self { store, dir } = self;
        drop(store);
        let store = open(dir.path(), Limits::default(), 1 << 20);
        Self { store, dir }
    }

    /// Writes `adapter` under the root and returns its path.
    pub(crate) fn write(&self, name: &str, adapter: &Adapter) -> std::path::PathBuf {
        let path = self.dir.path().join("root").join(name);
        adapter.write(&path);
        path
    }

    /// What `name` stands for, as an administrator sees it.
    pub(crate) fn info(&self, name: &str) -> AdapterInfo {
        self.store.get(name, &admin()).expect("registered")
    }

    /// The weights of what `name` stands for.
    pub(crate) fn load(&self, name: &str) -> Result<Arc<AdapterWeights>, AdapterError> {
        self.store.resolve(name)?.load()
    }

    pub(crate) fn data(&self) -> std::path::PathBuf {
        self.dir.path().join("data")
    }

    /// Files and folders of the store that a failed or finished change must not leave: everything in `staging`.
    pub(crate) fn staged(&self) -> usize {
        entries(&self.data().join("staging")).len()
    }

    /// The folder of a generation's files, where there is one.
    pub(crate) fn location(&self, generation: openlora_types::Generation) -> String {
        let mut found = entries(&self.data().join("adapters"));
        found.retain(|name| name.starts_with(&generation.to_string()));
        assert_eq!(found.len(), 1, "{found:?}");
        found.remove(0)
    }

    /// Generations on the disk.
    pub(crate) fn generations(&self) -> usize {
        entries(&self.data().join("adapters")).len()
    }
}

pub(crate) fn config(dir: &Path, host_cache_bytes: u64) -> StoreConfig {
    StoreConfig {
        data_dir: dir.join("data"),
        database_url: postgres_schema(dir).unwrap_or_default(),
        store_url: String::new(),
        allowed_roots: vec![dir.join("root")],
        host_cache_bytes,
    }
}

pub(crate) fn open(dir: &Path, limits: Limits, host_cache_bytes: u64) -> AdapterStore {
    AdapterStore::open(config(dir, host_cache_bytes), shape(), limits).expect("the store opens")
}

pub(crate) fn entries(dir: &Path) -> Vec<String> {
    let name =
        |entry: std::io::Result<fs::DirEntry>| entry.expect("readable").file_name().to_string_lossy().into_owned();
    fs::read_dir(dir).expect("the folder is there").map(name).collect()
}

pub(crate) fn alias(text: &str) -> Alias {
    Alias::parse("alias", text, &Limits::default()).expect(text)
}

pub(crate) fn actor(name: &str) -> Actor {
    Actor { name: name.into(), admin: false }
}

pub(crate) fn admin() -> Actor {
    Actor { name: "root".into(), admin: true }
}
