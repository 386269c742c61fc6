// Causal attention with grouped queries over paged keys and values, an optional sliding window (grouped-query attention, Ainslie et
// al. 2023; tiles and online softmax as in FlashAttention-2, Dao 2023; splits over the keys as in Flash-Decoding, Dao et al. 2023).
//
//   positions    0        64       128      192      256                    splits: SPLIT positions, each with a softmax of its own
//   tiles        |--------|--------|--------|--------|--------|----         tiles: KEYS positions (64; 32 for long heads)
//   row at 300   ################################### | ######.              one row's sums: tiles in order within a split,
//                split 0: (largest, sum, values)       split 1              then splits in order (join)
//
// A query row of one head is a *pair* (row, head of the group). The pairs of a sequence that share a key-value head are the rows of
// the tensor cores' 16 x 16 tiles, row after row: a key or value is read once for the whole group.
//
//   few rows (rows x group <= 16, decode): one block of 4 warps for one tile of 16 pairs and one split. The warps share the keys of
//       Q K^T and the columns of P V; P goes through shared memory. Largest, sum and values in f32 to the workspace, where
//       attention_join adds up the splits in order. One split alone is written out at once.
//   many rows (chunks of prompts): 12 warps (4 where a block has 100 KiB) with 16 pairs each, all splits one after the other; P stays
//       in registers; what the splits before came to lies in shared memory.
//
// Both are one template, so the order of every sum is the same: mma over ascending k, tiles from fixed positions, rescaling by the
// same numbers. The sum of P is a product with a column of ones, which needs no order of its own. Tiles and splits in which a row
// sees nothing change no bit of it: its P is 0, its factor 2^0. Keys and values that no row of the block sees are not read; their
// places are zeros.
//
// Who does what is in a plan that attention_plan writes once a step (and window): lists of (sequence, tile, split), which blocks walk
// through. So a recorded launch has nothing of the step in it.
//
// What it should cost on an H200, by design; not measured yet (32 query heads, 8 key-value heads, 128 elements, bf16):
//
//   decode, 64 rows at 1,024     268 MB of keys and values, 62 us at 4.3 TB/s, in 2,048 items of 128 KiB; partial results are 4 MB,
//                                which stay in the cache. 3 blocks a multiprocessor with 32 KiB on the way each, where 18 KiB are
//                                enough for a microsecond's latency. Expected: 0.85 of that floor; memory is the bound.
//   decode, 1 row at 32,768      134 MB, 31 us, in 1,024 items for 396 places; joining 128 splits in order is 8 rounds of loads, 3 to
//                                4 us. Expected: 0.75.
//   prompts, 8 x 1,024           69 GFLOP, 87 us at 790 TFLOP/s. With 16 pairs a warp, each warp reads every key and value fragment
//                                for itself: 40 KB of shared memory for 128 mma, 312 cycles for 128, so at most 0.41 of the peak;
//                                with the masked halves of tiles at the edge 0.3 to 0.35 is expected. Keys and values come
//                                out of the L2 cache once for 192 pairs, 0.36 GB.
//
// Registers as NVRTC 13.0 reports them for sm_80, sm_89, sm_90a and sm_100: attention_few at most 150, so that 3 blocks fit;
// attention_many at most 168, the most that 12 warps can have; its small form up to 247, one block of 4 warps. What spills is in
// allowed-local-memory.txt: nothing that those devices launch.
//
//   shared memory    heads of 64    96      128     256 elements
//   few              38 KiB         54      70      73            3 blocks of a multiprocessor
//   many             86             162     214     218           1 block
//   many, small      48             89      97      99
#include "step.cuh"

namespace {

constexpr u32 SPLIT = 256;
constexpr u32 ROWS = 16;  // of an mma tile
constexpr u32 DIRECT = 0xffffffffu;

// One block's work. `slot`: where the first row's partial result goes; DIRECT where there is one split only.
struct Item {
  u32 sequence;
  u32 tile;
  u32 split;
  u32 slot;
};

// One row whose splits are to be joined: their places are slot, slot + stride, ...
struct Join {
  u32 row;
  u32 slot;
  u32 splits;
  u32 stride;
};

struct Plan {
  u32 few;
  u32 many;
  u32 joins;
  u32 unused;
};

struct PlanParams {
  Step step;
  Plan* plan;
  Item* few;
  Item* many;
  Join* joins;
  u32 group;       // query heads of a key-value head
  u32 window;      // 0: none
  u32 many_pairs;  // pairs of a block of attention_many
  u32 unused;
};

struct State {
  float largest;
  float sum;
};

struct Params {
  Step step;
  const Plan* plan;
  const Item* few;
  const Item* many;
  const Join* joins;
  State* states;     // [slots, heads]
  float* sums;       // [slots, heads, head_dim]
  const void* qkv;   // [rows, (heads + 2 kv_heads) head_dim]
  void* out;         // [rows, heads head_dim]
  const u8* pages;   // this layer's part of page 0
  u64 page_bytes;
  u32 heads;
  u32 kv_heads;
  u32 group;          // heads / kv_heads
  u32 head_dim;
  u32 block_size;
  u32 window;         // 0: none
  float scale_log2;   // scale / ln 2
  u32 unused;
};

#define NOTHING __uint_as_float(0xff800000u)  // the largest of no scores

// The first position that the row at `position` sees.
DEVICE u32 first_seen(u32 position, u32 window) { return window == 0 || position < window ? 0 : position + 1 - window; }

// What is subtracted from scores before 2^x: their largest, or 0 where there is none yet.
DEVICE float reference_of(float largest) { return largest == NOTHING ? 0.0f : largest; }

template <typename T>
DEVICE u32 pack_pair(float low, float high) {
  return static_cast<u32>(from_float<T>(low).bits) | static_cast<u32>(from_float<T>(high).bits) << 16;
}

// How two softmaxes over different keys become one: both numerators are multiplied by the factors and added.
struct Merge {
  float before;  // factor of what there is
  float after;   // factor of what comes

