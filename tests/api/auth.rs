//! Registration, login and accounts.

use std::collections::BTreeSet;

use futures_util::future::join_all;
use serde_json::{Value, json};

use crate::harness::{PASSWORD, Response, Server, User, claims, forge};
use crate::sessions::assert_revoked;
use crate::tokens;

/// A password to change to, which no user has initially.
pub(crate) const ANOTHER_PASSWORD: &str = "violet tugboat 41 sings";

pub(crate) async fn login(server: &Server, email: &str, password: &str) -> Response {
    server
        .post("/api/v1/auth/login")
        .json(json!({"email": email, "password": password}))
        .await
}

pub(crate) async fn register(server: &Server, email: &str, password: &str) -> Response {
    server
        .post("/api/v1/auth/register")
        .json(json!({"email": email, "password": password}))
        .await
}

pub(crate) async fn refresh(server: &Server, refresh_token: &str) -> Response {
    server
        .post("/api/v1/auth/refresh")
        .json(json!({"refresh_token": refresh_token}))
        .await
}

pub(crate) async fn change_password(
    server: &Server,
    access_token: &str,
    current: &str,
    new: &str,
) -> Response {
    server
        .put("/api/v1/auth/password")
        .bearer(access_token)
        .json(json!({"current_password": current, "new_password": new}))
        .await
}

pub(crate) async fn delete_account(
    server: &Server,
    access_token: &str,
    password: &str,
) -> Response {
    server
        .delete("/api/v1/auth/me")
        .bearer(access_token)
        .json(json!({"password": password}))
        .await
}

/// Asserts that an access token is accepted.
pub(crate) async fn assert_signed_in(server: &Server, access_token: &str) {
    server
        .get("/api/v1/auth/me")
        .bearer(access_token)
        .await
        .expect(200);
}

pub(crate) async fn logout(server: &Server, access_token: &str) -> Response {
    server
        .post("/api/v1/auth/logout")
        .bearer(access_token)
        .await
}

/// Returns a string member of a body.
pub(crate) fn text(body: &Value, member: &str) -> String {
    body[member]
        .as_str()
        .unwrap_or_else(|| panic!("{member} is not a string in {body}"))
        .to_owned()
}

/// Returns the names of an object's members.
pub(crate) fn members(body: &Value) -> BTreeSet<&str> {
    let members = body.as_object().expect("an object");
    members.keys().map(String::as_str).collect()
}

/// Returns the pointers to the invalid fields of a 422 response.
pub(crate) fn pointers(problem: &Value) -> BTreeSet<String> {
    problem["errors"]
        .as_array()
        .unwrap_or_else(|| panic!("no errors in {problem}"))
        .iter()
        .map(|error| {
            assert!(!text(error, "code").is_empty());
            assert!(!text(error, "detail").is_empty());
            text(error, "pointer")
        })
        .collect()
}

/// Asserts that a body has exactly the members of a token response, for this address.
pub(crate) fn assert_tokens(response: &Response, email: &str) -> Value {
    let body = response.json();
    let expected = [
        "access_token",
        "token_type",
        "expires_in",
        "refresh_token",
        "refresh_expires_in",
        "user",
    ];
    assert_eq!(members(&body), BTreeSet::from(expected));
    assert_eq!(body["token_type"], "bearer");
    assert_eq!(body["expires_in"], 86400);
    assert_eq!(body["refresh_expires_in"], 2_592_000);
    assert_user(&body["user"], email);
    assert_eq!(response.header("cache-control"), "no-store");
    body
}

/// Asserts that a value has exactly the members of a user, and so contains no hash.
fn assert_user(user: &Value, email: &str) {
    let expected = ["id", "email", "email_verified", "created_at", "updated_at"];
    assert_eq!(members(user), BTreeSet::from(expected));
    assert_eq!(user["email"], email);
    let id = text(user, "id");
    let parsed = uuid::Uuid::parse_str(&id).expect("a UUID");
    assert_eq!(parsed.get_version_num(), 7);
    assert_eq!(parsed.hyphenated().to_string(), id, "the canonical form");
    assert_time(&text(user, "created_at"));
    assert_time(&text(user, "updated_at"));
}

