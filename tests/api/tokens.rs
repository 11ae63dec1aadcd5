//! Forged, twisted and stolen access tokens: the whole matrix is refused, each with one WARN line.
//!
//! The attacks are those of public lists, made for this service's claims:
//! - jwt_tool (github.com/ticarpi/jwt_tool), the exploits of its `-X` and `-I` options and its
//!   wiki's "attack playbook": `alg` none in several cases, null signature, blank password, psychic
//!   signature (CVE-2022-21449), key confusion, embedded JWK, spoofed JWKS, `kid` injection, weak
//!   secrets out of its `jwt-common.txt`;
//! - Project Wycheproof, `json_web_signature_test.json`, by the names of its cases
//!   ("rejectsMissingSignature", "rejectsExtraComponent", …);
//! - PortSwigger's Web Security Academy, "JWT attacks": `kid` path traversal to an empty file, `jku`
//!   and `x5u` of the attacker's, `cty`;
//! - RFC 8725 (best current practice), sections 2 and 3: cross-JWT confusion, `crit`, types of claims.

use jsonwebtoken::{Algorithm, EncodingKey, crypto};
use serde_json::{Value, json};

use crate::auth::{assert_signed_in, login, refresh, text};
use crate::harness::{Server, User, base64url, claims, forge};
use crate::log::{settled, unique_id, warnings};
use crate::sessions::NOBODYS_TASKS;

/// Reads base64 of the alphabet for URLs without padding, written apart from every library that
/// the service uses.
pub(crate) fn from_base64url(text: &str) -> Vec<u8> {
    let mut bits = 0u32;
    let mut held = 0;
    let mut bytes = Vec::new();
    for c in text.bytes() {
        let six = match c {
            b'A'..=b'Z' => c - b'A',
            b'a'..=b'z' => c - b'a' + 26,
            b'0'..=b'9' => c - b'0' + 52,
            b'-' => 62,
            b'_' => 63,
            _ => panic!("{c:?} is not of the alphabet"),
        };
        bits = bits << 6 | u32::from(six);
        held += 6;
        if held >= 8 {
            held -= 8;
            bytes.push((bits >> held) as u8);
            bits &= (1 << held) - 1;
        }
    }
    bytes
}

/// The header of every token of ours.
fn plain_header() -> Value {
    json!({"alg": "HS256", "typ": "JWT"})
}

/// A token of any header and payload, signed in any way.
fn signed(algorithm: Algorithm, key: &EncodingKey, header: &str, payload: &str) -> String {
    let message = format!(
        "{}.{}",
        base64url(header.as_bytes()),
        base64url(payload.as_bytes())
    );
    let signature = crypto::sign(message.as_bytes(), key, algorithm).expect("a signature");
    format!("{message}.{signature}")
}

/// A copy of the claims with one of them replaced, or removed by `Value::Null`.
fn with(claims: &Value, name: &str, value: Value) -> Value {
    let mut claims = claims.clone();
    let members = claims.as_object_mut().expect("an object");
    if value.is_null() {
        members.remove(name);
    } else {
        members.insert(name.to_owned(), value);
    }
    claims
}

/// An attack: what it is called, and the token.
type Attack = (String, String);

/// `alg` none and its kin: nothing is signed.
fn unsigned(user: &User) -> Vec<Attack> {
    let payload = user.access_token.split('.').nth(1).expect("a payload");
    let signature = user.access_token.split('.').nth(2).expect("a signature");
    let mut attacks = Vec::new();
    for none in ["none", "None", "NONE", "nOnE", "none ", "", "null"] {
        let header = base64url(json!({"alg": none, "typ": "JWT"}).to_string().as_bytes());
        for (how, signature) in [
            ("no signature", ""),
            ("the old one", signature),
            ("AA", "AA"),
        ] {
            attacks.push((
                format!("alg {none:?}, {how}"),
                format!("{header}.{payload}.{signature}"),
            ));
        }
        attacks.push((
            format!("alg {none:?}, two parts"),
            format!("{header}.{payload}"),
        ));
    }
    for header in [
        json!({"typ": "JWT"}),
        json!({"alg": null}),
        json!({"alg": 0}),
        json!({"alg": ["HS256", "none"]}),
        json!({}),
        json!([]),
        json!("HS256"),
    ] {
        let encoded = base64url(header.to_string().as_bytes());
        attacks.push((
            format!("header {header}"),
            format!("{encoded}.{payload}.{signature}"),
        ));
    }
    attacks
}

