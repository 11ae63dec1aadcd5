//! HTTP semantics, tested on the wire.

use std::collections::BTreeSet;
use std::io::Read;
use std::time::{Duration, Instant};

use flate2::read::GzDecoder;
use hyper::Method;
use serde_json::{Value, json};
use tokio::time::sleep;

use crate::harness::{Server, User, Wire, WireResponse, head};

/// Returns a path for every route, with the methods of the route.
fn routes(user: &User, task: &Value) -> Vec<(String, Vec<&'static str>)> {
    let session = format!("/api/v1/auth/sessions/{}", user.session_id);
    let complete = format!("{}/complete", user.path_of(task));
    vec![
        ("/api/v1/auth/register".into(), vec!["POST"]),
        ("/api/v1/auth/login".into(), vec!["POST"]),
        ("/api/v1/auth/refresh".into(), vec!["POST"]),
        ("/api/v1/auth/logout".into(), vec!["POST"]),
        ("/api/v1/auth/me".into(), vec!["GET", "DELETE"]),
        ("/api/v1/auth/password".into(), vec!["PUT"]),
        ("/api/v1/auth/sessions".into(), vec!["GET", "DELETE"]),
        (session, vec!["DELETE"]),
        (user.tasks(), vec!["GET", "POST", "DELETE"]),
        (user.path_of(task), vec!["GET", "PUT", "PATCH", "DELETE"]),
        (complete, vec!["PATCH"]),
        ("/healthz".into(), vec!["GET"]),
        ("/readyz".into(), vec!["GET"]),
        ("/openapi.json".into(), vec!["GET"]),
        ("/docs".into(), vec!["GET"]),
        ("/problems/validation_failed".into(), vec!["GET"]),
        ("/".into(), vec!["GET"]),
    ]
}

