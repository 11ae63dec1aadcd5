//! The types of problems (RFC 9457) that the service reports: their codes, statuses, and texts for
//! clients.

/// A type of problem. Each has a page at `/problems/{code}`.
pub(crate) struct ProblemType {
    /// Identifies the problem to programs.
    pub(crate) code: &'static str,
    pub(crate) status: u16,
    pub(crate) title: &'static str,
    /// What went wrong.
    pub(crate) meaning: &'static str,
    /// What the client should do.
    pub(crate) advice: &'static str,
}

/// Returns the type of problem with this code.
pub(crate) fn find_problem(code: &str) -> Option<&'static ProblemType> {
    let mut problems = PROBLEMS.iter().copied();
    problems.find(|problem| problem.code == code)
}

macro_rules! problems {
    ($($name:ident = $status:literal $code:literal $title:literal $meaning:literal $advice:literal;)*) => {
        const PROBLEMS: &[&ProblemType] = &[$(&$name),*];
        $(pub(crate) const $name: ProblemType = ProblemType {
            code: $code, status: $status, title: $title, meaning: $meaning, advice: $advice,
        };)*
    };
}

problems! {
    MALFORMED_JSON = 400 "malformed_json" "Malformed JSON"
        "The body is missing or is not valid JSON in UTF-8."
        "Send a single JSON object. Sending the same body again fails in the same way.";
    MALFORMED_REQUEST = 400 "malformed_request" "Malformed request"
        "Something other than the JSON violates the rules of HTTP or of this API, such as the Host header, another header, or the framing of the body."
        "Fix the problem that “detail” describes. Sending the same request again fails in the same way.";
    MISSING_TOKEN = 401 "missing_token" "Authentication required"
        "This endpoint requires an access token, and the request has none."
        "Sign in, then send the access token in the header “Authorization: Bearer …”.";
    INVALID_TOKEN = 401 "invalid_token" "Invalid access token"
        "The access token has expired, has been modified, or belongs to a session that has ended."
        "Get new tokens with the refresh token and retry once. If that fails as well, ask the user to sign in.";
    INVALID_CREDENTIALS = 401 "invalid_credentials" "Wrong e-mail address or password"
        "No account has this e-mail address and password. The response is the same whether or not the address is registered."
        "Ask the user to enter both again. After ten wrong attempts in a row, the account is locked for your network for a while.";
    INVALID_REFRESH_TOKEN = 401 "invalid_refresh_token" "Invalid refresh token"
        "The refresh token has expired, has already been used, has been modified, or belongs to a session that has ended."
        "Ask the user to sign in again.";
    INVALID_MAIL_TOKEN = 401 "invalid_mail_token" "Invalid link"
        "The token from the mail has expired or has been modified, or the password or the address has changed since it was sent. A link that resets the password works once."
        "Ask the user to request a new mail.";
    FORBIDDEN = 403 "forbidden" "Forbidden"
        "The user ID in the path is not the ID of the signed-in user."
        "Use the ID of the signed-in user. Getting a new token does not help.";
    WRONG_PASSWORD = 403 "wrong_password" "Wrong password"
        "The password that confirms this change is wrong. Nothing was changed."
        "Ask the user to enter the password again.";
    ACCOUNT_DISABLED = 403 "account_disabled" "Account disabled"
        "The password is right, but the operator of this service has disabled the account."
        "Tell the user to contact the operator. Trying again does not help.";
    EMAIL_UNVERIFIED = 403 "email_unverified" "E-mail address not verified"
        "The password is right, but this service requires a verified e-mail address."
        "Ask the user to open the link in the mail, or request another one with “POST /api/v1/auth/email/resend”.";
    REGISTRATION_CLOSED = 403 "registration_closed" "Registration is closed"
        "The operator of this service does not accept new accounts."
        "Ask the operator for an account.";
    QUOTA_EXCEEDED = 403 "quota_exceeded" "Quota exceeded"
        "You have the maximum number of tasks. Nothing was created."
        "Delete tasks that you no longer need, for example the completed ones.";
    NOT_FOUND = 404 "not_found" "Not found"
        "This path does not exist."
        "Look up the path in the API documentation.";
    TASK_NOT_FOUND = 404 "task_not_found" "Task not found"
        "You have no task with this ID. It may have been deleted."
        "Load the list of tasks again.";
    SESSION_NOT_FOUND = 404 "session_not_found" "Session not found"
        "You have no session with this ID. It may have ended."
        "Load the list of sessions again.";
    METHOD_NOT_ALLOWED = 405 "method_not_allowed" "Method not allowed"
        "This path does not support the request method."
        "Use one of the methods that the Allow header lists.";
    REQUEST_TIMEOUT = 408 "request_timeout" "Request timeout"
        "The body did not arrive within 20 seconds. Nothing was changed."
        "Retry, if possible over a faster connection.";
    EMAIL_TAKEN = 409 "email_taken" "E-mail address taken"
        "An account with this e-mail address already exists."
        "Sign in instead, or register with another address.";
    CURSOR_EXPIRED = 410 "cursor_expired" "Cursor expired"
        "Changes since this cursor are no longer available: the cursor is more than 30 days old, from before a restore of the database, or from another account."
        "Discard your copy of the list and load everything again, without “since”.";
    PRECONDITION_FAILED = 412 "precondition_failed" "Precondition failed"
        "The current version of the task is not listed in If-Match, or is listed in If-None-Match; or a task with the new ID exists or was deleted. Nothing was changed."
        "Fetch the task, apply your change to its current version, and retry with the new ETag. A weak ETag (W/…) never matches If-Match.";
    BODY_TOO_LARGE = 413 "body_too_large" "Body too large"
        "The body is larger than 16 KiB."
        "Send a smaller body. Every valid task fits within this limit.";
    UNSUPPORTED_MEDIA_TYPE = 415 "unsupported_media_type" "Unsupported media type"
        "The body is compressed, or its Content-Type is not JSON."
        "Send “Content-Type: application/json” and no Content-Encoding. PATCH also accepts application/merge-patch+json.";
    VALIDATION_FAILED = 422 "validation_failed" "Validation failed"
        "The request is well-formed, but some of its values are invalid."
        "“errors” lists every invalid field by its JSON pointer, and every invalid query parameter by its name. Fix them all and retry.";
    IDEMPOTENCY_KEY_REUSED = 422 "idempotency_key_reused" "Idempotency key reused"
        "This Idempotency-Key was used within the last 24 hours for a task with different values."
        "Use a new key for each new task. Reuse a key only to retry the same request.";
    TOO_MANY_ATTEMPTS = 429 "too_many_attempts" "Too many attempts"
        "Too many wrong passwords were entered for one account, too many sign-in requests came from your network, or the address of one account was changed too often."
        "Wait for the number of seconds in the Retry-After header. Until then, attempts are rejected without being checked.";
    TOO_MANY_REQUESTS = 429 "too_many_requests" "Too many requests"
        "You change tasks faster than the limit for one user allows. Nothing was changed."
        "Wait for the number of seconds in the Retry-After header, and send changes less often.";
    INTERNAL = 500 "internal" "Internal error"
        "There is a bug in the service, or the database did not confirm a change. The operator can find the cause in the log by the request ID."
        "Report the request ID. Before you repeat a change, check whether it was made. Repeating it with the same Idempotency-Key is safe.";
    DATABASE_UNAVAILABLE = 503 "database_unavailable" "Database unavailable"
        "The service cannot reach its database at the moment."
        "Retry after the number of seconds in the Retry-After header. Creating a task is safe to retry with the same Idempotency-Key.";
    OVERLOADED = 503 "overloaded" "Overloaded"
        "The service has more requests than it can handle in time, and rejected this one. Nothing was changed."
        "Retry after the number of seconds in the Retry-After header, and send requests less often.";
    STOPPING = 503 "stopping" "Shutting down"
        "This instance is shutting down. Nothing was changed."
        "Retry. Another instance, or this one after its restart, will handle the request.";
}
