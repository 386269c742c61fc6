//! Wire types → the project's own, with every refusal naming the field as it stands on the wire. Pure and fuzzed: no
//! clock, no I/O, and the only randomness is the seed drawn where the client gave none.
//!
//! Checks come before copies: a list is measured before it is looked at.

use openlora_model::text::Message;
use openlora_proto::v1 as wire;
use openlora_proto::v1::generate_request::Prompt as WirePrompt;
use openlora_types::{Alias, Generation, InvalidField, Limits, Priority, SamplingParams, Token};

/// `max_tokens` where the client gave none and the context leaves room for it.
pub(crate) const MAX_TOKENS_DEFAULT: u32 = 256;

/// Bytes that one reported candidate takes in a message at most, its text included.
const LOGPROB_BYTES: u64 = 40;

/// What a request is measured against.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bounds<'a> {
    pub(crate) limits: &'a Limits,
    /// Tokens the model knows.
    pub(crate) vocab: usize,
    /// Longest sequence served, prompt and answer together.
    pub(crate) sequence_tokens_max: usize,
}

/// Which adapter a request wants.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct AdapterName {
    pub(crate) alias: Alias,
    pub(crate) generation: Option<Generation>,
}

impl AdapterName {
    fn parse(text: &str, limits: &Limits) -> Result<Option<Self>, InvalidField> {
        if text.is_empty() {
            return Ok(None);
        }
        let (alias, generation) = match text.split_once('@') {
            Some((alias, generation)) => (alias, Some(parse_generation("adapter", generation)?)),
            None => (text, None),
        };
        Ok(Some(Self { alias: Alias::parse("adapter", alias, limits)?, generation }))
    }
}

impl std::fmt::Display for AdapterName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.alias)?;
        self.generation.iter().try_for_each(|generation| write!(f, "@{generation}"))
    }
}

/// What stands before the answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Prompt {
    /// Tokenized as it is.
    Text(String),
    /// Already tokens, in the vocabulary.
    Tokens(Vec<Token>),
    /// Rendered by the model's template.
    Chat { messages: Vec<Message>, add_generation_prompt: bool },
}

impl Prompt {
    /// The wire's name of the field that holds it.
    pub(crate) fn field(&self) -> &'static str {
        match self {
            Self::Text(_) => "text",
            Self::Tokens(_) => "token_ids.ids",
            Self::Chat { .. } => "chat.messages",
        }
    }
}

/// A request whose every field has been checked, but for what only its token count decides: see
/// [`Checked::fit_prompt`].
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Checked {
    pub(crate) adapter: Option<AdapterName>,
    pub(crate) prompt: Prompt,
    pub(crate) sampling: SamplingParams,
    /// Whether the client chose `max_tokens`.
    max_tokens_chosen: bool,
    pub(crate) stops: Vec<String>,
    pub(crate) include_stop: bool,
    pub(crate) token_ids: bool,
    pub(crate) priority: Priority,
    pub(crate) cache_salt: String,
    pub(crate) request_id: String,
}

impl Checked {
    /// Settles `max_tokens`, now that the prompt (in the wire's `field`) has been counted.
    ///
    /// # Errors
    /// An empty prompt, or one that leaves no room for what was asked.
    pub(crate) fn fit_prompt(
        &mut self,
        field: &str,
        prompt_tokens: usize,
        bounds: &Bounds<'_>,
    ) -> Result<(), InvalidField> {
        let max = bounds.sequence_tokens_max;
        if prompt_tokens == 0 {
            return Err(InvalidField::new(field, "must give at least one token"));
        }
        if prompt_tokens >= max {
            let why = format!("is {prompt_tokens} tokens long; with one token of answer at most {max} fit");
            return Err(InvalidField::new(field, why));
        }
        let room = u32::try_from(max - prompt_tokens).unwrap_or(u32::MAX);
        let asked = self.sampling.max_tokens;
        if self.max_tokens_chosen && asked > room {
            let why =
                format!("is {asked}; the prompt has {prompt_tokens} tokens and at most {max} fit, so it may be {room}");
            return Err(InvalidField::new("sampling.max_tokens", why));
        }
        self.sampling.max_tokens = asked.min(room);
        if self.sampling.min_tokens > self.sampling.max_tokens {
            let (min, max) = (self.sampling.min_tokens, self.sampling.max_tokens);
            return Err(InvalidField::new(
                "sampling.min_tokens",
                format!("is {min}; it must be at most max_tokens, {max}"),
            ));
        }
        Ok(())
    }

