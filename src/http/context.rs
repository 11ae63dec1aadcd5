//! What a handler may ask of a request, each answer bounded and checked.

use std::borrow::Cow;
use std::net::IpAddr;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use http_body_util::{BodyExt, LengthLimitError, Limited};
use hyper::Version;
use hyper::body::{Body as _, Incoming};
use hyper::header::{
    AUTHORIZATION, CONTENT_LENGTH, EXPECT, HOST, HeaderMap, HeaderName, HeaderValue, USER_AGENT,
};
use hyper::http::request::Parts;
use hyper::http::uri::Authority;
use ipnet::IpNet;
use percent_encoding::percent_decode_str;
use serde_json::{Map, Value};
use tokio::time::{Instant, timeout};
use uuid::Uuid;

use crate::db::{Deadline, PASSWORD_REQUEST_TIMEOUT, Queries, REQUEST_TIMEOUT};
use crate::domain::{Email, ValidationError};
use crate::error::{Error, FieldError};
use crate::http::content_type;
use crate::http::state::AppState;
use crate::telemetry::labels::TokenRejection;

/// The longest task fits many times over.
const MAX_BODY_BYTES: usize = 16 * 1024;
/// From the head of a request to the end of its body.
const BODY_TIMEOUT: Duration = Duration::from_secs(20);
/// An unread body of this size is read and discarded, so that its connection can be used again.
const MAX_DRAIN_BYTES: usize = 64 * 1024;
/// The body of an early response arrives within milliseconds; a slower client reconnects instead.
const BODY_DRAIN_TIMEOUT: Duration = Duration::from_secs(1);

/// `X-Request-Id`.
pub(crate) const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");
const FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");

/// One request on its way: what the router, the guard and the handlers work on.
pub(crate) struct RequestContext<'a> {
    pub(crate) app: &'a AppState,
    pub(crate) head: &'a Parts,
    pub(crate) client: IpAddr,
    pub(crate) id: HeaderValue,
    /// When the request was complete; `None` until its body is read or its deadline is asked for.
    complete_at: Mutex<Option<Instant>>,
    /// The address that somebody tries to sign in with, for the log.
    pub(crate) email: OnceLock<Email>,
    route: OnceLock<&'static str>,
}

impl<'a> RequestContext<'a> {
    /// A request that has just arrived.
    pub(crate) fn new(app: &'a AppState, head: &'a Parts, peer: IpAddr) -> Self {
        Self {
            app,
            head,
            client: client_ip(&head.headers, peer, &app.config.trusted_proxies),
            id: request_id(&head.headers),
            complete_at: Mutex::default(),
            email: OnceLock::new(),
            route: OnceLock::new(),
        }
    }

    /// The one deadline for all database work of this request. It counts from the end of the body,
    /// however long that took to arrive; without a body, from the first use.
    pub(crate) fn deadline(&self) -> Deadline {
        self.deadline_within(REQUEST_TIMEOUT)
    }

    /// The same for a request that hashes passwords: hashing and its queues are included.
    pub(crate) fn password_deadline(&self) -> Deadline {
        self.deadline_within(PASSWORD_REQUEST_TIMEOUT)
    }

