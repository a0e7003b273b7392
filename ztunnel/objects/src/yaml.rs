//! YAML text as a tree in which every value knows its line.
//!
//! Knows nothing of Kubernetes. Bounds what a text may cost: its depth, and its size after aliases are
//! expanded. JSON is read as the YAML it is.
//!
//! The parser is a library; the tree and its decoder are by hand, as libraries that deserialize (serde-saphyr, looked at in
//! version 2.2) give a line only to fields of a type of their own, which Kubernetes' types do not have, and say neither
//! which fields a type has nor more than the first error: they would come on top of the tree instead of in its place.

use std::collections::HashMap;
use std::collections::HashSet;
use std::sync::Arc;

use saphyr_parser::Event;
use saphyr_parser::Parser;
use saphyr_parser::ScalarStyle;
use saphyr_parser::ScanError;
use saphyr_parser::Tag;

pub mod decoder;

/// A value and the line it stands on.
#[derive(Debug)]
pub struct Node {
    /// Counted from 1.
    pub line: u32,
    /// The value.
    pub value: Value,
}

/// What a node holds.
#[derive(Debug)]
pub enum Value {
    /// A text, number, boolean or null: which of them is decided where the type is known.
    Scalar {
        /// As written, without quotes and escapes.
        text: Box<str>,
        /// Written without quotes, so that `80` is a number and `~` is null.
        plain: bool,
    },
    /// A sequence.
    List(Vec<Arc<Node>>),
    /// A mapping, in the order it was written, without duplicates.
    Map(Vec<Entry>),
}

/// One key of a mapping.
#[derive(Debug)]
pub struct Entry {
    /// The key.
    pub key: Box<str>,
    /// The line of the key.
    pub line: u32,
    /// What it maps to.
    pub value: Arc<Node>,
}

impl Node {
    /// The value of `key`, if this is a mapping that has it.
    pub fn entry(&self, key: &str) -> Option<&Entry> {
        match &self.value {
            Value::Map(entries) => entries.iter().find(|entry| &*entry.key == key),
            Value::Scalar { .. } | Value::List(_) => None,
        }
    }

    /// The text of `key`, if this is a mapping that has it and it is not null.
    pub fn text(&self, key: &str) -> Option<&str> {
        match &self.entry(key)?.value.value {
            Value::Scalar { text, plain } if !(*plain && is_null(text)) => Some(text),
            Value::Scalar { .. } | Value::List(_) | Value::Map(_) => None,
        }
    }

    /// The same with what is above `depth` only, and without texts: enough for [`Self::line_of`].
    pub fn skeleton(&self, depth: usize) -> Self {
        let nothing = || Value::Scalar { text: Box::from(""), plain: true };
        let below = |node: &Self| Arc::new(node.skeleton(depth.saturating_sub(1)));
        let value = match &self.value {
            Value::List(items) if depth > 0 => Value::List(items.iter().map(|item| below(item)).collect()),
            Value::Map(entries) if depth > 0 => {
                let entry = |entry: &Entry| Entry {
                    key: entry.key.clone(),
                    line: entry.line,
                    value: below(&entry.value),
                };
                Value::Map(entries.iter().map(entry).collect())
            }
            Value::Scalar { .. } | Value::List(_) | Value::Map(_) => nothing(),
        };
        Self { line: self.line, value }
    }

    /// Whether this is a mapping that has both keys, `key` after `other`.
    pub fn is_after(&self, key: &str, other: &str) -> bool {
        let Value::Map(entries) = &self.value else { return false };
        let place = |key: &str| entries.iter().position(|entry| &*entry.key == key);
        place(key).zip(place(other)).is_some_and(|(key, other)| key > other)
    }

    /// Whether nothing is written here.
    pub fn is_null(&self) -> bool {
        matches!(&self.value, Value::Scalar { text, plain: true } if is_null(text))
    }

