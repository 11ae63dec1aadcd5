//! Hashing is slow on purpose; it must be slow for nobody but those who sign in.

use std::sync::atomic::{AtomicBool, Ordering};

use futures_util::future::join_all;
use rustix::process::{Resource, getrlimit, setrlimit};

use crate::auth::{login, register};
use crate::harness::{PASSWORD, Server};

/// Opens as many files as the machine allows: each of the storm's clients is a socket.
fn lift_file_limit() {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    setrlimit(Resource::Nofile, limit).expect("a higher limit");
}

/// More than the queue holds at once, from people whom nothing else would hold back.
#[tokio::test]
async fn when_too_many_sign_in_some_are_told_to_come_back_and_reads_go_on() {
    lift_file_limit();
    // The queue grows with the cores.
    let clients = 200 * std::thread::available_parallelism().map_or(1, |cores| cores.get());
    let server = Server::with(&[("BCRYPT_COST", "11")]).await;
    let ann = server.user().await;
    let task = ann.create_task("water the plants").await;
    let path = ann.path_of(&task);

    let over = AtomicBool::new(false);
    let storm = async {
        let answers = join_all((0..clients).map(|n| {
            let server = &server;
            async move { login(server, &format!("nobody{n}@example.com"), PASSWORD).await }
        }))
        .await;
        over.store(true, Ordering::Relaxed);
        answers
    };
    let reads = async {
        let mut served = 0;
        while !over.load(Ordering::Relaxed) {
            server
                .get(&path)
                .bearer(&ann.access_token)
                .await
                .expect(200);
            served += 1;
        }
        served
    };
    let (answers, served) = tokio::join!(storm, reads);

    let mut checked = 0;
    let mut shed = 0;
    for answer in answers {
        if answer.status == 503 {
            let wait: u32 = answer.header("retry-after").parse().expect("seconds");
            assert!(wait >= 1);
            answer.problem(503, "overloaded");
            shed += 1;
        } else {
            answer.problem(401, "invalid_credentials");
            checked += 1;
        }
    }
    println!("{checked} checked, {shed} shed, {served} reads meanwhile");
    assert!(shed > 0, "nothing bounds the queue");
    assert!(checked > 0);
    // Each check takes some hundred milliseconds of a core; a read waits for none of them.
    assert!(
        served >= 10 * checked.min(20),
        "{served} reads beside {checked} checks"
    );

    // It is over when it is over: the next one is served at once.
    register(&server, "late@example.com", PASSWORD)
        .await
        .expect(201);
    login(&server, &ann.email, &ann.password).await.expect(200);
}
