//! Log lines and metrics.

pub(crate) mod labels;
pub mod logging;
pub mod metrics;
