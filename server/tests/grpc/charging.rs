//! Requests pay for what they had, once, whatever becomes of their readers and of the server.

use openlora_database::DatabaseUrl;
use openlora_ledger::{
    Account, Asset, Ledger, LedgerConfig, Order, Payees, Prices, Request, Split, Target, Tokens, Usage,
};
use openlora_proto::v1 as wire;
use openlora_server::Books;
use openlora_server::keys::Role;
use sqlx::{AnyConnection, Connection as _, Executor as _};
use tempfile::TempDir;
use tokio_stream::StreamExt as _;
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

use crate::harness::{PATIENCE, Setup, TestServer, long_request, name_of, request, text, tokens};

/// What the application has at first.
const PREPAID: u128 = 10_000_000;
/// Units for a token: of the prompt, of it from the cache, of the answer.
const PRICES: [u128; 3] = [10, 1, 100];

/// A ledger with prices, a split and a deposit.
struct Shop {
    ledger: Ledger,
    asset: Asset,
    folder: TempDir,
}

impl Shop {
    async fn open() -> Self {
        let shop = Self::open_with(LedgerConfig::default()).await;
        let million = |units: u128| (units * 1_000_000) as u64;
        let [prompt, cached, completion] = PRICES.map(million);
        for (target, contributors) in [(Target::Adapters, 3_000), (Target::Base, 0)] {
            let key = format!("{target:?}");
            let prices = Prices { prompt, cached, completion };
            shop.ledger.set_prices(&key, &target, &shop.asset, prices).await.expect("prices");
            let owner = if contributors == 0 { 0 } else { 5_000 };
            let operator = 9_000 - contributors - owner;
            let split = Split { owner, contributors, base_owner: 1_000, parents: 0, operator };
            shop.ledger.set_split(&format!("split of {key}"), &target, split).await.expect("a split");
        }
        shop.ledger.deposit("d", &name_of(Role::App), &shop.asset, PREPAID).await.expect("a deposit");
        shop
    }

    /// Without anything in it.
    async fn open_with(config: LedgerConfig) -> Self {
        let folder = tempfile::tempdir().expect("temporary folder");
        let url = DatabaseUrl::sqlite(&folder.path().join("ledger.db"));
        let ledger = Ledger::open(&url, config).await.expect("a ledger");
        Self { ledger, asset: Asset::parse("OPEN").expect("an asset"), folder }
    }

    fn charges(&self) -> impl FnOnce(&mut Setup) {
        let (ledger, asset) = (self.ledger.clone(), self.asset.clone());
        let books = Books { ledger, asset, charge: true, base_owner: Some("lab".into()) };
        |setup| setup.books = Some(books)
    }

    async fn has(&self, account: &str) -> u128 {
        let account: Account = account.parse().expect("an account");
        self.ledger.balance(&account, &self.asset).await.expect("a balance").available()
    }

    /// What the application has paid, and what is set aside.
    async fn spent(&self) -> (u128, u128) {
        let pending = self.has("pending/the-app").await;
        (PREPAID - self.has("application/the-app").await - pending, pending)
    }

    /// How many requests the application began.
    async fn begun(&self) -> usize {
        let account = Account::Pending(name_of(Role::App));
        let (entries, _) = self.ledger.entries(&account, Order::Newest, None, 1_000).await.expect("entries");
        entries.iter().filter(|entry| entry.what.starts_with("open/")).count()
    }
}

fn fee(usage: &wire::Usage) -> u128 {
    let [prompt, cached, completion] = PRICES;
    let computed = usage.prompt_tokens - usage.cached_prompt_tokens;
    [(prompt, computed), (cached, usage.cached_prompt_tokens), (completion, usage.completion_tokens)]
        .into_iter()
        .map(|(price, tokens)| price * u128::from(tokens))
        .sum()
}

fn reason(status: &Status) -> String {
    status.get_details_error_info().expect("ErrorInfo").reason
}

