//! Refresh tokens: good for one use, forgiving for ten seconds, then a theft. FR-017.

use std::collections::BTreeSet;
use std::time::Instant;

use futures_util::future::join_all;
use serde_json::json;

use crate::auth::{assert_signed_in, logout, refresh, text};
use crate::harness::{Server, User, claims, forge};
use crate::log::{settled, unique_id, warnings};
use crate::purge::age;
use crate::sessions::assert_revoked;
use crate::tokens;

/// Moves one session's whole past back in time, as if that long had gone by.
async fn wait_in_database(sql: &tokio_postgres::Client, user: &User, interval: &str) {
    age(
        sql,
        "sessions",
        interval,
        &format!("id = '{}'", user.session_id),
    )
    .await;
}

/// Asserts that nothing of a session works any longer.
async fn assert_over(server: &Server, access: &[&str], refresh_tokens: &[&str], ended: Instant) {
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
async fn a_refresh_carries_the_same_session_on() {
    let server = Server::start().await;
    let ann = server.user().await;
    let mut token = ann.refresh_token.clone();
    let mut seen = BTreeSet::from([token.clone()]);
    for _ in 0..5 {
        let response = refresh(&server, &token).await.expect(200);
        assert_eq!(response.header("cache-control"), "no-store");
        let body = response.json();
        assert_eq!(body["token_type"], "bearer");
        assert_eq!(body["expires_in"], 86400);
        assert_eq!(body["user"]["id"], ann.id.as_str());
        assert_eq!(body["user"]["email"], ann.email.as_str());
        let access = text(&body, "access_token");
        assert_eq!(claims(&access)["sid"], ann.session_id.as_str());
        assert_signed_in(&server, &access).await;
        token = text(&body, "refresh_token");
        assert!(seen.insert(token.clone()), "each use gives a new one");
    }
    // What was given before lives out its own day.
    assert_signed_in(&server, &ann.access_token).await;
}

/// Two tabs, or an answer that was lost on the way.
#[tokio::test]
async fn a_repeat_within_the_grace_time_gets_the_very_same_successor() {
    let server = Server::start().await;
    let other = server.sibling(&[]).await;
    let sql = server.sql().await;
    let ann = server.user().await;
    let first = refresh(&server, &ann.refresh_token)
        .await
        .expect(200)
        .json();
    wait_in_database(&sql, &ann, "2 seconds").await;
    for server in [&server, &other, &server] {
        let again = refresh(server, &ann.refresh_token).await.expect(200).json();
        assert_eq!(again["refresh_token"], first["refresh_token"]);
        assert_signed_in(server, &text(&again, "access_token")).await;
    }
    // It harmed nothing: the successor is as good as ever.
    refresh(&other, &text(&first, "refresh_token"))
        .await
        .expect(200);
    let log = settled(&server).await;
    assert!(!log.contains("reuse"), "{log}");
}

#[tokio::test]
async fn a_later_repeat_ends_the_session_and_is_logged_once() {
    let server = Server::start().await;
    let sql = server.sql().await;
    let ann = server.user().await;
    let bystander = server.user().await;
    let first = refresh(&server, &ann.refresh_token)
        .await
        .expect(200)
        .json();
    wait_in_database(&sql, &ann, "11 seconds").await;

    let id = unique_id();
    let response = server
        .post("/api/v1/auth/refresh")
        .header("x-request-id", &id)
        .json(json!({"refresh_token": ann.refresh_token}))
        .await;
    let ended = Instant::now();
    response.problem(401, "invalid_refresh_token");

    assert_over(
        &server,
        &[&ann.access_token, &text(&first, "access_token")],
        &[&text(&first, "refresh_token"), &ann.refresh_token],
        ended,
    )
    .await;
    let log = settled(&server).await;
    let lines = warnings(&log, &id);
    assert_eq!(lines.len(), 1, "{lines:?}");
    assert!(lines[0].contains("reuse"), "{}", lines[0]);
    assert_signed_in(&server, &bystander.access_token).await;
    refresh(&server, &bystander.refresh_token).await.expect(200);
}

/// Even within the grace time: only the token used last has one.
#[tokio::test]
async fn an_older_generation_ends_the_session_at_once() {
    let server = Server::start().await;
    let ann = server.user().await;
    let second = refresh(&server, &ann.refresh_token)
        .await
        .expect(200)
        .json();
    let third = refresh(&server, &text(&second, "refresh_token"))
        .await
        .expect(200)
        .json();

    refresh(&server, &ann.refresh_token)
        .await
        .problem(401, "invalid_refresh_token");
    let ended = Instant::now();
    assert_over(
        &server,
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
async fn fifty_refreshes_of_one_token_at_once_give_one_successor() {
    let server = Server::start().await;
    let other = server.sibling(&[]).await;
    let ann = server.user().await;
    let answers = join_all((0..50).map(|n| {
        let server = if n % 2 == 0 { &server } else { &other };
        refresh(server, &ann.refresh_token)
    }))
    .await;
    let successors: BTreeSet<String> = answers
        .into_iter()
        .map(|answer| text(&answer.expect(200).json(), "refresh_token"))
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

/// Neither token passes for the other, however the other's claims are dressed up.
#[tokio::test]
async fn neither_token_passes_for_the_other() {
    let server = Server::start().await;
    let ann = server.user().await;
    refresh(&server, &ann.access_token)
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

    // A refresh token's own header and claims under the plain secret: the keys differ too.
    let mut parts = ann.refresh_token.split('.').map(tokens::from_base64url);
    let (head, claims) = (parts.next(), parts.next());
    if let (Some(head), Some(claims)) = (head, claims)
        && let (Ok(head), Ok(claims)) = (
            serde_json::from_slice(&head),
            serde_json::from_slice(&claims),
        )
    {
        let forged = forge(server.secret(), head, claims);
        refresh(&server, &forged)
            .await
            .problem(401, "invalid_refresh_token");
    }
    // Nothing of this ended anything.
    assert_signed_in(&server, &ann.access_token).await;
    refresh(&server, &ann.refresh_token).await.expect(200);
}

#[tokio::test]
async fn what_is_no_refresh_token_is_refused_and_ends_nothing() {
    let server = Server::start().await;
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
        let response = refresh(&server, bad).await;
        response.problem(401, "invalid_refresh_token");
        // RFC 9110 section 11.6.1: a 401 carries a challenge.
        assert!(
            response
                .header("www-authenticate")
                .starts_with("Bearer realm=\"todo\"")
        );
    }
    assert_signed_in(&server, &ann.access_token).await;
    refresh(&server, token).await.expect(200);
}

/// 30 days idle; the last access token keeps its own day (the contract says so).
#[tokio::test]
async fn a_session_idle_for_thirty_days_cannot_be_refreshed() {
    let server = Server::start().await;
    let sql = server.sql().await;
    let ann = server.user().await;
    let bob = server.user().await;
    wait_in_database(&sql, &ann, "30 days 1 second").await;
    wait_in_database(&sql, &bob, "29 days 23 hours").await;
    refresh(&server, &ann.refresh_token)
        .await
        .problem(401, "invalid_refresh_token");
    refresh(&server, &bob.refresh_token).await.expect(200);

    // Seen over more than the second in which an ended session would be known to have ended.
    let since = Instant::now();
    while since.elapsed().as_millis() < 1500 {
        assert_signed_in(&server, &ann.access_token).await;
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    }
}

/// 90 days in all, however diligently it is refreshed.
#[tokio::test]
async fn no_session_outlives_ninety_days() {
    let server = Server::start().await;
    let sql = server.sql().await;
    let ann = server.user().await;
    let mut token = ann.refresh_token.clone();
    for days_left in [61_i64, 32, 3] {
        wait_in_database(&sql, &ann, "29 days").await;
        let body = refresh(&server, &token).await.expect(200).json();
        let left = body["refresh_expires_in"].as_i64().expect("seconds");
        let most = days_left.min(30) * 86400;
        assert!(
            left <= most && left > most - 60,
            "{left} of {days_left} days"
        );
        token = text(&body, "refresh_token");
    }
    wait_in_database(&sql, &ann, "3 days 1 second").await;
    refresh(&server, &token)
        .await
        .problem(401, "invalid_refresh_token");
}

#[tokio::test]
async fn signing_out_by_bearer_token_ends_the_session() {
    let server = Server::start().await;
    let ann = server.user().await;
    let elsewhere = crate::auth::login(&server, &ann.email, &ann.password)
        .await
        .expect(200)
        .json();
    let response = logout(&server, &ann.access_token).await.expect(204);
    let ended = Instant::now();
    assert!(response.body.is_empty());
    assert_over(&server, &[&ann.access_token], &[&ann.refresh_token], ended).await;
    // Again, though the session is over already.
    logout(&server, &ann.access_token).await.expect(204);
    assert_signed_in(&server, &text(&elsewhere, "access_token")).await;
}

#[tokio::test]
async fn signing_out_by_refresh_token_ends_the_session() {
    let server = Server::start().await;
    let ann = server.user().await;
    for _ in 0..2 {
        server
            .post("/api/v1/auth/logout")
            .json(json!({"refresh_token": ann.refresh_token}))
            .await
            .expect(204);
    }
    let ended = Instant::now();
    assert_over(&server, &[&ann.access_token], &[&ann.refresh_token], ended).await;
}

/// RFC 7009 section 2.2: a token that is nobody's is signed out as it stands.
#[tokio::test]
async fn signing_out_with_an_unknown_or_used_refresh_token_is_no_error() {
    let server = Server::start().await;
    let ann = server.user().await;
    for unknown in ["", "x", "a.b.c", "ä\u{0}", &ann.access_token] {
        server
            .post("/api/v1/auth/logout")
            .json(json!({"refresh_token": unknown}))
            .await
            .expect(204);
    }
    assert_signed_in(&server, &ann.access_token).await;
    refresh(&server, &ann.refresh_token).await.expect(200);
    server
        .post("/api/v1/auth/logout")
        .json(json!({"refresh_token": ann.refresh_token}))
        .await
        .expect(204);
}

/// Someone who comes back after two days can still press "sign out", and it counts.
#[tokio::test]
async fn signing_out_with_a_merely_expired_token_ends_the_session() {
    let server = Server::start().await;
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
    logout(&server, &expired).await.expect(204);
    let ended = Instant::now();
    assert_over(&server, &[&ann.access_token], &[&ann.refresh_token], ended).await;
}

#[tokio::test]
async fn signing_out_with_a_forged_token_or_none_is_refused() {
    let server = Server::start().await;
    let ann = server.user().await;
    let forged = forge(
        "another secret of at least 32 bytes, the attacker's",
        json!({"alg": "HS256", "typ": "JWT"}),
        claims(&ann.access_token),
    );
    let expired_and_forged = {
        let mut claims = claims(&ann.access_token);
        claims["exp"] = json!(1);
        forge(
            "another secret of at least 32 bytes, the attacker's",
            json!({"alg": "HS256", "typ": "JWT"}),
            claims,
        )
    };
    for bad in [&forged, &expired_and_forged, &ann.refresh_token] {
        logout(&server, bad).await.problem(401, "invalid_token");
        // A refresh token in the body does not make a forgery good.
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
    assert_signed_in(&server, &ann.access_token).await;
    refresh(&server, &ann.refresh_token).await.expect(200);
}

/// A thief of the whole database finds nothing to present.
#[tokio::test]
async fn the_database_holds_no_token() {
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
