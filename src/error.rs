//! Errors that end a request: their responses and their log fields.

use std::borrow::Cow;

use jiff::Timestamp;
use serde::Serialize;

use crate::db::{DbError, error_message};
use crate::problem::{self, ProblemType};
use crate::telemetry::labels::{AuthFailure, LoginFailure, TokenRejection};

/// An invalid field of the body, or an invalid query parameter.
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
    /// An invalid field; `pointer` is a JSON pointer such as `/title`.
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

    pub(crate) fn parameter(name: &'static str, code: &'static str, detail: &'static str) -> Self {
        Self {
            location: ErrorLocation::Parameter(name),
            code,
            detail: detail.into(),
        }
    }

    pub(crate) fn detail(&self) -> &str {
        &self.detail
    }
}

/// The result of processing part of a request.
pub(crate) type Result<T, E = Error> = std::result::Result<T, E>;

/// An error that ends a request.
#[derive(Debug)]
pub(crate) enum Error {
    /// The body is missing or not JSON. The text says where parsing failed.
    MalformedJson(String),
    /// A part of the request other than its JSON is malformed.
    MalformedRequest(&'static str),
    MissingToken,
    /// The bearer token was rejected. The reason is only logged.
    InvalidToken(TokenRejection),
    /// The refresh token was rejected. The reason is only logged.
    InvalidRefreshToken(TokenRejection),
    /// The token from a mail was rejected. The reason is only logged.
    InvalidMailToken(TokenRejection),
    /// A login failed. The reason is only logged.
    InvalidCredentials(LoginFailure),
    /// The user in the path is not the user of the token.
    Forbidden,
    WrongPassword,
    /// The password is right, but an operator disabled the account.
    AccountDisabled,
    /// The password is right, but the address has to be verified first.
    EmailUnverified,
    RegistrationClosed,
    NotFound,
    TaskNotFound,
    SessionNotFound,
    /// The route supports only these methods.
    MethodNotAllowed(&'static str),
    RequestTimeout,
    EmailTaken,
    /// The cursor of the changes is too old, or from before a restore of the database.
    CursorExpired,
    /// The condition in `If-Match` or `If-None-Match` is not met.
    PreconditionFailed,
    /// The ID that the client chose belongs to a task of this version, or to a deleted task
    /// (`None`).
    IdTaken(Option<Timestamp>),
    BodyTooLarge,
    UnsupportedMediaType {
        body: UnsupportedBody,
        /// Whether the request is a PATCH, which supports one more media type.
        is_patch: bool,
    },
    /// The invalid fields or parameters of the request.
    Validation(Vec<FieldError>),
    IdempotencyKeyReused,
    TooManyAttempts {
        /// Seconds, at least 1.
        retry_after: u64,
        /// Whether the account or the network is rate limited; only logged.
        reason: LoginFailure,
    },
    /// The user changes tasks too fast.
    TooManyRequests {
        /// Seconds, at least 1.
        retry_after: u64,
    },
    /// The user has the maximum number of tasks.
    QuotaExceeded,
    /// A bug. The cause is only logged.
    Internal(String),
    /// The database is unreachable. The cause is only logged.
    DatabaseUnavailable(String),
    /// The connection was lost before the database confirmed a change that is not idempotent. The
    /// cause is only logged.
    OutcomeUnknown(String),
    /// The service has more work than it can finish in time.
    Overloaded,
    Stopping,
}

/// Why a body is rejected without being read.
#[derive(Clone, Copy, Debug)]
pub(crate) enum UnsupportedBody {
    Compressed,
    NotJson,
    /// It has no media type and was sent by a page of another origin.
    Untyped,
}

impl UnsupportedBody {
    fn detail(self) -> &'static str {
        match self {
            Self::Compressed => "The body is compressed. Send it without Content-Encoding.",
            Self::NotJson => "The Content-Type of the body is not JSON.",
            Self::Untyped => {
                "Requests from other origins must declare “Content-Type: application/json”."
            }
        }
    }
}

impl Error {
    /// The problem type reported to the client.
    pub(crate) fn problem(&self) -> &'static ProblemType {
        match self {
            Self::MalformedJson(_) => &problem::MALFORMED_JSON,
            Self::MalformedRequest(_) => &problem::MALFORMED_REQUEST,
            Self::MissingToken => &problem::MISSING_TOKEN,
            Self::InvalidToken(_) => &problem::INVALID_TOKEN,
            Self::InvalidRefreshToken(_) => &problem::INVALID_REFRESH_TOKEN,
            Self::InvalidMailToken(_) => &problem::INVALID_MAIL_TOKEN,
            Self::InvalidCredentials(_) => &problem::INVALID_CREDENTIALS,
            Self::Forbidden => &problem::FORBIDDEN,
            Self::WrongPassword => &problem::WRONG_PASSWORD,
            Self::AccountDisabled => &problem::ACCOUNT_DISABLED,
            Self::EmailUnverified => &problem::EMAIL_UNVERIFIED,
            Self::RegistrationClosed => &problem::REGISTRATION_CLOSED,
            Self::NotFound => &problem::NOT_FOUND,
            Self::TaskNotFound => &problem::TASK_NOT_FOUND,
            Self::SessionNotFound => &problem::SESSION_NOT_FOUND,
            Self::MethodNotAllowed(_) => &problem::METHOD_NOT_ALLOWED,
            Self::RequestTimeout => &problem::REQUEST_TIMEOUT,
            Self::EmailTaken => &problem::EMAIL_TAKEN,
            Self::CursorExpired => &problem::CURSOR_EXPIRED,
            Self::PreconditionFailed | Self::IdTaken(_) => &problem::PRECONDITION_FAILED,
            Self::BodyTooLarge => &problem::BODY_TOO_LARGE,
            Self::UnsupportedMediaType { .. } => &problem::UNSUPPORTED_MEDIA_TYPE,
            Self::Validation(_) => &problem::VALIDATION_FAILED,
            Self::IdempotencyKeyReused => &problem::IDEMPOTENCY_KEY_REUSED,
            Self::TooManyAttempts { .. } => &problem::TOO_MANY_ATTEMPTS,
            Self::TooManyRequests { .. } => &problem::TOO_MANY_REQUESTS,
            Self::QuotaExceeded => &problem::QUOTA_EXCEEDED,
            Self::Internal(_) | Self::OutcomeUnknown(_) => &problem::INTERNAL,
            Self::DatabaseUnavailable(_) => &problem::DATABASE_UNAVAILABLE,
            Self::Overloaded => &problem::OVERLOADED,
            Self::Stopping => &problem::STOPPING,
        }
    }

