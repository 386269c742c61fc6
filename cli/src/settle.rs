//! `openlora settle`: epochs from the ledger to the chain and to the accounts they pay.

use std::fs;
use std::io::{IsTerminal as _, Write as _};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};
use clap::{Args, Subcommand};
use indicatif::{ProgressBar, ProgressFinish};
use openlora_ledger::{Asset, Ledger, LedgerError};
use openlora_settlement::bundle::{Bundle, Manifest};
use openlora_settlement::bundles::{BUNDLE_BYTES_MAX, Bundles, fetch, publish_missing};
use openlora_settlement::chain::At;
use openlora_settlement::claims::{Claim, Claims};
use openlora_settlement::epochs::{CLAIMS_MAX, Contract, Open, Standing, State, bundle_of};
use openlora_settlement::outbox::{Intent, IntentId, Status};
use openlora_settlement::sender::Sender;
use openlora_settlement::tree::Address;
use openlora_settlement::watch::{Verdict, judge};
use serde_json::json;

use crate::config::Config;
use crate::{Global, block_on, chain, ledger, load_config, shutdown_signal};

/// Pause between two looks at the chain.
const POLL: Duration = Duration::from_secs(2);

#[derive(Subcommand)]
pub(crate) enum SettleCommand {
    /// Close the ledger's rows since the last epoch and publish its bundle
    #[command(after_help = "Example:\n  openlora settle seal")]
    Seal,
    /// Send the contract tokens of the key's account, to be paid out
    #[command(after_help = "Example:\n  openlora settle fund 5000000000000000000 --key june")]
    Fund {
        /// In the token's smallest unit
        amount: u128,
        /// Names this transfer: the same key twice is one transfer
        #[arg(long)]
        key: String,
    },
    /// Propose the next epoch's root on the chain
    #[command(after_help = "Example:\n  openlora settle propose")]
    Propose,
    /// Make the proposed root payable once its window is over
    #[command(after_help = "Example:\n  openlora settle finalize --wait")]
    Finalize {
        /// Wait for the end of the window
        #[arg(long)]
        wait: bool,
    },
    /// Where the epochs are, in the ledger and on the chain
    #[command(after_help = "Examples:\n  openlora settle status\n  openlora settle status --watch")]
    Status {
        /// Go on until Ctrl-C: the terminal is drawn anew, anything else gets what changed
        #[arg(long)]
        watch: bool,
    },
    /// An account's proof, as the contract takes it
    #[command(after_help = "Example:\n  openlora settle proof 0x70997970C51812dc3A010C7d01b50e0d17dc79C8")]
    Proof {
        /// Whose
        account: Address,
        /// Of which epoch; the last finalized one when left out
        #[arg(long)]
        epoch: Option<u64>,
    },
    /// Have accounts paid what they have earned; anyone may do that for anyone
    Claim(ClaimArgs),
    /// Derive every proposed root again and challenge a wrong one; note in the ledger what was claimed
    #[command(after_help = "Example:\n  openlora settle watch --challenge")]
    Watch {
        /// Send the challenge, with its bond; without it a wrong root is only reported
        #[arg(long)]
        challenge: bool,
        /// Look once and leave: exit status 1 where something is proposed that is not what the ledger says
        #[arg(long)]
        once: bool,
    },
    /// Recompute a published bundle, and compare it with the chain; needs no ledger
    #[command(after_help = "Example:\n  openlora settle verify bundles/epoch-7.json --rpc https://mainnet.base.org")]
    Verify {
        /// A file, or a URL that begins with https:// or http://
        bundle: String,
        /// The bundle of the epoch before, to see that this one goes on from there
        #[arg(long, value_name = "BUNDLE")]
        previous: Option<String>,
        /// A node of the bundle's chain
        #[arg(long, value_name = "URL")]
        rpc: Option<String>,
    },
}

#[derive(Args)]
#[command(after_help = "Examples:
  openlora settle claim 0x70997970C51812dc3A010C7d01b50e0d17dc79C8
  openlora settle claim --all
  openlora settle claim --key wallet.json --password-file password --bundle https://example.org/epoch-7.json")]
