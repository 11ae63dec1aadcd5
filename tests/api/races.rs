//! Two requests that want the same row at the same instant. A row lock held from a connection of
//! the test's own makes sure that the two really overlap: both are seen to wait before it is
//! let go. Each race is run in both orders, and over two instances.

use std::time::Instant;

use serde_json::json;

use crate::auth::{
    ANOTHER_PASSWORD, assert_signed_in, change_password, delete_account, login, refresh, text,
};
use crate::harness::{PASSWORD, Response, Server, User, wait_for_blocked};
use crate::sessions::assert_revoked;

/// A second instance that hashes at a higher cost than the harness's servers do.
const COSTLIER: (&str, &str) = ("BCRYPT_COST", "11");

/// A row that somebody holds.
pub(crate) struct RowLock {
    pub(crate) sql: tokio_postgres::Client,
    watch: tokio_postgres::Client,
}

impl RowLock {
    /// Takes the row lock that every change of the row has to wait for.
    pub(crate) async fn new(server: &Server, table: &str, id: &str) -> RowLock {
        let sql = server.sql().await;
        sql.batch_execute(&format!(
            "begin; select 1 from {table} where id = '{id}' for update"
        ))
        .await
        .expect("the row");
        let watch = server.sql().await;
        RowLock { sql, watch }
    }

    /// Waits until this many statements are blocked by a lock.
    pub(crate) async fn waiting(&self, count: i64) {
        wait_for_blocked(&self.watch, count).await;
    }

    /// Lets both requests run into the row, the first one first, then lets the row go.
    pub(crate) async fn race<A, B>(
        self,
        first: impl Future<Output = A>,
        second: impl Future<Output = B>,
    ) -> (A, B) {
        let second = async {
            self.waiting(1).await;
            second.await
        };
        let release = async {
            self.waiting(2).await;
            self.sql.batch_execute("commit").await.expect("let go");
        };
        let (first, second, ()) = tokio::join!(first, second, release);
        (first, second)
    }
}

/// The same race with either in front.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Order {
    AsNamed,
    Reversed,
}

pub(crate) const BOTH: [Order; 2] = [Order::AsNamed, Order::Reversed];

/// Runs two requests into a held row in the given order; the answers come as they were named.
pub(crate) async fn race(
    order: Order,
    held: RowLock,
    a: impl Future<Output = Response>,
    b: impl Future<Output = Response>,
) -> (Response, Response) {
    match order {
        Order::AsNamed => held.race(a, b).await,
        Order::Reversed => {
            let (b, a) = held.race(b, a).await;
            (a, b)
        }
    }
}

/// Asserts that whatever tokens an answer brought are dead, and what it may be besides.
async fn assert_fruitless(servers: [&Server; 2], answer: Response, otherwise: u16) {
    let since = Instant::now();
    if answer.status == 200 {
        let body = answer.json();
        for server in servers {
            assert_revoked(server, &text(&body, "access_token"), since).await;
            refresh(server, &text(&body, "refresh_token"))
                .await
                .problem(401, "invalid_refresh_token");
        }
    } else {
        answer.expect(otherwise);
    }
}

/// Somebody signs in over there while changing the password here; the answers to both.
async fn sign_in_beside_a_change_of_password(
    [here, there]: [&Server; 2],
    order: Order,
) -> (User, Response, Response) {
    let ann = here.user().await;
    let held = RowLock::new(here, "users", &ann.id).await;
    let (signed_in, changed) = race(
        order,
        held,
        login(there, &ann.email, &ann.password),
        change_password(here, &ann.access_token, &ann.password, ANOTHER_PASSWORD),
    )
    .await;
    println!("{order:?}: {} {}", signed_in.status, changed.status);
    (ann, signed_in, changed)
}

