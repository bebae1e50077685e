//! Where things stand in a YAML text: a tree of positions, looked up by field path.
//!
//! Values come from [`crate::yaml`]; this tree holds only structure and places, so that a [`crate::diagnostic::Diagnostic`], which names a
//! field path, can be printed with line and column, and a repair can cut the right piece out of the text. It also reads what
//! the value reader refuses (duplicate keys, unresolved aliases), because that is when a position is wanted most. Size and depth are bounded.

use granit_parser::{Event, Parser, ScalarStyle, StructureStyle};

/// Deepest nesting.
pub const MAX_DEPTH: usize = 100;
/// Most nodes of one text.
pub const MAX_NODES: usize = 2_000_000;

/// A place in a text.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, serde::Serialize)]
pub struct Position {
    /// Line, from 1.
    pub line: usize,
    /// Column in characters, from 1.
    pub column: usize,
    /// Bytes before it.
    #[serde(skip)]
    pub offset: usize,
}

/// Why a text has no tree.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct SyntaxError {
    /// Where reading stopped.
    pub at: Position,
    /// What is wrong there.
    pub message: String,
}

/// One node.
#[derive(Clone, Debug, PartialEq)]
pub struct Node {
    /// Its first character.
    pub start: Position,
    /// Bytes before its end.
    pub end: usize,
    /// What it is.
    pub content: Content,
}

/// What a node is.
#[derive(Clone, Debug, PartialEq)]
pub enum Content {
    /// A text, number, boolean or null.
    Scalar {
        /// After unescaping.
        text: String,
        /// Written without quotes.
        plain: bool,
    },
    /// A map, in order of appearance, duplicates included.
    Mapping(Vec<Entry>),
    /// A list.
    Sequence(Vec<Node>),
    /// `*name`.
    Alias,
}

/// One entry of a map.
#[derive(Clone, Debug, PartialEq)]
pub struct Entry {
    /// The key as text.
    pub key: String,
    /// The key's place.
    pub at: Position,
    /// Bytes before the key's end.
    pub key_end: usize,
    /// The value.
    pub value: Node,
}

impl Node {
    /// The entry of a map.
    pub fn get(&self, key: &str) -> Option<&Entry> {
        match &self.content {
            Content::Mapping(entries) => entries.iter().find(|entry| entry.key == key),
            _ => None,
        }
    }

    /// An item of a list.
    pub fn item(&self, index: usize) -> Option<&Node> {
        match &self.content {
            Content::Sequence(items) => items.get(index),
            _ => None,
        }
    }

    /// The place of the deepest part of `path` (`spec.rules[0].from`, `metadata.annotations[a.b/c]`) that is in the text: of the
    /// key, or of the item of a list. True when the whole path is there.
    pub fn locate(&self, path: &str) -> (Position, bool) {
        let (found, at) = self.walk(path);
        (at, found.is_some())
    }

    /// The node at `path`.
    pub fn at(&self, path: &str) -> Option<&Node> {
        self.walk(path).0
    }

    fn walk(&self, path: &str) -> (Option<&Node>, Position) {
        let mut node = self;
        let mut at = self.start;
        let mut rest = path;
        while !rest.is_empty() {
            match node.step(rest) {
                Some((next, place, tail)) => {
                    node = next;
                    at = place;
                    rest = tail;
                }
                None => return (None, at),
            }
        }
        (Some(node), at)
    }

