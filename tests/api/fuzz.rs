//! Fuzz tests: the service responds to any input, without a 500, a connection that closes without a
//! response, or a crash. proptest generates paths, queries, headers, JSON, tokens and raw HTTP.
//!
//! By default 500 cases of each kind; `FUZZ_CASES` sets the number.

use std::{cell::RefCell, env, net::SocketAddr};

use proptest::{
    prelude::*,
    test_runner::{Config, TestRunner},
};
use serde_json::{Value, json};
use tokio::runtime::Handle;

use crate::harness::{SECRET, Server, User, Wire, base64url, forge};

fn cases() -> u32 {
    let cases = env::var("FUZZ_CASES")
        .ok()
        .and_then(|text| text.parse().ok());
    cases.unwrap_or(500)
}

const CLOSED: &str = "closed without a response";

/// Sends one request after another, over one connection where possible.
struct FuzzClient {
    address: SocketAddr,
    connection: Option<Wire>,
    /// Whether each case uses a new connection, because its bytes may not be exactly one request.
    one_shot: bool,
}

impl FuzzClient {
    async fn send(&mut self, bytes: &[u8]) -> Result<(), String> {
        let reused = self.connection.is_some();
        match self.exchange(bytes).await {
            // An unread body may have ended the connection after the previous response.
            Err(reason) if reused && reason == CLOSED => self.exchange(bytes).await,
            result => result,
        }
    }

    async fn exchange(&mut self, bytes: &[u8]) -> Result<(), String> {
        let mut wire = match self.connection.take() {
            Some(wire) => wire,
            None => Wire::connect(self.address).await.with_long_timeout(),
        };
        wire.send(bytes).await;
        if self.one_shot {
            wire.finish().await;
        }
        let has_body = !bytes.starts_with(b"HEAD ");
        let response = loop {
            match wire.next(has_body).await {
                Some(response) if response.status == 100 => {}
                Some(response) => break response,
                None => return Err(CLOSED.into()),
            }
        };
        if response.status >= 500 {
            return Err(format!("{}\n{}", response.head, response.body));
        }
        let names_connection = bytes
            .to_ascii_lowercase()
            .windows(10)
            .any(|word| word == b"connection");
        let closes = names_connection || response.header("connection") == Some("close");
        if !self.one_shot && !closes && response.status < 400 {
            self.connection = Some(wire);
        }
        Ok(())
    }
}

/// Runs cases of this kind against a new server.
async fn fuzz<S>(
    one_shot: bool,
    strategy: impl Fn(&User) -> S + Send + 'static,
    bytes: fn(&User, S::Value) -> Vec<u8>,
) where
    S: Strategy + 'static,
{
    let server = Server::start().await;
    let user = server.user().await;
    let address = server.addr();
    tokio::task::spawn_blocking(move || {
        let strategy = strategy(&user);
        let config = Config {
            cases: cases(),
            failure_persistence: None,
            max_shrink_iters: 2000,
            ..Config::default()
        };
        let client = RefCell::new(FuzzClient {
            address,
            connection: None,
            one_shot,
        });
        let result = TestRunner::new(config).run(&strategy, |case| {
            let bytes = bytes(&user, case);
            let sent = Handle::current().block_on(client.borrow_mut().send(&bytes));
            sent.map_err(|reason| {
                let sent = String::from_utf8_lossy(&bytes);
                TestCaseError::fail(format!("{reason}\nto {sent:?}"))
            })
        });
        result.unwrap_or_else(|error| panic!("{error}"));
    })
    .await
    .unwrap();
    server.get("/healthz").await.expect(200);
    let log = server.log();
    assert!(
        !log.contains("internal error") && !log.contains("panic"),
        "{log}"
    );
    assert_eq!(server.stop().await.code(), Some(0), "{log}");
}

fn method() -> impl Strategy<Value = String> {
    prop_oneof![
        8 => prop::sample::select(vec!["GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"])
            .prop_map(str::to_owned),
        1 => "[A-Z!#$%&'*+.^_`|~-]{1,12}",
    ]
    // A response to CONNECT turns the connection into a tunnel, which hyper closes.
    .prop_filter("CONNECT opens a tunnel", |method| method != "CONNECT")
}

/// Generates unusual text, which callers percent-encode if it becomes part of a target.
fn unusual_text() -> impl Strategy<Value = String> {
    prop_oneof![
        "[ -~]{0,20}",
        "\\PC{0,20}",
        any::<Vec<u8>>().prop_map(|bytes| String::from_utf8_lossy(&bytes).into_owned()),
        Just("0".repeat(300)),
        Just("%".to_owned()),
        Just("..".to_owned()),
        Just("\0".to_owned()),
    ]
}

