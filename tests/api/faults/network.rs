//! Faults of the network between the service and its database.

use std::time::{Duration, Instant};

use tokio::time::sleep;

use super::{
    Cluster, RECOVERY_TIMEOUT, RESPONSE_TIMEOUT, assert_outage_is_survived, backends,
    load::{RequestRecord, summary},
    proxy::NetworkCondition,
    report, short_or_full, start_light_load, until_recovered, until_served,
};
use crate::{harness::until, sessions::OTHER_USERS_TASKS};

/// A cluster behind a proxy, with a pool of eight connections.
async fn start_cluster() -> Cluster {
    Cluster::proxied(&[("DB_POOL_SIZE", "8")]).await
}

/// Asserts that the service keeps no more backends than the pool allows.
async fn assert_no_leaked_backends(cluster: &Cluster) {
    let sql = cluster.sql().await;
    until("surplus backends have exited", async || {
        backends(&sql).await.len() <= 8
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn detects_a_blackholed_network_and_recovers() {
    let _guard = start_light_load().await;
    let cluster = start_cluster().await;
    let load = cluster.load(8, 4);
    let mut counts = Vec::new();
    for _ in 0..short_or_full(1, 5) {
        until_served(&load.requests, 50, 20).await;
        let outage = assert_outage_is_survived(
            &cluster,
            &load.requests,
            || cluster.proxy().set_condition(NetworkCondition::Blackhole),
            || cluster.proxy().set_condition(NetworkCondition::Normal),
        );
        counts.push(outage.await);
    }
    let requests = load.finish().await;
    requests.assert_all_responded_within(RESPONSE_TIMEOUT);
    let kept = requests.assert_durable(&cluster.sql().await).await;
    assert_no_leaked_backends(&cluster).await;
    report(
        "blackhole",
        format!(
            "{}; all: {}; {kept} tasks verified",
            counts.join(" | "),
            requests.summary()
        ),
    );
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_distant_database_is_used_without_errors() {
    let _guard = start_light_load().await;
    let cluster = start_cluster().await;
    // Close the connections, so that new ones are opened over the slow network.
    cluster
        .proxy()
        .set_condition(NetworkCondition::Suspended(Duration::ZERO));
    cluster
        .proxy()
        .set_condition(NetworkCondition::Slow(Duration::from_millis(100)));
    let load = cluster.load(8, 4);
    sleep(short_or_full(Duration::ZERO, Duration::from_secs(60))).await;
    until("enough requests have finished", async || {
        load.requests.all().len() > 120
    })
    .await;
    let requests = load.finish().await;
    requests.assert_all_responded_within(RESPONSE_TIMEOUT);
    let kept = requests.assert_durable(&cluster.sql().await).await;
    let counts = requests.summary();
    report(
        "200 ms of latency",
        format!("{counts}; {kept} tasks verified"),
    );
    let records = requests.all();
    let failed = records.iter().filter(|request| !request.is_success());
    assert!(20 * failed.count() <= records.len(), "{counts}");
    assert_no_leaked_backends(&cluster).await;
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_reset_during_a_response_lose_no_acknowledged_task() {
    let _guard = start_light_load().await;
    let cluster = start_cluster().await;
    let load = cluster.load(8, 4);
    let requests = load.requests.clone();
    let start = Instant::now();
    let rounds = short_or_full(4, 100);
    for _ in 0..rounds {
        cluster.proxy().set_condition(NetworkCondition::Reset);
        sleep(Duration::from_millis(100)).await;
        cluster.proxy().set_condition(NetworkCondition::Normal);
        until_served(&requests, 11, 6).await;
    }
    let flapping = requests.sent_between(start, Instant::now());

    // Then reset the connections for a longer time.
    let long_fault = Instant::now();
    cluster.proxy().set_condition(NetworkCondition::Reset);
    sleep(short_or_full(
        Duration::from_secs(2),
        Duration::from_secs(10),
    ))
    .await;
    let restored = Instant::now();
    cluster.proxy().set_condition(NetworkCondition::Normal);
    let recovered = until_recovered(&requests, restored, RECOVERY_TIMEOUT).await;
    load.finish().await;
    requests.assert_all_responded_within(RESPONSE_TIMEOUT);
    let kept = requests.assert_durable(&cluster.sql().await).await;
    assert_no_leaked_backends(&cluster).await;
    report(
        "reset during a response",
        format!(
            "{rounds} × 100 ms: {}; longer: {}; recovered after {recovered:.1?}; {kept} tasks verified",
            summary(&flapping),
            summary(&requests.sent_between(long_fault, restored)),
        ),
    );
    let successes = flapping.iter().filter(|request| request.is_success());
    assert!(
        2 * successes.count() > flapping.len(),
        "{}",
        summary(&flapping)
    );
    // Retries may fill the queue.
    let is_expected = |request: &RequestRecord| {
        request.is_success()
            || request.is_retryable_503("database_unavailable")
            || request.is_retryable_503("overloaded")
    };
    assert!(
        requests.all().iter().all(is_expected),
        "{}",
        requests.summary()
    );
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn half_open_connections_are_evicted() {
    let _guard = start_light_load().await;
    let cluster = start_cluster().await;
    let load = cluster.load(8, 6);
    let requests = load.requests.clone();
    let mut counts = Vec::new();
    for _ in 0..short_or_full(1, 5) {
        until_served(&requests, 50, 50).await;
        let start = Instant::now();
        cluster.proxy().make_half_open();
        // Only a timeout distinguishes a half-open connection from a slow query.
        let limit = RESPONSE_TIMEOUT + RECOVERY_TIMEOUT;
        let recovered = until_recovered(&requests, start, limit).await;
        counts.push(format!(
            "recovered after {recovered:.1?}: {}",
            summary(&requests.sent_between(start, Instant::now()))
        ));
    }
    load.finish().await;
    requests.assert_all_responded_within(RESPONSE_TIMEOUT);
    let kept = requests.assert_durable(&cluster.sql().await).await;
    assert_no_leaked_backends(&cluster).await;
    report(
        "half-open",
        format!(
            "{}; all: {}; {kept} tasks verified",
            counts.join(" | "),
            requests.summary()
        ),
    );
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn half_open_connections_are_evicted_together() {
    let _guard = start_light_load().await;
    let cluster = start_cluster().await;
    let sql = cluster.sql().await;
    let load = cluster.load(8, 6);
    until("several connections are open", async || {
        backends(&sql).await.len() >= 5
    })
    .await;
    load.finish().await;
    cluster.proxy().make_half_open();
    let start = Instant::now();
    // A single client uses one connection after another.
    let load = cluster.load(0, 1);
    let limit = RESPONSE_TIMEOUT + RECOVERY_TIMEOUT;
    let recovered = until_recovered(&load.requests, start, limit).await;
    let requests = load.finish().await;
    let counts = requests.summary();
    report(
        "half-open, one client",
        format!("recovered after {recovered:.1?}: {counts}"),
    );
    requests.assert_all_responded_within(RESPONSE_TIMEOUT);
    let records = requests.all();
    let failed = records.iter().filter(|request| !request.is_success());
    assert!(failed.count() <= 2, "{counts}");
    cluster.stop().await;
}

/// The revocation cache is refreshed before it expires.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_do_not_wait_until_revocations_are_refreshed() {
    const ONE_WAY: Duration = Duration::from_millis(75);
    let _guard = start_light_load().await;
    let cluster = Cluster::proxied(&[]).await;
    cluster
        .proxy()
        .set_condition(NetworkCondition::Slow(ONE_WAY));
    let start = Instant::now();
    let mut waits = 0;
    let mut requests = 0;
    while start.elapsed() < Duration::from_secs(4) {
        let sent_at = Instant::now();
        // A 403 needs the revocation cache and no other database work.
        let response = cluster.user.get(OTHER_USERS_TASKS).await;
        response.expect(403);
        waits += usize::from(sent_at.elapsed() >= 2 * ONE_WAY);
        requests += 1;
        sleep(Duration::from_millis(10)).await;
    }
    report(
        "revocations refreshed in advance",
        format!("{waits} of {requests} requests waited"),
    );
    // The first request may have to wait, and a busy machine may stall once.
    assert!(waits <= 2, "{waits} of {requests} requests waited");
}
