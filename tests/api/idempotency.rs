//! `Idempotency-Key`: a create request that is sent repeatedly takes effect once.

use futures_util::future::{join, join_all};
use serde_json::{Value, json};

use crate::harness::{Response, Server, User};

async fn create(user: &User, key: &str, body: Value) -> Response {
    user.post(user.tasks())
        .header("idempotency-key", key)
        .json(body)
        .await
}

/// Counts a user's tasks.
async fn count(user: &User) -> usize {
    let tasks = user.get(user.tasks()).await.expect(200).json();
    tasks.as_array().unwrap().len()
}

/// Returns the parts of a response that must be the same for every repetition.
fn stable_parts(response: &Response) -> (u16, String, String, Value) {
    let header = |name| response.header(name).to_owned();
    (
        response.status,
        header("location"),
        header("etag"),
        response.json(),
    )
}

#[tokio::test]
async fn a_repeated_request_gets_the_first_response_and_creates_nothing() {
    let server = Server::shared().await;
    let ann = server.user().await;
    let body = json!({"title": " a ", "description": "b", "completed": true});
    let first = stable_parts(&create(&ann, "key", body.clone()).await.expect(201));
    for _ in 0..3 {
        assert_eq!(
            stable_parts(&create(&ann, "key", body.clone()).await),
            first
        );
    }
    assert_eq!(count(&ann).await, 1);
    let request = ann.get(ann.path_of(&first.3));
    assert_eq!(
        request.await.expect(200).json(),
        first.3,
        "the response differs from the stored task"
    );
    let other = create(&ann, "other", body.clone()).await.expect(201).json();
    assert_ne!(
        other["id"], first.3["id"],
        "another key must create another task"
    );
    let request = ann.create(body);
    assert_ne!(
        request.await.expect(201).json()["id"],
        first.3["id"],
        "no key must create another task"
    );
    assert_eq!(count(&ann).await, 3);
}

#[tokio::test]
async fn twenty_concurrent_copies_on_two_instances_create_one_task() {
    let server = Server::start().await;
    let sibling = server.sibling(&[]).await;
    let ann = server.user().await;
    for round in 0..3 {
        let key = format!("round-{round}");
        let lock = server.lock("lock table tasks in exclusive mode").await;
        let copies = (0..20).map(|n| {
            let instance = if n % 2 == 0 { &server } else { &sibling };
            ann.on(instance)
                .post(ann.tasks())
                .header("idempotency-key", &key)
                .json(json!({"title": "once", "description": key}))
                .send()
        });
        let (responses, ()) = join(join_all(copies), lock.release_after(4)).await;
        let responses: Vec<_> = responses
            .into_iter()
            .map(|response| stable_parts(&response.expect(201)))
            .collect();
        assert!(
            responses.iter().all(|response| *response == responses[0]),
            "{responses:#?}"
        );
        assert_eq!(count(&ann).await, round + 1);
    }
}

#[tokio::test]
async fn one_of_several_concurrent_requests_with_one_key_and_different_values_succeeds() {
    let server = Server::start().await;
    let ann = server.user().await;
    let lock = server.lock("lock table tasks in exclusive mode").await;
    let rivals = (0..4).map(|n| create(&ann, "key", json!({"title": format!("rival {n}")})));
    let (responses, ()) = join(join_all(rivals), lock.release_after(2)).await;
    let (won, lost): (Vec<_>, Vec<_>) = responses
        .into_iter()
        .partition(|response| response.status == 201);
    assert_eq!(won.len(), 1);
    for response in lost {
        response.problem(422, "idempotency_key_reused");
    }
    assert_eq!(count(&ann).await, 1);
}

#[tokio::test]
async fn a_repeated_request_returns_the_task_as_it_was_created() {
    let server = Server::shared().await;
    let ann = server.user().await;
    let body = json!({"title": "a", "description": "as created"});
    let first = stable_parts(&create(&ann, "key", body.clone()).await.expect(201));
    let path = ann.path_of(&first.3);
    let change = json!({"title": "b", "description": null, "completed": true});
    let changed = ann.patch(&path).json(change).await.expect(200).json();
    assert_eq!(
        stable_parts(&create(&ann, "key", body.clone()).await),
        first
    );
    let read = ann.get(&path).await.expect(200).json();
    assert_eq!(read, changed, "the repeated request reverted the task");

    ann.delete(&path).await.expect(204);
    assert_eq!(stable_parts(&create(&ann, "key", body).await), first);
    ann.get(&path).await.problem(404, "task_not_found");
    assert_eq!(count(&ann).await, 0);
}

#[tokio::test]
async fn rejects_a_key_with_other_values() {
    let server = Server::shared().await;
    let ann = server.user().await;
    let body = json!({"title": "a", "description": "b", "completed": false});
    let first = stable_parts(&create(&ann, "key", body.clone()).await.expect(201));
    for other in [
        json!({"title": "A", "description": "b"}),
        json!({"title": "a", "description": "B"}),
        json!({"title": "a", "description": ""}),
        json!({"title": "a", "description": null}),
        json!({"title": "a"}),
        json!({"title": "a", "description": "b", "completed": true}),
    ] {
        let response = create(&ann, "key", other.clone()).await;
        assert_eq!(response.status, 422, "{other}");
        let problem = response.problem(422, "idempotency_key_reused");
        assert!(!problem.to_string().contains("as created"));
    }
    // Null equals a missing description, but not an empty one.
    create(&ann, "null", json!({"title": "a"}))
        .await
        .expect(201);
    create(&ann, "null", json!({"title": "a", "description": null}))
        .await
        .expect(201);
    let response = create(&ann, "null", json!({"title": "a", "description": ""})).await;
    response.problem(422, "idempotency_key_reused");
    // The key still returns the first task.
    assert_eq!(stable_parts(&create(&ann, "key", body).await), first);
    assert_eq!(count(&ann).await, 2);
}

