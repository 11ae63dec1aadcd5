//! Forged, modified and stolen access tokens: every attack is rejected and logged with one WARN
//! line.
//!
//! The attacks come from public collections, adapted to this service's claims:
//! - jwt_tool (github.com/ticarpi/jwt_tool), its `-X` and `-I` options and the "attack playbook" of
//!   its wiki: `alg` none in several cases, null signature, blank password, psychic signature
//!   (CVE-2022-21449), key confusion, embedded JWK, spoofed JWKS, `kid` injection, weak secrets from
//!   its `jwt-common.txt`;
//! - Project Wycheproof, `json_web_signature_test.json`, by the names of its cases
//!   ("rejectsMissingSignature", "rejectsExtraComponent", …);
//! - PortSwigger's Web Security Academy, "JWT attacks": `kid` path traversal to an empty file, `jku`
//!   and `x5u` that name the attacker's server, `cty`;
//! - RFC 8725 (best current practice), sections 2 and 3: cross-JWT confusion, `crit`, claim types.

use jsonwebtoken::{Algorithm, EncodingKey, crypto};
use serde_json::{Value, json};

use crate::auth::{assert_signed_in, login, refresh, text};
use crate::harness::{Server, User, base64url, claims, forge};
use crate::log::{read_log, unique_id, warnings};
use crate::sessions::OTHER_USERS_TASKS;

const BASE64URL: &str = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";

/// Decodes base64url without padding, independently of the libraries that the service uses.
pub(crate) fn from_base64url(text: &str) -> Vec<u8> {
    let (mut bits, mut bit_count) = (0u32, 0);
    let mut bytes = Vec::new();
    for c in text.chars() {
        let value = BASE64URL.find(c).expect("base64url");
        bits = bits << 6 | value as u32;
        bit_count += 6;
        if bit_count >= 8 {
            bit_count -= 8;
            bytes.push((bits >> bit_count) as u8);
            bits &= (1 << bit_count) - 1;
        }
    }
    bytes
}

/// Returns the header of the service's own access tokens.
fn own_header() -> Value {
    json!({"alg": "HS256", "typ": "JWT"})
}

fn encode(value: &Value) -> String {
    base64url(value.to_string().as_bytes())
}

/// Signs any header and payload with any algorithm.
fn sign(algorithm: Algorithm, key: &EncodingKey, header: &Value, payload: &str) -> String {
    let message = format!("{}.{}", encode(header), base64url(payload.as_bytes()));
    let signature = crypto::sign(message.as_bytes(), key, algorithm).expect("a signature");
    format!("{message}.{signature}")
}

fn with_claim(claims: &Value, name: &str, value: Value) -> Value {
    let mut claims = claims.clone();
    claims[name] = value;
    claims
}

fn without_claim(claims: &Value, name: &str) -> Value {
    let mut claims = claims.clone();
    claims.as_object_mut().expect("an object").remove(name);
    claims
}

/// Tokens that must be rejected, each with a name.
#[derive(Default)]
struct Attacks(Vec<(String, String)>);

impl Attacks {
    fn add(&mut self, name: impl Into<String>, token: impl Into<String>) {
        self.0.push((name.into(), token.into()));
    }
}

/// Returns unsigned tokens: `alg` none, and missing or malformed `alg`.
fn unsigned(user: &User) -> Attacks {
    let payload = user.access_token.split('.').nth(1).expect("a payload");
    let signature = user.access_token.split('.').nth(2).expect("a signature");
    let mut attacks = Attacks::default();
    for alg in ["none", "None", "NONE", "nOnE", "none ", "", "null"] {
        let header = encode(&json!({"alg": alg, "typ": "JWT"}));
        for signature in ["", signature, "AA"] {
            let token = format!("{header}.{payload}.{signature}");
            attacks.add(format!("alg {alg:?}, signature {signature:?}"), token);
        }
        attacks.add(
            format!("alg {alg:?}, two parts"),
            format!("{header}.{payload}"),
        );
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
        let token = format!("{}.{payload}.{signature}", encode(&header));
        attacks.add(format!("header {header}"), token);
    }
    attacks
}

