//! What Prometheus scrapes.

use std::collections::BTreeSet;

use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::harness::{PASSWORD, Server};

/// The text at `/metrics` of the address that the log names.
pub(crate) async fn scrape(server: &Server) -> String {
    server.wait_for_log("metrics at http://").await;
    let log = server.log();
    let address = log
        .split("metrics at http://")
        .nth(1)
        .and_then(|rest| rest.split('/').next())
        .expect("an address");
    let mut stream = TcpStream::connect(address).await.expect("the listener");
    stream
        .write_all(b"GET /metrics HTTP/1.1\r\nHost: metrics\r\n\r\n")
        .await
        .expect("a request");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.expect("an answer");
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    answer
}

/// The values that a label has anywhere.
fn values<'a>(text: &'a str, label: &str) -> BTreeSet<&'a str> {
    let start = format!("{label}=\"");
    let values = text.split(&start).skip(1);
    values.filter_map(|rest| rest.split('"').next()).collect()
}

#[tokio::test]
async fn whatever_a_client_sends_the_labels_stay_the_same_few() {
    let server = Server::with(&[("METRICS_ADDR", "127.0.0.1:0")]).await;
    let ann = server.user().await;
    ann.create_task(&server, "a").await;
    server
        .post("/api/v1/auth/login")
        .json(json!({"email": ann.email, "password": "wrong"}))
        .send()
        .await
        .expect(401);
    server.login(&ann.email, PASSWORD).await;
    for number in 0..20 {
        let path = format!("/no/such/{number}");
        server.get(path).send().await.expect(404);
        let path = format!("/api/v1/{number}/tasks/{number}");
        let token = format!("token {number}");
        server.get(path).bearer(&token).send().await.expect(401);
        let head =
            format!("BREW{number} /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
        assert!(server.raw(head).await.starts_with("HTTP/1.1 405"));
    }
    let text = scrape(&server).await;
    assert_eq!(
        values(&text, "route"),
        BTreeSet::from([
            "/api/v1/auth/login",
            "/api/v1/auth/register",
            "/api/v1/{user_id}/tasks",
            "/api/v1/{user_id}/tasks/{id}",
            "/healthz",
            "/readyz",
            "none",
        ])
    );
    assert_eq!(
        values(&text, "method"),
        BTreeSet::from(["GET", "POST", "other"])
    );
    assert_eq!(values(&text, "reason"), BTreeSet::from(["malformed_token"]));
    assert_eq!(
        values(&text, "outcome"),
        BTreeSet::from(["success", "wrong_password"])
    );
    for name in [
        "todo_api_http_request_duration_seconds_bucket{route=\"/healthz\",le=\"1\"}",
        "todo_api_db_wait_seconds_count",
        "todo_api_db_query_seconds_count",
        "todo_api_db_connections{state=\"idle\"}",
        "todo_api_db_waiting 0",
        "todo_api_hash_queue_length 0",
        "todo_api_hash_seconds_count",
        "todo_api_build_info{version=",
        "process_start_time_seconds",
    ] {
        assert!(text.contains(name), "{name} is not in {text}");
    }
}

#[tokio::test]
async fn the_metrics_are_not_on_the_listener_of_the_clients() {
    let server = Server::with(&[("METRICS_ADDR", "127.0.0.1:0")]).await;
    server
        .get("/metrics")
        .send()
        .await
        .problem(404, "not_found");
}
