//! The registry: aliases, generations, leases, pins and their limits.

use std::{fs, sync::Barrier};

use openlora_adapters::{Actor, AdapterError};
use openlora_types::{Classify, Generation, Limits};

use crate::make::{Adapter, Bench, actor, admin, alias};

/// Bytes that `Adapter::qv(rank, _)` takes in memory: F32, two sites a layer.
fn qv_bytes(rank: u64) -> u64 {
    2 * 4 * rank * ((8 + 8) + (8 + 4))
}

#[test]
fn a_registered_adapter_is_listed_resolved_and_gone_after_unregister() {
    let bench = Bench::new();
    let path = bench.write("one", &Adapter::qv(2, 1));
    let info = bench.store.register_folder(&alias("acme/one"), &path, &actor("acme"), false).expect("registered");
    assert_eq!((info.alias.as_str(), info.owner.as_str()), ("acme/one", "acme"));
    assert_eq!((info.rank_max, info.sites, info.bytes, info.dora), (2, 4, qv_bytes(2), false));
    assert_eq!(info.modules, ["q_proj", "v_proj"]);
    assert!(info.created_unix_s > 1_600_000_000 && !info.in_host_cache && info.leases == 0);
    assert_eq!(bench.info("acme/one"), info);
    assert_eq!(bench.store.list(&actor("acme"), None, 10).expect("listed"), std::slice::from_ref(&info));

    let lease = bench.store.resolve("acme/one").expect("resolved");
    let named = bench.store.resolve(&format!("acme/one@{}", info.generation)).expect("by its generation");
    assert_eq!((lease.generation(), named.generation()), (info.generation, info.generation));
    let again = lease.clone();
    let now = bench.info("acme/one");
    assert_eq!((now.leases, now.in_host_cache), (3, false), "a lease alone reads nothing");
    let weights = lease.load().expect("read");
    assert_eq!((weights.sizes(), weights.byte_len() as u64), ((**lease.sizes()).clone(), lease.bytes()));
    named.load().expect("in memory");
    let stats = bench.store.stats();
    assert_eq!((stats.leases, stats.misses, stats.hits, stats.cached_entries), (3, 1, 1, 1));

    assert_eq!(bench.store.unregister("acme/one", &actor("acme")).expect("gone"), info.generation);
    assert!(matches!(bench.store.resolve("acme/one"), Err(AdapterError::NotFound { .. })));
    assert!(matches!(bench.store.unregister("acme/one", &actor("acme")), Err(AdapterError::NotFound { .. })));
    assert_eq!((bench.store.stats().registered, bench.store.stats().generations), (0, 0));
    // Who runs on it goes on, whether its weights were read yet or not.
    drop(weights);
    assert_eq!((bench.generations(), again.load().expect("its files stay").sites.len()), (1, 4));
    drop((lease, named, again));
    let stats = bench.store.stats();
    assert_eq!((stats.leases, stats.held_bytes, stats.held_entries), (0, 0, 0));
    assert_eq!(bench.reopen().generations(), 0, "the files went with the last lease");
}

#[test]
fn only_owners_and_administrators_change_an_alias() {
    let bench = Bench::new();
    let (one, two) = (bench.write("one", &Adapter::qv(2, 1)), bench.write("two", &Adapter::qv(2, 2)));
    let (store, name) = (&bench.store, alias("a"));
    let first = store.register_folder(&name, &one, &actor("acme"), false).expect("registered").generation;
    let exists = |error: AdapterError| matches!(error, AdapterError::AlreadyExists { .. });
    let denied = |error: AdapterError| matches!(error, AdapterError::PermissionDenied { .. });
    assert!(exists(store.register_folder(&name, &two, &actor("acme"), false).expect_err("taken")));
    assert!(exists(store.register_folder(&name, &two, &actor("eve"), false).expect_err("taken")));
    assert!(denied(store.register_folder(&name, &two, &actor("eve"), true).expect_err("not hers")));
    assert!(denied(store.begin_upload(&name, &actor("eve"), true).err().expect("not hers")));
    assert!(denied(store.unregister("a", &actor("eve")).expect_err("not hers")));
    assert!(denied(store.pin("a", true, &actor("eve")).expect_err("not hers")));
    assert!(denied(store.set_alias(&name, first, Some(first), &actor("eve")).expect_err("not hers")));
    // Knowing a hash is not owning it.
    let stolen = store.set_alias(&alias("eve"), first, None, &actor("eve")).expect_err("not hers");
    assert!(matches!(stolen, AdapterError::NotFound { .. }), "{stolen}");
    let admin = Actor { name: "root".into(), admin: true };
    let replaced = store.register_folder(&name, &two, &admin, true).expect("administrators may");
    assert_eq!((replaced.owner.as_str(), replaced.generation == first), ("acme", false));
    let base = store.register_folder(&alias("tiny"), &one, &actor("acme"), false).expect_err("the base model's name");
    assert!(base.to_string().contains("base model"), "{base}");
    assert!(exists(base));
}

