//! The one place where errors become gRPC statuses, with google.rpc details: which field (BadRequest), when to come back
//! (RetryInfo), which limit (QuotaFailure), and a stable reason for programs (ErrorInfo, domain `openlora`).
//!
//! What a client cannot act on (paths, panics, system errors) is logged and not sent.

use std::collections::HashMap;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use openlora_adapters::AdapterError;
use openlora_engine::EngineError;
use openlora_ledger::LedgerError;
use openlora_model::text::TextError;
use openlora_types::{Classify, Fault, InvalidField};
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt as _};

use crate::ServerError;
use crate::epochs::EpochsError;

/// `ErrorInfo.domain` of every status.
pub const ERROR_DOMAIN: &str = "openlora";

/// Sent where the error itself knows no better time.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// A status in the making.
struct Answer {
    code: Code,
    reason: &'static str,
    message: String,
    details: ErrorDetails,
    metadata: HashMap<String, String>,
}

impl Answer {
    fn new(code: Code, reason: &'static str, message: impl Into<String>) -> Self {
        Self { code, reason, message: message.into(), details: ErrorDetails::new(), metadata: HashMap::new() }
    }

    fn retry(mut self, after: Duration) -> Self {
        self.details.set_retry_info(Some(after));
        self
    }

    fn field(mut self, field: &InvalidField) -> Self {
        self.details.add_bad_request_violation(&field.field, &field.reason);
        self
    }

    fn quota(mut self, limit: &str, max: impl std::fmt::Display) -> Self {
        self.details.add_quota_failure_violation(limit, format!("the limit {limit} is {max}"));
        self.metadata.insert("limit".into(), limit.into());
        self.metadata.insert("max".into(), max.to_string());
        self
    }

    fn resource(mut self, kind: &str, name: &str) -> Self {
        self.details.set_resource_info(kind, name, "", &self.message);
        self
    }

    fn into_status(mut self) -> Status {
        self.details.set_error_info(self.reason, ERROR_DOMAIN, self.metadata);
        Status::with_error_details(self.code, self.message, self.details)
    }
}

/// The status of an error.
pub(crate) fn status(error: &ServerError) -> Status {
    answer(error).into_status()
}

impl From<ServerError> for Status {
    fn from(error: ServerError) -> Self {
        if error.fault() != Fault::Client && !error.is_retryable() {
            tracing::error!(%error, "request failed");
        }
        status(&error)
    }
}

fn answer(error: &ServerError) -> Answer {
    let text = error.to_string();
    match error {
        ServerError::Invalid(field) => invalid(field),
        ServerError::Unauthenticated { .. } => Answer::new(Code::Unauthenticated, "UNAUTHENTICATED", text),
        ServerError::Forbidden { .. } => Answer::new(Code::PermissionDenied, "ROLE_NOT_ALLOWED", text),
        ServerError::OutsideNamespace { alias, .. } => {
            Answer::new(Code::PermissionDenied, "OUTSIDE_NAMESPACE", text).resource("adapter", alias)
        }
        ServerError::ForeignAccount { account, .. } => {
            Answer::new(Code::PermissionDenied, "NOT_YOUR_ACCOUNT", text).resource("account", account)
        }
        ServerError::Text { source: TextError::Invalid(field), .. } => invalid(field),
        ServerError::Text { field, source } if source.fault() == Fault::Client => {
            invalid(&InvalidField::new(*field, source.to_string()))
        }
        ServerError::Adapter(error) => adapter(error),
        ServerError::Engine(error) => engine(error),
        ServerError::Ledger(error) => ledger(error),
        ServerError::Epochs(error) => epochs(error),
        ServerError::Busy { limit, max, retry_after, .. } => {
            Answer::new(Code::ResourceExhausted, "TOO_MANY_AT_ONCE", text).quota(limit, max).retry(*retry_after)
        }
        ServerError::Idle { .. } => Answer::new(Code::DeadlineExceeded, "CLIENT_TOO_SLOW", text),
        ServerError::MessageTooLarge { max } => {
            Answer::new(Code::ResourceExhausted, "MESSAGE_TOO_LARGE", text).quota("message_bytes_max", max)
        }
        ServerError::Undecodable => {
            invalid(&InvalidField::new("message", "is no valid protobuf of its type, or its text is not UTF-8"))
        }
        ServerError::DeadlineExceeded => Answer::new(Code::DeadlineExceeded, "DEADLINE_EXCEEDED", text),
        ServerError::Draining | ServerError::Aborted => {
            Answer::new(Code::Unavailable, "SHUTTING_DOWN", text).retry(RETRY_AFTER)
        }
        ServerError::EngineDied(_) => dead(),
        _ => internal(),
    }
}

