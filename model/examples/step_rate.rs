//! Prefill and decode rates of the bare forward pass on the CPU backend, without engine or server.
//!
//! `cargo run --release -p openlora-model --example step_rate -- MODEL [threads]`

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use openlora_kernels::cpu::{Cpu, Isa};
use openlora_kernels::{Backend, LoraRows, Precision, SequenceRows, StepRows};
use openlora_model::{Activations, LoadOptions, Model, ModelError, ModelFiles};
use openlora_types::Limits;

const BLOCK: usize = 16;
const PREFILL: usize = 512;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args_os().skip(1);
    let path = PathBuf::from(arguments.next().ok_or("usage: step_rate MODEL [threads]")?);
    let threads = arguments.next().and_then(|threads| threads.to_str()?.parse().ok()).unwrap_or(2);
    for precision in [Precision::Quantised, Precision::F32] {
        let backend = Arc::new(Cpu::new(threads, precision, Isa::detect())?);
        println!("{} {precision:?}", backend.describe());
        let started = Instant::now();
        let files = Arc::new(ModelFiles::open(&path, &Limits::default())?);
        let options =
            LoadOptions { max_rows: PREFILL, max_logit_rows: 32, max_position: 2 * PREFILL, block_size: BLOCK };
        let model = Model::load(backend, files, &options, &mut |_, _| {})?;
        println!("  loaded in {:.2} s", started.elapsed().as_secs_f64());
        let mut bench = Bench::new(&model)?;
        bench.report("prefill 512", 1, PREFILL, 5)?;
        for sequences in [1, 8, 32] {
            bench.report(&format!("decode x{sequences}"), sequences, 1, 30)?;
        }
    }
    Ok(())
}

struct Bench<'a> {
    model: &'a Model<Cpu>,
    act: Activations<Cpu>,
    kv: <Cpu as Backend>::Pages,
}

impl<'a> Bench<'a> {
    fn new(model: &'a Model<Cpu>) -> Result<Self, ModelError> {
        let blocks = 32 * 8;
        let kv = model.backend().new_pages(model.attention_spec(), model.layers(), blocks)?;
        Ok(Self { model, act: model.new_activations()?, kv })
    }

    /// Steps of `sequences` x `rows` rows; decoding continues at position 64.
    fn report(&mut self, name: &str, sequences: usize, rows: usize, steps: usize) -> Result<(), ModelError> {
        let start = if rows == 1 { 64 } else { 0 };
        let vocab = self.model.shape().vocab as u32;
        let tokens: Vec<u32> = (0..(sequences * rows) as u32).map(|i| (i * 7919 + 13) % vocab).collect();
        let blocks = if sequences == 1 { PREFILL / BLOCK } else { 8 };
        let tables: Vec<u32> = (0..(sequences * blocks) as u32).collect();
        let spans: Vec<SequenceRows> =
            (0..sequences).map(|i| SequenceRows { row: i * rows, rows, table: i * blocks, blocks }).collect();
        let last: Vec<u32> = spans.iter().map(|span| (span.row + span.rows - 1) as u32).collect();
        let all: Vec<u32> = (0..last.len() as u32).collect();
        let lora = LoraRows { segments: &[] };
        let mut best = f64::INFINITY;
        for step in 0..steps {
            let from = if rows == 1 { start + step } else { start };
            let positions: Vec<u32> = (0..sequences).flat_map(|_| (from..from + rows).map(|p| p as u32)).collect();
            let step = StepRows { tokens: &tokens, positions: &positions, sequences: &spans, block_tables: &tables };
            let started = Instant::now();
            self.model.forward(&mut self.act, &step, &lora, (&last, &lora), &mut self.kv)?;
            self.model.logits(&mut self.act, &all, &lora)?;
            best = best.min(started.elapsed().as_secs_f64());
        }
        println!("  {name}: {:.2} ms, {:.0} tokens/s", best * 1e3, (sequences * rows) as f64 / best);
        Ok(())
    }
}
