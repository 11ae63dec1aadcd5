//! The service killed, stopped and started again, and two of it.

use std::time::{Duration, Instant};

use serde_json::json;

use super::{
    ANSWERED, HEALED,
    load::{Addresses, Credentials, Load, Outcome, Work, summary},
    report, serialize, short_or_full, until_well,
};
use crate::connections::{listening_socket, start_with_sockets};
use crate::harness::{DataDir, SECRET, Server, User, until};

/// What the drain may take; the rest is for a busy machine.
const STOPPED: Duration = Duration::from_secs(13);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_acknowledged_outlives_a_killed_service() {
    let _turn = serialize().await;
    let directory = DataDir::new();
    let variables = [("DATA_DIR", directory.text())];
    let mut server = Server::with(&variables).await;
    let user = server.user().await;
    let addresses = Addresses::of(&[server.addr()]);
    let load = Load::on(&addresses).writing(8, &Credentials::from(&user));
    let ledger = load.ledger.clone();
    let kills = short_or_full(2, 20);
    let mut slowest = Duration::ZERO;
    for _ in 0..kills {
        let calm = Instant::now();
        until("there is a load", async || {
            ledger.good_since(calm, Work::Write) > 100
        })
        .await;
        server.kill();
        let killed = Instant::now();
        server = Server::with(&variables).await;
        addresses.set(&[server.addr()]);
        until("writes are acknowledged again", async || {
            ledger.good_since(killed, Work::Write) > 20
        })
        .await;
        slowest = slowest.max(killed.elapsed());
    }
    let ledger = load.end().await;
    let kept = ledger.assert_kept(&server.sql().await).await;
    assert!(kept >= 100 * kills, "{kept} acknowledged");
    report(
        "service killed",
        format!(
            "{kills} × kill -9, slowest back after {slowest:.1?}; {}; {kept} compared, 0 lost, 0 doubled",
            ledger.summary()
        ),
    );
    assert_eq!(server.stop().await.code(), Some(0), "{}", server.log());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_request_goes_unanswered_when_the_service_stops() {
    let _turn = serialize().await;
    let mut server = Server::start().await;
    let user = server.user().await;
    let task = user.create_task("read me").await;
    let task = task["id"].as_str().unwrap();
    let asker = Credentials::from(&user);
    let addresses = Addresses::of(&[server.addr()]);
    let load = Load::on(&addresses)
        .reading(16, &asker, task)
        .writing(8, &asker);
    let ledger = load.ledger.clone();
    let stops = short_or_full(3, 20);
    let mut slowest = Duration::ZERO;
    for _ in 0..stops {
        let calm = Instant::now();
        until("there is a load", async || {
            ledger.good_since(calm, Work::Read) > 100 && ledger.good_since(calm, Work::Write) > 50
        })
        .await;
        let begin = Instant::now();
        let status = server.stop().await;
        let took = begin.elapsed();
        assert_eq!(status.code(), Some(0), "{}", server.log());
        assert!(took < STOPPED, "ended only after {took:?}");
        slowest = slowest.max(took);
        let next = server.sibling(&[]).await;
        addresses.set(&[next.addr()]);
        server = next;
    }
    let calm = Instant::now();
    until_well(&ledger, calm).await;
    let ledger = load.end().await;
    let kept = ledger.assert_kept(&server.sql().await).await;
    report(
        "SIGTERM under load",
        format!(
            "{stops} × , slowest end after {slowest:.1?}; {}; {kept} compared, 0 lost, 0 doubled",
            ledger.summary()
        ),
    );
    // Nobody listens between one and the next: connections are refused then, but no request that
    // was taken is dropped.
    let bad: Vec<_> = ledger
        .all()
        .into_iter()
        .filter(|answer| !answer.is_good() && answer.fate != Outcome::Refused)
        .collect();
    assert!(bad.is_empty(), "{}", summary(&bad));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restart_behind_a_socket_loses_no_request_at_all() {
    let _turn = serialize().await;
    let first = Server::start().await;
    let user = first.user().await;
    let task = user.on(&first).create_task("read me").await;
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

    let asker = Credentials::from(&user);
    let load = Load::on(&Addresses::of(&[address]))
        .reading(16, &asker, task)
        .writing(8, &asker);
    let ledger = load.ledger.clone();
    let restarts = short_or_full(3, 20);
    for _ in 0..restarts {
        let calm = Instant::now();
        until("there is a load", async || {
            ledger.good_since(calm, Work::Read) > 100 && ledger.good_since(calm, Work::Write) > 50
        })
        .await;
        let status = process.stop().await;
        assert_eq!(status.code(), Some(0), "{}", process.log());
        process = start();
    }
    let calm = Instant::now();
    until_well(&ledger, calm).await;
    let ledger = load.end().await;
    let kept = ledger.assert_kept(&first.sql().await).await;
    let all = ledger.all();
    let bad: Vec<_> = all
        .iter()
        .filter(|answer| !answer.is_good())
        .cloned()
        .collect();
    report(
        "restart behind a socket",
        format!(
            "{restarts} × ; {}; {kept} compared, 0 lost, 0 doubled",
            ledger.summary()
        ),
    );
    // A connection that the service has closed between two requests carried none.
    assert!(
        bad.iter()
            .all(|answer| answer.fate == Outcome::Status(503) && answer.retry_after),
        "{}",
        summary(&bad)
    );
    assert!(bad.is_empty(), "{}", summary(&bad));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_two_instances_one_can_be_killed_and_nobody_notices() {
    let _turn = serialize().await;
    let mut one = Server::start().await;
    let mut two = one.sibling(&[]).await;
    let user = one.user().await;
    let task = user.on(&one).create_task("read me").await;
    let task = task["id"].as_str().unwrap();
    let asker = Credentials::from(&user);
    let addresses = Addresses::of(&[one.addr(), two.addr()]);
    let load = Load::on(&addresses)
        .reading(8, &asker, task)
        .writing(8, &asker);
    let ledger = load.ledger.clone();
    let kills = short_or_full(3, 20);
    for _ in 0..kills {
        let calm = Instant::now();
        until("there is a load", async || {
            ledger.good_since(calm, Work::Read) > 100 && ledger.good_since(calm, Work::Write) > 50
        })
        .await;
        one.kill();
        // The other serves alone.
        let killed = Instant::now();
        let alone = until_well(&ledger, killed).await;
        assert!(alone < HEALED, "well only after {alone:?}");
        one = two.sibling(&[]).await;
        addresses.set(&[one.addr(), two.addr()]);
        std::mem::swap(&mut one, &mut two);
    }
    let ledger = load.end().await;
    let kept = ledger.assert_kept(&two.sql().await).await;
    assert!(kept >= 50 * kills, "{kept} acknowledged");
    let answers = ledger.all();
    assert!(
        answers.iter().all(|answer| answer.took < ANSWERED),
        "{}",
        ledger.summary()
    );
    // What a kill cuts off, the other instance answers when it is asked again.
    assert!(
        !answers
            .iter()
            .any(|answer| matches!(answer.fate, Outcome::Status(300..))),
        "{}",
        ledger.summary()
    );
    let agreed = agree(&one, &two).await;
    report(
        "one of two instances killed",
        format!(
            "{kills} × ; {}; {kept} compared, 0 lost, 0 doubled; {agreed}",
            ledger.summary()
        ),
    );
}

/// Refresh rotation, ended sessions and throttling are the same on both.
async fn agree(one: &Server, two: &Server) -> String {
    let refresh = async |server: &Server, token: &str| {
        let body = json!({"refresh_token": token});
        server.post("/api/v1/auth/refresh").json(body).send().await
    };
    let user: User = one.user().await;
    let here = refresh(one, &user.refresh_token).await.expect(200).json();
    let there = refresh(two, &user.refresh_token).await.expect(200).json();
    assert_eq!(here["refresh_token"], there["refresh_token"]);

    let token = here["access_token"].as_str().unwrap();
    one.post("/api/v1/auth/logout")
        .bearer(token)
        .send()
        .await
        .expect(204);
    let ended = Instant::now();
    until("the session is over on the other instance", async || {
        let me = two.get("/api/v1/auth/me").bearer(token).send().await;
        me.status == 401
    })
    .await;
    let ended = ended.elapsed();
    assert!(ended < Duration::from_secs(4), "over only after {ended:?}");
    refresh(two, here["refresh_token"].as_str().unwrap())
        .await
        .problem(401, "invalid_refresh_token");

    for failure in 0..10 {
        let server = if failure % 2 == 0 { one } else { two };
        let body = json!({"email": user.email, "password": "not-The-right-one-77"});
        let login = server.post("/api/v1/auth/login").json(body).send().await;
        login.problem(401, "invalid_credentials");
    }
    for server in [one, two] {
        let body = json!({"email": user.email, "password": user.password});
        let login = server.post("/api/v1/auth/login").json(body).send().await;
        login.problem(429, "too_many_attempts");
    }
    format!("same successor, session over after {ended:.1?}, throttled on both")
}
