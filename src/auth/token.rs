//! Access tokens and refresh tokens: both HS256, under keys of their own, so that neither passes
//! for the other.

use std::fmt;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use jsonwebtoken::errors::ErrorKind;
use jsonwebtoken::{
    Algorithm, DecodingKey, EncodingKey, Header, Validation, crypto, decode, encode,
};
use secrecy::{ExposeSecret, SecretString};
use serde::de::{DeserializeOwned, Visitor};
use serde::{Deserialize, Deserializer, Serialize};
use uuid::Uuid;

use crate::domain::{self, MAX_ACCESS_TTL, User};
use crate::error::Error;
use crate::telemetry::labels::TokenRejection;

/// A token of ours has some 400 bytes; no honest one comes near this.
const MAX_BYTES: usize = 4096;
/// How far the clock of another instance may be ahead, in seconds.
const CLOCK_LEEWAY: u64 = 30;

/// What an access token says of its bearer.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct AccessClaims {
    #[serde(deserialize_with = "id")]
    pub(crate) user_id: Uuid,
    #[serde(deserialize_with = "id")]
    pub(crate) sub: Uuid,
    pub(crate) email: String,
    #[serde(deserialize_with = "id")]
    pub(crate) sid: Uuid,
    /// The session's epoch. No claim while it is 0.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub(crate) epoch: i32,
    pub(crate) iat: u64,
    pub(crate) exp: u64,
}

fn is_zero(epoch: &i32) -> bool {
    *epoch == 0
}

/// What a refresh token says: which session, and which of its tokens. No time, so that the same
/// successor can be made again.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct RefreshClaims {
    #[serde(deserialize_with = "id")]
    pub(crate) sid: Uuid,
    pub(crate) generation: i32,
}

/// An id in the one spelling that we write.
fn id<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Uuid, D::Error> {
    struct Id;
    impl Visitor<'_> for Id {
        type Value = Uuid;

        fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
            f.write_str("an id")
        }

        fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Uuid, E> {
            domain::parse_id(text).ok_or_else(|| E::custom("no id"))
        }
    }
    deserializer.deserialize_str(Id)
}

/// Signs with one key, verifies with that and the one before.
struct KeyRing {
    /// RFC 8725 sections 3.1 and 3.10: nothing in a header chooses a key or an algorithm. Ours
    /// have `alg` and `typ` and no more.
    header: Header,
    signing: EncodingKey,
    verifying: Vec<DecodingKey>,
    validation: Validation,
}

/// Makes and verifies every token.
pub(crate) struct TokenIssuer {
    access: KeyRing,
    /// The same keys, for the sign-out of somebody whose token merely expired.
    expired_access: KeyRing,
    refresh: KeyRing,
    access_ttl: Duration,
}

impl TokenIssuer {
    pub(crate) fn new(
        secret: &SecretString,
        previous: Option<&SecretString>,
        access_ttl: Duration,
    ) -> Result<Self, Error> {
        let secrets: Vec<&[u8]> = std::iter::once(secret)
            .chain(previous)
            .map(|secret| secret.expose_secret().as_bytes())
            .collect();
        let mut strict = Validation::new(Algorithm::HS256);
        strict.leeway = 0;
        strict.validate_nbf = true;
        strict.set_required_spec_claims(&["exp", "sub"]);
        let mut expired = strict.clone();
        expired.validate_exp = false;
        let mut timeless = Validation::new(Algorithm::HS256);
        timeless.validate_exp = false;
        timeless.required_spec_claims.clear();
        let derived = secrets
            .iter()
            .map(|secret| derive(secret))
            .collect::<Result<Vec<_>, _>>()?;
        let derived: Vec<&[u8]> = derived.iter().map(String::as_bytes).collect();
        Ok(Self {
            access: KeyRing::new("JWT", &secrets, strict),
            expired_access: KeyRing::new("JWT", &secrets, expired),
            refresh: KeyRing::new("refresh+jwt", &derived, timeless),
            access_ttl,
        })
    }

    /// A new access token.
    pub(crate) fn issue_access(&self, user: &User, sid: Uuid, epoch: i32) -> Result<String, Error> {
        let iat = now();
        self.access.sign(&AccessClaims {
            user_id: user.id,
            sub: user.id,
            email: user.email.clone(),
            sid,
            epoch,
            iat,
            exp: iat + self.access_ttl.as_secs(),
        })
    }

    /// The refresh token of this generation: always the same one.
    pub(crate) fn issue_refresh(&self, sid: Uuid, generation: i32) -> Result<String, Error> {
        self.refresh.sign(&RefreshClaims { sid, generation })
    }

    /// What a good access token says, or the reason why it is none.
    pub(crate) fn verify_access(&self, token: &str) -> Result<AccessClaims, TokenRejection> {
        validate_claims(self.access.verify(token)?)
    }

