//! Whatever a client sends, it is answered: no 500, no connection that just closes, no end of the
//! process. The cases are made by proptest around what the parsers look at: path, query, headers,
//! JSON, tokens, and the bytes of HTTP itself.
//!
//! A few thousand of them by default; `FUZZ_CASES=1000000` runs a million of each kind.

use std::{
    env,
    io::{Read, Write},
    net::{Shutdown, SocketAddr, TcpStream},
    time::Duration,
};

use proptest::{
    prelude::*,
    test_runner::{Config, TestRunner},
};
use serde_json::{Value, json};

use crate::harness::{SECRET, Server, User, base64url, forge};

fn cases() -> u32 {
    let cases = env::var("FUZZ_CASES")
        .ok()
        .and_then(|text| text.parse().ok());
    cases.unwrap_or(500)
}

const CLOSED: &str = "closed without an answer";

/// Sends bytes and reads one answer; the connection is kept for the next where it can be.
struct Wire {
    address: SocketAddr,
    stream: Option<TcpStream>,
    /// What is sent may not be one request: each has a connection of its own, and an end.
    once: bool,
}

impl Wire {
    fn to(address: SocketAddr, once: bool) -> Wire {
        Wire {
            address,
            stream: None,
            once,
        }
    }

    fn ask(&mut self, bytes: &[u8]) -> Result<u16, String> {
        let reused = self.stream.is_some();
        match self.exchange(bytes) {
            // A body that nobody asked for may have ended the connection behind its answer.
            Err(reason) if reused && reason == CLOSED => self.exchange(bytes),
            result => result,
        }
    }

    fn exchange(&mut self, bytes: &[u8]) -> Result<u16, String> {
        let mut stream = match self.stream.take() {
            Some(stream) => stream,
            None => TcpStream::connect(self.address).map_err(|error| error.to_string())?,
        };
        // Longer than any bound of the service that a test wants to meet.
        let patience = Some(Duration::from_secs(30));
        stream.set_read_timeout(patience).unwrap();
        stream.set_nodelay(true).unwrap();
        // Who is refused early may find the connection closed while still sending.
        let _ = stream.write_all(bytes);
        if self.once {
            let _ = stream.shutdown(Shutdown::Write);
        }
        let mut answer = Vec::new();
        let mut piece = [0; 16 * 1024];
        let head = loop {
            if let Some(end) = answer.windows(4).position(|window| window == b"\r\n\r\n") {
                if !answer.starts_with(b"HTTP/1.1 100 ") {
                    break end + 4;
                }
                answer.drain(..end + 4);
                continue;
            }
            match stream.read(&mut piece) {
                Ok(0) if answer.is_empty() => return Err(CLOSED.into()),
                Ok(0) => {
                    return Err(format!(
                        "closed after {:?}",
                        String::from_utf8_lossy(&answer)
                    ));
                }
                Ok(length) => answer.extend_from_slice(&piece[..length]),
                Err(error) => return Err(format!("no answer: {error}")),
            }
        };
        let text = String::from_utf8_lossy(&answer[..head]).to_ascii_lowercase();
        let status: u16 = text
            .strip_prefix("http/1.1 ")
            .or_else(|| text.strip_prefix("http/1.0 "))
            .and_then(|rest| rest.get(..3)?.parse().ok())
            .ok_or(format!("not an answer: {text:?}"))?;
        let length: usize = text
            .lines()
            .find_map(|line| line.strip_prefix("content-length: ")?.parse().ok())
            .unwrap_or(0);
        let body_follows = !bytes.starts_with(b"HEAD ") && status != 204 && status != 304;
        while body_follows && answer.len() < head + length {
            match stream.read(&mut piece) {
                Ok(0) | Err(_) => return Err(format!("{status}, cut off in mid-answer")),
                Ok(length) => answer.extend_from_slice(&piece[..length]),
            }
        }
        let asked_to_close = bytes
            .to_ascii_lowercase()
            .windows(10)
            .any(|word| word == b"connection");
        let closes = self.once || asked_to_close || text.contains("connection: close");
        if !closes && !(400..500).contains(&status) {
            self.stream = Some(stream);
        }
        // What we cannot parse hyper answers alone, with these and without a body of ours.
        if status >= 500 {
            return Err(format!("{status}: {:?}", String::from_utf8_lossy(&answer)));
        }
        Ok(status)
    }
}

