//! Accepted and rejected values, at every limit.

use hyper::Method;
use serde_json::{Value, json};
use uuid::Uuid;

use crate::harness::{Response, Server, User, Wire, WireResponse, head};

/// One code point, four bytes in UTF-8.
const ASTRAL: &str = "😀";

/// Creates a task from a raw body.
async fn create_raw(user: &User, body: impl AsRef<[u8]>) -> Response {
    let body = body.as_ref().to_vec();
    user.post(user.tasks()).body(body, "application/json").await
}

/// Returns the pointer and the code of each error in a problem.
fn errors(problem: &Value) -> Vec<(&str, &str)> {
    let errors = problem["errors"].as_array().expect("a 422 has errors");
    errors
        .iter()
        .map(|error| {
            assert!(
                error["detail"]
                    .as_str()
                    .is_some_and(|detail| !detail.is_empty()),
                "{error}"
            );
            (
                error["pointer"].as_str().expect("a pointer"),
                error["code"].as_str().expect("a code"),
            )
        })
        .collect()
}

// FR-005
#[tokio::test]
async fn accepts_titles_of_1_to_200_code_points() {
    let server = Server::shared().await;
    let ann = server.user().await;
    for title in [
        "x".into(),
        "x".repeat(200),
        ASTRAL.into(),
        ASTRAL.repeat(200),
        "e\u{301}".repeat(100),
    ] {
        let task = ann.create(json!({"title": title})).await.expect(201).json();
        assert_eq!(task["title"], json!(title));
    }
    for (title, code) in [
        (String::new(), "too_short"),
        ("x".repeat(201), "too_long"),
        (ASTRAL.repeat(201), "too_long"),
        ("e\u{301}".repeat(101), "too_long"),
    ] {
        let problem = ann
            .create(json!({"title": title}))
            .await
            .problem(422, "validation_failed");
        assert_eq!(errors(&problem), [("/title", code)]);
    }
}

// FR-005
#[tokio::test]
async fn trims_unicode_white_space_from_titles_before_counting() {
    let server = Server::shared().await;
    let ann = server.user().await;
    let spaces = "\t\n\u{b}\u{c}\r \u{85}\u{a0}\u{1680}\u{2000}\u{2007}\u{200a}\u{2028}\u{2029}\u{202f}\u{205f}\u{3000}";
    for inner in [
        "a".to_owned(),
        format!("a{spaces}b"),
        "x".repeat(200),
        "\u{200b}".into(),
        "\u{feff}".into(),
    ] {
        let title = format!("{spaces}{inner}{spaces}");
        let task = ann.create(json!({"title": title})).await.expect(201).json();
        assert_eq!(task["title"], json!(inner));
        let changed = ann
            .patch(ann.path_of(&task))
            .json(json!({"title": title}))
            .await
            .expect(200)
            .json();
        assert_eq!(changed["title"], json!(inner));
    }
    for space in spaces.chars() {
        let title = space.to_string();
        let problem = ann
            .create(json!({"title": title}))
            .await
            .problem(422, "validation_failed");
        assert_eq!(errors(&problem), [("/title", "too_short")], "{space:?}");
    }
}

// FR-005
#[tokio::test]
async fn accepts_descriptions_of_up_to_1000_code_points() {
    let server = Server::shared().await;
    let ann = server.user().await;
    for description in [
        String::new(),
        " ".into(),
        "x".repeat(1000),
        ASTRAL.repeat(1000),
    ] {
        let body = json!({"title": "a", "description": description});
        let task = ann.create(body).await.expect(201).json();
        assert_eq!(task["description"], json!(description));
    }
    for description in ["x".repeat(1001), ASTRAL.repeat(1001), " ".repeat(1001)] {
        let body = json!({"title": "a", "description": description});
        let problem = ann.create(body).await.problem(422, "validation_failed");
        assert_eq!(errors(&problem), [("/description", "too_long")]);
    }
}

