//! A base model on disk: a GGUF file or a Hugging Face folder, opened, checked against its configuration and
//! memory-mapped. Nothing is read beyond headers until a model is loaded.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use half::{bf16, f16};
use openlora_kernels::mapped::MappedFile;
use openlora_kernels::reference::dequantise::dequantise_row;
use openlora_kernels::{BlockFormat, TensorSource};
use openlora_types::{Limits, ModelShape, Module, Site};

use crate::config::{self, ModelConfig};
use crate::error::ModelError;
use crate::gguf::GgufFile;
use crate::hf;
use crate::roles::{Layout, Role};
use crate::text::{ChatOptions, ChatTemplate, GgufVocab, Tokenizer};

/// One tensor of the model's files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct TensorEntry {
    /// Name in the file.
    pub name: String,
    /// Row-major shape, slowest first.
    pub shape: Vec<usize>,
    /// Storage.
    pub format: BlockFormat,
    /// Which mapped file.
    pub map: usize,
    /// Its bytes there.
    pub range: Range<usize>,
}

/// A tensor as [`ModelFiles::tensors`] lists it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TensorListing<'a> {
    /// Name in the file.
    pub name: &'a str,
    /// Row-major shape, `[outputs, inputs]` of a matrix.
    pub shape: &'a [usize],
    /// Storage.
    pub format: BlockFormat,
    /// Bytes in the file.
    pub bytes: u64,
}

/// Totals for `openlora model inspect`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelSummary {
    /// Container, such as `GGUF v3`.
    pub container: String,
    /// Family.
    pub architecture: &'static str,
    /// Numbers in all tensors.
    pub parameters: u64,
    /// Bytes of all tensors.
    pub bytes: u64,
    /// Tensors and bytes by storage format.
    pub formats: BTreeMap<&'static str, (usize, u64)>,
}

/// Where metadata beyond the weights comes from.
pub(crate) enum Container {
    /// A GGUF file's header.
    Gguf(Box<GgufFile>),
    /// A Hugging Face folder.
    Folder,
}

/// A model's files, opened and validated: every tensor the architecture needs is there with the right shape, and there is
/// no other.
pub struct ModelFiles {
    path: PathBuf,
    container: Container,
    maps: Vec<Arc<MappedFile>>,
    tensors: Vec<TensorEntry>,
    by_role: HashMap<Role, usize>,
    config: ModelConfig,
    limits: Limits,
    tokenizer: OnceLock<Tokenizer>,
    /// Where the file's rows of q and k go, if it holds them permuted.
    q_order: Option<Vec<u32>>,
    k_order: Option<Vec<u32>>,
}

impl ModelFiles {
    /// Opens a `.gguf` file or a model folder.
    ///
    /// # Errors
    /// A file that cannot be read or is broken, an architecture or storage type without an implementation, a missing,
    /// unknown or mis-shaped tensor; each by name.
    pub fn open(path: &Path, limits: &Limits) -> Result<Self, ModelError> {
        let failed = |source| ModelError::Io { path: path.to_owned(), source };
        let metadata = std::fs::metadata(path).map_err(failed)?;
        if metadata.is_dir() {
            // The folder's own name, also where the path ends in `.` or `..`.
            let name = path.canonicalize().map_err(failed)?;
            let name = name.file_name().map_or_else(|| "model".into(), |name| name.to_string_lossy());
            let hf::Folder { maps, tensors, config } = hf::open(path, &name, limits)?;
            return Self::assemble(path, Container::Folder, maps, tensors, config, limits);
        }
        let map = MappedFile::open(path).map_err(failed)?;
        let name = path.file_stem().map_or_else(|| "model".into(), |name| name.to_string_lossy());
        let (gguf, tensors, config) = read_gguf(map.as_ref(), &name, limits)?;
        Self::assemble(path, Container::Gguf(Box::new(gguf)), vec![Arc::new(map)], tensors, config, limits)
    }

