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

/// Runs a test's body with the kernels under the address and undefined-behaviour sanitisers: the same test again, alone, in a
/// process that has their runtime preloaded. To be called by the test function itself.
#[track_caller]
pub(crate) fn sanitised<F: FnOnce()>(body: F) {
    if let Some(output) = in_child(body) {
        assert!(output.status.success(), "{}", messages(&output));
    }
}

/// As [`sanitised`], for a body that must fail and print `expected`.
#[track_caller]
pub(crate) fn sanitised_fails<F: FnOnce()>(expected: &str, body: F) {
    if let Some(output) = in_child(body) {
        let messages = messages(&output);
        assert!(!output.status.success(), "did not fail\n{messages}");
        assert!(messages.contains(expected), "did not print {expected:?}\n{messages}");
    }
}

fn messages(output: &Output) -> String {
    let [stdout, stderr] = [&output.stdout, &output.stderr].map(|bytes| String::from_utf8_lossy(bytes).into_owned());
    format!("{}\n{stdout}\n{stderr}", output.status)
}

/// What the child said; none in the child itself, once the body has run.
#[track_caller]
fn in_child<F: FnOnce()>(body: F) -> Option<Output> {
    const RUNS: &str = "runs under the sanitisers:";
    // The path of the closure: this binary's name, the test's, and a last part for the closure itself.
    let path = type_name::<F>();
    let test = path.split_once("::").and_then(|(_, path)| path.strip_suffix("::{{closure}}"));
    let test = test.unwrap_or_else(|| panic!("{path} is no closure in a test function"));
    if std::env::var_os(SANITISED).is_some() {
        println!("{RUNS} {test}");
        body();
        return None;
    }
    let output = Command::new(std::env::current_exe().expect("this program"))
        .args([test, "--exact", "--include-ignored", "--nocapture", "--test-threads=1"])
        .env(SANITISED, "1")
        .env("LD_PRELOAD", runtime())
        .env("ASAN_OPTIONS", "detect_leaks=0:detect_stack_use_after_return=0:allocator_may_return_null=1")
        .env("UBSAN_OPTIONS", "print_stacktrace=1")
        .output()
        .expect("a child process");
    let ran = String::from_utf8_lossy(&output.stdout).contains(&format!("{RUNS} {test}"));
    assert!(ran, "{test} did not run: call this from the test function itself\n{}", messages(&output));
    Some(output)
}

/// The address sanitiser's, which must be in a process from its start.
fn runtime() -> PathBuf {
    let found =
        Command::new("g++").arg("-print-file-name=libasan.so").output().expect("g++: run scripts/prerequisites.sh");
    let path = PathBuf::from(String::from_utf8_lossy(&found.stdout).trim());
    assert!(path.is_absolute(), "g++ has no libasan: run scripts/prerequisites.sh");
    path
}
