//! What people see: lines on standard error, and text that a terminal may be given.

use std::borrow::Cow;
use std::io::Write as _;

/// Writes a line to standard error.
///
/// The macro `eprintln!` would panic where standard error is a full disk, or a pipe that nobody
/// reads any more: no reason for a training of weeks to end.
pub(crate) fn say(text: &str) {
    // One write, so that lines of several threads do not mix.
    let line = format!("{text}\n");
    let _ = std::io::stderr().write_all(line.as_bytes());
}

/// `text` for a terminal: control characters, which may move the cursor, change the title or more, become
/// visible; line ends (of two characters, too) and tabs stay.
pub(crate) fn visible(text: &str) -> Cow<'_, str> {
    let odd = |c: char| c.is_control() && c != '\n' && c != '\t';
    if !text.contains(odd) {
        return Cow::Borrowed(text);
    }
    let mut shown = String::with_capacity(text.len() + 8);
    let mut rest = text.chars().peekable();
    while let Some(c) = rest.next() {
        match c {
            c if !odd(c) => shown.push(c),
            '\r' if rest.peek() == Some(&'\n') => shown.push(c),
            '\u{7f}' => shown.push('\u{2421}'),
            // The symbols for the first 32 are in their order.
            '\0'..' ' => shown.extend(char::from_u32(0x2400 + u32::from(c))),
            c => shown.push_str(&format!("\\x{:02X}", u32::from(c))),
        }
    }
    Cow::Owned(shown)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_characters_are_seen_and_do_nothing() {
        let text = "a\x1b[2J\x07\r\n\tb\rc\x7f\u{9b}é\0";
        assert_eq!(visible(text), "a␛[2J␇\r\n\tb␍c␡\\x9Bé␀");
        assert!(matches!(visible("tab\tand\nline\n"), Cow::Borrowed(_)));
    }
}
