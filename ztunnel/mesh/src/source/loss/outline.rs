//! Whether one text is only the beginning of another: what is left of a file that was cut off.

use std::fmt;
use std::hash::DefaultHasher;
use std::hash::Hasher;
use std::sync::Arc;

/// As much of a text as it takes to recognise its beginning: four bytes for each line. Lines that are blank or a comment
/// do not count.
#[derive(Clone, PartialEq, Eq, Default)]
pub struct Outline {
    /// After each line that is ended: a sum over all until there.
    lines: Arc<[u32]>,
    /// The same after the last one, if that is not ended.
    unended: Option<u32>,
    /// How long the text is.
    size: usize,
}

/// How a text lacks the end of another one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cut {
    /// It ends in the middle of a line.
    WithinLine,
    /// It ends where a line of the other one does, or its last line is not ended and the other one's was. A person may
    /// have done that.
    AfterLine,
}

impl Outline {
    /// Of this text.
    pub fn of(text: &str) -> Self {
        let (mut lines, mut unended) = (Vec::new(), None);
        let mut hasher = DefaultHasher::new();
        for line in text.split_inclusive('\n') {
            let said = line.trim_end();
            if said.is_empty() || said.trim_start().starts_with('#') {
                continue;
            }
            hasher.write(said.as_bytes());
            hasher.write_u8(b'\n');
            let sum = hasher.finish() as u32;
            if line.ends_with('\n') {
                lines.push(sum);
            } else {
                unended = Some(sum);
            }
        }
        Self { lines: lines.into(), unended, size: text.trim_end().len() }
    }

    /// Whether its last line is ended.
    pub fn is_ended(&self) -> bool {
        self.unended.is_none()
    }

    /// Whether this seems to be what is left of `whole`.
    pub fn is_cut_from(&self, whole: &Self) -> Option<Cut> {
        let ended = self.lines.len();
        let begins = match self.lines.last() {
            None => true,
            Some(last) => whole.lines.get(ended - 1) == Some(last),
        };
        let next =
            whole.lines.get(ended).copied().or_else(|| whole.unended.filter(|_| whole.lines.len() == ended));
        let begins = begins && self.size < whole.size;
        match (self.unended, next) {
            (None, Some(_)) if begins => Some(Cut::AfterLine),
            // The line is whole, and others are missing.
            (Some(last), Some(next)) if begins && last == next => Some(Cut::AfterLine),
            (Some(_), Some(_)) if begins && (whole.is_ended() || whole.len() > self.len()) => {
                Some(Cut::WithinLine)
            }
            (Some(last), next) if whole.is_ended() && next != Some(last) => Some(Cut::AfterLine),
            _ => None,
        }
    }

    fn len(&self) -> usize {
        self.lines.len() + usize::from(self.unended.is_some())
    }
}

impl fmt::Debug for Outline {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "Outline({} lines{})",
            self.len(),
            if self.is_ended() { "" } else { ", the last not ended" }
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_beginning_is_recognised() {
        let whole = "a: 1\nb:\n- 2\n---\nc: 3\n";
        for (text, expected) in [
            (whole, None),
            ("a: 1\nb:\n- 2\n---\nc: 3", None),
            ("# a remark\n\na: 1\nb:\n- 2\n---\nc: 3\n", None),
            ("a: 1\nb:\n- 2\n---\nc: 3\n...\n", None),
            ("a: 1\nb:\n- 2\n", Some(Cut::AfterLine)),
            ("a: 1\nb:\n- 2\n---\n", Some(Cut::AfterLine)),
            ("a: 1\nb:\n- 2", Some(Cut::AfterLine)),
            ("a: 1\nb:\n-", Some(Cut::WithinLine)),
            ("a: 1\nb:\n- 2\n---\nc:", Some(Cut::WithinLine)),
            // Not shorter.
            ("a: 1\nb:\n- 2\n---\nc: 345", Some(Cut::AfterLine)),
            ("a: 1\nb:\n- 2\n---\nc: 345\n", None),
            ("a", Some(Cut::WithinLine)),
            ("", Some(Cut::AfterLine)),
            ("a: 1\nb:\n- 2\n...\n", None),
            ("a: 1\nb:\n- 2\n---\nd: 3\n", None),
            ("b:\n- 2\n---\nc: 3\n", None),
            // Written anew, and not to the end.
            ("a: 2\nb:\n- 2\n---\nc: ", Some(Cut::AfterLine)),
        ] {
            assert_eq!(Outline::of(text).is_cut_from(&Outline::of(whole)), expected, "{text:?}");
        }
        // Of one that is never ended, every last line is.
        let whole = whole.trim_end();
        for (text, expected) in [
            (whole, None),
            ("a: 1\nb:\n- 2\n---\nc: 4", None),
            ("a: 1\nb:\n- 2\n---\nc: 3\n", None),
            ("a: 1\nb:\n- 2", Some(Cut::AfterLine)),
            ("a: 1\nb:\n-", Some(Cut::WithinLine)),
            ("a: 1\nb:\n- 2\n---\n", Some(Cut::AfterLine)),
        ] {
            assert_eq!(Outline::of(text).is_cut_from(&Outline::of(whole)), expected, "{text:?} of the other");
        }
    }
}
