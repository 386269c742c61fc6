//! Epochs as the wire shows them, and the streams that follow them.
//!
//! One task looks at the ledger and the chain for all streams, and only while there is one. A stream compares what it saw with
//! what it has sent, so that a slow reader costs no memory and misses states in between.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use openlora_ledger::{Amount, Asset, Epoch};
use openlora_proto::v1 as wire;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use crate::ServerError;
use crate::app::State;
use crate::edge::Deadline;
use crate::epochs::{Place, Standing};

/// Pause between looks while somebody watches.
const POLL: Duration = Duration::from_secs(2);
/// The newest epochs, which are watched.
const WATCHED_EPOCHS_MAX: u64 = 100;
/// Streams at once.
const WATCHERS_MAX: usize = 256;
/// Messages that wait for one reader.
const WATCH_MESSAGES_MAX: usize = 4;

/// The newest epochs, ascending, or why they cannot be seen.
type Picture = Result<Vec<wire::Epoch>, Status>;

/// What all streams share.
pub(crate) struct Watch {
    pictures: watch::Sender<Arc<Picture>>,
    /// Somebody came, or something happened: look now.
    wanted: Arc<Notify>,
    watchers: Arc<Semaphore>,
}

impl Watch {
    /// Starts the task that looks; it ends when the server drains.
    pub(crate) fn start(state: &Arc<State>) -> Self {
        let pictures = watch::Sender::new(Arc::new(Ok(Vec::new())));
        let wanted = Arc::new(Notify::new());
        let (state, to, when) = (Arc::clone(state), pictures.clone(), Arc::clone(&wanted));
        tokio::spawn(async move {
            tokio::select! {
                () = state.drained() => {}
                () = look_for_ever(&state, &to, &when) => {}
            }
        });
        Self { pictures, wanted, watchers: Arc::new(Semaphore::new(WATCHERS_MAX)) }
    }

    /// Has watchers see what has just happened.
    pub(crate) fn look(&self) {
        self.wanted.notify_one();
    }

    /// A stream of the epochs as they are and of what changes, until the reader goes, its deadline passes or the server drains.
    ///
    /// # Errors
    /// [`ServerError::Busy`].
    pub(crate) fn stream(
        &self,
        state: &Arc<State>,
        deadline: Option<Deadline>,
    ) -> Result<ReceiverStream<Result<wire::Epoch, Status>>, ServerError> {
        let permit = Arc::clone(&self.watchers).try_acquire_owned().map_err(|_| ServerError::Busy {
            what: "calls of WatchEpochs",
            limit: "watchers_max",
            max: WATCHERS_MAX,
            retry_after: POLL,
        })?;
        let (to, stream) = mpsc::channel(WATCH_MESSAGES_MAX);
        // What was seen before is not shown: nobody may have looked for long.
        tokio::spawn(follow(Arc::clone(state), self.pictures.subscribe(), deadline, to, permit));
        self.look();
        Ok(ReceiverStream::new(stream))
    }
}

async fn look_for_ever(state: &State, pictures: &watch::Sender<Arc<Picture>>, wanted: &Notify) {
    let mut next: Option<tokio::time::Instant> = None;
    loop {
        match next {
            Some(at) => drop(tokio::time::timeout_at(at, wanted.notified()).await),
            None => wanted.notified().await,
        }
        let is_watched = pictures.receiver_count() > 0;
        if is_watched {
            pictures.send_replace(Arc::new(newest(state).await.map_err(Status::from)));
        }
        next = is_watched.then(|| tokio::time::Instant::now() + POLL);
    }
}

async fn newest(state: &State) -> Result<Vec<wire::Epoch>, ServerError> {
    let Some(books) = &state.app.books else { return Ok(Vec::new()) };
    let last = books.ledger.last_epoch().await?;
    let first = last.saturating_sub(WATCHED_EPOCHS_MAX - 1).max(1);
    picture(state, &(first..=last).collect::<Vec<_>>()).await
}

/// One stream. The permit goes with it.
async fn follow(
    state: Arc<State>,
    pictures: watch::Receiver<Arc<Picture>>,
    deadline: Option<Deadline>,
    to: mpsc::Sender<Result<wire::Epoch, Status>>,
    _permit: OwnedSemaphorePermit,
) {
    let late = async {
        match deadline {
            Some(Deadline(at)) => tokio::time::sleep_until(at.into()).await,
            None => std::future::pending().await,
        }
    };
    let end = tokio::select! {
        () = to.closed() => return,
        () = state.drained() => ServerError::Draining.into(),
        () = late => ServerError::DeadlineExceeded.into(),
        end = feed(pictures, &to) => end,
    };
    // A reader that is gone needs no reason.
    let _gone = to.send(Err(end)).await;
}