/// Returns tokens whose header names another algorithm.
fn other_algorithms(secret: &str, user: &User) -> Attacks {
    let payload = claims(&user.access_token).to_string();
    let key = EncodingKey::from_secret(secret.as_bytes());
    let mut attacks = Attacks::default();
    for (algorithm, name) in [(Algorithm::HS384, "HS384"), (Algorithm::HS512, "HS512")] {
        let header = json!({"alg": name, "typ": "JWT"});
        attacks.add(name, sign(algorithm, &key, &header, &payload));
        let mislabeled = sign(algorithm, &key, &own_header(), &payload);
        attacks.add(format!("{name} labeled HS256"), mislabeled);
    }
    for name in [
        "RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "ES256K",
        "EdDSA", "HS1", "hs256", "Hs256", "HS-256", "HS256 ", "dir", "A128KW",
    ] {
        // Key confusion: an HMAC under a header that names a public-key algorithm.
        let header = json!({"alg": name, "typ": "JWT"});
        let confused = sign(Algorithm::HS256, &key, &header, &payload);
        attacks.add(format!("{name}, HMAC with the secret"), confused);
        // The psychic signature: r = s = 0, as raw bytes and in DER.
        for zero in [base64url(&[0; 64]), "MAYCAQACAQA".to_owned()] {
            let token = format!(
                "{}.{}.{zero}",
                encode(&header),
                base64url(payload.as_bytes())
            );
            attacks.add(format!("{name}, psychic signature"), token);
        }
    }
    attacks
}

/// A P-256 private key in PKCS #8, generated for these tests, and its public key.
const ATTACKER_KEY: &str = "MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQg1RXzlZnOB_-3xQiWZxeP1Besm0RoJ4CfDQf2eMfwREehRANCAAQaA3jX8tOL6oiDhAYJjgdt5BmTIdzx2ALf0pQo7_THcSCHP39TonYxUzSU_Rgkvz0OtrZPPXhdKJBOmdBt_ySm";
const ATTACKER_X: &str = "GgN41_LTi-qIg4QGCY4HbeQZkyHc8dgC39KUKO_0x3E";
const ATTACKER_Y: &str = "IIc_f1OidjFTNJT9GCS_PQ62tk89eF0okE6Z0G3_JKY";

/// Returns tokens signed with an attacker's key or with a weak secret; most headers refer to that key.
fn attacker_keys(user: &User) -> Attacks {
    let payload = claims(&user.access_token).to_string();
    let mut attacks = Attacks::default();
    let hmac = |secret: &str, header: Value| {
        let key = EncodingKey::from_secret(secret.as_bytes());
        sign(Algorithm::HS256, &key, &header, &payload)
    };
    for (kid, secret) in [
        // Path traversal to files with known contents.
        (json!("/dev/null"), ""),
        (json!("../../../../../../../dev/null"), ""),
        (json!("../../../../../../../dev/null"), "\0"),
        (json!("/proc/sys/kernel/randomize_va_space"), "2\n"),
        (json!("file:///dev/null"), ""),
        // SQL, LDAP and shell injection.
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
        let header = with_claim(&own_header(), "kid", kid.clone());
        attacks.add(format!("kid {kid}"), hmac(secret, header));
    }
    let jwk_oct = json!({"kty": "oct", "alg": "HS256", "k": base64url(b"attacker")});
    let jwk_ec = json!({"kty": "EC", "crv": "P-256", "use": "sig", "kid": "attacker",
                        "x": ATTACKER_X, "y": ATTACKER_Y});
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
        let header = with_claim(&own_header(), name, value.clone());
        attacks.add(format!("{name} {value}"), hmac("attacker", header));
    }
    // Valid signatures of the attacker's key pair.
    let key = EncodingKey::from_ec_der(&from_base64url(ATTACKER_KEY));
    for header in [
        json!({"alg": "ES256", "typ": "JWT", "jwk": jwk_ec}),
        json!({"alg": "ES256", "typ": "JWT", "jku": "http://127.0.0.1:9/jwks.json", "kid": "attacker"}),
        json!({"alg": "ES256", "typ": "JWT"}),
    ] {
        let token = sign(Algorithm::ES256, &key, &header, &payload);
        attacks.add(format!("signed with the attacker's key: {header}"), token);
    }
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
        attacks.add(format!("secret {secret:?}"), hmac(secret, own_header()));
    }
    attacks
}

