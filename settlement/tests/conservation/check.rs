//! What is there after a process ended, read past the code that is tested, against the books.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use alloy::primitives::{Address, B256, Bytes, U256};
use alloy::sol_types::{SolCall, SolEvent as _};
use openlora_database::testing;
use openlora_settlement::bundles::Bundles;
use openlora_settlement::contracts::{OpenToken, RewardSettlement};
use openlora_settlement::deploy::{Deployment, Plan};
use openlora_settlement::epochs::bundle_of;
use openlora_settlement::outbox::UnixMs;
use serde_json::{Value, json};

use crate::anvil::{self, ACCOUNT, Anvil};
use crate::books::{Books, Chain, Cut, Epoch, Sums, payout};
use crate::stage::{self, WINDOW, address, asset};
use crate::steps::{ADDRESSES, Step};

/// Blocks that are asked for at once.
const BLOCKS: u64 = 200;

/// Checks ledger, bundles and chain after a process that may have done some of the steps `rest` without a word of it. Returns
/// the books with those in them.
pub(crate) async fn after(
    anvil: &Anvil,
    dir: &Path,
    deployment: &Deployment,
    mut books: Books,
    rest: &[Step],
    what: &str,
) -> Books {
    let ledger = stage::ledger(dir).await;
    let rows = ledger.verify(|_, _| {}).await.unwrap_or_else(|error| panic!("{what}: {error}")).rows;
    ledger.close().await;
    let mut unheard = rest.iter();
    while books.rows < rows {
        let step = unheard.next().unwrap_or_else(|| panic!("{what}: rows that nobody asked for"));
        // Cut off or not, the rows there are are followed.
        let (Ok(_) | Err(Cut)) = books.follow(step, rows);
    }
    assert_eq!(books.rows, rows, "{what}");
    assert_eq!(accounts(dir).await, books.accounts, "{what}");
    check_bundles(dir, &books, what);

    let found = chain(anvil, deployment);
    // A step that is done alone may have got onto the chain before the process died.
    if let Some(step) = rest.first().filter(|step| found != books.chain && !step.is_written_together()) {
        books.follow(step, u64::MAX).expect("never cut off");
    }
    assert_eq!(found, books.chain, "{what}: {:?}", rest.first());
    books
}

/// The table of balances: what it is made of has been checked by `verify`, its lines are checked here one by one.
async fn accounts(dir: &Path) -> BTreeMap<String, Sums> {
    let url = stage::url(dir, "ledger").await;
    let rows = testing::rows(&url, "SELECT account, credits, debits FROM ledger_balances WHERE asset = 'OPEN'").await;
    let amount = |bytes: Vec<u8>| u128::from_be_bytes(bytes.try_into().expect("16 bytes"));
    let sums: BTreeMap<String, Sums> =
        rows.into_iter().map(|(account, credits, debits)| (account, (amount(credits), amount(debits)))).collect();
    let (got, gave) = sums.values().fold((0, 0), |(got, gave), sums| (got + sums.0, gave + sums.1));
    assert_eq!(got, gave, "what one account gets another gives");
    sums.into_iter().filter(|(_, sums)| *sums != (0, 0)).collect()
}

/// Each bundle that has its name is whole and says what the books say.
fn check_bundles(dir: &Path, books: &Books, what: &str) {
    let Ok(files) = fs::read_dir(dir.join("bundles")) else { return };
    let mut found = 0;
    for file in files {
        let name = file.expect("a file").file_name().into_string().expect("text");
        let Some(number) = name.strip_prefix("epoch-").and_then(|rest| rest.strip_suffix(".json")) else { continue };
        let number: usize = number.parse().expect("an epoch");
        let json = fs::read(dir.join("bundles").join(&name)).expect("readable");
        let file: Value = serde_json::from_slice(&json).unwrap_or_else(|error| panic!("{what}, {name}: {error}"));
        let text = |value: &Value| value.as_str().expect("text").to_owned();
        let pairs = |list: &str| {
            let list = file[list].as_array().expect("a list").iter();
            list.map(|pair| (text(&pair[0]), text(&pair[1]))).collect::<Vec<_>>()
        };
        let byte = |account: &str| u8::from_str_radix(&account[2..4], 16).expect("a byte");
        let epoch = Epoch {
            leaves: pairs("payouts").iter().map(|(a, sum)| (byte(a), sum.parse().expect("a number"))).collect(),
            receipts: pairs("receipts").into_iter().map(|(receipt, _)| receipt).collect(),
        };
        assert_eq!(epoch, books.epochs[number - 1], "{what}, {name}");
        assert_eq!(text(&file["manifest"]["total"]), epoch.total().to_string(), "{what}, {name}");
        found += 1;
    }
    assert!(found >= books.published, "{what}: {found} bundles");
}