/// Asserts that a time has the format `2026-02-05T09:30:00.123456Z`.
pub(crate) fn assert_time(time: &str) {
    let shape: String = time
        .chars()
        .map(|c| if c.is_ascii_digit() { '0' } else { c })
        .collect();
    assert_eq!(shape, "0000-00-00T00:00:00.000000Z", "{time}");
}

/// Counts a user's rows in a table.
async fn count_rows(sql: &tokio_postgres::Client, table: &str, column: &str, user: &User) -> i64 {
    let count = format!(
        "select count(*) from {table} where {column} = '{}'",
        user.id
    );
    sql.query_one(&count, &[]).await.expect("a count").get(0)
}

/// FR-011, FR-014.
#[tokio::test]
async fn registration_creates_an_account_and_returns_tokens() {
    let server = Server::start().await;
    let response = register(&server, "ann@example.com", PASSWORD)
        .await
        .expect(201);
    assert_eq!(response.header("location"), "/api/v1/auth/me");
    let body = assert_tokens(&response, "ann@example.com");

    let me = server.get("/api/v1/auth/me");
    let me = me.bearer(&text(&body, "access_token")).await.expect(200);
    assert_eq!(me.header("cache-control"), "no-store");
    assert_user(&me.json(), "ann@example.com");
    assert_eq!(me.json(), body["user"]);
}

/// FR-013.
#[tokio::test]
async fn login_returns_tokens_of_a_new_session() {
    let server = Server::start().await;
    let ann = server.register("ann@example.com").await;
    let response = login(&server, &ann.email, &ann.password).await.expect(200);
    let body = assert_tokens(&response, &ann.email);
    assert_eq!(body["user"]["id"], ann.id.as_str());
    assert_ne!(body["access_token"], ann.access_token.as_str());
    assert_ne!(body["refresh_token"], ann.refresh_token.as_str());
    assert_ne!(
        claims(&text(&body, "access_token"))["sid"],
        ann.session_id.as_str()
    );
    // The session from the registration is still valid.
    assert_signed_in(&server, &ann.access_token).await;
}

/// FR-001, FR-002, FR-016. Decodes the token without the library that encoded it.
#[tokio::test]
async fn access_tokens_identify_the_user_and_expire_after_a_day() {
    let server = Server::start().await;
    let ann = server.register("ann@example.com").await;

    let head = ann.access_token.split('.').next().expect("a header");
    let head: Value = serde_json::from_slice(&tokens::from_base64url(head)).expect("JSON");
    assert_eq!(head, json!({"alg": "HS256", "typ": "JWT"}));

    let payload = ann.access_token.split('.').nth(1).expect("a payload");
    let claims: Value = serde_json::from_slice(&tokens::from_base64url(payload)).expect("JSON");
    assert_eq!(claims["user_id"], ann.id.as_str());
    assert_eq!(claims["sub"], ann.id.as_str());
    assert_eq!(claims["email"], ann.email.as_str());
    assert_eq!(claims["sid"], ann.session_id.as_str());
    let iat = claims["iat"].as_i64().expect("whole seconds");
    assert_eq!(claims["exp"].as_i64(), Some(iat + 86400));
    assert!((jiff::Timestamp::now().as_second() - iat).abs() < 30);

    // The signature is HMAC-SHA256 with the secret.
    let forged = forge(server.secret(), head, claims);
    assert_signed_in(&server, &forged).await;
}

#[tokio::test]
async fn token_lifetimes_are_configurable() {
    let server = Server::with(&[
        ("ACCESS_TOKEN_TTL", "600"),
        ("REFRESH_TOKEN_IDLE_TTL", "7200"),
    ])
    .await;
    let body = register(&server, "ann@example.com", PASSWORD)
        .await
        .expect(201)
        .json();
    assert_eq!(body["expires_in"], 600);
    assert_eq!(body["refresh_expires_in"], 7200);
    let claims = claims(&text(&body, "access_token"));
    assert_eq!(
        claims["exp"].as_i64(),
        claims["iat"].as_i64().map(|iat| iat + 600)
    );
}

