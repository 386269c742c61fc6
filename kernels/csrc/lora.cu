// LoRA for rows of many adapters in one batch (SGMV: Punica, Chen et al. 2023, section 4), as src/cuda/lora.rs launches it. The
// definition is src/reference/lora.rs; where factors lie is said in src/cuda/lora.rs.
//
//   lora_plan     once per step, a block for each linear of the model: which tiles the next two have to do, with every address resolved
//   lora_shrink   z = A x       for all sites of a linear and all rows: partial sums over 1,024 inputs each, to a workspace
//   lora_expand   out = output_scale (out + scale (B z + b_bias)) + bias     adding up the partial sums in their order
//   lora_embed    the same for `embed_tokens`, where z is a column of A
//
// Why a plan: with the weights of a layer in between, segments, sites and pieces are in no cache, so that following step -> segment ->
// site -> piece costs four round trips to memory, some 3 us, in each of 256 launches of a step. The plan follows them for all
// linears at the same time, about 5 us in all; a block of the others reads its item and then weights.
//
// What a tile does, for the elements of 16 bits (mma.m16n8k16: 16 x 16 weights, 8 rows of the batch; weights are the M side, so that
// one row costs no more than eight):
//
//   shrink   unit = 16 ranks of one site; tile = unit x 1,024 inputs x 1..16 rows. Each of 8 warps has 128 inputs, and all its weights in
//            flight at once: 32 KiB a block. A lane's 16 bytes are 8 inputs of one rank, two mma's worth: A and x are
//            permuted along k in the same way, so that nothing goes through shared memory but 8 sums.
//            Segments of 256 rows and more: tile = up to 4 units x 1,024 inputs x 128 rows, 16 of them for each warp, which goes
//            through the same eight 128 inputs by itself: x is read once for all sites.
//   expand   tile = 512 outputs of one site x 1..16 rows (64 where a segment has 256). A lane's 16 bytes are 8 outputs of one rank;
//            four such loads are the fragments of four mma's, outputs permuted along m, and what comes out is 8
//            neighbouring outputs of two rows, added to out with 16-byte accesses.
//
// A row's bits. A sum over k is mma's in order over 128 inputs, then additions in order over the eight parts of a split, then
// additions in order over the splits; over ranks, mma's in order. Nothing of that knows how many rows, blocks or multiprocessors there
// are. Tiles are dealt out by their number, and no two blocks write the same place.
//
// Bytes by design: bf16, r16, q, k, v of Llama-3.1-8B (4,096 -> 4,096 + 1,024 + 1,024), in MB. Floor: every factor and x once, out read
// and written once. "L2" is what is read again shortly after somebody else has read or written it.
//
//                            shrink                                     expand                                         floor   above it
//   64 rows, 64 adapters     A 25.2, x 0.5 (L2 1.0), z 0.05             B 12.6, out 0.8 + 0.8, z (L2 0.2)               39.9    0.4%
//   64 rows, 1 adapter       A 0.4 (L2 1.2), x 0.5 (L2 1.0), z 0.05     B 0.2 (L2 0.6), out 0.8 + 0.8, z (L2 0.2)        2.7    4%
//   8,192 rows, 1 adapter    x 67, A 0.4 (L2 25), z 6.3                 B 0.2 (L2 25), out 101 + 101, z 6.3 (L2 19)    269      5%
//
// Above it are z and the items, 48 bytes for a tile's 32 KiB and 80 for 16 KiB, which the plan writes before. The second case is
// 0.6 us of bytes: there the launches and three round trips to memory in each are all the time.
#include "step.cuh"

constexpr u32 THREADS = 256;
constexpr u32 WARPS = THREADS / WARP;
constexpr u32 SITES = 3;            // of a fused linear at most: q, k, v
constexpr u32 GROUP = 8;            // ranks that a piece holds at most
constexpr u32 UNIT = 16;            // ranks
constexpr u32 SPLIT = 1024;         // inputs
constexpr u32 PART = SPLIT / WARPS; // inputs that are one chain
constexpr u32 LARGE_FROM = 256;     // rows of a segment that goes as large tiles
constexpr u32 SMALL_ROWS = 16;
constexpr u32 SHRINK_ROWS = 128;
constexpr u32 SHRINK_UNITS = 4;
constexpr u32 EXPAND_ROWS = 64;
constexpr u32 COLUMNS = 512;

// One site of an adapter; rank 0: it has none there. A piece holds up to 8 ranks of one strip of columns, `[ranks][columns]`; rows are
// padded to 16 bytes. The pieces' addresses are at `a_pieces` and `b_pieces`, `[strips][groups of 8 ranks]`, the first strip's
// first two also here.
struct LoraSite {
  u32 rank;
  float scale;
  u32 a_width;  // columns of a strip
  u32 b_width;
  u64 a_pieces;
  u64 b_pieces;
  u64 a[2];
  u64 b[2];
  u64 b_bias;        // float[outputs] or 0
  u64 output_scale;  // float[outputs] or 0
};

