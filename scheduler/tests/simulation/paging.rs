//! What is promised of adapters and of tenants' shares, each in a scene of its own.

use std::collections::BTreeMap;

use openlora_scheduler::{AdapterNeed, NewSequence, Rate, SchedulerConfig, SequenceResult, StepPlan, SubmitError};
use openlora_types::{Classify, Fault, Generation, Priority, SequenceId, TenantId, Time};

use crate::promises::{Rig, adapter, small};
use crate::rng::Rng;

fn sized(n: u8, pages: usize) -> AdapterNeed {
    AdapterNeed { pages, ..adapter(n) }
}

fn runs(plan: &StepPlan, id: SequenceId) -> bool {
    plan.sequences.iter().any(|sequence| sequence.id == id)
}

fn loads(plan: &StepPlan) -> Vec<u8> {
    plan.loads.iter().map(|load| load.generation.0[0]).collect()
}

fn evicted(plan: &StepPlan) -> Vec<u8> {
    plan.evicted.iter().map(|generation| generation.0[0]).collect()
}

/// A step whose loads do not end.
fn step_without_loads(rig: &mut Rig) -> StepPlan {
    let plan = rig.plan();
    rig.finish(&plan);
    plan
}

#[test]
fn a_sequence_whose_adapter_loads_holds_nobody_back_and_runs_in_the_step_after() {
    let mut rig = Rig::new(small());
    rig.warm([adapter(2)]);
    let cold = rig.submit(|new| new.adapter = Some(sized(1, 5)));
    let base = rig.submit(|new| new.max_tokens = 9);
    let resident = rig.submit(|new| new.adapter = Some(adapter(2)));
    let plan = step_without_loads(&mut rig);
    assert!(!runs(&plan, cold) && runs(&plan, base) && runs(&plan, resident));
    assert_eq!((loads(&plan), plan.pages(&plan.loads[0]).len()), (vec![1], 5));
    for _ in 0..3 {
        let plan = step_without_loads(&mut rig);
        assert!(!runs(&plan, cold) && plan.loads.is_empty(), "it is loaded once");
    }
    rig.scheduler.adapter_loaded(adapter(1).generation);
    assert!(runs(&rig.step(), cold));
    let stats = rig.scheduler.stats();
    assert_eq!((stats.adapter_hits_total, stats.adapter_misses_total, stats.loads_total), (1, 1, 2));
}

#[test]
fn adapters_load_in_the_queues_order_and_no_more_than_max_loading_at_once() {
    let mut rig = Rig::new(SchedulerConfig { max_loading: 2, lookahead: 3, ..small() });
    for n in [1, 2, 1, 3] {
        rig.submit(|new| new.adapter = Some(adapter(n)));
    }
    rig.submit(|new| (new.adapter, new.priority) = (Some(adapter(4)), Priority::High));
    assert_eq!(loads(&step_without_loads(&mut rig)), [4, 1]);
    assert_eq!(loads(&step_without_loads(&mut rig)), []);
    rig.scheduler.adapter_loaded(adapter(1).generation);
    // 1 runs twice and leaves the queue; the next free load is the second one's.
    assert_eq!(loads(&step_without_loads(&mut rig)), [2]);
    rig.scheduler.adapter_loaded(adapter(2).generation);
    rig.scheduler.adapter_loaded(adapter(4).generation);
    assert_eq!(loads(&step_without_loads(&mut rig)), [3]);
}

#[test]
fn a_failed_load_ends_exactly_those_who_wait_for_it() {
    let mut rig = Rig::new(small());
    let failing = [0, 0].map(|_| rig.submit(|new| new.adapter = Some(sized(1, 5))));
    let other = rig.submit(|new| new.adapter = Some(adapter(2)));
    let base = rig.submit(|new| new.max_tokens = 5);
    rig.plan();
    assert_eq!(rig.scheduler.adapter_failed(adapter(1).generation), failing);
    rig.scheduler.adapter_loaded(adapter(2).generation);
    rig.scheduler.check_invariants();
    rig.scheduler.update(Time(rig.now), &[SequenceResult { id: base, token: 1, finished: false }]);
    assert!(failing.iter().all(|id| rig.scheduler.tokens(*id).is_none()));
    let plan = rig.step();
    assert!(runs(&plan, other) && runs(&plan, base));
    let stats = rig.scheduler.stats();
    assert_eq!((stats.failed_total, stats.load_failures_total, stats.adapter_pages), (2, 1, 1));
    // The next sequence tries again.
    let again = rig.submit(|new| new.adapter = Some(sized(1, 5)));
    assert_eq!(loads(&rig.step()), [1]);
    assert!(runs(&rig.step(), again));
}