/// What several calls return.
fn views(anvil: &Anvil, calls: impl IntoIterator<Item = (Address, Vec<u8>)>) -> Vec<Bytes> {
    let call = |(to, data): (Address, Vec<u8>)| json!([{ "to": to, "data": Bytes::from(data) }, "latest"]);
    let answers = anvil::ask_all(anvil.port, "eth_call", calls.into_iter().map(call));
    answers.into_iter().map(|answer| serde_json::from_value(answer).expect("bytes")).collect()
}

fn amount(word: &Bytes) -> u128 {
    U256::from_be_slice(word).to()
}

/// What the chain says, once what must always hold has been checked.
fn chain(anvil: &Anvil, deployment: &Deployment) -> Chain {
    let (settlement, token) = (deployment.settlement, deployment.token);
    let balance = |account| (token, OpenToken::balanceOfCall { account }.abi_encode());
    let payees = || (1..=ADDRESSES).map(address);
    let claimed = payees().map(|account| (settlement, RewardSettlement::claimedCall { account }.abi_encode()));
    let [totals, proposal] = [
        (settlement, RewardSettlement::totalsCall {}.abi_encode()),
        (settlement, RewardSettlement::proposalCall {}.abi_encode()),
    ];
    let calls = [totals, proposal, balance(settlement), balance(ACCOUNT)];
    let answers = views(anvil, calls.into_iter().chain(claimed).chain(payees().map(balance)));
    let totals = RewardSettlement::totalsCall::abi_decode_returns(&answers[0]).expect("totals");
    let proposal = RewardSettlement::proposalCall::abi_decode_returns(&answers[1]).expect("a proposal");
    let (held, kept) = (amount(&answers[2]), U256::from_be_slice(&answers[3]));
    let (claimed, received) = answers[4..].split_at(usize::from(ADDRESSES));
    assert_eq!(claimed, received, "an address has what the contract paid it");
    let claimed = (1..).zip(claimed.iter().map(amount)).filter(|(_, claimed)| *claimed > 0);
    let chain = Chain {
        sent: anvil.nonce(ACCOUNT),
        epoch: totals.epoch.into(),
        finalized: totals.finalized.to(),
        open: (proposal.status != 0).then(|| proposal.epoch.into()),
        claimed: claimed.collect(),
        funded: held + totals.claimed.to::<u128>(),
    };
    assert_eq!(chain.paid(), totals.claimed.to::<u128>(), "all that was claimed was paid");
    let supply = Plan::local(ACCOUNT, WINDOW).supply;
    assert_eq!(kept + U256::from(chain.funded), supply, "no token is anywhere else");
    chain
}

/// When everything is done: nobody is owed anything, and the chain's history has each epoch and each nonce once.
pub(crate) async fn end(anvil: &Anvil, dir: &Path, deployment: &Deployment, books: &Books) {
    let Some(last) = books.epochs.last() else { panic!("nothing was sealed") };
    assert_eq!((books.chain.epoch as usize, books.published), (books.epochs.len(), books.epochs.len()));
    assert_eq!((&books.chain.claimed, books.chain.finalized), (&last.leaves, last.total()));
    for number in 1..=ADDRESSES {
        let (got, gave) = books.accounts.get(&payout(number)).copied().unwrap_or_default();
        assert_eq!((got, gave), (last.leaves.get(&number).copied().unwrap_or_default(), got), "{number}");
    }
    check_events(anvil, deployment, books);
    check_transactions(anvil, books.chain.sent);

    let (ledger, bundles) = (stage::ledger(dir).await, Bundles::open("", &dir.join("bundles")).expect("a folder"));
    let contract = stage::contract(anvil.port, deployment.settlement).await;
    for epoch in 1..=books.chain.epoch {
        let again = bundle_of(&ledger, epoch, contract.settles(), &asset()).await.expect("sealed");
        let published = bundles.get(epoch).await.expect("whole").expect("published");
        assert_eq!(again.to_json(), published.to_json(), "epoch {epoch}");
    }
    let rest = stage::sender(dir, contract.chain().clone()).await.turn_at(UnixMs(i64::MAX)).await.expect("a turn");
    assert_eq!((rest.signed, rest.broadcast, rest.gaps_filled, rest.finalized), (0, 0, 0, 0), "{rest:?}");
}

