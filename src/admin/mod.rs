//! Health, metrics and status over HTTP: `/livez`, `/readyz`, `/metrics`, `/status` (DESIGN section 10).
//!
//! Read-only and without a password: it listens on loopback unless the configuration says otherwise. It runs on the
//! telemetry runtime, never on an arbiter, so that it answers while an actor is stuck.

mod status;

use std::fmt::Write as _;
use std::io;
use std::net::TcpListener as StdListener;
use std::sync::Arc;

use axum::extract::{RawQuery, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use prometheus::{Registry, TEXT_FORMAT, TextEncoder};
use tokio::net::TcpListener;

pub use status::{
    AgentStatus, BreakerStatus, CertificateStatus, Check, FlowStatus, KafkaTrouble, LinkStatus, MailboxStatus,
    MassMisses, Outcomes, Readiness, RetentionGap, ServerStatus, SessionStatus, Status, StatusSource, WaitingFor,
};

/// Why the admin interface cannot be offered. Retrying helps only once somebody has changed something.
#[derive(Debug, thiserror::Error)]
pub enum AdminError {
    /// The address of `admin.listen` cannot be listened on.
    #[error("cannot serve the admin interface on {listen}: {source}")]
    Bind { listen: String, source: io::Error },
}

/// Listens on `host:port`; port 0 takes any that is free. Needs no runtime.
///
/// # Errors
///
/// [`AdminError::Bind`] when the address is taken, not ours, or no address.
pub fn bind(listen: &str) -> Result<StdListener, AdminError> {
    let bound = StdListener::bind(listen).and_then(|listener| {
        listener.set_nonblocking(true)?;
        Ok(listener)
    });
    bound.map_err(|source| AdminError::Bind {
        listen: listen.to_owned(),
        source,
    })
}

/// Serves until `shutdown` is done and the requests at hand are answered.
///
/// # Errors
///
/// What accepting connections may fail with.
pub async fn serve(
    listener: TcpListener,
    source: Arc<dyn StatusSource>,
    registry: Registry,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> io::Result<()> {
    let router = Router::new()
        .route("/livez", get(livez))
        .route("/readyz", get(readyz))
        .route("/metrics", get(metrics))
        .route("/status", get(status))
        .with_state(Shared { source, registry });
    axum::serve(listener, router).with_graceful_shutdown(shutdown).await
}

#[derive(Clone)]
struct Shared {
    source: Arc<dyn StatusSource>,
    registry: Registry,
}

/// That there is an answer is the answer.
async fn livez() -> &'static str {
    "ok\n"
}

async fn readyz(State(shared): State<Shared>, RawQuery(query): RawQuery) -> (StatusCode, String) {
    let readiness = shared.source.ready();
    let (code, word) = match (readiness.ready, readiness.degraded) {
        (false, _) => (StatusCode::SERVICE_UNAVAILABLE, "not ready"),
        (true, true) => (StatusCode::OK, "degraded"),
        (true, false) => (StatusCode::OK, "ready"),
    };
    let verbose = query.is_some_and(|query| query.split('&').any(|part| part.split('=').next() == Some("verbose")));
    let mut body = format!("{word}\n");
    if verbose {
        for Check {
            name,
            ok,
            gates,
            detail,
        } in &readiness.checks
        {
            let mark = if *ok { "ok" } else { "failed" };
            let weight = if *gates { "" } else { " (does not gate)" };
            let colon = if detail.is_empty() { "" } else { ": " };
            // Writing to a String cannot fail.
            let _ = writeln!(body, "[{mark}] {name}{weight}{colon}{detail}");
        }
    }
    (code, body)
}

async fn metrics(State(shared): State<Shared>) -> Response {
    let mut text = String::new();
    match TextEncoder::new().encode_utf8(&shared.registry.gather(), &mut text) {
        Ok(()) => ([(header::CONTENT_TYPE, TEXT_FORMAT)], text).into_response(),
        Err(error) => {
            tracing::error!(%error, "cannot write metrics");
            StatusCode::INTERNAL_SERVER_ERROR.into_response()
        }
    }
}

async fn status(State(shared): State<Shared>) -> Json<Status> {
    Json(shared.source.status())
}

#[cfg(test)]
mod tests;
