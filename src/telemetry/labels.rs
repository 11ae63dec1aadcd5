//! The reasons that appear in log lines and in metric labels.

/// Defines enums with a label for each variant. `LABELS` lists all labels.
macro_rules! labels {
    ($($(#[$doc:meta])* $name:ident { $($variant:ident = $label:literal,)* })*) => {$(
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub(crate) enum $name { $($variant),* }

        impl $name {
            pub(crate) const LABELS: &[&str] = &[$($label),*];

            pub(crate) fn label(self) -> &'static str {
                Self::LABELS[self as usize]
            }
        }
    )*};
}

labels! {
    /// Why an access token, a refresh token or a token from a mail was rejected.
    TokenRejection {
        MissingToken = "missing_token",
        MultipleAuthorizationHeaders = "multiple_authorization_headers",
        Oversized = "oversized_token",
        Malformed = "malformed_token",
        UnexpectedHeader = "unexpected_header",
        WrongAlgorithm = "wrong_algorithm",
        BadSignature = "bad_signature",
        MissingClaim = "missing_claim",
        ClaimsMismatch = "claims_mismatch",
        NotYetValid = "not_yet_valid",
        LifetimeTooLong = "lifetime_too_long",
        Expired = "expired_token",
        RevokedSession = "revoked_session",
        ReusedRefreshToken = "reused_refresh_token",
        NoSuchUser = "no_such_user",
        NotOwner = "not_owner",
        Superseded = "superseded_token",
    }

    /// Why a login, or the current password that a change requires, was rejected.
    LoginFailure {
        WrongPassword = "wrong_password",
        UnknownAccount = "unknown_account",
        InvalidEmail = "invalid_email",
        EmailUnverified = "email_unverified",
        PasswordChangedConcurrently = "password_changed_concurrently",
        AccountDisabled = "account_disabled",
        Throttled = "throttled",
        RateLimited = "rate_limited",
    }

    /// Why a session was revoked.
    RevocationReason {
        Logout = "logout",
        EndedByUser = "ended",
        ReusedRefreshToken = "reuse",
        PasswordChanged = "password_changed",
        AccountDeleted = "account_deleted",
        SessionLimit = "session_limit",
        PasswordReset = "password_reset",
        EmailChanged = "email_changed",
    }

    /// The result of a mail.
    MailOutcome {
        Sent = "sent",
        Rejected = "rejected",
        Deferred = "deferred",
        Unreachable = "unreachable",
        Unsupported = "unsupported",
        QueueFull = "queue_full",
        Uncounted = "database",
    }
}

/// Why an authentication failed.
#[derive(Clone, Copy)]
pub(crate) enum AuthFailure {
    Token(TokenRejection),
    Login(LoginFailure),
}

impl AuthFailure {
    pub(crate) fn label(self) -> &'static str {
        match self {
            Self::Token(reason) => reason.label(),
            Self::Login(reason) => reason.label(),
        }
    }
}
