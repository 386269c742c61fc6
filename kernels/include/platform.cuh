// What every kernel is written against: plain CUDA C++ as NVRTC compiles it, without any header of the toolkit. On the host
// (OPENLORA_HOST) host.hpp supplies the same names, so that kernels run in tests on a machine with no GPU.
//
// Kernels use threadIdx, blockIdx, gridDim, blockDim, __syncthreads, __syncwarp, __shfl_*_sync, __any_sync, __ballot_sync as CUDA has
// them; shared memory is dynamic only (shared_memory), so that the host can poison it; everything that is PTX is in this file.
#pragma once

using i8 = signed char;
using u8 = unsigned char;
using u16 = unsigned short;
using i32 = int;
using u32 = unsigned int;
using i64 = long long;
using u64 = unsigned long long;

constexpr u32 WARP = 32;
constexpr u32 ALL_LANES = 0xffffffffu;

// 16-bit floats. Kernels compute in f32 and convert when they load and store.
struct bf16 {
  u16 bits;
};
struct f16 {
  u16 bits;
};

#ifdef OPENLORA_HOST
#include "host.hpp"
#else

#define DEVICE __device__ __forceinline__
// A kernel of THREADS threads a block with one argument, a struct: what src/cuda launches by this name.
#define KERNEL(name, Params, THREADS) extern "C" __global__ void __launch_bounds__(THREADS) name(const __grid_constant__ Params p)
// The same with registers for at least BLOCKS blocks beside each other on a multiprocessor.
#define KERNEL_BESIDE(name, Params, THREADS, BLOCKS) \
  extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) name(const __grid_constant__ Params p)

// The block's dynamic shared memory, aligned to 128 bytes.
DEVICE u8* shared_memory() {
  extern __shared__ __align__(128) u8 openlora_shared[];
  return openlora_shared;
}

DEVICE float as_float(bf16 x) { return __uint_as_float(static_cast<u32>(x.bits) << 16); }
DEVICE float as_float(f16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}

// To nearest even. f16 saturates to the largest finite number, as the CPU backend's does; NaN stays NaN.
DEVICE bf16 to_bf16(float x) {
  bf16 y;
#if __CUDA_ARCH__ >= 800
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
#else
  u32 bits = __float_as_uint(x);
  y.bits = (bits & 0x7fffffffu) > 0x7f800000u ? static_cast<u16>(bits >> 16 | 0x40)
                                              : static_cast<u16>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
#endif
  return y;
}
DEVICE f16 to_f16(float x) {
  f16 y;
  float clamped = x > 65504.0f ? 65504.0f : (x < -65504.0f ? -65504.0f : x);
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(clamped));
  return y;
}

// 2^x, within 2 ulp; 0 for -inf.
DEVICE float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// 1 / sqrt(x), within 2 ulp.
DEVICE float rsqrt_approx(float x) {
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// d += a b on one warp's tensor cores: a is 16 x 16 (row-major fragments), b is 16 x 8, d is 16 x 8 in f32. Fragment layouts:
// PTX ISA, "Matrix fragments for mma.m16n8k16". T is bf16 (from sm_80 on) or f16.
template <typename T>
DEVICE void mma_16x8x16(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]);
template <>
DEVICE void mma_16x8x16<f16>(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
#if __CUDA_ARCH__ >= 800
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(b[0]));
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[2]), "r"(a[3]), "r"(b[1]));
#endif
}
#if __CUDA_ARCH__ >= 800
template <>
DEVICE void mma_16x8x16<bf16>(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
#endif

// Four 8 x 8 matrices of 16-bit numbers from shared memory: lane l names row l % 8 of matrix l / 8, 16 bytes each. `trans`
// hands every matrix out transposed.
DEVICE void ldmatrix_x4(u32 (&r)[4], const void* row) {
  u32 address = static_cast<u32>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
DEVICE void ldmatrix_x4_trans(u32 (&r)[4], const void* row) {
  u32 address = static_cast<u32>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// 16 bytes from global to shared memory, both aligned to 16; where `bytes` is smaller, zeros follow. They are there once
// async_wait of their group has returned and a barrier has been passed.
DEVICE void async_copy_16(void* shared, const void* global, u32 bytes = 16) {
#if __CUDA_ARCH__ >= 800
  u32 address = static_cast<u32>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(global), "r"(bytes) : "memory");
#else
  u8* to = static_cast<u8*>(shared);
  const u8* from = static_cast<const u8*>(global);
  for (u32 i = 0; i < 16; i++) to[i] = i < bytes ? from[i] : 0;
#endif
}
DEVICE void async_commit() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
// Waits until at most `pending` of the groups committed last are not there yet.
template <int pending>
DEVICE void async_wait() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
#endif
}

#endif  // OPENLORA_HOST

DEVICE float as_float(float x) { return x; }
template <typename T>
DEVICE T from_float(float x);
template <>
DEVICE float from_float<float>(float x) { return x; }
template <>
DEVICE bf16 from_float<bf16>(float x) { return to_bf16(x); }
template <>
DEVICE f16 from_float<f16>(float x) { return to_f16(x); }

// N numbers that are loaded and stored at once, aligned to their size (at most 16 bytes).
template <typename T, u32 N>
struct alignas(sizeof(T) * N) Pack {
  T values[N];
};
template <typename T, u32 N>
DEVICE Pack<T, N> load_pack(const T* from) {
  return *reinterpret_cast<const Pack<T, N>*>(from);
}
template <typename T, u32 N>
DEVICE void store_pack(T* to, const Pack<T, N>& pack) {
  *reinterpret_cast<Pack<T, N>*>(to) = pack;
}

// Sums and maxima over a warp in a fixed order; every lane has the result.
DEVICE float warp_sum(float x) {
  for (u32 distance = WARP / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(ALL_LANES, x, distance);
  return x;
}
DEVICE float warp_max(float x) {
  for (u32 distance = WARP / 2; distance > 0; distance /= 2) {
    float other = __shfl_xor_sync(ALL_LANES, x, distance);
    x = other > x ? other : x;
  }
  return x;
}

DEVICE u32 div_up(u32 a, u32 b) { return (a + b - 1) / b; }
DEVICE u32 min_u32(u32 a, u32 b) { return a < b ? a : b; }
DEVICE u32 max_u32(u32 a, u32 b) { return a > b ? a : b; }
