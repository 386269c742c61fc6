// Kernels that show whether the host does what a GPU does, and notices what a GPU would leave undefined.
#include "platform.cuh"

struct Numbers {
  const u32* in;
  u32* out;
  u32 count;
};

// Every thread writes, passes a barrier, and reads what another one wrote.
KERNEL(probe_barrier, Numbers, 1024) {
  u32* shared = reinterpret_cast<u32*>(shared_memory());
  u32 i = threadIdx.x, block = blockIdx.y * gridDim.x + blockIdx.x;
  shared[i] = block * 1000 + i;
  if (p.count) __syncthreads();
  p.out[block * blockDim.x + i] = shared[blockDim.x - 1 - i];
}

// 16 results a lane: every shuffle and vote.
KERNEL(probe_warp, Numbers, 128) {
  u32 lane = threadIdx.x % WARP;
  u32 x = p.in[threadIdx.x];
  u32* out = p.out + threadIdx.x * 16;
  out[0] = __shfl_sync(ALL_LANES, x, (lane * 7 + 3) % 32);
  out[1] = __shfl_sync(ALL_LANES, x, 5, 8);
  out[2] = __shfl_xor_sync(ALL_LANES, x, 9);
  out[3] = __shfl_up_sync(ALL_LANES, x, 3);
  out[4] = __shfl_down_sync(ALL_LANES, x, 3);
  out[5] = __shfl_up_sync(ALL_LANES, x, 3, 8);
  out[6] = __shfl_down_sync(ALL_LANES, x, 3, 8);
  out[7] = __ballot_sync(ALL_LANES, x & 1);
  out[8] = static_cast<u32>(__any_sync(ALL_LANES, x == p.in[7]));
  out[9] = static_cast<u32>(__all_sync(ALL_LANES, x == p.in[7]));
  u64 wide = __shfl_xor_sync(ALL_LANES, static_cast<u64>(x) << 32 | lane, 1);
  out[10] = static_cast<u32>(wide >> 32);
  out[11] = static_cast<u32>(wide);
  out[12] = __float_as_uint(warp_sum(static_cast<float>(lane)));
  out[13] = __float_as_uint(warp_max(lane == 11 ? 2.0f : -1.0f));
  out[14] = static_cast<u32>(__shfl_sync(ALL_LANES, static_cast<i32>(lane) - 16, 2));
  __syncwarp();
  out[15] = __popc(x) + (__ffs(static_cast<i32>(x)) << 8) + (__clz(static_cast<i32>(x)) << 16);
}

struct Product {
  const u16 *a, *b;  // [16][16], [16][8], row-major
  float* d;          // [16][8]
};

// d += a b. Through shared memory as kernels do it: asynchronous copies, then ldmatrix for both.
template <typename T>
DEVICE void product(const Product& p, bool wait) {
  u8* shared = shared_memory();
  u32 lane = threadIdx.x;
  async_copy_16(shared + lane * 16, p.a + lane * 8);
  if (lane < 16) async_copy_16(shared + 512 + lane * 16, p.b + lane * 8);
  async_commit();
  if (wait) async_wait<0>();
  __syncthreads();
  u32 a[4], b[4];
  // Matrices of a: rows 0-7 and 8-15 of columns 0-7, then of 8-15. Of b: rows 0-7 and 8-15, transposed; again for the other half.
  ldmatrix_x4(a, shared + (lane % 16) * 32 + lane / 16 * 16);
  ldmatrix_x4_trans(b, shared + 512 + (lane % 16) * 16);
  const u32 both[2] = {b[0], b[1]};
  float* low = p.d + lane / 4 * 8 + lane % 4 * 2;
  float d[4] = {low[0], low[1], low[64], low[65]};
  mma_16x8x16<T>(d, a, both);
  low[0] = d[0];
  low[1] = d[1];
  low[64] = d[2];
  low[65] = d[3];
}
KERNEL(probe_mma_bf16, Product, 32) { product<bf16>(p, true); }
KERNEL(probe_mma_f16, Product, 32) { product<f16>(p, true); }
KERNEL(probe_forgotten_wait, Product, 32) { product<bf16>(p, false); }

