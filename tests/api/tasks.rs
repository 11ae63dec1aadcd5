//! The operations on tasks: their effects and responses.

use futures_util::future::join_all;
use hyper::Method;
use serde_json::{Value, json};
use uuid::Uuid;

use crate::harness::{Server, User};

/// Lists tasks with `query` and returns their titles in order.
async fn titles(user: &User, query: &str) -> Vec<String> {
    let path = format!("{}{query}", user.tasks());
    let tasks = user.get(&path).await.expect(200).json();
    let tasks = tasks.as_array().expect("a list").iter();
    tasks
        .map(|task| task["title"].as_str().unwrap().to_owned())
        .collect()
}

/// Creates a task, and asserts that the response equals the stored task.
async fn create(user: &User, body: Value) -> Value {
    let task = user.create(body).await.expect(201).json();
    let request = user.get(user.path_of(&task));
    assert_eq!(request.await.expect(200).json(), task);
    task
}

// FR-005, FR-009
#[tokio::test]
async fn returns_a_new_task_with_its_location() {
    let server = Server::shared().await;
    let ann = server.user().await;
    let response = ann
        .post(ann.tasks())
        .json(json!({"title": "Sow peas", "description": "in rows"}))
        .await;
    let response = response.expect(201);
    let task = response.json();
    let members: Vec<_> = task
        .as_object()
        .unwrap()
        .keys()
        .map(String::as_str)
        .collect();
    let all = [
        "completed",
        "created_at",
        "description",
        "id",
        "title",
        "updated_at",
        "user_id",
    ];
    assert_eq!(members, all);
    assert_eq!(task["title"], "Sow peas");
    assert_eq!(task["description"], "in rows");
    assert_eq!(task["completed"], false);
    assert_eq!(task["user_id"], json!(ann.id));
    assert_eq!(response.header("location"), ann.path_of(&task));
    assert_eq!(response.header("content-type"), "application/json");
}

#[tokio::test]
async fn creates_a_completed_task_or_one_without_a_description() {
    let server = Server::shared().await;
    let ann = server.user().await;
    let bare = create(&ann, json!({"title": "a"})).await;
    assert_eq!(
        (&bare["description"], &bare["completed"]),
        (&Value::Null, &json!(false))
    );
    let null = create(&ann, json!({"title": "b", "description": null})).await;
    assert_eq!(null["description"], Value::Null);
    let done = create(&ann, json!({"title": "c", "completed": true})).await;
    assert_eq!(done["completed"], true);
}

#[tokio::test]
async fn keeps_an_empty_description() {
    let server = Server::shared().await;
    let ann = server.user().await;
    let mut task = create(&ann, json!({"title": "a", "description": ""})).await;
    assert_eq!(task["description"], "");
    let path = ann.path_of(&task);
    for description in ["  not trimmed  ", ""] {
        let body = json!({"description": description});
        let request = ann.put(&path).json(body);
        task = request.await.expect(200).json();
        assert_eq!(task["description"], description);
    }
    assert_eq!(ann.get(&path).await.json(), task);
}

#[tokio::test]
async fn ignores_the_id_owner_and_times_that_a_client_sends() {
    let server = Server::shared().await;
    let (ann, bob) = (server.user().await, server.user().await);
    let chosen_id = Uuid::now_v7().to_string();
    let body = json!({
        "title": "a", "id": chosen_id, "user_id": bob.id,
        "created_at": "2001-01-01T00:00:00.000000Z", "updated_at": "2001-01-01T00:00:00.000000Z",
    });
    let task = create(&ann, body).await;
    assert_ne!(task["id"], json!(chosen_id));
    assert_eq!(task["user_id"], json!(ann.id));
    assert!(task["created_at"].as_str().unwrap() > "2002");
    let body = json!({"title": "b", "user_id": bob.id, "id": chosen_id});
    let changed = ann
        .patch(ann.path_of(&task))
        .json(body)
        .await
        .expect(200)
        .json();
    assert_eq!(
        (&changed["id"], &changed["user_id"]),
        (&task["id"], &task["user_id"])
    );
}

#[tokio::test]
async fn ids_are_lower_case_uuids_of_version_7() {
    let server = Server::shared().await;
    let ann = server.user().await;
    let task = ann.create_task("a").await;
    for id in [&ann.id, &ann.session_id, task["id"].as_str().unwrap()] {
        let parsed = Uuid::parse_str(id).expect("a UUID");
        assert_eq!(parsed.get_version_num(), 7, "{id}");
        assert_eq!(&parsed.hyphenated().to_string(), id);
    }
}

