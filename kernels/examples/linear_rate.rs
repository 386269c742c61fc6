//! Prints how fast the linears of a model's shapes run, beside what this machine can do at best.
//!
//! ```text
//! cargo run --release -p openlora-kernels --example linear_rate -- [THREADS] [portable|avx2|avx512]
//! ```
//!
//! The matrices of a shape are cycled through, enough of them that no cache of this machine alone holds them all.

use std::time::{Duration, Instant};

use openlora_kernels::cpu::{Cpu, Isa, ceilings};
use openlora_kernels::{Backend, BlockFormat, KernelError, LinearSpec, LoraRows, Numbers, Precision, TensorSource};

/// `(name, inputs, outputs of the parts, format)` of SmolLM2-135M.
const SHAPES: [(&str, usize, &[usize], BlockFormat); 5] = [
    ("qkv", 576, &[576, 192, 192], BlockFormat::Q4_1),
    ("o", 576, &[576], BlockFormat::Q4_1),
    ("gate_up", 576, &[1536, 1536], BlockFormat::Q4_1),
    ("down", 1536, &[576], BlockFormat::Q4_1),
    ("head", 576, &[49152], BlockFormat::Q8_0),
];
const ROWS: [usize; 8] = [1, 2, 4, 8, 16, 32, 64, 256];
/// Weights of one shape that are cycled through: a token's step reads each matrix once, so none is in cache again.
const CYCLE_BYTES: usize = 96 << 20;
const TIME_PER_FIGURE: Duration = Duration::from_millis(250);

fn main() -> Result<(), KernelError> {
    let mut arguments = std::env::args().skip(1);
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = arguments.next().and_then(|threads| threads.parse().ok()).unwrap_or(cores);
    let wanted = arguments.next().map(|name| name.to_lowercase());
    let isa = wanted.and_then(|name| Isa::available().iter().rev().find(|isa| isa.name().starts_with(&name)));
    let isa = isa.copied().unwrap_or_else(Isa::detect);

    let ceilings = ceilings::measure(threads)?;
    println!(
        "{threads} threads, {}: read {:.1} GB/s, int8 {:.0} G multiply-adds/s, f32 {:.0} G multiply-adds/s",
        ceilings.isa.name(),
        ceilings.read_g_per_s,
        ceilings.int8_g_per_s,
        ceilings.f32_g_per_s
    );
    for precision in [Precision::Quantised, Precision::F32] {
        let cpu = Cpu::new(threads, precision, isa)?;
        println!("\n{}\nG multiply-adds/s (GB/s of weights)", cpu.describe());
        print!("{:>8}", "rows");
        ROWS.iter().for_each(|rows| print!("{rows:>14}"));
        println!();
        for (name, inputs, parts, format) in SHAPES {
            print!("{name:>8}");
            for figure in rates(&cpu, inputs, parts, format)? {
                print!("{figure:>14}");
            }
            println!();
        }
    }
    Ok(())
}

fn rates(cpu: &Cpu, inputs: usize, parts: &[usize], format: BlockFormat) -> Result<Vec<String>, KernelError> {
    let outputs: usize = parts.iter().sum();
    let row_bytes = inputs / format.block_elements() * format.block_bytes();
    // Codes and scales of 0x11 bytes are ordinary numbers in every format; the kernels' speed does not depend on them.
    let bytes = vec![0x11; row_bytes * outputs];
    let mut linears = Vec::new();
    while linears.is_empty() || linears.len() * bytes.len() < CYCLE_BYTES {
        let mut rest = &bytes[..];
        let parts = parts.iter().map(|rows| {
            let (bytes, after) = rest.split_at(rows * row_bytes);
            rest = after;
            TensorSource { name: "benchmark", format, rows: *rows, cols: inputs, bytes, row_order: None }
        });
        linears.push(cpu.load_linear(&LinearSpec { parts: parts.collect(), bias: None, sites: Vec::new() })?);
    }
    let weights = linears[0].panels.byte_len() as f64;
    let mut figures = Vec::new();
    for rows in ROWS {
        let mut x = cpu.new_tensor(Numbers::Activation, rows, inputs)?;
        x.set_rows(rows);
        x.values_mut().iter_mut().enumerate().for_each(|(i, x)| *x = (i % 17) as f32 - 8.0);
        let mut out = cpu.new_tensor(Numbers::Activation, rows, outputs)?;
        // The best time of each matrix, then their mean: what else runs on the machine disturbs single calls.
        let mut best = vec![f64::INFINITY; linears.len()];
        let end = Instant::now() + TIME_PER_FIGURE;
        while Instant::now() < end {
            for (linear, best) in linears.iter().zip(&mut best) {
                let start = Instant::now();
                cpu.linear(linear, &LoraRows { segments: &[] }, &x, &mut out)?;
                *best = best.min(start.elapsed().as_secs_f64());
            }
        }
        let best = best.iter().sum::<f64>() / best.len() as f64;
        let rate = (rows * inputs * outputs) as f64 / best / 1e9;
        figures.push(format!("{rate:.0} ({:.1})", weights / best / 1e9));
    }
    Ok(figures)
}