#[tokio::test]
async fn updates_have_the_same_limits_as_creation() {
    let server = Server::shared().await;
    let ann = server.user().await;
    let task = ann.create_task("unchanged").await;
    let path = ann.path_of(&task);
    for method in [Method::PUT, Method::PATCH] {
        for (body, pointer, code) in [
            (json!({"title": ""}), "/title", "too_short"),
            (json!({"title": " \u{3000}"}), "/title", "too_short"),
            (json!({"title": "x".repeat(201)}), "/title", "too_long"),
            (json!({"title": "a\0"}), "/title", "invalid_character"),
            (
                json!({"description": "x".repeat(1001)}),
                "/description",
                "too_long",
            ),
            (
                json!({"description": "\0"}),
                "/description",
                "invalid_character",
            ),
            (
                json!({"title": "fine", "completed": "no"}),
                "/completed",
                "wrong_type",
            ),
        ] {
            let problem = ann
                .request(method.clone(), &path)
                .json(body.clone())
                .await
                .problem(422, "validation_failed");
            assert_eq!(errors(&problem), [(pointer, code)], "{method} {body}");
        }
        for (title, description) in [
            ("x".repeat(200), ASTRAL.repeat(1000)),
            ("unchanged".into(), String::new()),
        ] {
            let body = json!({"title": title, "description": description});
            ann.request(method.clone(), &path)
                .json(body)
                .await
                .expect(200);
        }
    }
}

#[tokio::test]
async fn rejects_nul_in_title_and_description() {
    let server = Server::shared().await;
    let ann = server.user().await;
    for text in ["\0", "a\0b", "a\0"] {
        let body = json!({"title": text, "description": text});
        let problem = ann.create(body).await.problem(422, "validation_failed");
        assert_eq!(
            errors(&problem),
            [
                ("/title", "invalid_character"),
                ("/description", "invalid_character")
            ]
        );
    }
    // All other characters are allowed.
    let unusual = "\u{1}\u{7f}\u{202e}\u{fffe}\u{10ffff}\"\\/</script>'; drop table tasks; --";
    let task = ann
        .create(json!({"title": unusual, "description": unusual}))
        .await
        .expect(201)
        .json();
    assert_eq!(
        (&task["title"], &task["description"]),
        (&json!(unusual), &json!(unusual))
    );
}

#[tokio::test]
async fn rejects_fields_of_a_wrong_type() {
    let server = Server::shared().await;
    let ann = server.user().await;
    let wrong = [
        json!(1),
        json!(1.5),
        json!(true),
        json!(["a"]),
        json!({"a": 1}),
    ];
    for value in wrong.iter().chain([&Value::Null]) {
        let problem = ann
            .create(json!({"title": value}))
            .await
            .problem(422, "validation_failed");
        assert_eq!(errors(&problem)[0].0, "/title", "{value}");
    }
    for value in &wrong {
        let body = json!({"title": "a", "description": value});
        let problem = ann.create(body).await.problem(422, "validation_failed");
        assert_eq!(
            errors(&problem),
            [("/description", "wrong_type")],
            "{value}"
        );
    }
    for value in [
        json!("true"),
        json!(0),
        json!(1),
        json!([]),
        json!({}),
        Value::Null,
    ] {
        let body = json!({"title": "a", "completed": value});
        let problem = ann.create(body).await.problem(422, "validation_failed");
        assert_eq!(errors(&problem), [("/completed", "wrong_type")], "{value}");
    }
}

