//! The scheduler under seeded, random traffic, and under the adversaries that each of its promises names.
//!
//! `world.rs` is a client, a clock and a model in one: it submits, cancels, registers adapters anew, pins, lets deadlines pass
//! and loads fail, and checks every plan against its own books. `device.rs` is the pool that it computes on, which remembers
//! what was written into each place of each page by KV and adapters, and which adapter has which page.
//! `promises.rs` holds the promises that need a scene of their own. A failing seed is printed with the command that replays it.

mod device;
mod paging;
mod promises;
mod rng;
mod world;

use openlora_scheduler::SchedulerConfig;

use crate::rng::Rng;
use crate::world::{Totals, Traffic, World};

/// Runs `seeds` worlds of a regime, or the one that `OPENLORA_SIM_SEED` names; what they did together.
fn simulate(regime: &str, seeds: u64, traffic: impl Fn(&mut Rng) -> (SchedulerConfig, Traffic)) -> Totals {
    let chosen = std::env::var("OPENLORA_SIM_SEED").ok();
    let seeds = match chosen.map(|seed| seed.parse().expect("OPENLORA_SIM_SEED is a number")) {
        Some(seed) => seed..seed + 1,
        None => 0..seeds,
    };
    let mut totals = Totals::default();
    for seed in seeds {
        let _replay = Replay { regime, seed };
        let mut rng = Rng::new(seed);
        let (config, traffic) = traffic(&mut rng);
        let mut world = World::new(config, traffic, rng);
        world.run();
        totals.add(&world.totals);
    }
    totals
}

/// Tells how to see a failure again.
struct Replay<'a> {
    regime: &'a str,
    seed: u64,
}

impl Drop for Replay<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let Self { regime, seed } = self;
            eprintln!(
                "seed {seed} failed; replay it with\n  OPENLORA_SIM_SEED={seed} cargo nextest run -p openlora-scheduler --test \
                 simulation {regime}"
            );
        }
    }
}

/// Whether all seeds ran, so that rare events must have occurred.
fn ran_all_seeds() -> bool {
    std::env::var_os("OPENLORA_SIM_SEED").is_none()
}

fn any_config(rng: &mut Rng) -> SchedulerConfig {
    let max_num_seqs = rng.between(1, 12);
    SchedulerConfig {
        block_size: rng.pick(&[1, 2, 3, 4, 8, 16]),
        num_pages: rng.between(8, 96),
        max_num_seqs,
        kept_places: rng.between(0, max_num_seqs - 1),
        max_num_batched_tokens: max_num_seqs + rng.between(0, 40),
        max_loras: rng.between(1, 4),
        adapter_pages_per_step: rng.between(1, 60),
        max_loading: rng.between(1, 4),
        lookahead: rng.between(1, 20),
        block_micros: rng.between(0, 20_000) as u64,
        max_waiting: rng.between(4, 40),
        max_waiting_per_tenant: rng.between(2, 40),
        prefix_cache: !rng.chance(0.15),
        long_prefill_chunk: rng.between(1, 24),
        starvation_micros: rng.between(50, 3_000) as u64,
        ..SchedulerConfig::default()
    }
}

fn any_traffic(rng: &mut Rng) -> Traffic {
    Traffic {
        steps: 300,
        tenants: rng.between(1, 4),
        adapters: rng.between(0, 8),
        adapter_pages: rng.between(1, 3),
        zipf: rng.chance(0.5),
        load_failures: rng.pick(&[0.0, 0.02, 0.2]),
        load_steps: rng.between(0, 20),
        registrations: rng.pick(&[0.0, 0.02, 0.2]),
        pins: rng.pick(&[0.0, 0.02]),
        rated: rng.pick(&[0, 0, 1]),
        prefixes: rng.between(1, 4),
        arrivals: rng.pick(&[0.05, 0.3, 1.0, 2.0]),
        aborts: rng.pick(&[0.0, 0.02, 0.2]),
        deadlines: rng.pick(&[0.0, 0.1, 0.4]),
        ahead: rng.pick(&[0.0, 0.5, 1.0]),
        prompt_max: rng.between(1, 60),
        answer_max: rng.between(1, 30),
    }
}

