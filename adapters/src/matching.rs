//! Which sites an adapter changes and which tensors hold their factors, decided as PEFT would on the Hugging Face model.
//!
//! Two lists must agree: the sites that the configuration selects, and the tensors of the file. PEFT itself lets both
//! kinds of difference pass with a warning (missing factors start at zero, unknown tensors are ignored), and the base
//! model then answers in the adapter's name. Here either difference refuses the adapter.
//!
//! Sources: `check_target_module_exists` in `peft/tuners/tuners_utils.py`, `get_pattern_key` in `peft/utils/other.py`.

use std::collections::{HashMap, HashSet};

use openlora_types::{InvalidField, Limits, ModelShape, Module, Site};

use crate::{
    config::{CONFIG_FILE, LoraConfig, Selector},
    json::shown,
    pattern::{Matcher, Pattern},
    safetensors_file::{Header, TENSORS_FILE, TensorEntry},
};

/// Prefix of every tensor's name: the PEFT model that wraps the causal LM.
const PREFIX: &str = "base_model.model.";

/// A site the configuration selects.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Expected {
    pub(crate) site: Site,
    pub(crate) rank: usize,
    pub(crate) scale: f32,
}

/// A site with the tensors that hold its factors, as indices into [`Header::tensors`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct PlannedSite {
    pub(crate) site: Site,
    pub(crate) rank: usize,
    pub(crate) scale: f32,
    pub(crate) a: usize,
    pub(crate) b: usize,
    pub(crate) b_bias: Option<usize>,
    pub(crate) magnitude: Option<usize>,
}

/// How the tensors of a file make up an adapter.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Plan {
    /// In ascending order of site.
    pub(crate) sites: Vec<PlannedSite>,
    /// Copies of the base model's embedding table or head that PEFT saves beside the factors of an adapter on them.
    pub(crate) base_copies: Vec<(Module, usize)>,
}

/// Problems listed; one is enough to refuse an adapter, the others help whoever repairs it.
const PROBLEMS_MAX: usize = 64;

/// The plan of `header` under `config`, and everything that speaks against it, in the order met; the plan may be used
/// only where the list is empty.
pub(crate) fn plan(
    config: &LoraConfig,
    shape: &ModelShape,
    header: &Header,
    limits: &Limits,
) -> (Plan, Vec<InvalidField>) {
    let expected = match expected_sites(config, shape) {
        Ok(expected) => expected,
        Err(problem) => return (Plan::default(), vec![problem]),
    };
    let mut matching = Matching { config, shape, header, limits, problems: Vec::new() };
    let mut found = matching.collect();
    let mut plan =
        Plan { sites: Vec::with_capacity(expected.len()), base_copies: std::mem::take(&mut found.base_copies) };
    for site in &expected {
        let parts = found.sites.remove(&site.site).unwrap_or_default();
        plan.sites.extend(matching.site(site, &parts));
    }
    // What is left belongs to modules of the model that the configuration does not select.
    let mut left: Vec<_> = found.sites.values().flatten().map(|&(_, tensor)| tensor).collect();
    left.sort_unstable();
    for tensor in left {
        matching.problem(&header.tensors[tensor], "belongs to a module that adapter_config.json does not target");
    }
    (plan, matching.problems)
}

fn tensor_field(tensor: &TensorEntry) -> String {
    format!("{TENSORS_FILE}: {}", shown(&tensor.name))
}

fn config_field(field: &str) -> impl Fn(String) -> InvalidField {
    let field = format!("{CONFIG_FILE}: {field}");
    move |reason| InvalidField::new(field.clone(), reason)
}

/// Sites the configuration selects, in ascending order, with their ranks and scales.
pub(crate) fn expected_sites(config: &LoraConfig, shape: &ModelShape) -> Result<Vec<Expected>, InvalidField> {
    let mut sites: Vec<_> = shape.sites().map(|site| (site, site.to_string())).collect();
    sites.sort_unstable_by_key(|(site, _)| *site);
    let selection = Selection::new(config)?;
    // PEFT cannot adapt these, and stops when a pattern selects one: the adapter was not made for this model.
    for name in containers(shape) {
        if selection.selects(&name, false)? {
            let why = format!("selects {name}, which is not a linear or an embedding");
            return Err(config_field("target_modules")(why));
        }
    }
    let mut selected = Vec::new();
    for (site, name) in sites {
        let linear_in_layer = !matches!(site.module, Module::Embed | Module::LmHead);
        if selection.selects(&name, linear_in_layer)? {
            selected.push((site, name));
        }
    }
    if selected.is_empty() {
        let why = format!("selects no module of the base model {}", shape.name);
        return Err(config_field("target_modules")(why));
    }
    check_targets(config, shape, &selected)?;
    let names: Vec<_> = selected.iter().map(|(_, name)| name.as_str()).collect();
    let ranks = first_matches(&config.rank_pattern, &names).map_err(config_field("rank_pattern"))?;
    let alphas = first_matches(&config.alpha_pattern, &names).map_err(config_field("alpha_pattern"))?;
    let mut expected = Vec::with_capacity(selected.len());
    for ((site, name), (rank, alpha)) in selected.iter().zip(ranks.into_iter().zip(alphas)) {
        let (rank, alpha) = (rank.unwrap_or(config.rank), alpha.unwrap_or(config.alpha));
        let divisor = if config.rslora { (rank as f64).sqrt() } else { rank as f64 };
        let scale = (alpha / divisor) as f32;
        if !scale.is_finite() {
            return Err(config_field("lora_alpha")(format!("gives {name} a scale that is not finite")));
        }
        expected.push(Expected { site: *site, rank, scale });
    }
    Ok(expected)
}

