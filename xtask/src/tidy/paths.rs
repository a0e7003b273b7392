//! The paths that a source names: in `use` declarations, with what is in their braces, and in expressions and types.

/// One of them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Named<'a> {
    /// Its parts, from `crate`, `self`, `super` or whatever else it begins with. A `*` at the end is left out.
    pub(crate) parts: Vec<&'a str>,
    /// The name that others find it under here, when this is `pub use`.
    pub(crate) shown_as: Option<&'a str>,
}

/// All that begin with a word that counts and go on with `::`, in a text without comments.
pub(crate) fn named<'a>(text: &'a str, counts: impl Fn(&str) -> bool) -> Vec<Named<'a>> {
    let tokens = tokens(text);
    let mut found = Vec::new();
    let mut shown = false;
    let mut at = 0;
    while let Some(&token) = tokens.get(at) {
        match token {
            "use" => shown = is_public(&tokens[..at]),
            ";" => shown = false,
            _ => {}
        }
        let before = at.checked_sub(1).map_or("", |before| tokens[before]);
        // `pub(in crate::a)` only says who sees it.
        if counts(token) && tokens.get(at + 1) == Some(&"::") && before != "::" && before != "in" {
            at = tree(&tokens, at, &[], shown, &mut found);
        } else {
            at += 1;
        }
    }
    found
}

/// Whether what stands before `use` makes it public.
fn is_public(before: &[&str]) -> bool {
    match before {
        [.., "pub"] => true,
        [.., ")"] => before
            .iter()
            .rposition(|token| *token == "(")
            .is_some_and(|open| open > 0 && before[open - 1] == "pub"),
        _ => false,
    }
}

/// Reads a path or what is in braces, behind `prefix`; returns where the text goes on.
fn tree<'a>(
    tokens: &[&'a str],
    mut at: usize,
    prefix: &[&'a str],
    shown: bool,
    found: &mut Vec<Named<'a>>,
) -> usize {
    let mut parts = prefix.to_vec();
    loop {
        match tokens.get(at) {
            Some(&"{") => {
                at += 1;
                while let Some(&token) = tokens.get(at) {
                    match token {
                        "}" => return at + 1,
                        "," => at += 1,
                        _ => at = tree(tokens, at, &parts, shown, found),
                    }
                }
                return at;
            }
            Some(&word) if is_word(word) => {
                parts.push(word);
                at += 1;
                if tokens.get(at) == Some(&"::") {
                    at += 1;
                    continue;
                }
                let mut name = word;
                if let [Some(&"as"), Some(&other)] = [tokens.get(at), tokens.get(at + 1)] {
                    name = other;
                    at += 2;
                }
                found.push(Named { parts, shown_as: shown.then_some(name) });
                return at;
            }
            // `*`, or the `<` of a type's arguments.
            _ => {
                found.push(Named { parts, shown_as: None });
                return at + 1;
            }
        }
    }
}

fn is_word(token: &str) -> bool {
    token.starts_with(|c: char| c.is_alphabetic() || c == '_')
}

fn tokens(text: &str) -> Vec<&str> {
    let mut found = Vec::new();
    let mut rest = text.trim_start();
    while let Some(first) = rest.chars().next() {
        let length = if first.is_alphanumeric() || first == '_' {
            rest.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(rest.len())
        } else if rest.starts_with("::") {
            2
        } else {
            first.len_utf8()
        };
        let (token, after) = rest.split_at(length);
        found.push(token);
        rest = after.trim_start();
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn paths(text: &str) -> Vec<String> {
        let counts = |word: &str| ["crate", "super", "child"].contains(&word);
        named(text, counts).iter().map(|named| named.parts.join("::")).collect()
    }

    #[test]
    fn paths_are_found_in_declarations_and_in_code() {
        for (text, expected) in [
            ("use crate::a::B;", &["crate::a::B"][..]),
            ("use crate::{a::{B, c::D as E}, f};", &["crate::a::B", "crate::a::c::D", "crate::f"]),
            (
                "use super::*; fn g(x: &crate::a::B<u8>) { child::run(x) }",
                &["super", "crate::a::B", "child::run"],
            ),
            ("let x: crate::a::Vec::<u8> = y;", &["crate::a::Vec"]),
            ("use super::super::a::{self, B};", &["super::super::a::self", "super::super::a::B"]),
            ("use other::crate_like; other::child::x(); self.child.x(); super_::x();", &[]),
            ("pub(in crate::a) fn f() {} pub(crate) struct G;", &[]),
        ] {
            assert_eq!(paths(text), expected, "{text}");
        }
    }

    #[test]
    fn what_is_shown_to_others_has_its_name() {
        let text =
            "use crate::a::B; pub use crate::c::D; pub(super) use crate::{e::F as G, h::*}; crate::i::j();";
        let shown: Vec<_> = named(text, |word| word == "crate").iter().map(|named| named.shown_as).collect();
        assert_eq!(shown, [None, Some("D"), Some("G"), None, None]);
    }
}
