//! Isolation levels, serialization failures and deadlocks: what the server rolled back is retried.

use std::time::Duration;

use futures_util::future::join_all;
use serde_json::json;

use super::Cluster;
use crate::harness::{Server, User, until};

/// Toggles one task 300 times over ten clients; each is served, and the task is as before.
async fn toggle_300_times(server: &Server, user: &User, task: &str) {
    let toggle = async |_| {
        for _ in 0..30 {
            let request = server.patch(format!("{task}/complete"));
            request.bearer(&user.access_token).send().await.expect(200);
        }
    };
    join_all((0..10).map(toggle)).await;
    let task = server.get(task).bearer(&user.access_token).send().await;
    assert_eq!(task.expect(200).json()["completed"], false);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn concurrent_toggles_are_served_whatever_the_default_isolation_is() {
    let server = Server::with(&[("DB_POOL_SIZE", "12")]).await;
    let user = server.user().await;
    let task = user.path_of(&user.create_task("popular").await);
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
        toggle_300_times(&server, &user, &task).await;
        server
            .wait_for_log(&format!("default_transaction_isolation is {level}"))
            .await;
        // All of it ran in READ COMMITTED: nothing had to be retried, and all else works in there.
        let user = server.user().await;
        server.login(&user.email, &user.password).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn concurrent_toggles_are_served_if_the_default_changes_under_open_connections() {
    let rig = Cluster::direct(&[("DB_POOL_SIZE", "12")]).await;
    let task = format!("{}/{}", rig.user.tasks(), rig.task);
    toggle_300_times(&rig.server, &rig.user, &task).await;
    let sql = rig.sql().await;
    sql.batch_execute("alter system set default_transaction_isolation = 'serializable'")
        .await
        .unwrap();
    sql.batch_execute("select pg_reload_conf()").await.unwrap();
    let show = "show default_transaction_isolation";
    until("the new default is in force", async || {
        let level: String = sql.query_one(show, &[]).await.unwrap().get(0);
        level == "serializable"
    })
    .await;
    toggle_300_times(&rig.server, &rig.user, &task).await;
    let log = rig.server.log();
    assert!(log.contains("read committed"), "{log}");
    rig.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_statement_that_loses_a_deadlock_is_retried() {
    let server = Server::start().await;
    let user = server.user().await;
    let mut tasks = Vec::new();
    for title in ["one", "two"] {
        let task = user.create_task(title).await;
        let complete = server.patch(format!("{}/complete", user.path_of(&task)));
        complete.bearer(&user.access_token).send().await.expect(200);
        tasks.push(task["id"].as_str().unwrap().to_owned());
    }
    // The statement locks one of the two tasks and waits for the other; then the transaction wants
    // the one that the statement has. The server ends the statement, which waited first.
    let mut transaction = server.sql().await;
    let watch = server.sql().await;
    transaction
        .batch_execute("set deadlock_timeout = '1 min'")
        .await
        .unwrap();
    let transaction = transaction.transaction().await.unwrap();
    let touch = "update tasks set description = 'touched' where id::text = $1";
    transaction.execute(touch, &[&tasks[1]]).await.unwrap();
    let path = format!("{}?completed=true", user.tasks());
    let delete = server.delete(path).bearer(&user.access_token);
    let delete = tokio::spawn(delete.send());
    until("the statement waits", async || {
        let waiting: i64 = watch
            .query_one(
                "select count(*) from pg_stat_activity
                 where datname = current_database() and wait_event_type = 'Lock'",
                &[],
            )
            .await
            .unwrap()
            .get(0);
        waiting == 1
    })
    .await;
    let waiting = std::time::Instant::now();
    transaction.execute(touch, &[&tasks[0]]).await.unwrap();
    assert!(
        waiting.elapsed() > Duration::from_millis(300),
        "there was no deadlock"
    );
    transaction.commit().await.unwrap();
    let deleted = delete.await.unwrap().expect(200).json();
    assert_eq!(deleted, json!({"deleted": 2}));
}