  // Moves `largest` on to that of both.
  DEVICE Merge(float& largest, float coming, float scale_log2) {
    float both = fmaxf(largest, coming);
    float reference = reference_of(both);
    before = exp2_approx(__fmul_rn(largest - reference, scale_log2));
    after = exp2_approx(__fmul_rn(coming - reference, scale_log2));
    largest = both;
  }
  DEVICE float operator()(float there, float coming) const { return __fmaf_rn(there, before, __fmul_rn(coming, after)); }
};

// The attention of blocks of TILES x 16 pairs, each 16 pairs the work of WARPS warps, for heads of at most HEAD elements (a multiple
// of 32; shorter heads are filled up with zeros).
template <typename T, u32 HEAD, u32 TILES, u32 WARPS, bool SHARED_Q, bool TIGHT>
struct Attend {
  static constexpr u32 THREADS = TILES * WARPS * WARP;
  static constexpr u32 KEYS = HEAD > 128 ? 32 : 64;
  static constexpr u32 SCORES = KEYS / 8 / WARPS;             // 16 x 8 tiles of Q K^T of one warp
  static constexpr u32 COLUMNS = HEAD / 16;                   // 16 x 16 tiles of P V of all warps
  static constexpr u32 OWN = (COLUMNS + WARPS - 1) / WARPS;   // of one warp at most
  static constexpr u32 CHUNKS = HEAD / 8;                     // 16 bytes
  // Rows lie in shared memory so that ldmatrix meets every bank once: an odd number of chunks apart, or, where there is
  // no room for that, chunks swapped by the row's low bits.
  static constexpr bool SWAPPED = TIGHT && CHUNKS % 8 == 0;
  static constexpr u32 STRIDE = SWAPPED ? CHUNKS : CHUNKS + 1;
  static constexpr u32 TILE_BYTES = KEYS * STRIDE * 16;
  static constexpr u32 COPIES = (KEYS * CHUNKS + THREADS - 1) / THREADS;  // of a thread
  static constexpr bool EVEN = KEYS * CHUNKS % THREADS == 0;
  // Shared memory behind the stages, in bytes: P and the largest scores where warps exchange them, q where it is not in
  // registers, then what the splits before came to.
  static constexpr u32 EXCHANGED = WARPS > 1 ? TILES * KEYS / 16 * WARP * 16 : 0;
  static constexpr u32 LARGEST = WARPS > 1 ? TILES * WARPS * ROWS * 4 : 0;
  static constexpr u32 QUERIES = SHARED_Q ? TILES * HEAD / 16 * WARP * 16 : 0;

  const Params& p;
  u8* stages;   // [2][keys, values]
  u8* rest;
  u32 tile, part;  // the warp's place: which 16 pairs, which share of their work
  static DEVICE u32 lane() { return threadIdx.x % WARP; }

  // The block's sequence and pairs.
  u32 first_row, rows, kv_head, first_entry;

  u32 q[SHARED_Q ? 1 : HEAD / 16][4];
  float sums[OWN][2][4];
  float weight[4];   // sum of P, every column the same
  float largest[2];
  u32 position[2];   // of the rows of this thread's pairs

  DEVICE explicit Attend(const Params& params) : p(params) {
    static_assert((4 * TILE_BYTES + EXCHANGED + LARGEST + QUERIES) % 16 == 0, "alignment");
    stages = shared_memory();
    rest = stages + 4 * TILE_BYTES;
    tile = threadIdx.x / WARP / WARPS;
    part = threadIdx.x / WARP % WARPS;
  }

  static DEVICE u32 place(u32 row, u32 chunk) { return (row * STRIDE + (SWAPPED ? chunk ^ (row & 7) : chunk)) * 16; }

  DEVICE void begin(const Item& item, u32 head) {
    Sequence sequence = p.step.sequences[item.sequence];
    first_row = sequence.row;
    rows = sequence.rows;
    kv_head = head;
    first_entry = sequence.table;
  }

