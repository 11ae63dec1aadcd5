//! Replicas of a list, kept current by its changes or its tag, stay correct despite faults of the
//! network, the service and the database.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Arc, Mutex, RwLock,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use futures_util::future::join_all;
use rustix::process::Signal;
use serde_json::{Value, json};
use tokio::time::sleep;
use uuid::Uuid;

use super::{
    Cluster, RESPONSE_TIMEOUT, memory, process_and_children, proxy::NetworkCondition,
    raise_file_limit, report, short_or_full, signal_all, start_light_load,
};
use crate::conditional_lists::id;
use crate::harness::{Request, Response, Server, User, until};
use crate::metrics::gauge;

/// The state that the writers and the replicas share.
struct World {
    /// The user as a client of each instance, whose address changes at a restart.
    users: RwLock<Vec<User>>,
    /// The acknowledged writes in order: the task and its `updated_at`, or `None` if it was
    /// deleted.
    acknowledged: Mutex<Vec<(String, Option<String>)>>,
    /// The tasks for which a deletion was sent, and the completed tasks: the writers sometimes
    /// delete all completed tasks.
    may_be_deleted: Mutex<BTreeSet<String>>,
    writes: AtomicUsize,
    stop: AtomicBool,
}

impl World {
    /// The user as a client of any instance.
    fn user(&self) -> User {
        let users = self.users.read().unwrap();
        users[fastrand::usize(..users.len())].clone()
    }

    fn acknowledge(&self, id: String, version: Option<String>) {
        self.acknowledged.lock().unwrap().push((id, version));
        self.writes.fetch_add(1, Ordering::Relaxed);
    }

    /// Creates a task under this ID. A client repeats this until it succeeds.
    async fn create_with_id(&self, id: &str, body: Value) {
        while !self.is_stopped() {
            let create = self.user().create_with_id(id, body.clone());
            if let Some(response) = send(create, &[201, 412]).await {
                if response.status == 201 {
                    let version = text(&response.json()["updated_at"]);
                    return self.acknowledge(id.to_owned(), Some(version));
                }
                // An earlier attempt created the task, unless it has been deleted since.
                return self.acknowledge(id.to_owned(), Some(String::new()));
            }
        }
    }

    fn may_be_deleted(&self, id: &str) {
        self.may_be_deleted.lock().unwrap().insert(id.to_owned());
    }

    fn is_stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }
}

/// Sends a request. Returns `None` if its outcome is unknown or it was refused during a fault.
async fn send(request: Request, expected: &[u16]) -> Option<Response> {
    let Ok(response) = request.try_send().await else {
        sleep(Duration::from_millis(30)).await;
        return None;
    };
    let status = response.status;
    if [500, 503].contains(&status) {
        sleep(Duration::from_millis(30)).await;
        return None;
    }
    assert!(expected.contains(&status), "{status}: {response:?}");
    Some(response)
}

/// Changes its own tasks at random, and sometimes deletes all completed tasks.
async fn write(world: Arc<World>) {
    let mut own: Vec<String> = Vec::new();
    while !world.is_stopped() {
        let user = world.user();
        let task = (!own.is_empty()).then(|| own[fastrand::usize(..own.len())].clone());
        let (action, task) = match task {
            Some(task) if own.len() < 60 || fastrand::bool() => (fastrand::u8(..20), task),
            Some(task) => (17, task),
            None => (fastrand::u8(..6), String::new()),
        };
        let path = format!("{}/{task}", user.tasks());
        let body = json!({"title": format!("{}", fastrand::u32(..))});
        let (request, expected): (Request, &[u16]) = match action {
            0..3 => (user.create(body), &[201]),
            3..6 => {
                let new = Uuid::now_v7().to_string();
                own.push(new.clone());
                world.create_with_id(&new, body).await;
                continue;
            }
            6..13 => (user.put(path).json(body), &[200, 404]),
            13..16 => {
                world.may_be_deleted(&task);
                (user.patch(format!("{path}/complete")), &[200, 404])
            }
            16..19 => {
                world.may_be_deleted(&task);
                (user.delete(path), &[204, 404])
            }
            _ => (
                user.delete(format!("{}?completed=true", user.tasks())),
                &[200],
            ),
        };
        if let Some(response) = send(request, expected).await {
            match (action, response.status) {
                (_, 404) => own.retain(|known| *known != task),
                (16..19, _) => {
                    own.retain(|known| *known != task);
                    world.acknowledge(task, None);
                }
                (19, _) => {}
                _ => {
                    let task = response.json();
                    if action < 3 {
                        own.push(id(&task));
                    }
                    world.acknowledge(id(&task), Some(text(&task["updated_at"])));
                }
            }
        }
        sleep(Duration::from_millis(fastrand::u64(..8))).await;
    }
}