#[tokio::test]
async fn returns_404_for_other_forms_of_an_id() {
    let server = Server::shared().await;
    let ann = server.user().await;
    let task = ann.create_task("a").await;
    let id = task["id"].as_str().unwrap();
    let others = [
        id.to_uppercase(),
        id.replace('-', ""),
        format!("%7B{id}%7D"),
        format!("urn:uuid:{id}"),
    ];
    for other in others.iter().filter(|other| *other != id) {
        let path = format!("{}/{other}", ann.tasks());
        let response = ann.get(&path).await;
        response.problem(404, "task_not_found");
    }
}

#[tokio::test]
async fn times_are_utc_with_six_fractional_digits() {
    let server = Server::start().await;
    let ann = server.user().await;
    let task = ann.create_task("a").await;
    let shape = |time: &str| {
        time.chars()
            .map(|c| if c.is_ascii_digit() { '0' } else { c })
            .collect::<String>()
    };
    for time in [&task["created_at"], &task["updated_at"]] {
        assert_eq!(shape(time.as_str().unwrap()), "0000-00-00T00:00:00.000000Z");
    }
    let whole = "update tasks set created_at = '2026-02-05 10:30:00+01', updated_at = '2026-02-05 09:30:00.5+00'";
    server.sql().await.execute(whole, &[]).await.unwrap();
    let read = ann.get(ann.path_of(&task)).await.expect(200).json();
    assert_eq!(read["created_at"], "2026-02-05T09:30:00.000000Z");
    assert_eq!(read["updated_at"], "2026-02-05T09:30:00.500000Z");
}

#[tokio::test]
async fn concurrently_created_tasks_are_listed_in_the_order_of_created_at() {
    let server = Server::shared().await;
    let ann = server.user().await;
    let create = async |n: i32| {
        ann.post(ann.tasks())
            .json(json!({"title": n.to_string()}))
            .await
    };
    let responses = join_all((0..50).map(create)).await;
    // A slow machine may reject some requests as overloaded.
    let created = responses
        .iter()
        .filter(|response| response.status == 201)
        .count();
    assert!(created > 1, "{responses:?}");
    for (query, newest_first) in [
        ("", true),
        ("?sort=-created_at", true),
        ("?sort=created_at", false),
    ] {
        let path = format!("{}{query}", ann.tasks());
        let tasks = ann.get(&path).await.expect(200).json();
        let times: Vec<_> = tasks
            .as_array()
            .unwrap()
            .iter()
            .map(|t| t["created_at"].as_str().unwrap())
            .collect();
        assert_eq!(times.len(), created);
        let mut sorted = times.clone();
        sorted.sort_unstable();
        if newest_first {
            sorted.reverse();
        }
        assert_eq!(times, sorted, "{query}");
    }
}

// FR-009
#[tokio::test]
async fn put_and_patch_change_only_the_given_fields() {
    let server = Server::shared().await;
    let ann = server.user().await;
    for method in [Method::PUT, Method::PATCH] {
        let changes = [
            json!({"title": "new"}),
            json!({"description": "other"}),
            json!({"completed": true}),
            json!({"completed": false, "title": "newer"}),
            json!({"title": "a", "description": "b", "completed": true}),
            json!({"title": "  trimmed \u{3000}", "unknown": 1}),
        ];
        let mut task = create(&ann, json!({"title": "old", "description": "it"})).await;
        let path = ann.path_of(&task);
        for change in changes {
            let changed = ann
                .request(method.clone(), &path)
                .json(change.clone())
                .await
                .expect(200)
                .json();
            assert!(changed["updated_at"].as_str() > task["updated_at"].as_str());
            for (member, value) in change.as_object().unwrap() {
                match (member.as_str(), value.as_str()) {
                    ("unknown", _) => {}
                    ("title", Some(title)) => task["title"] = json!(title.trim()),
                    _ => task[member] = value.clone(),
                }
            }
            task["updated_at"] = changed["updated_at"].clone();
            assert_eq!(changed, task, "{method} {change}");
            let read = ann.get(&path).await.expect(200).json();
            assert_eq!(read, task);
        }
    }
}

#[tokio::test]
async fn null_clears_the_description_and_is_rejected_elsewhere() {
    let server = Server::shared().await;
    let ann = server.user().await;
    for method in [Method::PUT, Method::PATCH] {
        let task = create(&ann, json!({"title": "a", "description": "b"})).await;
        let path = ann.path_of(&task);
        let change = |body: Value| ann.request(method.clone(), &path).json(body).send();
        let cleared = change(json!({"description": null}))
            .await
            .expect(200)
            .json();
        assert_eq!(
            (&cleared["description"], &cleared["title"]),
            (&Value::Null, &json!("a"))
        );
        change(json!({"title": null}))
            .await
            .problem(422, "validation_failed");
        change(json!({"completed": null}))
            .await
            .problem(422, "validation_failed");
    }
}