fn check_targets(config: &LoraConfig, shape: &ModelShape, selected: &[(Site, String)]) -> Result<(), InvalidField> {
    let embeds = selected.iter().any(|(site, _)| site.module == Module::Embed);
    let outside = embeds || selected.iter().any(|(site, _)| site.module == Module::LmHead);
    if config.ensure_weight_tying && shape.tied_head && outside {
        let why = "must be false where embed_tokens or lm_head is targeted: adapters that share factors are not served";
        return Err(config_field("ensure_weight_tying")(why.into()));
    }
    if config.lora_bias && embeds {
        return Err(config_field("lora_bias")("must be false where embed_tokens is targeted, as in PEFT".into()));
    }
    Ok(())
}

/// For each name, the value of the first pattern that matches it.
fn first_matches<T: Copy>(patterns: &[(Pattern, T)], names: &[&str]) -> Result<Vec<Option<T>>, String> {
    let mut values = vec![None; names.len()];
    for (pattern, value) in patterns {
        // One compiled pattern at a time: a configuration may hold thousands.
        let matcher = pattern.suffix()?;
        for (slot, name) in values.iter_mut().zip(names).filter(|(slot, _)| slot.is_none()) {
            if matcher.matches(name)? {
                *slot = Some(*value);
            }
        }
    }
    Ok(values)
}

/// Modules of a decoder layer that are not linears.
const LAYER_CONTAINERS: [&str; 6] =
    ["", ".self_attn", ".mlp", ".mlp.act_fn", ".input_layernorm", ".post_attention_layernorm"];

/// Modules of the Hugging Face model that are neither linears nor embeddings.
fn containers(shape: &ModelShape) -> impl Iterator<Item = String> {
    let layers = (0..shape.layers)
        .flat_map(|layer| LAYER_CONTAINERS.iter().map(move |part| format!("model.layers.{layer}{part}")));
    ["model", "model.layers", "model.norm", "model.rotary_emb"].into_iter().map(String::from).chain(layers)
}

/// `target_modules`, `exclude_modules` and the layer filters, ready to be asked.
struct Selection<'a> {
    targets: Compiled<'a>,
    exclude: Option<Compiled<'a>>,
    layers: Option<&'a [i128]>,
    layers_pattern: Vec<Matcher<'a>>,
}