#[test]
#[should_panic(expected = "no plan had started it")]
fn a_load_that_nobody_started_cannot_end() {
    Rig::new(small()).scheduler.adapter_loaded(adapter(1).generation);
}

#[test]
fn evicted_pages_are_used_again_in_the_same_plan() {
    let mut rig = Rig::new(SchedulerConfig { num_pages: 8, prefix_cache: false, ..small() });
    rig.warm([sized(1, 4), sized(2, 4)]);
    rig.submit(|new| new.prompt = vec![1; 10]);
    let plan = rig.step();
    assert_eq!((evicted(&plan), plan.block_tables.len()), (vec![1], 3));
}

#[test]
fn what_is_cheap_to_get_back_for_its_pages_goes_first() {
    let need = |n, pages, load_micros| AdapterNeed { load_micros, ..sized(n, pages) };
    // (adapters in order of use, the order of their eviction): GreedyDual-Size by hand.
    let cases: &[(&[AdapterNeed], &[u8])] = &[
        (&[need(1, 2, 100), need(2, 2, 100), need(3, 2, 100)], &[1, 2, 3]),
        (&[need(1, 2, 300), need(2, 2, 100), need(3, 2, 200)], &[2, 3, 1]),
        // The same cost for more pages is worth less.
        (&[need(1, 1, 600), need(2, 3, 600), need(3, 2, 600)], &[2, 3, 1]),
    ];
    for (needs, order) in cases {
        let mut rig = Rig::new(SchedulerConfig { num_pages: 6, prefix_cache: false, ..small() });
        needs.iter().for_each(|need| rig.warm([*need]));
        rig.submit(|new| (new.prompt, new.max_tokens) = (vec![1; 3], 20));
        let mut gone = Vec::new();
        while !rig.scheduler.is_idle() {
            gone.extend(evicted(&rig.step()));
        }
        assert_eq!(gone, order[..gone.len()], "{needs:?}");
        assert!(gone.len() >= 2, "{gone:?}");
    }
}

#[test]
fn what_is_not_used_grows_worthless_however_costly_it_was() {
    let mut rig = Rig::new(SchedulerConfig { num_pages: 4, ..small() });
    let mut gone = Vec::new();
    // 301 µs a page against 100: each eviction of a cheap one makes the next cheap one worth 100 more.
    for (n, load_micros) in [(1, 602), (2, 200), (3, 200), (4, 200), (5, 200), (6, 200)] {
        rig.scheduler.pin(AdapterNeed { load_micros, ..sized(n, 2) }).expect("there is room");
        gone.extend(evicted(&rig.step()));
        rig.scheduler.unpin(adapter(n).generation);
    }
    assert_eq!(gone, [2, 3, 4, 1]);
}

#[test]
fn blocks_and_adapters_are_compared_by_value_and_age() {
    // One adapter of one page and one cached block of a base prompt, the older first; a block costs 500 µs.
    for (load_micros, block_first) in [(100, false), (1_000, true)] {
        let config = SchedulerConfig { num_pages: 4, block_micros: 500, ..small() };
        let mut rig = Rig::new(config);
        rig.warm([AdapterNeed { load_micros, ..adapter(1) }]);
        rig.submit(|new| new.prompt = vec![9; 5]);
        rig.drain();
        let stats = rig.scheduler.stats();
        assert_eq!((stats.pages_cached, stats.adapter_pages_idle), (1, 1));
        rig.submit(|new| new.prompt = vec![3; 12]);
        let plan = rig.step();
        assert_eq!(plan.evicted.is_empty(), block_first, "load_micros {load_micros}");
    }
}

