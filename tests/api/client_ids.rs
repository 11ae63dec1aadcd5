//! `PUT …/tasks/{id}` with `If-None-Match: *` creates a task under an ID that the client chose.

use std::time::{Duration, SystemTime};

use futures_util::future::join_all;
use serde_json::{Value, json};
use uuid::{NoContext, Timestamp, Uuid};

use crate::harness::{Request, Server, User, until};
use crate::purge::age;

impl User {
    /// A request that creates a task under this ID.
    pub(crate) fn create_with_id(&self, id: impl ToString, body: Value) -> Request {
        let path = format!("{}/{}", self.tasks(), id.to_string());
        self.put(path).header("if-none-match", "*").json(body)
    }
}

/// Returns a new ID whose time is this many seconds from now.
fn id_at(seconds: i64) -> Uuid {
    let now = SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap();
    let at = now.as_millis() as i64 + seconds * 1000;
    let (seconds, millis) = ((at / 1000) as u64, (at % 1000) as u32);
    Uuid::new_v7(Timestamp::from_unix(NoContext, seconds, millis * 1_000_000))
}

/// Asserts that `created_at` is the time of the ID.
fn assert_created_at(task: &Value, id: Uuid) {
    let created_at: jiff::Timestamp = task["created_at"].as_str().unwrap().parse().unwrap();
    assert_eq!(created_at.as_millisecond() as u128, id.as_u128() >> 80);
    assert_eq!(created_at.as_microsecond() % 1000, 0);
    assert!(
        task["updated_at"].as_str() >= task["created_at"].as_str(),
        "{task}"
    );
}

#[tokio::test]
async fn a_task_is_created_under_the_id_that_the_client_chose() {
    let server = Server::shared().await;
    let ann = server.user().await;
    let newest = ann.create_task("on the server").await;
    for seconds in [-89 * 86_400, 0, 290] {
        let id = id_at(seconds);
        let body = json!({"title": " a ", "description": "b", "completed": true});
        let created = ann.create_with_id(id, body).await.expect(201);
        let task = created.json();
        assert_eq!(task["id"], id.to_string());
        assert_eq!(
            (&task["title"], &task["description"]),
            (&json!("a"), &json!("b"))
        );
        assert_eq!(task["completed"], true);
        assert_created_at(&task, id);
        assert_eq!(created.header("location"), ann.path_of(&task));
        let read = ann.get(ann.path_of(&task)).await.expect(200);
        assert_eq!(
            (read.json(), read.header("etag")),
            (task, created.header("etag"))
        );
    }
    let list = ann.get(ann.tasks()).await.expect(200).json();
    let list = list.as_array().unwrap();
    assert_eq!(list.len(), 4);
    // Sorted by the creation times that the clients' IDs encode.
    assert!(
        list.windows(2)
            .all(|pair| pair[0]["created_at"].as_str() > pair[1]["created_at"].as_str())
    );
    assert_ne!(list[3], newest);
}

#[tokio::test]
async fn a_repeat_is_412_with_the_tag_of_the_unharmed_task() {
    let server = Server::shared().await;
    let ann = server.user().await;
    let id = id_at(0);
    ann.create_with_id(id, json!({"title": "a"}))
        .await
        .expect(201);
    let path = format!("{}/{id}", ann.tasks());
    ann.put(&*path)
        .json(json!({"title": "b"}))
        .await
        .expect(200);
    let list_tag = ann.list_tag().await;
    let task = ann.get(&*path).await.expect(200);
    let repeat = ann.create_with_id(id, json!({"title": "a"})).await;
    repeat.problem(412, "precondition_failed");
    assert_eq!(repeat.header("etag"), task.header("etag"));
    assert_eq!(ann.get(&*path).await.json(), task.json());
    assert_eq!(ann.list_tag().await, list_tag);
    // Another user's tasks do not matter.
    let bob = server.user().await;
    bob.create_with_id(id, json!({"title": "c"}))
        .await
        .expect(201);
}

