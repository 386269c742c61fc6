//! The step thread ends: by a panic, by a device that fails, because it is told to, because nobody is left. Nobody hangs.

use std::sync::Arc;
use std::sync::mpsc;

use openlora_engine::{EngineError, Submit};

use crate::probe::{Fault, HANG, Operation};
use crate::rig::{Rig, Setup, ask, eventually, next_token, prompt, read, read_failure};

/// Runs what might hang on a thread of its own.
fn without_hanging<T: Send + 'static>(what: &str, work: impl FnOnce() -> T + Send + 'static) -> T {
    let (done, result) = mpsc::channel();
    let thread = std::thread::spawn(move || done.send(work()));
    let result = result.recv_timeout(HANG).unwrap_or_else(|error| panic!("{what}: {error}"));
    thread.join().expect("it has sent its result").expect("the result was taken");
    result
}

fn wait_for_death(rig: &Rig) -> String {
    let engine = rig.engine.clone();
    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
    without_hanging("dead()", move || runtime.block_on(engine.dead()))
}

fn shut_down(rig: &Rig) {
    let engine = rig.engine.clone();
    without_hanging("shutdown()", move || engine.shutdown());
}

fn expect_dead(stream: openlora_engine::OutputStream, reason: &str) -> usize {
    let (error, events) = read_failure(stream);
    assert!(matches!(&error, EngineError::Dead(why) if why.contains(reason)), "{error}");
    events
}

/// Breaks the third step with one request running that reads, one that does not, one waiting and one handed over.
fn break_third_step(operation: Operation, fault: Fault, reason: &str) {
    let mut setup = Setup::default();
    setup.config.max_num_seqs = 2;
    setup.config.stream_events_max = 3;
    let rig = setup.start();
    rig.controls.close();
    let mut running = rig.submit(Submit { lease: Some(rig.lease("all-linear")), ..ask(&prompt(9), 50) });
    rig.controls.wait_for_step(1);
    let unread = rig.submit(ask(&prompt(7), 50));
    let waiting = rig.submit(Submit { lease: Some(rig.lease("embed-head")), ..ask(&prompt(9), 50) });
    rig.controls.advance();
    rig.controls.advance();
    let handed_over = rig.submit(Submit { lease: Some(rig.lease("all-linear")), ..ask(&prompt(9), 50) });
    next_token(&mut running);
    assert!(rig.engine.is_alive());
    rig.controls.break_next(operation, fault);
    rig.controls.open();

    // Of the running one two tokens, one of which was read above.
    assert_eq!(expect_dead(running, reason), 1);
    assert!(!rig.engine.is_alive(), "a reader is told and the engine looks alive");
    assert_eq!(expect_dead(unread, reason), 1);
    assert_eq!(expect_dead(waiting, reason), 0);
    assert_eq!(expect_dead(handed_over, reason), 0);
    assert!(wait_for_death(&rig).contains(reason));
    assert!(rig.engine.death_reason().is_some_and(|why| why.contains(reason)));
    let refused = rig.engine.submit(Submit { lease: Some(rig.lease("all-linear")), ..ask(&prompt(9), 5) });
    assert!(matches!(&refused, Err(EngineError::Dead(why)) if why.contains(reason)), "{refused:?}");
    shut_down(&rig);
    assert_eq!(rig.store.stats().leases, 0);
}

#[test]
fn a_panic_in_a_step_ends_every_stream_and_the_engine_is_known_to_be_dead() {
    break_third_step(Operation::Embed, Fault::Panic, "injected panic");
    break_third_step(Operation::Sample, Fault::Panic, "injected panic");
}

#[test]
fn exhausted_device_memory_ends_every_stream_and_the_engine_is_known_to_be_dead() {
    break_third_step(Operation::Attention, Fault::OutOfMemory, "could not be allocated");
    break_third_step(Operation::Sample, Fault::OutOfMemory, "could not be allocated");
}

#[test]
fn a_lost_device_ends_every_stream_and_the_engine_is_known_to_be_dead() {
    break_third_step(Operation::Embed, Fault::DeviceLost, "injected loss");
}

