//! What an epoch owes is decided when it is sealed, adds up, and never gets less.

use openlora_ledger::{Account, Amount, Leaf, Ledger, LedgerConfig, LedgerError};

use crate::bench::{Bench, address, request, usage, usd};

/// All leaves of an epoch, checked to be in order.
pub(crate) async fn leaves(ledger: &Ledger, epoch: u64) -> Vec<Leaf> {
    let (mut fold, mut leaves) = (ledger.fold(epoch).await.expect("sealed"), Vec::new());
    loop {
        let page = fold.next().await.expect("read");
        if page.is_empty() {
            break;
        }
        leaves.extend(page);
    }
    assert!(leaves.windows(2).all(|two| (two[0].address, &two[0].asset) < (two[1].address, &two[1].asset)));
    leaves
}

async fn pay(ledger: &Ledger, key: &str, receipt: Option<&str>) {
    ledger.reserve(key, &request("app", 10, 0)).await.expect("reserved");
    ledger.post(key, &usage(receipt, 10, 0, 0)).await.expect("posted");
}

fn owed(leaves: &[Leaf]) -> Vec<(u8, u128)> {
    leaves.iter().map(|leaf| (leaf.address.0[0], leaf.cumulative)).collect()
}

#[tokio::test]
async fn amounts_accrue_without_an_address_and_a_later_address_changes_no_sealed_epoch() {
    let Bench { ledger, dir: _dir, .. } = Bench::new().await;
    ledger.deposit("d", "app", &usd(), 100_000).await.expect("deposited");
    let (owner, operator) = (Account::Owner("acme".into()), Account::Operator);
    ledger.set_address("1", &owner, Some(address(1))).await.expect("set");
    let addresses = [ledger.address(&owner).await.expect("read"), ledger.address(&operator).await.expect("read")];
    assert_eq!(addresses, [Some(address(1)), None]);
    pay(&ledger, "a", Some("ra")).await;
    let first = ledger.seal().await.expect("sealed");
    assert_eq!((first.number, first.first, first.row), (1, 1, first.last + 1));
    assert_eq!(owed(&leaves(&ledger, 1).await), [(1, 400)]);
    assert_eq!((first.paid.clone(), first.cumulative), (vec![(usd(), Amount(400))], first.paid));
    let empty = ledger.seal().await.expect_err("nothing new");
    assert!(matches!(empty, LedgerError::EmptyEpoch { last: 1 }), "{empty}");

    // Two accounts with one address are added up; the operator's first epoch without one is carried.
    pay(&ledger, "b", None).await;
    ledger.set_address("2", &owner, Some(address(2))).await.expect("set");
    ledger.set_address("3", &operator, Some(address(2))).await.expect("set");
    let second = ledger.seal().await.expect("sealed");
    assert_eq!((second.first, &second.paid), (first.row + 1, &vec![(usd(), Amount(400 + 300))]));
    assert_eq!(owed(&leaves(&ledger, 2).await), [(1, 400), (2, 700)]);
    ledger.set_address("4", &owner, None).await.expect("set");
    pay(&ledger, "c", None).await;
    ledger.seal().await.expect("sealed");
    assert_eq!(owed(&leaves(&ledger, 3).await), [(1, 400), (2, 850)]);
    for (epoch, expected) in [(1, vec![(1, 400)]), (2, vec![(1, 400), (2, 700)])] {
        assert_eq!(owed(&leaves(&ledger, epoch).await), expected, "epoch {epoch} is as it was");
    }

    ledger.claimed("x", address(1), &usd(), 400).await.expect("claimed");
    let twice = ledger.claimed("y", address(1), &usd(), 1).await.expect_err("all of it was");
    assert!(matches!(twice, LedgerError::Unfunded { available: 0, .. }), "{twice}");
    let empty = ledger.seal().await.expect_err("what is claimed was paid by an epoch before");
    assert!(matches!(empty, LedgerError::EmptyEpoch { last: 3 }), "{empty}");
    pay(&ledger, "d", None).await;
    ledger.seal().await.expect("sealed");
    assert_eq!(owed(&leaves(&ledger, 4).await), [(1, 400), (2, 1_000)], "claims are not deducted");
    let missing = ledger.fold(5).await.err().expect("not sealed");
    assert!(matches!(missing, LedgerError::NotFound { what: "epoch", .. }), "{missing}");
    assert_eq!(ledger.verify(|_, _| ()).await.expect("whole").epochs, 4);
}

