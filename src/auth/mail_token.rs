//! Tokens that are sent by mail: they reset a password or verify an address.
//!
//! Each kind has its own key and `typ`. A token is bound to the password hash and the address of its
//! account, so it becomes invalid as soon as either changes. No table of used tokens is needed.

use std::time::Duration;

use jsonwebtoken::{Algorithm, DecodingKey, EncodingKey, crypto, get_current_timestamp};
use secrecy::{ExposeSecret, SecretString};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::auth::token::{KeyRing, derive_key, internal, strict_validation};
use crate::db::mail::MailAccount;
use crate::error::{Error, Result};
use crate::telemetry::labels::TokenRejection;

/// Short, because the token gives access to the account.
const RESET_TTL: Duration = Duration::from_secs(30 * 60);
/// Enough to read the mail on the next day.
const VERIFICATION_TTL: Duration = Duration::from_secs(24 * 60 * 60);

/// The claims of both kinds of tokens.
#[derive(Serialize, Deserialize)]
pub(crate) struct MailClaims {
    pub(crate) sub: Uuid,
    /// The address to which the token was sent.
    pub(crate) email: String,
    /// The session that asked for a change of the address.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) sid: Option<Uuid>,
    exp: u64,
    /// A MAC over the account's address, keyed with its password hash.
    state: String,
}

/// Issues and verifies tokens that are sent by mail.
pub(crate) struct MailTokens {
    reset: KeyRing,
    verification: KeyRing,
}

impl MailTokens {
    pub(crate) fn new(secret: &SecretString, previous: Option<&SecretString>) -> Result<Self> {
        let key_ring = |typ, purpose| {
            let secrets = std::iter::once(secret).chain(previous);
            let derive = |s: &SecretString| derive_key(s.expose_secret().as_bytes(), purpose);
            let keys = secrets.map(derive).collect::<Result<Vec<_>>>()?;
            Ok::<_, Error>(KeyRing::new(typ, &keys, strict_validation()))
        };
        Ok(Self {
            reset: key_ring("reset+jwt", "todo-api password reset v1")?,
            verification: key_ring("verification+jwt", "todo-api address verification v1")?,
        })
    }

    /// Issues a token that sets a new password.
    pub(crate) fn issue_reset(&self, account: &MailAccount) -> Result<String> {
        let claims = MailClaims::new(account, account.email.clone(), None, RESET_TTL)?;
        self.reset.sign(&claims)
    }

    /// Issues a token that verifies `email`, which becomes the account's address if it is another.
    pub(crate) fn issue_verification(
        &self,
        account: &MailAccount,
        email: &str,
        session: Option<Uuid>,
    ) -> Result<String> {
        let claims = MailClaims::new(account, email.to_owned(), session, VERIFICATION_TTL)?;
        self.verification.sign(&claims)
    }

    /// Verifies the signature and the expiry time. The caller then checks the account with
    /// [`MailClaims::check`].
    pub(crate) fn verify_reset(&self, token: &str) -> Result<MailClaims> {
        self.reset.verify(token).map_err(Error::InvalidMailToken)
    }

    /// Like `verify_reset`, for the other kind.
    pub(crate) fn verify_verification(&self, token: &str) -> Result<MailClaims> {
        let claims = self.verification.verify(token);
        claims.map_err(Error::InvalidMailToken)
    }
}

impl MailClaims {
    fn new(account: &MailAccount, email: String, sid: Option<Uuid>, ttl: Duration) -> Result<Self> {
        let key = EncodingKey::from_secret(account.hash.as_bytes());
        let state = crypto::sign(&account.state(), &key, Algorithm::HS256).map_err(internal)?;
        Ok(Self {
            sub: account.id,
            email,
            sid,
            exp: get_current_timestamp() + ttl.as_secs(),
            state,
        })
    }

    /// Fails if the password or the address has changed since the token was issued.
    pub(crate) fn check(&self, account: &MailAccount) -> Result<()> {
        let key = DecodingKey::from_secret(account.hash.as_bytes());
        match crypto::verify(&self.state, &account.state(), &key, Algorithm::HS256) {
            Ok(true) => Ok(()),
            _ => Err(Error::InvalidMailToken(TokenRejection::Superseded)),
        }
    }
}

impl MailAccount {
    fn state(&self) -> Vec<u8> {
        format!("{} {}", self.id, self.email).into_bytes()
    }
}
