//! Two concurrent requests for the same row, in both orders and on two instances. The test holds a lock
//! on the row until it blocks both requests, so that they overlap.

use std::time::{Duration, Instant};

use serde_json::json;
use tokio::time::timeout;

use crate::auth::{
    ANOTHER_PASSWORD, assert_signed_in, change_password, delete_account, login, logout, refresh,
    text,
};
use crate::harness::{Lock, PASSWORD, Response, Server, User};
use crate::sessions::assert_revoked;

/// Locks a row, so that every change of it is blocked.
pub(crate) async fn lock_row(server: &Server, table: &str, id: &str) -> Lock {
    server
        .lock(&format!(
            "select 1 from {table} where id = '{id}' for update"
        ))
        .await
}

/// How long the first request is blocked while the second is on its way: less than the 5 s that a statement
/// may take, although a busy machine may hash the second request's passwords for longer.
const BLOCKED_TIMEOUT: Duration = Duration::from_secs(3);

/// Sends the second request once the first is blocked, and releases the lock once both are blocked.
async fn send_in_order(
    lock: Lock,
    first: impl Future<Output = Response>,
    second: impl Future<Output = Response>,
) -> (Response, Response) {
    let second = async {
        lock.wait_for_blocked(1).await;
        second.await
    };
    let release = async {
        lock.wait_for_blocked(1).await;
        timeout(BLOCKED_TIMEOUT, lock.wait_for_blocked(2))
            .await
            .ok();
        lock.release().await;
    };
    let (first, second, ()) = tokio::join!(first, second, release);
    (first, second)
}

/// The order in which two requests are sent.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Order {
    AsNamed,
    Reversed,
}

pub(crate) const BOTH: [Order; 2] = [Order::AsNamed, Order::Reversed];

/// Sends two requests for a locked row in this order and returns the responses to `a` and `b`.
pub(crate) async fn race(
    order: Order,
    lock: Lock,
    a: impl Future<Output = Response>,
    b: impl Future<Output = Response>,
) -> (Response, Response) {
    match order {
        Order::AsNamed => send_in_order(lock, a, b).await,
        Order::Reversed => {
            let (b, a) = send_in_order(lock, b, a).await;
            (a, b)
        }
    }
}

/// Asserts that a response has this status, or is 200 with tokens that are revoked.
async fn assert_no_valid_tokens(servers: [&Server; 2], response: Response, otherwise: u16) {
    let since = Instant::now();
    if response.status == 200 {
        let body = response.json();
        for server in servers {
            assert_revoked(server, &text(&body, "access_token"), since).await;
            refresh(server, &text(&body, "refresh_token"))
                .await
                .problem(401, "invalid_refresh_token");
        }
    } else {
        response.expect(otherwise);
    }
}

/// Logs in on the second instance while the first one changes the password of a user.
async fn login_during_password_change(
    [here, there]: [&Server; 2],
    order: Order,
    ann: User,
) -> (User, Response, Response) {
    let lock = lock_row(here, "users", &ann.id).await;
    let (logged_in, changed) = race(
        order,
        lock,
        login(there, &ann.email, &ann.password),
        change_password(here, &ann.access_token, &ann.password, ANOTHER_PASSWORD),
    )
    .await;
    println!("{order:?}: {} {}", logged_in.status, changed.status);
    (ann, logged_in, changed)
}

/// Logs in on the second instance while the first one deletes the account of a user.
async fn login_during_account_deletion(
    [here, there]: [&Server; 2],
    order: Order,
    ann: User,
) -> (User, Response, Response) {
    let lock = lock_row(here, "users", &ann.id).await;
    let (logged_in, deleted) = race(
        order,
        lock,
        login(there, &ann.email, &ann.password),
        delete_account(here, &ann.access_token, &ann.password),
    )
    .await;
    println!("{order:?}: {} {}", logged_in.status, deleted.status);
    (ann, logged_in, deleted)
}

async fn count(server: &Server, what: &str) -> i64 {
    let sql = server.sql().await;
    sql.query_one(&format!("select count(*) from {what}"), &[])
        .await
        .expect("a count")
        .get(0)
}

/// Creates a user whose hash has a lower cost than those of the servers.
async fn user_with_outdated_hash(server: &Server) -> User {
    let user = server.user().await;
    let hash = bcrypt::hash(PASSWORD, 4).expect("a hash");
    let change = "update users set password_hash = $1 where email = $2";
    let sql = server.sql().await;
    let changed = sql.execute(change, &[&hash, &user.email]).await;
    assert_eq!(changed.expect("an update"), 1);
    user
}

