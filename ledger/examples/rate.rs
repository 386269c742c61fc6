//! Prints how many requests a second are reserved and posted durably, and how long an epoch of many accounts takes.
//!
//! `cargo run --release -p openlora-ledger --example rate [USAGES] [ACCOUNTS] [FILE]`; with a file, the ledger is left
//! there before its epoch is sealed (for `openlora-settlement`'s example `epoch`).

use std::{path::PathBuf, time::Instant};

use openlora_database::DatabaseUrl;
use openlora_ledger::{
    Account, Address, Asset, Ledger, LedgerConfig, LedgerError, Payees, Prices, Request, Split, Target, Tokens, Usage,
};

/// Requests in flight.
const TASKS: u64 = 64;

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let mut number = |default: u64| arguments.next().map_or(Ok(default), |text| text.parse());
    let (usages, accounts) = (number(20_000)?, number(10_000)?);
    let (dir, kept) = (tempfile::tempdir()?, arguments.next().map(PathBuf::from));
    let file = kept.clone().unwrap_or_else(|| dir.path().join("ledger.db"));
    let ledger = Ledger::open(&DatabaseUrl::sqlite(&file), LedgerConfig::default()).await?;
    let asset = Asset::parse("USDC")?;
    let prices = Prices { prompt: 100_000_000, cached: 10_000_000, completion: 300_000_000 };
    ledger.set_prices("p", &Target::Base, &asset, prices).await?;
    let split = Split { owner: 0, contributors: 3_000, base_owner: 5_000, parents: 0, operator: 2_000 };
    ledger.set_split("s", &Target::Base, split).await?;
    ledger.deposit("d", "app", &asset, 1 << 100).await?;

    let began = Instant::now();
    let per_task = usages / TASKS;
    let tasks = (0..TASKS).map(|task| {
        let (ledger, asset) = (ledger.clone(), asset.clone());
        tokio::spawn(async move {
            for n in 0..per_task {
                request(&ledger, &asset, &format!("{task}/{n}")).await?;
            }
            Ok::<_, LedgerError>(())
        })
    });
    for task in tasks.collect::<Vec<_>>() {
        task.await??;
    }
    let (done, took) = (per_task * TASKS, began.elapsed().as_secs_f64());
    println!("{done} requests reserved and posted in {took:.2} s: {:.0} posts/s", done as f64 / took);

    // Contributors by the thousand, each with an address, fed by one share table after another.
    let began = Instant::now();
    for chunk in 0..accounts.div_ceil(1_000) {
        let names: Vec<_> = (chunk * 1_000..accounts.min((chunk + 1) * 1_000)).map(|n| format!("c{n}")).collect();
        let address = |n: usize| {
            Address(std::array::from_fn(|i| if i < 8 { (chunk * 1_000 + n as u64).to_be_bytes()[i] } else { 1 }))
        };
        let set = names.iter().enumerate().map(|(n, name)| {
            let (ledger, account, address) = (ledger.clone(), Account::Contributor(name.clone()), address(n));
            tokio::spawn(async move { ledger.set_address(&account.to_string(), &account, Some(address)).await })
        });
        for one in set.collect::<Vec<_>>() {
            one.await??;
        }
        let shares = names.into_iter().map(|name| (name, 1)).collect();
        ledger.attribute(&format!("0/{chunk}"), shares, 0).await?;
    }
    println!("{accounts} accounts given addresses and shares in {:.2} s", began.elapsed().as_secs_f64());
    if kept.is_some() {
        ledger.close().await;
        return Ok(());
    }
    let began = Instant::now();
    let epoch = ledger.seal().await?;
    println!("sealed in {:.2} s", began.elapsed().as_secs_f64());
    let began = Instant::now();
    let (mut fold, mut leaves) = (ledger.fold(epoch.number).await?, 0);
    loop {
        let page = fold.next().await?;
        if page.is_empty() {
            break;
        }
        leaves += page.len();
    }
    println!("{leaves} leaves folded in {:.2} s", began.elapsed().as_secs_f64());
    print_peak("before verify");
    let began = Instant::now();
    let verified = ledger.verify(|_, _| ()).await?;
    println!("{} rows verified in {:.2} s", verified.rows, began.elapsed().as_secs_f64());
    print_peak("in all");
    Ok(())
}

async fn request(ledger: &Ledger, asset: &Asset, key: &str) -> Result<(), LedgerError> {
    let request = Request {
        application: "app".into(),
        asset: asset.clone(),
        generation: None,
        alias: None,
        prompt_tokens: 100,
        completion_tokens_max: 200,
    };
    ledger.reserve(key, &request).await?;
    let payees = Payees { owner: None, base_owner: Some("base".into()), parents: Vec::new() };
    let tokens = Tokens { prompt: 100, cached: 10, completion: 50 };
    ledger.post(key, &Usage { request_id: key.into(), receipt: Some(key.into()), tokens, payees }).await.map(drop)
}

/// The most memory this process held, as Linux counts it.
fn print_peak(when: &str) {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let peak = status.lines().find(|line| line.starts_with("VmHWM")).unwrap_or("VmHWM: unknown");
    println!("peak memory {when}: {}", peak.trim_start_matches("VmHWM:").trim());
}