    /// The line of what `path` leads to, or of as much of it as there is. A segment is a key, or an index
    /// into a sequence.
    pub fn line_of(&self, path: &[&str]) -> u32 {
        let (mut node, mut line) = (self, self.line);
        for segment in path {
            match &node.value {
                Value::Map(_) => {
                    let Some(entry) = node.entry(segment) else { break };
                    (node, line) = (&entry.value, entry.line);
                }
                Value::List(items) => {
                    let index = segment.parse::<usize>().ok();
                    let Some(item) = index.and_then(|index| items.get(index)) else { break };
                    (node, line) = (item, item.line);
                }
                Value::Scalar { .. } => break,
            }
        }
        line
    }
}

/// Whether a plain scalar means null.
pub fn is_null(text: &str) -> bool {
    matches!(text, "" | "~" | "null" | "Null" | "NULL")
}

/// Why a text is not YAML that we read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SyntaxError {
    /// The scanner's or parser's complaint.
    #[error("not YAML: {0}")]
    Yaml(String),
    /// Nested too deeply.
    #[error("nested more than {DEPTH_MAX} levels deep")]
    Depth,
    /// Too large, or aliases expand to too much.
    #[error("holds more than {NODES_MAX} values, counting what aliases expand to")]
    Size,
    /// Aliases expand to much more than is written.
    #[error("aliases expand to more than {0} values, too many for a text of this length")]
    Expansion(usize),
    /// A mapping has a key twice.
    #[error("key {0:?} is there twice, first on line {1}")]
    Duplicate(String, u32),
    /// A mapping's key is not a text.
    #[error("a key must be a text")]
    Key,
    /// An alias to nothing, or to what encloses it.
    #[error("alias to an anchor that is not complete here")]
    Alias,
    /// A tag outside YAML's core schema.
    #[error("tag {0} is not known")]
    Tag(String),
}

/// Deeper than any Kubernetes object goes (a pod reaches about 15 levels), and little enough for the stack.
const DEPTH_MAX: usize = 64;

/// How many values one text may hold: some 20,000 pods as `kubectl get -o yaml` prints them.
const NODES_MAX: usize = 4_000_000;

/// How many values aliases may expand to in a text that is short.
const EXPANSION_MIN: usize = 10_000;

/// How many values aliases may expand to for each byte of a text that is long: many objects that share their parts. Each
/// value is decoded again wherever it is used, so a text must not become much larger by being read.
const EXPANSION_FOR_EACH_BYTE: usize = 8;

/// The documents of `text` that are not empty. An error comes with its line.
pub fn documents(text: &str) -> Result<Vec<Arc<Node>>, (u32, SyntaxError)> {
    let mut documents = Vec::new();
    parse(text, Pieces { sink: &mut |piece| documents.extend(piece.document()), items: false })?;
    Ok(documents)
}

/// A part of a text.
#[derive(Debug)]
pub enum Piece {
    /// An element of the list `items` of a document that is not over, with a kind and a version of its own.
    Item(Arc<Node>),
    /// A document, without such elements, and how many of them there were.
    Document(Arc<Node>, usize),
}

impl Piece {
    fn document(self) -> Option<Arc<Node>> {
        match self {
            Self::Item(_) => None,
            Self::Document(node, _) => Some(node),
        }
    }
}

/// Gives out the documents of `text` that are not empty, one after the other, and long lists element by element, so that
/// nobody has to have the tree of all of it. An error comes with its line; what was given out before it is not taken
/// back.
pub fn pieces(text: &str, sink: &mut dyn FnMut(Piece)) -> Result<(), (u32, SyntaxError)> {
    parse(text, Pieces { sink, items: true })
}

