//! What may be a password, what happens at 72 bytes, and how old hashes become new ones. FR-012.

use std::collections::BTreeSet;

use crate::auth::{
    ANOTHER_PASSWORD, assert_signed_in, change_password, login, pointers, register, text,
};
use crate::harness::{PASSWORD, Server};

/// 71 bytes that nobody guesses.
const BYTES_71: &str = "kV7#pQ2mXz9!rT4wLb8@nY6cJd3$hF5gSa1%eU0iOo^vBx&uKq*tMw(zNr)yPl_jGk+DsEf";

/// 18 code points of 4 bytes each.
const EIGHTEEN_CRABS: &str = "🦀🐙🦑🐚🐡🐠🐟🐬🐳🐋🦈🐊🐅🐆🦓🦍🦧🐘";

#[tokio::test]
async fn passwords_have_8_code_points_to_72_bytes() {
    assert_eq!(BYTES_71.len(), 71);
    assert_eq!(
        (EIGHTEEN_CRABS.len(), EIGHTEEN_CRABS.chars().count()),
        (72, 18)
    );
    let server = Server::start().await;
    let bytes_72 = format!("{BYTES_71}Z");
    let bytes_73 = format!("{BYTES_71}ZZ");
    let crabs_and_one = format!("{EIGHTEEN_CRABS}x");
    let seven_crabs: String = EIGHTEEN_CRABS.chars().take(7).collect();
    let eight_crabs: String = EIGHTEEN_CRABS.chars().take(8).collect();

    for (n, (password, is_good)) in [
        ("", false),
        ("kV7#pQ2", false),
        ("kV7#pQ2m", true),
        // 28 bytes, but 7 of what a person counts.
        (&seven_crabs, false),
        (&eight_crabs, true),
        (&bytes_72, true),
        (&bytes_73, false),
        (EIGHTEEN_CRABS, true),
        (&crabs_and_one, false),
        ("kV7#pQ2m\0Xz9!rT4w", false),
        // No composition rules, nothing trimmed, nothing folded.
        ("verdant walrus umbrella", true),
        ("  kV7#pQ2mXz  ", true),
        ("48151623429176", true),
        ("пароль-который-длинный", true),
    ]
    .into_iter()
    .enumerate()
    {
        let email = format!("ann{n}@example.com");
        let response = register(&server, &email, password).await;
        if is_good {
            response.expect(201);
            login(&server, &email, password).await.expect(200);
        } else {
            let problem = response.problem(422, "validation_failed");
            assert_eq!(
                pointers(&problem),
                BTreeSet::from(["/password".to_owned()]),
                "{password:?}"
            );
        }
    }
}

/// RFC 8265: a keyboard that composes an accent in another way types the same password, wherever
/// a password is asked for; and the bounds are those of the composed one.
#[tokio::test]
async fn a_password_is_the_same_however_its_accents_are_composed() {
    let server = Server::start().await;
    let composed = "mélange-Ångström-où";
    let decomposed = "me\u{301}lange-A\u{30a}ngstro\u{308}m-ou\u{300}";
    register(&server, "ann@example.com", decomposed)
        .await
        .expect(201);
    register(&server, "bob@example.com", composed)
        .await
        .expect(201);
    for email in ["ann@example.com", "bob@example.com"] {
        for password in [composed, decomposed, "mélange-\u{212b}ngström-où"] {
            login(&server, email, password).await.expect(200);
        }
        login(&server, email, "melange-Angstrom-ou")
            .await
            .problem(401, "invalid_credentials");
    }
    let ann = server.login("ann@example.com", composed).await;
    let next = "de\u{301}ja\u{300}-vu-encore-une-fois";
    let changed = change_password(&server, &ann.access_token, decomposed, next).await;
    assert!(changed.status < 300, "{}", changed.status);
    let ann = server
        .login("ann@example.com", "déjà-vu-encore-une-fois")
        .await;
    crate::auth::delete_account(&server, &ann.access_token, next)
        .await
        .expect(204);

    // 7 code points once composed, and 72 bytes once composed.
    let seven = "e\u{301}kV7#pQ";
    assert_eq!(seven.chars().count(), 8);
    register(&server, "cid@example.com", seven)
        .await
        .problem(422, "validation_failed");
    let longest = format!("{}{}", "e\u{301}", &BYTES_71[..70]);
    assert_eq!(longest.len(), 73);
    register(&server, "cid@example.com", &longest)
        .await
        .expect(201);
    login(&server, "cid@example.com", &longest)
        .await
        .expect(200);
    // U+1D160 is three code points when composed, as Unicode has it: 84 bytes.
    register(&server, "dan@example.com", &"\u{1d160}".repeat(7))
        .await
        .problem(422, "validation_failed");
    login(&server, "bob@example.com", &"\u{1d160}".repeat(18))
        .await
        .problem(401, "invalid_credentials");
}

