//! Reads that are asked at the same moment travel as one statement. Who asks must not notice: each
//! gets its own answer, whoever else asks, goes away, or has to be asked for again.

use futures_util::future::join_all;
use serde_json::{Value, json};
use tokio::time::{Duration, sleep, timeout};
use tokio_postgres::Client;

use crate::harness::{Request, Response, Server, User, until};
use crate::metrics::scrape;

/// A user with tasks, newest first.
struct Person {
    user: User,
    tasks: Vec<Value>,
}

/// Seven people with one to seven tasks each.
async fn people(server: &Server) -> Vec<Person> {
    let mut people = Vec::new();
    for person in 1..=7 {
        let user = server.user().await;
        let mut tasks = Vec::new();
        for task in 0..person {
            let title = format!("task {task} of person {person}");
            tasks.insert(0, user.create_task(&title).await);
        }
        people.push(Person { user, tasks });
    }
    open_connections(server).await;
    people
}

/// A request, and the answer that it has to get: the task, the page, or nothing.
type Asked = (Request, Option<Value>);

/// Everybody asks for each of their own tasks, for one of somebody else's under their own path, for
/// one that is not there, and for pages from the beginning and from the middle.
fn questions(server: &Server, people: &[Person]) -> Vec<Asked> {
    let mut asked = Vec::new();
    for (n, Person { user, tasks }) in people.iter().enumerate() {
        let mut ask = |path: String, answer| {
            asked.push((server.get(path).bearer(&user.access_token), answer));
        };
        for (at, task) in tasks.iter().enumerate() {
            ask(user.path_of(task), Some(task.clone()));
            let id = task["id"].as_str().unwrap().replace('-', "");
            let rest = tasks[at + 1..].iter().take(2).cloned().collect();
            ask(
                format!("{}?limit=2&after={id}", user.tasks()),
                Some(Value::Array(rest)),
            );
        }
        ask(user.path_of(&people[(n + 1) % people.len()].tasks[0]), None);
        ask(
            format!("{}/01900000-0000-7000-8000-000000000000", user.tasks()),
            None,
        );
        let first = tasks.iter().take(3).cloned().collect();
        ask(
            format!("{}?limit=3", user.tasks()),
            Some(Value::Array(first)),
        );
        ask(
            format!("{}?limit=100", user.tasks()),
            Some(Value::Array(tasks.clone())),
        );
    }
    asked
}

fn assert_answered(answer: &Response, expected: Option<&Value>) {
    match expected {
        Some(expected) => {
            assert_eq!(answer.status, 200);
            assert_eq!(answer.json(), *expected);
        }
        None => {
            answer.problem(404, "task_not_found");
        }
    }
}

async fn metric(server: &Server, name: &str) -> usize {
    let text = scrape(server).await;
    let value = text
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    value.unwrap().parse().unwrap()
}

/// Statements that the service has had answers to so far.
async fn statements(server: &Server) -> usize {
    metric(server, "todo_api_db_query_duration_seconds_count").await
}

/// Keeps everybody from reading tasks until `commit`.
async fn hold_tasks(server: &Server) -> Client {
    let sql = server.sql().await;
    sql.batch_execute("begin; lock table tasks in access exclusive mode")
        .await
        .unwrap();
    sql
}

/// Waits until as many reads, whoever asked for how many of them, wait for the tasks.
async fn waiting(watch: &Client, statements: i64) {
    let question = "select count(*) from pg_stat_activity
                    where datname = current_database() and wait_event_type = 'Lock'
                      and query like '%with ordinality%'";
    until("reads wait for the tasks", async || {
        let waiting: i64 = watch.query_one(question, &[]).await.unwrap().get(0);
        waiting >= statements
    })
    .await;
}

/// Makes the service open some connections: while the tasks are held it cannot prepare any.
async fn open_connections(server: &Server) {
    let user = server.user().await;
    let task = user.create_task("a").await;
    let path = user.path_of(&task);
    let (sql, watch) = (server.sql().await, server.sql().await);
    let row = format!(
        "begin; select from tasks where id = {} for update",
        task["id"]
    );
    sql.batch_execute(&row.replace('"', "'")).await.unwrap();
    let change = || {
        server
            .patch(&*path)
            .bearer(&user.access_token)
            .json(json!({"title": "b"}))
            .send()
    };
    let release = async {
        let question = "select count(*) from pg_stat_activity
                        where datname = current_database() and wait_event_type = 'Lock'";
        until("all connections are open", async || {
            let waiting: i64 = watch.query_one(question, &[]).await.unwrap().get(0);
            waiting >= 4
        })
        .await;
        sql.batch_execute("commit").await.unwrap();
    };
    let (answers, ()) = tokio::join!(join_all((0..4).map(|_| change())), release);
    for answer in answers {
        answer.expect(200);
    }
}

