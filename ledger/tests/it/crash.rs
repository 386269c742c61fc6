//! Processes killed while they write, and a disk that takes no more: nothing is half done, nothing is done twice.

use std::{
    env, fs,
    os::unix::process::ExitStatusExt as _,
    path::Path,
    process::{Command, Stdio},
    time::Duration,
};

use openlora_database::{DatabaseUrl, kill, testing::failing_disk};
use openlora_ledger::{Account, Ledger, LedgerConfig, LedgerError};
use openlora_types::Classify as _;
use tempfile::TempDir;

use crate::bench::{NOW_MS, address, available, open, request, set_terms, url, usage, usd};

/// Set for the children of these tests: the folder they work in.
const CHILD: &str = "OPENLORA_TEST_LEDGER_CHILD";
/// What a child prints before each thing that it was told is done.
const ANSWERED: &str = "answered: ";
/// What everything costs that children do: one deposit.
const DEPOSIT: u128 = 1_000_000_000;

/// Everything the ledger does, once, in order.
async fn everything(ledger: &Ledger) -> Result<(), LedgerError> {
    set_terms(ledger).await;
    ledger.deposit("d", "app", &usd(), DEPOSIT).await?;
    println!("{ANSWERED}deposit");
    ledger.set_address("o", &Account::Owner("acme".into()), Some(address(1))).await?;
    ledger.reserve("r", &request("app", 10, 10)).await?;
    println!("{ANSWERED}reserve");
    ledger.post("r", &usage(Some("receipt"), 10, 0, 10)).await?;
    println!("{ANSWERED}post");
    ledger.attribute("receipt", vec![("ann".into(), 1)], 1).await?;
    println!("{ANSWERED}attribute");
    ledger.reserve("v", &request("app", 10, 10)).await?;
    ledger.void("v").await?;
    match ledger.seal().await {
        Ok(_) | Err(LedgerError::EmptyEpoch { .. }) => {}
        Err(error) => return Err(error),
    }
    println!("{ANSWERED}seal");
    Ok(())
}

#[tokio::test]
#[ignore = "the child of the tests below"]
async fn child_that_does_everything_once() {
    let dir = env::var_os(CHILD).expect("started by its parent");
    let ledger = open(&url(Path::new(&dir)), LedgerConfig::default(), || NOW_MS).await;
    everything(&ledger).await.expect("done");
}

/// What the accounts have when everything was done once.
async fn check_everything(ledger: &Ledger, point: &str) {
    let fee = 10 * 100 + 10 * 300;
    let expected = [
        ("application/app", DEPOSIT - fee),
        ("pending/app", 0),
        ("payout/0x0101010101010101010101010101010101010101", 1_600),
        ("owner/old", 200),
        ("base/smol", 400),
        ("operator", 600),
        ("contributor/ann", 600),
        ("pool", 600),
        ("held", 0),
    ];
    for (account, amount) in expected {
        assert_eq!(available(ledger, account).await, amount, "{point}: {account}");
    }
    let verified = ledger.verify(|_, _| ()).await.expect(point);
    assert_eq!(verified.epochs, 1, "{point}");
}

#[tokio::test]
async fn killed_at_every_persistence_point_everything_is_done_once_in_the_end() {
    let points = [
        "after the row",
        "after the balances",
        "before the commit",
        "between changes and commit",
        "between commit and answer",
    ];
    let mut killed = 0;
    for point in points.iter().flat_map(|point| (1..=14).map(move |n| format!("{point}#{n}"))) {
        killed += usize::from(killed_at(&point).await);
    }
    assert!(killed >= points.len() * 12, "each of a dozen rows was interrupted at each point: {killed}");
    assert!(killed_at("between payouts and seal#1").await);
}

/// Whether a child got as far as `point`; checks what it left, and that doing everything again completes it.
async fn killed_at(point: &str) -> bool {
    let dir = TempDir::new().expect("a temporary folder");
    let ended = child("child_that_does_everything_once", dir.path(), "").env(kill::AT, point).output().expect("ran");
    let (said, errors) = (String::from_utf8_lossy(&ended.stdout), String::from_utf8_lossy(&ended.stderr));
    let killed = ended.status.signal() == Some(9);
    assert!(killed || ended.status.success(), "{point}: {errors}");
    let ledger = open(&url(dir.path()), LedgerConfig::default(), || NOW_MS).await;
    ledger.verify(|_, _| ()).await.expect(point);
    check_answered(&ledger, &said, point).await;
    everything(&ledger).await.expect(point);
    check_everything(&ledger, point).await;
    killed
}