/// FR-012.
#[tokio::test]
async fn passwords_are_stored_as_bcrypt_hashes_of_the_configured_cost() {
    let server = Server::with(&[("BCRYPT_COST", "11")]).await;
    let ann = server.register("ann@example.com").await;
    let sql = server.sql().await;
    let stored_hash = async || -> String {
        let row = sql.query_one("select password_hash from users", &[]).await;
        row.expect("the user").get(0)
    };
    let hash = stored_hash().await;
    assert!(hash.starts_with("$2b$11$"), "{hash}");
    assert_eq!(hash.len(), 60);
    assert!(bcrypt::verify(&ann.password, &hash).expect("a hash"));

    change_password(&server, &ann.access_token, PASSWORD, ANOTHER_PASSWORD)
        .await
        .expect(200);
    let hash = stored_hash().await;
    assert!(hash.starts_with("$2b$11$"), "{hash}");
    assert!(bcrypt::verify(ANOTHER_PASSWORD, &hash).expect("a hash"));
}

/// FR-015.
#[tokio::test]
async fn email_addresses_ignore_case_and_surrounding_white_space() {
    let server = Server::start().await;
    let body = register(&server, " \tAnn.Ö@Example.COM\n", PASSWORD)
        .await
        .expect(201)
        .json();
    assert_eq!(body["user"]["email"], "ann.ö@example.com");
    for spelling in [
        "ann.ö@example.com",
        "ANN.Ö@EXAMPLE.COM",
        "\u{2003}Ann.ö@example.com\u{a0}",
    ] {
        register(&server, spelling, PASSWORD)
            .await
            .problem(409, "email_taken");
        let body = login(&server, spelling, PASSWORD).await.expect(200).json();
        assert_eq!(body["user"]["email"], "ann.ö@example.com");
    }
}

#[tokio::test]
async fn email_addresses_ignore_unicode_normalization_and_case() {
    let server = Server::start().await;
    for (registered, stored, others) in [
        (
            "Ange\u{301}le@example.com",
            "angéle@example.com",
            &["ANG\u{c9}LE@example.com", "ange\u{301}le@example.com"][..],
        ),
        (
            "ΝΊΚΟΣ@example.com",
            "νίκοσ@example.com",
            &[
                "νίκος@example.com",
                "νίκοσ@example.com",
                "Νι\u{301}κος@EXAMPLE.com",
            ],
        ),
        (
            "\u{17f}am@example.\u{212a}iwi",
            "sam@example.kiwi",
            &["SAM@example.kiwi"],
        ),
        (
            "STRAẞE@example.com",
            "straße@example.com",
            &["straße@example.com"],
        ),
    ] {
        let body = register(&server, registered, PASSWORD)
            .await
            .expect(201)
            .json();
        assert_eq!(body["user"]["email"], stored);
        for other in others {
            register(&server, other, PASSWORD)
                .await
                .problem(409, "email_taken");
            let body = login(&server, other, PASSWORD).await.expect(200).json();
            assert_eq!(body["user"]["email"], stored, "{other}");
        }
    }
    for another in ["strasse@example.com", "angele@example.com"] {
        register(&server, another, PASSWORD).await.expect(201);
    }
}

