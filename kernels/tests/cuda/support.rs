//! What every test of the kernels needs: the device, and a process with the sanitisers to run in.

use std::any::type_name;
use std::path::PathBuf;
use std::process::{Command, Output};
use std::sync::Arc;

use openlora_kernels::cuda::emulated::{Emulated, SANITISED};

/// A device with seven multiprocessors: odd, as no power of two is.
pub(crate) fn emulated() -> Arc<Emulated> {
    emulated_with(7)
}

/// A device with so many multiprocessors.
pub(crate) fn emulated_with(multiprocessors: u32) -> Arc<Emulated> {
    Emulated::new(multiprocessors).expect("the emulated device")
}

/// Runs a test's body with the kernels under the address and undefined-behaviour sanitisers, and once more under what notices
/// races: the same test again, alone, in processes of their own. To be called by the test function itself.
#[track_caller]
pub(crate) fn sanitised<F: FnOnce()>(body: F) {
    if is_child() {
        return run_as_child(body);
    }
    for kind in [MEMORY, RACES] {
        let output = in_child::<F>(kind);
        assert!(output.status.success(), "{kind}: {}", messages(&output));
    }
}

/// As [`sanitised`], for a body that must fail under one of them and print `expected`.
#[track_caller]
pub(crate) fn sanitised_fails<F: FnOnce()>(kind: &str, expected: &str, body: F) {
    if is_child() {
        return run_as_child(body);
    }
    let output = in_child::<F>(kind);
    let messages = messages(&output);
    assert!(!output.status.success(), "did not fail\n{messages}");
    assert!(messages.contains(expected), "did not print {expected:?}\n{messages}");
}

pub(crate) const MEMORY: &str = "memory";
const RACES: &str = "races";
const RUNS: &str = "runs for the sanitisers:";

fn is_child() -> bool {
    std::env::var_os(SANITISED).is_some()
}

/// Whether this process notices races.
pub(crate) fn notices_races() -> bool {
    std::env::var_os(SANITISED).is_some_and(|kind| kind == RACES)
}

fn run_as_child<F: FnOnce()>(body: F) {
    println!("{RUNS} {}", test_of::<F>());
    body();
}

/// The test that a closure is in. Its path is this binary's name, the test's, and a last part for the closure itself.
fn test_of<F>() -> &'static str {
    let path = type_name::<F>();
    let test = path.split_once("::").and_then(|(_, path)| path.strip_suffix("::{{closure}}"));
    test.unwrap_or_else(|| panic!("{path} is no closure in a test function"))
}

fn messages(output: &Output) -> String {
    let [stdout, stderr] = [&output.stdout, &output.stderr].map(|bytes| String::from_utf8_lossy(bytes).into_owned());
    format!("{}\n{stdout}\n{stderr}", output.status)
}

/// Runs the closure's test in a process that notices what it is asked to.
#[track_caller]
fn in_child<F>(kind: &str) -> Output {
    let test = test_of::<F>();
    let mut command = Command::new(std::env::current_exe().expect("this program"));
    command.args([test, "--exact", "--include-ignored", "--nocapture", "--test-threads=1"]).env(SANITISED, kind);
    if kind == MEMORY {
        command
            .env("LD_PRELOAD", runtime())
            .env("ASAN_OPTIONS", "detect_leaks=0:detect_stack_use_after_return=0:allocator_may_return_null=1")
            .env("UBSAN_OPTIONS", "print_stacktrace=1");
    }
    let output = command.output().expect("a child process");
    let ran = String::from_utf8_lossy(&output.stdout).contains(&format!("{RUNS} {test}"));
    assert!(ran, "{test} did not run: call this from the test function itself\n{}", messages(&output));
    output
}

/// The address sanitiser's, which must be in a process from its start.
fn runtime() -> PathBuf {
    let found =
        Command::new("g++").arg("-print-file-name=libasan.so").output().expect("g++: run scripts/prerequisites.sh");
    let path = PathBuf::from(String::from_utf8_lossy(&found.stdout).trim());
    assert!(path.is_absolute(), "g++ has no libasan: run scripts/prerequisites.sh");
    path
}
