// Sampling: from rows of logits to tokens and their log-probabilities. What is drawn from is defined in src/reference/sample.rs;
// NaN counts as impossible and +inf as the largest finite number, as on the CPU.
//
// The vocabulary is never sorted and read once. Two launches:
//
//   sample_scan, grid [splits, rows]    a block has SPLIT logits in registers:
//     raw:        best token, sum of e^(x - best); the largest of each group of 32 tokens where alternatives are asked for
//     changes:    biases, bans and penalties into the row's logits (what was there is noted in the list of changes)
//     changed:    best token, sum of e^((x - best) / temperature), the largest of each group where the draw is cut
//
//   sample_pick, grid [rows]            a block joins the row's splits, in order, and then
//     greedy, score     is done
//     temperature only  picks the split in which u times the weight of all falls, and the token in it
//     top_k, top_p,     finds a bound below the cut from the groups alone, lists the tokens above it (LISTED of them at most,
//     min_p             in order of the token), finds the exact cut among them and draws from what is kept
//     puts the logits back, and finds the alternatives in the same way
//
// A bound from the groups: each group's largest is a token, so where k groups' largest are at least x, k tokens are; and where
// groups' largest weigh enough together, so do the tokens. Rows too flat for that (more than LISTED tokens above the bound)
// are searched in global memory: eleven passes over the row by one block, from the L2 cache.
//
// A search is over the ordered bits of an f32: seven thresholds a pass, each with the count or weight of what is at or above
// it, so that three bits are found by each. The draw is a descent: each warp has a sixteenth of the range, the one in which the
// random number falls is the next range. Sums are f32 within a thread (16 numbers, then the sums of those) and a warp, f64 beyond,
// all in fixed places: a row's result depends on that row alone.
//
// Bytes by design: scan reads rows * vocab * 4 and writes 1/32 of it for each kind of groups; a pick reads 16 kB of a row's
// groups a few times (L1 and L2 cache) and the lines of the tokens above the bound, or one split (32 kB). 64 rows of 128,256:
// 33 MB, of which much is still in the L2 cache after the head's product; expected 80% of the memory's rate in the scan and 10 to 20
// microseconds of latency in a pick with cuts, all rows side by side.
#include "step.cuh"

constexpr u32 SCAN_THREADS = 256;
constexpr u32 SCAN_PACKS = 8;
constexpr u32 SPLIT = SCAN_THREADS * SCAN_PACKS * 4;
constexpr u32 GROUP = 32;
constexpr u32 PICK_THREADS = 512;
constexpr u32 PICK_WARPS = PICK_THREADS / WARP;
constexpr u32 LISTED = 4096;
constexpr u32 THRESHOLDS = 7;
// A bound from the groups need not be the best one: 2^-11 of its size lower saves four of eleven passes.
constexpr u32 BOUND_SLACK = 1u << 12;
// Numbers a thread adds up before it adds their sum to its others.
constexpr u32 SUMMED = 16;

constexpr float LOG2_E = 1.4426950408889634f;
constexpr float FINITE_MAX = 3.402823466e38f;
constexpr float NORMAL_MIN = 1.175494351e-38f;

// What happens to one token's logit; each token once in a list.
struct Change {
  u32 token;  // with SEEN and GENERATED
  float bias; // -inf for a banned token
  float frequency;  // the frequency penalty times how often it was generated
  float before;  // the logit before, written by sample_scan
};
constexpr u32 SEEN = 1u << 31;       // in prompt or answer
constexpr u32 GENERATED = 1u << 30;  // in the answer

struct SampleRow {
  Change* changes;
  const u32* starts;  // [splits + 1]: where in `changes` each split's begin; null when there are none
  u32 draws;          // 0: scores `token`
  u32 token;
  u32 top;
  u32 top_k;    // 0 keeps all
  float scale;  // log2(e) / temperature; 0 is greedy
  float top_p;
  float min_p;
  float repetition;
  float presence;
  u32 position;
  u32 sample_index;
  u32 seed[2];
  u32 unused;
};

// A split's part of the result, raw and changed: [0] and [1].
struct SplitResult {
  double sum[2];  // of e^((x - best) / temperature)
  u64 best[2];    // as ranked() has it
};