/// Returns variants of a valid token with a part modified, missing or added.
fn modified(secret: &str, user: &User, other: &User) -> Attacks {
    let token = user.access_token.as_str();
    let parts: Vec<&str> = token.split('.').collect();
    let (header, payload, signature) = (parts[0], parts[1], parts[2]);
    let other_parts: Vec<&str> = other.access_token.split('.').collect();
    let own = claims(token);
    let other_user_id = encode(&with_claim(&own, "user_id", json!(other.id)));
    let later_exp = encode(&with_claim(&own, "exp", json!(9_999_999_999_u64)));
    let flip = |text: &str, at: usize| {
        let new = if text.as_bytes()[at] == b'A' {
            "B"
        } else {
            "A"
        };
        format!("{}{new}{}", &text[..at], &text[at + 1..])
    };
    // A signature of 43 characters encodes 258 bits, of which the last two must be zero.
    let last = BASE64URL.find(&signature[42..]).expect("base64url");
    let unused_bits = format!("{}{}", &signature[..42], &BASE64URL[last ^ 1..=last ^ 1]);
    let flattened = json!({"payload": payload, "protected": header, "signature": signature});
    let serialized = json!({"payload": payload,
                            "signatures": [{"protected": header, "signature": signature}]});

    let substitutions = [
        ("$token", token),
        ("$header", header),
        ("$payload", payload),
        ("$signature", signature),
        ("$other_payload", other_parts[1]),
        ("$other_signature", other_parts[2]),
        ("$other_user_id", &other_user_id),
        ("$later_exp", &later_exp),
        ("$modified_header", &flip(header, 4)),
        ("$modified_payload", &flip(payload, 4)),
        ("$modified_signature", &flip(signature, 0)),
        ("$signature_modified_inside", &flip(signature, 20)),
        ("$unused_bits", &unused_bits),
        ("$half", &signature[..21]),
        ("$first", &signature[..1]),
        ("$upper_case", &signature.to_uppercase()),
        ("$serialized", &serialized.to_string()),
        ("$flattened", &flattened.to_string()),
        ("$refresh_token", &user.refresh_token),
        ("$session_id", &user.session_id),
        ("$user_id", &user.id),
    ];
    let mut attacks = Attacks::default();
    for template in [
        // Another user's parts, and claims that the signature does not cover.
        "$header.$other_payload.$signature",
        "$header.$payload.$other_signature",
        "$header.$other_user_id.$signature",
        "$header.$later_exp.$signature",
        // rejectsModifiedHeader, rejectsModifiedPayload, rejectsModifiedSignature.
        "$modified_header.$payload.$signature",
        "$header.$modified_payload.$signature",
        "$header.$payload.$modified_signature",
        "$header.$payload.$signature_modified_inside",
        "$header.$payload.$unused_bits",
        "$header.$payload.$half",
        "$header.$payload.$first",
        "$header.$payload.$upper_case",
        "$tokenA",
        "$tokenAAAA",
        "$token$signature",
        "$token=",
        "$token%3D",
        "$header.$payload==.$signature",
        // rejectsMissingSignature and the other missing parts and separators.
        "$header.$payload.",
        "$header.$payload",
        "$header..$signature",
        "$header.$signature",
        ".$payload.$signature",
        "$payload.$signature",
        ".$payload.",
        "$payload",
        // rejectsExtraEmptyComponent, rejectsExtraComponent, and the five parts of a JWE.
        "$token.",
        "$token.foo",
        ".$token",
        "..",
        "$token.$payload.$signature",
        // rejectsValidJsonSerialization, and the flattened serialization.
        "$serialized",
        "$flattened",
        // Characters around and within the token.
        "$header. $payload.$signature",
        "$header.\t$payload.$signature",
        "\"$token\"",
        "<$token>",
        "$token,",
        "$token $token",
        "$token, $token",
        "$token, Bearer $token",
        "Bearer $token",
        "token=$token",
        // Other values of the same user.
        "$refresh_token",
        "$session_id",
        "$user_id",
    ] {
        // Longer names first, because some names begin with another one.
        let mut names: Vec<_> = substitutions.iter().collect();
        names.sort_by_key(|(name, _)| std::cmp::Reverse(name.len()));
        let token = names
            .iter()
            .fold(template.to_owned(), |token, (name, value)| {
                token.replace(name, value)
            });
        attacks.add(template, token);
    }
    attacks.add("truncated by one", &token[..token.len() - 1]);
    let key = EncodingKey::from_secret(secret.as_bytes());
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
        let token = sign(Algorithm::HS256, &key, &own_header(), payload);
        attacks.add(format!("payload {payload:?}"), token);
    }
    attacks
}