// 16 ranks of one site's A for some rows.
struct LoraUnit {
  u64 first[2];  // pieces in strip 0
  u64 pieces;    // address of the first one's address
  u32 width;
  u32 groups;
  u32 row;
  u32 rows;
  u32 ranks;  // 0: an unused place of a large item
  u32 z;      // where in a row of z
};

// One site for some rows.
struct LoraExpand {
  u32 row;
  u32 rows;
  u32 rank;
  float scale;
  u64 first[2];
  u64 pieces;
  u64 b_bias;
  u64 output_scale;
  u64 site;
  u32 width;
  u32 groups;
  u64 unused;
};

struct LoraCounts {
  u32 small;   // units
  u32 large;   // items of SHRINK_UNITS units
  u32 expand;  // items of `sites` sites
  u32 unused;
};

// One linear of the model, and where its plan goes.
struct LoraLinear {
  LoraCounts* counts;
  LoraUnit* small;
  LoraUnit* large;
  LoraExpand* expand;  // [row tiles][sites]
  u32 site[SITES];     // index in an adapter's sites
  u32 sites;
  u32 z_site;   // from a site to the next in a row of z
  u32 bias;     // 1: all rows are expanded, because there is a bias to add
  u32 gathers;  // 1: nothing is shrunk
  u32 unused;
};

struct LoraPlanParams {
  Step step;
  const LoraLinear* linears;
  u32 large;  // 1: segments of LARGE_FROM rows go as large tiles
  u32 unused;
};

struct LoraShrinkParams {
  const LoraCounts* counts;
  const LoraUnit* small;
  const LoraUnit* large;
  const void* x;  // [rows][inputs]
  float* z;       // [splits][rows][sites][ranks]
  u64 z_split;
  u32 z_row;
  u32 inputs;
  u32 splits;
  u32 small_max;  // units that `small` has room for
};

struct LoraColumns {
  u32 first;  // column in out
  u32 outputs;
};

struct LoraExpandParams {
  const LoraCounts* counts;
  const LoraExpand* items;
  const float* z;
  const u32* tokens;  // [rows]; of lora_embed
  void* out;          // [rows][width]
  const float* bias;  // [width] or 0
  u64 z_split;
  u32 z_row;
  u32 z_site;
  u32 splits;
  u32 inputs;  // of lora_embed: the vocabulary
  u32 width;
  u32 sites;
  u32 across;     // tiles of a row tile, over all sites
  u32 items_max;  // row tiles that `items` has room for
  LoraColumns columns[SITES];
};

using Quad = Pack<u32, 4>;

// Rows are padded to 16 bytes.
template <typename T>
DEVICE u32 padded(u32 length) {
  constexpr u32 multiple = 16 / sizeof(T);
  return div_up(length, multiple) * multiple;
}

// `column` of row `row` of a piece, `length` being the factor's padded length. STRIPS: it may be in another strip than the first.
template <typename T, bool STRIPS>
DEVICE const T* element_of(u64 first, const u64* pieces, u32 groups, u32 width, u32 length, u32 row, u32 column) {
  if (!STRIPS) return reinterpret_cast<const T*>(first) + row * length + column;
  u32 strip = column / width, start = strip * width;
  u64 piece = pieces[static_cast<u64>(strip) * groups];
  return reinterpret_cast<const T*>(piece) + row * min_u32(width, length - start) + (column - start);
}

// --- The plan -------------------------------------------------------------------------------------------------------------------

// The sum of the threads before this one; `all` becomes the sum of all of them.
DEVICE u32 scan(u32 value, u32* shared, u32& all) {
  u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  u32 sum = value;
  for (u32 distance = 1; distance < WARP; distance *= 2) {
    u32 other = __shfl_up_sync(ALL_LANES, sum, distance);
    if (lane >= distance) sum += other;
  }
  if (lane == WARP - 1) shared[warp] = sum;
  __syncthreads();
  u32 before = 0;
  all = 0;
  for (u32 i = 0; i < WARPS; i++) {
    if (i < warp) before += shared[i];
    all += shared[i];
  }
  __syncthreads();
  return before + sum - value;
}

DEVICE LoraUnit unit_of(const LoraSite& site, u32 unit, u32 z, u32 row, u32 rows) {
  u32 groups = div_up(site.rank, GROUP);
  const u64* pieces = reinterpret_cast<const u64*>(site.a_pieces) + 2 * unit;
  LoraUnit made;
  for (u32 i = 0; i < 2; i++) made.first[i] = 2 * unit + i >= groups ? 0 : unit == 0 ? site.a[i] : pieces[i];
  made.pieces = reinterpret_cast<u64>(pieces);
  made.width = site.a_width;
  made.groups = groups;
  made.row = row;
  made.rows = rows;
  made.ranks = min_u32(UNIT, site.rank - unit * UNIT);
  made.z = z + unit * UNIT;
  return made;
}

// What one segment gives one linear to do.
struct SegmentTiles {
  bool large;
  u32 units;
  u32 sites;  // bit i: the adapter has the linear's site i
};