fn text(value: &Value) -> String {
    value.as_str().unwrap().to_owned()
}

/// How a replica follows the list.
#[derive(Clone, Copy, Debug)]
enum Follow {
    Cursor,
    Wait,
    FullList,
    /// By cursor, with long pauses.
    Offline,
}

/// A copy of the list.
struct Replica {
    follow: Follow,
    tasks: BTreeMap<String, Value>,
    deleted: BTreeSet<String>,
    /// The cursor or the tag.
    state: String,
    /// The number of successful updates, and how many of them found no change.
    counts: [usize; 2],
}

impl Replica {
    fn new(follow: Follow) -> Replica {
        Replica {
            follow,
            tasks: BTreeMap::new(),
            deleted: BTreeSet::new(),
            state: String::new(),
            counts: [0; 2],
        }
    }

    async fn run(mut self, world: Arc<World>) -> Replica {
        while !world.is_stopped() {
            self.synchronize_and_verify(&world).await;
            let pause = match self.follow {
                Follow::Offline => fastrand::u64(..1500),
                Follow::Wait => 0,
                _ => fastrand::u64(..20),
            };
            sleep(Duration::from_millis(pause)).await;
        }
        self
    }

    /// Brings the copy up to date, and asserts that it contains every write acknowledged before.
    async fn synchronize_and_verify(&mut self, world: &World) -> bool {
        let known = world.acknowledged.lock().unwrap().len();
        let user = world.user();
        let done = match self.follow {
            Follow::FullList => self.read_list(&user).await,
            _ => self.read_changes(&user).await,
        };
        if done.is_none() {
            return false;
        }
        self.counts[0] += 1;
        let acknowledged = world.acknowledged.lock().unwrap();
        for (id, version) in acknowledged[..known].iter().rev().take(200) {
            let task = self.tasks.get(id);
            match version {
                None => assert!(task.is_none(), "{:?}: {id} was deleted", self.follow),
                Some(version) => {
                    let is_new =
                        task.is_some_and(|task| task["updated_at"].as_str() >= Some(version));
                    let is_gone =
                        task.is_none() && world.may_be_deleted.lock().unwrap().contains(id);
                    assert!(
                        is_new || is_gone,
                        "{:?}: {id} is not of {version}: {task:?}",
                        self.follow
                    );
                }
            }
        }
        true
    }

    async fn read_changes(&mut self, user: &User) -> Option<()> {
        loop {
            let path = format!("{}?since={}&limit=17", user.changes(), self.state);
            let mut request = user.get(path);
            if matches!(self.follow, Follow::Wait) {
                request = request.header("prefer", "wait=1");
            }
            let page = send(request, &[200]).await?.json();
            for task in page["tasks"].as_array().unwrap() {
                self.put(task.clone());
            }
            for task in page["deleted"].as_array().unwrap() {
                self.tasks.remove(&id(task));
                self.deleted.insert(id(task));
            }
            let next = text(&page["cursor"]);
            let revision = |cursor: &str| {
                let number = cursor.split('.').next().unwrap();
                u64::from_str_radix(number, 16).unwrap_or(0)
            };
            assert!(
                revision(&next) >= revision(&self.state),
                "{} after {}",
                next,
                self.state
            );
            self.counts[1] += usize::from(next == self.state);
            self.state = next;
            if page["more"] == false {
                return Some(());
            }
        }
    }

