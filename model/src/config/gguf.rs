//! GGUF metadata to [`ModelConfig`] (keys as in ggml's `docs/gguf.md` and llama.cpp's `llama-arch.cpp`).
//!
//! Keys of the architecture's own namespace change arithmetic, so one this file does not know is refused by name.

use openlora_types::{Limits, ModelShape, Token};

use super::{Architecture, Biases, ModelConfig};
use crate::error::ModelError;
use crate::gguf::GgufFile;
use crate::rope::{RopeConfig, RopeScaling, Yarn, YarnAttention};

/// Keys below `{architecture}.` that are understood or say nothing about arithmetic.
const KNOWN_KEYS: [&str; 30] = [
    "attention.causal",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.layer_norm_rms_epsilon",
    "attention.sliding_window",
    "attention.value_length",
    "block_count",
    "context_length",
    "embedding_length",
    "expert_count",
    "expert_used_count",
    "feed_forward_length",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scale_linear",
    "rope.scaling.attn_factor",
    "rope.scaling.factor",
    "rope.scaling.finetuned",
    "rope.scaling.original_context_length",
    "rope.scaling.type",
    "rope.scaling.yarn_attn_factor",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
    "rope.scaling.yarn_ext_factor",
    "rope.scaling.yarn_log_multiplier",
    "tensor_data_layout",
    "use_parallel_residual",
    "vocab_size",
    "pooling_type",
];

/// Reads the configuration. `name` is what the model will be served under; `rope_factors` are the values of the
/// `rope_freqs.weight` tensor.
///
/// # Errors
/// A missing or mistyped key, a value out of range, or anything this engine does not compute, by name.
pub(crate) fn read(
    file: &GgufFile,
    name: &str,
    rope_factors: Option<Vec<f32>>,
    limits: &Limits,
) -> Result<ModelConfig, ModelError> {
    let architecture_name = file.string("general.architecture")?;
    let architecture = match architecture_name {
        Some("llama") => Architecture::Llama,
        Some("qwen2") => Architecture::Qwen2,
        Some("qwen3") => Architecture::Qwen3,
        Some(other) => {
            return Err(ModelError::Unsupported {
                what: "general.architecture".into(),
                value: other.into(),
                supported: "llama (also Mistral), qwen2, qwen3".into(),
            });
        }
        None => return Err(ModelError::metadata("general.architecture", "is missing")),
    };
    let keys = Keys { file, prefix: architecture.name() };
    keys.refuse_unknown()?;
    let shape = shape(&keys, name, file)?;
    let windows = windows(&keys, architecture, shape.layers)?;
    let rms_eps = keys.float("attention.layer_norm_rms_epsilon")?;
    let rms_eps = rms_eps.ok_or_else(|| keys.missing("attention.layer_norm_rms_epsilon"))?;
    let eos_tokens = ["eos_token_id", "eot_token_id", "eom_token_id"]
        .iter()
        .filter_map(|key| token(file, &format!("tokenizer.ggml.{key}")).transpose())
        .collect::<Result<_, _>>()?;
    let config = ModelConfig {
        rope: rope(&keys, &shape, rope_factors)?,
        biases: biases(file, architecture),
        qk_norm: architecture == Architecture::Qwen3,
        bos: token(file, "tokenizer.ggml.bos_token_id")?,
        architecture,
        rms_eps,
        windows,
        eos_tokens,
        shape,
    };
    config.checked(limits)
}

/// Accessors below the architecture's own prefix.
struct Keys<'a> {
    file: &'a GgufFile,
    prefix: &'static str,
}

impl Keys<'_> {
    fn key(&self, key: &str) -> String {
        format!("{}.{key}", self.prefix)
    }

    fn missing(&self, key: &str) -> ModelError {
        ModelError::metadata(self.key(key), "is missing")
    }

    fn size(&self, key: &str) -> Result<Option<usize>, ModelError> {
        let value = self.file.uint(&self.key(key))?;
        let too_large = || ModelError::metadata(self.key(key), "is beyond this machine's range");
        value.map(|value| usize::try_from(value).map_err(|_| too_large())).transpose()
    }

    fn required(&self, key: &str) -> Result<usize, ModelError> {
        self.size(key)?.ok_or_else(|| self.missing(key))
    }

    fn float(&self, key: &str) -> Result<Option<f32>, ModelError> {
        self.file.float(&self.key(key))
    }

    fn refuse(&self, key: &str, value: impl ToString, supported: &str) -> ModelError {
        ModelError::Unsupported { what: self.key(key), value: value.to_string(), supported: supported.into() }
    }

    fn refuse_unknown(&self) -> Result<(), ModelError> {
        for (key, value) in self.file.metadata() {
            let own = key.strip_prefix(self.prefix).and_then(|rest| rest.strip_prefix('.'));
            if let Some(rest) = own
                && !KNOWN_KEYS.contains(&rest)
            {
                return Err(self.refuse(rest, value.kind(), "files without this key"));
            }
        }
        if let Some(experts @ 1..) = self.size("expert_count")? {
            return Err(self.refuse("expert_count", experts, "dense models"));
        }
        if self.file.boolean(&self.key("attention.causal"))? == Some(false) {
            return Err(self.refuse("attention.causal", false, "causal attention"));
        }
        if self.file.boolean(&self.key("use_parallel_residual"))? == Some(true) {
            return Err(self.refuse("use_parallel_residual", true, "sequential residuals"));
        }
        if let Some(pooling @ 1..) = self.size("pooling_type")? {
            return Err(self.refuse("pooling_type", pooling, "causal language models"));
        }
        Ok(())
    }
}

