//! JSON-RPC over HTTP to a chain's node: bounded in time, bytes and tries, and silent about what its URL holds.
//!
//! A provider's URL carries its API key, so no error, event or `Debug` of this file shows more than scheme and host, and
//! what a node says is scrubbed of the rest before it is repeated.

use std::{
    fmt,
    sync::{
        Arc, Once,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use alloy::primitives::Bytes;
use openlora_types::{Classify, Fault, InvalidField};
use reqwest::{StatusCode, Url, header::CONTENT_TYPE, redirect::Policy};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::{Map, Value, json};

/// Characters of a node's message that are repeated.
const MESSAGE_CHARS_MAX: usize = 400;
/// Parts of a path or query that are shorter are words such as `v2`, not keys.
const SECRET_CHARS_MIN: usize = 4;
/// What stands in the place of a secret.
const HIDDEN: &str = "…";

/// Where a node listens. Shown as scheme and host alone.
#[derive(Clone, PartialEq, Eq)]
pub struct RpcUrl(Url);

impl RpcUrl {
    /// A URL as in the settings.
    ///
    /// # Errors
    /// [`InvalidField`] on `field` for what is no URL of HTTP. It does not repeat the text.
    pub fn parse(field: &str, text: &str) -> Result<Self, InvalidField> {
        match Url::parse(text) {
            Ok(url) if ["http", "https"].contains(&url.scheme()) && url.has_host() => Ok(Self(url)),
            _ => Err(InvalidField::new(field, "must be the URL of a node, beginning with https:// or http://")),
        }
    }

    /// `text` without what the URL keeps secret, and not endless.
    fn scrub(&self, text: &str) -> String {
        let mut text = text.replace(self.0.as_str(), &self.to_string());
        let parts = self.0.path_segments().into_iter().flatten();
        let values = self.0.query_pairs().map(|(_, value)| value.into_owned());
        let long = parts.map(str::to_owned).chain(values).filter(|part| part.len() >= SECRET_CHARS_MIN);
        let user = [self.0.username(), self.0.password().unwrap_or_default()].map(str::to_owned);
        for secret in long.chain(user).filter(|secret| !secret.is_empty()) {
            text = text.replace(&secret, HIDDEN);
        }
        match text.char_indices().nth(MESSAGE_CHARS_MAX) {
            Some((at, _)) => format!("{}{HIDDEN}", &text[..at]),
            None => text,
        }
    }
}

impl fmt::Display for RpcUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}://{}", self.0.scheme(), self.0.host_str().unwrap_or_default())?;
        self.0.port().map_or(Ok(()), |port| write!(f, ":{port}"))
    }
}

impl fmt::Debug for RpcUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RpcUrl({self})")
    }
}

/// Bounds of a conversation with a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RpcConfig {
    /// How long one answer may take.
    pub timeout: Duration,
    /// Bytes of one answer.
    pub response_bytes_max: usize,
    /// How often a question is asked that the node does not answer. Transactions are sent once per turn.
    pub tries: u32,
    /// The pause before the second try; it doubles for each that follows.
    pub backoff: Duration,
}

impl Default for RpcConfig {
    fn default() -> Self {
        Self {
            timeout: Duration::from_secs(10),
            response_bytes_max: 4 << 20,
            tries: 4,
            backoff: Duration::from_millis(250),
        }
    }
}

/// Why a node did not answer a question.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RpcError {
    /// No answer, or one that is cut off or no JSON-RPC: whether the node did what it was asked is unknown.
    #[error("{host} gave no answer to {method}: {why}")]
    Unknown {
        /// Scheme and host.
        host: String,
        /// What was asked.
        method: &'static str,
        /// What came instead.
        why: String,
    },
    /// An answer that is too long to be read.
    #[error("{host} answers {method} with more than {max} bytes (response_bytes_max)")]
    TooLong {
        /// Scheme and host.
        host: String,
        /// What was asked.
        method: &'static str,
        /// The bound.
        max: usize,
    },
    /// The node said no.
    #[error("{host} refused {method}: {message} ({code})")]
    Refused {
        /// Scheme and host.
        host: String,
        /// What was asked.
        method: &'static str,
        /// JSON-RPC's number.
        code: i64,
        /// The node's words, scrubbed.
        message: String,
        /// What a contract reverted with.
        data: Option<Bytes>,
    },
}

impl Classify for RpcError {
    fn is_retryable(&self) -> bool {
        match self {
            Self::Unknown { .. } | Self::TooLong { .. } => true,
            // Requests are limited (Infura, Alchemy); "resource unavailable".
            Self::Refused { code, .. } => [-32005, -32002, 429].contains(code),
        }
    }

    fn fault(&self) -> Fault {
        Fault::Upstream
    }
}

/// A connection to a node.
#[derive(Clone)]
pub(crate) struct Rpc {
    client: reqwest::Client,
    url: Arc<RpcUrl>,
    config: RpcConfig,
    ids: Arc<AtomicU64>,
}

impl fmt::Debug for Rpc {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Rpc({})", self.url)
    }
}

impl Rpc {
    pub(crate) fn new(url: &RpcUrl, config: RpcConfig) -> Result<Self, RpcError> {
        static PROVIDER: Once = Once::new();
        PROVIDER.call_once(|| {
            // Another room may have been first; then theirs is used.
            let _installed = rustls::crypto::ring::default_provider().install_default();
        });
        let builder = reqwest::Client::builder().timeout(config.timeout).redirect(Policy::none());
        let client = builder.build().map_err(|error| RpcError::Unknown {
            host: url.to_string(),
            method: "the first question",
            why: url.scrub(&error.without_url().to_string()),
        })?;
        Ok(Self { client, url: Arc::new(url.clone()), config, ids: Arc::default() })
    }