    fn assemble(
        path: &Path,
        container: Container,
        maps: Vec<Arc<MappedFile>>,
        mut tensors: Vec<TensorEntry>,
        config: ModelConfig,
        limits: &Limits,
    ) -> Result<Self, ModelError> {
        let layout = match container {
            Container::Gguf(_) => Layout::Gguf,
            Container::Folder => Layout::HuggingFace,
        };
        if layout == Layout::HuggingFace {
            drop_tied_head(&mut tensors, &maps, &config)?;
            // Buffers of old checkpoints: a function of the configuration, recomputed here.
            tensors.retain(|tensor| !tensor.name.ends_with(".rotary_emb.inv_freq"));
        }
        let by_role = layout.assign(&config, &tensors)?;
        let permuted = layout == Layout::Gguf && config.architecture == crate::config::Architecture::Llama;
        let order = |heads: usize| permuted.then(|| interleaved_to_halves(heads, config.shape.head_dim));
        let (q_order, k_order) = (order(config.shape.heads), order(config.shape.kv_heads));
        let (path, limits) = (path.to_owned(), limits.clone());
        let tokenizer = OnceLock::new();
        Ok(Self { path, container, maps, tensors, by_role, config, limits, tokenizer, q_order, k_order })
    }

    /// What was opened.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The architecture.
    #[must_use]
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Sizes and name.
    #[must_use]
    pub fn shape(&self) -> ModelShape {
        self.config.shape.clone()
    }

    /// Serves the model under another name than its file's.
    #[must_use]
    pub fn named(mut self, name: impl Into<String>) -> Self {
        self.config.shape.name = name.into();
        self
    }

    /// The GGUF header, where the model is a GGUF file.
    #[must_use]
    pub fn gguf(&self) -> Option<&GgufFile> {
        match &self.container {
            Container::Gguf(file) => Some(file),
            Container::Folder => None,
        }
    }

    /// The tokenizer, from `tokenizer.json` or from the GGUF's own vocabulary. Built on the first call.
    ///
    /// # Errors
    /// A missing, damaged or unsupported tokenizer.
    pub fn tokenizer(&self) -> Result<Tokenizer, ModelError> {
        if let Some(tokenizer) = self.tokenizer.get() {
            return Ok(tokenizer.clone());
        }
        let tokenizer = match &self.container {
            Container::Gguf(file) => Tokenizer::from_gguf(GgufVocab::from_metadata(file)?)?,
            Container::Folder => Tokenizer::from_folder(&self.path)?,
        };
        Ok(self.tokenizer.get_or_init(|| tokenizer).clone())
    }

    /// The chat template, where the model has one, with [`ChatOptions::default`].
    ///
    /// # Errors
    /// A tokenizer or template that cannot be read, or a template that does not compile.
    pub fn chat_template(&self) -> Result<Option<ChatTemplate>, ModelError> {
        self.chat_template_with(ChatOptions::default())
    }

    /// As [`Self::chat_template`], with other options.
    ///
    /// # Errors
    /// As [`Self::chat_template`].
    pub fn chat_template_with(&self, options: ChatOptions) -> Result<Option<ChatTemplate>, ModelError> {
        let tokenizer = &self.tokenizer()?;
        match &self.container {
            Container::Gguf(file) => {
                let source = file.string("tokenizer.chat_template")?;
                let template = source.map(|source| ChatTemplate::new(source, tokenizer, options, &self.limits));
                Ok(template.transpose()?)
            }
            Container::Folder => Ok(ChatTemplate::from_folder(&self.path, tokenizer, options, &self.limits)?),
        }
    }

    /// One row of a base matrix, dequantised, in Hugging Face's order: what adapters that carry copies of the base are
    /// compared with.
    ///
    /// # Panics
    /// Where `site` is not of this model, `row` not one of its outputs (of its tokens, for the embedding), or `out` not as
    /// long as a row.
    pub fn read_row(&self, site: Site, row: usize, out: &mut [f32]) {
        dequantise_row(&self.matrix(self.weight_role(site)), row, out);
    }