    /// The same, whether or not it has expired.
    pub(crate) fn verify_expired_access(
        &self,
        token: &str,
    ) -> Result<AccessClaims, TokenRejection> {
        validate_claims(self.expired_access.verify(token)?)
    }

    /// What a refresh token says, or the reason why it is none. Whether it is still good, the
    /// database knows.
    pub(crate) fn verify_refresh(&self, token: &str) -> Result<RefreshClaims, TokenRejection> {
        let claims: RefreshClaims = self.refresh.verify(token)?;
        if claims.generation < 1 || claims.generation == i32::MAX {
            Err(TokenRejection::Malformed)
        } else {
            Ok(claims)
        }
    }
}

fn validate_claims(claims: AccessClaims) -> Result<AccessClaims, TokenRejection> {
    if claims.sub != claims.user_id {
        return Err(TokenRejection::ClaimsMismatch);
    }
    if !claims.email.contains('@') {
        return Err(TokenRejection::Malformed);
    }
    if claims.iat > now() + CLOCK_LEEWAY || claims.exp < claims.iat {
        return Err(TokenRejection::NotYetValid);
    }
    if claims.exp - claims.iat > MAX_ACCESS_TTL.as_secs() {
        return Err(TokenRejection::LifetimeTooLong);
    }
    Ok(claims)
}

impl KeyRing {
    fn new(typ: &str, secrets: &[&[u8]], validation: Validation) -> Self {
        let mut header = Header::new(Algorithm::HS256);
        header.typ = Some(typ.to_owned());
        Self {
            header,
            signing: EncodingKey::from_secret(secrets.first().copied().unwrap_or_default()),
            verifying: secrets
                .iter()
                .map(|secret| DecodingKey::from_secret(secret))
                .collect(),
            validation,
        }
    }

    fn sign<T: Serialize>(&self, claims: &T) -> Result<String, Error> {
        encode(&self.header, claims, &self.signing).map_err(internal)
    }

    fn verify<T: DeserializeOwned>(&self, token: &str) -> Result<T, TokenRejection> {
        if token.len() > MAX_BYTES {
            return Err(TokenRejection::Oversized);
        }
        let mut refusal = TokenRejection::Malformed;
        for key in &self.verifying {
            match decode::<T>(token, key, &self.validation) {
                Ok(data) if data.header == self.header => return Ok(data.claims),
                Ok(_) => return Err(TokenRejection::UnexpectedHeader),
                Err(error) => {
                    refusal = reason(error.kind());
                    if refusal != TokenRejection::BadSignature {
                        break;
                    }
                }
            }
        }
        Err(refusal)
    }
}

fn reason(kind: &ErrorKind) -> TokenRejection {
    match kind {
        ErrorKind::ExpiredSignature => TokenRejection::Expired,
        ErrorKind::InvalidSignature => TokenRejection::BadSignature,
        ErrorKind::ImmatureSignature => TokenRejection::NotYetValid,
        ErrorKind::InvalidAlgorithm | ErrorKind::InvalidAlgorithmName => {
            TokenRejection::WrongAlgorithm
        }
        ErrorKind::MissingRequiredClaim(_) => TokenRejection::MissingClaim,
        _ => TokenRejection::Malformed,
    }
}

/// A key for refresh tokens alone: nothing signed with it can be taken for an access token.
fn derive(secret: &[u8]) -> Result<String, Error> {
    crypto::sign(
        b"todo-api refresh token v1",
        &EncodingKey::from_secret(secret),
        Algorithm::HS256,
    )
    .map_err(internal)
}

fn internal(error: jsonwebtoken::errors::Error) -> Error {
    Error::Internal(format!("cannot sign: {error}"))
}

fn now() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn tokens() -> TokenIssuer {
        let secret = SecretString::from("a secret of the tests, 32 bytes at least");
        TokenIssuer::new(&secret, None, Duration::from_secs(60)).unwrap()
    }

    proptest! {
        #![proptest_config(crate::proptest_config())]

        #[test]
        fn what_we_did_not_sign_is_no_token(text in prop_oneof![
            any::<String>(),
            "[A-Za-z0-9_-]{0,80}\\.[A-Za-z0-9_-]{0,80}\\.[A-Za-z0-9_-]{0,43}",
        ]) {
            let tokens = tokens();
            prop_assert!(tokens.verify_access(&text).is_err());
            prop_assert!(tokens.verify_refresh(&text).is_err());
        }

        #[test]
        fn a_token_with_another_byte_is_no_token(at in any::<prop::sample::Index>(), byte in any::<u8>()) {
            let tokens = tokens();
            let token = tokens.issue_refresh(Uuid::nil(), 1).unwrap();
            let at = at.index(token.len());
            let mut bytes = token.clone().into_bytes();
            bytes[at] = byte;
            if let Ok(changed) = String::from_utf8(bytes)
                && changed != token
            {
                prop_assert!(tokens.verify_refresh(&changed).is_err());
            }
        }
    }
}
