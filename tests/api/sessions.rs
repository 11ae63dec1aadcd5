//! The list of a user's sessions, and revocation on every instance within a second.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use serde_json::{Value, json};
use tokio::time::sleep;

use crate::auth::{
    ANOTHER_PASSWORD, assert_signed_in, assert_time, change_password, delete_account, login,
    logout, members, refresh, text,
};
use crate::harness::{PASSWORD, Server, User, claims};
use crate::purge::age;

/// The tasks of another user. The response is 403 with a valid token and 401 with any other. The
/// only query is the one for revocations.
pub(crate) const OTHER_USERS_TASKS: &str = "/api/v1/00000000-0000-7000-8000-000000000000/tasks";

/// Asserts that requests with this token are rejected no later than one second after `ended`.
pub(crate) async fn assert_revoked(server: &Server, token: &str, ended: Instant) {
    loop {
        let sent = Instant::now();
        let response = server.get(OTHER_USERS_TASKS).bearer(token).await;
        if response.status == 401 {
            response.problem(401, "invalid_token");
            break;
        }
        response.problem(403, "forbidden");
        assert!(
            sent.duration_since(ended) < Duration::from_secs(1),
            "a revoked token was accepted {:?} after the revocation",
            sent.duration_since(ended)
        );
        tokio::time::sleep(Duration::from_millis(25)).await;
    }
    // Routes that query the database also reject the token.
    server
        .get("/api/v1/auth/me")
        .bearer(token)
        .await
        .problem(401, "invalid_token");
}

pub(crate) async fn list(server: &Server, access_token: &str) -> Vec<Value> {
    let response = server
        .get("/api/v1/auth/sessions")
        .bearer(access_token)
        .await
        .expect(200);
    assert_eq!(response.header("cache-control"), "no-store");
    response.json().as_array().expect("an array").clone()
}

/// Logs in with a User-Agent of arbitrary bytes.
async fn login_as(server: &Server, user: &User, user_agent: &[u8]) -> Value {
    let body = json!({"email": user.email, "password": user.password}).to_string();
    let head = b"POST /api/v1/auth/login HTTP/1.1\r\nHost: localhost\r\nUser-Agent: ";
    let rest = format!(
        "\r\nContent-Type: application/json\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
        body.len()
    );
    let response = server
        .raw([head, user_agent, rest.as_bytes()].concat())
        .await;
    assert!(response.starts_with("HTTP/1.1 200 "), "{response}");
    let (_, body) = response.split_once("\r\n\r\n").expect("a body");
    serde_json::from_str(body).expect("JSON")
}

#[tokio::test]
async fn lists_the_users_own_sessions_newest_first() {
    let server = Server::start().await;
    let ann = server.user().await;
    let _bob = server.user().await;
    let phone = login_as(&server, &ann, b"phone").await;
    let laptop = login_as(&server, &ann, b"laptop").await;
    let (phone, laptop) = (text(&phone, "access_token"), text(&laptop, "access_token"));

    for (token, current) in [(&laptop, 0), (&phone, 1), (&ann.access_token, 2)] {
        let sessions = list(&server, token).await;
        let ids: Vec<String> = sessions.iter().map(|session| text(session, "id")).collect();
        let expected: Vec<String> = [&laptop, &phone, &ann.access_token]
            .iter()
            .map(|token| text(&claims(token), "sid"))
            .collect();
        assert_eq!(ids, expected);
        assert_eq!(sessions[0]["user_agent"], "laptop");
        assert_eq!(sessions[1]["user_agent"], "phone");
        for (position, session) in sessions.iter().enumerate() {
            let expected = [
                "id",
                "user_agent",
                "created_at",
                "last_used_at",
                "expires_at",
                "current",
            ];
            assert_eq!(members(session), BTreeSet::from(expected));
            for time in ["created_at", "last_used_at", "expires_at"] {
                assert_time(&text(session, time));
            }
            assert_eq!(session["current"], position == current);
        }
    }

    // A refresh updates its own session only.
    let before = list(&server, &phone).await;
    refresh(&server, &ann.refresh_token).await.expect(200);
    let after = list(&server, &phone).await;
    assert_eq!(before[..2], after[..2]);
    assert!(text(&after[2], "last_used_at") > text(&before[2], "last_used_at"));
    assert!(text(&after[2], "expires_at") > text(&before[2], "expires_at"));
    assert_eq!(after[2]["created_at"], before[2]["created_at"]);
}

#[tokio::test]
async fn does_not_list_expired_sessions() {
    let server = Server::start().await;
    let sql = server.sql().await;
    let ann = server.user().await;
    let second = server.login(&ann.email, &ann.password).await;
    let condition = format!("id = '{}'", ann.session_id);
    age(&sql, "sessions", "31 days", &condition).await;
    let sessions = list(&server, &second.access_token).await;
    assert_eq!(sessions.len(), 1);
    assert_eq!(sessions[0]["current"], true);
}