// The registers themselves: of each lane four of a, two of b and four of d, and then what d has become.
template <typename T>
DEVICE void fragments(const Numbers& p) {
  const u32* own = p.in + threadIdx.x * 10;
  u32 a[4], b[2];
  float d[4];
  for (u32 i = 0; i < 4; i++) a[i] = own[i];
  for (u32 i = 0; i < 2; i++) b[i] = own[4 + i];
  for (u32 i = 0; i < 4; i++) d[i] = __uint_as_float(own[6 + i]);
  mma_16x8x16<T>(d, a, b);
  for (u32 i = 0; i < 4; i++) p.out[threadIdx.x * 4 + i] = __float_as_uint(d[i]);
}
KERNEL(probe_fragments_bf16, Numbers, 32) { fragments<bf16>(p); }
KERNEL(probe_fragments_f16, Numbers, 32) { fragments<f16>(p); }

// Four 8 x 8 matrices, one after the other; with count, transposed.
KERNEL(probe_matrices, Numbers, 32) {
  u32* shared = reinterpret_cast<u32*>(shared_memory());
  u32 lane = threadIdx.x;
  for (u32 i = 0; i < 4; i++) shared[lane * 4 + i] = p.in[lane * 4 + i];
  __syncwarp();
  u32 r[4];
  if (p.count) {
    ldmatrix_x4_trans(r, shared + lane * 4);
  } else {
    ldmatrix_x4(r, shared + lane * 4);
  }
  for (u32 i = 0; i < 4; i++) p.out[lane * 4 + i] = r[i];
}

// Every lane writes a row of 16 bytes that another lane names to ldmatrix; without count, nothing is between the two.
KERNEL(probe_rows, Numbers, 32) {
  u32* shared = reinterpret_cast<u32*>(shared_memory());
  u32 lane = threadIdx.x;
  for (u32 i = 0; i < 4; i++) shared[lane * 4 + i] = lane * 4 + i;
  if (p.count) __syncwarp();
  u32 r[4];
  ldmatrix_x4(r, shared + (31 - lane) * 4);
  for (u32 i = 0; i < 4; i++) p.out[i * 32 + lane] = r[i];
}

// Three groups, of which the wait leaves the last `pending`; what is there of each.
KERNEL(probe_groups, Numbers, 32) {
  u32* shared = reinterpret_cast<u32*>(shared_memory());
  if (threadIdx.x == 0) {
    for (u32 i = 0; i < 3; i++) {
      async_copy_16(shared + i * 4, p.in + i * 4, i == 1 ? 6 : 16);
      async_commit();
    }
    if (p.count == 0) async_wait<0>();
    if (p.count == 1) async_wait<1>();
    if (p.count == 2) async_wait<2>();
    for (u32 i = 0; i < 12; i++) p.out[i] = shared[i];
  }
}