/// The migration normalizes the addresses of older versions, unless the result is already taken.
#[tokio::test]
async fn accounts_of_older_versions_can_log_in() {
    let server = Server::start().await;
    let sql = server.sql().await;
    let migration = crate::sql::files()
        .into_iter()
        .find(|(name, _)| name.contains("/V4__"))
        .expect("the migration")
        .1;
    let update = &migration[migration.find("with renamed as").expect("the update")..];
    let cases = [
        ("an\u{200b}n@example.com", "ann@example.com"),
        ("ange\u{301}le@example.com", "angéle@example.com"),
        ("νίκος@example.com", "νίκοσ@example.com"),
        ("µ\u{17f}\u{307}@example.com", "μṡ@example.com"),
        ("α\u{345}@example.com", "ᾳ@example.com"),
        ("straße@example.com", "straße@example.com"),
        ("bob@example.com", "bob@example.com"),
        ("bo\u{ad}b@example.com", "bo\u{ad}b@example.com"),
        ("\u{2060}@example.com", "\u{2060}@example.com"),
        ("cid\u{feff}@example.com", "cid@example.com"),
        ("cid\u{200e}@example.com", "cid\u{200e}@example.com"),
    ];
    let registered = register(&server, "template@example.com", PASSWORD).await;
    let session = registered.expect(201).json();
    for (stored, _) in &cases {
        sql.execute(
            "insert into users (id, email, password_hash, created_at, updated_at)
             select gen_random_uuid(), $1, password_hash, now() + random() * interval '1 s', now()
             from users where email = 'template@example.com'",
            &[stored],
        )
        .await
        .expect("an account of an older version");
    }
    sql.batch_execute(update).await.expect("the migration");
    let rows = sql
        .query("select email from users", &[])
        .await
        .expect("users");
    let emails: BTreeSet<String> = rows.iter().map(|row| row.get(0)).collect();
    for (stored, now) in cases {
        if stored.starts_with("cid") {
            continue;
        }
        assert!(
            emails.contains(now),
            "{stored:?}: {now:?} is not in {emails:?}"
        );
        if stored.starts_with(['b', '\u{2060}']) {
            continue;
        }
        login(&server, now, PASSWORD).await.expect(200);
    }
    // If two addresses become equal, only one is changed.
    assert!(emails.contains("cid@example.com"));
    assert_eq!(
        emails
            .iter()
            .filter(|email| email.starts_with("cid"))
            .count(),
        2
    );
    assert_signed_in(&server, &text(&session, "access_token")).await;
}

#[tokio::test]
async fn rejects_invalid_email_addresses() {
    let server = Server::start().await;
    let too_long = format!("{}@example.com", "a".repeat(255 - "@example.com".len()));
    assert_eq!(too_long.len(), 255);
    for address in [
        "",
        "   ",
        "ann",
        "@",
        "@example.com",
        "ann@",
        "ann@b@example.com",
        "an n@example.com",
        "ann@exam\tple.com",
        "ann@exam\u{2003}ple.com",
        "ann@exam\u{2028}ple.com",
        "ann@exam\u{0}ple.com",
        "ann@exam\u{7f}ple.com",
        "ann@exam\u{85}ple.com",
        "ann@exam\r\nple.com",
        // Invisible: zero width, directional, soft hyphen, BOM, variation selector, tag, filler.
        "an\u{200b}n@example.com",
        "ann\u{200d}@example.com",
        "\u{202e}ann@example.com",
        "ann@example\u{ad}.com",
        "\u{feff}ann@example.com",
        "ann@example.com\u{fe0f}",
        "ann\u{e0061}@example.com",
        "ann\u{3164}@example.com",
        &too_long,
        // 254 code points, but more than 254 bytes.
        &format!("{}@example.com", "ä".repeat(254 - "@example.com".len())),
    ] {
        let problem = register(&server, address, PASSWORD)
            .await
            .problem(422, "validation_failed");
        assert_eq!(
            pointers(&problem),
            BTreeSet::from(["/email".to_owned()]),
            "{address:?}"
        );
    }
    let longest = &too_long[1..];
    register(&server, longest, PASSWORD).await.expect(201);
    login(&server, longest, PASSWORD).await.expect(200);
}