#[tokio::test]
async fn an_epoch_that_would_pay_nobody_is_not_sealed_and_what_there_is_goes_to_the_first_that_does() {
    let Bench { ledger, dir: _dir, .. } = Bench::new().await;
    ledger.deposit("d", "app", &usd(), 100_000).await.expect("deposited");
    pay(&ledger, "a", Some("ra")).await;
    let nobody = ledger.seal().await.expect_err("no address");
    assert!(nobody.to_string().contains("openlora ledger address"), "{nobody}");
    let zero = ledger.set_address("z", &Account::Operator, Some(address(0))).await.expect_err("nobody's");
    assert!(zero.to_string().starts_with("address is the zero address"), "{zero}");
    ledger.set_address("o", &Account::Operator, Some(address(1))).await.expect("set");
    let first = ledger.seal().await.expect("sealed");
    assert_eq!((first.number, first.first), (1, 1));
    assert_eq!(owed(&leaves(&ledger, 1).await), [(1, 150)]);
    // Without anything new for an address, it has what it had.
    pay(&ledger, "b", None).await;
    ledger.set_address("p", &Account::Operator, None).await.expect("set");
    ledger.seal().await.expect("sealed");
    assert_eq!(owed(&leaves(&ledger, 2).await), [(1, 150)]);
}

#[tokio::test]
async fn receipts_of_an_epoch_are_those_charged_and_those_settled_in_it() {
    let config = LedgerConfig { page_rows_max: 2, ..LedgerConfig::default() };
    let Bench { ledger, dir: _dir, .. } = Bench::with(config).await;
    ledger.deposit("d", "app", &usd(), 100_000).await.expect("deposited");
    ledger.set_address("o", &Account::Operator, Some(address(1))).await.expect("set");
    pay(&ledger, "a", Some("ra")).await;
    pay(&ledger, "b", Some("rb")).await;
    ledger.attribute("ra", vec![("ann".into(), 1)], 0).await.expect("attributed");
    ledger.seal().await.expect("sealed");
    ledger.attribute("rb", vec![("ann".into(), 1)], 0).await.expect("attributed later");
    ledger.seal().await.expect("sealed");
    let mut found = Vec::new();
    for epoch in [1, 2] {
        let mut receipts = ledger.receipts(epoch).await.expect("sealed");
        loop {
            let page = receipts.next().await.expect("read");
            if page.is_empty() {
                break;
            }
            found.extend(page.into_iter().map(|one| (epoch, one.receipt, one.settled)));
        }
    }
    let expected = [(1, "ra", false), (1, "rb", false), (1, "ra", true), (2, "rb", true)];
    assert_eq!(found, expected.map(|(epoch, receipt, settled)| (epoch, receipt.to_owned(), settled)));
}

#[tokio::test]
async fn a_seal_of_more_accounts_than_fit_in_a_row_pays_each_once() {
    let config = LedgerConfig { payout_accounts_max: 3, page_rows_max: 4, ..LedgerConfig::default() };
    let Bench { ledger, dir: _dir, .. } = Bench::with(config).await;
    ledger.deposit("d", "app", &usd(), 1_000_000).await.expect("deposited");
    pay(&ledger, "a", Some("r")).await;
    let names: Vec<_> = (0..10).map(|n| format!("c{n}")).collect();
    for (n, name) in names.iter().enumerate() {
        let account = Account::Contributor(name.clone());
        ledger.set_address(name, &account, Some(address(n as u8 + 1))).await.expect("set");
    }
    ledger.attribute("r", names.into_iter().map(|name| (name, 1)).collect(), 0).await.expect("attributed");
    let epoch = ledger.seal().await.expect("sealed");
    assert_eq!(owed(&leaves(&ledger, 1).await), (1..=10).map(|n| (n, 30)).collect::<Vec<_>>());
    assert_eq!(epoch.cumulative, [(usd(), Amount(300))]);
    ledger.verify(|_, _| ()).await.expect("whole");
}
