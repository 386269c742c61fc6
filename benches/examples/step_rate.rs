//! Times whole steps and every operation in them, without a scheduler: `cargo run --release -p openlora-benches --example
//! step_rate -- --sequences 32 --adapters 0,1,32`.
//!
//! The configurations take turns, one step each, so that what the machine does beside this falls on all of them alike, and
//! what adapters cost is the median of a step less the median of the same step without. The rows of a sequence
//! are the last of its context.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result};
use clap::Parser;
use openlora_adapters::Lease;
use openlora_benches::adapters::register_random;
use openlora_benches::shapes::Shape;
use openlora_benches::timed::{Operation, Timed};
use openlora_kernels::cpu::{Cpu, Isa};
use openlora_kernels::{Backend, LoraRows, LoraSegment, Precision, SampleRow, SequenceRows, StepRows};
use openlora_model::{LoadOptions, Model, ModelFiles};
use openlora_types::{Limits, Module, SamplingParams};

#[derive(Parser)]
struct Arguments {
    /// A GGUF file or a Hugging Face folder
    #[arg(long)]
    model: Option<PathBuf>,
    /// Random weights in this shape instead: see benches/src/shapes.rs
    #[arg(long, conflicts_with = "model")]
    shape: Option<String>,
    /// Kernel threads
    #[arg(long, default_value_t = 2)]
    threads: usize,
    /// Sequences of a step, each with `--new` rows
    #[arg(long, value_delimiter = ',', default_values_t = [1, 8, 32])]
    sequences: Vec<usize>,
    /// Rows of each sequence in a step: 1 is decode, more is prefill
    #[arg(long, default_value_t = 1)]
    new: usize,
    /// Distinct adapters; 0 is the base model alone
    #[arg(long, value_delimiter = ',', default_values_t = [0, 1, 32])]
    adapters: Vec<usize>,
    /// Rank of the adapters
    #[arg(long, default_value_t = 8)]
    rank: usize,
    /// Adapt all seven linears instead of q and v
    #[arg(long)]
    all_linear: bool,
    /// Tokens before and in the step
    #[arg(long, default_value_t = 96)]
    context: usize,
    /// Steps of each configuration
    #[arg(long, default_value_t = 60)]
    steps: usize,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let scratch = tempfile::tempdir()?;
    let model = model(&arguments, scratch.path())?;
    let files = Arc::new(ModelFiles::open(&model, &Limits::default())?);
    let backend = Arc::new(Timed::new(Cpu::new(arguments.threads, Precision::Quantised, Isa::detect())?));
    let sequences_max = arguments.sequences.iter().copied().max().unwrap_or(1);
    let rows_max = sequences_max * arguments.new;
    let block_size = 16;
    let blocks = arguments.context.div_ceil(block_size);
    let options =
        LoadOptions { max_rows: rows_max, max_logit_rows: sequences_max, max_position: arguments.context, block_size };
    let model = Model::load(backend, Arc::clone(&files), &options, &mut |_, _| {})?;
    let backend = model.backend();
    let spec = model.attention_spec();

    let count = arguments.adapters.iter().copied().max().unwrap_or(0);
    let modules: &[Module] = if arguments.all_linear { &Module::IN_LAYER } else { &[Module::Q, Module::V] };
    let leases = register_random(scratch.path(), &files.shape(), arguments.rank, modules, count)?;
    let weights = leases.iter().map(Lease::load).collect::<Result<Vec<_>, _>>()?;
    let needed = weights.first().map_or(0, |weights| model.adapter_pages(&weights.sizes()));
    let kv = sequences_max * blocks;
    let mut pool = backend.new_pages(spec, model.layers(), kv + count * needed)?;
    let load = |(i, weights): (usize, &Arc<openlora_types::AdapterWeights>)| {
        let pages: Vec<u32> = (0..needed).map(|page| (kv + i * needed + page) as u32).collect();
        Ok(model.load_adapter(weights, backend.take_pages(&mut pool, &pages)?)?)
    };
    let loaded = weights.iter().enumerate().map(load).collect::<Result<Vec<_>>>()?;
    drop(weights);

