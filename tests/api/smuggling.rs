//! Requests whose end two readers could see in two places. Each is refused, or answered once and
//! the connection closed; what hides behind it is never served.

use futures_util::future::join_all;
use tokio_postgres::Client;

use crate::harness::{Server, User};
use crate::http::{Wire, head};

/// A request that must never be served, to be hidden behind another one.
fn hidden(user: &User) -> String {
    let body = r#"{"title":"smuggled"}"#;
    let more = format!("Content-Length: {}\r\n", body.len());
    head("POST", &user.tasks(), Some(&user.access_token), &more) + body
}

async fn smuggled(sql: &Client) -> i64 {
    let count = "select count(*) from tasks where title = 'smuggled'";
    sql.query_one(count, &[]).await.expect("a count").get(0)
}

/// Sends each of `attacks` on a connection of its own, all at once, and holds the server to the
/// promise above. Where one leaves it waiting for more, its patience must run out.
async fn hold(server: &Server, attacks: impl IntoIterator<Item = Vec<u8>>) {
    let sql = &server.sql().await;
    join_all(attacks.into_iter().map(async |attack| {
        let shown = String::from_utf8_lossy(&attack).escape_debug().to_string();
        let mut wire = Wire::open(server).await.patient();
        wire.send(&attack).await;
        if wire.answer_or_close().await.is_some() {
            assert!(wire.is_closed().await, "a second answer to {shown}");
        }
        assert_eq!(smuggled(sql).await, 0, "served: {shown}");
    }))
    .await;
    server.get("/healthz").send().await.expect(200);
}

/// A creation with these framing lines and this body, and the hidden request right behind it.
fn creation(user: &User, framing: &str, body: &str) -> Vec<u8> {
    let head = head("POST", &user.tasks(), Some(&user.access_token), framing);
    (head + body + &hidden(user)).into_bytes()
}

const CHUNKED: &str = "d\r\n{\"title\":\"a\"}\r\n0\r\n\r\n";
const PLAIN: &str = r#"{"title":"a"}"#;

// The probe itself: behind a sound request the hidden one is found.
#[tokio::test]
async fn a_second_request_behind_a_sound_one_is_served() {
    let server = Server::start().await;
    let ann = server.user().await;
    for (framing, body) in [
        ("Content-Length: 13\r\n", PLAIN),
        ("Transfer-Encoding: chunked\r\n", CHUNKED),
    ] {
        let mut wire = Wire::open(&server).await;
        wire.send(creation(&ann, framing, body)).await;
        assert_eq!(wire.answer().await.status, 201);
        assert_eq!(wire.answer().await.status, 201);
    }
    assert_eq!(smuggled(&server.sql().await).await, 2);
}

#[tokio::test]
async fn both_lengths_at_once_hide_nothing() {
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
    hold(
        &server,
        attacks.map(|(framing, body)| creation(&ann, framing, body)),
    )
    .await;
}

#[tokio::test]
async fn two_content_lengths_hide_nothing() {
    let server = Server::start().await;
    let ann = server.user().await;
    // One length said twice alike may be taken for one: then the next request is a next request.
    let attacks = [
        "Content-Length: 13\r\nContent-Length: 0\r\n",
        "Content-Length: 0\r\nContent-Length: 13\r\n",
        "Content-Length: 13, 0\r\n",
        "Content-Length: 0, 13\r\n",
    ];
    hold(
        &server,
        attacks.map(|framing| creation(&ann, framing, PLAIN)),
    )
    .await;
    for alike in [
        "Content-Length: 13\r\nContent-Length: 13\r\n",
        "Content-Length: 13, 13\r\n",
    ] {
        let mut wire = Wire::open(&server).await;
        wire.send(head("POST", &ann.tasks(), Some(&ann.access_token), alike) + PLAIN)
            .await;
        let answer = wire.answer_or_close().await;
        assert!(
            answer.is_none_or(|answer| matches!(answer.status, 201 | 400)),
            "{alike}"
        );
    }
}

#[tokio::test]
async fn a_content_length_that_is_no_number_hides_nothing() {
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
        lengths.map(|length| creation(&ann, &format!("Content-Length: {length}\r\n"), PLAIN));
    hold(&server, attacks).await;
}

#[tokio::test]
async fn a_transfer_encoding_that_is_not_plainly_chunked_hides_nothing() {
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
    // As chunks, where it is read as chunked; as plain bytes, where it is ignored.
    for body in [CHUNKED, PLAIN] {
        hold(
            &server,
            encodings.map(|framing| creation(&ann, framing, body)),
        )
        .await;
    }
}

#[tokio::test]
async fn chunks_of_a_bad_size_hide_nothing() {
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
    hold(
        &server,
        bodies.map(|body| creation(&ann, "Transfer-Encoding: chunked\r\n", body)),
    )
    .await;
}

