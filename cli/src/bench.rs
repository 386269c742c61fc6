//! `openlora bench`: the engine on this machine, beside the machine's own ceilings.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Args;
use openlora_adapters::Lease;
use openlora_benches::adapters::register_random;
use openlora_benches::engine_bench::{Outcome, Workload, measure};
use openlora_engine::EngineHandle;
use openlora_kernels::cpu::ceilings;
use openlora_types::Module;
use serde_json::json;
use toml::Value;

use crate::{Global, device, gpu_bench, load_config, serve};

#[derive(Args)]
#[command(after_help = "Examples:
  openlora bench
  openlora bench --sequences 1,8,32 --adapters 0,32 --json
  openlora bench --device cuda --out benches/runs/today")]
pub(crate) struct BenchArgs {
    /// The processor, or a GPU: its kernels and whole steps on random weights; of the other flags only --budget and --out are for it
    #[arg(long, default_value = "cpu", value_name = "cpu|cuda:N")]
    device: String,
    /// Seconds after which nothing more is begun on a GPU
    #[arg(long, default_value_t = 300)]
    budget: u64,
    /// A GGUF file or a Hugging Face folder
    #[arg(long, value_name = "PATH")]
    model: Option<String>,
    /// Sequences at once
    #[arg(long, value_delimiter = ',', default_values_t = [1, 8, 32])]
    sequences: Vec<usize>,
    /// Distinct adapters in the batch; 0 is the base model alone
    #[arg(long, value_delimiter = ',', default_values_t = [0, 1, 32])]
    adapters: Vec<usize>,
    /// Rank of the random adapters
    #[arg(long, default_value_t = 8)]
    rank: usize,
    /// Adapt all seven linears instead of q and v
    #[arg(long)]
    all_linear: bool,
    /// Tokens of a prompt
    #[arg(long, default_value_t = 64)]
    prompt_tokens: usize,
    /// Tokens of an answer
    #[arg(long, default_value_t = 32)]
    answer_tokens: usize,
    /// Times each figure is measured; the best is shown, all are in the JSON
    #[arg(long, default_value_t = 3)]
    repetitions: usize,
    /// Write results.json and table.md into this folder
    #[arg(long, value_name = "FOLDER")]
    out: Option<PathBuf>,
}

pub(crate) fn run(global: &Global, args: &BenchArgs) -> Result<ExitCode> {
    if args.device != "cpu" {
        return gpu_bench::run(global, &args.device, args.budget, args.out.as_deref());
    }
    let mut flags = vec![
        ("engine.prefix_cache", "bench", Value::Boolean(false)),
        ("engine.device", "bench", Value::String("cpu".into())),
    ];
    flags.extend(args.model.clone().map(|model| ("model.path", "--model", Value::String(model))));
    let config = load_config(global, &flags)?.config;
    eprintln!("measuring this machine's ceilings …");
    let ceilings = ceilings::measure(config.engine.threads)?;
    let measured = json!({"read_gb_per_s": ceilings.read_g_per_s, "int8_g_per_s": ceilings.int8_g_per_s, "f32_g_per_s": ceilings.f32_g_per_s});
    let ceilings = format!(
        "read {:.1} GB/s, int8 {:.0} G multiply-adds/s, f32 {:.0} G multiply-adds/s",
        ceilings.read_g_per_s, ceilings.int8_g_per_s, ceilings.f32_g_per_s
    );
    let files = serve::open_model(&config)?;
    let chosen = device::choose(&config)?;
    let engine_config = device::engine_config(&config, chosen.0);
    let engine = device::load(&config, &files, chosen, &engine_config)?.start_engine(engine_config)?;
    let scratch = tempfile::tempdir().context("a folder for the random adapters")?;
    let count = args.adapters.iter().copied().max().unwrap_or(0);
    eprintln!("writing {count} random adapters …");
    let modules: &[Module] = if args.all_linear { &Module::IN_LAYER } else { &[Module::Q, Module::V] };
    let leases = register_random(scratch.path(), &files.shape(), args.rank, modules, count)?;
    let mut outcomes = Vec::new();
    let mut table = String::from("| sequences | adapters | prefill tok/s | decode tok/s |\n|---|---|---|---|\n");
    if !global.json {
        print!("{table}");
    }
    for &sequences in &args.sequences {
        for &adapters in args.adapters.iter().filter(|&&adapters| adapters <= sequences.max(1)) {
            let outcome = one(args, &engine, &leases, files.shape().vocab, sequences, adapters)?;
            let line = format!(
                "| {sequences} | {adapters} | {:.0} | {:.0} |\n",
                outcome.prefill_tokens_per_s, outcome.decode_tokens_per_s
            );
            if !global.json {
                print!("{line}");
            }
            table.push_str(&line);
            outcomes.push(outcome);
        }
    }
    let result = json!({
        "model": files.shape().name,
        "backend": engine.describe(),
        "ceilings": measured,
        "rank": args.rank,
        "modules": if args.all_linear { "all-linear" } else { "q_proj,v_proj" },
        "outcomes": outcomes,
    });
    if global.json {
        println!("{result}");
    } else {
        println!("{}: {ceilings}", engine.describe());
    }
    if let Some(out) = &args.out {
        std::fs::create_dir_all(out).with_context(|| out.display().to_string())?;
        std::fs::write(out.join("results.json"), serde_json::to_string_pretty(&result)?)?;
        std::fs::write(out.join("table.md"), format!("{}: {ceilings}\n\n{table}", engine.describe()))?;
    }
    engine.shutdown();
    Ok(ExitCode::SUCCESS)
}

fn one(
    args: &BenchArgs,
    engine: &EngineHandle,
    leases: &[Lease],
    vocab: usize,
    sequences: usize,
    adapters: usize,
) -> Result<Outcome> {
    let workload =
        Workload { sequences, adapters, prompt_tokens: args.prompt_tokens, answer_tokens: args.answer_tokens };
    measure(engine, leases, vocab, workload, args.repetitions)
}