#[test]
fn a_name_that_cannot_be_an_alias_is_refused_before_it_is_looked_up() {
    let bench = Bench::new();
    let long = "a".repeat(10_000);
    for name in ["", "../x", "/etc/passwd", "~", "a\0b", "a,b", &long, "a@", "a@zz", "@", "a@b@c"] {
        let error = bench.store.resolve(name).expect_err("refused");
        assert!(matches!(error, AdapterError::Invalid(_)), "{name:.20}: {error}");
    }
    let unknown = bench.store.resolve(&format!("a@{}", "0".repeat(64))).expect_err("unknown");
    assert!(matches!(unknown, AdapterError::NotFound { .. }), "{unknown}");
}

#[test]
fn a_replaced_alias_serves_the_new_weights_and_its_leases_keep_the_old() {
    let bench = Bench::new();
    let path = bench.write("a", &Adapter::qv(2, 0));
    let (store, name, owner) = (&bench.store, alias("a"), actor("acme"));
    let mut generations = vec![store.register_folder(&name, &path, &owner, false).expect("registered").generation];
    let old = store.resolve("a").expect("resolved");
    let before = old.load().expect("read").sites[0].clone();
    for seed in 1..=6 {
        Adapter::qv(2, seed).write(&path);
        generations.push(store.register_folder(&name, &path, &owner, true).expect("replaced").generation);
        let now = store.resolve("a").expect("resolved");
        assert_eq!(now.generation(), generations[seed as usize]);
        assert_ne!(now.load().expect("read").sites[0], before);
    }
    assert_eq!((old.generation(), &old.load().expect("held").sites[0]), (generations[0], &before));
    drop(old);
    let bench = bench.reopen();
    let store = &bench.store;
    // Four earlier generations are remembered, by the default of alias_history_max.
    let by_hash = |generation: &Generation| store.resolve(&format!("a@{generation}")).map(|lease| lease.generation());
    for generation in &generations[2..] {
        assert_eq!(by_hash(generation).expect("remembered"), *generation);
    }
    assert!(matches!(by_hash(&generations[1]), Err(AdapterError::NotFound { .. })));
    assert_eq!((bench.generations(), store.stats().generations), (5, 5));

    let (current, earlier) = (generations[6], generations[3]);
    let wrong = store.set_alias(&name, earlier, Some(earlier), &owner).expect_err("not what it stands for");
    assert!(matches!(wrong, AdapterError::Conflict { .. }), "{wrong}");
    let taken = store.set_alias(&name, earlier, None, &owner).expect_err("not new");
    assert!(matches!(taken, AdapterError::AlreadyExists { .. }), "{taken}");
    store.set_alias(&name, earlier, Some(current), &owner).expect("pointed back");
    assert_eq!(store.resolve("a").expect("resolved").generation(), earlier);
    assert_eq!(by_hash(&current).expect("remembered now"), current);
    store.set_alias(&alias("b"), current, None, &owner).expect("a second name");
    store.unregister("a", &owner).expect("gone");
    assert_eq!(bench.generations(), 1, "what b stands for stays");
    let bench = bench.reopen();
    assert_eq!(bench.store.resolve("b").expect("after a restart").generation(), current);
}

#[test]
fn registering_the_same_bytes_again_changes_nothing() {
    let bench = Bench::new();
    let path = bench.write("a", &Adapter::qv(2, 1));
    let first = bench.store.register_folder(&alias("a"), &path, &actor("o"), false).expect("registered");
    let again = bench.store.register_folder(&alias("a"), &path, &actor("o"), true).expect("registered again");
    assert_eq!(first, again);
    bench.store.register_folder(&alias("b"), &path, &actor("p"), false).expect("under another name");
    assert_eq!((bench.generations(), bench.store.stats().generations, bench.store.stats().registered), (1, 1, 2));
    bench.store.unregister("a", &actor("o")).expect("gone");
    bench.load("b").expect("served");
}

