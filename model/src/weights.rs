//! Loading: from [`ModelFiles`] to a device. q, k, v and gate, up are stacked so that one pass over a row computes them.

use std::sync::Arc;

use openlora_kernels::{AttentionSpec, Backend, LinearSpec, SiteSpan};
use openlora_types::{ModelShape, Module, Site};

use crate::config::ModelConfig;
use crate::error::ModelError;
use crate::files::ModelFiles;
use crate::roles::Role;

/// Capacity a model is loaded with. Buffers are allocated for it once; a step that does not fit is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoadOptions {
    /// Rows of one step (`max_num_batched_tokens`).
    pub max_rows: usize,
    /// Rows of logits computed at once.
    pub max_logit_rows: usize,
    /// Positions a sequence may have; the model's context length caps it.
    pub max_position: usize,
    /// Tokens of one KV block.
    pub block_size: usize,
}

/// One decoder layer on the device.
pub(crate) struct Layer<B: Backend> {
    pub attention_norm: B::Vector,
    pub qkv: B::Linear,
    pub qk_norm: Option<(B::Vector, B::Vector)>,
    pub o: B::Linear,
    pub feed_forward_norm: B::Vector,
    pub gate_up: B::Linear,
    pub down: B::Linear,
    pub window: Option<usize>,
}

/// A base model on a device. Shared by the step thread and by threads that load adapters.
pub struct Model<B: Backend> {
    pub(crate) backend: Arc<B>,
    pub(crate) files: Arc<ModelFiles>,
    pub(crate) options: LoadOptions,
    pub(crate) attention: AttentionSpec,
    pub(crate) rope: B::Rope,
    pub(crate) embedding: B::Embedding,
    pub(crate) layers: Vec<Layer<B>>,
    pub(crate) final_norm: B::Vector,
    pub(crate) head: B::Linear,
}

impl<B: Backend> Model<B> {
    /// Loads all weights. `progress(done, total)` is called with bytes of the files read so far.
    ///
    /// # Errors
    /// What the backend refuses (a width its kernels cannot take, memory), naming the tensor.
    pub fn load(
        backend: Arc<B>,
        files: Arc<ModelFiles>,
        options: &LoadOptions,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Self, ModelError> {
        let config = files.config();
        let options = LoadOptions { max_position: options.max_position.min(config.shape.context), ..*options };
        let total = files.summary().bytes;
        let mut loader = Loader { backend: &*backend, files: &files, done: 0, total, progress };
        let embedding = loader.embedding()?;
        let layers = (0..config.shape.layers as u32).map(|layer| loader.layer(layer)).collect::<Result<_, _>>()?;
        let final_norm = loader.vector(Role::FinalNorm)?;
        let head = loader.head()?;
        (loader.progress)(total, total);
        Ok(Self {
            attention: attention_spec(config, options.block_size),
            rope: backend.load_rope(&config.rope.table(options.max_position))?,
            options,
            embedding,
            layers,
            final_norm,
            head,
            backend,
            files,
        })
    }

    /// Attention's sizes, for allocating the KV cache.
    #[must_use]
    pub fn attention_spec(&self) -> &AttentionSpec {
        &self.attention
    }

    /// Decoder layers.
    #[must_use]
    pub fn layers(&self) -> usize {
        self.layers.len()
    }

    /// Sizes and name.
    #[must_use]
    pub fn shape(&self) -> &ModelShape {
        &self.files.config().shape
    }

    /// The architecture.
    #[must_use]
    pub fn config(&self) -> &ModelConfig {
        self.files.config()
    }

    /// What the model was loaded for, `max_position` capped at the model's context.
    #[must_use]
    pub fn options(&self) -> &LoadOptions {
        &self.options
    }

    /// The device.
    #[must_use]
    pub fn backend(&self) -> &B {
        &self.backend
    }
}

fn attention_spec(config: &ModelConfig, block_size: usize) -> AttentionSpec {
    let shape = &config.shape;
    AttentionSpec {
        heads: shape.heads,
        kv_heads: shape.kv_heads,
        head_dim: shape.head_dim,
        block_size,
        scale: (1.0 / (shape.head_dim as f64).sqrt()) as f32,
        norm_eps: config.rms_eps,
    }
}

struct Loader<'a, B: Backend> {
    backend: &'a B,
    files: &'a ModelFiles,
    done: u64,
    total: u64,
    progress: &'a mut dyn FnMut(u64, u64),
}

