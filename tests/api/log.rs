//! Log lines about failed authentication: one WARN line each, without secrets, and without input that
//! could be mistaken for a field or a line.

use std::collections::BTreeSet;
use std::time::Instant;

use futures_util::future::join_all;
use serde_json::json;

use crate::auth::{ANOTHER_PASSWORD, change_password, login, logout, refresh, text};
use crate::harness::{PASSWORD, Request, SECRET, Server, Wire, claims, forge, until};
use crate::purge::age;

/// Returns a unique request id, to find the lines of a request.
pub(crate) fn unique_id() -> String {
    format!("test-{}", uuid::Uuid::now_v7().simple())
}

/// Sends a request and returns the log once it contains that request, and therefore all earlier
/// requests.
pub(crate) async fn read_log(server: &Server) -> String {
    let id = unique_id();
    server
        .get("/api/v1/auth/me")
        .header("x-request-id", &id)
        .await
        .problem(401, "missing_token");
    server.wait_for_log(&id).await;
    server.log()
}

/// Returns the WARN lines about a request, and those beyond the limit of lines per second, which test
/// servers log at DEBUG. Omits `slow request`, which a busy machine can cause.
pub(crate) fn warnings<'a>(log: &'a str, request_id: &str) -> Vec<&'a str> {
    log.lines()
        .filter(|line| line.contains(" WARN ") || line.contains(" DEBUG authentication failed"))
        .filter(|line| !line.contains("slow request"))
        .filter(|line| field(line, "request_id") == Some(request_id))
        .collect()
}

/// Returns the value of an unquoted `key=value` field.
fn field<'a>(line: &'a str, key: &str) -> Option<&'a str> {
    line.split(' ')
        .filter_map(|word| word.split_once('='))
        .find(|(name, _)| *name == key)
        .map(|(_, value)| value)
}

/// The `failregex` for fail2ban in packaging/fail2ban/filter.conf. It matches lines of the journal
/// (`host todo-api[pid]: …`) and of a file. It lists every field up to the address, and none of
/// them can contain white space, so that no value can be mistaken for another field.
const FAIL_REGEX: &str = r"^\s*(?:\S+ todo-api\[\d+\]:\s+|\S*\s*WARN\s+)authentication (?:failed reason=\S+ method=\S+ path=\S+|failures suppressed count=\d+) client=<HOST>(?:\s|$)";

/// Returns the addresses that fail2ban would ban, according to PostgreSQL's regular expression engine.
async fn banned_addresses(server: &Server, log: &str) -> BTreeSet<String> {
    let regex = FAIL_REGEX.replace("<HOST>", "([0-9A-Fa-f:.]+)");
    let lines: Vec<&str> = log.lines().collect();
    server
        .sql()
        .await
        .query(
            "select distinct (regexp_match(line, $2))[1] from unnest($1::text[]) line where line ~ $2",
            &[&lines, &regex],
        )
        .await
        .expect("the matches")
        .iter()
        .map(|row| row.get(0))
        .collect()
}