DEVICE void put_units(const LoraLinear& linear, const Segment& segment, const SegmentTiles& tiles, LoraUnit* to) {
  const LoraSite* sites = reinterpret_cast<const LoraSite*>(segment.adapter);
  u32 step = tiles.large ? SHRINK_ROWS : SMALL_ROWS;
  for (u32 row = 0; row < segment.rows; row += step) {
    u32 rows = min_u32(step, segment.rows - row), made = 0;
#pragma unroll 1
    for (u32 i = 0; i < linear.sites; i++) {
      const LoraSite& site = sites[linear.site[i]];
      for (u32 unit = 0; unit * UNIT < site.rank; unit++, made++)
        *to++ = unit_of(site, unit, i * linear.z_site, segment.row + row, rows);
    }
    for (; tiles.large && made % SHRINK_UNITS != 0; made++) *to++ = LoraUnit{};
  }
}

DEVICE void put_sites(const LoraLinear& linear, const Segment& segment, const SegmentTiles& tiles, LoraExpand* to) {
  u32 step = tiles.large ? EXPAND_ROWS : SMALL_ROWS;
#pragma unroll 1
  for (u32 i = 0; i < linear.sites; i++) {
    LoraExpand item = {};
    if (tiles.sites >> i & 1) {
      const LoraSite* site = reinterpret_cast<const LoraSite*>(segment.adapter) + linear.site[i];
      item.rank = site->rank;
      item.scale = site->scale;
      item.first[0] = site->b[0];
      item.first[1] = site->b[1];
      item.pieces = site->b_pieces;
      item.b_bias = site->b_bias;
      item.output_scale = site->output_scale;
      item.site = reinterpret_cast<u64>(site);
      item.width = site->b_width;
      item.groups = div_up(site->rank, GROUP);
    }
    for (u32 row = 0, at = i; row < segment.rows; row += step, at += linear.sites) {
      item.row = segment.row + row;
      item.rows = min_u32(step, segment.rows - row);
      to[at] = item;
    }
  }
}

KERNEL(lora_plan, LoraPlanParams, 256) {
  u32* shared = reinterpret_cast<u32*>(shared_memory());
  const LoraLinear& linear = p.linears[blockIdx.x];
  Counts counts = *p.step.counts;
  // Without any segment the step's rows are all the base model's.
  u32 segments = counts.segments == 0 && counts.rows > 0 ? 1 : counts.segments;
  LoraCounts made = {};
  for (u32 start = 0; start < segments; start += THREADS) {
    u32 number = start + threadIdx.x;
    Segment segment = {};
    if (number < segments) segment = counts.segments == 0 ? Segment{0, counts.rows, 0} : p.step.segments[number];
    SegmentTiles tiles = {};
    const LoraSite* sites = reinterpret_cast<const LoraSite*>(segment.adapter);
    for (u32 i = 0; i < linear.sites && sites != nullptr; i++) {
      u32 rank = sites[linear.site[i]].rank;
      tiles.units += div_up(rank, UNIT);
      tiles.sites |= static_cast<u32>(rank > 0) << i;
    }
    tiles.large = p.large != 0 && segment.rows >= LARGE_FROM;
    u32 small = tiles.large ? 0 : div_up(segment.rows, SMALL_ROWS) * tiles.units;
    u32 large = tiles.large ? div_up(segment.rows, SHRINK_ROWS) * div_up(tiles.units, SHRINK_UNITS) : 0;
    u32 expand = tiles.sites != 0 || linear.bias ? div_up(segment.rows, tiles.large ? EXPAND_ROWS : SMALL_ROWS) : 0;
    u32 all_small, all_large, all_expand;
    u32 at_small = made.small + scan(small, shared, all_small);
    u32 at_large = made.large + scan(large, shared, all_large);
    u32 at_expand = made.expand + scan(expand, shared, all_expand);
    made.small += all_small;
    made.large += all_large;
    made.expand += all_expand;
    if (tiles.units > 0 && linear.gathers == 0)
      put_units(linear, segment, tiles, tiles.large ? linear.large + at_large * SHRINK_UNITS : linear.small + at_small);
    if (expand > 0) put_sites(linear, segment, tiles, linear.expand + at_expand * linear.sites);
  }
  if (threadIdx.x == 0) *linear.counts = made;
}

// --- Shrink ---------------------------------------------------------------------------------------------------------------------

// 8 inputs of one row of x from `column` on, as far as there are any.
template <typename T>
DEVICE Quad inputs_at(const T* row, u32 column, u32 inputs) {
  Quad quad = {};
  if (inputs % 8 == 0) {
    if (column < inputs) quad = *reinterpret_cast<const Quad*>(row + column);
    return quad;
  }
#pragma unroll
  for (u32 i = 0; i < 8; i++) {
    if (column + i < inputs) quad.values[i / 2] |= static_cast<u32>(row[column + i].bits) << (i % 2 * 16);
  }
  return quad;
}

// 8 inputs of one rank: of the 8 ranks of `half` the one that this lane has in a fragment.
template <typename T, bool STRIPS>
DEVICE Quad weights_at(const LoraUnit& unit, u32 half, u32 length, u32 column) {
  u32 row = threadIdx.x % WARP / 4;
  if (half * GROUP + row >= unit.ranks || column >= length) return Quad{};
  const u64* pieces = reinterpret_cast<const u64*>(unit.pieces) + half;
  return *reinterpret_cast<const Quad*>(
      element_of<T, STRIPS>(unit.first[half], pieces, unit.groups, unit.width, length, row, column));
}

