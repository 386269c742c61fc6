//! `openlora chain`: the contracts onto a chain, or onto one of one's own.

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::{Args, Subcommand};
use openlora_database::{Database, DatabaseUrl};
use openlora_settlement::chain::Chain;
use openlora_settlement::contracts;
use openlora_settlement::deploy::{Deployment, Plan, deploy};
use openlora_settlement::dev::{Anvil, CHAIN_ID};
use openlora_settlement::keys::{Password, Signer};
use openlora_settlement::outbox::SCHEMA;
use openlora_settlement::sender::{Sender, SenderConfig};
use openlora_settlement::{RpcConfig, RpcUrl};

use crate::config::{self, Config};
use crate::{Global, block_on, ledger, load_config, shutdown_signal};

/// The version of anvil that scripts/fetch-anvil.sh fetches.
const ANVIL: &str = "anvil/1.7.1/anvil";
/// Wei that the account of a local chain begins with: 10,000 ether.
const RICH: u128 = 10_000 * 1_000_000_000_000_000_000;

#[derive(Subcommand)]
pub(crate) enum ChainCommand {
    /// Start a local OP-style chain, deploy everything, print the addresses; Ctrl-C ends it
    Dev(DevArgs),
    /// Make a key that pays: an encrypted keystore and its password, where the settings say; prints its account
    #[command(after_help = "Example:
  openlora chain key
The password's file is made with it, unless it is there already.")]
    Key,
    /// Deploy everything with the key of the settings; goes on where a deployment was cut off
    Deploy(DeployArgs),
}

#[derive(Args)]
#[command(after_help = "Example:
  openlora chain dev
  # in another terminal, with the lines it prints:
  openlora settle status")]
pub(crate) struct DevArgs {
    /// Where it listens on this machine; 0 for a free port
    #[arg(long, default_value_t = 8545)]
    port: u16,
    /// Seconds in which a proposal can be challenged
    #[arg(long, default_value_t = 5)]
    window: u32,
}

#[derive(Args)]
#[command(after_help = "Example:
  openlora chain deploy --rpc https://sepolia.base.org --chain-id 84532
Set settlement.keystore and settlement.password_file first (`openlora chain key` makes both); the key's account begins as proposer, arbiter and holder.")]
pub(crate) struct DeployArgs {
    /// The node; settlement.rpc_url when left out
    #[arg(long, value_name = "URL")]
    rpc: Option<String>,
    /// The chain's EIP-155 id; settlement.chain_id when left out
    #[arg(long)]
    chain_id: Option<u64>,
    /// Seconds in which a proposal can be challenged
    #[arg(long, default_value_t = 86_400)]
    window: u32,
    /// Names this deployment among others of the same key
    #[arg(long, default_value = "1")]
    label: String,
}

pub(crate) fn run(global: &Global, command: &ChainCommand) -> Result<ExitCode> {
    match command {
        ChainCommand::Key => key(global),
        ChainCommand::Dev(args) => block_on(dev(global, args)),
        ChainCommand::Deploy(args) => block_on(deployed(global, args)),
    }
}

/// The local chain's program under `home`.
pub(crate) fn anvil(home: &Path) -> Result<PathBuf> {
    let program = home.join(ANVIL);
    if !program.exists() {
        bail!("there is no {}; run scripts/fetch-anvil.sh", program.display());
    }
    Ok(program)
}

async fn dev(global: &Global, args: &DevArgs) -> Result<ExitCode> {
    let home = config::home()?;
    let program = anvil(&home)?;
    // Everything of a chain that is gone is of no use to the next.
    let folder = home.join("chain-dev");
    if folder.exists() {
        fs::remove_dir_all(&folder).with_context(|| folder.display().to_string())?;
    }
    fs::create_dir_all(&folder).with_context(|| folder.display().to_string())?;
    let mut anvil = Anvil::start(&program, args.port)?;
    let (keystore, password) = (folder.join("keystore.json"), folder.join("password"));
    let signer = new_key(&keystore, &password)?;
    anvil.fund(signer.address(), RICH).await?;
    let chain = open_chain(&anvil.url(), CHAIN_ID).await?;
    let database = DatabaseUrl::sqlite(&folder.join("settlement.db"));
    let sender = sender(chain, signer, &database).await?;
    let plan = Plan::local(sender.account(), args.window);
    let deployment = deploy_all(&sender, "dev", &plan).await?;
    sender.close().await?;
    let settings = format!(
        "export OPENLORA_SETTLEMENT_RPC_URL={}\nexport OPENLORA_SETTLEMENT_CHAIN_ID={CHAIN_ID}\n\
         export OPENLORA_SETTLEMENT_CONTRACT={}\nexport OPENLORA_SETTLEMENT_KEYSTORE={}\n\
         export OPENLORA_SETTLEMENT_PASSWORD_FILE={}\nexport OPENLORA_SETTLEMENT_DATABASE_URL=sqlite://{}\n",
        anvil.url(),
        deployment.settlement,
        keystore.display(),
        password.display(),
        folder.join("settlement.db").display(),
    );
    fs::write(folder.join("settings.sh"), &settings).with_context(|| folder.display().to_string())?;
    print_deployment(global, &deployment)?;
    if !global.json {
        println!("\n{settings}# or: source {}", folder.join("settings.sh").display());
    }
    std::io::stdout().flush()?;
    let mut ended = std::pin::pin!(shutdown_signal());
    loop {
        tokio::select! {
            () = &mut ended => return Ok(ExitCode::SUCCESS),
            () = tokio::time::sleep(Duration::from_millis(500)) => {
                if anvil.has_ended()? {
                    bail!("the local chain ended by itself");
                }
            }
        }
    }
}

