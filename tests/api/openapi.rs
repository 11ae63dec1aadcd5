//! The OpenAPI document matches the service. `.ci/openapi` tests the responses against their schemas
//! with schemathesis.

use std::collections::{BTreeMap, BTreeSet};

use hyper::Method;
use serde_json::{Value, json};
use uuid::Uuid;

use crate::harness::{MailServer, Request, Response, Server, User};

const DOCUMENT: &str = include_str!("../../src/openapi.json");

/// The password in the examples of the document.
const EXAMPLE_PASSWORD: &str = "blue kettle sings at dawn";

/// The OpenAPI document.
struct Document(Value);

/// One method of one path.
#[derive(Clone, Copy)]
struct Operation<'a> {
    path: &'a str,
    method: &'a str,
    id: &'a str,
    spec: &'a Value,
}

impl Document {
    fn read() -> Self {
        Self(serde_json::from_str(DOCUMENT).unwrap())
    }

    fn resolve<'a>(&'a self, node: &'a Value) -> &'a Value {
        match node["$ref"].as_str() {
            Some(reference) => self
                .0
                .pointer(reference.strip_prefix('#').unwrap())
                .unwrap(),
            None => node,
        }
    }

    fn operations(&self) -> Vec<Operation<'_>> {
        let mut operations = Vec::new();
        for (path, item) in self.0["paths"].as_object().unwrap() {
            for (method, spec) in item.as_object().unwrap() {
                if let Some(id) = spec["operationId"].as_str() {
                    operations.push(Operation {
                        path,
                        method,
                        id,
                        spec,
                    });
                }
            }
        }
        operations
    }

    fn operation(&self, id: &str) -> Operation<'_> {
        self.operations()
            .into_iter()
            .find(|operation| operation.id == id)
            .unwrap()
    }

    /// Returns the documented methods of each path.
    fn methods(&self) -> BTreeMap<&str, BTreeSet<String>> {
        let mut methods: BTreeMap<_, BTreeSet<_>> = BTreeMap::new();
        for operation in self.operations() {
            methods
                .entry(operation.path)
                .or_default()
                .insert(operation.method.to_uppercase());
        }
        methods
    }

    /// Returns the examples of a body by name.
    fn examples<'a>(&'a self, body: &'a Value) -> BTreeMap<&'a str, &'a Value> {
        let named = body["examples"].as_object().into_iter().flatten();
        let mut examples: BTreeMap<_, _> = named
            .map(|(name, example)| (name.as_str(), &self.resolve(example)["value"]))
            .collect();
        if let Some(example) = body.get("example") {
            examples.insert("example", example);
        }
        examples
    }

    /// Returns the problem codes that a response documents.
    fn codes<'a>(&'a self, response: &'a Value) -> BTreeSet<&'a str> {
        let examples = self.examples(&response["content"]["application/problem+json"]);
        examples
            .values()
            .map(|example| example["code"].as_str().unwrap())
            .collect()
    }

    /// Fills in the parameters of a path. The default is the documented example, or else `x`.
    fn fill_path(&self, path: &str, values: &[(&str, &str)]) -> String {
        let parameters = self.0["paths"][path]["parameters"]
            .as_array()
            .into_iter()
            .flatten();
        let mut filled = path.to_owned();
        for parameter in parameters.map(|parameter| self.resolve(parameter)) {
            let name = parameter["name"].as_str().unwrap();
            let given = values
                .iter()
                .find(|(key, _)| *key == name)
                .map(|(_, value)| *value);
            let value = given.or(parameter["example"].as_str()).unwrap_or("x");
            filled = filled.replace(&format!("{{{name}}}"), value);
        }
        filled
    }
}

impl Operation<'_> {
    fn method(&self) -> Method {
        self.method.to_uppercase().parse().unwrap()
    }

    fn needs_a_token(&self) -> bool {
        self.spec["security"]
            .as_array()
            .is_none_or(|schemes| schemes.iter().any(|scheme| scheme["bearer"].is_array()))
    }

    fn takes_a_body(&self) -> bool {
        self.spec["requestBody"].is_object()
    }

    /// Returns the status of a successful request.
    fn success(&self) -> u16 {
        let statuses = self.spec["responses"].as_object().unwrap().keys();
        statuses
            .map(|status| status.parse().unwrap())
            .find(|status| *status < 400)
            .unwrap()
    }
}

