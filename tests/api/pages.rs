//! Lists in pages: `Link` and `after` are exact, whatever is added or deleted meanwhile.

use std::collections::{BTreeMap, BTreeSet};

use percent_encoding::percent_decode_str;
use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};
use serde_json::json;
use uuid::Uuid;

use crate::harness::{Response, Server, User};
use crate::tasks::{fill, path_of};

/// The path and query of the next page, where there is one.
fn next(answer: &Response) -> Option<String> {
    let link = answer.headers.get("link")?.to_str().expect("text");
    let (target, rest) = link.strip_prefix('<')?.split_once('>')?;
    assert_eq!(rest.replace(' ', ""), r#";rel="next""#, "{link}");
    let path = target.find("/api/v1/").expect("a page of this API");
    Some(target[path..].to_owned())
}

/// The parameters of a target, decoded, `after` aside.
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

async fn page(server: &Server, user: &User, target: &str) -> (Vec<String>, Option<String>) {
    let answer = server
        .get(target)
        .bearer(&user.access_token)
        .send()
        .await
        .expect(200);
    let ids = answer
        .json()
        .as_array()
        .expect("a list")
        .iter()
        .map(|t| t["id"].as_str().unwrap().to_owned())
        .collect();
    let next = next(&answer);
    (ids, next)
}

/// Every page from `target` on, in order.
async fn walk(server: &Server, user: &User, target: String) -> Vec<Vec<String>> {
    let mut pages = Vec::new();
    let mut target = Some(target);
    while let Some(at) = target {
        let (ids, next) = page(server, user, &at).await;
        assert!(
            !ids.is_empty() || next.is_none(),
            "an empty page that promises more"
        );
        pages.push(ids);
        target = next;
        assert!(pages.len() < 2000, "the pages go round in circles");
    }
    pages
}

/// What happens between two pages.
#[derive(Clone, Debug)]
enum ConcurrentEdit {
    Create {
        completed: bool,
        found: bool,
    },
    /// Of the tasks there are, the one at this place, counted round.
    Delete(usize),
    /// The task that the last page ended with: where the next one is to go on.
    DeleteLastSeen,
    /// A change that leaves the task in the list.
    Edit(usize),
}

#[derive(Clone, Debug)]
struct Walk {
    /// Whether each task at the beginning is completed, and whether the search finds it.
    tasks: Vec<(bool, bool)>,
    limit: usize,
    oldest_first: bool,
    completed: Option<bool>,
    search: bool,
    /// What happens after each page; after the last it begins anew.
    meanwhile: Vec<Vec<ConcurrentEdit>>,
}

fn walks() -> impl Strategy<Value = Walk> {
    let meanwhile = prop_oneof![
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
        prop::collection::vec(prop::collection::vec(meanwhile, 0..4), 1..6),
    )
        .prop_map(
            |(tasks, limit, oldest_first, completed, search, meanwhile)| Walk {
                tasks,
                limit,
                oldest_first,
                completed,
                search,
                meanwhile,
            },
        )
}

async fn create(server: &Server, user: &User, completed: bool, found: bool) -> String {
    let title = if found { "100% Needle_x" } else { "hay" };
    let request = server.post(user.tasks()).bearer(&user.access_token);
    let answer = request
        .json(json!({"title": title, "completed": completed}))
        .send()
        .await
        .expect(201);
    answer.json()["id"].as_str().unwrap().to_owned()
}

/// Takes the walk and says what was wrong with it.
async fn take(server: &Server, user: &User, walk: &Walk) -> Result<(), TestCaseError> {
    let wanted =
        |completed, found| walk.completed.is_none_or(|c| c == completed) && (!walk.search || found);
    let sql = server.sql().await;
    sql.execute("delete from tasks", &[]).await.unwrap();
    let mut alive = Vec::new();
    // Wanted and there from the first page to the last: owed exactly once.
    let mut owed = BTreeSet::new();
    let mut may_be_seen = BTreeSet::new();
    for &(completed, found) in &walk.tasks {
        let id = create(server, user, completed, found).await;
        if wanted(completed, found) {
            owed.insert(id.clone());
            may_be_seen.insert(id.clone());
        }
        alive.push(id);
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
    let asked = filters(&target);
    let mut seen: Vec<String> = Vec::new();
    let mut meanwhile = walk.meanwhile.iter().cycle();
    let mut pages = 0;
    loop {
        let (ids, next) = page(server, user, &target).await;
        prop_assert!(ids.len() <= walk.limit);
        prop_assert!(
            next.is_none() || ids.len() == walk.limit,
            "a short page in the middle"
        );
        seen.extend(ids);
        prop_assert!(
            seen.len() <= may_be_seen.len(),
            "the pages go round in circles"
        );
        let Some(next) = next else { break };
        prop_assert_eq!(filters(&next), asked.clone());
        target = next;
        pages += 1;
        // New tasks come where an oldest-first walk ends; it must be able to get there.
        if pages > 30 {
            continue;
        }
        for step in meanwhile.next().into_iter().flatten() {
            let gone = match step {
                ConcurrentEdit::Create { completed, found } => {
                    let id = create(server, user, *completed, *found).await;
                    if wanted(*completed, *found) {
                        may_be_seen.insert(id.clone());
                    }
                    alive.push(id);
                    continue;
                }
                ConcurrentEdit::Edit(at) if !alive.is_empty() => {
                    let path = format!("{}/{}", user.tasks(), alive[at % alive.len()]);
                    let request = server.patch(&path).bearer(&user.access_token);
                    request
                        .json(json!({"description": "edited"}))
                        .send()
                        .await
                        .expect(200);
                    continue;
                }
                ConcurrentEdit::Delete(at) if !alive.is_empty() => alive[at % alive.len()].clone(),
                ConcurrentEdit::DeleteLastSeen
                    if seen.last().is_some_and(|id| alive.contains(id)) =>
                {
                    seen.last().cloned().expect("just looked at")
                }
                _ => continue,
            };
            let path = format!("{}/{gone}", user.tasks());
            server
                .delete(&path)
                .bearer(&user.access_token)
                .send()
                .await
                .expect(204);
            alive.retain(|id| *id != gone);
            owed.remove(&gone);
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
        owed.is_subset(&distinct),
        "missed: {:?}",
        owed.difference(&distinct)
    );
    prop_assert!(
        distinct.is_subset(&may_be_seen),
        "not asked for: {:?}",
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
fn following_link_gives_every_task_that_stood_all_along_exactly_once() {
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
            runtime.block_on(take(&server, &ann, &walk))
        })
        .unwrap();
    runtime.block_on(async move { drop(server) });
}

// Pages of any size give the same list, with nothing twice and nothing left out.
#[tokio::test]
async fn a_still_list_is_the_same_in_pages_of_any_size() {
    let server = Server::start().await;
    let ann = server.user().await;
    fill(&server, &ann, 50, "same").await;
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
        let (whole, end) = page(
            &server,
            &ann,
            &format!("{}?limit=1000{filter}", ann.tasks()),
        )
        .await;
        assert!(end.is_none() && !whole.is_empty());
        for limit in [1, 2, 7, 25, 49, 50, 51] {
            let pages = walk(
                &server,
                &ann,
                format!("{}?limit={limit}{filter}", ann.tasks()),
            )
            .await;
            assert!(pages.iter().rev().skip(1).all(|page| page.len() == limit));
            assert_eq!(
                pages.len(),
                whole.len().div_ceil(limit).max(1),
                "no page for nothing"
            );
            assert_eq!(pages.concat(), whole, "limit={limit}{filter}");
        }
    }
}

#[tokio::test]
async fn a_page_ends_early_at_about_a_mebibyte_and_goes_on() {
    let server = Server::start().await;
    let ann = server.user().await;
    // 4 MB of text, and characters that take six bytes each once they are JSON.
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
            let answer = server
                .get(&at)
                .bearer(&ann.access_token)
                .send()
                .await
                .expect(200);
            for task in answer.json().as_array().unwrap() {
                assert_eq!(task["description"], json!(description));
                assert!(
                    seen.insert(task["id"].as_str().unwrap().to_owned()),
                    "seen twice"
                );
            }
            sizes.push(answer.body.len());
            target = next(&answer);
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
async fn the_total_is_counted_when_asked_and_over_all_pages() {
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
            let answer = server
                .get(&at)
                .bearer(&ann.access_token)
                .send()
                .await
                .expect(200);
            assert_eq!(answer.header("x-total-count"), total, "{at}");
            target = next(&answer);
        }
    }
    for query in ["", "?total=false", "?limit=5"] {
        let answer = server
            .get(format!("{}{query}", ann.tasks()))
            .bearer(&ann.access_token)
            .send()
            .await;
        assert!(
            !answer.expect(200).headers.contains_key("x-total-count"),
            "{query}"
        );
    }
}

#[tokio::test]
async fn link_keeps_the_filters_to_the_letter() {
    let server = Server::start().await;
    let ann = server.user().await;
    let odd = "a&b=c #%+é\"<>_";
    for n in 0..3 {
        ann.create_task(&server, &format!("{n} {odd}")).await;
        ann.create_task(&server, &format!("{n} a&b")).await;
    }
    let encoded = "a%26b%3Dc%20%23%25%2B%C3%A9%22%3C%3E_";
    let query = format!("q={encoded}&completed=false&sort=created_at&limit=1&total=true");
    let mut target = format!("{}?{query}", ann.tasks());
    let mut titles = Vec::new();
    loop {
        let answer = server
            .get(&target)
            .bearer(&ann.access_token)
            .send()
            .await
            .expect(200);
        titles.push(answer.json()[0]["title"].as_str().unwrap().to_owned());
        let Some(at) = next(&answer) else { break };
        assert!(titles.len() < 6, "the pages go round in circles");
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
        [format!("0 {odd}"), format!("1 {odd}"), format!("2 {odd}")]
    );
}

#[tokio::test]
async fn a_last_page_that_is_full_promises_no_more() {
    let server = Server::start().await;
    let ann = server.user().await;
    let first = ann.create_task(&server, "a").await;
    ann.create_task(&server, "b").await;
    let (ids, end) = page(&server, &ann, &format!("{}?limit=2", ann.tasks())).await;
    assert_eq!((ids.len(), end), (2, None));
    let (_, more) = page(&server, &ann, &format!("{}?limit=1", ann.tasks())).await;
    // What was promised may be gone when it is asked for: an empty page then, and the end.
    server
        .delete(path_of(&ann, &first))
        .bearer(&ann.access_token)
        .send()
        .await
        .expect(204);
    assert_eq!(
        page(&server, &ann, &more.expect("there was more")).await,
        (vec![], None)
    );
}

// What no page ever gave out is refused, and what one did is taken as it is.
#[tokio::test]
async fn after_is_taken_as_a_page_gave_it_and_refused_else() {
    let server = Server::start().await;
    let ann = server.user().await;
    fill(&server, &ann, 3, "x").await;
    let (_, target) = page(&server, &ann, &format!("{}?limit=1", ann.tasks())).await;
    let target = target.expect("there is more");
    let once = page(&server, &ann, &target).await;
    assert_eq!(
        page(&server, &ann, &target).await,
        once,
        "asked again, answered again"
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
        let answer = server
            .get(format!("{path}after={garbage}"))
            .bearer(&ann.access_token)
            .send()
            .await;
        let problem = answer.problem(422, "validation_failed");
        assert_eq!(problem["errors"][0]["parameter"], "after", "{garbage}");
    }
    assert!(Uuid::parse_str(&once.0[0]).is_ok());
}