/// The right secret, or none of ours, under other algorithms' names.
fn other_algorithms(secret: &str, user: &User) -> Vec<Attack> {
    let payload = claims(&user.access_token).to_string();
    let key = EncodingKey::from_secret(secret.as_bytes());
    let mut attacks = Vec::new();
    for (algorithm, name) in [(Algorithm::HS384, "HS384"), (Algorithm::HS512, "HS512")] {
        let header = json!({"alg": name, "typ": "JWT"}).to_string();
        attacks.push((
            format!("{name} with the secret"),
            signed(algorithm, &key, &header, &payload),
        ));
        // Named as what is allowed, signed as what is not.
        let header = plain_header().to_string();
        attacks.push((
            format!("{name} named HS256"),
            signed(algorithm, &key, &header, &payload),
        ));
    }
    for name in [
        "RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "ES256K",
        "EdDSA", "HS1", "hs256", "Hs256", "HS-256", "HS256 ", "dir", "A128KW",
    ] {
        let header = json!({"alg": name, "typ": "JWT"});
        // Key confusion: an HMAC under a header that asks for a public key.
        attacks.push((
            format!("{name}, HMAC with the secret"),
            signed(Algorithm::HS256, &key, &header.to_string(), &payload),
        ));
        // The psychic signature: r = s = 0, as bytes and in DER.
        let message = format!(
            "{}.{}",
            base64url(header.to_string().as_bytes()),
            base64url(payload.as_bytes())
        );
        for zero in [base64url(&[0; 64]), "MAYCAQACAQA".to_owned()] {
            attacks.push((format!("{name}, psychic"), format!("{message}.{zero}")));
        }
    }
    attacks
}

/// A P-256 key in PKCS #8, made with OpenSSL for these tests, and its public half.
const ATTACKERS_KEY: &str = "MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQg1RXzlZnOB_-3xQiWZxeP1Besm0RoJ4CfDQf2eMfwREehRANCAAQaA3jX8tOL6oiDhAYJjgdt5BmTIdzx2ALf0pQo7_THcSCHP39TonYxUzSU_Rgkvz0OtrZPPXhdKJBOmdBt_ySm";
const ATTACKERS_X: &str = "GgN41_LTi-qIg4QGCY4HbeQZkyHc8dgC39KUKO_0x3E";
const ATTACKERS_Y: &str = "IIc_f1OidjFTNJT9GCS_PQ62tk89eF0okE6Z0G3_JKY";

/// Headers that say where to find the key, with a key that is there.
fn keys_of_the_attackers_own(user: &User) -> Vec<Attack> {
    let payload = claims(&user.access_token).to_string();
    let mut attacks = Vec::new();
    let hmac = |key: &str, header: Value| {
        let key = EncodingKey::from_secret(key.as_bytes());
        signed(Algorithm::HS256, &key, &header.to_string(), &payload)
    };
    let with_kid = |kid: Value| json!({"alg": "HS256", "typ": "JWT", "kid": kid});
    for (kid, key) in [
        // Path traversal: files whose contents everybody knows.
        (json!("/dev/null"), ""),
        (json!("../../../../../../../dev/null"), ""),
        (json!("../../../../../../../dev/null"), "\0"),
        (json!("/proc/sys/kernel/randomize_va_space"), "2\n"),
        (json!("file:///dev/null"), ""),
        // SQL, LDAP and shell.
        (json!("x' union select 'attacker';--"), "attacker"),
        (json!("x' or '1'='1"), "attacker"),
        (json!("0; drop table users; --"), "attacker"),
        (json!("*)(uid=*))(|(uid=*"), "attacker"),
        (json!("x; sleep 5"), "attacker"),
        (json!("$(sleep 5)"), "attacker"),
        (json!("|/usr/bin/id"), "attacker"),
        (json!("http://127.0.0.1:9/key"), "attacker"),
        (json!("\r\nX-Injected: yes"), "attacker"),
        (json!("\u{0}"), "\0"),
        (json!(""), ""),
        (json!(null), ""),
        (json!(0), ""),
        (json!({"k": "attacker"}), "attacker"),
        (json!("a".repeat(2000)), "attacker"),
    ] {
        attacks.push((format!("kid {kid}"), hmac(key, with_kid(kid))));
    }
    let jwk_oct = json!({"kty": "oct", "alg": "HS256", "k": base64url(b"attacker")});
    let jwk_ec = json!({"kty": "EC", "crv": "P-256", "use": "sig", "kid": "attacker",
                        "x": ATTACKERS_X, "y": ATTACKERS_Y});
    for (name, value) in [
        ("jku", json!("http://127.0.0.1:9/jwks.json")),
        ("jku", json!("file:///etc/passwd")),
        ("x5u", json!("http://127.0.0.1:9/cert.pem")),
        ("x5c", json!(["MIIB"])),
        ("x5t", json!("AAAA")),
        ("jwk", jwk_oct),
        ("jwk", jwk_ec.clone()),
        ("cty", json!("text/xml")),
        ("cty", json!("application/x-java-serialized-object")),
        ("zip", json!("DEF")),
        ("b64", json!(false)),
    ] {
        let mut header = plain_header();
        header[name] = value.clone();
        attacks.push((format!("{name} {value}"), hmac("attacker", header)));
    }
    // The embedded key for real: a good signature of the attacker's.
    let key = EncodingKey::from_ec_der(&from_base64url(ATTACKERS_KEY));
    for header in [
        json!({"alg": "ES256", "typ": "JWT", "jwk": jwk_ec}),
        json!({"alg": "ES256", "typ": "JWT", "jku": "http://127.0.0.1:9/jwks.json", "kid": "attacker"}),
        json!({"alg": "ES256", "typ": "JWT"}),
    ] {
        attacks.push((
            format!("signed with the attacker's own key: {header}"),
            signed(Algorithm::ES256, &key, &header.to_string(), &payload),
        ));
    }
    // Secrets that people leave in.
    for secret in [
        "",
        " ",
        "\0",
        "secret",
        "Secret",
        "password",
        "changeme",
        "jwt",
        "your-256-bit-secret",
        "your_jwt_secret",
        "null",
        "undefined",
        "12345678901234567890123456789012",
    ] {
        attacks.push((format!("secret {secret:?}"), hmac(secret, plain_header())));
    }
    attacks
}

