//! Fair shares of the hashing threads and of searches: a victim is served while other clients send as many
//! requests as they can.

use std::{
    collections::BTreeMap,
    num::NonZero,
    sync::{Arc, Mutex},
    thread::available_parallelism,
    time::{Duration, Instant},
};

use serde_json::json;
use tokio::{
    task::JoinSet,
    time::{sleep, timeout},
};

use super::{raise_file_limit, report, short_or_full, start_heavy_load};
use crate::{
    harness::{PASSWORD, Request, Response, Server, User, until},
    metrics::scrape,
};

/// Clients that send requests continuously, until this is dropped.
struct Attack {
    statuses: Arc<Mutex<Vec<u16>>>,
    _clients: JoinSet<()>,
}

impl Attack {
    /// Starts `clients` clients, each of which sends the requests that `request` returns for its
    /// number and a counter.
    fn start(
        clients: usize,
        request: impl Fn(usize, usize) -> Request + Clone + Send + 'static,
    ) -> Attack {
        raise_file_limit();
        let statuses: Arc<Mutex<Vec<u16>>> = Arc::default();
        let mut running = JoinSet::new();
        for client in 0..clients {
            let (request, statuses) = (request.clone(), statuses.clone());
            running.spawn(async move {
                for count in 0.. {
                    // Fails when the server stops at the end of the test.
                    let Ok(response) = request(client, count).try_send().await else {
                        return;
                    };
                    statuses.lock().unwrap().push(response.status);
                    // Fast enough to exceed every share without overloading the test machine.
                    sleep(Duration::from_millis(400)).await;
                }
            });
        }
        Attack {
            statuses,
            _clients: running,
        }
    }

    /// Returns the number of responses received with this status.
    fn count(&self, status: u16) -> usize {
        let statuses = self.statuses.lock().unwrap();
        statuses.iter().filter(|other| **other == status).count()
    }

    async fn until_count(&self, status: u16, count: usize) {
        until("the attack is under way", async || {
            self.count(status) >= count
        })
        .await;
    }

    fn summary(&self) -> String {
        let mut counts = BTreeMap::<u16, usize>::new();
        for status in self.statuses.lock().unwrap().iter() {
            *counts.entry(*status).or_default() += 1;
        }
        format!("attack: {counts:?}")
    }
}

/// Sends the victim's requests one after another. Asserts that each succeeds, and that few of the attack's
/// requests, most of which were sent earlier, are served meanwhile. Returns a summary.
async fn assert_served(
    attack: &Attack,
    served: u16,
    rounds: usize,
    mut send: impl AsyncFnMut(usize) -> Response,
) -> String {
    let mut slowest = Duration::ZERO;
    let mut overtaken = 0;
    for round in 0..rounds {
        let (before, start) = (attack.count(served), Instant::now());
        let response = send(round).await;
        assert_eq!(response.status, 200, "{}", attack.summary());
        slowest = slowest.max(start.elapsed());
        overtaken += attack.count(served) - before;
        sleep(Duration::from_millis(200)).await;
    }
    let summary = format!(
        "{rounds} requests of the victim, slowest {slowest:.2?}, {overtaken} of the attack served meanwhile; {}",
        attack.summary()
    );
    // A queue without shares would serve at least 16 before.
    assert!(overtaken <= 12 * rounds, "{summary}");
    summary
}

fn log_in(server: &Server, email: &str, password: &str) -> Request {
    server
        .post("/api/v1/auth/login")
        .json(json!({"email": email, "password": password}))
}

