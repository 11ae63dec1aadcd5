//! The files under `sql/`: every statement is restricted to its owner's rows and documented.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// The tables whose rows belong to a user.
const OWNED: [&str; 4] = ["tasks", "task_lists", "deleted_tasks", "sessions"];

/// Statements that use these tables without `user_id = $1`, and the reason.
const NOT_BY_OWNER: [(&str, &str); 8] = [
    (
        "deleted_tasks/purge.sql",
        "deletes old tombstones of all users",
    ),
    (
        "sessions/refresh.sql",
        "a refresh token identifies its session; the row identifies the user",
    ),
    (
        "sessions/end_reused.sql",
        "a refresh token identifies its session; the row identifies the user",
    ),
    (
        "sessions/end_by_refresh_token.sql",
        "a refresh token identifies its session; the row identifies the user",
    ),
    (
        "sessions/login.sql",
        "creates a session for the user whose password was verified: $1",
    ),
    (
        "users/register.sql",
        "creates a session for the user that the statement creates: $1",
    ),
    ("users/accounts.sql", "lists the accounts for the operator"),
    (
        "sessions/purge.sql",
        "deletes expired sessions of all users",
    ),
];

fn sql() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("sql")
}

/// Returns every file under `sql/`: its path there and its text.
pub(crate) fn files() -> Vec<(String, String)> {
    let mut found = Vec::new();
    let mut folders = vec![sql()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).expect("a directory sql/") {
            let path = entry.expect("an entry").path();
            if path.is_dir() {
                folders.push(path);
            } else {
                let name = path
                    .strip_prefix(sql())
                    .expect("a path under sql/")
                    .to_str()
                    .expect("a name")
                    .to_owned();
                assert!(name.ends_with(".sql"), "sql/{name} is not an SQL file");
                found.push((name, fs::read_to_string(path).expect("text")));
            }
        }
    }
    found.sort();
    assert!(found.len() > 10, "the statements are missing");
    found
}

/// Returns the statement without comments, with empty literals and function bodies, and with single
/// spaces.
fn bare(text: &str) -> String {
    let mut bare = String::new();
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        let end = if rest.starts_with("--") {
            rest.find('\n').unwrap_or(rest.len())
        } else if let Some(body) = rest.strip_prefix("$$") {
            bare += "''";
            2 + body.find("$$").expect("the end of a function body") + 2
        } else if first == '\'' {
            bare += "''";
            1 + rest[1..].find('\'').expect("the end of a literal") + 1
        } else if rest.starts_with("U&'") {
            2
        } else {
            bare.push(if first.is_whitespace() { ' ' } else { first });
            first.len_utf8()
        };
        rest = &rest[end..];
    }
    bare.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Returns the tokens of a statement; `t.user_id` and `$1` are one token each.
fn words(bare: &str) -> Vec<String> {
    let mut words = Vec::new();
    let mut word = String::new();
    for letter in bare.chars() {
        if letter.is_alphanumeric() || "_.$:".contains(letter) {
            word.push(letter);
            continue;
        }
        if !word.is_empty() {
            words.push(std::mem::take(&mut word));
        }
        if letter != ' ' {
            words.push(letter.to_string());
        }
    }
    words.push(word);
    words
}

/// Returns whether every read, update and delete of `table` is in a query that requires `user_id = $1`,
/// and every insert takes `user_id` from `$1`. In a batch, `user_id` must equal the request's, or that of
/// a row that the batch changed. A query in parentheses is checked separately.
fn is_scoped(statement: &str, table: &str) -> bool {
    // A batch: $1 contains one owner per request.
    let owners = match statement.contains("from unnest((select $1::uuid[])")
        && statement.contains(" with ordinality as request (user_id, ")
    {
        true => &["$1", "request.user_id", "changed.user_id"][..],
        false => &["$1"],
    };
    // The tokens of the queries that are still open, the innermost last.
    let mut open: Vec<Vec<String>> = vec![Vec::new()];
    let mut scoped = true;
    let mut close = |query: Vec<String>| {
        scoped &= query_is_scoped(&query, table, owners);
        let is_query = query.first().is_some_and(|first| {
            ["select", "with", "insert", "update", "delete"].contains(&first.as_str())
        });
        // A list or an expression is part of the enclosing query.
        if is_query {
            vec!["()".to_owned()]
        } else {
            [vec!["(".to_owned()], query, vec![")".to_owned()]].concat()
        }
    };
    for word in words(statement) {
        match word.as_str() {
            "(" => open.push(Vec::new()),
            ")" => {
                let inner = open.pop().expect("balanced parentheses");
                let inner = close(inner);
                open.last_mut().expect("balanced parentheses").extend(inner);
            }
            _ => open.last_mut().expect("balanced parentheses").push(word),
        }
    }
    close(open.pop().expect("balanced parentheses"));
    scoped
}