fn shape(keys: &Keys<'_>, name: &str, file: &GgufFile) -> Result<ModelShape, ModelError> {
    let hidden = keys.required("embedding_length")?;
    let heads = keys.required("attention.head_count")?;
    let key_length = keys.size("attention.key_length")?;
    let value_length = keys.size("attention.value_length")?;
    let head_dim = key_length.unwrap_or(hidden.checked_div(heads).unwrap_or(0));
    if value_length.is_some_and(|value_length| value_length != head_dim) {
        let supported = format!("the length of keys, {head_dim}");
        return Err(keys.refuse("attention.value_length", value_length.unwrap_or(0), &supported));
    }
    // The embedding table says how many tokens there are; the key is optional and the tokenizer may list fewer.
    let embedding = file.tensors().iter().find(|tensor| tensor.name == "token_embd.weight");
    let embedding = embedding.ok_or_else(|| ModelError::MissingTensor {
        name: "token_embd.weight".into(),
        architecture: keys.prefix.into(),
    })?;
    Ok(ModelShape {
        name: name.into(),
        hidden,
        intermediate: keys.required("feed_forward_length")?,
        layers: keys.required("block_count")?,
        heads,
        kv_heads: keys.size("attention.head_count_kv")?.unwrap_or(heads),
        head_dim,
        vocab: embedding.shape[0],
        tied_head: !file.tensors().iter().any(|tensor| tensor.name == "output.weight"),
        context: keys.required("context_length")?,
    })
}

fn windows(keys: &Keys<'_>, architecture: Architecture, layers: usize) -> Result<Vec<Option<usize>>, ModelError> {
    let window = keys.size("attention.sliding_window")?.filter(|window| *window > 0);
    if let Some(window) = window
        && architecture != Architecture::Llama
    {
        // Which layers it applies to is not in the file for these families.
        return Err(keys.refuse("attention.sliding_window", window, "qwen2 and qwen3 files without a window"));
    }
    // A hostile block_count must not size an allocation before it is checked; `checked` refuses it right after.
    Ok(vec![window; layers.min(1 << 16)])
}

fn biases(file: &GgufFile, architecture: Architecture) -> Biases {
    let has = |name: &str| file.tensors().iter().any(|tensor| tensor.name == name);
    Biases {
        qkv: architecture == Architecture::Qwen2 || has("blk.0.attn_q.bias"),
        o: has("blk.0.attn_output.bias"),
        gate_up: has("blk.0.ffn_gate.bias"),
        down: has("blk.0.ffn_down.bias"),
    }
}

fn rope(keys: &Keys<'_>, shape: &ModelShape, factors: Option<Vec<f32>>) -> Result<RopeConfig, ModelError> {
    let factor = match keys.float("rope.scaling.factor")? {
        Some(factor) => Some(factor),
        None => keys.float("rope.scale_linear")?,
    };
    let factor = factor.filter(|factor| *factor != 0.0).map_or(1.0, f64::from);
    let kind_key = keys.key("rope.scaling.type");
    let scaling = match keys.file.string(&kind_key)? {
        // llama.cpp takes a factor without a type as linear scaling.
        None | Some("linear") if factor != 1.0 => RopeScaling::Linear { factor },
        None | Some("linear" | "none") => RopeScaling::None,
        Some("yarn") => RopeScaling::Yarn(yarn(keys, shape, factor)?),
        Some(other) => return Err(keys.refuse("rope.scaling.type", other, "none, linear, yarn")),
    };
    Ok(RopeConfig {
        theta: f64::from(keys.float("rope.freq_base")?.unwrap_or(10_000.0)),
        rotary_dim: keys.size("rope.dimension_count")?.unwrap_or(shape.head_dim),
        scaling,
        factors,
    })
}

fn yarn(keys: &Keys<'_>, shape: &ModelShape, factor: f64) -> Result<Yarn, ModelError> {
    for (key, neutral) in [("rope.scaling.yarn_ext_factor", 1.0), ("rope.scaling.yarn_log_multiplier", 0.0)] {
        if let Some(value) = keys.float(key)?
            && value != neutral
        {
            return Err(keys.refuse(key, value, &neutral.to_string()));
        }
    }
    let mut times = 1.0;
    for key in ["rope.scaling.attn_factor", "rope.scaling.yarn_attn_factor"] {
        times *= keys.float(key)?.map_or(1.0, f64::from);
    }
    Ok(Yarn {
        factor,
        original_context: keys.size("rope.scaling.original_context_length")?.unwrap_or(shape.context),
        beta_fast: keys.float("rope.scaling.yarn_beta_fast")?.map_or(32.0, f64::from),
        beta_slow: keys.float("rope.scaling.yarn_beta_slow")?.map_or(1.0, f64::from),
        truncate: true,
        attention: YarnAttention::FromFactor { times },
    })
}

fn token(file: &GgufFile, key: &str) -> Result<Option<Token>, ModelError> {
    // 2^32 - 1 is how some converters write "none".
    let value = file.uint(key)?.filter(|value| *value != u64::from(u32::MAX));
    let too_large = || ModelError::metadata(key, "is not a token");
    value.map(|value| Token::try_from(value).map_err(|_| too_large())).transpose()
}
