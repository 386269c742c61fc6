//! The thread pool of the kernels: a fork-join of a fixed number of threads, made for operations of ten microseconds.
//!
//! [`Pool::run`] hands the same closure to every worker; the calling thread is worker 0. Workers spin for a bounded time
//! between operations, because waking a sleeping thread costs as much as a small operation, and then park, so that an idle
//! server uses no processor. There is no queue. Small operations split their work with [`Pool::split`] once and for all;
//! large ones ([`Pool::run_shares`]) begin the same way, which keeps each thread's share of a weight matrix in its own cache
//! from step to step, and then take from each other what is not begun yet, because a processor that has just been taken
//! away from one thread (by another program, by the server's own threads) would have all others wait.

use std::any::Any;
use std::cell::{Cell, UnsafeCell};
use std::marker::PhantomData;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{JoinHandle, Thread};

use crate::KernelError;

/// Turns of a worker's spin loop before it parks: roughly 100 microseconds, longer than the serial parts between two
/// operations of a step and short beside the time between two requests.
const SPINS_BEFORE_PARK: u32 = 2_000;
/// Turns of the caller's spin loop before it starts to give its time slice away: on a machine with fewer free processors
/// than threads the worker it waits for may need this very processor.
const SPINS_BEFORE_YIELD: u32 = 20_000;

thread_local! {
    /// Whether this thread is inside [`Pool::run`]; a nested run would wait for itself.
    static INSIDE: Cell<bool> = const { Cell::new(false) };
}

/// A fixed set of threads that run one closure together.
#[derive(Debug)]
pub struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    /// Serialises callers: an adapter may be loaded beside a step.
    turn: Mutex<()>,
}

type Task = dyn Fn(usize) + Sync;

struct Shared {
    /// Twice the number of operations so far; a change tells the workers to start. The lowest bit is [`STOP`].
    epoch: AtomicU64,
    /// The running operation's closure. Written by the caller before `epoch`, read by workers after it.
    task: UnsafeCell<Option<*const Task>>,
    /// Workers that have not finished the running operation.
    pending: AtomicUsize,
    /// Which workers are parked or about to.
    parked: Vec<AtomicBool>,
    /// What each worker of [`Pool::run_shares`] has left of each work.
    shares: Vec<[Share; WORKS_MAX]>,
    poisoned: AtomicBool,
    message: Mutex<Option<String>>,
}

/// Works of one [`Pool::run_shares`].
const WORKS_MAX: usize = 2;

/// Work that is cut into numbered parts, for [`Pool::run_shares`].
pub struct Work<'a> {
    /// A worker's parts. They must not overlap with others'.
    pub share: &'a (dyn Fn(usize) -> Range<usize> + Sync),
    /// How many neighbouring parts are taken at a time.
    pub run: usize,
    /// Does some parts: called with the worker and the parts.
    pub task: &'a (dyn Fn(usize, Range<usize>) + Sync),
}

impl std::fmt::Debug for Work<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Work").field("run", &self.run).finish_non_exhaustive()
    }
}

/// What is left of one worker's share: alone on its cache line, because every worker counts its own up all the time.
#[derive(Default)]
#[repr(align(64))]
struct Share {
    next: AtomicUsize,
    end: AtomicUsize,
}

impl Share {
    fn take(&self, parts: usize) -> Option<Range<usize>> {
        let end = self.end.load(Ordering::Relaxed);
        // Looked at first, so that those who find it empty do not count it up for ever.
        if self.next.load(Ordering::Relaxed) >= end {
            return None;
        }
        let start = self.next.fetch_add(parts, Ordering::Relaxed);
        (start < end).then(|| start..(start + parts).min(end))
    }
}

/// Set in `epoch` when the workers shall end.
const STOP: u64 = 1;