/// Returns correctly signed tokens with invalid claims or headers, which another service with the same
/// secret could issue.
fn wrong_claims(secret: &str, user: &User, other: &User) -> Attacks {
    let valid = claims(&user.access_token);
    let now = jiff::Timestamp::now().as_second();
    let mut attacks = Attacks::default();
    let mut add =
        |name: String, claims: Value| attacks.add(name, forge(secret, own_header(), claims));
    for name in ["user_id", "sub", "email", "sid", "iat", "exp"] {
        add(format!("no {name}"), without_claim(&valid, name));
        let array = json!([valid[name]]);
        let object = json!({"eq": valid[name]});
        for value in [json!(null), json!(true), json!(""), array, object] {
            add(format!("{name} {value}"), with_claim(&valid, name, value));
        }
    }
    for name in ["user_id", "sub", "sid", "email"] {
        add(format!("{name} 1"), with_claim(&valid, name, json!(1)));
    }
    for name in ["iat", "exp", "nbf"] {
        let text = (now + 600).to_string();
        for value in [json!(text), json!("2099-01-01T00:00:00Z"), json!(1e300)] {
            add(format!("{name} {value}"), with_claim(&valid, name, value));
        }
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
        add(format!("{name} {value}"), with_claim(&valid, name, value));
    }
    let id = user.id.as_str();
    for value in [
        &id.to_uppercase(),
        &id.replace('-', ""),
        &format!("{{{id}}}"),
        &format!("urn:uuid:{id}"),
        &format!(" {id}"),
        &format!("{id}\0"),
        &format!("{id}/../{}", other.id),
        "1",
        "admin",
        "*",
        "' or '1'='1",
        "%",
    ] {
        let both = with_claim(
            &with_claim(&valid, "user_id", json!(value)),
            "sub",
            json!(value),
        );
        add(format!("user_id and sub {value:?}"), both);
        add(
            format!("sid {value:?}"),
            with_claim(&valid, "sid", json!(value)),
        );
    }
    for header in [
        json!({"alg": "HS256", "typ": "refresh"}),
        json!({"alg": "HS256", "typ": "rt+jwt"}),
        json!({"alg": "HS256", "typ": "JWT", "crit": ["exp"], "exp": now + 600}),
        json!({"alg": "HS256", "typ": "JWT", "crit": ["b64"], "b64": false}),
        json!({"alg": "HS256", "typ": "JWT", "crit": ["x"], "x": 1}),
        json!({"alg": "HS256", "typ": "JWT", "crit": []}),
    ] {
        attacks.add(header.to_string(), forge(secret, header, valid.clone()));
    }
    attacks
}

/// Asserts that a route that writes rejects every token with 401 `invalid_token`, without an effect, and
/// with one WARN line.
async fn assert_all_rejected(server: &Server, user: &User, attacks: Attacks) {
    let mut ids = Vec::new();
    let mut accepted = Vec::new();
    for (name, token) in attacks.0 {
        let id = unique_id();
        let response = server
            .post(user.tasks())
            .bearer(&token)
            .header("x-request-id", &id)
            .json(json!({"title": name}))
            .await;
        if response.status != 401 {
            accepted.push(format!("{name}: {}", response.status));
            continue;
        }
        let problem = response.problem(401, "invalid_token").to_string();
        let challenge = response.header("www-authenticate");
        assert!(
            challenge.starts_with("Bearer realm=\"todo\""),
            "{name}: {challenge}"
        );
        assert!(
            challenge.contains("error=\"invalid_token\""),
            "{name}: {challenge}"
        );
        assert!(
            !problem.contains(&token),
            "{name}: the token is in {problem}"
        );
        ids.push((name, id));
    }
    assert!(accepted.is_empty(), "{accepted:#?}");

    let log = read_log(server).await;
    for (name, id) in ids {
        let lines = warnings(&log, &id);
        assert_eq!(lines.len(), 1, "{name}: {lines:#?}");
        assert!(
            lines[0].contains("authentication failed reason="),
            "{name}: {}",
            lines[0]
        );
    }
    assert_eq!(user.get(user.tasks()).await.expect(200).json(), json!([]));
}

