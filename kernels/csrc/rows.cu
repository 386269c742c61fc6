// What works row by row: tokens taken from the sampling before, embedding, RMSNorm with the residual addition before it, SwiGLU, bias,
// rows picked out, pages copied.
//
// All of it is bound by bytes. Per row, with T in 16 bits and at width h (intermediate size i):
//
//   take_drawn    reads 16 bytes in two places, writes 4: a launch's latency
//   embed         reads 2 h, writes 4 h
//   add_rms_norm  reads 4 h + 2 h and the weight (4 h, from the L2 cache after the first row), writes 4 h + 2 h
//   swiglu        reads 4 i, writes 2 i
//   add_bias      reads 2 h and the bias (4 h, from the L2 cache), writes 2 h
//   gather_rows   reads and writes the row once
//   copy_blocks   reads and writes the page once
//
// Each byte moves once, 16 bytes a thread at a time (8 where a 16-bit row goes beside an f32 row), so the expected rate is that
// of a copy, 85 to 90% of the memory's peak, once there are enough rows (from about 3 MB on; a decode step's 64 rows are
// smaller than that, lie in the L2 cache and cost a launch). Widths that 16 bytes do not divide take the same kernels with one
// number a thread at a time.
//
// `rows` is the address of the number of rows: that of a step (the first field of Counts) or of a list of picked rows. Blocks
// beyond it return. What a row's bits depend on is the row and the width: the threads that share a row are chosen by width alone.
#include "step.cuh"

// Turing has no bf16 and no kernels for it.
#if defined(OPENLORA_HOST) || __CUDA_ARCH__ >= 800
#define BF16_KERNELS 1
#else
#define BF16_KERNELS 0
#endif

constexpr u32 NORM_THREADS = 512;
// Packs of a row that a thread of add_rms_norm keeps in registers; what a wider row has more is read again.
constexpr u32 NORM_PACKS = 4;
constexpr u32 ROW_THREADS = 256;
// Of the numbers that a token or an index out of range gives instead of a read out of bounds.
constexpr u32 NAN_BITS = 0x7fffffffu;

// One number or as many as 16 bytes of T hold.
template <typename T>
constexpr u32 WIDE = 16 / sizeof(T);

struct DrawnParams {
  const Drawn* drawn;           // [count], each row once
  const SampleResult* results;  // of a sampling with every row that `drawn` names
  u32* tokens;                  // of the step
  u32 count;
  u32 unused;
};

// Tokens that the host does not know, before the step's first kernel reads them.
KERNEL(take_drawn, DrawnParams, ROW_THREADS) {
  u32 i = blockIdx.x * ROW_THREADS + threadIdx.x;
  if (i < p.count) p.tokens[p.drawn[i].row] = p.results[p.drawn[i].sample].token;
}

struct EmbedParams {
  const u32* rows;
  const u32* tokens;  // [rows]
  const void* table;  // [vocab, hidden] of T
  void* out;          // [rows, hidden] of O
  u32 vocab;
  u32 hidden;
};

template <typename T, typename O, u32 N>
DEVICE void embed_row(const EmbedParams& p, u32 token, u32 column) {
  O* out = static_cast<O*>(p.out) + static_cast<u64>(blockIdx.x) * p.hidden + column;
  Pack<T, N> values;
  if (token < p.vocab) {
    values = load_pack<T, N>(static_cast<const T*>(p.table) + static_cast<u64>(token) * p.hidden + column);
  } else {
    for (u32 i = 0; i < N; i++) values.values[i] = from_float<T>(__uint_as_float(NAN_BITS));
  }
  // 16 bytes of T are 32 of f32.
  constexpr u32 STORE = N < WIDE<O> ? N : WIDE<O>;
  for (u32 first = 0; first < N; first += STORE) {
    Pack<O, STORE> pack;
    for (u32 i = 0; i < STORE; i++) pack.values[i] = from_float<O>(as_float(values.values[first + i]));
    store_pack<O, STORE>(out + first, pack);
  }
}

template <typename T, typename O>
DEVICE void embed(const EmbedParams& p) {
  if (blockIdx.x >= *p.rows) return;
  u32 token = p.tokens[blockIdx.x];
  if (p.hidden % WIDE<T> == 0) {
    u32 column = (blockIdx.y * ROW_THREADS + threadIdx.x) * WIDE<T>;
    if (column < p.hidden) embed_row<T, O, WIDE<T>>(p, token, column);
  } else {
    u32 end = min_u32((blockIdx.y + 1) * ROW_THREADS * WIDE<T>, p.hidden);
    for (u32 column = blockIdx.y * ROW_THREADS * WIDE<T> + threadIdx.x; column < end; column += ROW_THREADS) {
      embed_row<T, O, 1>(p, token, column);
    }
  }
}