// SAFETY: `task` is the only field that is not Sync. It is written only by the thread that holds `turn`, while `pending` is
// 0 (no worker reads it), and the epoch's release store / acquire load orders the write before the workers' reads.
unsafe impl Sync for Shared {}
// SAFETY: the raw pointer in `task` is only dereferenced while the caller of `run` keeps its target alive, from any thread,
// which the target's `Sync` bound allows.
unsafe impl Send for Shared {}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").field("poisoned", &self.poisoned).finish_non_exhaustive()
    }
}

impl Pool {
    /// Starts `threads - 1` threads named `openlora-kernel-N`; the caller of [`Pool::run`] is the remaining one.
    ///
    /// # Errors
    /// [`KernelError::Threads`] when `threads` is 0 or the system refuses a thread.
    pub fn new(threads: usize) -> Result<Self, KernelError> {
        if threads == 0 {
            return Err(KernelError::Threads { threads, reason: "at least one thread is needed".into() });
        }
        let shared = Arc::new(Shared {
            epoch: AtomicU64::new(0),
            task: UnsafeCell::new(None),
            pending: AtomicUsize::new(0),
            parked: (0..threads).map(|_| AtomicBool::new(false)).collect(),
            shares: (0..threads).map(|_| Default::default()).collect(),
            poisoned: AtomicBool::new(false),
            message: Mutex::new(None),
        });
        let mut pool = Self { shared, workers: Vec::with_capacity(threads - 1), turn: Mutex::new(()) };
        for worker in 1..threads {
            let shared = Arc::clone(&pool.shared);
            let thread = std::thread::Builder::new()
                .name(format!("openlora-kernel-{worker}"))
                .spawn(move || shared.work(worker))
                .map_err(|error| KernelError::Threads { threads, reason: error.to_string() })?;
            pool.workers.push(thread);
        }
        Ok(pool)
    }

    /// Threads that take part in an operation, the caller included.
    #[must_use]
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `task(worker)` once for every worker in `0..threads()`, at the same time, and returns when all have returned.
    ///
    /// A panic of `task` on any worker poisons the pool: this and every later `run` returns normally (later ones without
    /// calling anything), and [`Pool::check`] says what happened. Callers that need the result check before they use it.
    ///
    /// # Panics
    /// When called from inside a task of a pool, which would wait for itself.
    pub fn run(&self, task: &(dyn Fn(usize) + Sync)) {
        let _turn = self.turn();
        self.run_in_turn(task);
    }