// FR-008
#[tokio::test]
async fn returns_all_errors_of_a_body_at_once() {
    let server = Server::shared().await;
    let ann = server.user().await;
    let body = json!({"title": "x".repeat(201), "description": 7, "completed": "yes"});
    let problem = ann.create(body).await.problem(422, "validation_failed");
    let expected = [
        ("/title", "too_long"),
        ("/description", "wrong_type"),
        ("/completed", "wrong_type"),
    ];
    assert_eq!(errors(&problem), expected);
    assert!(
        problem["detail"]
            .as_str()
            .is_some_and(|detail| !detail.is_empty())
    );

    let problem = ann
        .create(json!({}))
        .await
        .problem(422, "validation_failed");
    assert_eq!(errors(&problem), [("/title", "required")]);

    for path in ["/api/v1/auth/register", "/api/v1/auth/login"] {
        let problem = server
            .post(path)
            .json(json!({}))
            .await
            .problem(422, "validation_failed");
        assert_eq!(
            errors(&problem),
            [("/email", "required"), ("/password", "required")]
        );
        let body = json!({"email": 1, "password": ["x"]});
        let problem = server
            .post(path)
            .json(body)
            .await
            .problem(422, "validation_failed");
        assert_eq!(
            errors(&problem),
            [("/email", "wrong_type"), ("/password", "wrong_type")]
        );
    }
    let body = json!({"email": "nobody", "password": "short"});
    let response = server.post("/api/v1/auth/register").json(body).await;
    let problem = response.problem(422, "validation_failed");
    let pointers: Vec<_> = errors(&problem).into_iter().map(|error| error.0).collect();
    assert_eq!(pointers, ["/email", "/password"]);
}

#[tokio::test]
async fn ignores_unknown_fields_but_rejects_an_update_without_known_ones() {
    let server = Server::shared().await;
    let ann = server.user().await;
    let body = json!({"title": "a", "colour": "red", "": 1, "Title": "b", "x": {"title": [1]}});
    let task = ann.create(body).await.expect(201).json();
    assert_eq!(task["title"], "a");
    let path = ann.path_of(&task);
    for method in [Method::PUT, Method::PATCH] {
        for body in [
            json!({}),
            json!({"colour": "red"}),
            json!({"user_id": ann.id, "Title": "b"}),
        ] {
            ann.request(method.clone(), &path)
                .json(body)
                .await
                .problem(422, "validation_failed");
        }
    }
    let read = ann.get(&path).await.json();
    assert_eq!(read, task);
}

#[tokio::test]
async fn returns_400_for_malformed_json() {
    let server = Server::shared().await;
    let ann = server.user().await;
    let bodies: [&[u8]; 16] = [
        b"",
        b" ",
        b"{",
        b"{\"title\":\"a\"",
        b"{\"title\":\"a\"}}",
        b"{\"title\":\"a\"} x",
        b"{'title':'a'}",
        b"{\"title\":\"a\",}",
        b"{title:\"a\"}",
        b"{\"title\":\"a\nb\"}",
        b"{\"title\":\"\\x\"}",
        b"{\"title\":\"\xff\"}",
        b"{\"title\":\"\xed\xa0\x80\"}",
        b"{\"title\":\"\xc0\x80\"}",
        b"{\"title\":\"\\ud800\"}",
        b"title=a",
    ];
    for body in bodies {
        let response = create_raw(&ann, body).await;
        assert_eq!(response.status, 400, "{}", String::from_utf8_lossy(body));
        response.problem(400, "malformed_json");
    }
    let task = ann.create_task("a").await;
    for method in [Method::PUT, Method::PATCH] {
        ann.request(method, ann.path_of(&task))
            .await
            .problem(400, "malformed_json");
    }
    for path in [
        "/api/v1/auth/register",
        "/api/v1/auth/login",
        "/api/v1/auth/refresh",
    ] {
        server.post(path).await.problem(400, "malformed_json");
    }
    let complete = format!("{}/complete", ann.path_of(&task));
    ann.patch(&complete)
        .body(b"{".to_vec(), "application/json")
        .await
        .problem(400, "malformed_json");
}

#[tokio::test]
async fn returns_422_for_json_that_is_not_an_object() {
    let server = Server::shared().await;
    let ann = server.user().await;
    let task = ann.create_task("a").await;
    let path = ann.path_of(&task);
    for body in [
        "null",
        "true",
        "1",
        "\"title\"",
        "[]",
        "[{\"title\":\"a\"}]",
        "[\"a\",null,false]",
        " [ ] ",
    ] {
        let problem = create_raw(&ann, body)
            .await
            .problem(422, "validation_failed");
        assert_eq!(errors(&problem), [("", "wrong_type")], "{body}");
        for at in [path.clone(), format!("{path}/complete")] {
            let response = ann
                .patch(&at)
                .body(body.as_bytes().to_vec(), "application/json")
                .await;
            response.problem(422, "validation_failed");
        }
    }
}