// FR-010
#[tokio::test]
async fn each_failed_authentication_logs_one_warning() {
    // Each request comes from its own network, because the log lines of a network are limited.
    let server = Server::with(&[("TRUSTED_PROXIES", "127.0.0.1"), ("RUST_LOG", "info")]).await;
    let sql = server.sql().await;
    let ann = server.register("ann@example.com").await;
    let bob = server.user().await;
    let locked = server.register("locked@example.com").await;
    for _ in 0..10 {
        login(&server, &locked.email, "wrong").await.expect(401);
    }
    let revoked = server.user().await;
    logout(&server, &revoked.access_token).await.expect(204);
    crate::sessions::assert_revoked(&server, &revoked.access_token, std::time::Instant::now())
        .await;
    let reused = server.user().await;
    refresh(&server, &reused.refresh_token).await.expect(200);
    let condition = format!("id = '{}'", reused.session_id);
    age(&sql, "sessions", "11 seconds", &condition).await;
    let expired = {
        let mut claims = claims(&ann.access_token);
        let now = jiff::Timestamp::now().as_second();
        claims["iat"] = json!(now - 100_000);
        claims["exp"] = json!(now - 100_000 + 86400);
        forge(
            server.secret(),
            json!({"alg": "HS256", "typ": "JWT"}),
            claims,
        )
    };
    let forged = forge(
        "not the secret of this service at all",
        json!({"alg": "HS256", "typ": "JWT"}),
        claims(&ann.access_token),
    );

    let me = "/api/v1/auth/me";
    let log_in = |email: &str, password: &str| {
        server
            .post("/api/v1/auth/login")
            .json(json!({"email": email, "password": password}))
    };
    let refresh_with = |refresh_token: &str| {
        server
            .post("/api/v1/auth/refresh")
            .json(json!({"refresh_token": refresh_token}))
    };
    let tasks = ann.tasks();
    let attempts: Vec<(&str, &str, &str, Request, u16)> = vec![
        ("no token", "GET", me, server.get(me), 401),
        (
            "no token on a write",
            "POST",
            &tasks,
            server.post(ann.tasks()),
            401,
        ),
        ("garbage", "GET", me, server.get(me).bearer("garbage"), 401),
        ("forged", "GET", me, server.get(me).bearer(&forged), 401),
        ("expired", "GET", me, server.get(me).bearer(&expired), 401),
        ("revoked session", "GET", me, revoked.get(me), 401),
        (
            "a refresh token",
            "GET",
            me,
            server.get(me).bearer(&ann.refresh_token),
            401,
        ),
        (
            "another user's tasks",
            "GET",
            &tasks,
            bob.get(ann.tasks()),
            403,
        ),
        (
            "logout with a forged token",
            "POST",
            "/api/v1/auth/logout",
            server.post("/api/v1/auth/logout").bearer(&forged),
            401,
        ),
        (
            "logout without a token",
            "POST",
            "/api/v1/auth/logout",
            server.post("/api/v1/auth/logout"),
            401,
        ),
        (
            "wrong password",
            "POST",
            "/api/v1/auth/login",
            log_in(&ann.email, "wrong"),
            401,
        ),
        (
            "unknown account",
            "POST",
            "/api/v1/auth/login",
            log_in("nobody@example.com", PASSWORD),
            401,
        ),
        (
            "invalid address",
            "POST",
            "/api/v1/auth/login",
            log_in("invalid address", PASSWORD),
            401,
        ),
        (
            "locked account",
            "POST",
            "/api/v1/auth/login",
            log_in(&locked.email, PASSWORD),
            429,
        ),
        (
            "malformed refresh token",
            "POST",
            "/api/v1/auth/refresh",
            refresh_with("garbage"),
            401,
        ),
        (
            "access token as refresh token",
            "POST",
            "/api/v1/auth/refresh",
            refresh_with(&ann.access_token),
            401,
        ),
        (
            "refresh of a revoked session",
            "POST",
            "/api/v1/auth/refresh",
            refresh_with(&revoked.refresh_token),
            401,
        ),
        (
            "reused refresh token",
            "POST",
            "/api/v1/auth/refresh",
            refresh_with(&reused.refresh_token),
            401,
        ),
        (
            "wrong current password",
            "PUT",
            "/api/v1/auth/password",
            ann.put("/api/v1/auth/password")
                .json(json!({"current_password": "wrong", "new_password": ANOTHER_PASSWORD})),
            403,
        ),
        (
            "wrong password for account deletion",
            "DELETE",
            me,
            ann.delete(me).json(json!({"password": "wrong"})),
            403,
        ),
    ];
    let mut sent = Vec::new();
    for (number, (name, method, path, request, status)) in attempts.into_iter().enumerate() {
        // The account is locked for the network from which the wrong passwords came.
        let client = match name {
            "locked account" => "127.0.0.1".to_owned(),
            _ => format!("203.0.113.{number}"),
        };
        let request = request.header("x-forwarded-for", &client);
        let id = unique_id();
        let response = request.header("x-request-id", &id).await;
        assert_eq!(response.status, status, "{name}");
        sent.push((name, method, path, client, id));
    }
    let log = read_log(&server).await;
    let banned = banned_addresses(&server, &log).await;
    for (name, method, path, client, id) in sent {
        let lines = warnings(&log, &id);
        assert_eq!(lines.len(), 1, "{name}: {lines:#?}");
        let line = lines[0];
        assert!(
            line.contains("authentication failed reason="),
            "{name}: {line}"
        );
        let reason = field(line, "reason").unwrap_or_default();
        assert!(
            !reason.is_empty() && reason.chars().all(|c| c.is_ascii_lowercase() || c == '_'),
            "{name}: {line}"
        );
        assert_eq!(field(line, "method"), Some(method), "{name}: {line}");
        assert_eq!(field(line, "path"), Some(path), "{name}: {line}");
        assert_eq!(field(line, "client"), Some(&*client), "{name}: {line}");
        assert!(banned.contains(&client), "{name}: {line}");
        // A login logs the e-mail address, if it is valid.
        let email = match name {
            "wrong password" => Some("ann@example.com"),
            "unknown account" => Some("nobody@example.com"),
            "locked account" => Some("locked@example.com"),
            _ => continue,
        };
        assert_eq!(field(line, "email"), email, "{name}: {line}");
    }
    assert!(
        !log.contains("invalid address"),
        "an invalid address is logged, which may be a password"
    );
}