fn adapter(error: &AdapterError) -> Answer {
    let text = error.to_string();
    match error {
        AdapterError::Invalid(field) => invalid(field),
        AdapterError::AlreadyExists { alias, .. } => {
            Answer::new(Code::AlreadyExists, "ALIAS_TAKEN", text).resource("adapter", alias)
        }
        AdapterError::NotFound { name } => {
            Answer::new(Code::NotFound, "ADAPTER_NOT_FOUND", text).resource("adapter", name)
        }
        AdapterError::PermissionDenied { alias } => {
            Answer::new(Code::PermissionDenied, "NOT_THE_OWNER", text).resource("adapter", alias)
        }
        AdapterError::QuotaDenied { .. } => Answer::new(Code::PermissionDenied, "NOT_THE_OWNER", text),
        AdapterError::Conflict { alias, .. } => {
            Answer::new(Code::FailedPrecondition, "GENERATION_MISMATCH", text).resource("adapter", alias)
        }
        AdapterError::LimitReached { limit, max, passes, .. } => {
            let answer = Answer::new(Code::ResourceExhausted, "LIMIT_REACHED", text).quota(limit, max);
            if *passes { answer.retry(RETRY_AFTER) } else { answer }
        }
        AdapterError::Corrupt { generation, .. } => {
            let text = format!("the stored files of generation {generation} are damaged; register the adapter again");
            Answer::new(Code::Internal, "ADAPTER_DAMAGED", text).resource("adapter", &generation.to_string())
        }
        AdapterError::Io { .. } | AdapterError::Database { .. } => Answer::new(
            Code::Unavailable,
            "STORE_UNAVAILABLE",
            "the adapter store is not available; the server's log says why",
        )
        .retry(RETRY_AFTER),
        other => fallback(other),
    }
}

fn engine(error: &EngineError) -> Answer {
    let text = error.to_string();
    match error {
        EngineError::Invalid(field) => invalid(field),
        EngineError::Load(error) => adapter(error),
        EngineError::Adapter(reason) => invalid(&InvalidField::new("adapter", format!("cannot be served: {reason}"))),
        EngineError::QueueFull { max, retry_after, .. } => Answer::new(Code::ResourceExhausted, "QUEUE_FULL", text)
            .quota("waiting_requests_max", max)
            .retry(*retry_after),
        EngineError::TenantQueueFull { max, retry_after, .. } => {
            Answer::new(Code::ResourceExhausted, "TENANT_QUEUE_FULL", text)
                .quota("waiting_requests_per_tenant_max", max)
                .retry(*retry_after)
        }
        EngineError::SlowReader { max } => {
            Answer::new(Code::ResourceExhausted, "SLOW_READER", text).quota("stream_events_max", max)
        }
        EngineError::DeadlineExceeded => Answer::new(Code::DeadlineExceeded, "DEADLINE_EXCEEDED", text),
        EngineError::Draining => Answer::new(Code::Unavailable, "SHUTTING_DOWN", text).retry(RETRY_AFTER),
        EngineError::Dead(_) => dead(),
        other => fallback(other),
    }
}

