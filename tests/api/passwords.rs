//! Password rules, the limit of 72 bytes, and rehashing. FR-012.

use std::collections::BTreeSet;

use crate::auth::{
    ANOTHER_PASSWORD, assert_signed_in, change_password, login, pointers, register, text,
};
use crate::harness::{PASSWORD, Server};

/// A strong password of 71 bytes.
const BYTES_71: &str = "kV7#pQ2mXz9!rT4wLb8@nY6cJd3$hF5gSa1%eU0iOo^vBx&uKq*tMw(zNr)yPl_jGk+DsEf";

/// A password of 18 code points with 4 bytes each.
const ANIMALS: &str = "🦀🐙🦑🐚🐡🐠🐟🐬🐳🐋🦈🐊🐅🐆🦓🦍🦧🐘";

#[tokio::test]
async fn passwords_have_at_least_8_characters_and_at_most_72_bytes() {
    assert_eq!(BYTES_71.len(), 71);
    assert_eq!((ANIMALS.len(), ANIMALS.chars().count()), (72, 18));
    let server = Server::start().await;
    let bytes_72 = format!("{BYTES_71}Z");
    let bytes_73 = format!("{BYTES_71}ZZ");
    let too_long = format!("{ANIMALS}x");
    let seven_animals: String = ANIMALS.chars().take(7).collect();
    let eight_animals: String = ANIMALS.chars().take(8).collect();

    for (n, (password, is_valid)) in [
        ("", false),
        ("kV7#pQ2", false),
        ("kV7#pQ2m", true),
        // 28 bytes, but only 7 code points.
        (&seven_animals, false),
        (&eight_animals, true),
        (&bytes_72, true),
        (&bytes_73, false),
        (ANIMALS, true),
        (&too_long, false),
        ("kV7#pQ2m\0Xz9!rT4w", false),
        // No required character classes, no trimming, no case folding.
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
        if is_valid {
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

/// RFC 8265: keyboards compose accents differently. The limits apply to the normalized password.
#[tokio::test]
async fn passwords_match_in_any_unicode_normalization() {
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

    // 8 code points before normalization and 7 after it; 73 bytes before and 72 after it.
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
    // NFC turns U+1D160 into three code points; seven of them have 84 bytes.
    register(&server, "dan@example.com", &"\u{1d160}".repeat(7))
        .await
        .problem(422, "validation_failed");
    login(&server, "bob@example.com", &"\u{1d160}".repeat(18))
        .await
        .problem(401, "invalid_credentials");
}

#[tokio::test]
async fn passwords_are_otherwise_compared_exactly() {
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
        // Å instead of Ä.
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

/// bcrypt itself ignores everything after 72 bytes.
#[tokio::test]
async fn rejects_a_password_of_72_bytes_with_a_suffix() {
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

/// The rules apply to new passwords only.
#[tokio::test]
async fn login_treats_an_invalid_password_as_a_wrong_one() {
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
async fn rejects_passwords_that_are_easy_to_guess_with_advice() {
    let server = Server::start().await;
    let long = "password".repeat(9);
    for password in [
        &long,
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
        // The detail gives advice and does not repeat the password.
        assert!(detail.split_whitespace().count() >= 8, "{detail}");
        assert!(
            password == "password" || !detail.contains(password),
            "{detail}"
        );
    }
    register(&server, "ann@example.com", PASSWORD)
        .await
        .expect(201);
    let strong_end = format!("{}{PASSWORD}", "0".repeat(40));
    register(&server, "bob@example.com", &strong_end)
        .await
        .expect(201);
}

#[tokio::test]
async fn rejects_passwords_derived_from_the_email_address() {
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
    let long = "a.rather.long.address.of.ann.smith@example.com";
    register(&server, long, long).await.expect(422);
    // The same password is acceptable for another address.
    register(&server, "ann@example.com", "xkqvbwzjpm")
        .await
        .expect(201);
}

#[tokio::test]
async fn a_password_change_applies_the_same_rules() {
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

/// Reads the password hash of a user.
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
async fn login_rehashes_a_password_whose_cost_is_outdated() {
    let old = Server::with(&[("BCRYPT_COST", "10")]).await;
    let new = old.sibling(&[("BCRYPT_COST", "11")]).await;
    let sql = old.sql().await;
    let ann = old.register("ann@example.com").await;
    let before = hash(&sql, &ann.email).await;
    assert!(before.starts_with("$2b$10$"), "{before}");

    // A wrong password does not rehash.
    login(&new, &ann.email, ANOTHER_PASSWORD)
        .await
        .problem(401, "invalid_credentials");
    assert_eq!(hash(&sql, &ann.email).await, before);

    login(&new, &ann.email, &ann.password).await.expect(200);
    let after = hash(&sql, &ann.email).await;
    assert!(after.starts_with("$2b$11$"), "{after}");
    assert!(bcrypt::verify(&ann.password, &after).expect("a hash"));

    // The next login does not rehash again.
    for _ in 0..2 {
        login(&new, &ann.email, &ann.password).await.expect(200);
        assert_eq!(hash(&sql, &ann.email).await, after);
    }
    // Existing sessions continue.
    assert_signed_in(&new, &ann.access_token).await;
}
