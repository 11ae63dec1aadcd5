//! What can go wrong, as clients read it (RFC 9457) and as the log tells it.

use std::borrow::Cow;

use serde::Serialize;

use crate::db::{DbError, error_message};
use crate::domain::ValidationError;
use crate::telemetry::labels::{AuthFailure, LoginFailure, TokenRejection};

/// What a kind of problem is, for its clients and for its page under `/problems/`.
pub(crate) struct ProblemType {
    /// Its name in the contract.
    pub(crate) code: &'static str,
    /// The HTTP status that it comes with.
    pub(crate) status: u16,
    /// A title for people.
    pub(crate) title: &'static str,
    /// What it means.
    pub(crate) meaning: &'static str,
    /// What a client does about it.
    pub(crate) advice: &'static str,
}

macro_rules! problems {
    ($($name:ident = $status:literal $code:literal $title:literal $meaning:literal $advice:literal;)*) => {
        /// Every kind of problem that the service answers with.
        pub(crate) const PROBLEMS: &[&ProblemType] = &[$(&$name),*];
        $(const $name: ProblemType = ProblemType {
            code: $code, status: $status, title: $title, meaning: $meaning, advice: $advice,
        };)*
    };
}

problems! {
    MALFORMED_JSON = 400 "malformed_json" "Malformed JSON"
        "The body is missing, or is not JSON in UTF-8."
        "Send one JSON object. Sending the same bytes again gives the same answer.";
    MALFORMED_REQUEST = 400 "malformed_request" "Malformed request"
        "A part of the request outside its body breaks the rules of HTTP or of this API: the Host, a header, the way the body is framed."
        "Mend what the detail names. Sending the same bytes again gives the same answer.";
    MISSING_TOKEN = 401 "missing_token" "Sign in first"
        "This needs an access token and the request has none."
        "Sign in and send the header “Authorization: Bearer …” with the access token.";
    INVALID_TOKEN = 401 "invalid_token" "Access token not accepted"
        "The access token has expired, was altered, or belongs to a session that has ended."
        "Refresh once with the refresh token and try again; if that is refused too, sign in.";
    INVALID_CREDENTIALS = 401 "invalid_credentials" "Wrong e-mail or password"
        "There is no account with this e-mail address and this password. The answer is the same whether or not the address is known."
        "Ask for both again. After ten wrong attempts in a row the account rests for a while.";
    INVALID_REFRESH_TOKEN = 401 "invalid_refresh_token" "Refresh token not accepted"
        "The refresh token has expired, was used before, was altered, or belongs to a session that has ended."
        "Sign in again.";
    FORBIDDEN = 403 "forbidden" "Not yours"
        "The user in the path is not the one who is signed in."
        "Use the id of the signed-in user. A new token does not help.";
    WRONG_PASSWORD = 403 "wrong_password" "Wrong password"
        "The password that confirms this change is not the account's."
        "Ask for the password again. Nothing was changed.";
    REGISTRATION_CLOSED = 403 "registration_closed" "Registration is closed"
        "The operator of this service takes no new accounts."
        "Ask the operator for an account.";
    NOT_FOUND = 404 "not_found" "No such page"
        "No route of this API has this path."
        "Look the path up in the documentation.";
    TASK_NOT_FOUND = 404 "task_not_found" "No such task"
        "You have no task with this id: it was deleted, or never was yours."
        "Load the list again.";
    SESSION_NOT_FOUND = 404 "session_not_found" "No such session"
        "You have no session with this id: it has ended, or never was yours."
        "Load the list again.";
    METHOD_NOT_ALLOWED = 405 "method_not_allowed" "Method not allowed"
        "The path exists, but not with this method."
        "The header Allow names the methods that it takes.";
    REQUEST_TIMEOUT = 408 "request_timeout" "The request came too slowly"
        "The body did not arrive within 20 seconds."
        "Try again on a better connection. Nothing was changed.";
    EMAIL_TAKEN = 409 "email_taken" "E-mail address taken"
        "There is an account with this e-mail address already."
        "Sign in instead, or register with another address.";
    PRECONDITION_FAILED = 412 "precondition_failed" "Precondition failed"
        "The task is not in a version that If-Match lists, or is in one that If-None-Match lists. Nothing was changed."
        "Read the task again, apply the change to what it is now, and send it with the new ETag. A weak ETag (W/…) never matches If-Match.";
    BODY_TOO_LARGE = 413 "body_too_large" "Body too large"
        "The body has more than 16 KiB."
        "Send less. The longest task fits many times over.";
    UNSUPPORTED_MEDIA_TYPE = 415 "unsupported_media_type" "Unsupported media type"
        "The body is declared to be something other than JSON, or is compressed."
        "Send “Content-Type: application/json” and no Content-Encoding; PATCH also takes application/merge-patch+json.";
    VALIDATION_FAILED = 422 "validation_failed" "Validation failed"
        "The request was understood, but values in it break a rule."
        "“errors” names each fault with a JSON pointer or the query parameter. Mend them all and send again.";
    IDEMPOTENCY_KEY_REUSED = 422 "idempotency_key_reused" "Idempotency key reused"
        "This Idempotency-Key was used within the last 24 hours for a task with other values."
        "Use a new key for a new task, and the same key only to repeat the very same request.";
    TOO_MANY_ATTEMPTS = 429 "too_many_attempts" "Too many attempts"
        "There were too many wrong passwords for one account from your network, or too many requests to sign in from it."
        "Wait for the seconds that Retry-After gives; nothing is checked before.";
    INTERNAL = 500 "internal" "Internal error"
        "A bug in the service, or a change that the database did not confirm. The operator finds it in the log under the request id."
        "Report the request id. Read before you repeat a change; with an Idempotency-Key repeating is safe.";
    DATABASE_UNAVAILABLE = 503 "database_unavailable" "Database unavailable"
        "The service cannot reach its database just now."
        "Repeat after the seconds that Retry-After gives; creating is safe to repeat with the same Idempotency-Key.";
    OVERLOADED = 503 "overloaded" "Overloaded"
        "There is more work than the service can do in good time, and it refuses some rather than keep everybody waiting. Nothing was changed."
        "Repeat after the seconds that Retry-After gives, and less often.";
    STOPPING = 503 "stopping" "Stopping"
        "This instance is shutting down. Nothing was changed."
        "Repeat; another instance, or this one restarted, will answer.";
}

