//! JWT authentication. It runs before the body is read.

use uuid::Uuid;

use crate::db::{AUTHENTICATION_TIMEOUT, Deadline};
use crate::error::{Error, Result};
use crate::http::context::RequestContext;
use crate::http::state::AppState;
use crate::telemetry::labels::TokenRejection;

/// The user and the session of a valid access token.
pub(crate) struct AuthenticatedUser {
    pub(crate) id: Uuid,
    pub(crate) session: Uuid,
    epoch: i32,
}

/// Verifies the bearer token (FR-001, FR-002, FR-004).
pub(crate) async fn authenticate(context: &RequestContext<'_>) -> Result<AuthenticatedUser> {
    let app = context.app;
    let token = context.bearer_token()?.ok_or(Error::MissingToken)?;
    let claims = app.tokens.verify_access(token)?;
    let user = AuthenticatedUser {
        id: claims.user_id,
        session: claims.sid,
        epoch: claims.epoch,
    };
    check_session(app, &user).await?;
    Ok(user)
}

/// Verifies that the token of a user has not been revoked.
pub(crate) async fn check_session(app: &AppState, user: &AuthenticatedUser) -> Result<()> {
    // The request's own deadline starts only when the body has been read.
    let deadline = Deadline::after(AUTHENTICATION_TIMEOUT);
    let db = app.database.with_deadline(deadline);
    let revocations = &app.revocations;
    match revocations.is_revoked(db, user.session, user.epoch).await? {
        true => Err(Error::InvalidToken(TokenRejection::RevokedSession)),
        false => Ok(()),
    }
}

/// Verifies the bearer token, and that the user in the path is the user of the token (FR-003).
pub(crate) async fn require_owner(
    context: &RequestContext<'_>,
    user_id: &str,
) -> Result<AuthenticatedUser> {
    let user = authenticate(context).await?;
    let mut buffer = Uuid::encode_buffer();
    match user.id.hyphenated().encode_lower(&mut buffer) == user_id {
        true => Ok(user),
        false => Err(Error::Forbidden),
    }
}
