//! The server's way to the chain: what its settlement door asks ([`Epochs`]), done with the settings' contract, bundles and key.
//!
//! Everything that asks a node or sends runs on one thread of its own: a transaction that was begun is brought to its end whether
//! its caller waits or not, proposals come one after another, and the futures of a sender need not be `Send`. Only a proof of
//! a bundle that is in memory is looked up where it is asked for.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use openlora_database::DatabaseError;
use openlora_ledger::{Address, Asset, Ledger, LedgerError};
use openlora_server::{Books, ClaimProof, Epochs, EpochsError, Place, Proposed, Sealed, Standing};
use openlora_settlement::bundle::Bundle;
use openlora_settlement::bundles::{Bundles, publish_missing};
use openlora_settlement::chain::At;
use openlora_settlement::epochs::{self, Contract, State};
use openlora_settlement::keys::KeyError;
use openlora_settlement::outbox::{IntentId, Status};
use openlora_settlement::sender::Sender;
use openlora_settlement::{RpcUrl, SettlementError, tree};
use tokio::sync::{OnceCell, Semaphore, mpsc, oneshot};
use tokio::task::{LocalSet, spawn_local};
use tokio::time::{Instant, timeout_at};

use crate::config::Config;
use crate::{chain, settle};

/// Calls under way at once.
const JOBS_MAX: usize = 64;
/// How long what the contract said of itself is taken to be so.
const FRESH: Duration = Duration::from_secs(2);
/// How long a listing waits for the node.
const LOOK_MAX: Duration = Duration::from_secs(5);
/// Epochs whose root, and whose place once that is for good, are kept in memory.
const EPOCHS_KEPT_MAX: usize = 10_000;

/// Asks the thread. Dropped, it ends the thread; what was sent is in the outbox.
pub(crate) struct Desk {
    jobs: mpsc::Sender<Job>,
    room: Arc<Semaphore>,
    shelf: Arc<Shelf>,
}

/// Something to do there.
type Job = Box<dyn FnOnce(Rc<Worker>) -> Pin<Box<dyn Future<Output = ()>>> + Send>;

const STOPPED: EpochsError = EpochsError::Internal("the settlement thread ended");
const NODE: EpochsError = EpochsError::Unavailable { what: "the chain's node" };

impl Desk {
    /// The desk of the settings; none where they name no contract. Asks nothing yet: a node may come later.
    pub(crate) fn open(config: &Config, books: &Books) -> Result<Option<Self>> {
        let settings = &config.settlement;
        if settings.contract.is_empty() {
            return Ok(None);
        }
        if settings.rpc_url.is_empty() || settings.chain_id == 0 {
            bail!("settlement.contract is set: set settlement.rpc_url and settlement.chain_id too, or none of them");
        }
        // What is wrong with them is said at the start, not to the first caller.
        settings.contract.parse::<tree::Address>().context("settlement.contract")?;
        RpcUrl::parse("settlement.rpc_url", &settings.rpc_url)?;
        let shelf = Arc::new(Shelf::default());
        let seat = Seat {
            config: config.clone(),
            ledger: books.ledger.clone(),
            asset: books.asset.clone(),
            bundles: settle::bundles(config)?,
            shelf: Arc::clone(&shelf),
        };
        let (jobs, queue) = mpsc::channel(JOBS_MAX);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let thread = std::thread::Builder::new().name("settlement".into());
        thread.spawn(move || runtime.block_on(LocalSet::new().run_until(work(seat, queue))))?;
        Ok(Some(Self { jobs, room: Arc::new(Semaphore::new(JOBS_MAX)), shelf }))
    }

    /// Has `work` done on the thread, to its end whether the caller waits or not.
    async fn ask<T, F>(&self, work: impl FnOnce(Rc<Worker>) -> F + Send + 'static) -> Result<T, EpochsError>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, EpochsError>> + 'static,
    {
        let busy = |_| EpochsError::Busy { max: JOBS_MAX };
        let permit = Arc::clone(&self.room).try_acquire_owned().map_err(busy)?;
        let (answer, answered) = oneshot::channel();
        let job: Job = Box::new(move |worker| {
            Box::pin(async move {
                let done = work(worker).await;
                drop(permit);
                // Whoever does not wait any more may ask again.
                let _gone = answer.send(done);
            })
        });
        self.jobs.try_send(job).map_err(|_| STOPPED)?;
        answered.await.unwrap_or(Err(STOPPED))
    }
}

#[tonic::async_trait]
impl Epochs for Desk {
    async fn seal(&self) -> Result<Sealed, EpochsError> {
        self.ask(|worker| async move { worker.seal().await }).await
    }

