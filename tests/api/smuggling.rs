//! Request smuggling: requests whose end a proxy and the service could locate differently. The
//! service rejects each of them, or responds and closes the connection; it never serves a request
//! hidden behind them.

use std::time::Duration;

use futures_util::future::join_all;
use tokio_postgres::Client;

use crate::harness::{Server, User, Wire, head};

/// Returns a request that is sent behind an ambiguous one and must not be served.
fn hidden_request(user: &User) -> String {
    let body = r#"{"title":"smuggled"}"#;
    let more = format!("Content-Length: {}\r\n", body.len());
    head("POST", &user.tasks(), Some(&user.access_token), &more) + body
}

async fn count_smuggled(sql: &Client) -> i64 {
    let count = "select count(*) from tasks where title = 'smuggled'";
    sql.query_one(count, &[]).await.expect("a count").get(0)
}

/// Sends each of `attacks` on its own connection, and asserts that there is at most one response and
/// that no hidden request is served. An attack may leave the server waiting for more bytes; the
/// connection then ends.
async fn assert_not_served(server: &Server, attacks: impl IntoIterator<Item = Vec<u8>>) {
    let sql = &server.sql().await;
    join_all(attacks.into_iter().map(async |attack| {
        let shown = String::from_utf8_lossy(&attack).escape_debug().to_string();
        let mut wire = Wire::open(server).await.with_long_timeout();
        wire.send(&attack).await;
        if !wire.is_readable(Duration::from_secs(2)).await {
            wire.finish().await;
        }
        if wire.response_or_close().await.is_some() {
            assert!(wire.is_closed().await, "a second response to {shown}");
        }
        assert_eq!(count_smuggled(sql).await, 0, "served: {shown}");
    }))
    .await;
    server.get("/healthz").await.expect(200);
}

/// Returns a request that creates a task, with these framing headers and this body, followed by the
/// hidden request.
fn attack(user: &User, framing: &str, body: &str) -> Vec<u8> {
    let head = head("POST", &user.tasks(), Some(&user.access_token), framing);
    (head + body + &hidden_request(user)).into_bytes()
}

const CHUNKED: &str = "d\r\n{\"title\":\"a\"}\r\n0\r\n\r\n";
const PLAIN: &str = r#"{"title":"a"}"#;

// Verifies the test itself: the request behind a well-formed one is served.
#[tokio::test]
async fn serves_a_request_behind_a_well_formed_one() {
    let server = Server::start().await;
    let ann = server.user().await;
    for (framing, body) in [
        ("Content-Length: 13\r\nX-Content-Length: 13\r\n", PLAIN),
        ("Content-Length: 17\r\n", "\n{\n\"title\":\n\"a\"}\n\r\n"),
        (
            "Transfer-Encoding: chunked\r\n",
            "d;x=y\r\n{\"title\":\"a\"}\r\n0\r\nX: y\r\n\r\n",
        ),
    ] {
        let mut wire = Wire::open(&server).await;
        wire.send(attack(&ann, framing, body)).await;
        assert_eq!(wire.response().await.status, 201);
        assert_eq!(wire.response().await.status, 201);
    }
    assert_eq!(count_smuggled(&server.sql().await).await, 3);
}

#[tokio::test]
async fn content_length_with_transfer_encoding_smuggles_nothing() {
    let server = Server::start().await;
    let ann = server.user().await;
    let attacks = [
        (
            "Content-Length: 13\r\nTransfer-Encoding: chunked\r\n",
            CHUNKED,
        ),
        (
            "Transfer-Encoding: chunked\r\nContent-Length: 13\r\n",
            CHUNKED,
        ),
        (
            "Content-Length: 5\r\nTransfer-Encoding: chunked\r\n",
            "0\r\n\r\n",
        ),
        (
            "Content-Length: 4\r\nTransfer-Encoding: chunked\r\n",
            CHUNKED,
        ),
        (
            "Content-Length: 13\r\nTransfer-Encoding: chunked\r\n",
            PLAIN,
        ),
        (
            "Content-Length: 0\r\nTransfer-Encoding: chunked\r\n",
            CHUNKED,
        ),
    ];
    assert_not_served(
        &server,
        attacks.map(|(framing, body)| attack(&ann, framing, body)),
    )
    .await;
}

