//! What a registered adapter costs that nobody uses: a program of its own, whose every allocation is counted.

use std::{alloc::System, fs, path::Path};

use cap::Cap;
use openlora_adapters::AdapterStore;
use openlora_types::Limits;
use tempfile::TempDir;

#[expect(dead_code, reason = "shared with the other tests, which use all of it")]
#[path = "it/make.rs"]
mod make;

use make::{Adapter, actor, alias};

#[global_allocator]
static HEAP: Cap<System> = Cap::new(System, usize::MAX);

/// Bytes of memory an idle adapter may cost.
const IDLE_BYTES_MAX: usize = 2_000;
const THREADS: usize = 4;

/// A folder in memory where there is one: this test is not about disks.
fn folder() -> TempDir {
    TempDir::new_in("/dev/shm").or_else(|_| TempDir::new()).expect("a temporary folder")
}

/// Memory of this process that is no file's, SQLite's too, in bytes.
fn resident() -> usize {
    let status = fs::read_to_string("/proc/self/status").expect("Linux has it");
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).expect("a line of it");
    line.trim().trim_end_matches(" kB").parse::<usize>().expect("a number") << 10
}

fn register(store: &AdapterStore, dir: &Path, numbers: std::ops::Range<usize>) {
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let numbers = numbers.clone();
            scope.spawn(move || {
                let path = dir.join(format!("root/{thread}"));
                for i in numbers.skip(thread).step_by(THREADS) {
                    // Each is another generation.
                    Adapter::qv(1, i as u64).write(&path);
                    store.register_folder(&alias(&format!("o/{i}")), &path, &actor("o"), false).expect("registered");
                }
            });
        }
    });
}

#[test]
fn an_idle_adapter_costs_less_than_two_kilobytes_of_memory_before_and_after_a_restart() {
    let dir = folder();
    fs::create_dir_all(dir.path().join("root")).expect("made");
    let open = || make::open(dir.path(), Limits::default(), 1 << 20);
    let store = open();
    register(&store, dir.path(), 0..500);
    // What the database's connections keep is bounded, but not yet all there: the more adapters, the less of it each has.
    let few = (HEAP.allocated(), resident());
    register(&store, dir.path(), 500..4_500);
    let many = (HEAP.allocated(), resident());
    let cost = (many.0.saturating_sub(few.0) / 4_000, many.1.saturating_sub(few.1) / 4_000);
    assert!(cost.0 < IDLE_BYTES_MAX && cost.1 < IDLE_BYTES_MAX, "heap and resident bytes of each: {cost:?}");
    assert_eq!(store.stats().generations, 4_500);
    drop(store);
    let closed = HEAP.allocated();
    let store = open();
    let cost = HEAP.allocated().saturating_sub(closed) / 4_500;
    assert!(cost < IDLE_BYTES_MAX, "heap bytes of each after a restart: {cost}");
    store.resolve("o/4499").expect("it is there").load().expect("it is whole");
}