    /// The database, with this request's deadline.
    pub(crate) fn queries(&self) -> Queries<'a> {
        self.app.database.with_deadline(self.deadline())
    }

    /// The same for a request that hashes passwords.
    pub(crate) fn password_queries(&self) -> Queries<'a> {
        self.app.database.with_deadline(self.password_deadline())
    }

    fn deadline_within(&self, timeout: Duration) -> Deadline {
        let mut complete_at = self.complete_at();
        Deadline::from(*complete_at.get_or_insert_with(Instant::now) + timeout)
    }

    fn complete_at(&self) -> MutexGuard<'_, Option<Instant>> {
        let complete_at = self.complete_at.lock();
        complete_at.unwrap_or_else(PoisonError::into_inner)
    }

    /// Records the path of the matched route.
    pub(crate) fn set_route(&self, route: &'static str) {
        self.route.get_or_init(|| route);
    }

    /// The pattern of its route, where it has one.
    pub(crate) fn route(&self) -> Option<&'static str> {
        self.route.get().copied()
    }

    /// The bearer token. More than one Authorization header is none that could be trusted. What
    /// scripts send before they have a token (`Bearer null`) is no token.
    pub(crate) fn bearer_token(&self) -> Result<Option<&str>, TokenRejection> {
        let mut values = self.head.headers.get_all(AUTHORIZATION).iter();
        let Some(value) = values.next() else {
            return Ok(None);
        };
        if values.next().is_some() {
            return Err(TokenRejection::MultipleAuthorizationHeaders);
        }
        let text = value.to_str().map_err(|_| TokenRejection::Malformed)?;
        match text.split_once(' ') {
            Some((scheme, token)) if scheme.eq_ignore_ascii_case("bearer") => {
                let token = token.trim_matches(' ');
                Ok(Some(token).filter(|token| !["", "null", "undefined"].contains(token)))
            }
            _ => Ok(None),
        }
    }

    /// The first 200 characters of what signs in, for the list of sessions.
    pub(crate) fn user_agent(&self) -> Option<String> {
        let value = self.head.headers.get(USER_AGENT)?;
        let text = String::from_utf8_lossy(value.as_bytes());
        Some(text.chars().filter(|c| !c.is_control()).take(200).collect())
    }

    /// `Idempotency-Key`: 1 to 255 characters of visible ASCII.
    pub(crate) fn idempotency_key(&self) -> Result<Option<&str>, Error> {
        let mut values = self.head.headers.get_all(IDEMPOTENCY_KEY).iter();
        let Some(value) = values.next() else {
            return Ok(None);
        };
        let key = value
            .to_str()
            .ok()
            .filter(|key| (1..=255).contains(&key.len()));
        match key.filter(|key| key.bytes().all(|byte| byte.is_ascii_graphic())) {
            Some(key) if values.next().is_none() => Ok(Some(key)),
            _ => Err(Error::MalformedRequest(
                "Idempotency-Key must be one value of 1 to 255 visible ASCII characters",
            )),
        }
    }

    /// The query, taken apart.
    pub(crate) fn query(&self) -> Query<'_> {
        Query::parse(self.head.uri.query().unwrap_or_default())
    }
}

/// A query string, percent-decoded.
pub(crate) struct Query<'a> {
    pairs: Vec<(Cow<'a, str>, Option<Cow<'a, str>>)>,
}

impl<'a> Query<'a> {
    fn parse(query: &'a str) -> Self {
        let pairs = query.split('&').filter(|pair| !pair.is_empty());
        let decoded = pairs.map(|pair| {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            (decode(name).unwrap_or(Cow::Borrowed(name)), decode(value))
        });
        Self {
            pairs: decoded.collect(),
        }
    }

    /// A parameter's value, parsed; one that is there twice or that `parse` refuses is a fault.
    pub(crate) fn parameter<T>(
        &self,
        name: &'static str,
        refusal: &'static str,
        errors: &mut Vec<FieldError>,
        parse: impl Fn(&str) -> Option<T>,
    ) -> Option<T> {
        let mut values = self
            .pairs
            .iter()
            .filter(|(key, _)| key == name)
            .map(|(_, value)| value);
        let value = values.next()?;
        if values.next().is_some() {
            errors.push(FieldError::parameter(
                name,
                "duplicate",
                "the parameter must be given once",
            ));
            return None;
        }
        let parsed = value
            .as_deref()
            .filter(|text| !text.contains('\0'))
            .and_then(parse);
        if parsed.is_none() {
            errors.push(FieldError::parameter(name, "invalid_value", refusal));
        }
        parsed
    }
}

