//! Tokenizers from the vocabulary inside a GGUF file (ggml's `docs/gguf.md`, "Tokenizer"). The keys say less than a
//! `tokenizer.json` does: `tokenizer.ggml.pre` is only the name of a rule for splitting text into words, and what the
//! name means is written here, as the model's own `tokenizer.json` and llama.cpp's `llama-vocab.cpp` have it.

use openlora_types::Token;
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::normalizers::{NFC, Prepend, Replace, Sequence as Normalizers};
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence as PreTokenizers;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{AddedToken, NormalizerWrapper, SplitDelimiterBehavior};

use super::TextError;
use super::pieces::{Pieces, Spelling, byte_token, spell};
use super::tokenizer::{CACHED_WORDS, Parts};
use crate::error::ModelError;
use crate::gguf::GgufFile;

/// Names of `tokenizer.ggml.pre` with a rule in [`Words::of`].
const SUPPORTED_PRE: &str = "smollm, starcoder, gpt-2, llama-bpe, llama3, llama-v3, qwen2, tekken";

/// GPT-2's own rule (`encoder.py`), also the `ByteLevel` pre-tokenizer's.
const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// Mistral's, which also splits camelCase.
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// `tokenizer.ggml.token_type` of tokens that text cannot contain.
const TYPE_UNKNOWN: i64 = 2;
const TYPE_CONTROL: i64 = 3;
/// Found in text before it is split into words, by everyone.
const TYPE_USER_DEFINED: i64 = 4;
const TYPE_UNUSED: i64 = 5;

/// The `tokenizer.ggml.*` keys of a GGUF file.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GgufVocab {
    /// `model`: `gpt2` (byte-level BPE) or `llama` (SentencePiece).
    pub model: String,
    /// `pre`: name of the rule that splits text into words (`gpt2` only).
    pub pre: Option<String>,
    /// `tokens`, by id.
    pub tokens: Vec<String>,
    /// `token_type`, by id; empty means all are normal.
    pub token_types: Vec<i64>,
    /// `merges`, best first, as `left right` (`gpt2` only).
    pub merges: Vec<String>,
    /// `scores`, by id (`llama` only).
    pub scores: Vec<f32>,
    /// `bos_token_id`.
    pub bos: Option<Token>,
    /// `eos_token_id`.
    pub eos: Option<Token>,
    /// `unknown_token_id`.
    pub unk: Option<Token>,
    /// `add_bos_token`; absent, SentencePiece, Llama 3 and Tekken models get one.
    pub add_bos: Option<bool>,
    /// `add_space_prefix`; absent, SentencePiece models put a space before text.
    pub add_space_prefix: Option<bool>,
}

impl GgufVocab {
    /// Reads the keys.
    ///
    /// # Errors
    /// A missing `model` or `tokens`, a key of another type than the format says, or an id that is no 32-bit number.
    pub fn from_metadata(file: &GgufFile) -> Result<Self, ModelError> {
        let key = |name: &str| format!("tokenizer.ggml.{name}");
        let missing = |name: &str| ModelError::metadata(key(name), "is missing; the file has no tokenizer");
        let id = |name: &str| {
            let value = file.uint(&key(name))?;
            let narrow = |value| Token::try_from(value).map_err(|_| ModelError::metadata(key(name), "is no token id"));
            value.map(narrow).transpose()
        };
        let owned = |name: &str| Ok::<_, ModelError>(file.string(&key(name))?.map(str::to_owned));
        Ok(Self {
            model: owned("model")?.ok_or_else(|| missing("model"))?,
            pre: owned("pre")?,
            tokens: file.strings(&key("tokens"))?.ok_or_else(|| missing("tokens"))?.to_vec(),
            token_types: file.ints(&key("token_type"))?.unwrap_or_default().to_vec(),
            merges: file.strings(&key("merges"))?.unwrap_or_default().to_vec(),
            scores: file.floats(&key("scores"))?.unwrap_or_default().iter().map(|score| *score as f32).collect(),
            bos: id("bos_token_id")?,
            eos: id("eos_token_id")?,
            unk: id("unknown_token_id")?,
            add_bos: file.boolean(&key("add_bos_token"))?,
            add_space_prefix: file.boolean(&key("add_space_prefix"))?,
        })
    }

    /// Builds what [`super::Tokenizer`] is made of.
    pub(super) fn into_parts(self) -> Result<Parts, TextError> {
        self.validate()?;
        match self.model.as_str() {
            "gpt2" => self.byte_level(),
            "llama" => self.sentence_piece(),
            other => Err(TextError::Unsupported {
                what: "tokenizer.ggml.model".into(),
                value: other.into(),
                supported: "gpt2, llama",
            }),
        }
    }