#[tokio::test]
async fn rejects_invalid_bodies_and_reports_all_invalid_fields() {
    let server = Server::start().await;
    let ann = server.register("ann@example.com").await;
    let both = BTreeSet::from(["/email".to_owned(), "/password".to_owned()]);
    for path in ["/api/v1/auth/register", "/api/v1/auth/login"] {
        for body in [
            json!({}),
            json!({"email": null, "password": null}),
            json!({"email": 1, "password": true}),
            json!({"email": ["ann@example.com"], "password": {"$ne": ""}}),
        ] {
            let problem = server
                .post(path)
                .json(body.clone())
                .await
                .problem(422, "validation_failed");
            assert_eq!(pointers(&problem), both, "{path} {body}");
        }
    }
    let refresh = "/api/v1/auth/refresh";
    for body in [json!({}), json!({"refresh_token": 1})] {
        let problem = server
            .post(refresh)
            .json(body)
            .await
            .problem(422, "validation_failed");
        assert_eq!(
            pointers(&problem),
            BTreeSet::from(["/refresh_token".to_owned()])
        );
    }
    let problem = ann
        .put("/api/v1/auth/password")
        .json(json!({"current_password": 1}))
        .await
        .problem(422, "validation_failed");
    assert_eq!(
        pointers(&problem),
        BTreeSet::from(["/current_password".to_owned(), "/new_password".to_owned()])
    );
    let problem = ann
        .delete("/api/v1/auth/me")
        .json(json!({}))
        .await
        .problem(422, "validation_failed");
    assert_eq!(pointers(&problem), BTreeSet::from(["/password".to_owned()]));

    for path in ["/api/v1/auth/register", "/api/v1/auth/login", refresh] {
        for (body, status, code) in [
            ("", 400, "malformed_json"),
            ("{", 400, "malformed_json"),
            ("{\"email\":\"a@b.c\"}}", 400, "malformed_json"),
            ("[]", 422, "validation_failed"),
            ("\"text\"", 422, "validation_failed"),
            ("null", 422, "validation_failed"),
        ] {
            server
                .post(path)
                .body(body.as_bytes().to_vec(), "application/json")
                .await
                .problem(status, code);
        }
        server
            .post(path)
            .body(b"email=ann".to_vec(), "application/x-www-form-urlencoded")
            .await
            .problem(415, "unsupported_media_type");
        server
            .post(path)
            .body(vec![b' '; 16 * 1024 + 1], "application/json")
            .await
            .problem(413, "body_too_large");
    }
    // The account is unchanged.
    login(&server, &ann.email, &ann.password).await.expect(200);
}

/// FR-015.
#[tokio::test]
async fn one_of_twelve_concurrent_registrations_with_one_address_succeeds() {
    let server = Server::start().await;
    let other = server.sibling(&[]).await;
    let statuses = join_all((0..12).map(|n| {
        let server = if n % 2 == 0 { &server } else { &other };
        async move {
            let email = if n % 3 == 0 {
                "Ann@Example.com"
            } else {
                "ann@example.com"
            };
            // Retries while the server is overloaded.
            loop {
                let status = register(server, email, PASSWORD).await.status;
                if status != 503 {
                    return status;
                }
            }
        }
    }))
    .await;
    let created = statuses.iter().filter(|&&status| status == 201).count();
    let taken = statuses.iter().filter(|&&status| status == 409).count();
    assert_eq!((created, taken), (1, 11), "{statuses:?}");
    let sql = server.sql().await;
    let counts = "select (select count(*) from users), (select count(*) from sessions)";
    let row = sql.query_one(counts, &[]).await.expect("counts");
    let counts: (i64, i64) = (row.get(0), row.get(1));
    assert_eq!(counts, (1, 1), "users and sessions");
}

#[tokio::test]
async fn returns_401_for_a_wrong_password_or_an_unknown_account() {
    let server = Server::start().await;
    let ann = server.register("ann@example.com").await;
    for (email, password) in [
        (ann.email.as_str(), ANOTHER_PASSWORD),
        (ann.email.as_str(), ""),
        (ann.email.as_str(), "CORRECT HORSE"),
        ("nobody@example.com", PASSWORD),
        // Login does not validate the address.
        ("not an address", PASSWORD),
        ("", ""),
    ] {
        let response = login(&server, email, password).await;
        // RFC 9110, section 11.6.1, requires a challenge.
        assert!(
            response
                .header("www-authenticate")
                .starts_with("Bearer realm=\"todo\""),
            "{:?}",
            response.headers
        );
        response.problem(401, "invalid_credentials");
    }
}

#[tokio::test]
async fn account_and_session_routes_require_a_token() {
    let server = Server::shared().await;
    for (method, path) in [
        ("GET", "/api/v1/auth/me"),
        ("DELETE", "/api/v1/auth/me"),
        ("PUT", "/api/v1/auth/password"),
        ("GET", "/api/v1/auth/sessions"),
        ("DELETE", "/api/v1/auth/sessions"),
        (
            "DELETE",
            "/api/v1/auth/sessions/00000000-0000-7000-8000-000000000000",
        ),
        ("POST", "/api/v1/auth/logout"),
    ] {
        let method = method.parse().expect("a method");
        let response = server.request(method, path).await;
        assert_eq!(
            response.header("www-authenticate"),
            "Bearer realm=\"todo\"",
            "{path}"
        );
        response.problem(401, "missing_token");
    }
}

