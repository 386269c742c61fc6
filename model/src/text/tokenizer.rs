//! [`Tokenizer`]: the model's own, from a Hugging Face folder or a GGUF vocabulary. Encoding is the `tokenizers` crate's
//! (the reference implementation); decoding is ours, from a table of each token's bytes.

use std::fs::File;
use std::io::Read;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;

use openlora_types::{InvalidField, Token};
use serde_json::Value;
use tokenizers::{
    AddedVocabulary, Encoding, Model, OffsetReferential, OffsetType, PostProcessor, PreTokenizedString, PreTokenizer,
};

use super::gguf_vocab::GgufVocab;
use super::pieces::{Pieces, Spelling, spell};
use super::{DecodeOptions, Detokenizer, TextError};

/// Bytes of a `tokenizer.json`, `tokenizer_config.json` or template file. The largest known are under 40 MB.
const FILE_BYTES_MAX: u64 = 256 << 20;
/// Ids a vocabulary may have; the largest known have under 300 000.
const VOCAB_MAX: usize = 1 << 22;
/// Words of a thread's cache of tokenized words. The crate's default of 10 000 for each thread that ever encodes is
/// megabytes for words that never come back.
pub(super) const CACHED_WORDS: usize = 1024;

/// White space in one run. The regular expressions that split words (`\s+(?!\S)`) step back once for each character of a
/// run, and after a million steps the library silently takes the rest of the text for one word: other tokens than the
/// model's. Texts that could come near are refused.
const WHITE_SPACE_RUN_MAX: usize = 1 << 18;

/// A model's tokenizer. Cloning shares it.
#[derive(Clone)]
pub struct Tokenizer(Arc<Inner>);

struct Inner {
    pipeline: tokenizers::Tokenizer,
    /// The added tokens again, set to leave the spelling of control tokens alone.
    ordinary: AddedVocabulary,
    pieces: Pieces,
    /// What is put before a prompt of plain text: the begin-of-sequence token, where the model wants one.
    prefix: Vec<Token>,
    bos: Option<Token>,
    eos: Option<Token>,
    unk: Option<Token>,
}

/// What a tokenizer is made of, before the tables are.
pub(super) struct Parts {
    pub(super) pipeline: tokenizers::Tokenizer,
    pub(super) pieces: Pieces,
    pub(super) prefix: Vec<Token>,
    pub(super) bos: Option<Token>,
    pub(super) eos: Option<Token>,
    pub(super) unk: Option<Token>,
}

impl Tokenizer {
    /// From the vocabulary and merges of a GGUF file.
    ///
    /// # Errors
    /// A tokenizer model or pre-tokenizer that is not supported, naming it; a vocabulary that contradicts itself.
    pub fn from_gguf(vocab: GgufVocab) -> Result<Self, TextError> {
        vocab.into_parts().map(Self::assemble)
    }

    /// From the `tokenizer.json` of a Hugging Face folder, with the control tokens that its `tokenizer_config.json` names.
    ///
    /// # Errors
    /// A missing, oversized or malformed file; a decoder that would not be reproduced exactly, naming it.
    pub fn from_folder(folder: &Path) -> Result<Self, TextError> {
        let json = read_bounded(&folder.join("tokenizer.json"))?;
        let config = read_optional_json(&folder.join("tokenizer_config.json"))?;
        Self::from_json(&json, &config)
    }

    /// From the bytes of a `tokenizer.json`; `config` is the content of `tokenizer_config.json` or null.
    ///
    /// # Errors
    /// As [`Self::from_folder`].
    pub fn from_json(json: &[u8], config: &Value) -> Result<Self, TextError> {
        let malformed = |reason: String| TextError::malformed("tokenizer.json", reason);
        // The crate indexes by what the file says in places, so a damaged file can panic it.
        let parsed = catch_unwind(AssertUnwindSafe(|| tokenizers::Tokenizer::from_bytes(json)));
        let mut pipeline = parsed
            .map_err(|_| malformed("its parts contradict each other".into()))?
            .map_err(|error| malformed(error.to_string()))?;
        let mut model = pipeline.get_model().clone();
        model.resize_cache(CACHED_WORDS);
        pipeline.with_model(model);

        let spelling = spelling_of(&pipeline)?;
        let vocab = pipeline.get_vocab(true);
        let size = vocab.values().max().map_or(0, |last| *last as usize + 1);
        if size > VOCAB_MAX {
            return Err(malformed(format!("token id {} is out of range; ids go to {VOCAB_MAX}", size - 1)));
        }
        let added = pipeline.get_added_tokens_decoder();
        let mut pieces = Pieces::new(spelling, size);
        for id in 0..size as Token {
            let text = pipeline.id_to_token(id).unwrap_or_default();
            pieces.push(&spell(&text, spelling), added.get(&id).is_some_and(|token| token.special))?;
        }
        let named = |key: &str| {
            let text = config.get(key).and_then(|value| value.as_str().or_else(|| value.get("content")?.as_str()));
            text.and_then(|text| pipeline.token_to_id(text))
        };
        let (bos, eos, unk) = (named("bos_token"), named("eos_token"), named("unk_token"));
        let prefix = prefix_of(&pipeline)?;
        Ok(Self::assemble(Parts { pipeline, pieces, prefix, bos, eos, unk }))
    }

