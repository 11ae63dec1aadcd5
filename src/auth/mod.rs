//! Who somebody is, and for how long: tokens, passwords, sessions that ended, brakes.

pub(crate) mod password;
pub(crate) mod revocations;
pub(crate) mod throttle;
pub(crate) mod token;