/// Returns the methods that `Allow` must list for a route with these methods.
fn allow(methods: &[&'static str]) -> BTreeSet<String> {
    let mut all: BTreeSet<_> = methods.iter().map(|method| method.to_string()).collect();
    all.insert("OPTIONS".into());
    if methods.contains(&"GET") {
        all.insert("HEAD".into());
    }
    all
}

fn listed(header: &str) -> BTreeSet<String> {
    header
        .split(',')
        .map(|name| name.trim().to_owned())
        .collect()
}

/// The problem codes of the API.
const CODES: [&str; 31] = [
    "malformed_json",
    "malformed_request",
    "missing_token",
    "invalid_token",
    "invalid_credentials",
    "invalid_refresh_token",
    "invalid_mail_token",
    "forbidden",
    "wrong_password",
    "account_disabled",
    "registration_closed",
    "email_unverified",
    "quota_exceeded",
    "not_found",
    "task_not_found",
    "session_not_found",
    "method_not_allowed",
    "cursor_expired",
    "precondition_failed",
    "body_too_large",
    "unsupported_media_type",
    "request_timeout",
    "email_taken",
    "validation_failed",
    "idempotency_key_reused",
    "too_many_attempts",
    "too_many_requests",
    "internal",
    "database_unavailable",
    "overloaded",
    "stopping",
];

#[tokio::test]
async fn head_returns_the_headers_of_get() {
    let server = Server::shared().await;
    let ann = server.user().await;
    let task = ann.create_task("a").await;
    let mut targets: Vec<_> = routes(&ann, &task)
        .into_iter()
        .filter(|(_, methods)| methods.contains(&"GET"))
        .map(|(target, _)| target)
        .collect();
    targets.push(format!("{}?limit=1&total=true", ann.tasks()));
    targets.push(format!("{}/unknown", ann.tasks()));
    targets.push("/unknown".into());
    let mut wire = Wire::open(server).await;
    for target in targets {
        let mut heads = Vec::new();
        for method in ["GET", "HEAD"] {
            let token = Some(ann.access_token.as_str());
            wire.send(head(method, &target, token, "X-Request-Id: same\r\n"))
                .await;
            let response = match method {
                "GET" => wire.response().await,
                _ => wire.response_to_head().await,
            };
            // RFC 9110 section 9.3.2: HEAD may omit headers that depend on generating the content.
            let lines = response
                .head
                .lines()
                .filter(|line| !line.starts_with("date: ") && *line != "content-length: 0");
            let mut lines: Vec<_> = lines.map(str::to_owned).collect();
            lines.sort();
            heads.push(lines);
        }
        assert_eq!(heads[0], heads[1], "{target}");
    }
}

#[tokio::test]
async fn options_returns_the_allowed_methods_without_authentication() {
    let server = Server::shared().await;
    let ann = server.user().await;
    let task = ann.create_task("a").await;
    let mut wire = Wire::open(server).await;
    for (target, methods) in routes(&ann, &task) {
        wire.send(head("OPTIONS", &target, None, "")).await;
        let response = wire.response().await;
        assert_eq!(response.status, 204, "{target}: {}", response.head);
        assert_eq!(
            listed(response.header("allow").expect("Allow")),
            allow(&methods),
            "{target}"
        );
        // RFC 5789 section 3.1.
        let types = "application/json, application/merge-patch+json";
        let patch = methods.contains(&"PATCH").then_some(types);
        assert_eq!(response.header("accept-patch"), patch, "{target}");
    }
    wire.send(head("OPTIONS", "/nowhere", None, "")).await;
    assert_eq!(wire.response().await.status, 404);
    wire.send(head("OPTIONS", "*", None, "")).await;
    assert!(wire.response().await.status < 500);
}

// FR-008
#[tokio::test]
async fn returns_405_and_the_allowed_methods_for_other_methods() {
    let server = Server::shared().await;
    let ann = server.user().await;
    let task = ann.create_task("a").await;
    let mut wire = Wire::open(server).await;
    for (target, methods) in routes(&ann, &task) {
        let all = allow(&methods);
        for method in [
            "GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "TRACE", "BREW", "get",
        ] {
            if all.contains(method) {
                continue;
            }
            wire.send(head(method, &target, None, "")).await;
            let response = match method {
                "HEAD" => wire.response_to_head().await,
                _ => wire.response().await,
            };
            assert_eq!(response.status, 405, "{method} {target}");
            assert_eq!(
                listed(response.header("allow").expect("Allow")),
                all,
                "{method} {target}"
            );
            if method != "HEAD" {
                assert_eq!(response.json()["code"], "method_not_allowed");
            }
        }
    }
}

#[tokio::test]
async fn ignores_one_trailing_slash_but_not_two() {
    let server = Server::shared().await;
    let ann = server.user().await;
    let task = ann.create_task("a").await;
    let mut wire = Wire::open(server).await;
    let token = Some(ann.access_token.as_str());
    for (target, methods) in routes(&ann, &task) {
        if target == "/" || !methods.contains(&"GET") {
            continue;
        }
        wire.send(head("GET", &target, token, "")).await;
        let plain = wire.response().await;
        wire.send(head("GET", &format!("{target}/"), token, ""))
            .await;
        let slash = wire.response().await;
        // A page's relative links depend on its path.
        let body = |response: &WireResponse| match response.header("content-type") {
            Some(html) if html.starts_with("text/html") => String::new(),
            _ => response.body.clone(),
        };
        assert_eq!(
            (slash.status, body(&slash)),
            (plain.status, body(&plain)),
            "{target}/"
        );
        wire.send(head("GET", &format!("{target}//"), token, ""))
            .await;
        // The empty segment is not an id.
        assert!(
            matches!(wire.response().await.status, 404 | 405),
            "{target}//"
        );
    }
    let body = r#"{"title":"b"}"#;
    wire.send(
        head(
            "POST",
            &format!("{}/?x=1", ann.tasks()),
            token,
            "Content-Length: 13\r\n",
        ) + body,
    )
    .await;
    assert_eq!(wire.response().await.status, 201);
}

#[tokio::test]
async fn sends_100_continue_before_reading_the_body() {
    let server = Server::shared().await;
    let ann = server.user().await;
    let mut wire = Wire::open(server).await;
    let more = "Expect: 100-continue\r\nContent-Length: 13\r\n";
    wire.send(head("POST", &ann.tasks(), Some(&ann.access_token), more))
        .await;
    assert_eq!(wire.response().await.status, 100);
    wire.send(r#"{"title":"a"}"#).await;
    assert_eq!(wire.response().await.status, 201);
}

// FR-001: the token is verified before the body is read.
#[tokio::test]
async fn rejects_a_bad_token_without_100_continue() {
    let server = Server::shared().await;
    let (ann, bob) = (server.user().await, server.user().await);
    let more = "Expect: 100-continue\r\nContent-Length: 13\r\n";
    for (token, user, status) in [
        (None, &ann, 401),
        (Some("bad"), &ann, 401),
        (Some(ann.access_token.as_str()), &bob, 403),
    ] {
        let mut wire = Wire::open(server).await;
        wire.send(head("POST", &user.tasks(), token, more)).await;
        assert_eq!(wire.response().await.status, status);
    }
}

#[tokio::test]
async fn accepts_a_chunked_body() {
    let server = Server::shared().await;
    let ann = server.user().await;
    let mut wire = Wire::open(server).await;
    let more = "Transfer-Encoding: chunked\r\nContent-Type: application/json\r\n";
    for body in [
        "d\r\n{\"title\":\"a\"}\r\n0\r\n\r\n",
        "1\r\n{\r\n0000C;name=value\r\n\"title\":\"a\"}\r\n0\r\nTrailer: ignored\r\n\r\n",
    ] {
        wire.send(head("POST", &ann.tasks(), Some(&ann.access_token), more) + body)
            .await;
        let response = wire.response().await;
        assert_eq!(response.status, 201, "{body}");
        assert_eq!(response.json()["title"], "a");
    }
    // The same request byte by byte.
    for byte in (head("POST", &ann.tasks(), Some(&ann.access_token), more)
        + "d\r\n{\"title\":\"b\"}\r\n0\r\n\r\n")
        .bytes()
    {
        wire.send([byte]).await;
    }
    assert_eq!(wire.response().await.json()["title"], "b");
}

#[tokio::test]
async fn accepts_a_target_in_absolute_form() {
    let server = Server::shared().await;
    let ann = server.user().await;
    let mut wire = Wire::open(server).await;
    for base in [
        "http://todo.example",
        "http://todo.example:8000",
        "HTTP://other.example",
    ] {
        let target = format!("{base}{}?limit=5", ann.tasks());
        wire.send(head("GET", &target, Some(&ann.access_token), ""))
            .await;
        let response = wire.response().await;
        assert_eq!(
            (response.status, response.body.as_str()),
            (200, "[]"),
            "{target}"
        );
    }
}

#[tokio::test]
async fn decodes_each_path_segment_separately() {
    let server = Server::shared().await;
    let (ann, bob) = (server.user().await, server.user().await);
    let first = format!("%{:02X}", ann.id.as_bytes()[0]);
    let same = format!("/api/v1/{first}{}/t%61sks", &ann.id[1..]);
    let mut wire = Wire::open(server).await;
    wire.send(head("GET", &same, Some(&ann.access_token), ""))
        .await;
    assert_eq!(wire.response().await.status, 200, "{same}");

    let (own, other) = (&ann.id, &bob.id);
    for (target, statuses) in [
        (format!("/api/v1/{own}%2Ftasks"), vec![404]),
        (format!("/api/v1/{own}/tasks%2F"), vec![404]),
        (format!("/api/v1/{own}/../{other}/tasks"), vec![404]),
        (format!("/api/v1/{own}/%2e%2e/{other}/tasks"), vec![404]),
        (format!("/api/v1/{own}%00/tasks"), vec![400, 403]),
        (format!("/api/v1/{own}%FF/tasks"), vec![400, 403]),
        (format!("/api/v1/{own}%zz/tasks"), vec![400, 403]),
        (format!("/api/v1/{own}%/tasks"), vec![400, 403]),
        (format!("/api/v1/{own}/tasks/%2e%2e"), vec![404]),
        (format!("/api/v1/{own}/tasks/%00"), vec![400, 404]),
        (format!("/api/v1/{own}/tasks/%FF"), vec![400, 404]),
        ("/%".to_owned(), vec![400, 404]),
        ("/healthz%00".to_owned(), vec![400, 404]),
    ] {
        let mut wire = Wire::open(server).await;
        wire.send(head("GET", &target, Some(&ann.access_token), ""))
            .await;
        let response = wire.response().await;
        assert!(
            statuses.contains(&response.status),
            "{target}: {}",
            response.head
        );
    }
}

#[tokio::test]
async fn skips_the_body_of_a_get() {
    let server = Server::shared().await;
    let ann = server.user().await;
    let token = Some(ann.access_token.as_str());
    let mut wire = Wire::open(server).await;
    for (more, body) in [
        ("Content-Length: 25\r\n", "GET /nowhere HTTP/1.1\r\n\r\n"),
        ("Transfer-Encoding: chunked\r\n", "2\r\n{}\r\n0\r\n\r\n"),
        (
            "Content-Length: 2\r\nContent-Type: application/json\r\n",
            "{}",
        ),
    ] {
        wire.send(head("GET", &ann.tasks(), token, more) + body)
            .await;
        assert_eq!(wire.response().await.status, 200, "{more}");
    }
    wire.send(head("GET", "/healthz", None, "")).await;
    assert_eq!(wire.response().await.status, 200);
}

#[tokio::test]
async fn responds_to_pipelined_requests_in_order() {
    let server = Server::shared().await;
    let ann = server.user().await;
    let token = Some(ann.access_token.as_str());
    let mut requests = String::new();
    for n in 0..20 {
        let body = format!(r#"{{"title":"task {n:02}"}}"#);
        let more = format!(
            "Content-Length: {}\r\nX-Request-Id: create-{n}\r\n",
            body.len()
        );
        requests += &(head("POST", &ann.tasks(), token, &more) + &body);
        let more = format!("X-Request-Id: read-{n}\r\n");
        requests += &head("GET", &format!("{}?limit=1", ann.tasks()), token, &more);
        requests += &head(
            "GET",
            "/nowhere",
            None,
            &format!("X-Request-Id: miss-{n}\r\n"),
        );
    }
    let mut wire = Wire::open(server).await;
    wire.send(requests).await;
    for n in 0..20 {
        let title = json!(format!("task {n:02}"));
        let created = wire.response().await;
        assert_eq!(
            created.header("x-request-id"),
            Some(format!("create-{n}").as_str())
        );
        assert_eq!(created.json()["title"], title);
        let read = wire.response().await;
        assert_eq!(
            read.header("x-request-id"),
            Some(format!("read-{n}").as_str())
        );
        assert_eq!(
            read.json()[0]["title"],
            title,
            "a request sees the effects of the previous one"
        );
        let missed = wire.response().await;
        assert_eq!(
            (missed.status, missed.header("x-request-id")),
            (404, Some(format!("miss-{n}").as_str()))
        );
    }
}

#[tokio::test]
async fn finds_each_request_wherever_the_stream_is_split() {
    let server = Server::shared().await;
    let ann = server.user().await;
    let token = Some(ann.access_token.as_str());
    let chunked = head(
        "POST",
        &ann.tasks(),
        token,
        "Transfer-Encoding: chunked\r\n",
    ) + "12\r\n{\n \"title\":\n \"a\"\n}\r\n0\r\n\r\n";
    let body = "{\n \"title\":\n \"b\"\n}";
    let plain = head("POST", &ann.tasks(), token, "Content-Length: 18\r\n") + body;
    let read = head("GET", "/healthz", None, "");
    let all = format!("{chunked}{plain}{read}{chunked}{chunked}{read}{plain}");
    // Lets the server read the first part before the second is sent.
    for cut in (1..all.len()).step_by(7) {
        let mut wire = Wire::open(server).await;
        wire.send(&all[..cut]).await;
        tokio::task::yield_now().await;
        if cut > chunked.len() {
            assert_eq!(wire.response().await.status, 201, "cut at {cut}");
        }
        wire.send(&all[cut..]).await;
        let rest = [201, 201, 200, 201, 201, 200, 201];
        for status in &rest[usize::from(cut > chunked.len())..] {
            assert_eq!(wire.response().await.status, *status, "cut at {cut}");
        }
    }
}

#[tokio::test]
async fn serves_the_request_after_a_rejected_one_or_closes_the_connection() {
    let server = Server::shared().await;
    let ann = server.user().await;
    let chunks = "12\r\n{\n \"title\":\n \"a\"\n}\r\n0\r\n\r\n";
    let whole = "{\n \"title\":\n \"a\"\n}";
    for (framing, body) in [
        ("Transfer-Encoding: chunked\r\n", chunks),
        ("Content-Length: 18\r\n", whole),
    ] {
        for (token, target) in [(Some("bad"), ann.tasks()), (None, "/nowhere".to_owned())] {
            for together in [true, false] {
                let rejected = head("POST", &target, token, framing);
                let mut wire = Wire::open(server).await;
                if together {
                    wire.send(rejected + body).await;
                    assert!(matches!(wire.response().await.status, 401 | 404));
                } else {
                    wire.send(rejected).await;
                    assert!(matches!(wire.response().await.status, 401 | 404));
                    wire.send(body).await;
                }
                for _ in 0..2 {
                    wire.send(head("GET", &ann.tasks(), Some(&ann.access_token), ""))
                        .await;
                    let Some(next) = wire.response_or_close().await else {
                        break;
                    };
                    assert_eq!(
                        next.status, 200,
                        "{framing} {target} {together}: {}",
                        next.body
                    );
                }
            }
        }
    }
}

#[tokio::test]
async fn closes_the_connection_if_the_client_requests_it() {
    let server = Server::shared().await;
    let ann = server.user().await;
    let token = Some(ann.access_token.as_str());
    let mut wire = Wire::open(server).await;
    let one = head("GET", &ann.tasks(), token, "Connection: close\r\n");
    wire.send(format!("{one}{one}")).await;
    let response = wire.response().await;
    assert_eq!(
        (response.status, response.header("connection")),
        (200, Some("close"))
    );
    assert!(
        wire.is_closed().await,
        "a response after `Connection: close`"
    );

    let mut wire = Wire::open(server).await;
    wire.send(format!(
        "GET {} HTTP/1.0\r\nAuthorization: Bearer {}\r\n\r\n",
        ann.tasks(),
        ann.access_token
    ))
    .await;
    assert_eq!(
        wire.response().await.status,
        200,
        "HTTP/1.0 does not require Host"
    );
    assert!(wire.is_closed().await);
}

#[tokio::test]
async fn rejects_a_missing_duplicate_or_malformed_host() {
    let server = Server::shared().await;
    for hosts in [
        "",
        "Host: a.example\r\nHost: a.example\r\n",
        "Host: a.example\r\nHost: b.example\r\n",
        "Host: a b\r\n",
        "Host: a.example, b.example\r\n",
        "Host: a.example/path\r\n",
        "Host: user@a.example\r\n",
        "Host: a.example:port\r\n",
        "Host: [::1\r\n",
        "Host: a?b\r\n",
        "Host: \u{e9}.example\r\n",
    ] {
        let mut wire = Wire::open(server).await;
        wire.send(format!("GET /healthz HTTP/1.1\r\n{hosts}\r\n"))
            .await;
        assert_eq!(wire.response().await.status, 400, "{hosts:?}");
    }
    for host in [
        "a.example",
        "a.example:8000",
        "127.0.0.1",
        "[::1]",
        "[::1]:8000",
        "A_b.example.",
        "a.example:",
    ] {
        let mut wire = Wire::open(server).await;
        wire.send(format!("GET /healthz HTTP/1.1\r\nHost: {host}\r\n\r\n"))
            .await;
        assert_eq!(wire.response().await.status, 200, "{host}");
    }
}

#[tokio::test]
async fn returns_and_logs_a_valid_request_id() {
    let server = Server::start().await;
    let ann = server.user().await;
    for valid in ["a", "Client-7.request_9", &"x".repeat(128)] {
        let response = server.get(ann.tasks()).header("x-request-id", valid).await;
        assert_eq!(response.header("x-request-id"), valid);
        response.problem(401, "missing_token");
        server.wait_for_log(&format!("request_id={valid}")).await;
    }
}

#[tokio::test]
async fn replaces_an_invalid_request_id_with_a_unique_one() {
    let server = Server::shared().await;
    let mut seen = BTreeSet::new();
    let long = "x".repeat(129);
    for invalid in [
        "", " ", "a b", "a\"b", "a\tb", "a=b", "é", "a,b", "../x", &long,
    ] {
        let mut wire = Wire::open(server).await;
        wire.send(head(
            "GET",
            "/nowhere",
            None,
            &format!("X-Request-Id: {invalid}\r\n"),
        ))
        .await;
        let response = wire.response().await;
        let id = response
            .header("x-request-id")
            .expect("X-Request-Id")
            .to_owned();
        assert_ne!(id, invalid);
        assert!(
            !id.is_empty()
                && id
                    .bytes()
                    .all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b)),
            "{id}"
        );
        assert_eq!(
            response.json()["instance"],
            json!(format!("urn:request:{id}"))
        );
        assert!(seen.insert(id), "two requests have the same id");
    }
}

#[tokio::test]
async fn every_response_has_a_request_id_and_nosniff() {
    let server = Server::shared().await;
    let ann = server.user().await;
    let task = ann.create_task("a").await;
    let mut wire = Wire::open(server).await;
    for (target, _) in routes(&ann, &task) {
        for method in ["GET", "POST", "OPTIONS", "TRACE"] {
            for token in [None, Some(ann.access_token.as_str())] {
                wire.send(head(method, &target, token, "Content-Length: 0\r\n"))
                    .await;
                let response = wire.response().await;
                assert!(
                    response.header("x-request-id").is_some(),
                    "{method} {target}"
                );
                assert_eq!(
                    response.header("x-content-type-options"),
                    Some("nosniff"),
                    "{method} {target}"
                );
            }
        }
    }
}

#[tokio::test]
async fn api_responses_must_not_be_cached() {
    let server = Server::shared().await;
    let ann = server.user().await;
    let task = ann.create_task("a").await;
    let path = ann.path_of(&task);
    let credentials = json!({"email": ann.email, "password": ann.password});
    let title = json!({"title": "b"});
    for response in [
        server
            .post("/api/v1/auth/login")
            .json(credentials)
            .await
            .expect(200),
        server
            .post("/api/v1/auth/refresh")
            .json(json!({"refresh_token": ann.refresh_token}))
            .await
            .expect(200),
        ann.get("/api/v1/auth/me").await.expect(200),
        ann.get("/api/v1/auth/sessions").await.expect(200),
        ann.get(ann.tasks()).await.expect(200),
        ann.create(title.clone()).await.expect(201),
        ann.get(&path).await.expect(200),
        ann.get(&path)
            .header("if-none-match", "*")
            .await
            .expect(304),
        ann.patch(&path).json(title).await.expect(200),
    ] {
        assert_eq!(response.header("cache-control"), "no-store");
    }
    // Percent-encoded paths.
    for path in [
        ann.tasks().replace("/api", "/%61pi"),
        ann.tasks().replace("/v1", "/v%31"),
    ] {
        let response = ann.get(path).await.expect(200);
        assert_eq!(response.header("cache-control"), "no-store");
    }
}

// A single test, so that the timeouts run concurrently: 10 s for a head, 20 s for a body.
#[tokio::test]
async fn closes_connections_of_stalled_and_slow_clients() {
    let server = Server::shared().await;
    let ann = server.user().await;
    let full = head(
        "POST",
        &ann.tasks(),
        Some(&ann.access_token),
        "Content-Length: 9000\r\n",
    );
    let silent = async {
        let mut wire = Wire::open(server).await.with_long_timeout();
        assert!(
            wire.response_or_close()
                .await
                .is_none_or(|response| response.status == 408)
        );
    };
    let half_a_head = async {
        let mut wire = Wire::open(server).await.with_long_timeout();
        wire.send("GET /healthz HTTP/1.1\r\nHost: a").await;
        assert!(
            wire.response_or_close()
                .await
                .is_none_or(|response| response.status == 408)
        );
    };
    let endless_head = async {
        let mut wire = Wire::open(server).await.with_long_timeout();
        wire.send("GET /healthz HTTP/1.1\r\nHost: a\r\n").await;
        let cut_off = trickle(&mut wire, "X-More: 1\r\n").await;
        assert!(cut_off.is_none_or(|response| response.status == 408));
    };
    let stalled_body = async {
        let mut wire = Wire::open(server).await.with_long_timeout();
        wire.send(full.clone() + "{").await;
        let response = wire.response().await;
        assert_eq!(
            (response.status, &response.json()["code"]),
            (408, &json!("request_timeout"))
        );
        assert!(
            wire.is_closed().await,
            "the rest of the body would be read as a request"
        );
    };
    let endless_body = async {
        let mut wire = Wire::open(server).await.with_long_timeout();
        wire.send(full.clone()).await;
        let response = trickle(&mut wire, " ").await.expect("a response");
        assert_eq!(
            (response.status, &response.json()["code"]),
            (408, &json!("request_timeout"))
        );
    };
    // A connection may be idle for longer than a head may take.
    let idle = async {
        let mut wire = Wire::open(server).await;
        for _ in 0..2 {
            wire.send(head("GET", "/healthz", None, "")).await;
            assert_eq!(wire.response().await.status, 200);
            sleep(Duration::from_secs(12)).await;
        }
    };
    tokio::join!(
        idle,
        silent,
        half_a_head,
        endless_head,
        stalled_body,
        endless_body
    );
    ann.get(ann.tasks()).await.expect(200);
}

/// Sends `bytes` repeatedly until the server responds or closes the connection.
async fn trickle(wire: &mut Wire, bytes: &str) -> Option<WireResponse> {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        assert!(Instant::now() < deadline, "the server does not time out");
        wire.send(bytes).await;
        if wire.is_readable(Duration::from_millis(250)).await {
            return wire.response_or_close().await;
        }
    }
}

