//! Faults of the database server.

use std::{
    fs,
    path::Path,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, geteuid};
use todo_api::embedded_postgres::Postgres;
use tokio::time::sleep;

use super::{
    Cluster, RECOVERY_TIMEOUT, RESPONSE_TIMEOUT, assert_outage_is_survived, backends,
    load::{Addresses, Client, Credentials, Load, Outcome, RequestRecord, Work, summary},
    process_and_children, report, short_or_full, signal_all, start_light_load, until_served,
};
use crate::harness::{DataDir, Process, SECRET, Server, until};
use crate::metrics::gauge;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn detects_a_frozen_database_and_recovers() {
    let _guard = start_light_load().await;
    let rounds = short_or_full(1, 5);
    let mut counts = Vec::new();
    let cluster = Cluster::direct(&[("DB_POOL_SIZE", "20")]).await;
    let sql = cluster.sql().await;
    let load = cluster.load(8, 4);
    for _ in 0..rounds {
        until_served(&load.requests, 50, 20).await;
        let before = backends(&sql).await;
        let processes = process_and_children(cluster.directory.postgres().unwrap());
        let outage = assert_outage_is_survived(
            &cluster,
            &load.requests,
            || signal_all(&processes, Signal::STOP),
            || signal_all(&processes, Signal::CONT),
        );
        counts.push(outage.await);
        until("the service is ready", async || {
            cluster.server.get("/readyz").await.status == 200
        })
        .await;
        until("the frozen connections are closed", async || {
            let now = backends(&sql).await;
            now.len() <= 20 && !now.iter().any(|pid| before.contains(pid))
        })
        .await;
    }
    let requests = load.finish().await;
    requests.assert_all_responded_within(RESPONSE_TIMEOUT);
    let kept = requests.assert_durable(&sql).await;
    report(
        "PostgreSQL frozen",
        format!(
            "{rounds} × ({}); all: {}; {kept} tasks verified",
            counts.join(" | "),
            requests.summary()
        ),
    );
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_users_slow_writes_affect_no_other_user_and_are_not_mistaken_for_a_lost_database() {
    let _guard = start_light_load().await;
    let cluster = Cluster::direct(&[("DB_POOL_SIZE", "8")]).await;
    let slow = cluster.server.user().await;
    let task = slow.create_task("slow").await;
    let load = cluster.load(6, 4);
    let requests = load.requests.clone();
    let sql = cluster.sql().await;
    until("several connections are open", async || {
        backends(&sql).await.len() >= 3
    })
    .await;
    let rounds = short_or_full(1, 5);
    let mut during = Vec::new();
    for _ in 0..rounds {
        let mut locking = cluster.sql().await;
        let lock = locking.transaction().await.unwrap();
        lock.execute(
            "select from tasks where id::text = $1 for update",
            &[&task["id"].as_str().unwrap()],
        )
        .await
        .unwrap();
        // The updates wait for the lock: long enough for a probe, but within the deadline.
        let start = Instant::now();
        let edit = || {
            let edit = slow.patch(slow.path_of(&task));
            tokio::spawn(edit.json(serde_json::json!({"completed": true})).send())
        };
        let edits: Vec<_> = (0..12).map(|_| edit()).collect();
        sleep(Duration::from_millis(3500)).await;
        lock.commit().await.unwrap();
        let mut served = 0;
        for edit in edits {
            let response = edit.await.unwrap();
            if response.status == 200 {
                served += 1;
            } else {
                response.problem(503, "overloaded");
            }
        }
        assert!(served > 0);
        during.extend(requests.sent_between(start, Instant::now()));
    }
    load.finish().await;
    report(
        "slow statement, full pool",
        format!("{rounds} × 3.5 s; others: {}", summary(&during)),
    );
    assert!(
        !cluster.server.log().contains("database lost"),
        "{}",
        cluster.server.log()
    );
    assert!(during.len() > 100, "{}", summary(&during));
    assert!(
        during.iter().all(|request| request.is_success()),
        "{}",
        summary(&during)
    );
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn acknowledged_tasks_survive_a_killed_database() {
    let _guard = start_light_load().await;
    let kills = short_or_full(3, 20);
    let cluster = Cluster::direct(&[("DB_POOL_SIZE", "8")]).await;
    let load = cluster.load(2, 8);
    let requests = load.requests.clone();
    let mut slowest = Duration::ZERO;
    for round in 0..kills {
        until_served(&requests, 0, 101).await;
        let postmaster = cluster.directory.postgres().unwrap();
        let mut killed_processes = process_and_children(postmaster);
        match round % 3 {
            // All processes, as in a power failure.
            0 => {}
            // The postmaster only; its children exit when they notice.
            1 => killed_processes.truncate(1),
            // One backend; the postmaster restarts all others.
            _ => {
                let sql = cluster.sql().await;
                let pid = backends(&sql).await[0];
                killed_processes = vec![Pid::from_raw(pid).unwrap()];
            }
        }
        signal_all(&killed_processes, Signal::KILL);
        let killed = Instant::now();
        until_served(&requests, 0, 21).await;
        slowest = slowest.max(killed.elapsed());
    }
    let requests = load.finish().await;
    requests.assert_all_responded_within(RESPONSE_TIMEOUT);
    let kept = requests.assert_durable(&cluster.sql().await).await;
    assert!(kept >= 100 * kills, "{kept} acknowledged");
    report(
        "PostgreSQL killed",
        format!(
            "{kills} × kill -9, slowest recovery {slowest:.1?}; {}; {kept} tasks verified",
            requests.summary()
        ),
    );
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn reads_succeed_while_backends_are_terminated() {
    let _guard = start_light_load().await;
    let cluster = Cluster::direct(&[("DB_POOL_SIZE", "8")]).await;
    let sql = cluster.sql().await;
    let load = cluster.load(8, 4);
    let requests = load.requests.clone();
    let (mut rounds, mut terminated) = (0, 0);
    while rounds < short_or_full(10, 300) || requests.all().len() < 400 {
        let row = sql
            .query_one(
                "select count(pg_terminate_backend(pid)) from pg_stat_activity
                 where application_name = 'todo-api'",
                &[],
            )
            .await
            .unwrap();
        rounds += 1;
        terminated += row.get::<_, i64>(0);
        sleep(Duration::from_millis(200)).await;
    }
    until_served(&requests, 0, 21).await;
    let requests = load.finish().await;
    requests.assert_all_responded_within(RESPONSE_TIMEOUT);
    let kept = requests.assert_durable(&sql).await;
    let (reads, writes): (Vec<_>, Vec<_>) = requests
        .all()
        .into_iter()
        .partition(|request| request.work == Work::Read);
    report(
        "backends terminated",
        format!(
            "{rounds} rounds, {terminated} backends; reads: {}; writes: {}; {kept} tasks verified",
            summary(&reads),
            summary(&writes)
        ),
    );
    assert!(terminated > rounds, "no backend was terminated");
    assert!(reads.len() > 200, "{}", summary(&reads));
    assert!(
        reads.iter().all(|read| read.is_success()),
        "{}",
        summary(&reads)
    );
    assert!(
        writes
            .iter()
            .all(|write| write.is_success() || write.is_retryable_503("database_unavailable")),
        "{}",
        summary(&writes)
    );
    let good = writes.iter().filter(|write| write.is_success()).count();
    assert!(2 * good > writes.len(), "{}", summary(&writes));
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_disk_loses_no_acknowledged_task() {
    if !geteuid().is_root() || !may_mount() {
        report(
            "disk full",
            "SKIPPED: mounting a tmpfs is not permitted here",
        );
        return;
    }
    let _guard = start_light_load().await;
    let directory = DataDir::new();
    // The mount is removed with the last process in its mount namespace.
    let mut command = Command::new("unshare");
    command
        .args(["-m", "sh", "-c", SMALL_DISK, "small-disk"])
        .arg(directory.parent())
        .arg(env!("CARGO_BIN_EXE_todo-api"))
        .stdin(Stdio::null())
        .stdout(Stdio::null());
    let process = Process::run(
        command,
        &[
            ("DATA_DIR", directory.text()),
            ("JWT_SECRET", SECRET),
            ("LISTEN_ADDR", "127.0.0.1:0"),
            ("BCRYPT_COST", "10"),
            ("AUTH_RATE_PER_MINUTE", "0"),
            ("WRITES_PER_MINUTE", "0"),
        ],
    );
    let address = process.listening().await;
    let disk = format!("/proc/{}/root{}", process.pid(), directory.text());
    let disk = Path::new(&disk);
    let connect = async || {
        let mut config = tokio_postgres::Config::new();
        config
            .host_path(disk.join("socket"))
            .user("todo")
            .dbname("todo");
        let (client, connection) = config.connect(tokio_postgres::NoTls).await.ok()?;
        tokio::spawn(connection);
        Some(client)
    };

    let mut client = Client::at(address);
    let mut credentials = None;
    until("registration succeeds", async || {
        let body = r#"{"email": "full@example.com", "password": "mossy-Lantern-42-harbour"}"#;
        let request = hyper::Request::post("/api/v1/auth/register")
            .header("host", "todo.example")
            .body(body.into())
            .unwrap();
        let response = client.send(request).await;
        credentials = (response.outcome == Outcome::Status(201))
            .then(|| Credentials::from_tokens(&response.json()));
        credentials.is_some()
    })
    .await;
    let load = Load::new(&Addresses::new(&[address])).writing(4, &credentials.unwrap());
    let requests = load.requests.clone();
    let mut counts = Vec::new();
    for round in 0..short_or_full(1, 3) {
        until_served(&requests, 0, 51).await;
        let ballast = disk.join(format!("ballast{round}"));
        fill(&ballast);
        let full = Instant::now();
        until("writes fail", async || {
            let since = requests.sent_between(full, Instant::now());
            since.iter().filter(|request| !request.is_success()).count() > 50
        })
        .await;
        assert_healthy(address).await;

        fs::remove_file(&ballast).unwrap();
        let freed = Instant::now();
        until_served(&requests, 0, 51).await;
        counts.push(format!(
            "while full: {}; recovered after {:.1?}",
            summary(&requests.sent_between(full, freed)),
            freed.elapsed()
        ));
    }
    let requests = load.finish().await;
    requests.assert_all_responded_within(RESPONSE_TIMEOUT);
    let is_expected = |request: &RequestRecord| {
        request.is_success() || request.is_retryable_503("database_unavailable")
    };
    assert!(
        requests.all().iter().all(is_expected),
        "{}",
        requests.summary()
    );
    let mut sql = None;
    until("PostgreSQL accepts connections", async || {
        sql = connect().await;
        sql.is_some()
    })
    .await;
    let kept = requests.assert_durable(&sql.unwrap()).await;
    report(
        "disk full",
        format!(
            "{}; all: {}; {kept} tasks verified",
            counts.join(" | "),
            requests.summary()
        ),
    );
    assert_eq!(process.stop().await.code(), Some(0), "{}", process.log());
}

/// Mounts a disk with room for a cluster and little more, then replaces the shell with the program.
const SMALL_DISK: &str = r#"
mount --make-rprivate / && mount -t tmpfs -o size=96m,mode=0755 tmpfs "$1" && cd "$1" && exec "$2"
"#;

fn may_mount() -> bool {
    let mut command = Command::new("unshare");
    let mount = command.args(["-m", "sh", "-c", "mount -t tmpfs tmpfs /mnt"]);
    mount
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success())
}

/// Fills the disk.
fn fill(ballast: &Path) {
    use std::io::Write;
    let mut file = fs::File::create(ballast).unwrap();
    for size in [1 << 20, 4096, 1] {
        while file.write_all(&vec![0; size]).is_ok() {}
    }
}

async fn assert_healthy(address: std::net::SocketAddr) {
    let request = hyper::Request::get("/healthz").header("host", "todo.example");
    let response = Client::at(address)
        .send(request.body(Default::default()).unwrap())
        .await;
    assert_eq!(response.outcome, Outcome::Status(200));
}

#[tokio::test]
async fn waits_for_a_database_that_is_unavailable_at_startup() {
    let directory = DataDir::initialized().await;
    let url = directory.database_url();
    let variables = [("DATABASE_URL", &*url), ("METRICS_ADDR", "127.0.0.1:0")];
    let server = Server::listening(&variables).await;
    let start = Instant::now();

    // `check` does not wait.
    let check = Process::spawn(
        &["check"],
        &[("DATABASE_URL", &url), ("JWT_SECRET", SECRET)],
    );
    assert_eq!(check.ended().await.code(), Some(1), "{}", check.output());
    assert!(
        check.output().contains("cannot be used"),
        "{}",
        check.output()
    );

    server.wait_for_log("waiting for the database").await;
    let waits = || server.log().matches("waiting for the database").count() as u64;
    let mut rejected = 0;
    while start.elapsed() < short_or_full(Duration::from_secs(1), Duration::from_secs(35)) {
        server.get("/healthz").await.expect(200);
        let early = server.get("/readyz").await;
        early.problem(503, "database_unavailable");
        rejected += 1;
        sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(gauge(&server, "todo_api_database_up").await, 0);
    let lines = waits();
    // Logged about every ten seconds.
    assert!(
        lines >= 1 && lines <= 2 + start.elapsed().as_secs() / 10,
        "{}",
        server.log()
    );

    let postgres = Postgres::start(directory.path()).await.unwrap();
    let started = Instant::now();
    until("the service is ready", async || {
        server.get("/readyz").await.status == 200
    })
    .await;
    let ready = started.elapsed();
    assert!(ready < RECOVERY_TIMEOUT, "ready only after {ready:?}");
    assert_eq!(gauge(&server, "todo_api_database_up").await, 1);
    let user = server.user().await;
    user.create_task("created late").await;
    report(
        "unavailable at startup",
        format!(
            "{rejected} × 503, {lines} log lines, ready {ready:.1?} after the database started"
        ),
    );
    assert_eq!(server.stop().await.code(), Some(0));
    postgres.stop().await;
}
