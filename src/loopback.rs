//! What `Host` and `Origin` headers name, for servers that only this machine may ask.

use std::net::IpAddr;

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

/// Whether a `Host`, with or without a port, is a name of this machine for itself: localhost or any
/// loopback address. An address cannot be made to resolve to another machine, as a name can.
pub(crate) fn is_own(host: &str) -> bool {
    host_name(host).is_some_and(|name| {
        name.eq_ignore_ascii_case("localhost")
            || name.parse::<IpAddr>().is_ok_and(|it| it.is_loopback())
    })
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn names_of_this_machine() {
        for own in [
            "localhost",
            "LOCALHOST:8000",
            "127.0.0.1",
            "127.0.0.1:65535",
            "127.0.0.2",
            "127.255.0.3:6006",
            "[::1]",
            "[::1]:80",
        ] {
            assert!(is_own(own), "{own}");
        }
        for foreign in [
            "",
            "evil.example",
            "localhost.evil.example",
            "evil.example:8000",
            "127.0.0.1.evil.example",
            "127.0.0.2.evil.example",
            "127.0.0.1:80@evil.example",
            "localhost:",
            "localhost:x",
            "localhost:+80",
            "localhost:80:80",
            "[::1]evil",
            "[::1",
            "[::2]:6006",
            "::1",
            "[127.0.0.1]",
            "0.0.0.0",
            "192.168.1.2:6006",
            "127.1",
            "128.0.0.1",
            " localhost",
            "user@localhost",
        ] {
            assert!(!is_own(foreign), "{foreign}");
        }
    }

    proptest! {
        #[test]
        fn any_header_is_answered(host in "\\PC{0,40}") {
            let lower = host.to_ascii_lowercase();
            let known = ["localhost", "127.", "["].iter().any(|it| lower.starts_with(it));
            prop_assert!(!is_own(&host) || known);
        }
    }
}
