//! `openlora ledger`: what applications prepaid, what requests cost, what is owed to whom.

use std::io::BufRead as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use clap::Subcommand;
use futures_util::{StreamExt as _, stream};
use indicatif::{ProgressBar, ProgressStyle};
use openlora_database::DatabaseUrl;
use openlora_ledger::{
    Account, Address, Asset, Entry, Ledger, LedgerConfig, Order, Payees, Prices, Request, Split, Target, Tokens, Usage,
};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::json;

use crate::adapter::bytes_bar;
use crate::config::Config;
use crate::{Global, block_on, load_config};

/// Bytes of a line at most.
const LINE_BYTES_MAX: usize = 1 << 20;
/// Lines that are under way at once.
const LINES_AT_ONCE: usize = 64;

#[derive(Subcommand)]
pub(crate) enum LedgerCommand {
    /// Derive every balance and the chain of rows again
    #[command(after_help = "Example:\n  openlora ledger verify")]
    Verify,
    /// What an account has, such as application/shop, owner/acme, contributor/ann, operator, pool
    #[command(after_help = "Example:\n  openlora ledger balance application/shop")]
    Balance {
        /// Its name
        account: Account,
    },
    /// Where an account's money came from and went to, the newest first
    #[command(after_help = "Example:\n  openlora ledger entries contributor/ann --limit 20
For a contributor, what is named receipt/ID is its part of the answer with that receipt.")]
    Entries {
        /// Its name
        account: Account,
        /// Rows of the ledger at most
        #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u16).range(1..=1_000))]
        limit: u16,
    },
    /// Note what an application has prepaid
    #[command(after_help = "Example:\n  openlora ledger deposit shop 5000000 --key invoice-17")]
    Deposit {
        /// The caller's name, as its API key has it
        application: String,
        /// In the asset's smallest unit
        amount: u128,
        /// Names this deposit: the same key twice is one deposit
        #[arg(long)]
        key: String,
    },
    /// Set what 1,000,000 tokens cost, in the asset's smallest unit
    #[command(after_help = "Examples:
  openlora ledger price adapters --prompt 1000000 --cached 500000 --completion 3000000 --key prices-1
  openlora ledger price alias/acme/cwe --prompt 2000000 --cached 1000000 --completion 6000000 --key prices-2")]
    Price {
        /// base, adapters, alias/NAME or generation/HEX
        target: String,
        /// Prompt tokens that were computed
        #[arg(long)]
        prompt: u64,
        /// Prompt tokens found in the cache
        #[arg(long)]
        cached: u64,
        /// Tokens of the answer
        #[arg(long)]
        completion: u64,
        /// Names this change
        #[arg(long)]
        key: String,
    },
    /// Set who gets what part of a fee, in basis points that sum to 10,000
    #[command(
        after_help = "Example:\n  openlora ledger split adapters --owner 3000 --contributors 4000 --operator 3000 --key split-1"
    )]
    Split {
        /// base, adapters, alias/NAME or generation/HEX
        target: String,
        /// The adapter's owner
        #[arg(long, default_value_t = 0)]
        owner: u32,
        /// Those whose data shaped the answer
        #[arg(long, default_value_t = 0)]
        contributors: u32,
        /// The base model's owner
        #[arg(long, default_value_t = 0)]
        base_owner: u32,
        /// Owners of the adapters it was trained from
        #[arg(long, default_value_t = 0)]
        parents: u32,
        /// Who runs the server
        #[arg(long, default_value_t = 0)]
        operator: u32,
        /// Names this change
        #[arg(long)]
        key: String,
    },
    /// Say where an account is paid; what it has earned before is paid there too
    #[command(
        after_help = "Example:\n  openlora ledger address contributor/ann 0x70997970C51812dc3A010C7d01b50e0d17dc79C8 --key ann-1"
    )]
    Address {
        /// Its name
        account: Account,
        /// Its address on the chain
        address: Address,
        /// Names this change
        #[arg(long)]
        key: String,
    },
    /// Name the contributors of answers, from a file of JSON lines, so that their part is divided
    #[command(after_help = "Example:
  openlora ledger attribute shares.jsonl
