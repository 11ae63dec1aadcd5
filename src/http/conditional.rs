//! Entity tags and preconditions (RFC 9110 sections 8.8.3 and 13).

use hyper::header::{HeaderMap, HeaderName, IF_MATCH, IF_NONE_MATCH};
use jiff::Timestamp;

use crate::db::tasks::Versions;
use crate::error::Error;

/// What compressing proxies append to a tag, inside the quotes.
const CODING_SUFFIXES: [&str; 3] = ["-gzip", "-br", "-zstd"];

/// A task's version as a strong entity tag: its `updated_at`, which changes with every update.
pub(crate) fn entity_tag(version: Timestamp) -> String {
    format!("\"{:x}\"", version.as_microsecond())
}

/// The preconditions of a request on one task, in the order of RFC 9110 section 13.2.2: `If-Match`,
/// then `If-None-Match`.
pub(crate) struct Preconditions {
    /// `Any` without the header.
    if_match: TagList,
    /// Empty without the header.
    if_none_match: TagList,
}

/// The versions that a header lists.
enum TagList {
    Any,
    Versions(Vec<Timestamp>),
}

impl TagList {
    fn contains(&self, version: Timestamp) -> bool {
        match self {
            Self::Any => true,
            Self::Versions(versions) => versions.contains(&version),
        }
    }
}

impl Preconditions {
    /// A malformed `If-Match` matches nothing; a malformed `If-None-Match` is no condition.
    pub(crate) fn parse(headers: &HeaderMap) -> Self {
        let none = || TagList::Versions(vec![]);
        Self {
            if_match: match headers.contains_key(IF_MATCH) {
                // Section 13.1.1: compared strongly, so a weak tag matches nothing.
                true => parse_tags(headers, &IF_MATCH, |tag| !tag.weak).unwrap_or_else(none),
                false => TagList::Any,
            },
            // Section 13.1.2: compared weakly.
            if_none_match: parse_tags(headers, &IF_NONE_MATCH, |_| true).unwrap_or_else(none),
        }
    }

    /// Whether a GET or HEAD gets this version or, because the client has it, 304.
    pub(crate) fn is_modified(&self, version: Timestamp) -> Result<bool, Error> {
        if !self.if_match.contains(version) {
            return Err(Error::PreconditionFailed);
        }
        Ok(!self.if_none_match.contains(version))
    }

    /// The versions that any other method may change. The statement itself checks them.
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
    /// The version that it stands for, if it is a tag of ours.
    fn version(&self) -> Option<Timestamp> {
        let mut opaque = self.opaque;
        while let Some(undecorated) = CODING_SUFFIXES
            .iter()
            .find_map(|suffix| opaque.strip_suffix(suffix))
        {
            opaque = undecorated;
        }
        let version = Timestamp::from_microsecond(i64::from_str_radix(opaque, 16).ok()?).ok()?;
        // Only the text that `entity_tag` writes: not `+5f…`, not `05F…`.
        (entity_tag(version).trim_matches('"') == opaque).then_some(version)
    }
}

/// The versions in a header, of the tags that `counts` accepts; `None` if it is malformed.
fn parse_tags(
    headers: &HeaderMap,
    name: &HeaderName,
    counts: impl Fn(&Tag<'_>) -> bool,
) -> Option<TagList> {
    let lines = headers.get_all(name).iter().map(|line| line.as_bytes());
    // Section 5.3: several lines are one list. A tag of ours is ASCII, whatever stands beside it.
    let text = lines.collect::<Vec<_>>().join(&b',');
    let text = String::from_utf8_lossy(&text);
    let mut rest = skip_separators(&text);
    if let Some(after) = rest.strip_prefix('*') {
        return skip_separators(after).is_empty().then_some(TagList::Any);
    }
    let mut versions = Vec::new();
    while !rest.is_empty() {
        let (tag, after) = parse_tag(rest)?;
        versions.extend(counts(&tag).then(|| tag.version()).flatten());
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
        fn a_version_is_only_read_from_the_tag_that_was_given_out(
            values in prop::collection::vec("(W/)?\"[0-9a-f]{0,16}(-gzip|-br)?\"?[, ]{0,3}(W/)?\"?[0-9a-f]{0,16}\"|.*", 0..3)
        ) {
            let lines = values.iter().filter_map(|value| HeaderValue::from_str(value).ok());
            let headers = lines.map(|line| (IF_MATCH, line)).collect();
            if let Some(TagList::Versions(versions)) = parse_tags(&headers, &IF_MATCH, |_| true) {
                for version in versions {
                    let tag = entity_tag(version);
                    prop_assert!(values.iter().any(|value| value.contains(tag.trim_end_matches('"'))));
                }
            }
        }
    }
}