struct TokenLogprob {
  u32 token;
  float logprob;
};

struct SampleParams {
  const u32* rows;
  float* logits;  // [rows, vocab]
  const SampleRow* requests;
  SplitResult* split_results;  // [rows, splits]
  float* groups[2];            // [rows, groups] each
  SampleResult* results;
  TokenLogprob* tops;  // [rows, top_max]
  u32 vocab;
  u32 splits;
  u32 top_max;
  u32 unused;
};

DEVICE float minus_infinity() { return __uint_as_float(0xff800000u); }

// A logit as it is computed with. -0 becomes 0, so that equal numbers have equal bits.
DEVICE float possible(float x) { return x != x ? minus_infinity() : (x < FINITE_MAX ? x : FINITE_MAX) + 0.0f; }

// Unsigned numbers in the order of the floats, and back.
DEVICE u32 ordered(float x) {
  u32 bits = __float_as_uint(x);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}
DEVICE float unordered(u32 key) { return __uint_as_float(key >> 31 ? key & 0x7fffffffu : ~key); }

// The largest of these is the largest logit's, the lower token's among equals.
DEVICE u64 ranked(float x, u32 token) { return static_cast<u64>(ordered(x)) << 32 | ~token; }
DEVICE float logit_of(u64 rank) { return unordered(static_cast<u32>(rank >> 32)); }
DEVICE u32 token_of(u64 rank) { return ~static_cast<u32>(rank); }

DEVICE bool is_cut(const SampleRow& r) {
  return r.draws && r.scale != 0.0f && (r.top_k > 0 || r.top_p < 1.0f || r.min_p > 0.0f);
}

// ---- sample_scan

struct Logits {
  float x[SCAN_PACKS][4];
};

// A thread has four neighbouring tokens every SCAN_THREADS * 4; what is past the vocabulary is impossible.
DEVICE void load_split(Logits& l, const float* row, u32 vocab) {
  u32 first = blockIdx.x * SPLIT + threadIdx.x * 4;
  if (vocab % 4 == 0) {
#pragma unroll
    for (u32 i = 0; i < SCAN_PACKS; i++) {
      u32 token = first + i * SCAN_THREADS * 4;
      Pack<float, 4> pack;
      for (u32 j = 0; j < 4; j++) pack.values[j] = minus_infinity();
      if (token < vocab) pack = load_pack<float, 4>(row + token);
      for (u32 j = 0; j < 4; j++) l.x[i][j] = possible(pack.values[j]);
    }
  } else {
#pragma unroll
    for (u32 i = 0; i < SCAN_PACKS; i++) {
      u32 token = first + i * SCAN_THREADS * 4;
      for (u32 j = 0; j < 4; j++) l.x[i][j] = token + j < vocab ? possible(row[token + j]) : minus_infinity();
    }
  }
}

DEVICE u64 split_best(const Logits& l) {
  u64* bests = reinterpret_cast<u64*>(shared_memory());
  u32 first = blockIdx.x * SPLIT + threadIdx.x * 4;
  float largest = minus_infinity();
  u32 token = first;
#pragma unroll
  for (u32 i = 0; i < SCAN_PACKS; i++) {
    for (u32 j = 0; j < 4; j++) {
      // In ascending order of the token: an equal one does not replace it.
      if (l.x[i][j] > largest) {
        largest = l.x[i][j];
        token = first + i * SCAN_THREADS * 4 + j;
      }
    }
  }
  u64 best = ranked(largest, token);
  for (u32 distance = WARP / 2; distance > 0; distance /= 2) {
    u64 other = __shfl_xor_sync(ALL_LANES, best, distance);
    best = other > best ? other : best;
  }
  __syncthreads();
  if (threadIdx.x % WARP == 0) bests[threadIdx.x / WARP] = best;
  __syncthreads();
  for (u32 warp = 0; warp < SCAN_THREADS / WARP; warp++) best = bests[warp] > best ? bests[warp] : best;
  return best;
}

