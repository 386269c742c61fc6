//! A device that works by itself and has memory of its own, here the emulated one: it is made ready before the first request, readers
//! are told while it works, and when it fails nobody hangs.

use std::sync::Arc;

use openlora_engine::{EngineError, Event, Submit};
use openlora_kernels::cuda::Cuda;
use openlora_kernels::cuda::device::Element;
use openlora_kernels::cuda::emulated::{Emulated, Fault};
use openlora_types::SamplingParams;

use crate::answers::{check, recorded};
use crate::rig::{Rig, Setup, ask, eventually, next, next_token, prompt, read, read_failure};

type DeviceRig = Rig<Cuda<Emulated>>;

fn emulated() -> Arc<Emulated> {
    Emulated::new(3).expect("the emulated device")
}

/// Few rows and sequences: the emulated device is slow.
fn small() -> Setup {
    let mut setup = Setup { blocks: 48, logit_rows: 6, ..Setup::default() };
    (setup.config.max_num_seqs, setup.config.max_num_batched_tokens) = (6, 40);
    setup
}

fn try_start(setup: Setup, device: &Arc<Emulated>) -> Result<DeviceRig, EngineError> {
    let backend = Arc::new(Cuda::new(Arc::clone(device), Element::F32).expect("memory"));
    setup.try_start_on(backend, Arc::default())
}

fn start(setup: Setup) -> DeviceRig {
    try_start(setup, &emulated()).unwrap_or_else(|error| panic!("{error}"))
}

#[test]
fn answers_equal_those_of_transformers_and_peft_in_one_batch() {
    let rig = start(small());
    let (requests, recorded) = recorded(&rig, "llama3", ["all-linear", "embed-head"]);
    let streams: Vec<_> = requests.into_iter().map(|request| rig.submit(request)).collect();
    for (number, (stream, recorded)) in streams.into_iter().zip(&recorded).enumerate() {
        check(&format!("request {number}"), &read(stream), recorded);
    }
    rig.settle();
}

#[test]
fn the_next_step_is_enqueued_before_this_ones_tokens_are_known() {
    let rig = Setup { asynchronous: true, ..Setup::default() }.start();
    let before = rig.controls.steps();
    rig.controls.allow_results(0);
    let mut stream = rig.submit(ask(&prompt(9), 10));
    rig.controls.wait_for_collection(1);
    assert_eq!(rig.controls.steps(), before + 2);
    assert!(stream.try_next().is_none(), "no token before its step is over");
    let second = rig.submit(ask(&prompt(7), 10));
    let mut tokens = Vec::new();
    // While the second step runs: what the first made goes out, and who has come is taken in and planned.
    rig.controls.allow_results(1);
    rig.controls.wait_for_collection(2);
    tokens.push(next_token(&mut stream));
    assert!(stream.try_next().is_none() && second.scheduled_at().is_some());
    assert_eq!(rig.controls.steps(), before + 3);
    rig.controls.allow_results(1);
    rig.controls.wait_for_collection(3);
    assert_eq!(rig.stats().running, 2);
    // While the fourth runs: who has left is gone.
    drop(second);
    rig.controls.allow_results(1);
    rig.controls.wait_for_collection(4);
    assert_eq!(rig.stats().running, 1);
    rig.controls.allow_results(1_000);
    tokens.extend(read(stream).tokens());
    assert_eq!(tokens, rig.answer(ask(&prompt(9), 10)).tokens());
    rig.settle();
}

#[test]
fn a_draw_that_depends_on_the_tokens_before_it_waits_for_them() {
    let penalised: [fn(&mut SamplingParams); 3] = [
        |params| params.repetition_penalty = 1.2,
        |params| params.presence_penalty = 0.5,
        |params| params.frequency_penalty = 0.5,
    ];
    for penalise in penalised {
        let rig = Setup { asynchronous: true, ..Setup::default() }.start();
        let before = rig.controls.steps();
        rig.controls.allow_results(0);
        let mut request = ask(&prompt(9), 4);
        penalise(&mut request.sampling);
        let stream = rig.submit(request);
        for step in 1..=4 {
            rig.controls.wait_for_collection(step);
            assert_eq!(rig.controls.steps(), before + step);
            rig.controls.allow_results(1);
        }
        assert_eq!(read(stream).tokens().len(), 4);
        rig.settle();
    }
}

#[test]
fn a_sample_that_ends_while_its_next_step_runs_says_nothing_more() {
    let rig = Setup { asynchronous: true, ..Setup::default() }.start();
    let tokens = rig.answer(ask(&prompt(9), 10)).tokens();
    let mut request = ask(&prompt(9), 10);
    request.sampling.stop_tokens = vec![tokens[4]];
    let first = tokens.iter().position(|token| *token == tokens[4]).expect("it is one of them");
    let (steps, collections) = (rig.controls.steps(), rig.controls.collections());
    rig.controls.allow_results(0);
    let stream = rig.submit(request);
    for step in 1..=first as u64 + 1 {
        rig.controls.wait_for_collection(collections + step);
        assert_eq!(rig.controls.steps(), steps + step + 1);
        rig.controls.allow_results(1);
    }
    rig.controls.allow_results(1_000);
    assert_eq!(read(stream).tokens(), tokens[..=first]);
    rig.settle();
    assert_eq!(rig.stats().generation_tokens_total, (10 + first + 1) as u64);
}