    async fn propose(&self, epoch: Option<u64>) -> Result<Proposed, EpochsError> {
        self.ask(move |worker| async move { worker.propose(epoch).await }).await
    }

    async fn standings(&self, epochs: &[u64]) -> Vec<Standing> {
        let asked = epochs.to_vec();
        let found = self.ask(|worker| async move { Ok(worker.standings(asked).await) }).await;
        let unknown = |error: EpochsError| epochs.iter().map(|_| unknown(None, &error)).collect();
        found.unwrap_or_else(unknown)
    }

    async fn proof(&self, account: Address, epoch: Option<u64>) -> Result<ClaimProof, EpochsError> {
        let bundle = match self.shelf.find(epoch) {
            Some(bundle) => bundle,
            None => self.ask(move |worker| async move { worker.bundle(epoch).await }).await?,
        };
        prove(&bundle, account)
    }
}

/// The bundles that proofs are looked up in: of the last final epoch, and of another that was asked for by number.
#[derive(Default)]
struct Shelf(Mutex<Shelved>);

#[derive(Default)]
struct Shelved {
    /// The last final epoch, and when the contract said so.
    last: Option<(u64, Instant)>,
    bundles: Vec<Arc<Bundle>>,
}

impl Shelf {
    fn lock(&self) -> MutexGuard<'_, Shelved> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The bundle of an epoch, or of the last one where that is known to be the last.
    fn find(&self, epoch: Option<u64>) -> Option<Arc<Bundle>> {
        let shelved = self.lock();
        let last = || shelved.last.filter(|(_, said)| said.elapsed() < FRESH).map(|(epoch, _)| epoch);
        let epoch = epoch.or_else(last)?;
        shelved.bundles.iter().find(|bundle| bundle.manifest().epoch == epoch).cloned()
    }

    /// Keeps a bundle beside that of the last final epoch, which no question for old ones pushes out.
    fn put(&self, bundle: Arc<Bundle>) {
        let mut shelved = self.lock();
        let last = shelved.last.map(|(epoch, _)| epoch);
        let put = bundle.manifest().epoch;
        shelved.bundles.retain(|kept| Some(kept.manifest().epoch) == last && kept.manifest().epoch != put);
        shelved.bundles.push(bundle);
    }
}

fn prove(bundle: &Bundle, account: Address) -> Result<ClaimProof, EpochsError> {
    let manifest = bundle.manifest();
    let Some(proof) = bundle.tree().proof(account.0.into()) else {
        let next = "; it has earned nothing that was sealed until then";
        let name = format!("{account} in epoch {}", manifest.epoch);
        return Err(EpochsError::NotFound { what: "payout", name, next });
    };
    Ok(ClaimProof {
        epoch: manifest.epoch,
        account,
        cumulative: proof.cumulative,
        index: proof.index as u64,
        siblings: proof.siblings.into_iter().map(Into::into).collect(),
        chain_id: manifest.chain_id,
        settlement: own(manifest.settlement),
        token: own(manifest.token),
    })
}

/// Does what is asked until nobody can ask any more.
async fn work(seat: Seat, mut queue: mpsc::Receiver<Job>) {
    let worker = Rc::new(Worker {
        seat,
        contract: OnceCell::new(),
        look: tokio::sync::Mutex::default(),
        sealing: tokio::sync::Mutex::default(),
        proposing: tokio::sync::Mutex::default(),
        loading: tokio::sync::Mutex::default(),
        roots: RefCell::default(),
        settled: RefCell::default(),
    });
    while let Some(job) = queue.recv().await {
        spawn_local(job(Rc::clone(&worker)));
    }
}

/// What the thread is given.
struct Seat {
    config: Config,
    ledger: Ledger,
    asset: Asset,
    bundles: Bundles,
    shelf: Arc<Shelf>,
}

/// What the contract said of itself, and when.
struct Look {
    at: Instant,
    state: Result<State, EpochsError>,
}

/// What is on the thread.
struct Worker {
    seat: Seat,
    contract: OnceCell<Contract>,
    look: tokio::sync::Mutex<Option<Look>>,
    sealing: tokio::sync::Mutex<()>,
    proposing: tokio::sync::Mutex<()>,
    /// Bundles are large: one is read at a time.
    loading: tokio::sync::Mutex<()>,
    roots: RefCell<BTreeMap<u64, [u8; 32]>>,
    /// Places that a later final epoch has made final for good.
    settled: RefCell<BTreeMap<u64, Standing>>,
}

impl Worker {
    async fn contract(&self) -> Result<&Contract> {
        self.contract.get_or_try_init(|| settle::contract(&self.seat.config)).await
    }

