//! Responses. Each is in memory and has a known length.

use bytes::Bytes;
use http_body_util::Full;
use hyper::StatusCode;
use hyper::header::{
    ACCEPT_ENCODING, ALLOW, CONTENT_LENGTH, CONTENT_TYPE, ETAG, HeaderName, HeaderValue, LINK,
    LOCATION, RETRY_AFTER, WWW_AUTHENTICATE,
};
use serde::Serialize;

use crate::domain::Task;
use crate::error::{Error, FieldError, Result, UnsupportedBody};
use crate::http::body::ACCEPT_PATCH;
use crate::http::conditional::entity_tag;
use crate::http::large_responses::{LargeResponsePermit, attach_permit};

pub(crate) type Response = hyper::Response<Full<Bytes>>;

const PATCH_TYPES: HeaderName = HeaderName::from_static("accept-patch");
const PREFERENCE_APPLIED: HeaderName = HeaderName::from_static("preference-applied");
const TOTAL_COUNT: HeaderName = HeaderName::from_static("x-total-count");

/// Responds with JSON.
pub(crate) fn json<T: Serialize>(status: StatusCode, value: &T) -> Result<Response> {
    let body = serde_json::to_vec(value).map_err(Error::serialize)?;
    Ok(bytes(status, "application/json", body))
}

/// Responds with a body of the given media type.
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

/// Responds with JSON that was serialized under the limits on large responses.
pub(crate) fn json_with_permit(mut body: Vec<u8>, permit: Option<LargeResponsePermit>) -> Response {
    if permit.is_some() {
        body.shrink_to_fit();
    }
    let body = attach_permit(body.into(), permit);
    bytes(StatusCode::OK, "application/json", body)
}

/// Adds to a page of tasks its entity tag, the link to the next page, and the number of tasks on all
/// pages.
pub(crate) fn with_page_headers(
    mut response: Response,
    etag: Option<String>,
    next: Option<String>,
    total: Option<i64>,
) -> Response {
    let link = next.map(|next| format!("<{next}>; rel=\"next\""));
    let total = total.map(|total| total.to_string());
    for (name, value) in [(ETAG, etag), (LINK, link), (TOTAL_COUNT, total)] {
        if let Some(value) = value {
            response = with_header(response, name, value);
        }
    }
    response
}

/// Responds without a body.
pub(crate) fn empty(status: StatusCode) -> Response {
    let mut response = Response::new(Full::default());
    *response.status_mut() = status;
    response
}

pub(crate) fn no_content() -> Response {
    empty(StatusCode::NO_CONTENT)
}

/// Responds to OPTIONS with the methods of a route.
pub(crate) fn options(allow: &'static str) -> Response {
    let mut response = no_content();
    let headers = response.headers_mut();
    headers.insert(ALLOW, HeaderValue::from_static(allow));
    if allow.contains("PATCH") {
        headers.insert(PATCH_TYPES, ACCEPT_PATCH);
    }
    response
}

/// Responds with a task and its entity tag.
pub(crate) fn task(status: StatusCode, task: &Task) -> Result<Response> {
    let mut body = Vec::with_capacity(256);
    task.write_json(&mut body).map_err(Error::serialize)?;
    let response = bytes(status, "application/json", body);
    Ok(with_header(response, ETAG, entity_tag(task.updated_at.0)))
}

/// Responds with 304: the client already has the version with this entity tag.
pub(crate) fn not_modified(etag: String) -> Response {
    with_header(empty(StatusCode::NOT_MODIFIED), ETAG, etag)
}

/// Adds the preference of the client that was applied (RFC 7240).
pub(crate) fn with_preference_applied(response: Response, preference: String) -> Response {
    with_header(response, PREFERENCE_APPLIED, preference)
}

/// Adds the path of a created resource.
pub(crate) fn with_location(response: Response, path: String) -> Response {
    with_header(response, LOCATION, path)
}

/// Redirects to a relative path. It is relative because a proxy may have stripped a prefix.
pub(crate) fn redirect(path: &'static str) -> Response {
    let mut response = empty(StatusCode::TEMPORARY_REDIRECT);
    let headers = response.headers_mut();
    // hyper omits a length of 0 from responses to HEAD.
    headers.insert(CONTENT_LENGTH, HeaderValue::from_static("0"));
    headers.insert(LOCATION, HeaderValue::from_static(path));
    response
}

fn with_header(mut response: Response, name: HeaderName, value: String) -> Response {
    match HeaderValue::try_from(value) {
        Ok(value) => {
            response.headers_mut().insert(name, value);
        }
        Err(_) => log::error!("invalid response header name={name}"),
    }
    response
}

/// Responds with problem details (RFC 9457).
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
        // RFC 6750 section 3.1: no error code if the request had no token.
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
        Error::IdTaken(Some(version)) => {
            return with_header(response, ETAG, entity_tag(*version));
        }
        Error::MethodNotAllowed(allow) => {
            headers.insert(ALLOW, HeaderValue::from_static(allow));
        }
        Error::UnsupportedMediaType { body, is_patch } => {
            if *is_patch {
                headers.insert(PATCH_TYPES, ACCEPT_PATCH);
            }
            // RFC 9110 section 12.5.3: tells the client which encoding to use.
            if matches!(body, UnsupportedBody::Compressed) {
                headers.insert(ACCEPT_ENCODING, HeaderValue::from_static("identity"));
            }
        }
        _ => {}
    }
    response
}
