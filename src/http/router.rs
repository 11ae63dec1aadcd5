//! THE match: method and path, then the guard, then the handler; and the one place where an error
//! becomes an answer and a line in the log.

use std::borrow::Cow;
use std::future::poll_fn;
use std::net::IpAddr;
use std::pin::pin;
use std::task::Poll;
use std::time::{Duration, Instant};

use hyper::body::Incoming;
use hyper::header::{CACHE_CONTROL, CONNECTION, HeaderName, HeaderValue};
use hyper::http::request::Parts;
use hyper::{Method, Request};
use log::{debug, error, warn};
use percent_encoding::percent_decode_str;

use crate::error::Error;
use crate::http::context::{Body, REQUEST_ID, RequestContext, check_host, drain};
use crate::http::handlers::{auth, meta, sessions, tasks};
use crate::http::middleware::{authenticate, require_owner};
use crate::http::response::{self, Response};
use crate::http::state::AppState;
use crate::telemetry::logging::{self, ACCESS, logfmt_value};
use crate::telemetry::metrics::UNMATCHED_ROUTE;

const CONTENT_TYPE_OPTIONS: HeaderName = HeaderName::from_static("x-content-type-options");
/// A request that takes longer is worth a line: the target is 95 % within it.
const SLOW_REQUEST: Duration = Duration::from_secs(1);

/// The whole API. Each path ends in an arm for the methods that it does not take.
async fn dispatch(context: &RequestContext<'_>, body: Body<'_>) -> Result<Response, Error> {
    const GET: Method = Method::GET;
    const POST: Method = Method::POST;
    const PUT: Method = Method::PUT;
    const PATCH: Method = Method::PATCH;
    const DELETE: Method = Method::DELETE;

    check_host(context.head)?;
    let path = context.head.uri.path();
    let decoded: Vec<Cow<str>> = segments(path).collect();
    let segments: Vec<&str> = decoded.iter().map(AsRef::as_ref).collect();
    if segments.contains(&"") {
        return Err(Error::NotFound);
    }
    // hyper leaves out the body of an answer to HEAD.
    let method = if context.head.method == Method::HEAD {
        GET
    } else {
        context.head.method.clone()
    };

    match segments.as_slice() {
        [] => match context.set_route("/", method) {
            GET => Ok(response::redirect("docs")),
            _ => options_or_405(context, "GET, HEAD, OPTIONS"),
        },
        ["healthz"] => match context.set_route("/healthz", method) {
            GET => meta::healthz(),
            _ => options_or_405(context, "GET, HEAD, OPTIONS"),
        },
        ["readyz"] => match context.set_route("/readyz", method) {
            GET => meta::readyz(context).await,
            _ => options_or_405(context, "GET, HEAD, OPTIONS"),
        },
        ["openapi.json"] => match context.set_route("/openapi.json", method) {
            GET => Ok(meta::openapi()),
            _ => options_or_405(context, "GET, HEAD, OPTIONS"),
        },
        ["docs"] => match context.set_route("/docs", method) {
            GET => Ok(meta::docs(context)),
            _ => options_or_405(context, "GET, HEAD, OPTIONS"),
        },
        ["docs", file] => match context.set_route("/docs/{file}", method) {
            GET => meta::docs_file(file),
            _ => options_or_405(context, "GET, HEAD, OPTIONS"),
        },
        ["problems", code] => match context.set_route("/problems/{code}", method) {
            GET => meta::problem(context, code),
            _ => options_or_405(context, "GET, HEAD, OPTIONS"),
        },
        ["api", "v1", "auth", "register"] => {
            match context.set_route("/api/v1/auth/register", method) {
                POST => auth::register(context, body).await,
                _ => options_or_405(context, "POST, OPTIONS"),
            }
        }
        ["api", "v1", "auth", "login"] => match context.set_route("/api/v1/auth/login", method) {
            POST => auth::login(context, body).await,
            _ => options_or_405(context, "POST, OPTIONS"),
        },
        ["api", "v1", "auth", "refresh"] => match context.set_route("/api/v1/auth/refresh", method)
        {
            POST => auth::refresh(context, body).await,
            _ => options_or_405(context, "POST, OPTIONS"),
        },
        ["api", "v1", "auth", "logout"] => match context.set_route("/api/v1/auth/logout", method) {
            POST => auth::logout(context, body).await,
            _ => options_or_405(context, "POST, OPTIONS"),
        },
        ["api", "v1", "auth", "me"] => match context.set_route("/api/v1/auth/me", method) {
            GET => auth::me(context, authenticate(context).await?).await,
            DELETE => auth::delete_me(context, authenticate(context).await?, body).await,
            _ => options_or_405(context, "GET, HEAD, DELETE, OPTIONS"),
        },
        ["api", "v1", "auth", "password"] => {
            match context.set_route("/api/v1/auth/password", method) {
                PUT => auth::change_password(context, authenticate(context).await?, body).await,
                _ => options_or_405(context, "PUT, OPTIONS"),
            }
        }
        ["api", "v1", "auth", "sessions"] => {
            match context.set_route("/api/v1/auth/sessions", method) {
                GET => sessions::list(context, authenticate(context).await?).await,
                DELETE => sessions::end_others(context, authenticate(context).await?).await,
                _ => options_or_405(context, "GET, HEAD, DELETE, OPTIONS"),
            }
        }
        ["api", "v1", "auth", "sessions", id] => {
            match context.set_route("/api/v1/auth/sessions/{id}", method) {
                DELETE => sessions::end(context, authenticate(context).await?, id).await,
                _ => options_or_405(context, "DELETE, OPTIONS"),
            }
        }
        ["api", "v1", user_id, "tasks"] => {
            match context.set_route("/api/v1/{user_id}/tasks", method) {
                GET => tasks::list(context, require_owner(context, user_id).await?).await,
                POST => tasks::create(context, require_owner(context, user_id).await?, body).await,
                DELETE => {
                    tasks::delete_completed(context, require_owner(context, user_id).await?).await
                }
                _ => options_or_405(context, "GET, HEAD, POST, DELETE, OPTIONS"),
            }
        }
        ["api", "v1", user_id, "tasks", id] => {
            match context.set_route("/api/v1/{user_id}/tasks/{id}", method) {
                GET => tasks::get(context, require_owner(context, user_id).await?, id).await,
                PUT | PATCH => {
                    tasks::update(context, require_owner(context, user_id).await?, id, body).await
                }
                DELETE => tasks::delete(context, require_owner(context, user_id).await?, id).await,
                _ => options_or_405(context, "GET, HEAD, PUT, PATCH, DELETE, OPTIONS"),
            }
        }
        ["api", "v1", user_id, "tasks", id, "complete"] => {
            match context.set_route("/api/v1/{user_id}/tasks/{id}/complete", method) {
                PATCH => {
                    tasks::complete(context, require_owner(context, user_id).await?, id, body).await
                }
                _ => options_or_405(context, "PATCH, OPTIONS"),
            }
        }
        // RFC 9110 section 9.3.7: OPTIONS * asks about the service as a whole.
        ["*"] if path == "*" => {
            options_or_405(context, "GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS")
        }
        _ => Err(Error::NotFound),
    }
}