#[tokio::test]
async fn deleting_an_account_deletes_its_sessions_and_tasks() {
    let server = Server::start().await;
    let sql = server.sql().await;
    let ann = server.register("ann@example.com").await;
    let bob = server.register("bob@example.com").await;
    for user in [&ann, &ann, &bob] {
        user.create_task("water the plants").await;
    }
    let second = server.login(&ann.email, &ann.password).await;

    delete_account(&server, &ann.access_token, "not the password")
        .await
        .problem(403, "wrong_password");
    assert_eq!(count_rows(&sql, "tasks", "user_id", &ann).await, 2);
    assert_eq!(count_rows(&sql, "sessions", "user_id", &ann).await, 2);

    delete_account(&server, &ann.access_token, &ann.password)
        .await
        .expect(204);
    let ended = std::time::Instant::now();
    assert_eq!(count_rows(&sql, "users", "id", &ann).await, 0);
    assert_eq!(count_rows(&sql, "tasks", "user_id", &ann).await, 0);
    assert_eq!(count_rows(&sql, "sessions", "user_id", &ann).await, 0);
    assert_eq!(count_rows(&sql, "tasks", "user_id", &bob).await, 1);
    assert_eq!(count_rows(&sql, "sessions", "user_id", &bob).await, 1);

    assert_revoked(&server, &ann.access_token, ended).await;
    assert_revoked(&server, &second.access_token, ended).await;
    for token in [&ann.refresh_token, &second.refresh_token] {
        refresh(&server, token)
            .await
            .problem(401, "invalid_refresh_token");
    }
    login(&server, &ann.email, &ann.password)
        .await
        .problem(401, "invalid_credentials");

    // The address can be registered again.
    let again = server.register(&ann.email).await;
    assert_ne!(again.id, ann.id);
    let tasks = again.get(again.tasks()).await.expect(200);
    assert_eq!(tasks.json(), json!([]));
}

#[tokio::test]
async fn a_password_change_revokes_all_other_sessions() {
    let server = Server::start().await;
    let ann = server.register("ann@example.com").await;
    let bob = server.register("bob@example.com").await;
    let other = server.login(&ann.email, &ann.password).await;

    change_password(
        &server,
        &ann.access_token,
        "not the password",
        ANOTHER_PASSWORD,
    )
    .await
    .problem(403, "wrong_password");
    login(&server, &ann.email, &ann.password).await.expect(200);

    let tokens = change_password(&server, &ann.access_token, &ann.password, ANOTHER_PASSWORD)
        .await
        .expect(200)
        .json();
    let ended = std::time::Instant::now();
    assert_revoked(&server, &other.access_token, ended).await;
    refresh(&server, &other.refresh_token)
        .await
        .problem(401, "invalid_refresh_token");
    for tokens in [
        tokens,
        json!({"access_token": bob.access_token, "refresh_token": bob.refresh_token}),
    ] {
        assert_signed_in(&server, &text(&tokens, "access_token")).await;
        refresh(&server, &text(&tokens, "refresh_token"))
            .await
            .expect(200);
    }
    login(&server, &ann.email, &ann.password)
        .await
        .problem(401, "invalid_credentials");
    login(&server, &ann.email, ANOTHER_PASSWORD)
        .await
        .expect(200);
}

#[tokio::test]
async fn closing_registration_does_not_affect_login() {
    let server = Server::start().await;
    let ann = server.register("ann@example.com").await;
    let closed = server.sibling(&[("REGISTRATION", "closed")]).await;
    for email in ["bob@example.com", "ann@example.com"] {
        register(&closed, email, PASSWORD)
            .await
            .problem(403, "registration_closed");
    }
    login(&closed, &ann.email, &ann.password).await.expect(200);
    refresh(&closed, &ann.refresh_token).await.expect(200);
}
