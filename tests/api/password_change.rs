//! A password change revokes all earlier tokens, including those of the current session, and
//! returns new tokens for that session.

use std::time::Instant;

use serde_json::{Value, json};

use crate::auth::{
    ANOTHER_PASSWORD, assert_signed_in, assert_tokens, change_password, login, logout, refresh,
    text,
};
use crate::harness::{PASSWORD, Response, Server, User, claims};
use crate::log::read_log;
use crate::races::{BOTH, Order, lock_row, race};
use crate::sessions::{OTHER_USERS_TASKS, assert_revoked, list};

const THIRD_PASSWORD: &str = "quiet marble 77 rivers";

async fn logout_with_refresh_token(server: &Server, refresh_token: &str) -> Response {
    server
        .post("/api/v1/auth/logout")
        .json(json!({"refresh_token": refresh_token}))
        .await
}

/// Asserts that tokens work on both servers. Refreshes them and returns the new ones.
async fn assert_valid(servers: [&Server; 2], tokens: &Value) -> Value {
    for server in servers {
        assert_signed_in(server, &text(tokens, "access_token")).await;
    }
    let next = refresh(servers[1], &text(tokens, "refresh_token")).await;
    let next = next.expect(200).json();
    assert_signed_in(servers[0], &text(&next, "access_token")).await;
    next
}

#[tokio::test]
async fn returns_new_tokens_for_the_same_session() {
    let here = Server::start().await;
    let there = here.sibling(&[]).await;
    let ann = here.user().await;
    let _other = here.login(&ann.email, &ann.password).await;
    let before = list(&here, &ann.access_token).await;
    let response = change_password(&here, &ann.access_token, PASSWORD, ANOTHER_PASSWORD).await;
    let tokens = assert_tokens(&response.expect(200), &ann.email);
    // The tokens work even within the second in which the earlier ones were issued.
    let next = assert_valid([&here, &there], &tokens).await;
    let sessions = list(&there, &text(&next, "access_token")).await;
    assert_eq!(sessions.len(), 1);
    assert_eq!(text(&sessions[0], "id"), ann.session_id);
    assert_eq!(sessions[0]["current"], true);
    assert_eq!(sessions[0]["created_at"], before[1]["created_at"]);
    assert_eq!(
        claims(&text(&next, "access_token"))["sid"],
        ann.session_id.as_str()
    );
    assert_ne!(tokens["user"]["updated_at"], tokens["user"]["created_at"]);
}

#[tokio::test]
async fn earlier_tokens_are_rejected_and_cannot_end_the_session() {
    let here = Server::start().await;
    let there = here.sibling(&[]).await;
    let ann = here.user().await;
    let second = refresh(&here, &ann.refresh_token).await.expect(200).json();
    let access = [&ann.access_token, &text(&second, "access_token")];
    let refresh_tokens = [&ann.refresh_token, &text(&second, "refresh_token")];
    // The other instance has just refreshed its revocations.
    assert_signed_in(&there, access[0]).await;
    let response = change_password(&here, access[1], PASSWORD, ANOTHER_PASSWORD).await;
    let changed = Instant::now();
    let tokens = response.expect(200).json();
    for token in access {
        here.get(OTHER_USERS_TASKS)
            .bearer(token)
            .await
            .problem(401, "invalid_token");
        assert_revoked(&there, token, changed).await;
    }
    // The grace period of the latest refresh token has not ended yet.
    for server in [&here, &there] {
        for token in refresh_tokens {
            refresh(server, token)
                .await
                .problem(401, "invalid_refresh_token");
            logout_with_refresh_token(server, token).await.expect(204);
        }
        for token in access {
            logout(server, token).await.expect(204);
        }
    }
    let next = assert_valid([&here, &there], &tokens).await;
    // The new refresh tokens have a grace period as usual.
    let again = refresh(&here, &text(&tokens, "refresh_token")).await;
    assert_eq!(
        again.expect(200).json()["refresh_token"],
        next["refresh_token"]
    );
    for token in refresh_tokens {
        refresh(&here, token)
            .await
            .problem(401, "invalid_refresh_token");
    }
    assert_valid([&here, &there], &next).await;
    assert!(!read_log(&here).await.contains("reuse"));
    assert!(!read_log(&there).await.contains("reuse"));

    // An instance that starts later accepts and rejects the same tokens.
    let later = here.sibling(&[]).await;
    assert_signed_in(&later, &text(&next, "access_token")).await;
    for token in access {
        assert_revoked(&later, token, changed).await;
    }
}

#[tokio::test]
async fn a_second_change_revokes_the_tokens_of_the_first() {
    let here = Server::start().await;
    let there = here.sibling(&[]).await;
    let ann = here.user().await;
    let first = change_password(&here, &ann.access_token, PASSWORD, ANOTHER_PASSWORD).await;
    let first = first.expect(200).json();
    let token = text(&first, "access_token");
    assert_signed_in(&there, &token).await;
    let second = change_password(&here, &token, ANOTHER_PASSWORD, THIRD_PASSWORD).await;
    let changed = Instant::now();
    let second = second.expect(200).json();
    for server in [&here, &there] {
        assert_revoked(server, &token, changed).await;
        assert_revoked(server, &ann.access_token, changed).await;
        refresh(server, &text(&first, "refresh_token"))
            .await
            .problem(401, "invalid_refresh_token");
    }
    assert_valid([&here, &there], &second).await;
}

