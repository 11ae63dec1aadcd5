//! Log lines and metrics. Imports no other module of the crate.

pub(crate) mod labels;
pub(crate) mod log_limiter;
pub(crate) mod logging;
pub(crate) mod metrics;