pub(crate) struct ClaimArgs {
    /// Which accounts; that of the key when left out
    #[arg(required_unless_present_any = ["all", "key"])]
    accounts: Vec<Address>,
    /// Every account of the last finalized epoch
    #[arg(long, conflicts_with = "accounts")]
    all: bool,
    /// Wait until no reorganisation takes the payments back, so that they are in the ledger too
    #[arg(long)]
    wait: bool,
    /// The keystore whose account pays for the transaction, in place of the settings'
    #[arg(long, value_name = "FILE")]
    key: Option<PathBuf>,
    /// Where its password is, in place of settlement.password_file
    #[arg(long, value_name = "FILE", requires = "key")]
    password_file: Option<PathBuf>,
    /// The last finalized epoch's bundle, a file or an URL, in place of the one in the settings' store
    #[arg(long)]
    bundle: Option<String>,
}

pub(crate) fn run(global: &Global, command: &SettleCommand) -> Result<ExitCode> {
    let config = load_config(global, &[])?.config;
    let say = Say { json: global.json };
    block_on(async {
        match command {
            SettleCommand::Seal => seal(&config, &say).await,
            SettleCommand::Fund { amount, key } => fund(&config, &say, *amount, key).await,
            SettleCommand::Propose => propose(&config, &say).await,
            SettleCommand::Finalize { wait } => finalize(&config, &say, *wait).await,
            SettleCommand::Status { watch } => status(&config, &say, *watch).await,
            SettleCommand::Proof { account, epoch } => proof(&config, *account, *epoch).await,
            SettleCommand::Claim(args) => claim(config.clone(), &say, args).await,
            SettleCommand::Watch { challenge, once } => return watch(&config, &say, *challenge, *once).await,
            SettleCommand::Verify { bundle, previous, rpc } => {
                verify(&say, bundle, previous.as_deref(), rpc.as_deref()).await
            }
        }?;
        Ok(ExitCode::SUCCESS)
    })
}

/// Answers as text or as JSON.
struct Say {
    json: bool,
}

impl Say {
    fn line(&self, text: &str, json: serde_json::Value) {
        if self.json { println!("{json}") } else { println!("{text}") }
    }
}

/// The contract of the settings.
pub(crate) async fn contract(config: &Config) -> Result<Contract> {
    let address = &config.settlement.contract;
    if address.is_empty() {
        bail!("settlement.contract must be set to the RewardSettlement's address; `openlora chain deploy` prints it");
    }
    let address = address.parse().context("settlement.contract")?;
    Ok(Contract::open(chain::configured_chain(config).await?, address).await?)
}

/// Where the settings keep published bundles.
pub(crate) fn bundles(config: &Config) -> Result<Bundles> {
    Ok(Bundles::open(&config.settlement.bundles_url, &config.settlement.bundles_dir)?)
}

/// A bundle that anybody has published.
async fn read(place: &str) -> Result<Bundle> {
    if ["http://", "https://"].iter().any(|scheme| place.starts_with(scheme)) {
        return Ok(fetch(place).await?);
    }
    let bytes = fs::metadata(place).with_context(|| place.to_owned())?.len();
    if bytes > BUNDLE_BYTES_MAX {
        bail!("{place}: has {bytes} bytes; at most {BUNDLE_BYTES_MAX} are read");
    }
    Bundle::from_json(&fs::read(place).with_context(|| place.to_owned())?).with_context(|| place.to_owned())
}

/// A published bundle.
async fn published(config: &Config, epoch: u64) -> Result<Bundle> {
    let bundles = bundles(config)?;
    let found = bundles.get(epoch).await.with_context(|| bundles.place(epoch))?;
    found.with_context(|| format!("there is no {}; run `openlora settle seal`", bundles.place(epoch)))
}

async fn seal(config: &Config, say: &Say) -> Result<()> {
    let contract = contract(config).await?;
    let (asset, bundles) = (ledger::asset(config)?, bundles(config)?);
    let ledger = ledger::open(config).await?;
    // Seconds where a hundred thousand accounts are paid.
    let spinner = ProgressBar::new_spinner().with_message("sealing").with_finish(ProgressFinish::AndClear);
    spinner.enable_steady_tick(Duration::from_millis(100));
    match ledger.seal().await {
        Ok(_) => {}
        Err(LedgerError::EmptyEpoch { last }) => {
            let text = format!("nothing is new since epoch {last}");
            spinner.suspend(|| say.line(&text, json!({"epoch": last, "new": false})));
        }
        Err(error) => return Err(error.into()),
    }
    spinner.set_message("computing and publishing what was sealed");
    let published = publish_missing(&ledger, contract.settles(), &asset, &bundles).await?;
    spinner.finish_and_clear();
    for manifest in published {
        let Manifest { epoch, accounts, total, receipts, payout_root, .. } = &manifest;
        let place = bundles.place(*epoch);
        let text = format!(
            "epoch {epoch}: {accounts} accounts, {total} in all, {receipts} receipts, root {payout_root}; {place}"
        );
        say.line(
            &text,
            json!({"epoch": epoch, "manifest": manifest, "manifest_hash": manifest.hash(), "bundle": place}),
        );
    }
    ledger.close().await;
    Ok(())
}

