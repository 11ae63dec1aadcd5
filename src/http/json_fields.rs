//! Parsing of the fields of a JSON object.

use serde_json::{Map, Value};

use crate::domain::ValidationError;
use crate::error::{Error, FieldError, Result};

/// The fields of a JSON object, and the errors found in them. Fields are named by JSON pointers, as
/// in the errors.
pub(crate) struct JsonFields {
    /// `None` if the body is not an object, which is then the only error.
    fields: Option<Map<String, Value>>,
    errors: Vec<FieldError>,
}

impl JsonFields {
    pub(crate) fn new(body: Value) -> Self {
        let (fields, errors) = match body {
            Value::Object(fields) => (Some(fields), vec![]),
            _ => {
                let detail = "the body must be a JSON object";
                (None, vec![FieldError::at("", "wrong_type", detail)])
            }
        };
        Self { fields, errors }
    }

    /// Takes a required string.
    pub(crate) fn required_string(&mut self, pointer: &'static str) -> Option<String> {
        if !self.contains(pointer) {
            return self.reject(pointer, "required", "is required");
        }
        self.optional_string(pointer)
    }

    /// Takes a string that may be missing, but not null.
    pub(crate) fn optional_string(&mut self, pointer: &'static str) -> Option<String> {
        match self.take(pointer)? {
            Value::String(text) => Some(text),
            _ => self.reject(pointer, "wrong_type", "must be a string"),
        }
    }

    /// Takes a string that may be missing or null. `Some(None)` stands for null.
    pub(crate) fn nullable_string(&mut self, pointer: &'static str) -> Option<Option<String>> {
        match self.take(pointer)? {
            Value::String(text) => Some(Some(text)),
            Value::Null => Some(None),
            _ => self.reject(pointer, "wrong_type", "must be a string or null"),
        }
    }

    /// Takes a boolean that may be missing.
    pub(crate) fn optional_bool(&mut self, pointer: &'static str) -> Option<bool> {
        match self.take(pointer)? {
            Value::Bool(value) => Some(value),
            _ => self.reject(pointer, "wrong_type", "must be true or false"),
        }
    }

    /// Returns whether the field exists. True for a body that is not an object, so that a missing
    /// field is not reported as well.
    pub(crate) fn contains(&self, pointer: &'static str) -> bool {
        let fields = self.fields.as_ref();
        fields.is_none_or(|fields| fields.contains_key(member_name(pointer)))
    }

    /// Parses a field into a domain value, or records why it is invalid.
    pub(crate) fn parse<T>(
        &mut self,
        pointer: &'static str,
        text: Option<String>,
        parse: impl Fn(&str) -> Result<T, ValidationError>,
    ) -> Option<T> {
        match parse(&text?) {
            Ok(value) => Some(value),
            Err(error) => {
                self.push_error(FieldError::at(pointer, error.code, error.detail));
                None
            }
        }
    }

    /// Records an error.
    pub(crate) fn push_error(&mut self, error: FieldError) {
        if self.fields.is_some() {
            self.errors.push(error);
        }
    }

    /// Returns the parsed values or, if there are errors, all of them.
    pub(crate) fn finish_with<T>(self, values: Option<T>) -> Result<T> {
        match values {
            Some(values) if self.errors.is_empty() => Ok(values),
            _ => Err(Error::Validation(self.errors)),
        }
    }

    fn take(&mut self, pointer: &'static str) -> Option<Value> {
        self.fields.as_mut()?.remove(member_name(pointer))
    }

    fn reject<T>(&mut self, pointer: &'static str, code: &'static str, rule: &str) -> Option<T> {
        let detail = format!("{} {rule}", member_name(pointer));
        self.push_error(FieldError::at(pointer, code, detail));
        None
    }
}

fn member_name(pointer: &'static str) -> &'static str {
    pointer.trim_start_matches('/')
}
