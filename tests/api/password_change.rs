//! A change of password revokes every token from before, those of the session that asks too, and
//! returns the next ones of it.

use std::time::Instant;

use serde_json::{Value, json};

use crate::auth::{
    ANOTHER_PASSWORD, assert_signed_in, assert_tokens, change_password, login, logout, refresh,
    text,
};
use crate::harness::{PASSWORD, Response, Server, User, claims};
use crate::log::settled;
use crate::races::{BOTH, RowLock, race};
use crate::sessions::{OTHER_USERS_TASKS, assert_revoked, list};

/// A third password, as good as the others.
const THIRD_PASSWORD: &str = "quiet marble 77 rivers";

async fn sign_out_by_refresh_token(server: &Server, refresh_token: &str) -> Response {
    server
        .post("/api/v1/auth/logout")
        .json(json!({"refresh_token": refresh_token}))
        .await
}

/// Asserts that these tokens of a session work everywhere.
async fn assert_alive(servers: [&Server; 2], tokens: &Value) -> Value {
    for server in servers {
        assert_signed_in(server, &text(tokens, "access_token")).await;
    }
    let next = refresh(servers[1], &text(tokens, "refresh_token")).await;
    let next = next.expect(200).json();
    assert_signed_in(servers[0], &text(&next, "access_token")).await;
    next
}