/// The right token with a part of it changed, missing, or one too many.
fn twisted(secret: &str, user: &User, other: &User) -> Vec<Attack> {
    let token = user.access_token.as_str();
    let parts: Vec<&str> = token.split('.').collect();
    let (header, payload, signature) = (parts[0], parts[1], parts[2]);
    let others: Vec<&str> = other.access_token.split('.').collect();
    let own = claims(token);
    let elevated = base64url(
        with(&own, "user_id", json!(other.id))
            .to_string()
            .as_bytes(),
    );
    let later = base64url(
        with(&own, "exp", json!(9_999_999_999_u64))
            .to_string()
            .as_bytes(),
    );
    let flip = |text: &str, at: usize| {
        let mut bytes = text.as_bytes().to_vec();
        bytes[at] = if bytes[at] == b'A' { b'B' } else { b'A' };
        String::from_utf8(bytes).expect("ASCII")
    };
    // 43 characters are 258 bits: the last two of them say nothing, and must be nought.
    let spare_bits = {
        let mut bytes = signature.as_bytes().to_vec();
        let last = bytes.pop().expect("a character");
        const ALPHABET: &[u8; 64] =
            b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
        let at = ALPHABET
            .iter()
            .position(|&c| c == last)
            .expect("of the alphabet");
        bytes.push(ALPHABET[at ^ 1]);
        String::from_utf8(bytes).expect("ASCII")
    };
    let json_serialization =
        json!({"payload": payload, "signatures": [{"protected": header, "signature": signature}]})
            .to_string();
    let flattened =
        json!({"payload": payload, "protected": header, "signature": signature}).to_string();
    let key = EncodingKey::from_secret(secret.as_bytes());
    let mut attacks: Vec<Attack> = [
        (
            "another's payload",
            format!("{header}.{}.{signature}", others[1]),
        ),
        (
            "another's signature",
            format!("{header}.{payload}.{}", others[2]),
        ),
        (
            "another's user_id",
            format!("{header}.{elevated}.{signature}"),
        ),
        ("a later exp", format!("{header}.{later}.{signature}")),
        (
            "rejectsModifiedHeader",
            format!("{}.{payload}.{signature}", flip(header, 4)),
        ),
        (
            "rejectsModifiedPayload",
            format!("{header}.{}.{signature}", flip(payload, 4)),
        ),
        (
            "rejectsModifiedSignature",
            format!("{header}.{payload}.{}", flip(signature, 0)),
        ),
        (
            "signature's middle",
            format!("{header}.{payload}.{}", flip(signature, 20)),
        ),
        (
            "signature's spare bits",
            format!("{header}.{payload}.{spare_bits}"),
        ),
        ("truncated by one", token[..token.len() - 1].to_owned()),
        (
            "truncated to half",
            format!("{header}.{payload}.{}", &signature[..21]),
        ),
        (
            "truncated to one",
            format!("{header}.{payload}.{}", &signature[..1]),
        ),
        ("extended", format!("{token}A")),
        ("extended by four", format!("{token}AAAA")),
        ("twice the signature", format!("{token}{signature}")),
        ("padded", format!("{token}=")),
        ("padded, percent", format!("{token}%3D")),
        (
            "padded payload",
            format!("{header}.{payload}==.{signature}"),
        ),
        (
            "upper case",
            format!("{header}.{payload}.{}", signature.to_uppercase()),
        ),
        ("rejectsMissingSignature", format!("{header}.{payload}.")),
        (
            "rejectsMissingSignatureAndSeparator",
            format!("{header}.{payload}"),
        ),
        ("rejectsMissingPayload", format!("{header}..{signature}")),
        (
            "rejectsMissingPayloadAndSeparator",
            format!("{header}.{signature}"),
        ),
        ("rejectsMissingHeader", format!(".{payload}.{signature}")),
        (
            "rejectsMissingHeaderAndSeparator",
            format!("{payload}.{signature}"),
        ),
        ("rejectsMissingHeaderAndSignature", format!(".{payload}.")),
        (
            "rejectsMissingHeaderSignatureAndSeparators",
            payload.to_owned(),
        ),
        ("rejectsExtraEmptyComponent", format!("{token}.")),
        ("rejectsExtraComponent", format!("{token}.foo")),
        ("a leading point", format!(".{token}")),
        ("points", "..".to_owned()),
        (
            "five parts, as a JWE",
            format!("{header}.{payload}.{signature}.{payload}.{signature}"),
        ),
        ("rejectsValidJsonSerialization", json_serialization),
        ("flattened JSON", flattened),
        (
            "white space within",
            format!("{header}. {payload}.{signature}"),
        ),
        ("a tab within", format!("{header}.\t{payload}.{signature}")),
        ("quoted", format!("\"{token}\"")),
        ("in angle brackets", format!("<{token}>")),
        ("a comma after it", format!("{token},")),
        ("two tokens", format!("{token} {token}")),
        ("two tokens, comma", format!("{token}, {token}")),
        ("two challenges", format!("{token}, Bearer {token}")),
        ("the scheme twice", format!("Bearer {token}")),
        ("an attribute", format!("token={token}")),
        ("the refresh token", user.refresh_token.clone()),
        ("the session's id", user.session_id.clone()),
        ("the user's id", user.id.clone()),
    ]
    .into_iter()
    .map(|(name, token)| (name.to_owned(), token))
    .collect();
    // Signed as it should be, but no claims.
    for payload in [
        "",
        "{",
        "null",
        "[]",
        "\"claims\"",
        "0",
        "{}",
        "{}{}",
        "\u{feff}{}",
    ] {
        attacks.push((
            format!("payload {payload:?}"),
            signed(Algorithm::HS256, &key, &plain_header().to_string(), payload),
        ));
    }
    attacks
}

