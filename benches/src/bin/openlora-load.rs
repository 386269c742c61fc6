//! Load generator: concurrent streams against a running server, or the public workload.

use std::fs::File;
use std::io::{BufReader, BufWriter, IsTerminal, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::{Args, Parser, Subcommand};
use openlora_benches::load::{self, Load, Measured};
use openlora_benches::register::{self, Registration};
use openlora_benches::replay::{self, Group, Pace, Report, Target};
use openlora_benches::stats::Percentiles;
use openlora_benches::trace::{PRESETS, Trace, Workload, generate};
use openlora_model::ModelFiles;
use openlora_types::Limits;

#[derive(Parser)]
#[command(
    about = "Send concurrent requests to an OpenLoRA server and time every token",
    args_conflicts_with_subcommands = true,
    after_help = "Examples:
  openlora-load --concurrency 32 --requests 128
  openlora-load --adapter acme/a --adapter acme/b --json
  openlora-load register --trace smoke --model SmolLM2.gguf --folder /tmp/adapters
  openlora-load --trace smoke --metrics 127.0.0.1:8080
  openlora-load --trace zipf-10k --keys keys/        # keys/<tenant>, one file each"
)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    run: RunArgs,
}

#[derive(Subcommand)]
enum Command {
    /// Write random adapters with a trace's ranks into a folder and register them
    #[command(
        after_help = "Example:\n  openlora-load register --trace zipf-2k-r8 --model SmolLM2.gguf --folder /srv/adapters"
    )]
    Register(RegisterArgs),
    /// Write a workload's trace as a file
    #[command(after_help = "Example:\n  openlora-load write zipf-10k zipf-10k.jsonl")]
    Write {
        /// One of the workloads that `openlora-load workloads` lists
        workload: String,
        /// Where to
        file: PathBuf,
    },
    /// List the workloads
    Workloads,
}

#[derive(Args)]
struct ServerArgs {
    /// The server's gRPC address
    #[arg(long, env = "OPENLORA_SERVER", default_value = "http://127.0.0.1:50051")]
    server: String,
    /// File with the API key; or the key itself in OPENLORA_API_KEY
    #[arg(long, env = "OPENLORA_API_KEY_FILE")]
    api_key_file: Option<PathBuf>,
}

