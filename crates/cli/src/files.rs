//! Reading the YAML and JSON files that users hand to commands.
//!
//! Every command with `-f` reads through here, so that all of them take the same things: files, directories (recursively), `-`
//! for standard input, several documents in a file, and lists of objects. A [`Document`] keeps its text, so that findings can be printed
//! with line and column. It must not know what the objects mean.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, bail};
use mantlet_api::spans::{self, Node, Position};
use mantlet_api::yaml;
use serde_json::Value;

/// Most bytes of all files together.
pub const MAX_TOTAL: usize = 64 << 20;
/// Most files.
pub const MAX_FILES: usize = 10_000;
/// Most objects of all files together.
pub const MAX_DOCUMENTS: usize = 100_000;
/// Deepest directory.
const MAX_DEPTH: usize = 32;

/// One object of a file.
#[derive(Clone, Debug)]
pub struct Document {
    /// The file as the user named it or as it was found in a directory; `-` for standard input.
    pub file: PathBuf,
    /// Line of the file, from 1, on which `text` begins.
    pub line: usize,
    /// The object's own text. Columns in it are those of the file.
    pub text: Arc<str>,
    /// What it says.
    pub value: Value,
}

impl Document {
    /// Line and column in the file of a field path, or of the nearest thing around it that is there.
    pub fn position(&self, path: &str) -> (usize, usize) {
        match spans::parse(&self.text) {
            Ok(Some(tree)) => self.place(tree.locate(path).0),
            _ => (self.line, 1),
        }
    }

    /// As [`Document::position`], with the text read once for many questions.
    pub fn tree(&self) -> Option<Node> {
        spans::parse(&self.text).ok().flatten()
    }

    /// Line and column in the file of a place in the text.
    pub fn place(&self, at: Position) -> (usize, usize) {
        (self.line + at.line - 1, at.column)
    }
}

/// The text of one YAML document of a file, not yet read.
#[derive(Clone, Debug)]
pub struct Chunk {
    /// The file.
    pub file: PathBuf,
    /// Line of the file, from 1, on which it begins.
    pub line: usize,
    /// Bytes of the file before it.
    pub offset: usize,
    /// The text, with its `---` line if it has one.
    pub text: Arc<str>,
}

/// Why a document cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}:{line}:{column}: {message}", file.display())]
pub struct Unreadable {
    /// The file.
    pub file: PathBuf,
    /// Line of the file, from 1.
    pub line: usize,
    /// Column, from 1.
    pub column: usize,
    /// What is wrong.
    pub message: String,
}

impl Chunk {
    /// The objects in it: none if it is empty, several if it is a list.
    pub fn read(&self) -> Result<Vec<Document>, Unreadable> {
        let fault = |at: Position, message: String| Unreadable {
            file: self.file.clone(),
            line: self.line + at.line.max(1) - 1,
            column: at.column.max(1),
            message,
        };
        let tree = spans::parse(&self.text).map_err(|e| fault(e.at, format!("invalid YAML: {}", e.message)))?;
        let Some(tree) = tree else { return Ok(Vec::new()) };
        if let Some((at, key)) = tree.duplicates().into_iter().next() {
            return Err(fault(
                at,
                format!("invalid YAML: the key {key:?} stands here a second time"),
            ));
        }
        let value = yaml::read_one(&self.text).map_err(|e| fault(tree.start, e.to_string()))?;
        if value.is_null() {
            return Ok(Vec::new());
        }
        let whole = Document {
            file: self.file.clone(),
            line: self.line,
            text: self.text.clone(),
            value,
        };
        Ok(flatten(whole, &tree))
    }
}

/// Reads all objects of files, directories (recursively, `.yaml`, `.yml` and `.json`, by name) and standard input (`-`). The items of
/// lists come one by one. The first text that cannot be read is an error with file, line and column.
pub fn load(paths: &[PathBuf]) -> anyhow::Result<Vec<Document>> {
    let mut documents = Vec::new();
    for chunk in chunks(paths)? {
        documents.extend(chunk.read()?);
        if documents.len() > MAX_DOCUMENTS {
            bail!("more than {MAX_DOCUMENTS} objects in the files");
        }
    }
    Ok(documents)
}

/// The documents of files, directories and standard input as texts.
pub fn chunks(paths: &[PathBuf]) -> anyhow::Result<Vec<Chunk>> {
    let mut chunks = Vec::new();
    for (file, text) in texts(paths)? {
        chunks.extend(split(&file, &text));
    }
    Ok(chunks)
}

