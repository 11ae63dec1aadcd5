//! The list of one's sessions, and that what has ended is over everywhere within a second.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use serde_json::{Value, json};

use crate::auth::{
    ANOTHER_PASSWORD, assert_signed_in, assert_time, change_password, delete_account, login,
    logout, refresh, text,
};
use crate::harness::{PASSWORD, Server, User, claims};
use crate::purge::age;

/// Somebody else's tasks: 403 to a good token and 401 to any other, before the database is
/// asked for anything but what has ended.
pub(crate) const OTHER_USERS_TASKS: &str = "/api/v1/00000000-0000-7000-8000-000000000000/tasks";

/// Asserts that no request sent a second or more after `ended` is let in with this token.
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
            "a token of an ended session was let in {:?} after the end",
            sent.duration_since(ended)
        );
        tokio::time::sleep(Duration::from_millis(25)).await;
    }
    // And it stays dead, on the routes that do ask the database too.
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

/// A sign-in by a client that calls itself something, in whatever bytes.
async fn login_as(server: &Server, user: &User, user_agent: &[u8]) -> Value {
    let body = json!({"email": user.email, "password": user.password}).to_string();
    let head = b"POST /api/v1/auth/login HTTP/1.1\r\nHost: localhost\r\nUser-Agent: ";
    let rest = format!(
        "\r\nContent-Type: application/json\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
        body.len()
    );
    let answer = server
        .raw([head, user_agent, rest.as_bytes()].concat())
        .await;
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    let (_, body) = answer.split_once("\r\n\r\n").expect("a body");
    serde_json::from_str(body).expect("JSON")
}

#[tokio::test]
async fn one_sees_ones_own_sessions_newest_first() {
    let server = Server::start().await;
    let ann = server.register("ann@example.com").await;
    let _bob = server.register("bob@example.com").await;
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
            let members: BTreeSet<&str> = session
                .as_object()
                .expect("an object")
                .keys()
                .map(String::as_str)
                .collect();
            let expected = [
                "id",
                "user_agent",
                "created_at",
                "last_used_at",
                "expires_at",
                "current",
            ];
            assert_eq!(members, BTreeSet::from(expected));
            for time in ["created_at", "last_used_at", "expires_at"] {
                assert_time(&text(session, time));
            }
            assert_eq!(session["current"], position == current);
        }
    }

    // A refresh shows in its session and moves none of the others.
    let before = list(&server, &phone).await;
    refresh(&server, &ann.refresh_token).await.expect(200);
    let after = list(&server, &phone).await;
    assert_eq!(before[..2], after[..2]);
    assert!(text(&after[2], "last_used_at") > text(&before[2], "last_used_at"));
    assert!(text(&after[2], "expires_at") > text(&before[2], "expires_at"));
    assert_eq!(after[2]["created_at"], before[2]["created_at"]);
}

#[tokio::test]
async fn a_session_that_ran_out_is_not_listed() {
    let server = Server::start().await;
    let sql = server.sql().await;
    let ann = server.user().await;
    let second = login(&server, &ann.email, &ann.password)
        .await
        .expect(200)
        .json();
    let condition = format!("id = '{}'", ann.session_id);
    age(&sql, "sessions", "31 days", &condition).await;
    let sessions = list(&server, &text(&second, "access_token")).await;
    assert_eq!(sessions.len(), 1);
    assert_eq!(sessions[0]["current"], true);
}

/// What a client calls itself is the client's to choose: kept as text, at most 200 of it.
#[tokio::test]
async fn whatever_a_client_calls_itself_it_can_sign_in() {
    let server = Server::start().await;
    let ann = server.register("ann@example.com").await;
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
    // Neither UTF-8 nor printable: something is kept or nothing, but the sign-in stands.
    for bytes in [&b"\xff\xfe\xc0\x80"[..], b"tab\there", b""] {
        let body = login_as(&server, &ann, bytes).await;
        let sessions = list(&server, &text(&body, "access_token")).await;
        let kept = &sessions[0]["user_agent"];
        assert!(kept.is_null() || kept.is_string(), "{kept}");
    }
    // And nothing at all.
    let body = login(&server, &ann.email, &ann.password)
        .await
        .expect(200)
        .json();
    let sessions = list(&server, &text(&body, "access_token")).await;
    assert_eq!(sessions[0]["user_agent"], Value::Null);
}

