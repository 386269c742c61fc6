//! Named points at which tests kill the process, to see what the next one makes of what is left. Nothing outside tests.

#[cfg(not(test))]
pub(crate) fn point(_name: &str) {}

/// The environment variable that names the point for a test's child process.
#[cfg(test)]
pub(crate) const AT: &str = "OPENLORA_TEST_KILL_AT";

#[cfg(test)]
pub(crate) fn point(name: &str) {
    if std::env::var(AT).is_ok_and(|wanted| wanted == name) {
        let myself = rustix::process::getpid();
        let _killed = rustix::process::kill_process(myself, rustix::process::Signal::KILL);
    }
}