  // Takes up the pairs from `first` on: 16 for each tile.
  DEVICE void take_pairs(u32 first) {
    u32 last_pair = rows * p.group - 1;
    const u32* positions = p.step.positions + first_row;
    const T* query[2];
#pragma unroll
    for (u32 r = 0; r < 2; r++) {
      u32 pair = first + tile * ROWS + lane() / 4 + r * 8;
      u32 row = min_u32(pair, last_pair) / p.group;
      position[r] = positions[row];
      u64 head = static_cast<u64>(first_row + row) * (p.heads + 2 * p.kv_heads) + kv_head * p.group + pair % p.group;
      query[r] = pair <= last_pair ? static_cast<const T*>(p.qkv) + head * p.head_dim + lane() % 4 * 2 : nullptr;
    }
    if constexpr (SHARED_Q) {
      for (u32 step = part; step < HEAD / 16; step += WARPS) {
        Pack<u32, 4> fragment;
        load_query(fragment.values, query, step);
        store_pack(queries() + step * WARP * 4, fragment);
      }
    } else {
#pragma unroll
      for (u32 step = 0; step < HEAD / 16; step++) load_query(q[step], query, step);
    }
    clear();
  }

  // This lane's fragments of q in shared memory, one for each 16 elements, WARP * 4 apart.
  DEVICE u32* queries() const {
    return reinterpret_cast<u32*>(rest + EXCHANGED + LARGEST) + (tile * (HEAD / 16) * WARP + lane()) * 4;
  }

  // The fragment of 16 elements; `query` is where the lane's two rows have theirs, or null.
  DEVICE void load_query(u32 (&fragment)[4], const T* const (&query)[2], u32 step) const {
#pragma unroll
    for (u32 e = 0; e < 4; e++) {
      u32 column = step * 16 + e / 2 * 8;
      bool there = query[e % 2] != nullptr && column + lane() % 4 * 2 < p.head_dim;
      fragment[e] = there ? *reinterpret_cast<const u32*>(query[e % 2] + column) : 0;
    }
  }

  DEVICE void clear() {
#pragma unroll
    for (u32 i = 0; i < OWN; i++) {
#pragma unroll
      for (u32 e = 0; e < 8; e++) sums[i][e / 4][e % 4] = 0.0f;
    }
#pragma unroll
    for (u32 e = 0; e < 4; e++) weight[e] = 0.0f;
    largest[0] = largest[1] = NOTHING;
  }

  // The row of a tile that is this thread's i-th to copy 16 bytes of.
  static DEVICE u32 copied_row(u32 i) {
    return THREADS % CHUNKS == 0 ? threadIdx.x / CHUNKS + i * (THREADS / CHUNKS) : (threadIdx.x + i * THREADS) / CHUNKS;
  }

  // The head's keys in page 0.
  DEVICE const u8* first_keys() const {
    return p.pages + static_cast<u64>(kv_head) * 2 * p.block_size * p.head_dim * sizeof(T);
  }

  DEVICE u8* stage_of(u32 start) const { return stages + start / KEYS % 2 * 2 * TILE_BYTES; }

  // Starts the copy of the keys and values of the tile at `start`; places outside from..=until become zeros.
  DEVICE void copy(u32 start, u32 from, u32 until) {
    u8* to_keys = stage_of(start);
    u8* to_values = to_keys + TILE_BYTES;
    u32 values = p.block_size * p.head_dim * sizeof(T);
    if (p.head_dim % 8 != 0) {
      copy_words(to_keys, start, from, until);
      return;
    }
    const u32* table = p.step.block_tables + first_entry;
    const u8* keys = first_keys();
    // All page numbers are asked for before the first is needed.
    u32 pages[COPIES];
#pragma unroll
    for (u32 i = 0; i < COPIES; i++) {
      u32 at = start + copied_row(i);
      pages[i] = at >= from && at <= until ? table[at / p.block_size] : 0;
    }
#pragma unroll
    for (u32 i = 0; i < COPIES; i++) {
      u32 row = copied_row(i), chunk = (threadIdx.x + i * (THREADS % CHUNKS)) % CHUNKS;
      if (!EVEN && row >= KEYS) continue;
      bool seen = start + row >= from && start + row <= until && chunk * 8 < p.head_dim;
      u64 offset = pages[i] * p.page_bytes + (start + row) % p.block_size * (p.head_dim * sizeof(T)) + chunk * 16;
      const u8* source = keys + (seen ? offset : 0);
      u32 to = place(row, chunk);
      async_copy_16(to_keys + to, source, seen ? 16 : 0);
      async_copy_16(to_values + to, source + values, seen ? 16 : 0);
    }
    async_commit();
  }

  // The same for heads that are not whole chunks of 16 bytes.
  DEVICE void copy_words(u8* to_keys, u32 start, u32 from, u32 until) {
    constexpr u32 WORDS = HEAD / 2;
    const u32* table = p.step.block_tables + first_entry;
    const u8* keys = first_keys();
    const u8* values = keys + static_cast<u64>(p.block_size) * p.head_dim * sizeof(T);
#pragma unroll 1
    for (u32 i = threadIdx.x; i < KEYS * WORDS; i += THREADS) {
      u32 row = i / WORDS, word = i % WORDS, at = start + row;
      u32 key = 0, value = 0;
      if (at >= from && at <= until && word * 2 < p.head_dim) {
        u64 offset = table[at / p.block_size] * p.page_bytes + (at % p.block_size * p.head_dim + word * 2) * sizeof(T);
        key = *reinterpret_cast<const u32*>(keys + offset);
        value = *reinterpret_cast<const u32*>(values + offset);
      }
      u32 to = place(row, word / 4) + word % 4 * 4;
      *reinterpret_cast<u32*>(to_keys + to) = key;
      *reinterpret_cast<u32*>(to_keys + TILE_BYTES + to) = value;
    }
  }