#[test]
fn any_traffic_is_served_within_limits_without_leaks_or_stale_kv() {
    let totals = simulate("any_traffic_is_served", 300, |rng| (any_config(rng), any_traffic(rng)));
    if ran_all_seeds() {
        assert!(totals.finished > 5_000 && totals.expired > 500 && totals.refused > 500, "{totals:?}");
        assert!(totals.left_out > 500, "{totals:?}");
        assert!(
            totals.aborted_waiting > 100 && totals.aborted_running > 100 && totals.aborted_in_flight > 100,
            "{totals:?}"
        );
        assert!(totals.preempted > 100 && totals.hits > 1_000, "{totals:?}");
    }
}

#[test]
fn tiny_pools_preempt_and_still_finish_everything() {
    let totals = simulate("tiny_pools_preempt", 300, |rng| {
        let config = SchedulerConfig {
            block_size: rng.between(1, 4),
            num_pages: rng.between(2, 10),
            prefix_cache: rng.chance(0.7),
            ..any_config(rng)
        };
        let traffic = Traffic {
            aborts: 0.01,
            deadlines: 0.02,
            arrivals: 1.0,
            adapters: rng.between(0, 1),
            adapter_pages: 1,
            load_failures: 0.0,
            registrations: 0.0,
            pins: 0.0,
            rated: 0,
            prompt_max: 12,
            answer_max: 24,
            ..any_traffic(rng)
        };
        (config, traffic)
    });
    if ran_all_seeds() {
        assert!(totals.finished > 5_000 && totals.preempted > 2_000, "{totals:?}");
        assert!(totals.drawn > 10_000 && totals.ended_ahead > 500 && totals.preempted_ahead > 500, "{totals:?}");
    }
}

#[test]
fn few_adapter_places_serve_many_adapters() {
    let totals = simulate("few_adapter_places", 150, |rng| {
        let config = SchedulerConfig { max_loras: rng.between(1, 2), starvation_micros: 300, ..any_config(rng) };
        (config, Traffic { adapters: 12, arrivals: 1.0, aborts: 0.02, ..any_traffic(rng) })
    });
    if ran_all_seeds() {
        assert!(totals.finished > 3_000, "{totals:?}");
    }
}

#[test]
fn adapters_of_any_size_come_and_go_in_a_pool_that_holds_few() {
    let totals = simulate("adapters_of_any_size", 600, |rng| {
        let num_pages = rng.between(6, 48);
        let config = SchedulerConfig {
            num_pages,
            block_size: rng.between(1, 8),
            max_loras: rng.between(1, 6),
            starvation_micros: rng.between(50, 600) as u64,
            ..any_config(rng)
        };
        let traffic = Traffic {
            adapters: rng.between(4, 40),
            adapter_pages: num_pages / 3,
            arrivals: rng.pick(&[0.3, 1.0]),
            aborts: 0.02,
            pins: rng.pick(&[0.0, 0.05]),
            prompt_max: rng.between(1, 24),
            answer_max: rng.between(1, 16),
            ..any_traffic(rng)
        };
        (config, traffic)
    });
    if ran_all_seeds() {
        assert!(totals.finished > 30_000 && totals.failed > 2_000 && totals.preempted > 500, "{totals:?}");
        assert!(totals.loads > 20_000 && totals.evictions > 15_000 && totals.throttled > 4_000, "{totals:?}");
    }
}

#[test]
fn shared_prefixes_are_reused_only_where_the_content_is_the_same() {
    let totals = simulate("shared_prefixes_are_reused", 150, |rng| {
        let config = SchedulerConfig { block_size: rng.between(1, 4), prefix_cache: true, ..any_config(rng) };
        let traffic = Traffic { prefixes: 2, prompt_max: 40, answer_max: 6, arrivals: 1.0, ..any_traffic(rng) };
        (config, traffic)
    });
    if ran_all_seeds() {
        assert!(totals.finished > 3_000 && totals.hits > 20_000, "{totals:?}");
    }
}

#[test]
fn the_same_calls_give_the_same_plans() {
    let trace = |seed| {
        let mut rng = Rng::new(seed);
        let (config, traffic) = (any_config(&mut rng), any_traffic(&mut rng));
        let mut world = World::new(config, traffic, rng);
        world.run();
        world.trace()
    };
    for seed in 1_000..1_020 {
        assert_eq!(trace(seed), trace(seed), "seed {seed}");
    }
    assert_ne!(trace(1_000), trace(1_001));
}
