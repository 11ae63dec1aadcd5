//! Password hashing does not slow down other requests, and its queue is bounded.

use std::collections::BTreeMap;
use std::fs;
use std::sync::atomic::{AtomicBool, Ordering};

use futures_util::future::join_all;

use crate::auth::{login, register};
use crate::faults::raise_file_limit;
use crate::harness::{PASSWORD, Server};

#[tokio::test]
async fn sheds_logins_when_the_hash_queue_is_full_while_reads_continue() {
    raise_file_limit();
    // More clients than the capacity of the queue, which grows with the number of cores.
    let clients = 40 * std::thread::available_parallelism().map_or(1, |cores| cores.get());
    // Enough connections for the logins and the reads, so that the pool is not the limit.
    let server = Server::with(&[("DB_POOL_SIZE", "20")]).await;
    let ann = server.user().await;
    let path = ann.path_of(&ann.create_task("water the plants").await);

    let logins_done = AtomicBool::new(false);
    let logins = async {
        let responses = join_all((0..clients).map(|n| {
            let server = &server;
            async move { login(server, &format!("nobody{n}@example.com"), PASSWORD).await }
        }))
        .await;
        logins_done.store(true, Ordering::Relaxed);
        responses
    };
    let reads = async {
        let mut reads = 0;
        while !logins_done.load(Ordering::Relaxed) {
            ann.get(&path).await.expect(200);
            reads += 1;
        }
        reads
    };
    let (responses, reads) = tokio::join!(logins, reads);

    let mut checked = 0;
    let mut shed = 0;
    for response in responses {
        if response.status == 503 {
            let retry_after: u32 = response.header("retry-after").parse().expect("seconds");
            assert!(retry_after >= 1);
            response.problem(503, "overloaded");
            shed += 1;
        } else {
            response.problem(401, "invalid_credentials");
            checked += 1;
        }
    }
    println!("{checked} logins checked, {shed} shed, {reads} reads meanwhile");
    assert!(shed > 0, "the queue is unbounded");
    assert!(checked > 0);
    // Reads that waited for logins would be fewer, because a login takes 50 ms of processor time.
    assert!(reads > checked, "{reads} reads, {checked} logins");

    let response = register(&server, "late@example.com", PASSWORD).await;
    response.expect(201);
    login(&server, &ann.email, &ann.password).await.expect(200);
}

#[cfg(target_os = "linux")]
#[tokio::test]
async fn each_core_has_a_hashing_thread_of_low_priority() {
    let server = Server::shared().await;
    let mut threads = BTreeMap::new();
    for thread in fs::read_dir(format!("/proc/{}/task", server.pid())).unwrap() {
        let stat = fs::read_to_string(thread.unwrap().path().join("stat")).unwrap();
        let (name, fields) = stat.rsplit_once(") ").unwrap();
        if let Some((_, number)) = name.split_once("(hash-") {
            // `nice` is field 19 of proc_pid_stat(5), and the name is field 2.
            let nice: i32 = fields.split(' ').nth(16).unwrap().parse().unwrap();
            threads.insert(number.parse::<usize>().unwrap(), nice);
        }
    }
    let cores = std::thread::available_parallelism().unwrap().get();
    assert_eq!(threads, (0..cores).map(|number| (number, 5)).collect());
}