  // One tile of keys and values, at `start`, into the sums.
  DEVICE void add_tile(u32 start) {
    // The positions of the warp's first and last row.
    u32 low = __shfl_sync(ALL_LANES, position[0], 0), high = __shfl_sync(ALL_LANES, position[1], WARP - 1);
    // With WARPS > 1 every warp has to come to the barriers.
    if (WARPS == 1 && (start > high || start + KEYS <= first_seen(low, p.window))) return;
    const u8* tile_keys = stage_of(start);
    const u8* tile_values = tile_keys + TILE_BYTES;
    float scores[SCORES][4];
#pragma unroll
    for (u32 j = 0; j < SCORES; j++) {
#pragma unroll
      for (u32 e = 0; e < 4; e++) scores[j][e] = 0.0f;
    }
    // Not taken apart where registers are short.
#pragma unroll (SHARED_Q && HEAD == 128 ? 1 : HEAD / 32)
    for (u32 step = 0; step < HEAD / 16; step += 2) {
      u32 a[2][4];
#pragma unroll
      for (u32 n = 0; n < 2; n++) {
        if constexpr (SHARED_Q) {
          Pack<u32, 4> fragment = load_pack<u32, 4>(queries() + (step + n) * WARP * 4);
#pragma unroll
          for (u32 e = 0; e < 4; e++) a[n][e] = fragment.values[e];
        } else {
#pragma unroll
          for (u32 e = 0; e < 4; e++) a[n][e] = q[step + n][e];
        }
      }
#pragma unroll
      for (u32 j = 0; j < SCORES; j++) {
        u32 b[4];
        ldmatrix_x4(b, tile_keys + place((part * SCORES + j) * 8 + lane() % 8, step * 2 + lane() / 8));
        mma_16x8x16<T>(scores[j], a[0], {b[0], b[1]});
        mma_16x8x16<T>(scores[j], a[1], {b[2], b[3]});
      }
    }
    u32 own_start = start + part * SCORES * 8;
    if (start + KEYS - 1 > low || start < first_seen(high, p.window)) {
      u32 seen_from[2] = {first_seen(position[0], p.window), first_seen(position[1], p.window)};
#pragma unroll
      for (u32 j = 0; j < SCORES; j++) {
#pragma unroll
        for (u32 e = 0; e < 4; e++) {
          u32 at = own_start + j * 8 + lane() % 4 * 2 + e % 2;
          if (at > position[e / 2] || at < seen_from[e / 2]) scores[j][e] = NOTHING;
        }
      }
    }
    float factors[2], references[2];
    move_largest(scores, factors, references);
    float offsets[2] = {__fmul_rn(-references[0], p.scale_log2), __fmul_rn(-references[1], p.scale_log2)};
#pragma unroll
    for (u32 j = 0; j < SCORES; j++) {
#pragma unroll
      for (u32 e = 0; e < 4; e++) scores[j][e] = exp2_approx(__fmaf_rn(scores[j][e], p.scale_log2, offsets[e / 2]));
    }
    // A factor of 1 changes nothing; it is the usual case once the largest score has been met.
    if (__any_sync(ALL_LANES, factors[0] != 1.0f || factors[1] != 1.0f)) {
#pragma unroll
      for (u32 i = 0; i < OWN; i++) {
#pragma unroll
        for (u32 e = 0; e < 8; e++) sums[i][e / 4][e % 4] *= factors[e % 4 / 2];
      }
#pragma unroll
      for (u32 e = 0; e < 4; e++) weight[e] *= factors[e / 2];
    }
    // P as the A side of P V: the scores' fragments are its own.
    u32* exchange = reinterpret_cast<u32*>(rest) + tile * (KEYS / 16) * WARP * 4;
    if constexpr (WARPS > 1) {
#pragma unroll
      for (u32 j = 0; j < SCORES; j++) {
        u32 number = part * SCORES + j;
        u32* to = exchange + (number / 2 * WARP + lane()) * 4 + number % 2 * 2;
        to[0] = pack_pair<T>(scores[j][0], scores[j][1]);
        to[1] = pack_pair<T>(scores[j][2], scores[j][3]);
      }
      __syncthreads();
    }
    const u32 ones = pack_pair<T>(1.0f, 1.0f);
#pragma unroll
    for (u32 step = 0; step < KEYS / 16; step++) {
      u32 a[4];
      if constexpr (WARPS > 1) {
        Pack<u32, 4> fragment = load_pack<u32, 4>(exchange + (step * WARP + lane()) * 4);
#pragma unroll
        for (u32 e = 0; e < 4; e++) a[e] = fragment.values[e];
      } else {
#pragma unroll
        for (u32 e = 0; e < 4; e++) {
          a[e] = pack_pair<T>(scores[step * 2 + e / 2][e % 2 * 2], scores[step * 2 + e / 2][e % 2 * 2 + 1]);
        }
      }
      mma_16x8x16<T>(weight, a, {ones, ones});
#pragma unroll
      for (u32 i = 0; i < OWN; i++) {
        u32 column = part + i * WARPS;
        if (COLUMNS % WARPS == 0 || column < COLUMNS) {
          u32 b[4];
          ldmatrix_x4_trans(b, tile_values + place(step * 16 + lane() % 16, column * 2 + lane() / 16));
          mma_16x8x16<T>(sums[i][0], a, {b[0], b[1]});
          mma_16x8x16<T>(sums[i][1], a, {b[2], b[3]});
        }
      }
    }
  }

