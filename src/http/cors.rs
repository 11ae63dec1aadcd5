//! Cross-origin resource sharing (CORS), as the Fetch standard defines it. Credentials are not
//! allowed, because tokens travel in a header and never in a cookie.

use hyper::Method;
use hyper::header::{
    ACCESS_CONTROL_ALLOW_HEADERS, ACCESS_CONTROL_ALLOW_METHODS, ACCESS_CONTROL_ALLOW_ORIGIN,
    ACCESS_CONTROL_EXPOSE_HEADERS, ACCESS_CONTROL_MAX_AGE, ACCESS_CONTROL_REQUEST_METHOD, HOST,
    HeaderMap, HeaderName, HeaderValue, ORIGIN, VARY,
};
use hyper::http::request::Parts;

/// Preflights allow every method on every path: otherwise a page would see a network error instead
/// of a 404 or 405.
pub(crate) const ALL_METHODS: &str = "GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS";
const ALLOWED_METHODS: HeaderValue = HeaderValue::from_static(ALL_METHODS);
const ALLOWED_HEADERS: HeaderValue = HeaderValue::from_static(
    "Authorization, Content-Type, If-Match, If-None-Match, Idempotency-Key, Prefer, X-Request-Id",
);
const EXPOSED_HEADERS: HeaderValue = HeaderValue::from_static(
    "Location, Link, ETag, Preference-Applied, Retry-After, X-Request-Id, X-Total-Count",
);
/// Two hours, the longest time for which Chromium caches a preflight.
const MAX_AGE: HeaderValue = HeaderValue::from_static("7200");
const FORWARDED_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");

/// The allowed origins.
pub(crate) struct Cors {
    origins: Vec<HeaderValue>,
}

impl Cors {
    pub(crate) fn new(origins: &[String]) -> Self {
        let values = origins
            .iter()
            .filter_map(|origin| HeaderValue::from_str(origin).ok());
        Self {
            origins: values.collect(),
        }
    }

    /// The request's origin, if it is allowed.
    fn allowed_origin<'a>(&self, headers: &'a HeaderMap) -> Option<&'a HeaderValue> {
        headers
            .get(ORIGIN)
            .filter(|origin| self.origins.contains(origin))
    }

    /// Whether the request is a preflight from an allowed origin.
    pub(crate) fn is_preflight(&self, head: &Parts) -> bool {
        head.method == Method::OPTIONS
            && head.headers.contains_key(ACCESS_CONTROL_REQUEST_METHOD)
            && self.allowed_origin(&head.headers).is_some()
    }

    /// Whether the request comes from a page whose origin is neither the service's own nor allowed.
    pub(crate) fn is_foreign(&self, headers: &HeaderMap) -> bool {
        let origin = headers.get(ORIGIN);
        origin
            .is_some_and(|origin| !self.origins.contains(origin) && !is_own_origin(origin, headers))
    }

    /// Adds the CORS headers to a response.
    pub(crate) fn apply(&self, head: &Parts, headers: &mut HeaderMap) {
        if self.origins.is_empty() {
            return;
        }
        headers.append(VARY, HeaderValue::from_static("Origin"));
        let Some(origin) = self.allowed_origin(&head.headers) else {
            return;
        };
        headers.insert(ACCESS_CONTROL_ALLOW_ORIGIN, origin.clone());
        if self.is_preflight(head) {
            headers.insert(ACCESS_CONTROL_ALLOW_METHODS, ALLOWED_METHODS);
            headers.insert(ACCESS_CONTROL_ALLOW_HEADERS, ALLOWED_HEADERS);
            headers.insert(ACCESS_CONTROL_MAX_AGE, MAX_AGE);
        } else {
            headers.insert(ACCESS_CONTROL_EXPOSE_HEADERS, EXPOSED_HEADERS);
        }
    }
}

/// Whether the request was sent to the host of its origin. The scheme is not compared, because
/// behind a proxy the service does not know it. A page of another origin cannot set `Host` at all,
/// nor `X-Forwarded-Host` without a preflight.
fn is_own_origin(origin: &HeaderValue, headers: &HeaderMap) -> bool {
    let (host, default_port) = match origin.to_str().unwrap_or_default().split_once("://") {
        Some(("http", host)) => (host, ":80"),
        Some(("https", host)) => (host, ":443"),
        _ => return false,
    };
    let mut targets = [HOST, FORWARDED_HOST]
        .into_iter()
        .filter_map(|name| headers.get(name)?.to_str().ok()?.split(',').next());
    targets.any(|target| {
        let target = target.trim();
        let target = target.strip_suffix(default_port).unwrap_or(target);
        target.eq_ignore_ascii_case(host)
    })
}
