//! The metrics that Prometheus scrapes.

use std::collections::BTreeSet;

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::commands::{run, stdout};
use crate::harness::{PASSWORD, Server};

/// Gets `/metrics` from the address that the log names.
pub(crate) async fn scrape(server: &Server) -> String {
    server.wait_for_log("metrics at http://").await;
    let log = server.log();
    let address = log
        .split("metrics at http://")
        .nth(1)
        .and_then(|rest| rest.split('/').next())
        .expect("an address");
    let mut stream = TcpStream::connect(address).await.expect("the listener");
    stream
        .write_all(b"GET /metrics HTTP/1.1\r\nHost: metrics\r\n\r\n")
        .await
        .expect("a request");
    let mut response = String::new();
    stream
        .read_to_string(&mut response)
        .await
        .expect("a response");
    assert!(response.starts_with("HTTP/1.1 200"), "{response}");
    response
}

/// Returns the value of a metric without labels.
pub(crate) async fn gauge(server: &Server, name: &str) -> usize {
    let text = scrape(server).await;
    let mut lines = text.lines();
    let value = lines.find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    value.expect(name).parse().expect("a number")
}

/// Returns all values of a label.
fn values<'a>(text: &'a str, label: &str) -> BTreeSet<&'a str> {
    let start = format!("{label}=\"");
    let values = text.split(&start).skip(1);
    values.filter_map(|rest| rest.split('"').next()).collect()
}

/// Returns the series whose line begins with `name`, each with its count.
fn series<'a>(text: &'a str, name: &str) -> Vec<(&'a str, u64)> {
    let lines = text.lines().filter(|line| line.starts_with(name));
    lines
        .filter_map(|line| line.rsplit_once(' '))
        .map(|(series, value)| (series, value.parse().expect("a count")))
        .collect()
}

