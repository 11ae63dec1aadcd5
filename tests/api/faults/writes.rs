//! The outcome of writes during faults: a 201 means that the task is stored exactly once, a 503 that a retry
//! is safe.

use std::time::Duration;

use futures_util::future::join_all;
use serde_json::{Value, json};
use tokio::time::sleep;
use tokio_postgres::Client as Sql;

use super::{Cluster, proxy::NetworkCondition};
use crate::harness::{PASSWORD, Request, Response, Server, Wire, WireResponse, until};

/// Longer than the deadline for database work.
const SLOW_BODY: Duration = Duration::from_millis(5300);

/// Sends a request whose body pauses in the middle.
async fn send_slowly(
    server: &Server,
    line: &str,
    token: &str,
    body: &Value,
    pause: Duration,
) -> WireResponse {
    let body = body.to_string();
    let head = format!(
        "{line} HTTP/1.1\r\nHost: todo.example\r\nAuthorization: Bearer {token}\r\n\
         Content-Type: application/json\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    let mut wire = Wire::open(server).await.with_long_timeout();
    let (first, second) = body.split_at(body.len() / 2);
    wire.send(format!("{head}{first}")).await;
    sleep(pause).await;
    wire.send(second).await;
    wire.response().await
}

async fn count(sql: &Sql, condition: &str) -> i64 {
    let statement = format!("select count(*) from tasks where {condition}");
    sql.query_one(&statement, &[]).await.unwrap().get(0)
}

/// Returns the process ids of the server's backends that satisfy this condition.
async fn backends(sql: &Sql, condition: &str) -> Vec<i32> {
    let statement = format!(
        "select pid from pg_stat_activity
         where datname = current_database() and application_name = 'todo-api' and {condition}"
    );
    let rows = sql.query(&statement, &[]).await.unwrap();
    rows.iter().map(|row| row.get(0)).collect()
}

/// Blocks every login, and every write of tasks.
const LOCK: &str = "select from users, task_lists, tasks for update";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_body_is_processed_once_and_closes_no_connection() {
    let server = Server::start().await;
    let sql = server.sql().await;
    let user = server.user().await;
    let token = user.access_token.as_str();
    let task = user.path_of(&user.create_task("one").await);
    let tasks = user.tasks();
    // Uses another user, because changing the password revokes sessions.
    let other = server.user().await;
    let new_password = "another-Lantern-43-harbour";
    let requests = [
        (
            format!("POST {tasks}"),
            token,
            json!({"title": "slow"}),
            201,
        ),
        (
            format!("PUT {task}"),
            token,
            json!({"title": "slow too"}),
            200,
        ),
        (
            format!("PATCH {task}/complete"),
            token,
            json!({"completed": true}),
            200,
        ),
        (
            "POST /api/v1/auth/register".into(),
            "",
            json!({"email": "slow@example.com", "password": PASSWORD}),
            201,
        ),
        (
            "POST /api/v1/auth/login".into(),
            "",
            json!({"email": user.email, "password": PASSWORD}),
            200,
        ),
        (
            "POST /api/v1/auth/refresh".into(),
            "",
            json!({"refresh_token": user.refresh_token}),
            200,
        ),
        (
            "PUT /api/v1/auth/password".into(),
            other.access_token.as_str(),
            json!({"current_password": PASSWORD, "new_password": new_password}),
            200,
        ),
    ];
    let before = backends(&sql, "true").await;
    assert!(!before.is_empty());
    let responses = join_all(
        requests
            .iter()
            .map(|(line, token, body, _)| send_slowly(&server, line, token, body, SLOW_BODY)),
    )
    .await;
    for ((line, .., status), response) in requests.iter().zip(responses) {
        assert_eq!(response.status, *status, "{line}: {}", response.body);
    }
    assert_eq!(count(&sql, "title = 'slow'").await, 1);
    assert_eq!(count(&sql, "title = 'slow too' and completed").await, 1);
    let after = backends(&sql, "true").await;
    assert!(
        before.iter().all(|pid| after.contains(pid)),
        "connections were replaced: {before:?}, now {after:?}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn writes_blocked_until_their_deadline_get_503_and_are_not_applied_later() {
    let server = Server::with(&[("DB_POOL_SIZE", "20")]).await;
    let sql = server.sql().await;
    let user = server.user().await;
    let task = user.path_of(&user.create_task("one").await);
    // The writes of one user would wait for each other.
    let other = server.user().await;
    let lock = server.lock(LOCK).await;
    let create = |title: &str| other.create(json!({"title": title}));
    let blocked = [
        create("without a key"),
        create("with a key").header("idempotency-key", "one"),
        user.put(&task).json(json!({"title": "changed"})),
        user.patch(format!("{task}/complete")),
        user.delete(&task),
        server
            .post("/api/v1/auth/login")
            .json(json!({"email": user.email, "password": PASSWORD})),
    ];
    let blocked = blocked.map(|request| tokio::spawn(request.send()));
    lock.wait_for_blocked(6).await;
    // Reads are not blocked.
    user.get(&task).await.expect(200);
    for response in blocked {
        let response = response.await.unwrap();
        response.problem(503, "database_unavailable");
        response.header("retry-after");
    }

    lock.release().await;
    until("no statement is running", async || {
        backends(&sql, "state <> 'idle'").await.is_empty()
    })
    .await;
    assert_eq!(count(&sql, "true").await, 1, "a rejected write was applied");
    let unchanged = "title = 'one' and not completed";
    assert_eq!(count(&sql, unchanged).await, 1);
    let sessions = "select count(*) from sessions";
    let sessions: i64 = sql.query_one(sessions, &[]).await.unwrap().get(0);
    assert_eq!(sessions, 2, "a rejected login created a session");

    // Retrying is safe, as the 503 promises.
    for request in [
        create("with a key").header("idempotency-key", "one"),
        create("with a key").header("idempotency-key", "one"),
    ] {
        request.await.expect(201);
    }
    assert_eq!(count(&sql, "title = 'with a key'").await, 1);
    assert!(!server.log().contains("database lost"), "{}", server.log());
}

/// Sends requests, terminates their backends while they are blocked, and releases the lock.
async fn send_and_terminate<const N: usize>(
    server: &Server,
    requests: [Request; N],
) -> [Response; N] {
    let lock = server.lock(LOCK).await;
    let sent = requests.map(|request| tokio::spawn(request.send()));
    lock.wait_for_blocked(N as i64).await;
    lock.terminate_blocked().await;
    sleep(Duration::from_millis(300)).await;
    lock.release().await;
    let mut responses = Vec::new();
    for response in sent {
        responses.push(response.await.unwrap());
    }
    responses.try_into().unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_response_to_a_write_whose_connection_is_lost_says_whether_a_retry_is_safe() {
    let server = Server::with(&[("DB_POOL_SIZE", "20")]).await;
    let user = server.user().await;
    let task = user.path_of(&user.create_task("one").await);
    let [created, put, toggled] = send_and_terminate(
        &server,
        [
            user.post(user.tasks()).json(json!({"title": "new"})),
            user.put(&task).json(json!({"title": "changed"})),
            user.patch(format!("{task}/complete")),
        ],
    )
    .await;
    // The service retries with the same id.
    created.expect(201);
    assert_eq!(count(&server.sql().await, "title = 'new'").await, 1);
    // Idempotent, so the client may retry.
    put.problem(503, "database_unavailable");
    // A retry would toggle the task again, so there is no Retry-After.
    let problem = toggled.problem(500, "internal");
    let detail = problem["detail"].as_str().unwrap();
    assert!(detail.contains("may or may not"), "{detail}");
    assert!(toggled.headers.get("retry-after").is_none());
    server.wait_for_log("reason=outcome_unknown").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_write_committed_before_its_connection_was_lost_is_acknowledged_and_stored_once() {
    // The task is the last one that the quota allows.
    let cluster = Cluster::proxied(&[("MAX_TASKS_PER_USER", "2")]).await;
    let sql = cluster.sql().await;
    let (server, user) = (&cluster.server, &cluster.user);
    let create = user.post(user.tasks()).json(json!({"title": "new"}));
    let register = server
        .post("/api/v1/auth/register")
        .json(json!({"email": "new@example.com", "password": PASSWORD}));
    let stored = [
        "select count(*) from tasks where title = 'new'",
        "select count(*) from users where email = 'new@example.com'",
    ];
    for (request, stored) in [create, register].into_iter().zip(stored) {
        // The first execution commits, but its result is lost.
        cluster.proxy().set_condition(NetworkCondition::Reset);
        let request = tokio::spawn(request.send());
        until("the row is stored", async || {
            let count: i64 = sql.query_one(stored, &[]).await.unwrap().get(0);
            count == 1
        })
        .await;
        // Wait until the result has been sent and lost.
        sleep(Duration::from_millis(100)).await;
        cluster.proxy().set_condition(NetworkCondition::Normal);
        request.await.unwrap().expect(201);
    }
    assert_eq!(count(&sql, "title = 'new'").await, 1);
    cluster.stop().await;
}
