//! Pagination: no task is missed or repeated if the list changes between pages.

use std::collections::{BTreeMap, BTreeSet};

use percent_encoding::percent_decode_str;
use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};
use serde_json::json;
use uuid::Uuid;

use crate::harness::{Response, Server, User};
use crate::tasks::fill;

/// Returns the path and query of the next page, if any.
fn next(response: &Response) -> Option<String> {
    let link = response.headers.get("link")?.to_str().expect("text");
    let (target, rest) = link.strip_prefix('<')?.split_once('>')?;
    assert_eq!(rest.replace(' ', ""), r#";rel="next""#, "{link}");
    let path = target.find("/api/v1/").expect("a page of this API");
    Some(target[path..].to_owned())
}

/// Returns the decoded parameters of a target except `after`.
fn filters(target: &str) -> BTreeMap<String, String> {
    let query = target.split_once('?').map_or("", |(_, query)| query);
    let pairs = query.split('&').filter_map(|pair| pair.split_once('='));
    let decoded = |value: &str| {
        let spaced = value.replace('+', " ");
        percent_decode_str(&spaced)
            .decode_utf8()
            .expect("text")
            .into_owned()
    };
    pairs
        .filter(|(name, _)| *name != "after")
        .map(|(name, value)| (name.to_owned(), decoded(value)))
        .collect()
}

/// Fetches a page and returns its ids and the target of the next page.
async fn page(user: &User, target: &str) -> (Vec<String>, Option<String>) {
    let response = user.get(target).await.expect(200);
    let ids = response
        .json()
        .as_array()
        .expect("a list")
        .iter()
        .map(|t| t["id"].as_str().unwrap().to_owned())
        .collect();
    let next = next(&response);
    (ids, next)
}

/// Fetches all pages, starting at `target`.
async fn fetch_pages(user: &User, target: String) -> Vec<Vec<String>> {
    let mut pages = Vec::new();
    let mut target = Some(target);
    while let Some(at) = target {
        let (ids, next) = page(user, &at).await;
        assert!(
            !ids.is_empty() || next.is_none(),
            "an empty page with a link to the next"
        );
        pages.push(ids);
        target = next;
        assert!(pages.len() < 2000, "the pages repeat");
    }
    pages
}

/// A change between two pages.
#[derive(Clone, Debug)]
enum ConcurrentEdit {
    Create {
        completed: bool,
        found: bool,
    },
    /// Deletes the task at this index, modulo the number of tasks.
    Delete(usize),
    /// Deletes the last task of the previous page.
    DeleteLastSeen,
    /// Changes the task at this index, which stays in the list.
    Edit(usize),
}

#[derive(Clone, Debug)]
struct Walk {
    /// The initial tasks: whether each is completed, and whether it matches the search.
    tasks: Vec<(bool, bool)>,
    limit: usize,
    oldest_first: bool,
    completed: Option<bool>,
    search: bool,
    /// The changes after each page, repeated cyclically.
    edits: Vec<Vec<ConcurrentEdit>>,
}

fn walks() -> impl Strategy<Value = Walk> {
    let edit = prop_oneof![
        3 => (any::<bool>(), any::<bool>()).prop_map(|(completed, found)| ConcurrentEdit::Create { completed, found }),
        3 => any::<usize>().prop_map(ConcurrentEdit::Delete),
        1 => Just(ConcurrentEdit::DeleteLastSeen),
        1 => any::<usize>().prop_map(ConcurrentEdit::Edit),
    ];
    (
        prop::collection::vec(any::<(bool, bool)>(), 0..20),
        1usize..6,
        any::<bool>(),
        any::<Option<bool>>(),
        any::<bool>(),
        prop::collection::vec(prop::collection::vec(edit, 0..4), 1..6),
    )
        .prop_map(
            |(tasks, limit, oldest_first, completed, search, edits)| Walk {
                tasks,
                limit,
                oldest_first,
                completed,
                search,
                edits,
            },
        )
}

async fn create(user: &User, completed: bool, found: bool) -> String {
    let title = if found { "100% Needle_x" } else { "hay" };
    let response = user
        .create(json!({"title": title, "completed": completed}))
        .await
        .expect(201);
    response.json()["id"].as_str().unwrap().to_owned()
}

/// Fetches all pages while the list changes, and checks the result.
async fn run_walk(server: &Server, user: &User, walk: &Walk) -> Result<(), TestCaseError> {
    let matches =
        |completed, found| walk.completed.is_none_or(|c| c == completed) && (!walk.search || found);
    let sql = server.sql().await;
    sql.execute("delete from tasks", &[]).await.unwrap();
    let mut existing = Vec::new();
    // Matching tasks that exist throughout must be seen exactly once.
    let mut required = BTreeSet::new();
    let mut may_be_seen = BTreeSet::new();
    for &(completed, found) in &walk.tasks {
        let id = create(user, completed, found).await;
        if matches(completed, found) {
            required.insert(id.clone());
            may_be_seen.insert(id.clone());
        }
        existing.push(id);
    }
    let mut target = format!("{}?limit={}", user.tasks(), walk.limit);
    if walk.oldest_first {
        target += "&sort=created_at";
    }
    if let Some(completed) = walk.completed {
        target += &format!("&completed={completed}");
    }
    if walk.search {
        target += "&q=0%25%20nEEDLE_";
    }
    let expected = filters(&target);
    let mut seen: Vec<String> = Vec::new();
    let mut edits = walk.edits.iter().cycle();
    let mut pages = 0;
    loop {
        let (ids, next) = page(user, &target).await;
        prop_assert!(ids.len() <= walk.limit);
        prop_assert!(
            next.is_none() || ids.len() == walk.limit,
            "a short page before the last"
        );
        seen.extend(ids);
        prop_assert!(seen.len() <= may_be_seen.len(), "the pages repeat");
        let Some(next) = next else { break };
        prop_assert_eq!(filters(&next), expected.clone());
        target = next;
        pages += 1;
        // An oldest-first walk ends only if no more tasks are added at the end.
        if pages > 30 {
            continue;
        }
        for step in edits.next().into_iter().flatten() {
            let deleted = match step {
                ConcurrentEdit::Create { completed, found } => {
                    let id = create(user, *completed, *found).await;
                    if matches(*completed, *found) {
                        may_be_seen.insert(id.clone());
                    }
                    existing.push(id);
                    continue;
                }
                ConcurrentEdit::Edit(at) if !existing.is_empty() => {
                    let path = format!("{}/{}", user.tasks(), existing[at % existing.len()]);
                    let edit = json!({"description": "edited"});
                    user.patch(&path).json(edit).await.expect(200);
                    continue;
                }
                ConcurrentEdit::Delete(at) if !existing.is_empty() => {
                    existing[at % existing.len()].clone()
                }
                ConcurrentEdit::DeleteLastSeen
                    if seen.last().is_some_and(|id| existing.contains(id)) =>
                {
                    seen.last().cloned().expect("not empty")
                }
                _ => continue,
            };
            let path = format!("{}/{deleted}", user.tasks());
            user.delete(&path).await.expect(204);
            existing.retain(|id| *id != deleted);
            required.remove(&deleted);
        }
    }
    let distinct: BTreeSet<_> = seen.iter().cloned().collect();
    prop_assert_eq!(
        distinct.len(),
        seen.len(),
        "a task was seen twice: {:?}",
        seen
    );
    prop_assert!(
        required.is_subset(&distinct),
        "missed: {:?}",
        required.difference(&distinct)
    );
    prop_assert!(
        distinct.is_subset(&may_be_seen),
        "unexpected: {:?}",
        distinct.difference(&may_be_seen)
    );
    let mut order = seen.clone();
    order.sort();
    if !walk.oldest_first {
        order.reverse();
    }
    prop_assert_eq!(seen, order);
    Ok(())
}

#[test]
fn following_links_returns_every_unchanged_task_exactly_once() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let (server, ann) = runtime.block_on(async {
        let server = Server::start().await;
        let ann = server.user().await;
        (server, ann)
    });
    let config = Config {
        cases: 60,
        failure_persistence: None,
        ..Config::default()
    };
    let mut runner =
        TestRunner::new_with_rng(config, TestRng::deterministic_rng(RngAlgorithm::ChaCha));
    runner
        .run(&walks(), |walk| {
            runtime.block_on(run_walk(&server, &ann, &walk))
        })
        .unwrap();
    runtime.block_on(async move { drop(server) });
}

