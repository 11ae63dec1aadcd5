//! Processes one request: creates its context, calls the router within a panic boundary, and turns
//! an error into a response and a log line.

use std::borrow::Cow;
use std::future::poll_fn;
use std::net::IpAddr;
use std::pin::pin;
use std::task::Poll;
use std::time::{Duration, Instant};

use hyper::Request;
use hyper::body::Incoming;
use hyper::header::{CACHE_CONTROL, CONNECTION, HeaderName, HeaderValue};
use log::{Level, debug, error, log_enabled, warn};

use crate::error::{Error, Result};
use crate::http::body::{Body, drain};
use crate::http::context::{REQUEST_ID, RequestContext, check_host};
use crate::http::response::{self, Response};
use crate::http::router;
use crate::http::state::AppState;
use crate::telemetry::labels::{AuthFailure, LoginFailure};
use crate::telemetry::log_limiter::LineKind;
use crate::telemetry::logging::{self, ACCESS, logfmt_value};
use crate::telemetry::metrics::UNMATCHED_ROUTE;

const CONTENT_TYPE_OPTIONS: HeaderName = HeaderName::from_static("x-content-type-options");
/// Requests slower than this are logged. The target is for 95% of requests to be faster.
const SLOW_REQUEST: Duration = Duration::from_secs(1);

/// Processes one request. `head_error` is the error that the framer found in the head, if any.
pub(crate) async fn handle(
    app: &AppState,
    request: Request<Incoming>,
    peer: IpAddr,
    head_error: Option<&'static str>,
) -> Response {
    let started = Instant::now();
    let (head, incoming) = request.into_parts();
    let context = RequestContext::new(app, &head, peer);
    let mut unread = Some(incoming);
    let body = Body {
        context: &context,
        unread: &mut unread,
    };
    let result = catch_panic(async {
        match head_error {
            Some(detail) => return Err(Error::MalformedRequest(detail)),
            None => check_host(&head)?,
        }
        router::dispatch(&context, body).await
    })
    .await;
    // After these errors the unread part of the request may be incomplete or ambiguous.
    let must_close = matches!(
        result,
        Err(Error::RequestTimeout | Error::MalformedRequest(_))
    );
    let mut response = match result {
        Ok(response) => response,
        Err(Error::NotFound) if app.cors.is_preflight(&head) => response::no_content(),
        Err(error) => {
            log_error(&context, &error);
            response::problem(&error, &context.id)
        }
    };
    let path = context.route().unwrap_or(head.uri.path());
    let is_api = path.starts_with("/api/");
    let headers = response.headers_mut();
    headers.insert(REQUEST_ID, context.id.clone());
    headers.insert(CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    if is_api {
        headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    }
    app.cors.apply(&head, headers);
    let took = started.elapsed().saturating_sub(context.waited());
    record_request(&context, &response, took);
    if is_api {
        app.spawn_purge_if_due();
    }
    // hyper closes the connection if the body is still arriving when the response is written, but
    // does not add `Connection: close`.
    let drained = !must_close && drain(&head, unread).await;
    if !drained || app.shutdown.is_cancelled() {
        let headers = response.headers_mut();
        headers.insert(CONNECTION, HeaderValue::from_static("close"));
    }
    response
}

/// Turns a panic into an internal error, so that it affects only this request.
async fn catch_panic(handler: impl Future<Output = Result<Response>>) -> Result<Response> {
    let mut handler = pin!(handler);
    poll_fn(|context| {
        let polled = logging::catch_panic(|| handler.as_mut().poll(context));
        polled.unwrap_or_else(|panic| Poll::Ready(Err(Error::Internal(panic))))
    })
    .await
}

/// Logs an error once: failed authentication and rejected requests at WARN, bugs at ERROR, other
/// client errors not at all.
fn log_error(context: &RequestContext<'_>, error: &Error) {
    if let Some(failure) = error.authentication_failure() {
        context.app.metrics.record_auth_failure(failure);
        let line = || {
            let email = context.email.get().map_or(String::new(), |email| {
                format!(" email={}", logfmt_value(email.as_str()))
            });
            let (reason, request) = (failure.label(), describe_request(context));
            format!("authentication failed reason={reason} {request}{email}")
        };
        match failure {
            // The rate limit bounds the number of failed logins, so each is logged (FR-010).
            AuthFailure::Login(reason) if reason != LoginFailure::RateLimited => {
                warn!("{}", line());
            }
            _ => log_limited(context, LineKind::Authentication, line),
        }
        return;
    }
    match error {
        Error::Internal(cause) => {
            let (cause, request) = (logfmt_value(cause), describe_request(context));
            error!("internal error cause={cause} {request}");
        }
        Error::OutcomeUnknown(cause) => {
            let (cause, request) = (logfmt_value(cause), describe_request(context));
            warn!("request failed reason=outcome_unknown cause={cause} {request}");
        }
        Error::DatabaseUnavailable(_) | Error::Overloaded | Error::Stopping => {
            log_limited(context, LineKind::Capacity, || {
                let cause = match error {
                    Error::DatabaseUnavailable(cause) => format!(" cause={}", logfmt_value(cause)),
                    _ => String::new(),
                };
                let (reason, request) = (error.problem().code, describe_request(context));
                format!("request refused reason={reason}{cause} {request}")
            });
        }
        _ => {}
    }
}

fn log_limited(context: &RequestContext<'_>, kind: LineKind, line: impl FnOnce() -> String) {
    let log = &context.app.limited_log;
    log.warn(kind, context.network(), context.client, line);
}

/// The log fields that identify a request.
fn describe_request(context: &RequestContext<'_>) -> String {
    let (method, path, request_id) = request_fields(context);
    let client = context.client;
    format!("method={method} path={path} client={client} request_id={request_id}")
}

/// Counts a request and writes the access log.
fn record_request(context: &RequestContext<'_>, response: &Response, took: Duration) {
    let status = response.status();
    let route = context.route().unwrap_or(UNMATCHED_ROUTE);
    let metrics = &context.app.metrics;
    metrics.record_request(route, &context.head.method, status.as_str(), took);
    if took <= SLOW_REQUEST && !log_enabled!(target: ACCESS, Level::Debug) {
        return;
    }
    let (status, seconds, client) = (status.as_u16(), took.as_secs_f64(), context.client);
    let (method, path, request_id) = request_fields(context);
    if took > SLOW_REQUEST {
        log_limited(context, LineKind::Slow, || {
            format!(
                "slow request route={route} method={method} status={status} \
                 seconds={seconds:.3} request_id={request_id}"
            )
        });
    }
    debug!(
        target: ACCESS,
        "method={method} path={path} status={status} seconds={seconds:.6} client={client} \
         request_id={request_id}"
    );
}

/// The method, the path and the id of a request, as log fields.
fn request_fields<'a>(context: &'a RequestContext<'_>) -> (Cow<'a, str>, Cow<'a, str>, &'a str) {
    let head = context.head;
    (
        logfmt_value(head.method.as_str()),
        logfmt_value(head.uri.path()),
        context.id.to_str().unwrap_or_default(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_panic_becomes_an_internal_error() {
        let handler = async {
            tokio::task::yield_now().await;
            panic!("text")
        };
        let result = catch_panic(handler).await;
        assert!(matches!(result, Err(Error::Internal(cause)) if cause == "panic: text"));
    }
}