DEVICE double split_sum(const Logits& l, float largest, float scale) {
  float* sums = reinterpret_cast<float*>(shared_memory());
  // The difference of infinities is not a number.
  float shift = largest == minus_infinity() ? 0.0f : largest;
  float sum = 0.0f;
#pragma unroll
  for (u32 i = 0; i < SCAN_PACKS; i++) {
    float part = 0.0f;
    for (u32 j = 0; j < 4; j++) part += exp2_approx((l.x[i][j] - shift) * scale);
    sum += part;
  }
  sum = warp_sum(sum);
  __syncthreads();
  if (threadIdx.x % WARP == 0) sums[threadIdx.x / WARP] = sum;
  __syncthreads();
  double total = 0.0;
  for (u32 warp = 0; warp < SCAN_THREADS / WARP; warp++) total += sums[warp];
  return total;
}

// The largest of each 32 tokens, which eight lanes have.
DEVICE void store_groups(const Logits& l, float* groups, u32 vocab) {
#pragma unroll
  for (u32 i = 0; i < SCAN_PACKS; i++) {
    float largest = l.x[i][0];
    for (u32 j = 1; j < 4; j++) largest = l.x[i][j] > largest ? l.x[i][j] : largest;
    for (u32 distance = 1; distance < GROUP / 4; distance *= 2) {
      float other = __shfl_xor_sync(ALL_LANES, largest, distance);
      largest = other > largest ? other : largest;
    }
    u32 token = blockIdx.x * SPLIT + (i * SCAN_THREADS + threadIdx.x) * 4;
    if (token % GROUP == 0 && token < vocab) groups[token / GROUP] = largest;
  }
}

// In the reference's order: bias or ban, repetition over prompt and answer, frequency and presence over the answer. No product
// meets a sum here that a fused multiply-add would round differently.
DEVICE float changed(float x, const Change& change, const SampleRow& r) {
  x += change.bias;
  if (change.token & SEEN) x = x > 0.0f ? __fdiv_rn(x, r.repetition) : __fmul_rn(x, r.repetition);
  if (change.token & GENERATED) x = x - change.frequency - r.presence;
  return x;
}

KERNEL(sample_scan, SampleParams, SCAN_THREADS) {
  u32 row = blockIdx.y;
  if (row >= *p.rows) return;
  const SampleRow& r = p.requests[row];
  float* logits = p.logits + static_cast<u64>(row) * p.vocab;
  u64 groups = static_cast<u64>(row) * div_up(p.vocab, GROUP);
  Logits l;
  load_split(l, logits, p.vocab);
  SplitResult* result = p.split_results + static_cast<u64>(row) * p.splits + blockIdx.x;
  u64 best = split_best(l);
  double sum = split_sum(l, logit_of(best), LOG2_E);
  if (threadIdx.x == 0) *result = SplitResult{{sum, sum}, {best, best}};
  if (r.top > 0) store_groups(l, p.groups[0] + groups, p.vocab);

  bool changes = r.starts && r.starts[blockIdx.x] < r.starts[blockIdx.x + 1];
  if (changes) {
    // Every thread has its logits: there was a barrier.
    u32 end = r.starts[blockIdx.x + 1];
    for (u32 i = r.starts[blockIdx.x] + threadIdx.x; i < end; i += SCAN_THREADS) {
      Change change = r.changes[i];
      u32 token = change.token & ~(SEEN | GENERATED);
      float before = logits[token];
      r.changes[i].before = before;
      logits[token] = changed(before, change, r);
    }
    __syncthreads();
    load_split(l, logits, p.vocab);
    best = split_best(l);
    if (threadIdx.x == 0) result->best[1] = best;
  }
  if (r.draws && r.scale != 0.0f) {
    if (changes || r.scale != LOG2_E) {
      sum = split_sum(l, logit_of(best), r.scale);
      if (threadIdx.x == 0) result->sum[1] = sum;
    }
    if (is_cut(r)) store_groups(l, p.groups[1] + groups, p.vocab);
  }
}

// ---- sample_pick

// The block's shared memory.
struct Shared {
  float sums[PICK_WARPS][THRESHOLDS + 1];
  u32 counts[PICK_WARPS];
  float listed[LISTED];
  u32 tokens[LISTED];
};
DEVICE Shared& shared() { return *reinterpret_cast<Shared*>(shared_memory()); }

