//! Processes killed at named points of a registration and of a removal, and what the next one finds.

use std::{env, fs, os::unix::process::ExitStatusExt, path::Path, process::Command, sync::Arc};

use object_store::{ObjectStore, ObjectStoreExt as _, memory::InMemory};
use openlora_database::kill;
use openlora_types::Limits;
use tempfile::TempDir;

use crate::files::Files;

#[expect(dead_code, reason = "shared with the integration tests, which use all of it")]
#[path = "../tests/it/make.rs"]
pub(crate) mod make;

use make::{Adapter, actor, admin, alias, entries};

/// Set for the children of these tests: the folder they work in, and what they do there.
const CHILD: &str = "OPENLORA_TEST_ADAPTERS_CHILD";
const DO: &str = "OPENLORA_TEST_ADAPTERS_DO";
/// Threads that register at the same time.
const THREADS: usize = 4;
/// What a child prints before the name of an adapter that it was told is registered.
const ANSWERED: &str = "answered: ";
/// What it prints before an error.
const REFUSED: &str = "refused: ";

#[test]
#[ignore = "the child of the tests below"]
fn child_that_is_killed() {
    let dir = env::var_os(CHILD).expect("started by its parent");
    let dir = Path::new(&dir);
    let store = make::open(dir, Limits::default(), 1 << 20);
    match env::var(DO).expect("told what to do").as_str() {
        "register" => {
            store.register_folder(&alias("a"), &dir.join("root/new"), &actor("o"), true).expect("registered");
        }
        "try to register" => {
            match store.register_folder(&alias("a"), &dir.join("root/new"), &actor("o"), true) {
                Ok(_) => println!("{ANSWERED}a"),
                Err(error) => println!("{REFUSED}{error}"),
            }
            // One flush fails: whatever it stopped, the next registration goes through.
            let again = store.register_folder(&alias("b"), &dir.join("root/new"), &actor("o"), false);
            println!("then {}", again.map_or_else(|error| error.to_string(), |_| "b".into()));
        }
        "unregister" => {
            store.unregister("a", &actor("o")).expect("gone");
        }
        "register in company" => std::thread::scope(|scope| {
            for thread in 0..THREADS {
                let store = &store;
                scope.spawn(move || {
                    for i in 0.. {
                        let (name, path) = (format!("t{thread}/{i}"), dir.join(format!("root/{}", i % 2)));
                        store.register_folder(&alias(&name), &path, &actor("o"), false).expect("registered");
                        println!("{ANSWERED}{name}");
                    }
                });
            }
        }),
        other => panic!("{other}"),
    }
}

/// A folder where `a` stands for the adapter `old`, after a child that does `what` was killed at `point`.
fn killed(point: &str, what: &str) -> TempDir {
    killed_after_saying(point, what).0
}

/// As [`killed`], and what the child had printed.
fn killed_after_saying(point: &str, what: &str) -> (TempDir, String) {
    let dir = with_an_adapter();
    let ended = child(&dir, what).env(kill::AT, point).output().expect("ran");
    assert_eq!(ended.status.signal(), Some(9), "{point}: {}", String::from_utf8_lossy(&ended.stderr));
    (dir, String::from_utf8(ended.stdout).expect("text"))
}

/// A folder with a store where `a` stands for the adapter `old`.
fn with_an_adapter() -> TempDir {
    let dir = TempDir::new().expect("a temporary folder");
    for i in 0..2 {
        Adapter::qv(2, 10 + i).write(&dir.path().join(format!("root/{i}")));
    }
    Adapter::qv(2, 1).write(&dir.path().join("root/old"));
    Adapter::qv(3, 2).write(&dir.path().join("root/new"));
    let store = make::open(dir.path(), Limits { alias_history_max: 0, ..Limits::default() }, 1 << 20);
    store.register_folder(&alias("a"), &dir.path().join("root/old"), &actor("o"), false).expect("registered");
    dir
}

/// This program as the child that does `what` in a folder.
fn child(dir: &TempDir, what: &str) -> Command {
    let mut child = Command::new(env::current_exe().expect("this binary"));
    child.args(["--exact", "crash_tests::child_that_is_killed", "--ignored", "--nocapture"]);
    child.env(CHILD, dir.path()).env(DO, what);
    child
}

/// Opens the store again: what `a` has as its largest rank, or nothing; and that no file is left over.
fn rank_after(dir: &TempDir, point: &str) -> Option<u32> {
    let store = make::open(dir.path(), Limits::default(), 1 << 20);
    assert_eq!(entries(&dir.path().join("data/staging")), Vec::<String>::new(), "{point}");
    let stats = store.stats();
    assert_eq!(entries(&dir.path().join("data/adapters")).len() as u64, stats.generations, "{point}");
    let infos = store.list(&admin(), None, 10).expect("listed");
    let quota = store.quota("o", &admin()).expect("asked");
    assert_eq!((quota.adapters, stats.registered), (infos.len() as u64, infos.len() as u64), "{point}");
    let info = infos.first()?;
    let weights = store.resolve("a").expect("resolved").load().expect("whole");
    assert_eq!((weights.generation, weights.byte_len() as u64), (info.generation, quota.bytes), "{point}");
    Some(info.rank_max)
}

