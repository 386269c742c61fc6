//! The registry: who sees what, quotas, lineage, and databases that cannot be used.

use openlora_adapters::{AdapterError, AdapterStore, Lineage, Registration, StoreConfig};
use openlora_database::testing::sql;
use openlora_types::{Classify, Limits};

use crate::make::{self, Adapter, Bench, actor, admin, alias, shape};

#[test]
fn owners_see_their_own_aliases_and_administrators_all() {
    let bench = Bench::new();
    let path = bench.write("a", &Adapter::qv(1, 1));
    for (name, owner) in [("b/2", "b"), ("a/1", "a"), ("a/3", "a"), ("c/4", "c")] {
        bench.store.register_folder(&alias(name), &path, &actor(owner), false).expect(name);
    }
    let list = |who: &_, after, limit| {
        let page = bench.store.list(who, after, limit).expect("listed");
        page.into_iter().map(|info| info.alias).collect::<Vec<_>>()
    };
    assert_eq!(list(&actor("a"), None, 10), ["a/1", "a/3"]);
    assert_eq!(list(&actor("a"), Some("a/1"), 10), ["a/3"]);
    assert_eq!(list(&actor("nobody"), None, 10), Vec::<String>::new());
    assert_eq!(list(&admin(), Some("a/1"), 2), ["a/3", "b/2"]);
    assert_eq!(bench.store.get("a/1", &actor("a")).expect("theirs").owner, "a");
    // Others do not even learn that it is there; requests run on it all the same.
    let hidden = bench.store.get("a/1", &actor("b")).expect_err("another's");
    assert_eq!(hidden.to_string(), bench.store.get("a/1", &actor("c")).expect_err("another's").to_string());
    assert!(matches!(hidden, AdapterError::NotFound { .. }), "{hidden}");
    bench.store.resolve("a/1").expect("for whoever may infer");
}

#[test]
fn an_owner_takes_no_more_than_their_quota() {
    let bench = Bench::with(Limits { owner_adapters_max: 2, ..Limits::default() }, 1 << 20);
    let (small, large) = (bench.write("small", &Adapter::qv(1, 1)), bench.write("large", &Adapter::qv(4, 1)));
    let register = |name: &str, path, owner: &str, replace| {
        bench.store.register_folder(&alias(name), path, &actor(owner), replace)
    };
    let bytes = register("a", &small, "o", false).expect("one").bytes;
    register("b", &small, "o", false).expect("two");
    let full = register("c", &small, "o", false).expect_err("three");
    assert!(!full.is_retryable() && full.to_string().contains("owner_adapters_max is 2"), "{full}");
    register("p", &small, "p", false).expect("another owner's first");

    assert!(matches!(bench.store.set_quota("o", None, None, &actor("o")), Err(AdapterError::QuotaDenied { .. })));
    bench.store.set_quota("o", Some(3), Some(4 * bytes), &admin()).expect("set");
    register("c", &small, "o", false).expect("three");
    let large_one = register("c", &large, "o", true).expect_err("four times as large");
    assert!(large_one.to_string().contains("owner_bytes_max"), "{large_one}");
    assert_eq!(bench.info("c").rank_max, 1, "what was refused changed nothing");
    bench.store.unregister("a", &actor("o")).expect("gone");
    let quota = bench.store.quota("o", &actor("o")).expect("their own");
    assert_eq!((quota.adapters, quota.bytes, quota.bytes_max), (2, 2 * bytes, Some(4 * bytes)));
    assert!(matches!(bench.store.quota("o", &actor("p")), Err(AdapterError::QuotaDenied { .. })));
    let bench = bench.reopen();
    assert_eq!(bench.store.quota("o", &admin()).expect("kept"), quota);
    assert_eq!(bench.generations(), 1, "what was refused left no files");
}