enum Compiled<'a> {
    AllLinear,
    Regex(Matcher<'a>),
    Names(HashSet<&'a str>),
}

impl<'a> Compiled<'a> {
    fn new(selector: &'a Selector) -> Result<Self, String> {
        Ok(match selector {
            Selector::AllLinear => Self::AllLinear,
            Selector::Regex(pattern) => Self::Regex(pattern.full()?),
            Selector::Names(names) => Self::Names(names.iter().map(String::as_str).collect()),
        })
    }
}

/// `key in names or any(key.endswith("." + name) for name in names)`; says whether it was the former.
fn name_match(names: &HashSet<&str>, key: &str) -> Option<Exactness> {
    if names.contains(key) {
        return Some(Exactness::Whole);
    }
    let ends = key.match_indices('.').any(|(dot, _)| names.contains(&key[dot + 1..]));
    ends.then_some(Exactness::Suffix)
}

#[derive(PartialEq)]
enum Exactness {
    Whole,
    Suffix,
}

impl<'a> Selection<'a> {
    fn new(config: &'a LoraConfig) -> Result<Self, InvalidField> {
        let exclude = config.exclude.as_ref().map(Compiled::new).transpose();
        let layers_pattern = config.layers_pattern.iter().map(Pattern::layer).collect::<Result<_, _>>();
        Ok(Self {
            targets: Compiled::new(&config.targets).map_err(config_field("target_modules"))?,
            exclude: exclude.map_err(config_field("exclude_modules"))?,
            layers: config.layers.as_deref(),
            layers_pattern: layers_pattern.map_err(config_field("layers_pattern"))?,
        })
    }

    /// PEFT's `check_target_module_exists`; `in_all_linear` says whether "all-linear" stands for this module.
    fn selects(&self, key: &str, in_all_linear: bool) -> Result<bool, InvalidField> {
        let excluded = match &self.exclude {
            None | Some(Compiled::AllLinear) => false,
            Some(Compiled::Regex(matcher)) => matcher.matches(key).map_err(config_field("exclude_modules"))?,
            Some(Compiled::Names(names)) => name_match(names, key).is_some(),
        };
        if excluded {
            return Ok(false);
        }
        match &self.targets {
            Compiled::AllLinear => Ok(in_all_linear),
            Compiled::Regex(matcher) => matcher.matches(key).map_err(config_field("target_modules")),
            Compiled::Names(names) => match name_match(names, key) {
                None => Ok(false),
                // PEFT asks for the layer only where the name matched by its end.
                Some(Exactness::Whole) => Ok(true),
                Some(Exactness::Suffix) => self.in_layers(key).map_err(config_field("layers_pattern")),
            },
        }
    }

    fn in_layers(&self, key: &str) -> Result<bool, String> {
        let Some(layers) = self.layers else { return Ok(true) };
        let mut index = None;
        if self.layers_pattern.is_empty() {
            index = first_index(key);
        }
        for matcher in &self.layers_pattern {
            if let Some(found) = matcher.index(key)? {
                index = found;
                break;
            }
        }
        Ok(index.is_some_and(|index| layers.contains(&i128::from(index))))
    }
}

/// The group of `.*?\.[^.]*\.(\d+)\.`: the first numeric segment with two segments before it and one after it.
fn first_index(key: &str) -> Option<u64> {
    let segments: Vec<_> = key.split('.').collect();
    let inner = segments.get(2..segments.len().saturating_sub(1))?;
    let numeric = |segment: &&&str| !segment.is_empty() && segment.bytes().all(|b| b.is_ascii_digit());
    inner.iter().find(numeric)?.parse().ok()
}

/// What a tensor is to its site.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    A,
    B,
    BBias,
    Magnitude,
}

/// Suffixes of a linear's tensors. `default` is the adapter's name where the saver left it in.
const LINEAR_PARTS: &[(&str, Part)] = &[
    (".lora_A.weight", Part::A),
    (".lora_A.default.weight", Part::A),
    (".lora_B.weight", Part::B),
    (".lora_B.default.weight", Part::B),
    (".lora_B.bias", Part::BBias),
    (".lora_B.default.bias", Part::BBias),
    (".lora_magnitude_vector", Part::Magnitude),
    (".lora_magnitude_vector.default", Part::Magnitude),
    (".lora_magnitude_vector.weight", Part::Magnitude),
    (".lora_magnitude_vector.default.weight", Part::Magnitude),
];

/// Suffixes of an embedding's factors, which are bare parameters.
const EMBEDDING_PARTS: &[(&str, Part)] = &[
    (".lora_embedding_A", Part::A),
    (".lora_embedding_A.default", Part::A),
    (".lora_embedding_B", Part::B),
    (".lora_embedding_B.default", Part::B),
];

type Parts = Vec<(Part, usize)>;

struct Found {
    sites: HashMap<Site, Parts>,
    base_copies: Vec<(Module, usize)>,
}

/// The full weights that PEFT's `save_embedding_layers` writes: those of a targeted or of a resized layer.
fn base_copy(key: &str) -> Option<Module> {
    match key {
        "model.embed_tokens.base_layer.weight" | "model.embed_tokens.weight" => Some(Module::Embed),
        "lm_head.base_layer.weight" | "lm_head.weight" => Some(Module::LmHead),
        _ => None,
    }
}

/// The two lists being compared, and what speaks against the adapter.
struct Matching<'a> {
    config: &'a LoraConfig,
    shape: &'a ModelShape,
    header: &'a Header,
    limits: &'a Limits,
    problems: Vec<InvalidField>,
}