#[test]
fn aliases_are_listed_in_pages_and_survive_a_restart() {
    let bench = Bench::new();
    let path = bench.write("a", &Adapter::qv(1, 1));
    let names: Vec<String> = (0..25).map(|i| format!("acme/n{i:02}.x_-")).collect();
    for name in &names {
        bench.store.register_folder(&alias(name), &path, &actor("acme"), false).expect(name);
    }
    let bench = bench.reopen();
    let mut seen: Vec<String> = Vec::new();
    loop {
        let page = bench.store.list(&actor("acme"), seen.last().map(String::as_str), 10).expect("listed");
        if page.is_empty() {
            break;
        }
        seen.extend(page.into_iter().map(|info| info.alias));
    }
    assert_eq!(seen, names);
    assert_eq!(bench.store.list(&admin(), Some("acme/n22.x_-"), 1).expect("listed")[0].alias, names[23]);
}

#[test]
fn the_store_takes_no_more_aliases_than_its_limit() {
    let bench = Bench::with(Limits { adapters_max: 2, ..Limits::default() }, 1 << 20);
    let path = bench.write("a", &Adapter::qv(1, 1));
    let register = |name: &str, replace| bench.store.register_folder(&alias(name), &path, &actor("o"), replace);
    register("a", false).expect("one");
    register("b", false).expect("two");
    let full = register("c", false).expect_err("three");
    assert!(!full.is_retryable() && full.to_string().contains("adapters_max is 2"), "{full}");
    register("a", true).expect("replacing takes no room");
    bench.store.unregister("a", &actor("o")).expect("gone");
    register("c", false).expect("room again");
}

#[test]
fn the_cache_stays_within_its_bytes_and_evicted_weights_live_with_their_leases() {
    let each = qv_bytes(32);
    let bench = Bench::with(Limits::default(), 4 * each);
    for i in 0..12 {
        let path = bench.write("next", &Adapter::qv(32, i));
        bench.store.register_folder(&alias(&format!("a{i}")), &path, &actor("o"), false).expect("registered");
    }
    let first = bench.load("a0").expect("read");
    let before = first.sites[0].clone();
    for round in 0..3 {
        for i in 1..12 {
            bench.load(&format!("a{i}")).expect("read");
        }
        let stats = bench.store.stats();
        assert!(stats.cached_bytes <= 4 * each && stats.cached_entries <= 4, "round {round}: {stats:?}");
    }
    assert_eq!(first.sites[0], before);
    let misses = bench.store.stats().misses;
    bench.load("a0").expect("held");
    assert_eq!(bench.store.stats().misses, misses, "weights in use are not read again");

    // Twice the cache's bytes in use: one more is refused for now, and fits when somebody has let go.
    let mut held: Vec<_> = (1..8).map(|i| bench.load(&format!("a{i}")).expect("fits")).collect();
    let full = bench.load("a8").expect_err("a ninth does not fit");
    assert!(full.is_retryable() && full.to_string().contains("host_cache_bytes"), "{full}");
    bench.load("a1").expect("those in use are had again");
    held.pop();
    bench.load("a8").expect("room again");
}

#[test]
fn an_adapter_larger_than_the_cache_is_refused_when_it_is_registered() {
    let bench = Bench::with(Limits::default(), qv_bytes(4) - 1);
    let path = bench.write("big", &Adapter::qv(4, 1));
    let error = bench.store.register_folder(&alias("big"), &path, &actor("o"), false).expect_err("too big");
    assert!(!error.is_retryable() && error.to_string().contains("host_cache_bytes"), "{error}");
    assert_eq!((bench.generations(), bench.staged()), (0, 0));
}

#[test]
fn pins_stay_in_memory_up_to_their_limits() {
    let each = qv_bytes(32);
    let bench = Bench::with(Limits { pins_max: 2, ..Limits::default() }, 6 * each);
    for i in 0..12 {
        let path = bench.write("next", &Adapter::qv(32, i));
        let owner = if i < 6 { "o" } else { "p" };
        bench.store.register_folder(&alias(&format!("a{i}")), &path, &actor(owner), false).expect("registered");
    }
    let pin = |name: &str, pinned, owner: &str| bench.store.pin(name, pinned, &actor(owner));
    assert!(pin("a0", true, "o").expect("pinned").pinned);
    pin("a1", true, "o").expect("pinned");
    let many = pin("a2", true, "o").expect_err("a third");
    assert!(many.to_string().contains("pins_max is 2"), "{many}");
    pin("a1", true, "o").expect("pinned already");
    pin("a6", true, "p").expect("another owner's first");
    // Three of six places: pins leave half of the memory to requests.
    let much = pin("a7", true, "p").expect_err("over half");
    assert!(much.to_string().contains("host_cache_bytes / 2"), "{much}");
    assert!(!bench.info("a7").pinned);
    for _ in 0..3 {
        for i in 0..12 {
            bench.load(&format!("a{i}")).expect("read");
        }
    }
    let misses = bench.store.stats().misses;
    for name in ["a0", "a1", "a6"] {
        let info = bench.info(name);
        assert!(info.pinned && info.in_host_cache && info.leases == 0, "{info:?}");
        bench.load(name).expect("in memory");
    }
    assert_eq!(bench.store.stats().misses, misses, "a pinned generation was read again");
    assert!(!pin("a0", false, "o").expect("let go").pinned);
    pin("a2", true, "o").expect("room again");
    assert_eq!(bench.store.stats().held_entries, 3);
    bench.store.unregister("a1", &actor("o")).expect("gone");
    assert_eq!(bench.store.stats().held_entries, 2, "a pin goes with its alias");
}