/// The files' texts, bounded in number and size.
pub fn texts(paths: &[PathBuf]) -> anyhow::Result<Vec<(PathBuf, String)>> {
    let mut files = Vec::new();
    for path in paths {
        if path.as_os_str() == "-" {
            files.push(path.clone());
        } else {
            let meta = std::fs::metadata(path).with_context(|| format!("cannot read file {:?}", path.display()))?;
            if meta.is_dir() {
                directory(path, 0, &mut files)?;
            } else {
                files.push(path.clone());
            }
        }
        if files.len() > MAX_FILES {
            bail!("more than {MAX_FILES} files");
        }
    }
    let mut total = 0;
    let mut texts = Vec::new();
    for file in files {
        let text = read(&file)?;
        total += text.len();
        if total > MAX_TOTAL {
            bail!("the files together are over {} MiB", MAX_TOTAL >> 20);
        }
        texts.push((file, text));
    }
    Ok(texts)
}

fn directory(path: &Path, depth: usize, files: &mut Vec<PathBuf>) -> anyhow::Result<()> {
    if depth > MAX_DEPTH {
        bail!("directory {:?} is nested deeper than {MAX_DEPTH}", path.display());
    }
    let mut entries = std::fs::read_dir(path)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .with_context(|| format!("cannot read directory {:?}", path.display()))?;
    entries.sort_by_key(std::fs::DirEntry::file_name);
    for entry in entries {
        let path = entry.path();
        // Names with a leading dot are editors' and version control's. Links to directories could lead in a circle.
        if entry.file_name().to_string_lossy().starts_with('.') {
            continue;
        }
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            directory(&path, depth + 1, files)?;
        } else if path.is_file()
            && path
                .extension()
                .is_some_and(|e| e == "yaml" || e == "yml" || e == "json")
        {
            files.push(path);
        }
        if files.len() > MAX_FILES {
            bail!("more than {MAX_FILES} files");
        }
    }
    Ok(())
}

/// One file's text, at most [`yaml::MAX_BYTES`].
fn read(file: &Path) -> anyhow::Result<String> {
    let name = file.display();
    let mut bytes = Vec::new();
    let limit = yaml::MAX_BYTES as u64 + 1;
    if file.as_os_str() == "-" {
        std::io::stdin().lock().take(limit).read_to_end(&mut bytes)
    } else {
        std::fs::File::open(file).and_then(|f| f.take(limit).read_to_end(&mut bytes))
    }
    .with_context(|| format!("cannot read file {name:?}", name = name.to_string()))?;
    if bytes.len() > yaml::MAX_BYTES {
        bail!("{name}: larger than {} MiB", yaml::MAX_BYTES >> 20);
    }
    String::from_utf8(bytes).map_err(|e| {
        let line = 1 + e.as_bytes()[..e.utf8_error().valid_up_to()]
            .iter()
            .filter(|b| **b == b'\n')
            .count();
        anyhow::anyhow!("{name}:{line}:1: the text is not UTF-8; save the file as UTF-8")
    })
}

/// Cuts a text at its `---` and `...` lines, which at the start of a line always end a YAML document.
pub fn split(file: &Path, text: &str) -> Vec<Chunk> {
    let mut chunks = Vec::new();
    let mut begin = (0, 1);
    let mut offset = 0;
    let push = |from: (usize, usize), to: usize, chunks: &mut Vec<Chunk>| {
        let piece = &text[from.0..to];
        let says_something = piece.lines().any(|line| {
            let line = line.trim_start_matches('\u{feff}').trim();
            !line.is_empty() && !line.starts_with('#') && line != "---" && line != "..."
        });
        if says_something {
            chunks.push(Chunk {
                file: file.to_path_buf(),
                line: from.1,
                offset: from.0,
                text: piece.into(),
            });
        }
    };
    for (number, line) in text.split_inclusive('\n').enumerate() {
        let marker = |mark: &str| {
            line.strip_prefix(mark)
                .is_some_and(|rest| rest.is_empty() || rest.starts_with([' ', '\t', '\r', '\n']))
        };
        if marker("---") {
            // Directives (`%YAML 1.2`) belong to the document that follows them.
            let directives = text[begin.0..offset].lines().any(|line| line.starts_with('%'))
                && text[begin.0..offset]
                    .lines()
                    .all(|line| line.is_empty() || line.starts_with(['%', '#']));
            if !directives {
                push(begin, offset, &mut chunks);
                begin = (offset, number + 1);
            }
        } else if marker("...") {
            push(begin, offset + line.len(), &mut chunks);
            begin = (offset + line.len(), number + 2);
        }
        offset += line.len();
    }
    push(begin, text.len(), &mut chunks);
    chunks
}