#[tokio::test]
async fn a_change_of_password_returns_tokens_of_the_same_session() {
    let here = Server::start().await;
    let there = here.sibling(&[]).await;
    let ann = here.user().await;
    let _other = here.login(&ann.email, &ann.password).await;
    let before = list(&here, &ann.access_token).await;
    let response = change_password(&here, &ann.access_token, PASSWORD, ANOTHER_PASSWORD).await;
    let tokens = assert_tokens(&response.expect(200), &ann.email);
    // At once, within the second that the tokens before it were issued in.
    let next = assert_alive([&here, &there], &tokens).await;
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

/// Whoever copied a token before has nothing after it, and cannot end anything with it either.
#[tokio::test]
async fn a_token_from_before_a_change_of_password_does_nothing_any_more() {
    let here = Server::start().await;
    let there = here.sibling(&[]).await;
    let ann = here.user().await;
    let second = refresh(&here, &ann.refresh_token).await.expect(200).json();
    let access = [&ann.access_token, &text(&second, "access_token")];
    let refresh_tokens = [&ann.refresh_token, &text(&second, "refresh_token")];
    // The other instance is as far behind as it can be.
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
    // Within the grace time of one of them.
    for server in [&here, &there] {
        for token in refresh_tokens {
            refresh(server, token)
                .await
                .problem(401, "invalid_refresh_token");
            sign_out_by_refresh_token(server, token).await.expect(204);
        }
        for token in access {
            logout(server, token).await.expect(204);
        }
    }
    let next = assert_alive([&here, &there], &tokens).await;
    // The grace time of the new ones is as ever.
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
    assert_alive([&here, &there], &next).await;
    assert!(!settled(&here).await.contains("reuse"));
    assert!(!settled(&there).await.contains("reuse"));

    // An instance that starts later knows both.
    let later = here.sibling(&[]).await;
    assert_signed_in(&later, &text(&next, "access_token")).await;
    for token in access {
        assert_revoked(&later, token, changed).await;
    }
}

#[tokio::test]
async fn a_second_change_of_password_revokes_the_tokens_of_the_first() {
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
    assert_alive([&here, &there], &second).await;
}

/// However it ends: the revocation of its earlier tokens does not hide that of the rest.
#[tokio::test]
async fn a_session_whose_password_was_changed_can_still_be_ended() {
    let here = Server::start().await;
    let there = here.sibling(&[]).await;
    let sql = here.sql().await;
    for way in ["logout", "by refresh token", "theft", "by hand"] {
        let ann = here.user().await;
        let tokens = change_password(&here, &ann.access_token, PASSWORD, ANOTHER_PASSWORD).await;
        let tokens = tokens.expect(200).json();
        let access = text(&tokens, "access_token");
        let refresh_token = text(&tokens, "refresh_token");
        assert_signed_in(&there, &access).await;
        match way {
            "logout" => logout(&here, &access).await.expect(204),
            "by refresh token" => sign_out_by_refresh_token(&here, &refresh_token)
                .await
                .expect(204),
            "theft" => {
                let next = refresh(&here, &refresh_token).await.expect(200).json();
                let next = refresh(&here, &text(&next, "refresh_token")).await;
                next.expect(200);
                refresh(&here, &refresh_token).await.expect(401)
            }
            _ => {
                sql.batch_execute("delete from sessions").await.expect(way);
                here.get("/healthz").await
            }
        };
        let ended = Instant::now();
        println!("{way}");
        assert_revoked(&there, &access, ended).await;
        assert_revoked(&here, &access, ended).await;
    }
}

/// A refresh of the same session at the same moment: its tokens are from before or after.
#[tokio::test]
async fn a_refresh_beside_a_change_of_password_in_one_session_leaves_only_its_tokens() {
    let here = Server::start().await;
    let there = here.sibling(&[]).await;
    for order in BOTH {
        let ann = here.user().await;
        let held = RowLock::new(&here, "sessions", &ann.session_id).await;
        let (refreshed, changed) = race(
            order,
            held,
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
        assert_alive([&here, &there], &tokens).await;
    }
}

/// A session that is over changes nothing, and a logout that comes later ends nothing.
#[tokio::test]
async fn a_logout_beside_a_change_of_password_comes_before_or_after_it() {
    let here = Server::start().await;
    let there = here.sibling(&[]).await;
    for order in BOTH {
        let ann = here.user().await;
        let held = RowLock::new(&here, "sessions", &ann.session_id).await;
        let (signed_out, changed) = race(
            order,
            held,
            logout(&there, &ann.access_token),
            change_password(&here, &ann.access_token, PASSWORD, ANOTHER_PASSWORD),
        )
        .await;
        println!("{order:?}: {} {}", signed_out.status, changed.status);
        signed_out.expect(204);
        if changed.status == 200 {
            assert_alive([&here, &there], &changed.json()).await;
            login(&here, &ann.email, ANOTHER_PASSWORD).await.expect(200);
        } else {
            changed.problem(401, "invalid_token");
            login(&here, &ann.email, PASSWORD).await.expect(200);
        }
    }
}

#[tokio::test]
async fn of_two_changes_of_password_in_one_session_one_wins() {
    let here = Server::start().await;
    let there = here.sibling(&[]).await;
    let ann: User = here.user().await;
    let held = RowLock::new(&here, "users", &ann.id).await;
    let (first, second) = held
        .race(
            change_password(&here, &ann.access_token, PASSWORD, ANOTHER_PASSWORD),
            change_password(&there, &ann.access_token, PASSWORD, THIRD_PASSWORD),
        )
        .await;
    second.problem(403, "wrong_password");
    assert_alive([&here, &there], &first.expect(200).json()).await;
    login(&here, &ann.email, ANOTHER_PASSWORD).await.expect(200);
}

/// The database ends a deadlock by rolling back the change, which waited first.
#[tokio::test]
async fn a_change_of_password_that_met_a_deadlock_is_made_all_the_same() {
    let server = Server::start().await;
    let ann = server.user().await;
    let other = RowLock::new(&server, "sessions", &ann.session_id).await;
    let deadlock = async {
        other.waiting(1).await;
        let lock = format!("select 1 from users where id = '{}' for update", ann.id);
        other.sql.batch_execute(&lock).await.expect("the account");
        other.sql.batch_execute("commit").await.expect("let go");
    };
    let change = change_password(&server, &ann.access_token, PASSWORD, ANOTHER_PASSWORD);
    let (changed, ()) = tokio::join!(change, deadlock);
    assert_alive([&server; 2], &changed.expect(200).json()).await;
}
