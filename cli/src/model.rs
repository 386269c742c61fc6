//! `openlora model inspect`: what a model file holds.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Subcommand;
use openlora_model::ModelFiles;
use serde_json::json;

use crate::{Global, load_config};

#[derive(Subcommand)]
pub(crate) enum ModelCommand {
    /// Show a model's family, sizes and tensors
    #[command(after_help = "Examples:\n  openlora model inspect\n  openlora model inspect ./Qwen2.5-0.5B --tensors")]
    Inspect {
        /// GGUF file or Hugging Face folder; the configured model when left out
        path: Option<PathBuf>,
        /// List every tensor
        #[arg(long)]
        tensors: bool,
    },
}

pub(crate) fn run(global: &Global, command: &ModelCommand) -> Result<ExitCode> {
    let ModelCommand::Inspect { path, tensors } = command;
    let config = load_config(global, &[])?.config;
    let path = path.as_ref().unwrap_or(&config.model.path);
    let files = ModelFiles::open(path, &config.limits)
        .with_context(|| format!("model {}; scripts/fetch-model.sh fetches the default one", path.display()))?;
    let (shape, architecture) = (files.shape(), files.config().architecture);
    let listed: Vec<_> = files.tensors().collect();
    if global.json {
        let tensors = listed.iter().map(|tensor| {
            json!({"name": tensor.name, "shape": tensor.shape, "format": tensor.format.name(), "bytes": tensor.bytes})
        });
        println!(
            "{}",
            json!({
                "architecture": architecture.to_string(),
                "shape": shape,
                "eos_tokens": files.config().eos_tokens,
                "has_chat_template": files.chat_template()?.is_some(),
                "tensors": tensors.collect::<Vec<_>>(),
            })
        );
        return Ok(ExitCode::SUCCESS);
    }
    println!("{} ({architecture})", shape.name);
    println!("layers {}, hidden {}, feed-forward {}", shape.layers, shape.hidden, shape.intermediate);
    println!("heads {} of {}, key/value heads {}", shape.heads, shape.head_dim, shape.kv_heads);
    println!("vocabulary {}, context {}", shape.vocab, shape.context);
    println!("output head {}", if shape.tied_head { "tied to the embedding" } else { "of its own" });
    println!("chat template {}", if files.chat_template()?.is_some() { "yes" } else { "none" });
    let bytes: u64 = listed.iter().map(|tensor| tensor.bytes).sum();
    println!("{} tensors, {bytes} bytes", listed.len());
    if *tensors {
        for tensor in &listed {
            println!("  {:45} {:6} {:?}", tensor.name, tensor.format.name(), tensor.shape);
        }
    }
    Ok(ExitCode::SUCCESS)
}
