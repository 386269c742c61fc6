use crate::{InvalidField, Limits, Token};

/// How the next token is chosen. Order of operations, as in vLLM: penalties and bias on the logits, temperature,
/// `min_p`, then `top_k` and `top_p` together, then one draw from a counter-based generator keyed by
/// `(seed, sample index, position)`, so that a preempted and recomputed sequence draws the same tokens.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplingParams {
    /// 0 is greedy. Finite, 0 to 100.
    pub temperature: f32,
    /// Keep the k most probable tokens; 0 keeps all.
    pub top_k: u32,
    /// Keep the smallest set whose probability reaches this. In (0, 1].
    pub top_p: f32,
    /// Drop tokens less probable than this times the most probable. In [0, 1).
    pub min_p: f32,
    /// Divides positive and multiplies negative logits of tokens already seen, prompt included (CTRL, Keskar et al.
    /// 2019, section 4.1). In (0, 10].
    pub repetition_penalty: f32,
    /// Subtracted once from the logit of every token already generated. In [-2, 2].
    pub presence_penalty: f32,
    /// Subtracted from the logit of a generated token as often as it was generated. In [-2, 2].
    pub frequency_penalty: f32,
    /// Added to the logits. Finite, -100 to 100 each.
    pub logit_bias: Vec<(Token, f32)>,
    /// Start of the random sequence; the server draws one where the client gave none.
    pub seed: u64,
    /// Tokens to generate at most, at least 1.
    pub max_tokens: u32,
    /// End-of-sequence and stop tokens are not sampled before this many.
    pub min_tokens: u32,
    /// Go on past end-of-sequence tokens (stop tokens still stop).
    pub ignore_eos: bool,
    /// Further tokens that end the sequence.
    pub stop_tokens: Vec<Token>,
    /// Samples to draw.
    pub n: u32,
    /// Alternatives to report with each sampled token; `None` reports none.
    pub logprobs: Option<u32>,
    /// Alternatives to report with each prompt token (`Some(0)`: only its own log-probability).
    pub prompt_logprobs: Option<u32>,
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            seed: 0,
            max_tokens: 256,
            min_tokens: 0,
            ignore_eos: false,
            stop_tokens: Vec::new(),
            n: 1,
            logprobs: None,
            prompt_logprobs: None,
        }
    }
}

impl SamplingParams {
    /// Whether what is drawn next depends on which tokens came before it.
    #[must_use]
    pub fn has_penalties(&self) -> bool {
        self.repetition_penalty != 1.0 || self.presence_penalty != 0.0 || self.frequency_penalty != 0.0
    }