#[tokio::test]
async fn other_client_errors_log_no_warning() {
    let server = Server::start().await;
    let ann = server.register("ann@example.com").await;
    login(&server, &ann.email, &ann.password).await.expect(200);
    refresh(&server, &ann.refresh_token).await.expect(200);
    server
        .post("/api/v1/auth/register")
        .json(json!({"email": "ann@example.com", "password": PASSWORD}))
        .await
        .expect(409);
    server
        .post("/api/v1/auth/register")
        .json(json!({"email": "bob", "password": "short"}))
        .await
        .expect(422);
    server
        .post("/api/v1/auth/login")
        .json(json!({}))
        .await
        .expect(422);
    server.get("/api/v1/nowhere").await.expect(404);
    server.put("/api/v1/auth/login").await.expect(405);
    ann.get(format!("{}/unknown", ann.tasks()))
        .await
        .expect(404);
    let log = read_log(&server).await;
    // `read_log` itself causes one failure.
    let warnings: Vec<&str> = log
        .lines()
        .filter(|line| line.contains("authentication failed"))
        .collect();
    assert_eq!(warnings.len(), 1, "{warnings:#?}");
}

/// Calls every route at the most verbose log levels.
#[tokio::test]
async fn passwords_tokens_and_tasks_are_not_logged() {
    let server = Server::with(&[("RUST_LOG", "debug"), ("BCRYPT_COST", "10")]).await;
    let other = server
        .sibling(&[("RUST_LOG", "trace"), ("BCRYPT_COST", "11")])
        .await;
    let sql = server.sql().await;
    let mut secrets = vec![
        server.secret().to_owned(),
        PASSWORD.to_owned(),
        ANOTHER_PASSWORD.to_owned(),
        "a mistyped password".to_owned(),
        "password in the address field".to_owned(),
        "a title of ann's".to_owned(),
        "a description of ann's".to_owned(),
        "searched-for-by-ann".to_owned(),
        "$2b$".to_owned(),
        "refused-bearer-token".to_owned(),
        "basic-credentials".to_owned(),
        "refused-refresh-token".to_owned(),
        "token-in-the-query".to_owned(),
    ];

    let ann = server.user().await;
    secrets.extend([ann.access_token.clone(), ann.refresh_token.clone()]);
    let body = login(&other, &ann.email, &ann.password)
        .await
        .expect(200)
        .json();
    secrets.extend([text(&body, "access_token"), text(&body, "refresh_token")]);
    for _ in 0..2 {
        let body = refresh(&server, &ann.refresh_token)
            .await
            .expect(200)
            .json();
        secrets.extend([text(&body, "access_token"), text(&body, "refresh_token")]);
    }
    let token = ann.access_token.as_str();

    // Failed authentication.
    login(&server, &ann.email, "a mistyped password")
        .await
        .expect(401);
    login(&server, "password in the address field", PASSWORD)
        .await
        .expect(401);
    refresh(&server, "refused-refresh-token").await.expect(401);
    server
        .get(ann.tasks())
        .bearer("refused-bearer-token")
        .await
        .expect(401);
    server
        .get(ann.tasks())
        .header("authorization", "Basic basic-credentials")
        .await
        .expect(401);
    server
        .get(format!("{}?access_token=token-in-the-query", ann.tasks()))
        .await
        .expect(401);
    server
        .get(format!("/api/v1/nowhere?access_token={token}"))
        .await
        .expect(404);
    ann.get(format!("{}?access_token={token}&limit=no", ann.tasks()))
        .await
        .expect(422);
    server
        .post("/api/v1/auth/login")
        .body(
            format!("{{\"password\": \"{PASSWORD}\""),
            "application/json",
        )
        .await
        .expect(400);

    // Tasks.
    let body = json!({"title": "a title of ann's", "description": "a description of ann's"});
    let task = ann
        .create(body.clone())
        .header("idempotency-key", "k")
        .await
        .expect(201)
        .json();
    let path = format!("{}/{}", ann.tasks(), text(&task, "id"));
    for request in [
        ann.get(&path),
        ann.get(ann.tasks()),
        ann.get(format!("{}?q=searched-for-by-ann", ann.tasks())),
        ann.put(&path).json(body),
        ann.patch(&path).json(json!({"title": "a title of ann's"})),
        ann.patch(format!("{path}/complete")),
        ann.create(json!({"title": "a title of ann's\0"})),
        ann.delete(&path),
        ann.delete(format!("{}?completed=true", ann.tasks())),
        ann.get("/api/v1/auth/sessions"),
        ann.delete("/api/v1/auth/sessions"),
    ] {
        let status = request.await.status;
        assert!([200, 204, 422].contains(&status), "{status}");
    }

    // Password changes and account deletion.
    let mut token = token.to_owned();
    for (current, new) in [
        ("a mistyped password", ANOTHER_PASSWORD),
        (PASSWORD, ANOTHER_PASSWORD),
    ] {
        let change = change_password(&server, &token, current, new).await;
        if change.status == 200 {
            let tokens = change.json();
            token = text(&tokens, "access_token");
            secrets.extend([token.clone(), text(&tokens, "refresh_token")]);
        }
    }
    let hash: String = sql
        .query_one("select password_hash from users", &[])
        .await
        .expect("the user")
        .get(0);
    secrets.push(hash);
    for password in ["a mistyped password", ANOTHER_PASSWORD] {
        server
            .delete("/api/v1/auth/me")
            .bearer(&token)
            .json(json!({"password": password}))
            .await;
    }

    for server in [&server, &other] {
        let log = read_log(server).await;
        for secret in &secrets {
            let line = log.lines().find(|line| line.contains(secret.as_str()));
            assert!(line.is_none(), "{secret:?} in {line:?}");
        }
        // A signature alone is enough to complete a token.
        let tokens = secrets.iter().filter(|secret| secret.starts_with("eyJ"));
        for signature in tokens.filter_map(|token| token.split('.').nth(2)) {
            assert!(!log.contains(signature), "{signature}");
        }
    }
}