#[test]
fn tags_and_lineage_come_back_as_they_were_given_and_follow_what_the_alias_stands_for() {
    let bench = Bench::new();
    let (name, owner) = (alias("a"), actor("o"));
    let path = bench.write("a", &Adapter::qv(1, 1));
    let parent = bench.store.register_folder(&alias("parent"), &path, &owner, false).expect("registered").generation;
    let lineage = |run: &str| Lineage {
        parent: Some(parent),
        training_run: run.into(),
        snapshots: vec!["cyber@3".into(), "\"quoted\", ünïcode".into()],
    };
    let registration = |run: &str, tags: &[&str]| Registration {
        replace: true,
        tags: tags.iter().map(|tag| (*tag).into()).collect(),
        lineage: lineage(run),
    };
    bench.write("a", &Adapter::qv(1, 2));
    let first = bench.store.register_folder(&name, &path, &owner, registration("run-1", &["x", "y"])).expect("one");
    assert_eq!((&first.tags[..], &first.lineage), (&["x".to_owned(), "y".to_owned()][..], &lineage("run-1")));
    bench.write("a", &Adapter::qv(1, 3));
    let second = bench.store.register_folder(&name, &path, &owner, registration("run-2", &[])).expect("two");
    assert_eq!((&second.tags, &second.lineage), (&first.tags, &lineage("run-2")));
    let again = bench.store.register_folder(&name, &path, &owner, true).expect("the same bytes");
    assert_eq!(again, second);
    let back = bench.store.set_alias(&name, first.generation, Some(second.generation), &owner).expect("pointed back");
    assert_eq!((back.generation, &back.lineage), (first.generation, &lineage("run-1")));
    let bench = bench.reopen();
    assert_eq!(bench.info("a"), back);

    for (field, bad) in [
        ("tags", registration("r", &["x"; 17])),
        ("tags", registration("r", &[""])),
        ("tags", registration("r", &["a\nb"])),
        ("lineage.training_run", registration(&"r".repeat(129), &[])),
    ] {
        let error = bench.store.register_folder(&name, &path, &owner, bad).expect_err(field);
        assert!(matches!(error, AdapterError::Invalid(_)) && error.to_string().contains(field), "{error}");
    }
}

#[test]
fn a_lookup_sees_every_change_that_was_answered_before_it() {
    let bench = Bench::new();
    let paths: Vec<_> = (0..2).map(|seed| bench.write(&seed.to_string(), &Adapter::qv(1, seed))).collect();
    let (store, name) = (&bench.store, alias("a"));
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        // Others look the alias up all the time, so that what they found lies about to be believed.
        scope.spawn(|| {
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                let _either = store.resolve("a");
            }
        });
        for i in 0..60 {
            let info = store.register_folder(&name, &paths[i % 2], &actor("o"), true).expect("registered");
            assert_eq!(store.resolve("a").expect("resolved").generation(), info.generation, "change {i}");
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
    });
}

fn refused(config: StoreConfig) -> AdapterError {
    AdapterStore::open(config, shape(), Limits::default()).err().expect("refused")
}

#[test]
fn urls_that_cannot_be_used_are_refused_by_name_without_repeating_a_password() {
    let dir = tempfile::TempDir::new().expect("a temporary folder");
    std::fs::create_dir(dir.path().join("root")).expect("made");
    let database = refused(StoreConfig { database_url: "mysql://u:hunter2@h/d".into(), ..make::config(dir.path(), 1) });
    assert!(database.to_string().contains("adapters.database_url"), "{database}");
    assert!(!format!("{database:?}").contains("hunter2"), "{database:?}");
    for url in ["ftp://x", "s3:bucket", "file://relative"] {
        let store = refused(StoreConfig { store_url: url.into(), ..make::config(dir.path(), 1) });
        assert!(store.to_string().contains("adapters.store_url"), "{store}");
    }
}

#[cfg(not(feature = "s3"))]
#[test]
fn an_s3_store_in_a_program_built_without_it_says_how_to_build_it() {
    let dir = tempfile::TempDir::new().expect("a temporary folder");
    std::fs::create_dir(dir.path().join("root")).expect("made");
    let error = refused(StoreConfig { store_url: "s3://bucket/prefix".into(), ..make::config(dir.path(), 1) });
    assert!(error.to_string().contains("--features s3"), "{error}");
}

