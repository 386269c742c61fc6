//! `openlora.v1.Settlement`: accounts and sealed epochs from the ledger; sealing, proposing and proofs from whoever brings epochs
//! to a chain ([`Epochs`]).
//!
//! Operators and administrators see every account. Anybody else sees the accounts of their key's name, and the payout account
//! of an address that one of these is paid at. Epochs are public.

use std::sync::Arc;

use openlora_ledger::{Account, Address, Entry, Ledger, Order};
use openlora_proto::v1 as wire;
use openlora_proto::v1::get_claim_proof_request::Whose;
use openlora_proto::v1::settlement_server::Settlement;
use openlora_types::InvalidField;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use crate::ServerError;
use crate::adapters::split;
use crate::app::{Books, State};
use crate::auth::Caller;
use crate::convert::page_size;
use crate::edge::Deadline;
use crate::epochs::{ClaimProof, Epochs, EpochsError};
use crate::keys::Role;
use crate::watch::{Watch, hex, picture};

const ENTRY_ROWS_DEFAULT: u32 = 100;
/// Rows of a page of entries at most: what the ledger reads at once.
const ENTRY_ROWS_MAX: u32 = 1_000;
const EPOCHS_DEFAULT: u32 = 20;
/// Epochs of a page at most: each may be a question to the chain's node.
const EPOCHS_MAX: u32 = 100;

/// The service.
pub(crate) struct SettlementService {
    state: Arc<State>,
    watch: Watch,
}

impl Caller {
    /// The account that a request means which names none.
    fn account(&self) -> Account {
        let name = self.name.to_string();
        match self.role {
            Role::App => Account::Application(name),
            Role::Owner => Account::Owner(name),
            Role::Contributor => Account::Contributor(name),
            Role::Operator | Role::Admin => Account::Operator,
        }
    }
}

impl SettlementService {
    pub(crate) fn new(state: Arc<State>) -> Self {
        Self { watch: Watch::start(&state), state }
    }

    fn books(&self) -> Result<&Books, ServerError> {
        let next = "this server was started without a ledger";
        let missing = EpochsError::NotConfigured { setting: "ledger.database_url", next };
        self.state.app.books.as_ref().ok_or_else(|| missing.into())
    }

    fn ledger(&self) -> Result<&Ledger, ServerError> {
        Ok(&self.books()?.ledger)
    }

    fn epochs(&self) -> Result<&dyn Epochs, ServerError> {
        let next =
            "`openlora chain dev` or `openlora chain deploy` deploys one and says what to set; then restart the server";
        let missing = EpochsError::NotConfigured { setting: "settlement.contract", next };
        self.state.app.epochs.as_deref().ok_or_else(|| missing.into())
    }

    /// The account that is asked for, where the caller may ask for it.
    async fn account(&self, caller: &Caller, text: &str) -> Result<Account, ServerError> {
        if text.is_empty() {
            return Ok(caller.account());
        }
        // An address in it is no field of its own here.
        let account = text.parse::<Account>().map_err(|wrong| InvalidField::new("account", wrong.reason))?;
        self.check_own(caller, &account).await?;
        Ok(account)
    }

    async fn check_own(&self, caller: &Caller, account: &Account) -> Result<(), ServerError> {
        use Account::{Application, BaseOwner, Contributor, Owner, Payout, Pending};
        let own = caller.operates()
            || match account {
                Application(name) | Pending(name) | Owner(name) | Contributor(name) | BaseOwner(name) => {
                    *name == *caller.name
                }
                Payout(address) => self.is_paid_at(caller, *address).await?,
                _ => false,
            };
        let foreign = || ServerError::ForeignAccount { account: account.to_string(), name: caller.name.to_string() };
        if own { Ok(()) } else { Err(foreign()) }
    }

