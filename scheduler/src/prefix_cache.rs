//! When two sequences may share a KV block: chained content keys, and the index from key to block.
//!
//! The key of a block is BLAKE3 over the block's tokens, keyed by the key of the block before it; the chain starts at a
//! root over (generation, tenant, cache salt). Equal keys therefore mean equal adapter content, equal tenant and salt, and
//! equal tokens from the sequence's beginning to the block's end, which is all that the block's keys and values depend on.
//! Nothing reusable enters a key: an adapter reloaded under its old name has another generation and never meets old KV,
//! and no tenant can find out, by timing, what another one's prompts contain.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, DefaultHasher};

use openlora_types::{Generation, TenantId, Token};

/// A map without a random seed: every run of the same calls is the same run.
pub(crate) type FixedMap<K, V> = HashMap<K, V, BuildHasherDefault<DefaultHasher>>;

/// Separates root keys from every other use of BLAKE3; the number changes when what enters the key changes.
const ROOT_CONTEXT: &str = "openlora scheduler prefix cache root 1";

/// What a full block holds, from the beginning of its sequence.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) struct BlockKey([u8; 32]);

impl BlockKey {
    /// The parent of a sequence's first block. Strings enter with their length, so that no two triples give the same
    /// bytes.
    pub(crate) fn root(generation: Option<&Generation>, tenant: &TenantId, cache_salt: &str) -> Self {
        let mut hasher = blake3::Hasher::new_derive_key(ROOT_CONTEXT);
        match generation {
            None => hasher.update(&[0]),
            Some(generation) => hasher.update(&[1]).update(&generation.0),
        };
        for text in [tenant.0.as_str(), cache_salt] {
            hasher.update(&(text.len() as u64).to_le_bytes()).update(text.as_bytes());
        }
        Self(hasher.finalize().into())
    }

    /// The key of the block that holds `tokens` and follows the block with this key.
    pub(crate) fn child(&self, tokens: &[Token]) -> Self {
        let mut hasher = blake3::Hasher::new_keyed(&self.0);
        // BLAKE3 consumes 64-byte blocks: hand it whole ones instead of four bytes at a time.
        let mut bytes = [0; 64];
        for tokens in tokens.chunks(bytes.len() / 4) {
            for (bytes, token) in bytes.chunks_exact_mut(4).zip(tokens) {
                bytes.copy_from_slice(&token.to_le_bytes());
            }
            hasher.update(&bytes[..tokens.len() * 4]);
        }
        Self(hasher.finalize().into())
    }
}

/// Which block holds what. One block per key: where two sequences computed the same block side by side, the first one
/// published is shared and the other stays private.
#[derive(Debug, Default)]
pub(crate) struct PrefixIndex {
    blocks: FixedMap<BlockKey, u32>,
}

impl PrefixIndex {
    pub(crate) fn with_capacity(blocks: usize) -> Self {
        Self { blocks: FixedMap::with_capacity_and_hasher(blocks, Default::default()) }
    }

    pub(crate) fn get(&self, key: &BlockKey) -> Option<u32> {
        self.blocks.get(key).copied()
    }

    /// Whether `block` is now the one found under `key`.
    pub(crate) fn insert_if_absent(&mut self, key: BlockKey, block: u32) -> bool {
        *self.blocks.entry(key).or_insert(block) == block
    }

    pub(crate) fn remove(&mut self, key: &BlockKey) {
        self.blocks.remove(key);
    }

    pub(crate) fn len(&self) -> usize {
        self.blocks.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_depends_on_everything_that_the_kv_depends_on() {
        let tenant = |name: &str| TenantId(name.into());
        let (a, b) = (Generation([1; 32]), Generation([2; 32]));
        let roots = [
            BlockKey::root(None, &tenant("t"), ""),
            BlockKey::root(Some(&a), &tenant("t"), ""),
            BlockKey::root(Some(&b), &tenant("t"), ""),
            BlockKey::root(None, &tenant("u"), ""),
            BlockKey::root(None, &tenant("t"), "u"),
            BlockKey::root(None, &tenant("tu"), ""),
            BlockKey::root(None, &tenant(""), "tu"),
        ];
        let mut keys: Vec<_> = roots.iter().map(|root| root.child(&[1, 2, 3, 4])).collect();
        keys.push(roots[0].child(&[1, 2, 4, 3]));
        keys.push(roots[0].child(&[1, 2, 3]));
        keys.push(roots[0].child(&[1, 2, 3, 4]).child(&[1, 2, 3, 4]));
        keys.extend(roots);
        for (i, key) in keys.iter().enumerate() {
            assert!(!keys[..i].contains(key), "key {i} repeats");
        }
    }

    #[test]
    fn tokens_past_the_hashers_block_still_count() {
        let root = BlockKey::root(None, &TenantId("t".into()), "");
        let tokens: Vec<Token> = (0..70).collect();
        for changed in [0, 15, 16, 63, 64, 69] {
            let mut other = tokens.clone();
            other[changed] += 1;
            assert_ne!(root.child(&tokens), root.child(&other), "token {changed}");
        }
    }
}