where a line names the receipt of an answer's last message and whose data shaped it, by weight
  {\"receipt\": \"<32 hex digits>\", \"shares\": [[\"ann\", 3], [\"bob\", 1]], \"unattributed\": 1}
Lines that were read before are left as they are.")]
    Attribute {
        /// The file
        file: PathBuf,
    },
    /// Charge usage and divide it, from a file of JSON lines
    #[command(after_help = "Example:
  openlora ledger post usage.jsonl
where a line is
  {\"key\": \"r1\", \"application\": \"shop\", \"alias\": \"acme/cwe\", \"generation\": \"<64 hex digits>\",
   \"prompt\": 100, \"cached\": 0, \"completion\": 40, \"receipt\": \"r1\", \"owner\": \"acme\",
   \"shares\": [[\"ann\", 3], [\"bob\", 1]], \"unattributed\": 1}
Lines that were posted before are left as they are.")]
    Post {
        /// The file
        file: PathBuf,
    },
}

/// Whose data shaped one answer.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Shares {
    receipt: String,
    shares: Vec<(String, u64)>,
    #[serde(default)]
    unattributed: u64,
}

/// One request's usage and whose data shaped its answer.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    key: String,
    application: String,
    alias: Option<String>,
    generation: Option<String>,
    prompt: u64,
    #[serde(default)]
    cached: u64,
    completion: u64,
    receipt: Option<String>,
    owner: Option<String>,
    base_owner: Option<String>,
    #[serde(default)]
    parents: Vec<String>,
    #[serde(default)]
    shares: Vec<(String, u64)>,
    #[serde(default)]
    unattributed: u64,
}

/// Opens the ledger of the settings.
pub(crate) async fn open(config: &Config) -> Result<Ledger> {
    let url = database_url("ledger.database_url", &config.ledger.database_url, &config.ledger.default_file)?;
    Ledger::open(&url, LedgerConfig::default()).await.context("the ledger (ledger.database_url)")
}

/// The database at `text`, or the file where there is none.
pub(crate) fn database_url(field: &str, text: &str, file: &Path) -> Result<DatabaseUrl> {
    if !text.is_empty() {
        return Ok(DatabaseUrl::parse(field, text)?);
    }
    let folder = file.parent().unwrap_or(Path::new("."));
    std::fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
    Ok(DatabaseUrl::sqlite(file))
}

/// What the settings' prices and payouts are in.
pub(crate) fn asset(config: &Config) -> Result<Asset> {
    Asset::parse(&config.ledger.asset).context("ledger.asset")
}

pub(crate) fn run(global: &Global, command: &LedgerCommand) -> Result<ExitCode> {
    let config = load_config(global, &[])?.config;
    let asset = asset(&config)?;
    let say = |text: String, json: serde_json::Value| if global.json { println!("{json}") } else { println!("{text}") };
    block_on(async {
        let ledger = open(&config).await?;
        match command {
            LedgerCommand::Verify => {
                let style =
                    ProgressStyle::with_template("verifying {bar:30} {pos}/{len} rows").expect("a fixed template");
                let bar = ProgressBar::new(0).with_style(style);
                let verified = ledger.verify(|done, of| {
                    bar.set_length(of);
                    bar.set_position(done);
                });
                let verified = verified.await?;
                bar.finish_and_clear();
                let (rows, balances, epochs) = (verified.rows, verified.balances, verified.epochs);
                say(
                    format!("{rows} rows, {balances} balances, {epochs} epochs: all as derived from the rows"),
                    json!({"ok": true, "rows": rows, "balances": balances, "epochs": epochs}),
                );
            }
            LedgerCommand::Balance { account } => {
                let holding = ledger.balance(account, &asset).await?;
                let (has, credits, debits) = (holding.available(), holding.credits, holding.debits);
                say(
                    format!("{account} has {has} {asset} ({credits} in, {debits} out)"),
                    json!({"account": account.to_string(), "asset": asset.as_str(), "available": has.to_string(),
                           "credits": credits.to_string(), "debits": debits.to_string()}),
                );
            }
            LedgerCommand::Entries { account, limit } => {
                let (entries, _) = ledger.entries(account, Order::Newest, None, usize::from(*limit)).await?;
                for Entry { row, at_ms, what, asset, other, credit, amount } in entries {
                    let (sign, from) = if credit { ('+', "from") } else { ('-', "to") };
                    say(
                        format!("row {row:<8} {sign}{amount} {asset} {from} {other}, {what}"),
                        json!({"row": row, "at_ms": at_ms, "what": what, "asset": asset.as_str(), "credit": credit,
                               "amount": amount.to_string(), "other": other.to_string()}),
                    );
                }
            }
            LedgerCommand::Deposit { application, amount, key } => {
                let row = ledger.deposit(key, application, &asset, *amount).await?;
                say(format!("{application} deposited {amount} {asset}, row {row}"), json!({"row": row}));
            }
            LedgerCommand::Price { target, prompt, cached, completion, key } => {
                let prices = Prices { prompt: *prompt, cached: *cached, completion: *completion };
                let row = ledger.set_prices(key, &parse_target(target)?, &asset, prices).await?;
                say(format!("prices of {target} are version {row}"), json!({"version": row}));
            }
            LedgerCommand::Split { target, owner, contributors, base_owner, parents, operator, key } => {
                let [owner, contributors, base_owner, parents, operator] =
                    [*owner, *contributors, *base_owner, *parents, *operator];
                let split = Split { owner, contributors, base_owner, parents, operator };
                let row = ledger.set_split(key, &parse_target(target)?, split).await?;
                say(format!("the split of {target} is version {row}"), json!({"version": row}));
            }
            LedgerCommand::Address { account, address, key } => {
                let row = ledger.set_address(key, account, Some(*address)).await?;
                say(format!("{account} is paid at {address}, row {row}"), json!({"row": row}));
            }
            LedgerCommand::Attribute { file } => {
                let name = async |Shares { receipt, shares, unattributed }| {
                    ledger.attribute(&receipt, shares, unattributed).await?;
                    Ok(())
                };
                let attributed = each_line(file, global.json, name).await?;
                say(format!("{attributed} receipts attributed"), json!({"attributed": attributed}));
            }
            LedgerCommand::Post { file } => {
                let posted = each_line(file, global.json, async |line| post_line(&ledger, &asset, line).await).await?;
                say(format!("{posted} requests posted"), json!({"posted": posted}));
            }
        }
        ledger.close().await;
        Ok(ExitCode::SUCCESS)
    })
}