#[test]
fn a_store_in_another_folder_serves_from_there() {
    let dir = tempfile::TempDir::new().expect("a temporary folder");
    Adapter::qv(1, 1).write(&dir.path().join("root/a"));
    let folder = dir.path().join("files");
    let store_url = format!("file://{}", folder.display());
    let config = StoreConfig { store_url, ..make::config(dir.path(), 1 << 20) };
    let store = AdapterStore::open(config, shape(), Limits::default()).expect("opened");
    let info = store.register_folder(&alias("a"), &dir.path().join("root/a"), &actor("o"), false).expect("registered");
    assert_eq!(store.resolve("a").expect("resolved").load().expect("read").generation, info.generation);
    assert_eq!(make::entries(&folder.join("adapters")).len(), 1);
    assert!(!dir.path().join("data/adapters").exists());
}

#[test]
fn a_database_of_a_newer_release_is_left_alone() {
    let bench = Bench::new();
    let path = bench.write("a", &Adapter::qv(1, 1));
    bench.store.register_folder(&alias("a"), &path, &actor("o"), false).expect("registered");
    let Bench { store, dir } = bench;
    drop(store);
    let config = make::config(dir.path(), 1 << 20);
    let url = if config.database_url.is_empty() {
        format!("sqlite://{}", dir.path().join("data/registry.db").display())
    } else {
        config.database_url.clone()
    };
    sql(
        &url,
        "INSERT INTO _sqlx_migrations (version, description, success, checksum, execution_time) \
               VALUES (99, 'from the future', true, '', 0)",
    );
    let error = refused(config.clone());
    assert!(error.to_string().contains("version 99"), "{error}");
    sql(&url, "DELETE FROM _sqlx_migrations WHERE version = 99");
    let store = AdapterStore::open(config, shape(), Limits::default()).expect("as it was");
    store.resolve("a").expect("served again");
}

#[test]
fn an_adapter_of_another_base_model_is_never_served_and_waits_for_its_own() {
    let bench = Bench::new();
    let path = bench.write("a", &Adapter::qv(1, 1));
    let generation =
        bench.store.register_folder(&alias("a"), &path, &actor("o"), false).expect("registered").generation;
    bench.store.pin("a", true, &actor("o")).expect("pinned");
    let Bench { store, dir } = bench;
    drop(store);
    // Every tensor of the adapter would fit this one too.
    let other = openlora_types::ModelShape { name: "other".into(), vocab: 32, ..shape() };
    let store = AdapterStore::open(make::config(dir.path(), 1 << 20), other, Limits::default()).expect("opened");
    for name in ["a".to_owned(), format!("a@{generation}")] {
        let error = store.resolve(&name).expect_err("another base model's");
        assert!(matches!(error, AdapterError::Invalid(_)) && error.to_string().contains("other sizes"), "{error}");
    }
    assert_eq!(store.pinned().expect("asked").len(), 0);
    assert_eq!(store.list(&actor("o"), None, 10).expect("listed").len(), 1, "its owner still sees it");
    drop(store);
    let store = make::open(dir.path(), Limits::default(), 1 << 20);
    assert_eq!(store.resolve("a").expect("its own").load().expect("served").generation, generation);
}

/// A store on a SQLite file of its own, and the file.
fn sqlite(dir: &std::path::Path, mode: &str) -> (StoreConfig, String) {
    std::fs::create_dir_all(dir.join("root")).expect("made");
    let file = format!("sqlite://{}", dir.join("own.db").display());
    (StoreConfig { database_url: format!("{file}?mode={mode}"), ..make::config(dir, 1 << 20) }, file)
}

