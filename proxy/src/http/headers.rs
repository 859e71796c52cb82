//! Headers that end at each hop (RFC 9110 §7.6.1).

use http::{
    HeaderMap, HeaderName, HeaderValue, StatusCode,
    header::{CONNECTION, TE, TRANSFER_ENCODING, UPGRADE},
};

static KEEP_ALIVE: HeaderName = HeaderName::from_static("keep-alive");
static PROXY_CONNECTION: HeaderName = HeaderName::from_static("proxy-connection");

/// Whether a message asks to go on in another protocol (RFC 9110 §7.8).
pub(super) fn is_upgrade(headers: &HeaderMap) -> bool {
    headers.contains_key(UPGRADE)
        && connection_options(headers).any(|option| option.eq_ignore_ascii_case("upgrade"))
}

/// Whether a response agrees to go on in another protocol.
pub(super) fn is_upgraded(status: StatusCode, headers: &HeaderMap) -> bool {
    status == StatusCode::SWITCHING_PROTOCOLS && headers.contains_key(UPGRADE)
}

/// Whether a body is in no other transfer coding than `chunked`: any other would be lost here (RFC 9112 §6.1).
pub(super) fn is_plainly_framed(headers: &HeaderMap) -> bool {
    let chunked = |value: &HeaderValue| value.as_bytes().trim_ascii().eq_ignore_ascii_case(b"chunked");
    headers.get_all(TRANSFER_ENCODING).iter().all(chunked)
}

/// Removes what concerns only the hop it came from; an upgrade is passed on where it is meant.
pub(super) fn strip_hop_by_hop(headers: &mut HeaderMap, upgrade: bool) {
    let named: Vec<HeaderName> = connection_options(headers)
        .filter_map(|option| HeaderName::from_bytes(option.as_bytes()).ok())
        .collect();
    let upgrade = headers.get(UPGRADE).filter(|_| upgrade).cloned();
    let trailers = headers.get_all(TE).iter().any(|value| value.as_bytes().eq_ignore_ascii_case(b"trailers"));
    for name in named.iter().filter(|name| !is_end_to_end(name)) {
        headers.remove(name);
    }
    for name in [&CONNECTION, &KEEP_ALIVE, &PROXY_CONNECTION, &TE, &TRANSFER_ENCODING, &UPGRADE] {
        headers.remove(name);
    }
    if trailers {
        headers.insert(TE, HeaderValue::from_static("trailers"));
    }
    if let Some(protocol) = upgrade {
        headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
        headers.insert(UPGRADE, protocol);
    }
}

/// Naming these in `Connection` must not take them away: a request could lose its frame or its route that way.
fn is_end_to_end(name: &HeaderName) -> bool {
    [http::header::HOST, http::header::CONTENT_LENGTH].contains(name)
}

fn connection_options(headers: &HeaderMap) -> impl Iterator<Item = &str> {
    let values = headers.get_all(CONNECTION).iter().filter_map(|value| value.to_str().ok());
    values.flat_map(|value| value.split(',')).map(str::trim)
}

#[cfg(test)]
mod tests {
    use super::*;

    type Headers = &'static [(&'static str, &'static str)];

    fn stripped(headers: Headers, upgrade: bool) -> Vec<String> {
        let mut map = HeaderMap::new();
        for (name, value) in headers {
            map.append(*name, HeaderValue::from_static(value));
        }
        strip_hop_by_hop(&mut map, upgrade);
        let mut left: Vec<String> =
            map.iter().map(|(name, value)| format!("{name}: {}", value.to_str().unwrap())).collect();
        left.sort();
        left
    }

    #[test]
    fn what_ends_at_each_hop_is_removed_and_the_rest_stays() {
        let cases: [(Headers, &[&str]); 9] = [
            (&[("connection", "close"), ("x", "1")], &["x: 1"]),
            (&[("connection", "X-A, x-b"), ("x-a", "1"), ("x-b", "2"), ("x-c", "3")], &["x-c: 3"]),
            (&[("connection", "x-a"), ("connection", "x-b"), ("x-a", "1"), ("x-b", "2")], &[]),
            (&[("keep-alive", "timeout=5"), ("proxy-connection", "keep-alive")], &[]),
            (&[("te", "trailers"), ("trailer", "x")], &["te: trailers", "trailer: x"]),
            (&[("te", "gzip")], &[]),
            (&[("transfer-encoding", "chunked")], &[]),
            (&[("connection", "upgrade"), ("upgrade", "websocket")], &[]),
            (
                &[("connection", "host, content-length"), ("host", "a"), ("content-length", "3")],
                &["content-length: 3", "host: a"],
            ),
        ];
        for (headers, left) in cases {
            assert_eq!(stripped(headers, false), left, "{headers:?}");
        }
    }

    #[test]
    fn a_transfer_coding_that_would_be_lost_is_told() {
        for (coding, plain) in
            [("chunked", true), (" Chunked", true), ("gzip, chunked", false), ("gzip", false), ("", false)]
        {
            let mut headers = HeaderMap::new();
            headers.append(TRANSFER_ENCODING, HeaderValue::from_static(coding));
            assert_eq!(is_plainly_framed(&headers), plain, "{coding}");
        }
        assert!(is_plainly_framed(&HeaderMap::new()));
    }

    #[test]
    fn an_upgrade_is_passed_on_where_it_is_meant() {
        let headers: Headers =
            &[("connection", "keep-alive, Upgrade"), ("upgrade", "websocket"), ("keep-alive", "x")];
        assert_eq!(stripped(headers, true), ["connection: upgrade", "upgrade: websocket"]);
    }

    #[test]
    fn whatever_connection_names_nothing_of_this_hop_stays_and_neither_host_nor_length_goes() {
        let seeds: [&[u8]; 3] = [
            b"connection: close, x-a\nx-a: 1\nhost: a\ncontent-length: 3\nte: trailers",
            b"connection: host\nconnection: content-length,upgrade\nupgrade: websocket\nhost: a\ncontent-length: 3",
            b"keep-alive: 5\nproxy-connection: x\ntransfer-encoding: chunked\nte: gzip",
        ];
        let words =
            ["connection: ", "host", "content-length", ",", "\n", ": ", "upgrade", "te", "chunked", "\t"];
        fuzz::damaged!(seeds, words, |input: &[u8]| {
            let mut before = HeaderMap::new();
            for line in input.split(|byte| *byte == b'\n') {
                let at = line.iter().position(|byte| *byte == b':').unwrap_or(line.len());
                let value = line.get(at + 1..).unwrap_or_default().trim_ascii();
                if let (Ok(name), Ok(value)) =
                    (HeaderName::from_bytes(&line[..at]), HeaderValue::from_bytes(value))
                {
                    before.append(name, value);
                }
            }
            for upgrade in [false, true] {
                let mut after = before.clone();
                strip_hop_by_hop(&mut after, upgrade);
                for name in [http::header::HOST, http::header::CONTENT_LENGTH] {
                    assert!(after.get_all(&name).iter().eq(before.get_all(&name)));
                }
                assert!(
                    [&KEEP_ALIVE, &PROXY_CONNECTION, &TRANSFER_ENCODING]
                        .iter()
                        .all(|name| !after.contains_key(*name))
                );
                assert!(after.get(CONNECTION).is_none_or(|value| upgrade && value == "upgrade"));
                assert!(after.get(TE).is_none_or(|value| value == "trailers"));
                let mut again = after.clone();
                strip_hop_by_hop(&mut again, upgrade);
                assert!(again.get(UPGRADE) == after.get(UPGRADE) && is_plainly_framed(&again));
            }
        });
    }
}