    /// All tensors, in file order.
    pub fn tensors(&self) -> impl Iterator<Item = TensorListing<'_>> {
        self.tensors.iter().map(|tensor| TensorListing {
            name: &tensor.name,
            shape: &tensor.shape,
            format: tensor.format,
            bytes: tensor.range.len() as u64,
        })
    }

    /// Totals.
    #[must_use]
    pub fn summary(&self) -> ModelSummary {
        let container = match &self.container {
            Container::Gguf(file) => format!("GGUF v{}", file.version()),
            Container::Folder => format!("safetensors, {} file(s)", self.maps.len()),
        };
        let architecture = self.config.architecture.name();
        let mut summary = ModelSummary { container, architecture, parameters: 0, bytes: 0, formats: BTreeMap::new() };
        for tensor in self.tensors() {
            summary.parameters += tensor.shape.iter().map(|dim| *dim as u64).product::<u64>();
            summary.bytes += tensor.bytes;
            let (count, bytes) = summary.formats.entry(tensor.format.name()).or_default();
            *count += 1;
            *bytes += tensor.bytes;
        }
        summary
    }

    /// The tensor that holds a site's base weights.
    pub(crate) fn weight_role(&self, site: Site) -> Role {
        match site.module {
            Module::Embed => Role::Embedding,
            Module::LmHead if self.config.shape.tied_head => Role::Embedding,
            Module::LmHead => Role::Head,
            module => Role::Weight(site.layer, module),
        }
    }

    /// Whether a role has a tensor (biases and norms differ between families).
    pub(crate) fn has(&self, role: Role) -> bool {
        self.by_role.contains_key(&role)
    }

    /// The entry of a role that [`Layout::assign`] guaranteed.
    fn entry(&self, role: Role) -> &TensorEntry {
        let index =
            self.by_role.get(&role).expect("only roles of the configuration are asked for, and those were assigned");
        &self.tensors[*index]
    }

    fn bytes(&self, entry: &TensorEntry) -> &[u8] {
        &self.maps[entry.map].as_ref().as_ref()[entry.range.clone()]
    }

    fn row_order(&self, role: Role) -> Option<&[u32]> {
        match role {
            Role::Weight(_, Module::Q) | Role::Bias(_, Module::Q) => self.q_order.as_deref(),
            Role::Weight(_, Module::K) | Role::Bias(_, Module::K) => self.k_order.as_deref(),
            _ => None,
        }
    }

    /// A matrix where it lies.
    pub(crate) fn matrix(&self, role: Role) -> TensorSource<'_> {
        let entry = self.entry(role);
        TensorSource {
            name: &entry.name,
            format: entry.format,
            rows: entry.shape[0],
            cols: entry.shape[1],
            bytes: self.bytes(entry),
            row_order: self.row_order(role),
        }
    }

    /// A vector's values, in Hugging Face's order.
    pub(crate) fn vector(&self, role: Role) -> Result<Vec<f32>, ModelError> {
        let entry = self.entry(role);
        let values = read_vector(entry, self.bytes(entry))?;
        Ok(match self.row_order(role) {
            Some(order) => order.iter().map(|row| values[*row as usize]).collect(),
            None => values,
        })
    }

    /// Bytes of a role's tensor in the file.
    pub(crate) fn byte_len(&self, role: Role) -> usize {
        self.entry(role).range.len()
    }

    /// The mapping of a role's file, and the tensor's offset there.
    pub(crate) fn mapping(&self, role: Role) -> (Arc<MappedFile>, usize) {
        let entry = self.entry(role);
        (Arc::clone(&self.maps[entry.map]), entry.range.start)
    }

    /// A role's bytes will be read from start to end soon.
    pub(crate) fn advise_needed(&self, role: Role) {
        let entry = self.entry(role);
        self.maps[entry.map].advise_needed(entry.range.clone());
    }

    /// A role's bytes were copied; the pages need not stay.
    pub(crate) fn advise_unneeded(&self, role: Role) {
        let entry = self.entry(role);
        self.maps[entry.map].advise_unneeded(entry.range.clone());
    }
}