#[test]
fn a_database_that_may_only_be_read_serves_what_it_has_and_refuses_changes() {
    let dir = tempfile::TempDir::new().expect("a temporary folder");
    let path = dir.path().join("root/a");
    Adapter::qv(1, 1).write(&path);
    let (config, _) = sqlite(dir.path(), "ro");
    let none = refused(config.clone());
    assert!(matches!(none, AdapterError::Database { .. }), "there is no file yet: {none}");
    let (writable, _) = sqlite(dir.path(), "rwc");
    let store = AdapterStore::open(writable, shape(), Limits::default()).expect("opened");
    store.register_folder(&alias("a"), &path, &actor("o"), false).expect("registered");
    drop(store);
    match AdapterStore::open(config, shape(), Limits::default()) {
        Err(error) => assert!(error.to_string().contains("readonly"), "{error}"),
        Ok(store) => {
            store.resolve("a").expect("there").load().expect("served");
            let error = store.unregister("a", &actor("o")).expect_err("it may only be read");
            assert!(error.to_string().contains("readonly"), "{error}");
        }
    }
}

#[test]
fn a_database_that_another_program_has_locked_says_so() {
    use sqlx::{Connection as _, Executor as _};

    let dir = tempfile::TempDir::new().expect("a temporary folder");
    let path = dir.path().join("root/a");
    Adapter::qv(1, 1).write(&path);
    let (config, file) = sqlite(dir.path(), "rwc");
    let store = AdapterStore::open(config, shape(), Limits::default()).expect("opened");
    store.register_folder(&alias("a"), &path, &actor("o"), false).expect("registered");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let mut other = runtime.block_on(sqlx::AnyConnection::connect(&file)).expect("connected");
    runtime.block_on(other.execute("BEGIN IMMEDIATE")).expect("locked");
    let error = store.unregister("a", &actor("o")).expect_err("locked");
    assert!(error.is_retryable() && error.to_string().contains("locked"), "{error}");
    store.resolve("a").expect("readers do not wait");
    runtime.block_on(other.execute("ROLLBACK")).expect("unlocked");
    runtime.block_on(other.close()).expect("closed");
    store.unregister("a", &actor("o")).expect("gone");
}

#[test]
#[ignore = "a measurement: prints how fast adapters are registered and the store opens"]
fn speed_of_registration_and_opening() {
    let number = |name: &str, or| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok()).unwrap_or(or);
    let (count, threads) = (number("OPENLORA_TEST_SPEED_COUNT", 500), number("OPENLORA_TEST_SPEED_THREADS", 8));
    let dir = tempfile::TempDir::new().expect("a temporary folder");
    let made = |seed| {
        let mut adapter = Adapter::qv(4_000, 1);
        adapter.tensors[0].bytes[..8].copy_from_slice(&[&(seed as f32).to_le_bytes()[..], &[0; 4]].concat());
        adapter
    };
    let limits = Limits { lora_rank_max: 4_096, ..Limits::default() };
    for i in 0..count {
        made(i).write(&dir.path().join(format!("root/{i}")));
    }
    let bytes = std::fs::metadata(dir.path().join("root/0/adapter_model.safetensors")).expect("made").len();
    let store = make::open(dir.path(), limits.clone(), 64 << 20);
    let begun = std::time::Instant::now();
    let (store_ref, next) = (&store, std::sync::atomic::AtomicU64::new(0));
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let i = next.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                    if i >= count {
                        break;
                    }
                    let path = dir.path().join(format!("root/{i}"));
                    store_ref
                        .register_folder(&alias(&format!("o/{i}")), &path, &actor("o"), false)
                        .expect("registered");
                }
            });
        }
    });
    let took = begun.elapsed();
    println!("{threads} threads, {count} of {bytes} bytes in {took:?}: {:.0}/s", count as f64 / took.as_secs_f64());
    assert_eq!(store.stats().registered, count);
    drop(store);
    let begun = std::time::Instant::now();
    let store = make::open(dir.path(), limits, 64 << 20);
    println!("opened in {:?}", begun.elapsed());
    assert_eq!(store.stats().generations, count);
}
