//! The context of a request: its head, its deadline, and the values that are logged.

use std::net::IpAddr;
use std::sync::OnceLock;
use std::time::Duration;

use hyper::Version;
use hyper::header::{AUTHORIZATION, HOST, HeaderMap, HeaderName, HeaderValue, USER_AGENT};
use hyper::http::request::Parts;
use hyper::http::uri::Authority;
use parking_lot::Mutex;
use tokio::time::Instant;
use uuid::Uuid;

use crate::auth::hasher::HashClient;
use crate::db::sessions::NewSession;
use crate::db::{Deadline, PASSWORD_REQUEST_TIMEOUT, Queries, REQUEST_TIMEOUT};
use crate::domain::Email;
use crate::error::{Error, Result};
use crate::http::client_ip::{client_ip, client_network};
use crate::http::query::Query;
use crate::http::state::AppState;
use crate::telemetry::labels::TokenRejection;

/// `X-Request-Id`.
pub(crate) const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const PREFER: HeaderName = HeaderName::from_static("prefer");
const IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");

/// The data of a request that the router, the middleware and the handlers use.
pub(crate) struct RequestContext<'a> {
    pub(crate) app: &'a AppState,
    pub(crate) head: &'a Parts,
    pub(crate) client: IpAddr,
    pub(crate) id: HeaderValue,
    timing: Mutex<Timing>,
    /// The e-mail address of a login attempt, for the log.
    pub(crate) email: OnceLock<Email>,
    route: OnceLock<&'static str>,
}

#[derive(Default)]
struct Timing {
    /// When the body ended, or when the deadline was first needed if there is no body.
    complete_at: Option<Instant>,
    /// How long the request has waited for a change.
    waited: Duration,
}

impl<'a> RequestContext<'a> {
    pub(crate) fn new(app: &'a AppState, head: &'a Parts, peer: IpAddr) -> Self {
        Self {
            app,
            head,
            client: client_ip(&head.headers, peer, &app.config.trusted_proxies),
            id: request_id(&head.headers),
            timing: Mutex::default(),
            email: OnceLock::new(),
            route: OnceLock::new(),
        }
    }

    /// Records that the body has been read. Deadlines start here, so a slow upload does not count.
    pub(crate) fn set_complete(&self) {
        let mut timing = self.timing.lock();
        timing.complete_at.get_or_insert_with(Instant::now);
    }

    /// Records that the request has waited for a change. Its deadlines then start anew.
    pub(crate) fn record_wait(&self, waited: Duration) {
        let mut timing = self.timing.lock();
        timing.waited += waited;
        timing.complete_at = Some(Instant::now());
    }

    /// How long the request has waited for a change, which is not part of its processing time.
    pub(crate) fn waited(&self) -> Duration {
        self.timing.lock().waited
    }

    /// The deadline for all database work of this request.
    pub(crate) fn deadline(&self) -> Deadline {
        self.deadline_after(REQUEST_TIMEOUT)
    }