#[test]
fn a_registration_killed_at_any_point_leaves_the_old_adapter_or_the_new() {
    let points = [
        ("before the flush", 2),
        ("before the files", 2),
        ("between rename and flush", 2),
        ("after the files", 2),
        ("before the commit", 2),
        ("after the commit", 3),
    ];
    for (point, rank) in points {
        assert_eq!(rank_after(&killed(point, "register"), point), Some(rank), "{point}");
    }
}

#[test]
fn registrations_killed_among_those_they_share_a_transaction_with_are_whole_where_they_were_answered() {
    for point in ["between changes#1", "between changes#9", "between changes#40", "between changes and commit#30"] {
        let (dir, said) = killed_after_saying(point, "register in company");
        let store = make::open(dir.path(), Limits::default(), 1 << 20);
        assert_eq!(entries(&dir.path().join("data/staging")), Vec::<String>::new(), "{point}");
        assert_eq!(entries(&dir.path().join("data/adapters")).len() as u64, store.stats().generations, "{point}");
        let answered = said.lines().filter_map(|line| Some(line.split_once(ANSWERED)?.1));
        for name in answered.clone().chain(["a"]) {
            let generation = store.get(name, &actor("o")).expect(name).generation;
            assert_eq!(store.resolve(name).expect(name).load().expect("whole").generation, generation, "{point}");
        }
        let (infos, quota) = (store.list(&admin(), None, 1_000).expect("listed"), store.quota("o", &admin()));
        assert_eq!(quota.expect("asked").adapters, infos.len() as u64, "{point}");
        // One that is on its way in each thread may be there unanswered.
        let answered = answered.count() + 1;
        assert!((answered..=answered + THREADS).contains(&infos.len()), "{point}: {answered} and {}", infos.len());
    }
}

#[test]
fn a_removal_killed_at_any_point_leaves_the_adapter_or_nothing() {
    for (point, left) in [("before the commit", Some(2)), ("after the commit", None), ("between files and row", None)] {
        assert_eq!(rank_after(&killed(point, "unregister"), point), left, "{point}");
    }
}

/// The disk reports EIO for one flush after the other: of the staged files, their folders, the database.
#[test]
fn a_flush_that_fails_refuses_the_registration_and_leaves_the_old_adapter() {
    let library = TempDir::new().expect("a temporary folder");
    let library = openlora_database::testing::failing_disk(library.path());
    let mut refused = 0;
    for flush in 1.. {
        let dir = with_an_adapter();
        let mut child = child(&dir, "try to register");
        let ended = child.env("LD_PRELOAD", &library).env("FAIL_FLUSH", flush.to_string()).output().expect("ran");
        let (said, errors) = (String::from_utf8_lossy(&ended.stdout), String::from_utf8_lossy(&ended.stderr));
        assert!(ended.status.success(), "flush {flush}: {said}{errors}");
        if !errors.contains("the disk failed") {
            assert!(said.contains("answered: a\nthen b"), "nothing failed: {said}");
            break;
        }
        let point = format!("flush {flush}: {said}");
        let store = make::open(dir.path(), Limits::default(), 1 << 20);
        assert_eq!(entries(&dir.path().join("data/staging")), Vec::<String>::new(), "{point}");
        assert_eq!(entries(&dir.path().join("data/adapters")).len() as u64, store.stats().generations, "{point}");
        let a = store.resolve("a").expect("resolved").load().expect("whole");
        let rank = a.sites.iter().map(openlora_types::SiteWeights::rank).max();
        if said.contains(REFUSED) {
            refused += 1;
            assert_eq!(rank, Some(2), "{point}");
            assert!(said.contains("Input/output error") || said.contains("disk I/O error"), "{point}");
            assert!(said.contains("then b"), "{point}");
        } else {
            assert_eq!(rank, Some(3), "{point}");
        }
        // There if and only if it was answered.
        let b = store.resolve("b").map(|b| drop(b.load().expect("whole")));
        assert_eq!(b.is_ok(), said.contains("then b"), "{point}");
    }
    assert!(refused >= 3, "staged files, folder and database are flushed: {refused}");
}

#[tokio::test]
async fn files_in_a_store_that_is_no_folder_are_read_as_they_were_put_and_gone_when_removed() {
    let dir = TempDir::new().expect("a temporary folder");
    let memory = Arc::new(InMemory::new());
    let store: Arc<dyn ObjectStore> = Arc::clone(&memory) as _;
    let (files, limits) = (Files::over(store, dir.path()), Limits::default());
    let adapter = Adapter::qv(200, 1);
    let staged = files.stage().expect("staged");
    adapter.write(staged.path());
    files.put(staged, "there").await.expect("put");
    let [(mut config, _), (tensors, length)] =
        files.open_both("there", &limits).await.expect("asked").expect("they are there");
    let mut text = Vec::new();
    std::io::Read::read_to_end(&mut config, &mut text).expect("read");
    assert_eq!((text, length), (adapter.config_bytes(), tensors.metadata().expect("a file").len()));
    assert_eq!(length, adapter.tensor_bytes().len() as u64);
    let small = Limits { adapter_bytes_max: length - 1, ..Limits::default() };
    assert!(files.open_both("there", &small).await.is_err(), "more than was registered is not read");
    let key = "some/prefix/adapters/there/adapter_config.json".into();
    memory.head(&key).await.expect("under the prefix");
    for _again in 0..2 {
        files.remove("there").await.expect("removed");
        assert!(files.open_both("there", &limits).await.expect("asked").is_none());
    }
    assert_eq!(fs::read_dir(dir.path().join("staging")).expect("a folder").count(), 0);
}
