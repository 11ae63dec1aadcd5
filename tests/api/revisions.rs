//! Every change of a user's tasks raises the revision of their list by one.

use futures_util::future::join_all;
use serde_json::{Value, json};
use tokio_postgres::Client;

use crate::harness::{Request, Server, User};

/// A row of `task_lists`, and the number of the list's tombstones.
#[derive(Debug, PartialEq)]
struct List {
    revision: i64,
    tasks: i64,
    tombstones: i64,
}

impl List {
    /// Reads the list of a user, and asserts that its number of tasks is right and that no task or
    /// tombstone has a later revision.
    async fn read(sql: &Client, user: &User) -> List {
        let query = "
            select l.revision, l.tasks::bigint,
                   (select count(*) from deleted_tasks d where d.user_id = l.user_id),
                   (select count(*) from tasks t where t.user_id = l.user_id),
                   (select coalesce(max(revision), 0) from tasks t where t.user_id = l.user_id),
                   (select coalesce(max(revision), 0) from deleted_tasks d where d.user_id = l.user_id)
            from task_lists l where l.user_id::text = $1";
        let row = sql.query_one(query, &[&user.id]).await.unwrap();
        let number = |n: usize| row.get::<_, i64>(n);
        assert_eq!(number(1), number(3), "the number of tasks");
        assert!(number(0) >= number(4).max(number(5)), "the last revision");
        List {
            revision: number(0),
            tasks: number(1),
            tombstones: number(2),
        }
    }
}

#[tokio::test]
async fn each_change_raises_the_revision_once_and_a_request_without_effect_does_not() {
    let server = Server::start().await;
    let sql = server.sql().await;
    let (ann, bob) = (server.user().await, server.user().await);
    let task = ann.create_task("a").await;
    let path = ann.path_of(&task);
    let theirs = bob.path_of(&bob.create_task("b").await);
    let complete = format!("{path}/complete");
    let completed = format!("{}?completed=true", ann.tasks());
    let keyed = |title: &str| {
        ann.create(json!({"title": title}))
            .header("idempotency-key", "k")
    };
    let change = |body: Value| ann.put(&*path).json(body);
    let mut expected = List::read(&sql, &ann).await;
    assert_eq!(expected.revision, 1);
    // The request, its status, and by how much the revision, the tasks and the tombstones grow.
    let steps: Vec<(Request, u16, [i64; 3])> = vec![
        (
            ann.create(json!({"title": "b", "completed": true})),
            201,
            [1, 1, 0],
        ),
        (keyed("c"), 201, [1, 1, 0]),
        (keyed("c"), 201, [0, 0, 0]),
        (keyed("d"), 422, [0, 0, 0]),
        (ann.create(json!({"title": ""})), 422, [0, 0, 0]),
        (change(json!({"title": "e"})), 200, [1, 0, 0]),
        // A change to the same values moves `updated_at`.
        (change(json!({"title": "e"})), 200, [1, 0, 0]),
        (
            change(json!({"title": "f"})).header("if-match", "\"1\""),
            412,
            [0, 0, 0],
        ),
        (ann.patch(&*complete), 200, [1, 0, 0]),
        (
            ann.patch(&*complete).json(json!({"completed": true})),
            200,
            [1, 0, 0],
        ),
        (
            ann.put(theirs.replace(&bob.id, &ann.id))
                .json(json!({"title": "f"})),
            404,
            [0, 0, 0],
        ),
        (
            ann.delete(&*path).header("if-match", "\"1\""),
            412,
            [0, 0, 0],
        ),
        (ann.delete(theirs.replace(&bob.id, &ann.id)), 404, [0, 0, 0]),
        (ann.get(ann.tasks()), 200, [0, 0, 0]),
        (ann.get(&*path), 200, [0, 0, 0]),
        (ann.delete(&*completed), 200, [1, -2, 2]),
        (ann.delete(&*completed), 200, [0, 0, 0]),
        (ann.delete(&*path), 404, [0, 0, 0]),
    ];
    for (n, (request, status, [revision, tasks, tombstones])) in steps.into_iter().enumerate() {
        request.await.expect(status);
        expected.revision += revision;
        expected.tasks += tasks;
        expected.tombstones += tombstones;
        assert_eq!(List::read(&sql, &ann).await, expected, "step {n}");
    }
    assert_eq!(List::read(&sql, &bob).await.revision, 1);
}

/// The previous release and operators delete tasks in this way. Updating the list once per task
/// would take quadratic time.
#[tokio::test]
async fn a_deletion_without_a_revision_raises_the_revision_once_for_all_tasks() {
    let server = Server::start().await;
    let sql = server.sql().await;
    let (ann, bob) = (server.user().await, server.user().await);
    for user in [&ann, &ann, &bob] {
        user.create_task("a").await;
    }
    sql.execute("delete from tasks", &[]).await.unwrap();
    for (user, tombstones) in [(&ann, 2), (&bob, 1)] {
        let expected = List {
            revision: tombstones + 1,
            tasks: 0,
            tombstones,
        };
        assert_eq!(List::read(&sql, user).await, expected);
    }
    let none = sql.execute("delete from tasks", &[]).await.unwrap();
    assert_eq!((none, List::read(&sql, &ann).await.revision), (0, 3));
}

/// Concurrent requests wait for the list's lock, in any order, and then see each other's changes.
#[tokio::test]
async fn concurrent_changes_of_one_list_keep_its_revision_and_count() {
    let server = Server::start().await;
    let there = server.sibling(&[]).await;
    let sql = server.sql().await;
    let ann = server.user().await;
    let task = ann.create_task("a").await;
    let done = json!({"title": "b", "completed": true});
    ann.create(done.clone()).await.expect(201);
    let path = ann.path_of(&task);
    let lock = server.lock("select from task_lists for update").await;
    let here_and_there = [ann.clone(), ann.on(&there)];
    let requests = here_and_there.iter().flat_map(|ann| {
        let completed = format!("{}?completed=true", ann.tasks());
        [
            ann.create(done.clone()),
            ann.put(&*path).json(json!({"title": "c"})),
            ann.delete(&*path),
            ann.delete(completed),
        ]
    });
    let sent = join_all(requests.map(Request::send));
    let (responses, ()) = tokio::join!(sent, lock.release_after(4));
    let statuses: Vec<u16> = responses.iter().map(|response| response.status).collect();
    let count = |status| statuses.iter().filter(|found| **found == status).count();
    assert_eq!((count(201), count(204)), (2, 1), "{statuses:?}");
    let list = List::read(&sql, &ann).await;
    let tasks = ann.get(ann.tasks()).await.expect(200).json();
    assert_eq!(
        list.tasks as usize,
        tasks.as_array().unwrap().len(),
        "{list:?}"
    );
    // Four tasks were created; each of them is in the list or deleted.
    assert_eq!(list.tasks as i64 + list.tombstones as i64, 4, "{list:?}");
}