/// Each epoch was proposed and finalized once, in order, with the total of the books; each address was paid step by step up to
/// what the books say.
fn check_events(anvil: &Anvil, deployment: &Deployment, books: &Books) {
    let (mut proposed, mut finalized, mut paid) = (Vec::new(), Vec::new(), BTreeMap::<Address, U256>::new());
    let filter = json!([{ "address": deployment.settlement, "fromBlock": "0x0", "toBlock": "latest" }]);
    for log in anvil.ask("eth_getLogs", filter).as_array().expect("a list") {
        let topics: Vec<B256> = serde_json::from_value(log["topics"].clone()).expect("topics");
        let data: Bytes = serde_json::from_value(log["data"].clone()).expect("data");
        if topics[0] == RewardSettlement::Proposed::SIGNATURE_HASH {
            let event = RewardSettlement::Proposed::decode_raw_log(topics, &data).expect("as in the ABI");
            proposed.push((event.epoch, event.totalCumulative));
        } else if topics[0] == RewardSettlement::Finalized::SIGNATURE_HASH {
            let event = RewardSettlement::Finalized::decode_raw_log(topics, &data).expect("as in the ABI");
            finalized.push((event.epoch, event.totalCumulative));
        } else if topics[0] == RewardSettlement::Claimed::SIGNATURE_HASH {
            let event = RewardSettlement::Claimed::decode_raw_log(topics, &data).expect("as in the ABI");
            let sum = paid.entry(event.account).or_default();
            *sum += event.amount;
            assert_eq!((event.recipient, event.cumulative), (event.account, *sum));
        }
    }
    let expected: Vec<_> = (1..).zip(books.epochs.iter().map(|epoch| U256::from(epoch.total()))).collect();
    assert_eq!((&proposed, &finalized), (&expected, &expected));
    let claimed = books.chain.claimed.iter().map(|(number, claimed)| (address(*number), U256::from(*claimed)));
    assert_eq!(paid, claimed.collect());
}

/// The account's nonces are 0, 1, 2, … in the order of the blocks, all succeeded, and nothing waits for a block.
fn check_transactions(anvil: &Anvil, sent: u64) {
    let blocks = anvil::number(&anvil.ask("eth_blockNumber", json!([]))) + 1;
    let (mut nonces, mut hashes) = (Vec::new(), Vec::new());
    for first in (0..blocks).step_by(BLOCKS as usize) {
        let numbers = first..blocks.min(first + BLOCKS);
        let questions = numbers.map(|number| json!([format!("{number:#x}"), true]));
        for block in anvil::ask_all(anvil.port, "eth_getBlockByNumber", questions) {
            for transaction in block["transactions"].as_array().expect("a list") {
                let from: Address = serde_json::from_value(transaction["from"].clone()).expect("an address");
                if from == ACCOUNT {
                    nonces.push(anvil::number(&transaction["nonce"]));
                    hashes.push(json!([transaction["hash"]]));
                }
            }
        }
    }
    assert_eq!(nonces, (0..sent).collect::<Vec<_>>());
    for receipt in anvil::ask_all(anvil.port, "eth_getTransactionReceipt", hashes) {
        assert_eq!(anvil::number(&receipt["status"]), 1, "{receipt}");
    }
    assert_eq!(anvil.pool(), Vec::<B256>::new());
}
