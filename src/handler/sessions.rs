//! `/api/v1/auth/sessions`: where somebody is signed in.

use hyper::StatusCode;

use crate::db::sessions::{self, ALL_EPOCHS};
use crate::error::Error;
use crate::guard::SignedIn;
use crate::labels::RevocationCause;
use crate::model::id;
use crate::request::Call;
use crate::response::{self, Response};

/// `GET /api/v1/auth/sessions`
pub(crate) async fn list(call: &Call<'_>, user: SignedIn) -> Result<Response, Error> {
    let sessions =
        sessions::list(&call.app.database, call.deadline(), user.id, user.session).await?;
    response::json(StatusCode::OK, &sessions)
}

/// `DELETE /api/v1/auth/sessions/{id}`
pub(crate) async fn end(call: &Call<'_>, user: SignedIn, session: &str) -> Result<Response, Error> {
    let session = id(session).ok_or(Error::SessionNotFound)?;
    let database = &call.app.database;
    if !sessions::end(database, call.deadline(), user.id, session, ALL_EPOCHS).await? {
        return Err(Error::SessionNotFound);
    }
    call.app.ended(RevocationCause::EndedByUser, &[session]);
    Ok(response::no_content())
}

/// `DELETE /api/v1/auth/sessions`
pub(crate) async fn end_others(call: &Call<'_>, user: SignedIn) -> Result<Response, Error> {
    let ended =
        sessions::end_others(&call.app.database, call.deadline(), user.id, user.session).await?;
    call.app.ended(RevocationCause::EndedByUser, &ended);
    Ok(response::no_content())
}
