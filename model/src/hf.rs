//! Hugging Face model folders: `config.json`, and weights in `model.safetensors` or in the shards that
//! `model.safetensors.index.json` lists.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::fs::File;
use std::io::Read;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use openlora_kernels::BlockFormat;
use openlora_kernels::mapped::MappedFile;
use openlora_types::Limits;
use safetensors::{Dtype, SafeTensors};
use serde::Deserialize;

use crate::config::{ModelConfig, hf as config};
use crate::error::ModelError;
use crate::files::TensorEntry;

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
const FORMATS: &str = "F32, F16, BF16 safetensors, or quantise to GGUF";

/// A folder's weights and configuration.
pub(crate) struct Folder {
    pub maps: Vec<Arc<MappedFile>>,
    pub tensors: Vec<TensorEntry>,
    pub config: ModelConfig,
}

/// Opens and checks a folder.
///
/// # Errors
/// A missing or broken file, by name.
pub(crate) fn open(path: &Path, name: &str, limits: &Limits) -> Result<Folder, ModelError> {
    let config = read_config(path, name, limits)?;
    let shards = shards(path, limits)?;
    let mut maps = Vec::with_capacity(shards.len());
    let mut tensors = Vec::new();
    let mut seen = HashSet::new();
    for (shard, promised) in &shards {
        let file_path = path.join(shard);
        let map = MappedFile::open(&file_path).map_err(|source| ModelError::Io { path: file_path, source })?;
        let mut entries = read_safetensors(shard, map.as_ref(), maps.len(), limits)?;
        let names: HashSet<&str> = entries.iter().map(|entry| entry.name.as_str()).collect();
        if let Some(missing) = promised.iter().find(|name| !names.contains(name.as_str())) {
            let reason = format!("{INDEX} says {shard} holds it, but it does not");
            return Err(ModelError::Tensor { name: missing.clone(), reason });
        }
        if let Some(twice) = entries.iter().find(|entry| !seen.insert(entry.name.clone())) {
            return Err(ModelError::Tensor { name: twice.name.clone(), reason: "is in two shards".into() });
        }
        tensors.append(&mut entries);
        check_count(tensors.len(), limits)?;
        maps.push(Arc::new(map));
    }
    Ok(Folder { maps, tensors, config })
}

fn read_config(path: &Path, name: &str, limits: &Limits) -> Result<ModelConfig, ModelError> {
    let read = |file: &str| read_bounded(&path.join(file), limits.model_json_bytes_max);
    let config_path = path.join("config.json");
    let config_bytes = read("config.json")?.ok_or_else(|| ModelError::Io {
        path: config_path,
        source: std::io::Error::new(std::io::ErrorKind::NotFound, "a model folder needs a config.json"),
    })?;
    config::read(&config_bytes, read("generation_config.json")?.as_deref(), name, limits)
}

/// A file's bytes, or `None` where there is no such file.
pub(crate) fn read_bounded(path: &Path, bytes_max: usize) -> Result<Option<Vec<u8>>, ModelError> {
    let failed = |source| ModelError::Io { path: path.to_owned(), source };
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(failed(error)),
    };
    let mut bytes = Vec::new();
    file.take(bytes_max as u64 + 1).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() > bytes_max {
        return Err(ModelError::Limit {
            what: format!("size of {} in bytes", path.display()),
            value: bytes.len() as u64,
            limit: "model_json_bytes_max",
            max: bytes_max as u64,
        });
    }
    Ok(Some(bytes))
}

/// Files that hold the weights, each with the tensors the index promises (none for a single file).
fn shards(path: &Path, limits: &Limits) -> Result<BTreeMap<String, BTreeSet<String>>, ModelError> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    if path.join(SINGLE).is_file() {
        return Ok(BTreeMap::from([(SINGLE.to_owned(), BTreeSet::new())]));
    }
    let Some(bytes) = read_bounded(&path.join(INDEX), limits.model_json_bytes_max)? else {
        let pickled = path.join("pytorch_model.bin").exists() || path.join("pytorch_model.bin.index.json").exists();
        let reason = if pickled {
            "holds only pickled weights, which are never read; convert them to safetensors with save_pretrained"
        } else {
            "holds neither model.safetensors nor model.safetensors.index.json"
        };
        return Err(ModelError::Malformed { file: path.display().to_string(), reason: reason.into() });
    };
    let malformed = |reason: String| ModelError::Malformed { file: INDEX.into(), reason };
    let index: Index = serde_json::from_slice(&bytes).map_err(|error| malformed(error.to_string()))?;
    check_count(index.weight_map.len(), limits)?;
    let mut shards: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for (tensor, shard) in index.weight_map {
        // Only plain names: an index must not reach outside its folder.
        let mut components =
            PathBuf::from(&shard).components().map(|c| matches!(c, Component::Normal(_))).collect::<Vec<_>>();
        if components.len() != 1 || components.pop() != Some(true) || shard.contains(['/', '\\', '\0']) {
            return Err(malformed(format!(
                "{tensor} is said to be in {shard:?}; it must be a file name in the folder"
            )));
        }
        shards.entry(shard).or_default().insert(tensor);
    }
    Ok(shards)
}

fn check_count(count: usize, limits: &Limits) -> Result<(), ModelError> {
    if count > limits.model_tensors_max {
        return Err(ModelError::Limit {
            what: "number of tensors".into(),
            value: count as u64,
            limit: "model_tensors_max",
            max: limits.model_tensors_max as u64,
        });
    }
    Ok(())
}

/// The tensors of one safetensors file, in file order. `map` is the file's number.
pub(crate) fn read_safetensors(
    file: &str,
    bytes: &[u8],
    map: usize,
    limits: &Limits,
) -> Result<Vec<TensorEntry>, ModelError> {
    let malformed = |reason: String| ModelError::Malformed { file: file.into(), reason };
    let header = bytes.first_chunk::<8>().map_or(0, |length| u64::from_le_bytes(*length));
    if header > limits.model_json_bytes_max as u64 {
        return Err(ModelError::Limit {
            what: format!("header of {file} in bytes"),
            value: header,
            limit: "model_json_bytes_max",
            max: limits.model_json_bytes_max as u64,
        });
    }
    // Checks that offsets neither overlap, leave gaps nor leave the file, and that lengths fit the shapes.
    let (header, metadata) = SafeTensors::read_metadata(bytes).map_err(|error| malformed(error.to_string()))?;
    let data_start = header + size_of::<u64>();
    let infos = metadata.tensors();
    check_count(infos.len(), limits)?;
    let mut entries = Vec::with_capacity(infos.len());
    for (name, info) in infos {
        let format = match info.dtype {
            Dtype::F32 => BlockFormat::F32,
            Dtype::F16 => BlockFormat::F16,
            Dtype::BF16 => BlockFormat::Bf16,
            other => return Err(ModelError::TensorFormat { name, format: format!("{other:?}"), supported: FORMATS }),
        };
        let (start, end) = info.data_offsets;
        entries.push(TensorEntry {
            name,
            shape: info.shape.clone(),
            format,
            map,
            range: data_start + start..data_start + end,
        });
    }
    entries.sort_by_key(|entry| entry.range.start);
    Ok(entries)
}