    /// Takes the next segment off `path`. Keys may contain dots and brackets, so the longest key that fits wins.
    fn step<'a>(&self, path: &'a str) -> Option<(&Node, Position, &'a str)> {
        let bracketed = path.strip_prefix('[');
        match &self.content {
            Content::Sequence(items) => {
                let (index, tail) = bracketed?.split_once(']')?;
                let item = items.get(index.parse::<usize>().ok()?)?;
                Some((item, item.start, tail.strip_prefix('.').unwrap_or(tail)))
            }
            Content::Mapping(entries) => {
                let fits = |entry: &'_ Entry| -> Option<&'a str> {
                    if let Some(inner) = bracketed {
                        let tail = inner.strip_prefix(entry.key.as_str())?.strip_prefix(']')?;
                        return Some(tail.strip_prefix('.').unwrap_or(tail));
                    }
                    let tail = path.strip_prefix(entry.key.as_str())?;
                    match tail.chars().next() {
                        None | Some('[') => Some(tail),
                        Some('.') => Some(&tail[1..]),
                        Some(_) => None,
                    }
                };
                entries
                    .iter()
                    .filter_map(|entry| fits(entry).map(|tail| (entry, tail)))
                    .max_by_key(|(entry, _)| entry.key.len())
                    .map(|(entry, tail)| (&entry.value, entry.at, tail))
            }
            Content::Scalar { .. } | Content::Alias => None,
        }
    }

    /// The places where a map has a key a second time, with the key.
    pub fn duplicates(&self) -> Vec<(Position, String)> {
        let mut found = Vec::new();
        let mut todo = vec![self];
        while let Some(node) = todo.pop() {
            match &node.content {
                Content::Mapping(entries) => {
                    let mut seen = std::collections::BTreeSet::new();
                    for entry in entries {
                        if !seen.insert(entry.key.as_str()) {
                            found.push((entry.at, entry.key.clone()));
                        }
                        todo.push(&entry.value);
                    }
                }
                Content::Sequence(items) => todo.extend(items),
                Content::Scalar { .. } | Content::Alias => {}
            }
        }
        found.sort();
        found
    }
}

/// A container that is still open.
struct Open {
    start: Position,
    flow: bool,
    end: usize,
    kind: OpenKind,
}

enum OpenKind {
    Mapping(Vec<Entry>, Option<(String, Position, usize)>),
    Sequence(Vec<Node>),
}

/// The tree of the first document of a text; `None` if it is empty.
pub fn parse(text: &str) -> Result<Option<Node>, SyntaxError> {
    let options = granit_parser::options! { emit_comments: false, emit_unresolved_aliases: true };
    let mut parser = Parser::new_from_str_with_options(text, options);
    let mut stack: Vec<Open> = Vec::new();
    let mut count = 0;
    let mut root = None;
    while let Some(next) = parser.next_event() {
        let (event, span) = next.map_err(|e| SyntaxError {
            at: position(*e.marker()),
            message: e.kind().to_string(),
        })?;
        let start = position(span.start);
        let end = span.end.byte_offset().unwrap_or(start.offset);
        count += 1;
        if count > MAX_NODES || stack.len() > MAX_DEPTH {
            return Err(SyntaxError {
                at: start,
                message: format!("more than {MAX_NODES} nodes, or nested deeper than {MAX_DEPTH}"),
            });
        }
        let node = match event {
            Event::Scalar(text, style, ..) => Node {
                start,
                end,
                content: Content::Scalar {
                    text: text.into_owned(),
                    plain: style == ScalarStyle::Plain,
                },
            },
            Event::Alias(_) | Event::UnresolvedAlias(_) => Node {
                start,
                end,
                content: Content::Alias,
            },
            Event::MappingStart(style, ..) => {
                stack.push(Open {
                    start,
                    flow: style == StructureStyle::Flow,
                    end,
                    kind: OpenKind::Mapping(Vec::new(), None),
                });
                continue;
            }
            Event::SequenceStart(style, ..) => {
                stack.push(Open {
                    start,
                    flow: style == StructureStyle::Flow,
                    end,
                    kind: OpenKind::Sequence(Vec::new()),
                });
                continue;
            }
            Event::MappingEnd | Event::SequenceEnd => {
                let Some(open) = stack.pop() else { continue };
                Node {
                    start: open.start,
                    end: if open.flow { end } else { open.end },
                    content: match open.kind {
                        OpenKind::Mapping(entries, _) => Content::Mapping(entries),
                        OpenKind::Sequence(items) => Content::Sequence(items),
                    },
                }
            }
            Event::DocumentEnd => break,
            _ => continue,
        };
        match stack.last_mut() {
            None => root = Some(node),
            Some(open) => {
                open.end = open.end.max(node.end);
                match &mut open.kind {
                    OpenKind::Sequence(items) => items.push(node),
                    OpenKind::Mapping(entries, key) => match key.take() {
                        None => {
                            let name = match node.content {
                                Content::Scalar { text, .. } => text,
                                _ => String::new(),
                            };
                            *key = Some((name, node.start, node.end));
                        }
                        Some((key, at, key_end)) => entries.push(Entry {
                            key,
                            at,
                            key_end,
                            value: node,
                        }),
                    },
                }
            }
        }
    }
    Ok(root.filter(|node| !matches!(&node.content, Content::Scalar { text, plain: true } if text.is_empty())))
}

