//! The hosts file as text: our block in it, and everything else as it is, byte for byte. Pure.

use std::net::Ipv4Addr;

/// How the block's first line begins, by which any version finds it.
const BEGIN: &str = "# BEGIN mesh-redirect";
const BEGIN_LINE: &str = "# BEGIN mesh-redirect: removed with the last service that is disabled";
/// Where the line before had no end, which the block then begins with.
const BEGIN_UNENDED: &str =
    "# BEGIN mesh-redirect after a line without an end: removed with the last service that is disabled";
const END_LINE: &str = "# END mesh-redirect";
/// Every address that is ours.
const OURS: &str = "127.66.";

/// The file without a block of ours.
pub(super) fn without(text: &[u8]) -> Vec<u8> {
    let mut kept: Vec<u8> = Vec::new();
    let mut lines = text.split_inclusive(|&byte| byte == b'\n').peekable();
    while let Some(line) = lines.next() {
        if !line.starts_with(BEGIN.as_bytes()) {
            kept.extend(line);
            continue;
        }
        // Nothing but our own lines, wherever somebody may have cut the block.
        while lines.next_if(|line| line.starts_with(OURS.as_bytes())).is_some() {}
        let _end = lines.next_if(|line| line.starts_with(END_LINE.as_bytes()));
        // Where somebody has appended to the file since, the line before needs an end.
        let is_last = lines.peek().is_none();
        if line.starts_with(BEGIN_UNENDED.as_bytes()) && is_last && kept.last() == Some(&b'\n') {
            kept.pop();
        }
    }
    kept
}

/// The file with a block of these names, in the place of the one there was. Names that the file itself gives an
/// address are left to it; they are returned too.
pub(super) fn with(text: &[u8], names: &[(String, Ipv4Addr)]) -> (Vec<u8>, Vec<String>) {
    let mut text = without(text);
    let taken: Vec<String> = mapped(&text);
    let (left, ours): (Vec<_>, Vec<_>) = names.iter().partition(|(name, _)| taken.contains(name));
    let unended = text.last().is_some_and(|byte| *byte != b'\n');
    let begin = if unended { format!("\n{BEGIN_UNENDED}\n") } else { format!("{BEGIN_LINE}\n") };
    let lines = ours.iter().map(|(name, address)| format!("{address}\t{name}\n"));
    text.extend(
        [begin].into_iter().chain(lines).chain([format!("{END_LINE}\n")]).flat_map(String::into_bytes),
    );
    (text, left.into_iter().map(|(name, _)| name.clone()).collect())
}

/// Names that have an address, in lower case (hosts(5)).
fn mapped(text: &[u8]) -> Vec<String> {
    let text = String::from_utf8_lossy(text).to_ascii_lowercase();
    let lines = text.lines().map(|line| line.split('#').next().unwrap_or_default());
    lines.flat_map(|line| line.split_whitespace().skip(1)).map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names() -> Vec<(String, Ipv4Addr)> {
        vec![("catalog".into(), [127, 66, 1, 2].into()), ("mail".into(), [127, 66, 3, 4].into())]
    }

    #[test]
    fn everything_else_survives_byte_for_byte() {
        let files: [&[u8]; 8] = [
            b"",
            b"127.0.0.1 localhost\n",
            b"127.0.0.1 localhost",
            b"\n\n# comment\r\n10.0.0.1\ta b # c\r\n",
            b"\xff\xfe not text \x00\n",
            b"# BEGIN something else\n127.66.9.9 mine\n# END something else\n",
            b"127.66.9.9 mine\n\n",
            b" # BEGIN mesh-redirect is only a comment\n",
        ];
        for file in files {
            let (once, _) = with(file, &names());
            assert_eq!(without(&once), file, "{}", String::from_utf8_lossy(file));
            let (twice, _) = with(&once, &names());
            assert_eq!(twice, once, "writing it again changes nothing");
            assert_eq!(without(file), file);
        }
    }

    #[test]
    fn what_is_appended_after_a_line_without_an_end_is_a_line_of_its_own() {
        let (mut text, _) = with(b"127.0.0.1 localhost", &names());
        text.extend(b"10.0.0.1 theirs\n");
        assert_eq!(without(&text), b"127.0.0.1 localhost\n10.0.0.1 theirs\n");
    }

    #[test]
    fn the_block_maps_each_name_and_leaves_those_that_have_an_address() {
        let (text, left) = with(b"10.0.0.9 Catalog\n# 10.0.0.8 mail\n", &names());
        let text = String::from_utf8(text).unwrap();
        assert!(text.ends_with(&format!("{BEGIN_LINE}\n127.66.3.4\tmail\n{END_LINE}\n")), "{text}");
        assert_eq!(left, ["catalog"]);
    }

    #[test]
    fn a_block_that_another_version_wrote_is_replaced_and_removed() {
        let file = b"a b\n# BEGIN mesh-redirect 9: in other words\n127.66.200.1 n m # x\n# END mesh-redirect 9\nc d\n";
        assert_eq!(without(file), b"a b\nc d\n");
        assert_eq!(with(file, &names()), with(b"a b\nc d\n", &names()));
    }

    #[test]
    fn a_damaged_block_loses_only_our_own_lines() {
        let file = b"a b\n# BEGIN mesh-redirect: x\n127.66.1.1 n\n10.0.0.1 theirs\n127.66.1.2 later\n";
        assert_eq!(without(file), b"a b\n10.0.0.1 theirs\n127.66.1.2 later\n");
    }

    #[test]
    fn every_file_keeps_every_line_that_is_not_ours_and_is_itself_again_without_the_block() {
        let seeds: [&[u8]; 4] = [
            b"127.0.0.1 localhost\n::1 localhost ip6-localhost\n# comment\n10.0.0.9 Catalog # c\n",
            b"127.0.0.1 localhost\n# BEGIN mesh-redirect: removed\n127.66.1.2\tcatalog\n# END mesh-redirect\n10.0.0.1 x\n",
            b"a b\n# BEGIN mesh-redirect after a line without an end: x\n127.66.1.1 n\n# END mesh-redirect\n",
            b"10.0.0.1 a",
        ];
        let words = [
            BEGIN,
            BEGIN_UNENDED,
            BEGIN_LINE,
            END_LINE,
            "# BEGIN mesh-",
            OURS,
            "127.66.1.1 n\n",
            "\n",
            "\n\n",
            "#",
            "mail",
        ];
        fuzz::damaged!(seeds, words, |input: &[u8]| {
            let clean = without(input);
            assert_eq!(without(&clean), clean, "nothing is left to remove");
            assert!(
                lines_of_others(input).eq(lines_of_others(&clean)),
                "{}",
                String::from_utf8_lossy(&clean)
            );
            let (text, left) = with(input, &names());
            assert!(text.starts_with(&clean));
            assert_eq!(without(&text), clean);
            assert_eq!(with(&text, &names()), (text, left), "writing it again changes nothing");
        });
    }

    /// Lines that no block of ours can have, without their ends.
    fn lines_of_others(text: &[u8]) -> impl Iterator<Item = &[u8]> {
        let ours = [BEGIN, END_LINE, OURS];
        let lines = text.split(|&byte| byte == b'\n').filter(|line| !line.is_empty());
        lines.filter(move |line| !ours.iter().any(|ours| line.starts_with(ours.as_bytes())))
    }
}
