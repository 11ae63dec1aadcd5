//! Kills, shutdowns and restarts of the service, alone and as one of two instances.

use std::time::{Duration, Instant};

use serde_json::json;

use super::{
    RECOVERY_TIMEOUT, RESPONSE_TIMEOUT,
    load::{Addresses, Credentials, Load, Outcome, summary},
    report, short_or_full, start_light_load, until_recovered, until_served,
};
use crate::connections::{listening_socket, start_with_sockets};
use crate::harness::{DataDir, SECRET, Server, User, until};

/// The service shuts down within 10 s; the additional time allows for a busy machine.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(13);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn acknowledged_tasks_survive_a_killed_service() {
    let _guard = start_light_load().await;
    let directory = DataDir::initialized().await;
    let variables = [("DATA_DIR", directory.text())];
    let mut server = Server::with(&variables).await;
    let user = server.user().await;
    let addresses = Addresses::new(&[server.addr()]);
    let load = Load::new(&addresses).writing(8, &Credentials::from(&user));
    let kills = short_or_full(1, 20);
    let mut slowest = Duration::ZERO;
    for _ in 0..kills {
        until_served(&load.requests, 0, 101).await;
        server.kill();
        let killed = Instant::now();
        server = Server::with(&variables).await;
        addresses.set(&[server.addr()]);
        until_served(&load.requests, 0, 21).await;
        slowest = slowest.max(killed.elapsed());
    }
    let requests = load.finish().await;
    let kept = requests.assert_durable(&server.sql().await).await;
    assert!(kept >= 100 * kills, "{kept} acknowledged");
    report(
        "service killed",
        format!(
            "{kills} × kill -9, slowest recovery {slowest:.1?}; {}; {kept} tasks verified",
            requests.summary()
        ),
    );
    assert_eq!(server.stop().await.code(), Some(0), "{}", server.log());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_accepted_request_gets_a_response_during_shutdown() {
    let _guard = start_light_load().await;
    let mut server = Server::start().await;
    let user = server.user().await;
    let task = user.create_task("read me").await;
    let task = task["id"].as_str().unwrap();
    let credentials = Credentials::from(&user);
    let addresses = Addresses::new(&[server.addr()]);
    let load = Load::new(&addresses)
        .reading(16, &credentials, task)
        .writing(8, &credentials);
    let stops = short_or_full(1, 20);
    let mut slowest = Duration::ZERO;
    for _ in 0..stops {
        until_served(&load.requests, 101, 51).await;
        let start = Instant::now();
        let status = server.stop().await;
        let duration = start.elapsed();
        assert_eq!(status.code(), Some(0), "{}", server.log());
        assert!(
            duration < SHUTDOWN_TIMEOUT,
            "exited only after {duration:?}"
        );
        slowest = slowest.max(duration);
        let next = server.sibling(&[]).await;
        addresses.set(&[next.addr()]);
        server = next;
    }
    until_recovered(&load.requests, Instant::now(), RECOVERY_TIMEOUT).await;
    let requests = load.finish().await;
    let kept = requests.assert_durable(&server.sql().await).await;
    report(
        "SIGTERM under load",
        format!(
            "{stops} ×, slowest exit {slowest:.1?}; {}; {kept} tasks verified",
            requests.summary()
        ),
    );
    // Between two instances connections are refused, but no accepted request is dropped.
    let failed: Vec<_> = requests
        .all()
        .into_iter()
        .filter(|request| !request.is_success() && request.outcome != Outcome::NotConnected)
        .collect();
    assert!(failed.is_empty(), "{}", summary(&failed));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_request_fails_while_the_service_restarts_with_a_passed_socket() {
    let _guard = start_light_load().await;
    let first = Server::start().await;
    let user = first.user().await;
    let task = user.create_task("read me").await;
    let task = task["id"].as_str().unwrap();
    let sockets = [listening_socket(), listening_socket()];
    let address = sockets[0].local_addr().unwrap();
    let start = || {
        start_with_sockets(
            &sockets,
            &[
                ("DATABASE_URL", &first.database_url()),
                ("JWT_SECRET", SECRET),
            ],
        )
    };
    let mut process = start();
    assert_eq!(process.listening().await, address);

    let credentials = Credentials::from(&user);
    let load = Load::new(&Addresses::new(&[address]))
        .reading(16, &credentials, task)
        .writing(8, &credentials);
    let restarts = short_or_full(1, 20);
    for _ in 0..restarts {
        until_served(&load.requests, 101, 51).await;
        let status = process.stop().await;
        assert_eq!(status.code(), Some(0), "{}", process.log());
        process = start();
    }
    until_recovered(&load.requests, Instant::now(), RECOVERY_TIMEOUT).await;
    let requests = load.finish().await;
    let kept = requests.assert_durable(&first.sql().await).await;
    report(
        "restart with a passed socket",
        format!(
            "{restarts} ×; {}; {kept} tasks verified",
            requests.summary()
        ),
    );
    let records = requests.all();
    assert!(
        records.iter().all(|request| request.is_success()),
        "{}",
        requests.summary()
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_other_instance_serves_while_one_of_two_is_killed() {
    let _guard = start_light_load().await;
    let mut one = Server::start().await;
    let mut two = one.sibling(&[]).await;
    let user = one.user().await;
    let task = user.create_task("read me").await;
    let task = task["id"].as_str().unwrap();
    let credentials = Credentials::from(&user);
    let addresses = Addresses::new(&[one.addr(), two.addr()]);
    let load = Load::new(&addresses)
        .reading(8, &credentials, task)
        .writing(8, &credentials);
    let kills = short_or_full(1, 20);
    for _ in 0..kills {
        until_served(&load.requests, 101, 51).await;
        one.kill();
        until_recovered(&load.requests, Instant::now(), RECOVERY_TIMEOUT).await;
        one = two.sibling(&[]).await;
        addresses.set(&[one.addr(), two.addr()]);
        std::mem::swap(&mut one, &mut two);
    }
    let requests = load.finish().await;
    let kept = requests.assert_durable(&two.sql().await).await;
    assert!(kept >= 50 * kills, "{kept} acknowledged");
    // A request that the kill interrupted is retried successfully on the other instance.
    let is_expected = |request: &super::load::RequestRecord| {
        request.duration < RESPONSE_TIMEOUT && !matches!(request.outcome, Outcome::Status(300..))
    };
    assert!(
        requests.all().iter().all(is_expected),
        "{}",
        requests.summary()
    );
    let shared = assert_state_is_shared(&one, &two).await;
    report(
        "one of two instances killed",
        format!(
            "{kills} ×; {}; {kept} tasks verified; {shared}",
            requests.summary()
        ),
    );
}

/// Asserts that refresh rotation, revocation and login lockout hold across both instances.
async fn assert_state_is_shared(one: &Server, two: &Server) -> String {
    let refresh = async |server: &Server, token: &str| {
        let body = json!({"refresh_token": token});
        server.post("/api/v1/auth/refresh").json(body).await
    };
    let login = async |server: &Server, email: &str, password: &str| {
        let body = json!({"email": email, "password": password});
        server.post("/api/v1/auth/login").json(body).await
    };
    let user: User = one.user().await;
    let first = refresh(one, &user.refresh_token).await.expect(200).json();
    let second = refresh(two, &user.refresh_token).await.expect(200).json();
    assert_eq!(first["refresh_token"], second["refresh_token"]);

    let token = first["access_token"].as_str().unwrap();
    one.post("/api/v1/auth/logout")
        .bearer(token)
        .await
        .expect(204);
    let logged_out = Instant::now();
    until("the other instance rejects the session", async || {
        let me = two.get("/api/v1/auth/me").bearer(token).await;
        me.status == 401
    })
    .await;
    let revoked = logged_out.elapsed();
    assert!(
        revoked < Duration::from_secs(4),
        "rejected only after {revoked:?}"
    );
    refresh(two, first["refresh_token"].as_str().unwrap())
        .await
        .problem(401, "invalid_refresh_token");

    for attempt in 0..10 {
        let server = if attempt % 2 == 0 { one } else { two };
        login(server, &user.email, "not-The-right-one-77")
            .await
            .problem(401, "invalid_credentials");
    }
    for server in [one, two] {
        login(server, &user.email, &user.password)
            .await
            .problem(429, "too_many_attempts");
    }
    format!("same refresh token, session rejected after {revoked:.1?}, locked out on both")
}
