//! [`ChatTemplate`]: chat messages to one prompt, by the Jinja template that came with the model, as
//! `transformers`' `apply_chat_template` renders it.

use std::path::Path;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use minijinja::Value;
use openlora_types::{InvalidField, Limits, Token};

use super::template::Program;
use super::tokenizer::{read_bounded, read_optional_json};
use super::{TextError, Tokenizer};

/// Roles a message may have. Whether a model knows `tool` or `developer` is its template's to say.
pub const ROLES: [&str; 5] = ["system", "developer", "user", "assistant", "tool"];

/// One turn of a chat.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// One of [`ROLES`].
    pub role: String,
    /// What was said.
    pub content: String,
}

impl Message {
    /// `role` says `content`.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self { role: role.into(), content: content.into() }
    }
}

/// Where `strftime_now` takes the time from: seconds since 1970 in UTC. Passed in, so that a rendering can be repeated.
pub type Clock = Arc<dyn Fn() -> i64 + Send + Sync>;

/// How a template is used.
#[derive(Clone)]
pub struct ChatOptions {
    /// Let messages spell control tokens, as transformers does. Off, such a message is refused: whoever writes it could
    /// end its turn and speak in another role.
    pub allow_control_tokens: bool,
    /// What time it is.
    pub clock: Clock,
}

impl Default for ChatOptions {
    /// No control tokens in messages; the system's clock.
    fn default() -> Self {
        let now = || SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs() as i64);
        Self { allow_control_tokens: false, clock: Arc::new(now) }
    }
}

/// A model's chat template.
pub struct ChatTemplate {
    program: Program,
    tokenizer: Tokenizer,
    options: ChatOptions,
}

impl ChatTemplate {
    /// From the template's Jinja source (`tokenizer.chat_template` in a GGUF file) and the tokenizer of the same model.
    ///
    /// # Errors
    /// A template that does not compile or is longer than [`Limits::template_bytes_max`].
    pub fn new(
        source: impl Into<String>,
        tokenizer: &Tokenizer,
        options: ChatOptions,
        limits: &Limits,
    ) -> Result<Self, TextError> {
        Ok(Self { program: Program::new(source.into(), limits)?, tokenizer: tokenizer.clone(), options })
    }

    /// The template of a Hugging Face folder: `chat_template.jinja`, else `chat_template` in `tokenizer_config.json` (of
    /// several, the one named `default`). `None` where there is neither.
    ///
    /// # Errors
    /// As [`Self::new`], and files that cannot be read.
    pub fn from_folder(
        folder: &Path,
        tokenizer: &Tokenizer,
        options: ChatOptions,
        limits: &Limits,
    ) -> Result<Option<Self>, TextError> {
        let path = folder.join("chat_template.jinja");
        let source = match read_bounded(&path) {
            Ok(bytes) => Some(
                String::from_utf8(bytes)
                    .map_err(|_| TextError::malformed(path.display().to_string(), "is not UTF-8"))?,
            ),
            Err(TextError::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {
                let config = read_optional_json(&folder.join("tokenizer_config.json"))?;
                let field = &config["chat_template"];
                let named = |entry: &&serde_json::Value| entry["name"] == "default";
                let listed = || field.as_array()?.iter().find(named)?["template"].as_str();
                field.as_str().or_else(listed).map(str::to_owned)
            }
            Err(error) => return Err(error),
        };
        source.map(|source| Self::new(source, tokenizer, options, limits)).transpose()
    }

    /// The prompt for `messages`, followed by the start of the assistant's turn if `add_generation_prompt`. It has its
    /// begin-of-sequence token already; encode it with `allow_special`, and nothing else.
    ///
    /// # Errors
    /// Messages that are too many, too long, of an unknown role or that spell a control token, naming
    /// `chat.messages[i]`; what the template refused; a bound of `limits` that it ran into.
    pub fn render(
        &self,
        messages: &[Message],
        add_generation_prompt: bool,
        limits: &Limits,
    ) -> Result<String, TextError> {
        self.check(messages, limits)?;
        let list: Vec<Value> = messages
            .iter()
            .map(|message| {
                let fields = [("role", &message.role), ("content", &message.content)];
                Value::from_pairs(fields.map(|(name, text)| (name, text.as_str())))
            })
            .collect();
        let special =
            |token: Option<Token>| Value::from(token.map_or_else(String::new, |id| self.tokenizer.token_text(id)));
        let context = vec![
            ("messages", Value::from(list)),
            ("add_generation_prompt", Value::from(add_generation_prompt)),
            ("bos_token", special(self.tokenizer.bos())),
            ("eos_token", special(self.tokenizer.eos())),
            // transformers passes both, and templates test them.
            ("tools", Value::from(())),
            ("documents", Value::from(())),
        ];
        self.program.run(context, (self.options.clock)(), limits)
    }

    fn check(&self, messages: &[Message], limits: &Limits) -> Result<(), TextError> {
        let refuse = |field: String, why: String| Err(TextError::Invalid(InvalidField::new(field, why)));
        let count = messages.len();
        if count == 0 {
            return refuse("chat.messages".into(), "must not be empty".into());
        }
        if count > limits.chat_messages_max {
            let why = format!("has {count} entries; the limit chat_messages_max is {}", limits.chat_messages_max);
            return refuse("chat.messages".into(), why);
        }
        let bytes: usize = messages.iter().map(|message| message.content.len()).sum();
        if bytes > limits.prompt_bytes_max {
            let why = format!("have {bytes} bytes together; the limit prompt_bytes_max is {}", limits.prompt_bytes_max);
            return refuse("chat.messages".into(), why);
        }
        for (index, message) in messages.iter().enumerate() {
            if !ROLES.contains(&message.role.as_str()) {
                return refuse(format!("chat.messages[{index}].role"), format!("must be one of {}", ROLES.join(", ")));
            }
            if self.options.allow_control_tokens {
                continue;
            }
            if let Some(token) = self.tokenizer.find_control_token(&message.content) {
                let why = format!("contains the control token {token}, which only the chat template may write");
                return refuse(format!("chat.messages[{index}].content"), why);
            }
        }
        Ok(())
    }
}

impl std::fmt::Debug for ChatTemplate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ChatTemplate").field("tokenizer", &self.tokenizer).finish_non_exhaustive()
    }
}