async fn register(server: &TestServer) -> String {
    let path = crate::harness::fixture("adapters-tiny/llama3/all-linear").display().to_string();
    let alias = format!("{}/a", name_of(Role::Owner));
    let message = wire::RegisterAdapterRequest { alias: alias.clone(), path, ..Default::default() };
    server.adapters(Role::Owner).await.register(message).await.expect("registered");
    alias
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_last_message_names_a_receipt_that_is_in_the_ledger_already() {
    let shop = Shop::open().await;
    let server = TestServer::start_with(shop.charges()).await;
    let mut client = server.inference(Role::App).await;
    let adapter = register(&server).await;

    let asked = wire::GenerateRequest { adapter, ..request(tokens(&[5, 6, 7]), 4) };
    let answer = client.generate(asked).await.expect("answered").into_inner();
    let usage = answer.usage.expect("usage");
    assert_eq!((usage.prompt_tokens, usage.completion_tokens), (3, 4));
    let paid = fee(&usage);
    assert_eq!(shop.spent().await, (paid, 0));
    assert_eq!(shop.has("owner/the-owner").await, paid / 2, "the alias's owner, not who asked");
    assert_eq!(shop.has("held").await, paid * 3 / 10, "until the contributors are named");
    assert_eq!(shop.has("base/lab").await, paid / 10);
    assert_eq!(shop.has("operator").await, paid / 10);
    // The receipt is what contributors are named by.
    let settled = shop.ledger.attribute(&answer.receipt_id, vec![("ann".into(), 1)], 0).await.expect("held by it");
    assert_eq!(settled.amount, paid * 3 / 10);

    let mut stream = client.generate_stream(request(tokens(&[5, 6, 7]), 4)).await.expect("started").into_inner();
    let mut last = wire::GenerateStreamResponse::default();
    while let Some(message) = stream.next().await {
        assert_eq!(last.receipt_id, "", "only the last message has it");
        last = message.expect("a message");
    }
    assert_ne!(last.receipt_id, answer.receipt_id);
    assert_eq!(shop.spent().await, (paid + fee(&last.usage.expect("usage")), 0));
    assert_eq!(shop.has("owner/the-owner").await, paid / 2, "the base model has another owner");
    let error = shop.ledger.attribute(&last.receipt_id, vec![("ann".into(), 1)], 0).await.expect_err("nothing held");
    assert!(error.to_string().contains(&last.receipt_id), "{error}");
    let (_, metrics) = server.http("/metrics", Some(Role::Operator)).await;
    assert!(metrics.contains("openlora_charges_total{outcome=\"posted\"} 2"), "{metrics}");
    shop.ledger.verify(|_, _| {}).await.expect("a sound ledger");
    server.stop().await.expect("a clean end");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn samples_and_cached_prompts_are_charged_as_the_usage_says() {
    let shop = Shop::open().await;
    let server = TestServer::start_with(shop.charges()).await;
    let mut client = server.inference(Role::App).await;
    let prompt: Vec<u32> = (3..43).collect();
    let mut paid = 0;
    for (n, cached) in [(1, 0), (3, 32)] {
        let mut asked = request(tokens(&prompt), 5);
        asked.sampling.as_mut().expect("sampling").n = Some(n);
        let usage = client.generate(asked).await.expect("answered").into_inner().usage.expect("usage");
        assert_eq!((usage.cached_prompt_tokens, usage.completion_tokens), (cached, 5 * n));
        paid += fee(&usage);
        assert_eq!(shop.spent().await, (paid, 0));
    }
    server.stop().await.expect("a clean end");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_cannot_pay_is_told_what_to_do_and_nothing_is_begun() {
    let shop = Shop::open_with(LedgerConfig::default()).await;
    let server = TestServer::start_with(shop.charges()).await;
    let mut client = server.inference(Role::App).await;
    let refused = client.generate(request(text("The river"), 4)).await.expect_err("no price");
    assert_eq!((refused.code(), reason(&refused).as_str()), (Code::FailedPrecondition, "NO_TERMS"), "{refused}");
    assert!(refused.message().contains("price in OPEN") && refused.message().contains("base"), "{refused}");

    let prices = Prices { prompt: 1_000_000, cached: 0, completion: 1_000_000 };
    shop.ledger.set_prices("p", &Target::Base, &shop.asset, prices).await.expect("prices");
    let split = Split { owner: 0, contributors: 0, base_owner: 0, parents: 0, operator: 10_000 };
    shop.ledger.set_split("s", &Target::Base, split).await.expect("a split");
    let ask = || request(tokens(&[5, 6, 7]), 4);
    let refused = client.generate(ask()).await.expect_err("no deposit");
    assert_eq!((refused.code(), reason(&refused).as_str()), (Code::FailedPrecondition, "UNFUNDED"), "{refused}");
    assert!(refused.message().contains("deposit") && refused.message().contains('7'), "{refused}");
    // The most it can cost, to the unit.
    shop.ledger.deposit("one", &name_of(Role::App), &shop.asset, 6).await.expect("a deposit");
    assert_eq!(reason(&client.generate(ask()).await.expect_err("one short")), "UNFUNDED");
    assert_eq!(shop.begun().await, 0);
    shop.ledger.deposit("two", &name_of(Role::App), &shop.asset, 1).await.expect("a deposit");
    client.generate(ask()).await.expect("paid for");

    shop.ledger.deposit("more", &name_of(Role::App), &shop.asset, 100).await.expect("a deposit");
    shop.ledger.set_quota("q", &name_of(Role::App), &shop.asset, Some(10)).await.expect("a quota");
    let refused = client.generate(ask()).await.expect_err("over the day's quota");
    assert_eq!((refused.code(), reason(&refused).as_str()), (Code::ResourceExhausted, "OVER_QUOTA"), "{refused}");
    let after = refused.get_details_retry_info().expect("RetryInfo").retry_delay.expect("a time");
    assert!(after.as_secs() <= 24 * 60 * 60, "{after:?}");
    server.until_idle().await;
    server.stop().await.expect("a clean end");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reader_who_leaves_pays_for_what_was_made_and_who_never_ran_pays_nothing() {
    let shop = Shop::open().await;
    let charges = shop.charges();
    let server = TestServer::start_with(|setup| {
        charges(setup);
        setup.engine.max_num_seqs = 1;
    })
    .await;
    let mut client = server.inference(Role::App).await;
    let mut running = client.generate_stream(long_request()).await.expect("started").into_inner();
    running.next().await.expect("a message").expect("a token");
    // Behind the one that runs.
    let waiting = client.generate_stream(long_request()).await.expect("queued").into_inner();
    assert_eq!(shop.begun().await, 2);
    drop(waiting);
    drop(running);
    server.until_idle().await;
    // Shutdown waits for the ledger.
    server.stop().await.expect("a clean end");
    let (paid, pending) = shop.spent().await;
    assert_eq!(pending, 0);
    assert!(paid > 0 && paid < PRICES[2] * 16_000, "{paid} for part of an answer");
    let account = Account::Pending(name_of(Role::App));
    let (entries, _) = shop.ledger.entries(&account, Order::Oldest, None, 100).await.expect("entries");
    let returned: Vec<_> =
        entries.iter().filter(|entry| entry.other == Account::Application(name_of(Role::App))).collect();
    let whole = returned.iter().filter(|entry| !entry.credit).map(|entry| entry.amount).max();
    let reserved = returned.iter().find(|entry| entry.credit).map(|entry| entry.amount);
    assert_eq!(whole, reserved, "the one that waited had all of it back");
    shop.ledger.verify(|_, _| {}).await.expect("a sound ledger");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_server_cuts_off_or_refuses_is_not_charged() {
    let shop = Shop::open().await;
    let charges = shop.charges();
    let mut server = TestServer::start_with(|setup| {
        charges(setup);
        setup.engine.max_num_seqs = 1;
        setup.limits.waiting_requests_max = 1;
        setup.server.drain_grace = std::time::Duration::ZERO;
    })
    .await;
    let mut client = server.inference(Role::App).await;
    let mut running = client.generate_stream(long_request()).await.expect("started").into_inner();
    running.next().await.expect("a message").expect("a token");
    // One may wait; the others find the queue full, some at the door and some behind it.
    let (mut streams, mut statuses) = (vec![running], Vec::new());
    for _ in 0..8 {
        match client.generate_stream(long_request()).await {
            Ok(stream) => streams.push(stream.into_inner()),
            Err(status) => statuses.push(status),
        }
    }
    server.ask_to_stop();
    for mut stream in streams {
        let ended = async {
            while let Some(message) = stream.next().await {
                if let Err(status) = message {
                    return status;
                }
            }
            panic!("a cut answer ends with a status");
        };
        statuses.push(tokio::time::timeout(PATIENCE, ended).await.expect("ends in time"));
    }
    let count = |code| statuses.iter().filter(|status| status.code() == code).count();
    let (cut, refused) = (count(Code::Unavailable), count(Code::ResourceExhausted));
    assert!(cut >= 1 && refused >= 1 && cut + refused == 9, "{statuses:?}");
    server.ended().await.expect("a clean end");
    assert_eq!(shop.spent().await, (0, 0));
    assert_eq!(shop.begun().await, 9, "each was begun and given back");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_answer_goes_out_while_the_ledger_is_stuck_and_is_charged_later() {
    let shop = Shop::open().await;
    let server = TestServer::start_with(shop.charges()).await;
    let mut client = server.inference(Role::App).await;
    let mut stream = client.generate_stream(request(tokens(&[5, 6, 7]), 8_000)).await.expect("started").into_inner();
    stream.next().await.expect("a message").expect("a token");
    // Somebody else writes, and takes long.
    sqlx::any::install_default_drivers();
    let url = format!("sqlite://{}", shop.folder.path().join("ledger.db").display());
    let mut other = AnyConnection::connect(&url).await.expect("connects");
    other.execute("BEGIN IMMEDIATE").await.expect("writes");
    let mut last = None;
    while let Some(message) = stream.next().await {
        last = Some(message.expect("a message"));
    }
    let last = last.expect("messages");
    let usage = last.usage.expect("usage");
    assert_eq!(usage.completion_tokens, 8_000);
    assert_eq!(shop.spent().await.0, 0, "not charged yet");
    other.execute("ROLLBACK").await.expect("is done");
    server.stop().await.expect("a clean end");
    assert_eq!(shop.spent().await, (fee(&usage), 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_killed_server_left_open_is_given_back_by_the_next() {
    let shop = Shop::open_with(LedgerConfig { reservation_age_s: 0, ..LedgerConfig::default() }).await;
    let prices = Prices { prompt: 1_000_000, cached: 0, completion: 1_000_000 };
    shop.ledger.set_prices("p", &Target::Base, &shop.asset, prices).await.expect("prices");
    let split = Split { owner: 0, contributors: 0, base_owner: 0, parents: 0, operator: 10_000 };
    shop.ledger.set_split("s", &Target::Base, split).await.expect("a split");
    shop.ledger.deposit("d", &name_of(Role::App), &shop.asset, PREPAID).await.expect("a deposit");
    let left = Request {
        application: name_of(Role::App),
        asset: shop.asset.clone(),
        generation: None,
        alias: None,
        prompt_tokens: 10,
        completion_tokens_max: 10,
    };
    shop.ledger.reserve("left", &left).await.expect("reserved");
    assert_eq!(shop.spent().await, (0, 20));
    let server = TestServer::start_with(shop.charges()).await;
    let given_back = async {
        while shop.spent().await.1 > 0 {
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(PATIENCE, given_back).await.expect("swept");
    // Its usage, should it come after all, is refused.
    let tokens = Tokens { prompt: 10, cached: 0, completion: 1 };
    let late = Usage { request_id: "left".into(), receipt: None, tokens, payees: Payees::default() };
    assert!(shop.ledger.post("left", &late).await.is_err());
    server.stop().await.expect("a clean end");
}