#[tokio::test]
async fn updated_at_increases_with_every_change() {
    let server = Server::start().await;
    let ann = server.user().await;
    let task = ann.create_task("a").await;
    let path = ann.path_of(&task);
    let sql = server.sql().await;
    // The last update is in the future, as after a clock was set back.
    let ahead = "update tasks set updated_at = now() + interval '1 day' returning to_json(updated_at)::text";
    sql.query_one(ahead, &[]).await.unwrap();
    let read = ann.get(&path).await.expect(200).json();
    let mut last = read["updated_at"].as_str().unwrap().to_owned();
    let complete = format!("{path}/complete");
    for (method, at, body) in [
        (Method::PUT, &path, json!({"title": "a"})),
        (Method::PATCH, &path, json!({"title": "a"})),
        (Method::PATCH, &complete, json!({"completed": false})),
        (Method::PATCH, &complete, json!({"completed": false})),
        (Method::PATCH, &complete, json!({})),
    ] {
        let changed = ann
            .request(method.clone(), at)
            .json(body.clone())
            .await
            .expect(200)
            .json();
        let updated = changed["updated_at"].as_str().unwrap().to_owned();
        assert!(
            updated > last,
            "{method} {at} {body}: {updated} after {last}"
        );
        assert_eq!(changed["created_at"], task["created_at"]);
        last = updated;
    }
}

// FR-009
#[tokio::test]
async fn complete_toggles_a_task_or_sets_the_given_value() {
    let server = Server::shared().await;
    let ann = server.user().await;
    let task = ann.create_task("a").await;
    let path = format!("{}/complete", ann.path_of(&task));
    for (body, completed) in [
        (None, true),
        (None, false),
        (Some(json!({})), true),
        (Some(json!({"completed": true})), true),
        (Some(json!({"completed": false})), false),
        (Some(json!({"completed": false})), false),
        (Some(json!({"unknown": 1})), true),
    ] {
        let request = ann.patch(&path);
        let changed = match &body {
            Some(body) => request.json(body.clone()),
            None => request,
        }
        .await
        .expect(200)
        .json();
        assert_eq!(changed["completed"], completed, "{body:?}");
        assert_eq!(changed["title"], "a");
    }
    for bad in [
        json!({"completed": "true"}),
        json!({"completed": 1}),
        json!({"completed": null}),
    ] {
        let response = ann.patch(&path).json(bad).await;
        let problem = response.problem(422, "validation_failed");
        assert_eq!(problem["errors"][0]["pointer"], "/completed");
    }
}

#[tokio::test]
async fn every_concurrent_toggle_takes_effect() {
    let server = Server::shared().await;
    let ann = server.user().await;
    let task = ann.create_task("a").await;
    let path = format!("{}/complete", ann.path_of(&task));
    let toggles = (0..21).map(|_| ann.patch(&path).send());
    let responses = join_all(toggles).await;
    let done = responses
        .iter()
        .filter(|response| response.status == 200)
        .count();
    assert!(done > 1, "{responses:?}");
    let read = ann.get(ann.path_of(&task)).await.json();
    assert_eq!(read["completed"], done % 2 == 1, "{done} toggles");
}

// FR-009
#[tokio::test]
async fn returns_404_for_a_deleted_task_with_every_method() {
    let server = Server::shared().await;
    let ann = server.user().await;
    let (task, other) = (ann.create_task("a").await, ann.create_task("b").await);
    let path = ann.path_of(&task);
    let gone = ann.delete(&path).await.expect(204);
    assert!(gone.body.is_empty());
    for method in [Method::GET, Method::DELETE] {
        let response = ann.request(method, &path).await;
        response.problem(404, "task_not_found");
    }
    for (method, at) in [
        (Method::PUT, path.clone()),
        (Method::PATCH, path.clone()),
        (Method::PATCH, format!("{path}/complete")),
    ] {
        ann.request(method, &at)
            .json(json!({"completed": true}))
            .await
            .problem(404, "task_not_found");
    }
    let list = ann.get(ann.tasks()).await.json();
    assert_eq!(list, json!([other]));
}

#[tokio::test]
async fn delete_completed_returns_how_many_tasks_it_deleted() {
    let server = Server::shared().await;
    let ann = server.user().await;
    for (title, completed) in [("a", true), ("b", false), ("c", true), ("d", false)] {
        create(&ann, json!({"title": title, "completed": completed})).await;
    }
    let clear = format!("{}?completed=true", ann.tasks());
    for deleted in [2, 0] {
        let response = ann.delete(&clear).await.expect(200);
        assert_eq!(response.json(), json!({"deleted": deleted}));
        assert_eq!(titles(&ann, "").await, ["d", "b"]);
    }
}