fn ledger(error: &LedgerError) -> Answer {
    let text = error.to_string();
    match error {
        LedgerError::Invalid(field) => invalid(field),
        LedgerError::KeyReused { .. } => Answer::new(Code::AlreadyExists, "KEY_REUSED", text),
        LedgerError::Unfunded { account, .. } => {
            Answer::new(Code::FailedPrecondition, "UNFUNDED", text).resource("account", &account.to_string())
        }
        LedgerError::OverQuota { max, .. } => {
            Answer::new(Code::ResourceExhausted, "OVER_QUOTA", text).quota("quota", max).retry(until_midnight())
        }
        LedgerError::TooManyOpen { max, .. } => Answer::new(Code::ResourceExhausted, "TOO_MANY_OPEN", text)
            .quota("open_reservations_max", max)
            .retry(RETRY_AFTER),
        LedgerError::NoTerms { target, .. } => {
            Answer::new(Code::FailedPrecondition, "NO_TERMS", text).resource("terms", target)
        }
        LedgerError::NotFound { what, name } => {
            Answer::new(Code::NotFound, "NOT_IN_THE_LEDGER", text).resource(what, name)
        }
        LedgerError::EmptyEpoch { .. } => Answer::new(Code::FailedPrecondition, "EMPTY_EPOCH", text),
        LedgerError::NobodyPaid => Answer::new(Code::FailedPrecondition, "NOBODY_PAID", text),
        LedgerError::Damaged { row, .. } => {
            let text = format!("row {row} of the ledger is damaged; the operator runs `openlora ledger verify`");
            Answer::new(Code::Internal, "LEDGER_DAMAGED", text)
        }
        LedgerError::LimitReached { limit, max, .. } => {
            Answer::new(Code::ResourceExhausted, "LIMIT_REACHED", text).quota(limit, max)
        }
        LedgerError::Database(_) | LedgerError::Stopped => Answer::new(
            Code::Unavailable,
            "LEDGER_UNAVAILABLE",
            "the ledger is not available; the server's log says why",
        )
        .retry(RETRY_AFTER),
        other => fallback(other),
    }
}

/// Quotas are of days in UTC.
fn until_midnight() -> Duration {
    const DAY_S: u64 = 24 * 60 * 60;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    Duration::from_secs(DAY_S - now % DAY_S)
}

fn epochs(error: &EpochsError) -> Answer {
    let text = error.to_string();
    match error {
        EpochsError::NotConfigured { setting, .. } => {
            let mut answer = Answer::new(Code::FailedPrecondition, "NOT_CONFIGURED", text);
            answer.metadata.insert("setting".into(), (*setting).into());
            answer
        }
        EpochsError::NotFound { what, name, .. } => {
            Answer::new(Code::NotFound, "NOT_IN_THE_LEDGER", text).resource(what, name)
        }
        EpochsError::Refused { reason, .. } => Answer::new(Code::FailedPrecondition, reason, text),
        EpochsError::Unavailable { .. } => {
            Answer::new(Code::Unavailable, "SETTLEMENT_UNAVAILABLE", text).retry(RETRY_AFTER)
        }
        EpochsError::Busy { max } => {
            let answer = Answer::new(Code::ResourceExhausted, "TOO_MANY_AT_ONCE", text);
            answer.quota("epoch_calls_max", max).retry(RETRY_AFTER)
        }
        EpochsError::Ledger(error) => ledger(error),
        EpochsError::Internal(_) => internal(),
    }
}

fn invalid(field: &InvalidField) -> Answer {
    Answer::new(Code::InvalidArgument, "INVALID_FIELD", field.to_string()).field(field)
}

fn dead() -> Answer {
    Answer::new(Code::Unavailable, "ENGINE_STOPPED", "the engine has stopped; the server's log says why")
}

fn internal() -> Answer {
    Answer::new(Code::Internal, "INTERNAL", "internal error; the server's log says more")
}

