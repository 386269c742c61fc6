//! `adapter_config.json` into a checked [`LoraConfig`].
//!
//! PEFT ignores what it does not know, with a warning on a terminal nobody reads; here every field is one of three
//! things: computed exactly, known to change nothing at inference, or a reason to refuse the adapter by that field's
//! name. The meanings are PEFT 0.21's (`peft/tuners/lora/config.py`).

use openlora_types::Limits;

use crate::{
    error::AdapterError,
    json::{Json, shown},
    pattern::Pattern,
};

/// The file's name in an adapter's folder.
pub(crate) const CONFIG_FILE: &str = "adapter_config.json";

/// Patterns with look-around one configuration may hold: each match of one may take its whole step limit.
const SLOW_PATTERNS_MAX: usize = 16;

/// What `target_modules` or `exclude_modules` selects.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Selector {
    /// `"all-linear"`: every linear but the output head.
    AllLinear,
    /// A string: `re.fullmatch`.
    Regex(Pattern),
    /// A list: the module's name, or its end after a `.`.
    Names(Vec<String>),
}

/// An adapter's configuration, as far as it has a meaning at inference.
#[derive(Clone, Debug, PartialEq)]
pub struct LoraConfig {
    pub(crate) rank: usize,
    pub(crate) alpha: f64,
    pub(crate) rslora: bool,
    pub(crate) dora: bool,
    pub(crate) lora_bias: bool,
    /// In the file's order: the first that matches counts.
    pub(crate) rank_pattern: Vec<(Pattern, usize)>,
    pub(crate) alpha_pattern: Vec<(Pattern, f64)>,
    pub(crate) targets: Selector,
    pub(crate) exclude: Option<Selector>,
    /// Layers to keep; `None` keeps all.
    pub(crate) layers: Option<Vec<i128>>,
    pub(crate) layers_pattern: Vec<Pattern>,
    /// Adapters of tied layers share their factors; done only where no tied layer is adapted.
    pub(crate) ensure_weight_tying: bool,
}

/// How a field without arithmetic of its own is treated.
enum Rule {
    /// Changes nothing at inference, whatever it holds.
    Harmless,
    /// Must be switched off (null, false or empty); the text says what it would do.
    Off(&'static str),
}

/// Every field of PEFT's LoRA configuration that [`LoraConfig::parse`] does not read itself.
const OTHER_FIELDS: &[(&str, Rule)] = &[
    ("alora_invocation_tokens", Rule::Off("switches the adapter on in the middle of a prompt (aLoRA)")),
    ("arrow_config", Rule::Off("routes between several adapters (Arrow)")),
    ("auto_mapping", Rule::Harmless),
    ("base_model_name_or_path", Rule::Harmless),
    ("corda_config", Rule::Harmless), // Read by init_lora_weights = "corda" alone, which is refused.
    ("enable_lora", Rule::Off("adapts parts of a fused linear (a field of PEFT before 0.3)")),
    ("eva_config", Rule::Harmless),     // An initialisation of A; the base stays as it is.
    ("fan_in_fan_out", Rule::Harmless), // PEFT resets it for torch's Linear, which all linears here are.
    ("inference_mode", Rule::Harmless),
    ("kasa_config", Rule::Off("truncates the base weights (KaSA)")),
    ("layer_replication", Rule::Off("builds a deeper model out of repeated layers")),
    ("loftq_config", Rule::Harmless), // Read by init_lora_weights = "loftq" alone, which is refused.
    ("lora_dropout", Rule::Harmless), // Training only.
    ("lora_ga_config", Rule::Harmless), // Read by init_lora_weights = "lora_ga" alone, which is refused.
    ("megatron_config", Rule::Off("adapts Megatron's parallel linears")),
    ("megatron_core", Rule::Harmless), // The name of a Python module, used with megatron_config.
    ("merge_weights", Rule::Harmless), // How PEFT before 0.3 ran it, not what it computed.
    ("modules_to_save", Rule::Off("replaces whole modules of the base model")),
    ("monteclora_config", Rule::Off("samples its factors (MonteCLoRA)")),
    ("peft_version", Rule::Harmless),
    ("qalora_group_size", Rule::Harmless), // Used with use_qalora.
    ("revision", Rule::Harmless),
    ("runtime_config", Rule::Harmless), // PEFT drops it from files, too.
    ("target_parameters", Rule::Off("adapts bare parameters, such as a mixture's experts")),
    ("trainable_token_indices", Rule::Off("replaces rows of the embedding table")),
    ("use_bdlora", Rule::Off("makes the factors block-diagonal (BD-LoRA)")),
    ("use_qalora", Rule::Off("pools the input of quantised linears (QA-LoRA)")),
    ("velora_config", Rule::Off("stores further buffers for a compressed backward pass (VeLoRA)")),
];

fn refuse(field: &str, reason: impl Into<String>) -> AdapterError {
    AdapterError::invalid(format!("{CONFIG_FILE}: {}", shown(field)), reason)
}

impl LoraConfig {
    /// Reads a configuration of at most [`Limits::adapter_config_bytes_max`] bytes.
    ///
    /// # Errors
    /// [`AdapterError::Invalid`] naming the field that is wrong, unknown, or asks for something this server does not
    /// compute.
    pub fn parse(bytes: &[u8], limits: &Limits) -> Result<Self, AdapterError> {
        if bytes.len() > limits.adapter_config_bytes_max {
            let max = limits.adapter_config_bytes_max;
            let reason = format!("is {} bytes long; the limit adapter_config_bytes_max is {max}", bytes.len());
            return Err(AdapterError::invalid(CONFIG_FILE, reason));
        }
        let document = Json::parse(bytes).map_err(|(path, reason)| match path.as_str() {
            "" => AdapterError::invalid(CONFIG_FILE, reason),
            path => refuse(path, reason),
        })?;
        let Json::Map(fields) = document else {
            return Err(AdapterError::invalid(CONFIG_FILE, "must hold a JSON object"));
        };
        let mut reader = Fields { fields, limits, slow_patterns: 0 };
        let config = reader.config()?;
        reader.check_the_rest()?;
        config.check_combinations()
    }

