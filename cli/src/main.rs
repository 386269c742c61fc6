//! The one binary. Every command is a file of its own; `serve.rs` is the composition root, where the rooms are put
//! together; `config.rs` has the settings. Commands that talk to a server go through `client.rs`.
//!
//! Exit codes: 0 done, 1 failed, 2 wrong usage. Answers go to standard output, progress and errors to standard error.

mod adapter;
mod bench;
mod chain;
mod check;
mod client;
mod config;
mod desk;
mod device;
mod doctor;
mod generate;
mod gpu;
mod gpu_bench;
mod gpu_check;
mod key;
mod ledger;
mod model;
mod serve;
mod settle;
mod show;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::{Args, CommandFactory, Parser, Subcommand};

#[derive(Parser)]
#[command(
    name = "openlora",
    version,
    about = "Serve one base model with thousands of LoRA adapters in the same batch",
    after_help = "Examples:\n  openlora serve\n  openlora generate --adapter acme/cwe \"What is CWE-79?\"\n  openlora adapter add acme/cwe ./my-peft-folder\n\nEvery command has --help with examples of its own."
)]
struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

#[derive(Args)]
pub(crate) struct Global {
    /// Settings file; see `openlora config show`
    #[arg(long, global = true, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Print JSON instead of text
    #[arg(long, global = true)]
    json: bool,
}

#[derive(Subcommand)]
enum Command {
    /// Start the server
    Serve(serve::ServeArgs),
    /// Ask the model or an adapter; the answer streams to the terminal
    Generate(generate::GenerateArgs),
    /// Register, list, remove, inspect, check and verify adapters
    #[command(subcommand)]
    Adapter(adapter::AdapterCommand),
    /// Look into model files
    #[command(subcommand)]
    Model(model::ModelCommand),
    /// Make and list API keys
    #[command(subcommand)]
    Key(key::KeyCommand),
    /// What applications prepaid, what requests cost, what is owed to whom
    #[command(subcommand)]
    Ledger(ledger::LedgerCommand),
    /// Bring epochs of the ledger to the chain, and to those they pay
    #[command(subcommand)]
    Settle(settle::SettleCommand),
    /// Deploy the contracts; a local chain to try them on
    #[command(subcommand)]
    Chain(chain::ChainCommand),
    /// Measure prefill and decode beside this machine's ceilings
    Bench(bench::BenchArgs),
    /// Check a GPU's answers: kernels, whole models, adapters that come and go
    GpuCheck(gpu_check::GpuCheckArgs),
    /// Check the set-up; every line is ok or names the command that fixes it
    Doctor(doctor::DoctorArgs),
    /// Show or check the settings
    #[command(subcommand)]
    Config(show::ConfigCommand),
    /// Print a shell's completion script
    #[command(after_help = "Example:\n  openlora completions bash > /etc/bash_completion.d/openlora")]
    Completions {
        /// Which shell
        shell: clap_complete::Shell,
    },
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(cli) {
        Ok(code) => code,
        Err(error) => {
            // A closed pipe is the reader's way of saying that it has enough.
            let closed = error.chain().any(|cause| {
                cause.downcast_ref::<std::io::Error>().is_some_and(|e| e.kind() == std::io::ErrorKind::BrokenPipe)
            });
            if closed {
                return ExitCode::SUCCESS;
            }
            eprintln!("openlora: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli) -> Result<ExitCode> {
    let global = &cli.global;
    match cli.command {
        Command::Serve(args) => serve::run(global, &args),
        Command::Generate(args) => generate::run(global, &args),
        Command::Adapter(command) => adapter::run(global, &command),
        Command::Model(command) => model::run(global, &command),
        Command::Key(command) => key::run(global, &command),
        Command::Ledger(command) => ledger::run(global, &command),
        Command::Settle(command) => settle::run(global, &command),
        Command::Chain(command) => chain::run(global, &command),
        Command::Bench(args) => bench::run(global, &args),
        Command::GpuCheck(args) => gpu_check::run(global, &args),
        Command::Doctor(args) => doctor::run(global, &args),
        Command::Config(command) => show::run(global, &command),
        Command::Completions { shell } => {
            clap_complete::generate(shell, &mut Cli::command(), "openlora", &mut std::io::stdout());
            Ok(ExitCode::SUCCESS)
        }
    }
}

/// The settings for this call: file, environment, then `flags`.
pub(crate) fn load_config(global: &Global, flags: &[config::Flag]) -> Result<config::Loaded> {
    config::load(global.config.as_deref(), std::env::vars(), flags, &config::home()?)
}

/// A runtime for commands that talk to a server.
pub(crate) fn block_on<T>(future: impl Future<Output = Result<T>>) -> Result<T> {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?.block_on(future)
}

/// Resolves on SIGTERM or Ctrl-C.
pub(crate) async fn shutdown_signal() {
    let terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate());
    match terminate {
        Ok(mut terminate) => tokio::select! {
            _ = terminate.recv() => {}
            _ = tokio::signal::ctrl_c() => {}
        },
        Err(error) => {
            tracing::warn!(%error, "no handler for SIGTERM; Ctrl-C still stops the server");
            let _ = tokio::signal::ctrl_c().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_command_explains_itself_with_an_example() {
        fn walk(command: &clap::Command, path: &str) {
            assert!(command.get_about().is_some(), "{path} says what it does");
            if command.has_subcommands() {
                for child in command.get_subcommands().filter(|child| child.get_name() != "help") {
                    walk(child, &format!("{path} {}", child.get_name()));
                }
            } else {
                let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
                assert!(help.contains("Example") && help.contains("openlora "), "{path} --help has an example");
            }
        }
        Cli::command().debug_assert();
        walk(&Cli::command(), "openlora");
    }
}