template <typename T>
DEVICE void multiply(float (&sum)[4], const Quad& low, const Quad& high, const Quad& x) {
#pragma unroll
  for (u32 i = 0; i < 4; i += 2) {
    u32 a[4] = {low.values[i], high.values[i], low.values[i + 1], high.values[i + 1]};
    u32 b[2] = {x.values[i], x.values[i + 1]};
    mma_16x8x16<T>(sum, a, b);
  }
}

constexpr u32 CHUNKS = PART / 32;     // inputs of one warp-wide load: 4 lanes of 8
constexpr u32 SUM_ROW = UNIT + 4;     // without bank conflicts

// One unit for up to 16 rows over one split: warps share the split.
template <typename T, bool STRIPS>
DEVICE void shrink_small(const LoraShrinkParams& p, const LoraUnit& unit, u32 split, float* sums) {
  u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  u32 first = split * SPLIT + warp * PART + lane % 4 * 8, length = padded<T>(p.inputs);
  const T* x = static_cast<const T*>(p.x);
  if (split * SPLIT + warp * PART < p.inputs) {
    Quad weights[CHUNKS][2];
#pragma unroll
    for (u32 c = 0; c < CHUNKS; c++) {
#pragma unroll
      for (u32 half = 0; half < 2; half++)
        weights[c][half] = weights_at<T, STRIPS>(unit, half, length, first + c * 32);
    }
#pragma unroll
    for (u32 n = 0; n < SMALL_ROWS / 8; n++) {
      u32 row = n * 8 + lane / 4;
      if (n * 8 >= unit.rows) break;
      Quad rows[CHUNKS];
#pragma unroll
      for (u32 c = 0; c < CHUNKS; c++) {
        rows[c] = Quad{};
        if (row < unit.rows)
          rows[c] = inputs_at(x + static_cast<u64>(unit.row + row) * p.inputs, first + c * 32, p.inputs);
      }
      float sum[4] = {};
#pragma unroll
      for (u32 c = 0; c < CHUNKS; c++) multiply<T>(sum, weights[c][0], weights[c][1], rows[c]);
#pragma unroll
      for (u32 i = 0; i < 4; i++)
        sums[(warp * SMALL_ROWS + n * 8 + lane % 4 * 2 + i % 2) * SUM_ROW + i / 2 * 8 + lane / 4] = sum[i];
    }
  }
  __syncthreads();
  u32 rank = threadIdx.x % UNIT, row = threadIdx.x / UNIT;
  if (rank < unit.ranks && row < unit.rows) {
    u32 parts = min_u32(WARPS, div_up(p.inputs - split * SPLIT, PART));
    float total = sums[row * SUM_ROW + rank];
    for (u32 i = 1; i < parts; i++) total += sums[(i * SMALL_ROWS + row) * SUM_ROW + rank];
    p.z[split * p.z_split + static_cast<u64>(unit.row + row) * p.z_row + unit.z + rank] = total;
  }
}

// Some units for up to 128 rows over one split: each warp has 16 rows.
template <typename T, bool STRIPS>
DEVICE void shrink_large(const LoraShrinkParams& p, const LoraUnit* units, u32 split) {
  u32 lane = threadIdx.x % WARP, first_row = threadIdx.x / WARP * 16, rows = units[0].rows;
  u32 length = padded<T>(p.inputs), parts = min_u32(WARPS, div_up(p.inputs - split * SPLIT, PART));
  if (first_row >= rows) return;
  const T* x = static_cast<const T*>(p.x) + static_cast<u64>(units[0].row) * p.inputs;
  float total[SHRINK_UNITS][2][4] = {};
  for (u32 part = 0; part < parts; part++) {
    u32 first = split * SPLIT + part * PART + lane % 4 * 8;
    Quad inputs[CHUNKS][2];
#pragma unroll
    for (u32 c = 0; c < CHUNKS; c++) {
#pragma unroll
      for (u32 n = 0; n < 2; n++) {
        u32 row = first_row + n * 8 + lane / 4;
        inputs[c][n] = Quad{};
        if (row < rows) inputs[c][n] = inputs_at(x + static_cast<u64>(row) * p.inputs, first + c * 32, p.inputs);
      }
    }
#pragma unroll
    for (u32 u = 0; u < SHRINK_UNITS; u++) {
      if (units[u].ranks == 0) continue;
      float sum[2][4] = {};
#pragma unroll
      for (u32 c = 0; c < CHUNKS; c++) {
        Quad low = weights_at<T, STRIPS>(units[u], 0, length, first + c * 32);
        Quad high = weights_at<T, STRIPS>(units[u], 1, length, first + c * 32);
#pragma unroll
        for (u32 n = 0; n < 2; n++) multiply<T>(sum[n], low, high, inputs[c][n]);
      }
#pragma unroll
      for (u32 i = 0; i < 8; i++) {
        float& to = total[u][i / 4][i % 4];
        to = part == 0 ? sum[i / 4][i % 4] : to + sum[i / 4][i % 4];
      }
    }
  }
#pragma unroll
  for (u32 u = 0; u < SHRINK_UNITS; u++) {
#pragma unroll
    for (u32 i = 0; i < 8; i++) {
      u32 row = first_row + i / 4 * 8 + lane % 4 * 2 + i % 2, rank = i % 4 / 2 * 8 + lane / 4;
      if (row < rows && rank < units[u].ranks)
        p.z[split * p.z_split + static_cast<u64>(units[0].row + row) * p.z_row + units[u].z + rank] = total[u][i / 4][i % 4];
    }
  }
}

