//! Health checks and the pages of the documentation.

use hyper::StatusCode;
use hyper::header::{CONTENT_SECURITY_POLICY, HeaderName, HeaderValue, REFERRER_POLICY};
use serde_json::Value;

use crate::error::{Error, Result};
use crate::http::context::RequestContext;
use crate::http::handlers::static_files::OPENAPI;
use crate::http::response::{self, Response};
use crate::problem::find_problem;
use crate::telemetry::metrics::Metrics;

const DOCS: &str = include_str!("../../docs/index.html");
const ACCOUNT: &str = include_str!("../../docs/account.html");
const PROBLEM: &str = include_str!("../../docs/problem.html");

/// Allows resources of this origin only, no inline scripts, and no framing.
const CSP: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; \
                      connect-src 'self'; font-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";
const HTML: &str = "text/html; charset=utf-8";
const FRAME_OPTIONS: HeaderName = HeaderName::from_static("x-frame-options");

/// `GET /healthz`: whether the process is running.
pub(crate) fn healthz() -> Result<Response> {
    response::json(StatusCode::OK, &serde_json::json!({ "status": "ok" }))
}

/// `GET /readyz`: whether the service can handle requests.
pub(crate) async fn readyz(context: &RequestContext<'_>) -> Result<Response> {
    if context.app.shutdown.is_cancelled() {
        return Err(Error::Stopping);
    }
    if !context.app.database.is_ready().await {
        return Err(Error::DatabaseUnavailable("not ready".into()));
    }
    response::json(StatusCode::OK, &serde_json::json!({ "status": "ready" }))
}

/// Initializes the metrics of every documented response to zero.
pub(crate) fn declare_responses(metrics: &Metrics) -> Result<(), serde_json::Error> {
    let document: Value = serde_json::from_str(OPENAPI)?;
    let fields = |value: &Value| value.as_object().cloned().into_iter().flatten();
    for (route, item) in fields(&document["paths"]) {
        for (method, operation) in fields(&item) {
            for (status, _) in fields(&operation["responses"]) {
                metrics.declare_response(&route, &method.to_uppercase(), &status);
            }
        }
    }
    Ok(())
}

/// `GET /docs`
pub(crate) fn docs(context: &RequestContext<'_>) -> Response {
    page(context, DOCS)
}

/// `GET /account/reset` and `GET /account/verify`: where mails lead. The script of the page selects a
/// form by the path.
pub(crate) fn account(context: &RequestContext<'_>) -> Response {
    page(context, ACCOUNT)
}

/// `GET /problems/{code}`: what a type of problem means and what to do about it.
pub(crate) fn problem(context: &RequestContext<'_>, code: &str) -> Result<Response> {
    let problem = find_problem(code).ok_or(Error::NotFound)?;
    let html = PROBLEM
        .replace("{title}", problem.title)
        .replace("{status}", &problem.status.to_string())
        .replace("{code}", problem.code)
        .replace("{meaning}", problem.meaning)
        .replace("{advice}", problem.advice);
    Ok(page(context, &html))
}

/// Responds with an HTML page. Its links are relative, since a proxy may have stripped a prefix from
/// the path.
fn page(context: &RequestContext<'_>, html: &str) -> Response {
    let depth = context.head.uri.path().matches('/').skip(1).count();
    let html = html.replace("{root}", &"../".repeat(depth));
    let mut response = response::bytes(StatusCode::OK, HTML, html);
    let headers = response.headers_mut();
    headers.insert(CONTENT_SECURITY_POLICY, HeaderValue::from_static(CSP));
    headers.insert(FRAME_OPTIONS, HeaderValue::from_static("DENY"));
    headers.insert(REFERRER_POLICY, HeaderValue::from_static("no-referrer"));
    response
}
