//! Responses that are sent before the request's body has been read: the connection stays usable, or the
//! response has `Connection: close`.

use std::time::{Duration, Instant};

use futures_util::future::join_all;
use tokio::time::sleep;

use crate::harness::{Server, User, Wire, WireResponse, head};

const BODY: &str = r#"{"title":"a"}"#;
const LENGTH: &str = "Content-Length: 13\r\n";
const CHUNKED: &str = "Transfer-Encoding: chunked\r\n";
const CHUNKS: &str = "4\r\n{\"ti\r\n9\r\ntle\":\"a\"}\r\n0\r\n\r\n";

/// A request whose body the service does not read, and the status of its response.
struct EarlyResponse {
    method: &'static str,
    head: String,
    body: String,
    status: u16,
}

/// Returns a request for each reason to respond without reading the body.
fn early_responses(ann: &User, bob: &User) -> Vec<EarlyResponse> {
    let own = Some(ann.access_token.as_str());
    let tasks = ann.tasks();
    let unknown = format!("{tasks}/no-such-task");
    let one = |method, target: &str, token, more: &str, status| EarlyResponse {
        method,
        head: head(method, target, token, &format!("{LENGTH}{more}")),
        body: BODY.into(),
        status,
    };
    let large = "x".repeat(20_000);
    vec![
        one("POST", &tasks, None, "", 401),
        one("POST", &tasks, Some("bad"), "", 401),
        one("PATCH", &unknown, None, "", 401),
        one("POST", &bob.tasks(), own, "", 403),
        one("POST", "/nowhere", None, "", 404),
        one("PUT", &tasks, own, "", 405),
        one("BREW", "/healthz", None, "", 405),
        one("POST", &tasks, own, "Content-Type: text/plain\r\n", 415),
        one("GET", &tasks, own, "", 200),
        one("HEAD", &tasks, own, "", 200),
        one("GET", &unknown, own, "", 404),
        one("GET", "/openapi.json", None, "", 200),
        one("DELETE", &unknown, own, "", 404),
        one("OPTIONS", &tasks, None, "", 204),
        EarlyResponse {
            method: "POST",
            head: head("POST", &tasks, own, "Content-Length: 20000\r\n"),
            body: large,
            status: 413,
        },
        EarlyResponse {
            method: "POST",
            head: head("POST", &tasks, None, CHUNKED),
            body: CHUNKS.into(),
            status: 401,
        },
        EarlyResponse {
            method: "GET",
            head: head("GET", "/healthz", None, CHUNKED),
            body: CHUNKS.into(),
            status: 200,
        },
    ]
}

/// How a request and its body arrive.
#[derive(Clone, Copy, Debug)]
enum Arrival {
    Together,
    BodyAfter(Duration),
    InParts,
}

const ARRIVALS: [Arrival; 4] = [
    Arrival::Together,
    Arrival::BodyAfter(Duration::from_millis(1)),
    Arrival::BodyAfter(Duration::from_millis(50)),
    Arrival::InParts,
];

impl EarlyResponse {
    async fn send(&self, wire: &mut Wire, arrival: Arrival) -> WireResponse {
        match arrival {
            Arrival::Together => wire.send(format!("{}{}", self.head, self.body)).await,
            Arrival::BodyAfter(delay) => {
                wire.send(&self.head).await;
                sleep(delay).await;
                wire.send(&self.body).await;
            }
            Arrival::InParts => {
                wire.send(&self.head).await;
                let bytes = self.body.as_bytes();
                for part in bytes.chunks(bytes.len().div_ceil(5)) {
                    sleep(Duration::from_millis(2)).await;
                    wire.send(part).await;
                }
            }
        }
        let response = match self.method {
            "HEAD" => wire.response_to_head().await,
            _ => wire.response().await,
        };
        assert_eq!(response.status, self.status, "{arrival:?} {}", self.head);
        response
    }

    /// Asserts that the connection stays usable: repeats this request, each time followed by a valid one.
    async fn assert_connection_stays_usable(&self, server: &Server, arrival: Arrival) {
        let mut wire = Wire::open(server).await;
        for _ in 0..10 {
            let response = self.send(&mut wire, arrival).await;
            assert_eq!(response.header("connection"), None, "{}", self.head);
            wire.send(head("GET", "/healthz", None, "")).await;
            let next = wire.response_or_close().await;
            let next = next.unwrap_or_else(|| panic!("closed after {arrival:?} {}", self.head));
            assert_eq!(next.status, 200, "{arrival:?} {}", self.head);
        }
    }
}

#[tokio::test]
async fn serves_the_next_request_after_an_early_response() {
    let server = Server::shared().await;
    let (ann, bob) = (server.user().await, server.user().await);
    let all = early_responses(&ann, &bob);
    let all = all
        .iter()
        .flat_map(|early| ARRIVALS.map(|arrival| (early, arrival)));
    join_all(all.map(|(early, arrival)| early.assert_connection_stays_usable(server, arrival)))
        .await;
}