fn key(global: &Global) -> Result<ExitCode> {
    let config = load_config(global, &[])?.config;
    let (keystore, password) = key_files(&config)?;
    let account = new_key(keystore, password)?.address();
    if global.json {
        println!("{}", serde_json::json!({"account": account}));
    } else {
        println!("account     {account}");
        eprintln!("{} and {} together are the key: keep both, apart", keystore.display(), password.display());
    }
    Ok(ExitCode::SUCCESS)
}

/// A key in a new keystore, whose password nobody has typed unless its file is there already.
fn new_key(keystore: &Path, password: &Path) -> Result<Signer> {
    if !password.exists() {
        let text: String = (0..4).map(|_| format!("{:016x}", rand::random::<u64>())).collect();
        let made = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(password);
        let mut file = made.with_context(|| password.display().to_string())?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
    }
    Ok(Signer::create(keystore, &Password::read(password)?)?)
}

/// Keystore and password file of the settings.
pub(crate) fn key_files(config: &Config) -> Result<(&Path, &Path)> {
    let settings = &config.settlement;
    if settings.keystore.as_os_str().is_empty() || settings.password_file.as_os_str().is_empty() {
        bail!(
            "settlement.keystore and settlement.password_file must be set: an encrypted keystore and a file with its \
             password; `openlora chain key` makes both"
        );
    }
    Ok((&settings.keystore, &settings.password_file))
}

/// The key of the settings.
pub(crate) async fn configured_signer(config: &Config) -> Result<Signer> {
    let settings = &config.settlement;
    if settings.kms_key.is_empty() {
        let (keystore, password) = key_files(config)?;
        return Ok(Signer::open(keystore, &Password::read(password)?)?);
    }
    if !settings.keystore.as_os_str().is_empty() {
        bail!("settlement.kms_key and settlement.keystore are both set; leave one of them empty");
    }
    kms(&settings.kms_key).await
}

#[cfg(feature = "aws-kms")]
async fn kms(key: &str) -> Result<Signer> {
    Ok(Signer::kms(key).await?)
}

#[cfg(not(feature = "aws-kms"))]
async fn kms(_key: &str) -> Result<Signer> {
    bail!("settlement.kms_key is set, and this program was built without AWS KMS; build it with `--features aws-kms`")
}

async fn deployed(global: &Global, args: &DeployArgs) -> Result<ExitCode> {
    let mut config = load_config(global, &[])?.config;
    if let Some(rpc) = &args.rpc {
        config.settlement.rpc_url.clone_from(rpc);
    }
    config.settlement.chain_id = args.chain_id.unwrap_or(config.settlement.chain_id);
    let sender = configured_sender(&config).await?;
    let mut plan = Plan::new(sender.account());
    plan.challenge_window = args.window;
    let deployment = deploy_all(&sender, &args.label, &plan).await?;
    sender.close().await?;
    print_deployment(global, &deployment)?;
    eprintln!("set settlement.contract to {}", deployment.settlement);
    Ok(ExitCode::SUCCESS)
}

async fn deploy_all(sender: &Sender, label: &str, plan: &Plan) -> Result<Deployment> {
    eprintln!("deploying from {}", sender.account());
    let mut told = |what: &str, address| match address {
        Some(address) => eprintln!("  {what} at {address}"),
        None => eprintln!("  {what}"),
    };
    Ok(deploy(sender, label, plan, &mut told).await?)
}

fn print_deployment(global: &Global, deployment: &Deployment) -> Result<()> {
    if global.json {
        println!("{}", serde_json::to_string(deployment)?);
        return Ok(());
    }
    let Deployment { chain_id, token, timelock, governor, settlement, datanets, models } = deployment;
    println!("chain       {chain_id}\ntoken       {token}\ntimelock    {timelock}\ngovernor    {governor}");
    println!("settlement  {settlement}\ndatanets    {datanets}\nmodels      {models}");
    Ok(())
}

/// A node of the chain with this id.
pub(crate) async fn open_chain(url: &str, id: u64) -> Result<Chain> {
    let url = RpcUrl::parse("settlement.rpc_url", url)?;
    Ok(Chain::open(&url, id, RpcConfig::default(), contracts::describe).await?)
}

/// What sends with the key of the settings.
pub(crate) async fn configured_sender(config: &Config) -> Result<Sender> {
    let signer = configured_signer(config).await?;
    let chain = configured_chain(config).await?;
    let settings = &config.settlement;
    let file = &settings.default_file;
    let database = ledger::database_url("settlement.database_url", &settings.database_url, file)?;
    sender(chain, signer, &database).await
}

/// The node of the settings.
pub(crate) async fn configured_chain(config: &Config) -> Result<Chain> {
    let settings = &config.settlement;
    if settings.rpc_url.is_empty() || settings.chain_id == 0 {
        bail!(
            "settlement.rpc_url and settlement.chain_id must be set; `openlora chain dev` starts a local chain and says how"
        );
    }
    open_chain(&settings.rpc_url, settings.chain_id).await
}

async fn sender(chain: Chain, signer: Signer, database: &DatabaseUrl) -> Result<Sender> {
    let database = Database::open(database, SCHEMA).await.context("settlement.database_url")?;
    let poll = Duration::from_millis(if chain.id() == CHAIN_ID { 200 } else { 2_000 });
    Ok(Sender::new(chain, signer, Arc::new(database), SenderConfig { poll, ..SenderConfig::default() }))
}
