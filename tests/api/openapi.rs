//! The OpenAPI document and the service say the same.
//!
//! Whether every answer fits its schema to the letter, schemathesis finds out (`.ci/openapi`).

use std::collections::{BTreeMap, BTreeSet};

use hyper::Method;
use serde_json::{Value, json};

use crate::harness::{Request, Response, Server, User};

const DOCUMENT: &str = include_str!("../../src/openapi.json");

/// The password in the document's examples.
const EXAMPLE_PASSWORD: &str = "blue kettle sings at dawn";

/// The document, with its references followed.
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

    /// The methods that the document lists for each path.
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

    /// The examples of a body, by their names.
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

    /// The codes of the problems that this answer can bear.
    fn codes<'a>(&'a self, answer: &'a Value) -> BTreeSet<&'a str> {
        let examples = self.examples(&answer["content"]["application/problem+json"]);
        examples
            .values()
            .map(|example| example["code"].as_str().unwrap())
            .collect()
    }

    /// An address with a value for every parameter; what the document has no example for is `x`.
    fn address(&self, path: &str, values: &[(&str, &str)]) -> String {
        let parameters = self.0["paths"][path]["parameters"]
            .as_array()
            .into_iter()
            .flatten();
        let mut address = path.to_owned();
        for parameter in parameters.map(|parameter| self.resolve(parameter)) {
            let name = parameter["name"].as_str().unwrap();
            let given = values
                .iter()
                .find(|(key, _)| *key == name)
                .map(|(_, value)| *value);
            let value = given.or(parameter["example"].as_str()).unwrap_or("x");
            address = address.replace(&format!("{{{name}}}"), value);
        }
        address
    }
}

impl Operation<'_> {
    fn method(&self) -> Method {
        self.method.to_uppercase().parse().unwrap()
    }

    fn needs_a_token(&self) -> bool {
        self.spec["security"]
            .as_array()
            .is_none_or(|ways| ways.iter().any(|way| way["bearer"].is_array()))
    }

    fn takes_a_body(&self) -> bool {
        self.spec["requestBody"].is_object()
    }

    /// The status of a request that succeeds.
    fn success(&self) -> u16 {
        let statuses = self.spec["responses"].as_object().unwrap().keys();
        statuses
            .map(|status| status.parse().unwrap())
            .find(|status| *status < 400)
            .unwrap()
    }
}

/// Whether two values have the same members all the way down. Null is a member of any type.
fn assert_same_members(example: &Value, real: &Value, place: &str) {
    match (example, real) {
        (Value::Object(example), Value::Object(real)) => {
            let names =
                |of: &serde_json::Map<String, Value>| of.keys().cloned().collect::<BTreeSet<_>>();
            assert_eq!(names(example), names(real), "{place}");
            for (name, value) in example {
                assert_same_members(value, &real[name], &format!("{place}/{name}"));
            }
        }
        (Value::Array(example), Value::Array(real)) => {
            for value in example {
                assert_same_members(value, &real[0], &format!("{place}/0"));
            }
        }
        (Value::Null, _) | (_, Value::Null) => {}
        _ => assert_eq!(
            std::mem::discriminant(example),
            std::mem::discriminant(real),
            "{place}: {example} and {real}"
        ),
    }
}

#[tokio::test]
async fn the_service_serves_the_document_that_lies_beside_the_router() {
    let server = Server::start().await;
    let answer = server.get("/openapi.json").send().await.expect(200);
    assert_eq!(answer.header("content-type"), "application/json");
    assert_eq!(answer.json(), Document::read().0);
}