#[tokio::test]
async fn two_content_lengths_smuggle_nothing() {
    let server = Server::start().await;
    let ann = server.user().await;
    let attacks = [
        "Content-Length: 13\r\nContent-Length: 0\r\n",
        "Content-Length: 0\r\nContent-Length: 13\r\n",
        "Content-Length: 13, 0\r\n",
        "Content-Length: 0, 13\r\n",
    ];
    assert_not_served(&server, attacks.map(|framing| attack(&ann, framing, PLAIN))).await;
    // A repeated length is not ambiguous, so the service may accept it.
    for repeated in [
        "Content-Length: 13\r\nContent-Length: 13\r\n",
        "Content-Length: 13, 13\r\n",
    ] {
        let mut wire = Wire::open(&server).await;
        wire.send(head("POST", &ann.tasks(), Some(&ann.access_token), repeated) + PLAIN)
            .await;
        let response = wire.response_or_close().await;
        assert!(
            response.is_none_or(|response| matches!(response.status, 201 | 400)),
            "{repeated}"
        );
    }
}

#[tokio::test]
async fn a_content_length_that_is_not_a_number_smuggles_nothing() {
    let server = Server::start().await;
    let ann = server.user().await;
    let lengths = [
        "+13",
        "-1",
        "0x0d",
        "13 0",
        "1 3",
        "13;",
        "",
        "1e1",
        "13.0",
        "18446744073709551629",
        "\u{b}13",
    ];
    let attacks =
        lengths.map(|length| attack(&ann, &format!("Content-Length: {length}\r\n"), PLAIN));
    assert_not_served(&server, attacks).await;
}

#[tokio::test]
async fn a_transfer_encoding_other_than_chunked_smuggles_nothing() {
    let server = Server::start().await;
    let ann = server.user().await;
    let encodings = [
        "Transfer-Encoding: identity\r\n",
        "Transfer-Encoding: xchunked\r\n",
        "Transfer-Encoding: chunked, identity\r\n",
        "Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n",
        "Transfer-Encoding: gzip\r\n",
        "Transfer-Encoding: \"chunked\"\r\n",
        "Transfer-Encoding: chunked;q=1\r\n",
        "Transfer-Encoding: ch\u{131}nked\r\n",
        "Transfer-Encoding: chunked\u{b}\r\n",
        "Transfer-Encoding:\r\n",
        "Transfer-Encoding : chunked\r\n",
        " Transfer-Encoding: chunked\r\n",
        "X: y\r\n Transfer-Encoding: chunked\r\n",
        "Transfer-Encoding\r\n",
        "Transfer\u{0}-Encoding: chunked\r\n",
        "Transfer-Encoding: identity\r\nContent-Length: 13\r\n",
        "Transfer-Encoding: xchunked\r\nContent-Length: 13\r\n",
        "Content-Length: 13\r\nTransfer-Encoding: chunked, identity\r\n",
        "Content-Length: 13\r\nTransfer-Encoding : chunked\r\n",
    ];
    // For servers that parse the body as chunked, and for servers that ignore the header.
    for body in [CHUNKED, PLAIN] {
        assert_not_served(
            &server,
            encodings.map(|framing| attack(&ann, framing, body)),
        )
        .await;
    }
}

