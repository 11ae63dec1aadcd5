//! Entity tags and preconditions (RFC 9110 sections 8.8.3 and 13).

use hyper::header::{HeaderMap, HeaderName, IF_MATCH, IF_NONE_MATCH};
use jiff::Timestamp;

use crate::db::task_changes::Versions;
use crate::error::Error;

/// Suffixes that compressing proxies append inside the quotes of a tag.
const CODING_SUFFIXES: [&str; 3] = ["-gzip", "-br", "-zstd"];

/// Formats a task's version as a strong entity tag. The version is `updated_at`, which changes with
/// every update.
pub(crate) fn entity_tag(version: Timestamp) -> String {
    format!("\"{:x}\"", version.as_microsecond())
}

/// The preconditions of a request on one task. `If-Match` is evaluated before `If-None-Match` (RFC
/// 9110 section 13.2.2).
pub(crate) struct Preconditions {
    /// `Any` if the header is absent.
    if_match: TagList<Timestamp>,
    /// Empty if the header is absent or malformed.
    if_none_match: TagList<Timestamp>,
}

/// The versions that a header lists.
enum TagList<T> {
    Any,
    Versions(Vec<T>),
}

impl<T: PartialEq> TagList<T> {
    fn contains(&self, version: &T) -> bool {
        match self {
            Self::Any => true,
            Self::Versions(versions) => versions.contains(version),
        }
    }
}

/// The tags of lists in `If-None-Match`.
pub(crate) struct SeenTags(TagList<String>);

impl SeenTags {
    /// Returns `None` if the header is absent or malformed.
    pub(crate) fn parse(headers: &HeaderMap) -> Option<Self> {
        if !headers.contains_key(IF_NONE_MATCH) {
            return None;
        }
        let quote = |tag: &Tag<'_>| Some(format!("\"{}\"", tag.undecorated()));
        parse_tags(headers, &IF_NONE_MATCH, quote).map(Self)
    }

    /// Whether a list with this tag gets 304.
    pub(crate) fn contains(&self, tag: &String) -> bool {
        self.0.contains(tag)
    }
}

impl Preconditions {
    /// A malformed `If-Match` matches nothing; a malformed `If-None-Match` is ignored.
    pub(crate) fn parse(headers: &HeaderMap) -> Self {
        let none = || TagList::Versions(vec![]);
        Self {
            if_match: match headers.contains_key(IF_MATCH) {
                // Section 13.1.1: strong comparison, so a weak tag matches nothing.
                true => parse_tags(headers, &IF_MATCH, |tag| {
                    (!tag.weak).then(|| tag.version()).flatten()
                })
                .unwrap_or_else(none),
                false => TagList::Any,
            },
            // Section 13.1.2: weak comparison.
            if_none_match: parse_tags(headers, &IF_NONE_MATCH, |tag| tag.version())
                .unwrap_or_else(none),
        }
    }

    /// Returns whether a GET or HEAD request gets this version; if not, it gets 304.
    pub(crate) fn is_modified(&self, version: Timestamp) -> Result<bool, Error> {
        if !self.if_match.contains(&version) {
            return Err(Error::PreconditionFailed);
        }
        Ok(!self.if_none_match.contains(&version))
    }

    /// Whether the request creates a task and fails if the task exists (`If-None-Match: *`).
    pub(crate) fn requires_absence(&self) -> bool {
        matches!(self.if_none_match, TagList::Any)
    }

    /// The versions that a request with another method may change. The SQL statement checks them.
    pub(crate) fn into_versions(self) -> Versions {
        use TagList::{Any, Versions as List};
        match (self.if_match, self.if_none_match) {
            (_, Any) => Versions::Only(vec![]),
            (Any, List(seen)) if seen.is_empty() => Versions::Any,
            (Any, List(seen)) => Versions::Except(seen),
            (List(mut expected), List(seen)) => {
                expected.retain(|version| !seen.contains(version));
                Versions::Only(expected)
            }
        }
    }
}

struct Tag<'a> {
    weak: bool,
    opaque: &'a str,
}

impl Tag<'_> {
    /// The text between the quotes as the service wrote it.
    fn undecorated(&self) -> &str {
        let mut opaque = self.opaque;
        while let Some(undecorated) = CODING_SUFFIXES
            .iter()
            .find_map(|suffix| opaque.strip_suffix(suffix))
        {
            opaque = undecorated;
        }
        opaque
    }

    /// The version, if this is a tag that `entity_tag` returned.
    fn version(&self) -> Option<Timestamp> {
        let opaque = self.undecorated();
        let version = Timestamp::from_microsecond(i64::from_str_radix(opaque, 16).ok()?).ok()?;
        // Rejects other spellings of the number, such as `+5f…` and `05F…`.
        (entity_tag(version).trim_matches('"') == opaque).then_some(version)
    }
}

/// Parses the versions of the tags for which `parse` returns one. Returns `None` if the header is
/// malformed.
fn parse_tags<T>(
    headers: &HeaderMap,
    name: &HeaderName,
    parse: impl Fn(&Tag<'_>) -> Option<T>,
) -> Option<TagList<T>> {
    let lines = headers.get_all(name).iter().map(|line| line.as_bytes());
    // Section 5.3: several lines are one list. Our tags are ASCII, so a lossy conversion is enough.
    let text = lines.collect::<Vec<_>>().join(&b',');
    let text = String::from_utf8_lossy(&text);
    let mut rest = skip_separators(&text);
    if let Some(after) = rest.strip_prefix('*') {
        return skip_separators(after).is_empty().then_some(TagList::Any);
    }
    let mut versions = Vec::new();
    while !rest.is_empty() {
        let (tag, after) = parse_tag(rest)?;
        versions.extend(parse(&tag));
        let separated = after.trim_start_matches([' ', '\t']);
        if !separated.is_empty() && !separated.starts_with(',') {
            return None;
        }
        rest = skip_separators(separated);
    }
    Some(TagList::Versions(versions))
}

/// Section 5.6.1.2: empty list elements are ignored.
fn skip_separators(text: &str) -> &str {
    text.trim_start_matches([' ', '\t', ','])
}

fn parse_tag(text: &str) -> Option<(Tag<'_>, &str)> {
    let (weak, quoted) = match text.strip_prefix("W/") {
        Some(rest) => (true, rest),
        None => (false, text),
    };
    let (opaque, rest) = quoted.strip_prefix('"')?.split_once('"')?;
    let valid = opaque.bytes().all(|byte| byte > b' ' && byte != 0x7f);
    valid.then_some((Tag { weak, opaque }, rest))
}

#[cfg(test)]
mod tests {
    use hyper::header::HeaderValue;
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #![proptest_config(crate::proptest_config())]

        #[test]
        fn a_version_is_parsed_only_from_its_own_tag(
            values in prop::collection::vec("(W/)?\"[0-9a-f]{0,16}(-gzip|-br)?\"?[, ]{0,3}(W/)?\"?[0-9a-f]{0,16}\"|.*", 0..3)
        ) {
            let lines = values.iter().filter_map(|value| HeaderValue::from_str(value).ok());
            let headers = lines.map(|line| (IF_MATCH, line)).collect();
            if let Some(TagList::Versions(versions)) = parse_tags(&headers, &IF_MATCH, |tag| tag.version()) {
                for version in versions {
                    let tag = entity_tag(version);
                    prop_assert!(values.iter().any(|value| value.contains(tag.trim_end_matches('"'))));
                }
            }
        }
    }
}
