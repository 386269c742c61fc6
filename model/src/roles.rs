//! Which tensor plays which part: names in GGUF files and in Hugging Face folders, what an architecture needs, and the
//! check that the files hold exactly that.

use std::collections::HashMap;

use openlora_types::{Module, Site};

use crate::config::{Biases, ModelConfig};
use crate::error::ModelError;
use crate::files::TensorEntry;

/// A tensor's part in the model. `u32` is the layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Role {
    /// `[vocab, hidden]`
    Embedding,
    /// `[hidden]`
    FinalNorm,
    /// `[vocab, hidden]`
    Head,
    /// `[head_dim / 2]`
    RopeFactors,
    /// Norm before attention, `[hidden]`
    AttentionNorm(u32),
    /// Norm before the feed-forward part, `[hidden]`
    FeedForwardNorm(u32),
    /// `[head_dim]`
    QNorm(u32),
    /// `[head_dim]`
    KNorm(u32),
    /// `[outputs, inputs]` of one of [`Module::IN_LAYER`]
    Weight(u32, Module),
    /// `[outputs]`
    Bias(u32, Module),
}

impl Role {
    /// Name in a GGUF file (llama.cpp's `llama-arch.cpp`).
    pub(crate) fn gguf_name(self) -> String {
        match self {
            Self::Embedding => "token_embd.weight".into(),
            Self::FinalNorm => "output_norm.weight".into(),
            Self::Head => "output.weight".into(),
            Self::RopeFactors => "rope_freqs.weight".into(),
            Self::AttentionNorm(layer) => format!("blk.{layer}.attn_norm.weight"),
            Self::FeedForwardNorm(layer) => format!("blk.{layer}.ffn_norm.weight"),
            Self::QNorm(layer) => format!("blk.{layer}.attn_q_norm.weight"),
            Self::KNorm(layer) => format!("blk.{layer}.attn_k_norm.weight"),
            Self::Weight(layer, module) => format!("blk.{layer}.{}.weight", gguf_module(module)),
            Self::Bias(layer, module) => format!("blk.{layer}.{}.bias", gguf_module(module)),
        }
    }

    /// Name in a Hugging Face checkpoint.
    pub(crate) fn hf_name(self) -> String {
        match self {
            Self::Embedding => "model.embed_tokens.weight".into(),
            Self::FinalNorm => "model.norm.weight".into(),
            Self::Head => "lm_head.weight".into(),
            Self::RopeFactors => "rope_freqs.weight".into(),
            Self::AttentionNorm(layer) => format!("model.layers.{layer}.input_layernorm.weight"),
            Self::FeedForwardNorm(layer) => format!("model.layers.{layer}.post_attention_layernorm.weight"),
            Self::QNorm(layer) => format!("model.layers.{layer}.self_attn.q_norm.weight"),
            Self::KNorm(layer) => format!("model.layers.{layer}.self_attn.k_norm.weight"),
            Self::Weight(layer, module) => format!("{}.weight", Site { layer, module }),
            Self::Bias(layer, module) => format!("{}.bias", Site { layer, module }),
        }
    }

    fn shape(self, config: &ModelConfig) -> Vec<usize> {
        let shape = &config.shape;
        match self {
            Self::Embedding | Self::Head => vec![shape.vocab, shape.hidden],
            Self::FinalNorm | Self::AttentionNorm(_) | Self::FeedForwardNorm(_) => vec![shape.hidden],
            Self::RopeFactors => vec![shape.head_dim / 2],
            Self::QNorm(_) | Self::KNorm(_) => vec![shape.head_dim],
            Self::Weight(_, module) => {
                let (inputs, outputs) = shape.dims(module);
                vec![outputs, inputs]
            }
            Self::Bias(_, module) => vec![shape.dims(module).1],
        }
    }
}

fn gguf_module(module: Module) -> &'static str {
    match module {
        Module::Q => "attn_q",
        Module::K => "attn_k",
        Module::V => "attn_v",
        Module::O => "attn_output",
        Module::Gate => "ffn_gate",
        Module::Up => "ffn_up",
        Module::Down => "ffn_down",
        Module::Embed => "token_embd",
        Module::LmHead => "output",
    }
}

/// Naming scheme of the container.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Layout {
    /// GGUF.
    Gguf,
    /// Hugging Face.
    HuggingFace,
}

impl Layout {
    fn name(self, role: Role) -> String {
        match self {
            Self::Gguf => role.gguf_name(),
            Self::HuggingFace => role.hf_name(),
        }
    }

    /// Finds each needed tensor, checks its shape, and refuses any that is left over.
    pub(crate) fn assign(
        self,
        config: &ModelConfig,
        tensors: &[TensorEntry],
    ) -> Result<HashMap<Role, usize>, ModelError> {
        let mut unused: HashMap<&str, usize> =
            tensors.iter().enumerate().map(|(index, tensor)| (tensor.name.as_str(), index)).collect();
        let architecture = config.architecture.name();
        let mut by_role = HashMap::with_capacity(tensors.len());
        for role in roles(config) {
            let name = self.name(role);
            let Some(index) = unused.remove(name.as_str()) else {
                return Err(ModelError::MissingTensor { name, architecture: architecture.into() });
            };
            let (expected, found) = (role.shape(config), &tensors[index].shape);
            if expected != *found {
                return Err(ModelError::TensorShape { name, expected, found: found.clone() });
            }
            by_role.insert(role, index);
        }
        match unused.into_keys().min() {
            None => Ok(by_role),
            Some(name) => Err(ModelError::UnknownTensor { name: name.into(), architecture: architecture.into() }),
        }
    }
}

/// Every tensor a configuration needs, in the order of the forward pass.
fn roles(config: &ModelConfig) -> impl Iterator<Item = Role> + use<'_> {
    let before = [Role::Embedding].into_iter().chain(config.rope.factors.is_some().then_some(Role::RopeFactors));
    let layers = (0..config.shape.layers as u32).flat_map(|layer| layer_roles(config, layer));
    let head = (!config.shape.tied_head).then_some(Role::Head);
    before.chain(layers).chain([Role::FinalNorm]).chain(head)
}

fn layer_roles(config: &ModelConfig, layer: u32) -> impl Iterator<Item = Role> + use<> {
    let biases = config.biases;
    let norms = [Role::AttentionNorm(layer), Role::FeedForwardNorm(layer)];
    let head_norms = config.qk_norm.then_some([Role::QNorm(layer), Role::KNorm(layer)]);
    let linears = Module::IN_LAYER.into_iter().flat_map(move |module| {
        let bias = has_bias(biases, module).then_some(Role::Bias(layer, module));
        [Role::Weight(layer, module)].into_iter().chain(bias)
    });
    norms.into_iter().chain(head_norms.into_iter().flatten()).chain(linears)
}

fn has_bias(biases: Biases, module: Module) -> bool {
    match module {
        Module::Q | Module::K | Module::V => biases.qkv,
        Module::O => biases.o,
        Module::Gate | Module::Up => biases.gate_up,
        Module::Down => biases.down,
        Module::Embed | Module::LmHead => false,
    }
}
