//! What a request's money does.

use openlora_ledger::{Account, Amount, LedgerConfig, LedgerError, Order, Payees, Prices, Split, Swept, Target};

use crate::bench::{Bench, GENERATION, NOW_MS, PRICES, SPLIT, open, request, usage, usd};

#[tokio::test]
async fn a_request_pays_what_it_used_to_those_named_and_gets_the_rest_back() {
    let bench = Bench::new().await;
    bench.ledger.deposit("d", "app", &usd(), 100_000).await.expect("deposited");
    let reservation = bench.ledger.reserve("r", &request("app", 100, 200)).await.expect("reserved");
    assert_eq!(reservation.amount, 100 * 100 + 200 * 300);
    assert_eq!((bench.available("application/app").await, bench.available("pending/app").await), (30_000, 70_000));
    let posted = bench.ledger.post("r", &usage(Some("receipt"), 100, 40, 11)).await.expect("posted");
    // 60 computed, 40 cached, 11 answered.
    assert_eq!((posted.fee, posted.returned), (6_000 + 400 + 3_300, 60_300));
    let parts: Vec<_> = posted.parts.iter().map(|(account, Amount(amount))| (account.to_string(), *amount)).collect();
    let expected =
        [("base/smol", 970), ("held", 2_910), ("operator", 1_455), ("owner/acme", 3_880), ("owner/old", 485)];
    assert_eq!(parts, expected.map(|(account, amount)| (account.to_owned(), amount)));
    assert_eq!((bench.available("application/app").await, bench.available("pending/app").await), (90_300, 0));
    let shares = vec![("bob".into(), 1), ("ann".into(), 2)];
    bench.ledger.attribute("receipt", shares, 4).await.expect("attributed");
    let got = [bench.available("contributor/ann").await, bench.available("contributor/bob").await];
    // 2,910 by 2 : 1 : 4 is 831 3/7, 415 5/7 and 1,662 6/7: the two units left over go to the largest fractions.
    assert_eq!((got, bench.available("pool").await, bench.available("held").await), ([831, 416], 1_663, 0));
    bench.ledger.verify(|_, _| ()).await.expect("whole");
}

#[tokio::test]
async fn the_same_key_has_the_same_answer_and_other_content_is_refused() {
    let Bench { ledger, dir: _dir, .. } = Bench::new().await;
    let deposited = ledger.deposit("k", "app", &usd(), 1_000_000).await.expect("deposited");
    assert_eq!(ledger.deposit("k", "app", &usd(), 1_000_000).await.expect("again"), deposited);
    let other = ledger.deposit("k", "app", &usd(), 2).await.expect_err("another amount");
    assert!(matches!(other, LedgerError::KeyReused { .. }), "{other}");
    let reserved = ledger.reserve("k", &request("app", 1, 1)).await.expect("reserved");
    assert_eq!(ledger.reserve("k", &request("app", 1, 1)).await.expect("again"), reserved);
    let other = ledger.reserve("k", &request("app", 2, 1)).await.expect_err("another prompt");
    assert!(matches!(other, LedgerError::KeyReused { .. }), "{other}");
    let posted = ledger.post("k", &usage(Some("receipt"), 1, 0, 1)).await.expect("posted");
    assert_eq!(ledger.post("k", &usage(Some("receipt"), 1, 0, 1)).await.expect("again"), posted);
    let other = ledger.post("k", &usage(Some("receipt"), 1, 0, 0)).await.expect_err("less");
    assert!(matches!(other, LedgerError::KeyReused { .. }), "{other}");
    let late = ledger.void("k").await.expect_err("posted");
    assert!(matches!(late, LedgerError::Posted { .. }), "{late}");
    let settled = ledger.attribute("receipt", vec![("a".into(), 1), ("b".into(), 1)], 0).await.expect("attributed");
    let again = ledger.attribute("receipt", vec![("b".into(), 1), ("a".into(), 1)], 0).await.expect("the same table");
    assert_eq!(again, settled);
    let other = ledger.attribute("receipt", vec![("a".into(), 1)], 0).await.expect_err("another table");
    assert!(matches!(other, LedgerError::Settled { .. }), "{other}");
    ledger.reserve("v", &request("app", 1, 1)).await.expect("reserved");
    let voided = ledger.void("v").await.expect("voided");
    assert_eq!(ledger.void("v").await.expect("again"), voided);
    let late = ledger.post("v", &usage(None, 1, 0, 1)).await.expect_err("void");
    assert!(matches!(late, LedgerError::Voided { .. }), "{late}");
    ledger.verify(|_, _| ()).await.expect("whole");
}