  // The largest score so far with those of this tile; what the sums so far are to be multiplied by.
  DEVICE void move_largest(const float (&scores)[SCORES][4], float (&factors)[2], float (&references)[2]) {
    float here[2] = {NOTHING, NOTHING};
#pragma unroll
    for (u32 j = 0; j < SCORES; j++) {
#pragma unroll
      for (u32 e = 0; e < 4; e++) here[e / 2] = fmaxf(here[e / 2], scores[j][e]);
    }
#pragma unroll
    for (u32 r = 0; r < 2; r++) {
      here[r] = fmaxf(here[r], __shfl_xor_sync(ALL_LANES, here[r], 1));
      here[r] = fmaxf(here[r], __shfl_xor_sync(ALL_LANES, here[r], 2));
    }
    if constexpr (WARPS > 1) {
      float* exchange = reinterpret_cast<float*>(rest + EXCHANGED) + tile * WARPS * ROWS;
      if (lane() % 4 == 0) {
        exchange[part * ROWS + lane() / 4] = here[0];
        exchange[part * ROWS + lane() / 4 + 8] = here[1];
      }
      __syncthreads();
#pragma unroll
      for (u32 other = 0; other < WARPS; other++) {
        here[0] = fmaxf(here[0], exchange[other * ROWS + lane() / 4]);
        here[1] = fmaxf(here[1], exchange[other * ROWS + lane() / 4 + 8]);
      }
    }
#pragma unroll
    for (u32 r = 0; r < 2; r++) {
      float both = fmaxf(largest[r], here[r]);
      references[r] = reference_of(both);
      factors[r] = exp2_approx(__fmul_rn(largest[r] - references[r], p.scale_log2));
      largest[r] = both;
    }
  }

  // The element of a head that sums[i][n] holds in its columns 0 and 1 (of rows 0 and 8).
  DEVICE u32 element(u32 i, u32 n) const { return (part + i * WARPS) * 16 + n * 8 + lane() % 4 * 2; }

  DEVICE void write_out(u32 first, const float (&weights)[2]) {
    T* out = static_cast<T*>(p.out);
#pragma unroll
    for (u32 r = 0; r < 2; r++) {
      u32 pair = first + tile * ROWS + lane() / 4 + r * 8;
      if (pair >= rows * p.group) continue;
      u64 row = first_row + pair / p.group;
      T* to = out + (row * p.heads + kv_head * p.group + pair % p.group) * p.head_dim;
      float factor = 1.0f / weights[r];
#pragma unroll
      for (u32 i = 0; i < OWN; i++) {
#pragma unroll
        for (u32 n = 0; n < 2; n++) {
          u32 column = element(i, n);
          if (column >= p.head_dim) continue;
          *reinterpret_cast<u32*>(to + column) = pack_pair<T>(sums[i][n][r * 2] * factor, sums[i][n][r * 2 + 1] * factor);
        }
      }
    }
  }

  DEVICE void write_partial(u32 first, u32 slot) {
#pragma unroll
    for (u32 r = 0; r < 2; r++) {
      u32 pair = first + tile * ROWS + lane() / 4 + r * 8;
      if (pair >= rows * p.group) continue;
      u64 place = static_cast<u64>(slot + pair / p.group) * p.heads + kv_head * p.group + pair % p.group;
      if (part == 0 && lane() % 4 == 0) p.states[place] = {largest[r], weight[r * 2]};
#pragma unroll
      for (u32 i = 0; i < OWN; i++) {
#pragma unroll
        for (u32 n = 0; n < 2; n++) {
          u32 column = element(i, n);
          if (column >= p.head_dim) continue;
          Pack<float, 2> values = {{sums[i][n][r * 2], sums[i][n][r * 2 + 1]}};
          store_pack(p.sums + place * p.head_dim + column, values);
        }
      }
    }
  }

  // Tiles over the positions from..=until in order; `between(start)` before each.
  template <typename Between>
  DEVICE void tiles(u32 from, u32 until, Between between) {
    for (u32 start = from / KEYS * KEYS; start <= until; start += KEYS) {
      async_wait<0>();
      __syncthreads();
      if (start + KEYS <= until) copy(start + KEYS, from, until);
      between(start);
      add_tile(start);
    }
  }