/// The items of a `List` (or `PodList` and the like), each with its own piece of the text; any other object is itself.
fn flatten(document: Document, tree: &Node) -> Vec<Document> {
    let kind = document.value.get("kind").and_then(Value::as_str).unwrap_or_default();
    let items = document.value.get("items").and_then(Value::as_array);
    let (Some(item_kind), Some(items)) = (kind.strip_suffix("List"), items) else {
        return vec![document];
    };
    let api_version = document.value.get("apiVersion").cloned();
    let mut all = Vec::new();
    for (i, item) in items.iter().enumerate() {
        let mut value = item.clone();
        if let (false, Some(map)) = (item_kind.is_empty(), value.as_object_mut()) {
            // Items of typed lists have neither.
            map.entry("kind").or_insert_with(|| item_kind.into());
            if let Some(api_version) = &api_version {
                map.entry("apiVersion").or_insert_with(|| api_version.clone());
            }
        }
        let node = tree.get("items").and_then(|entry| entry.value.item(i));
        let (line, text) = match node {
            // Blanks before the first line keep the columns what they are in the file.
            Some(node) if node.end > node.start.offset => {
                let text = format!(
                    "{}{}",
                    " ".repeat(node.start.column - 1),
                    &document.text[node.start.offset..node.end]
                );
                (document.line + node.start.line - 1, Arc::from(text))
            }
            _ => (document.line, document.text.clone()),
        };
        all.push(Document {
            file: document.file.clone(),
            line,
            text,
            value,
        });
    }
    // A list of lists is legal and pointless; one level more is enough.
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    fn documents(text: &str) -> Vec<Document> {
        split(Path::new("f.yaml"), text)
            .iter()
            .flat_map(|chunk| chunk.read().unwrap())
            .collect()
    }

    #[test]
    fn several_documents_keep_their_lines() {
        let text = "# one\na: 1\nb: 2\n---\n# nothing\n---\r\nc: 3\n...\n--- {d: 4}\n%YAML 1.2\n---\ne: 5\n";
        let text = text.replace("--- {d: 4}\n%YAML", "--- {d: 4}\n...\n%YAML");
        let found: Vec<_> = documents(&text)
            .iter()
            .map(|d| {
                let key = d.value.as_object().unwrap().keys().next().unwrap().clone();
                (key.clone(), d.position(&key))
            })
            .collect();
        let expected = [("a", (2, 1)), ("c", (7, 1)), ("d", (9, 6)), ("e", (13, 1))];
        assert_eq!(found, expected.map(|(k, p)| (k.to_string(), p)));
    }

    #[test]
    fn lists_are_flattened_with_places() {
        let text =
            "kind: List\napiVersion: v1\nitems:\n  - kind: A\n    spec:\n      x: 1\n  - {kind: B, spec: {x: 2}}\n";
        let all = documents(text);
        assert_eq!(all.len(), 2);
        assert_eq!(all[0].position("spec.x"), (6, 7));
        assert_eq!(all[1].position("spec.x"), (7, 22));
        let typed = documents(
            "{\"kind\": \"PodList\", \"apiVersion\": \"v1\", \"items\": [{\"metadata\": {\"name\": \"a\"}}]}",
        );
        assert_eq!(typed[0].value["kind"], "Pod");
        assert_eq!(typed[0].position("metadata.name"), (1, 65));
    }

    #[test]
    fn unreadable_texts_have_places() {
        let fault = |text: &str| {
            let chunk = split(Path::new("f.yaml"), text).pop().unwrap();
            chunk.read().unwrap_err()
        };
        let e = fault("a: 1\n---\nb:\n\tc: 1\n");
        assert_eq!(e.line, 4, "{e}");
        let e = fault("a: 1\n---\nb: 1\nb: 2\n");
        assert_eq!((e.line, e.column), (4, 1), "{e}");
        assert!(e.to_string().starts_with("f.yaml:4:1: "), "{e}");
    }

    #[test]
    fn directories_and_limits() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        std::fs::create_dir(path("sub")).unwrap();
        std::fs::write(path("b.yaml"), "n: 2").unwrap();
        std::fs::write(path("a.json"), "{\"n\": 1}").unwrap();
        std::fs::write(path("sub/c.yml"), "n: 3").unwrap();
        std::fs::write(path("README.md"), "no: [").unwrap();
        std::fs::write(path(".hidden.yaml"), "no: [").unwrap();
        let all = load(&[dir.path().to_path_buf()]).unwrap();
        let numbers: Vec<_> = all.iter().map(|d| d.value["n"].as_i64().unwrap()).collect();
        assert_eq!(numbers, [1, 2, 3]);
        assert!(load(&[path("absent.yaml")]).is_err());
        std::fs::write(path("latin.yaml"), b"a: 1\nb: \xe9\n").unwrap();
        let error = load(&[path("latin.yaml")]).unwrap_err().to_string();
        assert!(error.contains("latin.yaml:2:1: the text is not UTF-8"), "{error}");
        std::fs::write(path("big.yaml"), vec![b'#'; yaml::MAX_BYTES + 1]).unwrap();
        assert!(
            load(&[path("big.yaml")])
                .unwrap_err()
                .to_string()
                .contains("larger than")
        );
    }
}