/// The line that an attacker tries to forge.
const FORGED_LINE: &str = "2026-02-05T09:30:00.000Z WARN  authentication failed \
                           reason=expired_token method=GET path=/ client=6.6.6.6 request_id=x";

/// Sends line breaks, escape sequences and forged fields in every input.
#[tokio::test]
async fn no_input_can_forge_a_log_line() {
    // With a trusted proxy, `X-Forwarded-For` is logged as well.
    let server = Server::with(&[("RUST_LOG", "debug"), ("TRUSTED_PROXIES", "127.0.0.1")]).await;
    let ann = server.register("ann@example.com").await;
    let breaks = [
        "\n",
        "\r\n",
        "\r",
        "\u{b}",
        "\u{c}",
        "\u{85}",
        "\u{2028}",
        "\u{2029}",
        "\u{1b}[2K\r",
        "\u{1b}]0;owned\u{7}",
        "\u{0}",
        "\u{8}\u{8}\u{8}",
        "\u{202e}",
        "\u{9b}2J",
        "\" ",
        " ",
        "\\n",
    ];
    for line_break in breaks {
        let forged = format!("ann@example.com{line_break}{FORGED_LINE}");
        // As an e-mail address, with and without spaces. A login verifies a password, which is slow.
        let address = format!("x{line_break}client=6.6.6.6{line_break}@example.com");
        login(&server, &address, "short").await.expect(401);
        for email in [
            forged.clone(),
            forged.replace(' ', "\u{a0}"),
            address,
            format!("client=6.6.6.6{line_break}@6.6.6.6"),
        ] {
            server
                .post("/api/v1/auth/register")
                .json(json!({"email": email, "password": "short"}))
                .await
                .expect(422);
        }
        refresh(&server, &forged).await.expect(401);
        server
            .post("/api/v1/auth/logout")
            .json(json!({"refresh_token": forged}))
            .await
            .expect(204);
        ann.post(ann.tasks())
            .header("idempotency-key", "k\u{e9}")
            .json(json!({"title": forged}))
            .await;
        // In the header and the claims of a token, correctly signed and not.
        for secret in [server.secret(), "not the secret of this service at all"] {
            let mut claims = claims(&ann.access_token);
            claims["email"] = json!(forged);
            claims["sub"] = json!(forged);
            let token = forge(
                secret,
                json!({"alg": "HS256", "typ": forged, "kid": forged}),
                claims,
            );
            server.get(ann.tasks()).bearer(&token).await.expect(401);
        }
        // In the path.
        let encoded: String = forged.bytes().map(|byte| format!("%{byte:02x}")).collect();
        for path in [
            format!("/api/v1/{encoded}/tasks"),
            format!("/api/v1/auth/sessions/{encoded}"),
            format!("/api/v1/x/tasks?q={encoded}"),
            format!("/{encoded}"),
        ] {
            server.get(path).await;
        }
    }
    // In request lines and headers, including bytes that HTTP does not allow.
    let hostile_heads = [
        "GET /api/v1/auth/me?x=\"%20client=6.6.6.6 HTTP/1.1\r\nHost: h\r\n".to_owned(),
        "GET /api/v1/x\"client=6.6.6.6\"/tasks HTTP/1.1\r\nHost: h\r\n".to_owned(),
        "GET /api/v1/auth/me\" client=6.6.6.6 HTTP/1.1\r\nHost: h\r\n".to_owned(),
        "GET /api/v1/\u{85}client=6.6.6.6\u{2028}/tasks HTTP/1.1\r\nHost: h\r\n".to_owned(),
        "GET /api/v1/auth/me#client=6.6.6.6 HTTP/1.1\r\nHost: h\r\n".to_owned(),
        "GET http://h/api/v1/auth/me?client=6.6.6.6 HTTP/1.1\r\nHost: h\r\n".to_owned(),
        "client=6.6.6.6 /api/v1/auth/me HTTP/1.1\r\nHost: h\r\n".to_owned(),
        "X'client'6.6.6.6 /api/v1/auth/me HTTP/1.1\r\nHost: h\r\n".to_owned(),
        "GET /api/v1/auth/me HTTP/1.1\r\nHost: client=6.6.6.6\r\n".to_owned(),
    ];
    for head in hostile_heads {
        server.raw(format!("{head}Connection: close\r\n\r\n")).await;
    }
    for (name, value) in [
        ("X-Request-Id", "x client=6.6.6.6"),
        ("X-Request-Id", "x\" client=6.6.6.6"),
        ("X-Request-Id", "x\tclient=6.6.6.6"),
        ("X-Request-Id", "x\u{1b}[2Kclient=6.6.6.6"),
        ("X-Request-Id", "x\u{85}client=6.6.6.6"),
        ("X-Request-Id", "x\rclient=6.6.6.6"),
        ("X-Request-Id", "x\n client=6.6.6.6"),
        ("X-Request-Id", "client=6.6.6.6"),
        ("X-Forwarded-For", "x client=6.6.6.6"),
        ("X-Forwarded-For", "198.51.100.7 client=6.6.6.6"),
        ("X-Forwarded-For", "198.51.100.7\tclient=6.6.6.6"),
        ("X-Forwarded-For", "\u{1b}[2K6.6.6.6"),
        ("X-Forwarded-For", "\"6.6.6.6\""),
        ("X-Forwarded-For", "6.6.6.6:x"),
        ("X-Forwarded-For", "6.6.6.6, client=6.6.6.6"),
        ("User-Agent", FORGED_LINE),
        ("User-Agent", "\u{1b}[2K\u{85}client=6.6.6.6"),
        ("Referer", FORGED_LINE),
        ("Origin", FORGED_LINE),
        ("Forwarded", "for=6.6.6.6"),
        ("X-Real-IP", "6.6.6.6"),
        ("Idempotency-Key", FORGED_LINE),
        ("Authorization", FORGED_LINE),
    ] {
        server
            .raw(format!(
                "GET /api/v1/auth/me HTTP/1.1\r\nHost: h\r\n{name}: {value}\r\nConnection: close\r\n\r\n"
            ))
            .await;
    }

    let log = read_log(&server).await;
    let start = log.lines().next().expect("a line").chars().next();
    for line in log.lines() {
        assert_eq!(line.chars().next(), start, "a forged line: {line:?}");
        assert!(
            !line
                .chars()
                .any(|c| c.is_control() || matches!(c, '\u{2028}' | '\u{2029}' | '\u{202e}')),
            "{line:?}"
        );
        // A forged field must be inside quotes.
        assert_ne!(field(line, "client"), Some("6.6.6.6"), "{line}");
    }
    assert_eq!(
        banned_addresses(&server, &log).await,
        BTreeSet::from(["127.0.0.1".to_owned()])
    );
}

