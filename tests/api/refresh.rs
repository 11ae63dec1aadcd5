//! Refresh tokens: single use, a grace period of ten seconds, and detection of reuse. FR-017.

use std::collections::BTreeSet;
use std::time::Instant;

use futures_util::future::join_all;
use serde_json::json;

use crate::auth::{assert_signed_in, logout, refresh, text};
use crate::harness::{Server, User, claims, forge};
use crate::log::{read_log, unique_id, warnings};
use crate::purge::age;
use crate::sessions::assert_revoked;
use crate::tokens;

/// Moves all timestamps of a user's session into the past.
async fn age_session(sql: &tokio_postgres::Client, user: &User, interval: &str) {
    age(
        sql,
        "sessions",
        interval,
        &format!("id = '{}'", user.session_id),
    )
    .await;
}

/// Asserts that all these tokens are rejected.
async fn assert_all_revoked(
    server: &Server,
    access: &[&str],
    refresh_tokens: &[&str],
    ended: Instant,
) {
    for token in access {
        assert_revoked(server, token, ended).await;
    }
    for token in refresh_tokens {
        refresh(server, token)
            .await
            .problem(401, "invalid_refresh_token");
    }
}

#[tokio::test]
async fn refreshing_continues_the_session() {
    let server = Server::shared().await;
    let ann = server.user().await;
    let mut token = ann.refresh_token.clone();
    let mut seen = BTreeSet::from([token.clone()]);
    for _ in 0..5 {
        let response = refresh(server, &token).await.expect(200);
        assert_eq!(response.header("cache-control"), "no-store");
        let body = response.json();
        assert_eq!(body["token_type"], "bearer");
        assert_eq!(body["expires_in"], 86400);
        assert_eq!(body["user"]["id"], ann.id.as_str());
        assert_eq!(body["user"]["email"], ann.email.as_str());
        let access = text(&body, "access_token");
        assert_eq!(claims(&access)["sid"], ann.session_id.as_str());
        assert_signed_in(server, &access).await;
        token = text(&body, "refresh_token");
        assert!(
            seen.insert(token.clone()),
            "a refresh token was returned twice"
        );
    }
    // Earlier access tokens remain valid until they expire.
    assert_signed_in(server, &ann.access_token).await;
}

/// Clients send a token again from a second tab or after a lost response.
#[tokio::test]
async fn a_repeat_within_the_grace_period_returns_the_same_successor() {
    let server = Server::start().await;
    let other = server.sibling(&[]).await;
    let sql = server.sql().await;
    let ann = server.user().await;
    let first = refresh(&server, &ann.refresh_token)
        .await
        .expect(200)
        .json();
    age_session(&sql, &ann, "2 seconds").await;
    for server in [&server, &other, &server] {
        let again = refresh(server, &ann.refresh_token).await.expect(200).json();
        assert_eq!(again["refresh_token"], first["refresh_token"]);
        assert_signed_in(server, &text(&again, "access_token")).await;
    }
    // The successor is still valid.
    refresh(&other, &text(&first, "refresh_token"))
        .await
        .expect(200);
    let log = read_log(&server).await;
    assert!(!log.contains("reuse"), "{log}");
}

#[tokio::test]
async fn a_repeat_after_the_grace_period_revokes_the_session_and_is_logged_once() {
    let server = Server::start().await;
    let sql = server.sql().await;
    let ann = server.user().await;
    let other = server.user().await;
    let first = refresh(&server, &ann.refresh_token)
        .await
        .expect(200)
        .json();
    age_session(&sql, &ann, "11 seconds").await;

    let id = unique_id();
    let response = server
        .post("/api/v1/auth/refresh")
        .header("x-request-id", &id)
        .json(json!({"refresh_token": ann.refresh_token}))
        .await;
    let ended = Instant::now();
    response.problem(401, "invalid_refresh_token");

    assert_all_revoked(
        &server,
        &[&ann.access_token, &text(&first, "access_token")],
        &[&text(&first, "refresh_token"), &ann.refresh_token],
        ended,
    )
    .await;
    let log = read_log(&server).await;
    let lines = warnings(&log, &id);
    assert_eq!(lines.len(), 1, "{lines:?}");
    assert!(lines[0].contains("reuse"), "{}", lines[0]);
    assert_signed_in(&server, &other.access_token).await;
    refresh(&server, &other.refresh_token).await.expect(200);
}

/// Only the most recently used token has a grace period.
#[tokio::test]
async fn an_older_token_revokes_the_session_immediately() {
    let server = Server::shared().await;
    let ann = server.user().await;
    let second = refresh(server, &ann.refresh_token).await.expect(200).json();
    let third = refresh(server, &text(&second, "refresh_token"))
        .await
        .expect(200)
        .json();

    refresh(server, &ann.refresh_token)
        .await
        .problem(401, "invalid_refresh_token");
    let ended = Instant::now();
    assert_all_revoked(
        server,
        &[
            &ann.access_token,
            &text(&second, "access_token"),
            &text(&third, "access_token"),
        ],
        &[
            &text(&second, "refresh_token"),
            &text(&third, "refresh_token"),
        ],
        ended,
    )
    .await;
}