/// Asserts that two values have the same members at all levels. Null matches any type.
fn assert_same_members(example: &Value, real: &Value, location: &str) {
    match (example, real) {
        (Value::Object(example), Value::Object(real)) => {
            let names =
                |of: &serde_json::Map<String, Value>| of.keys().cloned().collect::<BTreeSet<_>>();
            assert_eq!(names(example), names(real), "{location}");
            for (name, value) in example {
                assert_same_members(value, &real[name], &format!("{location}/{name}"));
            }
        }
        (Value::Array(example), Value::Array(real)) => {
            for value in example {
                assert_same_members(value, &real[0], &format!("{location}/0"));
            }
        }
        (Value::Null, _) | (_, Value::Null) => {}
        _ => assert_eq!(
            std::mem::discriminant(example),
            std::mem::discriminant(real),
            "{location}: {example} and {real}"
        ),
    }
}

#[tokio::test]
async fn serves_the_openapi_document() {
    let server = Server::shared().await;
    let response = server.get("/openapi.json").await.expect(200);
    assert_eq!(response.header("content-type"), "application/json");
    assert_eq!(response.json(), Document::read().0);
}

#[tokio::test]
async fn every_path_allows_exactly_the_documented_methods() {
    let (server, _) = Server::shared_with_mail().await;
    let document = Document::read();
    for (path, mut methods) in document.methods() {
        if methods.contains("GET") {
            methods.insert("HEAD".to_owned());
        }
        methods.insert("OPTIONS".to_owned());
        let path = document.fill_path(path, &[]);
        let response = server.request(Method::OPTIONS, &path).await;
        assert_eq!(response.status, 204, "{path}");
        let allowed: BTreeSet<String> = response
            .header("allow")
            .split(", ")
            .map(str::to_owned)
            .collect();
        assert_eq!(allowed, methods, "{path}");
    }
}

#[test]
fn every_example_of_a_problem_has_the_status_of_its_response() {
    let document = Document::read();
    for operation in document.operations() {
        for (status, response) in operation.spec["responses"].as_object().unwrap() {
            let content = &document.resolve(response)["content"]["application/problem+json"];
            for example in document.examples(content).into_values() {
                assert_eq!(example["status"].to_string(), *status, "{}", operation.id);
            }
        }
    }
}

#[tokio::test]
async fn every_example_of_a_request_succeeds_with_the_documented_status() {
    let (server, mails) = &Server::with_mail(&[]).await;
    let document = Document::read();
    let hash = bcrypt::hash(EXAMPLE_PASSWORD, 10).unwrap();
    for operation in document.operations() {
        let body = &operation.spec["requestBody"];
        for (content_type, content) in body["content"].as_object().into_iter().flatten() {
            for (name, example) in document.examples(content) {
                // The examples use Ann's address, which must be free for registration.
                let user = replace_users(server, "ann@example.com", &hash).await;
                if operation.id == "register" {
                    user.delete("/api/v1/auth/me")
                        .json(json!({"password": user.password}))
                        .await
                        .expect(204);
                }
                let task = match operation.path.contains("{id}") {
                    true => user.create_task("Buy milk").await["id"]
                        .as_str()
                        .unwrap()
                        .to_owned(),
                    false => String::new(),
                };
                let mut example = example.clone();
                if operation.id == "refresh" {
                    // Only the service can issue a valid token.
                    example["refresh_token"] = user.refresh_token.clone().into();
                }
                if operation.id == "verifyEmail" {
                    let body = json!({"email": user.email});
                    let resend = server.post("/api/v1/auth/email/resend");
                    resend.json(body).await.expect(202);
                    example["token"] = mails.token_of(&user, "/account/verify").await.into();
                }
                if operation.id == "resetPassword" {
                    let body = json!({"email": user.email});
                    let forgot = server.post("/api/v1/auth/password/forgot");
                    forgot.json(body).await.expect(202);
                    example["token"] = mails.token_of(&user, "/account/reset").await.into();
                }
                let path =
                    document.fill_path(operation.path, &[("user_id", &user.id), ("id", &task)]);
                let mut request = server
                    .request(operation.method(), path)
                    .body(example.to_string(), content_type);
                // A logout with a bearer token would ignore its body.
                if operation.needs_a_token() && operation.id != "logout" {
                    request = request.bearer(&user.access_token);
                }
                let response = request.await;
                assert_eq!(
                    response.status,
                    operation.success(),
                    "{} {name}: {response:?}",
                    operation.id
                );
            }
        }
    }
}