// Where blocks keep the items of this tile and of the next: read one tile ahead, because a round trip to memory is as long as
// a tile. Every thread has one 32-bit word.
template <u32 WORDS>
struct Ahead {
  u32* buffers;  // [2][WORDS]
  u32 word;

  DEVICE void ask(const void* item, u32 words) {
    if (threadIdx.x < words) word = static_cast<const u32*>(item)[threadIdx.x];
  }
  // To be followed by a barrier.
  DEVICE void keep(u32 turn) {
    if (threadIdx.x < WORDS) buffers[turn % 2 * WORDS + threadIdx.x] = word;
  }
  template <typename Item>
  DEVICE const Item* item(u32 turn) const {
    return reinterpret_cast<const Item*>(buffers + turn % 2 * WORDS);
  }
};

constexpr u32 UNIT_WORDS = sizeof(LoraUnit) / 4;
constexpr u32 SHRINK_WORDS = UNIT_WORDS * SHRINK_UNITS;

template <typename T>
DEVICE void shrink(const LoraShrinkParams& p) {
  Ahead<SHRINK_WORDS> ahead = {reinterpret_cast<u32*>(shared_memory()), 0};
  float* sums = reinterpret_cast<float*>(shared_memory()) + 2 * SHRINK_WORDS;
  // Most likely the first one's, without waiting for the counts. It may be of an earlier step, or nobody's.
  if (blockIdx.x / p.splits < p.small_max) ahead.ask(p.small + blockIdx.x / p.splits, UNIT_WORDS);
  u32 small = p.counts->small * p.splits, all = small + p.counts->large * p.splits;
  auto large_item = [&](u32 tile) { return p.large + (tile - small) / p.splits * SHRINK_UNITS; };
  if (blockIdx.x >= all) return;
  if (blockIdx.x >= small) ahead.ask(large_item(blockIdx.x), SHRINK_WORDS);
  ahead.keep(0);
  __syncthreads();
  u32 length = padded<T>(p.inputs);
  for (u32 tile = blockIdx.x, turn = 0; tile < all; tile += gridDim.x, turn++) {
    u32 next = tile + gridDim.x;
    if (next < small) {
      ahead.ask(p.small + next / p.splits, UNIT_WORDS);
    } else if (next < all) {
      ahead.ask(large_item(next), SHRINK_WORDS);
    }
    const LoraUnit* units = ahead.template item<LoraUnit>(turn);
    if (tile < small) {
      if (units->width >= length) {
        shrink_small<T, false>(p, *units, tile % p.splits, sums);
      } else {
        shrink_small<T, true>(p, *units, tile % p.splits, sums);
      }
    } else {
      bool strips = false;
      for (u32 u = 0; u < SHRINK_UNITS; u++) strips |= units[u].ranks > 0 && units[u].width < length;
      if (strips) {
        shrink_large<T, true>(p, units, (tile - small) % p.splits);
      } else {
        shrink_large<T, false>(p, units, (tile - small) % p.splits);
      }
    }
    ahead.keep(turn + 1);
    __syncthreads();
  }
}

// f32 without tensor cores: 16 threads for each rank.
DEVICE void shrink_f32(const LoraShrinkParams& p) {
  constexpr u32 SIDE = 4;  // rows side by side
  u32 length = padded<float>(p.inputs), half = threadIdx.x / UNIT / GROUP, row = threadIdx.x / UNIT % GROUP;
  const float* x = static_cast<const float*>(p.x);
  for (u32 tile = blockIdx.x; tile < p.counts->small * p.splits; tile += gridDim.x) {
    LoraUnit unit = p.small[tile / p.splits];
    u32 split = tile % p.splits, rank = half * GROUP + row;
    const u64* pieces = reinterpret_cast<const u64*>(unit.pieces) + half;
    for (u32 start = 0; start < unit.rows; start += SIDE) {
      float sum[SIDE] = {};
      for (u32 c = threadIdx.x % UNIT * 4; c < SPLIT; c += UNIT * 4) {
        u32 column = split * SPLIT + c;
        if (column >= length || rank >= unit.ranks) break;
        const float* weights = element_of<float, true>(0, pieces, unit.groups, unit.width, length, row, column);
        Pack<float, 4> weight = load_pack<float, 4>(weights);
#pragma unroll
        for (u32 i = 0; i < SIDE; i++) {
          if (start + i >= unit.rows) break;
          const float* from = x + static_cast<u64>(unit.row + start + i) * p.inputs + column;
#pragma unroll
          for (u32 k = 0; k < 4; k++) {
            if (column + k < p.inputs) sum[i] += weight.values[k] * from[k];
          }
        }
      }
#pragma unroll
      for (u32 i = 0; i < SIDE; i++) {
        for (u32 distance = UNIT / 2; distance > 0; distance /= 2) sum[i] += __shfl_xor_sync(ALL_LANES, sum[i], distance);
        if (threadIdx.x % UNIT == 0 && start + i < unit.rows && rank < unit.ranks)
          p.z[split * p.z_split + static_cast<u64>(unit.row + start + i) * p.z_row + unit.z + rank] = sum[i];
      }
    }
  }
}