/// A method that no handler of the path takes.
fn options_or_405(context: &RequestContext<'_>, allow: &'static str) -> Result<Response, Error> {
    if context.head.method == Method::OPTIONS {
        Ok(response::options(allow))
    } else {
        Err(Error::MethodNotAllowed(allow))
    }
}

/// The segments of a path, percent-decoded one by one, so that `%2F` ends none; a slash at the end
/// adds none. What does not decode to UTF-8 stays as it is and matches no route.
fn segments(path: &str) -> impl Iterator<Item = Cow<'_, str>> {
    let path = path.strip_prefix('/').unwrap_or(path);
    let path = path.strip_suffix('/').unwrap_or(path);
    let count = if path.is_empty() { 0 } else { usize::MAX };
    path.split('/').take(count).map(|segment| {
        if segment.contains('%') {
            percent_decode_str(segment)
                .decode_utf8()
                .unwrap_or(Cow::Borrowed(segment))
        } else {
            Cow::Borrowed(segment)
        }
    })
}

/// Answers one request, whatever becomes of it.
pub(crate) async fn handle(
    app: &AppState,
    request: Request<Incoming>,
    peer: IpAddr,
    fault: Option<&'static str>,
) -> Response {
    let started = Instant::now();
    let (head, incoming) = request.into_parts();
    let context = RequestContext::new(app, &head, peer);
    let mut unread = Some(incoming);
    let body = Body {
        context: &context,
        unread: &mut unread,
    };
    let result = match fault {
        Some(fault) => Err(Error::MalformedRequest(fault)),
        None => catch_panic(dispatch(&context, body)).await,
    };
    let must_close = result.as_ref().is_err_and(must_close);
    let mut response = match result {
        Ok(response) => response,
        Err(Error::NotFound) if app.cors.is_preflight(&head) => response::no_content(),
        Err(error) => {
            log_error(&context, &error);
            response::problem(&error, &context.id)
        }
    };
    let headers = response.headers_mut();
    headers.insert(REQUEST_ID, context.id.clone());
    headers.insert(CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    let path = context.route().unwrap_or(head.uri.path());
    let path_is_api = path.starts_with("/api/");
    if path_is_api {
        headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    }
    app.cors.apply(&head, headers);
    record_request(&context, &response, started.elapsed());
    if path_is_api {
        app.spawn_purge_if_due();
    }
    // hyper closes a connection without notice if the body is still arriving when the response is
    // written. The client has to be told with the response, so the body comes first.
    let drained = !must_close && drain(&head, unread).await;
    if !drained || app.is_shutting_down() {
        let headers = response.headers_mut();
        headers.insert(CONNECTION, HeaderValue::from_static("close"));
    }
    response
}

/// A panic is a bug, and the end of this request alone.
async fn catch_panic(
    answer: impl Future<Output = Result<Response, Error>>,
) -> Result<Response, Error> {
    let mut answer = pin!(answer);
    poll_fn(|context| {
        let polled = logging::catch_panic(|| answer.as_mut().poll(context));
        polled.unwrap_or_else(|panic| Poll::Ready(Err(Error::Internal(panic))))
    })
    .await
}

/// After these errors the rest of the request is not worth waiting for, or not to be trusted.
fn must_close(error: &Error) -> bool {
    matches!(error, Error::RequestTimeout | Error::MalformedRequest(_))
}

/// The one place where an error is logged: a failed authentication and a shed request at WARN, a
/// bug at ERROR, what a client did wrong not at all.
fn log_error(context: &RequestContext<'_>, error: &Error) {
    let head = context.head;
    let (method, path, client) = (
        logfmt_value(head.method.as_str()),
        logfmt_value(head.uri.path()),
        context.client,
    );
    let request_id = context.id.to_str().unwrap_or_default();
    let place = format_args!("method={method} path={path} client={client} request_id={request_id}");
    if let Some(failure) = error.authentication_failure() {
        context.app.metrics.count_auth_failure(failure);
        let reason = failure.label();
        match context.email.get() {
            Some(email) => warn!(
                "authentication failed reason={reason} {place} email={}",
                logfmt_value(email.as_str())
            ),
            None => warn!("authentication failed reason={reason} {place}"),
        }
        return;
    }
    match error {
        Error::Internal(cause) => error!("internal error cause={} {place}", logfmt_value(cause)),
        Error::DatabaseUnavailable(cause) => {
            context.app.refusal_log.warn(|more| {
                format!(
                    "request refused reason=database_unavailable cause={} {place}{more}",
                    logfmt_value(cause)
                )
            });
        }
        Error::OutcomeUnknown(cause) => warn!(
            "request failed reason=outcome_unknown cause={} {place}",
            logfmt_value(cause)
        ),
        Error::Overloaded | Error::Stopping => {
            let reason = error.problem().code;
            context
                .app
                .refusal_log
                .warn(|more| format!("request refused reason={reason} {place}{more}"));
        }
        _ => {}
    }
}

fn record_request(context: &RequestContext<'_>, response: &Response, took: Duration) {
    let head: &Parts = context.head;
    let status = response.status();
    let route = context.route().unwrap_or(UNMATCHED_ROUTE);
    context
        .app
        .metrics
        .record_request(route, &head.method, status.as_str(), took);
    if took > SLOW_REQUEST {
        warn!(
            "slow request route={route} method={} status={} seconds={:.3} request_id={}",
            logfmt_value(head.method.as_str()),
            status.as_u16(),
            took.as_secs_f64(),
            context.id.to_str().unwrap_or_default(),
        );
    }
    debug!(
        target: ACCESS,
        "method={} path={} status={} seconds={:.6} client={} request_id={}",
        logfmt_value(head.method.as_str()),
        logfmt_value(head.uri.path()),
        status.as_u16(),
        took.as_secs_f64(),
        context.client,
        context.id.to_str().unwrap_or_default(),
    );
}

#[cfg(test)]
mod tests {
    use super::{catch_panic, segments};
    use crate::error::Error;

    #[tokio::test]
    async fn a_panic_ends_one_request_with_an_internal_error() {
        for text in ["at once", "after a wait"] {
            let handler = async {
                if text != "at once" {
                    tokio::task::yield_now().await;
                }
                panic!("{text}")
            };
            let Err(Error::Internal(cause)) = catch_panic(handler).await else {
                unreachable!("a panic that is no internal error");
            };
            assert_eq!(cause, format!("panic: {text}"));
        }
    }

    #[test]
    fn a_path_is_split_once_and_decoded_by_segment() {
        let split = |path: &str| segments(path).map(|s| s.into_owned()).collect::<Vec<_>>();
        assert!(split("/").is_empty());
        assert_eq!(split("/healthz/"), ["healthz"]);
        assert_eq!(split("/api/v1/%61uth/me"), ["api", "v1", "auth", "me"]);
        assert_eq!(split("/a%2Fb/c"), ["a/b", "c"]);
        assert_eq!(split("/%ff"), ["%ff"]);
        assert_eq!(split("//a//"), ["", "a", ""]);
    }
}
