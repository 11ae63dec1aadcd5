use std::fmt;

use jiff::Timestamp;
use jiff::fmt::StdFmtWrite;
use jiff::fmt::temporal::DateTimePrinter;
use serde::{Serialize, Serializer};

/// A time that serializes as RFC 3339 in UTC with exactly six fractional digits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Rfc3339(pub(crate) Timestamp);

const PRINTER: DateTimePrinter = DateTimePrinter::new().precision(Some(6));

impl Rfc3339 {
    /// Appends the time to a text.
    pub(super) fn write(self, text: &mut Vec<u8>) {
        // Writing to a vector cannot fail.
        PRINTER.print_timestamp(&self.0, text).ok();
    }
}

impl fmt::Display for Rfc3339 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let printed = PRINTER.print_timestamp(&self.0, StdFmtWrite(f));
        printed.map_err(|_| fmt::Error)
    }
}

impl Serialize for Rfc3339 {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}