// --- Expand ---------------------------------------------------------------------------------------------------------------------

// What a tile's number says.
struct ExpandTile {
  u32 item;  // of the row tile and site
  u32 site;
  u32 column;
};
DEVICE ExpandTile expand_tile_of(const LoraExpandParams& p, u32 tile) {
  u32 part = tile % p.across, site = 0;
  for (; site + 1 < p.sites; site++) {
    u32 tiles = div_up(p.columns[site].outputs, COLUMNS);
    if (part < tiles) break;
    part -= tiles;
  }
  return ExpandTile{tile / p.across * p.sites + site, site, part * COLUMNS};
}

// A number of z: of `rank` for the row of the step.
template <typename T, bool GATHERS>
DEVICE float shrunk(const LoraExpandParams& p, const LoraExpand& item, u32 site, u32 row, u32 rank) {
  if (rank >= item.rank) return 0;
  if (GATHERS) {
    // Such a row's embedding is NaN.
    if (p.tokens[row] >= p.inputs) return 0;
    const LoraSite* from = reinterpret_cast<const LoraSite*>(item.site);
    const u64* pieces = reinterpret_cast<const u64*>(from->a_pieces) + rank / GROUP;
    // A strip's last piece may have fewer ranks, and its rows are as long as any.
    return as_float(*element_of<T, true>(0, pieces, item.groups, from->a_width, padded<T>(p.inputs), rank % GROUP, p.tokens[row]));
  }
  const float* from = p.z + static_cast<u64>(row) * p.z_row + site * p.z_site + rank;
  float sum = from[0];
#pragma unroll 4
  for (u32 split = 1; split < p.splits; split++) sum += from[split * p.z_split];
  return sum;
}

// What becomes of an output: the definition in src/reference/lora.rs. `column` counts from the site's first.
DEVICE float adapted(const LoraExpandParams& p, const LoraExpand& item, u32 first, u32 column, float out, float product) {
  const float* b_bias = reinterpret_cast<const float*>(item.b_bias);
  const float* output_scale = reinterpret_cast<const float*>(item.output_scale);
  if (b_bias != nullptr) product += b_bias[column];
  if (item.rank > 0) out += item.scale * product;
  if (output_scale != nullptr) out *= output_scale[column];
  return p.bias != nullptr ? out + p.bias[first + column] : out;
}

// 8 neighbouring outputs of a row, as they lie in memory: what is there of them.
template <typename O>
struct Eight {
  static constexpr u32 QUADS = sizeof(O) / 2;
  Quad quads[QUADS];

  DEVICE float get(u32 i) const {
    if constexpr (sizeof(O) == 4) {
      return __uint_as_float(quads[i / 4].values[i % 4]);
    } else {
      return as_float(O{static_cast<u16>(quads[0].values[i / 2] >> (i % 2 * 16))});
    }
  }
  DEVICE void set(u32 i, float value) {
    if constexpr (sizeof(O) == 4) {
      quads[i / 4].values[i % 4] = __float_as_uint(value);
    } else {
      u32 shift = i % 2 * 16, others = quads[0].values[i / 2] & ~(0xffffu << shift);
      quads[0].values[i / 2] = others | static_cast<u32>(from_float<O>(value).bits) << shift;
    }
  }
  DEVICE static Eight load(const O* from, bool aligned, u32 count) {
    Eight eight = {};
    if (aligned) {
#pragma unroll
      for (u32 i = 0; i < QUADS; i++) {
        if (count > 0) eight.quads[i] = reinterpret_cast<const Quad*>(from)[i];
      }
    } else {
#pragma unroll
      for (u32 i = 0; i < 8; i++) {
        if (i < count) eight.set(i, as_float(from[i]));
      }
    }
    return eight;
  }
  DEVICE void store(O* to, bool aligned, u32 count) const {
    if (aligned) {
#pragma unroll
      for (u32 i = 0; i < QUADS; i++) {
        if (count > 0) reinterpret_cast<Quad*>(to)[i] = quads[i];
      }
    } else {
#pragma unroll
      for (u32 i = 0; i < 8; i++) {
        if (i < count) to[i] = from_float<O>(get(i));
      }
    }
  }
};

