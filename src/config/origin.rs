//! Web origins in `CORS_ORIGINS`.

use std::net::{Ipv4Addr, Ipv6Addr};

/// Schemes whose pages have the origin `null`, or that have no pages.
#[rustfmt::skip]
const SCHEMES_WITHOUT_ORIGIN: [&str; 8] =
    ["about", "blob", "data", "file", "ftp", "javascript", "ws", "wss"];

/// Returns the origin as browsers send it (RFC 6454 section 6.2), or the reason why no browser
/// sends it.
pub(super) fn normalize_origin(text: &str) -> Result<String, String> {
    normalize(text).map_err(|reason| match text.contains('@') {
        // The text may contain a password.
        true => reason.to_owned(),
        false => format!("{text:?}: {reason}"),
    })
}

fn normalize(text: &str) -> Result<String, &'static str> {
    if text.contains('*') {
        return Err("wildcards are not supported: list every origin");
    }
    if text.contains(|c: char| c.is_whitespace() || c == ';') {
        return Err("origins are separated by commas");
    }
    if !text.is_ascii() {
        return Err("write the host in punycode, like https://xn--bcher-kva.example");
    }
    let text = text.to_ascii_lowercase();
    if text == "null" {
        return Err("every sandboxed page has the origin null, so it cannot be allowed");
    }
    let (scheme, rest) = text.split_once("://").unwrap_or_default();
    let is_scheme_char = |c: char| c.is_ascii_alphanumeric() || "+-.".contains(c);
    if !scheme.starts_with(|c: char| c.is_ascii_alphabetic()) || !scheme.chars().all(is_scheme_char)
    {
        return Err("an origin starts with a scheme, like https://app.example.com");
    }
    if SCHEMES_WITHOUT_ORIGIN.contains(&scheme) {
        return Err("pages of this scheme have no origin that could be allowed");
    }
    let authority = rest.strip_suffix('/').unwrap_or(rest);
    if authority.contains('@') {
        return Err("an origin has no user name or password");
    }
    if authority.contains(['/', '?', '#', '\\']) {
        return Err("an origin has no path or query");
    }
    let (host, port) = match authority.rsplit_once(':') {
        Some((host, port)) if !port.ends_with(']') => (host, port),
        _ => (authority, ""),
    };
    let host = normalize_host(host)?;
    let number = port.parse::<u16>().ok().filter(|_| !port.starts_with('+'));
    let port = match (scheme, number) {
        (_, None) if !port.is_empty() => return Err("the port must be a number up to 65535"),
        (_, None) | ("http", Some(80)) | ("https", Some(443)) => String::new(),
        (_, Some(port)) => format!(":{port}"),
    };
    Ok(format!("{scheme}://{host}{port}"))
}

fn normalize_host(host: &str) -> Result<String, &'static str> {
    const RULE: &str = "the host must be a name or an IP address, like app.example.com";
    if let Some(address) = host.strip_prefix('[').and_then(|h| h.strip_suffix(']')) {
        let address: Ipv6Addr = address.parse().map_err(|_| RULE)?;
        return Ok(format!("[{address}]"));
    }
    let is_valid = |c: char| c.is_ascii_alphanumeric() || "-._".contains(c);
    if host.is_empty()
        || host.starts_with('.')
        || host.contains("..")
        || !host.chars().all(is_valid)
    {
        return Err(RULE);
    }
    // Browsers parse a host whose last label is numeric as an IPv4 address, and send it in dotted
    // decimal form.
    let last = host.rsplit('.').next().unwrap_or_default();
    let is_numeric = last.starts_with("0x") || last.chars().all(|c| c.is_ascii_digit());
    if !last.is_empty() && is_numeric && host.parse::<Ipv4Addr>().is_err() {
        return Err("the host must be a name or an IPv4 address of four decimal numbers");
    }
    Ok(host.to_owned())
}