#[tokio::test]
async fn rejects_an_oversized_head() {
    let server = Server::shared().await;
    for request in [
        format!("GET /{} HTTP/1.1\r\nHost: a\r\n\r\n", "x".repeat(1 << 20)),
        head(
            "GET",
            "/healthz",
            None,
            &format!("X-Long: {}\r\n", "x".repeat(1 << 20)),
        ),
        head("GET", "/healthz", None, &"X-Many: 1\r\n".repeat(10_000)),
    ] {
        let mut wire = Wire::open(server).await;
        wire.send(request).await;
        let response = wire.response_or_close().await;
        assert!(response.is_none_or(|response| matches!(response.status, 400 | 414 | 431)));
    }
    server.get("/healthz").await.expect(200);
}

#[tokio::test]
async fn pages_have_a_strict_content_security_policy() {
    let server = Server::shared().await;
    server.get("/healthz").await.expect(200);
    server.get("/readyz").await.expect(200);
    let document = server.get("/openapi.json").await.expect(200).json();
    assert!(document["openapi"].as_str().unwrap().starts_with("3.1"));
    let home = server.get("/").await;
    assert!((300..400).contains(&home.status), "/ does not redirect");
    assert_eq!(home.header("location"), "docs");
    for page in ["/docs", "/problems/validation_failed"] {
        let response = server.get(page).await.expect(200);
        assert!(
            response.header("content-type").starts_with("text/html"),
            "{page}"
        );
        let policy = response.header("content-security-policy");
        assert!(policy.contains("default-src"), "{policy}");
        assert!(policy.contains("frame-ancestors 'none'"), "{policy}");
        for source in ["unsafe-inline", "unsafe-eval", "*", "http:", "https:"] {
            assert!(!policy.contains(source), "{page}: {source} in {policy}");
        }
        let text = String::from_utf8(response.body.to_vec()).unwrap();
        assert!(!text.contains("<script>"), "{page} has an inline script");
        assert!(
            !text.contains("src=\"http") && !text.contains("href=\"//"),
            "{page} loads from another origin"
        );
    }
}