#[tokio::test]
async fn every_example_of_an_invalid_value_matches_the_response() {
    let server = Server::shared().await;
    let user = server.user().await;
    let document = Document::read();
    let responses = document.0["components"]["responses"].as_object().unwrap();
    let examples = responses
        .values()
        .flat_map(|response| document.examples(&response["content"]["application/problem+json"]))
        .filter(|(_, example)| example["errors"].is_array());
    let mut count = 0;
    for (_, example) in examples {
        let response = match example["errors"][0]["pointer"].as_str() {
            Some("/title") => user.create(json!({"title": "x".repeat(201)})).await,
            _ => user.get(format!("{}?limit=1001", user.tasks())).await,
        };
        let problem = response.problem(422, "validation_failed");
        for member in ["errors", "detail", "title"] {
            assert_eq!(example[member], problem[member]);
        }
        count += 1;
    }
    assert!(count >= 3, "{count} examples");
}

/// Deletes all users, and creates one with this address and the password of the examples, whose hash is
/// `hash`.
async fn replace_users(server: &Server, email: &str, hash: &str) -> User {
    let sql = server.sql().await;
    let delete = "delete from users; delete from mail_requests";
    sql.batch_execute(delete).await.unwrap();
    let mut user = server.users(1).await.remove(0);
    let change = "update users set email = $1, password_hash = $2";
    sql.execute(change, &[&email, &hash]).await.unwrap();
    user.email = email.to_owned();
    user.password = EXAMPLE_PASSWORD.to_owned();
    user
}

/// Sends requests, compares each response with its documentation, and records the statuses.
struct Coverage {
    document: Document,
    seen: BTreeSet<(String, u16)>,
}

/// The server, the token and the path parameters of requests.
#[derive(Clone, Copy)]
struct Client<'a> {
    server: &'a Server,
    token: Option<&'a str>,
    values: &'a [(&'a str, &'a str)],
}