    /// The database, limited by this request's deadline.
    pub(crate) fn queries(&self) -> Queries<'a> {
        self.app.database.with_deadline(self.deadline())
    }

    /// The database, limited by the deadline of a request that hashes passwords.
    pub(crate) fn password_queries(&self) -> Queries<'a> {
        let deadline = self.hash_client().deadline;
        self.app.database.with_deadline(deadline)
    }

    /// The client, for the hash queue. The deadline includes the time in the queue.
    pub(crate) fn hash_client(&self) -> HashClient {
        HashClient {
            network: self.network(),
            deadline: self.deadline_after(PASSWORD_REQUEST_TIMEOUT),
        }
    }

    fn deadline_after(&self, timeout: Duration) -> Deadline {
        let mut timing = self.timing.lock();
        Deadline::from(*timing.complete_at.get_or_insert_with(Instant::now) + timeout)
    }

    /// Records the pattern of the matched route.
    pub(crate) fn set_route(&self, route: &'static str) {
        self.route.get_or_init(|| route);
    }

    /// The pattern of the matched route, if any.
    pub(crate) fn route(&self) -> Option<&'static str> {
        self.route.get().copied()
    }

    /// The bearer token, if any. `Bearer null` and similar values, which scripts send before they
    /// have a token, count as none.
    pub(crate) fn bearer_token(&self) -> Result<Option<&str>> {
        let text = match single_value(&self.head.headers, &AUTHORIZATION) {
            Ok(Some(value)) => value.to_str().map_err(|_| TokenRejection::Malformed),
            Ok(None) => return Ok(None),
            Err(Repeated) => Err(TokenRejection::MultipleAuthorizationHeaders),
        };
        let text = text.map_err(Error::InvalidToken)?;
        let token = text.split_once(' ').and_then(|(scheme, token)| {
            let is_bearer = scheme.eq_ignore_ascii_case("bearer");
            is_bearer.then(|| token.trim_matches(' '))
        });
        Ok(token.filter(|token| !["", "null", "undefined"].contains(token)))
    }

    /// The value of `Idempotency-Key`: 1 to 255 visible ASCII characters.
    pub(crate) fn idempotency_key(&self) -> Result<Option<&str>> {
        let invalid = Error::MalformedRequest(
            "Idempotency-Key must be a single value of 1 to 255 visible ASCII characters",
        );
        let key = match single_value(&self.head.headers, &IDEMPOTENCY_KEY) {
            Ok(Some(value)) => value.to_str().unwrap_or_default(),
            Ok(None) => return Ok(None),
            Err(Repeated) => return Err(invalid),
        };
        let is_valid =
            (1..=255).contains(&key.len()) && key.bytes().all(|byte| byte.is_ascii_graphic());
        is_valid.then_some(Some(key)).ok_or(invalid)
    }

    /// The seconds in `Prefer: wait=N` (RFC 7240). Returns `None` if they are missing or malformed.
    pub(crate) fn wait_preference(&self) -> Option<u64> {
        let lines = self.head.headers.get_all(&PREFER).iter();
        let mut preferences = lines.flat_map(|line| {
            let mut is_quoted = false;
            line.to_str().unwrap_or_default().split(move |c| {
                is_quoted ^= c == '"';
                c == ',' && !is_quoted
            })
        });
        // The first `wait` preference counts.
        let seconds = preferences.find_map(|preference| {
            let preference = preference.split(';').next()?;
            let (name, value) = preference.split_once('=').unwrap_or((preference, ""));
            let is_wait = name.trim().eq_ignore_ascii_case("wait");
            is_wait.then(|| value.trim())
        })?;
        let unquoted = |text: &'a str| text.strip_prefix('"')?.strip_suffix('"');
        let seconds = unquoted(seconds).unwrap_or(seconds);
        let is_number = !seconds.is_empty() && seconds.bytes().all(|byte| byte.is_ascii_digit());
        is_number.then(|| seconds.parse().unwrap_or(u64::MAX))
    }

    pub(crate) fn query(&self) -> Query<'_> {
        Query::new(self.head.uri.query().unwrap_or_default())
    }

    /// The client's network, to which rate limits and shares apply.
    pub(crate) fn network(&self) -> IpAddr {
        client_network(self.client)
    }

    /// Returns a new session for this client, ready to be stored.
    pub(crate) fn new_session(&self) -> NewSession {
        let user_agent = self.head.headers.get(USER_AGENT).map(|value| {
            let text = String::from_utf8_lossy(value.as_bytes());
            text.chars().filter(|c| !c.is_control()).take(200).collect()
        });
        NewSession {
            id: Uuid::now_v7(),
            idle: self.app.config.lifetimes.refresh_idle.as_secs_f64(),
            user_agent,
            network: self.network().to_string(),
        }
    }
}

/// A header that may occur only once was repeated.
struct Repeated;

fn single_value<'a>(
    headers: &'a HeaderMap,
    name: &HeaderName,
) -> Result<Option<&'a HeaderValue>, Repeated> {
    let mut values = headers.get_all(name).iter();
    match (values.next(), values.next()) {
        (value, None) => Ok(value),
        _ => Err(Repeated),
    }
}

/// Returns the client's request ID if it is well-formed, or else a new one.
fn request_id(headers: &HeaderMap) -> HeaderValue {
    let is_valid = |value: &&HeaderValue| {
        let allowed = |byte: &u8| byte.is_ascii_alphanumeric() || b"._-".contains(byte);
        (1..=128).contains(&value.len()) && value.as_bytes().iter().all(allowed)
    };
    match headers.get(&REQUEST_ID).filter(is_valid) {
        Some(id) => id.clone(),
        None => {
            let mut buffer = Uuid::encode_buffer();
            let id = Uuid::now_v7().hyphenated().encode_lower(&mut buffer);
            HeaderValue::from_str(id).unwrap_or(HeaderValue::from_static("unknown"))
        }
    }
}

/// Checks the `Host` header, which hyper does not do: HTTP/1.1 requires exactly one, and it must be
/// well-formed (RFC 9112 section 3.2).
pub(crate) fn check_host(head: &Parts) -> Result<()> {
    let error = match single_value(&head.headers, &HOST) {
        Ok(Some(host)) if host.is_empty() || is_authority(host) => return Ok(()),
        Ok(None) if head.version == Version::HTTP_10 => return Ok(()),
        Ok(Some(_)) => "the Host header is malformed",
        Ok(None) => "the Host header is missing",
        Err(Repeated) => "the Host header is repeated",
    };
    Err(Error::MalformedRequest(error))
}

fn is_authority(host: &HeaderValue) -> bool {
    let Ok(authority) = Authority::try_from(host.as_bytes()) else {
        return false;
    };
    let name = authority.host();
    // The port may have any number of digits, including none (RFC 3986 section 3.2.3).
    let port = authority.as_str().strip_prefix(name);
    let port = port.map(|rest| rest.strip_prefix(':').unwrap_or(rest));
    !name.is_empty() && port.is_some_and(|port| port.bytes().all(|byte| byte.is_ascii_digit()))
}