#[tokio::test]
async fn the_fail2ban_filter_matches_clients_behind_a_proxy_in_files_and_in_the_journal() {
    let file = Server::with(&[("TRUSTED_PROXIES", "127.0.0.1")]).await;
    let journal = file.sibling(&[("JOURNAL_STREAM", "stderr")]).await;
    for server in [&file, &journal] {
        for client in ["203.0.113.9", "2001:db8::9"] {
            server
                .get("/api/v1/auth/me")
                .header("x-forwarded-for", client)
                .await
                .expect(401);
            fail_login_from(server, client).await;
        }
    }
    let log = read_log(&file).await;
    let found = BTreeSet::from(["127.0.0.1", "203.0.113.9", "2001:db8::9"].map(str::to_owned));
    assert_eq!(banned_addresses(&file, &log).await, found);

    // The journal strips the priority and prepends the host and the program.
    let log = read_log(&journal).await;
    let mut lines = String::new();
    for line in log.lines() {
        let message = line
            .strip_prefix("<4>")
            .or_else(|| line.strip_prefix("<6>"))
            .unwrap_or_else(|| panic!("no priority: {line}"));
        lines += &format!("vm todo-api[4711]: {message}\n");
    }
    assert_eq!(banned_addresses(&journal, &lines).await, found);
}

