//! Pages of other origins: those that are listed may use the API, all others may not.

use std::collections::BTreeSet;

use hyper::Method;
use serde_json::{Value, json};

use crate::harness::{Response, Server, User};
use crate::tasks::path_of;

const LISTED: &str = "https://todo.example";
const ALSO_LISTED: &str = "http://localhost:5173";

/// None of these is the listed origin, though some look like it.
const UNLISTED: [&str; 11] = [
    "https://evil.example",
    "https://todo.example.evil.example",
    "https://eviltodo.example",
    "https://sub.todo.example",
    "http://todo.example",
    "https://todo.example:8443",
    "https://todo.example/",
    "http://localhost",
    "http://localhost:51730",
    "null",
    "*",
];

async fn server() -> Server {
    Server::with(&[(
        "CORS_ORIGINS",
        "https://todo.example, http://localhost:5173",
    )])
    .await
}

fn names(header: &str) -> BTreeSet<String> {
    header
        .split(',')
        .map(|name| name.trim().to_lowercase())
        .collect()
}

/// That a page of `origin` may read the answer, and all that it is to read of it.
fn assert_open_to(answer: &Response, origin: &str, what: &str) {
    assert_eq!(
        answer.header("access-control-allow-origin"),
        origin,
        "{what}"
    );
    assert!(names(answer.header("vary")).contains("origin"), "{what}");
    let exposed =
        "Location, Link, ETag, Preference-Applied, Retry-After, X-Request-Id, X-Total-Count";
    assert_eq!(
        names(answer.header("access-control-expose-headers")),
        names(exposed),
        "{what}"
    );
}

fn assert_silent(answer: &Response, what: &str) {
    let told: Vec<_> = answer
        .headers
        .keys()
        .filter(|name| name.as_str().starts_with("access-control-"))
        .collect();
    assert!(told.is_empty(), "{what}: {told:?}");
}

#[tokio::test]
async fn a_page_of_a_listed_origin_can_read_every_answer_and_its_headers() {
    let server = server().await;
    let ann = server.user().await;
    let task = ann.create_task(&server, "a").await;
    let (tasks, path) = (ann.tasks(), path_of(&ann, &task));
    let token = &ann.access_token;
    for origin in [LISTED, ALSO_LISTED] {
        let from = |method: Method, at: &str| server.request(method, at).header("origin", origin);
        for (answer, status) in [
            (from(Method::GET, &tasks).bearer(token).send().await, 200),
            (
                from(Method::POST, &tasks)
                    .bearer(token)
                    .json(json!({"title": "b"}))
                    .send()
                    .await,
                201,
            ),
            (from(Method::GET, &path).bearer(token).send().await, 200),
            (from(Method::HEAD, &path).bearer(token).send().await, 200),
            (
                from(Method::GET, &path)
                    .bearer(token)
                    .header("if-none-match", "*")
                    .send()
                    .await,
                304,
            ),
            (
                from(Method::DELETE, &format!("{tasks}?completed=true"))
                    .bearer(token)
                    .send()
                    .await,
                200,
            ),
            // The errors of the ladder, from the router to the handler.
            (from(Method::GET, "/nowhere").send().await, 404),
            (from(Method::PUT, &tasks).send().await, 405),
            (from(Method::GET, &tasks).send().await, 401),
            (from(Method::GET, &tasks).bearer("bad").send().await, 401),
            (
                from(Method::GET, "/api/v1/other/tasks")
                    .bearer(token)
                    .send()
                    .await,
                403,
            ),
            (
                from(Method::POST, &tasks)
                    .bearer(token)
                    .body(b"x".to_vec(), "text/plain")
                    .send()
                    .await,
                415,
            ),
            (
                from(Method::POST, &tasks)
                    .bearer(token)
                    .body(vec![b' '; 20_000], "application/json")
                    .send()
                    .await,
                413,
            ),
            (
                from(Method::POST, &tasks)
                    .bearer(token)
                    .body(b"{".to_vec(), "application/json")
                    .send()
                    .await,
                400,
            ),
            (
                from(Method::POST, &tasks)
                    .bearer(token)
                    .json(json!({}))
                    .send()
                    .await,
                422,
            ),
            (
                from(Method::GET, &format!("{tasks}/x"))
                    .bearer(token)
                    .send()
                    .await,
                404,
            ),
            (
                from(Method::PATCH, &path)
                    .bearer(token)
                    .header("if-match", "\"x\"")
                    .json(json!({"title": "c"}))
                    .send()
                    .await,
                412,
            ),
            (from(Method::OPTIONS, &tasks).send().await, 204),
        ] {
            assert_eq!(answer.status, status);
            assert_open_to(&answer, origin, &status.to_string());
        }
    }
}

