//! Entity tags of lists, and cursors of their changes. Both are keyed with the JWT secret. A
//! restore of the database replaces the secret, because the restored database may reuse revisions
//! that clients have already seen.

use jsonwebtoken::{Algorithm, DecodingKey, EncodingKey, crypto};
use secrecy::SecretString;
use uuid::Uuid;

use crate::auth::token::{derive_keys, internal};
use crate::db::lists::Position;
use crate::error::Error;

/// 22 characters of base64url, 132 bits, are enough for a tag.
const TAG_LENGTH: usize = 22;

/// Where a client continues to read the changes of a list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ChangesCursor {
    /// The last change that the client has.
    pub(crate) position: Position,
    /// The revision at which the client started without a copy. Deletions up to it are left out,
    /// because the client never had those tasks.
    pub(crate) started_at: i64,
}

/// Signs with the current secret, and verifies with the current and the previous one.
pub(crate) struct ListSigner {
    signing: EncodingKey,
    verifying: Vec<DecodingKey>,
}

impl ListSigner {
    pub(crate) fn new(
        secret: &SecretString,
        previous: Option<&SecretString>,
    ) -> Result<Self, Error> {
        let keys = derive_keys(secret, previous, "todo-api lists v1")?;
        Ok(Self {
            signing: EncodingKey::from_secret(keys[0].as_bytes()),
            verifying: keys
                .iter()
                .map(|key| DecodingKey::from_secret(key.as_bytes()))
                .collect(),
        })
    }

    /// The entity tag of every page of a list at this revision.
    pub(crate) fn entity_tag(&self, user_id: Uuid, revision: i64) -> Result<String, Error> {
        let mut tag = self.sign(&format!("tag {user_id} {revision}"))?;
        tag.truncate(TAG_LENGTH);
        // A hyphen could start text that looks like the suffix of a compressing proxy.
        Ok(format!("\"{}\"", tag.replace('-', ".")))
    }

    /// Writes a cursor for this user.
    pub(crate) fn write_cursor(
        &self,
        user_id: Uuid,
        cursor: ChangesCursor,
    ) -> Result<String, Error> {
        let text = cursor.to_text();
        let signature = self.sign(&cursor_message(user_id, &text))?;
        Ok(format!("{text}.{signature}"))
    }

    /// Reads a cursor. Returns `None` if it is malformed, and an error if it was written with another
    /// secret or for another user.
    pub(crate) fn read_cursor(
        &self,
        user_id: Uuid,
        cursor: &str,
    ) -> Option<Result<ChangesCursor, Error>> {
        let (text, signature) = cursor.rsplit_once('.')?;
        let cursor = ChangesCursor::parse(text)?;
        let message = cursor_message(user_id, text);
        let is_ours = |key| {
            let verified = crypto::verify(signature, message.as_bytes(), key, Algorithm::HS256);
            verified.unwrap_or(false)
        };
        match self.verifying.iter().any(is_ours) {
            true => Some(Ok(cursor)),
            false => Some(Err(Error::CursorExpired)),
        }
    }

    fn sign(&self, message: &str) -> Result<String, Error> {
        crypto::sign(message.as_bytes(), &self.signing, Algorithm::HS256).map_err(internal)
    }
}

impl ChangesCursor {
    fn to_text(self) -> String {
        let (revision, id) = self.position;
        format!("{revision:x}.{}.{:x}", id.simple(), self.started_at)
    }

    fn parse(text: &str) -> Option<Self> {
        let mut parts = text.split('.');
        let number = |text: &str| i64::from_str_radix(text, 16).ok();
        let cursor = Self {
            position: (number(parts.next()?)?, Uuid::try_parse(parts.next()?).ok()?),
            started_at: number(parts.next()?)?,
        };
        // Rejects other spellings of the numbers, and further parts.
        (cursor.to_text() == text).then_some(cursor)
    }
}

fn cursor_message(user_id: Uuid, text: &str) -> String {
    format!("cursor {user_id} {text}")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #![proptest_config(crate::proptest_config())]

        #[test]
        fn a_cursor_is_read_only_as_it_was_written(
            revision in 0..i64::MAX, started_at in 0..i64::MAX, id in any::<u128>(),
            at in any::<prop::sample::Index>(), byte in any::<u8>(),
        ) {
            let secret = SecretString::from("a test secret of at least 32 bytes");
            let signer = ListSigner::new(&secret, None).unwrap();
            let read = |user_id, text: &str| signer.read_cursor(user_id, text)?.ok();
            let position = (revision, Uuid::from_u128(id));
            let cursor = ChangesCursor { position, started_at };
            let text = signer.write_cursor(Uuid::nil(), cursor).unwrap();
            prop_assert_eq!(read(Uuid::nil(), &text), Some(cursor));
            prop_assert_eq!(read(Uuid::max(), &text), None);
            let mut bytes = text.clone().into_bytes();
            bytes[at.index(text.len())] = byte;
            if let Ok(changed) = String::from_utf8(bytes)
                && changed != text
            {
                prop_assert_eq!(read(Uuid::nil(), &changed), None);
            }
        }
    }
}