#[tokio::test]
async fn a_deleted_id_stays_deleted_for_30_days() {
    let server = Server::start().await;
    let ann = server.user().await;
    let create = |ann: &User, id| ann.create_with_id(id, json!({"title": "a", "completed": true}));
    let (one, bulk) = (id_at(0), id_at(0));
    create(&ann, bulk).await.expect(201);
    ann.delete(format!("{}?completed=true", ann.tasks()))
        .await
        .expect(200);
    create(&ann, one).await.expect(201);
    ann.delete(format!("{}/{one}", ann.tasks()))
        .await
        .expect(204);
    for id in [one, bulk] {
        let refused = create(&ann, id).await;
        refused.problem(412, "precondition_failed");
        assert_eq!(refused.headers.get("etag"), None);
        ann.get(format!("{}/{id}", ann.tasks())).await.expect(404);
    }
    age(&server.sql().await, "deleted_tasks", "31 days", "true").await;
    let there = server.sibling(&[]).await;
    let ann = ann.on(&there);
    until("the tombstones are purged", async || {
        create(&ann, one).await.status == 201
    })
    .await;
}

#[tokio::test]
async fn an_id_that_is_not_a_recent_uuid_of_version_7_is_422() {
    let server = Server::shared().await;
    let ann = server.user().await;
    let valid = id_at(0).to_string();
    let existing = ann.create_task("a").await["id"]
        .as_str()
        .unwrap()
        .to_uppercase();
    for id in [
        "x".to_owned(),
        "f47ac10b-58cc-4372-a567-0e02b2c3d479".into(),
        valid.to_uppercase(),
        valid.replace('-', ""),
        // Another variant.
        format!("{}c{}", &valid[..19], &valid[20..]),
        id_at(-91 * 86_400).to_string(),
        id_at(400).to_string(),
        existing,
    ] {
        let refused = ann.create_with_id(&id, json!({"title": "a"})).await;
        let problem = refused.problem(422, "validation_failed");
        assert_eq!(problem["errors"][0]["parameter"], "id", "{id}");
        // The response lists all errors.
        let refused = ann.create_with_id(&id, json!({"completed": 1})).await;
        assert_eq!(
            refused.problem(422, "validation_failed")["errors"]
                .as_array()
                .unwrap()
                .len(),
            3
        );
    }
    let untitled = ann.create_with_id(&valid, json!({"completed": true})).await;
    let problem = untitled.problem(422, "validation_failed");
    assert_eq!(problem["errors"][0]["pointer"], "/title");
    let both = ann
        .create_with_id(&valid, json!({"title": "a"}))
        .header("if-match", "*");
    both.await.problem(412, "precondition_failed");
    ann.get(format!("{}/{valid}", ann.tasks()))
        .await
        .expect(404);
}

/// Holds even if the task is deleted while a copy of the request waits for the lock on the list.
#[tokio::test]
async fn concurrent_copies_create_one_task_which_a_deletion_removes_for_good() {
    let server = Server::start().await;
    let there = server.sibling(&[]).await;
    let sql = server.sql().await;
    let ann = server.user().await;
    // An instance sends two writes of one user at a time.
    let clients = [ann.clone(), ann.clone(), ann.on(&there), ann.on(&there)];
    for round in 0..3 {
        let id = id_at(0);
        let create = |ann: &User| ann.create_with_id(id, json!({"title": "a"})).send();
        let path = format!("{}/{id}", ann.tasks());
        let held = server.lock("select from task_lists for update").await;
        let release = async {
            held.release_after(4).await;
            // Deletes the task as soon as it exists.
            tokio::time::timeout(Duration::from_secs(10), async {
                while ann.delete(&*path).await.status != 204 {}
            })
            .await
            .unwrap();
        };
        let copies = join_all(clients.iter().map(create));
        let (copies, ()) = tokio::join!(copies, release);
        let mut statuses: Vec<_> = copies.iter().map(|response| response.status).collect();
        statuses.sort();
        assert_eq!(statuses, [201, 412, 412, 412], "{round}");
        ann.get(&*path).await.expect(404);
        let list: i32 = sql
            .query_one("select tasks from task_lists", &[])
            .await
            .unwrap()
            .get(0);
        assert_eq!(list, 0);
    }
}