    async fn seal(&self) -> Result<Sealed, EpochsError> {
        // Bundles name the contract: before it is known nothing is sealed.
        let contract = self.contract().await.map_err(refused)?;
        let Seat { ledger, asset, bundles, .. } = &self.seat;
        let _one = self.sealing.lock().await;
        let new = match ledger.seal().await {
            Ok(_) => true,
            Err(LedgerError::EmptyEpoch { last }) if last > 0 => false,
            Err(error) => return Err(error.into()),
        };
        let published = publish_missing(ledger, contract.settles(), asset, bundles).await;
        published.map_err(|error| refused(error.into()))?;
        Ok(Sealed { epoch: ledger.last_epoch().await?, new })
    }

    async fn propose(&self, epoch: Option<u64>) -> Result<Proposed, EpochsError> {
        let Seat { config, bundles, .. } = &self.seat;
        let _one = self.proposing.lock().await;
        let settings = &config.settlement;
        for (setting, path) in
            [("settlement.keystore", &settings.keystore), ("settlement.password_file", &settings.password_file)]
        {
            if path.as_os_str().is_empty() && settings.kms_key.is_empty() {
                let next = "set it to what `openlora chain dev` prints, or to the proposer's, and restart the server";
                return Err(EpochsError::NotConfigured { setting, next });
            }
        }
        let asked = async || -> Result<_> {
            let contract = self.contract().await?;
            let state = contract.state(At::Latest).await?;
            let epoch = epoch.unwrap_or_else(|| state.open.map_or(state.epoch + 1, |open| open.epoch));
            Ok((contract, epoch, bundles.get(epoch).await?))
        };
        let (contract, epoch, bundle) = asked().await.map_err(refused)?;
        let bundle = bundle.ok_or_else(|| EpochsError::Refused {
            reason: "EPOCH_NOT_SEALED",
            message: format!("epoch {epoch} is not sealed and published; call SealEpoch or run `openlora settle seal`"),
        })?;
        let sent = async || -> Result<_> {
            let Some(intent) = contract.propose(&bundle).await? else { return Ok(None) };
            let sender = chain::configured_sender(config).await?;
            let id = contract.submit(&sender, intent).await?;
            Ok(Some((id, sender)))
        };
        let transaction = match sent().await.map_err(refused)? {
            Some((id, sender)) => self.in_a_block(id, sender, epoch).await?,
            None => None,
        };
        Ok(Proposed { epoch, transaction })
    }

    /// Waits until what was sent is in a block, and has it watched from then on until that is for good.
    async fn in_a_block(&self, id: IntentId, sender: Sender, epoch: u64) -> Result<Option<[u8; 32]>, EpochsError> {
        let status = sender.wait_until(id, |status| matches!(status, Status::Mined { .. })).await;
        // What was known of the contract is old now.
        *self.look.lock().await = None;
        spawn_local(async move {
            match sender.wait_finalized(id, |_| ()).await {
                Ok(status) => tracing::info!(epoch, ?status, "the proposal's transaction is over"),
                Err(error) => tracing::warn!(epoch, %error, "the proposal is not watched; the next call takes it up"),
            }
            if let Err(error) = sender.close().await {
                tracing::warn!(%error, "another process may have to wait to send");
            }
        });
        let not_sent = |why: String| EpochsError::Refused {
            reason: "NOT_SENT",
            message: format!(
                "the proposal of epoch {epoch} is not on the chain: {why}; call ProposeEpoch to try again"
            ),
        };
        match status.map_err(|error| refused(error.into()))? {
            Status::Mined { succeeded: true, hash, .. } | Status::Finalized { reverted: None, hash, .. } => {
                Ok(Some(hash.into()))
            }
            Status::DoneElsewhere => Ok(None),
            Status::Refused { reason } => Err(not_sent(reason)),
            Status::Finalized { reverted: Some(why), .. } => Err(not_sent(format!("it reverted: {why}"))),
            _ => Err(not_sent("it reverted".into())),
        }
    }