    /// Refuses an answer that may not fit one message. Only `Generate` needs this: a stream has no such limit.
    ///
    /// # Errors
    /// The option that makes it so large.
    pub(crate) fn fit_one_message(&self, prompt_tokens: usize, limits: &Limits) -> Result<(), InvalidField> {
        let answer = u64::from(self.sampling.n) * u64::from(self.sampling.max_tokens);
        for (field, alternatives, tokens) in [
            ("output.logprobs", self.sampling.logprobs, answer),
            ("output.prompt_logprobs", self.sampling.prompt_logprobs, prompt_tokens as u64),
        ] {
            let Some(alternatives) = alternatives else { continue };
            let bytes = tokens * (u64::from(alternatives) + 1) * LOGPROB_BYTES;
            if bytes > limits.message_bytes_max as u64 {
                let why = format!(
                    "asks for up to {bytes} bytes in one message; the limit message_bytes_max is {}: use GenerateStream",
                    limits.message_bytes_max
                );
                return Err(InvalidField::new(field, why));
            }
        }
        Ok(())
    }
}

/// Checks a `GenerateRequest`.
///
/// # Errors
/// The first field that is wrong.
pub(crate) fn generate(request: wire::GenerateRequest, bounds: &Bounds<'_>) -> Result<Checked, InvalidField> {
    let limits = bounds.limits;
    let output = request.output.unwrap_or_default();
    let wire_sampling = request.sampling.unwrap_or_default();
    check_label("request_id", &request.request_id, limits)?;
    check_label("cache_salt", &request.cache_salt, limits)?;
    let adapter = AdapterName::parse(&request.adapter, limits)?;
    let stops = stops(&wire_sampling.stop, limits)?;
    let include_stop = wire_sampling.include_stop_in_text.unwrap_or(false);
    let max_tokens_chosen = wire_sampling.max_tokens.is_some();
    let sampling = sampling(wire_sampling, &output, bounds)?;
    let priority = priority(request.priority)?;
    let prompt = match request.prompt {
        None => return Err(InvalidField::new("prompt", "must be one of text, token_ids and chat")),
        Some(WirePrompt::Text(text)) => self::text(text, limits)?,
        Some(WirePrompt::TokenIds(tokens)) => token_ids(tokens.ids, bounds)?,
        Some(WirePrompt::Chat(chat)) => self::chat(chat, limits)?,
    };
    Ok(Checked {
        adapter,
        prompt,
        sampling,
        max_tokens_chosen,
        stops,
        include_stop,
        token_ids: output.token_ids.unwrap_or(false),
        priority,
        cache_salt: request.cache_salt,
        request_id: request.request_id,
    })
}

/// Checks a `CountTokensRequest`.
///
/// # Errors
/// The first field that is wrong.
pub(crate) fn count_tokens(request: wire::CountTokensRequest, limits: &Limits) -> Result<Prompt, InvalidField> {
    match request.prompt {
        None => Err(InvalidField::new("prompt", "must be one of text and chat")),
        Some(wire::count_tokens_request::Prompt::Text(text)) => self::text(text, limits),
        Some(wire::count_tokens_request::Prompt::Chat(chat)) => self::chat(chat, limits),
    }
}

/// 64 hexadecimal digits in `field`.
///
/// # Errors
/// Anything else.
pub(crate) fn parse_generation(field: &str, text: &str) -> Result<Generation, InvalidField> {
    Generation::from_hex(text)
        .map_err(|error| InvalidField::new(field, format!("has a generation that {}", error.reason)))
}

/// How much a page of a listing may hold.
///
/// # Errors
/// On `page_size`.
pub(crate) fn page_size(asked: Option<u32>, default: u32, max: u32) -> Result<usize, InvalidField> {
    let size = asked.unwrap_or(default);
    if size == 0 || size > max {
        return Err(InvalidField::new("page_size", format!("is {size}; it must be from 1 to {max}")));
    }
    Ok(size as usize)
}

fn sampling(
    wire: wire::SamplingParameters,
    output: &wire::OutputOptions,
    bounds: &Bounds<'_>,
) -> Result<SamplingParams, InvalidField> {
    let defaults = SamplingParams::default();
    let context = u32::try_from(bounds.sequence_tokens_max).unwrap_or(u32::MAX);
    // `validate` would see a copied list; measure it first.
    count("sampling.logit_bias", wire.logit_bias.len(), "logit_bias_max", bounds.limits.logit_bias_max)?;
    count("sampling.stop_token_ids", wire.stop_token_ids.len(), "stops_max", bounds.limits.stops_max)?;
    let mut logit_bias: Vec<_> = wire.logit_bias.into_iter().collect();
    logit_bias.sort_unstable_by_key(|&(token, _)| token);
    let params = SamplingParams {
        temperature: wire.temperature.unwrap_or(defaults.temperature),
        top_k: wire.top_k.unwrap_or(defaults.top_k),
        top_p: wire.top_p.unwrap_or(defaults.top_p),
        min_p: wire.min_p.unwrap_or(defaults.min_p),
        repetition_penalty: wire.repetition_penalty.unwrap_or(defaults.repetition_penalty),
        presence_penalty: wire.presence_penalty.unwrap_or(defaults.presence_penalty),
        frequency_penalty: wire.frequency_penalty.unwrap_or(defaults.frequency_penalty),
        logit_bias,
        seed: wire.seed.unwrap_or_else(rand::random),
        max_tokens: wire.max_tokens.unwrap_or_else(|| MAX_TOKENS_DEFAULT.min(context)),
        min_tokens: wire.min_tokens.unwrap_or(defaults.min_tokens),
        ignore_eos: wire.ignore_eos.unwrap_or(defaults.ignore_eos),
        stop_tokens: wire.stop_token_ids,
        n: wire.n.unwrap_or(defaults.n),
        logprobs: output.logprobs,
        prompt_logprobs: output.prompt_logprobs,
    };
    params.validate(bounds.limits, bounds.vocab)?;
    Ok(params)
}