// Logits to look through: a row, its groups, or what is listed.
struct Source {
  const float* values;
  const u32* tokens;  // null: a value's place is its token
  u32 begin;
  u32 end;
};
DEVICE u32 token_at(const Source& s, u32 i) { return s.tokens ? s.tokens[i] : i; }

// What a token weighs: e^((x - largest) / temperature); 0 below the least weight that is kept.
struct Weight {
  float largest;
  float scale;
  float least;
  DEVICE float of(float x) const {
    float weight = exp2_approx((x - largest) * scale);
    return weight >= least ? weight : 0.0f;
  }
};

// Adds up what `measure(sums, x, token)` adds to each of N sums for the values at begin, begin + stride, ..., where the warp's first
// lane is at `first`: over the warp, in every lane. A warp with nothing to add is soon done.
template <u32 N, typename Measure>
DEVICE void measure_warp(float (&result)[N], const Source& s, u32 first, u32 end, u32 stride, Measure measure) {
  for (u32 k = 0; k < N; k++) result[k] = 0.0f;
  if (first >= end) return;
  // A vocabulary has less than 2^30 tokens: nothing here overflows.
  for (u32 from = first + threadIdx.x % WARP; from < end; from += stride * SUMMED) {
    float parts[N];
    for (u32 k = 0; k < N; k++) parts[k] = 0.0f;
#pragma unroll 4
    for (u32 n = 0; n < SUMMED; n++) {
      u32 i = from + n * stride;
      if (i < end) measure(parts, possible(s.values[i]), i);
    }
    for (u32 k = 0; k < N; k++) result[k] += parts[k];
  }
  for (u32 k = 0; k < N; k++) result[k] = warp_sum(result[k]);
}

// As above over the block; lane k has sum k.
template <u32 N, typename Measure>
DEVICE double measure_block(const Source& s, Measure measure) {
  u32 warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
  float sums[N];
  measure_warp(sums, s, s.begin + warp * WARP, s.end, PICK_THREADS, measure);
  __syncthreads();
  if (lane == 0) {
    for (u32 k = 0; k < N; k++) shared().sums[warp][k] = sums[k];
  }
  __syncthreads();
  double total = 0.0;
  for (u32 from = 0; from < PICK_WARPS; from++) total += static_cast<double>(shared().sums[from][lane < N ? lane : 0]);
  return total;
}

// The sum of weigh(x, i).
template <typename Weigh>
DEVICE double total_of(const Source& s, Weigh weigh) {
  double total = measure_block<1>(s, [&](float (&sums)[1], float x, u32 i) { sums[0] += weigh(x, i); });
  return __shfl_sync(ALL_LANES, total, 0);
}

// The largest key such that what has it or a larger one weighs `target`, which `low` and all above it do; nothing has a key
// above `high`. `above` becomes the weight of the larger ones. With `slack` the key may be so much less.
template <typename Weigh>
DEVICE u32 search(const Source& s, u32 low, u32 high, u32 slack, double target, double& above, Weigh weigh) {
  above = 0.0;
  while (high - low > slack) {
    u32 step = (high - low) / (THRESHOLDS + 1) + 1, thresholds = min_u32((high - low) / step, THRESHOLDS);
    double total = measure_block<THRESHOLDS>(s, [&](float (&sums)[THRESHOLDS], float x, u32 i) {
      u32 key = ordered(x);
      if (key <= low) return;
      float weight = weigh(x, i);
#pragma unroll
      for (u32 k = 0; k < THRESHOLDS; k++) sums[k] += key >= low + (k + 1) * step ? weight : 0.0f;
    });
    // A higher threshold's sum has fewer terms in the same places and is not larger: those that reach the target are the first.
    u32 lane = threadIdx.x % WARP;
    u32 reached = static_cast<u32>(__popc(__ballot_sync(ALL_LANES, lane < thresholds && total >= target)));
    double next = __shfl_sync(ALL_LANES, total, static_cast<int>(reached));
    if (reached < thresholds) {
      above = next;
      high = low + (reached + 1) * step - 1;
    }
    low += reached * step;
  }
  return low;
}

