//! Prints how long it takes to close an epoch (what `openlora settle seal` does) and to look a proof up.
//!
//! `cargo run --release -p openlora-settlement --example epoch LEDGER_FILE`, with a file that
//! `cargo run --release -p openlora-ledger --example rate 200000 100000 LEDGER_FILE` has left.

use std::{path::Path, time::Instant};

use alloy::primitives::{Address, U256};
use openlora_database::DatabaseUrl;
use openlora_ledger::{Asset, Ledger, LedgerConfig};
use openlora_settlement::{
    bundle::Bundle,
    epochs::bundle_of,
    tree::{Payout, PayoutTree, Settles},
};

/// Proofs looked up, of accounts all over the tree.
const PROOFS: usize = 10_000;

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let file = std::env::args().nth(1).ok_or("name the ledger's file")?;
    let ledger = Ledger::open(&DatabaseUrl::sqlite(Path::new(&file)), LedgerConfig::default()).await?;
    let settles = Settles { chain_id: 10, settlement: Address::repeat_byte(0x5e), token: Address::repeat_byte(0x70) };

    let began = Instant::now();
    let epoch = ledger.seal().await?;
    let sealed = began.elapsed();
    println!("sealed in {:.2} s", sealed.as_secs_f64());
    let bundle = bundle_of(&ledger, epoch.number, &settles, &Asset::parse("USDC")?).await?;
    let (accounts, receipts) = (bundle.tree().payouts().len(), bundle.receipts().len());
    let folded = began.elapsed() - sealed;
    println!("{accounts} accounts and {receipts} receipts folded, with their roots, in {:.2} s", folded.as_secs_f64());
    let json = bundle.to_json();
    std::fs::write(format!("{file}.bundle.json"), &json)?;
    println!("bundle of {} bytes written; in all {:.2} s", json.len(), began.elapsed().as_secs_f64());
    print_peak();

    let began = Instant::now();
    let back = Bundle::from_json(&json)?;
    println!("read back and recomputed in {:.2} s", began.elapsed().as_secs_f64());
    print_proofs(back.tree());
    let many = (1..=1_u64 << 20).map(|n| Payout { account: Address::from_word(U256::from(n).into()), cumulative: 1 });
    let began = Instant::now();
    let tree = PayoutTree::new(&settles, many.collect())?;
    println!("a tree of {} accounts built in {:.2} s", tree.payouts().len(), began.elapsed().as_secs_f64());
    print_proofs(&tree);
    Ok(())
}

fn print_proofs(tree: &PayoutTree) {
    let payouts = tree.payouts();
    let (mut siblings, mut slowest) = (0, 0.0_f64);
    let began = Instant::now();
    for n in 0..PROOFS {
        let one = Instant::now();
        // A prime stride: no two neighbours after one another.
        let proof = tree.proof(payouts[n * 7_919 % payouts.len()].account);
        siblings += proof.map_or(0, |proof| proof.siblings.len());
        slowest = slowest.max(one.elapsed().as_secs_f64());
    }
    let mean = began.elapsed().as_secs_f64() / PROOFS as f64;
    let (accounts, depth) = (payouts.len(), siblings / PROOFS);
    println!(
        "proof among {accounts} accounts, {depth} siblings: {:.2} µs on average, {:.0} µs the slowest of {PROOFS}",
        mean * 1e6,
        slowest * 1e6
    );
}

/// The most memory this process held, as Linux counts it.
fn print_peak() {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let peak = status.lines().find(|line| line.starts_with("VmHWM")).unwrap_or("VmHWM: unknown");
    println!("peak memory: {}", peak.trim_start_matches("VmHWM:").trim());
}