  // A split of a sequence with few rows.
  DEVICE void few(const Item& item, u32 head) {
    begin(item, head);
    u32 first = item.tile * ROWS * TILES;
    u32 last_pair = min_u32(first + ROWS * TILES, rows * p.group) - 1;
    const u32* positions = p.step.positions + first_row;
    u32 from = max_u32(item.split * SPLIT, first_seen(positions[first / p.group], p.window));
    u32 until = min_u32(item.split * SPLIT + SPLIT - 1, positions[last_pair / p.group]);
    if (from <= until) copy(from / KEYS * KEYS, from, until);
    take_pairs(first);
    tiles(from, until, [](u32) {});
    if (item.slot == DIRECT) {
      join_nothing();
      float weights[2] = {weight[0], weight[2]};
      write_out(first, weights);
    } else {
      write_partial(first, item.slot);
    }
  }

  // Joining to nothing gives the same numbers, but never -0.
  DEVICE void join_nothing() {
#pragma unroll
    for (u32 i = 0; i < OWN; i++) {
#pragma unroll
      for (u32 e = 0; e < 8; e++) sums[i][e / 4][e % 4] += 0.0f;
    }
  }

  // All splits of some rows of a sequence with many. A thread keeps what the splits so far came to in places of its own.
  DEVICE void many(const Item* items, u32 number) {
    Item item = items[number / p.kv_heads];
    begin(item, number % p.kv_heads);
    u32 first = item.tile * ROWS * TILES;
    u32 last_pair = min_u32(first + ROWS * TILES, rows * p.group) - 1;
    const u32* positions = p.step.positions + first_row;
    u32 from = first_seen(positions[first / p.group], p.window);
    u32 until = positions[last_pair / p.group];
    copy(from / KEYS * KEYS, from, until);
    take_pairs(first);
    float* totals = reinterpret_cast<float*>(rest + EXCHANGED + LARGEST + QUERIES) + threadIdx.x;
    // The rows' sums and largest scores; four lanes have the same.
    float* states = reinterpret_cast<float*>(rest + EXCHANGED + LARGEST + QUERIES) + OWN * 8 * THREADS;
    states += threadIdx.x / WARP * 2 * ROWS + lane() / 4;
    float total_weight[2];
    auto join = [&](u32 split, bool keep) {
      bool joined = split > from / SPLIT;
      float total_largest[2];
#pragma unroll
      for (u32 r = 0; r < 2; r++) {
        total_weight[r] = joined ? states[r * 8] : 0.0f;
        total_largest[r] = joined ? states[ROWS + r * 8] : NOTHING;
      }
      Merge merge[2] = {Merge(total_largest[0], largest[0], p.scale_log2), Merge(total_largest[1], largest[1], p.scale_log2)};
#pragma unroll
      for (u32 r = 0; r < 2; r++) total_weight[r] = merge[r](total_weight[r], weight[r * 2]);
#pragma unroll
      for (u32 i = 0; i < OWN * 8; i++) {
        float& sum = sums[i / 8][i / 4 % 2][i % 4];
        sum = merge[i % 4 / 2](joined ? totals[i * THREADS] : 0.0f, sum);
        if (keep) totals[i * THREADS] = sum;
      }
      __syncwarp();
      if (keep && lane() % 4 == 0) {
#pragma unroll
        for (u32 r = 0; r < 2; r++) {
          states[r * 8] = total_weight[r];
          states[ROWS + r * 8] = total_largest[r];
        }
      }
      // The other lanes read them when the next split is joined.
      __syncwarp();
    };
    tiles(from, until, [&](u32 start) {
      if (start % SPLIT == 0 && start > from) {
        join(start / SPLIT - 1, true);
        clear();
      }
    });
    join(until / SPLIT, false);
    // Read again rather than kept in registers meanwhile.
    item = items[number / p.kv_heads];
    begin(item, number % p.kv_heads);
    write_out(item.tile * ROWS * TILES, total_weight);
  }
};

template <typename T, u32 HEAD>
DEVICE void attention_few(const Params& p) {
  u32 work = p.plan->few * p.kv_heads;
  Attend<T, HEAD, 1, 4, (HEAD > 128), (HEAD > 128)> attend(p);
  for (u32 i = blockIdx.x; i < work; i += gridDim.x) {
    __syncthreads();  // with the shared memory of the item before
    attend.few(p.few[i / p.kv_heads], i % p.kv_heads);
  }
}

template <typename T, u32 HEAD, u32 TILES, u32 WARPS, bool SMALL>
DEVICE void attention_many(const Params& p) {
  Attend<T, HEAD, TILES, WARPS, HEAD == 96 || (!SMALL && HEAD > 64), SMALL> attend(p);
  for (u32 i = blockIdx.x; i < p.plan->many * p.kv_heads; i += gridDim.x) {
    __syncthreads();
    attend.many(p.many, i);
  }
}

// The splits of the rows in p.joins, in order. A thread has two elements of one head.
template <typename T>
DEVICE void attention_join(const Params& p) {
  constexpr u32 AHEAD = 16;  // splits asked for at once
  u32 joins = p.plan->joins;
  u32 unit = (blockIdx.y * blockDim.x + threadIdx.x) * 2;
  if (unit >= p.heads * p.head_dim) return;
  u32 head = unit / p.head_dim;
  for (u32 i = blockIdx.x; i < joins; i += gridDim.x) {
    Join join = p.joins[i];
    float largest = NOTHING, weight = 0.0f, sums[2] = {0.0f, 0.0f};
    u64 slot = join.slot;
    for (u32 base = 0; base < join.splits; base += AHEAD) {
      State states[AHEAD];
      Pack<float, 2> parts[AHEAD];
#pragma unroll
      for (u32 a = 0; a < AHEAD; a++) {
        u64 at = slot + static_cast<u64>(min_u32(base + a, join.splits - 1)) * join.stride;
        states[a] = p.states[at * p.heads + head];
        parts[a] = load_pack<float, 2>(p.sums + at * p.heads * p.head_dim + unit);
      }
#pragma unroll
      for (u32 a = 0; a < AHEAD; a++) {
        if (base + a >= join.splits) break;
        Merge merge(largest, states[a].largest, p.scale_log2);
        weight = merge(weight, states[a].sum);
        sums[0] = merge(sums[0], parts[a].values[0]);
        sums[1] = merge(sums[1], parts[a].values[1]);
      }
    }
    float factor = 1.0f / weight;
    u32* out = static_cast<u32*>(p.out);
    out[(static_cast<u64>(join.row) * p.heads * p.head_dim + unit) / 2] = pack_pair<T>(sums[0] * factor, sums[1] * factor);
  }
}

// Sum of `value` over the threads before this one; `all` becomes the sum over all. `warps`: shared, one for each warp.
DEVICE u32 sum_before(u32 value, u32* warps, u32& all) {
  u32 lane = threadIdx.x % WARP, sum = value;
  for (u32 distance = 1; distance < WARP; distance *= 2) {
    u32 other = __shfl_up_sync(ALL_LANES, sum, distance);
    if (lane >= distance) sum += other;
  }
  __syncthreads();
  if (lane == WARP - 1) warps[threadIdx.x / WARP] = sum;
  __syncthreads();
  u32 before = 0;
  all = 0;
  for (u32 warp = 0; warp < blockDim.x / WARP; warp++) {
    if (warp == threadIdx.x / WARP) before = all;
    all += warps[warp];
  }
  return before + sum - value;
}

// A sequence's part of the plan.
struct Share {
  u32 tiles;   // of 16 pairs, or of a block of attention_many
  u32 first_split;
  u32 splits;  // 0: many rows
  u32 few, many, slots, joins;  // where its own begin
};

}  // namespace

