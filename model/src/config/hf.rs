//! Hugging Face's `config.json` to [`ModelConfig`], with the defaults of transformers' configuration classes.
//!
//! Configurations carry many fields that only training or generation reads, so unknown fields cannot be refused; those
//! known to change arithmetic are, by name, and a tensor that nothing computes with is refused by the loader.

use openlora_types::{Limits, ModelShape, Token};
use serde::Deserialize;
use serde_json::Value;

use super::{Architecture, Biases, ModelConfig};
use crate::error::ModelError;
use crate::rope::{RopeConfig, RopeScaling, Yarn, YarnAttention};

/// Fields of other architectures, or of variants, that change the forward pass; refused unless absent, null, false or empty.
const REFUSED_FIELDS: [&str; 21] = [
    "quantization_config",
    "rope_interleaved",
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "logit_scale",
    "logits_scaling",
    "embedding_multiplier",
    "attention_multiplier",
    "residual_multiplier",
    "query_pre_attn_scalar",
    "use_qk_norm",
    "no_rope_layers",
    "no_rope_layer_interval",
    "attention_chunk_size",
    "attn_temperature_tuning",
    "use_mrope",
    "add_cross_attention",
    "is_encoder_decoder",
];

/// The fields that are read. `Option<Option<_>>`-like distinctions between absent and null go through [`Value`].
#[derive(Deserialize)]
struct Config {
    architectures: Option<Vec<String>>,
    model_type: Option<String>,
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    vocab_size: usize,
    max_position_embeddings: Option<usize>,
    original_max_position_embeddings: Option<usize>,
    rms_norm_eps: Option<f32>,
    hidden_act: Option<String>,
    tie_word_embeddings: Option<bool>,
    attention_bias: Option<bool>,
    mlp_bias: Option<bool>,
    partial_rotary_factor: Option<f64>,
    rope_theta: Option<f64>,
    use_sliding_window: Option<bool>,
    max_window_layers: Option<usize>,
    layer_types: Option<Vec<String>>,
    pretraining_tp: Option<u64>,
}

/// `rope_parameters` (transformers 5) or `rope_scaling` (before).
#[derive(Default, Deserialize)]
struct Rope {
    rope_type: Option<String>,
    #[serde(rename = "type")]
    old_type: Option<String>,
    rope_theta: Option<f64>,
    partial_rotary_factor: Option<f64>,
    factor: Option<f64>,
    original_max_position_embeddings: Option<usize>,
    attention_factor: Option<f64>,
    beta_fast: Option<f64>,
    beta_slow: Option<f64>,
    low_freq_factor: Option<f64>,
    high_freq_factor: Option<f64>,
    mscale: Option<f64>,
    mscale_all_dim: Option<f64>,
    truncate: Option<bool>,
    mrope_section: Option<Value>,
}

/// Reads the configuration from the bytes of `config.json` and, where there is one, `generation_config.json`. `name` is what
/// the model will be served under.
///
/// # Errors
/// Broken JSON, a missing or mistyped field, a value out of range, or anything this engine does not compute, by name.
pub(crate) fn read(
    config: &[u8],
    generation: Option<&[u8]>,
    name: &str,
    limits: &Limits,
) -> Result<ModelConfig, ModelError> {
    let value: Value = parse("config.json", config)?;
    let config: Config = serde_json::from_value(value.clone()).map_err(|error| broken("config.json", &error))?;
    let architecture = architecture(&config)?;
    refuse_fields(&config, &value)?;
    let shape = shape(&config, architecture, name)?;
    let special = SpecialTokens::read(generation, &value)?;
    let attention_bias = config.attention_bias.unwrap_or(false);
    let has_attention_bias = matches!(architecture, Architecture::Llama | Architecture::Qwen3);
    let mlp_bias = architecture == Architecture::Llama && config.mlp_bias.unwrap_or(false);
    let checked = ModelConfig {
        rms_eps: config.rms_norm_eps.unwrap_or(1e-6),
        rope: rope(&config, &value, shape.head_dim, shape.context)?,
        windows: windows(&config, &value, architecture, limits)?,
        biases: Biases {
            qkv: architecture == Architecture::Qwen2 || (has_attention_bias && attention_bias),
            o: has_attention_bias && attention_bias,
            gate_up: mlp_bias,
            down: mlp_bias,
        },
        qk_norm: architecture == Architecture::Qwen3,
        eos_tokens: special.eos,
        bos: special.bos,
        architecture,
        shape,
    };
    checked.checked(limits)
}

fn parse<'a, T: Deserialize<'a>>(file: &str, bytes: &'a [u8]) -> Result<T, ModelError> {
    serde_json::from_slice(bytes).map_err(|error| broken(file, &error))
}

fn broken(file: &str, error: &serde_json::Error) -> ModelError {
    ModelError::Malformed { file: file.into(), reason: error.to_string() }
}

fn unsupported(what: &str, value: impl ToString, supported: &str) -> ModelError {
    ModelError::Unsupported {
        what: format!("config.json: {what}"),
        value: value.to_string(),
        supported: supported.into(),
    }
}

