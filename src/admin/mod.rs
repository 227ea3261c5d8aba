//! Health, metrics and status over HTTP: `/livez`, `/readyz`, `/metrics`, `/status` (DESIGN section 10), `/tap` and
//! `/log-level`.
//!
//! Without a password, and read-only but for the log level: it listens on loopback unless the configuration says otherwise. It runs on the
//! telemetry runtime, never on an arbiter, so that it answers while an actor is stuck.

mod log_level;
mod server;
mod status;
mod tap;
mod troubles;

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
use tokio::sync::watch;

use crate::telemetry::Taps;

pub use status::{
    AgentStatus, BreakerStatus, CanaryStatus, CertificateStatus, Check, FlowStatus, FrontDoorStatus, KafkaTrouble,
    LinkStatus, MailboxStatus, MassMisses, Outcomes, Readiness, RetentionGap, ServerStatus, SessionStatus, StageStatus,
    StallStatus, Status, StatusSource, WaitingFor,
};
pub use troubles::Trouble;

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

/// What is offered.
pub struct Offers {
    /// Of `/livez`, `/readyz` and `/status`.
    pub source: Arc<dyn StatusSource>,
    /// Of `/metrics`.
    pub registry: Registry,
    /// Of `/tap`.
    pub taps: Arc<Taps>,
}

/// Serves until `shutdown` is done and the requests at hand are answered, or a second is over.
pub async fn serve(listener: TcpListener, offers: Offers, shutdown: impl Future<Output = ()> + Send + 'static) {
    let Offers { source, registry, taps } = offers;
    let (end, ending) = watch::channel(());
    let shared = Shared {
        source,
        registry,
        taps,
        ending,
    };
    let shutdown = async move {
        shutdown.await;
        // A tap would be at hand for ever.
        drop(end);
    };
    let router = Router::new()
        .route("/livez", get(livez))
        .route("/readyz", get(readyz))
        .route("/metrics", get(metrics))
        .route("/status", get(status))
        .route("/tap", get(tap::tap))
        .route(
            "/log-level",
            get(log_level::show).put(log_level::change).post(log_level::change),
        )
        .with_state(shared);
    server::serve(listener, router, server::Patience::default(), shutdown).await;
}

#[derive(Clone)]
struct Shared {
    source: Arc<dyn StatusSource>,
    registry: Registry,
    taps: Arc<Taps>,
    /// Its sender goes when the admin interface ends.
    ending: watch::Receiver<()>,
}

/// What does not work is always said; with `verbose` also what does.
async fn livez(State(shared): State<Shared>, RawQuery(query): RawQuery) -> (StatusCode, String) {
    let checks = shared.source.alive();
    let failed: Vec<_> = checks.iter().filter(|check| !check.ok).cloned().collect();
    let (code, mut body) = match failed.is_empty() {
        true => (StatusCode::OK, "ok\n".to_owned()),
        false => (StatusCode::SERVICE_UNAVAILABLE, "not working\n".to_owned()),
    };
    list(if is_verbose(query) { &checks } else { &failed }, &mut body);
    (code, body)
}

fn is_verbose(query: Option<String>) -> bool {
    query.is_some_and(|query| query.split('&').any(|part| part.split('=').next() == Some("verbose")))
}

fn list(checks: &[Check], body: &mut String) {
    for Check {
        name,
        ok,
        gates,
        detail,
    } in checks
    {
        let mark = if *ok { "ok" } else { "failed" };
        let weight = if *gates { "" } else { " (does not gate)" };
        let colon = if detail.is_empty() { "" } else { ": " };
        // Writing to a String cannot fail.
        let _ = writeln!(body, "[{mark}] {name}{weight}{colon}{detail}");
    }
}

async fn readyz(State(shared): State<Shared>, RawQuery(query): RawQuery) -> (StatusCode, String) {
    let readiness = shared.source.ready();
    let (code, word) = match (readiness.ready, readiness.degraded) {
        (false, _) => (StatusCode::SERVICE_UNAVAILABLE, "not ready"),
        (true, true) => (StatusCode::OK, "degraded"),
        (true, false) => (StatusCode::OK, "ready"),
    };
    let mut body = format!("{word}\n");
    if is_verbose(query) {
        list(&readiness.checks, &mut body);
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
    let mut status = shared.source.status();
    status.troubles = troubles::of(&status, &shared.source.alive());
    Json(status)
}

#[cfg(test)]
mod tests;