/// Sends what differs from what was sent; returns why it cannot go on.
async fn feed(mut pictures: watch::Receiver<Arc<Picture>>, to: &mpsc::Sender<Result<wire::Epoch, Status>>) -> Status {
    let mut sent = BTreeMap::new();
    loop {
        if pictures.changed().await.is_err() {
            return ServerError::Draining.into();
        }
        let picture = Arc::clone(&pictures.borrow_and_update());
        let epochs = match &*picture {
            Ok(epochs) => epochs,
            Err(status) => return status.clone(),
        };
        for epoch in epochs {
            if sent.get(&epoch.number) == Some(epoch) {
                continue;
            }
            sent.insert(epoch.number, epoch.clone());
            if to.send(Ok(epoch.clone())).await.is_err() {
                return Status::cancelled("the reader went away");
            }
        }
        if let Some(first) = epochs.first() {
            sent.retain(|number, _| *number >= first.number);
        }
    }
}

/// Sealed epochs in the order of `numbers`: from the ledger, with their standing on the chain where there is one.
///
/// # Errors
/// The ledger's. That the chain does not answer is none: the standing says so.
pub(crate) async fn picture(state: &State, numbers: &[u64]) -> Result<Vec<wire::Epoch>, ServerError> {
    let Some(books) = &state.app.books else { return Ok(Vec::new()) };
    let mut epochs = Vec::with_capacity(numbers.len());
    for number in numbers {
        epochs.push(sealed(books.ledger.epoch(*number).await?));
    }
    match &state.app.epochs {
        Some(chain) if !numbers.is_empty() => {
            let standings = chain.standings(numbers).await;
            epochs.iter_mut().zip(standings).for_each(|(epoch, found)| epoch.standing = Some(standing(found)));
        }
        _ => {}
    }
    Ok(epochs)
}

/// An epoch as the ledger has it.
fn sealed(epoch: Epoch) -> wire::Epoch {
    let total = |(asset, cumulative): &(Asset, Amount)| {
        let added = epoch.paid.iter().find(|(of, _)| of == asset).map_or(Amount(0), |(_, added)| *added);
        let [cumulative, added] = [*cumulative, added].map(|amount| amount.to_string());
        wire::EpochTotal { asset: asset.to_string(), cumulative, added }
    };
    let standing = wire::EpochStanding { state: wire::EpochState::Sealed.into(), ..Default::default() };
    wire::Epoch {
        number: epoch.number,
        first_row: epoch.first,
        last_row: epoch.row,
        ledger_head: hex(&epoch.head),
        sealed_unix_ms: epoch.sealed_at_ms,
        totals: epoch.cumulative.iter().map(total).collect(),
        standing: Some(standing),
    }
}

fn standing(found: Standing) -> wire::EpochStanding {
    let mut standing = wire::EpochStanding {
        payout_root: found.payout_root.as_ref().map(hex).unwrap_or_default(),
        ..Default::default()
    };
    let state = match found.place {
        Place::Unknown { reason } => {
            standing.reason = reason;
            wire::EpochState::Unknown
        }
        Place::Behind => wire::EpochState::Behind,
        Place::Due => wire::EpochState::Due,
        Place::Proposed { finalizable_unix_s } => {
            standing.finalizable_unix_s = finalizable_unix_s;
            wire::EpochState::Proposed
        }
        Place::Disputed { challenger, resolvable_until_unix_s } => {
            standing.challenger = challenger.to_string();
            standing.resolvable_until_unix_s = resolvable_until_unix_s;
            wire::EpochState::Disputed
        }
        Place::Finalized => wire::EpochState::Finalized,
        Place::OtherRoot { root, is_final } => {
            standing.other_root = hex(&root);
            standing.other_root_is_final = is_final;
            wire::EpochState::OtherRoot
        }
    };
    standing.set_state(state);
    standing
}

/// 32 bytes as they are written everywhere around a chain.
pub(crate) fn hex(hash: &[u8; 32]) -> String {
    format!("0x{}", blake3::Hash::from_bytes(*hash).to_hex())
}
