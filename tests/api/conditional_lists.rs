//! Lists: `ETag`, `If-None-Match`, and the change feed.

use std::collections::{BTreeMap, HashMap};

use hyper::Method;
use serde_json::{Value, json};

use crate::harness::{Response, Server, User, until};
use crate::purge::age;

/// A secret other than the harness's.
const OTHER_SECRET: &str = "another secret of the tests, and 32 bytes or more";

impl User {
    pub(crate) fn changes(&self) -> String {
        format!("/api/v1/{}/changes", self.id)
    }

    /// Reads all changes since a cursor, or all tasks if it is empty, in pages of this size.
    pub(crate) async fn changes_since(&self, cursor: &str, limit: usize) -> Changes {
        let mut changes = Changes {
            cursor: cursor.to_owned(),
            ..Changes::default()
        };
        loop {
            let page = format!("{}?since={}&limit={limit}", self.changes(), changes.cursor);
            let page = self.get(page).await.expect(200).json();
            let (tasks, deleted) = (array(&page["tasks"]), array(&page["deleted"]));
            assert!(tasks.len() + deleted.len() <= limit, "{page}");
            let is_full = tasks.len() + deleted.len() == limit;
            changes.tasks.extend_from_slice(tasks);
            changes.deleted.extend(deleted.iter().map(id));
            page["cursor"]
                .as_str()
                .unwrap()
                .clone_into(&mut changes.cursor);
            match page["more"].as_bool().unwrap() {
                // A page that takes several reads ends early if the list changes meanwhile.
                true => assert!(is_full || limit > 100, "{page}"),
                false => return changes,
            }
        }
    }

    async fn titles_since(&self, cursor: &str) -> Vec<String> {
        let tasks = self.changes_since(cursor, 1000).await.tasks;
        tasks
            .iter()
            .map(|task| task["title"].as_str().unwrap().to_owned())
            .collect()
    }

    pub(crate) async fn list_tag(&self) -> String {
        let list = self.get(self.tasks()).await.expect(200);
        list.header("etag").to_owned()
    }
}

/// The changes on several pages.
#[derive(Default)]
pub(crate) struct Changes {
    pub(crate) tasks: Vec<Value>,
    pub(crate) deleted: Vec<String>,
    pub(crate) cursor: String,
}

fn array(value: &Value) -> &[Value] {
    value.as_array().unwrap()
}

pub(crate) fn id(task: &Value) -> String {
    task["id"].as_str().unwrap().to_owned()
}

/// Asserts that the response is 304 with this tag and this `Preference-Applied`.
pub(crate) fn assert_unchanged(response: &Response, tag: &str, applied: Option<&str>) {
    assert_eq!(response.status, 304, "{response:?}");
    assert_eq!(response.header("etag"), tag);
    assert!(response.body.is_empty());
    let found = response.headers.get("preference-applied");
    assert_eq!(found.map(|value| value.to_str().unwrap()), applied);
}

#[tokio::test]
async fn returns_304_for_an_unchanged_list_with_any_filter_order_and_page() {
    let server = Server::start().await;
    let (ann, bob) = (server.user().await, server.user().await);
    let empty = ann.list_tag().await;
    assert_ne!(empty, bob.list_tag().await, "a tag belongs to one user");
    let task = ann.create_task("milk").await;
    ann.create_task("bread").await;
    let mut seen = vec![empty];
    let mut change = 0;
    loop {
        let tag = ann.list_tag().await;
        assert!(
            tag.starts_with('"') && !seen.contains(&tag),
            "{tag} in {seen:?}"
        );
        for query in [
            "",
            "?limit=1",
            "?completed=true",
            "?q=milk",
            "?sort=created_at&limit=1000",
            "?total=true",
        ] {
            let path = format!("{}{query}", ann.tasks());
            for method in [Method::GET, Method::HEAD] {
                let request = |seen: &str| {
                    ann.request(method.clone(), &*path)
                        .header("if-none-match", seen)
                };
                let list = request(&seen[0]).await.expect(200);
                assert_eq!(list.header("etag"), tag, "{query}");
                assert_unchanged(&request(&tag).await, &tag, None);
            }
        }
        let path = ann.path_of(&task);
        seen.push(tag);
        match change {
            0 => ann
                .put(path)
                .json(json!({"title": "milk"}))
                .await
                .expect(200),
            1 => ann.patch(format!("{path}/complete")).await.expect(200),
            2 => ann
                .create(json!({"title": "x", "completed": true}))
                .await
                .expect(201),
            3 => ann.delete(path).await.expect(204),
            4 => ann
                .delete(format!("{}?completed=true", ann.tasks()))
                .await
                .expect(200),
            _ => return,
        };
        change += 1;
    }
}

