//! A ledger in a folder of its own, with prices and a split.

use openlora_database::{DatabaseUrl, testing::postgres_schema};
use openlora_ledger::{
    Account, Address, Asset, Ledger, LedgerConfig, Payees, Prices, Request, Split, Target, Tokens, Usage,
};
use tempfile::TempDir;

pub(crate) struct Bench {
    pub(crate) ledger: Ledger,
    pub(crate) dir: TempDir,
    pub(crate) url: String,
}

/// A clock that stands still.
pub(crate) const NOW_MS: u64 = 1_800_000_000_000;

pub(crate) fn usd() -> Asset {
    Asset::parse("USDC").expect("an asset")
}

/// 100 units for a token of the prompt, 10 where it was cached, 300 for one of the answer.
pub(crate) const PRICES: Prices = Prices { prompt: 100_000_000, cached: 10_000_000, completion: 300_000_000 };
pub(crate) const SPLIT: Split =
    Split { owner: 4_000, contributors: 3_000, base_owner: 1_000, parents: 500, operator: 1_500 };
pub(crate) const GENERATION: &str = "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff";

/// The URL of the database in `dir`: a schema of PostgreSQL where the tests run on it.
pub(crate) fn url(dir: &std::path::Path) -> String {
    // A runtime of its own may not be started on a thread that runs one.
    std::thread::scope(|scope| scope.spawn(|| postgres_schema(dir)).join().expect("made"))
        .unwrap_or_else(|| format!("sqlite://{}?mode=rwc", dir.join("ledger.db").display()))
}

pub(crate) async fn open(url: &str, config: LedgerConfig, clock: fn() -> u64) -> Ledger {
    let url = DatabaseUrl::parse("url", url).expect("a URL");
    Ledger::open_with_clock(&url, config, clock).await.expect("opened")
}

impl Bench {
    /// Prices for adapters and the base model, and one split for both.
    pub(crate) async fn new() -> Self {
        Self::with(LedgerConfig::default()).await
    }

    pub(crate) async fn with(config: LedgerConfig) -> Self {
        let dir = TempDir::new().expect("a temporary folder");
        let url = url(dir.path());
        let ledger = open(&url, config, || NOW_MS).await;
        set_terms(&ledger).await;
        Self { ledger, dir, url }
    }

    pub(crate) async fn available(&self, account: &str) -> u128 {
        available(&self.ledger, account).await
    }

    /// Runs statements behind the ledger's back.
    pub(crate) fn sql(&self, statements: &str) {
        let run = || openlora_database::testing::sql(&self.url, statements);
        std::thread::scope(|scope| scope.spawn(run).join().expect("ran"));
    }
}

pub(crate) async fn set_terms(ledger: &Ledger) {
    for target in [Target::Adapters, Target::Base] {
        ledger.set_prices(&format!("p{target:?}"), &target, &usd(), PRICES).await.expect("set");
        ledger.set_split(&format!("s{target:?}"), &target, SPLIT).await.expect("set");
    }
}

pub(crate) async fn available(ledger: &Ledger, account: &str) -> u128 {
    let account: Account = account.parse().expect("an account");
    ledger.balance(&account, &usd()).await.expect("read").available()
}

pub(crate) fn request(application: &str, prompt_tokens: u64, completion_tokens_max: u64) -> Request {
    Request {
        application: application.into(),
        asset: usd(),
        generation: Some(GENERATION.into()),
        alias: Some("acme/cwe".into()),
        prompt_tokens,
        completion_tokens_max,
    }
}

pub(crate) fn usage(receipt: Option<&str>, prompt: u64, cached: u64, completion: u64) -> Usage {
    Usage {
        request_id: "request".into(),
        receipt: receipt.map(Into::into),
        tokens: Tokens { prompt, cached, completion },
        payees: Payees { owner: Some("acme".into()), base_owner: Some("smol".into()), parents: vec!["old".into()] },
    }
}

pub(crate) fn address(n: u8) -> Address {
    Address([n; 20])
}
