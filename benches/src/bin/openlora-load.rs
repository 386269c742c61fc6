//! Load generator: concurrent streams against a running server.

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Parser;
use openlora_benches::load::{self, Load};

#[derive(Parser)]
#[command(
    about = "Send concurrent requests to an OpenLoRA server and time every token",
    after_help = "Examples:\n  openlora-load --concurrency 32 --requests 128\n  openlora-load --adapter acme/a --adapter acme/b --json"
)]
struct Args {
    /// The server's gRPC address
    #[arg(long, env = "OPENLORA_SERVER", default_value = "http://127.0.0.1:50051")]
    server: String,
    /// File with the API key; or the key itself in OPENLORA_API_KEY
    #[arg(long, env = "OPENLORA_API_KEY_FILE")]
    api_key_file: Option<PathBuf>,
    /// Requests in flight at any time
    #[arg(long, default_value_t = 32)]
    concurrency: usize,
    /// Requests in all
    #[arg(long, default_value_t = 64)]
    requests: usize,
    /// Aliases, dealt to the requests in turn; the base model when left out
    #[arg(long)]
    adapter: Vec<String>,
    /// Tokens of a prompt, drawn at random
    #[arg(long, default_value_t = 64)]
    prompt_tokens: usize,
    /// Tokens of an answer
    #[arg(long, default_value_t = 32)]
    answer_tokens: usize,
    /// Token ids are drawn below this
    #[arg(long, default_value_t = 49_000)]
    vocab: u32,
    /// Start of the random sequence
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

fn main() -> Result<()> {
    let args = Args::parse();
    let key = match &args.api_key_file {
        Some(path) => std::fs::read_to_string(path).with_context(|| path.display().to_string())?,
        None => std::env::var("OPENLORA_API_KEY").unwrap_or_default(),
    };
    let load = Load {
        concurrency: args.concurrency,
        requests: args.requests,
        adapters: args.adapter,
        prompt_tokens: args.prompt_tokens,
        answer_tokens: args.answer_tokens,
        vocab: args.vocab,
        seed: args.seed,
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let measured = runtime.block_on(load::run(&args.server, key.trim(), &load))?;
    if args.json {
        println!("{}", serde_json::to_string(&measured)?);
    } else {
        println!(
            "{:.0} tokens/s, {:.1} requests/s over {:.1} s",
            measured.tokens_per_s, measured.requests_per_s, measured.seconds
        );
        for (name, p) in [
            ("first token", measured.ttft_ms),
            ("between tokens", measured.inter_token_ms),
            ("whole request", measured.e2e_ms),
        ] {
            println!("{name:15} p50 {:8.1} ms  p95 {:8.1} ms  p99 {:8.1} ms", p.p50, p.p95, p.p99);
        }
        for error in measured.errors.iter().take(5) {
            println!("failed: {error}");
        }
    }
    if measured.errors.is_empty() { Ok(()) } else { anyhow::bail!("{} requests failed", measured.errors.len()) }
}