fn parse(text: &str, pieces: Pieces<'_>) -> Result<(), (u32, SyntaxError)> {
    let mut parser = Parser::new_from_str(text.strip_prefix('\u{feff}').unwrap_or(text));
    let expansion_max = EXPANSION_MIN.max(text.len().saturating_mul(EXPANSION_FOR_EACH_BYTE));
    let mut builder = Builder::new(pieces, expansion_max);
    while let Some(event) = parser.next_event() {
        let (event, span) = event.map_err(|error| syntax(&error, text))?;
        let line = line(span.start.line());
        builder.event(event, line).map_err(|error| (line, error))?;
    }
    Ok(())
}

fn syntax(error: &ScanError, text: &str) -> (u32, SyntaxError) {
    let (mut at, what) = (line(error.marker().line()), error.info());
    if what.contains("tab") {
        // Of a tab that follows a text, the scanner names the line of the text.
        let indented = |(_, line): &(usize, &str)| line.trim_start_matches(' ').starts_with('\t');
        let tab = text.lines().enumerate().skip(at as usize - 1).find(indented);
        at = tab.map_or(at, |(number, _)| line(number + 1));
    }
    (at, SyntaxError::Yaml(what.to_owned()))
}

fn line(line: usize) -> u32 {
    u32::try_from(line).unwrap_or(u32::MAX).max(1)
}

/// Where what is finished goes.
struct Pieces<'p> {
    sink: &'p mut dyn FnMut(Piece),
    /// Elements of lists are given out by themselves.
    items: bool,
}

/// Makes trees of events, without recursion.
struct Builder<'p> {
    pieces: Pieces<'p>,
    /// How many elements of the list of this document were given out.
    given: usize,
    open: Vec<Open>,
    anchors: HashMap<usize, (Arc<Node>, usize)>,
    /// How many nodes there are, counting what aliases expand to.
    nodes: usize,
    /// How many of them are what aliases expand to, and how many may be.
    expanded: usize,
    expansion_max: usize,
}

/// A collection whose end is not seen yet.
struct Open {
    line: u32,
    anchor: usize,
    /// The builder's count of nodes when this was opened.
    before: usize,
    value: Value,
    /// The key that waits for its value.
    key: Option<(Box<str>, u32)>,
    /// The keys so far, for large mappings: looking through the entries would be quadratic.
    keys: HashSet<Box<str>>,
}

impl<'p> Builder<'p> {
    fn new(pieces: Pieces<'p>, expansion_max: usize) -> Self {
        let (open, anchors) = (Vec::new(), HashMap::new());
        Self { pieces, given: 0, open, anchors, nodes: 0, expanded: 0, expansion_max }
    }

    /// Whether what is finished now is an element of the list `items` of a document.
    fn is_item(&self, node: &Node) -> bool {
        let [root, list] = &self.open[..] else { return false };
        let of_items = matches!(list.value, Value::List(_))
            && root.key.as_ref().is_some_and(|(key, _)| &**key == "items");
        self.pieces.items && of_items && node.text("kind").is_some() && node.text("apiVersion").is_some()
    }

    fn event(&mut self, event: Event<'_>, line: u32) -> Result<(), SyntaxError> {
        match event {
            Event::Nothing | Event::StreamStart | Event::StreamEnd => Ok(()),
            Event::DocumentStart(_) | Event::DocumentEnd => {
                self.anchors.clear();
                Ok(())
            }
            Event::Alias(anchor) => {
                let (node, nodes) = self.anchors.get(&anchor).ok_or(SyntaxError::Alias)?;
                let (node, nodes) = (Arc::clone(node), *nodes);
                self.expanded = self.expanded.saturating_add(nodes);
                if self.expanded > self.expansion_max {
                    return Err(SyntaxError::Expansion(self.expansion_max));
                }
                self.count(nodes)?;
                self.place(node, line)
            }
            Event::Scalar(text, style, anchor, tag) => {
                self.count(1)?;
                let quoted_by_tag = core_tag(tag.as_deref())? == Some("str");
                let plain = style == ScalarStyle::Plain && !quoted_by_tag;
                let node = Arc::new(Node { line, value: Value::Scalar { text: text.into(), plain } });
                if anchor > 0 {
                    self.anchors.insert(anchor, (Arc::clone(&node), 1));
                }
                self.place(node, line)
            }
            Event::SequenceStart(anchor, tag) => {
                core_tag(tag.as_deref())?;
                self.enter(line, anchor, Value::List(Vec::new()))
            }
            Event::MappingStart(anchor, tag) => {
                core_tag(tag.as_deref())?;
                self.enter(line, anchor, Value::Map(Vec::new()))
            }
            Event::SequenceEnd | Event::MappingEnd => {
                let Some(open) = self.open.pop() else { return Ok(()) };
                let node = Arc::new(Node { line: open.line, value: open.value });
                if open.anchor > 0 {
                    self.anchors.insert(open.anchor, (Arc::clone(&node), self.nodes - open.before + 1));
                }
                self.place(node, open.line)
            }
        }
    }

