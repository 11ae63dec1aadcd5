//! Access tokens and refresh tokens. Both are HS256 but use different keys, so that one is never
//! accepted as the other.

use std::time::Duration;

use jsonwebtoken::errors::ErrorKind;
use jsonwebtoken::{
    Algorithm, DecodingKey, EncodingKey, Header, Validation, crypto, decode, encode,
    get_current_timestamp,
};
use secrecy::{ExposeSecret, SecretString};
use serde::de::{DeserializeOwned, Error as _};
use serde::{Deserialize, Deserializer, Serialize};
use uuid::Uuid;

use crate::domain::{self, MAX_ACCESS_TTL, User};
use crate::error::{Error, Result};
use crate::telemetry::labels::TokenRejection;

/// Longer tokens are rejected without being parsed. The service's own tokens have about 400 bytes.
const MAX_BYTES: usize = 4096;
/// How many seconds the clock of another instance may be ahead.
const CLOCK_LEEWAY: u64 = 30;

/// The claims of an access token.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct AccessClaims {
    #[serde(deserialize_with = "deserialize_id")]
    pub(crate) user_id: Uuid,
    #[serde(deserialize_with = "deserialize_id")]
    pub(crate) sub: Uuid,
    pub(crate) email: String,
    #[serde(deserialize_with = "deserialize_id")]
    pub(crate) sid: Uuid,
    /// The session's epoch. The claim is absent while it is 0.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub(crate) epoch: i32,
    pub(crate) iat: u64,
    pub(crate) exp: u64,
}

fn is_zero(epoch: &i32) -> bool {
    *epoch == 0
}

/// The claims of a refresh token: the session, and the token's generation. They contain no
/// timestamp, so a generation always has the same token.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct RefreshClaims {
    #[serde(deserialize_with = "deserialize_id")]
    pub(crate) sid: Uuid,
    pub(crate) generation: i32,
}

/// Accepts only the canonical form of a UUID.
fn deserialize_id<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Uuid, D::Error> {
    let text = String::deserialize(deserializer)?;
    domain::parse_id(&text).ok_or_else(|| D::Error::custom("not an id"))
}

/// Signs with the current key, and verifies with the current and the previous key.
pub(super) struct KeyRing {
    /// The only accepted header (`alg` and `typ`), so that a token cannot choose its key or
    /// algorithm (RFC 8725, sections 3.1 and 3.10).
    header: Header,
    signing: EncodingKey,
    verifying: Vec<DecodingKey>,
    validation: Validation,
}

/// Issues and verifies all tokens.
pub(crate) struct TokenIssuer {
    access: KeyRing,
    /// The same keys, but accepts expired tokens, so that clients can log out with one.
    expired_access: KeyRing,
    refresh: KeyRing,
    access_ttl: Duration,
}

impl TokenIssuer {
    pub(crate) fn new(
        secret: &SecretString,
        previous: Option<&SecretString>,
        access_ttl: Duration,
    ) -> Result<Self> {
        let secrets = std::iter::once(secret).chain(previous);
        let secrets: Vec<&str> = secrets.map(|secret| secret.expose_secret()).collect();
        let strict = strict_validation();
        let mut expired = strict.clone();
        expired.validate_exp = false;
        let mut without_expiry = Validation::new(Algorithm::HS256);
        without_expiry.validate_exp = false;
        without_expiry.required_spec_claims.clear();
        let derived = derive_keys(secret, previous, "todo-api refresh token v1")?;
        Ok(Self {
            access: KeyRing::new("JWT", &secrets, strict),
            expired_access: KeyRing::new("JWT", &secrets, expired),
            refresh: KeyRing::new("refresh+jwt", &derived, without_expiry),
            access_ttl,
        })
    }

