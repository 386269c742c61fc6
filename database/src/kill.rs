//! Named points at which tests kill the process, to see what the next one makes of what is left. Nothing without the
//! feature `testing`.

/// Where a test's child process may end.
#[cfg(not(feature = "testing"))]
pub fn point(_name: &str) {}

/// The environment variable that names the point for a test's child process: `name`, or `name#n` for the n-th time.
#[cfg(feature = "testing")]
pub const AT: &str = "OPENLORA_TEST_KILL_AT";

/// Kills this process where [`AT`] names the point.
#[cfg(feature = "testing")]
pub fn point(name: &str) {
    use std::sync::atomic::{AtomicUsize, Ordering};

    static TIMES: AtomicUsize = AtomicUsize::new(0);
    let Ok(wanted) = std::env::var(AT) else { return };
    let (at, times) = wanted.split_once('#').unwrap_or((&wanted, "1"));
    if at == name && (TIMES.fetch_add(1, Ordering::Relaxed) + 1).to_string() == times {
        let myself = rustix::process::getpid();
        let _killed = rustix::process::kill_process(myself, rustix::process::Signal::KILL);
    }
}