/// Percent-decoding with `+` for a space; `None` where the result is not UTF-8.
fn decode(text: &str) -> Option<Cow<'_, str>> {
    if !text.contains(['%', '+']) {
        return Some(Cow::Borrowed(text));
    }
    let spaced = text.replace('+', " ");
    percent_decode_str(&spaced)
        .decode_utf8()
        .ok()
        .map(|decoded| Cow::Owned(decoded.into_owned()))
}

/// The body of a request, not read yet.
pub(crate) struct Body<'a> {
    pub(crate) context: &'a RequestContext<'a>,
    /// `None` once the body has been read to its end.
    pub(crate) unread: &'a mut Option<Incoming>,
}

impl Body<'_> {
    /// The members of the JSON object that the body has to be.
    pub(crate) async fn json_object(self) -> Result<JsonFields, Error> {
        match self.optional_json_object().await? {
            Some(fields) => Ok(fields),
            None => Err(Error::MalformedJson("the request needs a JSON body".into())),
        }
    }

    /// The same where there may be no body at all.
    pub(crate) async fn optional_json_object(self) -> Result<Option<JsonFields>, Error> {
        let Body { context, unread } = self;
        let Some(incoming) = unread.as_mut().filter(|body| !body.is_end_stream()) else {
            return Ok(None);
        };
        content_type::check(context.head, &context.app.cors)?;
        if content_length_too_large(context.head) {
            return Err(Error::BodyTooLarge);
        }
        let bytes = match timeout(
            BODY_TIMEOUT,
            Limited::new(incoming, MAX_BODY_BYTES).collect(),
        )
        .await
        {
            Ok(Ok(collected)) => collected.to_bytes(),
            Ok(Err(error)) if error.is::<LengthLimitError>() => return Err(Error::BodyTooLarge),
            Ok(Err(_)) => {
                return Err(Error::MalformedRequest(
                    "the body is badly framed or was cut off",
                ));
            }
            Err(_) => return Err(Error::RequestTimeout),
        };
        *unread = None;
        *context.complete_at() = Some(Instant::now());
        if bytes.is_empty() {
            return Ok(None);
        }
        match serde_json::from_slice(&bytes) {
            Ok(Value::Object(fields)) => Ok(Some(JsonFields {
                fields,
                ..JsonFields::empty()
            })),
            Ok(_) => Ok(Some(JsonFields::not_an_object())),
            Err(error) => Err(Error::MalformedJson(format!(
                "the body is not JSON in UTF-8: {error}"
            ))),
        }
    }
}

/// Reads and discards what the handler left of the body. Returns false if the next request on the
/// connection cannot be found, because the rest is too long, too slow or malformed, or because the
/// client waits for `100 Continue` and may or may not send the body after another response.
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

/// Whether a body is announced that is larger than any that is read.
fn content_length_too_large(head: &Parts) -> bool {
    let length = head.headers.get(CONTENT_LENGTH);
    let length = length.and_then(|length| length.to_str().ok()?.parse().ok());
    length.is_some_and(|length: u64| length > MAX_BODY_BYTES as u64)
}

/// The members of a JSON object, and every fault found in them so far.
pub(crate) struct JsonFields {
    fields: Map<String, Value>,
    errors: Vec<FieldError>,
    /// What is no object has no members that could be wrong besides.
    is_object: bool,
}

impl JsonFields {
    /// No members at all.
    pub(crate) fn empty() -> Self {
        Self {
            fields: Map::new(),
            errors: Vec::new(),
            is_object: true,
        }
    }

    /// JSON, but no object: a fault among those of validation, which come after all others.
    fn not_an_object() -> Self {
        let fault = FieldError::at("", "wrong_type", "the body must be a JSON object");
        Self {
            fields: Map::new(),
            errors: vec![fault],
            is_object: false,
        }
    }

    /// A text that has to be there.
    pub(crate) fn required_string(&mut self, pointer: &'static str) -> Option<String> {
        match self.take(pointer) {
            Some(Value::String(text)) => Some(text),
            Some(_) => self.reject(pointer, "wrong_type", "must be a string"),
            None => self.reject(pointer, "required", "is required"),
        }
    }