#[tokio::test]
async fn all_series_exist_from_the_start_and_clients_cannot_add_any() {
    let server = Server::with(&[("METRICS_ADDR", "127.0.0.1:0")]).await;
    let text = scrape(&server).await;
    let known = ["route", "method", "status", "result", "reason"]
        .map(|label| (label, values(&text, label)));
    for (name, labels) in [
        ("todo_api_logins_total{result=", ["success", "rate_limited"]),
        (
            "todo_api_tokens_rejected_total{reason=",
            ["missing_token", "not_owner"],
        ),
        (
            "todo_api_sessions_revoked_total{reason=",
            ["logout", "account_deleted"],
        ),
    ] {
        let series = series(&text, name);
        assert!(series.iter().all(|(_, count)| *count == 0), "{series:?}");
        for value in labels {
            assert!(
                series.iter().any(|(series, _)| series.contains(value)),
                "{value}"
            );
        }
    }
    let document: Value =
        serde_json::from_str(include_str!("../../src/openapi.json")).expect("JSON");
    let documented = document["paths"].as_object().expect("paths").keys();
    let routes: BTreeSet<&str> = documented.map(String::as_str).chain(["none"]).collect();
    assert_eq!(known[0].1, routes);

    let alerts = include_str!("../../docs/alerts.yml");
    let documentation = [alerts, include_str!("../../docs/operations.md")].concat();
    let words = documentation.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
    for name in words.filter(|word| word.starts_with("todo_api_")) {
        assert!(
            text.contains(&format!("\n{name}")),
            "{name} is not exported"
        );
    }
    let ignored = alerts
        .split_once("reason!~\"")
        .expect("a list of reasons")
        .1;
    for reason in ignored
        .split('"')
        .next()
        .into_iter()
        .flat_map(|list| list.split('|'))
    {
        assert!(known[4].1.contains(reason), "{reason} is not exported");
    }

    let ann = server.user().await;
    ann.create_task("a").await;
    server
        .post("/api/v1/auth/login")
        .json(json!({"email": ann.email, "password": "wrong"}))
        .await
        .expect(401);
    server.login(&ann.email, PASSWORD).await;
    for number in 0..20 {
        let path = format!("/no/such/{number}");
        server.get(path).await.expect(404);
        let path = format!("/api/v1/{number}/tasks/{number}");
        let token = format!("token {number}");
        server.get(path).bearer(&token).await.expect(401);
        let head =
            format!("BREW{number} /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
        assert!(server.raw(head).await.starts_with("HTTP/1.1 405"));
    }
    let text = scrape(&server).await;
    for (label, known) in known {
        assert_eq!(values(&text, label), known);
    }
    for (name, expected) in [
        ("todo_api_logins_total{result=\"success\"", 1),
        ("todo_api_logins_total{result=\"wrong_password\"", 1),
        (
            "todo_api_tokens_rejected_total{reason=\"malformed_token\"",
            20,
        ),
    ] {
        assert!(
            matches!(*series(&text, name), [(_, count)] if count == expected),
            "{name}"
        );
    }
    let version = stdout(&run(&["--version"], &[], ""));
    let commit = version.split(['(', ')']).nth(1).expect("a commit");
    assert_eq!(commit.len(), 12, "{version}");
    for name in [
        "todo_api_http_request_duration_seconds_bucket{route=\"/healthz\",le=\"1\"}",
        "todo_api_db_pool_acquire_duration_seconds_count",
        "todo_api_db_query_duration_seconds_count",
        "todo_api_db_connections{state=\"idle\"}",
        "todo_api_db_pool_waiters 0",
        "todo_api_password_hash_queue_length 0",
        "todo_api_password_hash_duration_seconds_count",
        &format!("todo_api_build_info{{commit=\"{commit}\",version="),
        "process_start_time_seconds",
    ] {
        assert!(text.contains(name), "{name} is not in {text}");
    }
}

/// Returns the metrics of a query, each with the labels that its matchers name.
fn selectors(query: &str) -> Vec<(&str, Vec<&str>)> {
    let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let selector = |(start, _): (usize, &str)| {
        let rest = &query[start..];
        let (name, rest) = rest.split_at(rest.find(|c| !is_name(c)).unwrap_or(rest.len()));
        let matchers = rest
            .strip_prefix('{')
            .and_then(|rest| rest.split('}').next());
        let labels = matchers
            .into_iter()
            .flat_map(|matchers| matchers.split(", "));
        (
            name,
            labels
                .map(|label| label.split(['=', '!']).next().expect("a label"))
                .collect(),
        )
    };
    ["todo_api_", "process_"]
        .iter()
        .flat_map(|prefix| query.match_indices(prefix))
        .map(selector)
        .collect()
}

#[tokio::test]
async fn each_query_of_the_dashboard_names_exported_series_and_labels() {
    let server = Server::with(&[("METRICS_ADDR", "127.0.0.1:0")]).await;
    let text = scrape(&server).await;
    let dashboard = include_str!("../../packaging/grafana/todo-api.json");
    let dashboard: Value = serde_json::from_str(dashboard).expect("JSON");
    let panels = dashboard["panels"].as_array().expect("panels");
    let targets = panels
        .iter()
        .flat_map(|panel| panel["targets"].as_array().expect("targets"));
    let mut count = 0;
    for target in targets {
        let query = target["expr"].as_str().expect("a query");
        let grouping = query
            .split("by (")
            .skip(1)
            .flat_map(|rest| rest.split(')').next());
        let grouping: Vec<&str> = grouping.flat_map(|labels| labels.split(", ")).collect();
        for (name, labels) in selectors(query) {
            let is_series = |line: &&str| {
                line.strip_prefix(name)
                    .is_some_and(|rest| rest.starts_with(['{', ' ']))
            };
            let series = text
                .lines()
                .find(is_series)
                .unwrap_or_else(|| panic!("{name} is not exported"));
            // Prometheus adds the label `instance`.
            for label in labels
                .iter()
                .chain(&grouping)
                .filter(|label| **label != "instance")
            {
                assert!(
                    series.contains(&format!("{label}=\"")),
                    "{query}: {series} has no {label}"
                );
            }
            count += 1;
        }
    }
    assert!(count > 20, "{count} selectors");
}

#[tokio::test]
async fn the_api_does_not_serve_metrics() {
    let server = Server::with(&[("METRICS_ADDR", "127.0.0.1:0")]).await;
    server.get("/metrics").await.problem(404, "not_found");
}