#[tokio::test]
async fn malformed_chunks_smuggle_nothing() {
    let server = Server::start().await;
    let ann = server.user().await;
    let bodies = [
        "g\r\n{\"title\":\"a\"}\r\n0\r\n\r\n",
        "-d\r\n{\"title\":\"a\"}\r\n0\r\n\r\n",
        "+d\r\n{\"title\":\"a\"}\r\n0\r\n\r\n",
        "0xd\r\n{\"title\":\"a\"}\r\n0\r\n\r\n",
        " d\r\n{\"title\":\"a\"}\r\n0\r\n\r\n",
        "\r\n{\"title\":\"a\"}\r\n0\r\n\r\n",
        "1000000000000000d\r\n{\"title\":\"a\"}\r\n0\r\n\r\n",
        "ffffffffffffffff\r\n{\"title\":\"a\"}\r\n0\r\n\r\n",
        "c\r\n{\"title\":\"a\"}\r\n0\r\n\r\n",
        "d\n{\"title\":\"a\"}\n0\n\n",
        "d\r{\"title\":\"a\"}\r0\r\r",
        "d;a\nb\r\n{\"title\":\"a\"}\r\n0\r\n\r\n",
        "d\r\n{\"title\":\"a\"}xx0\r\n\r\n",
        "d\r\n{\"title\":\"a\"}0\r\n\r\n",
        "d\r\n{\"title\":\"a\"}\r\n0\r\nX",
    ];
    assert_not_served(
        &server,
        bodies.map(|body| attack(&ann, "Transfer-Encoding: chunked\r\n", body)),
    )
    .await;
}

#[tokio::test]
async fn a_bare_cr_or_lf_smuggles_nothing() {
    let server = Server::start().await;
    let ann = server.user().await;
    let (target, token) = (ann.tasks(), &ann.access_token);
    let headers = format!("Host: a\r\nAuthorization: Bearer {token}\r\nContent-Length: 13\r\n");
    let heads = [
        format!("POST {target} HTTP/1.1\n{headers}\r\n"),
        format!("POST {target} HTTP/1.1\r{headers}\r\n"),
        format!("POST {target} HTTP/1.1\r\n{headers}\n"),
        format!("POST {target} HTTP/1.1\r\n{headers}\r"),
        format!("POST {target} HTTP/1.1\r\n{headers}X: y\n\r\n"),
        format!("POST {target} HTTP/1.1\r\n{headers}X: y\r\r\n"),
        format!("POST {target} HTTP/1.1\r\n{headers}X: y\rZ: z\r\n\r\n"),
        format!("POST {target} HTTP/1.1\r\n{headers}X: y\nZ: z\r\n\r\n"),
        format!(
            "POST {target} HTTP/1.1\r\n{}\r\n",
            headers.replace("\r\n", "\n")
        ),
        format!(
            "POST {target} HTTP/1.1\n{}\n",
            headers.replace("\r\n", "\n")
        ),
        format!("POST {target}\n HTTP/1.1\r\n{headers}\r\n"),
    ];
    assert_not_served(
        &server,
        heads.map(|head| (head + PLAIN + &hidden_request(&ann)).into_bytes()),
    )
    .await;
}

#[tokio::test]
async fn rejects_a_bare_lf_after_any_kind_of_body() {
    let server = Server::start().await;
    let ann = server.user().await;
    let hidden = hidden_request(&ann).replacen("\r\n", "\n", 1);
    let sql = server.sql().await;
    for (framing, body) in [
        ("", ""),
        ("Content-Length: 13\r\n", PLAIN),
        ("Transfer-Encoding: chunked\r\n", CHUNKED),
        (
            "Transfer-Encoding: chunked\r\n",
            "d;x=y\r\n{\"title\":\"a\"}\r\n0\r\nX: y\r\n\r\n",
        ),
    ] {
        let head = head("POST", &ann.tasks(), Some(&ann.access_token), framing);
        let mut wire = Wire::open(&server).await;
        wire.send(format!("{head}{body}{hidden}")).await;
        wire.response().await;
        assert!(
            wire.response_or_close()
                .await
                .is_none_or(|response| response.status == 400),
            "{body}"
        );
        assert_eq!(count_smuggled(&sql).await, 0, "{body}");
    }
}