    fn count(&mut self, nodes: usize) -> Result<(), SyntaxError> {
        self.nodes = self.nodes.saturating_add(nodes);
        if self.nodes > NODES_MAX { Err(SyntaxError::Size) } else { Ok(()) }
    }

    fn enter(&mut self, line: u32, anchor: usize, value: Value) -> Result<(), SyntaxError> {
        self.count(1)?;
        if self.open.len() >= DEPTH_MAX {
            return Err(SyntaxError::Depth);
        }
        let before = self.nodes;
        self.open.push(Open { line, anchor, before, value, key: None, keys: HashSet::new() });
        Ok(())
    }

    /// Puts a finished node where it belongs. `line` is where it is used, which an alias makes another line
    /// than where it is written.
    fn place(&mut self, node: Arc<Node>, line: u32) -> Result<(), SyntaxError> {
        if self.is_item(&node) {
            self.given += 1;
            (self.pieces.sink)(Piece::Item(node));
            return Ok(());
        }
        let Some(parent) = self.open.last_mut() else {
            let given = std::mem::take(&mut self.given);
            if !node.is_null() {
                (self.pieces.sink)(Piece::Document(node, given));
            }
            return Ok(());
        };
        match &mut parent.value {
            Value::List(items) => items.push(node),
            Value::Map(entries) => match parent.key.take() {
                Some((key, line)) => entries.push(Entry { key, line, value: node }),
                None => {
                    let Value::Scalar { text, .. } = &node.value else { return Err(SyntaxError::Key) };
                    if !parent.keys.insert(text.clone()) {
                        let first = entries.iter().find(|entry| entry.key == *text);
                        let first = first.map_or(0, |entry| entry.line);
                        return Err(SyntaxError::Duplicate(text.to_string(), first));
                    }
                    parent.key = Some((text.clone(), line));
                }
            },
            Value::Scalar { .. } => unreachable!("only collections are opened, in `Builder::enter`"),
        }
        Ok(())
    }
}