fn architecture(config: &Config) -> Result<Architecture, ModelError> {
    let (architecture, class) = match config.model_type.as_deref() {
        Some("llama") => (Architecture::Llama, "LlamaForCausalLM"),
        Some("mistral") => (Architecture::Mistral, "MistralForCausalLM"),
        Some("qwen2") => (Architecture::Qwen2, "Qwen2ForCausalLM"),
        Some("qwen3") => (Architecture::Qwen3, "Qwen3ForCausalLM"),
        Some(other) => return Err(unsupported("model_type", other, Architecture::SUPPORTED)),
        None => return Err(ModelError::metadata("config.json: model_type", "is missing")),
    };
    match config.architectures.as_deref() {
        None | Some([]) => Ok(architecture),
        Some(classes) if classes.iter().any(|name| name == class) => Ok(architecture),
        Some(classes) => Err(unsupported("architectures", classes.join(", "), class)),
    }
}

fn refuse_fields(config: &Config, value: &Value) -> Result<(), ModelError> {
    for field in REFUSED_FIELDS {
        match value.get(field) {
            None | Some(Value::Null | Value::Bool(false)) => {}
            Some(Value::Array(items)) if items.is_empty() => {}
            Some(Value::Number(number)) if number.as_u64() == Some(0) => {}
            Some(found) => return Err(unsupported(field, found, "configurations without it")),
        }
    }
    match config.hidden_act.as_deref() {
        None | Some("silu" | "swish") => {}
        Some(other) => return Err(unsupported("hidden_act", other, "silu")),
    }
    match config.pretraining_tp {
        // Slices the same matrix products for bit-parity with tensor-parallel training; the mathematics is equal.
        None | Some(0 | 1) => Ok(()),
        Some(other) => Err(unsupported("pretraining_tp", other, "1")),
    }
}

fn shape(config: &Config, architecture: Architecture, name: &str) -> Result<ModelShape, ModelError> {
    let heads = config.num_attention_heads;
    let split = || config.hidden_size.checked_div(heads).unwrap_or(0);
    let head_dim = match architecture {
        Architecture::Qwen3 => config.head_dim.unwrap_or(128),
        _ => config.head_dim.unwrap_or_else(split),
    };
    // A null is "as many as heads" everywhere; an absent field takes the class's default, which only Llama sets so. A file
    // without it is too ambiguous to serve for the others.
    let kv_heads = match (config.num_key_value_heads, architecture) {
        (Some(kv_heads), _) => kv_heads,
        (None, Architecture::Llama) => heads,
        (None, _) => return Err(ModelError::metadata("config.json: num_key_value_heads", "is missing")),
    };
    let context = config.max_position_embeddings.unwrap_or(match architecture {
        Architecture::Llama => 2_048,
        Architecture::Mistral => 131_072,
        Architecture::Qwen2 | Architecture::Qwen3 => 32_768,
    });
    Ok(ModelShape {
        name: name.into(),
        hidden: config.hidden_size,
        intermediate: config.intermediate_size,
        layers: config.num_hidden_layers,
        heads,
        kv_heads,
        head_dim,
        vocab: config.vocab_size,
        tied_head: config.tie_word_embeddings.unwrap_or(false),
        context,
    })
}

fn windows(
    config: &Config,
    value: &Value,
    architecture: Architecture,
    limits: &Limits,
) -> Result<Vec<Option<usize>>, ModelError> {
    let layers = config.num_hidden_layers.min(limits.model_layers_max);
    let declared = match value.get("sliding_window") {
        None => Some(4_096),
        Some(Value::Null) => None,
        Some(window) => Some(window.as_u64().and_then(|window| usize::try_from(window).ok()).ok_or_else(|| {
            ModelError::metadata("config.json: sliding_window", format!("is {window}; it must be a positive integer"))
        })?),
    };
    match architecture {
        Architecture::Llama => match config.layer_types.as_deref() {
            Some(types) if types.iter().any(|kind| kind != "full_attention") => {
                Err(unsupported("layer_types", types.join(", "), "full_attention"))
            }
            _ => Ok(vec![None; layers]),
        },
        Architecture::Mistral => match &config.layer_types {
            Some(types) => Err(unsupported("layer_types", types.join(", "), "Mistral models without layer_types")),
            None => Ok(vec![declared; layers]),
        },
        Architecture::Qwen2 | Architecture::Qwen3 => {
            let window = declared.filter(|_| config.use_sliding_window.unwrap_or(false));
            let first = config.max_window_layers.unwrap_or(28);
            match &config.layer_types {
                Some(types) => layer_windows(types, window, config.num_hidden_layers),
                None => Ok((0..layers).map(|layer| window.filter(|_| layer >= first)).collect()),
            }
        }
    }
}