#[test]
fn an_adapter_that_is_wanted_outlives_those_that_are_not() {
    let mut rig = Rig::new(SchedulerConfig { num_pages: 11, max_loras: 1, prefix_cache: false, ..small() });
    rig.warm([AdapterNeed { load_micros: 1, ..sized(1, 2) }, sized(2, 3), sized(3, 2)]);
    rig.submit(|new| (new.adapter, new.max_tokens) = (Some(sized(3, 2)), 30));
    rig.step();
    // The cheapest by far, but somebody waits for it.
    let waiting = rig.submit(|new| new.adapter = Some(AdapterNeed { load_micros: 1, ..sized(1, 2) }));
    let mut gone = Vec::new();
    while gone.is_empty() {
        gone.extend(evicted(&rig.step()));
    }
    assert_eq!(gone, [2]);
    rig.steps_until_done(waiting, |_| ());
}

#[test]
fn a_load_never_takes_the_pages_of_what_a_sequence_further_ahead_wants() {
    let mut rig = Rig::new(SchedulerConfig { num_pages: 12, max_loras: 1, prefix_cache: false, ..small() });
    rig.warm([sized(1, 2), sized(2, 5)]);
    rig.submit(|new| (new.adapter, new.max_tokens) = (Some(sized(1, 2)), 8));
    rig.step();
    let ahead = rig.submit(|new| new.adapter = Some(sized(2, 5)));
    let behind = rig.submit(|new| new.adapter = Some(sized(3, 5)));
    while rig.scheduler.tokens(ahead).is_some() {
        let plan = rig.step();
        assert!(!evicted(&plan).contains(&2) && (plan.loads.is_empty() || runs(&plan, ahead)), "{plan:?}");
    }
    rig.steps_until_done(behind, |_| ());
    assert_eq!(rig.scheduler.stats().preemptions_total, 0);
}

#[test]
fn a_growing_sequence_takes_idle_pages_before_it_preempts_anybody() {
    let mut rig = Rig::new(SchedulerConfig { num_pages: 14, ..small() });
    rig.warm([sized(1, 4), sized(2, 4)]);
    for n in [1, 2] {
        rig.submit(|new| (new.prompt, new.max_tokens) = (vec![n; 3], 24));
    }
    rig.drain();
    let stats = rig.scheduler.stats();
    assert_eq!((stats.adapter_evictions_total, stats.preemptions_total), (2, 0));
}

#[test]
fn a_load_leaves_the_pages_alone_that_running_prompts_still_need() {
    let mut rig = Rig::new(SchedulerConfig { num_pages: 14, ..small() });
    let prompts = [5, 6].map(|token| rig.submit(|new| new.prompt = vec![token; 20]));
    let cold = rig.submit(|new| new.adapter = Some(sized(1, 5)));
    // Their first chunks leave ten pages, of which they will take six more.
    let plan = rig.step();
    assert!(prompts.iter().all(|id| runs(&plan, *id)) && plan.loads.is_empty());
    rig.steps_until_done(cold, |_| ());
    assert_eq!(rig.scheduler.stats().preemptions_total, 0);
}

#[test]
fn pinned_adapters_load_without_a_sequence_and_stay() {
    let mut rig = Rig::new(SchedulerConfig { num_pages: 8, ..small() });
    rig.scheduler.pin(sized(1, 3)).expect("there is room");
    assert!(!rig.scheduler.is_idle());
    assert_eq!(loads(&rig.step()), [1]);
    assert!(rig.scheduler.is_idle());
    for n in 0..6 {
        rig.submit(|new| (new.prompt, new.max_tokens) = (vec![n; 4], 12));
    }
    while !rig.scheduler.is_idle() {
        assert!(rig.step().evicted.is_empty());
    }
    assert!(rig.scheduler.unpin(adapter(1).generation));
    assert!(!rig.scheduler.unpin(adapter(1).generation));
    rig.submit(|new| new.prompt = vec![8; 29]);
    let plan = rig.step();
    assert!(evicted(&plan) == [1] || evicted(&rig.step()) == [1]);
    rig.drain();
}

#[test]
fn a_pin_that_a_live_sequence_could_not_run_beside_is_refused() {
    let mut rig = Rig::new(SchedulerConfig { num_pages: 8, ..small() });
    let live = rig.submit(|new| (new.adapter, new.max_tokens) = (Some(sized(2, 2)), 13));
    let error = rig.scheduler.pin(sized(1, 3)).expect_err("the sequence needs six of eight pages");
    assert!(matches!(error, SubmitError::NoRoomForPin { pages: 3, pinned: 0, live: 6, max: 8, .. }), "{error}");
    assert!(error.is_retryable(), "the sequence ends");
    rig.scheduler.pin(sized(2, 2)).expect("the sequence's own adapter costs nothing more");
    rig.steps_until_done(live, |_| ());
    rig.scheduler.pin(sized(1, 3)).expect("there is room");
    let error = rig.scheduler.pin(sized(3, 4)).expect_err("nine of eight pages");
    assert!(!error.is_retryable(), "{error}");
}

