//! Adapters on a device that has room for two.

use std::sync::Barrier;

use openlora_engine::{EngineError, Submit};
use openlora_types::Classify;

use crate::probe::{Fault, Operation};
use crate::rig::{Rig, Setup, ask, prompt, read};

/// Bytes of a variant of `all-linear` on the device.
fn variant_bytes() -> usize {
    let rig = Setup::default().start();
    rig.answer(request(&rig, 1));
    rig.stats().adapter_bytes_resident
}

fn room_for_two() -> (Rig, usize) {
    let bytes = variant_bytes();
    let mut setup = Setup::default();
    setup.config.adapter_bytes = 2 * bytes;
    (setup.start(), bytes)
}

fn request(rig: &Rig, alpha: u32) -> Submit {
    Submit { lease: Some(rig.lease_variant(alpha)), ..ask(&prompt(33), 10) }
}

#[test]
fn adapters_in_use_stay_and_a_third_is_refused_until_one_is_free() {
    let (rig, bytes) = room_for_two();
    rig.controls.close();
    let held = [rig.submit(request(&rig, 2)), rig.submit(request(&rig, 4))];
    let refused = rig.engine.submit(request(&rig, 6));
    let Err(error @ EngineError::AdapterMemory { needed, used, max }) = refused else { panic!("{refused:?}") };
    assert_eq!((needed, used, max), (bytes, 2 * bytes, 2 * bytes));
    assert!(error.is_retryable());
    assert_eq!(rig.store.stats().leases, 2, "the refused request's lease is given back");
    // Neither the base model nor an adapter that is there already needs room.
    let others = [rig.submit(request(&rig, 2)), rig.submit(ask(&prompt(9), 3))];
    rig.controls.open();
    for stream in held.into_iter().chain(others) {
        read(stream);
    }
    rig.answer(request(&rig, 6));
    let stats = rig.stats();
    assert_eq!((stats.adapters_resident, stats.adapter_bytes_resident), (2, 2 * bytes));
    assert_eq!((stats.adapter_loads_total, stats.adapter_evictions_total), (3, 1));
    rig.settle();
}

#[test]
fn the_least_recently_used_adapter_goes_and_answers_the_same_when_it_is_back() {
    let (rig, bytes) = room_for_two();
    let ask_for = |alpha| rig.answer(request(&rig, alpha)).bits();
    let first: Vec<_> = [2, 4, 6].map(ask_for).into();
    assert!(first[0] != first[1] && first[1] != first[2], "the adapters differ");
    let counts = || {
        let stats = rig.stats();
        assert_eq!((stats.adapters_resident, stats.adapter_bytes_resident), (2, 2 * bytes));
        (stats.adapter_loads_total, stats.adapter_evictions_total)
    };
    assert_eq!(counts(), (3, 1), "2 made room for 6");
    assert_eq!(ask_for(4), first[1]);
    assert_eq!(counts(), (3, 1), "4 was there");
    assert_eq!(ask_for(2), first[0]);
    assert_eq!(counts(), (4, 2), "6 made room for 2: 4 was used later");
    assert_eq!(ask_for(4), first[1]);
    assert_eq!(counts(), (4, 2));
    assert_eq!(ask_for(6), first[2]);
    assert_eq!(counts(), (5, 3));
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
fn an_adapter_that_fails_to_load_fails_its_own_request_alone() {
    let rig = Setup::default().start();
    rig.controls.close();
    let running = rig.submit(ask(&prompt(9), 10));
    rig.controls.break_next(Operation::LoadAdapter, Fault::OutOfMemory);
    let refused = rig.engine.submit(request(&rig, 2));
    let Err(EngineError::Adapter(reason)) = refused else { panic!("{refused:?}") };
    assert!(reason.contains("could not be allocated"), "{reason}");
    assert_eq!(rig.store.stats().leases, 0);
    rig.controls.open();
    assert_eq!(read(running).tokens().len(), 10);
    rig.answer(request(&rig, 2));
    rig.settle();
}

#[test]
fn an_adapter_larger_than_the_device_is_refused_for_good() {
    let mut setup = Setup::default();
    setup.config.adapter_bytes = variant_bytes() - 1;
    let rig = setup.start();
    let refused = rig.engine.submit(request(&rig, 2));
    let Err(error @ EngineError::Adapter(_)) = refused else { panic!("{refused:?}") };
    assert!(!error.is_retryable() && error.to_string().contains("engine.adapter_bytes"), "{error}");
    assert_eq!(rig.stats().adapter_bytes_resident, 0);
}
