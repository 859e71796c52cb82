//! What prober and echo say to each other: over streams and datagrams a line, and over DNS a query (RFC 1035 §4.1). Each
//! bears a number that no other has, by which both know that it is theirs.

use std::net::SocketAddr;

/// No method of HTTP, so that no proxy takes what follows for a request.
const MARK: char = '\u{1}';
/// A query's head: its number, recursion desired, one question.
const QUERY: [u8; 12] = [0x4d, 0x52, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
/// An answer's flags: of authority, recursion available; and its counts: a question, an answer.
const ANSWER: [u8; 10] = [0x85, 0x80, 0, 1, 0, 1, 0, 0, 0, 0];
/// Type and class of question and answer: text, of the Internet.
const TEXT: [u8; 4] = [0, 16, 0, 1];
/// A pointer to the question's name.
const SAME_NAME: [u8; 2] = [0xc0, 12];

/// What the prober says.
pub(super) fn hello(nonce: &str) -> String {
    format!("{MARK}{nonce}\n")
}

/// What the echo answers: whom it sees.
pub(super) fn reply(nonce: &str, seen: SocketAddr) -> String {
    format!("{MARK}{nonce} {seen}\n")
}

/// Whom the echo sees, if it is ours.
pub(super) fn seen(reply: &str, nonce: &str) -> Option<SocketAddr> {
    reply.strip_prefix(MARK)?.strip_prefix(nonce)?.strip_prefix(' ')?.strip_suffix('\n')?.parse().ok()
}

/// The query for a name that nobody else can know (RFC 6761 §6.4).
pub(super) fn query(nonce: &str) -> Vec<u8> {
    let labels = [nonce, "probe", "invalid"];
    let name = labels.iter().flat_map(|label| [&[label.len() as u8], label.as_bytes()].concat());
    QUERY.into_iter().chain(name).chain([0]).chain(TEXT).collect()
}

/// The answer to a query that is ours, but for its number, which whoever passes it on may change.
pub(super) fn answer(query: &[u8], nonce: &str, seen: SocketAddr) -> Option<Vec<u8>> {
    let expected = self::query(nonce);
    let question = query.get(QUERY.len()..expected.len())?;
    if !question.eq_ignore_ascii_case(&expected[QUERY.len()..]) {
        return None;
    }
    let text = seen.to_string();
    let lengths = [text.len() as u16 + 1, 0].map(u16::to_be_bytes);
    let text = [&lengths[0][..], &[text.len() as u8], text.as_bytes()].concat();
    let no_lifetime = [0; 4];
    Some([&query[..2], &ANSWER, question, &SAME_NAME, &TEXT, &no_lifetime, &text].concat())
}

/// Whom an answer says that the echo sees, if it is ours.
pub(super) fn seen_in_answer(answer: &[u8], nonce: &str) -> Option<SocketAddr> {
    let question = &query(nonce)[QUERY.len()..];
    let rest = answer.get(QUERY.len()..)?;
    let (asked, rest) = rest.split_at_checked(question.len())?;
    // The name, type and class, lifetime and length of the answer, and the length of its text.
    let text = rest.get(SAME_NAME.len() + TEXT.len() + 4 + 2..)?;
    let (length, text) = text.split_first()?;
    let text = std::str::from_utf8(text.get(..usize::from(*length))?).ok()?;
    text.parse().ok().filter(|_| asked.eq_ignore_ascii_case(question))
}

#[cfg(test)]
mod tests {
    use super::*;

    const NONCE: &str = "0123456789abcdef0123456789abcdef";

    #[test]
    fn what_is_said_is_understood_and_what_is_anothers_is_not() {
        let seen_from = "[fd00::1]:1234".parse().unwrap();
        assert_eq!(seen(&reply(NONCE, seen_from), NONCE), Some(seen_from));
        assert_eq!(seen(&reply("other", seen_from), NONCE), None);
        let query = query(NONCE);
        let answered = answer(&query, NONCE, seen_from).unwrap();
        assert_eq!(seen_in_answer(&answered, NONCE), Some(seen_from));
        assert_eq!(answer(&query, "other", seen_from), None);
        for end in 0..answered.len() {
            assert_eq!(seen_in_answer(&answered[..end], NONCE), None, "{end}");
        }
        for end in 0..query.len() {
            assert_eq!(answer(&query[..end], NONCE, seen_from), None, "{end}");
        }
    }
}
