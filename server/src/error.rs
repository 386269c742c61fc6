//! What can go wrong in this room: starting it, and serving a request. The mapping of the latter to gRPC is `status.rs`.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use openlora_adapters::AdapterError;
use openlora_engine::EngineError;
use openlora_ledger::LedgerError;
use openlora_model::text::TextError;
use openlora_types::{Classify, Fault, InvalidField};

use crate::epochs::EpochsError;
use crate::keys::{KeyError, Role};

/// Errors of this room.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServerError {
    /// Without keys everybody who reaches a door is an administrator.
    #[error(
        "{door} = {addr} can be reached from other machines: set up API keys (`openlora key create`), or listen on 127.0.0.1"
    )]
    InsecureOffLoopback {
        /// The setting.
        door: &'static str,
        /// Its value.
        addr: SocketAddr,
    },
    /// An address cannot be listened on.
    #[error("cannot listen on {addr}: {source}")]
    Bind {
        /// The address.
        addr: SocketAddr,
        /// What the system said.
        source: std::io::Error,
    },
    /// A listening socket failed.
    #[error("socket: {0}")]
    Socket(std::io::Error),
    /// Certificate or key are unusable.
    #[error("TLS: {}: {reason}", path.display())]
    Tls {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The key file is unusable.
    #[error(transparent)]
    Keys(#[from] KeyError),
    /// A part of the server could not be put together.
    #[error("cannot start: {0}")]
    Start(String),
    /// The gRPC transport failed.
    #[error("gRPC transport: {0}")]
    Transport(#[from] tonic::transport::Error),
    /// The engine died while serving; nothing was served since.
    #[error("the engine died: {0}")]
    EngineDied(String),

    /// A field of the request.
    #[error(transparent)]
    Invalid(#[from] InvalidField),
    /// No key, or not one of ours.
    #[error("not authenticated: {reason}")]
    Unauthenticated {
        /// What to do about it. Never quotes what was sent.
        reason: &'static str,
    },
    /// The key's role may not do this.
    #[error("a key of role {role} may not call {call}")]
    Forbidden {
        /// The call.
        call: String,
        /// The key's role.
        role: Role,
    },
    /// An owner reached for a name outside its own.
    #[error("alias {alias} is outside the namespace of {owner}: use {owner} or {owner}/NAME")]
    OutsideNamespace {
        /// The alias.
        alias: String,
        /// The owner.
        owner: String,
    },
    /// A caller reached for an account of others.
    #[error(
        "{account} is not an account of {name}: ask for one of application, pending, owner, contributor or base, such as owner/{name}, or \
         for one's own address"
    )]
    ForeignAccount {
        /// The account.
        account: String,
        /// The caller.
        name: String,
    },
    /// The prompt could not be rendered or tokenized.
    #[error("{field}: {source}")]
    Text {
        /// The wire's name of the prompt's field.
        field: &'static str,
        /// Why.
        source: TextError,
    },
    /// The adapters room refused or failed.
    #[error(transparent)]
    Adapter(#[from] AdapterError),
    /// The engine refused or ended the request.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// The ledger refused or failed.
    #[error(transparent)]
    Ledger(#[from] LedgerError),
    /// An epoch does not get on.
    #[error(transparent)]
    Epochs(#[from] EpochsError),
    /// A bound on what is done at once.
    #[error("{what}: {max} at once, the limit {limit}; retry in {retry_after:?}")]
    Busy {
        /// What there is too much of.
        what: &'static str,
        /// The limit's name.
        limit: &'static str,
        /// Its value.
        max: usize,
        /// When room is likely.
        retry_after: Duration,
    },
    /// The client sent nothing for too long.
    #[error("{what} did not come within {limit:?}")]
    Idle {
        /// What was waited for.
        what: &'static str,
        /// How long.
        limit: Duration,
    },
    /// A message over the limit.
    #[error("the message is larger than the limit message_bytes_max, {max} bytes")]
    MessageTooLarge {
        /// The limit.
        max: usize,
    },
    /// A message that is no protobuf of its type, such as text that is not UTF-8.
    #[error("the message cannot be decoded: it is no valid protobuf of its type, or its text is not UTF-8")]
    Undecodable,
    /// The deadline of `grpc-timeout` passed.
    #[error("the deadline passed before the answer was complete")]
    DeadlineExceeded,
    /// Shutdown has begun: other servers can take this.
    #[error("this server is shutting down and takes no new requests")]
    Draining,
    /// The grace for running requests is over.
    #[error("this server has shut down before the answer was complete")]
    Aborted,
    /// A failure of our own making; the log has more.
    #[error("internal error: {0}")]
    Internal(&'static str),
}

impl Classify for ServerError {
    fn is_retryable(&self) -> bool {
        match self {
            Self::Adapter(error) => error.is_retryable(),
            Self::Engine(error) => error.is_retryable(),
            Self::Ledger(error) => error.is_retryable(),
            Self::Epochs(error) => error.is_retryable(),
            Self::Text { source, .. } => source.is_retryable(),
            Self::Busy { .. } | Self::Draining | Self::Aborted => true,
            _ => false,
        }
    }

    fn fault(&self) -> Fault {
        match self {
            Self::Adapter(error) => error.fault(),
            Self::Engine(error) => error.fault(),
            Self::Ledger(error) => error.fault(),
            Self::Epochs(error) => error.fault(),
            Self::Text { source, .. } => source.fault(),
            Self::Invalid(_)
            | Self::Unauthenticated { .. }
            | Self::Forbidden { .. }
            | Self::OutsideNamespace { .. }
            | Self::ForeignAccount { .. }
            | Self::Idle { .. }
            | Self::MessageTooLarge { .. }
            | Self::Undecodable
            | Self::DeadlineExceeded => Fault::Client,
            _ => Fault::Server,
        }
    }
}