/// Returns the sum of the counts of suppressed lines, and the number of lines with a count.
fn suppressed(log: &str, text: &str) -> (usize, usize) {
    let lines = log.lines().filter(|line| line.contains(text));
    let counts: Vec<usize> = lines
        .map(|line| field(line, "count").unwrap().parse().unwrap())
        .collect();
    (counts.iter().sum(), counts.len())
}

// FR-010
#[tokio::test]
async fn many_rejected_requests_are_counted_while_each_failed_login_is_logged() {
    const ROUNDS: usize = 9;
    let server = Server::with(&[("TRUSTED_PROXIES", "127.0.0.1"), ("RUST_LOG", "info")]).await;
    let mut wire = Wire::open(&server).await;
    let request =
        "GET /api/v1/%00/tasks HTTP/1.1\r\nHost: h\r\nX-Forwarded-For: 203.0.113.7\r\n\r\n";
    let start = Instant::now();
    for _ in 0..ROUNDS {
        wire.send(request.repeat(200)).await;
        for _ in 0..200 {
            assert_eq!(wire.response().await.status, 401);
        }
        fail_login_from(&server, "203.0.113.7").await;
        fail_login_from(&server, "203.0.113.8").await;
    }
    // The last count is logged without a further request.
    let failures = |log: &str| log.matches("path=/api/v1/%00/tasks").count();
    let suppressed_failures = |log: &str| suppressed(log, "authentication failures suppressed");
    let failed_logins = |log: &str, client: &str| {
        log.matches(&format!("path=/api/v1/auth/login client={client}"))
            .count()
    };
    until("all refused requests are logged or counted", async || {
        let log = server.log();
        failures(&log) + suppressed_failures(&log).0 == ROUNDS * 200
            && failed_logins(&log, "203.0.113.8") == ROUNDS
    })
    .await;
    let seconds = start.elapsed().as_secs() as usize;
    let log = server.log();
    let lines = failures(&log) + suppressed_failures(&log).1;
    assert!(lines <= 11 * (seconds + 2), "{lines} lines in {seconds} s");
    assert_eq!(failed_logins(&log, "203.0.113.7"), ROUNDS);
    let counts = log.lines().filter(|line| line.contains(" suppressed "));
    let counts: String = counts.map(|line| format!("{line}\n")).collect();
    assert_eq!(
        banned_addresses(&server, &counts).await,
        BTreeSet::from(["203.0.113.7".to_owned()])
    );

    // The count is complete when the service stops.
    wire.send(request.repeat(200)).await;
    for _ in 0..200 {
        wire.response().await;
    }
    server.stop().await;
    let log = server.log();
    let all = failures(&log) + suppressed_failures(&log).0;
    assert_eq!(all, (ROUNDS + 1) * 200);
}

