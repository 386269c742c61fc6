//! Eight threads change, replace and use the same few aliases.

use std::{collections::HashMap, sync::Mutex};

use openlora_adapters::AdapterError;
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
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let (bench, paths, check) = (&bench, &paths, &check);
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
                        _ => bench.store.resolve(&name).map(|lease| {
                            check(lease.weights());
                            leases.push(lease.clone());
                        }),
                    };
                    match done {
                        Ok(()) | Err(AdapterError::NotFound { .. } | AdapterError::LimitReached { .. }) => {}
                        Err(error) => panic!("{error}"),
                    }
                }
                leases.iter().for_each(|lease| check(lease.weights()));
            });
        }
    });
    for name in (0..ALIASES).map(|i| format!("a{i}")) {
        let _unregistered_already = bench.store.unregister(&name, &actor("o"));
    }
    let stats = bench.store.stats();
    assert_eq!((stats.leases, stats.held_entries, stats.held_bytes), (0, 0, 0));
    assert_eq!((stats.registered, stats.generations), (0, 0));
    assert_eq!((bench.generations(), bench.staged()), (0, 0));
    assert!(seen.into_inner().expect("no thread panicked").len() == 6 && stats.misses > 0);
}