#[tokio::test]
async fn accepts_unusual_json_and_never_returns_500() {
    let server = Server::shared().await;
    let ann = server.user().await;
    for (body, title) in [
        ("\r\n\t {\"title\" : \"a\"} \n", "a"),
        (r#"{"t\u0069tle":"\u00e9\ud83d\ude00"}"#, "é😀"),
        (r#"{"title":"a","n":123456789012345678901234567890}"#, "a"),
        (r#"{"title":"a","n":-0.0e-99999}"#, "a"),
    ] {
        let response = create_raw(&ann, body).await;
        assert_eq!(response.expect(201).json()["title"], json!(title), "{body}");
    }
    // RFC 8259 section 6 leaves the range of numbers to the implementation.
    for (body, statuses) in [
        (r#"{"title":1e999}"#, [400, 422]),
        (r#"{"title":"a","n":1e999}"#, [400, 201]),
    ] {
        let huge = create_raw(&ann, body).await;
        assert!(statuses.contains(&huge.status), "{body}: {}", huge.status);
    }
    // Nested as deeply as the body size allows: rejected or ignored, but no crash.
    for (open, close) in [("[", "]"), ("{\"x\":", "}")] {
        let depth = 16_000 / (open.len() + close.len());
        let nested = open.repeat(depth) + "1" + &close.repeat(depth);
        let status = create_raw(&ann, format!(r#"{{"title":"deep","x":{nested}}}"#))
            .await
            .status;
        assert!(matches!(status, 201 | 400), "{status}");
        let status = create_raw(&ann, format!(r#"{{"title":{nested}}}"#))
            .await
            .status;
        assert!(matches!(status, 400 | 422), "{status}");
        let status = create_raw(&ann, open.repeat(16_000 / open.len()))
            .await
            .status;
        assert!(matches!(status, 400 | 422), "{status}");
    }
}

#[tokio::test]
async fn a_duplicate_field_creates_at_most_one_task() {
    let server = Server::shared().await;
    let ann = server.user().await;
    let response = create_raw(&ann, r#"{"title":"a","title":"b"}"#).await;
    assert!(
        matches!(response.status, 201 | 400 | 422),
        "{}",
        response.status
    );
    let tasks = ann.get(ann.tasks()).await.expect(200).json();
    assert_eq!(
        tasks.as_array().unwrap().len(),
        usize::from(response.status == 201)
    );
}

#[tokio::test]
async fn requires_a_json_content_type_or_none() {
    let server = Server::shared().await;
    let ann = server.user().await;
    let task = ann.create_task("a").await;
    let json_types = [
        "application/json",
        "application/json; charset=utf-8",
        "application/json;charset=UTF-8",
        "APPLICATION/JSON",
        "application/json ; charset=\"utf-8\"",
    ];
    let other_types = [
        "text/plain",
        "text/json",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        "application/jsonp",
        "application/json-patch+json",
        "application/vnd.api+json",
        "application",
        "json",
        "text/plain; application/json",
    ];
    let merge = "application/merge-patch+json";
    let body = br#"{"title":"b"}"#.to_vec();
    let (tasks, path) = (ann.tasks(), ann.path_of(&task));
    let complete = format!("{path}/complete");
    for (method, at, good) in [
        (Method::POST, &tasks, 201),
        (Method::PUT, &path, 200),
        (Method::PATCH, &path, 200),
        (Method::PATCH, &complete, 200),
    ] {
        let send = |content_type: &str| {
            ann.request(method.clone(), at)
                .body(body.clone(), content_type)
                .send()
        };
        for content_type in json_types {
            let response = send(content_type).await;
            assert_eq!(response.status, good, "{method} {at} {content_type}");
        }
        for content_type in other_types {
            let response = send(content_type).await;
            assert_eq!(response.status, 415, "{method} {at} {content_type}");
            response.problem(415, "unsupported_media_type");
        }
        let patch = method == Method::PATCH;
        assert_eq!(
            send(merge).await.status,
            if patch { good } else { 415 },
            "{method} {at} {merge}"
        );

        let mut wire = Wire::open(server).await;
        let more = format!("Content-Length: {}\r\n", body.len());
        wire.send(head(method.as_str(), at, Some(&ann.access_token), &more))
            .await;
        wire.send(&body).await;
        assert_eq!(
            wire.response().await.status,
            good,
            "{method} {at} without a content type"
        );
        // Two different types are rejected.
        let more = format!("{more}Content-Type: text/plain\r\nContent-Type: application/json\r\n");
        wire.send(head(method.as_str(), at, Some(&ann.access_token), &more))
            .await;
        wire.send(&body).await;
        assert!(
            matches!(wire.response().await.status, 400 | 415),
            "{method} {at} with two content types"
        );
    }
    // The type is ignored if there is no body and none is required.
    ann.patch(&complete)
        .header("content-type", "text/plain")
        .await
        .expect(200);
    ann.get(&path)
        .header("content-type", "text/plain")
        .await
        .expect(200);
}

#[tokio::test]
async fn a_415_names_the_accepted_types() {
    let server = Server::shared().await;
    let ann = server.user().await;
    let task = ann.create_task("a").await;
    let (tasks, path) = (ann.tasks(), ann.path_of(&task));
    let complete = format!("{path}/complete");
    for (method, at) in [
        (Method::POST, &tasks),
        (Method::PUT, &path),
        (Method::PATCH, &path),
        (Method::PATCH, &complete),
    ] {
        let send = |coding: &str, content_type: &str| {
            ann.request(method.clone(), at)
                .header("content-encoding", coding)
                .body(r#"{"title":"b","completed":true}"#, content_type)
                .send()
        };
        for coding in ["gzip", "GZip", "br", "zstd", "identity, gzip", "x"] {
            for content_type in ["application/json", "text/plain"] {
                let response = send(coding, content_type).await;
                let problem = response.problem(415, "unsupported_media_type");
                assert!(
                    problem["detail"].as_str().unwrap().contains("compressed"),
                    "{problem}"
                );
                assert_eq!(response.header("accept-encoding"), "identity");
                assert_eq!(
                    response.headers.contains_key("accept-patch"),
                    method == Method::PATCH
                );
            }
        }
        let response = send("identity", "text/plain").await;
        response.problem(415, "unsupported_media_type");
        assert!(!response.headers.contains_key("accept-encoding"));
        match method == Method::PATCH {
            true => assert_eq!(
                response.header("accept-patch"),
                "application/json, application/merge-patch+json"
            ),
            false => assert!(!response.headers.contains_key("accept-patch")),
        }
        for coding in ["identity", "Identity", "identity, identity", ""] {
            let response = send(coding, "application/json").await;
            assert!(response.status < 300, "{coding}: {}", response.status);
        }
    }
}

#[tokio::test]
async fn accepts_bodies_of_up_to_16_kib() {
    let server = Server::shared().await;
    let ann = server.user().await;
    let frame = r#"{"title":"a","x":""}"#.len();
    for (length, status) in [(16 * 1024, 201), (16 * 1024 + 1, 413)] {
        let body = format!(r#"{{"title":"a","x":"{}"}}"#, "x".repeat(length - frame));
        assert_eq!(body.len(), length);
        assert_eq!(create_raw(&ann, &body).await.status, status);
        let mut wire = Wire::open(server).await;
        wire.send(head(
            "POST",
            &ann.tasks(),
            Some(&ann.access_token),
            "Transfer-Encoding: chunked\r\n",
        ))
        .await;
        for chunk in body.as_bytes().chunks(1000) {
            wire.send(format!("{:x}\r\n", chunk.len())).await;
            wire.send(chunk).await;
            wire.send("\r\n").await;
        }
        wire.send("0\r\n\r\n").await;
        assert_eq!(wire.response().await.status, status, "in chunks");
    }
}

#[tokio::test]
async fn a_client_that_sends_a_megabyte_receives_the_413() {
    let server = Server::shared().await;
    let ann = server.user().await;
    let body = vec![b' '; 1 << 20];
    let assert_rejected = |response: WireResponse| {
        assert_eq!(response.status, 413);
        assert_eq!(response.json()["code"], "body_too_large");
        assert_eq!(
            response.header("content-type"),
            Some("application/problem+json")
        );
    };
    for _ in 0..10 {
        // The whole body is sent before the response is read.
        let mut wire = Wire::open(server).await;
        let more = format!("Content-Length: {}\r\n", body.len());
        wire.send(head("POST", &ann.tasks(), Some(&ann.access_token), &more))
            .await;
        wire.send(&body).await;
        assert_rejected(wire.response().await);

        let mut wire = Wire::open(server).await;
        wire.send(head(
            "POST",
            &ann.tasks(),
            Some(&ann.access_token),
            "Transfer-Encoding: chunked\r\n",
        ))
        .await;
        wire.send(format!("{:x}\r\n", body.len())).await;
        wire.send(&body).await;
        wire.send("\r\n0\r\n\r\n").await;
        assert_rejected(wire.response().await);

        let mut wire = Wire::open(server).await;
        let more = format!("Content-Length: {}\r\n", body.len());
        wire.send(head("POST", &ann.tasks(), None, &more)).await;
        wire.send(&body).await;
        assert_eq!(wire.response().await.status, 401);
    }
    // A Content-Length that is too large is rejected without waiting for the body.
    let mut wire = Wire::open(server).await;
    wire.send(head(
        "POST",
        &ann.tasks(),
        Some(&ann.access_token),
        "Content-Length: 99999999999\r\n",
    ))
    .await;
    assert_rejected(wire.response().await);
}

// FR-008
#[tokio::test]
async fn returns_the_first_error_in_the_documented_order() {
    let server = Server::shared().await;
    let (ann, bob) = (server.user().await, server.user().await);
    let task = ann.create_task("a").await;
    let unknown = format!("{}/{}", ann.tasks(), Uuid::now_v7());
    let theirs = format!("{}/{}", bob.tasks(), Uuid::now_v7());
    let (there, good) = (ann.path_of(&task), Some(ann.access_token.as_str()));
    let large = "x".repeat(20_000);
    let stale = "If-Match: \"stale\"\r\n";
    let text = "If-Match: \"stale\"\r\nContent-Type: text/plain\r\n";
    for (method, target, token, more, body, status, code) in [
        (
            "BREW",
            "/nowhere",
            None,
            text,
            large.as_str(),
            404,
            "not_found",
        ),
        (
            "BREW",
            theirs.as_str(),
            None,
            text,
            &large,
            405,
            "method_not_allowed",
        ),
        ("PUT", &theirs, None, text, &large, 401, "missing_token"),
        (
            "PUT",
            &theirs,
            Some("bad"),
            text,
            &large,
            401,
            "invalid_token",
        ),
        ("PUT", &theirs, good, text, &large, 403, "forbidden"),
        (
            "PUT",
            &unknown,
            good,
            text,
            &large,
            415,
            "unsupported_media_type",
        ),
        ("PUT", &unknown, good, stale, &large, 413, "body_too_large"),
        ("PUT", &unknown, good, stale, "{", 400, "malformed_json"),
        ("PUT", &unknown, good, stale, "{}", 422, "validation_failed"),
        (
            "PUT",
            &unknown,
            good,
            stale,
            r#"{"title":"b"}"#,
            404,
            "task_not_found",
        ),
        (
            "PUT",
            &there,
            good,
            stale,
            r#"{"title":"b"}"#,
            412,
            "precondition_failed",
        ),
        ("PUT", &there, good, "", r#"{"title":"b"}"#, 200, ""),
    ] {
        let mut wire = Wire::open(server).await;
        let more = format!("{more}Content-Length: {}\r\n", body.len());
        wire.send(head(method, target, token, &more) + body).await;
        let response = wire.response().await;
        assert_eq!(
            response.status, status,
            "{method} {target} {}",
            response.body
        );
        if status >= 400 {
            assert_eq!(response.json()["code"], code);
        }
    }
}

#[tokio::test]
async fn names_invalid_and_duplicate_query_parameters() {
    let server = Server::shared().await;
    let ann = server.user().await;
    ann.create_task("a").await;
    ann.create_task("b").await;
    let path = ann.tasks();
    let next = ann.get(format!("{path}?limit=1")).await;
    let link = next.header("link");
    let after = link
        .split("after=")
        .nth(1)
        .expect("after")
        .split(['&', '>'])
        .next()
        .unwrap();
    let longest = "%C3%A9".repeat(100);
    ann.get(format!("{path}?q={longest}")).await.expect(200);
    let too_long = longest + "a";

    let invalid = [
        (
            "limit",
            vec![
                "0",
                "1001",
                "-1",
                "",
                "abc",
                "1.5",
                "+1",
                "%2B1",
                "%201",
                "1e1",
                "99999999999999999999",
            ],
        ),
        (
            "completed",
            vec!["", "yes", "1", "True", "TRUE", "null", "%00"],
        ),
        (
            "sort",
            vec![
                "",
                "title",
                "created_at,title",
                "-updated_at",
                "+created_at",
                "CREATED_AT",
            ],
        ),
        ("total", vec!["", "maybe", "1"]),
        (
            "after",
            vec![
                "",
                "garbage",
                "%00",
                "%FF",
                "0",
                "../..",
                "00000000-0000-0000-0000-00000000000g",
            ],
        ),
        ("q", vec!["%00", "a%00b", "%FF", "%C3", &too_long]),
    ];
    let duplicates = [
        ("limit", "1"),
        ("completed", "true"),
        ("sort", "created_at"),
        ("total", "true"),
        ("q", "a"),
        ("after", after),
    ];
    let mut queries: Vec<(&str, String)> = Vec::new();
    for (name, values) in invalid {
        queries.extend(
            values
                .into_iter()
                .map(|value| (name, format!("{name}={value}"))),
        );
    }
    for (name, value) in duplicates {
        let single = format!("{path}?{name}={value}");
        ann.get(&single).await.expect(200);
        queries.push((name, format!("{name}={value}&{name}={value}")));
        queries.push((
            name,
            format!(
                "{name}={value}&x=1&%{:02x}{}={value}",
                name.as_bytes()[0],
                &name[1..]
            ),
        ));
    }
    for (name, query) in queries {
        let response = ann.get(format!("{path}?{query}")).await;
        assert_eq!(response.status, 422, "{query}");
        let problem = response.problem(422, "validation_failed");
        let error = &problem["errors"][0];
        assert_eq!(error["parameter"], name, "{query}");
        assert!(error.get("pointer").is_none(), "{query}: {error}");
        assert!(
            error["code"].is_string() && error["detail"].is_string(),
            "{query}: {error}"
        );
    }
    let response = ann.get(format!("{path}?limit=0&sort=x&completed=y")).await;
    let problem = response.problem(422, "validation_failed");
    let mut named: Vec<_> = problem["errors"]
        .as_array()
        .unwrap()
        .iter()
        .map(|e| e["parameter"].as_str().unwrap())
        .collect();
    named.sort_unstable();
    assert_eq!(
        named,
        ["completed", "limit", "sort"],
        "not all errors are returned"
    );
}

#[tokio::test]
async fn delete_completed_requires_completed_true() {
    let server = Server::shared().await;
    let ann = server.user().await;
    ann.create(json!({"title": "a", "completed": true}))
        .await
        .expect(201);
    for query in [
        "",
        "?",
        "?completed",
        "?completed=",
        "?completed=false",
        "?completed=1",
        "?completed=TRUE",
        "?completed=true&completed=true",
        "?q=a",
        "?Completed=true",
    ] {
        let problem = ann
            .delete(format!("{}{query}", ann.tasks()))
            .await
            .problem(422, "validation_failed");
        assert_eq!(problem["errors"][0]["parameter"], "completed", "{query}");
    }
    let list = ann.get(ann.tasks()).await.json();
    assert_eq!(list.as_array().unwrap().len(), 1);
}

// FR-005, FR-014, FR-015
#[tokio::test]
async fn the_database_schema_rejects_invalid_rows() {
    let server = Server::start().await;
    let ann = server.user().await;
    ann.create_task("a").await;
    let sql = server.sql().await;
    let task = |values: &str| {
        format!(
            "insert into tasks (user_id, id, title, description, completed, created_at, updated_at)
             select {values} from users u cross join tasks t"
        )
    };
    let valid = task("u.id, gen_random_uuid(), 'x', null, false, now(), now()");
    sql.execute(&valid, &[])
        .await
        .expect("a valid row is accepted");
    let user = |values: &str| {
        format!(
            "insert into users (id, email, password_hash, created_at, updated_at)
             select {values} from users"
        )
    };
    let session = |values: &str| {
        format!(
            "insert into sessions (id, user_id, generation, rotated_at, created_at, last_used_at, expires_at)
             select {values} from sessions"
        )
    };
    let longest =
        task("u.id, gen_random_uuid(), repeat('😀', 200), repeat('😀', 1000), true, now(), now()");
    sql.execute(&longest, &[])
        .await
        .expect("the longest texts are accepted");
    for bad in [
        task("u.id, gen_random_uuid(), '', null, false, now(), now()"),
        task("u.id, gen_random_uuid(), ' ', null, false, now(), now()"),
        task("u.id, gen_random_uuid(), repeat('x', 201), null, false, now(), now()"),
        task("u.id, gen_random_uuid(), null, null, false, now(), now()"),
        task("u.id, gen_random_uuid(), 'x', repeat('x', 1001), false, now(), now()"),
        task("u.id, gen_random_uuid(), 'x', null, null, now(), now()"),
        task("u.id, gen_random_uuid(), 'x', null, false, null, now()"),
        task("u.id, gen_random_uuid(), 'x', null, false, now(), null"),
        task("u.id, gen_random_uuid(), 'x', null, false, now(), now() - interval '1 second'"),
        task("u.id, null, 'x', null, false, now(), now()"),
        task("u.id, t.id, 'x', null, false, now(), now()"),
        task("null, gen_random_uuid(), 'x', null, false, now(), now()"),
        task("gen_random_uuid(), gen_random_uuid(), 'x', null, false, now(), now()"),
        user("gen_random_uuid(), email, password_hash, now(), now()"),
        user("id, 'x@example.com', password_hash, now(), now()"),
        user("gen_random_uuid(), null, password_hash, now(), now()"),
        user("gen_random_uuid(), '', password_hash, now(), now()"),
        user("gen_random_uuid(), 'nobody', password_hash, now(), now()"),
        user("gen_random_uuid(), '@example.com', password_hash, now(), now()"),
        user("gen_random_uuid(), repeat('x', 243) || '@example.com', password_hash, now(), now()"),
        user("gen_random_uuid(), 'x@example.com', null, now(), now()"),
        user("gen_random_uuid(), 'x@example.com', 'plain text', now(), now()"),
        session("id, user_id, 1, now(), now(), now(), now()"),
        session("gen_random_uuid(), gen_random_uuid(), 1, now(), now(), now(), now()"),
        session("gen_random_uuid(), null, 1, now(), now(), now(), now()"),
        session("gen_random_uuid(), user_id, 0, now(), now(), now(), now()"),
        session("gen_random_uuid(), user_id, 1, now(), now(), now(), null"),
    ] {
        let rejected = sql.execute(&bad, &[]).await;
        let error = rejected.expect_err(&bad);
        let class = error
            .code()
            .expect("an error from PostgreSQL")
            .code()
            .to_owned();
        // Any error other than a constraint (23…) or a length (22001) is a mistake in this test.
        assert!(
            class.starts_with("23") || class == "22001",
            "{class}: {bad}"
        );
    }
}
