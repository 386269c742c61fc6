//! Eight threads change, replace and use the same few aliases.

use std::{collections::HashMap, sync::Mutex};

use openlora_adapters::{AdapterError, Lease};
use openlora_types::{AdapterWeights, Generation, Limits};

use crate::make::{Adapter, Bench, actor, alias};

const THREADS: u64 = 8;
const STEPS: u64 = 120;
const ALIASES: u64 = 4;

/// xorshift64*: steps differ between threads and repeat between runs.
fn next(state: &mut u64) -> u64 {
    *state ^= *state >> 12;
    *state ^= *state << 25;
    *state ^= *state >> 27;
    state.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33
}

#[test]
fn leases_reach_zero_and_weights_are_always_their_generations() {
    // A cache too small for all, so that eviction and reloading take part.
    let bench = Bench::with(Limits::default(), 40_000);
    let paths: Vec<_> =
        (0..6).map(|seed| bench.write(&seed.to_string(), &Adapter::qv(16 + seed as usize, seed))).collect();
    // What each generation held when it was first seen; every later lease must hold the same.
    let seen: Mutex<HashMap<Generation, AdapterWeights>> = Mutex::default();
    let check = |weights: &AdapterWeights| {
        let mut seen = seen.lock().expect("no thread panicked");
        let first = seen.entry(weights.generation).or_insert_with(|| weights.clone());
        assert_eq!(first, weights);
    };
    let load = |lease: &Lease| match lease.load() {
        Ok(weights) => check(&weights),
        Err(AdapterError::LimitReached { .. }) => {}
        Err(error) => panic!("{error}"),
    };
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let (bench, paths, load) = (&bench, &paths, &load);
            scope.spawn(move || {
                let (mut state, mut leases) = (thread + 1, Vec::new());
                for _ in 0..STEPS {
                    let name = format!("a{}", next(&mut state) % ALIASES);
                    let path = &paths[next(&mut state) as usize % paths.len()];
                    let done = match next(&mut state) % 10 {
                        0 | 1 => bench.store.register_folder(&alias(&name), path, &actor("o"), true).map(drop),
                        2 => bench.store.unregister(&name, &actor("o")).map(drop),
                        3 => bench.store.pin(&name, next(&mut state).is_multiple_of(2), &actor("o")).map(drop),
                        4 => {
                            leases.clear();
                            Ok(())
                        }
                        // A lease may be older than its use: the files wait for it.
                        _ => bench.store.resolve(&name).map(|lease| leases.push(lease.clone())),
                    };
                    if next(&mut state).is_multiple_of(3) {
                        leases.iter().for_each(load);
                    }
                    match done {
                        Ok(()) | Err(AdapterError::NotFound { .. } | AdapterError::LimitReached { .. }) => {}
                        Err(error) => panic!("{error}"),
                    }
                }
                leases.iter().for_each(load);
            });
        }
    });
    for name in (0..ALIASES).map(|i| format!("a{i}")) {
        let _unregistered_already = bench.store.unregister(&name, &actor("o"));
    }
    let stats = bench.store.stats();
    assert_eq!((stats.leases, stats.held_entries, stats.held_bytes), (0, 0, 0));
    assert_eq!((stats.registered, stats.generations), (0, 0));
    let bench = bench.reopen();
    assert_eq!((bench.generations(), bench.staged()), (0, 0));
    assert!(seen.into_inner().expect("no thread panicked").len() == 6 && stats.misses > 0);
}

#[test]
fn of_many_that_expect_the_same_generation_one_points_the_alias() {
    let bench = Bench::new();
    let name = alias("a");
    let generations: Vec<_> = (0..=THREADS)
        .map(|seed| {
            let path = bench.write("a", &Adapter::qv(1, seed));
            let other = alias(&format!("n{seed}"));
            bench.store.register_folder(&other, &path, &actor("o"), false).expect("registered").generation
        })
        .collect();
    bench.store.set_alias(&name, generations[0], None, &actor("o")).expect("new");
    let mut current = generations[0];
    for round in 0..8 {
        let barrier = std::sync::Barrier::new(THREADS as usize);
        let won: Vec<_> = std::thread::scope(|scope| {
            let tries: Vec<_> = generations
                .iter()
                .filter(|wanted| **wanted != current)
                .map(|&wanted| {
                    let (barrier, store, name) = (&barrier, &bench.store, &name);
                    scope.spawn(move || {
                        barrier.wait();
                        match store.set_alias(name, wanted, Some(current), &actor("o")) {
                            Ok(info) => Some(info.generation),
                            Err(AdapterError::Conflict { .. }) => None,
                            Err(error) => panic!("{error}"),
                        }
                    })
                })
                .collect();
            tries.into_iter().filter_map(|thread| thread.join().expect("no panic")).collect()
        });
        assert_eq!(won.len(), 1, "round {round}");
        current = won[0];
        assert_eq!(bench.store.resolve("a").expect("resolved").generation(), current);
    }
}

#[test]
fn of_many_that_register_a_new_alias_one_owns_it() {
    let bench = Bench::new();
    let path = bench.write("a", &Adapter::qv(1, 1));
    let barrier = std::sync::Barrier::new(THREADS as usize);
    let owners: Vec<_> = std::thread::scope(|scope| {
        let tries: Vec<_> = (0..THREADS)
            .map(|i| {
                let (barrier, store, path) = (&barrier, &bench.store, &path);
                scope.spawn(move || {
                    barrier.wait();
                    match store.register_folder(&alias("a"), path, &actor(&format!("o{i}")), false) {
                        Ok(info) => Some(info.owner),
                        Err(AdapterError::AlreadyExists { .. }) => None,
                        Err(error) => panic!("{error}"),
                    }
                })
            })
            .collect();
        tries.into_iter().filter_map(|thread| thread.join().expect("no panic")).collect()
    });
    assert_eq!((owners.len(), bench.info("a").owner.as_str()), (1, owners[0].as_str()));
    let stats = bench.store.stats();
    assert_eq!((stats.registered, stats.generations), (1, 1));
    let bench = bench.reopen();
    assert_eq!((bench.generations(), bench.staged()), (1, 0), "the others left nothing");
}
