//! Concurrent writes are batched: each is atomic, is done once, and is acknowledged after its commit.
//! No write waits for the lock, or fails with the error, of another user's write.

use futures_util::future::join_all;
use serde_json::{Value, json};
use tokio::time::{Duration, Instant, sleep};
use tokio_postgres::Client;

use crate::harness::{Request, Response, Server, User, until};
use crate::metrics::gauge;
use crate::read_batching::{open_connections, statement_count};

/// Blocks every write of a task.
const BLOCK_WRITES: &str = "lock table tasks in exclusive mode";
/// The number of batches of one kind of write that run at a time.
const MAX_WORKERS: usize = 3;
/// The number of writes of one kind that run alone while no others are in progress.
const MAX_LONE: usize = 2;

async fn users<const N: usize>(server: &Server) -> [User; N] {
    let users = join_all((0..N).map(|_| server.user())).await;
    users.try_into().unwrap()
}

/// Sends requests so that those of one kind travel in one batch: while other writes keep all workers
/// busy, which a lock blocks. The transaction that holds it executes `statements` before it commits.
async fn send_batched(server: &Server, requests: Vec<Request>, statements: &str) -> Vec<Response> {
    // Each write is of another user, because the writes of a user with a lone write run alone.
    let others = server.users(3 * (MAX_LONE + MAX_WORKERS)).await;
    let tasks = join_all(others.iter().map(|user| user.create_task("other"))).await;
    let lock = server.lock(BLOCK_WRITES).await;
    let mut blockers = Vec::new();
    // Writes of three kinds, which share no batch, are sent at once: the first ones must not reach
    // their deadline before the other requests have arrived.
    for (users, tasks) in others.chunks(3).zip(tasks.chunks(3)) {
        let kinds = [
            users[0].create(json!({"title": "other"})),
            users[1]
                .put(users[1].path_of(&tasks[1]))
                .json(json!({"title": "other"})),
            users[2].delete(users[2].path_of(&tasks[2])),
        ];
        blockers.extend(kinds.map(|request| tokio::spawn(request.send())));
        lock.wait_for_blocked(blockers.len() as i64).await;
    }
    let arrived = requests.len() + blockers.len();
    let release = async {
        until("all requests have arrived", async || {
            gauge(server, "todo_api_http_open_connections").await >= arrived
        })
        .await;
        lock.transaction.batch_execute(statements).await.unwrap();
        lock.release().await;
    };
    let sent = join_all(requests.into_iter().map(Request::send));
    let (responses, ()) = tokio::join!(sent, release);
    for blocker in blockers {
        blocker.await.unwrap();
    }
    responses
}

async fn measured_server() -> Server {
    measured_server_with(&[]).await
}

/// Starts a server that has a connection for each worker and a few more.
async fn measured_server_with(variables: &[(&str, &str)]) -> Server {
    let measured = [("METRICS_ADDR", "127.0.0.1:0"), ("DB_POOL_SIZE", "20")];
    let server = Server::with(&[&measured[..], variables].concat()).await;
    open_connections(&server, 16).await;
    server
}

/// Checks that each list has the number of tasks that it counts, and that no two changes of a list
/// have the same revision or a higher one than the list.
async fn assert_lists_are_consistent(sql: &Client) {
    let inconsistent = "
        with changes as (
            select user_id, revision from tasks
            union all select user_id, revision from deleted_tasks
        )
        select count(*) from task_lists l
        where l.tasks <> (select count(*) from tasks t where t.user_id = l.user_id)
           or exists (select from changes c where c.user_id = l.user_id and c.revision > l.revision)
           or (select count(*) > count(distinct revision) from changes c where c.user_id = l.user_id)";
    let count: i64 = sql.query_one(inconsistent, &[]).await.unwrap().get(0);
    assert_eq!(count, 0, "inconsistent lists");
}

/// Sends a write, and sends it again while the service refuses it because the machine is busy.
async fn write(request: impl Fn() -> Request) -> Response {
    loop {
        let response = request().await;
        if response.status != 503 {
            return response;
        }
        response.problem(503, "overloaded");
    }
}