/// The right secret over claims that are not ours: what a service that shares the secret, or a bug
/// of our own, could make.
fn claims_of_the_wrong_kind(secret: &str, user: &User, other: &User) -> Vec<Attack> {
    let good = claims(&user.access_token);
    let now = jiff::Timestamp::now().as_second();
    let mut attacks = Vec::new();
    let mut attack = |name: String, claims: Value| {
        attacks.push((name, forge(secret, plain_header(), claims)));
    };
    for name in ["user_id", "sub", "email", "sid", "iat", "exp"] {
        attack(format!("no {name}"), with(&good, name, Value::Null));
        for wrong in [
            json!(true),
            json!(""),
            json!([good[name]]),
            json!({"eq": good[name]}),
        ] {
            attack(format!("{name} {wrong}"), with(&good, name, wrong.clone()));
        }
        // `with` would remove it.
        let mut null = good.clone();
        null[name] = Value::Null;
        attack(format!("{name} null"), null);
    }
    for name in ["user_id", "sub", "sid", "email"] {
        attack(format!("{name} a number"), with(&good, name, json!(1)));
    }
    for name in ["iat", "exp", "nbf"] {
        attack(
            format!("{name} as text"),
            with(&good, name, json!((now + 600).to_string())),
        );
        attack(
            format!("{name} as a date"),
            with(&good, name, json!("2099-01-01T00:00:00Z")),
        );
        attack(format!("{name} 1e300"), with(&good, name, json!(1e300)));
    }
    for (name, value) in [
        ("exp", json!(now - 31 - 5)),
        ("exp", json!(now - 86400)),
        ("exp", json!(0)),
        ("exp", json!(-1)),
        ("exp", json!(i64::MIN)),
        ("exp", json!(-1e300)),
        ("exp", json!(now as f64 - 3600.5)),
        ("nbf", json!(now + 3600)),
        ("nbf", json!(u64::MAX)),
        ("iat", json!(now + 3600)),
        ("exp", json!(now + 10 * 365 * 86400)),
        ("exp", json!(u64::MAX)),
        ("sub", json!(other.id)),
        ("user_id", json!(other.id)),
        ("sub", json!(user.email)),
    ] {
        attack(format!("{name} {value}"), with(&good, name, value.clone()));
    }
    let both = |id: &str| {
        let claims = with(&good, "user_id", json!(id));
        with(&claims, "sub", json!(id))
    };
    let id = user.id.as_str();
    for odd in [
        id.to_uppercase(),
        id.replace('-', ""),
        format!("{{{id}}}"),
        format!("urn:uuid:{id}"),
        format!(" {id}"),
        format!("{id}\0"),
        format!("{id}/../{}", other.id),
        "1".to_owned(),
        "admin".to_owned(),
        "*".to_owned(),
        "' or '1'='1".to_owned(),
        "%".to_owned(),
    ] {
        attack(format!("user_id and sub {odd:?}"), both(&odd));
        attack(format!("sid {odd:?}"), with(&good, "sid", json!(odd)));
    }
    // The header says what it is for, too.
    for (name, header) in [
        ("typ refresh", json!({"alg": "HS256", "typ": "refresh"})),
        ("typ rt+jwt", json!({"alg": "HS256", "typ": "rt+jwt"})),
        (
            "crit exp",
            json!({"alg": "HS256", "typ": "JWT", "crit": ["exp"], "exp": now + 600}),
        ),
        (
            "crit b64",
            json!({"alg": "HS256", "typ": "JWT", "crit": ["b64"], "b64": false}),
        ),
        (
            "crit unknown",
            json!({"alg": "HS256", "typ": "JWT", "crit": ["x"], "x": 1}),
        ),
        (
            "crit empty",
            json!({"alg": "HS256", "typ": "JWT", "crit": []}),
        ),
    ] {
        attacks.push((name.to_owned(), forge(secret, header, good.clone())));
    }
    attacks
}