    let mut act = model.new_activations()?;
    let mut sampled = Vec::new();
    let params = SamplingParams { temperature: 0.0, ..SamplingParams::default() };
    for &sequences in &arguments.sequences {
        let rows = sequences * arguments.new;
        let tokens: Vec<u32> = (0..rows).map(|row| 100 + (row * 7919 % (model.shape().vocab - 200)) as u32).collect();
        let first = arguments.context - arguments.new;
        let positions: Vec<u32> = (0..rows).map(|row| (first + row % arguments.new) as u32).collect();
        let spans: Vec<SequenceRows> = (0..sequences)
            .map(|i| SequenceRows { row: i * arguments.new, rows: arguments.new, table: i * blocks, blocks })
            .collect();
        let tables: Vec<u32> = (0..(sequences * blocks) as u32).collect();
        let step =
            StepRows { tokens: &tokens, drawn: &[], positions: &positions, sequences: &spans, block_tables: &tables };
        let wanted: Vec<u32> = (0..sequences).map(|i| ((i + 1) * arguments.new - 1) as u32).collect();
        let logit_rows: Vec<u32> = (0..sequences as u32).collect();
        let draws: Vec<_> = (0..sequences)
            .map(|_| SampleRow::Draw {
                params: &params,
                sample_index: 0,
                prompt: &[],
                generated: &[],
                banned: &[],
                top: 0,
            })
            .collect();
        let cases: Vec<usize> = arguments.adapters.iter().copied().filter(|&count| count <= sequences).collect();
        let mut times: Vec<Vec<[f64; Operation::COUNT + 1]>> = vec![Vec::new(); cases.len()];
        for round in 0..arguments.steps + 3 {
            for (case, &distinct) in cases.iter().enumerate() {
                // Neighbours by adapter, as the engine lays rows out.
                let adapter = |i: usize| (distinct > 0).then(|| &loaded[i * distinct / sequences]);
                let segments = |each: usize| -> Vec<LoraSegment<'_, _>> {
                    let segment = |i| LoraSegment { row: i * each, rows: each, adapter: adapter(i) };
                    let mut segments: Vec<LoraSegment<'_, _>> = Vec::new();
                    for i in 0..if distinct > 0 { sequences } else { 0 } {
                        let next = segment(i);
                        match segments.last_mut() {
                            Some(last)
                                if last.adapter.map(std::ptr::from_ref) == next.adapter.map(std::ptr::from_ref) =>
                            {
                                last.rows += each;
                            }
                            _ => segments.push(next),
                        }
                    }
                    segments
                };
                let (all, ends) = (segments(arguments.new), segments(1));
                backend.reset();
                let began = Instant::now();
                let lora = LoraRows { segments: &all };
                let wanted_lora = LoraRows { segments: &ends };
                model.forward(&mut act, &step, &lora, (&wanted, &wanted_lora), &mut pool)?;
                let logits = model.logits(&mut act, &logit_rows, &wanted_lora)?;
                backend.sample(logits, &draws, &mut sampled)?;
                if round >= 3 {
                    let mut time = [0.0; Operation::COUNT + 1];
                    time[0] = began.elapsed().as_secs_f64() * 1e3;
                    time[1..].copy_from_slice(&backend.milliseconds());
                    times[case].push(time);
                }
            }
        }
        print(&arguments, sequences, &cases, &times);
    }
    Ok(())
}

/// Where the weights are, written into `scratch` if they are random.
fn model(arguments: &Arguments, scratch: &Path) -> Result<PathBuf> {
    if let Some(name) = &arguments.shape {
        let path = scratch.join("model.gguf");
        Shape::named(name)?.write(&path)?;
        return Ok(path);
    }
    if let Some(model) = &arguments.model {
        return Ok(model.clone());
    }
    let home = std::env::var_os("HOME").context("HOME is not set and no --model given")?;
    Ok(PathBuf::from(home).join(".cache/openlora/models/SmolLM2-135M-Instruct.Q4_1.gguf"))
}

fn print(arguments: &Arguments, sequences: usize, cases: &[usize], times: &[Vec<[f64; Operation::COUNT + 1]>]) {
    println!(
        "\n{sequences} sequences, {} rows each, context {}, rank {}: milliseconds, median (best)",
        arguments.new, arguments.context, arguments.rank
    );
    print!("{:>12}", "adapters");
    cases.iter().for_each(|count| print!("{count:>18}"));
    println!();
    let names = std::iter::once("step").chain(Operation::ALL.iter().map(|operation| operation.name()));
    let mut base = (0.0, 0.0);
    for (i, name) in names.enumerate() {
        print!("{name:>12}");
        for (case, times) in times.iter().enumerate() {
            let mut all: Vec<f64> = times.iter().map(|time| time[i]).collect();
            all.sort_by(f64::total_cmp);
            let (median, best) = (all[all.len() / 2], all[0]);
            let figure = format!("{median:.3} ({best:.3})");
            print!("{figure:>18}");
            if i == 0 {
                if case == 0 {
                    base = (median, best);
                } else {
                    print!(" {:+.1}% ({:+.1}%)", (median / base.0 - 1.0) * 100.0, (best / base.1 - 1.0) * 100.0);
                }
            }
        }
        println!();
        if i == 0 {
            let rate = |time: f64| (sequences * arguments.new) as f64 / time * 1e3;
            print!("{:>12}", "rows/s");
            for times in times {
                let mut all: Vec<f64> = times.iter().map(|time| time[0]).collect();
                all.sort_by(f64::total_cmp);
                let figure = format!("{:.0} ({:.0})", rate(all[all.len() / 2]), rate(all[0]));
                print!("{figure:>18}");
            }
            println!();
        }
    }
}