#[tokio::test]
async fn rejects_unsigned_tokens() {
    let server = Server::shared().await;
    let ann = server.user().await;
    assert_all_rejected(server, &ann, unsigned(&ann)).await;
}

#[tokio::test]
async fn rejects_tokens_of_other_algorithms() {
    let server = Server::shared().await;
    let ann = server.user().await;
    let attacks = other_algorithms(server.secret(), &ann);
    assert_all_rejected(server, &ann, attacks).await;
}

#[tokio::test]
async fn rejects_tokens_signed_with_an_attackers_key() {
    let server = Server::shared().await;
    let ann = server.user().await;
    assert_all_rejected(server, &ann, attacker_keys(&ann)).await;
}

#[tokio::test]
async fn rejects_modified_tokens() {
    let server = Server::shared().await;
    let (ann, bob) = (server.user().await, server.user().await);
    let attacks = modified(server.secret(), &ann, &bob);
    assert_all_rejected(server, &ann, attacks).await;
}

/// FR-004: the claims include `exp`.
#[tokio::test]
async fn rejects_signed_tokens_with_invalid_claims() {
    let server = Server::shared().await;
    let (ann, bob) = (server.user().await, server.user().await);
    let attacks = wrong_claims(server.secret(), &ann, &bob);
    assert_all_rejected(server, &ann, attacks).await;
}

/// FR-004.
#[tokio::test]
async fn logs_that_a_rejected_token_has_expired() {
    let server = Server::shared().await;
    let ann = server.user().await;
    let now = jiff::Timestamp::now().as_second();
    let expired_for = |seconds: i64| {
        let claims = claims(&ann.access_token);
        let claims = with_claim(&claims, "iat", json!(now - 86400 - seconds));
        let claims = with_claim(&claims, "exp", json!(now - seconds));
        forge(server.secret(), own_header(), claims)
    };
    let id = unique_id();
    server
        .get("/api/v1/auth/me")
        .header("x-request-id", &id)
        .bearer(&expired_for(35))
        .await
        .problem(401, "invalid_token");
    let log = read_log(server).await;
    let lines = warnings(&log, &id);
    assert_eq!(lines.len(), 1, "{lines:?}");
    assert!(lines[0].contains("reason=expired_token"), "{}", lines[0]);
    assert_signed_in(server, &expired_for(-60)).await;
}

/// Revocations are kept for a day, so no token may be valid for longer, even if another program signed it
/// with the right secret.
#[tokio::test]
async fn rejects_access_tokens_valid_for_more_than_a_day() {
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
        let valid_for = |seconds: i64| {
            let claims = with_claim(&claims(&ann.access_token), "exp", json!(iat + seconds));
            forge(secret, own_header(), claims)
        };
        assert_signed_in(&server, &valid_for(86_400)).await;
        for seconds in [86_401, 10 * 365 * 86_400] {
            let token = valid_for(seconds);
            let id = unique_id();
            // Logout accepts expired tokens, but not these.
            for request in [
                server.get("/api/v1/auth/me"),
                server.post("/api/v1/auth/logout"),
            ] {
                let request = request.header("x-request-id", &id).bearer(&token);
                request.await.problem(401, "invalid_token");
            }
            for line in warnings(&read_log(&server).await, &id) {
                assert!(line.contains("reason=lifetime_too_long"), "{line}");
            }
        }
    }
    assert_signed_in(&server, &ann.access_token).await;
}

#[tokio::test]
async fn ignores_unknown_claims_and_accepts_a_past_nbf() {
    let server = Server::shared().await;
    let ann = server.user().await;
    let valid = claims(&ann.access_token);
    let now = jiff::Timestamp::now().as_second();
    for (name, value) in [
        ("nbf", json!(now - 60)),
        ("jti", json!("x")),
        ("admin", json!(true)),
        ("user", json!({"id": 1})),
    ] {
        let token = forge(
            server.secret(),
            own_header(),
            with_claim(&valid, name, value),
        );
        server.get(ann.tasks()).bearer(&token).await.expect(200);
    }
}

/// Returns the status of a raw response.
fn status(response: &str) -> u16 {
    let status = response
        .strip_prefix("HTTP/1.1 ")
        .and_then(|rest| rest.get(..3));
    status
        .and_then(|status| status.parse().ok())
        .unwrap_or_else(|| panic!("not a response: {response:?}"))
}

