//! Requests that come too late, too many or too long, and engines that cannot be.

use std::time::{Duration, Instant};

use openlora_engine::{EngineError, Submit};
use openlora_types::Classify;

use crate::rig::{Rig, Setup, ask, prompt, read, read_failure};

fn one_at_a_time(waiting_requests_max: usize) -> Rig {
    let mut setup = Setup::default();
    setup.config.max_num_seqs = 1;
    setup.config.waiting_requests_max = waiting_requests_max;
    let rig = setup.start();
    rig.controls.close();
    rig
}

#[test]
fn a_deadline_passes_in_the_queue_and_others_go_on() {
    let rig = one_at_a_time(8);
    let running = rig.submit(ask(&prompt(1), 30));
    rig.controls.wait_for_step(1);
    let late = Submit { deadline: Some(Instant::now()), lease: Some(rig.lease("all-linear")), ..ask(&prompt(9), 5) };
    let late = rig.submit(late);
    let waiting = rig.submit(ask(&prompt(7), 5));
    rig.controls.open();
    let (error, events) = read_failure(late);
    assert!(matches!(error, EngineError::DeadlineExceeded), "{error}");
    assert_eq!(events, 0);
    assert_eq!(read(running).tokens().len(), 30);
    assert_eq!(read(waiting).tokens().len(), 5);
    rig.settle();
}

#[test]
fn a_deadline_passes_while_running_and_others_go_on() {
    let rig = Setup::default().start();
    let lease = rig.lease("all-linear");
    rig.bring(&lease);
    rig.controls.close();
    let before = rig.controls.steps();
    let companion = rig.submit(ask(&prompt(1), 30));
    rig.controls.wait_for_step(before + 1);
    let deadline = Instant::now() + Duration::from_millis(700);
    let mut request = Submit { deadline: Some(deadline), lease: Some(lease), ..ask(&prompt(9), 60) };
    request.sampling.n = 2;
    let late = rig.submit(request);
    rig.controls.advance();
    rig.controls.advance();
    assert!(late.scheduled_at().is_some(), "it runs");
    std::thread::sleep(deadline.saturating_duration_since(Instant::now()));
    rig.controls.open();
    let (error, events) = read_failure(late);
    assert!(matches!(error, EngineError::DeadlineExceeded), "{error}");
    // The step at the gate began before the deadline and still counts.
    assert!(events <= 4, "{events} events");
    assert_eq!(read(companion).tokens().len(), 30);
    rig.settle();
}

#[test]
fn a_full_queue_refuses_at_both_of_its_doors_and_says_when_to_retry() {
    let rig = one_at_a_time(2);
    let running = rig.submit(ask(&prompt(1), 20));
    rig.controls.wait_for_step(1);
    // The step thread is busy: two places in its mailbox.
    let handed_over = [rig.submit(ask(&prompt(7), 3)), rig.submit(ask(&prompt(9), 3))];
    let refused = rig.engine.submit(Submit { lease: Some(rig.lease("all-linear")), ..ask(&prompt(9), 3) });
    let Err(error @ EngineError::QueueFull { waiting: 2, max: 2, retry_after }) = refused else {
        panic!("a third place: {refused:?}");
    };
    assert!(error.is_retryable() && retry_after > Duration::ZERO);
    assert_eq!(rig.stats().adapter_loads_total, 0, "a refused request costs no load");

    // They wait with the scheduler now, which holds two as well.
    rig.controls.advance();
    let late = rig.submit(Submit { lease: Some(rig.lease("all-linear")), ..ask(&prompt(9), 3) });
    rig.controls.advance();
    let (error, _) = read_failure(late);
    let EngineError::QueueFull { waiting: 2, max: 2, retry_after } = error else { panic!("{error}") };
    assert!(retry_after > Duration::ZERO);

    rig.controls.open();
    assert_eq!(read(running).tokens().len(), 20);
    for stream in handed_over {
        assert_eq!(read(stream).tokens().len(), 3);
    }
    rig.settle();
}

