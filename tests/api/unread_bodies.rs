//! An early response, and what it leaves of its request: the connection stays usable, or the
//! response says that it closes.

use std::time::{Duration, Instant};

use futures_util::future::join_all;
use tokio::time::sleep;

use crate::harness::{Server, User, Wire, WireResponse, head};

const BODY: &str = r#"{"title":"a"}"#;
const LENGTH: &str = "Content-Length: 13\r\n";
const CHUNKED: &str = "Transfer-Encoding: chunked\r\n";
const CHUNKS: &str = "4\r\n{\"ti\r\n9\r\ntle\":\"a\"}\r\n0\r\n\r\n";

/// A request whose body the service does not want, and the status of its response.
struct Refused {
    method: &'static str,
    head: String,
    body: String,
    status: u16,
}

/// One request for each way to respond without having read the body.
fn refused(ann: &User, bob: &User) -> Vec<Refused> {
    let own = Some(ann.access_token.as_str());
    let tasks = ann.tasks();
    let unknown = format!("{tasks}/no-such-task");
    let one = |method, target: &str, token, more: &str, status| Refused {
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
        Refused {
            method: "POST",
            head: head("POST", &tasks, own, "Content-Length: 20000\r\n"),
            body: large,
            status: 413,
        },
        Refused {
            method: "POST",
            head: head("POST", &tasks, None, CHUNKED),
            body: CHUNKS.into(),
            status: 401,
        },
        Refused {
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

impl Refused {
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
        let answer = match self.method {
            "HEAD" => wire.response_to_head().await,
            _ => wire.response().await,
        };
        assert_eq!(answer.status, self.status, "{arrival:?} {}", self.head);
        answer
    }

    /// Sends it again and again with a good request behind each, all on one connection.
    async fn is_followed_by(&self, server: &Server, good: &str, status: u16, arrival: Arrival) {
        let mut wire = Wire::open(server).await;
        for _ in 0..10 {
            let answer = self.send(&mut wire, arrival).await;
            assert_eq!(answer.header("connection"), None, "{}", self.head);
            wire.send(good).await;
            let next = wire.response_or_close().await;
            let next = next.unwrap_or_else(|| panic!("lost after {arrival:?} {}", self.head));
            assert_eq!(next.status, status, "{arrival:?} {}", self.head);
        }
    }
}

#[tokio::test]
async fn a_request_that_follows_an_early_response_on_its_connection_is_answered() {
    let server = Server::shared().await;
    let (ann, bob) = (server.user().await, server.user().await);
    let good = head("GET", "/healthz", None, "");
    let refused = refused(&ann, &bob);
    let all = refused
        .iter()
        .flat_map(|refused| ARRIVALS.map(|arrival| (refused, arrival)));
    join_all(all.map(|(refused, arrival)| refused.is_followed_by(server, &good, 200, arrival)))
        .await;
}

#[tokio::test]
async fn a_refusal_for_too_many_logins_leaves_its_connection_usable() {
    let server = Server::with(&[("AUTH_RATE_PER_MINUTE", "1")]).await;
    server.user().await;
    let refused = Refused {
        method: "POST",
        head: head("POST", "/api/v1/auth/login", None, LENGTH),
        body: BODY.into(),
        status: 429,
    };
    let good = head("GET", "/healthz", None, "");
    for arrival in ARRIVALS {
        refused.is_followed_by(&server, &good, 200, arrival).await;
    }
}

#[tokio::test]
async fn a_database_outage_leaves_connections_usable() {
    let server = Server::shared().await;
    let ann = server.user().await;
    let nowhere = "postgres://todo@127.0.0.1:1/todo?sslmode=disable";
    let away = Server::listening(&[("DATABASE_URL", nowhere)]).await;
    let refused = Refused {
        method: "POST",
        head: head("POST", &ann.tasks(), Some(&ann.access_token), LENGTH),
        body: BODY.into(),
        status: 503,
    };
    let good = head("GET", "/healthz", None, "");
    join_all(ARRIVALS.map(|arrival| refused.is_followed_by(&away, &good, 200, arrival))).await;
}

#[tokio::test]
async fn requests_pipelined_behind_an_unread_body_are_answered_in_order() {
    let server = Server::shared().await;
    let (ann, bob) = (server.user().await, server.user().await);
    let good = head("GET", "/healthz", None, "");
    let refused: Vec<_> = refused(&ann, &bob)
        .into_iter()
        .filter(|refused| refused.method != "HEAD")
        .collect();
    let stream: String = refused
        .iter()
        .map(|refused| format!("{}{}{good}", refused.head, refused.body))
        .collect();
    for piece in [stream.len(), 8191, 500] {
        let mut wire = Wire::open(server).await;
        for bytes in stream.as_bytes().chunks(piece) {
            wire.send(bytes).await;
            tokio::task::yield_now().await;
        }
        for refused in &refused {
            assert_eq!(
                wire.response().await.status,
                refused.status,
                "{}",
                refused.head
            );
            assert_eq!(wire.response().await.status, 200, "after {}", refused.head);
        }
    }
}

/// A response that says that it closes, then nothing more.
async fn announces_its_close(wire: &mut Wire, status: u16) {
    let answer = wire.response().await;
    assert_eq!(
        (answer.status, answer.header("connection")),
        (status, Some("close")),
        "{}",
        answer.head
    );
    wire.send(head("GET", "/healthz", None, "")).await;
    assert!(
        wire.is_closed().await,
        "a response after an announced close"
    );
}

#[tokio::test]
async fn a_body_that_is_not_waited_for_closes_its_connection_and_the_response_says_so() {
    let server = Server::shared().await;
    let ann = server.user().await;
    let own = Some(ann.access_token.as_str());
    let post = |token, more: &str| head("POST", &ann.tasks(), token, more);
    let expects = "Expect: 100-continue\r\n";
    let at_once = [
        // Too long to be drained.
        (post(None, "Content-Length: 70000\r\n"), 401),
        (post(own, "Content-Length: 70000\r\n"), 413),
        (
            head("GET", "/healthz", None, "Content-Length: 70000\r\n"),
            200,
        ),
        // The client may send the body after this response, or leave it out (RFC 9110 10.1.1).
        (post(None, &format!("{expects}{LENGTH}")), 401),
        (post(None, &format!("{expects}{CHUNKED}")), 401),
        (
            head("POST", "/nowhere", None, &format!("{expects}{LENGTH}")),
            404,
        ),
        // Where the body ends is in doubt.
        (post(own, "Host: b.example\r\nContent-Length: 13\r\n"), 400),
    ];
    join_all(at_once.map(async |(request, status)| {
        let asked = Instant::now();
        let mut wire = Wire::open(server).await;
        wire.send(request).await;
        announces_its_close(&mut wire, status).await;
        assert!(asked.elapsed() < Duration::from_secs(5));
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
        announces_its_close(&mut wire, 401).await;
    }))
    .await;
}

// A client that sends everything before it reads must find its response.
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
            announces_its_close(&mut wire, status).await;
        }
    }
}