    /// Lengths agree and ids exist.
    fn validate(&self) -> Result<(), TextError> {
        let tokens = self.tokens.len();
        if tokens == 0 || u32::try_from(tokens).is_err() {
            return Err(TextError::malformed("tokenizer.ggml.tokens", format!("has {tokens} entries")));
        }
        for (name, length) in [("token_type", self.token_types.len()), ("scores", self.scores.len())] {
            if length != 0 && length != tokens {
                let why = format!("has {length} entries for {tokens} tokens");
                return Err(TextError::malformed(format!("tokenizer.ggml.{name}"), why));
            }
        }
        for (name, id) in [("bos", self.bos), ("eos", self.eos), ("unknown", self.unk)] {
            if id.is_some_and(|id| id as usize >= tokens) {
                let why = format!("is outside the vocabulary of {tokens} tokens");
                return Err(TextError::malformed(format!("tokenizer.ggml.{name}_token_id"), why));
            }
        }
        Ok(())
    }

    fn kind(&self, id: usize) -> i64 {
        self.token_types.get(id).copied().unwrap_or(1)
    }

    fn text(&self, id: Option<Token>) -> Option<String> {
        id.map(|id| self.tokens[id as usize].clone())
    }

    fn byte_level(self) -> Result<Parts, TextError> {
        let words = Words::of(self.pre.as_deref())?;
        let mut merges = Vec::with_capacity(self.merges.len());
        for merge in &self.merges {
            // Either side may begin with a space only in byte-level spelling, where it is written otherwise.
            let (left, right) = merge.split_once(' ').ok_or_else(|| bad_merge(merge))?;
            merges.push((left.to_owned(), right.to_owned()));
        }
        let mut model = self.bpe(merges, words.ignore_merges, false)?;
        model.resize_cache(CACHED_WORDS);
        let mut pipeline = tokenizers::Tokenizer::new(model);
        let split = |pattern: &&str| {
            let pattern = SplitPattern::Regex((*pattern).to_owned());
            Split::new(pattern, SplitDelimiterBehavior::Isolated, false).map(PreTokenizerWrapper::Split)
        };
        let mut steps = words.patterns.iter().map(split).collect::<Result<Vec<_>, _>>().map_err(internal)?;
        steps.push(PreTokenizerWrapper::ByteLevel(ByteLevel::new(false, false, false)));
        pipeline.with_pre_tokenizer(Some(PreTokenizers::new(steps)));
        pipeline.with_normalizer(words.nfc.then_some(NFC)).map_err(internal)?;
        self.finish(pipeline, Spelling::ByteLevel, words.add_bos)
    }

    fn sentence_piece(self) -> Result<Parts, TextError> {
        if self.scores.is_empty() {
            return Err(TextError::malformed("tokenizer.ggml.scores", "is missing"));
        }
        let prefix = self.add_space_prefix.unwrap_or(true);
        let byte_fallback = self.tokens.iter().any(|token| byte_token(token).is_some());
        let mut model = self.bpe(self.merges_by_score(), false, byte_fallback)?;
        model.resize_cache(CACHED_WORDS);
        let mut pipeline = tokenizers::Tokenizer::new(model);
        // Without a pre-tokenizer: SentencePiece merges across spaces, which are characters like any other.
        let mut steps: Vec<NormalizerWrapper> = Vec::new();
        if prefix {
            steps.push(Prepend::new("▁".to_owned()).into());
        }
        steps.push(Replace::new(" ", "▁").map_err(internal)?.into());
        pipeline.with_normalizer(Some(Normalizers::new(steps))).map_err(internal)?;
        self.finish(pipeline, Spelling::SentencePiece { strips_first_space: prefix }, true)
    }

    /// SentencePiece joins the neighbours whose joined piece has the best score. As merges: for each piece all ways to cut
    /// it in two pieces, best piece first (as transformers converts these files). Control tokens are never joined.
    fn merges_by_score(&self) -> Vec<(String, String)> {
        let ids: std::collections::HashMap<&str, usize> = self
            .tokens
            .iter()
            .enumerate()
            .filter(|(id, _)| !matches!(self.kind(*id), TYPE_UNKNOWN | TYPE_CONTROL | TYPE_UNUSED))
            .map(|(id, token)| (token.as_str(), id))
            .collect();
        let mut merges = Vec::new();
        for (&piece, &id) in &ids {
            for (cut, _) in piece.char_indices().skip(1) {
                if let (Some(&left), Some(&right)) = (ids.get(&piece[..cut]), ids.get(&piece[cut..])) {
                    merges.push((id, left, right));
                }
            }
        }
        let better = |a: usize, b: usize| self.scores[b].total_cmp(&self.scores[a]);
        merges.sort_by(|a, b| {
            let by_score = better(a.0, b.0).then(a.0.cmp(&b.0));
            by_score.then(better(a.1, b.1)).then(better(a.2, b.2)).then(a.1.cmp(&b.1))
        });
        let text = |id: usize| self.tokens[id].clone();
        merges.into_iter().map(|(_, left, right)| (text(left), text(right))).collect()
    }

