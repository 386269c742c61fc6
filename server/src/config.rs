//! What the server room may be told: addresses, doors, keys and every bound of a connection. The composition root fills
//! this in from `openlora.toml`; nothing here reads a file or the environment.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use openlora_types::Limits;

use crate::ServerError;

/// Everything [`crate::run`] needs besides the rooms it serves.
#[derive(Clone, Debug)]
pub struct ServerConfig {
    /// Where gRPC listens; port 0 lets the system choose (see [`crate::BoundAddrs`]).
    pub grpc_addr: SocketAddr,
    /// Where `/metrics`, `/healthz` and `/readyz` listen.
    pub http_addr: SocketAddr,
    /// Serves both doors over TLS.
    pub tls: Option<Tls>,
    /// Who may call.
    pub auth: Auth,
    /// Serves `/metrics` without a key, for scrapers on a network of their own.
    pub metrics_public: bool,
    /// Bounds on requests.
    pub limits: Limits,
    /// Bounds on connections.
    pub connections: ConnectionLimits,
    /// How long running requests may go on once shutdown was asked for.
    pub drain_grace: Duration,
    /// An upload whose next part does not come within this is given up and removed.
    pub upload_idle_timeout: Duration,
    /// An upload that is not complete within this is given up and removed.
    pub upload_timeout: Duration,
}

impl Default for ServerConfig {
    fn default() -> Self {
        Self {
            grpc_addr: SocketAddr::from(([127, 0, 0, 1], 50051)),
            http_addr: SocketAddr::from(([127, 0, 0, 1], 8080)),
            tls: None,
            auth: Auth::InsecureLoopback,
            metrics_public: false,
            limits: Limits::default(),
            connections: ConnectionLimits::default(),
            drain_grace: Duration::from_secs(30),
            upload_idle_timeout: Duration::from_secs(30),
            upload_timeout: Duration::from_secs(3_600),
        }
    }
}

impl ServerConfig {
    /// Refuses to open a door without keys to anyone but this machine.
    ///
    /// # Errors
    /// [`ServerError::InsecureOffLoopback`] naming the address.
    pub fn validate(&self) -> Result<(), ServerError> {
        if matches!(self.auth, Auth::InsecureLoopback) {
            for (door, addr) in [("grpc_addr", self.grpc_addr), ("http_addr", self.http_addr)] {
                if !addr.ip().to_canonical().is_loopback() {
                    return Err(ServerError::InsecureOffLoopback { door, addr });
                }
            }
        }
        Ok(())
    }
}

/// A certificate chain and its key, both PEM files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tls {
    /// The chain, leaf first.
    pub cert_path: PathBuf,
    /// The private key (PKCS#8, PKCS#1 or SEC1).
    pub key_path: PathBuf,
}

/// How callers prove who they are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Auth {
    /// By an API key of this file; see [`crate::keys::KeyStore`].
    Keys {
        /// The file; it may not exist yet.
        path: PathBuf,
    },
    /// Not at all: everyone who reaches a door is an administrator. Only where every door is on the loopback interface.
    InsecureLoopback,
}

/// Bounds of the transport. Requests have theirs in [`Limits`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConnectionLimits {
    /// Connections open on each door; one more is closed at once.
    pub connections_max: usize,
    /// HTTP/2 streams, so calls, open on one connection; a client that keeps to the protocol waits before one more.
    pub streams_per_connection_max: u32,
    /// Bytes of one request's headers.
    pub header_list_bytes_max: u32,
    /// Streams reset by the peer before they were looked at (CVE-2023-44487); one more closes the connection.
    pub pending_resets_max: usize,
    /// Streams reset by us for the peer's errors (CVE-2025-8671); one more closes the connection.
    pub local_error_resets_max: usize,
    /// HTTP/2 control frames (PING, SETTINGS, PRIORITY, unknown types) that may come at once…
    pub control_frames_burst: u32,
    /// …and how many more per second. What we send earns the peer more (see `frames.rs`).
    pub control_frames_per_second: u32,
    /// TLS handshake and first HTTP/2 frame must come within this.
    pub handshake_timeout: Duration,
    /// A connection that is silent for this is sent a PING, and its TCP socket a probe…
    pub keepalive_interval: Duration,
    /// …and closed where no answer comes within this.
    pub keepalive_timeout: Duration,
    /// A connection this old is asked to end, so that clients spread over servers again.
    pub age_max: Duration,
    /// …and closed this much later.
    pub age_grace: Duration,
    /// Longest life of a connection to the HTTP door, whose answers take milliseconds.
    pub http_age_max: Duration,
}

impl Default for ConnectionLimits {
    fn default() -> Self {
        Self {
            connections_max: 1_024,
            streams_per_connection_max: 256,
            header_list_bytes_max: 16 << 10,
            pending_resets_max: 32,
            local_error_resets_max: 128,
            control_frames_burst: 512,
            control_frames_per_second: 64,
            handshake_timeout: Duration::from_secs(10),
            keepalive_interval: Duration::from_secs(30),
            keepalive_timeout: Duration::from_secs(10),
            age_max: Duration::from_secs(3_600),
            age_grace: Duration::from_secs(900),
            http_age_max: Duration::from_secs(60),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn doors_without_keys_open_on_loopback_only() {
        let config = |grpc: &str, http: &str| ServerConfig {
            grpc_addr: grpc.parse().expect(grpc),
            http_addr: http.parse().expect(http),
            ..ServerConfig::default()
        };
        for (grpc, http, door) in [
            ("0.0.0.0:1", "127.0.0.1:2", "grpc_addr"),
            ("127.0.0.1:1", "10.0.0.7:2", "http_addr"),
            ("[::]:1", "[::1]:2", "grpc_addr"),
            ("[::1]:1", "[::ffff:10.0.0.7]:2", "http_addr"),
        ] {
            let error = config(grpc, http).validate().expect_err(grpc);
            assert!(matches!(error, ServerError::InsecureOffLoopback { door: found, .. } if found == door), "{error}");
            let keyed = ServerConfig { auth: Auth::Keys { path: "keys.json".into() }, ..config(grpc, http) };
            assert!(keyed.validate().is_ok());
        }
        for (grpc, http) in [("127.0.0.1:1", "127.8.0.1:2"), ("[::1]:1", "[::ffff:127.0.0.1]:2")] {
            assert!(config(grpc, http).validate().is_ok());
        }
    }
}