#[tokio::test]
async fn pages_of_any_size_add_up_to_the_same_list() {
    let server = Server::start().await;
    let ann = server.user().await;
    fill(&server, &ann, 250, "same").await;
    let sql = server.sql().await;
    sql.execute(
        "update tasks set completed = true where title like '%3'",
        &[],
    )
    .await
    .unwrap();
    for filter in [
        "",
        "&sort=created_at",
        "&completed=true",
        "&q=TASK%201&sort=created_at",
        "&total=true",
    ] {
        let (whole, end) = page(&ann, &format!("{}?limit=1000{filter}", ann.tasks())).await;
        assert!(end.is_none() && !whole.is_empty());
        for limit in [7, 99, 100, 101, 150, 249, 250, 251] {
            let target = format!("{}?limit={limit}{filter}", ann.tasks());
            let pages = fetch_pages(&ann, target).await;
            assert!(pages.iter().rev().skip(1).all(|page| page.len() == limit));
            assert_eq!(
                pages.len(),
                whole.len().div_ceil(limit).max(1),
                "an empty page"
            );
            assert_eq!(pages.concat(), whole, "limit={limit}{filter}");
        }
    }
}

#[tokio::test]
async fn a_page_ends_early_at_about_1_mib() {
    let server = Server::start().await;
    let ann = server.user().await;
    // 4 MB of text, and characters that JSON escapes with six bytes each.
    for description in ["😀".repeat(1000), "\u{1}".repeat(1000)] {
        server
            .sql()
            .await
            .execute("delete from tasks", &[])
            .await
            .unwrap();
        fill(&server, &ann, 1000, &description).await;
        let mut target = Some(ann.tasks());
        let mut seen = BTreeSet::new();
        let mut sizes = Vec::new();
        while let Some(at) = target {
            let response = ann.get(&at).await.expect(200);
            for task in response.json().as_array().unwrap() {
                assert_eq!(task["description"], json!(description));
                assert!(
                    seen.insert(task["id"].as_str().unwrap().to_owned()),
                    "seen twice"
                );
            }
            sizes.push(response.body.len());
            target = next(&response);
        }
        assert_eq!(seen.len(), 1000);
        assert!(sizes.iter().all(|size| *size < 1_200_000), "{sizes:?}");
        let full = &sizes[..sizes.len() - 1];
        assert!(
            full.len() >= 3 && full.iter().all(|size| *size > 900_000),
            "{sizes:?}"
        );
    }
}

