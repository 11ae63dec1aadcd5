//! Which bodies are read: JSON, and not compressed.

use hyper::Method;
use hyper::header::{CONTENT_ENCODING, CONTENT_TYPE, HeaderValue};
use hyper::http::request::Parts;

use crate::error::{Error, UnsupportedBody};
use crate::http::cors::Cors;

/// What PATCH takes (RFC 5789 section 3.1).
pub(crate) const ACCEPT_PATCH: HeaderValue =
    HeaderValue::from_static("application/json, application/merge-patch+json");

/// Refuses a body that is compressed, or that is declared to be something other than JSON.
pub(crate) fn check(head: &Parts, cors: &Cors) -> Result<(), Error> {
    let headers = &head.headers;
    let is_patch = head.method == Method::PATCH;
    let refuse = |body| Err(Error::UnsupportedMediaType { body, is_patch });
    let mut codings = headers
        .get_all(CONTENT_ENCODING)
        .iter()
        .flat_map(|value| value.to_str().unwrap_or("unknown").split(','));
    if !codings.all(|coding| ["", "identity"].contains(&&*coding.trim().to_ascii_lowercase())) {
        return refuse(UnsupportedBody::Compressed);
    }
    let is_json = |value: &HeaderValue| {
        let essence = value.to_str().unwrap_or_default().split(';').next();
        let essence = essence.unwrap_or_default().trim().to_ascii_lowercase();
        essence == "application/json" || (is_patch && essence == "application/merge-patch+json")
    };
    if !headers.get_all(CONTENT_TYPE).iter().all(is_json) {
        return refuse(UnsupportedBody::NotJson);
    }
    // A page can send a body without a type to another origin without asking first (a preflight).
    if !headers.contains_key(CONTENT_TYPE) && cors.is_foreign(headers) {
        return refuse(UnsupportedBody::Untyped);
    }
    Ok(())
}