#[tokio::test]
async fn fifty_concurrent_refreshes_return_one_successor() {
    let server = Server::start().await;
    let other = server.sibling(&[]).await;
    let ann = server.user().await;
    let responses = join_all((0..50).map(|n| {
        let server = if n % 2 == 0 { &server } else { &other };
        refresh(server, &ann.refresh_token)
    }))
    .await;
    let successors: BTreeSet<String> = responses
        .into_iter()
        .map(|response| text(&response.expect(200).json(), "refresh_token"))
        .collect();
    assert_eq!(successors.len(), 1, "{successors:?}");
    let sql = server.sql().await;
    let sessions: i64 = sql
        .query_one("select count(*) from sessions", &[])
        .await
        .expect("a count")
        .get(0);
    assert_eq!(sessions, 1);
    let successor = successors.first().expect("one");
    refresh(&other, successor).await.expect(200);
}

#[tokio::test]
async fn access_and_refresh_tokens_are_not_interchangeable() {
    let server = Server::shared().await;
    let ann = server.user().await;
    refresh(server, &ann.access_token)
        .await
        .problem(401, "invalid_refresh_token");
    let response = server
        .get("/api/v1/auth/me")
        .bearer(&ann.refresh_token)
        .await;
    assert!(
        response
            .header("www-authenticate")
            .contains("error=\"invalid_token\"")
    );
    response.problem(401, "invalid_token");

    // The header and claims of a refresh token, signed with the key for access tokens.
    let mut parts = ann.refresh_token.split('.').map(tokens::from_base64url);
    let (head, claims) = (parts.next(), parts.next());
    if let (Some(head), Some(claims)) = (head, claims)
        && let (Ok(head), Ok(claims)) = (
            serde_json::from_slice(&head),
            serde_json::from_slice(&claims),
        )
    {
        let forged = forge(server.secret(), head, claims);
        refresh(server, &forged)
            .await
            .problem(401, "invalid_refresh_token");
    }
    // The session continues.
    assert_signed_in(server, &ann.access_token).await;
    refresh(server, &ann.refresh_token).await.expect(200);
}

#[tokio::test]
async fn malformed_refresh_tokens_are_rejected_without_effect() {
    let server = Server::shared().await;
    let ann = server.user().await;
    let token = ann.refresh_token.as_str();
    let mut flipped = token.to_owned();
    let last = if flipped.pop() == Some('A') { 'Q' } else { 'A' };
    flipped.push(last);
    let parts: Vec<&str> = token.split('.').collect();
    for bad in [
        "",
        ".",
        "..",
        "null",
        "\u{0}",
        "x",
        &"a".repeat(8000),
        &flipped,
        &token[..token.len() - 4],
        &format!("{token}="),
        &format!("{token} "),
        &format!(" {token}"),
        &format!("{token}\n"),
        &format!("{token}.{token}"),
        &token.to_uppercase(),
        &parts[..parts.len() - 1].join("."),
        &format!("{}.", parts[..parts.len() - 1].join(".")),
    ] {
        let response = refresh(server, bad).await;
        response.problem(401, "invalid_refresh_token");
        // RFC 9110, section 11.6.1, requires a challenge.
        assert!(
            response
                .header("www-authenticate")
                .starts_with("Bearer realm=\"todo\"")
        );
    }
    assert_signed_in(server, &ann.access_token).await;
    refresh(server, token).await.expect(200);
}

/// The last access token of an expired session remains valid until its own expiry.
#[tokio::test]
async fn a_session_expires_after_30_idle_days() {
    let server = Server::start().await;
    let sql = server.sql().await;
    let ann = server.user().await;
    let bob = server.user().await;
    age_session(&sql, &ann, "30 days 1 second").await;
    age_session(&sql, &bob, "29 days 23 hours").await;
    refresh(&server, &ann.refresh_token)
        .await
        .problem(401, "invalid_refresh_token");
    refresh(&server, &bob.refresh_token).await.expect(200);

    // A revocation would take effect within one second.
    let since = Instant::now();
    while since.elapsed().as_millis() < 1500 {
        assert_signed_in(&server, &ann.access_token).await;
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    }
}

#[tokio::test]
async fn a_session_expires_90_days_after_the_login() {
    let server = Server::start().await;
    let sql = server.sql().await;
    let ann = server.user().await;
    let mut token = ann.refresh_token.clone();
    for days_left in [61_i64, 32, 3] {
        age_session(&sql, &ann, "29 days").await;
        let body = refresh(&server, &token).await.expect(200).json();
        let left = body["refresh_expires_in"].as_i64().expect("seconds");
        let most = days_left.min(30) * 86400;
        assert!(
            left <= most && left > most - 60,
            "{left} s with {days_left} days left"
        );
        token = text(&body, "refresh_token");
    }
    age_session(&sql, &ann, "3 days 1 second").await;
    refresh(&server, &token)
        .await
        .problem(401, "invalid_refresh_token");
}