#[test]
fn a_failed_load_drops_the_pin() {
    let mut rig = Rig::new(small());
    rig.scheduler.pin(adapter(1)).expect("there is room");
    rig.plan();
    assert!(rig.scheduler.adapter_failed(adapter(1).generation).is_empty());
    assert!(rig.scheduler.is_idle());
    assert_eq!(rig.scheduler.stats().adapters_pinned, 0);
}

#[test]
fn a_sequence_that_could_never_run_beside_its_adapter_and_the_pinned_ones_is_refused() {
    let mut rig = Rig::new(SchedulerConfig { num_pages: 8, ..small() });
    rig.scheduler.pin(sized(1, 3)).expect("there is room");
    let request = |need, max_tokens| move |new: &mut NewSequence| (new.adapter, new.max_tokens) = (need, max_tokens);
    for (need, max_tokens, fits) in [
        (None, 17, true),
        (None, 18, false),
        (Some(sized(1, 3)), 17, true),
        (Some(sized(1, 3)), 18, false),
        (Some(sized(2, 4)), 1, true),
        (Some(sized(2, 4)), 2, false),
        (Some(sized(3, 8)), 1, false),
    ] {
        let result = rig.try_submit(request(need, max_tokens));
        assert_eq!(result.is_ok(), fits, "{need:?} and {max_tokens} tokens: {result:?}");
        if let Err(error) = result {
            assert!(matches!(error, SubmitError::TooManyPages { max: 8, .. }), "{error}");
            assert_eq!((error.is_retryable(), error.fault()), (false, Fault::Client));
        }
    }
    for need in [sized(4, 0), sized(1, 4)] {
        let error = rig.try_submit(request(Some(need), 1)).expect_err("no adapter has such pages");
        assert!(matches!(&error, SubmitError::Invalid(invalid) if invalid.field == "adapter.pages"), "{error}");
    }
    rig.drain();
}

#[test]
fn a_stream_of_small_sequences_never_starves_an_adapter_that_finds_no_pages() {
    let config = SchedulerConfig { num_pages: 16, starvation_micros: 50, prefix_cache: false, ..small() };
    let mut rig = Rig::new(config);
    let mut nth = 0_u8;
    let mut stream = |rig: &mut Rig| {
        nth = nth.wrapping_add(1);
        let _ = rig.try_submit(|new| (new.prompt, new.max_tokens) = (vec![u32::from(nth); 3], 8));
    };
    (0..12).for_each(|_| stream(&mut rig));
    rig.step();
    let starved = rig.submit(|new| new.adapter = Some(sized(1, 14)));
    let steps = rig.steps_until_done(starved, stream);
    // After 50 µs nothing is admitted until the sequences that run, of 8 tokens each, have left 14 pages.
    assert!(steps <= 50 + 12 * 8, "{steps} steps");
}

#[test]
fn a_stream_of_small_adapters_never_starves_a_large_one() {
    let config = SchedulerConfig { num_pages: 12, starvation_micros: 50, max_loras: 4, ..small() };
    let mut rig = Rig::new(config);
    let mut nth = 0_u8;
    let mut stream = |rig: &mut Rig| {
        nth = 10 + nth.wrapping_add(1) % 40;
        let _ = rig.try_submit(|new| (new.adapter, new.max_tokens) = (Some(sized(nth, 2)), 4));
    };
    (0..12).for_each(|_| stream(&mut rig));
    rig.step();
    let starved = rig.submit(|new| (new.adapter, new.priority) = (Some(sized(1, 9)), Priority::Low));
    let steps = rig.steps_until_done(starved, stream);
    assert!(steps <= 200, "{steps} steps");
}

