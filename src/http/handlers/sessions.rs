//! `/api/v1/auth/sessions`: the signed-in user's sessions.

use crate::db::sessions::{self, ALL_EPOCHS};
use crate::domain::parse_id;
use crate::error::{Error, Result};
use crate::http::context::RequestContext;
use crate::http::middleware::AuthenticatedUser;
use crate::http::response::{self, Response};
use crate::telemetry::labels::RevocationReason;

/// `GET /api/v1/auth/sessions`
pub(crate) async fn list(
    context: &RequestContext<'_>,
    user: AuthenticatedUser,
) -> Result<Response> {
    let read = || async {
        let sessions = sessions::list(context.queries(), user.id, user.session).await?;
        serde_json::to_vec(&sessions).map_err(Error::serialize)
    };
    let large_responses = &context.app.large_responses;
    let (body, permit) = large_responses
        .read(user.id, context.network(), context.deadline(), read)
        .await?;
    Ok(response::json_with_permit(body, permit))
}

/// `DELETE /api/v1/auth/sessions/{id}`
pub(crate) async fn end(
    context: &RequestContext<'_>,
    user: AuthenticatedUser,
    session: &str,
) -> Result<Response> {
    let session = parse_id(session).ok_or(Error::SessionNotFound)?;
    if !sessions::end(context.queries(), user.id, session, ALL_EPOCHS).await? {
        return Err(Error::SessionNotFound);
    }
    let reason = RevocationReason::EndedByUser;
    context.app.record_revoked(reason, &[session]);
    Ok(response::no_content())
}

/// `DELETE /api/v1/auth/sessions`
pub(crate) async fn end_others(
    context: &RequestContext<'_>,
    user: AuthenticatedUser,
) -> Result<Response> {
    let ended = sessions::end_others(context.queries(), user.id, user.session).await?;
    let reason = RevocationReason::EndedByUser;
    context.app.record_revoked(reason, &ended);
    Ok(response::no_content())
}