/// Written to the socket directly, because HTTP clients do not send such headers.
#[tokio::test]
async fn accepts_a_token_only_in_a_single_bearer_header() {
    let server = Server::shared().await;
    let (ann, bob) = (server.user().await, server.user().await);
    let valid = ann.access_token.as_str();
    let forged = format!("{}AAAA", &valid[..valid.len() - 4]);
    let long = "a".repeat(8 * 1024);
    let dots = ".".repeat(8 * 1024);
    let mut ids = Vec::new();
    for (query, template) in [
        ("", ""),
        ("?access_token=VALID", ""),
        ("", "Authorization:\n"),
        ("", "Authorization: Bearer\n"),
        ("", "Authorization: Bearer \n"),
        ("", "Authorization: VALID\n"),
        ("", "Authorization: Basic BASIC\n"),
        ("", "Authorization: Basic VALID\n"),
        ("", "Authorization: JWT VALID\n"),
        ("", "Authorization: Token VALID\n"),
        ("", "Authorization: Digest username=\"ann\"\n"),
        ("", "Authorization: BearerVALID\n"),
        ("", "Authorization: Bearer:VALID\n"),
        ("", "Authorization: Bearer=VALID\n"),
        (
            "",
            "Authorization: Bearer VALID\nAuthorization: Bearer VALID\n",
        ),
        (
            "",
            "Authorization: Bearer VALID\nAuthorization: Bearer FORGED\n",
        ),
        (
            "",
            "Authorization: Bearer FORGED\nAuthorization: Bearer VALID\n",
        ),
        (
            "",
            "Authorization: Bearer VALID\nauthorization: Bearer OTHER\n",
        ),
        (
            "",
            "Authorization: Basic BASIC\nAuthorization: Bearer VALID\n",
        ),
        ("", "Authorization: Bearer VALID\nAuthorization:\n"),
        ("", "Authorization: Bearer VALID, Bearer VALID\n"),
        ("", "X-Authorization: Bearer VALID\n"),
        ("", "Proxy-Authorization: Bearer VALID\n"),
        ("", "Access-Token: VALID\nX-Access-Token: VALID\n"),
        (
            "",
            "Cookie: access_token=VALID; token=VALID; Authorization=Bearer VALID\n",
        ),
        ("", "Authorization: Bearer LONG\n"),
        ("", "Authorization: Bearer VALIDLONG\n"),
        ("", "Authorization: Bearer DOTS\n"),
    ] {
        let id = unique_id();
        let query = query.replace("VALID", valid);
        let headers = template
            .replace('\n', "\r\n")
            .replace("VALID", valid)
            .replace("FORGED", &forged)
            .replace("OTHER", &bob.access_token)
            .replace("BASIC", "YW5uQGV4YW1wbGUuY29tOnBhc3N3b3Jk")
            .replace("LONG", &long)
            .replace("DOTS", &dots);
        let body = json!({"title": "x", "access_token": valid}).to_string();
        let response = server
            .raw(format!(
                "POST {}{query} HTTP/1.1\r\nHost: localhost\r\nX-Request-Id: {id}\r\n{headers}\
                 Content-Type: application/json\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
                ann.tasks(),
                body.len()
            ))
            .await;
        assert_eq!(status(&response), 401, "{template}: {response}");
        let response = response.to_lowercase();
        let has_challenge = response.contains("www-authenticate: bearer realm=\"todo\"");
        assert!(has_challenge, "{template}: {response}");
        let codes = ["\"code\":\"missing_token\"", "\"code\":\"invalid_token\""];
        let has_code = codes.iter().any(|code| response.contains(code));
        assert!(has_code, "{template}: {response}");
        ids.push((template, id));
    }
    let log = read_log(server).await;
    for (template, id) in ids {
        let lines = warnings(&log, &id);
        assert_eq!(lines.len(), 1, "{template}: {lines:#?}");
    }
    assert!(!log.contains(valid), "the log contains a token");
    assert_eq!(ann.get(ann.tasks()).await.expect(200).json(), json!([]));
}