#[test]
fn a_pin_follows_its_alias_through_replacement_and_restart() {
    let bench = Bench::new();
    let path = bench.write("a", &Adapter::qv(2, 1));
    bench.store.register_folder(&alias("a"), &path, &actor("o"), false).expect("registered");
    bench.store.pin("a", true, &actor("o")).expect("pinned");
    Adapter::qv(2, 2).write(&path);
    let new = bench.store.register_folder(&alias("a"), &path, &actor("o"), true).expect("replaced");
    assert!(new.pinned);
    assert_eq!(bench.store.stats().held_entries, 0, "the old generation is let go");
    drop(bench.load("a").expect("read"));
    assert_eq!(bench.store.stats().held_entries, 1, "the new one is held from its first use");
    let bench = bench.reopen();
    assert!(bench.info("a").pinned);
    drop(bench.load("a").expect("read"));
    assert_eq!(bench.store.stats().held_entries, 1);
}

#[test]
fn many_requests_for_a_cold_adapter_read_it_once() {
    let bench = Bench::new();
    let path = bench.write("a", &Adapter::qv(32, 1));
    bench.store.register_folder(&alias("a"), &path, &actor("o"), false).expect("registered");
    let barrier = Barrier::new(8);
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                barrier.wait();
                bench.load("a").expect("read")
            });
        }
    });
    let stats = bench.store.stats();
    assert_eq!((stats.misses, stats.hits), (1, 7));
}

#[test]
fn a_damaged_adapter_fails_alone_is_remembered_and_healed_by_registering_again() {
    let bench = Bench::with(Limits { adapter_failure_ttl_s: 3_600, ..Limits::default() }, 1 << 20);
    let (one, two) = (bench.write("one", &Adapter::qv(2, 1)), bench.write("two", &Adapter::qv(2, 2)));
    let info = bench.store.register_folder(&alias("one"), &one, &actor("o"), false).expect("registered");
    bench.store.register_folder(&alias("two"), &two, &actor("o"), false).expect("registered");
    let stored = || bench.data().join("adapters").join(bench.location(info.generation));
    let tensors = || stored().join("adapter_model.safetensors");
    let whole = fs::read(tensors()).expect("stored");
    let corrupt = |what: &str| {
        let error = bench.load("one").expect_err(what);
        assert!(
            matches!(error, AdapterError::Corrupt { generation, .. } if generation == info.generation),
            "{what}: {error}"
        );
        assert!(!error.is_retryable());
        assert_eq!(bench.store.stats().leases, 0, "{what}");
        bench.load("two").expect("the others are served");
    };
    let heal = |what: &str| {
        bench.store.register_folder(&alias("one"), &one, &actor("o"), true).expect(what);
        assert_eq!(bench.load("one").expect(what).generation, info.generation, "{what}");
        bench.store.unregister("one", &actor("o")).expect(what);
        bench.store.register_folder(&alias("one"), &one, &actor("o"), false).expect(what);
    };
    let mut flipped = whole.clone();
    *flipped.last_mut().expect("bytes") ^= 1;
    fs::write(tensors(), &flipped).expect("damaged");
    corrupt("one bit");
    fs::write(tensors(), &whole).expect("repaired by hand");
    corrupt("remembered");
    heal("after a bit");
    fs::write(tensors(), &whole[..whole.len() / 2]).expect("damaged");
    corrupt("cut short");
    heal("after a cut");
    fs::write(stored().join("adapter_config.json"), "{}").expect("damaged");
    corrupt("another configuration");
    heal("after a configuration");
    fs::remove_dir_all(stored()).expect("damaged");
    corrupt("folder gone");
    heal("after its folder");
}