#[tokio::test]
async fn malformed_header_lines_smuggle_nothing() {
    let server = Server::start().await;
    let ann = server.user().await;
    let lines = [
        "X: y\r\n folded\r\nContent-Length: 13\r\n",
        "X: y\r\n\tfolded\r\nContent-Length: 13\r\n",
        "Content-Length:\r\n 13\r\n",
        "Content-Length : 13\r\n",
        "Content-Length\t: 13\r\n",
        " Content-Length: 13\r\n",
        "Content-Length: 13\r\nX : y\r\n",
        "Content-Length: 13\r\nX\u{0}: y\r\n",
        "Content-Length: 13\r\nX: \u{0}\r\n",
        "Content-Length: 13\u{0}\r\n",
        "Content-Length: 13\r\n: y\r\n",
        "Content-Length: 13\r\nno colon\r\n",
        "Content-Length: 13\r\n(X): y\r\n",
    ];
    assert_not_served(&server, lines.map(|framing| attack(&ann, framing, PLAIN))).await;
}

#[tokio::test]
async fn http_1_0_with_chunks_and_unknown_versions_smuggle_nothing() {
    let server = Server::start().await;
    let ann = server.user().await;
    let (target, token) = (ann.tasks(), &ann.access_token);
    let headers = format!("Host: a\r\nAuthorization: Bearer {token}\r\n");
    let heads = [
        format!("POST {target} HTTP/1.0\r\n{headers}Transfer-Encoding: chunked\r\n\r\n"),
        format!(
            "POST {target} HTTP/1.0\r\n{headers}Transfer-Encoding: chunked\r\nConnection: keep-alive\r\n\r\n"
        ),
        format!(
            "POST {target} HTTP/1.0\r\n{headers}Transfer-Encoding: chunked\r\nContent-Length: 23\r\nConnection: keep-alive\r\n\r\n"
        ),
        format!(
            "POST {target} HTTP/1.2\r\n{headers}Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
        ),
        format!("POST {target} HTTP/0.9\r\n{headers}Transfer-Encoding: chunked\r\n\r\n"),
        format!("POST {target}\r\n{headers}Transfer-Encoding: chunked\r\n\r\n"),
        format!("POST  {target} HTTP/1.1\r\n{headers}Transfer-Encoding: chunked\r\n\r\n"),
        format!("POST {target} HTTP/1.1 \r\n{headers}Transfer-Encoding: chunked\r\n\r\n"),
        format!("\u{0}POST {target} HTTP/1.1\r\n{headers}Transfer-Encoding: chunked\r\n\r\n"),
    ];
    assert_not_served(
        &server,
        heads.map(|head| (head + CHUNKED + &hidden_request(&ann)).into_bytes()),
    )
    .await;
}

#[tokio::test]
async fn the_body_of_a_rejected_request_is_not_read_as_a_request() {
    let server = Server::start().await;
    let ann = server.user().await;
    let hidden = hidden_request(&ann);
    let large = "x".repeat(20_000) + &hidden;
    let request = |method: &str, target: &str, token: Option<&str>, body: &str| {
        let length = format!("Content-Length: {}\r\n", body.len());
        head(method, target, token, &length) + body
    };
    let rejected = [
        request("POST", &ann.tasks(), None, &hidden),
        request("POST", "/nowhere", None, &hidden),
        request("TRACE", "/healthz", None, &hidden),
        request("GET", "/healthz", None, &hidden),
        request("POST", &ann.tasks(), Some(&ann.access_token), &large),
        request("POST", &ann.tasks(), Some("bad"), &large),
    ];
    let sql = server.sql().await;
    for request in rejected {
        let mut wire = Wire::open(&server).await;
        wire.send(&request).await;
        wire.response().await;
        // Any further response must belong to the next request.
        wire.send(head("GET", "/healthz", None, "X-Request-Id: next\r\n"))
            .await;
        if let Some(next) = wire.response_or_close().await {
            assert_eq!(next.header("x-request-id"), Some("next"), "{}", next.head);
        }
        assert_eq!(count_smuggled(&sql).await, 0);
    }
}