/// A login waits for a busier network only while one of that network's passwords is being hashed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn serves_a_login_while_many_networks_log_in_continuously() {
    let _guard = start_heavy_load().await;
    let cost = short_or_full("10", "12");
    let cores = available_parallelism().map_or(1, NonZero::get);
    for (networks, clients) in [
        (1, 30 * cores),
        short_or_full((5, 40 * cores), (100, 100 * cores)),
    ] {
        let server = Arc::new(
            Server::with(&[
                ("TRUSTED_PROXIES", "127.0.0.1"),
                ("BCRYPT_COST", cost),
                // The logins must not compete for connections.
                ("DB_POOL_SIZE", "20"),
            ])
            .await,
        );
        let victim = server.user().await;
        let target = server.clone();
        let attack = Attack::start(clients, move |client, count| {
            let network = client % networks;
            log_in(&target, &format!("{client}-{count}@example.com"), PASSWORD)
                .header("x-forwarded-for", format!("203.0.113.{network}"))
        });
        // Every network sends so often that its logins are due later than those of the victim,
        // even if they have been waiting for long. There is a queue of 16 for each core.
        attack.until_count(503, 15 * networks).await;
        // A busy machine may need more than one timeout to hash all of it.
        for _ in 0..4 {
            let count = attack.count(401) + 4 * cores;
            attack.until_count(401, count).await;
        }
        let summary = assert_served(&attack, 401, short_or_full(3, 30), async |_| {
            log_in(&server, &victim.email, &victim.password).await
        });
        report(&format!("{networks} networks log in"), summary.await);
    }
}

/// The password changes of one user run one after another, so that a few accounts cannot fill the queue.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn serves_a_login_during_password_changes_of_eight_accounts() {
    const ACCOUNTS: usize = 8;
    let _guard = start_heavy_load().await;
    let variables = [
        ("TRUSTED_PROXIES", "127.0.0.1"),
        ("METRICS_ADDR", "127.0.0.1:0"),
        ("BCRYPT_COST", short_or_full("10", "12")),
    ];
    let server = Arc::new(Server::with(&variables).await);
    let victim = server.user().await;
    let mut accounts: Vec<User> = Vec::new();
    for _ in 0..ACCOUNTS {
        accounts.push(server.user().await);
    }
    let attack = Attack::start(5 * ACCOUNTS, move |client, _| {
        let account = &accounts[client % ACCOUNTS];
        // The new password is easy to guess and therefore rejected.
        let passwords = json!({"current_password": PASSWORD, "new_password": "password"});
        let request = account.put("/api/v1/auth/password").json(passwords);
        request.header("x-forwarded-for", "203.0.113.1")
    });
    attack.until_count(422, 10).await;
    let summary = assert_served(&attack, 422, short_or_full(3, 30), async |_| {
        let queued = metric(&server, "todo_api_password_hash_queue_length").await;
        assert!(
            queued <= ACCOUNTS,
            "{queued} hashes of {ACCOUNTS} accounts are queued"
        );
        log_in(&server, &victim.email, &victim.password).await
    });
    report("password changes of eight accounts", summary.await);
}

async fn metric(server: &Server, name: &str) -> usize {
    let text = scrape(server).await;
    let line = text.lines().find(|line| line.starts_with(name)).unwrap();
    line.split(' ').nth(1).unwrap().parse().unwrap()
}

/// A search waits for at most two searches of another user.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn serves_a_search_during_sixty_searches_of_another_user() {
    let _guard = start_heavy_load().await;
    let server = Server::with(&[("DB_POOL_SIZE", "20")]).await;
    let (attacker, victim) = (server.user().await, server.user().await);
    victim.create_task("water the plants").await;
    let tasks = short_or_full(1500, 60_000);
    let sql = server.sql().await;
    // With a revision, the rows need no trigger.
    sql.execute(
        "insert into tasks
             (user_id, id, title, description, completed, created_at, updated_at, revision)
         select $1::text::uuid, gen_random_uuid(), 'title', repeat('a', 1000), false, now(), now(), n
         from generate_series(1, $2) n",
        &[&attacker.id, &tasks],
    )
    .await
    .unwrap();
    let path = format!("{}?q=b{}", attacker.tasks(), "a".repeat(99));
    let attack = Attack::start(short_or_full(60, 250), move |_, _| attacker.get(&path));
    attack.until_count(200, 10).await;
    let summary = assert_served(&attack, 200, short_or_full(6, 30), async |round| {
        let searches = "select count(*) from pg_stat_activity
             where datname = current_database() and state = 'active' and query ~ 'fold_case\\('
               and pid <> pg_backend_pid()";
        let searches: i64 = sql.query_one(searches, &[]).await.unwrap().get(0);
        assert!(searches <= 2, "{searches} searches of one user are running");
        let filter = ["?q=plants", "?completed=false", "?total=true"][round % 3];
        let response = victim.get(victim.tasks() + filter);
        let response = timeout(Duration::from_secs(5), response.send()).await;
        response.expect("a response").expect(200)
    });
    report("searches of another user", summary.await);
}