fn query_is_scoped(query: &[String], table: &str, owners: &[&str]) -> bool {
    let after = |n: usize| query.get(n + 1).map(String::as_str);
    for (n, word) in query.iter().enumerate() {
        if word != table {
            continue;
        }
        match n.checked_sub(1).map(|before| query[before].as_str()) {
            Some("into") => {
                let n = if after(n) == Some("as") { n + 2 } else { n };
                if !insertion_is_scoped(&query[n + 1..], owners) {
                    return false;
                }
            }
            Some("from" | "join" | "update" | "using" | ",") => {
                let scope = query.windows(3).any(|three| {
                    (three[0] == "user_id" || three[0].ends_with(".user_id"))
                        && three[1] == "="
                        && owners.contains(&three[2].as_str())
                });
                if !scope {
                    return false;
                }
            }
            // The name of a common table expression or a column, as in `with tasks as (…)`.
            _ => {}
        }
    }
    true
}

/// Returns whether `( user_id , … ) values ( $1 , … )` or `( user_id , … ) select $1 , …` has one of the
/// owners.
fn insertion_is_scoped(words: &[String], owners: &[&str]) -> bool {
    let list = |words: &[String]| -> Vec<String> {
        let ends = ["from", ")"];
        let items = words
            .iter()
            .take_while(|word| !ends.contains(&word.as_str()))
            .cloned()
            .collect::<Vec<_>>();
        items
            .split(|word| word == ",")
            .map(|item| item.join(" "))
            .collect()
    };
    if words.first().is_none_or(|first| first != "(") {
        return false;
    }
    let Some(position) = list(&words[1..])
        .iter()
        .position(|column| column == "user_id")
    else {
        return false;
    };
    let Some(end) = words.iter().position(|word| word == ")") else {
        return false;
    };
    let values = match &words[end + 1..] {
        [values, open, rest @ ..] if values == "values" && open == "(" => list(rest),
        [select, rest @ ..] if select == "select" => list(rest),
        _ => return false,
    };
    let owner = values
        .get(position)
        .and_then(|value| value.split("::").next());
    owner.is_some_and(|owner| owners.contains(&owner))
}

// FR-007, SC-004
#[test]
fn every_statement_on_a_users_rows_is_restricted_to_its_owner() {
    let mut exceptions = BTreeSet::new();
    for (name, text) in files() {
        if name.starts_with("migrations/") {
            continue;
        }
        let bare = bare(&text);
        if OWNED.iter().all(|table| is_scoped(&bare, table)) {
            continue;
        }
        assert!(
            NOT_BY_OWNER.iter().any(|(exception, _)| *exception == name),
            "sql/{name} uses a user's rows without `user_id = $1`"
        );
        exceptions.insert(name);
    }
    for (name, reason) in NOT_BY_OWNER {
        assert!(
            exceptions.contains(name),
            "sql/{name} no longer needs an exception ({reason})"
        );
    }
}

// FR-007: the exceptions do not include tasks.
#[test]
fn every_statement_on_tasks_is_restricted_to_its_owner() {
    for (name, text) in files() {
        if !name.starts_with("migrations/") {
            assert!(is_scoped(&bare(&text), "tasks"), "sql/{name}");
        }
    }
}