/// What was answered is there; what was not is there as a whole or not at all, which `verify` checks.
async fn check_answered(ledger: &Ledger, said: &str, point: &str) {
    let world = ledger.balance(&Account::World, &usd()).await.expect("read").debits;
    assert!(world == DEPOSIT || (world == 0 && !said.contains("answered: deposit")), "{point}: {world}");
    let held = available(ledger, "held").await + ledger.balance(&Account::Pool, &usd()).await.expect("read").credits;
    assert!(held > 0 || !said.contains("answered: post"), "{point}");
    assert!(ledger.last_epoch().await.expect("read") == 1 || !said.contains("answered: seal"), "{point}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "the child of a_process_killed_at_any_instant_posts_nothing_twice_and_loses_nothing_answered"]
async fn child_that_posts_for_ever() {
    let dir = env::var_os(CHILD).expect("started by its parent");
    let dir = Path::new(&dir);
    let ledger = open(&url(dir), LedgerConfig::default(), || NOW_MS).await;
    let tasks = (0..8).map(|task| {
        let (ledger, dir) = (ledger.clone(), dir.to_owned());
        tokio::spawn(async move {
            // From the start: what was done before is answered as it was.
            for n in 0..100_000_u64 {
                let key = format!("{task}/{n}");
                ledger.reserve(&key, &request("app", 10, n % 10)).await.expect("reserved");
                ledger.post(&key, &usage(Some(&key), 10, n % 7, n % 10)).await.expect("posted");
                println!("{ANSWERED}{key}");
                ledger.attribute(&key, vec![("ann".into(), 1 + n)], 3).await.expect("attributed");
                fs::write(dir.join("progress"), "").expect("written");
            }
        })
    });
    for task in tasks.collect::<Vec<_>>() {
        task.await.expect("ended");
    }
}

#[tokio::test]
async fn a_process_killed_at_any_instant_posts_nothing_twice_and_loses_nothing_answered() {
    let dir = TempDir::new().expect("a temporary folder");
    let url = url(dir.path());
    let ledger = open(&url, LedgerConfig::default(), || NOW_MS).await;
    set_terms(&ledger).await;
    ledger.deposit("d", "app", &usd(), DEPOSIT).await.expect("deposited");
    let mut answered = std::collections::BTreeSet::new();
    for round in 0..8 {
        let mut child = child("child_that_posts_for_ever", dir.path(), "").spawn().expect("started");
        let progress = dir.path().join("progress");
        while !progress.exists() && child.try_wait().expect("asked").is_none() {
            std::thread::sleep(Duration::from_millis(5));
        }
        // An uneven step, so that rounds stop at different places.
        std::thread::sleep(Duration::from_millis(37 * round));
        child.kill().expect("killed");
        let ended = child.wait_with_output().expect("ended");
        assert_eq!(ended.status.signal(), Some(9), "{}", String::from_utf8_lossy(&ended.stderr));
        fs::remove_file(progress).expect("the child got as far as its first post");
        let said = String::from_utf8_lossy(&ended.stdout).into_owned();
        answered.extend(said.lines().filter_map(|line| line.strip_prefix(ANSWERED)).map(str::to_owned));
        ledger.verify(|_, _| ()).await.expect("whole");
    }
    // Each answered post is there: asked again it has its row, and no balance changes.
    let before = available(&ledger, "application/app").await;
    let rows = ledger.verify(|_, _| ()).await.expect("whole").rows;
    for key in &answered {
        let n: u64 = key.split_once('/').and_then(|(_, n)| n.parse().ok()).expect("a key");
        let again = ledger.post(key, &usage(Some(key), 10, n % 7, n % 10)).await.expect("there");
        assert!(again.row <= rows);
    }
    assert_eq!(available(&ledger, "application/app").await, before);
    assert!(!answered.is_empty());
    // What was reserved and not posted comes back by the sweep, and the totals are what was deposited.
    let late = open(&url, LedgerConfig::default(), || NOW_MS + 3_600_000).await;
    late.sweep().await.expect("swept");
    assert_eq!(available(&ledger, "pending/app").await, 0);
    let mut total = 0;
    for account in
        ["application/app", "owner/acme", "owner/old", "base/smol", "operator", "contributor/ann", "pool", "held"]
    {
        total += available(&ledger, account).await;
    }
    assert_eq!(total, DEPOSIT);
}

#[tokio::test]
#[ignore = "the child of a_disk_that_takes_no_more_refuses_and_loses_nothing"]
async fn child_whose_disk_is_full() {
    let dir = env::var_os(CHILD).expect("started by its parent");
    let ledger = open(&url(Path::new(&dir)), LedgerConfig::default(), || NOW_MS).await;
    for n in 0..100_000 {
        match ledger.deposit(&n.to_string(), "app", &usd(), 1).await {
            Ok(_) => println!("{ANSWERED}{n}"),
            Err(error) => {
                assert!(matches!(error, LedgerError::Database(_)) && error.is_retryable(), "{error}");
                println!("refused");
                return;
            }
        }
    }
}

#[tokio::test]
async fn a_disk_that_takes_no_more_refuses_and_loses_nothing() {
    if env::var_os("OPENLORA_TEST_POSTGRES").is_some() {
        return; // The disk of another process.
    }
    let dir = TempDir::new().expect("a temporary folder");
    let ledger = open(&url(dir.path()), LedgerConfig::default(), || NOW_MS).await;
    set_terms(&ledger).await;
    ledger.close().await;
    // Files may not pass one MiB: the kernel refuses the write halfway, as a full disk does.
    let ended = child("child_whose_disk_is_full", dir.path(), "trap '' XFSZ; ulimit -f 2048;").output().expect("ran");
    let said = String::from_utf8_lossy(&ended.stdout).into_owned();
    assert!(ended.status.success() && said.contains("refused"), "{}", String::from_utf8_lossy(&ended.stderr));
    let ledger = open(&url(dir.path()), LedgerConfig::default(), || NOW_MS).await;
    let answered = said.lines().filter(|line| line.starts_with(ANSWERED)).count() as u128;
    ledger.verify(|_, _| ()).await.expect("whole");
    // The refused one may have been committed before the disk said no to what comes after.
    let there = available(&ledger, "application/app").await;
    assert!(there == answered || there == answered + 1, "{there} of {answered}");
    ledger.deposit("next", "app", &usd(), 1).await.expect("there is room again");
}

#[tokio::test]
#[ignore = "the child of a_write_or_flush_that_fails_is_told_and_loses_and_invents_nothing"]
async fn child_whose_disk_fails_once() {
    let dir = env::var_os(CHILD).expect("started by its parent");
    let url = DatabaseUrl::parse("url", &url(Path::new(&dir))).expect("a URL");
    let told = |error: LedgerError| {
        assert!(matches!(error, LedgerError::Database(_)) && error.is_retryable(), "{error}");
        println!("refused: {error}");
    };
    let opened = match Ledger::open(&url, LedgerConfig::default()).await {
        Err(error) => {
            told(error);
            Ledger::open(&url, LedgerConfig::default()).await
        }
        opened => opened,
    };
    let ledger = opened.expect("opened the second time");
    let next = async || ledger.set_address("next", &Account::Pool, None).await.map(drop);
    let done = match everything(&ledger).await {
        Ok(()) => next().await,
        failed => failed,
    };
    if let Err(error) = done {
        told(error);
    }
    // One call fails: whatever it stopped, the next operation goes through.
    next().await.expect("the disk works again");
    println!("{ANSWERED}next");
}

#[tokio::test]
async fn a_write_or_flush_that_fails_is_told_and_loses_and_invents_nothing() {
    if env::var_os("OPENLORA_TEST_POSTGRES").is_some() {
        return; // The disk of another process.
    }
    let library = TempDir::new().expect("a temporary folder");
    let library = failing_disk(library.path());
    // A transaction is flushed once and written in many pieces.
    for (call, step, full) in [("FAIL_FLUSH", 1, false), ("FAIL_WRITE", 13, false), ("FAIL_WRITE", 13, true)] {
        let mut refused = 0;
        for number in (1..).step_by(step) {
            let dir = TempDir::new().expect("a temporary folder");
            let ledger = open(&url(dir.path()), LedgerConfig::default(), || NOW_MS).await;
            set_terms(&ledger).await;
            ledger.close().await;
            let mut child = child("child_whose_disk_fails_once", dir.path(), "");
            child.env("LD_PRELOAD", &library).env(call, number.to_string());
            if full {
                child.env("FAIL_FULL", "1");
            }
            let ended = child.output().expect("ran");
            let (said, errors) = (String::from_utf8_lossy(&ended.stdout), String::from_utf8_lossy(&ended.stderr));
            let point = format!("{call} {number}, full: {full}: {said}{errors}");
            assert!(ended.status.success() && said.contains("answered: next"), "{point}");
            if said.contains("refused") {
                refused += 1;
                assert!(said.contains(if full { "disk is full" } else { "disk I/O error" }), "{point}");
            } else {
                assert!(said.contains("answered: seal"), "{point}");
            }
            let ledger = open(&url(dir.path()), LedgerConfig::default(), || NOW_MS).await;
            ledger.verify(|_, _| ()).await.expect(&point);
            check_answered(&ledger, &said, &point).await;
            // Sealing is the last of it: again it would close an epoch of the operation that went through.
            if ledger.last_epoch().await.expect("read") == 0 {
                everything(&ledger).await.expect(&point);
            }
            check_everything(&ledger, &point).await;
            if !errors.contains("the disk failed") {
                break;
            }
        }
        // Ten transactions; SQLite flushes folders too and tells nobody where that fails.
        assert!(refused >= 5, "{call}, full: {full}: {refused} refused");
    }
}

/// Starts this test binary again to run `test` alone in `dir`; `before` are shell commands that prepare it.
fn child(test: &str, dir: &Path, before: &str) -> Command {
    let mut command = Command::new("sh");
    let binary = env::current_exe().expect("this binary");
    command.arg("-c").arg(format!("{before} exec \"$0\" --exact crash::{test} --ignored --nocapture"));
    command.arg(binary).env(CHILD, dir).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}