    async fn read_list(&mut self, user: &User) -> Option<()> {
        let list = user.get(format!("{}?limit=60", user.tasks()));
        let list = send(list.header("if-none-match", &self.state), &[200, 304]).await?;
        if list.status == 304 {
            self.counts[1] += 1;
            return Some(());
        }
        let tag = list.header("etag").to_owned();
        let mut pages = vec![list];
        while let Some(next) = pages.last().unwrap().headers.get("link") {
            let next = next
                .to_str()
                .unwrap()
                .split(['<', '>'])
                .nth(1)
                .unwrap()
                .to_owned();
            pages.push(send(user.get(next), &[200]).await?);
        }
        let before = std::mem::take(&mut self.tasks);
        for task in pages
            .iter()
            .flat_map(|page| page.json().as_array().unwrap().clone())
        {
            let known = before.get(&id(&task));
            assert!(known.is_none_or(|known| known["updated_at"].as_str() <= task["updated_at"].as_str()));
            self.put(task);
        }
        let gone = before.into_keys().filter(|id| !self.tasks.contains_key(id));
        self.deleted.extend(gone);
        self.state = tag;
        Some(())
    }

    fn put(&mut self, task: Value) {
        let id = id(&task);
        assert!(
            !self.deleted.contains(&id),
            "{:?}: {task} is back",
            self.follow
        );
        let version = text(&task["updated_at"]);
        let before = self.tasks.insert(id, task);
        let before = before.map(|task| text(&task["updated_at"]));
        assert!(
            before.is_none_or(|before| before <= version),
            "{:?}: backwards",
            self.follow
        );
    }
}

