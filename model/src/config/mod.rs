//! What a model's files say about its architecture, checked and brought into one form whatever the container.
//!
//! [`gguf`] reads GGUF metadata, [`hf`] reads `config.json`; both end in [`ModelConfig::checked`], so the forward pass never
//! meets a size that is zero, odd where it must be even, or large enough to overflow a product.

pub(crate) mod gguf;
pub(crate) mod hf;

use std::fmt;

use openlora_types::{Limits, ModelShape, Token};

use crate::error::ModelError;
use crate::rope::{RopeConfig, RopeScaling};

/// Largest value of a single dimension. Products of two stay far below 2^63.
const DIMENSION_MAX: usize = 1 << 24;

/// Decoder families this engine computes. They differ in biases, q/k norms and windows only.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Architecture {
    /// Llama 1 to 3 and everything of the same shape (SmolLM2, TinyLlama). GGUFs of Mistral models say `llama` as well.
    Llama,
    /// Mistral: Llama with a sliding window on all layers.
    Mistral,
    /// Qwen2 and Qwen2.5: biases on q, k and v.
    Qwen2,
    /// Qwen3: RMSNorm of each q and k head.
    Qwen3,
}

impl Architecture {
    /// The families, for messages.
    pub(crate) const SUPPORTED: &'static str = "llama, mistral, qwen2, qwen3";

    /// `model_type` in Hugging Face's configurations.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Llama => "llama",
            Self::Mistral => "mistral",
            Self::Qwen2 => "qwen2",
            Self::Qwen3 => "qwen3",
        }
    }
}

impl fmt::Display for Architecture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Which linears add a bias.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Biases {
    /// q, k and v.
    pub qkv: bool,
    /// o.
    pub o: bool,
    /// gate and up.
    pub gate_up: bool,
    /// down.
    pub down: bool,
}

/// A model's architecture, validated.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// Sizes, and the name the model is served under (the file's or folder's).
    pub shape: ModelShape,
    /// Family.
    pub architecture: Architecture,
    /// Epsilon of every RMSNorm.
    pub rms_eps: f32,
    /// Rotary embedding.
    pub rope: RopeConfig,
    /// Per layer: how many tokens a row sees, itself included; `None` sees all before it.
    pub windows: Vec<Option<usize>>,
    /// Which linears add a bias.
    pub biases: Biases,
    /// Whether q and k heads are normalised before the rotary embedding.
    pub qk_norm: bool,
    /// Tokens that end a sequence, ascending, possibly none.
    pub eos_tokens: Vec<Token>,
    /// The beginning-of-sequence token. Whether text starts with it is the tokenizer's to say
    /// ([`Tokenizer::prefix`](crate::text::Tokenizer::prefix)).
    pub bos: Option<Token>,
}

impl ModelConfig {
    /// Checks every size and relation.
    fn checked(mut self, limits: &Limits) -> Result<Self, ModelError> {
        if let RopeScaling::Yarn(yarn) = &self.rope.scaling {
            // Qwen's model cards turn YaRN on without raising the context length beside it.
            let stretched = (yarn.original_context as f64 * yarn.factor).min(DIMENSION_MAX as f64);
            self.shape.context = self.shape.context.max(stretched as usize);
        }
        let shape = &self.shape;
        let sizes = [
            ("hidden size", shape.hidden),
            ("feed-forward size", shape.intermediate),
            ("number of layers", shape.layers),
            ("number of heads", shape.heads),
            ("number of key-value heads", shape.kv_heads),
            ("head size", shape.head_dim),
            ("vocabulary size", shape.vocab),
            ("context length", shape.context),
        ];
        for (what, value) in sizes {
            if value == 0 || value > DIMENSION_MAX {
                return Err(ModelError::metadata(what, format!("is {value}; it must be from 1 to {DIMENSION_MAX}")));
            }
        }
        if shape.layers > limits.model_layers_max {
            let (value, max) = (shape.layers as u64, limits.model_layers_max as u64);
            return Err(ModelError::Limit { what: "number of layers".into(), value, limit: "model_layers_max", max });
        }
        if !shape.heads.is_multiple_of(shape.kv_heads) {
            let reason = format!("is {}; it must divide the {} heads", shape.kv_heads, shape.heads);
            return Err(ModelError::metadata("number of key-value heads", reason));
        }
        if !shape.head_dim.is_multiple_of(2) {
            return Err(ModelError::metadata("head size", format!("is {}; it must be even", shape.head_dim)));
        }
        if self.rope.rotary_dim != shape.head_dim {
            return Err(ModelError::Unsupported {
                what: "rotary dimensions".into(),
                value: self.rope.rotary_dim.to_string(),
                supported: format!("the whole head of {}", shape.head_dim),
            });
        }
        if !(self.rms_eps.is_finite() && self.rms_eps >= 0.0) {
            return Err(ModelError::metadata("RMSNorm epsilon", format!("is {}; it must be positive", self.rms_eps)));
        }
        self.rope.check()?;
        for window in self.windows.iter().flatten() {
            if *window == 0 {
                return Err(ModelError::metadata("sliding window", "is 0; it must be at least 1 or absent"));
            }
        }
        self.eos_tokens.sort_unstable();
        self.eos_tokens.dedup();
        for token in self.eos_tokens.iter().chain(&self.bos) {
            if *token as usize >= self.shape.vocab {
                let reason = format!("{token} is outside the vocabulary of {}", self.shape.vocab);
                return Err(ModelError::metadata("special token", reason));
            }
        }
        Ok(self)
    }
}