// The fragments of four mma's: 16 ranks of B for 64 outputs. The outputs of fragment j are 8 g + 2 j in its row g and 8 g + 2 j + 1 in
// row g + 8.
template <typename T, bool STRIPS>
DEVICE void fragments(u32 (&a)[4][4], const LoraExpand& item, u32 unit, u32 length, u32 column) {
  u32 pair = threadIdx.x % 4 * 2;
  Quad loaded[2][2];
#pragma unroll
  for (u32 half = 0; half < 2; half++) {
    u32 group = unit * 2 + half;
    const u64* pieces = reinterpret_cast<const u64*>(item.pieces) + group;
    u64 first = 0;
    if (!STRIPS && group < item.groups) first = unit == 0 ? item.first[half] : *pieces;
#pragma unroll
    for (u32 i = 0; i < 2; i++) {
      loaded[half][i] = Quad{};
      if (group * GROUP + pair + i < item.rank && column < length)
        loaded[half][i] = *reinterpret_cast<const Quad*>(
            element_of<T, STRIPS>(first, pieces, item.groups, item.width, length, pair + i, column));
    }
  }
#pragma unroll
  for (u32 half = 0; half < 2; half++) {
#pragma unroll
    for (u32 j = 0; j < 4; j++) {
      u32 even = loaded[half][0].values[j], odd = loaded[half][1].values[j];
      a[j][half * 2] = (even & 0xffff) | odd << 16;
      a[j][half * 2 + 1] = even >> 16 | (odd & 0xffff0000);
    }
  }
}

template <typename T, typename O, bool GATHERS, bool STRIPS>
DEVICE void expand_tile(const LoraExpandParams& p, const LoraExpand& item, const ExpandTile& tile, T* z) {
  // Times 8 rows of out that are on their way: what registers hold.
  constexpr i32 AHEAD = GATHERS ? 0 : sizeof(O) == 4 ? 1 : 2;
  u32 lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
  const u32 outputs = p.columns[tile.site].outputs, first = p.columns[tile.site].first;
  u32 length = padded<T>(outputs), column = tile.column + threadIdx.x / WARP * 64 + g * 8;
  u32 count = column < outputs ? min_u32(8, outputs - column) : 0, rows = item.rows;
  bool aligned = p.width % 8 == 0 && first % 8 == 0 && outputs % 8 == 0;
  O* out = static_cast<O*>(p.out) + static_cast<u64>(item.row) * p.width + first + column;
  u32 units = div_up(item.rank, UNIT), ranks = units * UNIT, z_row = ranks + 8;
  u32 a[4][4];
  fragments<T, STRIPS>(a, item, 0, length, column);
  // Of each 8 rows a lane has two.
  Eight<O> ahead[AHEAD + 1][2];
#pragma unroll
  for (i32 i = 0; i < AHEAD * 2; i++) {
    u32 row = i / 2 * 8 + t * 2 + i % 2;
    ahead[i / 2][i % 2] = Eight<O>::load(out + static_cast<u64>(row) * p.width, aligned, row < rows ? count : 0);
  }
  for (u32 i = threadIdx.x; i < rows * ranks; i += THREADS) {
    float value = shrunk<T, GATHERS>(p, item, tile.site, item.row + i / ranks, i % ranks);
    z[i / ranks * z_row + i % ranks] = from_float<T>(value);
  }
  __syncthreads();
  for (u32 start = 0; start < rows; start += 8) {
    Eight<O> now[2];
#pragma unroll
    for (u32 i = 0; i < 2; i++) {
      u32 row = start + AHEAD * 8 + t * 2 + i;
      ahead[AHEAD][i] = Eight<O>::load(out + static_cast<u64>(row) * p.width, aligned, row < rows ? count : 0);
      now[i] = ahead[0][i];
#pragma unroll
      for (i32 k = 0; k < AHEAD; k++) ahead[k][i] = ahead[k + 1][i];
    }
    float sum[4][4] = {};
    for (u32 unit = 0; unit < units; unit++) {
      u32 b[2] = {0, 0};
      if (start + g < rows) {
        const T* from = z + (start + g) * z_row + unit * UNIT + t * 2;
        b[0] = *reinterpret_cast<const u32*>(from);
        b[1] = *reinterpret_cast<const u32*>(from + 8);
      }
      if (unit == 0) {
#pragma unroll
        for (u32 j = 0; j < 4; j++) mma_16x8x16<T>(sum[j], a[j], b);
      } else {
        u32 more[4][4];
        fragments<T, STRIPS>(more, item, unit, length, column);
#pragma unroll
        for (u32 j = 0; j < 4; j++) mma_16x8x16<T>(sum[j], more[j], b);
      }
    }
#pragma unroll
    for (u32 i = 0; i < 2; i++) {
      u32 row = start + t * 2 + i;
      if (row >= rows) continue;
#pragma unroll
      for (u32 c = 0; c < 8; c++) {
        if (c < count) now[i].set(c, adapted(p, item, first, column + c, now[i].get(c), sum[c / 2][c % 2 * 2 + i]));
      }
      now[i].store(out + static_cast<u64>(row) * p.width, aligned, count);
    }
  }
}

constexpr u32 EXPAND_WORDS = sizeof(LoraExpand) / 4;