#[tokio::test]
async fn requests_rejected_during_an_outage_are_counted() {
    let variables = [
        ("DATABASE_URL", "postgres://nobody@127.0.0.1:9/none"),
        ("JWT_SECRET", SECRET),
        ("RUST_LOG", "info"),
    ];
    let server = Server::listening(&variables).await;
    let responses = join_all((0..100).map(|_| login(&server, "ann@example.com", PASSWORD))).await;
    for response in responses {
        response.problem(503, "database_unavailable");
    }
    let mut lines = 0;
    until("all refused requests are logged or counted", async || {
        let log = server.log();
        lines = log
            .matches("request refused reason=database_unavailable")
            .count();
        lines + suppressed(&log, "refused requests suppressed").0 == 100
    })
    .await;
    assert!(lines < 100, "every line was written");
}

/// Sends a login with a wrong password from an address behind a proxy.
async fn fail_login_from(server: &Server, client: &str) {
    server
        .post("/api/v1/auth/login")
        .header("x-forwarded-for", client)
        .json(json!({"email": "ann@example.com", "password": "wrong"}))
        .await
        .expect(401);
}

#[test]
fn the_package_contains_the_tested_filter() {
    let filter = include_str!("../../packaging/fail2ban/filter.conf");
    assert!(
        filter.contains(&format!("failregex = {FAIL_REGEX}\n")),
        "{filter}"
    );
}