#[tokio::test]
async fn one_session_can_be_ended_from_another() {
    let server = Server::start().await;
    let ann = server.register("ann@example.com").await;
    let thief = login(&server, &ann.email, &ann.password)
        .await
        .expect(200)
        .json();
    let stays = login(&server, &ann.email, &ann.password)
        .await
        .expect(200)
        .json();
    let thief_token = text(&thief, "access_token");
    let path = format!(
        "/api/v1/auth/sessions/{}",
        text(&claims(&thief_token), "sid")
    );
    ann.delete(&path).await.expect(204);
    let ended = Instant::now();
    assert_revoked(&server, &thief_token, ended).await;
    refresh(&server, &text(&thief, "refresh_token"))
        .await
        .problem(401, "invalid_refresh_token");
    ann.delete(&path).await.problem(404, "session_not_found");
    for token in [&ann.access_token, &text(&stays, "access_token")] {
        assert_eq!(list(&server, token).await.len(), 2);
    }
}

/// Its own as well: a sign-out by another name.
#[tokio::test]
async fn a_session_can_end_itself() {
    let server = Server::start().await;
    let ann = server.user().await;
    ann.delete(format!("/api/v1/auth/sessions/{}", ann.session_id))
        .await
        .expect(204);
    assert_revoked(&server, &ann.access_token, Instant::now()).await;
}

#[tokio::test]
async fn every_session_but_this_one_can_be_ended() {
    let server = Server::start().await;
    let ann = server.register("ann@example.com").await;
    let bob = server.register("bob@example.com").await;
    let mut others = Vec::new();
    for _ in 0..3 {
        let body = login(&server, &ann.email, &ann.password)
            .await
            .expect(200)
            .json();
        others.push(body);
    }
    ann.delete("/api/v1/auth/sessions").await.expect(204);
    let ended = Instant::now();
    for other in &others {
        assert_revoked(&server, &text(other, "access_token"), ended).await;
        refresh(&server, &text(other, "refresh_token"))
            .await
            .problem(401, "invalid_refresh_token");
    }
    for user in [&ann, &bob] {
        let sessions = list(&server, &user.access_token).await;
        assert_eq!(sessions.len(), 1);
        refresh(&server, &user.refresh_token).await.expect(200);
    }
    // With no others left it is done already.
    ann.delete("/api/v1/auth/sessions").await.expect(204);
}