/// Runs every attack against a route that writes: each is 401 `invalid_token`, makes nothing, and
/// leaves one WARN line.
async fn assert_all_refused(server: &Server, user: &User, attacks: Vec<Attack>) {
    let mut ids = Vec::new();
    let mut let_in = Vec::new();
    for (name, token) in attacks {
        let id = unique_id();
        let response = server
            .post(user.tasks())
            .bearer(&token)
            .header("x-request-id", &id)
            .json(json!({"title": name}))
            .await;
        if response.status != 401 {
            let_in.push(format!("{name}: {}", response.status));
            continue;
        }
        let problem = response.problem(401, "invalid_token");
        let challenge = response.header("www-authenticate");
        assert!(
            challenge.starts_with("Bearer realm=\"todo\"")
                && challenge.contains("error=\"invalid_token\""),
            "{name}: {challenge}"
        );
        // Not a word of the token comes back.
        assert!(!problem.to_string().contains(&token), "{name}: {problem}");
        ids.push((name, id));
    }
    assert!(let_in.is_empty(), "{let_in:#?}");

    let log = settled(server).await;
    for (name, id) in ids {
        let lines = warnings(&log, &id);
        assert_eq!(lines.len(), 1, "{name}: {lines:#?}");
        assert!(
            lines[0].contains("authentication failed reason="),
            "{name}: {}",
            lines[0]
        );
    }
    let tasks = server
        .get(user.tasks())
        .bearer(&user.access_token)
        .await
        .expect(200);
    assert_eq!(tasks.json(), json!([]));
}

#[tokio::test]
async fn a_token_that_nobody_signed_is_refused() {
    let server = Server::start().await;
    let ann = server.user().await;
    assert_all_refused(&server, &ann, unsigned(&ann)).await;
}

#[tokio::test]
async fn a_token_of_another_algorithm_is_refused() {
    let server = Server::start().await;
    let ann = server.user().await;
    let attacks = other_algorithms(server.secret(), &ann);
    assert_all_refused(&server, &ann, attacks).await;
}

#[tokio::test]
async fn a_token_that_brings_its_own_key_is_refused() {
    let server = Server::start().await;
    let ann = server.user().await;
    assert_all_refused(&server, &ann, keys_of_the_attackers_own(&ann)).await;
}

#[tokio::test]
async fn a_token_that_was_changed_is_refused() {
    let server = Server::start().await;
    let ann = server.user().await;
    let bob = server.user().await;
    let attacks = twisted(server.secret(), &ann, &bob);
    assert_all_refused(&server, &ann, attacks).await;
}

/// FR-004 among them: an expired token, and every other way in which claims can be wrong.
#[tokio::test]
async fn a_token_of_the_wrong_claims_is_refused_though_it_is_signed() {
    let server = Server::start().await;
    let ann = server.user().await;
    let bob = server.user().await;
    let attacks = claims_of_the_wrong_kind(server.secret(), &ann, &bob);
    assert_all_refused(&server, &ann, attacks).await;
}