fn encoded(text: &str) -> String {
    percent_encoding::utf8_percent_encode(text, percent_encoding::NON_ALPHANUMERIC).to_string()
}

/// Generates path segments: parts of routes, ids, encoded text, and bytes that are not UTF-8.
fn segment(user: &User) -> impl Strategy<Value = String> + use<> {
    prop_oneof![
        3 => prop::sample::select(vec![
            "api", "v1", "auth", "tasks", "sessions", "me", "register", "login", "refresh", "logout",
            "password", "complete", "healthz", "docs", "problems", "openapi.json", "", ".", "..",
        ])
        .prop_map(str::to_owned),
        2 => Just(user.id.clone()),
        1 => any::<u128>().prop_map(|bits| uuid::Uuid::from_u128(bits).to_string()),
        2 => unusual_text().prop_map(|text| encoded(&text)),
        1 => "(%[0-9a-fA-F]{2}){1,8}",
        1 => "[!$&'()*+,;=:@%A-Za-z0-9._~-]{1,20}",
    ]
}

/// Generates routes, similar paths and arbitrary ones.
fn path(user: &User) -> impl Strategy<Value = String> + use<> {
    let tasks = user.tasks();
    let routes = vec![
        tasks.clone(),
        tasks.clone() + "/",
        tasks.clone() + "/019b3f53-0000-7000-8000-000000000000",
        tasks + "/019b3f53-0000-7000-8000-000000000000/complete",
        "/api/v1/auth/me".into(),
        "/api/v1/auth/sessions".into(),
        "/api/v1/auth/refresh".into(),
    ];
    prop_oneof![
        2 => prop::sample::select(routes.clone()),
        2 => (prop::sample::select(routes), segment(user)).prop_map(|(route, tail)| route + "/" + &tail),
        3 => prop::collection::vec(segment(user), 0..8).prop_map(|parts| "/".to_owned() + &parts.join("/")),
    ]
}

fn query() -> impl Strategy<Value = String> {
    let name = prop_oneof![
        8 => prop::sample::select(vec!["completed", "q", "sort", "limit", "after", "total"]).prop_map(str::to_owned),
        1 => unusual_text().prop_map(|text| encoded(&text)),
        1 => "(%[0-9a-f]{2}){1,4}|%|%4|[a-z+]{0,5}",
    ];
    let value = prop_oneof![
        prop::sample::select(vec![
            "true",
            "false",
            "-created_at",
            "created_at",
            "0",
            "1",
            "1000",
            "1001",
            "-1",
            "1e3",
            "",
            "9223372036854775808",
            "%2B1",
            "%00",
            "%25%5F%5C",
            "true&true",
        ])
        .prop_map(str::to_owned),
        unusual_text().prop_map(|text| encoded(&text)),
        "(%[0-9a-fA-F]{2}){1,8}",
        "[A-Za-z0-9_-]{1,80}",
    ];
    prop::collection::vec((name, value), 0..6).prop_map(|pairs| {
        let pairs: Vec<_> = pairs
            .into_iter()
            .map(|(name, value)| name + "=" + &value)
            .collect();
        pairs.join("&")
    })
}

fn head(method: &str, target: &str, token: &str) -> String {
    format!("{method} {target} HTTP/1.1\r\nHost: todo.example\r\nAuthorization: Bearer {token}\r\n")
}

#[tokio::test]
async fn responds_to_any_path_and_query() {
    fuzz(
        false,
        |user| (method(), path(user), prop::option::of(query())),
        |user, (method, path, query)| {
            let target = query.map_or(path.clone(), |query| path + "?" + &query);
            let head = head(&method, &target, &user.access_token);
            (head + "Content-Length: 0\r\n\r\n").into_bytes()
        },
    )
    .await;
}

/// Generates JSON values of every type, including almost valid ones.
fn value() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(|number| json!(number)),
        "\\PC{0,30}".prop_map(Value::from),
        "[ \\t\u{a0}\u{2003}]{0,3}[a-z🌿\\x00]{0,10}".prop_map(Value::from),
        (190_usize..210).prop_map(|length| Value::from("é".repeat(length))),
        (990_usize..1010).prop_map(|length| Value::from("🌿".repeat(length))),
        "[a-z]{1,8}@[a-z]{1,8}".prop_map(Value::from),
    ];
    leaf.prop_recursive(4, 24, 5, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..5).prop_map(Value::from),
            prop::collection::btree_map("[a-z]{0,6}", inner, 0..5)
                .prop_map(|members| members.into_iter().collect()),
        ]
    })
}