// Calls `run(item, tile, z)` for each tile of this block, with a barrier after each.
template <typename Run>
DEVICE void for_expand_tiles(const LoraExpandParams& p, Run run) {
  Ahead<EXPAND_WORDS> ahead = {reinterpret_cast<u32*>(shared_memory()), 0};
  void* z = ahead.buffers + 2 * EXPAND_WORDS;
  ExpandTile tile = expand_tile_of(p, blockIdx.x);
  // Without waiting for the counts. It may be of an earlier step, or nobody's.
  if (tile.item < p.items_max * p.sites) ahead.ask(p.items + tile.item, EXPAND_WORDS);
  u32 all = p.counts->expand * p.across;
  if (blockIdx.x >= all) return;
  ahead.keep(0);
  __syncthreads();
  for (u32 number = blockIdx.x, turn = 0; number < all; number += gridDim.x, turn++) {
    ExpandTile next = expand_tile_of(p, number + gridDim.x);
    if (number + gridDim.x < all) ahead.ask(p.items + next.item, EXPAND_WORDS);
    const LoraExpand& item = *ahead.template item<LoraExpand>(turn);
    if (item.rank > 0 || p.bias != nullptr) run(item, tile, z);
    tile = next;
    ahead.keep(turn + 1);
    __syncthreads();
  }
}

template <typename T, typename O, bool GATHERS>
DEVICE void expand(const LoraExpandParams& p) {
  for_expand_tiles(p, [&](const LoraExpand& item, const ExpandTile& tile, void* z) {
    if (!GATHERS && (item.width >= padded<T>(p.columns[tile.site].outputs) || item.rank == 0)) {
      expand_tile<T, O, GATHERS, false>(p, item, tile, static_cast<T*>(z));
    } else {
      expand_tile<T, O, GATHERS, true>(p, item, tile, static_cast<T*>(z));
    }
  });
}

template <bool GATHERS>
DEVICE void expand_f32(const LoraExpandParams& p) {
  constexpr u32 SIDE = 4;  // rows side by side
  for_expand_tiles(p, [&](const LoraExpand& item, const ExpandTile& tile, void* shared) {
    float* z = static_cast<float*>(shared);
    u32 outputs = p.columns[tile.site].outputs, first = p.columns[tile.site].first, length = padded<float>(outputs);
    for (u32 i = threadIdx.x; i < item.rows * item.rank; i += THREADS)
      z[i] = shrunk<float, GATHERS>(p, item, tile.site, item.row + i / item.rank, i % item.rank);
    __syncthreads();
    u32 end = min_u32(tile.column + COLUMNS, outputs);
    for (u32 column = tile.column + threadIdx.x; column < end; column += THREADS) {
      for (u32 start = 0; start < item.rows; start += SIDE) {
        float sum[SIDE] = {};
        for (u32 rank = 0; rank < item.rank; rank++) {
          const u64* pieces = reinterpret_cast<const u64*>(item.pieces) + rank / GROUP;
          float weight = *element_of<float, true>(0, pieces, item.groups, item.width, length, rank % GROUP, column);
#pragma unroll
          for (u32 i = 0; i < SIDE; i++) {
            if (start + i < item.rows) sum[i] += weight * z[(start + i) * item.rank + rank];
          }
        }
#pragma unroll
        for (u32 i = 0; i < SIDE; i++) {
          if (start + i >= item.rows) break;
          float* out = static_cast<float*>(p.out) + static_cast<u64>(item.row + start + i) * p.width + first + column;
          *out = adapted(p, item, first, column, *out, sum[i]);
        }
      }
    }
  });
}

KERNEL(lora_shrink_f32, LoraShrinkParams, 256) { shrink_f32(p); }
KERNEL(lora_expand_f32, LoraExpandParams, 256) { expand_f32<false>(p); }
KERNEL(lora_embed_f32, LoraExpandParams, 256) { expand_f32<true>(p); }

// For Blackwell the compiler takes 170 registers unless it is told that a second block is to have room: the bytes that one block has
// on their way are not enough there.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
#define SHRINK_KERNEL(name) KERNEL_BESIDE(name, LoraShrinkParams, 256, 2)
#else
#define SHRINK_KERNEL(name) KERNEL(name, LoraShrinkParams, 256)
#endif

// Of 16 bits; outputs are as wide or f32 (logits, the residual stream).
#define ELEMENT(T)                                                                             \
  SHRINK_KERNEL(lora_shrink_##T) { shrink<T>(p); }                                             \
  KERNEL(lora_expand_##T, LoraExpandParams, 256) { expand<T, T, false>(p); }                   \
  KERNEL(lora_expand_##T##_to_f32, LoraExpandParams, 256) { expand<T, float, false>(p); }      \
  KERNEL(lora_embed_##T, LoraExpandParams, 256) { expand<T, T, true>(p); }                     \
  KERNEL(lora_embed_##T##_to_f32, LoraExpandParams, 256) { expand<T, float, true>(p); }
ELEMENT(f16)
#if defined(OPENLORA_HOST) || __CUDA_ARCH__ >= 800
ELEMENT(bf16)
#endif