    /// Asks, again where there is no answer.
    ///
    /// # Errors
    /// [`RpcError`] of the last try.
    pub(crate) async fn ask<T: DeserializeOwned>(
        &self,
        method: &'static str,
        params: impl Serialize,
    ) -> Result<T, RpcError> {
        let mut pause = self.config.backoff;
        for _ in 1..self.config.tries {
            match self.ask_once(method, &params).await {
                Err(error) if error.is_retryable() => {
                    tracing::debug!(%error, "asking the node again");
                    tokio::time::sleep(pause).await;
                    pause = pause.saturating_mul(2);
                }
                done => return done,
            }
        }
        self.ask_once(method, &params).await
    }

    /// Asks once.
    ///
    /// # Errors
    /// [`RpcError`].
    pub(crate) async fn ask_once<T: DeserializeOwned>(
        &self,
        method: &'static str,
        params: impl Serialize,
    ) -> Result<T, RpcError> {
        let id = self.ids.fetch_add(1, Ordering::Relaxed);
        let question = json!({ "jsonrpc": "2.0", "id": id, "method": method, "params": params }).to_string();
        let (status, body) = self.exchange(question).await.map_err(|why| self.unknown(method, &why))?;
        let Some(body) = body else {
            return Err(RpcError::TooLong { host: self.url.to_string(), method, max: self.config.response_bytes_max });
        };
        let answer = serde_json::from_slice::<Map<String, Value>>(&body);
        // An error in JSON-RPC may come with any status.
        let Ok(mut answer) = answer else {
            return Err(self.unknown(method, &format!("status {status} and no JSON-RPC")));
        };
        if let Some(error) = answer.remove("error").filter(|error| !error.is_null()) {
            return Err(self.refused(method, &error));
        }
        if answer.get("id").and_then(Value::as_u64) != Some(id) {
            return Err(self.unknown(method, "the answer to another question"));
        }
        let result = answer.remove("result").ok_or_else(|| self.unknown(method, "an answer without a result"))?;
        serde_json::from_value(result)
            .map_err(|error| self.unknown(method, &format!("a result not understood: {error}")))
    }

    /// The answer's status and body; no body where it is too long.
    async fn exchange(&self, question: String) -> Result<(StatusCode, Option<Vec<u8>>), String> {
        let why = |error: reqwest::Error| {
            let mut error: &dyn std::error::Error = &error.without_url();
            let mut text = error.to_string();
            while let Some(source) = error.source() {
                text = format!("{text}: {source}");
                error = source;
            }
            text
        };
        let request = self.client.post(self.url.0.clone()).header(CONTENT_TYPE, "application/json").body(question);
        let mut response = request.send().await.map_err(why)?;
        let mut body = Vec::new();
        while let Some(chunk) = response.chunk().await.map_err(why)? {
            if body.len() + chunk.len() > self.config.response_bytes_max {
                return Ok((response.status(), None));
            }
            body.extend_from_slice(&chunk);
        }
        Ok((response.status(), Some(body)))
    }

    /// No answer, or none that makes sense.
    pub(crate) fn unknown(&self, method: &'static str, why: &str) -> RpcError {
        RpcError::Unknown { host: self.url.to_string(), method, why: self.url.scrub(why) }
    }

    fn refused(&self, method: &'static str, error: &Value) -> RpcError {
        let message = error.get("message").and_then(Value::as_str).unwrap_or("without a message");
        // Geth puts a revert's bytes there as text, others in an object.
        let data = error.get("data").map(|data| data.get("data").unwrap_or(data)).and_then(Value::as_str);
        RpcError::Refused {
            host: self.url.to_string(),
            method,
            code: error.get("code").and_then(Value::as_i64).unwrap_or_default(),
            message: self.url.scrub(message),
            data: data.and_then(|data| data.parse().ok()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_shows_its_host_and_nothing_else() {
        let url = RpcUrl::parse("rpc", "https://user:pass@node.example:8443/v2/KEY-0123456789?token=TOKEN-1#f")
            .expect("a URL");
        for shown in [url.to_string(), format!("{url:?}"), format!("{:?}", Rpc::new(&url, RpcConfig::default()))] {
            assert!(shown.contains("https://node.example:8443"), "{shown}");
            for secret in ["user", "pass", "KEY", "TOKEN", "v2"] {
                assert!(!shown.contains(secret), "{shown}");
            }
        }
        let said = url.scrub("no such project KEY-0123456789 (user, pass, TOKEN-1) on v2");
        assert_eq!(said, "no such project … (…, …, …) on v2");
        assert_eq!(url.scrub(&"é".repeat(1_000)).chars().count(), MESSAGE_CHARS_MAX + 1);
    }

    #[test]
    fn what_is_no_url_of_a_node_is_refused_without_being_repeated() {
        for text in ["", "node.example/KEY-0123456789", "ftp://node.example/KEY-0123456789", "https://"] {
            let error = RpcUrl::parse("rpc", text).expect_err(text).to_string();
            assert!(error.contains("rpc") && !error.contains("KEY"), "{error}");
        }
    }
}