fn body() -> impl Strategy<Value = Vec<u8>> {
    let name = || {
        prop_oneof![
            6 => prop::sample::select(vec![
                "title", "description", "completed", "email", "password", "refresh_token",
                "current_password", "new_password",
            ])
            .prop_map(str::to_owned),
            1 => unusual_text(),
        ]
    };
    let object = || {
        prop::collection::vec((name(), value()), 0..6).prop_map(|members| {
            let object: Value = members.into_iter().collect();
            object.to_string().into_bytes()
        })
    };
    prop_oneof![
        6 => object(),
        2 => value().prop_map(|value| value.to_string().into_bytes()),
        // Valid JSON with one byte changed.
        2 => (object(), any::<prop::sample::Index>(), any::<u8>()).prop_map(|(mut text, at, byte)| {
            let at = at.index(text.len());
            text[at] = byte;
            text
        }),
        1 => any::<Vec<u8>>(),
        1 => (1_usize..300).prop_map(|depth| "[".repeat(depth).into_bytes()),
        1 => (1_usize..8000).prop_map(|depth| r#"{"title":"#.repeat(depth / 9).into_bytes()),
        1 => r#"\{"title": *"(\\u[0-9a-fA-F]{4}|\\[a-z"\\/]|[ -~]){0,12}"(, *"title": *1)?\}"#
            .prop_map(String::into_bytes),
        1 => r#"\{"completed": *-?[0-9]{1,400}(\.[0-9]+)?([eE][+-]?[0-9]{1,4})?\}"#.prop_map(String::into_bytes),
    ]
}

#[tokio::test]
async fn responds_to_any_body() {
    fuzz(
        false,
        |user| {
            let types = prop::sample::select(vec![
                "application/json",
                "application/json; charset=utf-8",
                "application/merge-patch+json",
                "application/json;charset=latin1",
                "text/plain",
                "",
                ";;;",
            ]);
            let methods = prop::sample::select(vec!["POST", "PUT", "PATCH", "DELETE", "GET"]);
            let routes = prop::sample::select(vec![
                user.tasks(),
                user.tasks() + "/019b3f53-0000-7000-8000-000000000000",
                user.tasks() + "/019b3f53-0000-7000-8000-000000000000/complete",
                "/api/v1/auth/refresh".into(),
                "/api/v1/auth/login".into(),
                "/api/v1/auth/register".into(),
                "/api/v1/auth/password".into(),
            ]);
            (methods, routes, types, body())
        },
        |user, (method, route, content_type, body)| {
            let mut bytes = head(method, &route, &user.access_token);
            bytes += &format!(
                "Content-Type: {content_type}\r\nContent-Length: {}\r\n\r\n",
                body.len()
            );
            [bytes.into_bytes(), body].concat()
        },
    )
    .await;
}

#[tokio::test]
async fn responds_to_any_header() {
    fuzz(
        false,
        |user| {
            let name = prop_oneof![
                8 => prop::sample::select(vec![
                    "Authorization", "If-Match", "If-None-Match", "Idempotency-Key", "X-Request-Id",
                    "X-Forwarded-For", "Origin", "Access-Control-Request-Method", "Accept", "Expect",
                    "Content-Type", "User-Agent", "Host", "Connection", "Cookie",
                    "Access-Control-Request-Headers", "Access-Control-Request-Private-Network",
                ])
                .prop_map(str::to_owned),
                1 => "[A-Za-z0-9!#$%&'*+.^_`|~-]{1,20}",
            ];
            let value = prop_oneof![
                prop::sample::select(vec![
                    "*", "W/\"1\"", "\"1\", \"2\"", "\"", ",", "Bearer", "Bearer ", "Basic YTpi", "close",
                    "100-continue", "null", "https://a.example", "application/json", "::1, 10.0.0.1",
                    "todo.example:99999", "[::1]:8000", "a b",
                ])
                .prop_map(|text| text.as_bytes().to_vec()),
                "[\\t -~]{0,40}".prop_map(String::into_bytes),
                prop::collection::vec(prop_oneof![Just(b'\t'), b' '..=b'~', 0x80_u8..=0xff], 0..300),
            ];
            let extra = prop::collection::vec((name, value), 1..6);
            let tail = prop_oneof![Just(""), Just("/019b3f53-0000-7000-8000-000000000000")];
            let methods = prop::sample::select(vec!["GET", "POST", "PATCH", "DELETE", "OPTIONS"]);
            (methods, Just(user.tasks()), tail, extra)
        },
        |user, (method, tasks, tail, extra)| {
            let mut bytes = head(method, &(tasks + tail), &user.access_token).into_bytes();
            for (name, value) in extra {
                // `responds_to_any_bytes` covers the headers that determine the framing.
                if ["content-length", "transfer-encoding", "upgrade"].contains(&&*name.to_lowercase()) {
                    continue;
                }
                bytes.extend([name.as_bytes(), b": ", &value, b"\r\n"].concat());
            }
            let body = r#"{"title": "any header"}"#;
            bytes.extend(format!("Content-Length: {}\r\n\r\n{body}", body.len()).into_bytes());
            bytes
        },
    )
    .await;
}

#[tokio::test]
async fn responds_to_any_token() {
    fuzz(
        false,
        |user| {
            let now = jiff::Timestamp::now().as_second();
            let right = json!({
                "user_id": user.id, "sub": user.id, "email": user.email, "sid": user.session_id,
                "iat": now, "exp": now + 3600,
            });
            let claims = (
                Just(right),
                prop::collection::vec(
                    (
                        prop::sample::select(vec!["user_id", "sub", "email", "sid", "iat", "exp", "nbf", "aud"]),
                        value(),
                    ),
                    0..4,
                ),
            )
                .prop_map(|(mut claims, changes)| {
                    for (name, value) in changes {
                        claims[name] = value;
                    }
                    claims
                });
            let header = prop_oneof![
                6 => Just(json!({"alg": "HS256", "typ": "JWT"})),
                2 => (prop::sample::select(vec!["alg", "typ", "kid", "crit", "b64", "zip"]), value())
                    .prop_map(|(name, value)| {
                        let mut header = json!({"alg": "HS256", "typ": "JWT"});
                        header[name] = value;
                        header
                    }),
                1 => value(),
            ];
            let signed = (header, claims).prop_map(|(header, claims)| forge(SECRET, header, claims));
            let changed = (Just(user.access_token.clone()), any::<prop::sample::Index>(), 0x21_u8..0x7f)
                .prop_map(|(token, at, byte)| {
                    let mut token = token.into_bytes();
                    let at = at.index(token.len());
                    token[at] = byte;
                    String::from_utf8(token).unwrap()
                });
            let truncated = (Just(user.access_token.clone()), any::<prop::sample::Index>())
                .prop_map(|(token, at)| token[..at.index(token.len())].to_owned());
            let parts = prop::collection::vec(any::<Vec<u8>>(), 0..5).prop_map(|parts| {
                let parts: Vec<_> = parts.iter().map(|part| base64url(part)).collect();
                parts.join(".")
            });
            let token = prop_oneof![4 => signed, 2 => changed, 1 => truncated, 1 => parts, 1 => "[!-~]{0,400}"];
            (token, any::<bool>())
        },
        |user, (token, refreshing)| {
            if refreshing {
                let body = json!({"refresh_token": token}).to_string();
                let length = body.len();
                format!(
                    "POST /api/v1/auth/refresh HTTP/1.1\r\nHost: a\r\nContent-Length: {length}\r\n\r\n{body}"
                )
                .into_bytes()
            } else {
                (head("GET", &user.tasks(), &token) + "\r\n").into_bytes()
            }
        },
    )
    .await;
}

#[tokio::test]
async fn responds_to_any_bytes() {
    fuzz(
        true,
        |user| {
            let tasks = user.tasks();
            let body = r#"{"title": "any bytes"}"#;
            let plain = head("POST", &tasks, &user.access_token);
            let whole = vec![
                format!("{plain}Content-Length: {}\r\n\r\n{body}", body.len()),
                format!(
                    "{plain}Transfer-Encoding: chunked\r\n\r\n{:x}\r\n{body}\r\n0\r\n\r\n",
                    body.len()
                ),
                format!(
                    "GET {tasks}?limit=2 HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {}\r\n\r\n",
                    user.access_token
                ),
                "OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n".to_owned(),
            ];
            let change = (any::<prop::sample::Index>(), 0_u8..4, any::<u8>());
            (
                prop::sample::select(whole),
                prop::collection::vec(change, 1..6),
            )
        },
        |_, (whole, changes)| {
            let mut bytes = whole.into_bytes();
            for (at, what, byte) in changes {
                let at = at.index(bytes.len().max(1));
                match what {
                    0 => bytes.insert(at, byte),
                    1 => bytes.truncate(at),
                    _ if bytes.is_empty() => {}
                    2 => drop(bytes.remove(at)),
                    _ => bytes[at] = byte,
                }
            }
            // Terminate the head, and send the number of bytes that a Content-Length may have promised.
            bytes.extend(b"\r\n\r\n");
            bytes.extend([b'0'; 64]);
            bytes.extend(b"\r\n\r\n");
            bytes
        },
    )
    .await;
}
