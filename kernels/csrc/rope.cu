// Rotary embedding of q and k (RoFormer, Su et al. 2021, equation 34, with Hugging Face's pairing of halves), RMSNorm of their heads
// before it where a model has that (Qwen3), and the way of k and v into the pages.
//
//   qkv     [row][q heads | k heads | v heads][head_dim]      T; q is rotated in place, k and v are read only
//   page    [layer][kv head][keys, values][block_size][head_dim]
//   cos     [positions][rotary_dim / 2]                       f32; sin the same
//
// One warp for one head of one row. It moves what it must: q once each way, k and v once from qkv and once to the pages; for 8,192
// rows of 32 + 8 + 8 heads of 128 in bf16 that is 184 MB, 43 us at 4.3 TB/s.
#include "step.cuh"

namespace {

struct Params {
  Step step;
  void* qkv;
  u8* pages;  // this layer's part of page 0
  u64 page_bytes;
  const float* cos;
  const float* sin;
  const float* q_norm;  // [head_dim]; null: no norms
  const float* k_norm;
  u32 heads;
  u32 kv_heads;
  u32 head_dim;
  u32 rotary_dim;
  u32 block_size;
  float norm_eps;
};

// A head's numbers, normed: N at once.
template <typename T, u32 N>
struct Head {
  const T* x;
  const float* weight;  // null: as they are
  float factor;

  DEVICE void load(float (&to)[N], u32 at) const {
    Pack<T, N> pack = load_pack<T, N>(x + at);
#pragma unroll
    for (u32 i = 0; i < N; i++) {
      float value = as_float(pack.values[i]);
      to[i] = weight ? value * factor * weight[at + i] : value;
    }
  }
};

template <typename T, u32 N>
DEVICE void store(T* to, const float (&values)[N]) {
  Pack<T, N> pack;
#pragma unroll
  for (u32 i = 0; i < N; i++) pack.values[i] = from_float<T>(values[i]);
  store_pack(to, pack);
}

// Rotates a head into `to`, which may be where it came from. N divides rotary_dim / 2 and head_dim.
template <typename T, u32 N>
DEVICE void rotate(const Params& p, const Head<T, N>& head, T* to, u32 position) {
  u32 lane = threadIdx.x % WARP, half = p.rotary_dim / 2;
  u64 angles = static_cast<u64>(position) * half;
  for (u32 i = lane * N; i < half; i += WARP * N) {
    float a[N], b[N], x[N], y[N];
    head.load(a, i);
    head.load(b, i + half);
#pragma unroll
    for (u32 n = 0; n < N; n++) {
      float cos = p.cos[angles + i + n], sin = p.sin[angles + i + n];
      x[n] = __fmaf_rn(a[n], cos, -__fmul_rn(b[n], sin));
      y[n] = __fmaf_rn(b[n], cos, __fmul_rn(a[n], sin));
    }
    store(to + i, x);
    store(to + i + half, y);
  }
  for (u32 i = p.rotary_dim + lane * N; i < p.head_dim; i += WARP * N) {
    float x[N];
    head.load(x, i);
    store(to + i, x);
  }
}

template <typename T, u32 N>
DEVICE void run(const Params& p) {
  u32 lane = threadIdx.x % WARP;
  u32 row_heads = p.heads + 2 * p.kv_heads;
  u32 unit = blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP;
  u32 row = unit / row_heads, head = unit % row_heads;
  if (row >= p.step.counts->rows) return;
  u32 position = p.step.positions[row];
  T* x = static_cast<T*>(p.qkv) + static_cast<u64>(unit) * p.head_dim;
  T* to = x;
  if (head >= p.heads) {
    u32 kv_head = (head - p.heads) % p.kv_heads;
    bool is_value = head >= p.heads + p.kv_heads;
    const u32* table = p.step.block_tables + p.step.sequences[p.step.row_sequence[row]].table;
    u64 page = table[position / p.block_size];
    u64 token = (static_cast<u64>(kv_head) * 2 + is_value) * p.block_size + position % p.block_size;
    to = reinterpret_cast<T*>(p.pages + page * p.page_bytes) + token * p.head_dim;
    if (is_value) {
      for (u32 i = lane * N; i < p.head_dim; i += WARP * N) store_pack(to + i, load_pack<T, N>(x + i));
      return;
    }
  }
  Head<T, N> normed = {x, head < p.heads ? p.q_norm : p.k_norm, 1.0f};
  if (normed.weight) {
    float squares = 0.0f;
    for (u32 i = lane; i < p.head_dim; i += WARP) {
      float value = as_float(x[i]);
      squares = __fmaf_rn(value, value, squares);
    }
    normed.factor = rsqrt_approx(warp_sum(squares) / static_cast<float>(p.head_dim) + p.norm_eps);
  }
  rotate(p, normed, to, position);
}

template <typename T>
DEVICE void rope_and_store(const Params& p) {
  if (p.rotary_dim % 4 == 0 && p.head_dim % 2 == 0) {
    run<T, 2>(p);
  } else {
    run<T, 1>(p);
  }
}

}  // namespace

KERNEL(rope_and_store_f32, Params, 256) { rope_and_store<float>(p); }
KERNEL(rope_and_store_f16, Params, 256) { rope_and_store<f16>(p); }
KERNEL(rope_and_store_bf16, Params, 256) { rope_and_store<bf16>(p); }
