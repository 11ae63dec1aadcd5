//! Users and their tokens.

use std::net::SocketAddr;

use hyper::Method;
use jsonwebtoken::{Algorithm, EncodingKey, crypto, dangerous};
use serde_json::{Value, json};
use tokio_postgres::Client;
use uuid::Uuid;

use super::{PASSWORD, PASSWORD_HASH, Request, SECRET, Server, request::request_methods, unique};

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

    /// Inserts users with a session each, as if they had registered, and signs their tokens.
    pub(super) async fn insert(server: &Server, sql: &Client, count: usize) -> Vec<User> {
        let unix_now = jiff::Timestamp::now().as_second();
        let new = |_| {
            let (id, session_id) = (Uuid::now_v7(), Uuid::now_v7());
            let email = format!("user{}@example.com", unique());
            let claims = json!({
                "user_id": id, "sub": id, "email": email, "sid": session_id, "epoch": 0,
                "iat": unix_now, "exp": unix_now + 86400,
            });
            let refresh_claims = json!({"sid": session_id, "generation": 1});
            User {
                addr: server.addr(),
                id: id.to_string(),
                access_token: forge(SECRET, json!({"alg": "HS256", "typ": "JWT"}), claims),
                refresh_token: forge(
                    &sign(SECRET, "todo-api refresh token v1"),
                    json!({"alg": "HS256", "typ": "refresh+jwt"}),
                    refresh_claims,
                ),
                email,
                password: PASSWORD.to_owned(),
                session_id: session_id.to_string(),
            }
        };
        let users: Vec<User> = (0..count).map(new).collect();
        let insert = "
            with account as (
                insert into users (id, email, password_hash, created_at, updated_at)
                select id::uuid, email, $4, now(), now()
                from unnest($1::text[], $2::text[]) u (id, email)
            ), session as (
                insert into sessions (id, user_id, generation, rotated_at, created_at, last_used_at,
                                      expires_at)
                select sid::uuid, id::uuid, 1, now(), now(), now(), now() + interval '30 days'
                from unnest($1::text[], $3::text[]) u (id, sid)
            )
            insert into login_networks (user_id, network, last_used_at)
            select id::uuid, '127.0.0.1', now() from unnest($1::text[]) id";
        let column = |field: fn(&User) -> &String| users.iter().map(field).collect::<Vec<_>>();
        let (ids, emails) = (column(|user| &user.id), column(|user| &user.email));
        let sessions = column(|user| &user.session_id);
        sql.execute(insert, &[&ids, &emails, &sessions, &PASSWORD_HASH])
            .await
            .unwrap();
        users
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
    let signature = sign(secret, &message);
    format!("{message}.{signature}")
}

fn sign(secret: &str, message: &str) -> String {
    let key = EncodingKey::from_secret(secret.as_bytes());
    crypto::sign(message.as_bytes(), &key, Algorithm::HS256).unwrap()
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