#[tokio::test]
async fn compresses_files_for_clients_that_accept_gzip() {
    let server = Server::start().await;
    let plain = server.get("/docs/swagger-ui.css").await.expect(200);
    assert_eq!(plain.header("vary"), "Accept-Encoding");
    let file = |method, accepted| {
        let request = server.request(method, "/docs/swagger-ui.css");
        request.header("accept-encoding", accepted)
    };
    for accepted in [
        "gzip, deflate, br",
        "x-gzip",
        "br;q=1.0, GZIP;q=0.001",
        "*",
        "*;q=0.5, br;q=0",
    ] {
        let response = file(Method::GET, accepted).await.expect(200);
        assert_eq!(response.header("content-encoding"), "gzip", "{accepted}");
        assert_eq!(response.header("vary"), "Accept-Encoding");
        assert_eq!(
            response.header("content-type"),
            plain.header("content-type")
        );
        assert!(response.body.len() < plain.body.len() / 4);
        let mut text = Vec::new();
        let decoded = GzDecoder::new(&response.body[..]).read_to_end(&mut text);
        assert!(decoded.is_ok() && text == plain.body);
        let head = file(Method::HEAD, accepted).await.expect(200);
        assert_eq!(head.header("content-encoding"), "gzip", "{accepted}");
        let length = response.body.len().to_string();
        assert_eq!(head.header("content-length"), length);
    }
    for accepted in [
        "",
        "br",
        "gzip;q=0",
        "gzip; q=0.000, *",
        "*;q=0",
        "identity, gzip;q=x",
    ] {
        let response = file(Method::GET, accepted).await.expect(200);
        assert!(
            !response.headers.contains_key("content-encoding"),
            "{accepted}"
        );
        assert!(response.body == plain.body, "{accepted}");
        assert_eq!(response.header("vary"), "Accept-Encoding");
    }
    let document = server
        .get("/openapi.json")
        .header("accept-encoding", "gzip");
    assert_eq!(
        document.await.expect(200).header("content-encoding"),
        "gzip"
    );
}