#[test]
fn a_reader_without_room_is_told_of_the_death_after_what_it_has() {
    let mut setup = Setup::default();
    setup.config.stream_events_max = 3;
    let rig = setup.start();
    rig.controls.close();
    let stream = rig.submit(ask(&prompt(9), 50));
    rig.controls.wait_for_step(1);
    for _ in 0..3 {
        rig.controls.advance();
    }
    rig.controls.break_next(Operation::Embed, Fault::Panic);
    rig.controls.open();
    wait_for_death(&rig);
    assert_eq!(expect_dead(stream, "injected panic"), 3);
}

#[test]
fn a_request_whose_adapter_loads_while_the_engine_dies_does_not_hang() {
    let rig = Setup::default().start();
    rig.controls.hold_loads(true);
    let loading = rig.submit(Submit { lease: Some(rig.lease("all-linear")), ..ask(&prompt(9), 5) });
    rig.controls.wait_for_loads(1);
    rig.controls.close();
    let running = rig.submit(ask(&prompt(9), 5));
    rig.controls.wait_for_step(1);
    rig.controls.break_next(Operation::Embed, Fault::Panic);
    rig.controls.open();
    expect_dead(running, "injected panic");
    assert_eq!(expect_dead(loading, "injected panic"), 0);
    shut_down(&rig);
    // The step thread is gone, and now the load ends.
    rig.controls.hold_loads(false);
    eventually("the load has let go of its lease", || rig.store.stats().leases == 0);
}

#[test]
fn shutdown_ends_running_and_waiting_requests_within_a_step() {
    let mut setup = Setup::default();
    setup.config.max_num_seqs = 1;
    let rig = setup.start();
    rig.controls.close();
    let running = rig.submit(Submit { lease: Some(rig.lease("all-linear")), ..ask(&prompt(9), 200) });
    rig.controls.wait_for_step(1);
    let waiting = rig.submit(ask(&prompt(7), 200));
    let engine = rig.engine.clone();
    let stopping = std::thread::spawn(move || engine.shutdown());
    eventually("no new requests are taken", || {
        matches!(rig.engine.submit(ask(&prompt(9), 5)), Err(EngineError::Draining | EngineError::Dead(_)))
    });
    rig.controls.open();
    without_hanging("shutdown()", move || stopping.join().expect("shutdown does not panic"));
    assert!(!rig.engine.is_alive());
    assert_eq!(expect_dead(running, "shut down"), 1, "the step at the gate was the last");
    assert_eq!(expect_dead(waiting, "shut down"), 0);
    assert_eq!(rig.store.stats().leases, 0);
    // Once more, as a server's error path might.
    shut_down(&rig);
}

#[test]
fn shutdown_waits_for_no_load() {
    let rig = Setup::default().start();
    rig.controls.hold_loads(true);
    let loading = rig.submit(Submit { lease: Some(rig.lease("all-linear")), ..ask(&prompt(9), 5) });
    rig.controls.wait_for_loads(1);
    let engine = rig.engine.clone();
    without_hanging("shutdown()", move || engine.shutdown());
    assert!(!rig.engine.is_alive());
    assert_eq!(expect_dead(loading, "shut down"), 0);
    rig.controls.break_next(Operation::LoadAdapter, Fault::OutOfMemory);
    rig.controls.hold_loads(false);
    eventually("the load has let go of its lease", || rig.store.stats().leases == 0);
}

#[test]
fn the_step_thread_ends_when_the_last_handle_is_gone_and_its_readers_are_done() {
    let Rig { engine, controls, store, model, .. } = Setup::default().start();
    controls.close();
    let reader = engine.submit(ask(&prompt(9), 10)).expect("there is room");
    let leaving = engine.submit(ask(&prompt(9), 200)).expect("there is room");
    drop(engine.clone());
    drop(engine);
    controls.open();
    drop(leaving);
    assert_eq!(read(reader).tokens().len(), 10, "what was asked for is still answered");
    // The step thread holds the model.
    eventually("the step thread has ended", || Arc::strong_count(&model) == 1);
    drop(store);
}
