//! Pages of other origins: those that are listed may use the API, all others may not.

use std::collections::BTreeSet;

use hyper::Method;
use serde_json::json;

use crate::harness::{Response, Server};
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
    let exposed = names(answer.header("access-control-expose-headers"));
    for name in [
        "location",
        "link",
        "etag",
        "retry-after",
        "x-request-id",
        "x-total-count",
    ] {
        assert!(exposed.contains(name), "{what}: {name} is not exposed");
    }
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
async fn a_preflight_of_a_listed_origin_is_answered_before_authentication() {
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
        let allowed = names(answer.header("access-control-allow-headers"));
        let promised =
            "Authorization, Content-Type, If-Match, If-None-Match, Idempotency-Key, X-Request-Id";
        assert!(allowed.is_superset(&names(promised)), "{allowed:?}");
        assert!(names(answer.header("vary")).contains("origin"));
        assert!(answer.body.is_empty());
    }
    assert!(
        !server.log().contains("authentication failed"),
        "a preflight is no failed sign-in"
    );
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