#[tokio::test]
async fn what_cannot_be_paid_is_refused_by_name_and_changes_nothing() {
    let config = LedgerConfig { open_reservations_max: 2, assets_max: 1, ..LedgerConfig::default() };
    let bench = Bench::with(config).await;
    let ledger = &bench.ledger;
    ledger.deposit("d", "app", &usd(), 1_000).await.expect("deposited");
    let before = ledger.verify(|_, _| ()).await.expect("whole");
    let error = ledger.reserve("a", &request("app", 11, 0)).await.expect_err("1,100 of 1,000");
    assert!(matches!(error, LedgerError::Unfunded { available: 1_000, needed: 1_100, .. }), "{error}");
    let error = ledger.withdraw("w", "app", &usd(), 1_001).await.expect_err("more than there is");
    assert!(matches!(error, LedgerError::Unfunded { .. }), "{error}");
    let error = ledger.claimed("c", crate::bench::address(1), &usd(), 1).await.expect_err("nothing is owed");
    assert!(matches!(error, LedgerError::Unfunded { .. }), "{error}");
    let error = ledger.post("none", &usage(None, 1, 0, 1)).await.expect_err("no reservation");
    assert!(matches!(error, LedgerError::NotFound { .. }), "{error}");
    let error = ledger.deposit("x", "app", &usd(), 0).await.expect_err("nothing");
    assert!(error.to_string().contains("amount"), "{error}");
    let other = openlora_ledger::Asset::parse("OTHER").expect("an asset");
    let error = ledger.deposit("x", "app", &other, 1).await.expect_err("no prices in it");
    assert!(error.to_string().contains("asset"), "{error}");
    let error = ledger.set_prices("x", &Target::Base, &other, PRICES).await.expect_err("one too many");
    assert!(matches!(error, LedgerError::LimitReached { limit: "assets_max", .. }), "{error}");
    let error = ledger.set_split("x", &Target::Base, Split { owner: 1, ..SPLIT }).await.expect_err("not a whole");
    assert!(error.to_string().contains("10000"), "{error}");
    let error = ledger.set_address("x", &Account::World, None).await.expect_err("never paid");
    assert!(error.to_string().contains("world"), "{error}");
    let error = ledger.deposit("x", "app", &usd(), u128::MAX).await.expect_err("past 2^128");
    assert!(matches!(error, LedgerError::Overflow { .. }), "{error}");
    assert_eq!(ledger.verify(|_, _| ()).await.expect("whole"), before);

    ledger.reserve("1", &request("app", 1, 0)).await.expect("reserved");
    let error = ledger.post("1", &usage(None, 2, 0, 0)).await.expect_err("twice what was reserved");
    assert!(matches!(error, LedgerError::ExceedsReservation { reserved: 100, fee: 200, .. }), "{error}");
    ledger.reserve("2", &request("app", 1, 0)).await.expect("reserved");
    let error = ledger.reserve("3", &request("app", 1, 0)).await.expect_err("two are open");
    assert!(matches!(error, LedgerError::TooManyOpen { max: 2, .. }), "{error}");
    ledger.void("2").await.expect("voided");
    ledger.set_quota("q", "app", &usd(), Some(250)).await.expect("set");
    let error = ledger.reserve("4", &request("app", 2, 0)).await.expect_err("100 are in use");
    assert!(matches!(error, LedgerError::OverQuota { used: 100, needed: 200, max: 250, .. }), "{error}");
    ledger.reserve("5", &request("app", 1, 0)).await.expect("within the quota");
    ledger.verify(|_, _| ()).await.expect("whole");
}