    /// A text that may be missing or null: `Some(None)` is null.
    pub(crate) fn nullable_string(&mut self, pointer: &'static str) -> Option<Option<String>> {
        match self.take(pointer)? {
            Value::String(text) => Some(Some(text)),
            Value::Null => Some(None),
            _ => self.reject(pointer, "wrong_type", "must be a string or null"),
        }
    }

    /// A boolean that may be missing.
    pub(crate) fn optional_bool(&mut self, pointer: &'static str) -> Option<bool> {
        match self.take(pointer)? {
            Value::Bool(value) => Some(value),
            _ => self.reject(pointer, "wrong_type", "must be true or false"),
        }
    }

    /// Whether there is such a member, or might be: what is no object has its fault already.
    pub(crate) fn contains(&self, pointer: &'static str) -> bool {
        !self.is_object || self.fields.contains_key(name(pointer))
    }

    /// A value of the model, or the reason why it is none among the faults.
    pub(crate) fn parse<T>(
        &mut self,
        pointer: &'static str,
        text: Option<String>,
        parse: impl Fn(&str) -> Result<T, ValidationError>,
    ) -> Option<T> {
        match parse(&text?) {
            Ok(value) => Some(value),
            Err(refusal) => {
                self.errors.push(FieldError::refused(pointer, refusal));
                None
            }
        }
    }

    /// Adds a fault that somebody else found.
    pub(crate) fn push_error(&mut self, fault: FieldError) {
        if self.is_object {
            self.errors.push(fault);
        }
    }

    /// All faults at once, if there are any.
    pub(crate) fn finish(self) -> Result<(), Error> {
        if self.errors.is_empty() {
            Ok(())
        } else {
            Err(Error::Validation(self.errors))
        }
    }

    /// The values, if all of them are there; else all faults at once.
    pub(crate) fn finish_with<T>(self, values: Option<T>) -> Result<T, Error> {
        match values {
            Some(values) if self.errors.is_empty() => Ok(values),
            _ => Err(Error::Validation(self.errors)),
        }
    }

    fn take(&mut self, pointer: &'static str) -> Option<Value> {
        self.fields.remove(name(pointer))
    }

    fn reject<T>(&mut self, pointer: &'static str, code: &'static str, rule: &str) -> Option<T> {
        let detail = format!("{} {rule}", name(pointer));
        self.push_error(FieldError::at(pointer, code, detail));
        None
    }
}