#[tokio::test]
async fn total_counts_all_pages_if_requested() {
    let server = Server::start().await;
    let ann = server.user().await;
    let bob = server.user().await;
    fill(&server, &ann, 12, "x").await;
    fill(&server, &bob, 5, "x").await;
    let sql = server.sql().await;
    sql.execute(
        "update tasks set completed = true where title in ('task 1', 'task 2', 'task 3')",
        &[],
    )
    .await
    .unwrap();
    for (query, total) in [
        ("total=true", "12"),
        ("total=true&limit=5", "12"),
        ("total=true&completed=true&limit=1", "3"),
        ("total=true&completed=false&sort=created_at", "9"),
        ("total=true&q=task%201", "4"),
        ("total=true&q=task%201&completed=true", "1"),
        ("total=true&q=nothing", "0"),
    ] {
        let mut target = Some(format!("{}?{query}", ann.tasks()));
        while let Some(at) = target {
            let response = ann.get(&at).await.expect(200);
            assert_eq!(response.header("x-total-count"), total, "{at}");
            target = next(&response);
        }
    }
    for query in ["", "?total=false", "?limit=5"] {
        let response = ann.get(format!("{}{query}", ann.tasks())).await;
        assert!(
            !response.expect(200).headers.contains_key("x-total-count"),
            "{query}"
        );
    }
}

#[tokio::test]
async fn the_next_link_preserves_the_filters() {
    let server = Server::shared().await;
    let ann = server.user().await;
    let text = "a&b=c #%+é\"<>_";
    for n in 0..3 {
        ann.create_task(&format!("{n} {text}")).await;
        ann.create_task(&format!("{n} a&b")).await;
    }
    let encoded = "a%26b%3Dc%20%23%25%2B%C3%A9%22%3C%3E_";
    let query = format!("q={encoded}&completed=false&sort=created_at&limit=1&total=true");
    let mut target = format!("{}?{query}", ann.tasks());
    let mut titles = Vec::new();
    loop {
        let response = ann.get(&target).await.expect(200);
        titles.push(response.json()[0]["title"].as_str().unwrap().to_owned());
        let Some(at) = next(&response) else { break };
        assert!(titles.len() < 6, "the pages repeat");
        assert!(at.starts_with(&format!("{}?", ann.tasks())), "{at}");
        let kept = filters(&at);
        for (name, value) in [
            ("completed", "false"),
            ("sort", "created_at"),
            ("limit", "1"),
            ("total", "true"),
        ] {
            assert_eq!(kept.get(name).map(String::as_str), Some(value), "{at}");
        }
        target = at;
    }
    assert_eq!(
        titles,
        [
            format!("0 {text}"),
            format!("1 {text}"),
            format!("2 {text}")
        ]
    );
}

#[tokio::test]
async fn a_full_last_page_has_no_next_link() {
    let server = Server::shared().await;
    let ann = server.user().await;
    let first = ann.create_task("a").await;
    ann.create_task("b").await;
    let (ids, end) = page(&ann, &format!("{}?limit=2", ann.tasks())).await;
    assert_eq!((ids.len(), end), (2, None));
    let (_, more) = page(&ann, &format!("{}?limit=1", ann.tasks())).await;
    // The next page is empty if its tasks have been deleted meanwhile.
    ann.delete(ann.path_of(&first)).await.expect(204);
    assert_eq!(
        page(&ann, &more.expect("a next page")).await,
        (vec![], None)
    );
}

#[tokio::test]
async fn rejects_invalid_cursors() {
    let server = Server::shared().await;
    let ann = server.user().await;
    fill(server, &ann, 3, "x").await;
    let (_, target) = page(&ann, &format!("{}?limit=1", ann.tasks())).await;
    let target = target.expect("a next page");
    let once = page(&ann, &target).await;
    assert_eq!(
        page(&ann, &target).await,
        once,
        "a repeated request returned another page"
    );
    let (path, _) = target.split_once("after=").unwrap();
    for garbage in [
        "x",
        "%20",
        "1",
        "-",
        "AAAA",
        "%F0%9F%98%80",
        &"a".repeat(5000),
        "'%20or%201=1",
    ] {
        let response = ann.get(format!("{path}after={garbage}")).await;
        let problem = response.problem(422, "validation_failed");
        assert_eq!(problem["errors"][0]["parameter"], "after", "{garbage}");
    }
    assert!(Uuid::parse_str(&once.0[0]).is_ok());
}
