//! The JWT middleware: a bearer token becomes a signed-in user, or the request ends here, before
//! anything of its body is read.

use uuid::Uuid;

use crate::App;
use crate::db::{AUTHENTICATION_TIMEOUT, Deadline};
use crate::error::{Error, Refused};
use crate::labels::TokenRejection;
use crate::request::Call;

/// Somebody with a good access token.
pub(crate) struct SignedIn {
    pub(crate) id: Uuid,
    pub(crate) session: Uuid,
}

/// Who asks (FR-001, FR-002, FR-004). The answer to a refusal, and its line in the log, are made
/// where all errors are.
pub(crate) async fn signed_in(call: &Call<'_>) -> Result<SignedIn, Error> {
    let refused = |reason| Error::Unauthenticated(Refused::AccessToken(reason));
    let token = call.bearer_token().map_err(refused)?;
    let token = token.ok_or(Error::Unauthenticated(Refused::MissingToken))?;
    let claims = call.app.tokens.verify_access(token).map_err(refused)?;
    // Not the request's: the body is yet to be read.
    let deadline = Deadline::after(AUTHENTICATION_TIMEOUT);
    let App {
        revocations,
        database,
        ..
    } = call.app;
    if revocations.is_revoked(database, deadline, &claims).await? {
        return Err(refused(TokenRejection::RevokedSession));
    }
    Ok(SignedIn {
        id: claims.user_id,
        session: claims.sid,
    })
}

/// The same where the path names a user: it has to be the token's (FR-003).
pub(crate) async fn owner(call: &Call<'_>, user_id: &str) -> Result<SignedIn, Error> {
    let signed_in = signed_in(call).await?;
    let mut buffer = Uuid::encode_buffer();
    if signed_in.id.hyphenated().encode_lower(&mut buffer) == user_id {
        Ok(signed_in)
    } else {
        Err(Error::Forbidden)
    }
}
