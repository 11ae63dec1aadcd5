//! Web origins as `CORS_ORIGINS` lists them.

use std::net::{Ipv4Addr, Ipv6Addr};

/// Pages of these schemes send `Origin: null`, or there are no such pages.
const SCHEMES_WITHOUT_ORIGIN: [&str; 8] = [
    "about",
    "blob",
    "data",
    "file",
    "ftp",
    "javascript",
    "ws",
    "wss",
];

/// Returns the origin as browsers send it (RFC 6454 section 6.2); the error says why none ever does.
pub(crate) fn normalize_origin(text: &str) -> Result<String, String> {
    normalize(text).map_err(|reason| match text.contains('@') {
        // It may show a password.
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
        return Err("any sandboxed page has the origin null, so it cannot be allowed");
    }
    let (scheme, rest) = text.split_once("://").unwrap_or_default();
    let valid_scheme = scheme.starts_with(|c: char| c.is_ascii_alphabetic())
        && scheme
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || b"+-.".contains(&byte));
    if !valid_scheme {
        return Err("an origin begins with a scheme, like https://app.example.com");
    }
    if SCHEMES_WITHOUT_ORIGIN.contains(&scheme) {
        return Err("pages of this scheme send no origin that could be allowed");
    }
    let authority = rest.strip_suffix('/').unwrap_or(rest);
    if authority.contains('@') {
        return Err("an origin has no user name and no password");
    }
    if authority.contains(['/', '?', '#', '\\']) {
        return Err("an origin has no path and no query");
    }
    let (host, port) = match authority.rsplit_once(':') {
        Some((host, port)) if !port.ends_with(']') => (host, port),
        _ => (authority, ""),
    };
    let host = normalize_host(host)?;
    let port = match (scheme, parse_port(port)?) {
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
    let valid = |byte: u8| byte.is_ascii_alphanumeric() || b"-._".contains(&byte);
    if host.is_empty() || host.starts_with('.') || host.contains("..") || !host.bytes().all(valid) {
        return Err(RULE);
    }
    // Browsers read such a host as an IPv4 address, and send it in this form only.
    let last = host.rsplit('.').next().unwrap_or_default();
    let numeric = last.starts_with("0x") || last.bytes().all(|byte| byte.is_ascii_digit());
    if !last.is_empty() && numeric && host.parse::<Ipv4Addr>().is_err() {
        return Err("the host must be a name or an IPv4 address of four decimal numbers");
    }
    Ok(host.to_owned())
}

fn parse_port(port: &str) -> Result<Option<u16>, &'static str> {
    if port.is_empty() {
        return Ok(None);
    }
    let digits = port.bytes().all(|byte| byte.is_ascii_digit());
    match port.parse() {
        Ok(port) if digits => Ok(Some(port)),
        _ => Err("the port must be a number up to 65535"),
    }
}
