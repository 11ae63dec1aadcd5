//! Isolation levels, serialization failures and deadlocks: statements that are rolled back are retried.

use std::time::Duration;

use futures_util::future::join_all;
use serde_json::json;

use super::Cluster;
use crate::harness::{Server, User, until};

/// Toggles one task 120 times from ten clients. Asserts that all succeed and that the task is
/// unchanged in the end.
async fn toggle_concurrently(server: &Server, user: &User, task: &str) {
    let user = user.on(server);
    let toggle = async |_| {
        for _ in 0..12 {
            user.patch(format!("{task}/complete")).await.expect(200);
        }
    };
    join_all((0..10).map(toggle)).await;
    let task = user.get(task).await.expect(200).json();
    assert_eq!(task["completed"], false);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn concurrent_toggles_succeed_at_any_default_isolation_level() {
    let server = Server::with(&[("DB_POOL_SIZE", "12")]).await;
    let user = server.user().await;
    let task = user.path_of(&user.create_task("toggled").await);
    let sql = server.sql().await;
    for level in ["repeatable read", "serializable"] {
        let database: String = sql
            .query_one("select current_database()", &[])
            .await
            .unwrap()
            .get(0);
        sql.batch_execute(&format!(
            "alter database {database} set default_transaction_isolation = '{level}'"
        ))
        .await
        .unwrap();
        let server = server.sibling(&[]).await;
        toggle_concurrently(&server, &user, &task).await;
        server
            .wait_for_log(&format!("default_transaction_isolation is {level}"))
            .await;
        // Registration and login also succeed at this isolation level.
        let user = server.user().await;
        server.login(&user.email, &user.password).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn concurrent_toggles_succeed_if_the_default_changes_while_connections_are_open() {
    let cluster = Cluster::direct(&[("DB_POOL_SIZE", "12")]).await;
    let task = format!("{}/{}", cluster.user.tasks(), cluster.task);
    toggle_concurrently(&cluster.server, &cluster.user, &task).await;
    let sql = cluster.sql().await;
    sql.batch_execute("alter system set default_transaction_isolation = 'serializable'")
        .await
        .unwrap();
    sql.batch_execute("select pg_reload_conf()").await.unwrap();
    let show = "show default_transaction_isolation";
    until("the new default is in effect", async || {
        let level: String = sql.query_one(show, &[]).await.unwrap().get(0);
        level == "serializable"
    })
    .await;
    // The service notices the new default when a statement conflicts with another.
    until("a conflict is logged", async || {
        toggle_concurrently(&cluster.server, &cluster.user, &task).await;
        cluster.server.log().contains("read committed")
    })
    .await;
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_statement_that_a_deadlock_aborts_is_retried() {
    let server = Server::start().await;
    let user = server.user().await;
    let mut tasks = Vec::new();
    for title in ["one", "two"] {
        let task = user.create_task(title).await;
        let complete = format!("{}/complete", user.path_of(&task));
        user.patch(complete).await.expect(200);
        tasks.push(task["id"].as_str().unwrap().to_owned());
    }
    // The statement locks one task and waits for the other, which the transaction has locked. Then the
    // transaction requests the first one. PostgreSQL aborts the statement, because the transaction does not
    // check for deadlocks until a minute has passed.
    let lock = server.lock("set local deadlock_timeout = '1 min'").await;
    // An update would also lock the list, in a trigger.
    let row = "select from tasks where id::text = $1 for update";
    lock.transaction.execute(row, &[&tasks[1]]).await.unwrap();
    let path = format!("{}?completed=true", user.tasks());
    let delete = tokio::spawn(user.delete(path).send());
    lock.wait_for_blocked(1).await;
    let waiting = std::time::Instant::now();
    lock.transaction.execute(row, &[&tasks[0]]).await.unwrap();
    assert!(
        waiting.elapsed() > Duration::from_millis(300),
        "there was no deadlock"
    );
    lock.release().await;
    let deleted = delete.await.unwrap().expect(200).json();
    assert_eq!(deleted, json!({"deleted": 2}));
}