/// The suffix of a tag of the core schema (`str` of `!!str`).
fn core_tag(tag: Option<&Tag>) -> Result<Option<&str>, SyntaxError> {
    match tag {
        None => Ok(None),
        Some(tag) if tag.is_yaml_core_schema() => Ok(Some(&tag.suffix)),
        Some(tag) => Err(SyntaxError::Tag(tag.to_string())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_value_knows_its_line() {
        let text = "a: 1\nb:\n  c:\n  - x\n  - y: {z: 2,\n      w: 3}\n---\n---\n# nothing\n---\nd: e\n";
        let documents = documents(text).unwrap();
        assert_eq!(documents.len(), 2);
        let lines = |path: &[&str]| documents[0].line_of(path);
        assert_eq!(lines(&[]), 1);
        assert_eq!(lines(&["b"]), 2);
        assert_eq!(lines(&["b", "c"]), 3);
        assert_eq!(lines(&["b", "c", "0"]), 4);
        assert_eq!(lines(&["b", "c", "1", "y", "w"]), 6);
        assert_eq!(lines(&["b", "c", "1", "absent"]), 5, "as much of the path as there is");
        assert_eq!(documents[1].line_of(&["d"]), 11);
    }

    #[test]
    fn what_we_do_not_read_is_refused_with_its_line() {
        let deep = format!("a: {}", "[".repeat(100));
        let bomb = {
            let mut text = String::from("a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n");
            for level in 1..12 {
                let alias = format!("*a{}, ", level - 1).repeat(10);
                text += &format!("a{level}: &a{level} [{alias}]\n");
            }
            text
        };
        for (text, line, error) in [
            ("a: 1\nb: 2\na: 3\n", 3, SyntaxError::Duplicate("a".into(), 1)),
            ("x:\n  ? [1]\n  : 2\n", 2, SyntaxError::Key),
            ("a: !Foo x\n", 1, SyntaxError::Tag("!Foo".into())),
            (deep.as_str(), 1, SyntaxError::Depth),
            (bomb.as_str(), 4, SyntaxError::Expansion(EXPANSION_MIN)),
        ] {
            assert_eq!(documents(text).unwrap_err(), (line, error), "{text:.60}");
        }
        let (line, error) = documents("a: 1\nb: [1\nc: 2\n").unwrap_err();
        assert!(matches!(error, SyntaxError::Yaml(_)) && line >= 2, "{line} {error}");
    }

    #[test]
    fn long_lists_are_given_out_element_by_element() {
        let text = "apiVersion: v1\nitems:\n- {apiVersion: v1, kind: Pod, a: [{kind: x, apiVersion: y}]}\n\
                    - {name: bare}\n- apiVersion: v1\n  kind: Pod\nkind: List\n---\nkind: Other\n";
        let mut given = Vec::new();
        let mut sink = |piece: Piece| {
            given.push(match piece {
                Piece::Item(node) => format!("item {}", node.line),
                Piece::Document(node, items) => {
                    let left = node.entry("items").map(|entry| match &entry.value.value {
                        Value::List(items) => items.len(),
                        _ => 0,
                    });
                    format!("document {} {items} {left:?}", node.text("kind").unwrap_or_default())
                }
            });
        };
        pieces(text, &mut sink).unwrap();
        assert_eq!(given, ["item 3", "item 5", "document List 2 Some(1)", "document Other 0 None"]);
    }

    #[test]
    fn a_skeleton_knows_the_lines() {
        let documents = documents("a:\n  b:\n    c:\n      d: 1\n").unwrap();
        let skeleton = documents[0].skeleton(3);
        assert_eq!(
            [&["a"][..], &["a", "b", "c"], &["a", "b", "c", "d"]].map(|path| skeleton.line_of(path)),
            [1, 3, 3]
        );
    }

    #[test]
    fn a_tab_is_found_on_its_own_line() {
        for (text, line) in
            [("a:\n  b: 1\n\tc: 2\n", 3), ("a:\n\tb: 1\n", 2), ("a: 1\nb:\n  c: x\n  \td: 1\n", 4)]
        {
            let (at, error) = documents(text).unwrap_err();
            assert!(matches!(&error, SyntaxError::Yaml(what) if what.contains("tab")), "{error}");
            assert_eq!(at, line, "{text:?}");
        }
    }

    #[test]
    fn many_objects_may_share_their_parts() {
        let mut text = format!("- &spec [{}]\n", "x, ".repeat(300));
        text += &"- {name: cart, namespace: shop, spec: *spec}\n".repeat(1000);
        assert!(documents(&text).is_ok());
    }

    #[test]
    fn an_alias_stands_for_what_it_names() {
        let documents = documents("a: &x {b: c}\nd: *x\n").unwrap();
        let d = documents[0].entry("d").unwrap();
        assert_eq!(d.line, 2);
        assert_eq!(d.value.text("b"), Some("c"));
    }
}
