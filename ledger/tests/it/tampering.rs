//! What is changed in the database by hand is found, and the row is named.

use openlora_ledger::{Account, LedgerError};

use crate::bench::{Bench, address, request, usage, usd};

/// 15 rows: terms (4), deposit, address, two requests (4), one receipt settled, payout, seal, quota, open reservation.
async fn used() -> Bench {
    let bench = Bench::new().await;
    let ledger = &bench.ledger;
    ledger.deposit("d", "app", &usd(), 1_000_000).await.expect("deposited");
    ledger.set_address("o", &Account::Operator, Some(address(1))).await.expect("set");
    for key in ["a", "b"] {
        ledger.reserve(key, &request("app", 10, 10)).await.expect("reserved");
        ledger.post(key, &usage(Some(key), 10, 0, 5)).await.expect("posted");
    }
    ledger.attribute("a", vec![("ann".into(), 1)], 1).await.expect("attributed");
    ledger.seal().await.expect("sealed");
    ledger.set_quota("q", "app", &usd(), Some(1_000_000)).await.expect("set");
    ledger.reserve("c", &request("app", 1, 1)).await.expect("reserved");
    bench
}

async fn found(bench: &Bench) -> (u64, String) {
    match bench.ledger.verify(|_, _| ()).await.expect_err("changed by hand") {
        LedgerError::Damaged { row, reason } => (row, reason),
        other => panic!("{other}"),
    }
}

#[tokio::test]
async fn a_row_that_is_edited_deleted_inserted_or_moved_is_named() {
    let cases = [
        ("UPDATE ledger_rows SET body = replace(body, '1000000', '2000000') WHERE seq = 5", 5),
        ("UPDATE ledger_rows SET at_ms = at_ms + 1 WHERE seq = 6", 6),
        ("UPDATE ledger_rows SET idempotency = 'close/z' WHERE seq = 8", 8),
        ("UPDATE ledger_rows SET hash = (SELECT hash FROM ledger_rows WHERE seq = 2) WHERE seq = 3", 3),
        ("DELETE FROM ledger_rows WHERE seq = 7", 7),
        ("DELETE FROM ledger_rows WHERE seq = 1", 1),
        (
            "UPDATE ledger_rows SET seq = 1000 WHERE seq = 7; UPDATE ledger_rows SET seq = 7 WHERE seq = 8; \
             UPDATE ledger_rows SET seq = 8 WHERE seq = 1000",
            7,
        ),
        (
            "INSERT INTO ledger_rows (seq, at_ms, idempotency, body, hash) \
             SELECT 16, at_ms, 'deposit/mine', body, hash FROM ledger_rows WHERE seq = 5",
            16,
        ),
        ("DELETE FROM ledger_rows WHERE seq = 15", 15),
        ("DELETE FROM ledger_rows WHERE seq > 9", 10),
    ];
    for (statements, expected) in cases {
        let bench = used().await;
        assert_eq!(bench.ledger.verify(|_, _| ()).await.expect("whole").rows, 15);
        bench.sql(statements);
        let (row, reason) = found(&bench).await;
        assert_eq!(row, expected, "{statements}: {reason}");
    }
}

#[tokio::test]
async fn every_other_table_is_compared_with_what_the_rows_make_of_it() {
    let less = "(SELECT debits FROM ledger_balances WHERE account = 'world')";
    let cases = [
        (format!("UPDATE ledger_balances SET credits = {less} WHERE account = 'operator'"), "ledger_balances"),
        (
            "INSERT INTO ledger_balances SELECT 'owner/me', asset, debits, credits FROM ledger_balances \
             WHERE account = 'world'"
                .into(),
            "ledger_balances",
        ),
        ("DELETE FROM ledger_balances WHERE account = 'pool'".into(), "ledger_balances"),
        ("DELETE FROM ledger_entries WHERE account = 'world'".into(), "ledger_entries"),
        ("INSERT INTO ledger_entries VALUES ('owner/me', 5)".into(), "ledger_entries"),
        ("UPDATE ledger_applications SET opened = 0".into(), "ledger_applications"),
        ("UPDATE ledger_applications SET per_day = NULL".into(), "ledger_applications"),
        ("DELETE FROM ledger_open".into(), "ledger_open"),
        ("UPDATE ledger_open SET at_ms = 0".into(), "ledger_open"),
        ("UPDATE ledger_held SET receipt = 'mine'".into(), "ledger_held"),
        ("UPDATE ledger_terms SET seq = 1 WHERE seq = 3".into(), "ledger_terms"),
        ("DELETE FROM ledger_addresses".into(), "ledger_addresses"),
        (format!("UPDATE ledger_leaves SET cumulative = {less}"), "ledger_leaves"),
        ("DELETE FROM ledger_totals".into(), "ledger_totals"),
        ("UPDATE ledger_head SET epoch = 0".into(), "head"),
        ("UPDATE ledger_head SET seq = seq + 1".into(), "head"),
    ];
    for (statements, table) in cases {
        let bench = used().await;
        bench.sql(&statements);
        let (_, reason) = found(&bench).await;
        assert!(reason.contains(table), "{statements}: {reason}");
    }
}
