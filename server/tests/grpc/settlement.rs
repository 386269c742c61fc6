//! Whose accounts and epochs are shown to whom, and what is said where there is no chain.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use openlora_database::DatabaseUrl;
use openlora_ledger::{
    Account, Address, Asset, Ledger, LedgerConfig, LedgerError, Payees, Prices, Request, Split, Target, Tokens, Usage,
};
use openlora_proto::v1 as wire;
use openlora_proto::v1::get_claim_proof_request::Whose;
use openlora_proto::v1::settlement_client::SettlementClient;
use openlora_server::keys::Role;
use openlora_server::{Books, ClaimProof, Epochs, EpochsError, Place, Proposed, Sealed, Standing};
use tonic::{Code, Status, Streaming};
use tonic_types::StatusExt as _;

use crate::harness::{Keyed, PATIENCE, TestServer, name_of};

const ANN: Address = Address([0xa1; 20]);

fn usd() -> Asset {
    Asset::parse("USD").expect("an asset")
}

/// A ledger where an application of the tests' keys has paid 1,000 units a request to an owner, a contributor and the operator.
async fn books(folder: &tempfile::TempDir, requests: u64) -> Books {
    let url = DatabaseUrl::sqlite(&folder.path().join("ledger.db"));
    let ledger = Ledger::open(&url, LedgerConfig::default()).await.expect("a ledger");
    let prices = Prices { prompt: 1_000_000, cached: 0, completion: 3_000_000 };
    ledger.set_prices("p", &Target::Base, &usd(), prices).await.expect("priced");
    let split = Split { owner: 5_000, contributors: 3_000, base_owner: 0, parents: 0, operator: 2_000 };
    ledger.set_split("s", &Target::Base, split).await.expect("split");
    ledger.deposit("d", &name_of(Role::App), &usd(), 1_000_000).await.expect("deposited");
    let contributor = Account::Contributor(name_of(Role::Contributor));
    ledger.set_address("a", &contributor, Some(ANN)).await.expect("an address");
    let books = Books { ledger, asset: usd(), charge: false, base_owner: None };
    for number in 0..requests {
        use_once(&books, number).await;
    }
    books
}

async fn use_once(books: &Books, number: u64) {
    let key = format!("r{number}");
    let request = Request {
        application: name_of(Role::App),
        asset: usd(),
        generation: None,
        alias: None,
        prompt_tokens: 400,
        completion_tokens_max: 250,
    };
    books.ledger.reserve(&key, &request).await.expect("reserved");
    let usage = Usage {
        request_id: key.clone(),
        receipt: Some(key.clone()),
        tokens: Tokens { prompt: 400, cached: 0, completion: 200 },
        payees: Payees { owner: Some(name_of(Role::Owner)), base_owner: None, parents: Vec::new() },
    };
    books.ledger.post(&key, &usage).await.expect("posted");
    books.ledger.attribute(&key, vec![(name_of(Role::Contributor), 1)], 0).await.expect("attributed");
}

/// Stands for a chain: epochs are where the test says.
struct Chain {
    ledger: Ledger,
    places: Mutex<Vec<Place>>,
}

impl Chain {
    fn new(books: &Books, places: Vec<Place>) -> Arc<Self> {
        Arc::new(Self { ledger: books.ledger.clone(), places: Mutex::new(places) })
    }

    fn set(&self, epoch: u64, place: Place) {
        let mut places = self.places.lock().unwrap_or_else(PoisonError::into_inner);
        let upto = places.len().max(epoch as usize);
        places.resize(upto, Place::Due);
        places[epoch as usize - 1] = place;
    }
}

#[tonic::async_trait]
impl Epochs for Chain {
    async fn seal(&self) -> Result<Sealed, EpochsError> {
        match self.ledger.seal().await {
            Ok(epoch) => Ok(Sealed { epoch: epoch.number, new: true }),
            Err(LedgerError::EmptyEpoch { last }) if last > 0 => Ok(Sealed { epoch: last, new: false }),
            Err(error) => Err(error.into()),
        }
    }

    async fn propose(&self, epoch: Option<u64>) -> Result<Proposed, EpochsError> {
        let epoch = epoch.unwrap_or(1);
        self.set(epoch, Place::Proposed { finalizable_unix_s: 77 });
        Ok(Proposed { epoch, transaction: Some([7; 32]) })
    }

