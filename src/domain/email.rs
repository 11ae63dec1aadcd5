use std::fmt;
use std::sync::LazyLock;

use regex::Regex;
use unicode_normalization::UnicodeNormalization;

use super::ValidationError;

/// White space, control and invisible characters.
static FORBIDDEN: LazyLock<Regex> = LazyLock::new(|| {
    Regex::new(r"[\p{White_Space}\x00-\x1F\x7F-\x9F\p{Default_Ignorable_Code_Point}]")
        .expect("the pattern is valid")
});

/// An e-mail address, trimmed, in NFC and case-folded. Equal addresses have equal text.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Email(String);

impl Email {
    /// RFC 5321, section 4.5.3.1.3, allows 256 bytes including the angle brackets.
    const MAX_BYTES: usize = 254;

    /// Parses and normalizes an address. Requires exactly one `@` with text on both sides, and no
    /// forbidden characters.
    pub(crate) fn parse(text: &str) -> Result<Self, ValidationError> {
        // Normalized again, because case folding can denormalize a text.
        let address: String = text.trim().nfc().flat_map(fold_case).nfc().collect();
        if address.len() > Self::MAX_BYTES {
            return Err(ValidationError::new(
                "too_long",
                "email must have at most 254 bytes",
            ));
        }
        let well_formed = matches!(address.split_once('@'),
            Some((local, domain)) if !local.is_empty() && !domain.is_empty() && !domain.contains('@'));
        if !well_formed || FORBIDDEN.is_match(&address) {
            return Err(ValidationError::new(
                "invalid_email",
                "email must be an address like ann@example.com, without spaces or invisible characters",
            ));
        }
        Ok(Self(address))
    }

    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }
}

/// Unicode's simple case folding: the lower case of the upper case, so that `σ` equals `ς` and `s`
/// equals `ſ`. Letters whose upper case is several letters, such as `ß`, are only lowercased, and so
/// is the Turkish `ı`.
fn fold_case(c: char) -> impl Iterator<Item = char> {
    let mut upper = c.to_uppercase();
    match (upper.next(), upper.next()) {
        (Some(upper), None) if c != 'ı' => upper.to_lowercase(),
        _ => c.to_lowercase(),
    }
}

impl fmt::Display for Email {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn ignores_case() {
        let parse = |local: &str| Email::parse(&format!("{local}@b")).unwrap();
        for same in [
            &["ς.ς", "Σ.Σ", "σ.σ"][..],
            &["ſ\u{307}k", "ẛ\u{212a}", "Ṡk", "s\u{307}K"],
            &["µ\u{212b}ϐ", "Μåβ", "μa\u{30a}Β"],
            &["İ", "i\u{307}", "I\u{307}"],
            &["\u{1fb3}", "\u{1fbc}", "α\u{345}"],
            &["ǰ", "J\u{30c}"],
        ] {
            assert!(
                same.iter().all(|text| parse(text) == parse(same[0])),
                "{same:?}"
            );
        }
        for (one, other) in [("straße", "strasse"), ("ı", "i"), ("İ", "i"), ("e", "é")] {
            assert_ne!(parse(one), parse(other));
        }
    }

    #[test]
    fn parsing_is_idempotent_for_every_cased_letter() {
        let has_case = |c: &char| c.to_uppercase().ne([*c]) || c.to_lowercase().ne([*c]);
        for c in ('\0'..=char::MAX).filter(has_case) {
            if let Ok(email) = Email::parse(&format!("x{c}@b")) {
                assert_eq!(Email::parse(email.as_str()), Ok(email), "{c}");
            }
        }
    }

    proptest! {
        #![proptest_config(crate::proptest_config())]

        #[test]
        fn parsing_is_idempotent(local in "\\PC{1,8}") {
            if let Ok(email) = Email::parse(&format!("{local}@b")) {
                prop_assert_eq!(Email::parse(email.as_str()), Ok(email));
            }
        }
    }
}