#[test]
fn no_more_than_one_part_of_a_prompt_is_enqueued_ahead() {
    let mut setup = Setup { asynchronous: true, ..Setup::default() };
    (setup.config.max_num_seqs, setup.config.max_num_batched_tokens) = (2, 8);
    let rig = setup.start();
    let before = rig.controls.steps();
    rig.controls.allow_results(0);
    let long = rig.submit(ask(&[5; 60], 2));
    for step in 1..=4 {
        rig.controls.wait_for_collection(step);
        assert_eq!(rig.controls.steps(), before + step + 1, "parts of a prompt are waited for as tokens are");
        rig.controls.allow_results(1);
    }
    rig.controls.allow_results(1_000);
    assert_eq!(read(long).tokens().len(), 2);
    rig.settle();
}

#[test]
fn answers_with_steps_overlapped_have_the_same_bits() {
    let answers = |asynchronous| {
        let mut setup = Setup { asynchronous, blocks: 12, logit_rows: 4, ..Setup::default() };
        (setup.config.max_num_seqs, setup.config.max_num_batched_tokens) = (6, 24);
        let rig = setup.start();
        // More than fit: some are preempted; scored prompts, samples and adapters among them.
        let request = |i: u32| {
            let mut request = ask(&prompt(if i.is_multiple_of(2) { 9 } else { 33 }), 20 + i);
            request.lease = i.is_multiple_of(3).then(|| rig.lease("all-linear"));
            request.sampling.prompt_logprobs = (i == 1).then_some(2);
            request.sampling.n = 1 + i % 2;
            request.sampling.logprobs = Some(2);
            request.sampling.repetition_penalty = if i == 6 { 1.3 } else { 1.0 };
            request
        };
        let streams: Vec<_> = (0..8).map(|i| rig.submit(request(i))).collect();
        let bits: Vec<_> = streams.into_iter().map(|stream| read(stream).bits()).collect();
        rig.settle();
        bits
    };
    assert_eq!(answers(true), answers(false));
}

#[test]
fn all_passes_are_recorded_before_the_first_request_and_none_after() {
    let rig = start(small());
    // Of 1, 2, 4 and 8 rows, without adapters and with.
    assert_eq!(rig.model.backend().recorded(), 8);
    let answers = |base: u32| {
        let adapters = [None, Some("all-linear"), Some("embed-head"), None, Some("all-linear"), None];
        let request = |(i, name): (usize, &Option<&str>)| {
            let sampling =
                SamplingParams { seed: i as u64, logprobs: Some(3), ..ask(&[1], 4 + i as u32 + base).sampling };
            let lease = name.map(|name| rig.lease(name));
            rig.submit(Submit { lease, sampling, ..ask(&prompt(9), 1) })
        };
        let streams: Vec<_> = adapters.iter().enumerate().map(request).collect();
        streams.into_iter().map(read).collect::<Vec<_>>()
    };
    let together = answers(0);
    assert_eq!(rig.model.backend().recorded(), 8);
    // One after the other and one by one: other passes, the same bits.
    let alone = rig.answer(Submit {
        lease: Some(rig.lease("all-linear")),
        sampling: SamplingParams { seed: 1, logprobs: Some(3), ..ask(&[1], 5).sampling },
        ..ask(&prompt(9), 1)
    });
    assert_eq!(alone.bits(), together[1].bits());
    assert_eq!(rig.model.backend().recorded(), 8);
    rig.settle();
}

#[test]
fn the_pool_is_a_share_of_what_the_device_has_left() {
    let memory = 64 << 20;
    let device = Emulated::with_memory(3, memory).expect("the emulated device");
    let mut setup = Setup { blocks: 0, ..small() };
    setup.config.device_memory_percent = 50;
    let rig = try_start(setup, &device).unwrap_or_else(|error| panic!("{error}"));
    let stats = rig.stats();
    let (pool, free) = (
        stats.pages_total * stats.page_bytes,
        openlora_kernels::cuda::device::Device::memory_free(&*device).expect("sound"),
    );
    // Half went to the pool, so as much is left.
    assert!(pool.abs_diff(free) <= 2 * stats.page_bytes && pool > memory / 8, "{pool} of {memory}, {free} free");
    rig.answer(ask(&prompt(9), 5));
}

#[test]
fn a_start_without_enough_memory_names_the_key_to_change() {
    let device = Emulated::with_memory(3, 64 << 20).expect("the emulated device");
    let refusal = |setup: Setup| try_start(setup, &device).map(drop).expect_err("there is no room").to_string();
    let pool = refusal(Setup { blocks: 1 << 16, ..small() });
    assert!(pool.contains("engine.pool_bytes"), "{pool}");
    let mut steps = small();
    steps.config.max_num_batched_tokens = 1 << 16;
    let steps = refusal(steps);
    assert!(steps.contains("engine.max_num_batched_tokens"), "{steps}");
}

