//! Readers that leave and readers that lag.

use openlora_engine::{EngineError, Event, OutputStream, Submit};

use crate::rig::{Rig, Setup, ask, next, next_token, prompt, read, read_failure};

/// A phase that a request is in when its reader leaves.
struct Phase {
    name: &'static str,
    /// Sequences that run at once.
    seqs: usize,
    /// Steps between the submission and the drop.
    steps: u64,
    /// Whether it has had a row, and a token.
    scheduled: bool,
    token: bool,
}

#[test]
fn a_dropped_stream_frees_blocks_and_adapter_within_a_step_in_every_phase() {
    let phases = [
        Phase { name: "handed over", seqs: 1, steps: 0, scheduled: false, token: false },
        Phase { name: "queued", seqs: 1, steps: 2, scheduled: false, token: false },
        Phase { name: "mid-prefill", seqs: 2, steps: 2, scheduled: true, token: false },
        Phase { name: "decoding", seqs: 2, steps: 10, scheduled: true, token: true },
    ];
    for Phase { name, seqs, steps, scheduled, token } in phases {
        let mut setup = Setup::default();
        setup.config.max_num_seqs = seqs;
        // 7 rows of the prompt's 33 beside the companion's one.
        setup.config.max_num_batched_tokens = 8;
        let rig = setup.start();
        let lease = rig.lease("all-linear");
        rig.bring(&lease);
        rig.settle_but(1);
        rig.controls.close();
        let before = rig.controls.steps();
        let companion = rig.submit(ask(&prompt(1), 60));
        rig.controls.wait_for_step(before + 1);

        let lease = Some(lease);
        let mut leaving = rig.submit(Submit { lease, ..ask(&prompt(33), 60) });
        for _ in 0..steps {
            rig.controls.advance();
        }
        assert_eq!(leaving.scheduled_at().is_some(), scheduled, "{name}");
        assert_eq!(leaving.try_next().is_some(), token, "{name}");
        assert_eq!(rig.store.stats().leases, 1, "{name}");
        drop(leaving);
        // The step at the gate may still compute it; when the next one comes, nothing of it is left.
        rig.controls.advance();
        assert_eq!(rig.store.stats().leases, 0, "{name}");
        rig.controls.advance();
        let stats = rig.stats();
        assert_eq!((stats.running, stats.waiting), (1, 0), "{name}");
        let held = ((rig.controls.steps() - before) as usize).div_ceil(16);
        let blocks = stats.pages_total - stats.pages_free - stats.adapter_pages;
        assert!(blocks <= held, "{name}: {blocks} blocks held");
        drop(companion);
        rig.controls.open();
        rig.settle();
        assert!(rig.engine.is_alive(), "{name}");
    }
}

/// Lets steps pass one by one, each when `reader` has read what the last one said, until it has its last token.
fn read_step_by_step(rig: &Rig, mut reader: OutputStream, tokens: usize) {
    for _ in 0..tokens {
        rig.controls.allow(1);
        next_token(&mut reader);
    }
    assert!(matches!(next(&mut reader), Some(Event::Finished { .. })));
    assert!(matches!(next(&mut reader), Some(Event::Done { .. })));
    rig.controls.open();
}

#[test]
fn a_reader_that_lags_behind_loses_its_request_and_nobody_else_theirs() {
    let mut setup = Setup::default();
    setup.config.stream_events_max = 4;
    let rig = setup.start();
    let lease = rig.lease("embed-head");
    rig.bring(&lease);
    rig.controls.close();
    let before = rig.controls.steps();
    let reader = rig.submit(ask(&prompt(1), 20));
    rig.controls.wait_for_step(before + 1);
    let lagging = rig.submit(Submit { lease: Some(lease), ..ask(&prompt(9), 50) });
    read_step_by_step(&rig, reader, 20);
    // Nobody read a word of it.
    let (error, events) = read_failure(lagging);
    assert!(matches!(error, EngineError::SlowReader { max: 4 }), "{error}");
    assert_eq!(events, 4, "what was buffered is still delivered");
    rig.settle();
}

#[test]
fn a_reader_that_lags_behind_a_scored_prompt_loses_its_request_and_nobody_else_theirs() {
    let mut setup = Setup { logit_rows: 4, ..Setup::default() };
    setup.config.stream_events_max = 4;
    setup.config.max_num_batched_tokens = 16;
    let rig = setup.start();
    rig.controls.close();
    let reader = rig.submit(ask(&prompt(1), 20));
    rig.controls.wait_for_step(1);
    // Its 40 rows come in parts of at most four, some of which are not yet computed when there is no room for one.
    let mut request = ask(&prompt(40), 5);
    request.sampling.prompt_logprobs = Some(0);
    let lagging = rig.submit(request);
    read_step_by_step(&rig, reader, 20);
    let (error, events) = read_failure(lagging);
    assert!(matches!(error, EngineError::SlowReader { max } if max == events), "{error}, after {events} events");
    rig.settle();
}

#[test]
fn one_step_never_makes_more_events_than_a_reader_has_room_for() {
    let mut setup = Setup { logit_rows: 2, ..Setup::default() };
    setup.config.stream_events_max = 1;
    setup.config.max_num_batched_tokens = 64;
    let rig = setup.start();
    let mut request = ask(&prompt(40), 1);
    request.sampling.prompt_logprobs = Some(0);
    request.sampling.n = 5;
    // It takes two steps, the first of which makes 22 events, and the reader comes when both are over.
    let stream = rig.submit(request);
    crate::rig::eventually("the request is over", || rig.stats().generation_tokens_total == 5);
    let answer = read(stream);
    assert_eq!((answer.prompt_logprobs.len(), answer.samples.len()), (39, 5));
}

#[test]
fn who_reads_the_last_event_finds_adapter_and_lease_free() {
    let rig = Setup::default().start();
    for _ in 0..20 {
        let mut stream = rig.submit(Submit { lease: Some(rig.lease("all-linear")), ..ask(&prompt(9), 2) });
        next_token(&mut stream);
        next_token(&mut stream);
        read(stream);
        assert_eq!(rig.store.stats().leases, 0);
    }
}
