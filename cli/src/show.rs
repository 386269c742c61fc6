//! `openlora config`: what the settings are and where each came from.

use std::process::ExitCode;

use anyhow::Result;
use clap::Subcommand;
use serde_json::json;

use crate::{Global, config, load_config};

#[derive(Subcommand)]
pub(crate) enum ConfigCommand {
    /// Print every setting
    #[command(
        after_help = "Examples:\n  openlora config show --origin\n  openlora config show --default > openlora.toml"
    )]
    Show {
        /// Say where each value came from
        #[arg(long)]
        origin: bool,
        /// Print the commented defaults instead
        #[arg(long, conflicts_with = "origin")]
        default: bool,
    },
    /// Read the settings and say what is wrong with them
    #[command(after_help = "Example:\n  openlora config check --config openlora.toml")]
    Check,
}

pub(crate) fn run(global: &Global, command: &ConfigCommand) -> Result<ExitCode> {
    match command {
        ConfigCommand::Show { default: true, .. } => print!("{}", config::DEFAULT),
        ConfigCommand::Show { origin, .. } => {
            let loaded = load_config(global, &[])?;
            if global.json {
                let entries = loaded
                    .values
                    .iter()
                    .map(|(key, (value, origin))| (key.clone(), json!({"value": value, "origin": origin.to_string()})));
                println!("{}", serde_json::Value::Object(entries.collect()));
            } else {
                for (key, (value, from)) in &loaded.values {
                    if *origin { println!("{key} = {value}  # {from}") } else { println!("{key} = {value}") }
                }
            }
        }
        ConfigCommand::Check => {
            load_config(global, &[])?;
            if global.json { println!("{}", json!({"ok": true})) } else { println!("the settings are fine") }
        }
    }
    Ok(ExitCode::SUCCESS)
}