/// Sends an intent and waits until it is in a block.
async fn send(contract: &Contract, sender: &Sender, intent: Intent, what: &str) -> Result<IntentId> {
    let id = contract.submit(sender, intent).await?;
    follow(sender, id, what).await?;
    Ok(id)
}

/// Waits until an intent is in a block.
async fn follow(sender: &Sender, id: IntentId, what: &str) -> Result<()> {
    let mut last = String::new();
    let status = sender.wait_until(id, |status| {
        let now = match status {
            Status::Queued { waiting: Some(why) } | Status::Broadcast { waiting: Some(why), .. } => {
                format!("waits: {why}")
            }
            Status::Queued { .. } => "is signed".to_owned(),
            Status::Broadcast { nonce, .. } => format!("is broadcast, nonce {nonce}"),
            other => format!("{other:?}"),
        };
        if now != last && !matches!(status, Status::Mined { .. }) {
            eprintln!("{what} {now}");
            last = now;
        }
        matches!(status, Status::Mined { .. })
    });
    match status.await? {
        Status::Mined { succeeded: true, block, hash, .. } => eprintln!("{what} is in block {block}: {hash}"),
        Status::Finalized { reverted: None, block, hash, .. } => eprintln!("{what} is final in block {block}: {hash}"),
        Status::DoneElsewhere => eprintln!("{what} was done by somebody else"),
        Status::Refused { reason } => bail!("{what} was not sent: {reason}"),
        Status::Finalized { reverted: Some(why), .. } => bail!("{what} reverted: {why}"),
        other => bail!("{what} reverted: {other:?}"),
    }
    Ok(())
}

async fn fund(config: &Config, say: &Say, amount: u128, key: &str) -> Result<()> {
    let contract = contract(config).await?;
    let sender = chain::configured_sender(config).await?;
    let intent = contract.fund(amount, key);
    let id = match sender.find(&intent.key).await? {
        None => contract.submit(&sender, intent).await?,
        // Unlike what follows from an epoch's number it is never due again, whatever a call that was cut off has left.
        Some(id) => {
            if matches!(sender.status(id).await?, Status::Refused { .. } | Status::Finalized { reverted: Some(_), .. })
            {
                sender.retry(id).await?;
            }
            id
        }
    };
    follow(&sender, id, "the transfer").await?;
    sender.close().await?;
    let held = contract.state(At::Latest).await?.balance;
    say.line(&format!("the contract holds {held}"), json!({"held": held.to_string()}));
    Ok(())
}

