//! The JWT middleware: a bearer token becomes a signed-in user, or the request ends here, before
//! anything of its body is read.

use uuid::Uuid;

use crate::App;
use crate::auth::token::AccessClaims;
use crate::error::{Error, Refused};
use crate::request::Call;

/// Somebody with a good access token.
pub(crate) struct SignedIn {
    pub(crate) id: Uuid,
    pub(crate) session: Uuid,
}

/// Who asks (FR-001, FR-002, FR-004). The answer to a refusal, and its line in the log, are made
/// where all errors are.
pub(crate) async fn signed_in(call: &Call<'_>) -> Result<SignedIn, Error> {
    let claims = verified(call)?;
    still_good(call, claims).await
}

/// The same where the path names a user: it has to be the token's (FR-003), which is known without
/// asking the database.
pub(crate) async fn owner(call: &Call<'_>, user_id: &str) -> Result<SignedIn, Error> {
    let claims = verified(call)?;
    let mut buffer = Uuid::encode_buffer();
    if claims.user_id.hyphenated().encode_lower(&mut buffer) != user_id {
        return Err(Error::Forbidden);
    }
    still_good(call, claims).await
}

/// What the token says, if it is one of ours, has not expired and is not known to have ended.
fn verified(call: &Call<'_>) -> Result<AccessClaims, Error> {
    let token = call.bearer_token().map_err(refused)?;
    let token = token.ok_or(Error::Unauthenticated(Refused::MissingToken))?;
    let claims = call.app.tokens.verify_access(token).map_err(refused)?;
    if call.app.revocations.knows(claims.sid) {
        return Err(refused("ended_session"));
    }
    Ok(claims)
}

/// Whether its session has not ended meanwhile, anywhere.
async fn still_good(call: &Call<'_>, claims: AccessClaims) -> Result<SignedIn, Error> {
    let App {
        revocations,
        database,
        ..
    } = call.app;
    if revocations
        .has_ended(database, call.deadline, claims.sid)
        .await?
    {
        return Err(refused("ended_session"));
    }
    Ok(SignedIn {
        id: claims.user_id,
        session: claims.sid,
    })
}

fn refused(reason: &'static str) -> Error {
    Error::Unauthenticated(Refused::AccessToken(reason))
}