#[tokio::test]
async fn the_most_specific_price_holds_and_a_reservation_keeps_the_one_it_was_made_with() {
    let Bench { ledger, dir: _dir, .. } = Bench::new().await;
    ledger.deposit("d", "app", &usd(), 1_000_000).await.expect("deposited");
    let per_token = |prompt: u64| Prices { prompt: prompt * 1_000_000, cached: 0, completion: 0 };
    let default = ledger.reserve("a", &request("app", 1, 0)).await.expect("reserved");
    ledger.set_prices("1", &Target::Alias("acme/cwe".into()), &usd(), per_token(7)).await.expect("set");
    assert_eq!(ledger.reserve("b", &request("app", 1, 0)).await.expect("reserved").amount, 7);
    let row = ledger.set_prices("2", &Target::Generation(GENERATION.into()), &usd(), per_token(9)).await.expect("set");
    let reserved = ledger.reserve("c", &request("app", 1, 0)).await.expect("reserved");
    assert_eq!((reserved.amount, reserved.prices.row), (9, row));
    let base = openlora_ledger::Request { generation: None, alias: None, ..request("app", 1, 0) };
    ledger.set_prices("3", &Target::Base, &usd(), per_token(2)).await.expect("set");
    assert_eq!(ledger.reserve("d", &base).await.expect("reserved").amount, 2);
    assert_eq!(default.amount, 100);
    assert_eq!(ledger.post("a", &usage(None, 1, 0, 0)).await.expect("posted").fee, 100);
    ledger.verify(|_, _| ()).await.expect("whole");
}

#[tokio::test]
async fn parts_for_which_nobody_is_named_go_to_the_pool_and_rounding_up_to_dust() {
    let bench = Bench::new().await;
    bench.ledger.deposit("d", "app", &usd(), 1_000_000).await.expect("deposited");
    let prices = Prices { prompt: 333_333, cached: 0, completion: 0 };
    bench.ledger.set_prices("p", &Target::Adapters, &usd(), prices).await.expect("set");
    bench.ledger.reserve("r", &request("app", 100, 0)).await.expect("reserved");
    let nobody = openlora_ledger::Usage { payees: Payees::default(), ..usage(None, 100, 0, 0) };
    // 33.3333 units: 34 are charged and 33 split.
    assert_eq!(bench.ledger.post("r", &nobody).await.expect("posted").fee, 34);
    assert_eq!((bench.available("dust").await, bench.available("operator").await), (1, 5));
    assert_eq!(bench.available("pool").await, 28);
}

#[tokio::test]
async fn a_sweep_voids_old_reservations_and_pools_what_nobody_attributed() {
    let bench = Bench::new().await;
    let ledger = &bench.ledger;
    ledger.deposit("d", "app", &usd(), 1_000_000).await.expect("deposited");
    ledger.reserve("old", &request("app", 10, 10)).await.expect("reserved");
    ledger.reserve("posted", &request("app", 10, 10)).await.expect("reserved");
    ledger.post("posted", &usage(Some("receipt"), 10, 0, 10)).await.expect("posted");
    assert_eq!(ledger.sweep().await.expect("swept"), Swept::default());
    let hour = open(&bench.url, LedgerConfig::default(), || NOW_MS + 3_600_000).await;
    assert_eq!(hour.sweep().await.expect("swept"), Swept { voided: 1, pooled: 0 });
    let late = hour.post("old", &usage(None, 1, 0, 1)).await.expect_err("void");
    assert!(matches!(late, LedgerError::Voided { .. }), "{late}");
    let week = open(&bench.url, LedgerConfig::default(), || NOW_MS + 7 * 24 * 3_600_000).await;
    assert_eq!(week.sweep().await.expect("swept"), Swept { voided: 0, pooled: 1 });
    assert_eq!((bench.available("pool").await, bench.available("pending/app").await), (1_200, 0));
    let late = week.attribute("receipt", vec![("a".into(), 1)], 0).await.expect_err("it went to the pool");
    assert!(matches!(late, LedgerError::Settled { .. }), "{late}");
    week.verify(|_, _| ()).await.expect("whole");
}

