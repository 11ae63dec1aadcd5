//! Users and their tokens.

use std::net::SocketAddr;

use hyper::Method;
use jsonwebtoken::{Algorithm, EncodingKey, crypto, dangerous};
use serde_json::{Value, json};

use super::{Request, Server, request::request_methods};

request_methods!(User);

/// A user with a session, and a client that sends their access token.
#[derive(Clone, Debug)]
pub(crate) struct User {
    addr: SocketAddr,
    pub(crate) id: String,
    pub(crate) email: String,
    pub(crate) password: String,
    pub(crate) access_token: String,
    pub(crate) refresh_token: String,
    pub(crate) session_id: String,
}

impl User {
    /// Builds a user from a response of registration or login.
    pub(super) fn from_tokens(addr: SocketAddr, tokens: &Value, password: &str) -> User {
        let text = |value: &Value| value.as_str().unwrap().to_owned();
        User {
            addr,
            id: text(&tokens["user"]["id"]),
            email: text(&tokens["user"]["email"]),
            password: password.to_owned(),
            access_token: text(&tokens["access_token"]),
            refresh_token: text(&tokens["refresh_token"]),
            session_id: text(&claims(tokens["access_token"].as_str().unwrap())["sid"]),
        }
    }

    /// Returns the path of this user's tasks.
    pub(crate) fn tasks(&self) -> String {
        format!("/api/v1/{}/tasks", self.id)
    }

    /// Returns the path of one of this user's tasks.
    pub(crate) fn path_of(&self, task: &Value) -> String {
        format!("{}/{}", self.tasks(), task["id"].as_str().unwrap())
    }

    /// Returns the same user as a client of another instance.
    pub(crate) fn on(&self, server: &Server) -> User {
        User {
            addr: server.addr(),
            ..self.clone()
        }
    }

    pub(crate) fn request(&self, method: Method, path: impl Into<String>) -> Request {
        Request::new(self.addr, method, path).bearer(&self.access_token)
    }

    pub(crate) async fn create_task(&self, title: &str) -> Value {
        self.create(json!({"title": title}))
            .await
            .expect(201)
            .json()
    }

    /// Builds a request that creates a task from this body.
    pub(crate) fn create(&self, body: Value) -> Request {
        self.post(self.tasks()).json(body)
    }
}

/// Decodes the claims of a token without verifying it.
pub(crate) fn claims(token: &str) -> Value {
    dangerous::insecure_decode_claims(token).unwrap()
}

/// Builds a JWT with any header, signed with HS256.
pub(crate) fn forge(secret: &str, header: Value, claims: Value) -> String {
    let message = format!(
        "{}.{}",
        base64url(header.to_string().as_bytes()),
        base64url(claims.to_string().as_bytes())
    );
    let key = EncodingKey::from_secret(secret.as_bytes());
    let signature = crypto::sign(message.as_bytes(), &key, Algorithm::HS256).unwrap();
    format!("{message}.{signature}")
}

/// Encodes as base64url without padding (RFC 7515, section 2).
pub(crate) fn base64url(bytes: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
    let mut text = String::new();
    for chunk in bytes.chunks(3) {
        let bits = chunk
            .iter()
            .fold(0, |bits, byte| bits << 8 | u32::from(*byte))
            << (8 * (3 - chunk.len()));
        for position in 0..=chunk.len() {
            text.push(char::from(
                ALPHABET[(bits >> (18 - 6 * position) & 63) as usize],
            ));
        }
    }
    text
}
