//! The HTTP door: `/metrics` for Prometheus, `/healthz` (is the process worth keeping) and `/readyz` (should traffic come).

use std::sync::Arc;

use axum::Router;
use axum::extract::{Request, State as AxumState};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;

use crate::ServerError;
use crate::app::State;
use crate::auth::{Access, Authenticator, METRICS};

#[derive(Clone)]
struct Http {
    state: Arc<State>,
    authenticator: Authenticator,
}

/// The routes of the door.
pub(crate) fn router(state: Arc<State>, authenticator: Authenticator) -> Router {
    Router::new()
        .route("/metrics", get(metrics))
        .route("/healthz", get(healthz))
        .route("/readyz", get(readyz))
        .fallback(async |request: Request| {
            drop(request);
            (StatusCode::NOT_FOUND, "not found: this door has /metrics, /healthz and /readyz\n")
        })
        .with_state(Http { state, authenticator })
}

async fn metrics(AxumState(http): AxumState<Http>, headers: HeaderMap) -> Response {
    let access = if http.state.config.metrics_public { Access::Open } else { METRICS };
    if let Err(error) = http.authenticator.admit(&headers, access, "/metrics") {
        return refuse(&error);
    }
    let state = http.state;
    let text =
        tokio::task::spawn_blocking(move || state.metrics.render(&state.app.engine.stats(), &state.app.store.stats()));
    match text.await {
        Ok(Ok(text)) => ([(header::CONTENT_TYPE, prometheus::TEXT_FORMAT)], text).into_response(),
        _ => (StatusCode::INTERNAL_SERVER_ERROR, "metrics could not be gathered\n").into_response(),
    }
}

/// 503 once the engine is dead: nothing but a restart helps.
async fn healthz(AxumState(http): AxumState<Http>) -> Response {
    if http.state.app.engine.is_alive() {
        "ok\n".into_response()
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, "the engine has stopped\n").into_response()
    }
}

/// 503 while draining as well.
async fn readyz(AxumState(http): AxumState<Http>) -> Response {
    match (http.state.is_ready(), http.state.is_draining()) {
        (true, _) => "ready\n".into_response(),
        (false, true) => (StatusCode::SERVICE_UNAVAILABLE, "draining\n").into_response(),
        (false, false) => (StatusCode::SERVICE_UNAVAILABLE, "the engine has stopped\n").into_response(),
    }
}

fn refuse(error: &ServerError) -> Response {
    let text = format!("{error}\n");
    match error {
        ServerError::Unauthenticated { .. } => {
            (StatusCode::UNAUTHORIZED, [(header::WWW_AUTHENTICATE, "Bearer")], text).into_response()
        }
        _ => (StatusCode::FORBIDDEN, text).into_response(),
    }
}