    fn assemble(parts: Parts) -> Self {
        let Parts { pipeline, pieces, prefix, bos, eos, unk } = parts;
        let mut ordinary = pipeline.get_added_vocabulary().clone();
        ordinary.set_encode_special_tokens(true);
        Self(Arc::new(Inner { pipeline, ordinary, pieces, prefix, bos, eos, unk }))
    }

    /// The tokens of `text` and nothing else: no begin-of-sequence token is added ([`Self::prefix`] says which one a plain
    /// prompt starts with), nothing is cut off. With `allow_special` the spelling of a control token becomes that token;
    /// without, it is ordinary text and no control token can come out.
    ///
    /// # Errors
    /// A failure of the tokenizer; 262 144 characters of white space in a row. Without `allow_special`, a word that its
    /// vocabulary has only as a control token.
    pub fn encode(&self, text: &str, allow_special: bool) -> Result<Vec<Token>, TextError> {
        refuse_white_space_run(text)?;
        let inner = &*self.0;
        let failed = |error: tokenizers::Error| TextError::Encode(error.to_string());
        let mut words = self.split_added(text, allow_special);
        if let Some(splitter) = inner.pipeline.get_pre_tokenizer() {
            splitter.pre_tokenize(&mut words).map_err(failed)?;
        }
        words.tokenize(|word| inner.pipeline.get_model().tokenize(word.get())).map_err(failed)?;
        let encoding = words.into_encoding(None, 0, OffsetType::None).map_err(failed)?;
        let tokens = encoding.get_ids().to_vec();
        let control = |token: &&Token| inner.pieces.is_special(**token) && Some(**token) != inner.unk;
        match tokens.iter().find(control) {
            Some(&token) if !allow_special => {
                let why = format!("contains the word {:?}, which is a control token", self.token_text(token));
                Err(InvalidField::new("prompt", why).into())
            }
            _ => Ok(tokens),
        }
    }

    /// The first control token that `text` spells, if [`Self::encode`] would find one.
    #[must_use]
    pub fn find_control_token(&self, text: &str) -> Option<String> {
        let parts = self.split_added(text, true);
        let splits = parts.get_splits(OffsetReferential::Original, OffsetType::None);
        let mut tokens = splits.iter().filter_map(|(_, _, tokens)| tokens.as_ref()).flatten();
        tokens.find(|token| self.0.pieces.is_special(token.id)).map(|token| self.token_text(token.id))
    }

    fn split_added(&self, text: &str, allow_special: bool) -> PreTokenizedString {
        let inner = &*self.0;
        let added = if allow_special { inner.pipeline.get_added_vocabulary() } else { &inner.ordinary };
        added.extract_and_normalize(inner.pipeline.get_normalizer(), text)
    }

    /// The text of `tokens` without control tokens, as the start of a text ([`DecodeOptions::default`]).
    #[must_use]
    pub fn decode(&self, tokens: &[Token]) -> String {
        self.decode_with(tokens, DecodeOptions::default())
    }

    /// The text of `tokens`. Bytes that are no UTF-8 become U+FFFD; ids outside the vocabulary are nothing.
    #[must_use]
    pub fn decode_with(&self, tokens: &[Token], options: DecodeOptions) -> String {
        let mut detokenizer = Detokenizer::new(self, options);
        let mut text = String::new();
        for &token in tokens {
            detokenizer.push_into(token, &mut text);
        }
        text + &detokenizer.finish()
    }

    /// What one token stands for, for people: half a character is U+FFFD.
    #[must_use]
    pub fn token_text(&self, token: Token) -> String {
        String::from_utf8_lossy(self.0.pieces.bytes(token)).into_owned()
    }

    /// The bytes one token stands for, which may be half a character.
    #[must_use]
    pub fn token_bytes(&self, token: Token) -> &[u8] {
        self.0.pieces.bytes(token)
    }

    /// The id of a vocabulary entry, by its exact spelling.
    #[must_use]
    pub fn token_id(&self, entry: &str) -> Option<Token> {
        self.0.pipeline.token_to_id(entry)
    }

    /// Whether `token` is a control token, which decoding leaves out unless asked.
    #[must_use]
    pub fn is_special(&self, token: Token) -> bool {
        self.0.pieces.is_special(token)
    }