#[tokio::test]
async fn a_preflight_from_a_listed_origin_gets_204_on_any_path_before_authentication() {
    let server = server().await;
    let ann = server.user().await;
    let task = ann.create_task(&server, "a").await;
    let path = path_of(&ann, &task);
    for (at, method) in [
        ("/api/v1/auth/register", "POST"),
        ("/api/v1/auth/me", "GET"),
        (ann.tasks().as_str(), "POST"),
        (&path, "PUT"),
        (&path, "PATCH"),
        (&path, "DELETE"),
        (&format!("{path}/complete"), "PATCH"),
        // What follows will be a 405 or a 404, and the page is to see it.
        ("/api/v1/auth/login", "DELETE"),
        ("/healthz", "PUT"),
        ("/api/v1/nowhere", "PATCH"),
        ("/api/v2/auth/login", "POST"),
        ("/nowhere", "GET"),
        ("/docs/nowhere.js", "GET"),
        ("/api//v1", "GET"),
        ("//", "GET"),
        ("/%ff", "GET"),
    ] {
        let request = server.request(Method::OPTIONS, at).header("origin", LISTED);
        let request = request.header("access-control-request-method", method);
        let request = request.header(
            "access-control-request-headers",
            "authorization,content-type",
        );
        let answer = request.send().await.expect(204);
        assert_eq!(answer.header("access-control-allow-origin"), LISTED);
        assert!(
            names(answer.header("access-control-allow-methods")).contains(&method.to_lowercase()),
            "{at}"
        );
        let allowed = "Authorization, Content-Type, If-Match, If-None-Match, Idempotency-Key, Prefer, X-Request-Id";
        assert_eq!(
            names(answer.header("access-control-allow-headers")),
            names(allowed)
        );
        assert!(names(answer.header("vary")).contains("origin"));
        assert!(answer.body.is_empty());
    }
    assert!(
        !server.log().contains("authentication failed"),
        "a preflight is no failed sign-in"
    );
    // Neither of these is a preflight from a listed origin.
    let request = server.request(Method::OPTIONS, "/nowhere");
    let unlisted = request
        .header("origin", UNLISTED[0])
        .header("access-control-request-method", "GET");
    assert_silent(&unlisted.send().await.expect(404), UNLISTED[0]);
    let request = server.request(Method::OPTIONS, "/nowhere");
    request.header("origin", LISTED).send().await.expect(404);
}

#[tokio::test]
async fn an_origin_can_be_listed_in_any_form_that_means_the_same() {
    let listed = [
        ("HTTPS://Todo.Example:443/", "https://todo.example"),
        ("http://LOCALHOST:80", "http://localhost"),
        ("http://localhost:05173/", "http://localhost:5173"),
        ("https://localhost:80", "https://localhost:80"),
        ("https://empty.example:", "https://empty.example"),
        (
            "https://xn--bcher-kva.example",
            "https://xn--bcher-kva.example",
        ),
        ("http://127.0.0.1:8931", "http://127.0.0.1:8931"),
        ("http://[0:0::0:1]:8080", "http://[::1]:8080"),
        ("capacitor://localhost", "capacitor://localhost"),
        ("Ionic://localhost/", "ionic://localhost"),
        ("tauri://localhost", "tauri://localhost"),
        ("chrome-extension://mnopabcd", "chrome-extension://mnopabcd"),
    ];
    let origins = listed.map(|(written, _)| written).join(" , ");
    let server = Server::with(&[("CORS_ORIGINS", &origins)]).await;
    for (_, sent) in listed {
        let answer = server.get("/healthz").header("origin", sent).send().await;
        assert_open_to(&answer, sent, sent);
    }
    for other in UNLISTED.into_iter().filter(|&o| o != "http://localhost") {
        let answer = server.get("/healthz").header("origin", other).send().await;
        assert_silent(&answer, other);
    }
}

/// The bodies of requests that need no token, so that a page of any origin could make them.
fn bodies(user: &User) -> Vec<(&'static str, Value)> {
    let credentials = json!({"email": user.email, "password": user.password});
    let refresh = json!({"refresh_token": user.refresh_token});
    vec![
        (
            "/api/v1/auth/register",
            json!({"email": "new@example.com", "password": user.password}),
        ),
        ("/api/v1/auth/login", credentials),
        ("/api/v1/auth/refresh", refresh.clone()),
        ("/api/v1/auth/logout", refresh),
    ]
}

