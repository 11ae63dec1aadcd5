//! Cross-origin requests: pages of configured origins can use the API, pages of other origins cannot.

use std::collections::BTreeSet;

use hyper::Method;
use serde_json::{Value, json};

use crate::harness::{Response, Server, User};

const ALLOWED: &str = "https://todo.example";
const ALSO_ALLOWED: &str = "http://localhost:5173";

/// Origins that are not allowed; some resemble an allowed one.
const OTHER_ORIGINS: [&str; 11] = [
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

/// Asserts that a page of `origin` can read the response and its headers.
fn assert_readable(response: &Response, origin: &str, what: &str) {
    assert_eq!(
        response.header("access-control-allow-origin"),
        origin,
        "{what}"
    );
    assert!(names(response.header("vary")).contains("origin"), "{what}");
    let exposed =
        "Location, Link, ETag, Preference-Applied, Retry-After, X-Request-Id, X-Total-Count";
    assert_eq!(
        names(response.header("access-control-expose-headers")),
        names(exposed),
        "{what}"
    );
}

fn assert_no_cors_headers(response: &Response, what: &str) {
    let headers: Vec<_> = response
        .headers
        .keys()
        .filter(|name| name.as_str().starts_with("access-control-"))
        .collect();
    assert!(headers.is_empty(), "{what}: {headers:?}");
}

#[tokio::test]
async fn an_allowed_origin_can_read_every_response_and_its_headers() {
    let server = server().await;
    let ann = server.user().await;
    let task = ann.create_task("a").await;
    let (tasks, path) = (ann.tasks(), ann.path_of(&task));
    let token = &ann.access_token;
    for origin in [ALLOWED, ALSO_ALLOWED] {
        let from = |method: Method, at: &str| server.request(method, at).header("origin", origin);
        for (response, status) in [
            (from(Method::GET, &tasks).bearer(token).await, 200),
            (
                from(Method::POST, &tasks)
                    .bearer(token)
                    .json(json!({"title": "b"}))
                    .await,
                201,
            ),
            (from(Method::GET, &path).bearer(token).await, 200),
            (from(Method::HEAD, &path).bearer(token).await, 200),
            (
                from(Method::GET, &path)
                    .bearer(token)
                    .header("if-none-match", "*")
                    .await,
                304,
            ),
            (
                from(Method::DELETE, &format!("{tasks}?completed=true"))
                    .bearer(token)
                    .await,
                200,
            ),
            // Errors, in the order in which the service checks a request.
            (from(Method::GET, "/nowhere").await, 404),
            (from(Method::PUT, &tasks).await, 405),
            (from(Method::GET, &tasks).await, 401),
            (from(Method::GET, &tasks).bearer("bad").await, 401),
            (
                from(Method::GET, "/api/v1/other/tasks").bearer(token).await,
                403,
            ),
            (
                from(Method::POST, &tasks)
                    .bearer(token)
                    .body(b"x".to_vec(), "text/plain")
                    .await,
                415,
            ),
            (
                from(Method::POST, &tasks)
                    .bearer(token)
                    .body(vec![b' '; 20_000], "application/json")
                    .await,
                413,
            ),
            (
                from(Method::POST, &tasks)
                    .bearer(token)
                    .body(b"{".to_vec(), "application/json")
                    .await,
                400,
            ),
            (
                from(Method::POST, &tasks)
                    .bearer(token)
                    .json(json!({}))
                    .await,
                422,
            ),
            (
                from(Method::GET, &format!("{tasks}/x")).bearer(token).await,
                404,
            ),
            (
                from(Method::PATCH, &path)
                    .bearer(token)
                    .header("if-match", "\"x\"")
                    .json(json!({"title": "c"}))
                    .await,
                412,
            ),
            (from(Method::OPTIONS, &tasks).await, 204),
        ] {
            assert_eq!(response.status, status);
            assert_readable(&response, origin, &status.to_string());
        }
    }
}

#[tokio::test]
async fn a_preflight_from_an_allowed_origin_returns_204_for_any_path_without_authentication() {
    let server = server().await;
    let ann = server.user().await;
    let task = ann.create_task("a").await;
    let path = ann.path_of(&task);
    for (at, method) in [
        ("/api/v1/auth/register", "POST"),
        ("/api/v1/auth/me", "GET"),
        (ann.tasks().as_str(), "POST"),
        (&path, "PUT"),
        (&path, "PATCH"),
        (&path, "DELETE"),
        (&format!("{path}/complete"), "PATCH"),
        // The page must be able to read the 405 or 404 that follows.
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
        let request = server
            .request(Method::OPTIONS, at)
            .header("origin", ALLOWED)
            .header("access-control-request-method", method);
        let response = request
            .header(
                "access-control-request-headers",
                "authorization,content-type",
            )
            .await
            .expect(204);
        assert_eq!(response.header("access-control-allow-origin"), ALLOWED);
        assert!(
            names(response.header("access-control-allow-methods")).contains(&method.to_lowercase()),
            "{at}"
        );
        let allowed = "Authorization, Content-Type, If-Match, If-None-Match, Idempotency-Key, Prefer, X-Request-Id";
        assert_eq!(
            names(response.header("access-control-allow-headers")),
            names(allowed)
        );
        assert!(names(response.header("vary")).contains("origin"));
        assert!(response.body.is_empty());
    }
    assert!(
        !server.log().contains("authentication failed"),
        "a preflight is not a failed authentication"
    );
    // These are not preflights from an allowed origin.
    let other = server
        .request(Method::OPTIONS, "/nowhere")
        .header("origin", OTHER_ORIGINS[0])
        .header("access-control-request-method", "GET");
    assert_no_cors_headers(&other.await.expect(404), OTHER_ORIGINS[0]);
    server
        .request(Method::OPTIONS, "/nowhere")
        .header("origin", ALLOWED)
        .await
        .expect(404);
}

#[tokio::test]
async fn origins_are_normalized() {
    let origins = [
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
    let setting = origins.map(|(configured, _)| configured).join(" , ");
    let server = Server::with(&[("CORS_ORIGINS", &setting)]).await;
    for (_, sent) in origins {
        let response = server.get("/healthz").header("origin", sent).await;
        assert_readable(&response, sent, sent);
    }
    for other in OTHER_ORIGINS
        .into_iter()
        .filter(|&o| o != "http://localhost")
    {
        let response = server.get("/healthz").header("origin", other).await;
        assert_no_cors_headers(&response, other);
    }
}

/// Returns the requests that need no token, so that a page of any origin could send them.
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

// Browsers send such a request without a preflight.
#[tokio::test]
async fn rejects_a_body_without_content_type_from_another_origin() {
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
        for origin in OTHER_ORIGINS {
            let response = send(origin, None).await;
            response.problem(415, "unsupported_media_type");
            assert_no_cors_headers(&response, origin);
        }
        let other_port = format!("http://{}:1", server.addr().ip());
        for origin in [&format!("capacitor://{host}"), &host, &other_port] {
            send(origin, None)
                .await
                .problem(415, "unsupported_media_type");
        }
        let other_host = Some(("x-forwarded-host", "other.example"));
        send("https://own.example", other_host)
            .await
            .problem(415, "unsupported_media_type");
    }
    let sessions = ann.get("/api/v1/auth/sessions");
    let sessions = sessions.await.expect(200).json();
    assert_eq!(
        sessions.as_array().unwrap().len(),
        1,
        "a request was served"
    );
}

#[tokio::test]
async fn accepts_a_body_without_content_type_from_other_clients() {
    let server = server().await;
    let host = server.addr().to_string();
    let own = [
        format!("http://{host}"),
        format!("https://{}", host.to_uppercase()),
    ];
    let proxied = "https://own.example";
    for (origin, forwarded_host) in [
        (None, None),
        (Some(ALLOWED), None),
        (Some(ALSO_ALLOWED), None),
        (Some(own[0].as_str()), None),
        (Some(own[1].as_str()), None),
        // Proxies that change `Host` send the original one in `X-Forwarded-Host`.
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
        let response = request.untyped(login).await;
        assert_eq!(response.status, 200, "{origin:?} {forwarded_host:?}");
    }
    // A request with this content type has already passed a preflight.
    let ann = server.user().await;
    let login = json!({"email": ann.email, "password": ann.password});
    let request = server
        .post("/api/v1/auth/login")
        .header("origin", OTHER_ORIGINS[0]);
    assert_no_cors_headers(&request.json(login).await.expect(200), OTHER_ORIGINS[0]);
    // A request without a body needs no content type.
    server
        .post("/api/v1/auth/logout")
        .header("origin", OTHER_ORIGINS[0])
        .bearer(&ann.access_token)
        .await
        .expect(204);
}

#[tokio::test]
async fn other_origins_get_no_cors_headers_but_vary() {
    let server = server().await;
    let ann = server.user().await;
    for origin in OTHER_ORIGINS {
        let response = ann.get(ann.tasks()).header("origin", origin).await;
        assert_no_cors_headers(&response, origin);
        assert!(
            names(response.header("vary")).contains("origin"),
            "{origin}"
        );
        let response = server.get(ann.tasks()).header("origin", origin).await;
        assert_no_cors_headers(&response, origin);
        let preflight = server
            .request(Method::OPTIONS, ann.tasks())
            .header("origin", origin)
            .header("access-control-request-method", "POST")
            .await;
        assert_no_cors_headers(&preflight, origin);
        assert!(
            names(preflight.header("vary")).contains("origin"),
            "{origin}"
        );
    }
    // A cache must not serve the response to a request without an origin to an allowed origin.
    let response = ann.get(ann.tasks()).await;
    assert!(names(response.header("vary")).contains("origin"));
}

#[tokio::test]
async fn no_origin_is_allowed_by_default() {
    let server = Server::shared().await;
    let ann = server.user().await;
    for origin in OTHER_ORIGINS.into_iter().chain([ALLOWED, ALSO_ALLOWED]) {
        let response = ann.get(ann.tasks()).header("origin", origin).await;
        assert_no_cors_headers(&response.expect(200), origin);
        let preflight = server
            .request(Method::OPTIONS, ann.tasks())
            .header("origin", origin)
            .header("access-control-request-method", "POST")
            .await;
        assert_no_cors_headers(&preflight, origin);
    }
}
