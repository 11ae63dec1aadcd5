//! The promises of the service, each kept by the real program on a real PostgreSQL.
//!
//! One binary: its tests share one private PostgreSQL, and each has a database of its own there.
//! With `TEST_DATABASE_URL` they use that server instead; its user must be allowed to make databases.

// A test that cannot go on has failed; unwrap says so as well as anything.
#![allow(clippy::unwrap_used)]

mod harness;

// Coming up, staying up, going down.
mod private_postgres;
mod startup;

// What the API promises.

// Who may do what.

// Faults, overload, several instances.