    /// Does all parts of all works, each once. A worker begins with its own share of the first, then takes over from others
    /// what they have not begun, and goes on with the next work without waiting for anybody. Panics as for [`Pool::run`].
    ///
    /// # Panics
    /// When called from inside a task of a pool, when a run is 0, or when there are more works than [`WORKS_MAX`].
    pub fn run_shares(&self, works: &[Work<'_>]) {
        assert!(works.len() <= WORKS_MAX && works.iter().all(|work| work.run > 0), "{works:?}");
        let _turn = self.turn();
        // Published to the workers with the operation's epoch.
        for (worker, left) in self.shared.shares.iter().enumerate() {
            for (work, left) in works.iter().zip(left) {
                let share = (work.share)(worker);
                left.next.store(share.start, Ordering::Relaxed);
                left.end.store(share.end, Ordering::Relaxed);
            }
        }
        self.run_in_turn(&|worker| {
            let shares = &self.shared.shares;
            for (number, work) in works.iter().enumerate() {
                for from in (worker..shares.len()).chain(0..worker) {
                    while let Some(parts) = shares[from][number].take(work.run) {
                        (work.task)(worker, parts);
                    }
                }
            }
        });
    }

    fn turn(&self) -> MutexGuard<'_, ()> {
        assert!(!INSIDE.get(), "a pool was called from inside a task");
        self.turn.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// [`Pool::run`] for who holds `turn`.
    fn run_in_turn(&self, task: &(dyn Fn(usize) + Sync)) {
        if self.shared.poisoned.load(Ordering::Acquire) {
            return;
        }
        if self.workers.is_empty() {
            return self.shared.call(task, 0);
        }
        // SAFETY: only the lifetime of the trait object changes. The pointer is read by workers of this operation alone, and
        // this function does not return (nor unwind: `call` catches panics) before `pending` is 0, that is, before the last
        // worker has left the closure.
        let erased = unsafe { std::mem::transmute::<*const (dyn Fn(usize) + Sync + '_), *const Task>(task) };
        self.shared.pending.store(self.workers.len(), Ordering::Relaxed);
        // SAFETY: `turn` is held and the previous operation has ended, so no other thread accesses `task` now.
        unsafe { *self.shared.task.get() = Some(erased) };
        // Sequentially consistent with the worker's `parked` store and `epoch` load: one of the two sees the other's.
        self.shared.epoch.fetch_add(2, Ordering::SeqCst);
        for (worker, handle) in (1..).zip(&self.workers) {
            self.shared.wake(worker, handle.thread());
        }
        self.shared.call(task, 0);
        let mut spins = 0;
        while self.shared.pending.load(Ordering::Acquire) != 0 {
            if spins < SPINS_BEFORE_YIELD {
                spins += 1;
                std::hint::spin_loop();
            } else {
                std::thread::yield_now();
            }
        }
    }

    /// `worker`'s part of `0..n`: contiguous parts in order, whose lengths differ by at most one.
    #[must_use]
    pub fn split(&self, n: usize, worker: usize) -> Range<usize> {
        let threads = self.threads();
        n * worker / threads..n * (worker + 1) / threads
    }

    /// Splits `data` into rows of `width` elements and calls `task(row, elements)` for each, the rows spread over the workers.
    ///
    /// # Panics
    /// When `width` is 0 or does not divide the length.
    pub fn for_each_row<T: Send>(&self, data: &mut [T], width: usize, task: &(dyn Fn(usize, &mut [T]) + Sync)) {
        assert!(width > 0 && data.len().is_multiple_of(width), "{} elements in rows of {width}", data.len());
        let rows = data.len() / width;
        let data = Disjoint::new(data);
        self.run(&|worker| {
            for row in self.split(rows, worker) {
                // SAFETY: `split` gives every row to exactly one worker, so the ranges do not overlap.
                task(row, unsafe { data.slice(row * width..(row + 1) * width) });
            }
        });
    }

    /// # Errors
    /// [`KernelError::ThreadPanicked`] when a task has panicked since the pool was made.
    pub fn check(&self) -> Result<(), KernelError> {
        if !self.shared.poisoned.load(Ordering::Acquire) {
            return Ok(());
        }
        let message = self.shared.message.lock().unwrap_or_else(PoisonError::into_inner).clone();
        Err(KernelError::ThreadPanicked(message.unwrap_or_default()))
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.epoch.fetch_or(STOP, Ordering::SeqCst);
        for (worker, handle) in (1..).zip(&self.workers) {
            self.shared.wake(worker, handle.thread());
        }
        for handle in self.workers.drain(..) {
            // A worker catches its tasks' panics, so there is nothing to learn from the result.
            let _ = handle.join();
        }
    }
}

impl Shared {
    fn work(&self, worker: usize) {
        let mut seen = 0;
        loop {
            seen = self.wait(worker, seen);
            if seen & STOP != 0 {
                return;
            }
            // SAFETY: the epoch changed, so the caller has written `task` and will not write it again before this worker has
            // decremented `pending`; the target is alive for the same reason.
            let task = unsafe { &*(*self.task.get()).expect("the caller sets the task before the epoch") };
            self.call(task, worker);
            self.pending.fetch_sub(1, Ordering::Release);
        }
    }

    /// Waits until the epoch is not `seen`: spins, then parks.
    fn wait(&self, worker: usize, seen: u64) -> u64 {
        for _ in 0..SPINS_BEFORE_PARK {
            let epoch = self.epoch.load(Ordering::Acquire);
            if epoch != seen {
                return epoch;
            }
            std::hint::spin_loop();
        }
        loop {
            self.parked[worker].store(true, Ordering::SeqCst);
            let epoch = self.epoch.load(Ordering::SeqCst);
            if epoch != seen {
                self.parked[worker].store(false, Ordering::Relaxed);
                return epoch;
            }
            std::thread::park();
        }
    }

    fn wake(&self, worker: usize, thread: &Thread) {
        if self.parked[worker].load(Ordering::SeqCst) && self.parked[worker].swap(false, Ordering::SeqCst) {
            thread.unpark();
        }
    }

    fn call(&self, task: &(dyn Fn(usize) + Sync), worker: usize) {
        INSIDE.set(true);
        let result = catch_unwind(AssertUnwindSafe(|| task(worker)));
        INSIDE.set(false);
        if let Err(panic) = result {
            let mut message = self.message.lock().unwrap_or_else(PoisonError::into_inner);
            message.get_or_insert_with(|| panic_message(&*panic));
            self.poisoned.store(true, Ordering::Release);
        }
    }
}

fn panic_message(panic: &(dyn Any + Send)) -> String {
    if let Some(text) = panic.downcast_ref::<&str>() {
        (*text).to_owned()
    } else if let Some(text) = panic.downcast_ref::<String>() {
        text.clone()
    } else {
        "panic with a value that is not text".to_owned()
    }
}

/// A mutable slice that workers write in parts that do not overlap.
#[derive(Debug)]
pub struct Disjoint<'a, T> {
    start: *mut T,
    len: usize,
    borrow: PhantomData<&'a mut [T]>,
}

// SAFETY: access is only by `slice`, whose caller promises that no two live parts overlap; elements then move between threads
// as `&mut T` would, which `T: Send` allows.
unsafe impl<T: Send> Sync for Disjoint<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send> Send for Disjoint<'_, T> {}

impl<'a, T> Disjoint<'a, T> {
    /// Borrows all of `data`.
    pub fn new(data: &'a mut [T]) -> Self {
        Self { start: data.as_mut_ptr(), len: data.len(), borrow: PhantomData }
    }

    /// The `len` elements from `start` on.
    ///
    /// # Safety
    /// They must be initialised and, for `'a`, reached only through values of this type, where parts that overlap must not
    /// live at the same time, whichever value they came from.
    pub(super) unsafe fn from_raw(start: *mut T, len: usize) -> Self {
        Self { start, len, borrow: PhantomData }
    }

    /// Elements.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The elements in `range`.
    ///
    /// # Safety
    /// While the result lives, no other part that overlaps `range` may exist, on any thread.
    ///
    /// # Panics
    /// When `range` leaves the slice.
    #[must_use]
    #[expect(clippy::mut_from_ref, reason = "the caller promises that parts do not overlap")]
    pub unsafe fn slice(&self, range: Range<usize>) -> &mut [T] {
        assert!(range.start <= range.end && range.end <= self.len, "{range:?} of {}", self.len);
        // SAFETY: the range is inside the borrowed slice, which outlives self, and the caller promises exclusive access.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(range.start), range.len()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_part_of_every_share_is_done_once_whoever_is_late() {
        for threads in 1..6 {
            let pool = Pool::new(threads).expect("threads");
            for (all, run) in [(0, 1), (1, 3), (7, 2), (64, 5), (1000, 1)] {
                for late in 0..threads {
                    let done: Vec<AtomicUsize> = (0..all).map(|_| AtomicUsize::new(0)).collect();
                    let by = AtomicUsize::new(0);
                    let second: Vec<AtomicUsize> = (0..3).map(|_| AtomicUsize::new(0)).collect();
                    let first = |worker, parts: Range<usize>| {
                        assert!(parts.len() <= run);
                        for part in parts {
                            done[part].fetch_add(1, Ordering::Relaxed);
                        }
                        if worker == late {
                            by.fetch_add(1, Ordering::Relaxed);
                            std::thread::sleep(std::time::Duration::from_micros(200));
                        }
                    };
                    pool.run_shares(&[
                        Work { share: &|worker| pool.split(all, worker), run, task: &first },
                        Work {
                            share: &|worker| pool.split(3, worker),
                            run: 1,
                            task: &|_, parts| parts.for_each(|part| _ = second[part].fetch_add(1, Ordering::Relaxed)),
                        },
                    ]);
                    assert!(done.iter().chain(&second).all(|done| done.load(Ordering::Relaxed) == 1));
                    if threads > 1 && all == 1000 {
                        assert!(by.load(Ordering::Relaxed) < 1000 / threads, "nobody took over from {late}");
                    }
                }
            }
            pool.check().expect("no panic");
        }
    }

    #[test]
    fn every_worker_runs_every_task_once() {
        for threads in [1, 2, 3, 5] {
            let pool = Pool::new(threads).expect("pool");
            let calls: Vec<AtomicUsize> = (0..threads).map(|_| AtomicUsize::new(0)).collect();
            for _ in 0..2_000 {
                pool.run(&|worker| {
                    calls[worker].fetch_add(1, Ordering::Relaxed);
                });
            }
            assert!(calls.iter().all(|count| count.load(Ordering::Relaxed) == 2_000));
        }
    }

    #[test]
    fn parked_workers_wake_for_the_next_task() {
        let pool = Pool::new(3).expect("pool");
        let calls = AtomicUsize::new(0);
        for _ in 0..5 {
            std::thread::sleep(std::time::Duration::from_millis(3));
            pool.run(&|_| {
                calls.fetch_add(1, Ordering::Relaxed);
            });
        }
        assert_eq!(calls.load(Ordering::Relaxed), 15);
    }

    #[test]
    fn the_split_covers_everything_once_and_evenly() {
        let pool = Pool::new(3).expect("pool");
        for n in 0..20 {
            let parts: Vec<_> = (0..3).map(|worker| pool.split(n, worker)).collect();
            assert_eq!((parts[0].start, parts[2].end), (0, n));
            assert!(parts.windows(2).all(|pair| pair[0].end == pair[1].start));
            let lengths = parts.iter().map(Range::len);
            assert!(lengths.clone().max().unwrap_or(0) - lengths.min().unwrap_or(0) <= 1);
        }
    }

    #[test]
    fn a_panic_on_any_worker_poisons_the_pool_and_never_hangs() {
        for culprit in [0, 1] {
            let pool = Pool::new(2).expect("pool");
            pool.check().expect("healthy");
            pool.run(&|worker| assert!(worker != culprit, "worker {worker} fails"));
            let error = pool.check().expect_err("poisoned");
            assert_eq!(error.to_string(), format!("a kernel thread panicked: worker {culprit} fails"));
            pool.run(&|_| unreachable!("a poisoned pool runs nothing"));
            pool.check().expect_err("still poisoned");
        }
    }

    #[test]
    fn callers_on_several_threads_take_turns() {
        let pool = Pool::new(2).expect("pool");
        let inside = AtomicUsize::new(0);
        let most = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    for _ in 0..200 {
                        pool.run(&|_| {
                            most.fetch_max(inside.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                            inside.fetch_sub(1, Ordering::SeqCst);
                        });
                    }
                });
            }
        });
        assert!(most.load(Ordering::SeqCst) <= 2);
        pool.check().expect("healthy");
    }

    #[test]
    fn rows_are_each_visited_once() {
        let pool = Pool::new(3).expect("pool");
        let mut data = vec![0_usize; 7 * 5];
        pool.for_each_row(&mut data, 5, &|row, values| values.iter_mut().for_each(|value| *value += row + 1));
        assert!(data.chunks(5).enumerate().all(|(row, values)| values.iter().all(|value| *value == row + 1)));
    }
}
