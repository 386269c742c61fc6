//! Rotary position embedding, with the q and k head norms that Qwen3 has before it.

use crate::{AttentionSpec, RopeTable};

use super::norm::rms_norm;

/// Rotates the pairs `(x[i], x[i + rotary_dim / 2])` of one head by the position's angles (RoFormer, Su et al. 2021, equation
/// 34, with Hugging Face's pairing of halves: `rotate_half`). Elements from `rotary_dim` on stay.
pub fn rotate(head: &mut [f32], rope: &RopeTable, position: usize) {
    let half = rope.rotary_dim / 2;
    for i in 0..half {
        let (cos, sin) = (rope.cos[position * half + i], rope.sin[position * half + i]);
        let (x, y) = (head[i], head[i + half]);
        head[i] = x * cos - y * sin;
        head[i + half] = y * cos + x * sin;
    }
}

/// On each row of `qkv: [positions, (heads + 2 kv_heads) head_dim]`: RMSNorm of every q and k head where weights `(q, k)`,
/// `[head_dim]` each, are given, then [`rotate`].
pub fn rope(
    spec: &AttentionSpec,
    positions: &[u32],
    table: &RopeTable,
    qk_norm: Option<(&[f32], &[f32])>,
    qkv: &mut [f32],
) {
    let width = (spec.heads + 2 * spec.kv_heads) * spec.head_dim;
    for (row, position) in qkv.chunks_exact_mut(width).zip(positions) {
        for (i, head) in row.chunks_exact_mut(spec.head_dim).take(spec.heads + spec.kv_heads).enumerate() {
            if let Some((q, k)) = qk_norm {
                let weight = if i < spec.heads { q } else { k };
                let raw = head.to_vec();
                rms_norm(&raw, weight, spec.norm_eps, head);
            }
            rotate(head, table, *position as usize);
        }
    }
}