#[tokio::test]
async fn a_bare_line_feed_or_carriage_return_hides_nothing() {
    let server = Server::start().await;
    let ann = server.user().await;
    let (target, token) = (ann.tasks(), &ann.access_token);
    let sound = format!("Host: a\r\nAuthorization: Bearer {token}\r\nContent-Length: 13\r\n");
    let heads = [
        format!("POST {target} HTTP/1.1\n{sound}\r\n"),
        format!("POST {target} HTTP/1.1\r{sound}\r\n"),
        format!("POST {target} HTTP/1.1\r\n{sound}\n"),
        format!("POST {target} HTTP/1.1\r\n{sound}\r"),
        format!("POST {target} HTTP/1.1\r\n{sound}X: y\n\r\n"),
        format!("POST {target} HTTP/1.1\r\n{sound}X: y\r\r\n"),
        format!("POST {target} HTTP/1.1\r\n{sound}X: y\rZ: z\r\n\r\n"),
        format!("POST {target} HTTP/1.1\r\n{sound}X: y\nZ: z\r\n\r\n"),
        format!(
            "POST {target} HTTP/1.1\r\n{}\r\n",
            sound.replace("\r\n", "\n")
        ),
        format!("POST {target} HTTP/1.1\n{}\n", sound.replace("\r\n", "\n")),
        format!("POST {target}\n HTTP/1.1\r\n{sound}\r\n"),
    ];
    hold(
        &server,
        heads.map(|head| (head + PLAIN + &hidden(&ann)).into_bytes()),
    )
    .await;
}

// What the request before it was made of is no excuse.
#[tokio::test]
async fn a_bare_line_feed_is_refused_behind_any_body() {
    let server = Server::start().await;
    let ann = server.user().await;
    let hidden = hidden(&ann).replacen("\r\n", "\n", 1);
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
        wire.answer().await;
        assert!(
            wire.answer_or_close()
                .await
                .is_none_or(|answer| answer.status == 400),
            "{body}"
        );
        assert_eq!(smuggled(&sql).await, 0, "{body}");
    }
}

#[tokio::test]
async fn folded_lines_spaced_names_and_nul_hide_nothing() {
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
    hold(&server, lines.map(|framing| creation(&ann, framing, PLAIN))).await;
}

#[tokio::test]
async fn http_1_0_with_chunks_and_unknown_versions_hide_nothing() {
    let server = Server::start().await;
    let ann = server.user().await;
    let (target, token) = (ann.tasks(), &ann.access_token);
    let sound = format!("Host: a\r\nAuthorization: Bearer {token}\r\n");
    let heads = [
        format!("POST {target} HTTP/1.0\r\n{sound}Transfer-Encoding: chunked\r\n\r\n"),
        format!(
            "POST {target} HTTP/1.0\r\n{sound}Transfer-Encoding: chunked\r\nConnection: keep-alive\r\n\r\n"
        ),
        format!(
            "POST {target} HTTP/1.0\r\n{sound}Transfer-Encoding: chunked\r\nContent-Length: 23\r\nConnection: keep-alive\r\n\r\n"
        ),
        format!(
            "POST {target} HTTP/1.2\r\n{sound}Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
        ),
        format!("POST {target} HTTP/0.9\r\n{sound}Transfer-Encoding: chunked\r\n\r\n"),
        format!("POST {target}\r\n{sound}Transfer-Encoding: chunked\r\n\r\n"),
        format!("POST  {target} HTTP/1.1\r\n{sound}Transfer-Encoding: chunked\r\n\r\n"),
        format!("POST {target} HTTP/1.1 \r\n{sound}Transfer-Encoding: chunked\r\n\r\n"),
        format!("\u{0}POST {target} HTTP/1.1\r\n{sound}Transfer-Encoding: chunked\r\n\r\n"),
    ];
    hold(
        &server,
        heads.map(|head| (head + CHUNKED + &hidden(&ann)).into_bytes()),
    )
    .await;
}

// What was refused without being read must not be read as the next request.
#[tokio::test]
async fn the_body_of_a_refused_request_is_never_taken_for_a_request() {
    let server = Server::start().await;
    let ann = server.user().await;
    let hidden = hidden(&ann);
    let large = 20_000 + hidden.len();
    let padding = "x".repeat(20_000);
    let refused = [
        head(
            "POST",
            &ann.tasks(),
            None,
            &format!("Content-Length: {}\r\n", hidden.len()),
        ) + &hidden,
        head(
            "POST",
            "/nowhere",
            None,
            &format!("Content-Length: {}\r\n", hidden.len()),
        ) + &hidden,
        head(
            "TRACE",
            "/healthz",
            None,
            &format!("Content-Length: {}\r\n", hidden.len()),
        ) + &hidden,
        head(
            "GET",
            "/healthz",
            None,
            &format!("Content-Length: {}\r\n", hidden.len()),
        ) + &hidden,
        head(
            "POST",
            &ann.tasks(),
            Some(&ann.access_token),
            &format!("Content-Length: {large}\r\n"),
        ) + &padding
            + &hidden,
        head(
            "POST",
            &ann.tasks(),
            Some("bad"),
            &format!("Content-Length: {large}\r\n"),
        ) + &padding
            + &hidden,
    ];
    let sql = server.sql().await;
    for request in refused {
        let mut wire = Wire::open(&server).await;
        wire.send(&request).await;
        wire.answer().await;
        // Open or closed: the next answer, if there is one, is to the next request.
        wire.send(head("GET", "/healthz", None, "X-Request-Id: next\r\n"))
            .await;
        if let Some(next) = wire.answer_or_close().await {
            assert_eq!(next.header("x-request-id"), Some("next"), "{}", next.head);
        }
        assert_eq!(smuggled(&sql).await, 0);
    }
}
