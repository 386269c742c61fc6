//! `openlora key`: API keys. A key is printed once; the file keeps its hash.

use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Subcommand;
use openlora_server::keys::{KeyStore, Role};
use serde_json::json;

use crate::{Global, load_config};

#[derive(Subcommand)]
pub(crate) enum KeyCommand {
    /// Make a key, print it once and keep its hash; a running server knows it within a second
    #[command(after_help = "Example:\n  openlora key create --role owner --name acme")]
    Create {
        /// What it may do: app asks, owner also registers adapters under its name, contributor sees what its data earned,
        /// operator sees metrics and settles epochs, admin may all
        #[arg(long)]
        role: Role,
        /// Who it is: an owner's aliases start with it
        #[arg(long)]
        name: String,
    },
    /// List the keys: names and roles, never the keys themselves
    #[command(after_help = "Example:\n  openlora key ls")]
    Ls,
    /// Revoke a key
    #[command(after_help = "Example:\n  openlora key rm acme")]
    Rm {
        /// Whose, or one key's id as `key ls` shows it
        name: String,
    },
}

pub(crate) fn run(global: &Global, command: &KeyCommand) -> Result<ExitCode> {
    let config = load_config(global, &[])?.config;
    let path = &config.server.keys_file;
    let store = KeyStore::open(path).with_context(|| format!("keys file {}", path.display()))?;
    match command {
        KeyCommand::Create { role, name } => {
            let secret = store.create(name, *role).with_context(|| format!("keys file {}", path.display()))?;
            if global.json {
                println!("{}", json!({"name": name, "role": role.to_string(), "key": secret.reveal()}));
            } else {
                println!("{}", secret.reveal());
                eprintln!("this is shown once; use it as: export OPENLORA_API_KEY=…");
            }
        }
        KeyCommand::Ls => {
            let keys = store.list().with_context(|| format!("keys file {}", path.display()))?;
            if global.json {
                let keys =
                    keys.iter().map(|key| json!({"name": key.name, "role": key.role.to_string(), "id": key.id()}));
                println!("{}", serde_json::Value::Array(keys.collect()));
            } else {
                for key in keys {
                    println!("{:24} {:11} {}", key.name, key.role.to_string(), key.id());
                }
            }
        }
        KeyCommand::Rm { name } => {
            let revoked = store.revoke(name).with_context(|| format!("keys file {}", path.display()))?;
            if revoked == 0 {
                anyhow::bail!("no key is named {name}; `openlora key ls` lists them");
            }
            if global.json {
                println!("{}", json!({"name": name, "revoked": revoked}));
            } else {
                println!("{revoked} revoked");
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}
