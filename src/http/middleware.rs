//! The JWT middleware: a bearer token becomes a signed-in user, or the request ends here, before
//! anything of its body is read.

use uuid::Uuid;

use crate::db::{AUTHENTICATION_TIMEOUT, Deadline};
use crate::error::Error;
use crate::http::context::RequestContext;
use crate::telemetry::labels::TokenRejection;

/// Somebody with a good access token.
pub(crate) struct AuthenticatedUser {
    pub(crate) id: Uuid,
    pub(crate) session: Uuid,
}

/// Who asks (FR-001, FR-002, FR-004). The answer to a refusal, and its line in the log, are made
/// where all errors are.
pub(crate) async fn authenticate(context: &RequestContext<'_>) -> Result<AuthenticatedUser, Error> {
    let token = context.bearer_token().map_err(Error::InvalidToken)?;
    let token = token.ok_or(Error::MissingToken)?;
    let claims = context
        .app
        .tokens
        .verify_access(token)
        .map_err(Error::InvalidToken)?;
    // Not the request's: the body is yet to be read.
    let deadline = Deadline::after(AUTHENTICATION_TIMEOUT);
    let db = context.app.database.with_deadline(deadline);
    if context.app.revocations.is_revoked(db, &claims).await? {
        return Err(Error::InvalidToken(TokenRejection::RevokedSession));
    }
    Ok(AuthenticatedUser {
        id: claims.user_id,
        session: claims.sid,
    })
}

/// The same where the path names a user: it has to be the token's (FR-003).
pub(crate) async fn require_owner(
    context: &RequestContext<'_>,
    user_id: &str,
) -> Result<AuthenticatedUser, Error> {
    let signed_in = authenticate(context).await?;
    let mut buffer = Uuid::encode_buffer();
    if signed_in.id.hyphenated().encode_lower(&mut buffer) == user_id {
        Ok(signed_in)
    } else {
        Err(Error::Forbidden)
    }
}
