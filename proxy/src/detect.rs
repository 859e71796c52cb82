//! What a client speaks, by its first bytes: pure.

/// Headers that are looked through for the host.
const MAX_HEADERS: usize = 128;

/// What the bytes so far say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Protocol {
    /// They may become an HTTP/1 head.
    Undecided,
    /// A whole HTTP/1 head.
    Http1 {
        /// Its one host, from the `Host` header or an absolute-form target.
        host: Option<String>,
    },
    /// Anything else; TLS and HTTP/2 with prior knowledge too, for now.
    Opaque,
}

/// Detects the protocol (RFC 9112 §2–§3 for what a head is).
pub(crate) fn protocol(bytes: &[u8]) -> Protocol {
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut request = httparse::Request::new(&mut headers);
    match request.parse(bytes) {
        Ok(httparse::Status::Partial) => Protocol::Undecided,
        // What follows a CONNECT is no HTTP, and where it goes is the proxy's business that it was sent to.
        Ok(httparse::Status::Complete(_)) if request.method == Some("CONNECT") => Protocol::Opaque,
        Ok(httparse::Status::Complete(_)) => {
            // A value may have tabs in it (RFC 9110 §5.5), and a target any byte from 0x80 on; a host may not.
            Protocol::Http1 { host: host(&request).filter(|host| !host.contains(char::is_control)) }
        }
        Err(_) => Protocol::Opaque,
    }
}

/// The host a request is for (RFC 9112 §3.2): an absolute-form target's authority, else the only `Host`.
fn host(request: &httparse::Request<'_, '_>) -> Option<String> {
    let target = request.path.unwrap_or_default();
    if let Some((_scheme, rest)) = target.split_once("://").filter(|_| !target.starts_with('/')) {
        let authority = rest.split(['/', '?']).next().unwrap_or_default();
        return Some(authority.rsplit('@').next().unwrap_or_default().to_owned());
    }
    let mut hosts = request.headers.iter().filter(|header| header.name.eq_ignore_ascii_case("host"));
    match (hosts.next(), hosts.next()) {
        (Some(host), None) => std::str::from_utf8(host.value).ok().map(|value| value.trim().to_owned()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host_of(bytes: &[u8]) -> Option<String> {
        match protocol(bytes) {
            Protocol::Http1 { host } => host,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_host_of_a_request_is_found() {
        assert_eq!(host_of(b"GET / HTTP/1.1\r\nHost: shop\r\n\r\n").as_deref(), Some("shop"));
        assert_eq!(
            host_of(b"POST /x HTTP/1.0\r\na: b\r\nhOST:  shop:80 \r\n\r\nbody").as_deref(),
            Some("shop:80")
        );
        assert_eq!(
            host_of(b"GET http://u@other:81/x?y HTTP/1.1\r\nHost: shop\r\n\r\n").as_deref(),
            Some("other:81")
        );
        assert_eq!(host_of(b"GET /?u=http://x/ HTTP/1.1\r\nHost: shop\r\n\r\n").as_deref(), Some("shop"));
    }

    #[test]
    fn no_host_and_two_hosts_are_none() {
        assert_eq!(host_of(b"GET / HTTP/1.1\r\nHost: s\thop\r\n\r\n"), None);
        assert_eq!(host_of("GET http://s\u{80}hop/ HTTP/1.1\r\n\r\n".as_bytes()), None);
        assert_eq!(host_of(b"GET / HTTP/1.0\r\n\r\n"), None);
        assert_eq!(host_of(b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n"), None);
    }

    #[test]
    fn every_prefix_of_a_head_is_undecided() {
        let head = b"OPTIONS * HTTP/1.1\r\nHost: shop\r\nX: y\r\n\r\n";
        for end in 0..head.len() {
            assert_eq!(protocol(&head[..end]), Protocol::Undecided, "{end}");
        }
    }

    #[test]
    fn other_protocols_are_told_by_their_first_bytes() {
        let cases: [&[u8]; 13] = [
            b"\x16\x03\x01\x02\x00\x01\x00",          // TLS ClientHello
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",      // HTTP/2 with prior knowledge
            b"*1\r\n$4\r\nPING\r\n",                  // Redis
            b"PING\r\n",                              // Redis, inline
            b"EHLO client\r\n",                       // SMTP
            b"SSH-2.0-OpenSSH_9.2\r\n",               // SSH
            b"\x00\x00\x00\x08\x04\xd2\x16\x2f",      // PostgreSQL SSLRequest
            b"AMQP\x00\x00\x09\x01",                  // AMQP
            b"get key\r\n",                           // memcached
            b"\x10\x1a\x00\x04MQTT",                  // MQTT
            b"GET / HTTP/1.1\r\nHost : shop\r\n\r\n", // a blank before the colon (RFC 9112 §5.1)
            b"GET / HTTP/3.0\r\n\r\n",
            b"CONNECT shop:443 HTTP/1.1\r\nHost: shop:443\r\n\r\n",
        ];
        for bytes in cases {
            assert_eq!(protocol(bytes), Protocol::Opaque, "{:?}", String::from_utf8_lossy(bytes));
        }
    }

    #[test]
    fn what_is_decided_stays_so_whatever_follows() {
        let seeds: [&[u8]; 4] = [
            b"GET http://u@other:81/x?y HTTP/1.1\r\nHost: shop\r\nX: y\r\n\r\nbody",
            b"OPTIONS * HTTP/1.0\nhost: shop\n\n",
            b"CONNECT shop:443 HTTP/1.1\r\nHost: shop:443\r\n\r\n",
            b"\x16\x03\x01\x02\x00\x01\x00",
        ];
        let words = [
            "\r\n\r\n",
            "\r\n",
            "Host:",
            "host: b\r\n",
            "://",
            "@",
            "HTTP/1.1",
            "HTTP/2.0",
            "/",
            "?",
            "#",
            "\\",
        ];
        fuzz::damaged!(seeds, words, |input: &[u8]| {
            let decided = protocol(input);
            if let Protocol::Http1 { host: Some(host) } = &decided {
                let bytes = host.as_bytes();
                assert!(bytes.is_empty() || input.windows(bytes.len()).any(|window| window == bytes));
                assert!(!host.contains(char::is_control), "{host:?}");
            }
            // In the order in which the bytes come.
            let first = (0..=input.len())
                .map(|end| protocol(&input[..end]))
                .find(|seen| *seen != Protocol::Undecided);
            assert_eq!(first.unwrap_or(Protocol::Undecided), decided);
        });
    }
}