/// Creates, changes, completes and deletes tasks one after another. Returns the tasks that remain.
async fn write_tasks(user: &User, writer: usize) -> Vec<Value> {
    let mut remaining = Vec::new();
    for n in 0..6 {
        let title = format!("{writer}: {n}");
        let create = || user.create(json!({"title": title}));
        let created = write(create).await.expect(201).json();
        let path = user.path_of(&created);
        let change = json!({"title": format!("{title}, changed"), "description": title});
        let change = || user.put(&*path).json(change.clone());
        let changed = write(change).await.expect(200).json();
        let toggled = write(|| user.patch(format!("{path}/complete"))).await;
        let toggled = toggled.expect(200).json();
        assert_eq!(
            (
                &toggled["title"],
                &toggled["completed"],
                &toggled["created_at"]
            ),
            (&changed["title"], &json!(true), &created["created_at"])
        );
        match n % 3 {
            0 => drop(write(|| user.delete(&*path)).await.expect(204)),
            _ => remaining.push(toggled),
        }
    }
    remaining
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_writes_of_84_writers_of_seven_users_have_the_outcome_of_separate_writes() {
    let server = measured_server().await;
    let users: [User; 7] = users(&server).await;
    let before = statement_count(&server).await;
    let writers = (0..84).map(|writer| write_tasks(&users[writer % 7], writer));
    let remaining = join_all(writers).await;
    let statements = statement_count(&server).await - before;
    assert!(
        statements < 84 * 20,
        "{statements} statements: nothing was batched"
    );
    for (n, user) in users.iter().enumerate() {
        let of_user = remaining.iter().skip(n).step_by(7).flatten();
        let mut expected: Vec<&Value> = of_user.collect();
        expected.sort_by_key(|task| std::cmp::Reverse(task["id"].as_str()));
        let listed = user.get(user.tasks()).await.expect(200).json();
        assert_eq!(listed, json!(expected));
    }
    assert_lists_are_consistent(&server.sql().await).await;
}

/// Blocks four creates of a user, one after another. Returns how many statements run until all are done
/// and since the first is blocked.
async fn statements_of_blocked_creates(server: &Server, ann: &User) -> usize {
    let list = format!(
        "select from task_lists where user_id = '{}' for update",
        ann.id
    );
    let lock = server.lock(&list).await;
    let mut sent = Vec::new();
    let mut before = 0;
    for blocked in 1..=4 {
        sent.push(tokio::spawn(ann.create(json!({"title": "new"})).send()));
        lock.wait_for_blocked(blocked).await;
        if blocked == 1 {
            before = statement_count(server).await;
        }
    }
    lock.release().await;
    for response in sent {
        response.await.unwrap().expect(201);
    }
    statement_count(server).await - before
}

/// Otherwise batches would overtake the waiting write again and again.
#[tokio::test]
async fn writes_of_a_user_run_alone_while_another_one_waits_for_the_lock_of_the_list() {
    let server = measured_server().await;
    let [ann] = users(&server).await;
    // Four lone statements. Three more would be batches that include none of the creates, or, on a
    // slow machine, probes of the database.
    let mut statements = usize::MAX;
    for _ in 0..5 {
        statements = statements.min(statements_of_blocked_creates(&server, &ann).await);
    }
    assert!(statements < 7, "{statements} statements");
}

#[tokio::test]
async fn concurrent_writes_of_one_task_all_take_effect() {
    let server = measured_server().await;
    let [ann, bob] = users(&server).await;
    let (shared, other) = (
        ann.create_task("shared").await,
        bob.create_task("other").await,
    );
    let (path, other) = (ann.path_of(&shared), bob.path_of(&other));
    let mut requests: Vec<_> = (0..5)
        .map(|_| ann.patch(format!("{path}/complete")))
        .collect();
    requests.push(ann.put(&*path).json(json!({"description": "changed"})));
    requests.push(bob.put(&*other).json(json!({"title": "changed"})));
    let responses = send_batched(&server, requests, "").await;
    let mut versions: Vec<String> = Vec::new();
    for response in responses {
        versions.push(response.expect(200).header("etag").to_owned());
    }
    versions.sort();
    versions.dedup();
    assert_eq!(versions.len(), 7, "two writes returned the same version");
    let task = ann.get(path).await.expect(200).json();
    assert_eq!(
        (&task["completed"], &task["description"]),
        (&json!(true), &json!("changed"))
    );
    assert_lists_are_consistent(&server.sql().await).await;
}

#[tokio::test]
async fn one_of_several_concurrent_deletions_of_a_task_succeeds() {
    let server = measured_server().await;
    let [ann] = users(&server).await;
    let path = ann.path_of(&ann.create_task("a").await);
    let requests = (0..5).map(|_| ann.delete(&*path)).collect();
    let responses = send_batched(&server, requests, "").await;
    let deleted = responses.iter().filter(|response| response.status == 204);
    assert_eq!(deleted.count(), 1);
    for response in responses.iter().filter(|response| response.status != 204) {
        response.problem(404, "task_not_found");
    }
    assert_lists_are_consistent(&server.sql().await).await;
}

#[tokio::test]
async fn a_batch_does_not_wait_for_a_locked_list_task_or_account() {
    let server = measured_server().await;
    let [ann, bob] = users(&server).await;
    let (task, other) = (ann.create_task("a").await, bob.create_task("b").await);
    let (path, other) = (ann.path_of(&task), bob.path_of(&other));
    let (user_id, id) = (&ann.id, task["id"].as_str().unwrap());
    for locked in [
        format!("select from task_lists where user_id = '{user_id}' for update"),
        format!("select from tasks where user_id = '{user_id}' and id = '{id}' for update"),
        format!("select from users where id = '{user_id}' for update"),
    ] {
        let lock = server.lock(&locked).await;
        // More than there are workers, and at intervals, so that no two of a kind share a batch.
        let mut sent = Vec::new();
        for _ in 0..=MAX_WORKERS {
            let create = ann.create(json!({"title": "new"}));
            let toggle = ann.patch(format!("{path}/complete"));
            sent.push(tokio::spawn(create.send()));
            sent.push(tokio::spawn(toggle.send()));
            sleep(Duration::from_millis(20)).await;
        }
        if !locked.contains("from users") {
            lock.wait_for_blocked(1).await;
        }
        for n in 0..20 {
            let (created, changed) = tokio::join!(
                bob.create_task("new"),
                bob.put(&*other)
                    .json(json!({"title": format!("b{n}")}))
                    .send(),
            );
            bob.delete(bob.path_of(&created)).await.expect(204);
            changed.expect(200);
        }
        lock.release().await;
        for response in join_all(sent).await {
            let response = response.unwrap();
            match response.status {
                200 | 201 => {}
                // More writes of one user waited for the lock than may wait.
                _ => drop(response.problem(503, "overloaded")),
            }
        }
    }
    assert_lists_are_consistent(&server.sql().await).await;
}

#[tokio::test]
async fn a_deleted_account_or_task_affects_only_its_own_writes_of_a_batch() {
    let server = measured_server().await;
    let [ann, bob, carl] = users(&server).await;
    let mut tasks = Vec::new();
    for user in [&ann, &bob, &carl] {
        tasks.push(user.create_task("a").await);
    }
    let statements = format!(
        "delete from users where id = '{}'; delete from tasks where user_id = '{}'",
        ann.id, bob.id
    );
    let each = |user: &User, task: &Value| {
        let path = user.path_of(task);
        [
            user.create(json!({"title": "new"})),
            user.put(&*path).json(json!({"title": "changed"})),
            user.patch(format!("{path}/complete")),
        ]
    };
    let requests = [&ann, &bob, &carl].into_iter().zip(&tasks);
    let requests = requests.flat_map(|(user, task)| each(user, task)).collect();
    let responses = send_batched(&server, requests, &statements).await;
    let [created, changed, toggled] = &responses[..3] else {
        unreachable!()
    };
    created.problem(401, "invalid_token");
    for response in [changed, toggled] {
        match response.status {
            // The token was checked after the account was deleted.
            401 => response.problem(401, "invalid_token"),
            _ => response.problem(404, "task_not_found"),
        };
    }
    assert_eq!(responses[3].status, 201);
    responses[4].problem(404, "task_not_found");
    responses[5].problem(404, "task_not_found");
    let statuses: Vec<_> = responses[6..]
        .iter()
        .map(|response| response.status)
        .collect();
    assert_eq!(statuses, [201, 200, 200]);
    assert_lists_are_consistent(&server.sql().await).await;
}

#[tokio::test]
async fn a_write_that_the_database_rejects_fails_alone() {
    let server = measured_server().await;
    let users: [User; 10] = users(&server).await;
    let sql = server.sql().await;
    sql.batch_execute("alter table tasks add check (title <> 'rejected')")
        .await
        .unwrap();
    let title = |n: usize| if n == 4 { "rejected" } else { "accepted" };
    let requests = users.iter().enumerate();
    let requests = requests
        .map(|(n, user)| user.create(json!({"title": title(n)})))
        .collect();
    let responses = send_batched(&server, requests, "").await;
    for (n, response) in responses.iter().enumerate() {
        assert_eq!(response.status, if n == 4 { 500 } else { 201 });
    }
    let stored = "select count(*) from tasks where title = 'accepted'";
    assert_eq!(
        sql.query_one(stored, &[]).await.unwrap().get::<_, i64>(0),
        9
    );
    assert_lists_are_consistent(&sql).await;
}

#[tokio::test]
async fn a_full_list_rejects_exactly_the_surplus_of_a_batch() {
    let server = measured_server_with(&[("MAX_TASKS_PER_USER", "5")]).await;
    let [ann, bob] = users(&server).await;
    let create = |n: usize| match n % 2 {
        0 => ann.create(json!({"title": "a"})),
        _ => bob.create(json!({"title": "b"})),
    };
    let responses = send_batched(&server, (0..24).map(create).collect(), "").await;
    let created = responses.iter().filter(|response| response.status == 201);
    assert_eq!(created.count(), 10);
    for response in responses.iter().filter(|response| response.status != 201) {
        response.problem(403, "quota_exceeded");
    }
    assert_lists_are_consistent(&server.sql().await).await;
}

#[tokio::test]
async fn a_key_creates_one_task_even_if_its_copies_share_a_batch() {
    let server = measured_server().await;
    let [ann, bob] = users(&server).await;
    let create = |user: &User, title: &str, key: &str| {
        let create = user.create(json!({"title": title}));
        create.header("idempotency-key", key)
    };
    let known = create(&ann, "known", "known").await.expect(201).json();
    let requests = vec![
        create(&ann, "a", "new"),
        create(&ann, "a", "new"),
        create(&ann, "other", "new"),
        create(&bob, "b", "new"),
        create(&ann, "known", "known"),
        bob.create(json!({"title": "b"})),
    ];
    let responses = send_batched(&server, requests, "").await;
    let (rejected, created): (Vec<_>, Vec<_>) = responses
        .into_iter()
        .partition(|response| response.status == 422);
    for response in &rejected {
        response.problem(422, "idempotency_key_reused");
    }
    let mut tasks: Vec<Value> = Vec::new();
    for response in created {
        let task = response.expect(201).json();
        tasks.extend((!tasks.contains(&task)).then_some(task));
    }
    // Either title of Ann's new key may have been the first.
    assert!(tasks.contains(&known) && tasks.len() == 4, "{tasks:?}");
    assert!(rejected.len() == 1 || rejected.len() == 2);
    assert_lists_are_consistent(&server.sql().await).await;
}

#[tokio::test]
async fn each_write_of_a_batch_is_done_whether_or_not_other_clients_disconnect() {
    let server = measured_server().await;
    let users: [User; 12] = users(&server).await;
    let lock = server.lock(BLOCK_WRITES).await;
    let creates = users
        .iter()
        .map(|user| user.create(json!({"title": "new"})));
    let sent: Vec<_> = creates.map(|create| tokio::spawn(create.send())).collect();
    until("all requests have arrived", async || {
        gauge(&server, "todo_api_http_open_connections").await >= sent.len()
    })
    .await;
    sleep(Duration::from_millis(100)).await;
    for request in sent.iter().step_by(2) {
        request.abort();
    }
    lock.release().await;
    for request in sent.into_iter().skip(1).step_by(2) {
        request.await.unwrap().expect(201);
    }
    let sql = server.sql().await;
    until("the tasks of all clients are stored", async || {
        let row = sql
            .query_one("select count(*) from tasks where title = 'new'", &[])
            .await
            .unwrap();
        row.get::<_, i64>(0) == 12
    })
    .await;
    assert_lists_are_consistent(&sql).await;
}

#[tokio::test]
async fn a_batch_whose_connection_is_lost_creates_each_task_once_and_repeats_no_other_write() {
    let server = measured_server().await;
    let users: [User; 9] = users(&server).await;
    let mut paths = Vec::new();
    for user in &users {
        paths.push(user.path_of(&user.create_task("old").await));
    }
    let lock = server.lock(BLOCK_WRITES).await;
    let requests = users
        .iter()
        .zip(&paths)
        .enumerate()
        .map(|(n, (user, path))| match n % 3 {
            0 => user.create(json!({"title": "new"})),
            1 => user.put(&**path).json(json!({"title": "changed"})),
            _ => user.patch(format!("{path}/complete")),
        });
    let sent = join_all(requests.map(Request::send));
    let terminate = async {
        lock.wait_for_blocked(2).await;
        sleep(Duration::from_millis(200)).await;
        assert!(lock.terminate_blocked().await >= 2);
        lock.release().await;
    };
    let (responses, ()) = tokio::join!(sent, terminate);
    for (n, response) in responses.into_iter().enumerate() {
        let task = users[n].get(&*paths[n]).await.expect(200).json();
        let is_changed = task["title"] == "changed" || task["completed"] == true;
        match n % 3 {
            0 => drop(response.expect(201)),
            // The lost statements were rolled back.
            1 if !is_changed => drop(response.problem(503, "database_unavailable")),
            2 if !is_changed => drop(response.problem(500, "internal")),
            _ => drop(response.expect(200)),
        }
    }
    let sql = server.sql().await;
    let created = "select count(*) from tasks where title = 'new'";
    assert_eq!(
        sql.query_one(created, &[]).await.unwrap().get::<_, i64>(0),
        3
    );
    assert_lists_are_consistent(&sql).await;
}

/// Makes each statement that changes a title to `held` run for 20 s, even if it is canceled.
const HOLD_WRITES: &str = "
    create function hold() returns trigger language plpgsql as $$
    begin
        while clock_timestamp() < statement_timestamp() + interval '20 s' loop
            begin
                perform pg_sleep(20);
            exception when query_canceled then
            end;
        end loop;
        raise 'held';
    end $$;
    create trigger hold before update on tasks
        for each row when (new.title = 'held') execute function hold()";

#[tokio::test]
async fn a_write_whose_deadline_passes_in_the_queue_gets_503_and_is_not_done_later() {
    let server = measured_server().await;
    let sql = server.sql().await;
    sql.batch_execute(HOLD_WRITES).await.unwrap();
    const BUSY: usize = MAX_LONE + MAX_WORKERS;
    let users: [User; BUSY + 2] = users(&server).await;
    let mut paths = Vec::new();
    for user in &users {
        paths.push(user.path_of(&user.create_task("new").await));
    }
    let change = |n: usize, title: &str| users[n].put(&*paths[n]).json(json!({"title": title}));
    // The workers are busy for another second after their deadline. The write must reach its own deadline
    // within that second.
    for attempt in 0.. {
        let title = format!("late {attempt}");
        let start = Instant::now();
        let mut held = Vec::new();
        for n in 0..BUSY {
            held.push(tokio::spawn(change(n, "held").send()));
            until("another worker is busy", async || {
                let busy = "select from pg_stat_activity
                            where datname = current_database() and wait_event = 'PgSleep'";
                sql.query(busy, &[]).await.unwrap().len() > n
            })
            .await;
        }
        let is_in_time = start.elapsed() < Duration::from_millis(600);
        // Is in the queue when a worker is free again, and shares the next batch.
        let next = async {
            sleep(Duration::from_secs(3)).await;
            change(BUSY + 1, "next").await.expect(200);
        };
        let (late, ()) = tokio::join!(change(BUSY, &title).send(), next);
        for response in join_all(held).await {
            assert_ne!(response.unwrap().status, 200);
        }
        if is_in_time {
            late.problem(503, "database_unavailable");
            let task = users[BUSY].get(&*paths[BUSY]).await.expect(200).json();
            assert_ne!(task["title"], title.as_str());
            break;
        }
    }
}