/// Otherwise a password is what it is, to the byte.
#[tokio::test]
async fn nothing_like_the_password_is_the_password() {
    let server = Server::start().await;
    let password = "  kV7#pQ2mÄz  ";
    register(&server, "ann@example.com", password)
        .await
        .expect(201);
    for other in [
        "kV7#pQ2mÄz",
        "  kV7#pQ2mÄz ",
        "  kv7#pq2mäz  ",
        "  KV7#PQ2MÄZ  ",
        // A letter of its own.
        "  kV7#pQ2m\u{212b}z  ",
        "  kV7#pQ2mÄz  \0",
    ] {
        login(&server, "ann@example.com", other)
            .await
            .problem(401, "invalid_credentials");
    }
    login(&server, "ann@example.com", password)
        .await
        .expect(200);
}

/// bcrypt reads 72 bytes: what comes after them must not be ignored.
#[tokio::test]
async fn a_right_password_of_72_bytes_with_a_tail_is_wrong() {
    let server = Server::start().await;
    let password = format!("{BYTES_71}Z");
    let ann = register(&server, "ann@example.com", &password)
        .await
        .expect(201)
        .json();
    let access_token = text(&ann, "access_token");
    for tail in ["x", "\0", "\0x", " ", "Z", &"long".repeat(1000)] {
        let longer = format!("{password}{tail}");
        login(&server, "ann@example.com", &longer)
            .await
            .problem(401, "invalid_credentials");
    }
    let longer = format!("{password}x");
    change_password(&server, &access_token, &longer, ANOTHER_PASSWORD)
        .await
        .problem(403, "wrong_password");
    crate::auth::delete_account(&server, &access_token, &longer)
        .await
        .problem(403, "wrong_password");
    login(&server, "ann@example.com", BYTES_71)
        .await
        .problem(401, "invalid_credentials");
    login(&server, "ann@example.com", &password)
        .await
        .expect(200);
}

/// At the door a password that breaks the rules is merely a wrong one: the rules are for
/// choosing, and say nothing about who is there.
#[tokio::test]
async fn at_sign_in_a_password_against_the_rules_is_merely_wrong() {
    let server = Server::start().await;
    let ann = server.register("ann@example.com").await;
    for password in [
        "",
        "short",
        "password",
        "\0\0\0\0\0\0\0\0",
        "with\0nul inside it",
        &"long".repeat(2000),
        &"🦀".repeat(100),
    ] {
        for email in [ann.email.as_str(), "nobody@example.com"] {
            login(&server, email, password)
                .await
                .problem(401, "invalid_credentials");
        }
    }
    login(&server, &ann.email, &ann.password).await.expect(200);
}