// Races, and what is none; count says which.
KERNEL(probe_races, Numbers, 64) {
  u32 i = threadIdx.x, lane = i % WARP;
  u32* shared = reinterpret_cast<u32*>(shared_memory());
  switch (p.count) {
    case 0:  // a warp's own numbers, then the block's, with the barriers that they need; read by many, written again
      shared[i] = i;
      __syncwarp();
      p.out[i] = shared[i ^ 1];
      __syncthreads();
      p.out[i] += shared[i ^ 33];
      __syncthreads();
      shared[i ^ 33] = lane;
      break;
    case 1:  // a shuffle is no barrier
      shared[i] = i;
      p.out[i] = __shfl_sync(ALL_LANES, i, 0);
      p.out[i] = shared[i ^ 1];
      break;
    case 2:  // a warp's barrier is none for another warp
      shared[i] = i;
      __syncwarp();
      p.out[i] = shared[i ^ 32];
      break;
    case 3:  // read by all, then written with nothing between
      if (i == 0) shared[0] = 1;
      __syncthreads();
      p.out[i] = shared[0];
      if (i == 40) shared[0] = 2;
      break;
    case 4:  // both blocks write the same numbers
      p.out[i] = i;
      break;
    case 5:  // a block reads what another one writes
      if (blockIdx.x == 0) p.out[i] = i;
      if (blockIdx.x == 1) p.out[64 + i] = p.out[63 - i];
      break;
    case 6:  // a copy over what others still read
      shared[i * 4] = i;
      __syncthreads();
      p.out[i] = shared[(i ^ 35) * 4];
      async_copy_16(shared + i * 4, p.in);
      break;
    case 7:  // a thread waits for its own copies only
      async_copy_16(shared + i * 4, p.in);
      async_commit();
      async_wait<0>();
      p.out[i] = shared[(i ^ 1) * 4];
      break;
    case 9:  // read by a warp, then written by one of its lanes with a vote between, which is no barrier
      if (lane == 0) shared[i] = 1;
      __syncwarp();
      p.out[i] = shared[i - lane];
      if (__any_sync(ALL_LANES, lane == 3) && lane == 0) shared[i] = 2;
      break;
    case 8:  // each block its own numbers, in bytes that are neighbours
      reinterpret_cast<u8*>(p.out)[blockIdx.x + i * 2] = static_cast<u8>(i);
      break;
  }
}

// Things that must not be done; count says which.
KERNEL(probe_wrong, Numbers, 128) {
  u32 i = threadIdx.x;
  u8* shared = shared_memory();
  switch (p.count) {
    case 0:
      if (i == 5) return;
      __syncthreads();
      break;
    case 1:
      if (i < 32)
        __syncthreads();
      else
        __syncthreads();
      break;
    case 2:
      if (i % 2) p.out[i] = __shfl_sync(0xaaaaaaaau, i, 1);
      break;
    case 3:
      if (i == 7)
        __syncwarp();
      else
        p.out[i] = __shfl_sync(ALL_LANES, i, 1);
      break;
    case 4:
      if (i == 8)
        __syncthreads();
      else
        __syncwarp();
      break;
    case 5: {
      u32 r[4];
      ldmatrix_x4(r, shared + 8);
      p.out[i] = r[0];
      break;
    }
    case 6:
      async_copy_16(shared + 64, p.in + 1);
      break;
    case 7:
      async_copy_16(shared + 1024, p.in);
      break;
    case 8:
      __trap();
    case 9:
      if (i == 0) shared[-1] = 0;
      break;
    case 10:
      p.out[i] = __float_as_uint(reinterpret_cast<float*>(shared)[i]);
      break;
    case 11:
      if (i == 0) shared[1024] = 1;
      break;
    case 12:
      if (i == 0) p.out[128] = 1;
      break;
    case 13:
      if (i == 0) p.out[0] = *reinterpret_cast<const u32*>(reinterpret_cast<const u8*>(p.in) + 2);
      break;
  }
}

struct Conversions {
  const float* in;
  u16* bf16s;
  u16* f16s;
  float* from_bf16;  // of all 65,536
  float* from_f16;
  u32 count;
};
KERNEL(probe_convert, Conversions, 256) {
  u32 i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < p.count) {
    p.bf16s[i] = to_bf16(p.in[i]).bits;
    p.f16s[i] = to_f16(p.in[i]).bits;
  }
  if (i < 65536) {
    p.from_bf16[i] = as_float(bf16{static_cast<u16>(i)});
    p.from_f16[i] = as_float(f16{static_cast<u16>(i)});
  }
}

// Adds one to every number.
KERNEL(probe_increment, Numbers, 64) {
  u32 i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < p.count) p.out[i] = p.in[i] + 1;
}