/// Resolves a relative reference of the page at `base`.
fn resolve(base: &str, reference: &str) -> String {
    let mut segments: Vec<_> = base.split('/').collect();
    segments.pop();
    for segment in reference.split('/') {
        match segment {
            ".." => drop(segments.pop()),
            "." => {}
            _ => segments.push(segment),
        }
    }
    segments.join("/")
}

// `.ci/browser` tests the same in a browser, behind a real proxy.
#[tokio::test]
async fn pages_work_behind_a_proxy_that_strips_a_prefix() {
    let server = Server::shared().await;
    let served = async |path: &str| {
        let stripped = path
            .strip_prefix("/todo")
            .unwrap_or_else(|| panic!("{path}"));
        server.get(stripped).await
    };
    let home = served("/todo/").await;
    assert_eq!(resolve("/todo/", home.header("location")), "/todo/docs");
    let problem = "/todo/problems/validation_failed";
    for page in ["/todo/docs", "/todo/docs/", problem, &format!("{problem}/")] {
        let text = String::from_utf8(served(page).await.expect(200).body.to_vec()).unwrap();
        let attributes = ["href=\"", "src=\""].map(|name| text.split(name).skip(1));
        let references = attributes
            .into_iter()
            .flatten()
            .map(|rest| rest.split('"').next());
        let mut count = 0;
        for reference in references.flatten().filter(|r| !r.starts_with('#')) {
            served(&resolve(page, reference)).await.expect(200);
            count += 1;
        }
        assert!(count >= 3, "{page} has {count} references");
    }
    let script = server.get("/docs/init.js").await.expect(200);
    let text = String::from_utf8(script.body.to_vec()).unwrap();
    let mut rooted = text.split("\"/").skip(1);
    assert!(!rooted.any(|rest| rest.starts_with(|c: char| c.is_ascii_alphanumeric())));

    let document = served("/todo/openapi.json").await.expect(200).json();
    let base = resolve(
        "/todo/openapi.json",
        document["servers"][0]["url"].as_str().unwrap(),
    );
    served(&format!("{base}/healthz")).await.expect(200);
    let links = document["info"]["description"]
        .as_str()
        .unwrap()
        .split("](")
        .skip(1);
    for link in links {
        let path = resolve("/todo/docs", link.split(')').next().unwrap());
        served(&path).await.expect(200);
    }
}