#[derive(Args)]
struct RunArgs {
    #[command(flatten)]
    server: ServerArgs,
    /// A workload by name, or a trace file
    #[arg(long)]
    trace: Option<String>,
    /// How many times as fast as the trace's times
    #[arg(long, default_value_t = 1.0)]
    speed: f64,
    /// Only so many requests of the trace
    #[arg(long)]
    first: Option<usize>,
    /// Folder with a file for each tenant of the trace that holds its API key
    #[arg(long)]
    keys: Option<PathBuf>,
    /// Address of the server's metrics page, for its counters in the report
    #[arg(long)]
    metrics: Option<String>,
    /// Aliases of a trace's adapters begin with this
    #[arg(long, default_value = "bench/a")]
    prefix: String,
    /// Requests in flight at any time; with a trace, its times are left aside
    #[arg(long)]
    concurrency: Option<usize>,
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

#[derive(Args)]
struct RegisterArgs {
    #[command(flatten)]
    server: ServerArgs,
    /// A workload by name, or a trace file
    #[arg(long)]
    trace: String,
    /// The served model's file: the adapters must fit it
    #[arg(long, env = "OPENLORA_MODEL_PATH")]
    model: PathBuf,
    /// Where the adapters are written; under a folder that the server may read (adapters.allowed_roots)
    #[arg(long)]
    folder: PathBuf,
    /// Aliases begin with this
    #[arg(long, default_value = "bench/a")]
    prefix: String,
    /// Registrations at once
    #[arg(long, default_value_t = 4)]
    concurrency: usize,
}

fn main() -> Result<()> {
    let cli = Cli::parse();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    match cli.command {
        Some(Command::Register(args)) => runtime.block_on(register(&args)),
        Some(Command::Write { workload, file }) => {
            let trace = generate(&Workload::preset(&workload)?)?;
            let out = BufWriter::new(File::create(&file).with_context(|| file.display().to_string())?);
            trace.write(out)?;
            eprintln!("{}: {} requests", file.display(), trace.requests.len());
            Ok(())
        }
        Some(Command::Workloads) => {
            for (name, what) in PRESETS {
                println!("{name:14} {what}");
            }
            Ok(())
        }
        None if cli.run.trace.is_some() => runtime.block_on(replay(&cli.run)),
        None => runtime.block_on(closed(&cli.run)),
    }
}

impl ServerArgs {
    fn key(&self) -> Result<String> {
        let key = match &self.api_key_file {
            Some(path) => read_key(path)?,
            None => std::env::var("OPENLORA_API_KEY").unwrap_or_default(),
        };
        Ok(key.trim().to_owned())
    }
}

fn read_key(path: &Path) -> Result<String> {
    let key = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
    Ok(key.trim().to_owned())
}

/// A workload's name or a trace file.
fn open_trace(name: &str) -> Result<Trace> {
    let path = Path::new(name);
    if !path.is_file() {
        return generate(&Workload::preset(name)?);
    }
    let file = File::open(path).with_context(|| name.to_owned())?;
    Trace::read(BufReader::new(file)).with_context(|| name.to_owned())
}

async fn register(args: &RegisterArgs) -> Result<()> {
    let trace = open_trace(&args.trace)?;
    let files = ModelFiles::open(&args.model, &Limits::default())?;
    let registration = Registration {
        url: args.server.server.clone(),
        key: args.server.key()?,
        folder: args.folder.clone(),
        prefix: args.prefix.clone(),
        concurrency: args.concurrency,
    };
    let ranks = &trace.header.adapter_ranks;
    register::write(ranks, &files.shape(), &args.folder, |done| show("written", done, ranks.len()))?;
    let seconds = register::register(ranks.len(), &registration, |done| show("registered", done, ranks.len())).await?;
    println!("{} adapters registered in {seconds:.1} s, {:.0} per second", ranks.len(), ranks.len() as f64 / seconds);
    Ok(())
}

async fn replay(args: &RunArgs) -> Result<()> {
    let mut trace = open_trace(args.trace.as_deref().unwrap_or_default())?;
    trace.requests.truncate(args.first.unwrap_or(usize::MAX));
    let tenants = &trace.header.workload.tenants;
    let keys = match &args.keys {
        Some(folder) => tenants.iter().map(|tenant| read_key(&folder.join(&tenant.name))).collect::<Result<_>>()?,
        None => vec![args.server.key()?; tenants.len()],
    };
    let target = Target {
        url: args.server.server.clone(),
        metrics: args.metrics.clone(),
        keys,
        prefix: args.prefix.clone(),
        vocab: args.vocab,
    };
    let pace = match args.concurrency {
        Some(0) => bail!("--concurrency must be at least 1"),
        Some(concurrency) => Pace::Closed(concurrency),
        None if args.speed > 0.0 => Pace::Timed(args.speed),
        None => bail!("--speed must be more than 0"),
    };
    let all = trace.requests.len();
    let report = replay::run(&trace, &target, pace, |done| show("answered", done, all)).await?;
    if args.json {
        println!("{}", serde_json::to_string(&report)?)
    } else {
        print_report(&report)
    }
    match report.classes[0].failed {
        0 => Ok(()),
        failed => bail!("{failed} requests failed"),
    }
}

async fn closed(args: &RunArgs) -> Result<()> {
    let load = Load {
        concurrency: args.concurrency.unwrap_or(32),
        requests: args.requests,
        adapters: args.adapter.clone(),
        prompt_tokens: args.prompt_tokens,
        answer_tokens: args.answer_tokens,
        vocab: args.vocab,
        seed: args.seed,
    };
    let measured = load::run(&args.server.server, &args.server.key()?, &load).await?;
    if args.json {
        println!("{}", serde_json::to_string(&measured)?)
    } else {
        print_measured(&measured)
    }
    match measured.errors.len() {
        0 => Ok(()),
        failed => bail!("{failed} requests failed"),
    }
}

fn print_measured(measured: &Measured) {
    println!(
        "{:.0} tokens/s, {:.1} requests/s over {:.1} s",
        measured.tokens_per_s, measured.requests_per_s, measured.seconds
    );
    print_times("first token", &measured.ttft_ms);
    print_times("between tokens", &measured.inter_token_ms);
    print_times("whole request", &measured.e2e_ms);
    for error in measured.errors.iter().take(5) {
        println!("failed: {error}");
    }
}

fn print_times(name: &str, times: &Percentiles) {
    println!("{name:15} p50 {:8.1} ms  p95 {:8.1} ms  p99 {:8.1} ms", times.p50, times.p95, times.p99);
}

fn print_report(report: &Report) {
    println!(
        "{}: {:.0} tokens/s, {:.2} requests/s over {:.1} s, Jain's index {:.3}",
        report.workload.name, report.tokens_per_s, report.requests_per_s, report.seconds, report.jain
    );
    println!("                 answered failed  tok/s open   TTFT p50   p95   p99   between p50   p95   p99  (ms)");
    let row = |group: &Group| {
        let (first, between) = (&group.ttft_ms, &group.inter_token_ms);
        println!(
            "{:16} {:8} {:6} {:11.1} {:10.1} {:5.0} {:5.0} {:13.1} {:5.0} {:5.0}",
            group.name,
            group.answered,
            group.failed,
            group.service_tokens_per_s,
            first.p50,
            first.p95,
            first.p99,
            between.p50,
            between.p95,
            between.p99
        );
    };
    report.classes.iter().for_each(row);
    report.tenants.iter().for_each(row);
    for (name, by) in report.server.iter().filter(|(name, _)| name.contains("adapter") || name.contains("prefix")) {
        println!("{name} +{by}");
    }
    for (error, times) in &report.errors {
        println!("failed {times} times: {error}");
    }
}

/// One line that counts up, on terminals only.
fn show(what: &str, done: usize, all: usize) {
    let mut out = std::io::stderr();
    if out.is_terminal() && (done.is_multiple_of(16) || done == all) {
        let _ = write!(out, "\r{done} of {all} {what} {}", if done == all { "\n" } else { "" });
    }
}