async fn propose(config: &Config, say: &Say) -> Result<()> {
    let contract = contract(config).await?;
    let state = contract.state(At::Latest).await?;
    let epoch = state.open.map_or(state.epoch + 1, |open| open.epoch);
    let bundle = published(config, epoch).await?;
    let root = bundle.manifest().payout_root;
    match contract.propose(&bundle).await? {
        Some(intent) => {
            let sender = chain::configured_sender(config).await?;
            send(&contract, &sender, intent, &format!("the proposal of epoch {epoch}")).await?;
            sender.close().await?;
            let window = state.challenge_window;
            let text = format!("epoch {epoch} is proposed with root {root}; it can be finalized in {window} s");
            say.line(&text, json!({"epoch": epoch, "root": root, "proposed": true}));
        }
        None => say.line(&format!("epoch {epoch} was proposed before"), json!({"epoch": epoch, "root": root})),
    }
    Ok(())
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

async fn finalize(config: &Config, say: &Say, wait: bool) -> Result<()> {
    let contract = contract(config).await?;
    let state = contract.state(At::Latest).await?;
    let Some(open) = state.open else {
        let epoch = state.epoch;
        say.line(&format!("nothing is proposed; epoch {epoch} is the last final one"), json!({"epoch": epoch}));
        return Ok(());
    };
    let bundle = published(config, open.epoch).await?;
    if wait && open.challenge.is_none() {
        let left = || (open.finalizable_at + 1).saturating_sub(now());
        while left() > 0 {
            eprintln!("epoch {} can be finalized in {} s", open.epoch, left());
            tokio::time::sleep(Duration::from_secs(left().clamp(1, 10))).await;
        }
    }
    let epoch = open.epoch;
    if let Some(intent) = contract.finalize(&bundle, now()).await? {
        let sender = chain::configured_sender(config).await?;
        send(&contract, &sender, intent, &format!("the finalization of epoch {epoch}")).await?;
        sender.close().await?;
    }
    say.line(&format!("epoch {epoch} is final: its accounts can claim"), json!({"epoch": epoch, "final": true}));
    Ok(())
}

async fn status(config: &Config, say: &Say, watch: bool) -> Result<()> {
    let contract = contract(config).await?;
    let ledger = ledger::open(config).await?;
    if watch {
        watch_status(&contract, &ledger, say).await?;
    } else {
        let (text, json) = overview(&contract, &ledger).await?;
        say.line(&text, json);
    }
    ledger.close().await;
    Ok(())
}

/// Until Ctrl-C. A node that does not answer is asked again.
async fn watch_status(contract: &Contract, ledger: &Ledger, say: &Say) -> Result<()> {
    let redraws = !say.json && std::io::stdout().is_terminal();
    let mut ended = std::pin::pin!(shutdown_signal());
    let (mut last, mut complaint) = (None, Complaint::default());
    loop {
        match overview(contract, ledger).await {
            Ok((text, json)) => {
                complaint.clear();
                // The text counts seconds, which is no change.
                if redraws {
                    println!("\x1b[2J\x1b[H{text}");
                } else if last.as_ref() != Some(&json) {
                    say.line(&text, json.clone());
                }
                std::io::stdout().flush()?;
                last = Some(json);
            }
            Err(error) => complaint.tell(&error),
        }
        tokio::select! {
            () = &mut ended => return Ok(()),
            () = tokio::time::sleep(POLL) => {}
        }
    }
}

/// Where the epochs are and what to do next, for people and for programs.
async fn overview(contract: &Contract, ledger: &Ledger) -> Result<(String, serde_json::Value)> {
    let last = ledger.last_epoch().await?;
    let State { epoch, finalized, claimed, balance, bond, challenge_window, open } = contract.state(At::Latest).await?;
    let mut text = format!(
        "ledger      {last} epochs sealed\nchain       {epoch} epochs final, {finalized} promised, {claimed} claimed, {balance} held\n\
         terms       a bond of {bond} wei, {challenge_window} s to challenge"
    );
    let proposal = open.map(|open| {
        json!({"epoch": open.epoch, "root": open.root, "total": open.total.to_string(),
               "finalizable_at": open.finalizable_at, "disputed": open.challenge.is_some()})
    });
    if let Some(open) = open {
        let left = open.finalizable_at.saturating_sub(now());
        let state = match open.challenge {
            Some((challenger, _)) => format!("disputed by {challenger}"),
            None if left > 0 => format!("can be challenged for {left} s"),
            None => "can be finalized".to_owned(),
        };
        text.push_str(&format!("\nproposal    epoch {}, {}, root {}, {state}", open.epoch, open.total, open.root));
    }
    let next = match (&open, last > epoch) {
        (Some(_), _) => "openlora settle finalize --wait",
        (None, true) => "openlora settle propose",
        (None, false) => "openlora settle seal",
    };
    text.push_str(&format!("\nnext        {next}"));
    let json = json!({"sealed": last, "final": epoch, "promised": finalized.to_string(), "claimed": claimed.to_string(),
                      "held": balance.to_string(), "proposal": proposal, "next": next});
    Ok((text, json))
}

/// What goes wrong again and again is told once.
#[derive(Default)]
struct Complaint(String);

impl Complaint {
    fn tell(&mut self, error: &anyhow::Error) {
        let text = format!("{error:#}");
        if text != self.0 {
            eprintln!("openlora: {text}; looking again");
            self.0 = text;
        }
    }

    fn clear(&mut self) {
        self.0.clear();
    }
}

async fn proof(config: &Config, account: Address, epoch: Option<u64>) -> Result<()> {
    let epoch = match epoch {
        Some(epoch) => epoch,
        None => contract(config).await?.state(At::Latest).await?.epoch,
    };
    let bundle = published(config, epoch).await?;
    let Some(proof) = bundle.tree().proof(account) else {
        bail!("{account} has earned nothing up to epoch {epoch}");
    };
    // The argument of `claim`.
    let claim = json!({"epoch": epoch, "account": account, "cumulative": proof.cumulative.to_string(), "index": proof.index,
                       "proof": proof.siblings});
    println!("{}", serde_json::to_string_pretty(&claim)?);
    Ok(())
}

async fn claim(mut config: Config, say: &Say, args: &ClaimArgs) -> Result<()> {
    let settings = &mut config.settlement;
    if let Some(key) = &args.key {
        settings.keystore.clone_from(key);
        settings.kms_key.clear();
    }
    if let Some(file) = &args.password_file {
        settings.password_file.clone_from(file);
    }
    let (config, wait) = (&config, args.wait);
    let contract = contract(config).await?;
    let epoch = contract.state(At::Latest).await?.epoch;
    if epoch == 0 {
        bail!("no epoch is final; `openlora settle status` tells where they are");
    }
    let bundle = match &args.bundle {
        Some(place) => read(place).await?,
        None => published(config, epoch).await?,
    };
    let sender = chain::configured_sender(config).await?;
    let accounts: Vec<Address> = match args.accounts.as_slice() {
        [] if args.all => bundle.tree().payouts().iter().map(|payout| payout.account).collect(),
        [] => vec![sender.account()],
        accounts => accounts.to_vec(),
    };
    let mut sent = Vec::new();
    for accounts in accounts.chunks(CLAIMS_MAX) {
        if let Some(intent) = contract.claim(&bundle, accounts).await? {
            sent.push(send(&contract, &sender, intent, &format!("the claim of {} accounts", accounts.len())).await?);
        }
    }
    for id in sent.into_iter().filter(|_| wait) {
        let status = sender.wait_finalized(id, |_| {}).await?;
        if !matches!(status, Status::Finalized { reverted: None, .. } | Status::DoneElsewhere) {
            bail!("a claim was taken back by the chain: {status:?}; run this again");
        }
    }
    sender.close().await?;
    for account in &accounts {
        let (earned, paid) = (bundle.tree().cumulative(*account), contract.claimed(*account, At::Latest).await?);
        // Also what an earlier call had sent.
        while wait && contract.claimed(*account, At::Finalized).await? < paid {
            tokio::time::sleep(POLL).await;
        }
        let text = format!("{account} has been paid {paid} of {earned}");
        say.line(&text, json!({"account": account, "earned": earned.to_string(), "paid": paid.to_string()}));
    }
    note_claims(config, contract).await
}

/// Notes in the ledger of the settings what was claimed so far and is final. Who claims need not have a ledger.
async fn note_claims(config: &Config, contract: Contract) -> Result<()> {
    if config.ledger.database_url.is_empty() && !config.ledger.default_file.exists() {
        return Ok(());
    }
    let ledger = ledger::open(config).await?;
    let mut noted = 0;
    let mut claims = Claims::new(contract, ledger.clone(), ledger::asset(config)?);
    claims.note(|_| noted += 1).await.context("what was claimed could not be noted in the ledger")?;
    if noted > 0 {
        eprintln!("{noted} claims are noted in the ledger");
    }
    ledger.close().await;
    Ok(())
}

async fn watch(config: &Config, say: &Say, challenge: bool, once: bool) -> Result<ExitCode> {
    let contract = contract(config).await?;
    let ledger = ledger::open(config).await?;
    let asset = ledger::asset(config)?;
    let sender = if challenge { Some(chain::configured_sender(config).await?) } else { None };
    let mut claims = Claims::new(contract.clone(), ledger.clone(), asset.clone());
    let mut watcher = Watcher { contract, ledger, asset, sender, seen: None, told: String::new() };
    let mut complaint = Complaint::default();
    loop {
        let right = watcher.look(say).await;
        let noted = claims.note(|claim| {
            let Claim { account, amount, epoch, block, transaction, row } = claim;
            let text = format!("{account} was paid {amount} in block {block}, by epoch {epoch}; noted in row {row}");
            let json = json!({"account": account, "amount": amount.to_string(), "epoch": epoch, "block": block,
                              "transaction": transaction, "row": row});
            say.line(&text, json);
        });
        let noted = noted.await;
        let right = right.and_then(|right| noted.map(|()| right).map_err(anyhow::Error::from));
        if once {
            watcher.close().await?;
            return Ok(if right? { ExitCode::SUCCESS } else { ExitCode::FAILURE });
        }
        // Whoever watches goes on, whatever the node, a node's operator or a lack of coins does.
        match right {
            Ok(_) => complaint.clear(),
            Err(error) => complaint.tell(&error),
        }
        tokio::time::sleep(POLL).await;
    }
}

/// Judges proposals.
struct Watcher {
    contract: Contract,
    ledger: Ledger,
    asset: Asset,
    /// What challenges are sent with, where they are.
    sender: Option<Sender>,
    /// The proposal that was judged for good, and whether it was right.
    seen: Option<(Open, bool)>,
    /// What was said last.
    told: String,
}

impl Watcher {
    /// Whether what is proposed now, if anything, is what the ledger says; what is not is challenged.
    async fn look(&mut self, say: &Say) -> Result<bool> {
        let settles = *self.contract.settles();
        let open = self.contract.state(At::Latest).await?.open.filter(|open| open.challenge.is_none());
        let Some(open) = open else { return Ok(true) };
        let (epoch, root) = (open.epoch, open.root);
        if let Some((_, right)) = self.seen.filter(|(seen, _)| *seen == open) {
            return Ok(right);
        }
        let verdict = judge(&open, &self.ledger, &settles, &self.asset).await?;
        let text = match &verdict {
            Verdict::Right => format!("epoch {epoch} is proposed as the ledger says, root {root}"),
            Verdict::Wrong { field, said, computed } => {
                format!("epoch {epoch} is WRONG: {field} is {said} on the chain and {computed} by the ledger")
            }
            Verdict::Unknown { last } => format!("epoch {epoch} is proposed, and the ledger here has {last}"),
        };
        if text != self.told {
            say.line(&text, json!({"epoch": epoch, "root": root, "right": verdict == Verdict::Right}));
            self.told = text;
        }
        if let (Verdict::Wrong { .. }, Some(sender)) = (&verdict, &self.sender) {
            let own = bundle_of(&self.ledger, epoch, &settles, &self.asset).await?.manifest().hash();
            let intent = self.contract.challenge(&open, own);
            send(&self.contract, sender, intent, &format!("the challenge of epoch {epoch}")).await?;
        }
        let right = verdict == Verdict::Right;
        // What the ledger does not know yet is looked at again.
        self.seen = (!matches!(verdict, Verdict::Unknown { .. })).then_some((open, right));
        Ok(right)
    }

    async fn close(&self) -> Result<()> {
        if let Some(sender) = &self.sender {
            sender.close().await?;
        }
        self.ledger.close().await;
        Ok(())
    }
}

async fn verify(say: &Say, place: &str, previous: Option<&str>, rpc: Option<&str>) -> Result<()> {
    let bundle = read(place).await?;
    let manifest = bundle.manifest();
    if let Some(previous) = previous {
        bundle.follows(&read(previous).await?)?;
    }
    let mut text = format!(
        "epoch {}: {} accounts sum to {}, root {}, manifest {}: all as its content gives",
        manifest.epoch,
        manifest.accounts,
        manifest.total,
        manifest.payout_root,
        manifest.hash()
    );
    let mut standing = None;
    if let Some(rpc) = rpc {
        let contract = Contract::open(chain::open_chain(rpc, manifest.chain_id).await?, manifest.settlement).await?;
        if contract.settles() != &manifest.settles() {
            bail!("the contract pays out {}, the bundle is of {}", contract.settles().token, manifest.token);
        }
        let found = contract.standing(manifest.epoch, manifest.payout_root, At::Latest).await?;
        if let Standing::Other { root, .. } = found {
            bail!("the chain has the root {root} for epoch {}, this bundle {}", manifest.epoch, manifest.payout_root);
        }
        text.push_str(&format!("\non the chain: {found:?}"));
        standing = Some(format!("{found:?}"));
    }
    say.line(&text, json!({"ok": true, "manifest": manifest, "manifest_hash": manifest.hash(), "chain": standing}));
    Ok(())
}
