//! A failed login does not reveal by its body, headers or duration whether an account exists.

use std::{ops::Range, time::Instant};

use serde_json::json;

use crate::auth::{ANOTHER_PASSWORD, login, register};
use crate::harness::{PASSWORD, Response, Server};
use crate::metrics::scrape;

/// Returns the status, headers and body of a response, without the date.
fn contents(response: &Response) -> (u16, Vec<(String, String)>, String) {
    let headers = response.headers.iter().filter(|(name, _)| *name != "date");
    let mut headers: Vec<(String, String)> = headers
        .map(|(name, value)| {
            let value = String::from_utf8_lossy(value.as_bytes()).into_owned();
            (name.to_string(), value)
        })
        .collect();
    headers.sort();
    let body = String::from_utf8_lossy(&response.body).into_owned();
    (response.status, headers, body)
}

/// Logs in with a fixed request ID, so that responses can be compared byte by byte.
async fn guess(server: &Server, email: &str, password: &str) -> Response {
    server
        .post("/api/v1/auth/login")
        .header("x-request-id", "the-same-for-all")
        .json(json!({"email": email, "password": password}))
        .await
}

#[tokio::test]
async fn known_and_unknown_addresses_get_the_same_response() {
    let server = Server::start().await;
    let ann = server.user().await;
    let long = "long".repeat(100);
    for password in [ANOTHER_PASSWORD, "", "short", "password", "\0", &long] {
        let known = guess(&server, &ann.email, password).await;
        let unknown = guess(&server, "bob@example.com", password).await;
        assert_eq!(known.status, 401);
        assert_eq!(contents(&known), contents(&unknown), "{password:?}");
    }
}

#[tokio::test]
async fn known_and_unknown_addresses_are_locked_out_after_equally_many_failures() {
    let server = Server::start().await;
    let ann = server.user().await;
    for n in 0..12 {
        let known = guess(&server, &ann.email, ANOTHER_PASSWORD).await;
        let unknown = guess(&server, "bob@example.com", ANOTHER_PASSWORD).await;
        assert_eq!(known.status, if n < 10 { 401 } else { 429 });
        // The remaining seconds differ, because the requests are not sent at the same instant.
        let without_seconds = |response: &Response| {
            let (status, mut headers, body) = contents(response);
            headers.retain(|(name, _)| name != "retry-after");
            (
                status,
                headers,
                body.replace(|c: char| c.is_ascii_digit(), "0"),
            )
        };
        assert_eq!(
            without_seconds(&known),
            without_seconds(&unknown),
            "attempt {n}"
        );
    }
}

/// Asserts that the shortest failed logins with a known address and with unknown addresses take about
/// equally long. The attempts alternate, so that other load affects both equally. On a busy machine, it takes
/// more rounds until the shortest times are comparable.
async fn assert_same_duration(server: &Server, known: &str, ratios: Range<f64>) {
    const MAX_ROUNDS: usize = 40;
    let sql = server.sql().await;
    let mut shortest = [f64::MAX; 2];
    for round in 0..MAX_ROUNDS {
        // Prevents a lockout after ten attempts.
        let reset = sql.execute("delete from login_failures", &[]).await;
        reset.expect("no failures");
        let unknown = format!("{round}@example.com");
        for (shortest, email) in shortest.iter_mut().zip([known, &unknown]) {
            let started = Instant::now();
            login(server, email, ANOTHER_PASSWORD).await.expect(401);
            *shortest = started.elapsed().as_secs_f64().min(*shortest);
        }
        if round >= 4 && ratios.contains(&(shortest[0] / shortest[1])) {
            return;
        }
    }
    panic!("{shortest:?}");
}

/// Without the dummy hash, a known address would take ten times as long or more.
#[tokio::test]
async fn known_and_unknown_addresses_take_the_same_time() {
    let server = Server::start().await;
    let ann = server.user().await;
    assert_same_duration(&server, &ann.email, 0.4..2.5).await;
}

/// Verifying the stored hash alone would take a quarter of the time, because its cost is lower by 2.
#[tokio::test]
async fn accounts_with_a_lower_cost_take_the_same_time() {
    let server = Server::start().await;
    let ann = server.user().await;
    let hash = bcrypt::hash(PASSWORD, 8).unwrap();
    let set_hash = "update users set password_hash = $1";
    let sql = server.sql().await;
    sql.execute(set_hash, &[&hash]).await.unwrap();
    assert_same_duration(&server, &ann.email, 0.5..2.0).await;
}

/// Returns how many hashes the server has computed.
async fn hash_count(server: &Server) -> u64 {
    let text = scrape(server).await;
    let start = "todo_api_password_hash_duration_seconds_count ";
    let line = text.lines().find_map(|line| line.strip_prefix(start));
    line.unwrap().parse().unwrap()
}

/// A registration that waits for its verification is another hash to verify.
#[tokio::test]
async fn failed_logins_verify_equally_many_hashes_where_verification_is_required() {
    let variables = [
        ("EMAIL_VERIFICATION", "required"),
        ("METRICS_ADDR", "127.0.0.1:0"),
    ];
    let (server, _) = Server::with_mail(&variables).await;
    let ann = server.users(1).await.remove(0);
    let waiting = "waiting@example.com";
    register(&server, waiting, PASSWORD).await.expect(202);
    let mut hashes = Vec::new();
    for email in [&ann.email, waiting, "unknown@example.com"] {
        let before = hash_count(&server).await;
        login(&server, email, ANOTHER_PASSWORD).await.expect(401);
        hashes.push(hash_count(&server).await - before);
    }
    assert!(hashes.iter().all(|count| *count == hashes[0]), "{hashes:?}");
}
