//! What `Host` and `Origin` headers name, for servers that only this machine may ask.

use axum::http::{HeaderMap, header};

/// The `Host` of a request that has one: of two, somebody between might go by the other.
pub(crate) fn only_host(headers: &HeaderMap) -> Option<&str> {
    let mut hosts = headers.get_all(header::HOST).iter();
    let host = hosts.next()?.to_str().ok()?;
    hosts.next().is_none().then_some(host)
}

/// The name in a `Host`, without its port and the brackets of an IPv6 address; none where it is no
/// `Host`.
pub(crate) fn host_name(host: &str) -> Option<&str> {
    let (name, port) = match host.strip_prefix('[') {
        Some(rest) => rest.split_once(']')?,
        None => host.split_at(host.find(':').unwrap_or(host.len())),
    };
    // "::1" is an address only in brackets, and a name in brackets only an address.
    let fits = host.starts_with('[') == name.contains(':');
    (fits && (port.is_empty() || is_port(port.strip_prefix(':')?))).then_some(name)
}

fn is_port(text: &str) -> bool {
    text.parse::<u16>().is_ok() && text.bytes().all(|byte| byte.is_ascii_digit())
}

/// The `Host` of the page that an `Origin` names.
pub(crate) fn origin_host(origin: &str) -> Option<&str> {
    origin
        .strip_prefix("http://")
        .or_else(|| origin.strip_prefix("https://"))
}