fn position(mark: granit_parser::Marker) -> Position {
    Position {
        line: mark.line().max(1),
        column: mark.col() + 1,
        offset: mark.byte_offset().unwrap_or_default(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(text: &str, path: &str) -> (usize, usize, bool) {
        let (at, whole) = parse(text).unwrap().unwrap().locate(path);
        (at.line, at.column, whole)
    }

    #[test]
    fn paths_to_places() {
        let text = "# head\nmetadata:\n  annotations:\n    a.b/c: x\nspec:\n  rules:\n  - from:\n    - source: {principals: [a, b]}\n  - to: é\n    when: x\n  portLevelMtls:\n    8080:\n      mode: STRICT\n";
        assert_eq!(place(text, ""), (2, 1, true));
        assert_eq!(place(text, "metadata.annotations[a.b/c]"), (4, 5, true));
        assert_eq!(place(text, "spec.rules[0].from[0].source.principals[1]"), (8, 32, true));
        assert_eq!(place(text, "spec.rules[1]"), (9, 5, true));
        assert_eq!(place(text, "spec.rules[1].when"), (10, 5, true));
        assert_eq!(place(text, "spec.portLevelMtls[8080]"), (12, 5, true));
        assert_eq!(place(text, "spec.portLevelMtls.8080.mode"), (13, 7, true));
        // What is not there is placed at the nearest thing around it.
        assert_eq!(place(text, "spec.selector.matchLabels"), (5, 1, false));
        assert_eq!(place(text, "spec.rules[7]"), (6, 3, false));
        assert_eq!(place("{\"a\": {\"b\": 1}}", "a.b"), (1, 8, true));
    }

    #[test]
    fn ends_and_texts() {
        let text = "items:\n- a: 1\n  b: [x, y]\n- {c: d}\n";
        let root = parse(text).unwrap().unwrap();
        let items = &root.get("items").unwrap().value;
        let cut = |node: &Node| text[node.start.offset..node.end].to_string();
        assert_eq!(cut(items.item(0).unwrap()), "a: 1\n  b: [x, y]");
        assert_eq!(cut(items.item(1).unwrap()), "{c: d}");
        let entry = root.get("items").unwrap();
        assert_eq!(&text[entry.at.offset..entry.key_end], "items");
    }

    #[test]
    fn bad_texts() {
        let error = parse("a: [1,\nb: 2\n").unwrap_err();
        assert!(error.at.line >= 1 && !error.message.is_empty(), "{error:?}");
        assert_eq!(parse("a:\n\tb: 1\n").unwrap_err().at.line, 2);
        assert!(parse("# only a comment\n").unwrap().is_none());
        assert!(parse("").unwrap().is_none());
        assert!(parse(&"[".repeat(5000)).is_err());
        assert!(parse(&"- ".repeat(5000)).is_err());
        let twice = parse("a: 1\nb: {c: 1, c: 2}\na: 3\n").unwrap().unwrap();
        let keys: Vec<_> = twice.duplicates().into_iter().map(|(at, key)| (at.line, key)).collect();
        assert_eq!(keys, [(2, "c".to_string()), (3, "a".to_string())]);
    }
}