    /// What the contract says of itself, at most [`FRESH`] old; an error is not asked for again sooner either.
    async fn look(&self) -> Result<State, EpochsError> {
        let mut look = self.look.lock().await;
        if let Some(Look { at, state }) = &*look
            && at.elapsed() < FRESH
        {
            return state.clone();
        }
        let asked = async { Ok(self.contract().await?.state(At::Latest).await?) };
        let asked = timeout_at(Instant::now() + LOOK_MAX, asked).await;
        let state = match asked {
            Ok(Ok(state)) => Ok(state),
            // Said once, not with every look.
            Ok(Err(error)) if look.as_ref().is_none_or(|look| look.state.is_ok()) => Err(refused(error)),
            Ok(Err(error)) => Err(told(&error)),
            Err(_) => Err(NODE),
        };
        let at = Instant::now();
        if let Ok(state) = &state {
            self.seat.shelf.lock().last = Some((state.epoch, at));
        }
        *look = Some(Look { at, state: state.clone() });
        state
    }

    async fn standings(&self, epochs: Vec<u64>) -> Vec<Standing> {
        let state = self.look().await;
        let until = Instant::now() + LOOK_MAX;
        let mut standings = Vec::with_capacity(epochs.len());
        for epoch in epochs {
            let found = timeout_at(until, self.standing(&state, epoch)).await;
            standings.push(found.unwrap_or_else(|_| unknown(None, &NODE)));
        }
        standings
    }

    async fn standing(&self, state: &Result<State, EpochsError>, epoch: u64) -> Standing {
        if let Some(settled) = self.settled.borrow().get(&epoch) {
            return settled.clone();
        }
        let root = match self.root(epoch).await {
            Ok(root) => root,
            Err(error) => return unknown(None, &error),
        };
        let state = match state {
            Ok(state) => state,
            Err(error) => return unknown(Some(root), error),
        };
        let asked = async || -> Result<_> {
            Ok(self.contract().await?.standing_in(state, epoch, root.into(), At::Latest).await?)
        };
        let place = match asked().await {
            Ok(found) => place(found),
            Err(error) => return unknown(Some(root), &refused(error)),
        };
        let is_final = matches!(place, Place::Finalized | Place::OtherRoot { is_final: true, .. });
        let standing = Standing { payout_root: Some(root), place };
        if is_final && epoch < state.epoch {
            // The whole window of a later epoch lies between: no reorganisation reaches it.
            keep(&mut self.settled.borrow_mut(), epoch, standing.clone());
        }
        standing
    }

    /// The root that an epoch's bundle says.
    async fn root(&self, epoch: u64) -> Result<[u8; 32], EpochsError> {
        if let Some(root) = self.roots.borrow().get(&epoch) {
            return Ok(*root);
        }
        let found = self.seat.bundles.manifest(epoch).await.map_err(|error| refused(error.into()))?;
        let root = found.ok_or_else(|| no_bundle(epoch))?.payout_root.into();
        keep(&mut self.roots.borrow_mut(), epoch, root);
        Ok(root)
    }