    /// The details of this error, for the client.
    pub(crate) fn detail(&self) -> Cow<'static, str> {
        match self {
            Self::MalformedJson(detail) => detail.clone().into(),
            Self::MalformedRequest(detail) => (*detail).into(),
            Self::UnsupportedMediaType { body, .. } => body.detail().into(),
            Self::Validation(errors) => {
                let details: Vec<&str> = errors.iter().map(FieldError::detail).collect();
                details.join("; ").into()
            }
            Self::TooManyAttempts { retry_after, .. } => {
                format!("too many attempts; try again in {retry_after} seconds").into()
            }
            Self::OutcomeUnknown(_) => {
                "the connection to the database was lost, so the change may or may not have been \
                 made; check before you repeat it"
                    .into()
            }
            other => other.problem().meaning.into(),
        }
    }

    /// Converts the error of a write that is not idempotent. A 503 promises that the request is
    /// safe to retry, so an unknown outcome must not become one.
    pub(crate) fn from_non_idempotent(error: DbError) -> Self {
        match error {
            DbError::ConnectionLost(reason) => Self::OutcomeUnknown(reason),
            other => other.into(),
        }
    }

    /// Converts a failure to serialize a response.
    pub(crate) fn serialize(error: serde_json::Error) -> Self {
        Self::Internal(format!("cannot serialize the response: {error}"))
    }

    /// The invalid fields of a 422 response.
    pub(crate) fn errors(&self) -> &[FieldError] {
        match self {
            Self::Validation(errors) => errors,
            _ => &[],
        }
    }

    /// The number of seconds after which the client should retry.
    pub(crate) fn retry_after(&self) -> Option<u64> {
        match self {
            Self::TooManyAttempts { retry_after, .. } | Self::TooManyRequests { retry_after } => {
                Some(*retry_after)
            }
            Self::DatabaseUnavailable(_) | Self::Overloaded | Self::Stopping => Some(1),
            _ => None,
        }
    }

    /// The reason why authentication failed, for the log and the metrics.
    pub(crate) fn authentication_failure(&self) -> Option<AuthFailure> {
        match self {
            Self::MissingToken => Some(AuthFailure::Token(TokenRejection::MissingToken)),
            Self::InvalidToken(reason)
            | Self::InvalidRefreshToken(reason)
            | Self::InvalidMailToken(reason) => Some(AuthFailure::Token(*reason)),
            Self::Forbidden => Some(AuthFailure::Token(TokenRejection::NotOwner)),
            Self::InvalidCredentials(reason) | Self::TooManyAttempts { reason, .. } => {
                Some(AuthFailure::Login(*reason))
            }
            Self::EmailUnverified => Some(AuthFailure::Login(LoginFailure::EmailUnverified)),
            Self::WrongPassword => Some(AuthFailure::Login(LoginFailure::WrongPassword)),
            Self::AccountDisabled => Some(AuthFailure::Login(LoginFailure::AccountDisabled)),
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