    async fn standings(&self, epochs: &[u64]) -> Vec<Standing> {
        let places = self.places.lock().unwrap_or_else(PoisonError::into_inner);
        let place = |epoch: &u64| places.get(*epoch as usize - 1).cloned().unwrap_or(Place::Behind);
        epochs.iter().map(|epoch| Standing { payout_root: Some([*epoch as u8; 32]), place: place(epoch) }).collect()
    }

    async fn proof(&self, account: Address, epoch: Option<u64>) -> Result<ClaimProof, EpochsError> {
        let [settlement, token] = [Address([0x55; 20]), Address([0x66; 20])];
        let siblings = vec![[1; 32], [2; 32]];
        let (epoch, chain_id) = (epoch.unwrap_or(9), 10);
        Ok(ClaimProof { epoch, account, cumulative: u128::MAX, index: 3, siblings, chain_id, settlement, token })
    }
}

async fn start(books: &Books, chain: Option<Arc<Chain>>) -> TestServer {
    let books = books.clone();
    TestServer::start_with(|setup| {
        setup.books = Some(books);
        setup.epochs = chain.map(|chain| chain as Arc<dyn Epochs>);
    })
    .await
}

fn account(text: impl Into<String>) -> wire::GetBalanceRequest {
    wire::GetBalanceRequest { account: text.into() }
}

fn proof_of(whose: Whose) -> wire::GetClaimProofRequest {
    wire::GetClaimProofRequest { whose: Some(whose), epoch: None }
}