impl Matching<'_> {
    fn push(&mut self, field: String, reason: String) {
        if self.problems.len() < PROBLEMS_MAX {
            self.problems.push(InvalidField::new(field, reason));
        }
    }

    fn problem(&mut self, tensor: &TensorEntry, reason: impl Into<String>) {
        self.push(tensor_field(tensor), reason.into());
    }

    /// Sorts the file's tensors by the site that their name says.
    fn collect(&mut self) -> Found {
        let sites: HashMap<String, Site> = self.shape.sites().map(|site| (site.to_string(), site)).collect();
        let mut found = Found { sites: HashMap::new(), base_copies: Vec::new() };
        let header = self.header;
        for (index, tensor) in header.tensors.iter().enumerate() {
            if let Err(reason) = self.place(index, tensor, &sites, &mut found) {
                self.problem(tensor, reason);
            }
        }
        found
    }

    fn place(
        &self,
        index: usize,
        tensor: &TensorEntry,
        sites: &HashMap<String, Site>,
        found: &mut Found,
    ) -> Result<(), String> {
        let key = tensor.name.strip_prefix(PREFIX);
        let key = key.ok_or_else(|| format!("has a name that does not start with `{PREFIX}`"))?;
        if let Some(module) = base_copy(key) {
            found.base_copies.push((module, index));
            return self.check_base_copy(tensor);
        }
        let split = |parts: &'static [(&str, Part)]| {
            parts.iter().find_map(|&(suffix, part)| Some((key.strip_suffix(suffix)?, part)))
        };
        let (module, part, embedding) = match (split(EMBEDDING_PARTS), split(LINEAR_PARTS)) {
            (Some((module, part)), _) => (module, part, true),
            (None, Some((module, part))) => (module, part, false),
            (None, None) => return Err("is not a factor of LoRA or DoRA; what it holds would be lost".into()),
        };
        let base = &self.shape.name;
        let site = *sites
            .get(module)
            .ok_or_else(|| format!("matches no module of the base model {base}; was it trained on another one?"))?;
        // A magnitude has one name for both kinds of module.
        if part != Part::Magnitude && embedding != (site.module == Module::Embed) {
            let (has, on) = if embedding { ("an embedding", "a linear") } else { ("a linear", "an embedding") };
            return Err(format!("has the name of {has}'s factor and its module is {on}"));
        }
        let parts = found.sites.entry(site).or_default();
        if parts.iter().any(|&(other, _)| other == part) {
            return Err("is there a second time under another form of its name".into());
        }
        parts.push((part, index));
        Ok(())
    }

    fn check_base_copy(&self, tensor: &TensorEntry) -> Result<(), String> {
        let (vocab, hidden) = (self.shape.vocab, self.shape.hidden);
        if tensor.shape == [vocab, hidden] {
            return Ok(());
        }
        let is = &tensor.shape;
        Err(format!(
            "is a full weight of shape {is:?} and the base model's is [{vocab}, {hidden}]: an adapter with a resized \
             vocabulary is not served"
        ))
    }

    /// Checks one site's tensors against what is expected of it; `None` when a factor is missing.
    fn site(&mut self, expected: &Expected, parts: &[(Part, usize)]) -> Option<PlannedSite> {
        let Expected { site, rank, scale } = *expected;
        let (inputs, outputs) = self.shape.dims(site.module);
        let get = |part| parts.iter().find(|&&(other, _)| other == part).map(|&(_, index)| index);
        let (a, b, b_bias, magnitude) = (get(Part::A), get(Part::B), get(Part::BBias), get(Part::Magnitude));
        for (present, wanted, what) in [
            (a.is_some(), true, "lora_A"),
            (b.is_some(), true, "lora_B"),
            (b_bias.is_some(), self.config.lora_bias, "lora_B.bias"),
            (magnitude.is_some(), self.config.dora, "lora_magnitude_vector"),
        ] {
            let field = format!("{TENSORS_FILE}: {PREFIX}{site}.{what}");
            match (present, wanted) {
                (false, true) => self.push(field, "is missing, and adapter_config.json targets its module".into()),
                (true, false) => self.push(field, "is there, and adapter_config.json has it switched off".into()),
                _ => {}
            }
        }
        self.check_shape(a, &[rank, inputs]);
        self.check_shape(b, &[outputs, rank]);
        self.check_shape(b_bias, &[outputs]);
        self.check_shape(magnitude, &[outputs]);
        Some(PlannedSite { site, rank, scale, a: a?, b: b?, b_bias, magnitude })
    }

    fn check_shape(&mut self, index: Option<usize>, wanted: &[usize]) {
        let header = self.header;
        let Some(tensor) = index.map(|index| &header.tensors[index]) else { return };
        if tensor.shape == wanted {
            return;
        }
        let max = self.limits.lora_rank_max;
        let mut reason = format!("has the shape {:?} and must have {wanted:?}", tensor.shape);
        // The smaller side of a factor is its rank.
        if wanted.len() == 2 && tensor.shape.iter().min().is_some_and(|&rank| rank > max) {
            reason.push_str(&format!("; the limit lora_rank_max is {max}"));
        } else {
            reason.push_str(", from the configuration's rank and the base model's sizes");
        }
        self.problem(tensor, reason);
    }
}
