//! Password rules.

use unicode_normalization::UnicodeNormalization;

use crate::error::FieldError;

/// Counted in code points. OWASP ASVS 5.0, 6.2.1, requires at least 8.
const MIN_CHARACTERS: usize = 8;
/// bcrypt ignores everything after 72 bytes; longer passwords are rejected instead of truncated.
const MAX_BYTES: usize = 72;
/// The number of code points at each end of a password that the strength estimate reads. The estimate
/// takes time in proportion to the number of combinations of characters that may stand for letters:
/// half a second for 72 code points.
const MAX_ESTIMATED: usize = 24;

/// A new password of valid length, and the JSON pointer at which the client sent it.
#[derive(Clone)]
pub(crate) struct NewPassword {
    pub(crate) text: String,
    pub(crate) pointer: &'static str,
}

/// Normalizes a password to NFC (RFC 8265, section 4.2.2), because keyboards differ in how they
/// compose accented letters.
pub(crate) fn normalize(password: &str) -> String {
    password.nfc().collect()
}

/// Checks the length of a normalized password, and that it does not contain NUL.
pub(crate) fn check_length(password: &str, pointer: &'static str) -> Result<(), FieldError> {
    let (code, detail) = if password.chars().count() < MIN_CHARACTERS {
        ("too_short", "the password must have at least 8 characters")
    } else if password.len() > MAX_BYTES {
        (
            "too_long",
            "the password must have at most 72 bytes in UTF-8",
        )
    } else if password.contains('\0') {
        (
            "invalid_character",
            "the password must not contain the character NUL",
        )
    } else {
        return Ok(());
    };
    Err(FieldError::at(pointer, code, detail))
}

/// Rejects a password that is easy to guess, in particular from the user's e-mail address. The
/// error includes advice.
pub(crate) fn check_strength(
    password: &str,
    email: &str,
    pointer: &'static str,
) -> Result<(), FieldError> {
    let local_part = email.split('@').next().unwrap_or_default();
    let context = [ends(email), ends(local_part)].concat();
    let [first, last] = ends(password);
    let mut estimate = zxcvbn::zxcvbn(first, &context);
    // A password is at least as hard to guess as each part of it.
    if estimate.score() < zxcvbn::Score::Two && first.len() < password.len() {
        estimate = zxcvbn::zxcvbn(last, &context);
    }
    if estimate.score() >= zxcvbn::Score::Two {
        return Ok(());
    }
    let mut detail = String::from("the password is too easy to guess");
    if let Some(feedback) = estimate.feedback() {
        if let Some(warning) = feedback.warning() {
            detail = format!("{detail}: {}", warning.to_string().trim_end_matches('.'));
        }
        for suggestion in feedback.suggestions() {
            detail = format!("{detail}. {}", suggestion.to_string().trim_end_matches('.'));
        }
    }
    Err(FieldError::at(pointer, "too_guessable", detail))
}

/// The first and the last characters of a text; the whole text twice if it is short.
fn ends(text: &str) -> [&str; 2] {
    let first = text.char_indices().nth(MAX_ESTIMATED);
    let first = first.map_or(text, |(end, _)| &text[..end]);
    let last = text.char_indices().rev().nth(MAX_ESTIMATED - 1);
    let last = last.map_or(text, |(start, _)| &text[start..]);
    [first, last]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn characters_that_may_stand_for_letters_take_little_time() {
        let password = "4@8({[<369!1|70$5+2%".repeat(4)[..72].to_owned();
        let fastest = |estimate: &dyn Fn()| {
            let times = (0..3).map(|_| {
                let start = std::time::Instant::now();
                estimate();
                start.elapsed()
            });
            times.min().unwrap()
        };
        let whole = fastest(&|| drop(zxcvbn::zxcvbn(&password, &[])));
        let bounded = fastest(&|| drop(check_strength(&password, "ann@example.com", "")));
        assert!(bounded * 2 < whole, "{bounded:?} of {whole:?}");
    }
}
