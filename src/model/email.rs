use std::fmt;

use super::Refusal;

/// An e-mail address, trimmed and in lower case: compared and stored as it is.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Email(String);

impl Email {
    /// RFC 5321 section 4.5.3.1.3 bounds a path at 256 bytes with its angle brackets.
    const MAX_BYTES: usize = 254;

    /// Takes one `@` with something on both sides, no white space and no control characters.
    pub(crate) fn parse(text: &str) -> Result<Self, Refusal> {
        let address = text.trim().to_lowercase();
        if address.len() > Self::MAX_BYTES {
            return Err(Refusal::new(
                "too_long",
                "email must have at most 254 bytes",
            ));
        }
        let well_formed = matches!(address.split_once('@'),
            Some((local, domain)) if !local.is_empty() && !domain.is_empty() && !domain.contains('@'));
        if !well_formed || address.chars().any(|c| c.is_whitespace() || c.is_control()) {
            return Err(Refusal::new(
                "invalid_email",
                "email must be an address like ann@example.com",
            ));
        }
        Ok(Self(address))
    }

    /// The address as it is stored.
    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Email {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_trimmed_and_lowered() {
        assert_eq!(
            Email::parse("  Ann@Example.COM\t").unwrap().as_str(),
            "ann@example.com"
        );
    }

    #[test]
    fn what_is_no_address_is_refused() {
        for text in [
            "",
            "@",
            "a@",
            "@b",
            "a",
            "a@b@c",
            "a b@c",
            "a@b\u{0}c",
            "a\u{7f}@b",
            "a@b\u{2003}c",
        ] {
            assert!(Email::parse(text).is_err(), "{text:?}");
        }
    }

    #[test]
    fn the_bound_is_in_bytes_and_after_lowering() {
        let fits = format!("{}@b", "a".repeat(252));
        assert!(Email::parse(&fits).is_ok());
        assert!(Email::parse(&format!("a{fits}")).is_err());
        assert!(Email::parse(&format!("{}@b", "é".repeat(127))).is_err());
    }
}