/// The first 200 characters are stored.
#[tokio::test]
async fn accepts_any_user_agent_at_login() {
    let server = Server::start().await;
    let ann = server.user().await;
    let long = "x".repeat(250);
    let long_umlauts = "ü".repeat(250);
    for (sent, kept) in [
        ("curl/8.0", Some("curl/8.0")),
        (
            "<script>alert(1)</script>",
            Some("<script>alert(1)</script>"),
        ),
        (
            "'; drop table sessions; --",
            Some("'; drop table sessions; --"),
        ),
        ("\"quoted\" \\ {} %s", Some("\"quoted\" \\ {} %s")),
        (long.as_str(), Some(&long[..200])),
        (long_umlauts.as_str(), Some(&long_umlauts[..400])),
    ] {
        let body = login_as(&server, &ann, sent.as_bytes()).await;
        let sessions = list(&server, &text(&body, "access_token")).await;
        assert_eq!(sessions[0]["user_agent"].as_str(), kept);
    }
    // Invalid UTF-8, unprintable, or empty.
    for bytes in [&b"\xff\xfe\xc0\x80"[..], b"tab\there", b""] {
        let body = login_as(&server, &ann, bytes).await;
        let sessions = list(&server, &text(&body, "access_token")).await;
        let kept = &sessions[0]["user_agent"];
        assert!(kept.is_null() || kept.is_string(), "{kept}");
    }
    // No User-Agent header.
    let session = server.login(&ann.email, &ann.password).await;
    let sessions = list(&server, &session.access_token).await;
    assert_eq!(sessions[0]["user_agent"], Value::Null);
}

#[tokio::test]
async fn one_session_can_end_another() {
    let server = Server::start().await;
    let ann = server.user().await;
    let revoked = server.login(&ann.email, &ann.password).await;
    let remaining = server.login(&ann.email, &ann.password).await;
    let path = format!("/api/v1/auth/sessions/{}", revoked.session_id);
    ann.delete(&path).await.expect(204);
    let ended = Instant::now();
    assert_revoked(&server, &revoked.access_token, ended).await;
    let response = refresh(&server, &revoked.refresh_token).await;
    response.problem(401, "invalid_refresh_token");
    ann.delete(&path).await.problem(404, "session_not_found");
    for user in [&ann, &remaining] {
        assert_eq!(list(&server, &user.access_token).await.len(), 2);
    }
}

#[tokio::test]
async fn a_session_can_end_itself() {
    let server = Server::shared().await;
    let ann = server.user().await;
    ann.delete(format!("/api/v1/auth/sessions/{}", ann.session_id))
        .await
        .expect(204);
    assert_revoked(server, &ann.access_token, Instant::now()).await;
}

#[tokio::test]
async fn all_other_sessions_can_be_ended() {
    let server = Server::start().await;
    let ann = server.user().await;
    let bob = server.user().await;
    let mut others = Vec::new();
    for _ in 0..3 {
        others.push(server.login(&ann.email, &ann.password).await);
    }
    ann.delete("/api/v1/auth/sessions").await.expect(204);
    let ended = Instant::now();
    for other in &others {
        assert_revoked(&server, &other.access_token, ended).await;
        let response = refresh(&server, &other.refresh_token).await;
        response.problem(401, "invalid_refresh_token");
    }
    for user in [&ann, &bob] {
        let sessions = list(&server, &user.access_token).await;
        assert_eq!(sessions.len(), 1);
        refresh(&server, &user.refresh_token).await.expect(200);
    }
    // Succeeds without other sessions too.
    ann.delete("/api/v1/auth/sessions").await.expect(204);
}

/// FR-007, SC-004.
#[tokio::test]
async fn another_users_session_is_not_found_and_unchanged() {
    let server = Server::start().await;
    let sql = server.sql().await;
    let ann = server.user().await;
    let bob = server.user().await;
    let row = async || -> String {
        sql.query_one(
            &format!(
                "select s::text from sessions s where id = '{}'",
                bob.session_id
            ),
            &[],
        )
        .await
        .expect("the session")
        .get(0)
    };
    let before = row().await;
    let upper = bob.session_id.to_uppercase();
    let mut details = BTreeSet::new();
    for id in [
        bob.session_id.as_str(),
        &upper,
        "00000000-0000-7000-8000-000000000000",
        "not-a-uuid",
        "%00",
        "'%20or%20'1'='1",
    ] {
        let problem = ann
            .delete(format!("/api/v1/auth/sessions/{id}"))
            .await
            .problem(404, "session_not_found");
        details.insert(problem["detail"].to_string());
    }
    assert_eq!(details.len(), 1, "{details:?}");
    assert_eq!(row().await, before);
    refresh(&server, &bob.refresh_token).await.expect(200);
}

