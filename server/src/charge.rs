//! What a request costs its caller: set aside before it runs, charged when it ends, given back where it had nothing. Steps three and
//! nine of a request.
//!
//! | how it ends | what is charged |
//! |---|---|
//! | complete | its usage; the last message goes out when that is on the disk |
//! | the caller went away, was too slow, or its deadline passed | the prompt and the tokens made so far; nothing before the first |
//! | this server failed or shut down | nothing |
//!
//! A request is closed by a task of its own, so that it is closed once whoever goes away, and tries again while the database does
//! not answer; shutdown waits for these tasks. What a killed server left open is given back by the ledger's sweep, which runs here.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use openlora_adapters::Lease;
use openlora_ledger::{LedgerError, Payees, Request, Tokens};
use openlora_types::{Classify as _, Usage};
use tokio::runtime::Handle;
use tokio::sync::oneshot;

use crate::ServerError;
use crate::app::{Books, State};
use crate::convert::AdapterName;

/// How long the last message waits for the ledger. The closing itself goes on beyond.
const CLOSE_PATIENCE: Duration = Duration::from_secs(2);
/// Between two tries to close a request: the first, and the longest.
const RETRY_FIRST: Duration = Duration::from_millis(50);
const RETRY_MAX: Duration = Duration::from_secs(5);
/// Between two sweeps.
const SWEEP_EVERY: Duration = Duration::from_secs(60);

/// Resolves when the ledger has what a request used, or patience is over.
pub(crate) type Closing = Pin<Box<dyn Future<Output = ()> + Send>>;

/// Money that is set aside for one request. Dropping it closes the request.
pub(crate) struct Charge {
    state: Arc<State>,
    books: Books,
    runtime: Handle,
    /// Names the reservation, and the answer's receipt.
    receipt: String,
    payees: Payees,
    /// Whether an adapter answered, whose contributors will be named by the receipt.
    attributed: bool,
    so_far: Tokens,
    open: bool,
}

impl Charge {
    /// Sets aside what the request may cost at most; `None` where requests are not charged. Blocks, on a thread of the runtime that
    /// may.
    ///
    /// # Errors
    /// [`ServerError::Ledger`]: among others not funded, over the day's quota, no price.
    pub(crate) fn reserve(
        state: &Arc<State>,
        caller: &str,
        adapter: Option<(&AdapterName, &Lease)>,
        tokens: Tokens,
    ) -> Result<Option<Self>, ServerError> {
        let Some(books) = state.app.books.clone().filter(|books| books.charge) else { return Ok(None) };
        let receipt = format!("{:032x}", rand::random::<u128>());
        let request = Request {
            application: caller.to_owned(),
            asset: books.asset.clone(),
            generation: adapter.map(|(_, lease)| lease.generation().to_string()),
            alias: adapter.map(|(name, _)| name.alias.to_string()),
            prompt_tokens: tokens.prompt,
            completion_tokens_max: tokens.completion,
        };
        let runtime = Handle::current();
        runtime.block_on(books.ledger.reserve(&receipt, &request))?;
        let owner = adapter.map(|(_, lease)| lease.owner().to_owned());
        let payees = Payees { owner, base_owner: books.base_owner.clone(), parents: Vec::new() };
        let so_far = Tokens { completion: 0, ..tokens };
        let (state, attributed) = (Arc::clone(state), adapter.is_some());
        Ok(Some(Self { state, books, runtime, receipt, payees, attributed, so_far, open: true }))
    }

    /// The receipt's id.
    pub(crate) fn receipt(&self) -> &str {
        &self.receipt
    }

    /// The request runs, with so many of its prompt's tokens from the cache.
    pub(crate) fn started(&mut self, cached: u32) {
        self.so_far.cached = cached.into();
    }

    /// A token was made.
    pub(crate) fn token(&mut self) {
        self.so_far.completion += 1;
    }

    /// Charges a complete request.
    pub(crate) fn complete(&mut self, usage: &Usage) -> Closing {
        let tokens = Tokens {
            prompt: usage.prompt_tokens.into(),
            cached: usage.cached_prompt_tokens.into(),
            completion: usage.completion_tokens.into(),
        };
        let closed = self.close(tokens);
        Box::pin(async move {
            if tokio::time::timeout(CLOSE_PATIENCE, closed).await.is_err() {
                tracing::warn!("the ledger takes long to charge a request; its answer goes out");
            }
        })
    }

    /// Charges nothing.
    pub(crate) fn waive(&mut self) {
        self.so_far.completion = 0;
    }

    /// Has the request charged, or voided where it made no token. Resolves when that is done or given up.
    fn close(&mut self, tokens: Tokens) -> oneshot::Receiver<()> {
        self.open = false;
        let (done, closed) = oneshot::channel();
        let (ledger, receipt) = (self.books.ledger.clone(), std::mem::take(&mut self.receipt));
        let used = openlora_ledger::Usage {
            request_id: receipt.clone(),
            receipt: self.attributed.then(|| receipt.clone()),
            tokens,
            payees: std::mem::take(&mut self.payees),
        };
        let busy = self.state.begin();
        let metrics = Arc::clone(&self.state.metrics);
        self.runtime.spawn(async move {
            let mut pause = RETRY_FIRST;
            loop {
                let outcome = match used.tokens.completion {
                    0 => ledger.void(&receipt).await.map(|_| "voided"),
                    _ => ledger.post(&receipt, &used).await.map(|_| "posted"),
                };
                match outcome {
                    Ok(outcome) => break metrics.closed(outcome),
                    Err(error) if error.is_retryable() => {
                        tracing::warn!(%error, %receipt, "a request is not charged yet; trying again");
                        tokio::time::sleep(pause).await;
                        pause = (pause * 2).min(RETRY_MAX);
                    }
                    Err(error) => {
                        tracing::error!(%error, %receipt, "a request was not charged");
                        break metrics.closed("failed");
                    }
                }
            }
            drop(busy);
            // Nobody waits where the caller is gone.
            let _gone = done.send(());
        });
        closed
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        if self.open {
            let so_far = self.so_far;
            drop(self.close(so_far));
        }
    }
}

/// Gives back, again and again, what killed servers left open. Ends never.
pub(crate) async fn sweep(books: Books) {
    loop {
        match books.ledger.sweep().await {
            Ok(swept) if swept.voided + swept.pooled > 0 => {
                tracing::info!(voided = swept.voided, pooled = swept.pooled, "swept the ledger");
            }
            Ok(_) => {}
            Err(error @ (LedgerError::Database(_) | LedgerError::Stopped)) => {
                tracing::warn!(%error, "the ledger could not be swept; trying again");
            }
            Err(error) => tracing::error!(%error, "the ledger could not be swept"),
        }
        tokio::time::sleep(SWEEP_EVERY).await;
    }
}
