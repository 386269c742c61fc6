//! Named points at which tests kill the process, to see what the next one makes of what is left. Nothing outside tests.

#[cfg(not(test))]
pub(crate) fn point(_name: &str) {}

/// The environment variable that names the point for a test's child process: `name`, or `name#n` for the n-th time.
#[cfg(test)]
pub(crate) const AT: &str = "OPENLORA_TEST_KILL_AT";

#[cfg(test)]
pub(crate) fn point(name: &str) {
    use std::sync::atomic::{AtomicUsize, Ordering};

    static TIMES: AtomicUsize = AtomicUsize::new(0);
    let Ok(wanted) = std::env::var(AT) else { return };
    let (at, times) = wanted.split_once('#').unwrap_or((&wanted, "1"));
    if at == name && (TIMES.fetch_add(1, Ordering::Relaxed) + 1).to_string() == times {
        let myself = rustix::process::getpid();
        let _killed = rustix::process::kill_process(myself, rustix::process::Signal::KILL);
    }
}