#[tokio::test]
async fn every_path_takes_exactly_the_methods_that_the_document_lists() {
    let server = Server::start().await;
    let document = Document::read();
    for (path, mut methods) in document.methods() {
        if methods.contains("GET") {
            methods.insert("HEAD".to_owned());
        }
        methods.insert("OPTIONS".to_owned());
        let address = document.address(path, &[]);
        let answer = server.request(Method::OPTIONS, &address).send().await;
        assert_eq!(answer.status, 204, "{path}");
        let allowed: BTreeSet<String> = answer
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
async fn every_example_of_a_request_succeeds_as_the_document_says() {
    let server = Server::start().await;
    let document = Document::read();
    for operation in document.operations() {
        let body = &operation.spec["requestBody"];
        for (content_type, content) in body["content"].as_object().into_iter().flatten() {
            for (name, example) in document.examples(content) {
                // The examples are about Ann, who must not be there yet when she registers.
                let user = register(&server, "ann@example.com").await;
                if operation.id == "register" {
                    server
                        .delete("/api/v1/auth/me")
                        .bearer(&user.access_token)
                        .json(json!({"password": user.password}))
                        .send()
                        .await
                        .expect(204);
                }
                let task = match operation.path.contains("{id}") {
                    true => user.create_task(&server, "Buy milk").await["id"]
                        .as_str()
                        .unwrap()
                        .to_owned(),
                    false => String::new(),
                };
                let mut example = example.clone();
                if operation.id == "refresh" {
                    // Only the service can make one that is good.
                    example["refresh_token"] = user.refresh_token.clone().into();
                }
                let address =
                    document.address(operation.path, &[("user_id", &user.id), ("id", &task)]);
                let mut request = server
                    .request(operation.method(), address)
                    .body(example.to_string(), content_type);
                // With a bearer token a logout would not read its body.
                if operation.needs_a_token() && operation.id != "logout" {
                    request = request.bearer(&user.access_token);
                }
                let answer = request.send().await;
                assert_eq!(
                    answer.status,
                    operation.success(),
                    "{} {name}: {answer:?}",
                    operation.id
                );
            }
        }
    }
}

#[tokio::test]
async fn every_example_of_an_invalid_value_is_what_the_service_sends() {
    let server = Server::start().await;
    let user = server.user().await;
    let document = Document::read();
    let responses = document.0["components"]["responses"].as_object().unwrap();
    let examples = responses
        .values()
        .flat_map(|response| document.examples(&response["content"]["application/problem+json"]))
        .filter(|(_, example)| example["errors"].is_array());
    let mut count = 0;
    for (_, example) in examples {
        let request = match example["errors"][0]["pointer"].as_str() {
            Some("/title") => server
                .post(user.tasks())
                .json(json!({"title": "x".repeat(201)})),
            _ => server.get(format!("{}?limit=1001", user.tasks())),
        };
        let answer = request.bearer(&user.access_token).send().await;
        let problem = answer.problem(422, "validation_failed");
        for member in ["errors", "detail", "title"] {
            assert_eq!(example[member], problem[member]);
        }
        count += 1;
    }
    assert!(count >= 3, "{count} examples");
}

/// Registers this address with the password of the examples, and nobody has had it before.
async fn register(server: &Server, email: &str) -> User {
    server
        .sql()
        .await
        .execute("delete from users where email = $1", &[&email])
        .await
        .unwrap();
    let body = json!({"email": email, "password": EXAMPLE_PASSWORD});
    server
        .post("/api/v1/auth/register")
        .json(body)
        .send()
        .await
        .expect(201);
    server.login(email, EXAMPLE_PASSWORD).await
}

/// Sends requests to operations and compares each answer with what the document has on it.
struct Tour {
    document: Document,
    met: BTreeSet<(String, u16)>,
}

impl Tour {
    fn request(&self, server: &Server, id: &str, values: &[(&str, &str)]) -> Request {
        let operation = self.document.operation(id);
        server.request(
            operation.method(),
            self.document.address(operation.path, values),
        )
    }

    async fn meet(&mut self, id: &str, request: Request, status: u16) -> Response {
        let answer = request.send().await;
        assert_eq!(answer.status, status, "{id}: {answer:?}");
        let documented = self.document.operation(id).spec["responses"].get(status.to_string());
        let documented = self
            .document
            .resolve(documented.unwrap_or_else(|| panic!("{id}: no {status}")));
        for (name, header) in documented["headers"].as_object().into_iter().flatten() {
            if self.document.resolve(header)["required"] == true {
                answer.header(name);
            }
        }
        match documented["content"].as_object() {
            None => assert!(answer.body.is_empty(), "{id}: {answer:?}"),
            Some(content) => {
                let essence = answer.header("content-type").split(';').next().unwrap();
                assert!(content.contains_key(essence), "{id}: {answer:?}");
                for example in self.document.examples(&content[essence]).values() {
                    assert_same_members_but_faults(example, &answer.json(), id);
                }
                if essence == "application/problem+json" {
                    let code = answer.json()["code"].as_str().unwrap().to_owned();
                    assert!(
                        self.document.codes(documented).contains(code.as_str()),
                        "{id}: {code}"
                    );
                }
            }
        }
        self.met.insert((id.to_owned(), status));
        answer
    }
}

/// One status can have problems with faults and others without.
fn assert_same_members_but_faults(example: &Value, real: &Value, place: &str) {
    if example["code"] == real["code"] {
        let (mut example, mut real) = (example.clone(), real.clone());
        if example["code"].is_string() {
            // A fault has a pointer or a parameter, whichever fits.
            for of in [&mut example, &mut real] {
                of.as_object_mut().unwrap().remove("errors");
            }
        }
        assert_same_members(&example, &real, place);
    }
}

#[tokio::test]
async fn a_tour_meets_every_documented_status_and_no_other() {
    let server = Server::start().await;
    let mut tour = Tour {
        document: Document::read(),
        met: BTreeSet::new(),
    };
    let (user, other) = (server.user().await, server.user().await);
    refusals_that_many_share(&mut tour, &server, &user, &other).await;
    successes(&mut tour, &server).await;
    refusals_of_their_own(&mut tour, &server, &user).await;
    brakes(&mut tour, &server).await;

    let mut documented = BTreeSet::new();
    for operation in tour.document.operations() {
        for status in operation.spec["responses"].as_object().unwrap().keys() {
            documented.insert((operation.id.to_owned(), status.parse::<u16>().unwrap()));
        }
    }
    // These need a client that waits, a bug, and a database that is away.
    documented.retain(|(_, status)| ![408, 500, 503].contains(status));
    let unmet: Vec<_> = documented.difference(&tour.met).collect();
    assert!(unmet.is_empty(), "documented, but not met: {unmet:?}");
}

/// What every operation of a kind refuses in the same way.
async fn refusals_that_many_share(tour: &mut Tour, server: &Server, user: &User, other: &User) {
    let document = Document::read();
    let methods = document.methods();
    let own: &[(&str, &str)] = &[("user_id", &user.id)];
    for operation in document.operations() {
        let id = operation.id;
        let signed_in = |request: Request| match operation.needs_a_token() && id != "logout" {
            true => request.bearer(&user.access_token),
            false => request,
        };
        let twice_hosted = tour
            .request(server, id, own)
            .header("host", "elsewhere.example");
        tour.meet(id, twice_hosted, 400).await;
        let address = document.address(operation.path, own);
        let foreign = [Method::PUT, Method::POST, Method::DELETE, Method::TRACE]
            .into_iter()
            .find(|method| !methods[operation.path].contains(method.as_str()))
            .unwrap();
        tour.meet(id, server.request(foreign, address), 405).await;
        if operation.needs_a_token() {
            tour.meet(id, tour.request(server, id, own), 401).await;
            tour.meet(id, tour.request(server, id, own).bearer("forged"), 401)
                .await;
        }
        if operation.path.contains("{user_id}") {
            let elsewhere = tour.request(server, id, &[("user_id", &other.id)]);
            tour.meet(id, elsewhere.bearer(&user.access_token), 403)
                .await;
        }
        if operation.takes_a_body() {
            let text = signed_in(tour.request(server, id, own)).body("title=x", "text/plain");
            tour.meet(id, text, 415).await;
            let large = signed_in(tour.request(server, id, own)).json("x".repeat(20_000).into());
            tour.meet(id, large, 413).await;
            let broken = signed_in(tour.request(server, id, own)).body("{", "application/json");
            tour.meet(id, broken, 400).await;
            let array = signed_in(tour.request(server, id, own)).json(json!([]));
            tour.meet(id, array, 422).await;
        }
    }
}

async fn successes(tour: &mut Tour, server: &Server) {
    let credentials = json!({"email": "ann@example.com", "password": EXAMPLE_PASSWORD});
    tour.meet(
        "register",
        tour.request(server, "register", &[])
            .json(credentials.clone()),
        201,
    )
    .await;
    let ann = server.login("ann@example.com", EXAMPLE_PASSWORD).await;
    tour.meet(
        "register",
        tour.request(server, "register", &[])
            .json(credentials.clone()),
        409,
    )
    .await;
    tour.meet(
        "login",
        tour.request(server, "login", &[]).json(credentials.clone()),
        200,
    )
    .await;
    let refresh = json!({"refresh_token": ann.refresh_token});
    tour.meet(
        "refresh",
        tour.request(server, "refresh", &[]).json(refresh),
        200,
    )
    .await;
    tour.meet(
        "getMe",
        tour.request(server, "getMe", &[]).bearer(&ann.access_token),
        200,
    )
    .await;
    tour.meet(
        "listSessions",
        tour.request(server, "listSessions", &[])
            .bearer(&ann.access_token),
        200,
    )
    .await;

    let own: &[(&str, &str)] = &[("user_id", &ann.id)];
    let create = tour
        .request(server, "createTask", own)
        .bearer(&ann.access_token);
    let body = json!({"title": "Buy milk", "description": "Two bottles, the green ones"});
    let created = tour
        .meet(
            "createTask",
            create.header("idempotency-key", "milk").json(body),
            201,
        )
        .await;
    let (task, tag) = (
        created.json()["id"].as_str().unwrap().to_owned(),
        created.header("etag").to_owned(),
    );
    let list = tour
        .request(server, "listTasks", own)
        .bearer(&ann.access_token);
    tour.meet("listTasks", list, 200).await;
    let reused = tour
        .request(server, "createTask", own)
        .bearer(&ann.access_token);
    let reused = reused
        .header("idempotency-key", "milk")
        .json(json!({"title": "Buy oat milk"}));
    tour.meet("createTask", reused, 422).await;

    let this: &[(&str, &str)] = &[("user_id", &ann.id), ("id", &task)];
    let signed_in =
        |tour: &Tour, id: &str| tour.request(server, id, this).bearer(&ann.access_token);
    tour.meet("getTask", signed_in(tour, "getTask"), 200).await;
    tour.meet(
        "getTask",
        signed_in(tour, "getTask").header("if-none-match", &tag),
        304,
    )
    .await;
    for id in ["replaceTask", "updateTask", "setTaskCompletion"] {
        tour.meet(
            id,
            signed_in(tour, id).json(json!({"completed": true})),
            200,
        )
        .await;
    }
    for id in ["replaceTask", "updateTask", "setTaskCompletion"] {
        let stale = signed_in(tour, id)
            .header("if-match", &tag)
            .json(json!({"completed": false}));
        tour.meet(id, stale, 412).await;
    }
    for id in ["getTask", "deleteTask"] {
        tour.meet(id, signed_in(tour, id).header("if-match", &tag), 412)
            .await;
    }
    tour.meet("deleteTask", signed_in(tour, "deleteTask"), 204)
        .await;
    let path = format!("{}?completed=true", ann.tasks());
    tour.meet(
        "deleteCompletedTasks",
        server.delete(path).bearer(&ann.access_token),
        200,
    )
    .await;

    let login = server.login(&ann.email, EXAMPLE_PASSWORD).await;
    let session = tour.request(server, "endSession", &[("id", &login.session_id)]);
    tour.meet("endSession", session.bearer(&ann.access_token), 204)
        .await;
    let others = tour
        .request(server, "endOtherSessions", &[])
        .bearer(&ann.access_token);
    tour.meet("endOtherSessions", others, 204).await;
    let change =
        json!({"current_password": EXAMPLE_PASSWORD, "new_password": "green kettle hums at noon"});
    let change = tour
        .request(server, "changePassword", &[])
        .bearer(&ann.access_token)
        .json(change);
    let tokens = tour.meet("changePassword", change, 200).await.json();
    let token = tokens["access_token"].as_str().expect("a token");
    let delete = tour.request(server, "deleteMe", &[]).bearer(token);
    tour.meet(
        "deleteMe",
        delete.json(json!({"password": "green kettle hums at noon"})),
        204,
    )
    .await;
    let bea = server.user().await;
    tour.meet(
        "logout",
        tour.request(server, "logout", &[])
            .bearer(&bea.access_token),
        204,
    )
    .await;

    for id in [
        "healthz", "readyz", "openapi", "docs", "docsFile", "problem",
    ] {
        tour.meet(id, tour.request(server, id, &[]), 200).await;
    }
    tour.meet("root", tour.request(server, "root", &[]), 307)
        .await;
}

async fn refusals_of_their_own(tour: &mut Tour, server: &Server, user: &User) {
    let none: &[(&str, &str)] = &[("user_id", &user.id), ("id", "none")];
    let signed_in =
        |tour: &Tour, id: &str| tour.request(server, id, none).bearer(&user.access_token);
    for id in ["getTask", "deleteTask", "endSession"] {
        tour.meet(id, signed_in(tour, id), 404).await;
    }
    for id in ["replaceTask", "updateTask", "setTaskCompletion"] {
        tour.meet(
            id,
            signed_in(tour, id).json(json!({"completed": true})),
            404,
        )
        .await;
    }
    tour.meet(
        "docsFile",
        tour.request(server, "docsFile", &[("file", "none")]),
        404,
    )
    .await;
    tour.meet(
        "problem",
        tour.request(server, "problem", &[("code", "none")]),
        404,
    )
    .await;
    let ill_formed = server
        .get(format!("{}?limit=0", user.tasks()))
        .bearer(&user.access_token);
    tour.meet("listTasks", ill_formed, 422).await;
    tour.meet(
        "deleteCompletedTasks",
        signed_in(tour, "deleteCompletedTasks"),
        422,
    )
    .await;
    let ill_formed = signed_in(tour, "createTask")
        .header("idempotency-key", "not visible")
        .json(json!({"title": "x"}));
    tour.meet("createTask", ill_formed, 400).await;

    let wrong = json!({"email": user.email, "password": "wrong"});
    tour.meet("login", tour.request(server, "login", &[]).json(wrong), 401)
        .await;
    let forged = json!({"refresh_token": user.access_token});
    tour.meet(
        "refresh",
        tour.request(server, "refresh", &[]).json(forged),
        401,
    )
    .await;
    let wrong = json!({"current_password": "wrong", "new_password": EXAMPLE_PASSWORD});
    tour.meet(
        "changePassword",
        signed_in(tour, "changePassword").json(wrong),
        403,
    )
    .await;
    tour.meet(
        "deleteMe",
        signed_in(tour, "deleteMe").json(json!({"password": "wrong"})),
        403,
    )
    .await;
    let closed = server.sibling(&[("REGISTRATION", "closed")]).await;
    let late = json!({"email": "late@example.com", "password": EXAMPLE_PASSWORD});
    tour.meet(
        "register",
        tour.request(&closed, "register", &[]).json(late),
        403,
    )
    .await;
}

async fn brakes(tour: &mut Tour, server: &Server) {
    let user = server.user().await;
    for _ in 0..10 {
        server
            .delete("/api/v1/auth/me")
            .bearer(&user.access_token)
            .json(json!({"password": "wrong"}))
            .send()
            .await
            .expect(403);
    }
    let signed_in =
        |tour: &Tour, id: &str| tour.request(server, id, &[]).bearer(&user.access_token);
    let change = json!({"current_password": user.password, "new_password": EXAMPLE_PASSWORD});
    tour.meet(
        "changePassword",
        signed_in(tour, "changePassword").json(change),
        429,
    )
    .await;
    tour.meet(
        "deleteMe",
        signed_in(tour, "deleteMe").json(json!({"password": user.password})),
        429,
    )
    .await;

    let braked = server.sibling(&[("AUTH_RATE_PER_MINUTE", "1")]).await;
    let credentials = json!({"email": user.email, "password": user.password});
    // The first request of the minute passes, or is held up by the account alone.
    braked
        .post("/api/v1/auth/login")
        .json(credentials.clone())
        .send()
        .await;
    for id in ["register", "login"] {
        tour.meet(
            id,
            tour.request(&braked, id, &[]).json(credentials.clone()),
            429,
        )
        .await;
    }
    let refresh = json!({"refresh_token": user.refresh_token});
    tour.meet(
        "refresh",
        tour.request(&braked, "refresh", &[]).json(refresh),
        429,
    )
    .await;
}
