//! Who somebody is, and for how long: tokens, passwords, sessions that ended, brakes.

pub(crate) mod login_limits;
pub(crate) mod password;
pub(crate) mod revocations;
pub(crate) mod token;
