//! `/log-level`: GET shows what is logged, PUT or POST with a filter as its body changes it, until the process ends.

use axum::http::{HeaderMap, StatusCode, header};

use crate::telemetry::{LogLevelError, log_level};

/// `GET /log-level`.
pub(super) async fn show() -> (StatusCode, String) {
    match log_level::get() {
        Some(filter) => (StatusCode::OK, format!("{filter}\n")),
        None => refused(&LogLevelError::NoLogger),
    }
}

/// `PUT /log-level` and `POST /log-level`.
pub(super) async fn change(headers: HeaderMap, body: String) -> (StatusCode, String) {
    // Only a browser sends it, for a page that some site has shown: loopback is no wall against those.
    if headers.contains_key(header::ORIGIN) {
        let why = "log level not changed: web pages may not do that\n";
        return (StatusCode::FORBIDDEN, why.to_owned());
    }
    match log_level::set(&body) {
        Ok(before) => {
            let now = log_level::get().unwrap_or_default();
            tracing::info!(before, now, "log level changed");
            (StatusCode::OK, format!("{now}\n"))
        }
        Err(error) => refused(&error),
    }
}

fn refused(error: &LogLevelError) -> (StatusCode, String) {
    let code = match error {
        LogLevelError::NoLogger => StatusCode::SERVICE_UNAVAILABLE,
        _ => StatusCode::BAD_REQUEST,
    };
    (code, format!("log level not changed: {error}\n"))
}