KERNEL(embed_f32, EmbedParams, ROW_THREADS) { embed<float, float>(p); }
#if BF16_KERNELS
KERNEL(embed_bf16, EmbedParams, ROW_THREADS) { embed<bf16, float>(p); }
#endif
KERNEL(embed_f16, EmbedParams, ROW_THREADS) { embed<f16, float>(p); }
#if BF16_KERNELS
KERNEL(embed_narrow_bf16, EmbedParams, ROW_THREADS) { embed<bf16, bf16>(p); }
#endif
KERNEL(embed_narrow_f16, EmbedParams, ROW_THREADS) { embed<f16, f16>(p); }

struct NormParams {
  const u32* rows;
  float* residual;      // [rows, width]
  const void* delta;    // [rows, width] of T, or null
  const float* weight;  // [width]
  void* out;            // [rows, width] of T
  u32 width;
  float eps;
};

// The sum over the block, in the same order for every block of so many threads.
DEVICE float block_sum(float x) {
  float* sums = reinterpret_cast<float*>(shared_memory());
  x = warp_sum(x);
  if (threadIdx.x % WARP == 0) sums[threadIdx.x / WARP] = x;
  __syncthreads();
  float total = 0.0f;
  for (u32 warp = 0; warp < blockDim.x / WARP; warp++) total += sums[warp];
  return total;
}

// residual += delta where given, then out = residual / sqrt(mean(residual^2) + eps) * weight. A thread has packs
// threadIdx.x, threadIdx.x + blockDim.x, ...; the first of them stay in registers between the sum and the product, the others
// it reads back. All loads of the first are on their way before anything waits for one.
template <typename T, u32 N>
DEVICE void norm_row(const NormParams& p) {
  u64 row = static_cast<u64>(blockIdx.x) * p.width;
  float* residual = p.residual + row;
  const T* delta = p.delta ? static_cast<const T*>(p.delta) + row : nullptr;
  T* out = static_cast<T*>(p.out) + row;
  u32 packs = p.width / N, first = threadIdx.x, beyond = threadIdx.x + NORM_PACKS * blockDim.x;
  float sum = 0.0f;
  auto add = [&](u32 pack, Pack<float, N>& x, const Pack<T, N>& more) {
    for (u32 i = 0; i < N; i++) x.values[i] += as_float(more.values[i]);
    store_pack<float, N>(residual + pack * N, x);
  };
  auto square = [&](const Pack<float, N>& x) {
    for (u32 i = 0; i < N; i++) sum += x.values[i] * x.values[i];
  };
  auto give = [&](u32 pack, const Pack<float, N>& x, const Pack<float, N>& weight, float factor) {
    Pack<T, N> y;
    for (u32 i = 0; i < N; i++) y.values[i] = from_float<T>(x.values[i] * factor * weight.values[i]);
    store_pack<T, N>(out + pack * N, y);
  };
  Pack<float, N> kept[NORM_PACKS], weights[NORM_PACKS];
  Pack<T, N> addends[NORM_PACKS];
#pragma unroll
  for (u32 slot = 0; slot < NORM_PACKS; slot++) {
    u32 pack = first + slot * blockDim.x;
    if (pack >= packs) continue;
    kept[slot] = load_pack<float, N>(residual + pack * N);
    if (delta) addends[slot] = load_pack<T, N>(delta + pack * N);
    weights[slot] = load_pack<float, N>(p.weight + pack * N);
  }
#pragma unroll
  for (u32 slot = 0; slot < NORM_PACKS; slot++) {
    u32 pack = first + slot * blockDim.x;
    if (pack >= packs) continue;
    if (delta) add(pack, kept[slot], addends[slot]);
    square(kept[slot]);
  }
  for (u32 pack = beyond; pack < packs; pack += blockDim.x) {
    Pack<float, N> x = load_pack<float, N>(residual + pack * N);
    if (delta) add(pack, x, load_pack<T, N>(delta + pack * N));
    square(x);
  }
  float factor = 1.0f / sqrtf(block_sum(sum) / static_cast<float>(p.width) + p.eps);
#pragma unroll
  for (u32 slot = 0; slot < NORM_PACKS; slot++) {
    u32 pack = first + slot * blockDim.x;
    if (pack < packs) give(pack, kept[slot], weights[slot], factor);
  }
  for (u32 pack = beyond; pack < packs; pack += blockDim.x) {
    give(pack, load_pack<float, N>(residual + pack * N), load_pack<float, N>(p.weight + pack * N), factor);
  }
}