/// The kind of problem with this code.
pub(crate) fn problem(code: &str) -> Option<&'static ProblemType> {
    PROBLEMS
        .iter()
        .copied()
        .find(|problem| problem.code == code)
}

/// One fault of a request, with the place it is at.
#[derive(Debug, Serialize)]
pub(crate) struct FieldError {
    #[serde(flatten)]
    location: ErrorLocation,
    code: &'static str,
    detail: Cow<'static, str>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "lowercase")]
enum ErrorLocation {
    /// A JSON pointer (RFC 6901) into the body.
    Pointer(&'static str),
    /// The name of a query parameter.
    Parameter(&'static str),
}

impl FieldError {
    /// A fault in the body; `pointer` is a JSON pointer like `/title`.
    pub(crate) fn at(
        pointer: &'static str,
        code: &'static str,
        detail: impl Into<Cow<'static, str>>,
    ) -> Self {
        Self {
            location: ErrorLocation::Pointer(pointer),
            code,
            detail: detail.into(),
        }
    }

    /// The sentence for people.
    pub(crate) fn detail(&self) -> &str {
        &self.detail
    }

    /// A value of the body that the model refused.
    pub(crate) fn refused(pointer: &'static str, refusal: ValidationError) -> Self {
        Self::at(pointer, refusal.code, refusal.detail)
    }

    /// A fault in the query.
    pub(crate) fn parameter(name: &'static str, code: &'static str, detail: &'static str) -> Self {
        Self {
            location: ErrorLocation::Parameter(name),
            code,
            detail: detail.into(),
        }
    }
}

/// Everything that a request can end with instead of what it asked for.
#[derive(Debug)]
pub(crate) enum Error {
    /// The body is not JSON; the text says where it stops being it.
    MalformedJson(String),
    /// Something before the body breaks a rule.
    MalformedRequest(&'static str),
    /// Somebody was not let in, for a reason that goes to the log alone.
    Unauthenticated(AuthError),
    /// The path's user is not the token's.
    Forbidden,
    /// The password that confirms a change is wrong.
    WrongPassword,
    /// The operator takes no new accounts.
    RegistrationClosed,
    /// No such route.
    NotFound,
    /// No such task of this user.
    TaskNotFound,
    /// No such session of this user.
    SessionNotFound,
    /// The route takes these methods.
    MethodNotAllowed(&'static str),
    /// The body did not arrive in time.
    RequestTimeout,
    /// The address has an account.
    EmailTaken,
    /// If-Match or If-None-Match does not hold for the task.
    PreconditionFailed,
    /// The body is larger than the bound.
    BodyTooLarge,
    /// The body is of a kind that is not read.
    UnsupportedMediaType {
        body: UnsupportedBody,
        /// PATCH takes one type more.
        is_patch: bool,
    },
    /// Every fault of the request.
    Validation(Vec<FieldError>),
    /// The key was used with other values.
    IdempotencyKeyReused,
    /// Try again after so many seconds; who braked is for the log.
    TooManyAttempts {
        /// Whole seconds, at least 1.
        retry_after: u64,
        /// Of the account or of the address.
        reason: LoginFailure,
    },
    /// A bug; the text is for the log.
    Internal(String),
    /// The database does not answer; the text is for the log.
    DatabaseUnavailable(String),
    /// The database did not confirm a change that is not safe to repeat; the text is for the log.
    OutcomeUnknown(String),
    /// More work than can be done in good time.
    Overloaded,
    /// The service is shutting down.
    Stopping,
}

/// Why somebody was not let in. The client learns the kind of token alone.
#[derive(Debug)]
pub(crate) enum AuthError {
    /// No bearer token.
    MissingToken,
    /// A bearer token that is no good: the reason.
    AccessToken(TokenRejection),
    /// A refresh token that is no good: the reason.
    RefreshToken(TokenRejection),
    /// A wrong password or no such account: the reason.
    Credentials(LoginFailure),
}

/// Why a body is not read.
#[derive(Clone, Copy, Debug)]
pub(crate) enum UnsupportedBody {
    Compressed,
    NotJson,
    /// Without a type, from a page of another origin.
    Untyped,
}

impl UnsupportedBody {
    fn detail(self) -> &'static str {
        match self {
            Self::Compressed => "The body is compressed. Send it without Content-Encoding.",
            Self::NotJson => "The body is declared to be something other than JSON.",
            Self::Untyped => {
                "A body from a page of another origin needs “Content-Type: application/json”."
            }
        }
    }
}

impl Error {
    /// The kind of problem that the client is told.
    pub(crate) fn problem(&self) -> &'static ProblemType {
        match self {
            Self::MalformedJson(_) => &MALFORMED_JSON,
            Self::MalformedRequest(_) => &MALFORMED_REQUEST,
            Self::Unauthenticated(AuthError::MissingToken) => &MISSING_TOKEN,
            Self::Unauthenticated(AuthError::AccessToken(_)) => &INVALID_TOKEN,
            Self::Unauthenticated(AuthError::RefreshToken(_)) => &INVALID_REFRESH_TOKEN,
            Self::Unauthenticated(AuthError::Credentials(_)) => &INVALID_CREDENTIALS,
            Self::Forbidden => &FORBIDDEN,
            Self::WrongPassword => &WRONG_PASSWORD,
            Self::RegistrationClosed => &REGISTRATION_CLOSED,
            Self::NotFound => &NOT_FOUND,
            Self::TaskNotFound => &TASK_NOT_FOUND,
            Self::SessionNotFound => &SESSION_NOT_FOUND,
            Self::MethodNotAllowed(_) => &METHOD_NOT_ALLOWED,
            Self::RequestTimeout => &REQUEST_TIMEOUT,
            Self::EmailTaken => &EMAIL_TAKEN,
            Self::PreconditionFailed => &PRECONDITION_FAILED,
            Self::BodyTooLarge => &BODY_TOO_LARGE,
            Self::UnsupportedMediaType { .. } => &UNSUPPORTED_MEDIA_TYPE,
            Self::Validation(_) => &VALIDATION_FAILED,
            Self::IdempotencyKeyReused => &IDEMPOTENCY_KEY_REUSED,
            Self::TooManyAttempts { .. } => &TOO_MANY_ATTEMPTS,
            Self::Internal(_) | Self::OutcomeUnknown(_) => &INTERNAL,
            Self::DatabaseUnavailable(_) => &DATABASE_UNAVAILABLE,
            Self::Overloaded => &OVERLOADED,
            Self::Stopping => &STOPPING,
        }
    }

    /// What the client reads of this very case.
    pub(crate) fn detail(&self) -> Cow<'static, str> {
        match self {
            Self::MalformedJson(detail) => detail.clone().into(),
            Self::MalformedRequest(detail) => (*detail).into(),
            Self::UnsupportedMediaType { body, .. } => body.detail().into(),
            Self::Validation(errors) => {
                let details: Vec<&str> = errors.iter().map(|fault| fault.detail.as_ref()).collect();
                details.join("; ").into()
            }
            Self::TooManyAttempts { retry_after, .. } => {
                format!("too many attempts; try again in {retry_after} seconds").into()
            }
            Self::OutcomeUnknown(_) => {
                "the connection to the database was lost: the change may or may not have been made. \
                 Read before you repeat it."
                    .into()
            }
            other => other.problem().meaning.into(),
        }
    }

    /// The failure of a change that happens once more with each repetition: 503 promises that the
    /// request is safe to repeat, which this is not once it may have been executed.
    pub(crate) fn of_unrepeatable(error: DbError) -> Self {
        match error {
            DbError::ConnectionLost(reason) => Self::OutcomeUnknown(reason),
            other => other.into(),
        }
    }

    /// The faults, for a 422.
    pub(crate) fn errors(&self) -> &[FieldError] {
        match self {
            Self::Validation(errors) => errors,
            _ => &[],
        }
    }

    /// Seconds after which trying again makes sense.
    pub(crate) fn retry_after(&self) -> Option<u64> {
        match self {
            Self::TooManyAttempts { retry_after, .. } => Some(*retry_after),
            Self::DatabaseUnavailable(_) | Self::Overloaded | Self::Stopping => Some(1),
            _ => None,
        }
    }

    /// The reason of a failed authentication, for its WARN line and the metrics.
    pub(crate) fn authentication_failure(&self) -> Option<AuthFailure> {
        let token = |reason| Some(AuthFailure::Token(reason));
        let login = |reason| Some(AuthFailure::Login(reason));
        match self {
            Self::Unauthenticated(AuthError::MissingToken) => token(TokenRejection::MissingToken),
            Self::Unauthenticated(
                AuthError::AccessToken(reason) | AuthError::RefreshToken(reason),
            ) => token(*reason),
            Self::Forbidden => token(TokenRejection::NotOwner),
            Self::Unauthenticated(AuthError::Credentials(reason))
            | Self::TooManyAttempts { reason, .. } => login(*reason),
            Self::WrongPassword => login(LoginFailure::WrongPassword),
            _ => None,
        }
    }
}

impl From<DbError> for Error {
    fn from(error: DbError) -> Self {
        match error {
            DbError::Transient(reason)
            | DbError::ConnectionLost(reason)
            | DbError::Unavailable(reason) => Self::DatabaseUnavailable(reason),
            DbError::Overloaded => Self::Overloaded,
            DbError::Refused(reason) => Self::Internal(error_message(&reason)),
        }
    }
}