fn name(pointer: &'static str) -> &'static str {
    pointer.trim_start_matches('/')
}

/// The client's own request id if it is sane, else a new one.
fn request_id(headers: &HeaderMap) -> HeaderValue {
    let sane = |value: &&HeaderValue| {
        let allowed = |byte: &u8| byte.is_ascii_alphanumeric() || b"._-".contains(byte);
        (1..=128).contains(&value.len()) && value.as_bytes().iter().all(allowed)
    };
    match headers.get(&REQUEST_ID).filter(sane) {
        Some(id) => id.clone(),
        None => {
            let mut buffer = Uuid::encode_buffer();
            let id = Uuid::now_v7().hyphenated().encode_lower(&mut buffer);
            HeaderValue::from_str(id).unwrap_or(HeaderValue::from_static("unknown"))
        }
    }
}

/// Who asks: the peer, or, where that is a proxy of ours, the last hop before it that is none.
fn client_ip(headers: &HeaderMap, peer: IpAddr, trusted: &[IpNet]) -> IpAddr {
    let is_trusted = |address: &IpAddr| trusted.iter().any(|network| network.contains(address));
    let mut client = peer.to_canonical();
    if !is_trusted(&client) {
        return client;
    }
    for value in headers.get_all(FORWARDED_FOR).iter().rev() {
        for hop in value.to_str().unwrap_or_default().rsplit(',') {
            // What is no address was not written by a proxy of ours: it ends the chain.
            let Some(address) = parse_forwarded_addr(hop.trim()) else {
                return client;
            };
            client = address;
            if !is_trusted(&client) {
                return client;
            }
        }
    }
    client
}

/// An address as proxies write it: bare, or with a port, or in brackets.
fn parse_forwarded_addr(hop: &str) -> Option<IpAddr> {
    let bare = hop.parse().ok();
    let with_port = || {
        hop.parse()
            .ok()
            .map(|address: std::net::SocketAddr| address.ip())
    };
    let bracketed = || hop.strip_prefix('[')?.strip_suffix(']')?.parse().ok();
    bare.or_else(with_port)
        .or_else(bracketed)
        .map(|address: IpAddr| address.to_canonical())
}

/// RFC 9112 section 3.2: exactly one Host, well-formed, in HTTP/1.1; hyper leaves that to us.
pub(crate) fn check_host(head: &Parts) -> Result<(), Error> {
    let mut hosts = head.headers.get_all(HOST).iter();
    match (hosts.next(), hosts.next()) {
        (Some(host), None) if host.is_empty() || is_authority(host) => Ok(()),
        (None, None) if head.version == Version::HTTP_10 => Ok(()),
        (None, None) => Err(Error::MalformedRequest("the header Host is missing")),
        (Some(_), None) => Err(Error::MalformedRequest("the header Host is malformed")),
        _ => Err(Error::MalformedRequest(
            "the header Host is there more than once",
        )),
    }
}

fn is_authority(host: &HeaderValue) -> bool {
    let Ok(authority) = Authority::try_from(host.as_bytes()) else {
        return false;
    };
    let name = authority.host();
    // What follows the name is a port, any digits (RFC 3986 section 3.2.3), or nothing.
    let port = authority.as_str().strip_prefix(name);
    let port = port.map(|rest| rest.strip_prefix(':').unwrap_or(rest));
    !name.is_empty() && port.is_some_and(|port| port.bytes().all(|byte| byte.is_ascii_digit()))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Anything, and what looks like a query or a list of addresses but for a slip.
    fn text() -> impl Strategy<Value = String> {
        prop_oneof![
            any::<String>(),
            "[a-z=&%+0-9A-F]{0,40}",
            "[0-9.:,\\[\\] ]{0,60}",
        ]
    }

    fn headers(name: HeaderName, values: &[String]) -> HeaderMap {
        let values = values
            .iter()
            .filter_map(|value| HeaderValue::from_str(value).ok());
        values.map(|value| (name.clone(), value)).collect()
    }

    proptest! {
        #![proptest_config(crate::proptest_config())]

        #[test]
        fn no_query_is_more_than_a_fault(query in text()) {
            let mut errors = Vec::new();
            let query = Query::parse(&query);
            for name in ["completed", "q", "limit", "after", ""] {
                let value = query.parameter(name, "no", &mut errors, |text| Some(text.to_owned()));
                prop_assert!(value.is_none_or(|value| !value.contains('\0')));
            }
        }

        #[test]
        fn nobody_becomes_somebody_else_by_what_they_forward(values in prop::collection::vec(text(), 0..3)) {
            let peer = IpAddr::from([192, 0, 2, 1]);
            let headers = headers(FORWARDED_FOR, &values);
            prop_assert_eq!(client_ip(&headers, peer, &[]), peer);
            // Whoever is trusted says who asks; that must be an address, and no panic.
            client_ip(&headers, peer, &["192.0.2.0/24".parse().unwrap()]);
        }

        #[test]
        fn a_request_id_is_sane_whatever_was_sent(value in text()) {
            let id = request_id(&headers(REQUEST_ID, &[value]));
            prop_assert!((1..=128).contains(&id.len()));
            prop_assert!(id.as_bytes().iter().all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(byte)));
        }
    }
}
