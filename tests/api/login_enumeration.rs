//! What a sign-in tells whom it refuses: nothing. Not by its words, its headers or its time.

use std::time::{Duration, Instant};

use crate::auth::{ANOTHER_PASSWORD, login};
use crate::harness::{Response, Server};
use serde_json::json;

/// All that an answer says, but for the clock's hand.
fn all_of(response: &Response) -> (u16, Vec<(String, String)>, String) {
    let mut headers: Vec<(String, String)> = response
        .headers
        .iter()
        .filter(|(name, _)| *name != "date")
        .map(|(name, value)| {
            let value = String::from_utf8_lossy(value.as_bytes()).into_owned();
            (name.to_string(), value)
        })
        .collect();
    headers.sort();
    let body = String::from_utf8_lossy(&response.body).into_owned();
    (response.status, headers, body)
}

/// A wrong guess under a fixed request id, so that answers can be compared to the byte.
async fn guess(server: &Server, email: &str, password: &str) -> Response {
    server
        .post("/api/v1/auth/login")
        .header("x-request-id", "the-same-for-all")
        .json(json!({"email": email, "password": password}))
        .await
}

#[tokio::test]
async fn a_known_and_an_unknown_address_are_refused_alike() {
    let server = Server::start().await;
    let ann = server.register("ann@example.com").await;
    let long = "long".repeat(100);
    for password in [ANOTHER_PASSWORD, "", "short", "password", "\0", &long] {
        let known = guess(&server, &ann.email, password).await;
        let unknown = guess(&server, "bob@example.com", password).await;
        assert_eq!(known.status, 401);
        assert_eq!(all_of(&known), all_of(&unknown), "{password:?}");
    }
}

/// The slowing down begins at the same guess and lasts as long.
#[tokio::test]
async fn a_known_and_an_unknown_address_are_slowed_down_alike() {
    let server = Server::start().await;
    let ann = server.register("ann@example.com").await;
    for n in 0..12 {
        let known = guess(&server, &ann.email, ANOTHER_PASSWORD).await;
        let unknown = guess(&server, "bob@example.com", ANOTHER_PASSWORD).await;
        assert_eq!(known.status, if n < 10 { 401 } else { 429 });
        let strip = |response: &Response| {
            let (status, mut headers, body) = all_of(response);
            // Seconds left: the two were not sent in the same instant.
            headers.retain(|(name, _)| name != "retry-after");
            let shape: String = body
                .chars()
                .map(|c| if c.is_ascii_digit() { '0' } else { c })
                .collect();
            (status, headers, shape)
        };
        assert_eq!(strip(&known), strip(&unknown), "guess {n}");
    }
}

/// The median of one kind of guess.
fn median(mut times: Vec<Duration>) -> f64 {
    times.sort();
    times[times.len() / 2].as_secs_f64()
}

/// How long a wrong guess at a known address takes, as a part of one at an unknown address.
///
/// The noise of a busy machine hits both kinds alike because they take turns.
async fn ratio_of_times(server: &Server, known: &str, rounds: usize) -> f64 {
    let sql = server.sql().await;
    let mut times = [Vec::new(), Vec::new()];
    for round in 0..rounds {
        // Or the tenth guess would be the last one that is checked.
        sql.execute("delete from login_failures", &[])
            .await
            .expect("a clean slate");
        let unknown = format!("{round}@example.com");
        for (times, email) in times.iter_mut().zip([known, &unknown]) {
            let started = Instant::now();
            login(server, email, ANOTHER_PASSWORD).await.expect(401);
            times.push(started.elapsed());
        }
    }
    let [known, unknown] = times.map(median);
    known / unknown
}

/// A hash that is not checked would be a tenth of the time or less.
#[tokio::test]
async fn a_known_and_an_unknown_address_take_the_same_time() {
    let server = Server::with(&[("BCRYPT_COST", "11")]).await;
    let ann = server.register("ann@example.com").await;
    let ratio = ratio_of_times(&server, &ann.email, 21).await;
    assert!((0.5..2.0).contains(&ratio), "{ratio}");
}

/// After the operator raised the cost by two, a guess at whoever did not sign in since would be
/// a quarter of the time.
#[tokio::test]
async fn an_account_with_a_hash_of_an_older_cost_takes_the_same_time() {
    let before = Server::with(&[("BCRYPT_COST", "10")]).await;
    let ann = before.register("ann@example.com").await;
    let server = before.sibling(&[("BCRYPT_COST", "12")]).await;
    let ratio = ratio_of_times(&server, &ann.email, 9).await;
    assert!((0.5..2.0).contains(&ratio), "{ratio}");
}