/// FR-004: 30 s of leeway at most, and the code says what to do.
#[tokio::test]
async fn an_expired_token_is_refused_and_named_so_in_the_log() {
    let server = Server::start().await;
    let ann = server.user().await;
    let now = jiff::Timestamp::now().as_second();
    let aged = |seconds: i64| {
        let old = with(
            &claims(&ann.access_token),
            "iat",
            json!(now - 86400 - seconds),
        );
        forge(
            server.secret(),
            plain_header(),
            with(&old, "exp", json!(now - seconds)),
        )
    };
    let id = unique_id();
    server
        .get("/api/v1/auth/me")
        .header("x-request-id", &id)
        .bearer(&aged(35))
        .await
        .problem(401, "invalid_token");
    let log = settled(&server).await;
    let lines = warnings(&log, &id);
    assert_eq!(lines.len(), 1, "{lines:?}");
    assert!(lines[0].contains("reason=expired_token"), "{}", lines[0]);
    // A minute more is a minute more.
    assert_signed_in(&server, &aged(-60)).await;
}

/// Revocations are kept for a day, so no token may outlive them, whoever signed it.
#[tokio::test]
async fn an_access_token_that_is_good_for_more_than_a_day_is_refused() {
    let before = Server::start().await;
    let server = before
        .sibling(&[
            ("JWT_SECRET", NEW_SECRET),
            ("JWT_SECRET_PREVIOUS", before.secret()),
        ])
        .await;
    let ann = server.user().await;
    let iat = claims(&ann.access_token)["iat"].as_i64().expect("seconds");
    for secret in [server.secret(), before.secret()] {
        let lasting = |seconds: i64| {
            let claims = with(&claims(&ann.access_token), "exp", json!(iat + seconds));
            forge(secret, plain_header(), claims)
        };
        assert_signed_in(&server, &lasting(86_400)).await;
        for seconds in [86_401, 10 * 365 * 86_400] {
            let token = lasting(seconds);
            let id = unique_id();
            let requests = [
                server.get("/api/v1/auth/me"),
                // An expired token is good enough for a logout, this one is not.
                server.post("/api/v1/auth/logout"),
            ];
            for request in requests {
                request
                    .header("x-request-id", &id)
                    .bearer(&token)
                    .await
                    .problem(401, "invalid_token");
            }
            let log = settled(&server).await;
            for line in warnings(&log, &id) {
                assert!(line.contains("reason=lifetime_too_long"), "{line}");
            }
        }
    }
    assert_signed_in(&server, &ann.access_token).await;
}

/// `nbf` is honoured where there is one; a claim that nobody asked for is not looked at.
#[tokio::test]
async fn a_token_with_more_claims_than_ours_is_read_as_ours() {
    let server = Server::start().await;
    let ann = server.user().await;
    let good = claims(&ann.access_token);
    let now = jiff::Timestamp::now().as_second();
    for (name, value) in [
        ("nbf", json!(now - 60)),
        ("jti", json!("x")),
        ("admin", json!(true)),
        ("user", json!({"id": 1})),
    ] {
        let token = forge(server.secret(), plain_header(), with(&good, name, value));
        server.get(ann.tasks()).bearer(&token).await.expect(200);
    }
}

/// The status of an answer that came as text.
fn status(answer: &str) -> u16 {
    answer
        .strip_prefix("HTTP/1.1 ")
        .and_then(|rest| rest.get(..3))
        .and_then(|status| status.parse().ok())
        .unwrap_or_else(|| panic!("no answer: {answer:?}"))
}