// A browser sends such a request to any origin without a preflight.
#[tokio::test]
async fn a_body_without_a_type_is_refused_from_a_page_of_a_foreign_origin() {
    let server = server().await;
    let ann = server.user().await;
    let host = server.addr().to_string();
    for (path, body) in bodies(&ann) {
        let send = |origin: &str, more: Option<(&str, &str)>| {
            let mut request = server.post(path).header("origin", origin);
            if let Some((name, value)) = more {
                request = request.header(name, value);
            }
            request.untyped(body.to_string()).send()
        };
        for origin in UNLISTED {
            let answer = send(origin, None).await;
            answer.problem(415, "unsupported_media_type");
            assert_silent(&answer, origin);
        }
        let other_port = format!("http://{}:1", server.addr().ip());
        for origin in [&format!("capacitor://{host}"), &host, &other_port] {
            send(origin, None)
                .await
                .problem(415, "unsupported_media_type");
        }
        let elsewhere = Some(("x-forwarded-host", "other.example"));
        send("https://own.example", elsewhere)
            .await
            .problem(415, "unsupported_media_type");
    }
    let sessions = server
        .get("/api/v1/auth/sessions")
        .bearer(&ann.access_token);
    let sessions = sessions.send().await.expect(200).json();
    assert_eq!(
        sessions.as_array().unwrap().len(),
        1,
        "something was served"
    );
}

#[tokio::test]
async fn a_body_without_a_type_is_json_from_everybody_else() {
    let server = server().await;
    let host = server.addr().to_string();
    let own = [
        format!("http://{host}"),
        format!("https://{}", host.to_uppercase()),
    ];
    let proxied = "https://own.example";
    for (origin, forwarded_host) in [
        (None, None),
        (Some(LISTED), None),
        (Some(ALSO_LISTED), None),
        (Some(own[0].as_str()), None),
        (Some(own[1].as_str()), None),
        // The host as proxies hand it on that send another one to us.
        (Some(proxied), Some("own.example")),
        (Some(proxied), Some("Own.Example:443")),
        (Some(proxied), Some("own.example, inner.example")),
        (Some("http://own.example"), Some("own.example:80")),
        (Some("https://own.example:8443"), Some("own.example:8443")),
    ] {
        let ann = server.user().await;
        let login = json!({"email": ann.email, "password": ann.password}).to_string();
        let mut request = server.post("/api/v1/auth/login");
        if let Some(origin) = origin {
            request = request.header("origin", origin);
        }
        if let Some(host) = forwarded_host {
            request = request.header("x-forwarded-host", host);
        }
        let answer = request.untyped(login).send().await;
        assert_eq!(answer.status, 200, "{origin:?} {forwarded_host:?}");
    }
    // With a type the browser has asked before, or it is no browser.
    let ann = server.user().await;
    let login = json!({"email": ann.email, "password": ann.password});
    let request = server
        .post("/api/v1/auth/login")
        .header("origin", UNLISTED[0]);
    assert_silent(&request.json(login).send().await.expect(200), UNLISTED[0]);
    // A request without a body has no type to declare.
    let request = server
        .post("/api/v1/auth/logout")
        .header("origin", UNLISTED[0]);
    request.bearer(&ann.access_token).send().await.expect(204);
}

#[tokio::test]
async fn an_origin_that_is_not_listed_learns_nothing_and_caches_are_told_to_mind() {
    let server = server().await;
    let ann = server.user().await;
    for origin in UNLISTED {
        let answer = server
            .get(ann.tasks())
            .bearer(&ann.access_token)
            .header("origin", origin)
            .send()
            .await;
        assert_silent(&answer, origin);
        assert!(names(answer.header("vary")).contains("origin"), "{origin}");
        let answer = server
            .get(ann.tasks())
            .header("origin", origin)
            .send()
            .await;
        assert_silent(&answer, origin);
        let request = server
            .request(Method::OPTIONS, ann.tasks())
            .header("origin", origin);
        let preflight = request
            .header("access-control-request-method", "POST")
            .send()
            .await;
        assert_silent(&preflight, origin);
        assert!(
            names(preflight.header("vary")).contains("origin"),
            "{origin}"
        );
    }
    // A cache must not hand the answer without an origin to one that is listed.
    let answer = server
        .get(ann.tasks())
        .bearer(&ann.access_token)
        .send()
        .await;
    assert!(names(answer.header("vary")).contains("origin"));
}

#[tokio::test]
async fn without_cors_origins_no_origin_is_let_in() {
    let server = Server::start().await;
    let ann = server.user().await;
    for origin in UNLISTED.into_iter().chain([LISTED, ALSO_LISTED]) {
        let answer = server
            .get(ann.tasks())
            .bearer(&ann.access_token)
            .header("origin", origin)
            .send()
            .await;
        assert_silent(&answer.expect(200), origin);
        let request = server
            .request(Method::OPTIONS, ann.tasks())
            .header("origin", origin);
        let preflight = request
            .header("access-control-request-method", "POST")
            .send()
            .await;
        assert_silent(&preflight, origin);
    }
}
