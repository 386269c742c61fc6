//! Adapters on their way to the device. A load reads the file (or finds it in the host cache) and writes the factors into
//! pages that the scheduler chose, on threads of its own: a step never waits for one.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use openlora_adapters::Lease;
use openlora_kernels::{Backend, KernelError};
use openlora_model::{Model, ModelError};
use openlora_types::Generation;

use crate::EngineError;

/// Threads that load.
const THREADS: usize = 2;

/// The way to the loading threads and what they have brought. They end after it, each with the load it is at: nobody waits
/// for a slow disk to shut down.
pub(crate) struct Loader<B: Backend> {
    jobs: SyncSender<Job<B>>,
    loaded: Receiver<Loaded<B::Adapter>>,
}

struct Job<B: Backend> {
    lease: Lease,
    pages: B::PageSet,
    /// How many.
    count: usize,
}

/// How a load ended. After a failure its pages are free again.
pub(crate) struct Loaded<A> {
    pub(crate) generation: Generation,
    pub(crate) result: Result<A, EngineError>,
    /// Pages it was for, and how long it took.
    pub(crate) pages: usize,
    pub(crate) micros: u64,
}

impl<B: Backend> Loader<B> {
    /// Starts the threads. At most `loading_max` loads may be under way at once.
    pub(crate) fn start(model: &Arc<Model<B>>, loading_max: usize) -> Result<Self, EngineError> {
        let (jobs, todo) = sync_channel(loading_max);
        let (done, loaded) = channel();
        let todo = Arc::new(Mutex::new(todo));
        for number in 0..THREADS {
            let (model, todo, done) = (Arc::clone(model), Arc::clone(&todo), done.clone());
            std::thread::Builder::new()
                .name(format!("openlora-load-{number}"))
                .spawn(move || work(&model, &todo, &done))
                .map_err(|error| EngineError::Start(format!("loading thread: {error}")))?;
        }
        Ok(Self { jobs, loaded })
    }

    /// Begins a load into `count` pages.
    ///
    /// # Panics
    /// When more are under way than the loader was started for.
    pub(crate) fn begin(&self, lease: Lease, pages: B::PageSet, count: usize) {
        assert!(self.jobs.try_send(Job { lease, pages, count }).is_ok(), "the scheduler bounds the loads under way");
    }

    /// The next load that has ended.
    pub(crate) fn poll(&self) -> Option<Loaded<B::Adapter>> {
        self.loaded.try_recv().ok()
    }

    /// As [`Loader::poll`], waiting for a while.
    pub(crate) fn wait(&self, longest: Duration) -> Option<Loaded<B::Adapter>> {
        self.loaded.recv_timeout(longest).ok()
    }
}

fn work<B: Backend>(model: &Model<B>, todo: &Mutex<Receiver<Job<B>>>, done: &Sender<Loaded<B::Adapter>>) {
    loop {
        let job = todo.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(Job { lease, pages, count }) = job else { return };
        let (generation, began) = (lease.generation(), Instant::now());
        // By value, so that whatever ends the load gives the pages back before the scheduler hears of it.
        let result = catch_unwind(AssertUnwindSafe(move || load(model, &lease, pages)));
        let result = result.unwrap_or_else(|_| Err(EngineError::Adapter("loading it panicked".into())));
        let micros = began.elapsed().as_micros() as u64;
        if done.send(Loaded { generation, result, pages: count, micros }).is_err() {
            return;
        }
    }
}

fn load<B: Backend>(model: &Model<B>, lease: &Lease, pages: B::PageSet) -> Result<B::Adapter, EngineError> {
    let weights = lease.load()?;
    model.load_adapter(&weights, pages).map_err(|error| match error {
        // No fault of the adapter's: nobody is served by this device any more.
        ModelError::Kernel(KernelError::Device { .. } | KernelError::ThreadPanicked(_)) => {
            EngineError::Dead(error.to_string())
        }
        error => EngineError::Adapter(error.to_string()),
    })
}