/// The causes of a revocation.
#[derive(Clone, Copy, Debug)]
enum Cause {
    Logout,
    LogoutWithRefreshToken,
    DeletedOne,
    DeletedOthers,
    PasswordChanged,
    AccountDeleted,
    RefreshTokenReused,
}

/// Logs a user in twice and revokes the second session. Returns its access token and the time of the
/// revocation.
async fn revoke(server: &Server, cause: Cause) -> (String, Instant) {
    revoke_after(server, cause, async |_| {}).await
}

/// Like [`revoke`], but calls `event` with the ID of the second session first.
async fn revoke_after(
    server: &Server,
    cause: Cause,
    event: impl AsyncFnOnce(&str),
) -> (String, Instant) {
    let ann = server.user().await;
    let second = server.login(&ann.email, &ann.password).await;
    let (token, refresh_token) = (second.access_token, second.refresh_token);
    event(&second.session_id).await;
    match cause {
        Cause::Logout => logout(server, &token).await.expect(204),
        Cause::LogoutWithRefreshToken => server
            .post("/api/v1/auth/logout")
            .json(json!({"refresh_token": refresh_token}))
            .await
            .expect(204),
        Cause::DeletedOne => ann
            .delete(format!("/api/v1/auth/sessions/{}", second.session_id))
            .await
            .expect(204),
        Cause::DeletedOthers => ann.delete("/api/v1/auth/sessions").await.expect(204),
        Cause::PasswordChanged => {
            change_password(server, &ann.access_token, PASSWORD, ANOTHER_PASSWORD)
                .await
                .expect(200)
        }
        Cause::AccountDeleted => delete_account(server, &ann.access_token, &ann.password)
            .await
            .expect(204),
        Cause::RefreshTokenReused => {
            let second = refresh(server, &refresh_token).await.expect(200).json();
            refresh(server, &text(&second, "refresh_token"))
                .await
                .expect(200);
            refresh(server, &refresh_token).await.expect(401)
        }
    };
    (token, Instant::now())
}

const ALL_CAUSES: [Cause; 7] = [
    Cause::Logout,
    Cause::LogoutWithRefreshToken,
    Cause::DeletedOne,
    Cause::DeletedOthers,
    Cause::PasswordChanged,
    Cause::AccountDeleted,
    Cause::RefreshTokenReused,
];

#[tokio::test]
async fn a_revocation_takes_effect_on_every_instance_within_a_second() {
    let here = Server::start().await;
    let there = here.sibling(&[]).await;
    let other = here.user().await;
    for cause in ALL_CAUSES {
        // The other instance has just refreshed its revocations; its next refresh is in one second.
        assert_signed_in(&there, &other.access_token).await;
        let (token, ended) = revoke(&here, cause).await;
        println!("{cause:?}");
        join_all([
            assert_revoked(&there, &token, ended),
            assert_revoked(&here, &token, ended),
        ])
        .await;
        assert_signed_in(&there, &other.access_token).await;
    }
}

#[tokio::test]
async fn an_instance_that_starts_later_applies_earlier_revocations() {
    let here = Server::start().await;
    let mut tokens = Vec::new();
    for cause in ALL_CAUSES {
        tokens.push(revoke(&here, cause).await);
    }
    let later = here.sibling(&[]).await;
    // All requests are concurrent, so that each is among the first.
    let statuses = join_all(
        tokens
            .iter()
            .map(async |(token, _)| later.get(OTHER_USERS_TASKS).bearer(token).await.status),
    )
    .await;
    assert_eq!(statuses, [401; 7]);
}

/// The last access token of a session that was refreshed just before it expired is valid for longer
/// than the session.
#[tokio::test]
async fn revoking_an_expired_session_revokes_its_last_access_token() {
    let here = Server::start().await;
    let there = here.sibling(&[]).await;
    let sql = here.sql().await;
    for cause in [
        Cause::Logout,
        Cause::LogoutWithRefreshToken,
        Cause::DeletedOne,
        Cause::DeletedOthers,
        Cause::PasswordChanged,
        Cause::AccountDeleted,
    ] {
        let (token, ended) = revoke_after(&here, cause, async |sid| {
            age(&sql, "sessions", "30 days 1 hour", &format!("id = '{sid}'")).await;
        })
        .await;
        println!("{cause:?}");
        assert_revoked(&there, &token, ended).await;
    }
}

/// Counts the statements of other clients of the database, by polling the last statement of each
/// backend.
struct StatementCounter {
    sql: tokio_postgres::Client,
    seen: BTreeSet<(i32, String)>,
}

