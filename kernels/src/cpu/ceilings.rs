//! What this machine can do at best: the yardstick beside every measured rate. Loops of nothing but the instruction in
//! question, on all threads at once.

use std::hint::black_box;
use std::time::Instant;

use super::Isa;
use super::pool::Pool;
use super::tensor::Aligned;
use crate::KernelError;

/// Bytes read per pass of the bandwidth measurement: several times any cache that is this machine's alone.
const READ_BYTES: usize = 1 << 30;
/// Parts of that memory whose times are taken apart.
const SLICES: usize = 16;
/// Passes; the best counts, because everything that disturbs a pass makes it slower.
const PASSES: usize = 5;
/// Independent accumulators: more than latency times instructions per cycle on any processor with these instructions.
const CHAINS: usize = 12;
/// Turns of an arithmetic loop per pass: a few milliseconds.
const TURNS: usize = 1_000_000;

/// Rates of the whole machine, the best of several passes each.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Ceilings {
    /// Threads they were measured with.
    pub threads: usize,
    /// Instruction set they were measured with.
    pub isa: Isa,
    /// Bytes read from memory, 10^9 per second.
    pub read_g_per_s: f64,
    /// Multiply-adds of 8-bit integers into 32 bits, 10^9 per second.
    pub int8_g_per_s: f64,
    /// Multiply-adds of f32, 10^9 per second.
    pub f32_g_per_s: f64,
}

/// Measures this machine with `threads` threads; takes about two seconds and 1 GiB of memory.
///
/// # Errors
/// Threads or memory that the system refuses.
pub fn measure(threads: usize) -> Result<Ceilings, KernelError> {
    let (pool, isa) = (Pool::new(threads)?, Isa::detect());
    let mut memory = Aligned::<u64>::zeroed(READ_BYTES / 8, "bandwidth measurement")?;
    // Written by the thread that will read it, and so that every page exists.
    pool.for_each_row(&mut memory, 512, &|row, page| page.fill(row as u64));
    // The best of each slice, then their sum: a whole pass is long enough to be disturbed every time.
    let slice = |memory: &[u64]| {
        pool.run(&|worker| {
            let mine = pool.split(memory.len() / 64, worker);
            black_box(read(isa, &memory[mine.start * 64..mine.end * 64]));
        });
    };
    let mut fastest = [f64::INFINITY; SLICES];
    for _ in 0..PASSES {
        for (fastest, memory) in fastest.iter_mut().zip(memory.chunks_exact(READ_BYTES / 8 / SLICES)) {
            *fastest = fastest.min(time(|| slice(memory)));
        }
    }
    let seconds: f64 = fastest.iter().sum();
    let arithmetic = |lanes: usize, turn: fn(Isa, usize)| {
        let passes = (0..PASSES).map(|_| time(|| pool.run(&|_| turn(isa, TURNS))));
        let seconds = passes.fold(f64::INFINITY, f64::min);
        (TURNS * CHAINS * lanes * threads) as f64 / seconds / 1e9
    };
    let (int8_lanes, f32_lanes) = match isa {
        Isa::Avx512Vnni => (64, 16),
        Isa::Avx2 => (32, 8),
        Isa::Portable => (1, 1),
    };
    let ceilings = Ceilings {
        threads,
        isa,
        read_g_per_s: READ_BYTES as f64 / seconds / 1e9,
        int8_g_per_s: arithmetic(int8_lanes, int8),
        f32_g_per_s: arithmetic(f32_lanes, f32),
    };
    pool.check()?;
    Ok(ceilings)
}

fn time(work: impl FnOnce()) -> f64 {
    let start = Instant::now();
    work();
    start.elapsed().as_secs_f64()
}