    /// One more than the largest id. The model's own vocabulary may be padded beyond it.
    #[must_use]
    pub fn vocab_size(&self) -> usize {
        self.0.pieces.len()
    }

    /// What goes before the tokens of a prompt of plain text: the begin-of-sequence token, for models that were trained
    /// with one. A rendered chat has it already.
    #[must_use]
    pub fn prefix(&self) -> &[Token] {
        &self.0.prefix
    }

    /// Begin of sequence, `bos_token` in templates.
    #[must_use]
    pub fn bos(&self) -> Option<Token> {
        self.0.bos
    }

    /// End of sequence, `eos_token` in templates.
    #[must_use]
    pub fn eos(&self) -> Option<Token> {
        self.0.eos
    }

    pub(super) fn pieces(&self) -> &Pieces {
        &self.0.pieces
    }
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokenizer").field("vocab_size", &self.vocab_size()).finish_non_exhaustive()
    }
}

fn refuse_white_space_run(text: &str) -> Result<(), TextError> {
    if text.len() <= WHITE_SPACE_RUN_MAX {
        return Ok(());
    }
    let mut run = 0;
    for character in text.chars() {
        run = if character.is_whitespace() { run + 1 } else { 0 };
        if run > WHITE_SPACE_RUN_MAX {
            let why = format!("has more than {WHITE_SPACE_RUN_MAX} characters of white space in a row");
            return Err(InvalidField::new("prompt", why).into());
        }
    }
    Ok(())
}

/// How the file's decoder spells bytes. The two kinds that the supported families use; any other would decode otherwise.
fn spelling_of(pipeline: &tokenizers::Tokenizer) -> Result<Spelling, TextError> {
    let decoder = serde_json::to_value(pipeline.get_decoder()).unwrap_or_default();
    let kind = |value: &Value| value["type"].as_str().unwrap_or("none").to_owned();
    let steps = match decoder["decoders"].as_array() {
        Some(steps) => steps.clone(),
        None => vec![decoder],
    };
    let names: Vec<String> = steps.iter().map(kind).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let space = serde_json::json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "});
    let strip = serde_json::json!({"type": "Strip", "content": " ", "start": 1, "stop": 0});
    match (&names[..], &steps[..]) {
        (["ByteLevel"], _) => Ok(Spelling::ByteLevel),
        (["Replace", "ByteFallback", "Fuse"], [replace, ..]) if *replace == space => {
            Ok(Spelling::SentencePiece { strips_first_space: false })
        }
        (["Replace", "ByteFallback", "Fuse", "Strip"], [replace, .., last]) if *replace == space && *last == strip => {
            Ok(Spelling::SentencePiece { strips_first_space: true })
        }
        _ => Err(TextError::Unsupported {
            what: "the decoder of tokenizer.json,".into(),
            value: names.join(" + "),
            supported: "ByteLevel; Replace(▁) + ByteFallback + Fuse, with or without Strip",
        }),
    }
}

/// What the file's post-processor puts before a text.
fn prefix_of(pipeline: &tokenizers::Tokenizer) -> Result<Vec<Token>, TextError> {
    let Some(processor) = pipeline.get_post_processor() else { return Ok(Vec::new()) };
    let processed = processor.process(Encoding::default(), None, true);
    let processed = processed.map_err(|error| TextError::malformed("tokenizer.json", error.to_string()))?;
    // What it adds around an empty text is what goes before and after one; only a begin-of-sequence token goes before.
    let around = processed.get_ids();
    let probe =
        pipeline.encode("a", true).map_err(|error| TextError::malformed("tokenizer.json", error.to_string()))?;
    let before = around.iter().zip(probe.get_ids()).take_while(|(a, b)| a == b).count();
    Ok(around[..before].to_vec())
}

pub(super) fn read_bounded(path: &Path) -> Result<Vec<u8>, TextError> {
    let io = |source| TextError::Io { path: path.to_owned(), source };
    let mut bytes = Vec::new();
    File::open(path).and_then(|file| file.take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes)).map_err(io)?;
    if bytes.len() as u64 > FILE_BYTES_MAX {
        return Err(TextError::malformed(path.display().to_string(), format!("is over {FILE_BYTES_MAX} bytes long")));
    }
    Ok(bytes)
}

/// A JSON file, or null where there is none.
pub(super) fn read_optional_json(path: &Path) -> Result<Value, TextError> {
    match read_bounded(path) {
        Ok(bytes) => serde_json::from_slice(&bytes)
            .map_err(|error| TextError::malformed(path.display().to_string(), error.to_string())),
        Err(TextError::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => Ok(Value::Null),
        Err(error) => Err(error),
    }
}