/// Scripts send such values before the user has logged in.
#[tokio::test]
async fn treats_an_empty_or_null_bearer_token_as_missing() {
    let server = Server::shared().await;
    let ann = server.user().await;
    for value in [
        "Bearer",
        "Bearer ",
        "Bearer null",
        "bearer undefined",
        "Bearer  null",
    ] {
        let id = unique_id();
        let response = server
            .get(ann.tasks())
            .header("authorization", value)
            .header("x-request-id", &id)
            .await;
        response.problem(401, "missing_token");
        assert_eq!(
            response.header("www-authenticate"),
            r#"Bearer realm="todo""#
        );
        let log = read_log(server).await;
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
        let request = server.get(ann.tasks()).header("authorization", value);
        request.await.problem(401, "invalid_token");
    }
}

/// RFC 9110, section 11.1.
#[tokio::test]
async fn the_authentication_scheme_is_case_insensitive() {
    let server = Server::shared().await;
    let ann = server.user().await;
    for scheme in ["Bearer", "bearer", "BEARER", "bEaReR"] {
        server
            .get(ann.tasks())
            .header("authorization", format!("{scheme} {}", ann.access_token))
            .await
            .expect(200);
    }
}

#[tokio::test]
async fn rejects_binary_and_oversized_authorization_headers() {
    let server = Server::shared().await;
    let ann = server.user().await;
    let head = format!(
        "GET {} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nAuthorization: Bearer ",
        ann.tasks()
    );
    for value in [
        &b"\xff\xfe\xfd"[..],
        "ünïcödé".as_bytes(),
        &[ann.access_token.as_bytes(), b"\xff"].concat(),
        b"\x80.\x81.\x82",
    ] {
        let request = [head.as_bytes(), value, b"\r\n\r\n"].concat();
        let response = server.raw(request).await;
        assert_eq!(status(&response), 401, "{response}");
    }
    // hyper responds with 431 if the head exceeds its own limit.
    for kilobytes in [60, 1024] {
        let value = "a".repeat(kilobytes * 1024);
        let response = server.raw(format!("{head}{value}\r\n\r\n")).await;
        assert!(
            [401, 431].contains(&status(&response)),
            "{kilobytes} KiB: {response}"
        );
    }
    ann.get(ann.tasks()).await.expect(200);
}

/// FR-001.
#[tokio::test]
async fn verifies_the_token_before_reading_the_body() {
    let server = Server::shared().await;
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
    // The body is never sent.
    let response = server
        .raw(format!(
            "POST {} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer forged\r\n\
             Content-Type: application/json\r\nContent-Length: 100\r\nConnection: close\r\n\r\n",
            ann.tasks()
        ))
        .await;
    assert_eq!(status(&response), 401, "{response}");
}

const NEW_SECRET: &str = "another test secret of more than 32 bytes";

#[tokio::test]
async fn rotating_the_secret_keeps_sessions_while_the_previous_secret_is_set() {
    let before = Server::start().await;
    let (ann, bob) = (before.user().await, before.user().await);
    let during = before
        .sibling(&[
            ("JWT_SECRET", NEW_SECRET),
            ("JWT_SECRET_PREVIOUS", before.secret()),
        ])
        .await;
    ann.on(&during).get(ann.tasks()).await.expect(200);
    let renewed = refresh(&during, &ann.refresh_token)
        .await
        .expect(200)
        .json();
    // A repeated refresh returns the same successor under the new secret too.
    let again = refresh(&during, &ann.refresh_token)
        .await
        .expect(200)
        .json();
    assert_eq!(again["refresh_token"], renewed["refresh_token"]);

    // New tokens are signed with the new secret, so the old server rejects them.
    let access = text(&renewed, "access_token");
    let renewed = text(&renewed, "refresh_token");
    let request = before.get(ann.tasks()).bearer(&access);
    request.await.problem(401, "invalid_token");
    let response = refresh(&before, &renewed).await;
    response.problem(401, "invalid_refresh_token");

    // Once the previous secret is removed, its tokens are invalid.
    let after = before.sibling(&[("JWT_SECRET", NEW_SECRET)]).await;
    for user in [&ann, &bob] {
        let request = user.on(&after).get(OTHER_USERS_TASKS);
        request.await.problem(401, "invalid_token");
    }
    let response = refresh(&after, &bob.refresh_token).await;
    response.problem(401, "invalid_refresh_token");
    after.get(ann.tasks()).bearer(&access).await.expect(200);
    refresh(&after, &renewed).await.expect(200);
    login(&after, &bob.email, &bob.password).await.expect(200);
}