/// For variants younger than this function: never tells a client that its request was wrong when it was not.
fn fallback(error: &(impl Classify + std::fmt::Display)) -> Answer {
    match (error.fault(), error.is_retryable()) {
        (Fault::Client, _) => Answer::new(Code::FailedPrecondition, "REFUSED", error.to_string()),
        (_, true) => Answer::new(Code::Unavailable, "UNAVAILABLE", "temporarily unavailable").retry(RETRY_AFTER),
        _ => internal(),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use openlora_types::Generation;

    use super::*;
    use crate::keys::Role;

    fn field(name: &str) -> InvalidField {
        InvalidField::new(name, "must be something else")
    }

    #[test]
    fn every_error_has_its_code_its_reason_and_our_domain() {
        let generation = Generation([7; 32]);
        let io = || Arc::new(std::io::Error::other("no space on /secret/path"));
        let second = Duration::from_secs(1);
        let cases: Vec<(ServerError, Code, &str)> = vec![
            (field("sampling.n").into(), Code::InvalidArgument, "INVALID_FIELD"),
            (ServerError::Unauthenticated { reason: "no key" }, Code::Unauthenticated, "UNAUTHENTICATED"),
            (
                ServerError::Forbidden { call: "Adapters.Upload".into(), role: Role::App },
                Code::PermissionDenied,
                "ROLE_NOT_ALLOWED",
            ),
            (
                ServerError::OutsideNamespace { alias: "a/b".into(), owner: "c".into() },
                Code::PermissionDenied,
                "OUTSIDE_NAMESPACE",
            ),
            (
                AdapterError::AlreadyExists { alias: "a".into(), reason: "is taken" }.into(),
                Code::AlreadyExists,
                "ALIAS_TAKEN",
            ),
            (AdapterError::NotFound { name: "a".into() }.into(), Code::NotFound, "ADAPTER_NOT_FOUND"),
            (AdapterError::PermissionDenied { alias: "a".into() }.into(), Code::PermissionDenied, "NOT_THE_OWNER"),
            (
                AdapterError::Conflict { alias: "a".into(), expected: generation, found: generation }.into(),
                Code::FailedPrecondition,
                "GENERATION_MISMATCH",
            ),
            (
                AdapterError::Corrupt { generation, reason: "bits of /secret/path".into() }.into(),
                Code::Internal,
                "ADAPTER_DAMAGED",
            ),
            (
                AdapterError::Io { action: "write /secret/path".into(), source: io() }.into(),
                Code::Unavailable,
                "STORE_UNAVAILABLE",
            ),
            (EngineError::Dead("panicked at /secret/path".into()).into(), Code::Unavailable, "ENGINE_STOPPED"),
            (EngineError::DeadlineExceeded.into(), Code::DeadlineExceeded, "DEADLINE_EXCEEDED"),
            (EngineError::Draining.into(), Code::Unavailable, "SHUTTING_DOWN"),
            (EngineError::SlowReader { max: 1 }.into(), Code::ResourceExhausted, "SLOW_READER"),
            (ServerError::DeadlineExceeded, Code::DeadlineExceeded, "DEADLINE_EXCEEDED"),
            (ServerError::Idle { what: "a chunk", limit: second }, Code::DeadlineExceeded, "CLIENT_TOO_SLOW"),
            (ServerError::MessageTooLarge { max: 4 }, Code::ResourceExhausted, "MESSAGE_TOO_LARGE"),
            (ServerError::Undecodable, Code::InvalidArgument, "INVALID_FIELD"),
            (
                LedgerError::NoTerms { what: "split".into(), target: "base".into() }.into(),
                Code::FailedPrecondition,
                "NO_TERMS",
            ),
            (LedgerError::Stopped.into(), Code::Unavailable, "LEDGER_UNAVAILABLE"),
            (
                LedgerError::TooManyOpen { application: "shop".into(), max: 1 }.into(),
                Code::ResourceExhausted,
                "TOO_MANY_OPEN",
            ),
            (ServerError::Draining, Code::Unavailable, "SHUTTING_DOWN"),
            (
                ServerError::ForeignAccount { account: "owner/a".into(), name: "b".into() },
                Code::PermissionDenied,
                "NOT_YOUR_ACCOUNT",
            ),
            (LedgerError::EmptyEpoch { last: 3 }.into(), Code::FailedPrecondition, "EMPTY_EPOCH"),
            (LedgerError::NotFound { what: "epoch", name: "4".into() }.into(), Code::NotFound, "NOT_IN_THE_LEDGER"),
            (LedgerError::Stopped.into(), Code::Unavailable, "LEDGER_UNAVAILABLE"),
            (
                LedgerError::Damaged { row: 9, reason: "bits of /secret/path".into() }.into(),
                Code::Internal,
                "LEDGER_DAMAGED",
            ),
            (
                EpochsError::NotConfigured { setting: "a.b", next: "set it" }.into(),
                Code::FailedPrecondition,
                "NOT_CONFIGURED",
            ),
            (
                EpochsError::NotFound { what: "epoch", name: "4".into(), next: "" }.into(),
                Code::NotFound,
                "NOT_IN_THE_LEDGER",
            ),
            (
                EpochsError::Refused { reason: "OTHER_ROOT", message: "it has another".into() }.into(),
                Code::FailedPrecondition,
                "OTHER_ROOT",
            ),
            (EpochsError::Unavailable { what: "the node" }.into(), Code::Unavailable, "SETTLEMENT_UNAVAILABLE"),
            (EpochsError::Busy { max: 4 }.into(), Code::ResourceExhausted, "TOO_MANY_AT_ONCE"),
            (EpochsError::Ledger(LedgerError::Stopped).into(), Code::Unavailable, "LEDGER_UNAVAILABLE"),
            (EpochsError::Internal("details in /secret/path").into(), Code::Internal, "INTERNAL"),
            (ServerError::Internal("details in /secret/path"), Code::Internal, "INTERNAL"),
        ];
        for (error, code, reason) in cases {
            let status = status(&error);
            assert_eq!(status.code(), code, "{error}");
            let info = status.get_details_error_info().expect("ErrorInfo");
            assert_eq!((info.reason.as_str(), info.domain.as_str()), (reason, ERROR_DOMAIN), "{error}");
            assert!(!status.message().contains("/secret/path"), "{status}");
        }
    }

    #[test]
    fn refused_fields_are_named_in_bad_request() {
        for error in [
            ServerError::from(field("sampling.top_p")),
            AdapterError::Invalid(field("sampling.top_p")).into(),
            EngineError::Invalid(field("sampling.top_p")).into(),
            LedgerError::Invalid(field("sampling.top_p")).into(),
        ] {
            let details = status(&error).get_details_bad_request().expect("BadRequest");
            assert_eq!(details.field_violations[0].field, "sampling.top_p");
            assert_eq!(details.field_violations[0].description, "must be something else");
        }
    }

    #[test]
    fn a_full_queue_says_when_to_come_back_and_which_limit_it_was() {
        let retry_after = Duration::from_millis(1_500);
        for (error, limit) in [
            (EngineError::QueueFull { waiting: 8, max: 8, retry_after }.into(), "waiting_requests_max"),
            (
                EngineError::TenantQueueFull { waiting: 8, max: 8, retry_after }.into(),
                "waiting_requests_per_tenant_max",
            ),
            (ServerError::Busy { what: "uploads", limit: "uploads_max", max: 8, retry_after }, "uploads_max"),
        ] {
            let status = status(&error);
            assert_eq!(status.code(), Code::ResourceExhausted);
            assert_eq!(status.get_details_retry_info().expect("RetryInfo").retry_delay, Some(retry_after));
            assert_eq!(status.get_details_quota_failure().expect("QuotaFailure").violations[0].subject, limit);
            assert_eq!(status.get_details_error_info().expect("ErrorInfo").metadata["max"], "8");
        }
    }
}