fn layer_windows(types: &[String], window: Option<usize>, layers: usize) -> Result<Vec<Option<usize>>, ModelError> {
    if types.len() != layers {
        let reason = format!("has {} entries for {layers} layers", types.len());
        return Err(ModelError::metadata("config.json: layer_types", reason));
    }
    let of_type = |kind: &String| match (kind.as_str(), window) {
        ("full_attention", _) => Ok(None),
        ("sliding_attention", Some(window)) => Ok(Some(window)),
        ("sliding_attention", None) => {
            Err(ModelError::metadata("config.json: layer_types", "has sliding_attention, but no window is in use"))
        }
        (other, _) => Err(unsupported("layer_types", other, "full_attention, sliding_attention")),
    };
    types.iter().map(of_type).collect()
}

fn rope(config: &Config, value: &Value, head_dim: usize, context: usize) -> Result<RopeConfig, ModelError> {
    let given = |field: &str| {
        value.get(field).filter(|value| !value.is_null() && value.as_object().is_none_or(|o| !o.is_empty()))
    };
    // transformers lets the older field win where both are given.
    let (field, object) = match (given("rope_scaling"), given("rope_parameters")) {
        (Some(object), _) => ("rope_scaling", Some(object)),
        (None, object) => ("rope_parameters", object),
    };
    let rope: Rope = match object {
        Some(object) => serde_json::from_value(object.clone())
            .map_err(|error| ModelError::metadata(format!("config.json: {field}"), format!("is malformed: {error}")))?,
        None => Rope::default(),
    };
    let name = |key: &str| format!("config.json: {field}.{key}");
    let need = |key: &str, value: Option<f64>| value.ok_or_else(|| ModelError::metadata(name(key), "is missing"));
    if let Some(section) = &rope.mrope_section {
        return Err(unsupported("mrope_section", section, "text-only models"));
    }
    let original = config.original_max_position_embeddings.or(rope.original_max_position_embeddings).unwrap_or(context);
    let kind = rope.rope_type.as_deref().or(rope.old_type.as_deref()).unwrap_or("default");
    let scaling = match kind {
        "default" => RopeScaling::None,
        "linear" => RopeScaling::Linear { factor: need("factor", rope.factor)? },
        "llama3" => RopeScaling::Llama3 {
            factor: need("factor", rope.factor)?,
            low_freq_factor: need("low_freq_factor", rope.low_freq_factor)?,
            high_freq_factor: need("high_freq_factor", rope.high_freq_factor)?,
            original_context: original,
        },
        "yarn" => RopeScaling::Yarn(Yarn {
            factor: rope.factor.unwrap_or(context as f64 / original.max(1) as f64),
            original_context: original,
            beta_fast: rope.beta_fast.filter(|beta| *beta != 0.0).unwrap_or(32.0),
            beta_slow: rope.beta_slow.filter(|beta| *beta != 0.0).unwrap_or(1.0),
            truncate: rope.truncate.unwrap_or(true),
            attention: yarn_attention(&rope),
        }),
        other => {
            return Err(ModelError::Unsupported {
                what: name("rope_type"),
                value: other.into(),
                supported: "default, linear, llama3, yarn".into(),
            });
        }
    };
    let partial = rope.partial_rotary_factor.or(config.partial_rotary_factor).unwrap_or(1.0);
    if partial != 1.0 {
        return Err(unsupported("partial_rotary_factor", partial, "1.0"));
    }
    let theta = rope.rope_theta.or(config.rope_theta).unwrap_or(10_000.0);
    Ok(RopeConfig { theta, rotary_dim: head_dim, scaling, factors: None })
}

fn yarn_attention(rope: &Rope) -> YarnAttention {
    let set = |value: Option<f64>| value.filter(|value| *value != 0.0);
    match (rope.attention_factor, set(rope.mscale), set(rope.mscale_all_dim)) {
        (Some(factor), _, _) => YarnAttention::Given(factor),
        (None, Some(mscale), Some(all_dim)) => YarnAttention::Ratio { mscale, all_dim },
        _ => YarnAttention::FromFactor { times: 1.0 },
    }
}

struct SpecialTokens {
    eos: Vec<Token>,
    bos: Option<Token>,
}

impl SpecialTokens {
    fn read(generation: Option<&[u8]>, config: &Value) -> Result<Self, ModelError> {
        let generation: Value = match generation {
            Some(bytes) => parse("generation_config.json", bytes)?,
            None => Value::Null,
        };
        // What generation_config.json says wins, as in `generate`.
        let first =
            |field: &str| [&generation, config].iter().find_map(|value| value.get(field).filter(|v| !v.is_null()));
        let eos = first("eos_token_id").map_or(Ok(Vec::new()), |value| tokens("eos_token_id", value))?;
        let bos = first("bos_token_id").map_or(Ok(Vec::new()), |value| tokens("bos_token_id", value))?;
        Ok(Self { eos, bos: bos.first().copied() })
    }
}

fn tokens(field: &str, value: &Value) -> Result<Vec<Token>, ModelError> {
    let one = |value: &Value| value.as_u64().and_then(|token| Token::try_from(token).ok());
    let all: Option<Vec<Token>> = match value {
        Value::Array(values) => values.iter().map(one).collect(),
        value => one(value).map(|token| vec![token]),
    };
    all.ok_or_else(|| {
        ModelError::metadata(format!("config.json: {field}"), format!("is {value}; it must be token ids"))
    })
}
