//! Tokens that are sent by mail: they reset a password or verify an address.
//!
//! Each kind has its own key and `typ`. A token is bound to the password hash and the address of its
//! account, so it becomes invalid as soon as either changes. No table of used tokens is needed.

use std::time::Duration;

use jsonwebtoken::{Algorithm, DecodingKey, EncodingKey, crypto, get_current_timestamp};
use secrecy::SecretString;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::auth::token::{KeyRing, derive_keys, internal, strict_validation};
use crate::db::users::StoredAccount;
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
    /// Tokens that set a new password.
    pub(crate) reset: MailTokenIssuer,
    /// Tokens that verify an address.
    pub(crate) verification: MailTokenIssuer,
}

/// Issues and verifies one kind of tokens.
pub(crate) struct MailTokenIssuer {
    keys: KeyRing,
    ttl: Duration,
}

impl MailTokens {
    pub(crate) fn new(secret: &SecretString, previous: Option<&SecretString>) -> Result<Self> {
        let issuer = |typ, purpose, ttl| {
            let keys = derive_keys(secret, previous, purpose)?;
            let keys = KeyRing::new(typ, &keys, strict_validation());
            Ok::<_, Error>(MailTokenIssuer { keys, ttl })
        };
        let verification = "todo-api address verification v1";
        Ok(Self {
            reset: issuer("reset+jwt", "todo-api password reset v1", RESET_TTL)?,
            verification: issuer("verification+jwt", verification, VERIFICATION_TTL)?,
        })
    }
}

impl MailTokenIssuer {
    /// Issues a token for a mail to `email`, which is the account's address or is to become it.
    pub(crate) fn issue(
        &self,
        account: &StoredAccount,
        email: &str,
        session: Option<Uuid>,
    ) -> Result<String> {
        let key = EncodingKey::from_secret(account.hash.as_bytes());
        let state = crypto::sign(&account.state(), &key, Algorithm::HS256).map_err(internal)?;
        self.keys.sign(&MailClaims {
            sub: account.id,
            email: email.to_owned(),
            sid: session,
            exp: get_current_timestamp() + self.ttl.as_secs(),
            state,
        })
    }

    /// Verifies the signature and the expiry time. The caller then checks the account with
    /// [`MailClaims::check`].
    pub(crate) fn verify(&self, token: &str) -> Result<MailClaims> {
        self.keys.verify(token).map_err(Error::InvalidMailToken)
    }
}

impl MailClaims {
    /// Fails if the password or the address has changed since the token was issued.
    pub(crate) fn check(&self, account: &StoredAccount) -> Result<()> {
        let key = DecodingKey::from_secret(account.hash.as_bytes());
        match crypto::verify(&self.state, &account.state(), &key, Algorithm::HS256) {
            Ok(true) => Ok(()),
            _ => Err(Error::InvalidMailToken(TokenRejection::Superseded)),
        }
    }
}

impl StoredAccount {
    fn state(&self) -> Vec<u8> {
        format!("{} {}", self.id, self.email).into_bytes()
    }
}
