//! Concurrent reads are batched: each client gets its own tasks, and the failure of one read does not
//! affect the others in its batch.

use futures_util::future::join_all;
use serde_json::{Value, json};
use tokio::time::{Duration, sleep, timeout};

use crate::harness::{Lock, Request, Response, Server, User, until};
use crate::metrics::gauge;

/// The number of connections that requests share with the default `DB_POOL_SIZE` of test servers.
const POOL_SIZE: usize = 4;

/// A user and their tasks, newest first.
struct Account {
    user: User,
    tasks: Vec<Value>,
}

/// Creates seven users with one to seven tasks.
async fn create_accounts(server: &Server) -> Vec<Account> {
    let mut accounts = Vec::new();
    for number in 1..=7 {
        let user = server.user().await;
        let mut tasks = Vec::new();
        for task in 0..number {
            let title = format!("task {task} of user {number}");
            tasks.insert(0, user.create_task(&title).await);
        }
        accounts.push(Account { user, tasks });
    }
    open_connections(server, POOL_SIZE).await;
    accounts
}

/// A request and the body of its response, or `None` for 404.
type Case = (Request, Option<Value>);

/// Returns for each user: a request for each of their tasks, for a task of another user, for a task that
/// does not exist, and for first and later pages.
fn cases(accounts: &[Account]) -> Vec<Case> {
    let mut cases = Vec::new();
    for (n, Account { user, tasks }) in accounts.iter().enumerate() {
        let mut add = |path: String, body| {
            cases.push((user.get(path), body));
        };
        for (at, task) in tasks.iter().enumerate() {
            add(user.path_of(task), Some(task.clone()));
            let id = task["id"].as_str().unwrap().replace('-', "");
            let rest = tasks[at + 1..].iter().take(2).cloned().collect();
            add(
                format!("{}?limit=2&after={id}", user.tasks()),
                Some(Value::Array(rest)),
            );
        }
        add(
            user.path_of(&accounts[(n + 1) % accounts.len()].tasks[0]),
            None,
        );
        add(
            format!("{}/01900000-0000-7000-8000-000000000000", user.tasks()),
            None,
        );
        let first = tasks.iter().take(3).cloned().collect();
        add(
            format!("{}?limit=3", user.tasks()),
            Some(Value::Array(first)),
        );
        add(
            format!("{}?limit=100", user.tasks()),
            Some(Value::Array(tasks.clone())),
        );
    }
    cases
}

fn assert_response(response: &Response, expected: Option<&Value>) {
    match expected {
        Some(expected) => {
            assert_eq!(response.status, 200);
            assert_eq!(response.json(), *expected);
        }
        None => {
            response.problem(404, "task_not_found");
        }
    }
}

/// Returns the number of statements that the service has executed.
pub(crate) async fn statement_count(server: &Server) -> usize {
    gauge(server, "todo_api_db_query_duration_seconds_count").await
}

/// Locks the table, so that reads are blocked.
async fn lock_tasks(server: &Server) -> Lock {
    server
        .lock("lock table tasks in access exclusive mode")
        .await
}

/// Makes the service open this many connections, because it cannot prepare new ones while the table of
/// tasks is locked.
pub(crate) async fn open_connections(server: &Server, count: usize) {
    let users = server.users(count).await;
    let lock = server.lock("select from task_lists for update").await;
    let create = |user: &User| user.create(json!({"title": "a"})).send();
    let creates = join_all(users.iter().map(create));
    let (responses, ()) = tokio::join!(creates, lock.release_after(count as i64));
    for response in responses {
        response.expect(201);
    }
}

// SC-004
#[tokio::test]
async fn batched_reads_return_each_users_own_tasks() {
    let server = Server::with(&[("METRICS_ADDR", "127.0.0.1:0")]).await;
    let accounts = create_accounts(&server).await;
    let (requests, expected): (Vec<_>, Vec<_>) = cases(&accounts).into_iter().unzip();
    let count = requests.len();
    assert!(count > 60);
    let before = statement_count(&server).await;
    let lock = lock_tasks(&server).await;
    let release = async {
        lock.wait_for_blocked(3).await;
        until("all requests have arrived", async || {
            gauge(&server, "todo_api_http_open_connections").await >= count
        })
        .await;
        lock.release().await;
    };
    let sent = join_all(requests.into_iter().map(Request::send));
    let (responses, ()) = tokio::join!(sent, release);
    for (response, expected) in responses.iter().zip(&expected) {
        assert_response(response, expected.as_ref());
    }
    let executed = statement_count(&server).await - before;
    assert!(
        executed < count,
        "{executed} statements for {count} requests: nothing was batched"
    );
}

#[tokio::test]
async fn a_client_that_disconnects_does_not_affect_its_batch() {
    let server = Server::start().await;
    let accounts = create_accounts(&server).await;
    let lock = lock_tasks(&server).await;
    // Every second client disconnects while all requests are blocked.
    let cases = cases(&accounts).into_iter().enumerate();
    let sent = join_all(cases.map(async |(n, (request, expected))| match n % 2 {
        0 => {
            timeout(Duration::from_millis(100), request.send())
                .await
                .ok();
        }
        _ => assert_response(&request.await, expected.as_ref()),
    }));
    let release = async {
        lock.wait_for_blocked(3).await;
        sleep(Duration::from_millis(150)).await;
        lock.release().await;
    };
    tokio::join!(sent, release);
}

#[tokio::test]
async fn batched_reads_are_retried_if_their_connection_is_lost() {
    let server = Server::start().await;
    let accounts = create_accounts(&server).await;
    let (requests, expected): (Vec<_>, Vec<_>) = cases(&accounts).into_iter().unzip();
    let lock = lock_tasks(&server).await;
    let terminate = async {
        lock.wait_for_blocked(3).await;
        assert!(lock.terminate_blocked().await >= 3);
        lock.release().await;
    };
    let sent = join_all(requests.into_iter().map(Request::send));
    let (responses, ()) = tokio::join!(sent, terminate);
    for (response, expected) in responses.iter().zip(&expected) {
        assert_response(response, expected.as_ref());
    }
}

#[tokio::test]
async fn a_blocked_batch_does_not_delay_other_reads() {
    let server = Server::start().await;
    let (ann, bob) = (server.user().await, server.user().await);
    let mut paths = Vec::new();
    for user in [&ann, &bob] {
        paths.push(user.path_of(&user.create_task("a").await));
    }
    open_connections(&server, POOL_SIZE).await;
    let lock = lock_tasks(&server).await;
    let blocked = async {
        let read = || async {
            ann.get(&*paths[0]).await.expect(200);
        };
        tokio::join!(read(), async {
            lock.wait_for_blocked(1).await;
            read().await;
        });
    };
    let others = async {
        // Both workers are blocked, so a third one starts.
        lock.wait_for_blocked(2).await;
        let next = bob.get(&*paths[1]).send();
        let ((), next) = tokio::join!(lock.release_after(3), next);
        assert_eq!(next.expect(200).json()["title"], json!("a"));
    };
    tokio::join!(blocked, others);
}