/// The revocation of the earlier tokens must not hide the revocation of the session.
#[tokio::test]
async fn the_session_can_be_revoked_after_a_change() {
    let here = Server::start().await;
    let there = here.sibling(&[]).await;
    let sql = here.sql().await;
    for cause in [
        "logout",
        "logout with refresh token",
        "reuse",
        "deleted row",
    ] {
        let ann = here.user().await;
        let tokens = change_password(&here, &ann.access_token, PASSWORD, ANOTHER_PASSWORD).await;
        let tokens = tokens.expect(200).json();
        let access = text(&tokens, "access_token");
        let refresh_token = text(&tokens, "refresh_token");
        assert_signed_in(&there, &access).await;
        match cause {
            "logout" => logout(&here, &access).await.expect(204),
            "logout with refresh token" => logout_with_refresh_token(&here, &refresh_token)
                .await
                .expect(204),
            "reuse" => {
                let next = refresh(&here, &refresh_token).await.expect(200).json();
                let next = refresh(&here, &text(&next, "refresh_token")).await;
                next.expect(200);
                refresh(&here, &refresh_token).await.expect(401)
            }
            _ => {
                sql.batch_execute("delete from sessions")
                    .await
                    .expect(cause);
                here.get("/healthz").await
            }
        };
        let ended = Instant::now();
        println!("{cause}");
        assert_revoked(&there, &access, ended).await;
        assert_revoked(&here, &access, ended).await;
    }
}

#[tokio::test]
async fn a_concurrent_refresh_does_not_outlive_the_change() {
    let here = Server::start().await;
    let there = here.sibling(&[]).await;
    for order in BOTH {
        let ann = here.user().await;
        let lock = lock_row(&here, "sessions", &ann.session_id).await;
        let (refreshed, changed) = race(
            order,
            lock,
            refresh(&there, &ann.refresh_token),
            change_password(&here, &ann.access_token, PASSWORD, ANOTHER_PASSWORD),
        )
        .await;
        let since = Instant::now();
        println!("{order:?}: {} {}", refreshed.status, changed.status);
        let tokens = changed.expect(200).json();
        if refreshed.status == 200 {
            let refreshed = refreshed.json();
            assert_revoked(&there, &text(&refreshed, "access_token"), since).await;
            refresh(&there, &text(&refreshed, "refresh_token"))
                .await
                .problem(401, "invalid_refresh_token");
        } else {
            refreshed.problem(401, "invalid_refresh_token");
        }
        assert_revoked(&there, &ann.access_token, since).await;
        assert_valid([&here, &there], &tokens).await;
    }
}

/// If the logout comes first, the change fails. Otherwise, the logout has no effect.
#[tokio::test]
async fn a_concurrent_logout_comes_before_or_after_the_change() {
    let here = Server::start().await;
    let there = here.sibling(&[]).await;
    for order in BOTH {
        let ann = here.user().await;
        let lock = lock_row(&here, "sessions", &ann.session_id).await;
        let (logged_out, changed) = race(
            order,
            lock,
            logout(&there, &ann.access_token),
            change_password(&here, &ann.access_token, PASSWORD, ANOTHER_PASSWORD),
        )
        .await;
        println!("{order:?}: {} {}", logged_out.status, changed.status);
        logged_out.expect(204);
        if changed.status == 200 {
            assert_valid([&here, &there], &changed.json()).await;
            login(&here, &ann.email, ANOTHER_PASSWORD).await.expect(200);
        } else {
            changed.problem(401, "invalid_token");
            login(&here, &ann.email, PASSWORD).await.expect(200);
        }
    }
}

#[tokio::test]
async fn one_of_two_concurrent_changes_succeeds() {
    let here = Server::start().await;
    let there = here.sibling(&[]).await;
    let ann: User = here.user().await;
    let lock = lock_row(&here, "users", &ann.id).await;
    let (first, second) = race(
        Order::AsNamed,
        lock,
        change_password(&here, &ann.access_token, PASSWORD, ANOTHER_PASSWORD),
        change_password(&there, &ann.access_token, PASSWORD, THIRD_PASSWORD),
    )
    .await;
    second.problem(403, "wrong_password");
    assert_valid([&here, &there], &first.expect(200).json()).await;
    login(&here, &ann.email, ANOTHER_PASSWORD).await.expect(200);
}

/// PostgreSQL resolves the deadlock by rolling back the change, which waited first.
#[tokio::test]
async fn retries_after_a_deadlock() {
    let server = Server::shared().await;
    let ann = server.user().await;
    let lock = lock_row(server, "sessions", &ann.session_id).await;
    let deadlock = async {
        lock.wait_for_blocked(1).await;
        let user = format!("select 1 from users where id = '{}' for update", ann.id);
        lock.transaction.batch_execute(&user).await.unwrap();
        lock.release().await;
    };
    let change = change_password(server, &ann.access_token, PASSWORD, ANOTHER_PASSWORD);
    let (changed, ()) = tokio::join!(change, deadlock);
    assert_valid([server; 2], &changed.expect(200).json()).await;
}