fn read(isa: Isa, memory: &[u64]) -> u64 {
    match isa {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: an Isa above portable exists only where the processor has it.
        Isa::Avx512Vnni => unsafe { x86::read_512(memory) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        Isa::Avx2 => unsafe { x86::read_256(memory) },
        _ => memory.iter().fold(0, |sum, value| sum ^ value),
    }
}

fn int8(isa: Isa, turns: usize) {
    match isa {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: an Isa above portable exists only where the processor has it.
        Isa::Avx512Vnni => unsafe { x86::int8_512(turns) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        Isa::Avx2 => unsafe { x86::int8_256(turns) },
        _ => {
            let (x, y) = (black_box(3_i8), black_box(5_i8));
            let mut sums = [0_i32; CHAINS];
            for _ in 0..turns {
                sums.iter_mut().for_each(|sum| *sum = sum.wrapping_add(i32::from(x) * i32::from(y)));
                black_box(&mut sums);
            }
        }
    }
}

fn f32(isa: Isa, turns: usize) {
    match isa {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: an Isa above portable exists only where the processor has it.
        Isa::Avx512Vnni => unsafe { x86::f32_512(turns) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        Isa::Avx2 => unsafe { x86::f32_256(turns) },
        _ => {
            let (x, y) = (black_box(0.999_f32), black_box(1.001_f32));
            let mut sums = [0.0_f32; CHAINS];
            for _ in 0..turns {
                sums.iter_mut().for_each(|sum| *sum += x * y);
                black_box(&mut sums);
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;
    use std::hint::black_box;

    use super::CHAINS;

    #[target_feature(enable = "avx512f")]
    pub(super) fn read_512(memory: &[u64]) -> u64 {
        let mut sums = [_mm512_setzero_si512(); 4];
        for line in memory.chunks_exact(32) {
            for (sum, line) in sums.iter_mut().zip(line.chunks_exact(8)) {
                // SAFETY: the chunk is 64 bytes.
                *sum = _mm512_add_epi64(*sum, unsafe { _mm512_loadu_si512(line.as_ptr().cast()) });
            }
        }
        sums.into_iter().map(|sum| _mm512_reduce_add_epi64(sum)).sum::<i64>().cast_unsigned()
    }

    #[target_feature(enable = "avx2")]
    pub(super) fn read_256(memory: &[u64]) -> u64 {
        let mut sums = [_mm256_setzero_si256(); 4];
        for line in memory.chunks_exact(16) {
            for (sum, line) in sums.iter_mut().zip(line.chunks_exact(4)) {
                // SAFETY: the chunk is 32 bytes.
                *sum = _mm256_add_epi64(*sum, unsafe { _mm256_loadu_si256(line.as_ptr().cast()) });
            }
        }
        black_box(sums);
        0
    }

    #[target_feature(enable = "avx512f,avx512vnni")]
    pub(super) fn int8_512(turns: usize) {
        let (x, y) = (_mm512_set1_epi8(black_box(3)), _mm512_set1_epi8(black_box(5)));
        let mut sums = [_mm512_setzero_si512(); CHAINS];
        for _ in 0..turns {
            for sum in &mut sums {
                *sum = _mm512_dpbusd_epi32(*sum, x, y);
            }
        }
        black_box(sums);
    }

    /// What AVX2 needs for 32 multiply-adds: multiply, add pairs to 32 bits, accumulate.
    #[target_feature(enable = "avx2")]
    pub(super) fn int8_256(turns: usize) {
        let (x, y, ones) = (_mm256_set1_epi8(black_box(3)), _mm256_set1_epi8(black_box(5)), _mm256_set1_epi16(1));
        let mut sums = [_mm256_setzero_si256(); CHAINS];
        for _ in 0..turns {
            for sum in &mut sums {
                // The operand depends on the sum so that the product is not computed once for all turns.
                let pairs = _mm256_maddubs_epi16(_mm256_or_si256(x, *sum), y);
                *sum = _mm256_add_epi32(*sum, _mm256_madd_epi16(pairs, ones));
            }
        }
        black_box(sums);
    }

    #[target_feature(enable = "avx512f")]
    pub(super) fn f32_512(turns: usize) {
        let (x, y) = (_mm512_set1_ps(black_box(0.999)), _mm512_set1_ps(black_box(0.001)));
        let mut sums = [_mm512_setzero_ps(); CHAINS];
        for _ in 0..turns {
            for sum in &mut sums {
                *sum = _mm512_fmadd_ps(*sum, x, y);
            }
        }
        black_box(sums);
    }

    #[target_feature(enable = "avx2,fma")]
    pub(super) fn f32_256(turns: usize) {
        let (x, y) = (_mm256_set1_ps(black_box(0.999)), _mm256_set1_ps(black_box(0.001)));
        let mut sums = [_mm256_setzero_ps(); CHAINS];
        for _ in 0..turns {
            for sum in &mut sums {
                *sum = _mm256_fmadd_ps(*sum, x, y);
            }
        }
        black_box(sums);
    }
}