#[tokio::test]
async fn entries_are_paged_from_either_end() {
    let Bench { ledger, dir: _dir, .. } = Bench::new().await;
    for n in 1..=5_u128 {
        ledger.deposit(&n.to_string(), "app", &usd(), n).await.expect("deposited");
    }
    let app = Account::Application("app".into());
    for (order, expected) in [(Order::Oldest, [1, 2, 3, 4, 5]), (Order::Newest, [5, 4, 3, 2, 1])] {
        let (mut cursor, mut amounts) = (None, Vec::new());
        loop {
            let (entries, next) = ledger.entries(&app, order, cursor, 2).await.expect("read");
            assert!(entries.iter().all(|entry| entry.credit && entry.other == Account::World));
            amounts.extend(entries.iter().map(|entry| entry.amount));
            cursor = next;
            if cursor.is_none() {
                break;
            }
        }
        assert_eq!(amounts, expected);
    }
    let error = ledger.entries(&app, Order::Oldest, None, 1_001).await.expect_err("too many");
    assert!(error.to_string().contains("page_rows_max"), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_tasks_spend_one_deposit_and_not_a_unit_more() {
    let bench = Bench::new().await;
    // Enough for 50 of the 80.
    bench.ledger.deposit("d", "app", &usd(), 50 * 400).await.expect("deposited");
    let tasks = (0..80).map(|n| {
        let ledger = bench.ledger.clone();
        tokio::spawn(async move {
            let key = n.to_string();
            match ledger.reserve(&key, &request("app", 1, 1)).await {
                Ok(_) => ledger.post(&key, &usage(None, 1, 0, 1)).await.map(|posted| posted.fee),
                Err(error) => Err(error),
            }
        })
    });
    let (mut paid, mut refused) = (0, 0);
    for task in tasks.collect::<Vec<_>>() {
        match task.await.expect("ended") {
            Ok(fee) => paid += fee,
            Err(LedgerError::Unfunded { .. }) => refused += 1,
            Err(error) => panic!("{error}"),
        }
    }
    assert_eq!((paid, refused), (20_000, 30));
    assert_eq!(bench.available("application/app").await, 0);
    bench.ledger.verify(|_, _| ()).await.expect("whole");
}

#[tokio::test]
async fn what_is_asked_in_one_breath_is_done_in_its_order_and_once() {
    let bench = Bench::new().await;
    let ledger = &bench.ledger;
    let (usd, two, one) = (usd(), request("app", 2, 0), usage(Some("receipt"), 1, 0, 0));
    // They queue in this order, and share a transaction or not as the writer's thread comes to them.
    let (first, second, early, reserved, dear, posted, voided, settled) = tokio::join!(
        ledger.deposit("k", "app", &usd, 200),
        ledger.deposit("k", "app", &usd, 200),
        ledger.post("r", &one),
        ledger.reserve("r", &two),
        ledger.reserve("dear", &two),
        ledger.post("r", &one),
        ledger.void("r"),
        ledger.attribute("receipt", vec![("ann".into(), 1)], 0),
    );
    assert_eq!(first.expect("deposited"), second.expect("deposited once"));
    assert!(matches!(early, Err(LedgerError::NotFound { .. })), "{early:?}");
    assert_eq!(reserved.expect("reserved").amount, 200);
    assert!(matches!(dear, Err(LedgerError::Unfunded { available: 0, .. })), "{dear:?}");
    assert_eq!(posted.expect("posted").returned, 100);
    assert!(matches!(voided, Err(LedgerError::Posted { .. })), "{voided:?}");
    assert_eq!(settled.expect("settled").amount, 30);
    assert_eq!((bench.available("application/app").await, bench.available("contributor/ann").await), (100, 30));
    ledger.verify(|_, _| ()).await.expect("whole");
}

#[tokio::test]
async fn a_damaged_row_is_told_to_who_asks_for_it_alone() {
    let bench = Bench::new().await;
    let ledger = &bench.ledger;
    ledger.deposit("d", "app", &usd(), 100_000).await.expect("deposited");
    ledger.reserve("a", &request("app", 1, 0)).await.expect("reserved");
    bench.sql("UPDATE ledger_rows SET at_ms = -1 WHERE idempotency = 'open/a'");
    let (usd, used) = (usd(), usage(None, 1, 0, 0));
    let (damaged, other) = tokio::join!(ledger.post("a", &used), ledger.deposit("e", "app", &usd, 1));
    let damaged = damaged.expect_err("damaged").to_string();
    assert!(damaged.contains("at_ms") && damaged.contains("openlora ledger verify"), "{damaged}");
    other.expect("deposited");
}