// SC-004
#[tokio::test]
async fn reads_that_travel_together_each_bring_back_their_own() {
    let server = Server::with(&[("METRICS_ADDR", "127.0.0.1:0")]).await;
    let people = people(&server).await;
    let (requests, expected): (Vec<_>, Vec<_>) = questions(&server, &people).into_iter().unzip();
    let asked = requests.len();
    assert!(asked > 60);
    let before = statements(&server).await;
    let (held, watch) = (hold_tasks(&server).await, server.sql().await);
    let release = async {
        waiting(&watch, 3).await;
        until("all of them have come", async || {
            metric(&server, "todo_api_http_open_connections").await >= asked
        })
        .await;
        held.batch_execute("commit").await.unwrap();
    };
    let sent = join_all(requests.into_iter().map(Request::send));
    let (answers, ()) = tokio::join!(sent, release);
    for (answer, expected) in answers.iter().zip(&expected) {
        assert_answered(answer, expected.as_ref());
    }
    let made = statements(&server).await - before;
    assert!(
        made < asked,
        "{made} statements for {asked} questions: nothing was gathered"
    );
}

#[tokio::test]
async fn who_goes_away_takes_nobodys_answer_with_them() {
    let server = Server::start().await;
    let people = people(&server).await;
    let (held, watch) = (hold_tasks(&server).await, server.sql().await);
    // Every other one hangs up while all of them wait.
    let asked = questions(&server, &people).into_iter().enumerate();
    let sent = join_all(asked.map(async |(n, (request, expected))| match n % 2 {
        0 => {
            timeout(Duration::from_millis(100), request.send())
                .await
                .ok();
        }
        _ => assert_answered(&request.await, expected.as_ref()),
    }));
    let release = async {
        waiting(&watch, 3).await;
        sleep(Duration::from_millis(150)).await;
        held.batch_execute("commit").await.unwrap();
    };
    tokio::join!(sent, release);
}

#[tokio::test]
async fn reads_whose_connection_is_lost_are_asked_again() {
    let server = Server::start().await;
    let people = people(&server).await;
    let (requests, expected): (Vec<_>, Vec<_>) = questions(&server, &people).into_iter().unzip();
    let (held, watch) = (hold_tasks(&server).await, server.sql().await);
    let cut = async {
        waiting(&watch, 3).await;
        let cut = "select count(pg_terminate_backend(pid)) from pg_stat_activity
                   where datname = current_database() and wait_event_type = 'Lock'";
        let cut: i64 = watch.query_one(cut, &[]).await.unwrap().get(0);
        assert!(cut >= 3);
        held.batch_execute("commit").await.unwrap();
    };
    let sent = join_all(requests.into_iter().map(Request::send));
    let (answers, ()) = tokio::join!(sent, cut);
    for (answer, expected) in answers.iter().zip(&expected) {
        assert_answered(answer, expected.as_ref());
    }
}

// One statement that hangs must not be what everybody waits for.
#[tokio::test]
async fn a_read_that_is_stuck_holds_up_no_other() {
    let server = Server::start().await;
    let (ann, bob) = (server.user().await, server.user().await);
    let mut paths = Vec::new();
    for user in [&ann, &bob] {
        paths.push(user.path_of(&user.create_task("a").await));
    }
    open_connections(&server).await;
    let (held, watch) = (hold_tasks(&server).await, server.sql().await);
    let stuck = async {
        let ask = || async {
            ann.get(&*paths[0]).await.expect(200);
        };
        tokio::join!(ask(), async {
            waiting(&watch, 1).await;
            ask().await;
        });
    };
    let others = async {
        // As many as senders are stuck, and what comes now is sent all the same.
        waiting(&watch, 2).await;
        let next = bob.get(&*paths[1]).send();
        let ((), next) = tokio::join!(
            async {
                waiting(&watch, 3).await;
                held.batch_execute("commit").await.unwrap();
            },
            next
        );
        assert_eq!(next.expect(200).json()["title"], json!("a"));
    };
    tokio::join!(stuck, others);
}