// Where the sum of weigh(x, i), in order, passes `left`; the last with a weight where rounding leads past the end.
template <typename Weigh>
DEVICE u32 descend(Source s, double left, Weigh weigh) {
  u32 warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
  while (s.end - s.begin > 1) {
    u32 step = div_up(s.end - s.begin, PICK_WARPS);
    u32 begin = min_u32(s.begin + warp * step, s.end), end = min_u32(begin + step, s.end);
    float sum[1];
    measure_warp(sum, s, begin, end, WARP, [&](float (&sums)[1], float x, u32 i) { sums[0] += weigh(x, i); });
    __syncthreads();
    if (lane == 0) shared().sums[warp][0] = sum[0];
    __syncthreads();
    u32 chosen = 0;
    double before = 0.0, passed = 0.0;
    for (u32 from = 0; from < PICK_WARPS; from++) {
      double weight = static_cast<double>(shared().sums[from][0]);
      if (weight > 0.0) {
        chosen = from;
        passed = before;
        before += weight;
        if (left < before) break;
      }
    }
    left -= passed;
    s.begin += chosen * step;
    s.end = min_u32(s.begin + step, s.end);
  }
  return s.begin;
}

// Lists the tokens for which keep(x, token), in order, and says how many they are: more than LISTED are not listed. A group is
// looked into where keep_group(its largest).
template <typename KeepGroup, typename Keep>
DEVICE u32 list(const float* row, u32 vocab, const Source& groups, KeepGroup keep_group, Keep keep) {
  u32 warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
  u32 step = div_up(groups.end, PICK_WARPS);
  u32 begin = min_u32(warp * step, groups.end), end = min_u32(begin + step, groups.end);
  u32 place = 0, total = 0;
  for (u32 writes = 0; writes < 2; writes++) {
    for (u32 first = begin; first < end; first += WARP) {
      u32 group = first + lane;
      u32 found = __ballot_sync(ALL_LANES, group < end && keep_group(groups.values[group]));
      while (found) {
        // Four at once, so that their loads are on their way together.
        u32 tokens[4];
        float x[4];
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
          tokens[i] = found ? (first + static_cast<u32>(__ffs(static_cast<i32>(found))) - 1) * GROUP + lane : vocab;
          found &= found - 1;
          x[i] = tokens[i] < vocab ? possible(row[tokens[i]]) : minus_infinity();
        }
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
          bool kept = tokens[i] < vocab && keep(x[i], tokens[i]);
          u32 lanes = __ballot_sync(ALL_LANES, kept);
          if (writes && kept) {
            u32 at = place + static_cast<u32>(__popc(lanes & ((1u << lane) - 1)));
            shared().listed[at] = x[i];
            shared().tokens[at] = tokens[i];
          }
          place += static_cast<u32>(__popc(lanes));
        }
      }
    }
    if (writes) break;
    __syncthreads();
    if (lane == 0) shared().counts[warp] = place;
    __syncthreads();
    place = 0;
    for (u32 from = 0; from < PICK_WARPS; from++) {
      if (from == warp) place = total;
      total += shared().counts[from];
    }
    if (total > LISTED) return total;
  }
  __syncthreads();
  return total;
}

// Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3": Philox4x32 of 10 rounds, as reference::sample::uniform.
DEVICE double uniform(const SampleRow& r) {
  u32 k0 = r.seed[0], k1 = r.seed[1];
  u32 c[4] = {r.position, r.sample_index, 0, 0};
#pragma unroll
  for (u32 round = 0; round < 10; round++) {
    u64 a = static_cast<u64>(c[0]) * 0xD2511F53u, b = static_cast<u64>(c[2]) * 0xCD9E8D57u;
    u32 c0 = static_cast<u32>(b >> 32) ^ c[1] ^ k0, c2 = static_cast<u32>(a >> 32) ^ c[3] ^ k1;
    c[0] = c0;
    c[1] = static_cast<u32>(b);
    c[2] = c2;
    c[3] = static_cast<u32>(a);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  u64 bits = (static_cast<u64>(c[1]) << 32 | c[0]) >> 11;
  return static_cast<double>(bits) * (1.0 / 9007199254740992.0);
}

// A row's splits joined; `which` is 0 for the raw logits and 1 for the changed ones.
struct Joined {
  u64 best;
  double sum;  // of e^((x - best) / temperature)
};
DEVICE double split_weight(const SplitResult& split, u32 which, float largest, float scale) {
  float shift = logit_of(split.best[which]) - largest;
  return split.sum[which] > 0.0 ? split.sum[which] * static_cast<double>(exp2_approx(shift * scale)) : 0.0;
}
DEVICE Joined join(const SplitResult* splits, u32 count, u32 which, float scale) {
  Joined joined{0, 0.0};
  for (u32 i = 0; i < count; i++) joined.best = splits[i].best[which] > joined.best ? splits[i].best[which] : joined.best;
  float largest = logit_of(joined.best);
  for (u32 i = 0; i < count; i++) joined.sum += split_weight(splits[i], which, largest, scale);
  return joined;
}

// A draw from all tokens.
DEVICE u32 draw_from_all(const SampleParams& p, Source row, const SplitResult* splits, const Joined& all, const SampleRow& r) {
  float largest = logit_of(all.best);
  double left = uniform(r) * all.sum, before = 0.0, passed = 0.0;
  u32 chosen = 0;
  for (u32 i = 0; i < p.splits; i++) {
    double weight = split_weight(splits[i], 1, largest, r.scale);
    if (weight > 0.0) {
      chosen = i;
      passed = before;
      before += weight;
      if (left < before) break;
    }
  }
  row.begin = chosen * SPLIT;
  row.end = min_u32(row.begin + SPLIT, p.vocab);
  Weight weight{largest, r.scale, NORMAL_MIN};
  return descend(row, left - passed, [&](float x, u32) { return weight.of(x); });
}

// A draw from what min_p, top_k and top_p keep.
DEVICE u32 draw_from_kept(const SampleParams& p, const Source& row, const Source& groups, const Joined& all, const SampleRow& r) {
  float largest = logit_of(all.best);
  u32 high = ordered(largest);
  Weight weight{largest, r.scale, r.min_p > NORMAL_MIN ? r.min_p : NORMAL_MIN};
  auto counts = [&](float x, u32) { return weight.of(x) > 0.0f ? 1.0f : 0.0f; };
  auto weighs = [&](float x, u32) { return weight.of(x); };
  double top_k = static_cast<double>(r.top_k), top_p = static_cast<double>(r.top_p), above;

  u32 least = 0;
  if (r.top_k > 0) {
    if (total_of(groups, counts) >= top_k) least = search(groups, 0, high, BOUND_SLACK, top_k, above, counts);
  } else if (r.min_p == 0.0f) {
    // The margin is for rounding: the sum of all was taken in another order.
    double target = top_p * all.sum * (1.0 + 1e-5);
    if (total_of(groups, weighs) >= target) least = search(groups, 0, high, BOUND_SLACK, target, above, weighs);
  }
  auto may_stay = [&](float x) { return ordered(x) >= least && weight.of(x) > 0.0f; };
  u32 listed = list(row.values, p.vocab, groups, may_stay, [&](float x, u32) { return may_stay(x); });
  Source source = row;
  if (listed <= LISTED) source = Source{shared().listed, shared().tokens, 0, listed};

  // top_k: the k-th largest and its equals stay.
  u32 cut = least;
  if (r.top_k > 0 && total_of(source, counts) >= top_k) cut = search(source, least, high, 0, top_k, above, counts);

  // top_p: of those that equal the last one that is needed, the lower tokens stay.
  u32 last = 0xffffffffu;
  if (r.top_p < 1.0f) {
    auto rest = [&](float x, u32) { return ordered(x) >= cut ? weight.of(x) : 0.0f; };
    double target = top_p * (r.top_k == 0 && r.min_p == 0.0f ? all.sum : total_of(source, rest));
    u32 edge = search(source, cut, high, 0, target, above, rest);
    double each = static_cast<double>(weight.of(unordered(edge)));
    if (each > 0.0) {
      double needed = ceil((target - above) / each);
      auto equal = [&](float x, u32) { return ordered(x) == edge ? 1.0f : 0.0f; };
      last = token_at(source, descend(source, (needed > 1.0 ? needed : 1.0) - 0.5, equal));
    }
    cut = edge;
  }
  auto kept = [&](float x, u32 i) {
    u32 key = ordered(x);
    return key > cut || (key == cut && token_at(source, i) <= last) ? weight.of(x) : 0.0f;
  };
  double total = total_of(source, kept);
  return token_at(source, descend(source, uniform(r) * total, kept));
}

// The `count` most probable raw tokens, best first, the lower token first among equals.
DEVICE void store_tops(const SampleParams& p, const Source& row, const Source& groups, u64 best, u32 count, double log_total) {
  u32 high = static_cast<u32>(best >> 32), least = 0;
  double above, wanted = static_cast<double>(count);
  auto one = [](float, u32) { return 1.0f; };
  if (groups.end >= count) least = search(groups, 0, high, BOUND_SLACK, wanted, above, one);
  auto may_be = [&](float x) { return ordered(x) >= least; };
  u32 listed = list(row.values, p.vocab, groups, may_be, [&](float x, u32) { return may_be(x); });
  Source source = row;
  if (listed <= LISTED) source = Source{shared().listed, shared().tokens, 0, listed};
  u32 cut = search(source, least, high, 0, wanted, above, one);
  auto equal = [&](float x, u32) { return ordered(x) == cut ? 1.0f : 0.0f; };
  u32 last = token_at(source, descend(source, wanted - above - 0.5, equal));
  auto kept = [&](float x, u32 token) { return ordered(x) > cut || (ordered(x) == cut && token <= last); };
  list(row.values, p.vocab, groups, [&](float x) { return ordered(x) >= cut; }, kept);
  for (u32 i = threadIdx.x; i < count; i += PICK_THREADS) {
    u32 token = shared().tokens[i], place = 0;
    float x = shared().listed[i];
    u64 rank = ranked(x, token);
    for (u32 j = 0; j < count; j++) place += ranked(shared().listed[j], shared().tokens[j]) > rank;
    float logprob = logit_of(best) == minus_infinity() ? minus_infinity() : static_cast<float>(x - log_total);
    p.tops[static_cast<u64>(blockIdx.x) * p.top_max + place] = TokenLogprob{token, logprob};
  }
}

KERNEL(sample_pick, SampleParams, PICK_THREADS) {
  if (blockIdx.x >= *p.rows) return;
  const SampleRow& r = p.requests[blockIdx.x];
  float* logits = p.logits + static_cast<u64>(blockIdx.x) * p.vocab;
  const SplitResult* splits = p.split_results + static_cast<u64>(blockIdx.x) * p.splits;
  u32 group_count = div_up(p.vocab, GROUP);
  u64 first_group = static_cast<u64>(blockIdx.x) * group_count;
  Source row{logits, nullptr, 0, p.vocab};
  Joined raw = join(splits, p.splits, 0, LOG2_E);
  u32 token = r.token;
  if (r.draws) {
    Joined all = join(splits, p.splits, 1, r.scale);
    token = token_of(all.best);
    if (logit_of(all.best) == minus_infinity()) {
      // Nothing is left: the best raw one, so that a request always goes on.
      token = token_of(raw.best);
    } else if (is_cut(r)) {
      token = draw_from_kept(p, row, Source{p.groups[1] + first_group, nullptr, 0, group_count}, all, r);
    } else if (r.scale != 0.0f) {
      token = draw_from_all(p, row, splits, all, r);
    }
  }
  if (r.starts) {
    __syncthreads();
    for (u32 i = threadIdx.x; i < r.starts[p.splits]; i += PICK_THREADS) {
      logits[r.changes[i].token & ~(SEEN | GENERATED)] = r.changes[i].before;
    }
    __syncthreads();
  }
  u32 top = min_u32(r.top, min_u32(p.vocab, p.top_max));
  double log_total = static_cast<double>(logit_of(raw.best)) + log(raw.sum);
  if (threadIdx.x == 0) {
    // Where every logit is impossible there is no distribution.
    float logprob = minus_infinity();
    if (logit_of(raw.best) != minus_infinity()) logprob = static_cast<float>(possible(logits[token]) - log_total);
    p.results[blockIdx.x] = SampleResult{token, logprob, top, 0};
  }
  if (top > 0) {
    store_tops(p, row, Source{p.groups[0] + first_group, nullptr, 0, group_count}, raw.best, top, log_total);
  }
}