/// Returns the examples of problems in the OpenAPI document.
fn problem_examples(node: &Value) -> Vec<&Value> {
    let kind = node["type"].as_str().unwrap_or_default();
    if kind.starts_with("/problems/") {
        return vec![node];
    }
    let members = node.as_object().into_iter().flat_map(|node| node.values());
    let children = members.chain(node.as_array().into_iter().flatten());
    children.flat_map(problem_examples).collect()
}

#[tokio::test]
async fn the_page_and_the_example_of_each_problem_agree() {
    let server = Server::shared().await;
    let document = server.get("/openapi.json").await.expect(200).json();
    let mut documented = BTreeSet::new();
    for example in problem_examples(&document) {
        let text = |member: &str| example[member].as_str().unwrap();
        documented.insert(text("code"));
        assert_eq!(example["type"], format!("/problems/{}", text("code")));
        let page = server.get(text("type")).await.expect(200).body;
        let page = String::from_utf8(page.to_vec()).unwrap();
        let status = format!("{} <code>{}</code>", example["status"], text("code"));
        let title = format!("<h1>{}</h1>", text("title"));
        assert!(page.contains(&status) && page.contains(&title), "{page}");
    }
    assert_eq!(documented, BTreeSet::from(CODES));
    let listed = &document["components"]["schemas"]["Problem"]["properties"]["code"]["enum"];
    let listed = listed.as_array().unwrap().iter();
    let listed: BTreeSet<&str> = listed.map(|code| code.as_str().unwrap()).collect();
    assert_eq!(documented, listed);
    server
        .get("/problems/unknown")
        .await
        .problem(404, "not_found");
}

// FR-008
#[tokio::test]
async fn returns_404_for_an_unknown_path_with_or_without_a_token() {
    let server = Server::shared().await;
    let ann = server.user().await;
    let tasks = ann.tasks();
    for path in [
        "/nowhere",
        "/api",
        "/api/v1",
        "/api/v2/x/tasks",
        "/API/V1/auth/me",
        "/api/v1/auth",
        "/tasks",
        &format!("{tasks}/a/b"),
        &format!("{tasks}/a/complete/b"),
        &format!("/api/v1/{}", ann.id),
    ] {
        server.get(path).await.problem(404, "not_found");
        ann.get(path).await.problem(404, "not_found");
    }
}
