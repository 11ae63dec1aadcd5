//! More of everything than there should be: connections, requests, and clients without manners.

use std::{
    fs,
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use tokio::{
    io::AsyncWriteExt,
    net::{TcpSocket, TcpStream},
    sync::Semaphore,
    task::JoinSet,
    time::{interval, sleep, sleep_until},
};
use tokio_postgres::Client as Sql;

use super::{
    ANSWERED, Cluster, HEALED, backends,
    load::{Addresses, Answer, Client, Credentials, Load, RequestLog, Work, percentile, summary},
    memory,
    proxy::NetworkCondition,
    raise_file_limit, report, serialize, short_or_full,
};
use crate::harness::{Server, User, until};

/// Looks at the backends all the time; the most that it has seen at once.
fn watch_backends(sql: Sql) -> (Arc<AtomicUsize>, tokio::task::JoinHandle<()>) {
    let most = Arc::new(AtomicUsize::new(0));
    let seen = most.clone();
    let watching = tokio::spawn(async move {
        let mut ticks = interval(Duration::from_millis(50));
        loop {
            ticks.tick().await;
            seen.fetch_max(backends(&sql).await.len(), Ordering::Relaxed);
        }
    });
    (most, watching)
}

// FR-006
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_thousand_connections_are_served_over_twenty() {
    const CONNECTIONS: usize = 2000;
    raise_file_limit();
    let _turn = serialize().await;
    let rig = Cluster::direct(&[("DB_POOL_SIZE", "20")]).await;
    let (most, watching) = watch_backends(rig.sql().await);
    let pid = rig.server.pid();
    let idle = memory(pid).0;

    let mut clients = Vec::new();
    for _ in 0..CONNECTIONS {
        let mut client = Client::at(rig.server.addr());
        assert!(client.connect().await, "{} connected", clients.len());
        clients.push(client);
    }
    let ledger = Arc::new(RequestLog::default());
    let asker = rig.asker();
    let rounds = short_or_full(1, 6);
    // A round takes ten seconds: 200 requests a second, a fifth of them writes.
    let round = Duration::from_secs(10);
    let begin = tokio::time::Instant::now();
    let mut at_work = JoinSet::new();
    for (number, mut client) in clients.into_iter().enumerate() {
        let (ledger, asker, task) = (ledger.clone(), asker.clone(), rig.task.clone());
        at_work.spawn(async move {
            for turn in 0..rounds {
                sleep_until(begin + round * turn + round * number as u32 / CONNECTIONS as u32)
                    .await;
                let asked = Instant::now();
                if number % 5 == 0 {
                    let title = format!("round {turn} of {number}");
                    let heard = client
                        .ask(asker.create(&title, &title.replace(' ', "-")))
                        .await;
                    if ledger.note(Work::Write, asked, &heard) {
                        ledger.acknowledge(title, &heard);
                    }
                } else {
                    let heard = client.ask(asker.read(&format!("/{task}"))).await;
                    ledger.note(Work::Read, asked, &heard);
                }
            }
            // Open until all are done.
            client
        });
    }
    let clients = at_work.join_all().await;
    let (resident, peak) = memory(pid);
    watching.abort();
    drop(clients);
    let kept = ledger.assert_kept(&rig.sql().await).await;
    let most = most.load(Ordering::Relaxed);
    report(
        "2,000 connections",
        format!(
            "{}; at most {most} backends; {idle} KiB resident without them, {resident} KiB with them, {peak} KiB at most; {kept} compared, 0 lost, 0 doubled",
            ledger.summary()
        ),
    );
    let answers = ledger.all();
    assert_eq!(answers.len(), CONNECTIONS * rounds as usize);
    assert!(answers.iter().all(Answer::is_good), "{}", ledger.summary());
    assert!(most <= 20, "{most} backends");
    // 64 MiB are promised of the release build.
    assert!(peak < 128 * 1024, "{peak} KiB");
    rig.end().await;
}

/// Requests at a rate that does not wait for answers; connections as many as that takes.
async fn offer(
    address: SocketAddr,
    asker: &Credentials,
    rate: u32,
    time: Duration,
    what: &str,
) -> Arc<RequestLog> {
    let ledger = Arc::new(RequestLog::default());
    let idle: Arc<Mutex<Vec<Client>>> = Arc::default();
    let begin = tokio::time::Instant::now();
    let mut under_way = JoinSet::new();
    for number in 0.. {
        let due = begin + Duration::from_secs(1) * number / rate;
        if due > begin + time {
            break;
        }
        sleep_until(due).await;
        let mut client = idle
            .lock()
            .unwrap()
            .pop()
            .unwrap_or_else(|| Client::at(address));
        let (ledger, idle, asker) = (ledger.clone(), idle.clone(), asker.clone());
        let title = format!("{what} {number}");
        under_way.spawn(async move {
            let asked = Instant::now();
            let heard = client
                .ask(asker.create(&title, &title.replace(' ', "-")))
                .await;
            if ledger.note(Work::Write, asked, &heard) {
                ledger.acknowledge(title, &heard);
            }
            idle.lock().unwrap().push(client);
        });
    }
    under_way.join_all().await;
    ledger
}

// SC-003
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn twice_what_it_can_serve_is_shed_quickly_and_the_rest_is_served_in_time() {
    raise_file_limit();
    let _turn = serialize().await;
    // One of them is kept to ask whether the database is there.
    let rig = Cluster::proxied(&[("DB_POOL_SIZE", "5")]).await;
    // Four connections to a database 40 ms away carry 100 writes a second on any machine.
    let capacity = 100;
    rig.proxy()
        .turns(NetworkCondition::Slow(Duration::from_millis(20)));
    let address = rig.server.addr();
    let asker = rig.asker();
    // The connections are made.
    offer(
        address,
        &asker,
        capacity / 4,
        Duration::from_secs(2),
        "before",
    )
    .await;

    let time = short_or_full(Duration::from_secs(5), Duration::from_secs(60));
    let ledger = offer(address, &asker, 2 * capacity, time, "during").await;
    let over = Instant::now();
    let mut waited = None;
    while waited.is_none() && over.elapsed() < 2 * HEALED {
        let after = format!("after {:?}", over.elapsed());
        let calm = offer(
            address,
            &asker,
            capacity / 4,
            Duration::from_secs(1),
            &after,
        )
        .await;
        waited = calm
            .all()
            .iter()
            .all(Answer::is_good)
            .then(|| over.elapsed());
    }
    let kept = ledger.assert_kept(&rig.sql().await).await;
    let (served, shed): (Vec<_>, Vec<_>) = ledger.all().into_iter().partition(Answer::is_good);
    report(
        "twice the capacity",
        format!(
            "{} requests a second for {time:?}; served: {}; shed: {}; normal {waited:.1?} after, a second of looking included; {kept} compared, 0 lost, 0 doubled",
            2 * capacity,
            summary(&served),
            summary(&shed)
        ),
    );
    ledger.assert_all_answered_within(ANSWERED);
    assert!(
        shed.iter().all(|answer| answer.is_refusal("overloaded")),
        "{}",
        summary(&shed)
    );
    // Half of what is offered can be served; a quarter is on the safe side of noise.
    assert!(
        4 * served.len() > ledger.all().len(),
        "{}",
        ledger.summary()
    );
    assert!(
        percentile(&served, 95) < Duration::from_secs(1),
        "{}",
        summary(&served)
    );
    assert!(
        percentile(&shed, 95) < Duration::from_secs(1),
        "{}",
        summary(&shed)
    );
    assert!(waited.is_some_and(|waited| waited < HEALED), "{waited:?}");
    rig.end().await;
}

/// What a client without manners does.
#[derive(Clone, Copy)]
enum AbusiveClient {
    /// Sends half a head and no more.
    Silent,
    /// Sends a head byte by byte, one a second.
    SlowHead,
    /// Sends a body byte by byte, one a second.
    SlowBody,
    /// Asks for a megabyte of tasks time and again, and reads nothing.
    Deaf,
    /// The same with the largest file there is.
    DeafToDocs,
}

impl AbusiveClient {
    /// What a deaf one asks for.
    fn wanted(self, tasks: &str) -> &str {
        match self {
            AbusiveClient::DeafToDocs => "/docs/swagger-ui-bundle.js",
            _ => tasks,
        }
    }

    /// Does it until it is cut off, or for as long as a deaf one can know.
    async fn behave(
        self,
        address: SocketAddr,
        user: Arc<User>,
        lists: Arc<Semaphore>,
    ) -> TcpStream {
        let socket = TcpSocket::new_v4().unwrap();
        // What the kernel takes in for us counts as read.
        socket.set_recv_buffer_size(4096).unwrap();
        let mut stream = socket.connect(address).await.unwrap();
        let (tasks, token) = (user.tasks(), &user.access_token);
        let credentials = format!("Host: a\r\nAuthorization: Bearer {token}\r\n");
        let drop_by_drop = match self {
            AbusiveClient::Silent => {
                let half = format!("GET {tasks} HTTP/1.1\r\n{credentials}");
                stream.write_all(half.as_bytes()).await.unwrap();
                return stream;
            }
            AbusiveClient::SlowHead => format!("GET {tasks} HTTP/1.1\r\n{credentials}\r\n"),
            AbusiveClient::SlowBody => {
                let head =
                    format!("POST {tasks} HTTP/1.1\r\n{credentials}Content-Length: 400\r\n\r\n");
                stream.write_all(head.as_bytes()).await.unwrap();
                format!("{:400}", r#"{"title": "slowly"}"#)
            }
            AbusiveClient::Deaf | AbusiveClient::DeafToDocs => {
                let _place = lists.acquire().await.unwrap();
                // Several, because the kernel takes in the first few megabytes.
                let ask = format!("GET {} HTTP/1.1\r\n{credentials}\r\n", self.wanted(&tasks));
                let ask = ask.repeat(8);
                stream.write_all(ask.as_bytes()).await.unwrap();
                stream.readable().await.unwrap();
                return stream;
            }
        };
        for byte in drop_by_drop.as_bytes() {
            if stream.write_all(&[*byte]).await.is_err() {
                break;
            }
            sleep(Duration::from_secs(1)).await;
        }
        stream
    }
}

/// The connections that the service holds, as the kernel counts them.
fn connections(address: SocketAddr) -> usize {
    let port = format!(":{:04X}", address.port());
    let table = fs::read_to_string("/proc/net/tcp").unwrap();
    let is_held = |line: &&str| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let (local, state, inode) = (fields[1], fields[3], fields[9]);
        // Not the listener, and not what only the kernel still remembers.
        local.ends_with(&port) && state != "0A" && inode != "0"
    };
    table.lines().skip(1).filter(is_held).count()
}

/// So many tasks that their list has a megabyte and a bit.
const MEGABYTE: usize = 260;

async fn fill_a_megabyte(sql: &Sql, user: &User) {
    let filled = sql
        .execute(
            "insert into tasks (user_id, id, title, description, completed, created_at, updated_at)
             select $1::text::uuid, gen_random_uuid(), 'leaf', repeat('🌿', 1000), false, now(), now()
             from generate_series(1, $2::bigint)",
            &[&user.id, &(MEGABYTE as i64)],
        )
        .await
        .unwrap();
    assert_eq!(filled, MEGABYTE as u64);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rude_clients_are_cut_off_and_others_do_not_notice() {
    raise_file_limit();
    let _turn = serialize().await;
    let server = Server::with(&[("DB_POOL_SIZE", "8")]).await;
    let user = Arc::new(server.user().await);
    let sql = server.sql().await;
    fill_a_megabyte(&sql, &user).await;
    let polite = server.user().await;
    let task = polite.create_task("read me").await;
    let load = Load::on(&Addresses::of(&[server.addr()]))
        .reading(2, &Credentials::from(&polite), task["id"].as_str().unwrap())
        .writing(1, &Credentials::from(&polite));
    let ledger = load.ledger.clone();
    let calm = Instant::now();
    until("there is a load", async || {
        ledger.good_since(calm, Work::Read) > 50
    })
    .await;

    let pid = server.pid();
    let (before, idle) = (connections(server.addr()), memory(pid).0);
    let rude = short_or_full(160, 1000);
    let lists = Arc::new(Semaphore::new(2));
    let begin = Instant::now();
    let mut rude_ones = JoinSet::new();
    for number in 0..rude {
        let kind = match number % 4 {
            0 => AbusiveClient::Silent,
            1 => AbusiveClient::SlowHead,
            2 => AbusiveClient::SlowBody,
            // One user has no more than a few large lists at a time.
            _ if number < 8 => AbusiveClient::Deaf,
            _ => AbusiveClient::DeafToDocs,
        };
        rude_ones.spawn(kind.behave(server.addr(), user.clone(), lists.clone()));
    }
    // The deaf ones among them are kept here, unread, to the end.
    let mut streams = Vec::new();
    let mut most = 0;
    let bound = short_or_full(Duration::from_secs(60), Duration::from_secs(120));
    loop {
        while let Some(stream) = rude_ones.try_join_next() {
            streams.push(stream.unwrap());
        }
        most = most.max(connections(server.addr()));
        if streams.len() == rude && connections(server.addr()) <= before {
            break;
        }
        assert!(
            begin.elapsed() < bound,
            "{} of {} still hold a connection; {} have been cut off or gave up",
            connections(server.addr()).saturating_sub(before),
            rude,
            streams.len()
        );
        sleep(Duration::from_millis(100)).await;
    }
    let cut = begin.elapsed();
    let during = ledger.asked(begin, Instant::now());
    load.end().await;
    let (resident, peak) = memory(pid);
    report(
        "rude clients",
        format!(
            "{rude}, at most {} at once, all cut off after {cut:.0?}; others: {}; {idle} KiB resident before, {peak} KiB at most, {resident} KiB after",
            most - before,
            summary(&during)
        ),
    );
    assert!(
        most - before > rude / 2,
        "never more than {most} connections"
    );
    assert!(during.len() > 500, "{}", summary(&during));
    assert!(during.iter().all(Answer::is_good), "{}", summary(&during));
    assert!(
        percentile(&during, 95) < Duration::from_secs(1),
        "{}",
        summary(&during)
    );
    // What unread answers may take, and the connections themselves.
    let grown = peak.saturating_sub(idle);
    assert!(grown < 256 * 1024 + 64 * rude as u64, "{grown} KiB more");
    assert_eq!(server.stop().await.code(), Some(0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_one_user_leaves_unread_is_bounded_and_no_other_is_kept_waiting() {
    raise_file_limit();
    let _turn = serialize().await;
    let server = Server::with(&[("DB_POOL_SIZE", "8")]).await;
    let (user, other) = (Arc::new(server.user().await), server.user().await);
    let sql = server.sql().await;
    fill_a_megabyte(&sql, &user).await;
    fill_a_megabyte(&sql, &other).await;
    let list = async |user: &User| {
        let list = server.get(user.tasks()).bearer(&user.access_token);
        list.send().await
    };
    let whole = list(&user).await.expect(200).body.len();
    assert!(whole > 1024 * 1024, "{whole} bytes");

    let idle = memory(server.pid()).0;
    let deaf = short_or_full(40, 500);
    let lists = Arc::new(Semaphore::new(deaf));
    let mut rude_ones = JoinSet::new();
    for _ in 0..deaf {
        rude_ones.spawn(AbusiveClient::Deaf.behave(server.addr(), user.clone(), lists.clone()));
    }
    let streams = rude_ones.join_all().await;
    let mut slowest = Duration::ZERO;
    for _ in 0..short_or_full(5, 50) {
        let asked = Instant::now();
        let theirs = list(&other).await.expect(200);
        assert!(
            theirs.body.len() > 1024 * 1024,
            "{} bytes",
            theirs.body.len()
        );
        slowest = slowest.max(asked.elapsed());
    }
    assert!(slowest < ANSWERED, "{slowest:?}");
    let peak = memory(server.pid()).1;
    drop(streams);
    until("the user's own lists are served again", async || {
        list(&user).await.status == 200
    })
    .await;
    report(
        "unread lists",
        format!(
            "{deaf} clients of one user with 8 MiB each before them; {idle} KiB resident before, {peak} KiB at most; another's list after {slowest:.1?} at most",
        ),
    );
    let grown = peak.saturating_sub(idle);
    assert!(grown < 96 * 1024 + 128 * deaf as u64, "{grown} KiB more");
    assert_eq!(server.stop().await.code(), Some(0));
}