/// Everything but one `Authorization: Bearer <token>`: written to the socket by hand, since no
/// decent client would.
#[tokio::test]
async fn only_one_bearer_header_is_a_token() {
    let server = Server::start().await;
    let ann = server.user().await;
    let bob = server.user().await;
    let good = ann.access_token.as_str();
    let forged = format!("{}AAAA", &good[..good.len() - 4]);
    let basic = "YW5uQGV4YW1wbGUuY29tOnBhc3N3b3Jk";
    let mut ids = Vec::new();
    for (name, headers, path_suffix) in [
        ("none at all", String::new(), ""),
        ("empty", "Authorization:\r\n".to_owned(), ""),
        ("scheme only", "Authorization: Bearer\r\n".to_owned(), ""),
        (
            "scheme and space",
            "Authorization: Bearer \r\n".to_owned(),
            "",
        ),
        ("no scheme", format!("Authorization: {good}\r\n"), ""),
        ("Basic", format!("Authorization: Basic {basic}\r\n"), ""),
        (
            "Basic with a token",
            format!("Authorization: Basic {good}\r\n"),
            "",
        ),
        ("JWT", format!("Authorization: JWT {good}\r\n"), ""),
        ("Token", format!("Authorization: Token {good}\r\n"), ""),
        (
            "Digest",
            "Authorization: Digest username=\"ann\"\r\n".to_owned(),
            "",
        ),
        (
            "run together",
            format!("Authorization: Bearer{good}\r\n"),
            "",
        ),
        ("colon", format!("Authorization: Bearer:{good}\r\n"), ""),
        ("equals", format!("Authorization: Bearer={good}\r\n"), ""),
        (
            "two good",
            format!("Authorization: Bearer {good}\r\nAuthorization: Bearer {good}\r\n"),
            "",
        ),
        (
            "good, forged",
            format!("Authorization: Bearer {good}\r\nAuthorization: Bearer {forged}\r\n"),
            "",
        ),
        (
            "forged, good",
            format!("Authorization: Bearer {forged}\r\nAuthorization: Bearer {good}\r\n"),
            "",
        ),
        (
            "good, other's",
            format!(
                "Authorization: Bearer {good}\r\nauthorization: Bearer {}\r\n",
                bob.access_token
            ),
            "",
        ),
        (
            "Basic, good",
            format!("Authorization: Basic {basic}\r\nAuthorization: Bearer {good}\r\n"),
            "",
        ),
        (
            "good, empty",
            format!("Authorization: Bearer {good}\r\nAuthorization:\r\n"),
            "",
        ),
        (
            "in one line",
            format!("Authorization: Bearer {good}, Bearer {good}\r\n"),
            "",
        ),
        (
            "another header",
            format!("X-Authorization: Bearer {good}\r\n"),
            "",
        ),
        (
            "proxy's header",
            format!("Proxy-Authorization: Bearer {good}\r\n"),
            "",
        ),
        (
            "access-token header",
            format!("Access-Token: {good}\r\nX-Access-Token: {good}\r\n"),
            "",
        ),
        (
            "cookie",
            format!("Cookie: access_token={good}; token={good}; Authorization=Bearer {good}\r\n"),
            "",
        ),
        ("in the query", String::new(), "?access_token="),
        (
            "8 KiB",
            format!("Authorization: Bearer {}\r\n", "a".repeat(8 * 1024)),
            "",
        ),
        (
            "8 KiB behind it",
            format!("Authorization: Bearer {good}{}\r\n", "a".repeat(8 * 1024)),
            "",
        ),
        (
            "8 KiB of points",
            format!("Authorization: Bearer {}\r\n", ".".repeat(8 * 1024)),
            "",
        ),
    ] {
        let id = unique_id();
        let query = if path_suffix.is_empty() {
            String::new()
        } else {
            format!("{path_suffix}{good}")
        };
        let body = json!({"title": name, "access_token": good}).to_string();
        let answer = server
            .raw(format!(
                "POST {}{query} HTTP/1.1\r\nHost: localhost\r\nX-Request-Id: {id}\r\n{headers}\
                 Content-Type: application/json\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
                ann.tasks(),
                body.len()
            ))
            .await;
        assert_eq!(status(&answer), 401, "{name}: {answer}");
        let answer = answer.to_lowercase();
        assert!(
            answer.contains("www-authenticate: bearer realm=\"todo\""),
            "{name}: {answer}"
        );
        assert!(
            answer.contains("\"code\":\"missing_token\"")
                || answer.contains("\"code\":\"invalid_token\""),
            "{name}: {answer}"
        );
        ids.push((name, id));
    }
    let log = settled(&server).await;
    for (name, id) in ids {
        let lines = warnings(&log, &id);
        assert_eq!(lines.len(), 1, "{name}: {lines:#?}");
        // A token in a query is a token still: not even a refused one is written down.
        assert!(!log.contains(good), "{name}");
    }
    let tasks = ann.get(ann.tasks()).await.expect(200);
    assert_eq!(tasks.json(), json!([]));
}