/// All tasks of the table, as the API represents them.
async fn table(sql: &tokio_postgres::Client) -> BTreeMap<String, Value> {
    let time = "'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"'";
    let query = format!(
        "select json_build_object(
             'id', id, 'user_id', user_id, 'title', title, 'description', description,
             'completed', completed, 'created_at', to_char(created_at at time zone 'utc', {time}),
             'updated_at', to_char(updated_at at time zone 'utc', {time}))::text
         from tasks"
    );
    let rows = sql.query(&query, &[]).await.unwrap();
    let task = |row: &tokio_postgres::Row| serde_json::from_str(row.get(0)).unwrap();
    rows.iter()
        .map(task)
        .map(|task| (id(&task), task))
        .collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn replicas_equal_the_list_after_every_fault() {
    let _guard = start_light_load().await;
    let cluster = Cluster::proxied(&[]).await;
    let mut there = cluster.server.sibling(&[]).await;
    let user = &cluster.user;
    let world = Arc::new(World {
        users: RwLock::new(vec![user.clone(), user.on(&there)]),
        acknowledged: Mutex::default(),
        may_be_deleted: Mutex::default(),
        writes: AtomicUsize::new(0),
        stop: AtomicBool::new(false),
    });
    let follows = [
        Follow::Cursor,
        Follow::Wait,
        Follow::FullList,
        Follow::Offline,
    ];
    let replicas: Vec<_> = follows
        .map(|follow| tokio::spawn(Replica::new(follow).run(world.clone())))
        .into();
    let writers: Vec<_> = (0..3).map(|_| tokio::spawn(write(world.clone()))).collect();
    let until_written = async |count| {
        let goal = world.writes.load(Ordering::Relaxed) + count;
        until("the writers go on", async || {
            assert!(replicas.iter().all(|replica| !replica.is_finished()));
            assert!(writers.iter().all(|writer| !writer.is_finished()));
            world.writes.load(Ordering::Relaxed) >= goal
        })
        .await;
    };
    let rounds = short_or_full(1, 30);
    for _ in 0..rounds {
        until_written(60).await;
        cluster.proxy().set_condition(NetworkCondition::Reset);
        sleep(Duration::from_millis(300)).await;
        cluster.proxy().set_condition(NetworkCondition::Normal);

        until_written(60).await;
        there.kill();
        there = cluster.server.sibling(&[]).await;
        world.users.write().unwrap()[1] = user.on(&there);

        until_written(60).await;
        let postmaster = cluster.directory.postgres().unwrap();
        signal_all(&process_and_children(postmaster), Signal::KILL);
        until_written(60).await;
    }
    world.stop.store(true, Ordering::Relaxed);
    for writer in writers {
        writer.await.unwrap();
    }
    let expected = table(&cluster.sql().await).await;
    let mut counts = String::new();
    for replica in replicas {
        let mut replica = replica.await.unwrap();
        until("the replica is up to date", async || {
            replica.synchronize_and_verify(&world).await
        })
        .await;
        assert_eq!(replica.tasks, expected, "{:?}", replica.follow);
        counts += &format!("; {:?} {:?}", replica.follow, replica.counts);
    }
    let writes = world.writes.load(Ordering::Relaxed);
    let lists = "select revision, tasks::bigint from task_lists";
    let list = cluster.sql().await.query_one(lists, &[]).await.unwrap();
    assert_eq!(list.get::<_, i64>(1), expected.len() as i64);
    assert!(list.get::<_, i64>(0) >= writes as i64);
    report(
        "replicas",
        format!(
            "{rounds} × 3 faults, {writes} acknowledged changes, {} tasks{counts}",
            expected.len()
        ),
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_that_wait_get_503_when_the_database_is_lost() {
    let _guard = start_light_load().await;
    let cluster = Cluster::proxied(&[("METRICS_ADDR", "127.0.0.1:0")]).await;
    let ann = &cluster.user;
    let waiting = tokio::spawn(ann.wait_for_list(&ann.list_tag().await).send());
    until("the request waits", async || {
        gauge(&cluster.server, "todo_api_http_waiting_requests").await == 1
    })
    .await;
    let lost = Instant::now();
    cluster.proxy().set_condition(NetworkCondition::Blackhole);
    let response = waiting.await.unwrap();
    assert!(lost.elapsed() < RESPONSE_TIMEOUT, "{:?}", lost.elapsed());
    response.problem(503, "database_unavailable");
    response.header("retry-after");
    cluster.proxy().set_condition(NetworkCondition::Normal);
}

/// The pool has two connections, one of them for the health probe.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_requests_wait_and_a_change_wakes_only_those_of_its_list() {
    let _guard = start_light_load().await;
    raise_file_limit();
    let variables = [("METRICS_ADDR", "127.0.0.1:0"), ("DB_POOL_SIZE", "2")];
    let server = Server::with(&variables).await;
    let there = server.sibling(&[]).await;
    let users = server.users(250).await;
    let mut tags = Vec::new();
    for user in &users {
        tags.push(user.list_tag().await);
    }
    let waiting = async |count: usize| {
        until("the requests wait", async || {
            gauge(&server, "todo_api_http_waiting_requests").await == count
        })
        .await;
    };
    let (before, _) = memory(server.pid());
    let requests = users
        .iter()
        .zip(&tags)
        .flat_map(|(user, tag)| (0..4).map(|_| tokio::spawn(user.wait_for_list(tag).send())));
    let mut requests: Vec<_> = requests.collect();
    waiting(1000).await;
    let (after, _) = memory(server.pid());
    let each = after.saturating_sub(before) / 1000;

    let mut times = Vec::new();
    for (n, writer) in [users[0].clone(), users[1].on(&there)].iter().enumerate() {
        let start = Instant::now();
        writer.create_task("a").await;
        for response in join_all(requests.drain(..4)).await {
            response.unwrap().expect(200);
        }
        times.push(start.elapsed());
        waiting(1000 - 4 * (n + 1)).await;
    }
    assert!(requests.iter().all(|request| !request.is_finished()));
    for request in requests {
        request.abort();
    }
    report(
        "a thousand waiting requests",
        format!(
            "{each} KiB each; woken in {:?} by this instance, {:?} by another",
            times[0], times[1]
        ),
    );
    // Each connection takes about 20 KiB of this.
    assert!(each < 150, "{each} KiB for each waiting request");
    assert!(times[1] < Duration::from_secs(10), "{times:?}");
}