#[test]
fn a_stream_of_loads_never_starves_a_sequence_that_needs_many_blocks() {
    let mut rig = Rig::new(SchedulerConfig { num_pages: 16, ..small() });
    let (mut loading, mut clients) = (BTreeMap::new(), BTreeMap::new());
    let mut large = None;
    for step in 0..200_u64 {
        // Each load takes three steps, the next one is always there to follow, and nobody waits for its end.
        let need = sized(10 + (step % 40) as u8, 3);
        if let Ok(id) = rig.try_submit(|new| new.adapter = Some(need)) {
            clients.insert(need.generation, id);
        }
        if step == 10 {
            large = Some(rig.submit(|new| new.prompt = vec![9; 50]));
        }
        let plan = step_without_loads(&mut rig);
        loading.extend(plan.loads.iter().map(|load| (load.generation, step + 3)));
        loading.retain(|generation, until| {
            if *until <= step {
                rig.scheduler.adapter_loaded(*generation);
                rig.scheduler.abort(clients[generation]);
            }
            *until > step
        });
        if large.is_some_and(|id| rig.scheduler.tokens(id).is_none()) {
            assert!(step <= 60, "{step} steps");
            return;
        }
    }
    panic!("it starves");
}

#[test]
fn under_lasting_overload_every_adapter_has_its_turn() {
    let (waiting, starvation, load_steps) = (24, 20, 5);
    let config = SchedulerConfig {
        num_pages: 16,
        max_num_seqs: 3,
        max_loading: 2,
        adapter_pages_per_step: 8,
        max_waiting: waiting,
        starvation_micros: starvation,
        ..small()
    };
    let (mut rig, mut rng) = (Rig::new(config), Rng::new(5));
    let (mut loading, mut since) = (BTreeMap::new(), BTreeMap::new());
    let mut served = [0; 12];
    for step in 0..6_000 {
        let nth = rng.between(0, 11);
        let request = |new: &mut NewSequence| {
            new.tenant = TenantId(format!("tenant {}", rng.between(1, 4)));
            new.priority = rng.pick(&[Priority::Low, Priority::Normal, Priority::High]);
            new.adapter = Some(sized(nth as u8, 1 + nth));
            new.max_tokens = 4;
        };
        if let Ok(id) = rig.try_submit(request) {
            since.insert(id, (step, nth));
        }
        let plan = step_without_loads(&mut rig);
        loading.extend(plan.loads.iter().map(|load| (load.generation, step + rng.between(0, load_steps))));
        loading.retain(|generation, until| {
            if *until <= step {
                rig.scheduler.adapter_loaded(*generation);
            }
            *until > step
        });
        since.retain(|id, (submitted, nth)| {
            // Everything else in the queue has its turn before it at most, and one request of each tenant whose counter is
            // behind; a turn takes the starvation time, the load, those that run and those whose loads hold pages.
            let bound = (waiting + 4) * (starvation as usize + 2 * load_steps + 3 * 4);
            assert!(step - *submitted <= bound, "{id} of adapter {nth} waits for more than {bound} steps");
            let live = rig.scheduler.tokens(*id).is_some();
            served[*nth] += usize::from(!live);
            live
        });
    }
    assert!(served.iter().all(|count| *count > 50), "{served:?}");
}

#[test]
fn running_adapters_stay_within_their_pages_and_a_larger_one_runs_alone() {
    let mut rig =
        Rig::new(SchedulerConfig { adapter_pages_per_step: 6, max_loras: 8, starvation_micros: 20, ..small() });
    let needs = [sized(1, 3), sized(2, 3), sized(3, 3), sized(4, 10)];
    rig.warm(needs);
    let ids = needs.map(|need| rig.submit(|new| (new.adapter, new.max_tokens) = (Some(need), 5)));
    let base = rig.submit(|new| new.max_tokens = 5);
    let plan = rig.step();
    let running = ids.map(|id| runs(&plan, id));
    assert_eq!((running, runs(&plan, base)), ([true, true, false, false], true));
    let mut alone = 0;
    while !rig.scheduler.is_idle() {
        let plan = rig.step();
        if runs(&plan, ids[3]) {
            alone += 1;
            assert!(!ids[..3].iter().any(|&id| runs(&plan, id)));
        }
    }
    assert_eq!(alone, 5);
}

