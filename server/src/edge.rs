//! What happens to every gRPC call before its service sees it: authentication, refusal while draining, the deadline, one
//! span, one count by final status. The transport's own errors are given our details on the way out.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use openlora_types::InvalidField;
use tonic::body::Body;
use tonic::codegen::http::{HeaderMap, Request, Response};
use tonic::{Code, Status};
use tower::{Layer, Service};
use tracing::Instrument as _;

use crate::ServerError;
use crate::app::State;
use crate::auth::{self, Authenticator, Call, Caller};

/// The call whose status is known only when its stream ends; it is counted there.
pub(crate) const STREAMING_CALL: &str = "Inference.GenerateStream";

/// Largest `grpc-timeout` that is kept as a deadline; a longer one is none. (Eight digits of hours are 11,000 years.)
const DEADLINE_MAX: Duration = Duration::from_secs(366 * 24 * 3_600);

/// When the caller gives up. Travels in the request's extensions.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Deadline(pub(crate) Instant);

/// Wraps services in an [`Edge`].
#[derive(Clone)]
pub(crate) struct EdgeLayer {
    pub(crate) state: Arc<State>,
    pub(crate) authenticator: Authenticator,
}

impl<S> Layer<S> for EdgeLayer {
    type Service = Edge<S>;

    fn layer(&self, inner: S) -> Edge<S> {
        Edge { inner, layer: self.clone() }
    }
}

/// See the module.
#[derive(Clone)]
pub(crate) struct Edge<S> {
    inner: S,
    layer: EdgeLayer,
}

impl<S> Service<Request<Body>> for Edge<S>
where
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible> + Clone + Send + 'static,
    S::Future: Send,
{
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, Infallible>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut request: Request<Body>) -> Self::Future {
        // The service that is ready is this one; its clone need not be.
        let clone = self.inner.clone();
        let mut inner = std::mem::replace(&mut self.inner, clone);
        let state = Arc::clone(&self.layer.state);
        let call = auth::call(request.uri().path());
        let admitted = self.layer.admit(&mut request, call);
        Box::pin(async move {
            let response = match admitted {
                Err(error) => Status::from(error).into_http(),
                Ok(admitted) => {
                    let span = admitted.span(call);
                    let served = async {
                        match inner.call(request).await {
                            Ok(response) => explain(response, &state),
                            Err(never) => match never {},
                        }
                    };
                    within(admitted.deadline, served).instrument(span).await
                }
            };
            let code = code_of(&response);
            if call.name != STREAMING_CALL || code != Code::Ok {
                state.metrics.call(call.name, code);
            }
            Ok(response)
        })
    }
}

/// What is known of a call that was let in.
struct Admitted {
    caller: Option<Caller>,
    deadline: Option<Deadline>,
}

impl Admitted {
    fn span(&self, call: Call) -> tracing::Span {
        match &self.caller {
            // `request_id` is the client's own; it is shown with `Debug`, so that it cannot forge a line.
            Some(caller) => tracing::info_span!(
                "request",
                call = call.name,
                tenant = &*caller.name,
                request_id = tracing::field::Empty
            ),
            None => tracing::Span::none(),
        }
    }
}

impl EdgeLayer {
    fn admit(&self, request: &mut Request<Body>, call: Call) -> Result<Admitted, ServerError> {
        let caller = self.authenticator.admit(request.headers(), call.access, call.name)?;
        if call.work && self.state.is_draining() {
            return Err(ServerError::Draining);
        }
        let deadline = deadline(request.headers(), Instant::now())?;
        if let Some(caller) = &caller {
            request.extensions_mut().insert(caller.clone());
        }
        if let Some(deadline) = deadline {
            request.extensions_mut().insert(deadline);
        }
        // The key has done its work; nothing behind this line can show it.
        request.headers_mut().remove("authorization");
        request.headers_mut().remove("x-api-key");
        Ok(Admitted { caller, deadline })
    }
}