#[test]
fn detects_statements_that_are_not_restricted_to_their_owner() {
    for restricted in [
        "select id from tasks where user_id = $1",
        "select id from tasks t join users u on u.id = t.user_id where t.user_id = $1",
        "with c as (delete from tasks where user_id = $1 returning id) select * from c",
        "insert into tasks (user_id, id) values ($1, $2)",
        "insert into tasks (id, user_id) select $2, $1::uuid from claim",
        "select count(*) from (select 1 from tasks where user_id = $1) x",
        "select ''tasks'' from users",
        "select task.* from unnest((select $1::uuid[]), (select $2::uuid[])) with ordinality as request (user_id, id, ordinal) \
         cross join lateral (select id from tasks t where t.user_id = request.user_id) task",
        "with request as (select * from unnest((select $1::uuid[]), (select $2::uuid[])) with ordinality as request (user_id, id, ordinal)) \
         insert into tasks (user_id, id) select request.user_id, id from request",
    ] {
        assert!(is_scoped(&bare(restricted), "tasks"), "{restricted}");
    }
    for unrestricted in [
        "select id from tasks",
        "select id from tasks where id = $1",
        "select id from tasks where user_id = $2",
        "select id from tasks where user_id <> $1",
        "select id from tasks -- where user_id = $1",
        "select id from tasks where title = 'user_id = $1'",
        "update tasks set completed = true where id = $2",
        "delete from tasks where id = $2",
        "delete from users using tasks where id = $2",
        "with c as (delete from tasks where id = $2) select 1 from users where user_id = $1",
        "select 1 from users where user_id = $1 and exists (select from tasks t where t.id = $2)",
        "select 1 from tasks where id in (select task_id from keys where user_id = $1)",
        "insert into tasks (user_id, id) values ($2, $1)",
        "insert into tasks (id, user_id) select $1, $2 from claim",
        "insert into tasks values ($1, $2)",
        "select 1 from users, tasks",
        "select id from tasks t where t.user_id = request.user_id",
        "insert into tasks (user_id, id) select request.user_id, id from request",
        "with request as (select * from unnest((select $1::uuid[]), (select $2::uuid[])) with ordinality as request (user_id, id, ordinal)) \
         insert into tasks (user_id, id) select id, id from request",
        "select task.* from unnest((select $2::uuid[]), (select $1::uuid[])) with ordinality as request (user_id, id, ordinal) \
         cross join lateral (select id from tasks t where t.user_id = request.user_id) task",
        "select task.* from unnest((select $1::uuid[]), (select $2::uuid[])) with ordinality as request (id, user_id, ordinal) \
         cross join lateral (select id from tasks t where t.user_id = request.user_id) task",
        "select task.* from unnest((select $1::uuid[]), (select $2::uuid[])) with ordinality as request (user_id, id, ordinal) \
         cross join lateral (select id from tasks t where t.id = request.id) task",
    ] {
        assert!(!is_scoped(&bare(unrestricted), "tasks"), "{unrestricted}");
    }
}

#[test]
fn every_statement_documents_its_purpose_and_parameters() {
    for (name, text) in files() {
        let header: Vec<_> = text
            .lines()
            .take_while(|line| line.starts_with("--"))
            .collect();
        assert!(
            header.first().is_some_and(|line| line.len() > 10),
            "sql/{name} has no header"
        );
        let header = header.join("\n");
        let bare = bare(&text);
        let used: BTreeSet<_> = words(&bare)
            .into_iter()
            .filter_map(|word| {
                word.strip_prefix('$')?
                    .split(':')
                    .next()?
                    .parse::<u32>()
                    .ok()
            })
            .collect();
        let most = used.last().copied().unwrap_or(0);
        for n in 1..=most {
            assert!(used.contains(&n), "sql/{name} does not use ${n}");
            assert!(
                header.contains(&format!("${n} ")),
                "the header of sql/{name} does not document ${n}"
            );
        }
        assert!(
            !header.contains(&format!("${} ", most + 1)),
            "the header of sql/{name} documents unused parameters"
        );
    }
}

#[test]
fn files_contain_one_statement_in_lower_case() {
    for (name, text) in files() {
        let bare = bare(&text);
        assert!(
            !bare.chars().any(char::is_uppercase),
            "sql/{name} has upper-case letters: {bare}"
        );
        if !name.starts_with("migrations/") {
            let body = bare.trim_end_matches(';');
            assert!(
                !body.is_empty() && !body.contains(';'),
                "sql/{name} contains more than one statement"
            );
        }
    }
}