#[tokio::test]
async fn what_is_easily_guessed_is_refused_with_a_reason_to_act_on() {
    let server = Server::start().await;
    for password in [
        "password",
        "12345678",
        "password1",
        "Passw0rd",
        "qwertyuiop",
        "aaaaaaaaaaaa",
        "iloveyou",
        "abcdefgh",
        "19900101",
        "letmein1",
    ] {
        let problem = register(&server, "ann@example.com", password)
            .await
            .problem(422, "validation_failed");
        assert_eq!(pointers(&problem), BTreeSet::from(["/password".to_owned()]));
        let detail = text(&problem["errors"][0], "detail");
        // More than "too weak", and not the password itself.
        assert!(detail.split_whitespace().count() >= 8, "{detail}");
        assert!(
            password == "password" || !detail.contains(password),
            "{detail}"
        );
    }
    register(&server, "ann@example.com", PASSWORD)
        .await
        .expect(201);
}

/// The e-mail is what an attacker tries first.
#[tokio::test]
async fn ones_own_address_is_easily_guessed() {
    let server = Server::start().await;
    let email = "xkqvbwzjpm@fhtrgnwq.example";
    for password in [
        "xkqvbwzjpm@fhtrgnwq.example",
        "Xkqvbwzjpm@fhtrgnwq.example",
        "xkqvbwzjpm",
        "xkqvbwzjpm1",
    ] {
        let problem = register(&server, email, password)
            .await
            .problem(422, "validation_failed");
        assert_eq!(
            pointers(&problem),
            BTreeSet::from(["/password".to_owned()]),
            "{password}"
        );
    }
    // It is the context that makes it weak.
    register(&server, "ann@example.com", "xkqvbwzjpm")
        .await
        .expect(201);
}

#[tokio::test]
async fn a_new_password_is_held_to_the_same_rules() {
    let server = Server::start().await;
    let ann = server.register("xkqvbwzjpm@example.com").await;
    let too_long = format!("{BYTES_71}ZZ");
    for password in [
        "kV7#pQ2",
        &too_long,
        "kV7#pQ2m\0Xz9!rT4w",
        "password1",
        "xkqvbwzjpm",
    ] {
        let problem = change_password(&server, &ann.access_token, &ann.password, password)
            .await
            .problem(422, "validation_failed");
        assert_eq!(
            pointers(&problem),
            BTreeSet::from(["/new_password".to_owned()]),
            "{password}"
        );
    }
    login(&server, &ann.email, &ann.password).await.expect(200);
    let longest = format!("{BYTES_71}Z");
    change_password(&server, &ann.access_token, &ann.password, &longest)
        .await
        .expect(200);
    login(&server, &ann.email, &longest).await.expect(200);
}

/// The hash of one user.
async fn hash(sql: &tokio_postgres::Client, email: &str) -> String {
    sql.query_one(
        "select password_hash from users where email = $1",
        &[&email],
    )
    .await
    .expect("the user")
    .get(0)
}

#[tokio::test]
async fn a_hash_of_an_older_cost_is_renewed_at_the_next_sign_in() {
    let old = Server::with(&[("BCRYPT_COST", "10")]).await;
    let new = old.sibling(&[("BCRYPT_COST", "11")]).await;
    let sql = old.sql().await;
    let ann = old.register("ann@example.com").await;
    let before = hash(&sql, &ann.email).await;
    assert!(before.starts_with("$2b$10$"), "{before}");

    // A wrong password renews nothing.
    login(&new, &ann.email, ANOTHER_PASSWORD)
        .await
        .problem(401, "invalid_credentials");
    assert_eq!(hash(&sql, &ann.email).await, before);

    login(&new, &ann.email, &ann.password).await.expect(200);
    let after = hash(&sql, &ann.email).await;
    assert!(after.starts_with("$2b$11$"), "{after}");
    assert!(bcrypt::verify(&ann.password, &after).expect("a hash"));

    // It is good for both, and renewed once only.
    for server in [&new, &new] {
        login(server, &ann.email, &ann.password).await.expect(200);
        assert_eq!(hash(&sql, &ann.email).await, after);
    }
    // No session ended over it.
    assert_signed_in(&new, &ann.access_token).await;
}
