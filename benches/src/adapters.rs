//! Random PEFT adapters, in the sizes of trained ones: on disk, and registered in a store.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result};
use half::{bf16, f16};
use openlora_adapters::{Actor, AdapterStore, BaseRows, Lease, StoreConfig};
use openlora_model::ModelFiles;
use openlora_types::{
    AdapterWeights, Alias, Elements, Generation, Limits, Matrix, ModelShape, Module, Site, SiteWeights,
};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use safetensors::tensor::{Dtype, TensorView};
use serde_json::json;

/// Writes `adapter_config.json` and `adapter_model.safetensors` for a rank `rank` adapter on `modules` of every layer.
/// Numbers are f16, uniform, with the spread that keeps the adapter's effect about as large as a trained one's; the same
/// seed gives the same bytes.
///
/// # Errors
/// Writing fails.
pub fn write_random(folder: &Path, shape: &ModelShape, rank: usize, modules: &[Module], seed: u64) -> Result<()> {
    std::fs::create_dir_all(folder)?;
    let mut rng = StdRng::seed_from_u64(seed);
    let mut numbers = |count: usize, spread: f32| -> Vec<u8> {
        let uniform = (0..count).map(|_| f16::from_f32(rng.random_range(-spread..spread)));
        uniform.flat_map(f16::to_le_bytes).collect()
    };
    let mut tensors: BTreeMap<String, (Vec<usize>, Vec<u8>)> = BTreeMap::new();
    for layer in 0..shape.layers as u32 {
        for &module in modules {
            let (inputs, outputs) = shape.dims(module);
            let site = Site { layer, module };
            let a = numbers(rank * inputs, (3.0 / inputs as f32).sqrt());
            tensors.insert(format!("base_model.model.{site}.lora_A.weight"), (vec![rank, inputs], a));
            tensors.insert(
                format!("base_model.model.{site}.lora_B.weight"),
                (vec![outputs, rank], numbers(outputs * rank, 0.03)),
            );
        }
    }
    let views = tensors
        .iter()
        .map(|(name, (shape, bytes))| Ok((name, TensorView::new(Dtype::F16, shape.clone(), bytes)?)))
        .collect::<Result<Vec<_>>>()?;
    safetensors::serialize_to_file(views, None, &folder.join("adapter_model.safetensors"))?;
    let names: Vec<_> = modules.iter().map(|&module| Site { layer: 0, module }.to_string()).collect();
    let names: Vec<_> = names.iter().map(|name| name.rsplit('.').next().unwrap_or(name)).collect();
    let config = json!({
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank, "lora_dropout": 0.0,
        "bias": "none", "target_modules": names, "base_model_name_or_path": shape.name, "inference_mode": true,
    });
    std::fs::write(folder.join("adapter_config.json"), config.to_string())?;
    Ok(())
}

/// Base rows that a store compares an adapter's copies with.
struct Base(Arc<ModelFiles>);

impl BaseRows for Base {
    fn read_row(&self, module: Module, row: usize, out: &mut [f32]) {
        self.0.read_row(Site { layer: 0, module }, row, out);
    }
}

/// The PEFT adapter in a folder, by a store of its own: the same way in as everyone's.
///
/// # Errors
/// It cannot be read, or does not fit the model.
pub fn read_folder(folder: &Path, files: &Arc<ModelFiles>) -> Result<Arc<AdapterWeights>> {
    let limits = Limits::default();
    let data = tempfile::tempdir()?;
    let folder = folder.canonicalize().with_context(|| folder.display().to_string())?;
    let config = StoreConfig {
        data_dir: data.path().to_owned(),
        allowed_roots: vec![folder.parent().context("a folder beside others")?.to_owned()],
        host_cache_bytes: 1 << 30,
        ..StoreConfig::default()
    };
    let store = AdapterStore::open(config, files.shape(), limits.clone())?.with_base(Arc::new(Base(Arc::clone(files))));
    let actor = Actor { name: "bench".into(), admin: true };
    store.register_folder(&Alias::parse("alias", "adapter", &limits)?, &folder, &actor, false)?;
    Ok(store.resolve("adapter")?.load()?)
}

/// A random adapter of rank `rank` on some modules of every layer, with the spread of a trained one's effect; the same seed gives the
/// same numbers, which bf16 holds.
#[must_use]
pub fn random_weights(shape: &ModelShape, rank: usize, modules: &[Module], seed: u64) -> AdapterWeights {
    let mut rng = StdRng::seed_from_u64(seed);
    let mut matrix = |rows: usize, cols: usize, spread: f32| {
        let numbers = (0..rows * cols).map(|_| bf16::from_f32(rng.random_range(-spread..spread)));
        Matrix { rows, cols, elements: Elements::Bf16(numbers.collect()) }
    };
    let mut sites = Vec::new();
    for layer in 0..shape.layers as u32 {
        for &module in modules {
            let (inputs, outputs) = shape.dims(module);
            let (a, b) = (matrix(rank, inputs, (3.0 / inputs as f32).sqrt()), matrix(outputs, rank, 0.03));
            sites.push(SiteWeights { site: Site { layer, module }, a, b, scale: 2.0, b_bias: None, magnitude: None });
        }
    }
    let mut generation = [0; 32];
    generation[..8].copy_from_slice(&seed.to_le_bytes());
    AdapterWeights { generation: Generation(generation), sites }
}

/// Registers `count` random adapters ([`write_random`]) in a store under `scratch`: the same way in as everyone's.
///
/// # Errors
/// Writing or registering fails.
pub fn register_random(
    scratch: &Path,
    shape: &ModelShape,
    rank: usize,
    modules: &[Module],
    count: usize,
) -> Result<Vec<Lease>> {
    let limits = Limits::default();
    let config = StoreConfig {
        data_dir: scratch.join("store"),
        allowed_roots: vec![scratch.to_owned()],
        host_cache_bytes: 4 << 30,
        ..StoreConfig::default()
    };
    let store = Arc::new(AdapterStore::open(config, shape.clone(), limits.clone())?);
    let actor = Actor { name: "bench".into(), admin: true };
    (0..count)
        .map(|i| {
            let folder = scratch.join(format!("a{i}"));
            write_random(&folder, shape, rank, modules, i as u64)?;
            let alias = Alias::parse("alias", &format!("bench/a{i}"), &limits)?;
            store.register_folder(&alias, &folder, &actor, false)?;
            Ok(store.resolve(alias.as_str())?)
        })
        .collect()
}
