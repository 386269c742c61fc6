//! The bytes each token stands for, worked out once when a tokenizer is built, so that decoding is a copy.

use openlora_types::Token;

use super::TextError;

/// How a vocabulary spells bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Spelling {
    /// GPT-2's byte-level alphabet: each character stands for one byte.
    ByteLevel,
    /// SentencePiece: `▁` is a space and `<0x0A>` a single byte.
    SentencePiece {
        /// The tokenizer put a space before the first word, so decoding a text from its start takes one away.
        strips_first_space: bool,
    },
}

/// The bytes of every token, back to back, with the end of each.
#[derive(Debug)]
pub(super) struct Pieces {
    bytes: Vec<u8>,
    ends: Vec<u32>,
    special: Vec<bool>,
    pub(super) strips_first_space: bool,
}

impl Pieces {
    /// Empty, for about `tokens` tokens.
    pub(super) fn new(spelling: Spelling, tokens: usize) -> Self {
        let strips_first_space = spelling == Spelling::SentencePiece { strips_first_space: true };
        let (bytes, ends, special) = (Vec::new(), Vec::with_capacity(tokens), Vec::with_capacity(tokens));
        Self { bytes, ends, special, strips_first_space }
    }

    /// Adds the next token.
    ///
    /// # Errors
    /// A vocabulary of 4 GiB of text.
    pub(super) fn push(&mut self, bytes: &[u8], special: bool) -> Result<(), TextError> {
        self.bytes.extend_from_slice(bytes);
        let end = u32::try_from(self.bytes.len());
        self.ends.push(end.map_err(|_| TextError::malformed("tokenizer", "the vocabulary holds over 4 GiB of text"))?);
        self.special.push(special);
        Ok(())
    }

    /// Number of tokens.
    pub(super) fn len(&self) -> usize {
        self.ends.len()
    }

    /// The token's bytes; none for an id outside the vocabulary (models pad their vocabulary beyond the tokenizer's).
    pub(super) fn bytes(&self, token: Token) -> &[u8] {
        let index = token as usize;
        let Some(&end) = self.ends.get(index) else { return &[] };
        let start = if index == 0 { 0 } else { self.ends[index - 1] };
        &self.bytes[start as usize..end as usize]
    }

    /// Whether it is a control token.
    pub(super) fn is_special(&self, token: Token) -> bool {
        self.special.get(token as usize).copied().unwrap_or(false)
    }
}

/// The bytes an entry of a vocabulary stands for.
pub(super) fn spell(text: &str, spelling: Spelling) -> Vec<u8> {
    match spelling {
        // A token with a character outside the alphabet was added as plain text.
        Spelling::ByteLevel => text.chars().map(byte_of).collect::<Option<_>>().unwrap_or_else(|| text.into()),
        Spelling::SentencePiece { .. } => match byte_token(text) {
            Some(byte) => vec![byte],
            None => text.replace('▁', " ").into_bytes(),
        },
    }
}

/// `<0x0A>` is the byte 10.
pub(super) fn byte_token(text: &str) -> Option<u8> {
    let digits = text.strip_prefix("<0x")?.strip_suffix('>')?;
    let hexadecimal = digits.len() == 2 && digits.bytes().all(|digit| digit.is_ascii_hexdigit());
    if hexadecimal { u8::from_str_radix(digits, 16).ok() } else { None }
}

/// Inverse of GPT-2's `bytes_to_unicode`: printable Latin-1 stands for itself, the other 68 bytes for U+0100 onwards, in
/// ascending order.
fn byte_of(character: char) -> Option<u8> {
    let itself = |byte: u8| matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    match u32::from(character) {
        code @ 0..=0xFF => Some(code as u8).filter(|byte| itself(*byte)),
        code @ 0x100..=0x143 => (0..=u8::MAX).filter(|byte| !itself(*byte)).nth((code - 0x100) as usize),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_has_exactly_one_character_of_the_byte_level_alphabet() {
        let mut bytes: Vec<u8> = ('\0'..='\u{200}').filter_map(byte_of).collect();
        bytes.sort_unstable();
        assert_eq!(bytes, (0..=u8::MAX).collect::<Vec<_>>());
        for (text, expected) in [("Ġthe", &b" the"[..]), ("Ċ", b"\n"), ("Ã©", "é".as_bytes()), ("ł", &[0xA0])] {
            assert_eq!(spell(text, Spelling::ByteLevel), expected, "{text}");
        }
        assert_eq!(spell("a b", Spelling::ByteLevel), b"a b", "added as plain text");
    }

    #[test]
    fn sentence_pieces_spell_spaces_and_single_bytes() {
        let spelling = Spelling::SentencePiece { strips_first_space: true };
        for (text, expected) in
            [("▁the▁", &b" the "[..]), ("<0x0A>", b"\n"), ("<0xff>", &[0xFF]), ("<0x+1>", b"<0x+1>")]
        {
            assert_eq!(spell(text, spelling), expected, "{text}");
        }
    }
}
