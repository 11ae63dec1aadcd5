//! Query strings.

use std::borrow::Cow;

use percent_encoding::percent_decode_str;

use crate::error::{Error, FieldError, Result};

/// A percent-decoded query string, and the errors found in its parameters.
pub(crate) struct Query<'a> {
    /// A value is `None` if it does not decode to UTF-8.
    pairs: Vec<(Cow<'a, str>, Option<Cow<'a, str>>)>,
    errors: Vec<FieldError>,
}

impl<'a> Query<'a> {
    pub(crate) fn new(query: &'a str) -> Self {
        let pairs = query.split('&').filter(|pair| !pair.is_empty());
        let decoded = pairs.map(|pair| {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            (decode(name).unwrap_or(Cow::Borrowed(name)), decode(value))
        });
        Self {
            pairs: decoded.collect(),
            errors: Vec::new(),
        }
    }

    /// Parses an optional parameter. Records an error if it is repeated or if `parse` rejects it;
    /// `rule` tells the client what is valid.
    pub(crate) fn parameter<T>(
        &mut self,
        name: &'static str,
        rule: &'static str,
        parse: impl FnOnce(&str) -> Option<T>,
    ) -> Option<T> {
        let mut values = self.pairs.iter().filter(|(key, _)| key == name);
        let (_, value) = values.next()?;
        let error = if values.next().is_some() {
            FieldError::parameter(name, "duplicate", "the parameter must not be repeated")
        } else {
            let text = value.as_deref().filter(|text| !text.contains('\0'));
            match text.and_then(parse) {
                Some(parsed) => return Some(parsed),
                None => FieldError::parameter(name, "invalid_value", rule),
            }
        };
        self.errors.push(error);
        None
    }

    /// Records an error if the parameter is missing.
    pub(crate) fn require(&mut self, name: &'static str, rule: &'static str) {
        if !self.pairs.iter().any(|(key, _)| key == name) {
            let error = FieldError::parameter(name, "required", rule);
            self.errors.push(error);
        }
    }

    /// Fails with all recorded errors, if there are any.
    pub(crate) fn finish(self) -> Result<()> {
        match self.errors.is_empty() {
            true => Ok(()),
            false => Err(Error::Validation(self.errors)),
        }
    }
}

/// Decodes percent-encoding and `+`. Returns `None` if the result is not UTF-8.
fn decode(text: &str) -> Option<Cow<'_, str>> {
    if !text.contains(['%', '+']) {
        return Some(Cow::Borrowed(text));
    }
    let spaced = text.replace('+', " ");
    let decoded = percent_decode_str(&spaced).decode_utf8().ok()?;
    Some(Cow::Owned(decoded.into_owned()))
}