/// Ends a call that has not begun to answer by its deadline. tonic would say CANCELLED; its timer starts after this one.
async fn within(deadline: Option<Deadline>, served: impl Future<Output = Response<Body>>) -> Response<Body> {
    match deadline {
        None => served.await,
        Some(Deadline(at)) => match tokio::time::timeout_at(at.into(), served).await {
            Ok(response) => response,
            Err(_) => Status::from(ServerError::DeadlineExceeded).into_http(),
        },
    }
}

/// Reads `grpc-timeout`: up to eight digits and a unit.
fn deadline(headers: &HeaderMap, now: Instant) -> Result<Option<Deadline>, ServerError> {
    let Some(value) = headers.get("grpc-timeout") else { return Ok(None) };
    let bad = || InvalidField::new("grpc-timeout", "must be at most eight digits and one of H, M, S, m, u, n");
    let text = value.to_str().map_err(|_| bad())?;
    let (digits, unit) = text.split_at_checked(text.len().saturating_sub(1)).ok_or_else(bad)?;
    if digits.is_empty() || digits.len() > 8 || !digits.bytes().all(|digit| digit.is_ascii_digit()) {
        return Err(bad().into());
    }
    let count: u64 = digits.parse().map_err(|_| bad())?;
    let timeout = match unit {
        "H" => Duration::from_secs(count * 3_600),
        "M" => Duration::from_secs(count * 60),
        "S" => Duration::from_secs(count),
        "m" => Duration::from_millis(count),
        "u" => Duration::from_micros(count),
        "n" => Duration::from_nanos(count),
        _ => return Err(bad().into()),
    };
    if timeout.is_zero() {
        return Err(ServerError::DeadlineExceeded);
    }
    Ok((timeout <= DEADLINE_MAX).then(|| Deadline(now + timeout)))
}

/// The status so far: of a response without a body the final one, else OK.
fn code_of(response: &Response<Body>) -> Code {
    response.headers().get(Status::GRPC_STATUS).map_or(Code::Ok, |code| Code::from_bytes(code.as_bytes()))
}

/// Replaces what tonic says about messages it could not read by what our clients understand.
fn explain(response: Response<Body>, state: &State) -> Response<Body> {
    let code = code_of(&response);
    if !matches!(code, Code::OutOfRange | Code::Internal) {
        return response;
    }
    match Status::from_header_map(response.headers()).and_then(|status| transport_error(&status, state)) {
        Some(error) => Status::from(error).into_http(),
        None => response,
    }
}

/// Our error for a status of tonic's decoder, which is told by its words: it has no other mark.
pub(crate) fn transport_error(status: &Status, state: &State) -> Option<ServerError> {
    match status.code() {
        Code::OutOfRange if status.message().contains("decoded message length too large") => {
            Some(ServerError::MessageTooLarge { max: state.config.limits.message_bytes_max })
        }
        Code::Internal if status.message().contains("failed to decode Protobuf message") => {
            Some(ServerError::Undecodable)
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn deadlines_are_read_in_every_unit_and_nonsense_is_refused() {
        let now = Instant::now();
        let parse = |text: &str| {
            let mut headers = HeaderMap::new();
            headers.insert("grpc-timeout", text.parse().expect("header"));
            deadline(&headers, now).map(|deadline| deadline.map(|Deadline(at)| at - now))
        };
        for (text, expected) in [
            ("1H", Duration::from_secs(3_600)),
            ("2M", Duration::from_secs(120)),
            ("3S", Duration::from_secs(3)),
            ("99999999m", Duration::from_millis(99_999_999)),
            ("5u", Duration::from_micros(5)),
            ("6n", Duration::from_nanos(6)),
        ] {
            assert_eq!(parse(text).expect(text), Some(expected));
        }
        assert_eq!(parse("99999999H").expect("far away"), None);
        for bad in ["", "S", "1", "1s", "-1S", "1.5S", "123456789S", "+1S", "1SS"] {
            assert!(matches!(parse(bad), Err(ServerError::Invalid(field)) if field.field == "grpc-timeout"), "{bad}");
        }
        assert!(matches!(parse("0S"), Err(ServerError::DeadlineExceeded)));
        assert!(deadline(&HeaderMap::new(), now).expect("no deadline").is_none());
    }
}