    /// The bundle of an epoch, or of the last final one, which stays in memory.
    async fn bundle(&self, epoch: Option<u64>) -> Result<Arc<Bundle>, EpochsError> {
        let state = self.look().await;
        let epoch = match epoch {
            Some(epoch) => epoch,
            None => state.clone()?.epoch,
        };
        if epoch == 0 {
            let message = "no epoch is final yet; WatchEpochs tells when one is".into();
            return Err(EpochsError::Refused { reason: "NO_FINAL_EPOCH", message });
        }
        let _one = self.loading.lock().await;
        if let Some(bundle) = self.seat.shelf.find(Some(epoch)) {
            return Ok(bundle);
        }
        let found = self.seat.bundles.get(epoch).await.map_err(|error| refused(error.into()))?;
        let bundle = Arc::new(found.ok_or_else(|| no_bundle(epoch))?);
        // A proof of another root than the chain's would only cost its gas.
        if let Place::OtherRoot { root, .. } = self.standing(&state, epoch).await.place {
            let (root, other) = (bundle.manifest().payout_root, root.into());
            return Err(refused(SettlementError::OtherRoot { epoch, root, other }.into()));
        }
        self.seat.shelf.put(Arc::clone(&bundle));
        Ok(bundle)
    }
}

/// Keeps the newest.
fn keep<T>(map: &mut BTreeMap<u64, T>, epoch: u64, value: T) {
    map.insert(epoch, value);
    if map.len() > EPOCHS_KEPT_MAX {
        map.pop_first();
    }
}

fn no_bundle(epoch: u64) -> EpochsError {
    let next = "; SealEpoch or `openlora settle seal` publishes it";
    EpochsError::NotFound { what: "bundle of epoch", name: epoch.to_string(), next }
}

fn unknown(payout_root: Option<[u8; 32]>, error: &EpochsError) -> Standing {
    Standing { payout_root, place: Place::Unknown { reason: error.to_string() } }
}

fn own(address: tree::Address) -> Address {
    Address(address.into())
}

fn place(found: epochs::Standing) -> Place {
    match found {
        epochs::Standing::Due => Place::Due,
        epochs::Standing::Behind { .. } => Place::Behind,
        epochs::Standing::Proposed { finalizable_at } => Place::Proposed { finalizable_unix_s: finalizable_at },
        epochs::Standing::Disputed { challenger, resolvable_until } => {
            Place::Disputed { challenger: own(challenger), resolvable_until_unix_s: resolvable_until }
        }
        epochs::Standing::Finalized => Place::Finalized,
        epochs::Standing::Other { root, finalized } => Place::OtherRoot { root: root.into(), is_final: finalized },
    }
}

/// What callers are told of an error; the log has it whole where they are told less.
fn refused(error: anyhow::Error) -> EpochsError {
    let told = told(&error);
    if matches!(told, EpochsError::Unavailable { .. } | EpochsError::Internal(_)) {
        tracing::warn!(error = format!("{error:#}"), "settlement");
    }
    told
}

fn told(error: &anyhow::Error) -> EpochsError {
    use SettlementError as E;
    const KEY: EpochsError = EpochsError::Unavailable { what: "the key of settlement.keystore or settlement.kms_key" };
    const DATABASE: EpochsError = EpochsError::Unavailable { what: "the database of settlement.database_url" };
    if error.is::<KeyError>() {
        return KEY;
    }
    if error.is::<DatabaseError>() {
        return DATABASE;
    }
    let reason = match error.downcast_ref::<SettlementError>() {
        Some(E::Ledger(error)) => return error.clone().into(),
        Some(E::Rpc(_)) => return NODE,
        Some(E::Key(_)) => return KEY,
        Some(E::Database(_) | E::LeaseLost { .. } | E::BrokenTransaction { .. }) => return DATABASE,
        Some(E::Bundles { .. } | E::BundleTaken { .. } | E::BundleFormat { .. } | E::BundleMismatch { .. }) => {
            return EpochsError::Unavailable { what: "the place of bundles" };
        }
        Some(E::NotDue { .. }) => "EPOCH_NOT_DUE",
        Some(E::OtherRoot { .. }) => "OTHER_ROOT",
        Some(E::Unfunded { .. }) => "SETTLEMENT_UNFUNDED",
        Some(E::Balance { .. }) => "BALANCE_TOO_LOW",
        Some(E::WouldRevert { .. } | E::GasTooHigh { .. }) => "WOULD_REVERT",
        Some(_) => "SETTLEMENT_REFUSED",
        None => return EpochsError::Internal("settlement"),
    };
    EpochsError::Refused { reason, message: format!("{error:#}") }
}

#[cfg(test)]
#[path = "desk_tests.rs"]
mod tests;