impl<'a> Client<'a> {
    fn anonymous(server: &'a Server) -> Client<'a> {
        Client {
            server,
            token: None,
            values: &[],
        }
    }

    fn new(server: &'a Server, user: &'a User, values: &'a [(&'a str, &'a str)]) -> Client<'a> {
        Client {
            server,
            token: Some(&user.access_token),
            values,
        }
    }
}

impl Coverage {
    fn request(&self, server: &Server, id: &str, values: &[(&str, &str)]) -> Request {
        let operation = self.document.operation(id);
        let path = self.document.fill_path(operation.path, values);
        server.request(operation.method(), path)
    }

    /// Sends a request for this operation and expects this status.
    async fn check(&mut self, client: &Client<'_>, id: &str, status: u16) -> Response {
        self.check_with(client, id, status, |request| request).await
    }

    /// Like [`Coverage::check`], with this body.
    async fn check_json(&mut self, client: &Client<'_>, id: &str, status: u16, body: Value) {
        self.check_with(client, id, status, |request| request.json(body))
            .await;
    }

    /// Like [`Coverage::check`], after a change to the request.
    async fn check_with(
        &mut self,
        client: &Client<'_>,
        id: &str,
        status: u16,
        change: impl FnOnce(Request) -> Request,
    ) -> Response {
        let mut request = self.request(client.server, id, client.values);
        if let Some(token) = client.token {
            request = request.bearer(token);
        }
        self.expect(id, change(request), status).await
    }

    async fn expect(&mut self, id: &str, request: Request, status: u16) -> Response {
        let response = request.send().await;
        assert_eq!(response.status, status, "{id}: {response:?}");
        let documented = self.document.operation(id).spec["responses"].get(status.to_string());
        let documented = self
            .document
            .resolve(documented.unwrap_or_else(|| panic!("{id}: no {status}")));
        for (name, header) in documented["headers"].as_object().into_iter().flatten() {
            if self.document.resolve(header)["required"] == true {
                response.header(name);
            }
        }
        match documented["content"].as_object() {
            None => assert!(response.body.is_empty(), "{id}: {response:?}"),
            Some(content) => {
                let essence = response.header("content-type").split(';').next().unwrap();
                assert!(content.contains_key(essence), "{id}: {response:?}");
                for example in self.document.examples(&content[essence]).values() {
                    assert_same_members_except_errors(example, &response.json(), id);
                }
                if essence == "application/problem+json" {
                    let code = response.json()["code"].as_str().unwrap().to_owned();
                    assert!(
                        self.document.codes(documented).contains(code.as_str()),
                        "{id}: {code}"
                    );
                }
            }
        }
        self.seen.insert((id.to_owned(), status));
        response
    }
}

/// Like `assert_same_members`, but ignores problems with another code, and `errors`.
fn assert_same_members_except_errors(example: &Value, real: &Value, location: &str) {
    if example["code"] == real["code"] {
        let (mut example, mut real) = (example.clone(), real.clone());
        if example["code"].is_string() {
            // An error has either a pointer or a parameter.
            for of in [&mut example, &mut real] {
                of.as_object_mut().unwrap().remove("errors");
            }
        }
        assert_same_members(&example, &real, location);
    }
}

#[tokio::test]
async fn every_documented_status_occurs_and_no_other() {
    let (server, mails) = &Server::with_mail(&[]).await;
    let mut coverage = Coverage {
        document: Document::read(),
        seen: BTreeSet::new(),
    };
    let (user, other) = (server.user().await, server.user().await);
    common_errors(&mut coverage, server, &user, &other).await;
    successes(&mut coverage, server).await;
    mail_routes(&mut coverage, server, mails).await;
    specific_errors(&mut coverage, server, &user).await;
    rate_limits(&mut coverage, server).await;

    let mut documented = BTreeSet::new();
    for operation in coverage.document.operations() {
        for status in operation.spec["responses"].as_object().unwrap().keys() {
            documented.insert((operation.id.to_owned(), status.parse::<u16>().unwrap()));
        }
    }
    // These statuses require a slow client, a bug, or a database outage.
    documented.retain(|(_, status)| ![408, 500, 503].contains(status));
    let missing: Vec<_> = documented.difference(&coverage.seen).collect();
    assert!(missing.is_empty(), "documented, but not seen: {missing:?}");
}

/// Checks the errors that many operations have in common.
async fn common_errors(coverage: &mut Coverage, server: &Server, user: &User, other: &User) {
    let document = Document::read();
    let methods = document.methods();
    let own: &[(&str, &str)] = &[("user_id", &user.id)];
    let anonymous = Client {
        values: own,
        ..Client::anonymous(server)
    };
    for operation in document.operations() {
        let id = operation.id;
        let client = match operation.needs_a_token() && id != "logout" {
            true => Client::new(server, user, own),
            false => anonymous,
        };
        let two_hosts = |request: Request| request.header("host", "elsewhere.example");
        coverage.check_with(&anonymous, id, 400, two_hosts).await;
        let path = document.fill_path(operation.path, own);
        let unsupported = [Method::PUT, Method::POST, Method::DELETE, Method::TRACE]
            .into_iter()
            .find(|method| !methods[operation.path].contains(method.as_str()))
            .unwrap();
        coverage
            .expect(id, server.request(unsupported, path), 405)
            .await;
        if operation.needs_a_token() {
            let token = Some("forged");
            let forged = Client { token, ..anonymous };
            coverage.check(&anonymous, id, 401).await;
            coverage.check(&forged, id, 401).await;
        }
        if operation.path.contains("{user_id}") {
            let values = [("user_id", other.id.as_str())];
            let not_owner = Client::new(server, user, &values);
            coverage.check(&not_owner, id, 403).await;
        }
        if operation.takes_a_body() {
            let text = |request: Request| request.body("title=x", "text/plain");
            let broken = |request: Request| request.body("{", "application/json");
            let large = "x".repeat(20_000).into();
            coverage.check_with(&client, id, 415, text).await;
            coverage.check_json(&client, id, 413, large).await;
            coverage.check_with(&client, id, 400, broken).await;
            coverage.check_json(&client, id, 422, json!([])).await;
        }
    }
}

async fn successes(coverage: &mut Coverage, server: &Server) {
    let anonymous = Client::anonymous(server);
    let credentials = json!({"email": "ann@example.com", "password": EXAMPLE_PASSWORD});
    for (id, status) in [("register", 201), ("register", 409), ("login", 200)] {
        let credentials = credentials.clone();
        coverage
            .check_json(&anonymous, id, status, credentials)
            .await;
    }
    let ann = server.login("ann@example.com", EXAMPLE_PASSWORD).await;
    let refresh = json!({"refresh_token": ann.refresh_token});
    coverage
        .check_json(&anonymous, "refresh", 200, refresh)
        .await;
    let own: &[(&str, &str)] = &[("user_id", &ann.id)];
    let client = Client::new(server, &ann, own);
    coverage.check(&client, "getMe", 200).await;
    coverage.check(&client, "listSessions", 200).await;

    let body = json!({"title": "Buy milk", "description": "Two bottles, the green ones"});
    let created = coverage
        .check_with(&client, "createTask", 201, |request| {
            request.header("idempotency-key", "milk").json(body)
        })
        .await;
    let task = created.json()["id"].as_str().unwrap().to_owned();
    let tag = created.header("etag").to_owned();
    let list = coverage.check(&client, "listTasks", 200).await;
    coverage
        .check_with(&client, "listTasks", 304, |request| {
            request.header("if-none-match", list.header("etag"))
        })
        .await;
    let changes = ann.get(ann.changes()).await.expect(200).json();
    let cursor = changes["cursor"].as_str().unwrap();
    let short_lived = ann.create_task("short-lived").await;
    ann.create_task("new").await;
    ann.delete(ann.path_of(&short_lived)).await.expect(204);
    let changes = ann.get(format!("{}?since={cursor}", ann.changes()));
    coverage.expect("listChanges", changes, 200).await;
    let reused = json!({"title": "Buy oat milk"});
    coverage
        .check_with(&client, "createTask", 422, |request| {
            request.header("idempotency-key", "milk").json(reused)
        })
        .await;

    let this: &[(&str, &str)] = &[("user_id", &ann.id), ("id", &task)];
    let client = Client::new(server, &ann, this);
    let if_match = |request: Request| request.header("if-match", &tag);
    coverage.check(&client, "getTask", 200).await;
    coverage
        .check_with(&client, "getTask", 304, |request| {
            request.header("if-none-match", &tag)
        })
        .await;
    for id in CHANGES {
        let change = json!({"completed": true});
        coverage.check_json(&client, id, 200, change).await;
    }
    for id in CHANGES {
        let change = json!({"completed": false});
        coverage
            .check_with(&client, id, 412, |request| if_match(request).json(change))
            .await;
    }
    for id in ["getTask", "deleteTask"] {
        coverage.check_with(&client, id, 412, if_match).await;
    }
    coverage.check(&client, "deleteTask", 204).await;
    let chosen = Uuid::now_v7().to_string();
    let values = [("user_id", ann.id.as_str()), ("id", &chosen)];
    let chosen = Client::new(server, &ann, &values);
    for status in [201, 412] {
        let body = json!({"title": "Buy milk", "description": "Two bottles, the green ones"});
        coverage
            .check_with(&chosen, "updateTaskWithPut", status, |request| {
                request.header("if-none-match", "*").json(body)
            })
            .await;
    }
    let delete = ann.delete(format!("{}?completed=true", ann.tasks()));
    coverage.expect("deleteCompletedTasks", delete, 200).await;

    let login = server.login(&ann.email, EXAMPLE_PASSWORD).await;
    let session = [("id", login.session_id.as_str())];
    let client = Client::new(server, &ann, &session);
    coverage.check(&client, "endSession", 204).await;
    coverage.check(&client, "endOtherSessions", 204).await;
    let new = "green kettle hums at noon";
    let change = json!({"current_password": EXAMPLE_PASSWORD, "new_password": new});
    let changed = coverage
        .check_with(&client, "changePassword", 200, |request| {
            request.json(change)
        })
        .await;
    let tokens = changed.json();
    let client = Client {
        token: tokens["access_token"].as_str(),
        ..anonymous
    };
    let delete = json!({"password": new});
    coverage.check_json(&client, "deleteMe", 204, delete).await;
    let bea = server.user().await;
    let client = Client::new(server, &bea, &[]);
    coverage.check(&client, "logout", 204).await;

    for id in [
        "healthz", "readyz", "openapi", "docs", "docsFile", "problem",
    ] {
        coverage.check(&anonymous, id, 200).await;
    }
    coverage.check(&anonymous, "root", 307).await;
}

/// The operations that exist only if mail is configured.
const MAIL_ROUTES: [&str; 7] = [
    "forgotPassword",
    "resetPassword",
    "changeEmail",
    "verifyEmail",
    "resendVerification",
    "resetPage",
    "verifyPage",
];

async fn mail_routes(coverage: &mut Coverage, server: &Server, mails: &MailServer) {
    let anonymous = Client::anonymous(server);
    for id in ["resetPage", "verifyPage"] {
        coverage.check(&anonymous, id, 200).await;
    }
    let (ann, ben) = (server.user().await, server.user().await);
    let email = json!({"email": ann.email});
    let resend = coverage.check_json(&anonymous, "resendVerification", 202, email.clone());
    resend.await;
    let forgot = coverage.check_json(&anonymous, "forgotPassword", 202, email);
    forgot.await;
    let reset = mails.token_of(&ann, "/account/reset").await;
    let client = Client::new(server, &ann, &[]);
    for (password, status) in [("wrong", 403), (&ann.password, 202)] {
        let change = json!({"email": ben.email, "password": password});
        coverage
            .check_json(&client, "changeEmail", status, change)
            .await;
    }
    let verify = mails.token_of(&ben, "/account/verify").await;
    let taken = mails.nth_about(&ben.email, "new e-mail address", 1).await;
    let taken = taken.token();
    for (token, status) in [(verify.as_str(), 204), (&taken, 409), (&reset, 401)] {
        let token = json!({"token": token});
        coverage
            .check_json(&anonymous, "verifyEmail", status, token)
            .await;
    }
    for status in [204, 401] {
        let body = json!({"token": reset, "new_password": EXAMPLE_PASSWORD});
        coverage
            .check_json(&anonymous, "resetPassword", status, body)
            .await;
    }
    let required = server.sibling(&[("EMAIL_VERIFICATION", "required")]).await;
    let required = Client::anonymous(&required);
    let credentials = json!({"email": "pending@example.com", "password": EXAMPLE_PASSWORD});
    for (id, status) in [("register", 202), ("login", 403)] {
        let credentials = credentials.clone();
        coverage
            .check_json(&required, id, status, credentials)
            .await;
    }
    let without = Client::anonymous(Server::shared().await);
    for id in MAIL_ROUTES {
        coverage.check(&without, id, 404).await;
    }
}

/// The operations that change a task.
const CHANGES: [&str; 3] = ["updateTaskWithPut", "updateTask", "setTaskCompletion"];

async fn specific_errors(coverage: &mut Coverage, server: &Server, user: &User) {
    let anonymous = Client::anonymous(server);
    let values: &[(&str, &str)] = &[
        ("user_id", &user.id),
        ("id", "none"),
        ("file", "none"),
        ("code", "none"),
    ];
    let client = Client::new(server, user, values);
    for id in ["getTask", "deleteTask", "endSession", "docsFile", "problem"] {
        coverage.check(&client, id, 404).await;
    }
    for id in CHANGES {
        let change = json!({"completed": true});
        coverage.check_json(&client, id, 404, change).await;
    }
    let invalid = user.get(format!("{}?limit=0", user.tasks()));
    coverage.expect("listTasks", invalid, 422).await;
    let invalid = user.get(format!("{}?since=none", user.changes()));
    coverage.expect("listChanges", invalid, 422).await;
    let other = server.user().await;
    let theirs = other.changes_since("", 9).await.cursor;
    let theirs = user.get(format!("{}?since={theirs}", user.changes()));
    coverage.expect("listChanges", theirs, 410).await;
    coverage.check(&client, "deleteCompletedTasks", 422).await;
    coverage
        .check_with(&client, "createTask", 400, |request| {
            let request = request.header("idempotency-key", "not visible");
            request.json(json!({"title": "x"}))
        })
        .await;

    let wrong = json!({"email": user.email, "password": "wrong"});
    coverage.check_json(&anonymous, "login", 401, wrong).await;
    let forged = json!({"refresh_token": user.access_token});
    coverage
        .check_json(&anonymous, "refresh", 401, forged)
        .await;
    let wrong = json!({"current_password": "wrong", "new_password": EXAMPLE_PASSWORD});
    coverage
        .check_json(&client, "changePassword", 403, wrong)
        .await;
    let wrong = json!({"password": "wrong"});
    coverage.check_json(&client, "deleteMe", 403, wrong).await;
    let disabled = server.user().await;
    let sql = server.sql().await;
    let disable = "update users set disabled_at = now() where email = $1";
    sql.execute(disable, &[&disabled.email]).await.unwrap();
    let right = json!({"email": disabled.email, "password": disabled.password});
    coverage.check_json(&anonymous, "login", 403, right).await;
    let closed = server.sibling(&[("REGISTRATION", "closed")]).await;
    let late = json!({"email": "late@example.com", "password": EXAMPLE_PASSWORD});
    let closed = Client::anonymous(&closed);
    coverage.check_json(&closed, "register", 403, late).await;
}

async fn rate_limits(coverage: &mut Coverage, server: &Server) {
    let user = server.user().await;
    let wrong = json!({"password": "wrong"});
    for _ in 0..10 {
        let delete = user.delete("/api/v1/auth/me").json(wrong.clone());
        delete.await.expect(403);
    }
    let client = Client::new(server, &user, &[]);
    let change = json!({"current_password": user.password, "new_password": EXAMPLE_PASSWORD});
    coverage
        .check_json(&client, "changePassword", 429, change)
        .await;
    let delete = json!({"password": user.password});
    coverage.check_json(&client, "deleteMe", 429, delete).await;
    let change = json!({"email": "new@example.com", "password": user.password});
    coverage
        .check_json(&client, "changeEmail", 429, change)
        .await;

    let limits = [("WRITES_PER_MINUTE", "1"), ("MAX_TASKS_PER_USER", "1")];
    let limited = server.sibling(&limits).await;
    let writer = limited.user().await.on(&limited);
    let task = writer.create_task("the only write of this minute").await;
    let this: &[(&str, &str)] = &[
        ("user_id", &writer.id),
        ("id", task["id"].as_str().unwrap()),
    ];
    for id in [
        "createTask",
        "updateTaskWithPut",
        "updateTask",
        "setTaskCompletion",
        "deleteTask",
    ] {
        let request = coverage
            .request(&limited, id, this)
            .bearer(&writer.access_token)
            .json(json!({"title": "x"}));
        coverage.expect(id, request, 429).await;
    }
    let request = writer.delete(format!("{}?completed=true", writer.tasks()));
    coverage.expect("deleteCompletedTasks", request, 429).await;

    let limited = server.sibling(&[("AUTH_RATE_PER_MINUTE", "1")]).await;
    let credentials = json!({"email": user.email, "password": user.password});
    // The rate limit accepts the first request of the minute.
    limited
        .post("/api/v1/auth/login")
        .json(credentials.clone())
        .await;
    let limited = Client::anonymous(&limited);
    let refresh = json!({"refresh_token": user.refresh_token});
    for (id, body) in [
        ("register", &credentials),
        ("login", &credentials),
        ("refresh", &refresh),
        ("forgotPassword", &credentials),
        ("resetPassword", &credentials),
        ("verifyEmail", &credentials),
        ("resendVerification", &credentials),
    ] {
        coverage.check_json(&limited, id, 429, body.clone()).await;
    }
}
