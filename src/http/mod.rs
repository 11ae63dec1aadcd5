//! The HTTP side: connections, routing, request parsing, handlers and responses.

pub(crate) mod body;
mod client_ip;
pub(crate) mod conditional;
mod connection_state;
mod connection_table;
pub(crate) mod context;
pub(crate) mod cors;
mod framing;
pub(crate) mod handlers;
mod json_fields;
mod large_responses;
mod list_wait;
mod middleware;
mod query;
pub(crate) mod response;
mod router;
pub(crate) mod server;
mod service;
pub(crate) mod state;
mod timeout_io;
