use crate::Token;

/// Which queue a request waits in. Within one class tenants share by tokens; a lower class never starves (the
/// scheduler ages it).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Priority {
    /// Background work.
    Low,
    /// The default.
    #[default]
    Normal,
    /// Interactive work of higher standing.
    High,
}

/// Why a sequence ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FinishReason {
    /// An end-of-sequence token, a stop token or a stop string.
    Stop,
    /// `max_tokens` or the context length was reached.
    Length,
    /// The client went away or asked for it.
    Cancelled,
    /// The deadline passed.
    DeadlineExceeded,
}

/// One candidate token with its log-probability (natural logarithm, of the model's distribution before temperature
/// and truncation).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TokenLogprob {
    /// Candidate.
    pub token: Token,
    /// ln p(token | what precedes).
    pub logprob: f32,
}

/// One token as sampled (or, for prompt log-probabilities, as given).
#[derive(Clone, Debug, PartialEq)]
pub struct TokenOutput {
    /// The token and its own log-probability. The log-probability is always computed for samples.
    pub chosen: TokenLogprob,
    /// The most probable candidates, best first; empty unless asked for.
    pub top: Vec<TokenLogprob>,
}

/// What a request consumed, in tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Tokens of the prompt.
    pub prompt_tokens: u32,
    /// Of those, how many came from the prefix cache.
    pub cached_prompt_tokens: u32,
    /// Tokens generated, over all samples.
    pub completion_tokens: u32,
}