#[tokio::test]
async fn if_none_match_compares_list_tags_weakly() {
    let server = Server::start().await;
    let ann = server.user().await;
    let tag = ann.list_tag().await;
    let bare = tag.trim_matches('"');
    for (header, status) in [
        (format!("W/{tag}"), 304),
        (format!("\"{bare}-gzip\""), 304),
        (format!("\"other\", {tag}"), 304),
        ("*".into(), 304),
        ("\"other\"".into(), 200),
        (bare.into(), 200),
        (format!("{tag} x"), 200),
    ] {
        let list = ann.get(ann.tasks()).header("if-none-match", &header);
        assert_eq!(list.await.status, status, "{header}");
    }
}

/// If such lists could differ, a client would miss a change.
#[tokio::test]
async fn lists_with_the_same_tag_are_equal_while_they_change() {
    let server = Server::start().await;
    let ann = server.user().await;
    let paths = [
        "?limit=100",
        "?completed=false&limit=50",
        "?sort=created_at&limit=100",
    ]
    .map(|query| format!("{}{query}", ann.tasks()));
    let write = async {
        for n in 0..90 {
            ann.create_task(&n.to_string()).await;
        }
    };
    let read = async {
        let mut pages: HashMap<(&str, String), Value> = HashMap::new();
        for _ in 0..60 {
            for path in &paths {
                let list = ann.get(&**path).await.expect(200);
                let key = (&**path, list.header("etag").to_owned());
                let body = list.json();
                assert_eq!(pages.entry(key).or_insert_with(|| body.clone()), &body);
            }
        }
        pages.len()
    };
    let ((), pages) = tokio::join!(write, read);
    assert!(pages > 30, "only {pages} different pages");
}

#[tokio::test]
async fn changes_are_complete_and_in_order_on_pages_of_any_size() {
    let server = Server::start().await;
    let ann = server.user().await;
    let mut tasks = Vec::new();
    for title in ["a", "b", "c", "d", "e"] {
        tasks.push(ann.create_task(title).await);
    }
    let all = ann.changes_since("", 2).await;
    assert_eq!((&all.tasks, all.deleted.len()), (&tasks, 0));
    assert_eq!(ann.titles_since("").await, ["a", "b", "c", "d", "e"]);
    assert!(ann.titles_since(&all.cursor).await.is_empty());

    let path = |n: usize| ann.path_of(&tasks[n]);
    ann.put(path(1))
        .json(json!({"title": "b1"}))
        .await
        .expect(200);
    ann.delete(path(0)).await.expect(204);
    ann.put(path(2))
        .json(json!({"completed": true}))
        .await
        .expect(200);
    let short_lived = ann
        .create(json!({"title": "f", "completed": true}))
        .await
        .json();
    ann.put(path(1))
        .json(json!({"title": "b2"}))
        .await
        .expect(200);
    ann.delete(format!("{}?completed=true", ann.tasks()))
        .await
        .expect(200);
    ann.create_task("g").await;
    for limit in [1, 2, 3, 1000] {
        let new = ann.changes_since(&all.cursor, limit).await;
        let titles: Vec<_> = new.tasks.iter().map(|task| &task["title"]).collect();
        assert_eq!(titles, ["b2", "g"], "{limit}");
        let mut completed = [id(&tasks[2]), id(&short_lived)];
        completed.sort();
        assert_eq!(
            new.deleted,
            [&[id(&tasks[0])], &completed[..]].concat(),
            "{limit}"
        );
        let rest = ann.changes_since(&new.cursor, limit).await;
        assert!(rest.tasks.is_empty() && rest.deleted.is_empty());
    }
    // Without a cursor, no page has deletions.
    let all = ann.changes_since("", 1).await;
    assert_eq!(all.tasks.len(), 4);
    assert!(all.deleted.is_empty(), "{:?}", all.deleted);
}

/// A page of this length takes several reads.
#[tokio::test]
async fn a_page_of_changes_has_no_task_twice_while_tasks_change() {
    let server = Server::start().await;
    let ann = server.user().await;
    let insert = "
        insert into tasks (user_id, id, title, completed, created_at, updated_at)
        select $1::text::uuid, gen_random_uuid(), 'a', false, now(), now()
        from generate_series(1, 400)";
    let sql = server.sql().await;
    sql.execute(insert, &[&ann.id]).await.unwrap();
    let tasks = ann.changes_since("", 1000).await.tasks;
    let write = async {
        for task in &tasks[..150] {
            let change = ann.put(ann.path_of(task)).json(json!({"title": "b"}));
            change.await.expect(200);
        }
    };
    let read = async {
        for _ in 0..30 {
            let page = ann.get(ann.changes()).await.expect(200).json();
            let mut ids: Vec<_> = array(&page["tasks"]).iter().map(id).collect();
            ids.sort();
            ids.dedup();
            assert_eq!(ids.len(), array(&page["tasks"]).len());
        }
    };
    tokio::join!(write, read);
}