#[tokio::test]
async fn compares_values_rather_than_json_text() {
    let server = Server::shared().await;
    let ann = server.user().await;
    let bodies = [
        r#"{"title":"é😀","description":"b"}"#,
        r#"{ "description" : "b", "title" : "é😀" }"#,
        r#"{"title":"\u00e9\ud83d\ude00","description":"\u0062","completed":false}"#,
        r#"{"title":"  é😀\t","description":"b","unknown":[1,2,3]}"#,
    ];
    let mut responses = Vec::new();
    for body in bodies {
        let request = ann
            .post(ann.tasks())
            .header("idempotency-key", "key")
            .body(body.as_bytes().to_vec(), "application/json; charset=utf-8");
        responses.push(stable_parts(&request.await.expect(201)));
    }
    assert!(
        responses.iter().all(|response| *response == responses[0]),
        "{responses:#?}"
    );
    assert_eq!(count(&ann).await, 1);
}

#[tokio::test]
async fn accepts_keys_of_1_to_255_visible_ascii_characters() {
    let server = Server::shared().await;
    let ann = server.user().await;
    let visible: String = ('!'..='~').collect();
    let mut created = 0;
    for key in ["k".to_owned(), "x".repeat(255), visible] {
        create(&ann, &key, json!({"title": "a"})).await.expect(201);
        create(&ann, &key, json!({"title": "a"})).await.expect(201);
        created += 1;
        assert_eq!(count(&ann).await, created);
    }
    for key in [
        "".to_owned(),
        " ".to_owned(),
        "x".repeat(256),
        "a b".to_owned(),
        "a\tb".to_owned(),
        "é".to_owned(),
    ] {
        let response = create(&ann, &key, json!({"title": "a"})).await;
        assert_eq!(response.status, 400, "{key:?}");
        response.problem(400, "malformed_request");
    }
    let request = ann
        .post(ann.tasks())
        .header("idempotency-key", "one")
        .header("idempotency-key", "two");
    request
        .json(json!({"title": "a"}))
        .await
        .problem(400, "malformed_request");
    assert_eq!(count(&ann).await, created);
    // Keys are case-sensitive.
    create(&ann, "K", json!({"title": "another"}))
        .await
        .expect(201);
}

#[tokio::test]
async fn a_key_belongs_to_one_user() {
    let server = Server::shared().await;
    let (ann, bob) = (server.user().await, server.user().await);
    let anns = create(&ann, "key", json!({"title": "ann's"}))
        .await
        .expect(201)
        .json();
    let bobs = create(&bob, "key", json!({"title": "bob's"}))
        .await
        .expect(201)
        .json();
    assert_eq!(
        (&bobs["title"], &bobs["user_id"]),
        (&json!("bob's"), &json!(bob.id))
    );
    let again = create(&ann, "key", json!({"title": "ann's"}))
        .await
        .expect(201)
        .json();
    assert_eq!(again, anns);
}

#[tokio::test]
async fn a_rejected_request_does_not_use_its_key() {
    let server = Server::shared().await;
    let (ann, bob) = (server.user().await, server.user().await);
    create(&ann, "key", json!({"title": ""}))
        .await
        .problem(422, "validation_failed");
    let send = |path: String, token: &str, body: &'static str, content_type: &str| {
        server
            .post(&path)
            .bearer(token)
            .header("idempotency-key", "key")
            .body(body.as_bytes().to_vec(), content_type)
            .send()
    };
    send(ann.tasks(), &ann.access_token, "{", "application/json")
        .await
        .problem(400, "malformed_json");
    send(ann.tasks(), &ann.access_token, "{}", "text/plain")
        .await
        .problem(415, "unsupported_media_type");
    send(ann.tasks(), &bob.access_token, "{}", "application/json")
        .await
        .problem(403, "forbidden");
    send(ann.tasks(), "bad", "{}", "application/json")
        .await
        .problem(401, "invalid_token");
    create(&ann, "key", json!({"title": "valid"}))
        .await
        .expect(201);
    assert_eq!(count(&ann).await, 1);
}

#[tokio::test]
async fn a_key_expires_after_a_day() {
    let server = Server::start().await;
    let ann = server.user().await;
    let body = json!({"title": "a"});
    let first = create(&ann, "key", body.clone()).await.expect(201).json();
    let sql = server.sql().await;
    let age = |hours: &str| {
        format!("update idempotency_keys set created_at = now() - interval '{hours}'")
    };

    sql.execute(&age("23 hours 59 minutes"), &[]).await.unwrap();
    let again = create(&ann, "key", body.clone()).await.expect(201).json();
    assert_eq!(again["id"], first["id"]);
    let other = json!({"title": "other"});
    create(&ann, "key", other.clone())
        .await
        .problem(422, "idempotency_key_reused");

    sql.execute(&age("24 hours 1 second"), &[]).await.unwrap();
    let second = create(&ann, "key", other.clone()).await.expect(201).json();
    assert_ne!(second["id"], first["id"]);
    assert_eq!(second["title"], "other");
    // The key now refers to the new task.
    assert_eq!(create(&ann, "key", other).await.expect(201).json(), second);
    create(&ann, "key", body)
        .await
        .problem(422, "idempotency_key_reused");
    assert_eq!(count(&ann).await, 2);
}
