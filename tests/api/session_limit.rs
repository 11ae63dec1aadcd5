//! An account has at most a hundred sessions.

use std::time::Instant;

use futures_util::future::join_all;
use tokio_postgres::Client;

use crate::auth::{assert_signed_in, login, refresh, text};
use crate::harness::{Server, User};
use crate::metrics::scrape;
use crate::purge::age;
use crate::sessions::{assert_revoked, list};

/// Adds sessions to a user that were last used this long ago.
async fn add_sessions(sql: &Client, user: &User, count: i32, age: &str) {
    sql.execute(
        &format!(
            "insert into sessions (id, user_id, generation, rotated_at, created_at, last_used_at,
                                   expires_at)
             select gen_random_uuid(), user_id, 1, used, used, used, used + interval '30 days'
             from sessions, generate_series(1, $1), cast(now() - interval '{age}' as timestamptz) used
             where sessions.id = '{}'",
            user.session_id
        ),
        &[&count],
    )
    .await
    .expect("sessions");
}

async fn count_sessions(sql: &Client) -> i64 {
    let count = "select count(*) from sessions where expires_at > now()";
    sql.query_one(count, &[]).await.expect("a count").get(0)
}

#[tokio::test]
async fn a_login_beyond_the_limit_ends_the_least_recently_used_session() {
    let here = Server::with(&[("METRICS_ADDR", "127.0.0.1:0")]).await;
    let there = here.sibling(&[]).await;
    let sql = here.sql().await;
    let ann = here.user().await;
    let bob = here.user().await;
    add_sessions(&sql, &ann, 98, "1 hour").await;
    // Expired sessions do not count.
    add_sessions(&sql, &ann, 5, "30 days 1 hour").await;
    let second = here.login(&ann.email, &ann.password).await;
    assert_eq!(list(&here, &ann.access_token).await.len(), 100);

    // The oldest session has been used since, so another session ends.
    let condition = format!("id = '{}'", ann.session_id);
    age(&sql, "sessions", "1 day", &condition).await;
    refresh(&here, &ann.refresh_token).await.expect(200);
    let third = here.login(&ann.email, &ann.password).await;
    assert_signed_in(&here, &ann.access_token).await;
    assert_eq!(list(&here, &ann.access_token).await.len(), 100);

    age(&sql, "sessions", "1 day", &condition).await;
    assert_signed_in(&there, &ann.access_token).await;
    let fourth = here.login(&ann.email, &ann.password).await;
    let ended = Instant::now();
    // Immediate on the instance that ended it.
    let me = ann.get("/api/v1/auth/me").await;
    me.problem(401, "invalid_token");
    assert_revoked(&there, &ann.access_token, ended).await;
    let sessions = list(&there, &fourth.access_token).await;
    assert_eq!(sessions.len(), 100);
    let current = sessions.iter().find(|session| session["current"] == true);
    assert_eq!(
        text(current.expect("the current session"), "id"),
        fourth.session_id
    );
    for user in [&second, &third, &fourth, &bob] {
        assert_signed_in(&there, &user.access_token).await;
    }
    let metrics = scrape(&here).await;
    let counted = "sessions_revoked_total{reason=\"session_limit\"} 2";
    assert!(metrics.contains(counted), "{metrics}");
}

/// Accounts from before the limit was introduced may have more sessions.
#[tokio::test]
async fn lists_more_than_a_hundred_sessions_until_the_next_login_ends_the_surplus() {
    let server = Server::start().await;
    let sql = server.sql().await;
    let ann = server.user().await;
    add_sessions(&sql, &ann, 1500, "1 hour").await;
    let sessions = list(&server, &ann.access_token).await;
    assert_eq!(sessions.len(), 1501);
    assert!(sessions.iter().any(|session| session["current"] == true));
    server.login(&ann.email, &ann.password).await;
    assert_eq!(list(&server, &ann.access_token).await.len(), 100);
}

#[tokio::test]
async fn concurrent_logins_leave_a_hundred_sessions() {
    let here = Server::start().await;
    let there = here.sibling(&[]).await;
    let sql = here.sql().await;
    let ann = here.user().await;
    add_sessions(&sql, &ann, 98, "1 hour").await;
    // All logins begin their statement before the first one can proceed.
    let lock = here.lock("select from users for update").await;
    let logins =
        [&here, &there, &here, &there].map(|server| login(server, &ann.email, &ann.password));
    let (logins, ()) = tokio::join!(join_all(logins), lock.release_after(4));
    assert_eq!(count_sessions(&sql).await, 100);
    for login in logins {
        let token = text(&login.expect(200).json(), "access_token");
        assert_signed_in(&here, &token).await;
    }
}