    /// Checks every field against its range, `limits` and the vocabulary size. Names are the wire's, prefixed
    /// `sampling.` or `output.`.
    ///
    /// # Errors
    /// The first field out of range.
    pub fn validate(&self, limits: &Limits, vocab_size: usize) -> Result<(), InvalidField> {
        // `contains` is false for NaN, so every range check also refuses it.
        let within = |field: &str, value: f32, ok: bool, range: &str| {
            if ok { Ok(()) } else { Err(InvalidField::new(field, format!("is {value}; it must be {range}"))) }
        };
        let (temperature, top_p, min_p) = (self.temperature, self.top_p, self.min_p);
        within("sampling.temperature", temperature, (0.0..=100.0).contains(&temperature), "from 0 to 100")?;
        within("sampling.top_p", top_p, top_p > 0.0 && top_p <= 1.0, "above 0 and at most 1")?;
        within("sampling.min_p", min_p, (0.0..1.0).contains(&min_p), "at least 0 and below 1")?;
        let penalty = self.repetition_penalty;
        within("sampling.repetition_penalty", penalty, penalty > 0.0 && penalty <= 10.0, "above 0 and at most 10")?;
        for (field, value) in [
            ("sampling.presence_penalty", self.presence_penalty),
            ("sampling.frequency_penalty", self.frequency_penalty),
        ] {
            within(field, value, (-2.0..=2.0).contains(&value), "from -2 to 2")?;
        }
        let count = |field: &str, value: usize, name: &str, max: usize| {
            if value <= max {
                Ok(())
            } else {
                Err(InvalidField::new(field, format!("has {value} entries; the limit {name} is {max}")))
            }
        };
        let known = |field: String, token: Token| {
            if (token as usize) < vocab_size {
                Ok(())
            } else {
                Err(InvalidField::new(field, format!("is token {token}; the vocabulary has {vocab_size}")))
            }
        };
        count("sampling.logit_bias", self.logit_bias.len(), "logit_bias_max", limits.logit_bias_max)?;
        for &(token, bias) in &self.logit_bias {
            let field = format!("sampling.logit_bias[{token}]");
            within(&field, bias, (-100.0..=100.0).contains(&bias), "from -100 to 100")?;
            known(field, token)?;
        }
        count("sampling.stop_token_ids", self.stop_tokens.len(), "stops_max", limits.stops_max)?;
        for (i, &token) in self.stop_tokens.iter().enumerate() {
            known(format!("sampling.stop_token_ids[{i}]"), token)?;
        }
        if self.max_tokens == 0 {
            return Err(InvalidField::new("sampling.max_tokens", "must be at least 1"));
        }
        if self.min_tokens > self.max_tokens {
            let why = format!("is {}; it must be at most max_tokens, {}", self.min_tokens, self.max_tokens);
            return Err(InvalidField::new("sampling.min_tokens", why));
        }
        if self.n == 0 || self.n > limits.n_max {
            let why = format!("is {}; it must be from 1 to the limit n_max, {}", self.n, limits.n_max);
            return Err(InvalidField::new("sampling.n", why));
        }
        for (field, value) in [("output.logprobs", self.logprobs), ("output.prompt_logprobs", self.prompt_logprobs)] {
            if let Some(value) = value.filter(|&value| value > limits.logprobs_max) {
                let why = format!("is {value}; the limit logprobs_max is {}", limits.logprobs_max);
                return Err(InvalidField::new(field, why));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_field_out_of_range_is_named() {
        type Change = fn(&mut SamplingParams);
        let cases: &[(&str, Change)] = &[
            ("sampling.temperature", |s| s.temperature = f32::NAN),
            ("sampling.temperature", |s| s.temperature = -0.1),
            ("sampling.temperature", |s| s.temperature = f32::INFINITY),
            ("sampling.top_p", |s| s.top_p = 0.0),
            ("sampling.top_p", |s| s.top_p = f32::NAN),
            ("sampling.min_p", |s| s.min_p = 1.0),
            ("sampling.repetition_penalty", |s| s.repetition_penalty = 0.0),
            ("sampling.presence_penalty", |s| s.presence_penalty = 2.1),
            ("sampling.frequency_penalty", |s| s.frequency_penalty = f32::NAN),
            ("sampling.logit_bias", |s| s.logit_bias = vec![(0, 0.0); 1_025]),
            ("sampling.logit_bias[100]", |s| s.logit_bias = vec![(100, 0.0)]),
            ("sampling.logit_bias[3]", |s| s.logit_bias = vec![(3, f32::NAN)]),
            ("sampling.stop_token_ids", |s| s.stop_tokens = vec![0; 17]),
            ("sampling.stop_token_ids[1]", |s| s.stop_tokens = vec![0, 100]),
            ("sampling.max_tokens", |s| s.max_tokens = 0),
            ("sampling.min_tokens", |s| (s.min_tokens, s.max_tokens) = (2, 1)),
            ("sampling.n", |s| s.n = 0),
            ("sampling.n", |s| s.n = 1_000_000_000),
            ("output.logprobs", |s| s.logprobs = Some(1_000_000)),
            ("output.prompt_logprobs", |s| s.prompt_logprobs = Some(21)),
        ];
        for (field, change) in cases {
            let mut params = SamplingParams::default();
            change(&mut params);
            let error = params.validate(&Limits::default(), 100).expect_err(field);
            assert_eq!(&error.field, field, "{error}");
        }
        assert_eq!(SamplingParams::default().validate(&Limits::default(), 100), Ok(()));
    }
}