constexpr u32 PLAN_THREADS = 256;

KERNEL(attention_plan, PlanParams, PLAN_THREADS) {
  u32* warps = reinterpret_cast<u32*>(shared_memory());
  Share* shares = reinterpret_cast<Share*>(shared_memory() + 128);
  u32 sequences = p.step.counts->sequences;
  u32 few = 0, many = 0, slots = 0, joins = 0;
  for (u32 base = 0; base < sequences; base += PLAN_THREADS) {
    Share share = {0, 0, 0, 0, 0, 0, 0};
    u32 number = base + threadIdx.x;
    Sequence sequence = {0, 0, 0, 0};
    if (number < sequences) {
      sequence = p.step.sequences[number];
      u32 pairs = sequence.rows * p.group;
      if (sequence.rows == 1 || pairs <= ROWS) {
        share.tiles = div_up(pairs, ROWS);
        share.first_split = first_seen(p.step.positions[sequence.row], p.window) / SPLIT;
        share.splits = p.step.positions[sequence.row + sequence.rows - 1] / SPLIT - share.first_split + 1;
      } else {
        share.tiles = div_up(pairs, p.many_pairs);
      }
    }
    bool parted = share.splits > 1;
    u32 all;
    share.few = few + sum_before(share.splits * share.tiles, warps, all);
    few += all;
    share.many = many + sum_before(share.splits == 0 ? share.tiles : 0, warps, all);
    many += all;
    share.slots = slots + sum_before(parted ? share.splits * sequence.rows : 0, warps, all);
    slots += all;
    share.joins = joins + sum_before(parted ? sequence.rows : 0, warps, all);
    joins += all;
    shares[threadIdx.x] = share;
    __syncthreads();
    u32 here = min_u32(sequences - base, PLAN_THREADS);
    for (u32 local = threadIdx.x / WARP; local < here; local += PLAN_THREADS / WARP) {
      u32 lane = threadIdx.x % WARP;
      Share own = shares[local];
      Sequence its = p.step.sequences[base + local];
      if (own.splits == 0) {
        // The last rows see the most keys: first.
        for (u32 i = lane; i < own.tiles; i += WARP) p.many[own.many + i] = {base + local, own.tiles - 1 - i, 0, DIRECT};
      }
      for (u32 i = lane; i < own.splits * own.tiles; i += WARP) {
        u32 split = i / own.tiles;
        u32 slot = own.splits > 1 ? own.slots + split * its.rows : DIRECT;
        p.few[own.few + i] = {base + local, i % own.tiles, own.first_split + split, slot};
      }
      if (own.splits > 1) {
        for (u32 row = lane; row < its.rows; row += WARP) {
          p.joins[own.joins + row] = {its.row + row, own.slots + row, own.splits, its.rows};
        }
      }
    }
    __syncthreads();
  }
  if (threadIdx.x == 0) *p.plan = {few, many, joins, 0};
}

