//! Text in, tokens out, and back: [`Tokenizer`] (from `tokenizer.json` or a GGUF vocabulary), [`ChatTemplate`] (the model's
//! own Jinja template, bounded), [`Detokenizer`] (one token in, whole characters out) and [`StopMatcher`] (stop strings
//! across token borders).
//!
//! **Control tokens and who may write them.** A chat model trusts its control tokens (`<|im_end|>`): whoever can place
//! one can end the user's turn and speak as the system. [`Tokenizer::encode`] therefore takes `allow_special`: with
//! `false`, for text that someone else wrote, a control token's spelling is tokenized as the ordinary characters it is;
//! with `true`, for what a template rendered (this room's or the application's own), it becomes the control token. A
//! rendered chat is one string in which the template's own control tokens and the messages' text can no longer be told
//! apart, so [`ChatTemplate`] refuses messages that spell one, unless it was built with
//! [`ChatOptions::allow_control_tokens`] (which is what transformers does).

mod chat;
mod detokenizer;
mod error;
mod gguf_vocab;
mod pieces;
mod stop;
mod strftime;
mod template;
mod template_filters;
mod template_meter;
mod tokenizer;

pub use chat::{ChatOptions, ChatTemplate, Clock, Message, ROLES};
pub use detokenizer::{DecodeOptions, Detokenizer};
pub use error::TextError;
pub use gguf_vocab::GgufVocab;
pub use stop::{StopMatch, StopMatcher};
pub use tokenizer::Tokenizer;
