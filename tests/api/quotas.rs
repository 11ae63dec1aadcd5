//! Limits on the data and on the write rate of one user.

use futures_util::future::join_all;
use serde_json::json;

use crate::harness::{Request, Response, Server, User, until};

async fn create_with_key(user: &User, key: &str) -> Response {
    let request = user.create(json!({"title": key}));
    request.header("idempotency-key", key).await
}

#[tokio::test]
async fn returns_429_for_writes_beyond_the_rate_limit() {
    // Allows a burst of five writes.
    let server = Server::with(&[("WRITES_PER_MINUTE", "60")]).await;
    let (ann, bob) = (server.user().await, server.user().await);
    let list = ann.tasks();
    let path = ann.path_of(&ann.create_task("water the plants").await);
    let statuses = join_all((0..30).map(async |_| {
        let response = ann.patch(format!("{path}/complete")).await;
        response.status
    }))
    .await;
    let served = statuses.iter().filter(|status| **status == 200).count();
    let rejected = statuses.iter().filter(|status| **status == 429).count();
    assert_eq!(served + rejected, 30, "{statuses:?}");
    assert!((4..15).contains(&served), "{statuses:?}");

    let completed = json!({"completed": true});
    let requests: [&dyn Fn() -> Request; 6] = [
        &|| ann.create(json!({"title": "x"})),
        &|| ann.put(&path).json(completed.clone()),
        &|| ann.patch(&path).json(completed.clone()),
        &|| ann.patch(format!("{path}/complete")),
        &|| ann.delete(format!("{list}/{}", ann.id)),
        &|| ann.delete(format!("{list}?completed=true")),
    ];
    for request in requests {
        // Each second allows another write.
        let mut response = request().await;
        if response.status != 429 {
            response = request().await;
        }
        response.problem(429, "too_many_requests");
        let wait: u32 = response.header("retry-after").parse().expect("seconds");
        assert!((1..=2).contains(&wait), "{wait}");
    }
    ann.get(&list).await.expect(200);
    bob.create_task("feed the cat").await;
}

#[tokio::test]
async fn requests_rejected_without_a_query_do_not_count_as_writes() {
    let server = Server::with(&[("WRITES_PER_MINUTE", "1")]).await;
    let ann = server.user().await;
    for _ in 0..3 {
        ann.create(json!({})).await.expect(422);
        let list = ann.tasks();
        ann.delete(&list).await.expect(422);
        ann.delete(format!("{list}/none")).await.expect(404);
    }
    ann.create_task("the only one of this minute").await;
    ann.create(json!({"title": "x"})).await.expect(429);
}

#[tokio::test]
async fn limits_the_number_of_tasks_of_each_user() {
    let server = Server::with(&[("MAX_TASKS_PER_USER", "3")]).await;
    let (ann, bob) = (server.user().await, server.user().await);
    let statuses = join_all((0..20).map(async |_| {
        let response = ann.create(json!({"title": "x"})).await;
        response.status
    }))
    .await;
    let created = statuses.iter().filter(|status| **status == 201).count();
    let rejected = statuses.iter().filter(|status| **status == 403).count();
    assert_eq!((created, rejected), (3, 17), "{statuses:?}");
    let response = ann.create(json!({"title": "x"})).await;
    response.problem(403, "quota_exceeded");
    bob.create_task("feed the cat").await;

    // Deleting a task allows another one.
    let tasks = ann.get(ann.tasks()).await.expect(200).json();
    ann.delete(ann.path_of(&tasks[0])).await.expect(204);
    ann.create_task("y").await;
    ann.create(json!({"title": "x"})).await.expect(403);
}

#[tokio::test]
async fn a_create_beyond_the_quota_does_not_use_its_key() {
    let server = Server::with(&[("MAX_TASKS_PER_USER", "1")]).await;
    let ann = server.user().await;
    let first = create_with_key(&ann, "first").await.expect(201).json();
    let rejected = create_with_key(&ann, "second").await;
    rejected.problem(403, "quota_exceeded");
    // A repeated request creates nothing, so the quota does not apply.
    let again = create_with_key(&ann, "first").await.expect(201).json();
    assert_eq!(again, first);
    ann.delete(ann.path_of(&first)).await.expect(204);
    let request = ann.create(json!({"title": "with other values"}));
    let request = request.header("idempotency-key", "second");
    request.await.expect(201);
}

#[tokio::test]
async fn concurrent_copies_of_the_last_create_get_the_same_response() {
    let server = Server::with(&[("MAX_TASKS_PER_USER", "1")]).await;
    let ann = server.user().await;
    let lock = server.lock("select from task_lists for update").await;
    let copies = join_all((0..2).map(|_| create_with_key(&ann, "last")));
    let (responses, ()) = tokio::join!(copies, lock.release_after(2));
    let tasks: Vec<_> = responses
        .into_iter()
        .map(|response| response.expect(201).json())
        .collect();
    assert_eq!(tasks[0], tasks[1]);
}

/// The oldest keys beyond 10,000 are deleted by about one keyed request in a hundred.
#[tokio::test]
async fn the_number_of_a_users_idempotency_keys_is_bounded() {
    let server = Server::start().await;
    let (ann, bob) = (server.user().await, server.user().await);
    let sql = server.sql().await;
    for user in [&ann, &bob] {
        sql.execute(
            "insert into idempotency_keys (user_id, key, task_id, title, completed, created_at)
             select $1::text::uuid, 'old ' || n, gen_random_uuid(), 'x', false,
                    now() - n * interval '1 second'
             from generate_series(1, 10050) n",
            &[&user.id],
        )
        .await
        .unwrap();
    }
    let keys = async |user: &User, condition: &str| -> i64 {
        let query = format!(
            "select count(*) from idempotency_keys where user_id = $1::text::uuid and {condition}"
        );
        sql.query_one(&query, &[&user.id]).await.unwrap().get(0)
    };
    let mut created = 0;
    until("the oldest keys are deleted", async || {
        create_with_key(&ann, &format!("new-{created}"))
            .await
            .expect(201);
        created += 1;
        keys(&ann, "true").await <= 10_001
    })
    .await;
    assert_eq!(keys(&ann, "key like 'new-%'").await, created);
    assert!(keys(&ann, "key = 'old 1'").await == 1);
    assert!(keys(&ann, "key = 'old 10050'").await == 0);
    assert_eq!(keys(&bob, "true").await, 10_050);
}