fn stops(stops: &[String], limits: &Limits) -> Result<Vec<String>, InvalidField> {
    count("sampling.stop", stops.len(), "stops_max", limits.stops_max)?;
    for (i, stop) in stops.iter().enumerate() {
        let field = || format!("sampling.stop[{i}]");
        if stop.is_empty() {
            return Err(InvalidField::new(field(), "must not be empty"));
        }
        if stop.len() > limits.stop_bytes_max {
            let why = format!("is {} bytes long; the limit stop_bytes_max is {}", stop.len(), limits.stop_bytes_max);
            return Err(InvalidField::new(field(), why));
        }
    }
    Ok(stops.to_vec())
}

fn priority(value: i32) -> Result<Priority, InvalidField> {
    match wire::Priority::try_from(value) {
        Ok(wire::Priority::Unspecified | wire::Priority::Normal) => Ok(Priority::Normal),
        Ok(wire::Priority::Low) => Ok(Priority::Low),
        Ok(wire::Priority::High) => Ok(Priority::High),
        Err(_) => Err(InvalidField::new("priority", format!("is {value}; it must be a value of the enum Priority"))),
    }
}

fn text(text: String, limits: &Limits) -> Result<Prompt, InvalidField> {
    prompt_bytes("text", text.len(), limits)?;
    Ok(Prompt::Text(text))
}

fn token_ids(ids: Vec<Token>, bounds: &Bounds<'_>) -> Result<Prompt, InvalidField> {
    count("token_ids.ids", ids.len(), "sequence_tokens_max", bounds.sequence_tokens_max)?;
    if let Some((i, id)) = ids.iter().enumerate().find(|&(_, &id)| id as usize >= bounds.vocab) {
        let why = format!("is token {id}; the vocabulary has {}", bounds.vocab);
        return Err(InvalidField::new(format!("token_ids.ids[{i}]"), why));
    }
    Ok(Prompt::Tokens(ids))
}

fn chat(chat: wire::Chat, limits: &Limits) -> Result<Prompt, InvalidField> {
    if chat.messages.is_empty() {
        return Err(InvalidField::new("chat.messages", "must not be empty"));
    }
    count("chat.messages", chat.messages.len(), "chat_messages_max", limits.chat_messages_max)?;
    let bytes = chat.messages.iter().map(|message| message.role.len() + message.content.len()).sum();
    prompt_bytes("chat.messages", bytes, limits)?;
    if let Some(i) = chat.messages.iter().position(|message| message.role.is_empty()) {
        return Err(InvalidField::new(format!("chat.messages[{i}].role"), "must not be empty"));
    }
    let messages = chat.messages.into_iter().map(|message| Message::new(message.role, message.content)).collect();
    Ok(Prompt::Chat { messages, add_generation_prompt: chat.add_generation_prompt.unwrap_or(true) })
}

fn prompt_bytes(field: &str, bytes: usize, limits: &Limits) -> Result<(), InvalidField> {
    if bytes <= limits.prompt_bytes_max {
        return Ok(());
    }
    let why = format!("is {bytes} bytes long; the limit prompt_bytes_max is {}", limits.prompt_bytes_max);
    Err(InvalidField::new(field, why))
}

fn count(field: &str, len: usize, name: &str, max: usize) -> Result<(), InvalidField> {
    if len <= max {
        return Ok(());
    }
    Err(InvalidField::new(field, format!("has {len} entries; the limit {name} is {max}")))
}

/// A value that ends up in traces or in a hash: short, and without characters that could forge a line of a log.
fn check_label(field: &str, text: &str, limits: &Limits) -> Result<(), InvalidField> {
    let max = limits.request_id_bytes_max;
    if text.len() > max {
        return Err(InvalidField::new(
            field,
            format!("is {} bytes long; the limit request_id_bytes_max is {max}", text.len()),
        ));
    }
    if text.chars().any(char::is_control) {
        return Err(InvalidField::new(field, "must not contain control characters"));
    }
    Ok(())
}

#[cfg(test)]
#[path = "convert_tests.rs"]
mod tests;