/// FR-007, SC-004: someone else's session is as unknown as one that never was.
#[tokio::test]
async fn a_session_of_somebody_else_is_not_found_and_untouched() {
    let server = Server::start().await;
    let sql = server.sql().await;
    let ann = server.register("ann@example.com").await;
    let bob = server.register("bob@example.com").await;
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

/// The ways in which a session ends.
#[derive(Clone, Copy, Debug)]
enum End {
    SignOut,
    SignOutByRefreshToken,
    DeletedOne,
    DeletedOthers,
    PasswordChanged,
    AccountDeleted,
    RefreshTokenReused,
}

/// Signs somebody in twice, ends the second session by way of the first (or both), and gives
/// the access token that must be dead and the moment of its end.
async fn end(server: &Server, way: End) -> (String, Instant) {
    end_after(server, way, async |_| {}).await
}

/// The same after something has happened to the session that will end.
async fn end_after(server: &Server, way: End, event: impl AsyncFnOnce(&str)) -> (String, Instant) {
    let ann = server.user().await;
    let doomed = login(server, &ann.email, &ann.password)
        .await
        .expect(200)
        .json();
    let token = text(&doomed, "access_token");
    let refresh_token = text(&doomed, "refresh_token");
    let sid = text(&claims(&token), "sid");
    event(&sid).await;
    match way {
        End::SignOut => logout(server, &token).await.expect(204),
        End::SignOutByRefreshToken => server
            .post("/api/v1/auth/logout")
            .json(json!({"refresh_token": refresh_token}))
            .await
            .expect(204),
        End::DeletedOne => server
            .delete(format!("/api/v1/auth/sessions/{sid}"))
            .bearer(&ann.access_token)
            .await
            .expect(204),
        End::DeletedOthers => server
            .delete("/api/v1/auth/sessions")
            .bearer(&ann.access_token)
            .await
            .expect(204),
        End::PasswordChanged => {
            change_password(server, &ann.access_token, PASSWORD, ANOTHER_PASSWORD)
                .await
                .expect(200)
        }
        End::AccountDeleted => delete_account(server, &ann.access_token, &ann.password)
            .await
            .expect(204),
        End::RefreshTokenReused => {
            let second = refresh(server, &refresh_token).await.expect(200).json();
            refresh(server, &text(&second, "refresh_token"))
                .await
                .expect(200);
            refresh(server, &refresh_token).await.expect(401)
        }
    };
    (token, Instant::now())
}

const EVERY_END: [End; 7] = [
    End::SignOut,
    End::SignOutByRefreshToken,
    End::DeletedOne,
    End::DeletedOthers,
    End::PasswordChanged,
    End::AccountDeleted,
    End::RefreshTokenReused,
];

/// Two instances that know of each other only through the database they share.
#[tokio::test]
async fn however_a_session_ends_it_is_over_everywhere_within_a_second() {
    let here = Server::start().await;
    let there = here.sibling(&[]).await;
    let witness = here.user().await;
    for way in EVERY_END {
        // The other instance has just looked what ended, so it is as far behind as it can be.
        assert_signed_in(&there, &witness.access_token).await;
        let (token, ended) = end(&here, way).await;
        println!("{way:?}");
        join_all([
            assert_revoked(&there, &token, ended),
            assert_revoked(&here, &token, ended),
        ])
        .await;
        assert_signed_in(&there, &witness.access_token).await;
    }
}

/// An instance that starts after the end knows of it from its first request on.
#[tokio::test]
async fn an_instance_that_starts_later_knows_what_ended_before() {
    let here = Server::start().await;
    let mut tokens = Vec::new();
    for way in EVERY_END {
        tokens.push(end(&here, way).await);
    }
    let later = here.sibling(&[]).await;
    // All at once, so that each of them is the first.
    let statuses = join_all(
        tokens
            .iter()
            .map(async |(token, _)| later.get(OTHER_USERS_TASKS).bearer(token).await.status),
    )
    .await;
    assert_eq!(statuses, [401; 7]);
}

/// The session ran out of time while its last access token had hours to live (it was refreshed
/// shortly before its 90 days were over): ending it by hand still ends that token, everywhere.
#[tokio::test]
async fn ending_a_session_that_ran_out_ends_its_last_access_token_too() {
    let here = Server::start().await;
    let there = here.sibling(&[]).await;
    let sql = here.sql().await;
    for way in [
        End::SignOut,
        End::SignOutByRefreshToken,
        End::DeletedOne,
        End::DeletedOthers,
        End::PasswordChanged,
        End::AccountDeleted,
    ] {
        let (token, ended) = end_after(&here, way, async |sid| {
            age(&sql, "sessions", "30 days 1 hour", &format!("id = '{sid}'")).await;
        })
        .await;
        println!("{way:?}");
        assert_revoked(&there, &token, ended).await;
    }
}

/// Counts the statements that this database's other clients begin, by looking at what each of
/// its backends ran last. Two within one look at one backend count as one.
struct Statements {
    sql: tokio_postgres::Client,
    seen: BTreeSet<(i32, String)>,
}

impl Statements {
    async fn look(&mut self) -> usize {
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

/// The price of knowing what ended: a small query or two a second however many requests there
/// are, and none when there are none.
#[tokio::test]
async fn knowing_what_ended_costs_a_query_or_two_a_second_and_none_when_idle() {
    let server = Server::start().await;
    let ann = server.user().await;
    let mut statements = Statements {
        sql: server.sql().await,
        seen: BTreeSet::new(),
    };
    // The first requests after a start have more to do: let that be over.
    let warm = Instant::now();
    while warm.elapsed() < Duration::from_secs(2) {
        ann.get(OTHER_USERS_TASKS).await.expect(403);
    }

    let before = statements.look().await;
    let started = Instant::now();
    let stop = tokio::sync::Notify::new();
    let load = async {
        let mut answered = 0;
        while started.elapsed() < Duration::from_secs(5) {
            ann.get(OTHER_USERS_TASKS).await.expect(403);
            answered += 1;
        }
        stop.notify_one();
        answered
    };
    let watch = async {
        loop {
            tokio::select! {
                () = stop.notified() => break,
                () = tokio::time::sleep(Duration::from_millis(3)) => {
                    statements.look().await;
                }
            }
        }
        statements.look().await - before
    };
    let (answered, asked) = tokio::join!(load, watch);
    let seconds = started.elapsed().as_secs_f64();
    assert!(answered > 100, "{answered} requests are no load");
    assert!(asked >= 3, "{asked} queries cannot keep what ended fresh");
    assert!(
        asked as f64 <= 2.0 * seconds + 2.0,
        "{asked} queries for {answered} requests in {seconds} s"
    );

    // What the last request set off may still come; then there are three seconds of nothing.
    let deadline = Instant::now() + Duration::from_secs(12);
    let mut seen = statements.look().await;
    let mut quiet_since = Instant::now();
    while quiet_since.elapsed() < Duration::from_secs(3) {
        let now = statements.look().await;
        if now > seen {
            seen = now;
            quiet_since = Instant::now();
        }
        assert!(
            Instant::now() < deadline,
            "an idle service goes on asking its database"
        );
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Without the database nobody knows what ended: 503, never 401 and never in.
#[tokio::test]
async fn while_the_database_is_away_a_token_is_neither_good_nor_bad() {
    let server = Server::start().await;
    let ann = server.user().await;
    let forged = format!("{}x", ann.access_token);
    let mut config: tokio_postgres::Config =
        server.database_url().parse().expect("the database's URL");
    let database = config.get_dbname().expect("a database").to_owned();
    // From outside: inside it there will be nobody.
    let (outside, connection) = config
        .dbname("postgres")
        .connect(tokio_postgres::NoTls)
        .await
        .expect("a connection");
    tokio::spawn(connection);
    outside
        .batch_execute(&format!(
            "alter database \"{database}\" allow_connections false"
        ))
        .await
        .expect("a closed database");
    outside
        .execute(
            "select pg_terminate_backend(pid) from pg_stat_activity where datname = $1",
            &[&database],
        )
        .await
        .expect("nobody in it");
    let away = Instant::now();

    let mut refusals = 0;
    while refusals < 10 {
        let sent = Instant::now();
        let response = ann.get(OTHER_USERS_TASKS).await;
        if response.status == 503 {
            assert!(!response.header("retry-after").is_empty());
            response.problem(503, "database_unavailable");
            refusals += 1;
        } else {
            response.problem(403, "forbidden");
            assert!(
                sent.duration_since(away) < Duration::from_secs(1),
                "let in without knowing what ended"
            );
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    // What is bad by itself is bad all the same.
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

    outside
        .batch_execute(&format!(
            "alter database \"{database}\" allow_connections true"
        ))
        .await
        .expect("an open database");
    let deadline = Instant::now() + Duration::from_secs(15);
    loop {
        let response = ann.get("/api/v1/auth/me").await;
        if response.status == 200 {
            break;
        }
        response.problem(503, "database_unavailable");
        assert!(Instant::now() < deadline, "it does not come back");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    refresh(&server, &ann.refresh_token).await.expect(200);
}