    fn check_combinations(self) -> Result<Self, AdapterError> {
        if self.lora_bias && self.dora {
            return Err(refuse("lora_bias", "must be false with use_dora; PEFT has no such combination"));
        }
        if !matches!(self.targets, Selector::Names(_)) {
            for (field, set) in
                [("layers_to_transform", self.layers.is_some()), ("layers_pattern", !self.layers_pattern.is_empty())]
            {
                if set {
                    return Err(refuse(field, "must be null where target_modules is a string, as in PEFT"));
                }
            }
        } else if self.layers.is_none() && !self.layers_pattern.is_empty() {
            return Err(refuse("layers_pattern", "must be null without layers_to_transform, as in PEFT"));
        }
        Ok(self)
    }
}

struct Fields<'a> {
    /// What is left; each reader takes its field out.
    fields: Vec<(String, Json)>,
    limits: &'a Limits,
    slow_patterns: usize,
}

impl Fields<'_> {
    fn config(&mut self) -> Result<LoraConfig, AdapterError> {
        match self.take("peft_type") {
            Json::Text(kind) if kind == "LORA" => {}
            Json::Text(kind) => {
                return Err(refuse("peft_type", format!("is `{}`; only LORA is served", shown(&kind))));
            }
            _ => return Err(refuse("peft_type", "must be the string LORA; is this a PEFT adapter?")),
        }
        match self.take("task_type") {
            Json::Null => {}
            Json::Text(task) if task == "CAUSAL_LM" => {}
            Json::Text(task) => {
                return Err(refuse("task_type", format!("is `{}`; only CAUSAL_LM is served", shown(&task))));
            }
            _ => return Err(refuse("task_type", "must be CAUSAL_LM or null")),
        }
        self.check_initialisation()?;
        match self.take("bias") {
            Json::Null => {}
            Json::Text(bias) if bias == "none" => {}
            _ => {
                let why = "must be `none`; trained biases of the base model (`all`, `lora_only`) are not served";
                return Err(refuse("bias", why));
            }
        }
        let rank = match self.take("r") {
            Json::Null => 8,
            value => self.rank("r", &value)?,
        };
        let alpha = match self.take("lora_alpha") {
            Json::Null => 8.0,
            value => number("lora_alpha", &value)?,
        };
        Ok(LoraConfig {
            rank,
            alpha,
            rslora: self.flag("use_rslora")?,
            dora: self.flag("use_dora")?,
            lora_bias: self.flag("lora_bias")?,
            rank_pattern: self.patterns("rank_pattern", |this, field, value| this.rank(field, value))?,
            alpha_pattern: self.patterns("alpha_pattern", |_, field, value| number(field, value))?,
            targets: self.targets()?,
            exclude: self.selector("exclude_modules", false)?,
            layers: self.layers()?,
            layers_pattern: self.layers_pattern()?,
            ensure_weight_tying: self.flag("ensure_weight_tying")?,
        })
    }

    /// Some initialisations move a part of the base weights into the factors and expect the base so changed at
    /// inference; PEFT changes it again while loading, which would mean a base model of each such adapter's own.
    fn check_initialisation(&mut self) -> Result<(), AdapterError> {
        let field = "init_lora_weights";
        match self.take(field) {
            Json::Null | Json::Bool(_) => Ok(()),
            Json::Text(kind) => match kind.to_ascii_lowercase().as_str() {
                "gaussian" | "eva" | "orthogonal" | "mica" => Ok(()),
                _ => Err(refuse(
                    field,
                    format!(
                        "is `{}`, which alters the base weights; save the adapter with \
                         path_initial_model_for_weight_conversion, which makes plain LoRA of it",
                        shown(&kind)
                    ),
                )),
            },
            _ => Err(refuse(field, "must be true, false or the name of an initialisation")),
        }
    }

    fn check_the_rest(&self) -> Result<(), AdapterError> {
        for (field, value) in &self.fields {
            match OTHER_FIELDS.iter().find(|(known, _)| known == field) {
                Some((_, Rule::Harmless)) => {}
                _ if value.is_off() => {}
                Some((_, Rule::Off(what))) => {
                    return Err(refuse(field, format!("must be null: it {what}, which is not served")));
                }
                None => {
                    let why =
                        "is not known here and may change what the adapter computes; set it to null if it does not";
                    return Err(refuse(field, why));
                }
            }
        }
        Ok(())
    }

    /// The field's value, taken out; null where it is absent.
    fn take(&mut self, field: &str) -> Json {
        match self.fields.iter().position(|(key, _)| key == field) {
            Some(i) => self.fields.remove(i).1,
            None => Json::Null,
        }
    }

    fn flag(&mut self, field: &str) -> Result<bool, AdapterError> {
        match self.take(field) {
            Json::Null => Ok(false),
            Json::Bool(value) => Ok(value),
            _ => Err(refuse(field, "must be true or false")),
        }
    }

    fn rank(&self, field: &str, value: &Json) -> Result<usize, AdapterError> {
        let Json::Int(rank) = *value else {
            return Err(refuse(field, "must be a whole number"));
        };
        if rank < 1 {
            return Err(refuse(field, format!("is {rank}; a rank must be at least 1")));
        }
        let max = self.limits.lora_rank_max;
        usize::try_from(rank)
            .ok()
            .filter(|&rank| rank <= max)
            .ok_or_else(|| refuse(field, format!("is {rank}; the limit lora_rank_max is {max}")))
    }

    fn check_length(&self, field: &str, length: usize) -> Result<(), AdapterError> {
        let max = self.limits.adapter_list_max;
        if length <= max {
            return Ok(());
        }
        Err(refuse(field, format!("has {length} entries; the limit adapter_list_max is {max}")))
    }

    fn pattern(&mut self, field: &str, source: &str) -> Result<Pattern, AdapterError> {
        let pattern = Pattern::parse(source, self.limits).map_err(|why| refuse(field, why))?;
        self.slow_patterns += usize::from(pattern.looks_around());
        if self.slow_patterns > SLOW_PATTERNS_MAX {
            return Err(refuse(field, format!("has more than {SLOW_PATTERNS_MAX} patterns with look-around")));
        }
        Ok(pattern)
    }

    fn patterns<T>(
        &mut self,
        field: &str,
        value_of: impl Fn(&Self, &str, &Json) -> Result<T, AdapterError>,
    ) -> Result<Vec<(Pattern, T)>, AdapterError> {
        let entries = match self.take(field) {
            Json::Null => return Ok(Vec::new()),
            Json::Map(entries) => entries,
            _ => return Err(refuse(field, "must be an object of module names or patterns")),
        };
        self.check_length(field, entries.len())?;
        let mut patterns = Vec::with_capacity(entries.len());
        for (key, value) in entries {
            let pattern = self.pattern(field, &key)?;
            let value = value_of(self, &format!("{field}[{}]", shown(&key)), &value)?;
            patterns.push((pattern, value));
        }
        Ok(patterns)
    }

    fn targets(&mut self) -> Result<Selector, AdapterError> {
        // PEFT's default for all four families served here.
        let default = || Selector::Names(vec!["q_proj".into(), "v_proj".into()]);
        Ok(self.selector("target_modules", true)?.unwrap_or_else(default))
    }

    fn selector(&mut self, field: &str, shorthand: bool) -> Result<Option<Selector>, AdapterError> {
        match self.take(field) {
            Json::Null => Ok(None),
            Json::Text(text) if shorthand && text.eq_ignore_ascii_case("all-linear") => Ok(Some(Selector::AllLinear)),
            Json::Text(text) if !shorthand && text.is_empty() => Ok(None),
            Json::Text(text) => Ok(Some(Selector::Regex(self.pattern(field, &text)?))),
            Json::List(items) if items.is_empty() && shorthand => {
                Err(refuse(field, "is empty; an adapter must target at least one module"))
            }
            Json::List(items) => {
                self.check_length(field, items.len())?;
                let name = |item| match item {
                    Json::Text(name) => Ok(name),
                    _ => Err(refuse(field, "must hold strings only")),
                };
                let names = items.into_iter().map(name).collect::<Result<Vec<_>, _>>()?;
                Ok(Some(Selector::Names(names)).filter(|selector| *selector != Selector::Names(Vec::new())))
            }
            _ => Err(refuse(field, "must be a list of module names or a string")),
        }
    }

    fn layers(&mut self) -> Result<Option<Vec<i128>>, AdapterError> {
        let field = "layers_to_transform";
        match self.take(field) {
            Json::Null => Ok(None),
            Json::Int(layer) => Ok(Some(vec![layer])),
            Json::List(items) => {
                self.check_length(field, items.len())?;
                let layer = |item| match item {
                    Json::Int(layer) => Ok(layer),
                    _ => Err(refuse(field, "must hold whole numbers only")),
                };
                let layers = items.into_iter().map(layer).collect::<Result<Vec<_>, _>>()?;
                Ok(Some(layers).filter(|layers| !layers.is_empty()))
            }
            _ => Err(refuse(field, "must be a whole number or a list of them")),
        }
    }

    fn layers_pattern(&mut self) -> Result<Vec<Pattern>, AdapterError> {
        let field = "layers_pattern";
        let sources = match self.take(field) {
            Json::Null => return Ok(Vec::new()),
            Json::Text(text) if text.is_empty() => return Ok(Vec::new()),
            Json::Text(text) => vec![Json::Text(text)],
            Json::List(items) => items,
            _ => return Err(refuse(field, "must be a string or a list of strings")),
        };
        self.check_length(field, sources.len())?;
        let mut patterns = Vec::with_capacity(sources.len());
        for source in sources {
            let Json::Text(source) = source else {
                return Err(refuse(field, "must hold strings only"));
            };
            patterns.push(self.pattern(field, &source)?);
        }
        Ok(patterns)
    }
}

/// A finite number. PEFT divides Python numbers, which are 64-bit floats here.
fn number(field: &str, value: &Json) -> Result<f64, AdapterError> {
    let number = match *value {
        Json::Int(value) => value as f64,
        Json::Float(value) => value,
        _ => return Err(refuse(field, "must be a number")),
    };
    if number.is_finite() { Ok(number) } else { Err(refuse(field, "must be finite")) }
}