#[test]
fn samples_wait_all_or_none() {
    let rig = one_at_a_time(3);
    let running = rig.submit(ask(&prompt(1), 10));
    rig.controls.wait_for_step(1);
    let waiting = rig.submit(ask(&prompt(9), 3));
    rig.controls.advance();
    let mut request = ask(&prompt(7), 3);
    request.sampling.n = 3;
    let too_many = rig.submit(request.clone());
    rig.controls.advance();
    let (error, events) = read_failure(too_many);
    assert!(matches!(error, EngineError::QueueFull { .. }), "{error}");
    assert_eq!(events, 0);
    rig.controls.advance();
    assert_eq!(rig.stats().waiting, 1, "no sample of the refused request is left behind");

    rig.controls.open();
    assert_eq!((read(running).tokens().len(), read(waiting).tokens().len()), (10, 3));
    // There is room for three when nothing waits.
    assert_eq!(rig.answer(request).samples.len(), 3);
    rig.settle();
}

#[test]
fn a_draining_engine_finishes_what_it_has_and_takes_nothing_new() {
    let rig = Setup::default().start();
    rig.controls.close();
    let running = rig.submit(ask(&prompt(9), 10));
    rig.engine.drain();
    let refused = rig.engine.clone().submit(ask(&prompt(9), 10));
    assert!(matches!(refused, Err(EngineError::Draining)), "{refused:?}");
    rig.controls.open();
    assert_eq!(read(running).tokens().len(), 10);
    assert!(rig.engine.is_alive());
    rig.settle();
}

fn refused_field(rig: &Rig, request: Submit) -> (String, String) {
    match rig.engine.submit(request) {
        Err(EngineError::Invalid(field)) => (field.field, field.reason),
        other => panic!("not refused: {other:?}"),
    }
}

#[test]
fn what_no_sequence_can_hold_is_refused_by_name() {
    let mut setup = Setup::default();
    setup.config.sequence_tokens_max = 50;
    setup.config.waiting_requests_max = 8;
    let configured = setup.clone().start();
    assert_eq!(configured.answer(ask(&prompt(40), 10)).tokens().len(), 10, "exactly the limit");
    let (field, reason) = refused_field(&configured, ask(&prompt(40), 11));
    assert_eq!(field, "sampling.max_tokens");
    assert!(reason.contains("40") && reason.contains("51") && reason.contains("at most 50"), "{reason}");
    assert_eq!(refused_field(&configured, ask(&prompt(40), u32::MAX)).0, "sampling.max_tokens");
    assert_eq!(refused_field(&configured, ask(&prompt(40), 0)).0, "sampling.max_tokens");
    assert_eq!(refused_field(&configured, ask(&[], 10)).0, "prompt");
    for n in [0, 9, 65, u32::MAX] {
        let mut request = ask(&prompt(1), 10);
        request.sampling.n = n;
        assert_eq!(refused_field(&configured, request).0, "sampling.n");
    }

    // The KV cache: 3 blocks of 16 tokens.
    setup.blocks = 3;
    let small = setup.start();
    assert_eq!(small.answer(ask(&prompt(40), 8)).tokens().len(), 8);
    let (field, reason) = refused_field(&small, ask(&prompt(40), 9));
    assert_eq!(field, "sampling.max_tokens");
    assert!(reason.contains("at most 48"), "{reason}");

    // The model's context, 256.
    let model = Setup::default().start();
    assert_eq!(refused_field(&model, ask(&prompt(100), 157)).0, "sampling.max_tokens");
    assert_eq!(model.answer(ask(&prompt(100), 156)).tokens().len(), 156);
}

#[test]
fn limits_that_cannot_work_do_not_start() {
    type Change = fn(&mut Setup);
    let cases: &[(&str, Change)] = &[
        ("pool_bytes", |setup| setup.blocks = 0),
        ("max_num_seqs", |setup| setup.config.max_num_seqs = 0),
        ("max_num_batched_tokens", |setup| setup.config.max_num_seqs = 257),
        ("max_num_batched_tokens", |setup| setup.rows = Some(255)),
        ("max_num_batched_tokens", |setup| setup.logit_rows = 0),
        ("max_waiting", |setup| setup.config.waiting_requests_max = 0),
        ("stream_events_max", |setup| setup.config.stream_events_max = 0),
        ("stream_events_max", |setup| setup.config.stream_events_max = usize::MAX),
        ("long_prefill_chunk", |setup| setup.config.long_prefill_chunk = 0),
    ];
    for (name, change) in cases {
        let mut setup = Setup::default();
        change(&mut setup);
        match setup.try_start().map(|_| ()) {
            Err(EngineError::Start(reason)) => assert!(reason.contains(name), "{name}: {reason}"),
            other => panic!("{name}: {other:?}"),
        }
    }
}