constexpr u32 JOIN_THREADS = 128;

// f32: one warp for one row of one head; keys 32 at a time in order, one for each lane.
KERNEL(attention_f32, Params, 128) {
  constexpr u32 HEAD_MAX = 256;
  constexpr u32 WARP_BYTES = HEAD_MAX * 4 + WARP * (4 + 8);
  u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  u32 unit = blockIdx.x * (blockDim.x / WARP) + warp;
  u32 row = unit / p.heads, head = unit % p.heads;
  if (row >= p.step.counts->rows) return;
  u64* values_at = reinterpret_cast<u64*>(shared_memory() + warp * WARP_BYTES);
  float* query = reinterpret_cast<float*>(values_at + WARP);
  float* weights = query + HEAD_MAX;
  u32 position = p.step.positions[row];
  u32 from = first_seen(position, p.window);
  const u32* table = p.step.block_tables + p.step.sequences[p.step.row_sequence[row]].table;
  u32 kv_head = head / (p.heads / p.kv_heads);
  u64 block_elements = static_cast<u64>(p.block_size) * p.head_dim;
  const float* qkv = static_cast<const float*>(p.qkv);
  const float* q = qkv + (static_cast<u64>(row) * (p.heads + 2 * p.kv_heads) + head) * p.head_dim;
  for (u32 d = lane; d < p.head_dim; d += WARP) query[d] = q[d];
  float sums[HEAD_MAX / WARP];
#pragma unroll
  for (u32 i = 0; i < HEAD_MAX / WARP; i++) sums[i] = 0.0f;
  float largest = NOTHING, weight = 0.0f;
  for (u32 base = from / WARP * WARP; base <= position; base += WARP) {
    u32 at = base + lane;
    bool seen = at >= from && at <= position;
    u32 block = at / p.block_size;
    u64 page = seen ? table[block] : 0;
    const u8* of_page = p.pages + page * p.page_bytes;
    u64 element = kv_head * 2 * block_elements + static_cast<u64>(at - block * p.block_size) * p.head_dim;
    const float* key = reinterpret_cast<const float*>(of_page) + element;
    __syncwarp();
    values_at[lane] = reinterpret_cast<u64>(key + block_elements);
    float score = NOTHING;
    if (seen) {
      score = 0.0f;
      for (u32 d = 0; d < p.head_dim; d++) score = __fmaf_rn(query[d], key[d], score);
    }
    float both = fmaxf(largest, warp_max(score));
    float reference = reference_of(both);
    float factor = exp2_approx((largest - reference) * p.scale_log2);
    float own = seen ? exp2_approx((score - reference) * p.scale_log2) : 0.0f;
    largest = both;
    weight = __fmaf_rn(weight, factor, warp_sum(own));
    weights[lane] = own;
    __syncwarp();
    u32 begin = base < from ? from - base : 0;
    u32 end = min_u32(position - base + 1, WARP);
#pragma unroll
    for (u32 i = 0; i < HEAD_MAX / WARP; i++) {
      u32 d = i * WARP + lane;
      if (d >= p.head_dim) break;
      float sum = sums[i] * factor;
#pragma unroll 2
      for (u32 k = begin; k < end; k++) {
        sum = __fmaf_rn(weights[k], reinterpret_cast<const float*>(values_at[k])[d], sum);
      }
      sums[i] = sum;
    }
  }
  float* out = static_cast<float*>(p.out) + static_cast<u64>(unit) * p.head_dim;
#pragma unroll
  for (u32 i = 0; i < HEAD_MAX / WARP; i++) {
    u32 d = i * WARP + lane;
    if (d < p.head_dim) out[d] = sums[i] / weight;
  }
}

// `small` is for devices with about 100 KiB of shared memory for a block.
#define KERNELS_OF_HEAD(T, HEAD)                                                                            \
  KERNEL(attention_few_##HEAD##_##T, Params, 128) { attention_few<T, HEAD>(p); }                            \
  KERNEL(attention_many_small_##HEAD##_##T, Params, 128) { attention_many<T, HEAD, 4, 1, true>(p); }        \
  KERNEL(attention_many_##HEAD##_##T, Params, 384) { attention_many<T, HEAD, 12, 1, false>(p); }

// Heads of up to 256 elements: two warps share 16 pairs, so that the sums fit in registers.
#define KERNELS(T)                                                                                          \
  KERNEL(attention_join_##T, Params, JOIN_THREADS) { attention_join<T>(p); }                                \
  KERNELS_OF_HEAD(T, 64)                                                                                    \
  KERNELS_OF_HEAD(T, 96)                                                                                    \
  KERNELS_OF_HEAD(T, 128)                                                                                   \
  KERNEL(attention_few_256_##T, Params, 128) { attention_few<T, 256>(p); }                                  \
  KERNEL(attention_many_small_256_##T, Params, 128) { attention_many<T, 256, 2, 2, true>(p); }              \
  KERNEL(attention_many_256_##T, Params, 384) { attention_many<T, 256, 6, 2, false>(p); }

KERNELS(f16)
#if defined(OPENLORA_HOST) || __CUDA_ARCH__ >= 800
KERNELS(bf16)
#endif