#[test]
fn where_rows_are_scarce_sequences_of_active_adapters_go_first_until_others_have_aged() {
    // One of adapter 1 keeps running; of those that wait, the one behind shares its adapter.
    for (starvation_micros, next) in [(1_000_000, 2), (1, 1)] {
        let mut rig = Rig::new(SchedulerConfig { max_num_seqs: 2, starvation_micros, ..small() });
        rig.warm([1, 2].map(adapter));
        let request =
            |n, max_tokens| move |new: &mut NewSequence| (new.adapter, new.max_tokens) = (Some(adapter(n)), max_tokens);
        let ids = [rig.submit(request(1, 20)), rig.submit(request(2, 1)), rig.submit(request(1, 1))];
        rig.now += 1;
        let plan = rig.step();
        assert!(runs(&plan, ids[0]) && runs(&plan, ids[next]) && !runs(&plan, ids[3 - next]), "{starvation_micros}");
        rig.drain();
    }
}

#[test]
fn grouping_by_adapter_takes_no_turn_from_another_tenant() {
    let mut rig = Rig::new(SchedulerConfig { max_num_seqs: 2, ..small() });
    rig.warm([1, 2].map(adapter));
    let request = |n, tenant: &'static str| {
        move |new: &mut NewSequence| (new.adapter, new.tenant) = (Some(adapter(n)), TenantId(tenant.into()))
    };
    rig.submit(request(1, "a"));
    rig.submit(request(1, "a"));
    let other = rig.submit(request(2, "b"));
    assert!(runs(&rig.step(), other));
}

#[test]
fn an_empty_bucket_stops_its_tenant_alone_until_it_has_refilled() {
    let mut rig = Rig::new(small());
    let rate = Some(Rate { tokens_per_second: 1_000, burst: 5 });
    let rated = |max_tokens| move |new: &mut NewSequence| (new.rate, new.max_tokens) = (rate, max_tokens);
    let first = rig.submit(rated(6));
    rig.step();
    let second = rig.submit(rated(1));
    let other = rig.submit(|new| new.tenant = TenantId("other".into()));
    // Three prompt tokens and one generated one are gone; one is left, and the second prompt takes it and two more.
    let plan = rig.step();
    assert!(runs(&plan, first) && runs(&plan, second) && runs(&plan, other));
    let third = rig.submit(rated(1));
    for _ in 0..4 {
        let plan = rig.step();
        assert!(runs(&plan, first) && !runs(&plan, third), "a running sequence goes on");
    }
    // It was 5 and paid for 6 prompt tokens and 7 generated ones: 8 of debt and 1 to have, at one per millisecond.
    assert!(rig.step().sequences.is_empty());
    rig.now = 8_970;
    assert!(rig.step().sequences.is_empty());
    rig.now = 9_002;
    assert!(runs(&rig.step(), third));
}

#[test]
fn a_tenant_cannot_fill_the_queue() {
    let mut rig = Rig::new(SchedulerConfig { max_waiting_per_tenant: 2, ..small() });
    let _ = [(); 2].map(|()| rig.submit(|_| ()));
    let error = rig.try_submit(|_| ()).expect_err("its share is used up");
    let expected = TenantId("tenant".into());
    assert!(
        matches!(&error, SubmitError::TenantQueueFull { tenant, waiting: 2, max: 2, .. } if *tenant == expected),
        "{error}"
    );
    assert!(error.is_retryable());
    rig.submit(|new| new.tenant = TenantId("other".into()));
    rig.drain();
    let nothing = Some(Rate { tokens_per_second: 0, burst: 1 });
    let error = rig.try_submit(|new| new.rate = nothing).expect_err("a rate of nothing");
    assert!(matches!(&error, SubmitError::Invalid(invalid) if invalid.field == "rate"), "{error}");
}

#[test]
fn another_generation_under_the_same_name_is_another_adapter() {
    let mut rig = Rig::new(small());
    let old = rig.submit(|new| (new.adapter, new.max_tokens) = (Some(adapter(1)), 10));
    rig.step();
    rig.step();
    let new = rig.submit(|new| (new.adapter, new.max_tokens) = (Some(sized(2, 3)), 3));
    rig.step();
    let plan = rig.step();
    let generation = |id| plan.sequences.iter().find(|sequence| sequence.id == id).and_then(|s| s.generation);
    assert_eq!([old, new].map(generation), [1, 2].map(|n| Some(Generation([n; 32]))));
    rig.drain();
}
