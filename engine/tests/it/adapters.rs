//! Adapters and KV blocks in one pool, and loads beside the steps.

use std::sync::Barrier;

use openlora_engine::{EngineError, Submit};
use openlora_types::Classify;

use crate::probe::{Fault, Operation};
use crate::rig::{Rig, Setup, ask, eventually, prompt, read, read_failure};

/// Pages of a variant of `all-linear`.
fn variant_pages() -> usize {
    let rig = Setup::default().start();
    rig.answer(request(&rig, 1));
    rig.stats().adapter_pages
}

/// A pool for two variants and one request's KV beside them.
fn room_for_two() -> (Rig, usize) {
    let pages = variant_pages();
    assert!(pages > 3, "a third adapter does not fit where KV blocks were to go");
    let blocks = 2 * pages + 3;
    (Setup { blocks, ..Setup::default() }.start(), pages)
}

fn request(rig: &Rig, alpha: u32) -> Submit {
    Submit { lease: Some(rig.lease_variant(alpha)), ..ask(&prompt(33), 10) }
}

#[test]
fn an_adapter_that_finds_no_room_waits_for_it_and_holds_nobody_up() {
    let (rig, pages) = room_for_two();
    let expected: Vec<_> = [2, 4, 6].map(|alpha| rig.answer(request(&rig, alpha)).bits()).into();
    let together: Vec<_> = [2, 4, 6, 2, 6, 4].map(|alpha| (alpha, rig.submit(request(&rig, alpha)))).into();
    let base = rig.submit(ask(&prompt(9), 3));
    for (alpha, stream) in together {
        assert_eq!(read(stream).bits(), expected[alpha as usize / 2 - 1], "alpha {alpha}");
    }
    read(base);
    let stats = rig.stats();
    assert!(stats.adapters_resident <= 2 && stats.adapter_pages <= 2 * pages, "{stats:?}");
    assert_eq!(stats.adapter_loads_total, stats.adapter_evictions_total + stats.adapters_resident as u64);
    assert!(stats.adapter_evictions_total >= 1);
    rig.settle();
}

#[test]
fn an_evicted_adapter_answers_the_same_when_it_is_back() {
    let (rig, pages) = room_for_two();
    let ask_for = |alpha| rig.answer(request(&rig, alpha)).bits();
    let first: Vec<_> = [2, 4, 6].map(ask_for).into();
    assert!(first[0] != first[1] && first[1] != first[2], "the adapters differ");
    for (alpha, expected) in [(2, 0), (6, 2), (4, 1), (2, 0), (4, 1), (6, 2)] {
        assert_eq!(ask_for(alpha), first[expected], "alpha {alpha}");
        assert!(rig.stats().adapter_pages <= 2 * pages);
    }
    rig.settle();
}

#[test]
fn a_load_holds_up_its_own_requests_alone() {
    let rig = Setup::default().start();
    rig.controls.hold_loads(true);
    let cold = rig.submit(request(&rig, 2));
    rig.controls.wait_for_loads(1);
    // Behind it in the queue, the base model and its own adapter's next request.
    let behind = rig.submit(request(&rig, 2));
    assert_eq!(rig.answer(ask(&prompt(9), 10)).tokens().len(), 10);
    let stats = rig.stats();
    assert_eq!((stats.adapters_loading, stats.adapters_resident, stats.waiting), (1, 0, 2));
    rig.controls.hold_loads(false);
    assert_eq!(read(cold).bits(), read(behind).bits());
    let stats = rig.stats();
    assert_eq!((stats.adapter_loads_total, stats.adapter_misses_total, stats.adapter_hits_total), (1, 2, 0));
    rig.answer(request(&rig, 2));
    assert_eq!(rig.stats().adapter_hits_total, 1);
    rig.settle();
}

#[test]
fn requests_that_come_together_load_an_adapter_once() {
    let rig = Setup::default().start();
    let requests: Vec<_> = (0..6).map(|_| request(&rig, 3)).collect();
    let together = Barrier::new(requests.len());
    let answers: Vec<_> = std::thread::scope(|scope| {
        let ask = |request| {
            together.wait();
            rig.answer(request).bits()
        };
        let threads: Vec<_> = requests.into_iter().map(|request| scope.spawn(move || ask(request))).collect();
        threads.into_iter().map(|thread| thread.join().expect("an answer")).collect()
    });
    assert!(answers.iter().all(|answer| *answer == answers[0]));
    assert_eq!(rig.stats().adapter_loads_total, 1);
    rig.settle();
}

#[test]
fn an_adapter_that_fails_to_load_fails_its_own_requests_alone() {
    let rig = Setup::default().start();
    rig.controls.close();
    let running = rig.submit(ask(&prompt(9), 10));
    for fault in [Fault::OutOfMemory, Fault::Panic] {
        rig.controls.break_next(Operation::LoadAdapter, fault);
        rig.controls.open();
        let (error, events) = read_failure(rig.submit(request(&rig, 2)));
        let EngineError::Adapter(reason) = error else { panic!("{error:?}") };
        assert!(reason.contains("could not be allocated") || reason.contains("panicked"), "{reason}");
        assert_eq!(events, 0);
    }
    assert_eq!(read(running).tokens().len(), 10);
    eventually("both failures are counted and the pages are free again", || {
        let stats = rig.stats();
        (stats.adapter_load_failures_total, stats.adapter_pages) == (2, 0)
    });
    rig.answer(request(&rig, 2));
    rig.settle();
}

#[test]
fn an_adapter_larger_than_the_pool_is_refused_for_good() {
    let rig = Setup { blocks: variant_pages(), ..Setup::default() }.start();
    let (error, _) = read_failure(rig.submit(request(&rig, 2)));
    assert!(matches!(&error, EngineError::Invalid(_)) && !error.is_retryable(), "{error:?}");
    assert!(error.to_string().contains("for its adapter"), "{error}");
    assert_eq!(rig.stats().adapter_pages, 0);
}

#[test]
fn a_pinned_adapter_is_loaded_for_nobody_and_stays() {
    let (rig, pages) = room_for_two();
    let lease = rig.lease_variant(2);
    let generation = lease.generation();
    rig.engine.set_pinned(vec![lease]).expect("the queue has room");
    eventually("the adapter is on the device", || rig.engine.is_resident(&generation));
    for alpha in [4, 6, 8, 4] {
        rig.answer(request(&rig, alpha));
        assert!(rig.engine.is_resident(&generation), "alpha {alpha} drove it out");
    }
    rig.engine.set_pinned(Vec::new()).expect("the queue has room");
    for alpha in [4, 6, 4, 6] {
        rig.answer(request(&rig, alpha));
    }
    eventually("what is not pinned can go", || !rig.engine.is_resident(&generation));
    assert!(rig.stats().adapter_pages <= 2 * pages);
    rig.settle();
}