template <typename T>
DEVICE void add_rms_norm(const NormParams& p) {
  if (blockIdx.x >= *p.rows) return;
  if (p.width % 4 == 0) {
    norm_row<T, 4>(p);
  } else {
    norm_row<T, 1>(p);
  }
}

KERNEL(add_rms_norm_f32, NormParams, NORM_THREADS) { add_rms_norm<float>(p); }
#if BF16_KERNELS
KERNEL(add_rms_norm_bf16, NormParams, NORM_THREADS) { add_rms_norm<bf16>(p); }
#endif
KERNEL(add_rms_norm_f16, NormParams, NORM_THREADS) { add_rms_norm<f16>(p); }

struct SwigluParams {
  const u32* rows;
  const void* gate_up;  // [rows, 2 width] of T, the gate first
  void* out;            // [rows, width] of T
  u32 width;
  u32 unused;
};

// x / (1 + e^-x). A large -x gives x / inf, which is 0.
DEVICE float silu(float x, float) { return x / (1.0f + expf(-x)); }
// What is rounded to 16 bits can do with the multiprocessor's own exponential: its error is 2^-20 at most where e^-x matters.
template <typename T>
DEVICE float silu(float x, T) {
  return x / (1.0f + exp2_approx(x * -1.4426950408889634f));
}

template <typename T, u32 N>
DEVICE void swiglu_pack(const SwigluParams& p, u32 column) {
  const T* gate = static_cast<const T*>(p.gate_up) + static_cast<u64>(blockIdx.x) * 2 * p.width + column;
  Pack<T, N> x = load_pack<T, N>(gate), up = load_pack<T, N>(gate + p.width), out;
  for (u32 i = 0; i < N; i++) {
    out.values[i] = from_float<T>(silu(as_float(x.values[i]), T{}) * as_float(up.values[i]));
  }
  store_pack<T, N>(static_cast<T*>(p.out) + static_cast<u64>(blockIdx.x) * p.width + column, out);
}

template <typename T>
DEVICE void swiglu(const SwigluParams& p) {
  if (blockIdx.x >= *p.rows) return;
  if (p.width % WIDE<T> == 0) {
    u32 column = (blockIdx.y * ROW_THREADS + threadIdx.x) * WIDE<T>;
    if (column < p.width) swiglu_pack<T, WIDE<T>>(p, column);
  } else {
    u32 end = min_u32((blockIdx.y + 1) * ROW_THREADS * WIDE<T>, p.width);
    for (u32 column = blockIdx.y * ROW_THREADS * WIDE<T> + threadIdx.x; column < end; column += ROW_THREADS) {
      swiglu_pack<T, 1>(p, column);
    }
  }
}

KERNEL(swiglu_f32, SwigluParams, ROW_THREADS) { swiglu<float>(p); }
#if BF16_KERNELS
KERNEL(swiglu_bf16, SwigluParams, ROW_THREADS) { swiglu<bf16>(p); }
#endif
KERNEL(swiglu_f16, SwigluParams, ROW_THREADS) { swiglu<f16>(p); }

struct BiasParams {
  const u32* rows;
  const float* bias;  // [width]
  void* out;          // [rows, width] of T
  u32 width;
  u32 unused;
};

template <typename T, u32 N>
DEVICE void bias_pack(const BiasParams& p, u32 column) {
  T* out = static_cast<T*>(p.out) + static_cast<u64>(blockIdx.x) * p.width + column;
  Pack<T, N> x = load_pack<T, N>(out);
  constexpr u32 LOAD = N < 4 ? N : 4;
  for (u32 first = 0; first < N; first += LOAD) {
    Pack<float, LOAD> bias = load_pack<float, LOAD>(p.bias + column + first);
    for (u32 i = 0; i < LOAD; i++) {
      x.values[first + i] = from_float<T>(as_float(x.values[first + i]) + bias.values[i]);
    }
  }
  store_pack<T, N>(out, x);
}