    /// Whether one of the caller's accounts has this address.
    async fn is_paid_at(&self, caller: &Caller, address: Address) -> Result<bool, ServerError> {
        for kind in [Account::Owner, Account::Contributor, Account::BaseOwner] {
            if self.ledger()?.address(&kind(caller.name.to_string())).await? == Some(address) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Where what `account` earns is paid.
    async fn address_of(&self, account: &Account) -> Result<Address, ServerError> {
        if let Account::Payout(address) = account {
            return Ok(*address);
        }
        if !account.is_paid() {
            let why =
                format!("is {account}, which is never paid out; ask for owner/NAME, contributor/NAME or base/NAME");
            return Err(InvalidField::new("account", why).into());
        }
        let message = format!("{account} has no address; the operator sets one with `openlora ledger address`");
        let missing = EpochsError::Refused { reason: "NO_ADDRESS", message };
        self.ledger()?.address(account).await?.ok_or_else(|| missing.into())
    }

    async fn epoch(&self, number: u64) -> Result<wire::Epoch, ServerError> {
        let mut found = picture(&self.state, &[number]).await?;
        found.pop().ok_or(ServerError::Internal("an epoch that is sealed is not shown"))
    }

    async fn last_epoch(&self) -> Result<u64, ServerError> {
        let next = "; the operator calls SealEpoch, or runs `openlora settle seal`";
        let missing = EpochsError::NotFound { what: "epoch", name: "1".into(), next };
        match self.ledger()?.last_epoch().await? {
            0 => Err(missing.into()),
            last => Ok(last),
        }
    }
}

#[tonic::async_trait]
impl Settlement for SettlementService {
    type WatchEpochsStream = ReceiverStream<Result<wire::Epoch, Status>>;

    async fn get_balance(&self, request: Request<wire::GetBalanceRequest>) -> Result<Response<wire::Balance>, Status> {
        let (caller, request) = split(request)?;
        let Books { ledger, asset, .. } = self.books()?;
        let account = self.account(&caller, &request.account).await?;
        let holding = ledger.balance(&account, asset).await.map_err(ServerError::from)?;
        Ok(Response::new(wire::Balance {
            account: account.to_string(),
            asset: asset.to_string(),
            available: holding.available().to_string(),
            credits: holding.credits.to_string(),
            debits: holding.debits.to_string(),
        }))
    }

    async fn list_entries(
        &self,
        request: Request<wire::ListEntriesRequest>,
    ) -> Result<Response<wire::ListEntriesResponse>, Status> {
        let (caller, request) = split(request)?;
        let rows = page_size(request.page_size, ENTRY_ROWS_DEFAULT, ENTRY_ROWS_MAX).map_err(ServerError::from)?;
        // The token is the last row of the page before.
        let cursor = page_token(&request.page_token)?;
        let order = if request.oldest_first.unwrap_or(false) { Order::Oldest } else { Order::Newest };
        let account = self.account(&caller, &request.account).await?;
        let found = self.ledger()?.entries(&account, order, cursor, rows).await;
        let (entries, next) = found.map_err(ServerError::from)?;
        Ok(Response::new(wire::ListEntriesResponse {
            account: account.to_string(),
            entries: entries.into_iter().map(entry).collect(),
            next_page_token: next.map(|row| row.to_string()).unwrap_or_default(),
        }))
    }

    async fn seal_epoch(
        &self,
        request: Request<wire::SealEpochRequest>,
    ) -> Result<Response<wire::SealEpochResponse>, Status> {
        let _busy = self.state.begin();
        split(request)?;
        let sealed = self.epochs()?.seal().await.map_err(ServerError::from)?;
        tracing::info!(epoch = sealed.epoch, new = sealed.new, "epoch sealed");
        self.watch.look();
        let epoch = Some(self.epoch(sealed.epoch).await?);
        Ok(Response::new(wire::SealEpochResponse { epoch, sealed: sealed.new }))
    }

    async fn propose_epoch(
        &self,
        request: Request<wire::ProposeEpochRequest>,
    ) -> Result<Response<wire::ProposeEpochResponse>, Status> {
        let _busy = self.state.begin();
        let (_, request) = split(request)?;
        if let Some(number) = request.epoch {
            known(self.ledger()?, "epoch", number).await?;
        }
        let proposed = self.epochs()?.propose(request.epoch).await.map_err(ServerError::from)?;
        let transaction = proposed.transaction.as_ref().map(hex).unwrap_or_default();
        tracing::info!(epoch = proposed.epoch, transaction, "epoch proposed");
        self.watch.look();
        let epoch = Some(self.epoch(proposed.epoch).await?);
        Ok(Response::new(wire::ProposeEpochResponse { epoch, transaction }))
    }

    async fn get_epoch(&self, request: Request<wire::GetEpochRequest>) -> Result<Response<wire::Epoch>, Status> {
        let (_, request) = split(request)?;
        let number = match request.number {
            Some(number) => known(self.ledger()?, "number", number).await?,
            None => self.last_epoch().await?,
        };
        Ok(Response::new(self.epoch(number).await?))
    }

    async fn list_epochs(
        &self,
        request: Request<wire::ListEpochsRequest>,
    ) -> Result<Response<wire::ListEpochsResponse>, Status> {
        let (_, request) = split(request)?;
        let wanted = page_size(request.page_size, EPOCHS_DEFAULT, EPOCHS_MAX).map_err(ServerError::from)? as u64;
        // The token is the last number of the page before.
        let before = page_token(&request.page_token)?.unwrap_or(u64::MAX);
        let last = self.ledger()?.last_epoch().await.map_err(ServerError::from)?;
        let newest = last.min(before.saturating_sub(1));
        let oldest = newest.saturating_sub(wanted - 1).max(1);
        let numbers: Vec<u64> = (oldest..=newest).rev().collect();
        let epochs = picture(&self.state, &numbers).await?;
        let next_page_token = if newest > 0 && oldest > 1 { oldest.to_string() } else { String::new() };
        Ok(Response::new(wire::ListEpochsResponse { epochs, next_page_token }))
    }

    async fn get_claim_proof(
        &self,
        request: Request<wire::GetClaimProofRequest>,
    ) -> Result<Response<wire::ClaimProof>, Status> {
        let (caller, request) = split(request)?;
        let address = match &request.whose {
            Some(Whose::Address(text)) => {
                let address = text.parse::<Address>().map_err(ServerError::from)?;
                self.check_own(&caller, &Account::Payout(address)).await?;
                address
            }
            Some(Whose::Account(text)) => self.address_of(&self.account(&caller, text).await?).await?,
            None => self.address_of(&caller.account()).await?,
        };
        if let Some(number) = request.epoch {
            known(self.ledger()?, "epoch", number).await?;
        }
        let proof = self.epochs()?.proof(address, request.epoch).await.map_err(ServerError::from)?;
        Ok(Response::new(claim_proof(&proof)))
    }

    async fn watch_epochs(
        &self,
        request: Request<wire::WatchEpochsRequest>,
    ) -> Result<Response<Self::WatchEpochsStream>, Status> {
        self.ledger()?;
        let deadline = request.extensions().get::<Deadline>().copied();
        Ok(Response::new(self.watch.stream(&self.state, deadline)?))
    }
}

/// An epoch's number, once it is known to be sealed.
async fn known(ledger: &Ledger, field: &str, number: u64) -> Result<u64, ServerError> {
    if number == 0 {
        return Err(InvalidField::new(field, "must be at least 1, the first epoch").into());
    }
    let last = ledger.last_epoch().await?;
    let next = "; ListEpochs tells which are sealed";
    let missing = EpochsError::NotFound { what: "epoch", name: number.to_string(), next };
    if number <= last { Ok(number) } else { Err(missing.into()) }
}

/// Where the page before ended.
fn page_token(text: &str) -> Result<Option<u64>, ServerError> {
    let wrong = || InvalidField::new("page_token", "must be empty or the next_page_token of an answer");
    let number = |text: &str| text.parse::<u64>().ok().filter(|number| number.to_string() == text);
    if text.is_empty() { Ok(None) } else { Ok(Some(number(text).ok_or_else(wrong)?)) }
}

fn entry(entry: Entry) -> wire::Entry {
    wire::Entry {
        row: entry.row,
        at_unix_ms: entry.at_ms,
        what: entry.what,
        asset: entry.asset.to_string(),
        amount: entry.amount.to_string(),
        credit: entry.credit,
        other: entry.other.to_string(),
    }
}

fn claim_proof(proof: &ClaimProof) -> wire::ClaimProof {
    wire::ClaimProof {
        epoch: proof.epoch,
        account: proof.account.to_string(),
        cumulative: proof.cumulative.to_string(),
        index: proof.index,
        proof: proof.siblings.iter().map(hex).collect(),
        chain_id: proof.chain_id,
        settlement: proof.settlement.to_string(),
        token: proof.token.to_string(),
    }
}
