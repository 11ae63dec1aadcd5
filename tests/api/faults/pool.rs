//! The size of the connection pool.

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use futures_util::future::join_all;
use serde_json::json;
use tokio::time::sleep;

use super::{Cluster, backends, short_or_full};

/// Returns the backends that have executed a statement since this time on the database server.
async fn used_since(sql: &tokio_postgres::Client, since: &str) -> BTreeSet<i32> {
    let rows = sql
        .query(
            "select pid from pg_stat_activity
             where application_name = 'todo-api' and query_start > $1::text::timestamptz",
            &[&since],
        )
        .await
        .unwrap();
    rows.iter().map(|row| row.get(0)).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn surplus_connections_time_out_under_light_traffic_after_a_burst() {
    let cluster = Cluster::direct(&[("DB_POOL_SIZE", "12")]).await;
    let sql = cluster.sql().await;
    let task = format!("{}/{}", cluster.user.tasks(), cluster.task);
    let read = || cluster.user.get(&task).send();
    let write = || cluster.user.patch(format!("{task}/complete")).send();
    // The writes of one user hold at most a quarter of the connections.
    let users = join_all((0..8).map(|_| cluster.server.user())).await;
    let start = Instant::now();
    while backends(&sql).await.len() < 8 {
        let creates = (0..40).map(|n| users[n % 8].create(json!({"title": "a"})).send());
        join_all(creates).await;
        assert!(
            start.elapsed() < Duration::from_secs(20),
            "the pool did not grow"
        );
    }
    let open = backends(&sql).await.len();

    let now: String = sql
        .query_one("select clock_timestamp()::text", &[])
        .await
        .unwrap()
        .get(0);
    for _ in 0..open {
        read().await.expect(200);
        write().await.expect(200);
    }
    let used = used_since(&sql, &now).await;
    // Acquiring the longest idle connection would use all of them in turn.
    assert!(used.len() < open, "all {open} connections are in use");

    // The idle timeout is 4 minutes and is checked twice a minute.
    let duration = short_or_full(Duration::ZERO, Duration::from_secs(280));
    let start = Instant::now();
    while start.elapsed() < duration {
        write().await.expect(200);
        sleep(Duration::from_millis(100)).await;
    }
    let left = backends(&sql).await.len();
    assert!(
        duration.is_zero() || left * 2 < open,
        "{left} of {open} are left"
    );
    cluster.stop().await;
}
