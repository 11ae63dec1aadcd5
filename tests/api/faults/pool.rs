//! How many connections the service keeps.

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use futures_util::future::join_all;
use tokio::time::sleep;

use super::{Cluster, backends, short_or_full};

/// Backends that have executed a statement since this moment of the server's.
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
async fn light_traffic_after_a_burst_leaves_surplus_connections_to_their_idle_timeout() {
    let rig = Cluster::direct(&[("DB_POOL_SIZE", "12")]).await;
    let sql = rig.sql().await;
    let task = format!("{}/{}", rig.user.tasks(), rig.task);
    let read = || rig.server.get(&task).bearer(&rig.user.access_token).send();
    let write = || {
        let toggle = rig.server.patch(format!("{task}/complete"));
        toggle.bearer(&rig.user.access_token).send()
    };
    let begin = Instant::now();
    while backends(&sql).await.len() < 8 {
        join_all((0..40).map(|_| write())).await;
        assert!(begin.elapsed() < Duration::from_secs(20), "no burst");
    }
    let open = backends(&sql).await.len();

    let now: String = sql
        .query_one("select clock_timestamp()::text", &[])
        .await
        .unwrap()
        .get(0);
    for _ in 0..open * 3 {
        read().await.expect(200);
        write().await.expect(200);
    }
    let used = used_since(&sql, &now).await;
    assert!(
        used.len() * 2 < open,
        "{} of {open} connections are in use",
        used.len()
    );

    // The idle timeout is 4 minutes, and it is looked for twice a minute.
    let rest = short_or_full(Duration::ZERO, Duration::from_secs(280));
    let begin = Instant::now();
    while begin.elapsed() < rest {
        write().await.expect(200);
        sleep(Duration::from_millis(100)).await;
    }
    let left = backends(&sql).await.len();
    assert!(
        rest.is_zero() || left * 2 < open,
        "{left} of {open} are left"
    );
    rig.end().await;
}