template <typename T>
DEVICE void add_bias(const BiasParams& p) {
  if (blockIdx.x >= *p.rows) return;
  if (p.width % WIDE<T> == 0) {
    u32 column = (blockIdx.y * ROW_THREADS + threadIdx.x) * WIDE<T>;
    if (column < p.width) bias_pack<T, WIDE<T>>(p, column);
  } else {
    u32 end = min_u32((blockIdx.y + 1) * ROW_THREADS * WIDE<T>, p.width);
    for (u32 column = blockIdx.y * ROW_THREADS * WIDE<T> + threadIdx.x; column < end; column += ROW_THREADS) {
      bias_pack<T, 1>(p, column);
    }
  }
}

KERNEL(add_bias_f32, BiasParams, ROW_THREADS) { add_bias<float>(p); }
#if BF16_KERNELS
KERNEL(add_bias_bf16, BiasParams, ROW_THREADS) { add_bias<bf16>(p); }
#endif
KERNEL(add_bias_f16, BiasParams, ROW_THREADS) { add_bias<f16>(p); }

struct GatherParams {
  const u32* rows;     // how many are picked
  const u32* indices;  // [rows]
  const u8* x;         // [x_rows] of row_bytes
  u8* out;             // [rows] of row_bytes
  u32 x_rows;
  u32 row_bytes;
};

// Bytes of a row that a block copies.
constexpr u32 GATHER_BYTES = ROW_THREADS * 16;

template <typename Unit>
DEVICE void gather_units(const GatherParams& p, u32 index) {
  u32 end = min_u32((blockIdx.y + 1) * GATHER_BYTES, p.row_bytes);
  const u8* from = p.x + static_cast<u64>(index) * p.row_bytes;
  u8* to = p.out + static_cast<u64>(blockIdx.x) * p.row_bytes;
  for (u32 at = blockIdx.y * GATHER_BYTES + threadIdx.x * sizeof(Unit); at < end; at += ROW_THREADS * sizeof(Unit)) {
    Unit unit;
    if (index < p.x_rows) {
      unit = *reinterpret_cast<const Unit*>(from + at);
    } else {
      // All bits set are a NaN in every element.
      for (u32 i = 0; i < sizeof(Unit) / 2; i++) reinterpret_cast<u16*>(&unit)[i] = 0xffff;
    }
    *reinterpret_cast<Unit*>(to + at) = unit;
  }
}

// Elements of any kind: only their bytes count.
KERNEL(gather_rows, GatherParams, ROW_THREADS) {
  if (blockIdx.x >= *p.rows) return;
  u32 index = p.indices[blockIdx.x];
  if (p.row_bytes % 16 == 0) {
    gather_units<Pack<u16, 8>>(p, index);
  } else if (p.row_bytes % 4 == 0) {
    gather_units<Pack<u16, 2>>(p, index);
  } else {
    gather_units<Pack<u16, 1>>(p, index);
  }
}

struct PagePair {
  u32 from;
  u32 to;
};

struct CopyParams {
  const u32* pairs_count;
  const PagePair* pairs;
  u8* pages;
  u64 page_bytes;  // a multiple of 256
  u32 pages_count;
  u32 unused;
};

// Bytes of a page that a block copies: a thread has eight loads on their way.
constexpr u32 COPY_LOADS = 8;
constexpr u32 COPY_BYTES = ROW_THREADS * 16 * COPY_LOADS;

// Pages onto other pages. No page is both written and read by one launch, or written twice.
KERNEL(copy_blocks, CopyParams, ROW_THREADS) {
  if (blockIdx.x >= *p.pairs_count) return;
  PagePair pair = p.pairs[blockIdx.x];
  if (pair.from >= p.pages_count || pair.to >= p.pages_count) return;
  const u8* from = p.pages + pair.from * p.page_bytes;
  u8* to = p.pages + pair.to * p.page_bytes;
  u64 first = static_cast<u64>(blockIdx.y) * COPY_BYTES + threadIdx.x * 16;
  Pack<u32, 4> units[COPY_LOADS];
#pragma unroll
  for (u32 i = 0; i < COPY_LOADS; i++) {
    u64 at = first + i * ROW_THREADS * 16;
    if (at < p.page_bytes) units[i] = *reinterpret_cast<const Pack<u32, 4>*>(from + at);
  }
#pragma unroll
  for (u32 i = 0; i < COPY_LOADS; i++) {
    u64 at = first + i * ROW_THREADS * 16;
    if (at < p.page_bytes) *reinterpret_cast<Pack<u32, 4>*>(to + at) = units[i];
  }
}