#[tokio::test]
async fn logout_with_an_access_token_revokes_the_session() {
    let server = Server::shared().await;
    let ann = server.user().await;
    let other_session = server.login(&ann.email, &ann.password).await;
    let response = logout(server, &ann.access_token).await.expect(204);
    let ended = Instant::now();
    assert!(response.body.is_empty());
    assert_all_revoked(server, &[&ann.access_token], &[&ann.refresh_token], ended).await;
    // Logging out again succeeds as well.
    logout(server, &ann.access_token).await.expect(204);
    assert_signed_in(server, &other_session.access_token).await;
}

#[tokio::test]
async fn logout_with_a_refresh_token_revokes_the_session() {
    let server = Server::shared().await;
    let ann = server.user().await;
    for _ in 0..2 {
        server
            .post("/api/v1/auth/logout")
            .json(json!({"refresh_token": ann.refresh_token}))
            .await
            .expect(204);
    }
    let ended = Instant::now();
    assert_all_revoked(server, &[&ann.access_token], &[&ann.refresh_token], ended).await;
}

/// RFC 7009, section 2.2.
#[tokio::test]
async fn logout_with_an_unknown_or_used_refresh_token_succeeds() {
    let server = Server::shared().await;
    let ann = server.user().await;
    for unknown in ["", "x", "a.b.c", "ä\u{0}", &ann.access_token] {
        server
            .post("/api/v1/auth/logout")
            .json(json!({"refresh_token": unknown}))
            .await
            .expect(204);
    }
    assert_signed_in(server, &ann.access_token).await;
    refresh(server, &ann.refresh_token).await.expect(200);
    server
        .post("/api/v1/auth/logout")
        .json(json!({"refresh_token": ann.refresh_token}))
        .await
        .expect(204);
}

/// A user who returns after two days can still log out.
#[tokio::test]
async fn logout_with_an_expired_access_token_revokes_the_session() {
    let server = Server::shared().await;
    let ann = server.user().await;
    let mut claims = claims(&ann.access_token);
    let now = jiff::Timestamp::now().as_second();
    claims["iat"] = json!(now - 2 * 86400);
    claims["exp"] = json!(now - 86400);
    let expired = forge(
        server.secret(),
        json!({"alg": "HS256", "typ": "JWT"}),
        claims,
    );
    logout(server, &expired).await.expect(204);
    let ended = Instant::now();
    assert_all_revoked(server, &[&ann.access_token], &[&ann.refresh_token], ended).await;
}

#[tokio::test]
async fn logout_without_a_token_or_with_a_forged_one_fails() {
    let server = Server::shared().await;
    let ann = server.user().await;
    let forge = |claims| {
        let header = json!({"alg": "HS256", "typ": "JWT"});
        forge("an attacker's secret of at least 32 bytes", header, claims)
    };
    let mut claims = claims(&ann.access_token);
    let forged = forge(claims.clone());
    claims["exp"] = json!(1);
    let expired_and_forged = forge(claims);
    for bad in [&forged, &expired_and_forged, &ann.refresh_token] {
        logout(server, bad).await.problem(401, "invalid_token");
        // The refresh token in the body is ignored.
        server
            .post("/api/v1/auth/logout")
            .bearer(bad)
            .json(json!({"refresh_token": "x"}))
            .await
            .problem(401, "invalid_token");
    }
    server
        .post("/api/v1/auth/logout")
        .await
        .problem(401, "missing_token");
    server
        .post("/api/v1/auth/logout")
        .json(json!({}))
        .await
        .problem(401, "missing_token");
    assert_signed_in(server, &ann.access_token).await;
    refresh(server, &ann.refresh_token).await.expect(200);
}

#[tokio::test]
async fn the_database_contains_no_tokens() {
    let server = Server::start().await;
    let sql = server.sql().await;
    let ann = server.user().await;
    let body = refresh(&server, &ann.refresh_token)
        .await
        .expect(200)
        .json();
    let tables = sql
        .query(
            "select tablename::text from pg_tables where schemaname = 'public'",
            &[],
        )
        .await
        .expect("the tables");
    assert!(!tables.is_empty());
    for table in tables {
        let table: String = table.get(0);
        let rows = sql
            .query(&format!("select t::text from \"{table}\" t"), &[])
            .await
            .expect("the rows");
        for row in rows {
            let row: String = row.get(0);
            for token in [
                &ann.access_token,
                &ann.refresh_token,
                &text(&body, "access_token"),
                &text(&body, "refresh_token"),
            ] {
                for part in token.split('.').filter(|part| part.len() >= 16) {
                    assert!(!row.contains(part), "{table}: {row}");
                }
            }
            assert!(!row.contains(&ann.password), "{table}: {row}");
        }
    }
}
