//! Token embedding.

use openlora_types::Token;

/// `out[i] = table[tokens[i]]`, `table: [vocab, hidden]`, `out: [tokens, hidden]`. An adapter of the table adds
/// [`super::lora::embedding`].
pub fn embed(table: &[f32], hidden: usize, tokens: &[Token], out: &mut [f32]) {
    for (token, out) in tokens.iter().zip(out.chunks_exact_mut(hidden)) {
        out.copy_from_slice(&table[*token as usize * hidden..][..hidden]);
    }
}