impl StatementCounter {
    async fn poll(&mut self) -> usize {
        let rows = self
            .sql
            .query(
                "select pid, query_start::text || ' ' || query from pg_stat_activity
                 where datname = current_database() and pid <> pg_backend_pid()
                   and query_start is not null",
                &[],
            )
            .await
            .expect("the activity");
        self.seen
            .extend(rows.iter().map(|row| (row.get(0), row.get(1))));
        self.seen.len()
    }
}

#[tokio::test]
async fn revocations_take_at_most_two_queries_a_second_and_none_when_idle() {
    const PAUSE: Duration = Duration::from_millis(8);
    let server = Server::start().await;
    let ann = server.user().await;
    let mut statements = StatementCounter {
        sql: server.sql().await,
        seen: BTreeSet::new(),
    };
    // The first requests after a start send more queries.
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(2) {
        ann.get(OTHER_USERS_TASKS).await.expect(403);
        sleep(PAUSE).await;
    }

    let before = statements.poll().await;
    let started = Instant::now();
    let stop = tokio::sync::Notify::new();
    let load = async {
        let mut requests = 0;
        while started.elapsed() < Duration::from_secs(4) {
            ann.get(OTHER_USERS_TASKS).await.expect(403);
            requests += 1;
            sleep(PAUSE).await;
        }
        stop.notify_one();
        requests
    };
    let watch = async {
        loop {
            tokio::select! {
                () = stop.notified() => break,
                () = sleep(PAUSE) => {
                    statements.poll().await;
                }
            }
        }
        statements.poll().await - before
    };
    let (requests, queries) = tokio::join!(load, watch);
    let seconds = started.elapsed().as_secs_f64();
    assert!(requests > 50, "only {requests} requests");
    assert!(queries >= 2, "only {queries} queries");
    assert!(
        queries as f64 <= 2.0 * seconds + 2.0,
        "{queries} queries for {requests} requests in {seconds} s"
    );

    // Statements of the last requests may follow, then none.
    let deadline = Instant::now() + Duration::from_secs(12);
    let mut seen = statements.poll().await;
    let mut quiet_since = Instant::now();
    while quiet_since.elapsed() < Duration::from_millis(2500) {
        let now = statements.poll().await;
        if now > seen {
            seen = now;
            quiet_since = Instant::now();
        }
        assert!(
            Instant::now() < deadline,
            "an idle service keeps querying the database"
        );
        sleep(Duration::from_millis(20)).await;
    }
}

/// Revocations cannot be read while the database is down.
#[tokio::test]
async fn returns_503_for_valid_tokens_while_the_database_is_down() {
    let server = Server::start().await;
    let ann = server.user().await;
    let forged = format!("{}x", ann.access_token);
    let mut config: tokio_postgres::Config = server.database_url().parse().expect("a database URL");
    let database = config.get_dbname().expect("a database").to_owned();
    // Connects to another database, because this one will refuse connections.
    let (admin, connection) = config
        .dbname("postgres")
        .connect(tokio_postgres::NoTls)
        .await
        .expect("a connection");
    tokio::spawn(connection);
    admin
        .batch_execute(&format!(
            "alter database \"{database}\" allow_connections false"
        ))
        .await
        .expect("connections disabled");
    admin
        .execute(
            "select pg_terminate_backend(pid) from pg_stat_activity where datname = $1",
            &[&database],
        )
        .await
        .expect("connections terminated");
    let down_since = Instant::now();

    let mut unavailable = 0;
    while unavailable < 10 {
        let sent = Instant::now();
        let response = ann.get(OTHER_USERS_TASKS).await;
        if response.status == 503 {
            assert!(!response.header("retry-after").is_empty());
            response.problem(503, "database_unavailable");
            unavailable += 1;
        } else {
            response.problem(403, "forbidden");
            assert!(
                sent.duration_since(down_since) < Duration::from_secs(1),
                "accepted with outdated revocations"
            );
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    // A forged token is rejected without the database.
    server
        .get(OTHER_USERS_TASKS)
        .bearer(&forged)
        .await
        .problem(401, "invalid_token");
    ann.get("/api/v1/auth/me")
        .await
        .problem(503, "database_unavailable");
    refresh(&server, &ann.refresh_token)
        .await
        .problem(503, "database_unavailable");
    login(&server, &ann.email, &ann.password)
        .await
        .problem(503, "database_unavailable");

    admin
        .batch_execute(&format!(
            "alter database \"{database}\" allow_connections true"
        ))
        .await
        .expect("connections enabled");
    let deadline = Instant::now() + Duration::from_secs(15);
    loop {
        let response = ann.get("/api/v1/auth/me").await;
        if response.status == 200 {
            break;
        }
        response.problem(503, "database_unavailable");
        assert!(Instant::now() < deadline, "the service does not recover");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    refresh(&server, &ann.refresh_token).await.expect(200);
}