async fn stored_hash(server: &Server, user: &User) -> String {
    let sql = server.sql().await;
    sql.query_one(
        &format!("select password_hash from users where id = '{}'", user.id),
        &[],
    )
    .await
    .expect("the user")
    .get(0)
}

#[tokio::test]
async fn a_login_during_a_password_change_leaves_no_session_of_the_old_password() {
    let here = Server::start().await;
    let there = here.sibling(&[]).await;
    for order in BOTH {
        let ann = here.user().await;
        let (ann, logged_in, changed) =
            login_during_password_change([&here, &there], order, ann).await;
        let tokens = changed.expect(200).json();
        assert_no_valid_tokens([&here, &there], logged_in, 401).await;
        let sessions = format!("sessions where user_id = '{}'", ann.id);
        assert_eq!(count(&here, &sessions).await, 1, "{order:?}");
        assert_signed_in(&here, &text(&tokens, "access_token")).await;
        login(&here, &ann.email, ANOTHER_PASSWORD).await.expect(200);
    }
}

#[tokio::test]
async fn a_login_during_account_deletion_leaves_no_valid_token() {
    let here = Server::start().await;
    let there = here.sibling(&[]).await;
    for order in BOTH {
        let ann = here.user().await;
        let (ann, logged_in, deleted) =
            login_during_account_deletion([&here, &there], order, ann).await;
        deleted.expect(204);
        let since = Instant::now();
        assert_no_valid_tokens([&here, &there], logged_in, 401).await;
        assert_revoked(&there, &ann.access_token, since).await;
        assert_eq!(count(&here, "users").await, 0);
        assert_eq!(count(&here, "sessions").await, 0);
    }
}

#[tokio::test]
async fn concurrent_logins_that_replace_an_outdated_hash_both_succeed() {
    let here = Server::start().await;
    let there = here.sibling(&[]).await;
    let third = here.sibling(&[]).await;
    let ann = user_with_outdated_hash(&here).await;
    let lock = lock_row(&here, "users", &ann.id).await;
    let (first, second) = race(
        Order::AsNamed,
        lock,
        login(&there, &ann.email, &ann.password),
        login(&third, &ann.email, &ann.password),
    )
    .await;
    for response in [first, second] {
        let body = response.expect(200).json();
        assert_signed_in(&here, &text(&body, "access_token")).await;
        refresh(&here, &text(&body, "refresh_token"))
            .await
            .expect(200);
    }
    let new = stored_hash(&here, &ann).await;
    assert!(new.starts_with("$2b$10$"), "{new}");
    assert!(bcrypt::verify(&ann.password, &new).expect("a hash"));
    assert_eq!(count(&here, "sessions").await, 3);
}

/// Replacing an outdated hash must not restore the old password.
#[tokio::test]
async fn replacing_an_outdated_hash_never_undoes_a_password_change() {
    let here = Server::start().await;
    let there = here.sibling(&[]).await;
    for order in BOTH {
        let ann = user_with_outdated_hash(&here).await;
        let (ann, logged_in, changed) =
            login_during_password_change([&here, &there], order, ann).await;
        // Succeeds even if the login has replaced the hash that was verified.
        changed.expect(200);
        assert_no_valid_tokens([&here, &there], logged_in, 401).await;
        let hash = stored_hash(&here, &ann).await;
        assert!(bcrypt::verify(ANOTHER_PASSWORD, &hash).expect("a hash"));
        login(&there, &ann.email, PASSWORD)
            .await
            .problem(401, "invalid_credentials");
        login(&there, &ann.email, ANOTHER_PASSWORD)
            .await
            .expect(200);
    }
}

/// Replacing an outdated hash must not make a concurrent request fail with the right password.
#[tokio::test]
async fn account_deletion_succeeds_while_a_login_replaces_the_hash() {
    let here = Server::start().await;
    let there = here.sibling(&[]).await;
    for order in BOTH {
        let ann = user_with_outdated_hash(&here).await;
        let (_, logged_in, deleted) =
            login_during_account_deletion([&here, &there], order, ann).await;
        deleted.expect(204);
        assert_no_valid_tokens([&here, &there], logged_in, 401).await;
        assert_eq!(count(&here, "users").await, 0);
    }
}