#[test]
fn readers_that_leave_or_lag_while_the_device_works_free_what_they_held() {
    let mut setup = small();
    setup.config.stream_events_max = 3;
    let rig = start(setup);
    let mut leaving = rig.submit(Submit { lease: Some(rig.lease("all-linear")), ..ask(&prompt(9), 200) });
    let lagging = rig.submit(ask(&prompt(7), 200));
    next_token(&mut leaving);
    drop(leaving);
    eventually("the one that lags is ended", || rig.stats().running == 0);
    let (error, events) = read_failure(lagging);
    assert!(matches!(error, EngineError::SlowReader { max: 3 }), "{error}");
    assert_eq!(events, 3);
    rig.settle();
    // As many events as a reader may leave lying.
    assert_eq!(rig.answer(ask(&prompt(9), 1)).tokens().len(), 1, "the engine goes on");
}

/// The device fails at one of its calls while requests run, wait and have an adapter on its way.
fn fail_after(calls: u64, fault: Fault, reason: &str) {
    let device = emulated();
    let mut setup = small();
    setup.config.max_num_seqs = 2;
    let rig = try_start(setup, &device).unwrap_or_else(|error| panic!("{error}"));
    let mut running = rig.submit(ask(&prompt(9), 200));
    next_token(&mut running);
    let with_adapter = Submit { lease: Some(rig.lease("all-linear")), ..ask(&prompt(9), 200) };
    let waiting: Vec<_> = (0..3).map(|_| rig.submit(ask(&prompt(7), 200))).collect();
    device.break_after(calls, fault);
    let adapter = rig.engine.submit(with_adapter);
    let is_dead = |error: &EngineError| matches!(error, EngineError::Dead(why) if why.contains(reason));
    for stream in waiting.into_iter().chain([running]).chain(adapter) {
        let (error, _) = read_failure(stream);
        assert!(is_dead(&error), "{calls}: {error}");
        assert!(!rig.engine.is_alive(), "{calls}: a reader is told and the engine looks alive");
    }
    eventually("the engine is dead", || !rig.engine.is_alive());
    assert!(rig.engine.death_reason().is_some_and(|why| why.contains(reason)), "{calls}");
    let refused = rig.engine.submit(ask(&prompt(9), 5)).map(drop).expect_err("there is no engine");
    assert!(is_dead(&refused), "{calls}: {refused}");
    rig.engine.shutdown();
    eventually("all leases are back", || rig.store.stats().leases == 0);
}

#[test]
fn a_device_that_is_lost_at_any_call_ends_every_stream_and_the_engine_is_known_to_be_dead() {
    for calls in [0, 1, 2, 3, 5, 8, 13, 40, 150] {
        fail_after(calls, Fault::Lost, "the device is lost");
    }
}

#[test]
fn a_load_that_finds_the_device_lost_ends_the_engine_even_where_nothing_else_runs() {
    let device = emulated();
    let rig = try_start(small(), &device).unwrap_or_else(|error| panic!("{error}"));
    rig.answer(ask(&prompt(9), 2));
    device.break_after(0, Fault::Lost);
    let stream = rig.submit(Submit { lease: Some(rig.lease("all-linear")), ..ask(&prompt(9), 5) });
    let (error, _) = read_failure(stream);
    assert!(matches!(&error, EngineError::Dead(why) if why.contains("the device is lost")), "{error}");
    assert!(!rig.engine.is_alive());
}

#[test]
fn a_step_that_finds_no_memory_on_the_device_ends_every_stream() {
    let device = emulated();
    let rig = try_start(small(), &device).unwrap_or_else(|error| panic!("{error}"));
    let mut running = rig.submit(ask(&prompt(9), 200));
    next_token(&mut running);
    device.break_after(7, Fault::OutOfMemory);
    let (error, _) = read_failure(running);
    assert!(matches!(&error, EngineError::Dead(why) if why.contains("could not be allocated")), "{error}");
    assert!(!rig.engine.is_alive());
}

#[test]
fn what_was_made_before_a_failure_is_delivered_before_it() {
    let device = emulated();
    let rig = try_start(small(), &device).unwrap_or_else(|error| panic!("{error}"));
    let expected = rig.answer(ask(&prompt(9), 200)).tokens();
    let mut stream = rig.submit(ask(&prompt(9), 200));
    let mut tokens = vec![next_token(&mut stream)];
    device.break_after(60, Fault::Lost);
    let error = loop {
        match next(&mut stream).expect("the last event is a failure") {
            Event::Token { output, .. } => tokens.push(output.chosen.token),
            Event::Failed(error) => break error,
            other => panic!("{other:?}"),
        }
    };
    assert!(matches!(error, EngineError::Dead(_)), "{error}");
    assert_eq!(tokens, expected[..tokens.len()]);
}