    /// Issues an access token for a session.
    pub(crate) fn issue_access(&self, user: &User, sid: Uuid, epoch: i32) -> Result<String> {
        let iat = get_current_timestamp();
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

    /// Issues the refresh token of this generation. The token is always the same for a generation.
    pub(crate) fn issue_refresh(&self, sid: Uuid, generation: i32) -> Result<String> {
        self.refresh.sign(&RefreshClaims { sid, generation })
    }

    /// Verifies an access token.
    pub(crate) fn verify_access(&self, token: &str) -> Result<AccessClaims> {
        let claims = self.access.verify(token).and_then(validate_claims);
        claims.map_err(Error::InvalidToken)
    }

    /// Verifies an access token that may have expired.
    pub(crate) fn verify_expired_access(&self, token: &str) -> Result<AccessClaims> {
        let claims = self.expired_access.verify(token).and_then(validate_claims);
        claims.map_err(Error::InvalidToken)
    }

    /// Verifies the signature and claims of a refresh token. Whether its generation is current can
    /// only be determined by the database.
    pub(crate) fn verify_refresh(&self, token: &str) -> Result<RefreshClaims, TokenRejection> {
        let claims: RefreshClaims = self.refresh.verify(token)?;
        if !(1..i32::MAX).contains(&claims.generation) {
            return Err(TokenRejection::Malformed);
        }
        Ok(claims)
    }
}

fn validate_claims(claims: AccessClaims) -> Result<AccessClaims, TokenRejection> {
    if claims.sub != claims.user_id {
        return Err(TokenRejection::ClaimsMismatch);
    }
    if !claims.email.contains('@') {
        return Err(TokenRejection::Malformed);
    }
    if claims.iat > get_current_timestamp() + CLOCK_LEEWAY || claims.exp < claims.iat {
        return Err(TokenRejection::NotYetValid);
    }
    if claims.exp - claims.iat > MAX_ACCESS_TTL.as_secs() {
        return Err(TokenRejection::LifetimeTooLong);
    }
    Ok(claims)
}

/// Requires a subject and an expiry time in the future.
pub(super) fn strict_validation() -> Validation {
    let mut strict = Validation::new(Algorithm::HS256);
    strict.leeway = 0;
    strict.validate_nbf = true;
    strict.set_required_spec_claims(&["exp", "sub"]);
    strict
}

impl KeyRing {
    pub(super) fn new(typ: &str, secrets: &[impl AsRef<[u8]>], validation: Validation) -> Self {
        let mut header = Header::new(Algorithm::HS256);
        header.typ = Some(typ.to_owned());
        let verifying = secrets.iter().map(AsRef::as_ref);
        Self {
            header,
            signing: EncodingKey::from_secret(secrets[0].as_ref()),
            verifying: verifying.map(DecodingKey::from_secret).collect(),
            validation,
        }
    }

    pub(super) fn sign<T: Serialize>(&self, claims: &T) -> Result<String> {
        encode(&self.header, claims, &self.signing).map_err(internal)
    }

    pub(super) fn verify<T: DeserializeOwned>(&self, token: &str) -> Result<T, TokenRejection> {
        if token.len() > MAX_BYTES {
            return Err(TokenRejection::Oversized);
        }
        let mut rejection = TokenRejection::Malformed;
        for key in &self.verifying {
            match decode::<T>(token, key, &self.validation) {
                Ok(data) if data.header == self.header => return Ok(data.claims),
                Ok(_) => return Err(TokenRejection::UnexpectedHeader),
                Err(error) => {
                    rejection = rejection_reason(error.kind());
                    if rejection != TokenRejection::BadSignature {
                        break;
                    }
                }
            }
        }
        Err(rejection)
    }
}

fn rejection_reason(kind: &ErrorKind) -> TokenRejection {
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

/// Derives keys that are used only for this purpose, from the current secret and the previous one.
pub(super) fn derive_keys(
    secret: &SecretString,
    previous: Option<&SecretString>,
    purpose: &str,
) -> Result<Vec<String>> {
    let derive = |secret: &SecretString| {
        let secret = EncodingKey::from_secret(secret.expose_secret().as_bytes());
        crypto::sign(purpose.as_bytes(), &secret, Algorithm::HS256).map_err(internal)
    };
    std::iter::once(secret)
        .chain(previous)
        .map(derive)
        .collect()
}

pub(super) fn internal(error: jsonwebtoken::errors::Error) -> Error {
    Error::Internal(format!("cannot sign a token: {error}"))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #![proptest_config(crate::proptest_config())]

        #[test]
        fn rejects_a_token_with_one_changed_byte(at in any::<prop::sample::Index>(), byte in any::<u8>()) {
            let secret = SecretString::from("a test secret of at least 32 bytes");
            let issuer = TokenIssuer::new(&secret, None, Duration::from_secs(60)).unwrap();
            let token = issuer.issue_refresh(Uuid::nil(), 1).unwrap();
            let at = at.index(token.len());
            let mut bytes = token.clone().into_bytes();
            bytes[at] = byte;
            if let Ok(changed) = String::from_utf8(bytes)
                && changed != token
            {
                prop_assert!(issuer.verify_refresh(&changed).is_err());
            }
        }
    }
}