/// Parses a GGUF file's header into tensors and configuration; the fuzz target's entry.
pub(crate) fn read_gguf(
    bytes: &[u8],
    name: &str,
    limits: &Limits,
) -> Result<(GgufFile, Vec<TensorEntry>, ModelConfig), ModelError> {
    let gguf = GgufFile::parse(bytes, limits)?;
    let entry = |tensor: &crate::gguf::GgufTensor| TensorEntry {
        name: tensor.name.clone(),
        shape: tensor.shape.clone(),
        format: tensor.format,
        map: 0,
        range: tensor.range.clone(),
    };
    let tensors: Vec<TensorEntry> = gguf.tensors().iter().map(entry).collect();
    let factors = tensors.iter().find(|tensor| tensor.name == Role::RopeFactors.gguf_name());
    let factors = factors.map(|entry| read_vector(entry, &bytes[entry.range.clone()])).transpose()?;
    let config = config::gguf::read(&gguf, name, factors, limits)?;
    Ok((gguf, tensors, config))
}

/// Values of a one-dimensional tensor.
fn read_vector(entry: &TensorEntry, bytes: &[u8]) -> Result<Vec<f32>, ModelError> {
    let pairs = || bytes.chunks_exact(2).map(|pair| [pair[0], pair[1]]);
    Ok(match entry.format {
        BlockFormat::F32 => bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
        BlockFormat::F16 => pairs().map(|pair| f16::from_le_bytes(pair).to_f32()).collect(),
        BlockFormat::Bf16 => pairs().map(|pair| bf16::from_le_bytes(pair).to_f32()).collect(),
        other => {
            return Err(ModelError::TensorFormat {
                name: entry.name.clone(),
                format: other.name().into(),
                supported: "F32, F16, BF16 for vectors",
            });
        }
    })
}

/// Some checkpoints of tied models store the head as well. Equal bytes say nothing new; others would be another model.
fn drop_tied_head(
    tensors: &mut Vec<TensorEntry>,
    maps: &[Arc<MappedFile>],
    config: &ModelConfig,
) -> Result<(), ModelError> {
    let find = |role: Role| tensors.iter().find(|tensor| tensor.name == role.hf_name());
    let (true, Some(head), Some(embedding)) = (config.shape.tied_head, find(Role::Head), find(Role::Embedding)) else {
        return Ok(());
    };
    let bytes = |entry: &TensorEntry| &maps[entry.map].as_ref().as_ref()[entry.range.clone()];
    if (head.format, &head.shape) != (embedding.format, &embedding.shape) || bytes(head) != bytes(embedding) {
        let reason = "differs from the embedding although tie_word_embeddings is true";
        return Err(ModelError::Tensor { name: head.name.clone(), reason: reason.into() });
    }
    tensors.retain(|tensor| tensor.name != Role::Head.hf_name());
    Ok(())
}

/// llama.cpp's converter stores q and k of Llama models with each head's rows interleaved (pairs 2j, 2j+1 rotate together);
/// Hugging Face rotates j with j + head_dim/2. Entry i is the file's row that becomes row i.
fn interleaved_to_halves(heads: usize, head_dim: usize) -> Vec<u32> {
    let half = head_dim / 2;
    let row = move |head: usize, i: usize| head * head_dim + (i % half) * 2 + i / half;
    (0..heads).flat_map(|head| (0..head_dim).map(move |i| row(head, i) as u32)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_row_order_undoes_llama_cpps_permutation() {
        // convert_hf_to_gguf: w.reshape(heads, 2, dim/2).swapaxes(1, 2)
        let (heads, dim) = (3, 8);
        let mut file_rows = vec![0; heads * dim];
        for head in 0..heads {
            for part in 0..2 {
                for j in 0..dim / 2 {
                    file_rows[head * dim + j * 2 + part] = head * dim + part * (dim / 2) + j;
                }
            }
        }
        let restored: Vec<usize> =
            interleaved_to_halves(heads, dim).iter().map(|row| file_rows[*row as usize]).collect();
        assert_eq!(restored, (0..heads * dim).collect::<Vec<_>>());
    }
}