fn parse_target(text: &str) -> Result<Target> {
    Ok(match text.split_once('/') {
        None if text == "base" => Target::Base,
        None if text == "adapters" => Target::Adapters,
        Some(("alias", name)) => Target::Alias(name.to_owned()),
        Some(("generation", hex)) => Target::Generation(hex.to_owned()),
        _ => bail!("{text}: base, adapters, alias/NAME or generation/HEX is meant"),
    })
}

/// Does something with every line, many at once, since each waits for the disk; what was done before a bad one stays. Returns how
/// many there were.
async fn each_line<L: DeserializeOwned>(
    file: &Path,
    quiet: bool,
    work: impl AsyncFn(L) -> Result<()>,
) -> Result<usize> {
    let name = file.display().to_string();
    let opened = std::fs::File::open(file).with_context(|| name.clone())?;
    let bar = bytes_bar(opened.metadata().map_or(0, |metadata| metadata.len()), quiet);
    let lines = std::io::BufReader::new(bar.wrap_read(opened)).lines().enumerate();
    let (name, work) = (&name, &work);
    let each = |(number, line): (usize, std::io::Result<String>)| async move {
        let at = || format!("{name}, line {}", number + 1);
        let line = line.with_context(at)?;
        if line.len() > LINE_BYTES_MAX {
            bail!("{}: has {} bytes; at most {LINE_BYTES_MAX} are read", at(), line.len());
        }
        if line.trim().is_empty() {
            return Ok(0);
        }
        work(serde_json::from_str(&line).with_context(at)?).await.with_context(at)?;
        Ok(1)
    };
    let mut done = stream::iter(lines).map(each).buffered(LINES_AT_ONCE);
    let mut count = 0;
    while let Some(one) = done.next().await {
        count += one?;
    }
    bar.finish_and_clear();
    Ok(count)
}

async fn post_line(ledger: &Ledger, asset: &Asset, line: Line) -> Result<()> {
    let request = Request {
        application: line.application,
        asset: asset.clone(),
        generation: line.generation,
        alias: line.alias,
        prompt_tokens: line.prompt,
        completion_tokens_max: line.completion,
    };
    ledger.reserve(&line.key, &request).await?;
    let usage = Usage {
        request_id: line.key.clone(),
        receipt: line.receipt.clone(),
        tokens: Tokens { prompt: line.prompt, cached: line.cached, completion: line.completion },
        payees: Payees { owner: line.owner, base_owner: line.base_owner, parents: line.parents },
    };
    ledger.post(&line.key, &usage).await?;
    if let Some(receipt) = line.receipt
        && (!line.shares.is_empty() || line.unattributed > 0)
    {
        ledger.attribute(&receipt, line.shares, line.unattributed).await?;
    }
    Ok(())
}
