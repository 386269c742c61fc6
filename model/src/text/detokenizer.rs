//! Tokens to text, one at a time. A token may end in the middle of a character, so bytes wait until the character is
//! whole: what [`Detokenizer`] has given out is never taken back, and all of it together is what decoding all tokens at
//! once gives. Each token costs a copy of its own bytes, however long the text already is.

use openlora_types::Token;

use super::Tokenizer;

/// What decoding shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DecodeOptions {
    /// Leave control tokens out.
    pub skip_special: bool,
    /// The tokens continue a text that is already there (an answer after its prompt), so that a space before the first
    /// word is part of the text. Where they start one, a tokenizer that puts a space before every text takes it away.
    pub continues: bool,
}

impl Default for DecodeOptions {
    /// A whole text, without control tokens.
    fn default() -> Self {
        Self { skip_special: true, continues: false }
    }
}

/// Turns a growing sequence of tokens into a growing text.
#[derive(Debug)]
pub struct Detokenizer {
    tokenizer: Tokenizer,
    skip_special: bool,
    /// One leading space is still to be taken away.
    strip_space: bool,
    /// At most three bytes of a character that is not whole yet, between calls.
    pending: Vec<u8>,
}

impl Detokenizer {
    /// A text with nothing in it yet. The tokenizer's vocabulary is shared, not copied.
    #[must_use]
    pub fn new(tokenizer: &Tokenizer, options: DecodeOptions) -> Self {
        Self {
            tokenizer: tokenizer.clone(),
            skip_special: options.skip_special,
            strip_space: tokenizer.pieces().strips_first_space && !options.continues,
            pending: Vec::new(),
        }
    }

    /// Appends to `out` the characters that `token` completes. Bytes that can never become a character are one U+FFFD
    /// for each maximal broken sequence, as in [`String::from_utf8_lossy`]; ids outside the vocabulary are nothing.
    pub fn push_into(&mut self, token: Token, out: &mut String) {
        let pieces = self.tokenizer.pieces();
        if self.skip_special && pieces.is_special(token) {
            return;
        }
        let mut bytes = pieces.bytes(token);
        if self.strip_space && !bytes.is_empty() {
            bytes = bytes.strip_prefix(b" ").unwrap_or(bytes);
            self.strip_space = false;
        }
        self.pending.extend_from_slice(bytes);
        drain_characters(&mut self.pending, out);
    }

    /// As [`Self::push_into`], into a new string; empty where no character was completed.
    pub fn push(&mut self, token: Token) -> String {
        let mut out = String::new();
        self.push_into(token, &mut out);
        out
    }

    /// The end of the text: U+FFFD where a character was left incomplete, else nothing.
    pub fn finish(&mut self) -> String {
        if std::mem::take(&mut self.pending).is_empty() { String::new() } else { '\u{FFFD}'.into() }
    }
}

/// Moves all whole characters (and replacements of broken ones) from `pending` to `out`, leaving the beginning of a
/// character that later bytes may complete.
fn drain_characters(pending: &mut Vec<u8>, out: &mut String) {
    let mut done = 0;
    loop {
        match std::str::from_utf8(&pending[done..]) {
            Ok(text) => {
                out.push_str(text);
                return pending.clear();
            }
            Err(error) => {
                let valid = done + error.valid_up_to();
                out.push_str(std::str::from_utf8(&pending[done..valid]).expect("valid up to here"));
                match error.error_len() {
                    Some(broken) => {
                        out.push('\u{FFFD}');
                        done = valid + broken;
                    }
                    None => {
                        pending.drain(..valid);
                        return;
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn increments_are_the_lossy_text_for_any_bytes_cut_anywhere() {
        bolero::check!().with_type::<Vec<Vec<u8>>>().for_each(|cuts| {
            let (mut pending, mut out) = (Vec::new(), String::new());
            for bytes in cuts {
                pending.extend_from_slice(bytes);
                drain_characters(&mut pending, &mut out);
                assert!(pending.len() < 4, "only an incomplete character waits");
            }
            if !pending.is_empty() {
                out.push('\u{FFFD}');
            }
            assert_eq!(out, String::from_utf8_lossy(&cuts.concat()));
        });
    }
}
