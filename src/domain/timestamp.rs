use jiff::Timestamp;
use jiff::fmt::temporal::DateTimePrinter;
use serde::{Serialize, Serializer};

/// A time that serializes as RFC 3339 in UTC with exactly six fractional digits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Rfc3339(pub(crate) Timestamp);

impl Serialize for Rfc3339 {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        const PRINTER: DateTimePrinter = DateTimePrinter::new().precision(Some(6));
        serializer.serialize_str(&PRINTER.timestamp_to_string(&self.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn always_has_six_fractional_digits() {
        for (nanos, text) in [
            (0, ".000000Z\""),
            (120_000_000, ".120000Z\""),
            (123_456_789, ".123456Z\""),
        ] {
            let time = Rfc3339(Timestamp::new(1_770_283_800, nanos).unwrap());
            let json = serde_json::to_string(&time).unwrap();
            assert_eq!(json, format!("\"2026-02-05T09:30:00{text}"));
        }
    }
}