/// Runs cases of this kind against a server of their own.
async fn fuzz<S>(
    once: bool,
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
        let mut wire = Wire::to(address, once);
        let wire = std::cell::RefCell::new(&mut wire);
        let result = TestRunner::new(config).run(&strategy, |case| {
            let bytes = bytes(&user, case);
            let answer = wire.borrow_mut().ask(&bytes);
            answer.map(|_| ()).map_err(|reason| {
                wire.borrow_mut().stream = None;
                TestCaseError::fail(format!(
                    "{reason}\nto {:?}",
                    String::from_utf8_lossy(&bytes)
                ))
            })
        });
        result.unwrap_or_else(|error| panic!("{error}"));
    })
    .await
    .unwrap();
    server.get("/healthz").send().await.expect(200);
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
    // The answer to it ends in a tunnel; hyper closes it.
    .prop_filter("no tunnels", |method| method != "CONNECT")
}

/// A piece of text as nobody expects it, percent-encoded so that it can stand in a target.
fn odd() -> impl Strategy<Value = String> {
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

/// A segment: of a route, of an id, encoded, or bytes that decode to no text.
fn segment(user: &User) -> impl Strategy<Value = String> + use<> {
    prop_oneof![
        3 => prop::sample::select(vec![
            "api", "v1", "auth", "tasks", "sessions", "me", "register", "login", "refresh", "logout",
            "password", "complete", "healthz", "docs", "problems", "openapi.json", "", ".", "..",
        ])
        .prop_map(str::to_owned),
        2 => Just(user.id.clone()),
        1 => any::<u128>().prop_map(|bits| uuid::Uuid::from_u128(bits).to_string()),
        2 => odd().prop_map(|text| encoded(&text)),
        1 => "(%[0-9a-fA-F]{2}){1,8}",
        1 => "[!$&'()*+,;=:@%A-Za-z0-9._~-]{1,20}",
    ]
}

/// A path near a route, or any at all.
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
        1 => odd().prop_map(|text| encoded(&text)),
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
        odd().prop_map(|text| encoded(&text)),
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
async fn any_path_and_query_is_answered() {
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

/// Values of every type, with what is close to right among them.
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
            1 => odd(),
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
        // Right JSON with a byte that is not.
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
async fn any_body_is_answered() {
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
            // Signing up and in costs a hash each, and says nothing new about a body.
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
async fn any_header_is_answered() {
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
                // What the framing hangs on has a test of its own.
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
async fn any_token_is_answered() {
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
            let bent = (Just(user.access_token.clone()), any::<prop::sample::Index>(), 0x21_u8..0x7f)
                .prop_map(|(token, at, byte)| {
                    let mut token = token.into_bytes();
                    let at = at.index(token.len());
                    token[at] = byte;
                    String::from_utf8(token).unwrap()
                });
            let cut = (Just(user.access_token.clone()), any::<prop::sample::Index>())
                .prop_map(|(token, at)| token[..at.index(token.len())].to_owned());
            let parts = prop::collection::vec(any::<Vec<u8>>(), 0..5).prop_map(|parts| {
                let parts: Vec<_> = parts.iter().map(|part| base64url(part)).collect();
                parts.join(".")
            });
            let token = prop_oneof![4 => signed, 2 => bent, 1 => cut, 1 => parts, 1 => "[!-~]{0,400}"];
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
async fn any_bytes_are_answered() {
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
            // Whatever it is now, it has an end: a head that ends, and whoever counts on more
            // bytes of a body has them.
            bytes.extend(b"\r\n\r\n");
            bytes.extend([b'0'; 64]);
            bytes.extend(b"\r\n\r\n");
            bytes
        },
    )
    .await;
}