    fn bpe(&self, merges: Vec<(String, String)>, ignore_merges: bool, sentence_piece: bool) -> Result<BPE, TextError> {
        let ids = self.tokens.iter().cloned().zip(0..);
        let vocab: Vocab = ids.collect();
        for (left, right) in &merges {
            let joined = format!("{left}{right}");
            if [left, right, &joined].iter().any(|piece| !vocab.contains_key(*piece)) {
                return Err(bad_merge(&format!("{left} {right}")));
            }
        }
        let mut builder = BPE::builder().vocab_and_merges(vocab, merges).ignore_merges(ignore_merges);
        if sentence_piece {
            builder = builder.byte_fallback(true).fuse_unk(true);
        }
        if let (Some(unk), "llama") = (self.text(self.unk), self.model.as_str()) {
            builder = builder.unk_token(unk);
        }
        builder.build().map_err(|error| TextError::malformed("tokenizer.ggml.merges", error.to_string()))
    }

    fn finish(self, pipeline: tokenizers::Tokenizer, spelling: Spelling, bos: bool) -> Result<Parts, TextError> {
        let mut pipeline = pipeline;
        let mut pieces = Pieces::new(spelling, self.tokens.len());
        let mut added = Vec::new();
        for (id, token) in self.tokens.iter().enumerate() {
            let kind = self.kind(id);
            let special = matches!(kind, TYPE_CONTROL | TYPE_UNKNOWN);
            let plain = special || kind == TYPE_USER_DEFINED;
            if plain && !token.is_empty() {
                added.push(AddedToken::from(token.clone(), special).normalized(false));
            }
            let bytes = if plain { token.clone().into_bytes() } else { spell(token, spelling) };
            pieces.push(&bytes, special)?;
        }
        pipeline.add_tokens(added).map_err(internal)?;
        let prefix = self.bos.filter(|_| self.add_bos.unwrap_or(bos)).into_iter().collect();
        Ok(Parts { pipeline, pieces, prefix, bos: self.bos, eos: self.eos, unk: self.unk })
    }
}

/// How a `tokenizer.ggml.pre` splits text into words, each tokenized on its own.
struct Words {
    /// Applied one after the other, each to the pieces of the one before.
    patterns: &'static [&'static str],
    /// Unicode normal form C first.
    nfc: bool,
    /// A word that is in the vocabulary is that token, whatever the merges say.
    ignore_merges: bool,
    /// The default of `add_bos_token`.
    add_bos: bool,
}

impl Words {
    fn of(pre: Option<&str>) -> Result<Self, TextError> {
        let plain = |patterns| Self { patterns, nfc: false, ignore_merges: false, add_bos: false };
        match pre {
            // Digits one by one, then GPT-2.
            Some("smollm" | "starcoder") => Ok(plain(&[r"\p{N}", GPT2])),
            Some("gpt-2" | "gpt2") => Ok(plain(&[GPT2])),
            Some("llama-bpe" | "llama3" | "llama-v3") => {
                Ok(Self { ignore_merges: true, add_bos: true, ..plain(&[LLAMA3]) })
            }
            Some("qwen2") => Ok(Self { nfc: true, ..plain(&[QWEN2]) }),
            Some("tekken") => Ok(Self { ignore_merges: true, add_bos: true, ..plain(&[TEKKEN]) }),
            // llama.cpp falls back to a rule of its own for files without a name, with a warning that generation will be
            // degraded: a guess.
            other => Err(TextError::Unsupported {
                what: "tokenizer.ggml.pre".into(),
                value: other.unwrap_or("(missing)").into(),
                supported: SUPPORTED_PRE,
            }),
        }
    }
}

fn bad_merge(merge: &str) -> TextError {
    TextError::malformed("tokenizer.ggml.merges", format!("{merge:?} does not join two tokens into a third"))
}

/// The rules above compile; a failure is ours, not the file's.
fn internal(error: tokenizers::Error) -> TextError {
    TextError::Encode(error.to_string())
}