#[tokio::test]
async fn a_429_leaves_the_connection_usable() {
    let server = Server::with(&[("AUTH_RATE_PER_MINUTE", "1")]).await;
    server.user().await;
    let early = EarlyResponse {
        method: "POST",
        head: head("POST", "/api/v1/auth/login", None, LENGTH),
        body: BODY.into(),
        status: 429,
    };
    for arrival in ARRIVALS {
        early.assert_connection_stays_usable(&server, arrival).await;
    }
}

#[tokio::test]
async fn a_database_outage_leaves_connections_usable() {
    let server = Server::shared().await;
    let ann = server.user().await;
    let nowhere = "postgres://todo@127.0.0.1:1/todo?sslmode=disable";
    let offline = Server::listening(&[("DATABASE_URL", nowhere)]).await;
    let early = EarlyResponse {
        method: "POST",
        head: head("POST", &ann.tasks(), Some(&ann.access_token), LENGTH),
        body: BODY.into(),
        status: 503,
    };
    join_all(ARRIVALS.map(|arrival| early.assert_connection_stays_usable(&offline, arrival))).await;
}

#[tokio::test]
async fn serves_requests_pipelined_behind_an_unread_body_in_order() {
    let server = Server::shared().await;
    let (ann, bob) = (server.user().await, server.user().await);
    let good = head("GET", "/healthz", None, "");
    let mut all = early_responses(&ann, &bob);
    all.retain(|early| early.method != "HEAD");
    let stream: String = all
        .iter()
        .map(|early| format!("{}{}{good}", early.head, early.body))
        .collect();
    for piece in [stream.len(), 8191, 500] {
        let mut wire = Wire::open(server).await;
        for bytes in stream.as_bytes().chunks(piece) {
            wire.send(bytes).await;
            tokio::task::yield_now().await;
        }
        for early in &all {
            assert_eq!(wire.response().await.status, early.status, "{}", early.head);
            assert_eq!(wire.response().await.status, 200, "after {}", early.head);
        }
    }
}

/// Asserts that the response has `Connection: close` and is the last one on the connection.
async fn assert_last_response(wire: &mut Wire, status: u16) {
    let response = wire.response().await;
    assert_eq!(
        (response.status, response.header("connection")),
        (status, Some("close")),
        "{}",
        response.head
    );
    wire.send(head("GET", "/healthz", None, "")).await;
    assert!(
        wire.is_closed().await,
        "a response after `Connection: close`"
    );
}

#[tokio::test]
async fn sends_connection_close_if_the_rest_of_the_body_is_not_awaited() {
    let server = Server::shared().await;
    let ann = server.user().await;
    let own = Some(ann.access_token.as_str());
    let post = |token, more: &str| head("POST", &ann.tasks(), token, more);
    let expects = "Expect: 100-continue\r\n";
    let immediate = [
        // Too long to be drained.
        (post(None, "Content-Length: 70000\r\n"), 401),
        (post(own, "Content-Length: 70000\r\n"), 413),
        (
            head("GET", "/healthz", None, "Content-Length: 70000\r\n"),
            200,
        ),
        // The client may send the body after this response or omit it (RFC 9110 section 10.1.1).
        (post(None, &format!("{expects}{LENGTH}")), 401),
        (post(None, &format!("{expects}{CHUNKED}")), 401),
        (
            head("POST", "/nowhere", None, &format!("{expects}{LENGTH}")),
            404,
        ),
        // The end of the body is ambiguous.
        (post(own, "Host: b.example\r\nContent-Length: 13\r\n"), 400),
    ];
    join_all(immediate.map(async |(request, status)| {
        let sent = Instant::now();
        let mut wire = Wire::open(server).await;
        wire.send(request).await;
        assert_last_response(&mut wire, status).await;
        assert!(sent.elapsed() < Duration::from_secs(5));
    }))
    .await;

    // A body that does not arrive, or never ends.
    let endless = post(None, CHUNKED) + &format!("2000\r\n{}\r\n", "x".repeat(0x2000)).repeat(9);
    let unfinished = [
        post(None, LENGTH),
        post(None, LENGTH) + &BODY[..5],
        post(None, CHUNKED),
        post(None, CHUNKED) + "4\r\n{\"ti\r\n",
        endless,
    ];
    join_all(unfinished.map(async |request| {
        let mut wire = Wire::open(server).await;
        wire.send(request).await;
        assert_last_response(&mut wire, 401).await;
    }))
    .await;
}

// Some clients send the whole body before they read the response.
#[tokio::test]
async fn an_early_response_is_not_lost_to_a_reset() {
    let server = Server::shared().await;
    let ann = server.user().await;
    let megabyte = "x".repeat(1 << 20);
    let chunk = format!("100000\r\n{megabyte}\r\n0\r\n\r\n");
    for (framing, body) in [
        ("Content-Length: 1048576\r\n", &megabyte),
        (CHUNKED, &chunk),
    ] {
        for (token, status) in [(None, 401), (Some(ann.access_token.as_str()), 413)] {
            let mut wire = Wire::open(server).await;
            wire.send(head("POST", &ann.tasks(), token, framing)).await;
            for part in body.as_bytes().chunks(64 * 1024) {
                wire.send(part).await;
                sleep(Duration::from_millis(1)).await;
            }
            assert_last_response(&mut wire, status).await;
        }
    }
}