/// A later page lists the tasks that were deleted after the first page.
#[tokio::test]
async fn a_replica_is_correct_even_if_tasks_are_deleted_between_its_first_pages() {
    let server = Server::start().await;
    let ann = server.user().await;
    let mut replica = BTreeMap::new();
    for title in ["a", "b", "c", "d"] {
        let task = ann.create_task(title).await;
        if title == "a" {
            ann.delete(ann.path_of(&task)).await.expect(204);
        }
    }
    let first = ann
        .get(format!("{}?limit=1", ann.changes()))
        .await
        .expect(200)
        .json();
    let first_task = &first["tasks"][0];
    replica.insert(id(first_task), first_task.clone());
    ann.delete(ann.path_of(first_task)).await.expect(204);
    let rest = ann
        .changes_since(first["cursor"].as_str().unwrap(), 1)
        .await;
    replica.extend(rest.tasks.iter().map(|task| (id(task), task.clone())));
    assert_eq!(rest.deleted, [id(first_task)]);
    replica.remove(&id(first_task));
    let list = ann
        .get(format!("{}?sort=created_at", ann.tasks()))
        .await
        .json();
    assert_eq!(Value::from_iter(replica.into_values()), list);
}

/// Tasks from before there were revisions share the revision 0.
#[tokio::test]
async fn changes_include_each_task_without_a_revision_once() {
    let server = Server::start().await;
    let ann = server.user().await;
    let mut tasks = Vec::new();
    for title in ["a", "b", "c", "d", "e"] {
        tasks.push(ann.create_task(title).await);
    }
    let reset = "alter table tasks disable trigger user;
                 update tasks set revision = 0 where title <> 'b';
                 alter table tasks enable trigger user";
    server.sql().await.batch_execute(reset).await.unwrap();
    tasks[1..].rotate_left(1);
    for limit in [1, 2, 3, 1000] {
        assert_eq!(ann.changes_since("", limit).await.tasks, tasks, "{limit}");
    }
}

#[tokio::test]
async fn returns_422_for_a_malformed_cursor_and_410_for_an_unknown_one() {
    let server = Server::start().await;
    let (ann, bob) = (server.user().await, server.user().await);
    ann.create_task("a").await;
    let cursor = ann.changes_since("", 9).await.cursor;
    for query in [
        "since=x",
        "since=1.2",
        "since=%00",
        "limit=0",
        "limit=1001",
        "limit=x",
        "limit=1&limit=1",
    ] {
        let invalid = ann.get(format!("{}?{query}", ann.changes())).await;
        let name = query.split('=').next().unwrap();
        let problem = invalid.problem(422, "validation_failed");
        assert_eq!(problem["errors"][0]["parameter"], name, "{query}");
    }
    let twice = format!("{}?since={cursor}&since={cursor}", ann.changes());
    ann.get(twice).await.problem(422, "validation_failed");
    let changes = |user: &User| user.get(format!("{}?since={cursor}", user.changes()));
    changes(&bob).await.problem(410, "cursor_expired");
    ann.get(format!("{}?since=", ann.changes()))
        .await
        .expect(200);

    // The first case replaces the secret without keeping the previous one, as after a restore. The
    // second case rotates it.
    let tag = ann.list_tag().await;
    for (previous, status, unchanged) in [("", 410, 200), (server.secret(), 200, 200)] {
        let variables = [
            ("JWT_SECRET", OTHER_SECRET),
            ("JWT_SECRET_PREVIOUS", previous),
        ];
        let there = server.sibling(&variables).await;
        let ann = there.login(&ann.email, &ann.password).await;
        assert_eq!(changes(&ann).await.status, status);
        let list = ann.get(ann.tasks()).header("if-none-match", &tag);
        assert_eq!(list.await.status, unchanged);
    }
}

#[tokio::test]
async fn returns_410_for_a_cursor_older_than_the_purged_deletions() {
    let server = Server::start().await;
    let sql = server.sql().await;
    let ann = server.user().await;
    let before = ann.changes_since("", 9).await.cursor;
    for _ in 0..2 {
        let task = ann.create_task("a").await;
        ann.delete(ann.path_of(&task)).await.expect(204);
    }
    let first = ann
        .get(format!("{}?since={before}&limit=1", ann.changes()))
        .await
        .json();
    let between = first["cursor"].as_str().unwrap();
    let after = ann.changes_since(&before, 9).await.cursor;
    age(&sql, "deleted_tasks", "31 days", "revision = 4").await;
    // Each instance purges after its first request.
    let there = server.sibling(&[]).await;
    let ann = ann.on(&there);
    let since = |cursor: &str| ann.get(format!("{}?since={cursor}", ann.changes()));
    until("the tombstone is purged", async || {
        since(&before).await.status == 410
    })
    .await;
    since(&before).await.problem(410, "cursor_expired");
    since(between).await.problem(410, "cursor_expired");
    since(&after).await.expect(200);
    let all = ann.changes_since("", 9).await;
    assert!(all.tasks.is_empty() && all.deleted.is_empty());
}
