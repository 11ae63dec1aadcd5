//! The HTTP client of the tests.

use std::{net::SocketAddr, pin::Pin};

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::{HeaderMap, Method, header};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::{net::TcpStream, time::timeout};

use super::WAIT_TIMEOUT;

type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// A request. Awaiting it sends it on a new connection.
#[must_use]
pub(crate) struct Request {
    addr: SocketAddr,
    method: Method,
    path: String,
    headers: Vec<(String, String)>,
    body: Option<Bytes>,
}

impl Request {
    pub(super) fn new(addr: SocketAddr, method: Method, path: impl Into<String>) -> Request {
        Request {
            addr,
            method,
            path: path.into(),
            headers: Vec::new(),
            body: None,
        }
    }

    pub(crate) fn header(mut self, name: &str, value: impl AsRef<str>) -> Request {
        self.headers
            .push((name.to_owned(), value.as_ref().to_owned()));
        self
    }

    pub(crate) fn bearer(self, token: &str) -> Request {
        self.header("authorization", format!("Bearer {token}"))
    }

    pub(crate) fn json(self, body: Value) -> Request {
        self.body(body.to_string(), "application/json")
    }

    pub(crate) fn body(mut self, body: impl Into<Bytes>, content_type: &str) -> Request {
        self.body = Some(body.into());
        self.header("content-type", content_type)
    }

    /// Sets a body without a `Content-Type`.
    pub(crate) fn untyped(mut self, body: impl Into<Bytes>) -> Request {
        self.body = Some(body.into());
        self
    }

    pub(crate) async fn send(self) -> Response {
        let what = format!("{} {}", self.method, self.path);
        self.try_send()
            .await
            .unwrap_or_else(|error| panic!("{what}: {error}"))
    }

    /// Sends the request to a server that may not be running or may stop before it responds.
    pub(crate) async fn try_send(self) -> Result<Response, BoxError> {
        timeout(WAIT_TIMEOUT, self.exchange()).await?
    }

    async fn exchange(self) -> Result<Response, BoxError> {
        let stream = TcpStream::connect(self.addr).await?;
        stream.set_nodelay(true)?;
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        let connection = tokio::spawn(connection);
        let mut request = hyper::Request::builder()
            .method(self.method)
            .uri(self.path)
            .header(header::HOST, self.addr.to_string());
        for (name, value) in self.headers {
            request = request.header(name, header::HeaderValue::from_bytes(value.as_bytes())?);
        }
        let request = request.body(Full::new(self.body.unwrap_or_default()))?;
        let (parts, body) = sender.send_request(request).await?.into_parts();
        let body = body.collect().await?.to_bytes();
        connection.abort();
        Ok(Response {
            status: parts.status.as_u16(),
            headers: parts.headers,
            body,
        })
    }
}

impl IntoFuture for Request {
    type Output = Response;
    type IntoFuture = Pin<Box<dyn Future<Output = Response> + Send>>;

    fn into_future(self) -> Self::IntoFuture {
        Box::pin(self.send())
    }
}

/// Implements a method for each HTTP method in terms of the client's `request`.
macro_rules! request_methods {
    ($client:ty) => {
        request_methods!($client, get GET, post POST, put PUT, patch PATCH, delete DELETE);
    };
    ($client:ty, $($name:ident $method:ident),+) => {
        impl $client {
            // A client need not use every method.
            $(#[allow(dead_code)]
            pub(crate) fn $name(&self, path: impl Into<String>) -> Request {
                self.request(Method::$method, path)
            })+
        }
    };
}
pub(super) use request_methods;

/// A response with its whole body.
#[derive(Debug)]
pub(crate) struct Response {
    pub(crate) status: u16,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Bytes,
}

impl Response {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.body)
            .unwrap_or_else(|error| panic!("not JSON ({error}): {} {:?}", self.status, self.body))
    }

    /// Returns the value of a header; panics if it is missing.
    pub(crate) fn header(&self, name: &str) -> &str {
        self.headers
            .get(name)
            .unwrap_or_else(|| panic!("no {name} in {self:?}"))
            .to_str()
            .unwrap()
    }

    /// Asserts the status and returns the response.
    pub(crate) fn expect(self, status: u16) -> Response {
        self.assert_status(status);
        self
    }

    fn assert_status(&self, status: u16) {
        let body = String::from_utf8_lossy(&self.body);
        assert_eq!(self.status, status, "{body}");
    }

    /// Asserts that the response is problem details (RFC 9457) with this status and code, and
    /// returns the body.
    pub(crate) fn problem(&self, status: u16, code: &str) -> Value {
        self.assert_status(status);
        assert_eq!(self.header("content-type"), "application/problem+json");
        let body = self.json();
        assert_eq!(body["code"], code, "{body}");
        assert_eq!(body["status"], status, "{body}");
        assert_eq!(body["type"], format!("/problems/{code}"), "{body}");
        for member in ["title", "detail"] {
            let text = body[member].as_str();
            assert!(text.is_some_and(|text| !text.is_empty()), "{body}");
        }
        let instance = format!("urn:request:{}", self.header("x-request-id"));
        assert_eq!(body["instance"], instance, "{body}");
        // Only a 422 lists errors.
        let errors = body["errors"].as_array().map_or(0, Vec::len);
        assert_eq!(errors > 0, code == "validation_failed", "{body}");
        body
    }
}