/// What scripts send before somebody has signed in, which is no attack.
#[tokio::test]
async fn a_bearer_without_a_token_is_no_token() {
    let server = Server::start().await;
    let ann = server.user().await;
    for value in [
        "Bearer",
        "Bearer ",
        "Bearer null",
        "bearer undefined",
        "Bearer  null",
    ] {
        let id = unique_id();
        let answer = server
            .get(ann.tasks())
            .header("authorization", value)
            .header("x-request-id", &id)
            .await;
        answer.problem(401, "missing_token");
        assert_eq!(answer.header("www-authenticate"), r#"Bearer realm="todo""#);
        let log = settled(&server).await;
        let lines = warnings(&log, &id);
        assert!(lines[0].contains("reason=missing_token"), "{lines:?}");

        let logout = || {
            server
                .post("/api/v1/auth/logout")
                .header("authorization", value)
        };
        logout().await.problem(401, "missing_token");
        let session = server.login(&ann.email, &ann.password).await;
        let body = json!({"refresh_token": session.refresh_token});
        logout().json(body).await.expect(204);
        session.get(ann.tasks()).await.problem(401, "invalid_token");
    }
    for value in ["Bearer nul", "Bearer null.null", "Bearer [object Object]"] {
        server
            .get(ann.tasks())
            .header("authorization", value)
            .await
            .problem(401, "invalid_token");
    }
}

/// RFC 9110 section 11.1: the scheme's case is nobody's business.
#[tokio::test]
async fn the_scheme_may_be_written_in_any_case() {
    let server = Server::start().await;
    let ann = server.user().await;
    for scheme in ["Bearer", "bearer", "BEARER", "bEaReR"] {
        server
            .get(ann.tasks())
            .header("authorization", format!("{scheme} {}", ann.access_token))
            .await
            .expect(200);
    }
}

/// Bytes that are no text, and a header beyond every bound: refused, and the service lives on.
#[tokio::test]
async fn a_monstrous_header_is_refused_and_hurts_nobody() {
    let server = Server::start().await;
    let ann = server.user().await;
    let head = format!(
        "GET {} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nAuthorization: Bearer ",
        ann.tasks()
    );
    for junk in [
        b"\xff\xfe\xfd".to_vec(),
        "ünïcödé".as_bytes().to_vec(),
        [ann.access_token.as_bytes(), b"\xff"].concat(),
        b"\x80.\x81.\x82".to_vec(),
    ] {
        let answer = server
            .raw([head.as_bytes(), &junk, b"\r\n\r\n"].concat())
            .await;
        assert_eq!(status(&answer), 401, "{answer}");
    }
    // hyper refuses what is too big for it by itself, with 431.
    for kilobytes in [60, 1024] {
        let answer = server
            .raw(format!("{head}{}\r\n\r\n", "a".repeat(kilobytes * 1024)))
            .await;
        assert!(
            [401, 431].contains(&status(&answer)),
            "{kilobytes} KiB: {answer}"
        );
    }
    ann.get(ann.tasks()).await.expect(200);
}

/// FR-001: the token comes before everything else of the request, its body above all.
#[tokio::test]
async fn the_token_is_looked_at_before_the_body() {
    let server = Server::start().await;
    let ann = server.user().await;
    for (body, content_type) in [
        (&b"{"[..], "application/json"),
        (&[b' '; 20_000][..], "application/json"),
        (b"title=x", "text/plain"),
        (b"{\"title\":\"\"}", "application/json"),
    ] {
        server
            .post(ann.tasks())
            .bearer("forged")
            .body(body.to_vec(), content_type)
            .await
            .problem(401, "invalid_token");
    }
    // A body that never comes is not waited for.
    let answer = server
        .raw(format!(
            "POST {} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer forged\r\n\
             Content-Type: application/json\r\nContent-Length: 100\r\nConnection: close\r\n\r\n",
            ann.tasks()
        ))
        .await;
    assert_eq!(status(&answer), 401, "{answer}");
}

const NEW_SECRET: &str = "another secret of the tests, of more than 32 bytes as well";

/// A change of secret logs nobody out, as long as the old one is named.
#[tokio::test]
async fn a_change_of_secret_signs_nobody_out() {
    let before = Server::start().await;
    let old = before.secret().to_owned();
    let ann = before.user().await;
    let bob = before.user().await;

    let during = before
        .sibling(&[("JWT_SECRET", NEW_SECRET), ("JWT_SECRET_PREVIOUS", &old)])
        .await;
    during
        .get(ann.tasks())
        .bearer(&ann.access_token)
        .await
        .expect(200);
    let renewed = refresh(&during, &ann.refresh_token)
        .await
        .expect(200)
        .json();
    // A repeat of the old token gets the very same successor here too.
    let again = refresh(&during, &ann.refresh_token)
        .await
        .expect(200)
        .json();
    assert_eq!(again["refresh_token"], renewed["refresh_token"]);

    // What is new is signed with what is new: who knows only the old secret knows nothing of it.
    let (access, renewed) = (
        text(&renewed, "access_token"),
        text(&renewed, "refresh_token"),
    );
    before
        .get(ann.tasks())
        .bearer(&access)
        .await
        .problem(401, "invalid_token");
    refresh(&before, &renewed)
        .await
        .problem(401, "invalid_refresh_token");

    // After the old one is dropped, what it signed is forged.
    let after = before.sibling(&[("JWT_SECRET", NEW_SECRET)]).await;
    for token in [&ann.access_token, &bob.access_token] {
        after
            .get(NOBODYS_TASKS)
            .bearer(token)
            .await
            .problem(401, "invalid_token");
    }
    refresh(&after, &bob.refresh_token)
        .await
        .problem(401, "invalid_refresh_token");
    after.get(ann.tasks()).bearer(&access).await.expect(200);
    refresh(&after, &renewed).await.expect(200);
    login(&after, &bob.email, &bob.password).await.expect(200);
}