fn field_of(status: &Status) -> String {
    assert_eq!(status.code(), Code::InvalidArgument, "{status}");
    status.get_details_bad_request().expect("BadRequest").field_violations[0].field.clone()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_that_names_no_account_is_about_the_callers_own() {
    let folder = tempfile::tempdir().expect("a folder");
    let books = books(&folder, 2).await;
    let server = start(&books, None).await;
    for (role, own, available) in [
        (Role::App, format!("application/{}", name_of(Role::App)), "998000"),
        (Role::Owner, format!("owner/{}", name_of(Role::Owner)), "1000"),
        (Role::Contributor, format!("contributor/{}", name_of(Role::Contributor)), "600"),
        (Role::Operator, "operator".into(), "400"),
        (Role::Admin, "operator".into(), "400"),
    ] {
        let mut client = server.settlement(role).await;
        let balance = client.get_balance(account("")).await.expect("one's own").into_inner();
        let found = (balance.account.as_str(), balance.asset.as_str(), balance.available.as_str());
        assert_eq!(found, (own.as_str(), "USD", available), "{role}");
        assert_eq!(client.get_balance(account(own)).await.expect("by its name").into_inner(), balance);
        let listed = client.list_entries(wire::ListEntriesRequest::default()).await.expect("one's own").into_inner();
        assert_eq!(listed.account, balance.account);
        let sum = |credit| {
            let amounts = listed.entries.iter().filter(|entry| entry.credit == credit).map(|entry| &entry.amount);
            amounts.map(|amount| amount.parse::<u128>().expect("digits")).sum::<u128>().to_string()
        };
        assert_eq!((sum(true), sum(false)), (balance.credits, balance.debits), "{role}: entries explain the balance");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn accounts_of_others_are_shown_to_operators_alone() {
    let folder = tempfile::tempdir().expect("a folder");
    let books = books(&folder, 1).await;
    let chain = Chain::new(&books, Vec::new());
    let server = start(&books, Some(chain)).await;
    let payout = format!("payout/{ANN}");
    let all = ["application/x", "pending/x", "owner/x", "contributor/x", "base/x", "operator", "pool", "dust", "held"];
    let all = [&all[..], &["world", &payout]].concat();
    for role in [Role::App, Role::Owner, Role::Contributor] {
        let mut client = server.settlement(role).await;
        let own_address = role == Role::Contributor;
        for foreign in all.iter().filter(|text| !own_address || **text != payout) {
            let status = client.get_balance(account(*foreign)).await.expect_err(foreign);
            assert_eq!(status.code(), Code::PermissionDenied, "{role} {foreign}: {status}");
            assert!(status.message().contains(foreign) && status.message().contains(&name_of(role)), "{status}");
            assert_eq!(status.get_details_error_info().expect("ErrorInfo").reason, "NOT_YOUR_ACCOUNT");
            let entries = wire::ListEntriesRequest { account: (*foreign).into(), ..Default::default() };
            assert_eq!(client.list_entries(entries).await.expect_err(foreign).code(), Code::PermissionDenied);
            let proof = client.get_claim_proof(proof_of(Whose::Account((*foreign).into()))).await;
            assert_eq!(proof.expect_err(foreign).code(), Code::PermissionDenied);
        }
        for kind in ["application", "pending", "owner", "contributor", "base"] {
            let own = format!("{kind}/{}", name_of(role));
            assert_eq!(client.get_balance(account(&own)).await.expect(kind).into_inner().account, own);
        }
        let by_address = client.get_claim_proof(proof_of(Whose::Address(ANN.to_string()))).await;
        assert_eq!(by_address.is_ok(), own_address, "{role}: {by_address:?}");
        assert_eq!(client.get_balance(account(&payout)).await.is_ok(), own_address, "{role}");
    }
    for role in [Role::Operator, Role::Admin] {
        let mut client = server.settlement(role).await;
        for any in &all {
            assert_eq!(client.get_balance(account(*any)).await.expect(any).into_inner().account, *any);
        }
        client.get_claim_proof(proof_of(Whose::Address(ANN.to_string()))).await.expect("any address");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pages_of_entries_hold_every_movement_once_in_either_order() {
    let folder = tempfile::tempdir().expect("a folder");
    let books = books(&folder, 7).await;
    let server = start(&books, None).await;
    let mut client = server.settlement(Role::App).await;
    let whole = client.list_entries(wire::ListEntriesRequest::default()).await.expect("a list").into_inner();
    // A deposit; for each request what was reserved, and what of that came back.
    assert_eq!((whole.entries.len(), whole.next_page_token.as_str()), (15, ""));
    assert!(whole.entries.is_sorted_by(|newer, older| newer.row > older.row), "the newest first");
    for oldest_first in [false, true] {
        let mut paged = Vec::new();
        let mut page_token = String::new();
        loop {
            let request = wire::ListEntriesRequest {
                page_size: Some(3),
                page_token,
                oldest_first: Some(oldest_first),
                ..Default::default()
            };
            let page = client.list_entries(request).await.expect("a page").into_inner();
            assert!(page.entries.len() <= 3);
            paged.extend(page.entries);
            page_token = page.next_page_token;
            if page_token.is_empty() {
                break;
            }
        }
        if oldest_first {
            paged.reverse();
        }
        assert_eq!(paged, whole.entries);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_field_that_is_refused_is_named() {
    let folder = tempfile::tempdir().expect("a folder");
    let books = books(&folder, 1).await;
    let chain = Chain::new(&books, Vec::new());
    let server = start(&books, Some(chain)).await;
    let mut client = server.settlement(Role::Operator).await;
    let long = format!("owner/{}", "x".repeat(129));
    for text in ["owner", "owner/", "acme", "payout/0x12", "payout/", "owner/a\nb", &long] {
        assert_eq!(field_of(&client.get_balance(account(text)).await.expect_err(text)), "account");
        let entries = wire::ListEntriesRequest { account: text.into(), ..Default::default() };
        assert_eq!(field_of(&client.list_entries(entries).await.expect_err(text)), "account");
        let proof = client.get_claim_proof(proof_of(Whose::Account(text.into()))).await;
        assert_eq!(field_of(&proof.expect_err(text)), "account");
    }
    for never_paid in ["application/x", "held", "world"] {
        let status = client.get_claim_proof(proof_of(Whose::Account(never_paid.into()))).await.expect_err(never_paid);
        assert_eq!(field_of(&status), "account");
    }
    for text in ["", "0x12", "a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1", "0xg1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1"] {
        let status = client.get_claim_proof(proof_of(Whose::Address(text.into()))).await.expect_err(text);
        assert_eq!(field_of(&status), "address");
    }
    for (page_size, page_token, field) in [
        (Some(0), "", "page_size"),
        (Some(1_001), "", "page_size"),
        (None, "x", "page_token"),
        (None, "01", "page_token"),
    ] {
        let page_token = page_token.to_owned();
        let entries = wire::ListEntriesRequest { page_size, page_token: page_token.clone(), ..Default::default() };
        assert_eq!(field_of(&client.list_entries(entries).await.expect_err(field)), field);
        let epochs = client.list_epochs(wire::ListEpochsRequest { page_size, page_token }).await;
        assert_eq!(field_of(&epochs.expect_err(field)), field);
    }
    let many = client.list_epochs(wire::ListEpochsRequest { page_size: Some(101), ..Default::default() }).await;
    assert_eq!(field_of(&many.expect_err("too many")), "page_size");
    let zero = client.get_epoch(wire::GetEpochRequest { number: Some(0) }).await;
    assert_eq!(field_of(&zero.expect_err("no epoch")), "number");
    let zero = client.propose_epoch(wire::ProposeEpochRequest { epoch: Some(0) }).await;
    assert_eq!(field_of(&zero.expect_err("no epoch")), "epoch");
    let zero = client
        .get_claim_proof(wire::GetClaimProofRequest { epoch: Some(0), whose: Some(Whose::Address(ANN.to_string())) });
    assert_eq!(field_of(&zero.await.expect_err("no epoch")), "epoch");
    let unaddressed =
        client.get_claim_proof(proof_of(Whose::Account("operator".into()))).await.expect_err("no address");
    assert_eq!(unaddressed.code(), Code::FailedPrecondition);
    assert!(unaddressed.message().contains("openlora ledger address"), "{unaddressed}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_chain_epochs_are_shown_and_what_needs_one_names_the_setting() {
    let folder = tempfile::tempdir().expect("a folder");
    let books = books(&folder, 1).await;
    let server = start(&books, None).await;
    let mut client = server.settlement(Role::Admin).await;
    let none = client.get_epoch(wire::GetEpochRequest::default()).await.expect_err("none yet");
    assert_eq!(none.code(), Code::NotFound, "{none}");
    assert!(
        client.list_epochs(wire::ListEpochsRequest::default()).await.expect("a list").into_inner().epochs.is_empty()
    );
    books.ledger.seal().await.expect("sealed elsewhere");
    let epoch = client.get_epoch(wire::GetEpochRequest::default()).await.expect("the last").into_inner();
    assert_eq!((epoch.number, epoch.standing.expect("a standing").state()), (1, wire::EpochState::Sealed));

    let whose = Some(Whose::Address(ANN.to_string()));
    let refused = [
        client.seal_epoch(wire::SealEpochRequest {}).await.err(),
        client.propose_epoch(wire::ProposeEpochRequest::default()).await.err(),
        client.get_claim_proof(wire::GetClaimProofRequest { whose, epoch: None }).await.err(),
    ];
    for status in refused {
        let status = status.expect("refused");
        assert_eq!(status.code(), Code::FailedPrecondition, "{status}");
        assert!(
            status.message().contains("settlement.contract") && status.message().contains("openlora chain"),
            "{status}"
        );
        let info = status.get_details_error_info().expect("ErrorInfo");
        assert_eq!(
            (info.reason.as_str(), info.metadata["setting"].as_str()),
            ("NOT_CONFIGURED", "settlement.contract")
        );
    }

    let bare = TestServer::start().await;
    let mut client = bare.settlement(Role::App).await;
    let status = client.get_balance(account("")).await.expect_err("no ledger");
    assert_eq!(status.code(), Code::FailedPrecondition, "{status}");
    assert!(status.message().contains("ledger.database_url"), "{status}");
    assert_eq!(
        client.watch_epochs(wire::WatchEpochsRequest {}).await.expect_err("no ledger").code(),
        Code::FailedPrecondition
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sealing_twice_seals_once_and_a_proposal_answers_where_it_stands() {
    let folder = tempfile::tempdir().expect("a folder");
    let books = books(&folder, 2).await;
    let chain = Chain::new(&books, Vec::new());
    let server = start(&books, Some(chain)).await;
    let mut client = server.settlement(Role::Operator).await;
    let first = client.seal_epoch(wire::SealEpochRequest {}).await.expect("sealed").into_inner();
    assert!(first.sealed);
    let epoch = first.epoch.expect("an epoch");
    let ledger = books.ledger.epoch(1).await.expect("sealed");
    assert_eq!((epoch.number, epoch.first_row, epoch.last_row), (1, 1, ledger.row));
    assert_eq!((epoch.ledger_head.len(), epoch.sealed_unix_ms), (66, ledger.sealed_at_ms));
    // The contributor alone has an address.
    let total = wire::EpochTotal { asset: "USD".into(), cumulative: "600".into(), added: "600".into() };
    assert_eq!(epoch.totals, [total]);
    assert_eq!(epoch.standing.expect("a standing").payout_root, format!("0x{}", "01".repeat(32)));
    let again = client.seal_epoch(wire::SealEpochRequest {}).await.expect("nothing new").into_inner();
    assert_eq!((again.sealed, again.epoch.expect("an epoch").number), (false, 1));

    let beyond = client.propose_epoch(wire::ProposeEpochRequest { epoch: Some(2) }).await.expect_err("not sealed");
    assert_eq!(beyond.code(), Code::NotFound, "{beyond}");
    let proposed =
        client.propose_epoch(wire::ProposeEpochRequest { epoch: Some(1) }).await.expect("proposed").into_inner();
    assert_eq!(proposed.transaction, format!("0x{}", "07".repeat(32)));
    let standing = proposed.epoch.expect("an epoch").standing.expect("a standing");
    assert_eq!((standing.state(), standing.finalizable_unix_s), (wire::EpochState::Proposed, 77));
    let mut contributor = server.settlement(Role::Contributor).await;
    let proof = contributor.get_claim_proof(wire::GetClaimProofRequest::default()).await.expect("its own").into_inner();
    let hash = |byte: &str| format!("0x{}", byte.repeat(32));
    let expected = wire::ClaimProof {
        epoch: 9,
        account: ANN.to_string(),
        cumulative: u128::MAX.to_string(),
        index: 3,
        proof: vec![hash("01"), hash("02")],
        chain_id: 10,
        settlement: format!("0x{}", "55".repeat(20)),
        token: format!("0x{}", "66".repeat(20)),
    };
    assert_eq!(proof, expected);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_epoch_is_on_one_page_with_its_standing() {
    let folder = tempfile::tempdir().expect("a folder");
    let books = books(&folder, 0).await;
    let other = Place::OtherRoot { root: [9; 32], is_final: true };
    let disputed = Place::Disputed { challenger: ANN, resolvable_until_unix_s: 5 };
    let unknown = Place::Unknown { reason: "the node sleeps".into() };
    let chain = Chain::new(&books, vec![Place::Finalized, other, disputed, unknown, Place::Due, Place::Behind]);
    for number in 0..6 {
        use_once(&books, number).await;
        books.ledger.seal().await.expect("sealed");
    }
    let server = start(&books, Some(chain)).await;
    let mut client = server.settlement(Role::App).await;
    let mut epochs = Vec::new();
    let mut page_token = String::new();
    loop {
        let request = wire::ListEpochsRequest { page_size: Some(4), page_token };
        let page = client.list_epochs(request).await.expect("a page").into_inner();
        epochs.extend(page.epochs);
        page_token = page.next_page_token;
        if page_token.is_empty() {
            break;
        }
    }
    assert_eq!(epochs.iter().map(|epoch| epoch.number).collect::<Vec<_>>(), [6, 5, 4, 3, 2, 1]);
    let standings: Vec<_> = epochs.iter().rev().filter_map(|epoch| epoch.standing.as_ref()).collect();
    let states: Vec<_> = standings.iter().map(|standing| standing.state()).collect();
    use wire::EpochState::{Behind, Disputed, Due, Finalized, OtherRoot, Unknown};
    assert_eq!(states, [Finalized, OtherRoot, Disputed, Unknown, Due, Behind]);
    assert_eq!(standings[1].other_root, format!("0x{}", "09".repeat(32)));
    assert!(standings[1].other_root_is_final);
    assert_eq!((standings[2].challenger.as_str(), standings[2].resolvable_until_unix_s), (&*ANN.to_string(), 5));
    assert_eq!(standings[3].reason, "the node sleeps");
    let third = client.get_epoch(wire::GetEpochRequest { number: Some(3) }).await.expect("one").into_inner();
    assert_eq!(third, epochs[3]);
    assert_eq!((third.totals[0].cumulative.as_str(), third.totals[0].added.as_str()), ("900", "300"));
    let beyond = client.list_epochs(wire::ListEpochsRequest { page_token: "1".into(), page_size: None }).await;
    assert!(beyond.expect("an empty page").into_inner().epochs.is_empty());
}

async fn next(stream: &mut Streaming<wire::Epoch>) -> Result<wire::Epoch, Status> {
    let message = tokio::time::timeout(PATIENCE, stream.message()).await.expect("a message in time");
    message.map(|epoch| epoch.expect("a watch ends with a reason"))
}

async fn watch(client: &mut SettlementClient<Keyed>) -> Streaming<wire::Epoch> {
    client.watch_epochs(wire::WatchEpochsRequest {}).await.expect("watched").into_inner()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_watch_shows_what_is_there_then_every_change_until_the_server_drains() {
    let folder = tempfile::tempdir().expect("a folder");
    let books = books(&folder, 1).await;
    books.ledger.seal().await.expect("sealed");
    use_once(&books, 1).await;
    books.ledger.seal().await.expect("sealed");
    let chain = Chain::new(&books, vec![Place::Finalized, Place::Due]);
    let mut server = start(&books, Some(Arc::clone(&chain))).await;
    let mut operator = server.settlement(Role::Operator).await;
    let mut streams = [watch(&mut operator).await, watch(&mut server.settlement(Role::Contributor).await).await];
    for stream in &mut streams {
        let found = [next(stream).await.expect("the first"), next(stream).await.expect("the second")];
        assert_eq!(found.map(|epoch| epoch.number), [1, 2]);
    }
    operator.propose_epoch(wire::ProposeEpochRequest { epoch: Some(2) }).await.expect("proposed");
    for stream in &mut streams {
        let changed = next(stream).await.expect("a change");
        assert_eq!((changed.number, changed.standing.expect("a standing").state()), (2, wire::EpochState::Proposed));
    }
    // Something that no call of this server did.
    chain.set(2, Place::Finalized);
    use_once(&books, 2).await;
    books.ledger.seal().await.expect("sealed");
    for stream in &mut streams {
        let mut seen = std::collections::BTreeMap::new();
        while seen.get(&2) != Some(&wire::EpochState::Finalized) || !seen.contains_key(&3) {
            let epoch = next(stream).await.expect("a change");
            seen.insert(epoch.number, epoch.standing.as_ref().expect("a standing").state());
        }
    }
    server.ask_to_stop();
    for stream in &mut streams {
        let end = next(stream).await.expect_err("the server drains");
        assert_eq!(end.code(), Code::Unavailable, "{end}");
        assert!(end.get_details_retry_info().is_some(), "it says when to come back");
    }
    server.ended().await.expect("a clean end");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_watch_ends_at_its_deadline_and_there_are_only_so_many() {
    let folder = tempfile::tempdir().expect("a folder");
    let books = books(&folder, 1).await;
    let server = start(&books, None).await;
    let mut client = server.settlement(Role::App).await;
    let mut short = tonic::Request::new(wire::WatchEpochsRequest {});
    short.set_timeout(Duration::from_millis(300));
    let mut stream = client.watch_epochs(short).await.expect("watched").into_inner();
    assert_eq!(next(&mut stream).await.expect_err("the deadline").code(), Code::DeadlineExceeded);

    let mut clients = [server.settlement(Role::App).await, server.settlement(Role::Owner).await];
    let mut open = Vec::new();
    let full = loop {
        match clients[open.len() % 2].watch_epochs(wire::WatchEpochsRequest {}).await {
            Ok(stream) => open.push(stream),
            Err(status) => break status,
        }
        assert!(open.len() <= 256, "there is a bound");
    };
    assert_eq!((full.code(), open.len()), (Code::ResourceExhausted, 256), "{full}");
    assert_eq!(full.get_details_error_info().expect("ErrorInfo").metadata["limit"], "watchers_max");
    // Room comes back with those that leave.
    drop(open);
    let again = async {
        while client.watch_epochs(wire::WatchEpochsRequest {}).await.is_err() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(PATIENCE, again).await.expect("room comes back");
}
