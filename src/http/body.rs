//! Request bodies: media type, reading, draining.

use std::time::Duration;

use http_body_util::{BodyExt, LengthLimitError, Limited};
use hyper::Method;
use hyper::body::{Body as _, Incoming};
use hyper::header::{CONTENT_ENCODING, CONTENT_TYPE, EXPECT, HeaderValue};
use hyper::http::request::Parts;
use serde_json::{Value, json};
use tokio::time::timeout;

use crate::error::{Error, Result, UnsupportedBody};
use crate::http::context::RequestContext;
use crate::http::cors::Cors;
use crate::http::json_fields::JsonFields;

/// The largest body that is read. A task of the maximum length fits, even fully escaped.
const MAX_BODY_BYTES: usize = 16 * 1024;
/// The time from the request head to the end of the body. Long enough for slow mobile connections.
const BODY_TIMEOUT: Duration = Duration::from_secs(20);
/// An unread body up to this size is discarded, so that the connection can be reused.
const MAX_DRAIN_BYTES: usize = 64 * 1024;
/// The rest of a rejected body usually arrives within milliseconds. Slower clients reconnect.
const BODY_DRAIN_TIMEOUT: Duration = Duration::from_secs(1);

/// The media types that PATCH accepts (RFC 5789 section 3.1).
pub(crate) const ACCEPT_PATCH: HeaderValue =
    HeaderValue::from_static("application/json, application/merge-patch+json");

/// A request body that has not been read yet.
pub(crate) struct Body<'a> {
    pub(crate) context: &'a RequestContext<'a>,
    /// `None` once the body has been read to its end.
    pub(crate) unread: &'a mut Option<Incoming>,
}

impl Body<'_> {
    /// Reads a required JSON object.
    pub(crate) async fn json_object(self) -> Result<JsonFields> {
        let value = self.read_json().await?;
        let missing = || Error::MalformedJson("a JSON body is required".into());
        value.map(JsonFields::new).ok_or_else(missing)
    }

    /// Reads a JSON object. A missing body counts as an empty object.
    pub(crate) async fn optional_json_object(self) -> Result<JsonFields> {
        let value = self.read_json().await?;
        Ok(JsonFields::new(value.unwrap_or_else(|| json!({}))))
    }

    async fn read_json(self) -> Result<Option<Value>> {
        let Body { context, unread } = self;
        let Some(incoming) = unread.as_mut().filter(|body| !body.is_end_stream()) else {
            return Ok(None);
        };
        check_media_type(context.head, &context.app.cors)?;
        if incoming.size_hint().lower() > MAX_BODY_BYTES as u64 {
            return Err(Error::BodyTooLarge);
        }
        let collected = Limited::new(incoming, MAX_BODY_BYTES).collect();
        let bytes = match timeout(BODY_TIMEOUT, collected).await {
            Ok(Ok(collected)) => collected.to_bytes(),
            Ok(Err(error)) if error.is::<LengthLimitError>() => return Err(Error::BodyTooLarge),
            Ok(Err(_)) => {
                let detail = "the body is incomplete or its framing is invalid";
                return Err(Error::MalformedRequest(detail));
            }
            Err(_) => return Err(Error::RequestTimeout),
        };
        *unread = None;
        context.set_complete();
        if bytes.is_empty() {
            return Ok(None);
        }
        // Not deserialized as an `Option`, because null would become `None`.
        serde_json::from_slice(&bytes).map(Some).map_err(|error| {
            Error::MalformedJson(format!("the body is not valid JSON in UTF-8: {error}"))
        })
    }
}

/// Rejects a body that is compressed or that is declared as something other than JSON.
fn check_media_type(head: &Parts, cors: &Cors) -> Result<()> {
    let headers = &head.headers;
    let is_patch = head.method == Method::PATCH;
    let reject = |body| Err(Error::UnsupportedMediaType { body, is_patch });
    let mut codings = headers
        .get_all(CONTENT_ENCODING)
        .iter()
        .flat_map(|value| value.to_str().unwrap_or("unknown").split(','));
    if !codings.all(|coding| ["", "identity"].contains(&&*coding.trim().to_ascii_lowercase())) {
        return reject(UnsupportedBody::Compressed);
    }
    let is_json = |value: &HeaderValue| {
        let essence = value.to_str().unwrap_or_default().split(';').next();
        let essence = essence.unwrap_or_default().trim().to_ascii_lowercase();
        essence == "application/json" || (is_patch && essence == "application/merge-patch+json")
    };
    if !headers.get_all(CONTENT_TYPE).iter().all(is_json) {
        return reject(UnsupportedBody::NotJson);
    }
    // A browser sends a body without a type to other origins without a CORS preflight.
    if !headers.contains_key(CONTENT_TYPE) && cors.is_foreign(headers) {
        return reject(UnsupportedBody::Untyped);
    }
    Ok(())
}

/// Reads and discards the part of the body that the handler did not read.
///
/// Returns `false` if the connection cannot be reused: the unread part is too long, too slow or
/// malformed, or the client is waiting for `100 Continue` and may or may not send the body after
/// another response.
pub(crate) async fn drain(head: &Parts, unread: Option<Incoming>) -> bool {
    let Some(body) = unread.filter(|body| !body.is_end_stream()) else {
        return true;
    };
    if head.headers.contains_key(EXPECT) || body.size_hint().lower() > MAX_DRAIN_BYTES as u64 {
        return false;
    }
    let mut rest = Limited::new(body, MAX_DRAIN_BYTES);
    let drained = async {
        while let Some(frame) = rest.frame().await {
            if frame.is_err() {
                return false;
            }
        }
        true
    };
    timeout(BODY_DRAIN_TIMEOUT, drained).await.unwrap_or(false)
}
