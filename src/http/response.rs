//! What a handler can answer with. Every answer is in memory and of a known length.

use bytes::Bytes;
use http_body_util::Full;
use hyper::StatusCode;
use hyper::header::{
    ACCEPT_ENCODING, ALLOW, CONTENT_LENGTH, CONTENT_TYPE, ETAG, HeaderName, HeaderValue, LINK,
    LOCATION, RETRY_AFTER, WWW_AUTHENTICATE,
};
use serde::Serialize;

use crate::domain::Task;
use crate::error::{Error, FieldError, UnsupportedBody};
use crate::http::conditional::entity_tag;
use crate::http::content_type::ACCEPT_PATCH;
use crate::http::state::LargeResponsePermit;

/// An answer.
pub(crate) type Response = hyper::Response<Full<Bytes>>;

const PATCH_TYPES: HeaderName = HeaderName::from_static("accept-patch");
const TOTAL_COUNT: HeaderName = HeaderName::from_static("x-total-count");

/// A value as JSON.
pub(crate) fn json<T: Serialize>(status: StatusCode, value: &T) -> Result<Response, Error> {
    let body = serde_json::to_vec(value)
        .map_err(|error| Error::Internal(format!("cannot write JSON: {error}")))?;
    Ok(bytes(status, "application/json", body))
}

/// Anything, with its type.
pub(crate) fn bytes(
    status: StatusCode,
    content_type: &'static str,
    body: impl Into<Bytes>,
) -> Response {
    let mut response = Response::new(Full::new(body.into()));
    *response.status_mut() = status;
    response
        .headers_mut()
        .insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    response
}

/// An answer so large that it keeps its place among the few of them until it is written or given
/// up: whoever asks for many and reads none must not fill the memory.
pub(crate) fn bytes_with_permit(
    content_type: &'static str,
    mut body: Vec<u8>,
    place: LargeResponsePermit,
) -> Response {
    struct PermitBody {
        body: Vec<u8>,
        _place: LargeResponsePermit,
    }
    impl AsRef<[u8]> for PermitBody {
        fn as_ref(&self) -> &[u8] {
            &self.body
        }
    }
    body.shrink_to_fit();
    bytes(
        StatusCode::OK,
        content_type,
        Bytes::from_owner(PermitBody {
            body,
            _place: place,
        }),
    )
}

/// No body.
pub(crate) fn empty(status: StatusCode) -> Response {
    let mut response = Response::new(Full::default());
    *response.status_mut() = status;
    response
}

/// 204: done, and nothing to say.
pub(crate) fn no_content() -> Response {
    empty(StatusCode::NO_CONTENT)
}

/// 204 with the methods that a route takes.
pub(crate) fn options(allow: &'static str) -> Response {
    let mut response = no_content();
    let headers = response.headers_mut();
    headers.insert(ALLOW, HeaderValue::from_static(allow));
    if allow.contains("PATCH") {
        headers.insert(PATCH_TYPES, ACCEPT_PATCH);
    }
    response
}

/// One task, with its version.
pub(crate) fn task(status: StatusCode, task: &Task) -> Result<Response, Error> {
    Ok(with_header(
        json(status, task)?,
        ETAG,
        entity_tag(task.updated_at.0),
    ))
}

/// 304: the client has this version of the task already.
pub(crate) fn not_modified(task: &Task) -> Response {
    with_header(
        empty(StatusCode::NOT_MODIFIED),
        ETAG,
        entity_tag(task.updated_at.0),
    )
}

/// Says where the new thing is.
pub(crate) fn with_location(response: Response, path: String) -> Response {
    with_header(response, LOCATION, path)
}

/// Says where the list goes on.
pub(crate) fn with_next_link(response: Response, next: &str) -> Response {
    with_header(response, LINK, format!("<{next}>; rel=\"next\""))
}

/// Says how many there are in all.
pub(crate) fn with_total_count(response: Response, total: i64) -> Response {
    with_header(response, TOTAL_COUNT, total.to_string())
}

/// A page that is somewhere else: `path` is relative, as a proxy may have stripped a prefix.
pub(crate) fn redirect(path: &'static str) -> Response {
    let mut response = empty(StatusCode::TEMPORARY_REDIRECT);
    let headers = response.headers_mut();
    // hyper leaves it out of the answer to HEAD where it is 0.
    headers.insert(CONTENT_LENGTH, HeaderValue::from_static("0"));
    headers.insert(LOCATION, HeaderValue::from_static(path));
    response
}

fn with_header(mut response: Response, name: HeaderName, value: String) -> Response {
    match HeaderValue::try_from(value) {
        Ok(value) => {
            response.headers_mut().insert(name, value);
        }
        Err(_) => log::error!("bug: a value for {name} that is no header value"),
    }
    response
}

/// An error as problem details (RFC 9457).
pub(crate) fn problem(error: &Error, request_id: &HeaderValue) -> Response {
    #[derive(Serialize)]
    struct Details<'a> {
        r#type: String,
        title: &'a str,
        status: u16,
        code: &'a str,
        detail: &'a str,
        instance: String,
        #[serde(skip_serializing_if = "<[_]>::is_empty")]
        errors: &'a [FieldError],
    }
    let kind = error.problem();
    let details = Details {
        r#type: format!("/problems/{}", kind.code),
        title: kind.title,
        status: kind.status,
        code: kind.code,
        detail: &error.detail(),
        instance: format!("urn:request:{}", request_id.to_str().unwrap_or_default()),
        errors: error.errors(),
    };
    let body = serde_json::to_vec(&details).unwrap_or_default();
    let status = StatusCode::from_u16(kind.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let mut response = bytes(status, "application/problem+json", body);
    let headers = response.headers_mut();
    if status == StatusCode::UNAUTHORIZED {
        // RFC 6750 section 3: the error is named only where a token was presented.
        let challenge = match kind.code {
            "invalid_token" => "Bearer realm=\"todo\", error=\"invalid_token\"",
            _ => "Bearer realm=\"todo\"",
        };
        headers.insert(WWW_AUTHENTICATE, HeaderValue::from_static(challenge));
    }
    if let Some(seconds) = error.retry_after() {
        headers.insert(RETRY_AFTER, HeaderValue::from(seconds));
    }
    match error {
        Error::MethodNotAllowed(allow) => {
            headers.insert(ALLOW, HeaderValue::from_static(allow));
        }
        Error::UnsupportedMediaType { body, is_patch } => {
            if *is_patch {
                headers.insert(PATCH_TYPES, ACCEPT_PATCH);
            }
            // RFC 9110 section 12.5.3.
            if matches!(body, UnsupportedBody::Compressed) {
                headers.insert(ACCEPT_ENCODING, HeaderValue::from_static("identity"));
            }
        }
        _ => {}
    }
    response
}