/// The same while deleting the account.
async fn sign_in_beside_the_end_of_the_account(
    [here, there]: [&Server; 2],
    order: Order,
) -> (User, Response, Response) {
    let ann = here.user().await;
    let held = RowLock::new(here, "users", &ann.id).await;
    let (signed_in, deleted) = race(
        order,
        held,
        login(there, &ann.email, &ann.password),
        delete_account(here, &ann.access_token, &ann.password),
    )
    .await;
    println!("{order:?}: {} {}", signed_in.status, deleted.status);
    (ann, signed_in, deleted)
}

async fn count(server: &Server, what: &str) -> i64 {
    let sql = server.sql().await;
    sql.query_one(&format!("select count(*) from {what}"), &[])
        .await
        .expect("a count")
        .get(0)
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
async fn a_sign_in_beside_a_change_of_password_leaves_no_session_of_the_old_one() {
    let here = Server::start().await;
    let there = here.sibling(&[]).await;
    for order in BOTH {
        let (ann, signed_in, changed) =
            sign_in_beside_a_change_of_password([&here, &there], order).await;
        let tokens = changed.expect(200).json();
        assert_fruitless([&here, &there], signed_in, 401).await;
        let sessions = format!("sessions where user_id = '{}'", ann.id);
        assert_eq!(count(&here, &sessions).await, 1, "{order:?}");
        assert_signed_in(&here, &text(&tokens, "access_token")).await;
        login(&here, &ann.email, ANOTHER_PASSWORD).await.expect(200);
    }
}

#[tokio::test]
async fn a_sign_in_beside_the_end_of_the_account_leaves_no_live_token() {
    let here = Server::start().await;
    let there = here.sibling(&[]).await;
    for order in BOTH {
        let (ann, signed_in, deleted) =
            sign_in_beside_the_end_of_the_account([&here, &there], order).await;
        deleted.expect(204);
        let since = Instant::now();
        assert_fruitless([&here, &there], signed_in, 401).await;
        assert_revoked(&there, &ann.access_token, since).await;
        assert_eq!(count(&here, "users").await, 0);
        assert_eq!(count(&here, "sessions").await, 0);
    }
}

#[tokio::test]
async fn two_sign_ins_that_both_renew_an_old_hash_both_succeed() {
    let here = Server::start().await;
    let there = here.sibling(&[COSTLIER]).await;
    let everywhere = here.sibling(&[COSTLIER]).await;
    let ann = here.user().await;
    let old = stored_hash(&here, &ann).await;
    assert!(old.starts_with("$2b$10$"), "{old}");
    let held = RowLock::new(&here, "users", &ann.id).await;
    let (first, second) = held
        .race(
            login(&there, &ann.email, &ann.password),
            login(&everywhere, &ann.email, &ann.password),
        )
        .await;
    for answer in [first, second] {
        let body = answer.expect(200).json();
        assert_signed_in(&here, &text(&body, "access_token")).await;
        refresh(&here, &text(&body, "refresh_token"))
            .await
            .expect(200);
    }
    let new = stored_hash(&here, &ann).await;
    assert!(new.starts_with("$2b$11$"), "{new}");
    assert!(bcrypt::verify(&ann.password, &new).expect("a hash"));
    assert_eq!(count(&here, "sessions").await, 3);
}

/// The renewal must not bring the password back that was just replaced.
#[tokio::test]
async fn a_renewed_hash_never_undoes_a_change_of_password() {
    let here = Server::start().await;
    let there = here.sibling(&[COSTLIER]).await;
    for order in BOTH {
        let (ann, signed_in, changed) =
            sign_in_beside_a_change_of_password([&here, &there], order).await;
        // The hash that was verified may be another one by then, but of the same password.
        changed.expect(200);
        assert_fruitless([&here, &there], signed_in, 401).await;
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

/// A sign-in that renews the hash must not make the right password wrong for its neighbour.
#[tokio::test]
async fn the_end_of_an_account_beside_a_renewed_hash_is_not_refused() {
    let here = Server::start().await;
    let there = here.sibling(&[COSTLIER]).await;
    for order in BOTH {
        let (_, signed_in, deleted) =
            sign_in_beside_the_end_of_the_account([&here, &there], order).await;
        deleted.expect(204);
        assert_fruitless([&here, &there], signed_in, 401).await;
        assert_eq!(count(&here, "users").await, 0);
    }
}

#[tokio::test]
async fn of_two_changes_of_password_at_once_one_wins() {
    let here = Server::start().await;
    let there = here.sibling(&[]).await;
    let ann = here.user().await;
    let other = login(&here, &ann.email, &ann.password)
        .await
        .expect(200)
        .json();
    let held = RowLock::new(&here, "users", &ann.id).await;
    let (first, second) = held
        .race(
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
    // The loser's password is not the current one any longer, and its session is over.
    assert!(
        [401, 403].contains(&second.status),
        "{} for the loser",
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
async fn a_refresh_beside_a_sign_out_does_not_bring_the_session_back() {
    let here = Server::start().await;
    let there = here.sibling(&[]).await;
    for order in BOTH {
        let ann = here.user().await;
        let held = RowLock::new(&here, "sessions", &ann.session_id).await;
        let logout = here
            .post("/api/v1/auth/logout")
            .bearer(&ann.access_token)
            .send();
        let (refreshed, signed_out) =
            race(order, held, refresh(&there, &ann.refresh_token), logout).await;
        println!("{order:?}: {} {}", refreshed.status, signed_out.status);
        signed_out.expect(204);
        let since = Instant::now();
        assert_fruitless([&here, &there], refreshed, 401).await;
        assert_revoked(&there, &ann.access_token, since).await;
        assert_eq!(count(&here, "sessions").await, 0);
    }
}

#[tokio::test]
async fn a_refresh_beside_a_change_of_password_does_not_save_the_session() {
    let here = Server::start().await;
    let there = here.sibling(&[]).await;
    for order in BOTH {
        let ann = here.user().await;
        let other = login(&here, &ann.email, &ann.password)
            .await
            .expect(200)
            .json();
        let held = RowLock::new(&here, "sessions", &ann.session_id).await;
        let (refreshed, changed) = race(
            order,
            held,
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
        assert_fruitless([&here, &there], refreshed, 401).await;
        assert_revoked(&there, &ann.access_token, since).await;
        refresh(&here, &text(&tokens, "refresh_token"))
            .await
            .expect(200);
    }
}

#[tokio::test]
async fn a_refresh_beside_the_end_of_the_account_leaves_no_live_token() {
    let here = Server::start().await;
    let there = here.sibling(&[]).await;
    for order in BOTH {
        let ann = here.user().await;
        let held = RowLock::new(&here, "sessions", &ann.session_id).await;
        let (refreshed, deleted) = race(
            order,
            held,
            refresh(&there, &ann.refresh_token),
            delete_account(&here, &ann.access_token, &ann.password),
        )
        .await;
        println!("{order:?}: {} {}", refreshed.status, deleted.status);
        deleted.expect(204);
        assert_fruitless([&here, &there], refreshed, 401).await;
        assert_eq!(count(&here, "users").await, 0);
        assert_eq!(count(&here, "sessions").await, 0);
    }
}

/// FR-007: a task has an owner or is not there. Whoever loses is told that the token is no
/// longer good, not that something broke.
#[tokio::test]
async fn a_task_created_beside_the_end_of_the_account_is_no_orphan() {
    let here = Server::start().await;
    let there = here.sibling(&[]).await;
    for key in [None, Some("the-only-one")] {
        for order in BOTH {
            let ann = here.user().await;
            let held = RowLock::new(&here, "users", &ann.id).await;
            let mut create = there.post(ann.tasks()).bearer(&ann.access_token);
            if let Some(key) = key {
                create = create.header("idempotency-key", key);
            }
            let create = create.json(json!({"title": "water the plants"})).send();
            let (created, deleted) = race(
                order,
                held,
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
                "sessions",
                "idempotency_keys",
                "login_networks",
            ] {
                assert_eq!(count(&here, table).await, 0, "{table}");
            }
        }
    }
}
