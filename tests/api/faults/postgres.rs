//! Faults of the database itself.

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
    ANSWERED, Cluster, HEALED, backends, family,
    load::{Addresses, Client, Credentials, Load, Outcome, Work, percentile, summary},
    report, serialize, short_or_full, signal_all, until_well,
};
use crate::harness::{DataDir, Process, SECRET, Server, until};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_frozen_database_is_noticed_refused_at_once_and_found_again() {
    let _turn = serialize().await;
    let rounds = short_or_full(1, 5);
    let mut counted = Vec::new();
    let rig = Cluster::direct(&[("DB_POOL_SIZE", "20")]).await;
    let sql = rig.sql().await;
    let load = rig.load(8, 4);
    let ledger = load.ledger.clone();
    for _ in 0..rounds {
        let calm = Instant::now();
        until("there is a load", async || {
            ledger.good_since(calm, Work::Read) > 50 && ledger.good_since(calm, Work::Write) > 20
        })
        .await;
        let before = backends(&sql).await;
        let lost = rig.server.log().matches("database lost").count();

        let frozen = family(rig.directory.postgres().unwrap());
        let freeze = Instant::now();
        signal_all(&frozen, Signal::STOP);
        until("its absence is noticed", async || {
            rig.server.log().matches("database lost").count() > lost
        })
        .await;
        let noticed = freeze.elapsed();
        assert!(noticed < ANSWERED, "noticed after {noticed:?}");

        // From here on everybody is refused at once.
        let known = Instant::now();
        sleep(short_or_full(
            Duration::from_secs(2),
            Duration::from_secs(10),
        ))
        .await;
        rig.server.get("/healthz").send().await.expect(200);
        let unready = rig.server.get("/readyz").send().await;
        unready.problem(503, "database_unavailable");
        unready.header("retry-after");
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

        let thaw = Instant::now();
        signal_all(&frozen, Signal::CONT);
        let healed = until_well(&ledger, thaw).await;
        assert!(healed < HEALED, "well only after {healed:?}");
        until("it is ready", async || {
            rig.server.get("/readyz").send().await.status == 200
        })
        .await;
        until("the stuck connections are closed", async || {
            let now = backends(&sql).await;
            now.len() <= 20 && !now.iter().any(|pid| before.contains(pid))
        })
        .await;
        counted.push(format!(
            "noticed after {noticed:.1?}, away: {}; well {healed:.1?} after",
            summary(&away)
        ));
    }
    let ledger = load.end().await;
    ledger.assert_all_answered_within(ANSWERED);
    ledger.assert_kept(&sql).await;
    report(
        "PostgreSQL frozen",
        format!(
            "{} × ({}); all: {}",
            rounds,
            counted.join(" | "),
            ledger.summary()
        ),
    );
    rig.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_statement_that_takes_long_is_not_taken_for_a_lost_database() {
    let _turn = serialize().await;
    let rig = Cluster::direct(&[("DB_POOL_SIZE", "4")]).await;
    let task = format!("{}/{}", rig.user.tasks(), rig.task);
    let load = rig.load(6, 4);
    let ledger = load.ledger.clone();
    let sql = rig.sql().await;
    // One is kept to ask whether the database is there.
    until("every connection of the pool is open", async || {
        backends(&sql).await.len() >= 3
    })
    .await;
    let rounds = short_or_full(1, 5);
    let mut during = Vec::new();
    for _ in 0..rounds {
        let mut locking = rig.sql().await;
        let lock = locking.transaction().await.unwrap();
        lock.execute(
            "select from tasks where id::text = $1 for update",
            &[&rig.task],
        )
        .await
        .unwrap();
        // Waits for the lock: longer than a probe takes, shorter than a request may.
        let begin = Instant::now();
        let edit = rig.server.patch(&task).bearer(&rig.user.access_token);
        let edit = tokio::spawn(edit.json(serde_json::json!({"completed": true})).send());
        sleep(Duration::from_millis(3500)).await;
        lock.commit().await.unwrap();
        edit.await.unwrap().expect(200);
        during.extend(ledger.asked(begin, Instant::now()));
    }
    load.end().await;
    report(
        "slow statement, full pool",
        format!("{rounds} × 3.5 s; others: {}", summary(&during)),
    );
    assert!(
        !rig.server.log().contains("database lost"),
        "{}",
        rig.server.log()
    );
    assert!(during.len() > 100, "{}", summary(&during));
    assert!(
        during.iter().all(|answer| answer.is_good()),
        "{}",
        summary(&during)
    );
    rig.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_acknowledged_outlives_a_killed_database() {
    let _turn = serialize().await;
    let kills = short_or_full(3, 20);
    let rig = Cluster::direct(&[("DB_POOL_SIZE", "8")]).await;
    let load = rig.load(2, 8);
    let ledger = load.ledger.clone();
    let mut slowest = Duration::ZERO;
    for round in 0..kills {
        let calm = Instant::now();
        until("there is a load", async || {
            ledger.good_since(calm, Work::Write) > 100
        })
        .await;
        let postmaster = rig.directory.postgres().unwrap();
        let mut victims = family(postmaster);
        match round % 3 {
            // All at once, as when the power goes.
            0 => {}
            // The postmaster alone; the others notice.
            1 => victims.truncate(1),
            // A child alone; the postmaster lets all others start anew.
            _ => {
                let sql = rig.sql().await;
                let pid = backends(&sql).await[0];
                victims = vec![Pid::from_raw(pid).unwrap()];
            }
        }
        signal_all(&victims, Signal::KILL);
        let killed = Instant::now();
        until("writes are acknowledged again", async || {
            ledger.good_since(killed, Work::Write) > 20
        })
        .await;
        slowest = slowest.max(killed.elapsed());
    }
    let ledger = load.end().await;
    ledger.assert_all_answered_within(ANSWERED);
    let kept = ledger.assert_kept(&rig.sql().await).await;
    assert!(kept >= 100 * kills, "{kept} acknowledged");
    report(
        "PostgreSQL killed",
        format!(
            "{kills} × kill -9, slowest back after {slowest:.1?}; {}; {kept} compared, 0 lost, 0 doubled",
            ledger.summary()
        ),
    );
    rig.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn reads_do_not_fail_while_backends_are_terminated() {
    let _turn = serialize().await;
    let rig = Cluster::direct(&[("DB_POOL_SIZE", "8")]).await;
    let sql = rig.sql().await;
    let load = rig.load(8, 4);
    let ledger = load.ledger.clone();
    let time = short_or_full(Duration::from_secs(4), Duration::from_secs(60));
    let begin = Instant::now();
    let (mut rounds, mut terminated) = (0, 0);
    while begin.elapsed() < time {
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
    let calm = Instant::now();
    until("writes are acknowledged again", async || {
        ledger.good_since(calm, Work::Write) > 20
    })
    .await;
    let ledger = load.end().await;
    ledger.assert_all_answered_within(ANSWERED);
    let kept = ledger.assert_kept(&sql).await;
    let (reads, writes): (Vec<_>, Vec<_>) = ledger
        .all()
        .into_iter()
        .partition(|answer| answer.work == Work::Read);
    report(
        "backends terminated",
        format!(
            "{rounds} × all, {terminated} backends; reads: {}; writes: {}; {kept} compared, 0 lost, 0 doubled",
            summary(&reads),
            summary(&writes)
        ),
    );
    assert!(terminated > rounds, "nothing was hit");
    assert!(reads.len() > 200, "{}", summary(&reads));
    assert!(
        reads.iter().all(|read| read.is_good()),
        "{}",
        summary(&reads)
    );
    assert!(
        writes
            .iter()
            .all(|write| write.is_good() || write.is_refusal("database_unavailable")),
        "{}",
        summary(&writes)
    );
    let good = writes.iter().filter(|write| write.is_good()).count();
    assert!(2 * good > writes.len(), "{}", summary(&writes));
    rig.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_disk_loses_nothing_that_was_acknowledged() {
    if !geteuid().is_root() || !may_mount() {
        report(
            "disk full",
            "SKIPPED: mounting a tmpfs is not permitted here",
        );
        return;
    }
    let _turn = serialize().await;
    let directory = DataDir::new();
    // In a mount namespace of its own the small disk goes with the processes on it.
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

    let mut sign_up = Client::at(address);
    let mut asker = None;
    until("somebody can register", async || {
        let body = r#"{"email": "full@example.com", "password": "mossy-Lantern-42-harbour"}"#;
        let request = hyper::Request::post("/api/v1/auth/register")
            .header("host", "todo.example")
            .body(body.into())
            .unwrap();
        let heard = sign_up.ask(request).await;
        asker =
            (heard.fate == Outcome::Status(201)).then(|| Credentials::from_tokens(&heard.json()));
        asker.is_some()
    })
    .await;
    let load = Load::on(&Addresses::of(&[address])).writing(4, &asker.unwrap());
    let ledger = load.ledger.clone();
    let mut counted = Vec::new();
    for round in 0..short_or_full(1, 3) {
        let calm = Instant::now();
        until("writes are acknowledged", async || {
            ledger.good_since(calm, Work::Write) > 50
        })
        .await;

        let ballast = disk.join(format!("ballast{round}"));
        fill(&ballast);
        let full = Instant::now();
        until("writes are refused", async || {
            let since = ledger.asked(full, Instant::now());
            since.iter().filter(|answer| !answer.is_good()).count() > 50
        })
        .await;
        process_answers(address).await;

        fs::remove_file(&ballast).unwrap();
        let room = Instant::now();
        until("writes are acknowledged again", async || {
            ledger.good_since(room, Work::Write) > 50
        })
        .await;
        counted.push(format!(
            "full: {}; acknowledged again after {:.1?}",
            summary(&ledger.asked(full, room)),
            room.elapsed()
        ));
    }
    let ledger = load.end().await;
    ledger.assert_all_answered_within(ANSWERED);
    let refusals = ledger.all();
    assert!(
        refusals
            .iter()
            .all(|answer| answer.is_good() || answer.is_refusal("database_unavailable")),
        "{}",
        ledger.summary()
    );
    let mut sql = None;
    until("PostgreSQL takes connections", async || {
        sql = connect().await;
        sql.is_some()
    })
    .await;
    let kept = ledger.assert_kept(&sql.unwrap()).await;
    report(
        "disk full",
        format!(
            "{}; all: {}; {kept} compared, 0 lost, 0 doubled",
            counted.join(" | "),
            ledger.summary()
        ),
    );
    assert_eq!(process.stop().await.code(), Some(0), "{}", process.log());
}

/// A disk with room for a cluster and little more, then the program in this very process.
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

/// Writes until there is no room.
fn fill(ballast: &Path) {
    use std::io::Write;
    let mut file = fs::File::create(ballast).unwrap();
    for size in [1 << 20, 4096, 1] {
        while file.write_all(&vec![0; size]).is_ok() {}
    }
}

async fn process_answers(address: std::net::SocketAddr) {
    let request = hyper::Request::get("/healthz").header("host", "todo.example");
    let heard = Client::at(address)
        .ask(request.body(Default::default()).unwrap())
        .await;
    assert_eq!(heard.fate, Outcome::Status(200));
}

#[tokio::test]
async fn a_database_that_is_late_is_waited_for_with_a_line_now_and_then() {
    let directory = DataDir::new();
    Postgres::start(directory.path())
        .await
        .unwrap()
        .stop()
        .await;
    let url = directory.database_url();
    let server = Server::listening(&[("DATABASE_URL", &url)]).await;
    let begin = Instant::now();

    // What only looks does not wait.
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
    let mut refused = 0;
    while begin.elapsed() < short_or_full(Duration::from_secs(3), Duration::from_secs(35)) {
        server.get("/healthz").send().await.expect(200);
        let early = server.get("/readyz").send().await;
        early.problem(503, "database_unavailable");
        refused += 1;
        sleep(Duration::from_millis(50)).await;
    }
    let lines = waits();
    // Every ten seconds or so.
    assert!(
        lines >= 1 && lines <= 2 + begin.elapsed().as_secs() / 10,
        "{}",
        server.log()
    );

    let postgres = Postgres::start(directory.path()).await.unwrap();
    let there = Instant::now();
    until("it is ready", async || {
        server.get("/readyz").send().await.status == 200
    })
    .await;
    let ready = there.elapsed();
    assert!(ready < HEALED, "ready only after {ready:?}");
    let user = server.user().await;
    user.create_task("patience").await;
    report(
        "not there at start",
        format!("{refused} × 503 meanwhile, {lines} lines, ready {ready:.1?} after it came"),
    );
    assert_eq!(server.stop().await.code(), Some(0));
    postgres.stop().await;
}
