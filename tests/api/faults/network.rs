//! Faults of the network between the service and its database.

use std::time::{Duration, Instant};

use tokio::time::sleep;

use super::{
    ANSWERED, Cluster, HEALED, backends,
    load::{Work, percentile, summary},
    proxy::NetworkCondition,
    report, serialize, short_or_full, until_well,
};
use crate::harness::until;
use crate::sessions::OTHER_USERS_TASKS;

/// As many backends as the pool has places, and none left over from before.
async fn until_no_leak(rig: &Cluster) -> usize {
    let sql = rig.sql().await;
    let mut now = 0;
    until("no more backends than places", async || {
        now = backends(&sql).await.len();
        now <= 8
    })
    .await;
    now
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_network_that_swallows_everything_is_noticed_and_found_again() {
    let _turn = serialize().await;
    let rig = Cluster::proxied(&[("DB_POOL_SIZE", "8")]).await;
    let load = rig.load(8, 4);
    let ledger = load.ledger.clone();
    let mut counted = Vec::new();
    for _ in 0..short_or_full(1, 5) {
        let calm = Instant::now();
        until("there is a load", async || {
            ledger.good_since(calm, Work::Read) > 50 && ledger.good_since(calm, Work::Write) > 20
        })
        .await;
        let lost = rig.server.log().matches("database lost").count();
        let begin = Instant::now();
        rig.proxy().turns(NetworkCondition::Blackhole);
        until("its absence is noticed", async || {
            rig.server.log().matches("database lost").count() > lost
        })
        .await;
        let noticed = begin.elapsed();
        assert!(noticed < ANSWERED, "noticed after {noticed:?}");

        let known = Instant::now();
        sleep(short_or_full(
            Duration::from_secs(2),
            Duration::from_secs(10),
        ))
        .await;
        rig.server.get("/healthz").send().await.expect(200);
        rig.server
            .get("/readyz")
            .send()
            .await
            .problem(503, "database_unavailable");
        let away = ledger.asked(known, Instant::now());
        assert!(away.len() > 50, "too few to judge: {}", summary(&away));
        assert!(
            away.iter()
                .all(|answer| answer.is_refusal("database_unavailable")),
            "{}",
            summary(&away)
        );
        assert!(
            percentile(&away, 95) < Duration::from_secs(1),
            "not at once: {}",
            summary(&away)
        );

        let over = Instant::now();
        rig.proxy().turns(NetworkCondition::Fair);
        let healed = until_well(&ledger, over).await;
        assert!(healed < HEALED, "well only after {healed:?}");
        counted.push(format!(
            "noticed after {noticed:.1?}, away: {}; well {healed:.1?} after",
            summary(&away)
        ));
    }
    let ledger = load.end().await;
    ledger.assert_all_answered_within(ANSWERED);
    let kept = ledger.assert_kept(&rig.sql().await).await;
    let left = until_no_leak(&rig).await;
    report(
        "blackhole",
        format!(
            "{}; all: {}; {kept} compared, 0 lost, 0 doubled; {left} backends left",
            counted.join(" | "),
            ledger.summary()
        ),
    );
    rig.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_database_that_is_far_away_serves_all_the_same() {
    let _turn = serialize().await;
    let rig = Cluster::proxied(&[("DB_POOL_SIZE", "8")]).await;
    // Half of it each way; connections are made anew as well.
    rig.proxy().turns(NetworkCondition::Asleep(Duration::ZERO));
    rig.proxy()
        .turns(NetworkCondition::Slow(Duration::from_millis(100)));
    let begin = Instant::now();
    let load = rig.load(8, 4);
    sleep(short_or_full(
        Duration::from_secs(5),
        Duration::from_secs(60),
    ))
    .await;
    let ledger = load.end().await;
    ledger.assert_all_answered_within(ANSWERED);
    let kept = ledger.assert_kept(&rig.sql().await).await;
    let answers = ledger.asked(begin, Instant::now());
    let bad = answers.iter().filter(|answer| !answer.is_good()).count();
    report(
        "200 ms of latency",
        format!("{}; {kept} compared, 0 lost, 0 doubled", ledger.summary()),
    );
    assert!(answers.len() > 100, "{}", summary(&answers));
    assert!(20 * bad <= answers.len(), "{}", summary(&answers));
    until_no_leak(&rig).await;
    rig.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_that_break_in_mid_answer_cost_no_acknowledged_task() {
    let _turn = serialize().await;
    let rig = Cluster::proxied(&[("DB_POOL_SIZE", "8")]).await;
    let load = rig.load(8, 4);
    let ledger = load.ledger.clone();
    let begin = Instant::now();
    let rounds = short_or_full(8, 100);
    for _ in 0..rounds {
        rig.proxy().turns(NetworkCondition::Reset);
        sleep(Duration::from_millis(100)).await;
        rig.proxy().turns(NetworkCondition::Fair);
        let calm = Instant::now();
        until("both are served in between", async || {
            ledger.good_since(calm, Work::Read) > 10 && ledger.good_since(calm, Work::Write) > 5
        })
        .await;
    }
    let flapping = ledger.asked(begin, Instant::now());

    // And when every answer breaks for long.
    let storm = Instant::now();
    rig.proxy().turns(NetworkCondition::Reset);
    sleep(short_or_full(
        Duration::from_secs(2),
        Duration::from_secs(10),
    ))
    .await;
    let over = Instant::now();
    rig.proxy().turns(NetworkCondition::Fair);
    let healed = until_well(&ledger, over).await;
    assert!(healed < HEALED, "well only after {healed:?}");
    let ledger = load.end().await;
    ledger.assert_all_answered_within(ANSWERED);
    let kept = ledger.assert_kept(&rig.sql().await).await;
    let left = until_no_leak(&rig).await;
    report(
        "reset in mid-answer",
        format!(
            "{rounds} × 100 ms: {}; for long: {}; well {healed:.1?} after; {kept} compared, 0 lost, 0 doubled; {left} backends left",
            summary(&flapping),
            summary(&ledger.asked(storm, over)),
        ),
    );
    let good = flapping.iter().filter(|answer| answer.is_good()).count();
    assert!(2 * good > flapping.len(), "{}", summary(&flapping));
    assert!(
        ledger
            .all()
            .iter()
            .all(|answer| answer.is_good() || answer.is_refusal("database_unavailable")),
        "{}",
        ledger.summary()
    );
    rig.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_that_only_we_remember_are_given_up() {
    let _turn = serialize().await;
    let rig = Cluster::proxied(&[("DB_POOL_SIZE", "8")]).await;
    let load = rig.load(8, 6);
    let ledger = load.ledger.clone();
    let mut counted = Vec::new();
    for _ in 0..short_or_full(1, 5) {
        let calm = Instant::now();
        until("there is a load", async || {
            ledger.good_since(calm, Work::Read) > 50 && ledger.good_since(calm, Work::Write) > 50
        })
        .await;
        let begin = Instant::now();
        rig.proxy().forgets();
        // Nothing tells a connection that is gone from a query that takes long, but the time-out.
        let healed = until_well(&ledger, begin).await;
        assert!(healed < ANSWERED + HEALED, "well only after {healed:?}");
        counted.push(format!(
            "well after {healed:.1?}: {}",
            summary(&ledger.asked(begin, Instant::now()))
        ));
    }
    let ledger = load.end().await;
    ledger.assert_all_answered_within(ANSWERED);
    let kept = ledger.assert_kept(&rig.sql().await).await;
    let left = until_no_leak(&rig).await;
    report(
        "half-open",
        format!(
            "{}; all: {}; {kept} compared, 0 lost, 0 doubled; {left} backends left",
            counted.join(" | "),
            ledger.summary()
        ),
    );
    rig.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_that_only_we_remember_cost_one_request_and_not_each_one() {
    let _turn = serialize().await;
    let rig = Cluster::proxied(&[("DB_POOL_SIZE", "8")]).await;
    let sql = rig.sql().await;
    let load = rig.load(8, 6);
    until("several connections are open", async || {
        backends(&sql).await.len() >= 5
    })
    .await;
    load.end().await;
    rig.proxy().forgets();
    let begin = Instant::now();
    // Somebody alone, who takes one connection after another.
    let load = rig.load(0, 1);
    let healed = until_well(&load.ledger, begin).await;
    let ledger = load.end().await;
    report(
        "half-open, one client",
        format!("well after {healed:.1?}: {}", ledger.summary()),
    );
    ledger.assert_all_answered_within(ANSWERED);
    assert!(healed < ANSWERED + HEALED, "well only after {healed:?}");
    let failed = ledger
        .all()
        .iter()
        .filter(|answer| !answer.is_good())
        .count();
    assert!(failed <= 2, "{}", ledger.summary());
    rig.end().await;
}

/// What is revoked is read before what is known of it becomes too old to be used.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_request_waits_for_revocations_to_be_read() {
    const ONE_WAY: Duration = Duration::from_millis(75);
    let _turn = serialize().await;
    let rig = Cluster::proxied(&[]).await;
    rig.proxy().turns(NetworkCondition::Slow(ONE_WAY));
    let started = Instant::now();
    let mut waits = 0;
    let mut requests = 0;
    while started.elapsed() < Duration::from_secs(4) {
        let sent = Instant::now();
        // Refused by what is known of revocations alone.
        let request = rig.server.get(OTHER_USERS_TASKS);
        request
            .bearer(&rig.user.access_token)
            .send()
            .await
            .expect(403);
        // The first one may have to wait, and a busy machine may stall once.
        waits += usize::from(sent.elapsed() >= 2 * ONE_WAY);
        requests += 1;
        sleep(Duration::from_millis(10)).await;
    }
    report(
        "revocations read ahead",
        format!("{waits} of {requests} requests waited"),
    );
    assert!(waits <= 2, "{waits} of {requests} requests waited");
}
