//! Authentication: passwords, tokens, revoked sessions and login rate limiting.

pub(crate) mod hasher;
mod job_queue;
pub(crate) mod list_signer;
pub(crate) mod mail_token;
pub(crate) mod password;
pub(crate) mod rate_limiter;
pub(crate) mod revocations;
pub(crate) mod token;