impl<B: Backend> Loader<'_, B> {
    fn advance(&mut self, bytes: usize) {
        self.done += bytes as u64;
        (self.progress)(self.done, self.total);
    }

    /// The lookup table stays where it is mapped: a step touches a few rows of it.
    fn embedding(&mut self) -> Result<B::Embedding, ModelError> {
        let source = self.files.matrix(Role::Embedding);
        let (map, offset) = self.files.mapping(Role::Embedding);
        let embedding = self.backend.load_embedding(&source, map, offset)?;
        self.advance(source.bytes.len());
        Ok(embedding)
    }

    /// A tied head is the embedding table once more, repacked for the linear kernel.
    fn head(&mut self) -> Result<B::Linear, ModelError> {
        let site = Site { layer: 0, module: Module::LmHead };
        let role = self.files.weight_role(site);
        let linear = self.load(&[(role, site)], None)?;
        if role == Role::Head {
            self.advance(self.files.byte_len(role));
        }
        self.files.advise_unneeded(role);
        Ok(linear)
    }

    fn layer(&mut self, layer: u32) -> Result<Layer<B>, ModelError> {
        let qk_norm = match self.files.has(Role::QNorm(layer)) {
            true => Some((self.vector(Role::QNorm(layer))?, self.vector(Role::KNorm(layer))?)),
            false => None,
        };
        Ok(Layer {
            attention_norm: self.vector(Role::AttentionNorm(layer))?,
            qkv: self.linear(layer, &[Module::Q, Module::K, Module::V])?,
            qk_norm,
            o: self.linear(layer, &[Module::O])?,
            feed_forward_norm: self.vector(Role::FeedForwardNorm(layer))?,
            gate_up: self.linear(layer, &[Module::Gate, Module::Up])?,
            down: self.linear(layer, &[Module::Down])?,
            window: self.files.config().windows[layer as usize],
        })
    }

    fn vector(&mut self, role: Role) -> Result<B::Vector, ModelError> {
        let values = self.files.vector(role)?;
        let vector = self.backend.load_vector(&values)?;
        self.advance(self.files.byte_len(role));
        Ok(vector)
    }

    /// The stacked linear of `modules`, which all have a bias or none.
    fn linear(&mut self, layer: u32, modules: &[Module]) -> Result<B::Linear, ModelError> {
        let parts: Vec<(Role, Site)> =
            modules.iter().map(|module| (Role::Weight(layer, *module), Site { layer, module: *module })).collect();
        let mut bias = None;
        for module in modules {
            if self.files.has(Role::Bias(layer, *module)) {
                bias.get_or_insert_with(Vec::new).extend(self.files.vector(Role::Bias(layer, *module))?);
            }
        }
        let linear = self.load(&parts, bias)?;
        for (role, _) in &parts {
            // Repacked: the file's pages are only needed again for a DoRA norm.
            self.files.advise_unneeded(*role);
            self.advance(self.files.byte_len(*role));
        }
        Ok(linear)
    }

    fn load(&self, parts: &[(Role, Site)], bias: Option<Vec<f32>>) -> Result<B::Linear, ModelError> {
        let layers = self.files.config().shape.layers;
        let mut spec =
            LinearSpec { parts: Vec::with_capacity(parts.len()), bias, sites: Vec::with_capacity(parts.len()) };
        let mut start = 0;
        for (role, site) in parts {
            self.files.advise_needed(*role);
            let source = self.files.matrix(*role);
            let outputs = start..start + source.rows;
            start = outputs.end;
            spec.parts.push(source);
            spec.sites.push(SiteSpan { site: *site, index: site.index(layers), outputs });
        }
        Ok(self.backend.load_linear(&spec)?)
    }
}