#[tokio::test]
async fn filters_by_completed() {
    let server = Server::shared().await;
    let ann = server.user().await;
    for (title, completed) in [("a", true), ("b", false), ("c", true)] {
        create(&ann, json!({"title": title, "completed": completed})).await;
    }
    assert_eq!(titles(&ann, "?completed=true").await, ["c", "a"]);
    assert_eq!(titles(&ann, "?completed=false").await, ["b"]);
    assert_eq!(
        titles(&ann, "?completed=true&sort=created_at").await,
        ["a", "c"]
    );
    assert_eq!(titles(&ann, "").await, ["c", "b", "a"]);
}

#[tokio::test]
async fn search_matches_a_literal_substring_case_insensitively() {
    let server = Server::shared().await;
    let ann = server.user().await;
    for (title, description) in [
        ("100% wool", None),
        ("1000 sheep", None),
        ("snake_case", None),
        ("snakeXcase", None),
        (r"C:\temp", None),
        (r"C:temp", None),
        ("ÉCLAIR", Some("from Lyon")),
        ("plain", Some("a \\% literal")),
        ("ΣΊΣΥΦΟΣ", None),
        ("two words", Some("*.txt 'quoted'")),
    ] {
        create(&ann, json!({"title": title, "description": description})).await;
    }
    for (query, expected) in [
        ("100%25", vec!["100% wool"]),
        ("%25", vec!["plain", "100% wool"]),
        ("_", vec!["snake_case"]),
        ("e_c", vec!["snake_case"]),
        ("%5C", vec!["plain", r"C:\temp"]),
        ("%5C%5C", vec![]),
        ("%5C%25", vec!["plain"]),
        ("WOOL", vec!["100% wool"]),
        ("%C3%A9clair", vec!["ÉCLAIR"]),
        ("%C3%89Clair", vec!["ÉCLAIR"]),
        ("%CF%83%CE%AF%CF%83", vec!["ΣΊΣΥΦΟΣ"]),
        ("lyon", vec!["ÉCLAIR"]),
        ("two+words", vec!["two words"]),
        ("two%20words", vec!["two words"]),
        ("%27quoted%27", vec!["two words"]),
        ("*", vec!["two words"]),
        ("no+such+thing", vec![]),
    ] {
        assert_eq!(
            titles(&ann, &format!("?q={query}")).await,
            expected,
            "q={query}"
        );
    }
    assert_eq!(
        titles(&ann, "?q=c&completed=true").await,
        Vec::<String>::new()
    );
}

#[tokio::test]
async fn ignores_an_empty_search_and_unknown_parameters() {
    let server = Server::shared().await;
    let ann = server.user().await;
    ann.create_task("a").await;
    for query in [
        "?q=",
        "?q",
        "?",
        "?unknown=1&unknown=2",
        "?Q=zzz",
        "?&&",
        "?=1",
        "?user_id=x&%FF=1",
    ] {
        assert_eq!(titles(&ann, query).await, ["a"], "{query}");
    }
}

#[tokio::test]
async fn a_page_has_at_most_limit_tasks_which_is_1000_by_default() {
    let server = Server::start().await;
    let ann = server.user().await;
    fill(&server, &ann, 1001, "t").await;
    let path = ann.tasks();
    for (query, length) in [
        ("", 1000),
        ("?limit=1000", 1000),
        ("?limit=1", 1),
        ("?limit=7", 7),
        ("?limit=100", 100),
        ("?limit=101", 101),
    ] {
        let response = ann.get(format!("{path}{query}")).await.expect(200);
        assert_eq!(response.json().as_array().unwrap().len(), length, "{query}");
        assert!(
            response.header("link").contains(r#"rel="next""#),
            "{query}: no link to the next page"
        );
    }
    let sql = server.sql().await;
    sql.execute(
        "delete from tasks where id = (select id from tasks limit 1)",
        &[],
    )
    .await
    .unwrap();
    let response = ann.get(&path).await.expect(200);
    assert_eq!(response.json().as_array().unwrap().len(), 1000);
    assert!(
        !response.headers.contains_key("link"),
        "link on the last page"
    );
}

/// Inserts `count` tasks with this description, oldest first.
pub(crate) async fn fill(server: &Server, user: &User, count: usize, description: &str) {
    let ids: Vec<Uuid> = (0..count).map(|_| Uuid::now_v7()).collect();
    let statement =
        "insert into tasks (user_id, id, title, description, completed, created_at, updated_at)
                     select $1, id, 'task ' || n, $3, false, now(), now()
                     from unnest($2::uuid[]) with ordinality as new (id, n)";
    let owner = Uuid::parse_str(&user.id).unwrap();
    server
        .sql()
        .await
        .execute(statement, &[&owner, &ids, &description])
        .await
        .unwrap();
}