#[tokio::test]
async fn one_of_two_concurrent_password_changes_succeeds() {
    let here = Server::start().await;
    let there = here.sibling(&[]).await;
    let ann = here.user().await;
    let other = login(&here, &ann.email, &ann.password)
        .await
        .expect(200)
        .json();
    let lock = lock_row(&here, "users", &ann.id).await;
    let (first, second) = race(
        Order::AsNamed,
        lock,
        change_password(&here, &ann.access_token, &ann.password, ANOTHER_PASSWORD),
        change_password(
            &there,
            &text(&other, "access_token"),
            &ann.password,
            "quiet marble 77 rivers",
        ),
    )
    .await;
    first.expect(200);
    // The second request has an outdated password and a revoked session.
    assert!(
        [401, 403].contains(&second.status),
        "{} for the second change",
        second.status
    );
    login(&here, &ann.email, ANOTHER_PASSWORD).await.expect(200);
    for wrong in [PASSWORD, "quiet marble 77 rivers"] {
        login(&here, &ann.email, wrong)
            .await
            .problem(401, "invalid_credentials");
    }
}

#[tokio::test]
async fn a_refresh_during_a_logout_does_not_restore_the_session() {
    let here = Server::start().await;
    let there = here.sibling(&[]).await;
    for order in BOTH {
        let ann = here.user().await;
        let lock = lock_row(&here, "sessions", &ann.session_id).await;
        let logout = logout(&here, &ann.access_token);
        let (refreshed, logged_out) =
            race(order, lock, refresh(&there, &ann.refresh_token), logout).await;
        println!("{order:?}: {} {}", refreshed.status, logged_out.status);
        logged_out.expect(204);
        let since = Instant::now();
        assert_no_valid_tokens([&here, &there], refreshed, 401).await;
        assert_revoked(&there, &ann.access_token, since).await;
        assert_eq!(count(&here, "sessions").await, 0);
    }
}

#[tokio::test]
async fn a_refresh_during_a_password_change_does_not_keep_the_session() {
    let here = Server::start().await;
    let there = here.sibling(&[]).await;
    for order in BOTH {
        let ann = here.user().await;
        let other = login(&here, &ann.email, &ann.password)
            .await
            .expect(200)
            .json();
        let lock = lock_row(&here, "sessions", &ann.session_id).await;
        let (refreshed, changed) = race(
            order,
            lock,
            refresh(&there, &ann.refresh_token),
            change_password(
                &here,
                &text(&other, "access_token"),
                &ann.password,
                ANOTHER_PASSWORD,
            ),
        )
        .await;
        println!("{order:?}: {} {}", refreshed.status, changed.status);
        let tokens = changed.expect(200).json();
        let since = Instant::now();
        assert_no_valid_tokens([&here, &there], refreshed, 401).await;
        assert_revoked(&there, &ann.access_token, since).await;
        refresh(&here, &text(&tokens, "refresh_token"))
            .await
            .expect(200);
    }
}

#[tokio::test]
async fn a_refresh_during_account_deletion_leaves_no_valid_token() {
    let here = Server::start().await;
    let there = here.sibling(&[]).await;
    for order in BOTH {
        let ann = here.user().await;
        let lock = lock_row(&here, "sessions", &ann.session_id).await;
        let (refreshed, deleted) = race(
            order,
            lock,
            refresh(&there, &ann.refresh_token),
            delete_account(&here, &ann.access_token, &ann.password),
        )
        .await;
        println!("{order:?}: {} {}", refreshed.status, deleted.status);
        deleted.expect(204);
        assert_no_valid_tokens([&here, &there], refreshed, 401).await;
        assert_eq!(count(&here, "users").await, 0);
        assert_eq!(count(&here, "sessions").await, 0);
    }
}

/// FR-007: every task has an owner. The task is created before the deletion, or the request fails with
/// an invalid token.
#[tokio::test]
async fn a_task_created_during_account_deletion_is_not_orphaned() {
    let here = Server::start().await;
    let there = here.sibling(&[]).await;
    for key in [None, Some("the-only-one")] {
        for order in BOTH {
            let ann = here.user().await;
            let list = format!(
                "select from task_lists where user_id = '{}' for update",
                ann.id
            );
            let lock = here.lock(&list).await;
            let mut create = ann.on(&there).post(ann.tasks());
            if let Some(key) = key {
                create = create.header("idempotency-key", key);
            }
            let create = create.json(json!({"title": "water the plants"})).send();
            let (created, deleted) = race(
                order,
                lock,
                create,
                delete_account(&here, &ann.access_token, &ann.password),
            )
            .await;
            println!("{order:?}: {} {}", created.status, deleted.status);
            deleted.expect(204);
            if created.status != 201 {
                created.problem(401, "invalid_token");
            }
            for table in [
                "users",
                "tasks",
                "task_lists",
                "deleted_tasks",
                "sessions",
                "idempotency_keys",
                "login_networks",
            ] {
                assert_eq!(count(&here, table).await, 0, "{table}");
            }
        }
    }
}
