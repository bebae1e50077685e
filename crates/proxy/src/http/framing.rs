//! A second look at the framing of HTTP/1.1 requests: which heads have both `Content-Length` and `Transfer-Encoding`.
//!
//! hyper follows RFC 9112 section 6.3 and drops the length when a request is chunked; whoever stands behind may not, and
//! Envoy refuses such requests. hyper tells nobody that there was a length, so this reader looks at the bytes as they pass:
//! it walks over heads line by line and jumps over bodies by their length or chunk sizes. It changes nothing and decides
//! nothing but this one question; when it cannot follow the bytes, chunked requests on the connection are refused.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::watched::Watch;

/// Longest begin of a line that is kept when the line comes in pieces.
const MAX_LINE: usize = 96;
/// Most heads that may be read before their requests are served; hyper's buffer holds fewer.
const MAX_AHEAD: usize = 8192;

/// What a head said about its body.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Head {
    chunked: bool,
    length: Option<u64>,
    lengths: bool,
}

/// Where in the bytes the reader is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum At {
    /// Before or in a head; whether its first line was seen.
    Head { started: bool },
    /// So many bytes of a body, and whether a chunk's line end follows.
    Body { left: u64, chunk: bool },
    /// The line with a chunk's size.
    Size,
    /// The empty line behind a chunk.
    ChunkEnd,
    /// Trailers.
    Trailers,
    /// Not understood.
    Lost,
}

/// Follows the requests of one connection.
#[derive(Debug)]
pub struct Follower {
    at: At,
    head: Head,
    line: Vec<u8>,
    line_length: usize,
    heads: VecDeque<Head>,
    /// Heads that have ended.
    count: u64,
    /// Whether the size of a chunk was none, or longer than any size.
    broken: bool,
}

impl Default for Follower {
    fn default() -> Self {
        Follower {
            at: At::Head { started: false },
            head: Head::default(),
            line: Vec::with_capacity(MAX_LINE),
            line_length: 0,
            heads: VecDeque::new(),
            count: 0,
            broken: false,
        }
    }
}

impl Follower {
    /// Looks at bytes that were read.
    fn feed(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            match self.at {
                At::Lost => return,
                At::Body { left, chunk } => {
                    let here = usize::try_from(left).unwrap_or(usize::MAX).min(bytes.len());
                    bytes = &bytes[here..];
                    let left = left - here as u64;
                    self.at = match (left, chunk) {
                        (0, true) => At::ChunkEnd,
                        (0, false) => At::Head { started: false },
                        _ => At::Body { left, chunk },
                    };
                }
                _ => match bytes.iter().position(|b| *b == b'\n') {
                    None => {
                        self.keep(bytes);
                        return;
                    }
                    Some(end) => {
                        self.keep(&bytes[..end]);
                        bytes = &bytes[end + 1..];
                        self.end_of_line();
                    }
                },
            }
        }
    }

    fn keep(&mut self, piece: &[u8]) {
        let room = MAX_LINE - self.line.len();
        self.line.extend_from_slice(&piece[..piece.len().min(room)]);
        self.line_length = self.line_length.saturating_add(piece.len());
        // The codec would read leading zeros for ever (threat 50).
        if self.at == At::Size && self.line_length > MAX_LINE && !self.line.contains(&b';') {
            self.broken = true;
        }
    }

    fn end_of_line(&mut self) {
        let mut line = std::mem::take(&mut self.line);
        let cut = self.line_length > line.len();
        self.line_length = 0;
        if !cut && line.last() == Some(&b'\r') {
            line.pop();
        }
        self.at = self.next(&line, cut);
        line.clear();
        self.line = line;
    }

    fn next(&mut self, line: &[u8], cut: bool) -> At {
        match self.at {
            // Empty lines before a request are allowed (RFC 9112 section 2.2).
            At::Head { started: false } if line.is_empty() => self.at,
            At::Head { started: false } => At::Head { started: true },
            At::Head { started: true } if line.is_empty() => self.end_of_head(),
            At::Head { started: true } => self.field(line, cut),
            At::Size => match chunk_size(line, cut) {
                Some(0) => At::Trailers,
                Some(left) => At::Body { left, chunk: true },
                None => {
                    self.broken = true;
                    At::Lost
                }
            },
            At::ChunkEnd if line.is_empty() => At::Size,
            At::Trailers if line.is_empty() => At::Head { started: false },
            At::Trailers => At::Trailers,
            At::ChunkEnd | At::Body { .. } | At::Lost => At::Lost,
        }
    }

    fn field(&mut self, line: &[u8], cut: bool) -> At {
        let same = At::Head { started: true };
        let Some(colon) = line.iter().position(|b| *b == b':') else {
            // Names are short; a line that is longer than what is kept has none of interest.
            return if cut { same } else { At::Lost };
        };
        let (name, value) = (&line[..colon], &line[colon + 1..]);
        if name.eq_ignore_ascii_case(b"transfer-encoding") {
            self.head.chunked = true;
        } else if name.eq_ignore_ascii_case(b"content-length") {
            let digits = value.trim_ascii();
            let number = std::str::from_utf8(digits)
                .ok()
                .filter(|d| !cut && !d.is_empty() && d.bytes().all(|b| b.is_ascii_digit()))
                .and_then(|d| d.parse().ok());
            self.head.lengths = true;
            match number {
                Some(length) if self.head.length.is_none_or(|l| l == length) => self.head.length = Some(length),
                _ => return At::Lost,
            }
        }
        same
    }

    fn end_of_head(&mut self) -> At {
        let head = std::mem::take(&mut self.head);
        self.count += 1;
        if self.heads.len() >= MAX_AHEAD {
            return At::Lost;
        }
        self.heads.push_back(head);
        match (head.chunked, head.length) {
            (true, _) => At::Size,
            (false, Some(left)) if left > 0 => At::Body { left, chunk: false },
            (false, _) => At::Head { started: false },
        }
    }

    /// The number of a head that has begun and not ended; the first has begun with the connection.
    pub fn unfinished(&self) -> Option<u64> {
        match self.at {
            At::Head { started } if started || self.line_length > 0 || self.count == 0 => Some(self.count),
            _ => None,
        }
    }

    /// To be called when the bytes are no requests any more.
    pub fn stop(&mut self) {
        self.at = At::Lost;
    }

    /// To be called once for each request that hyper hands out: whether its framing had only one reading. `chunked` is
    /// what hyper found.
    pub fn is_plain(&mut self, chunked: bool) -> bool {
        match self.heads.pop_front() {
            Some(head) => head.chunked == chunked && !(head.chunked && head.lengths),
            None => !chunked,
        }
    }
}

/// The size in the line before a chunk; `cut` says that the line is longer than what there is of it.
pub fn chunk_size(line: &[u8], cut: bool) -> Option<u64> {
    let digits = line.split(|b| *b == b';').next()?.trim_ascii_end();
    if digits.is_empty() || digits.len() > 15 || (cut && digits.len() == line.len()) {
        return None;
    }
    u64::from_str_radix(std::str::from_utf8(digits).ok()?, 16)
        .ok()
        .filter(|_| digits.iter().all(u8::is_ascii_hexdigit))
}

/// A follower between a connection and its requests. hyper wants `Send` of streams that may be upgraded; one thread
/// uses it, so the lock is free.
pub type SharedFollower = Arc<Mutex<Follower>>;

/// The follower.
pub fn follow(shared: &SharedFollower) -> MutexGuard<'_, Follower> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Watch for SharedFollower {
    fn read(&self, bytes: &[u8]) -> io::Result<()> {
        let mut follower = follow(self);
        follower.feed(bytes);
        if follower.broken {
            return Err(io::Error::other("the size of a chunk is none"));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the follower says about each request, for all ways to cut the bytes in two, and byte by byte.
    fn verdicts(bytes: &[u8], chunked: &[bool]) -> Vec<bool> {
        let ask = |pieces: &[&[u8]]| {
            let mut follower = Follower::default();
            for piece in pieces {
                follower.feed(piece);
            }
            chunked.iter().map(|c| follower.is_plain(*c)).collect::<Vec<_>>()
        };
        let whole = ask(&[bytes]);
        for at in 0..bytes.len() {
            assert_eq!(ask(&[&bytes[..at], &bytes[at..]]), whole, "cut at {at}");
        }
        let single: Vec<&[u8]> = bytes.chunks(1).collect();
        assert_eq!(ask(&single), whole, "byte by byte");
        whole
    }

    #[test]
    fn both_lengths_in_one_head_are_seen_wherever_they_stand() {
        for head in [
            "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n",
            "POST / HTTP/1.1\r\nTRANSFER-encoding: chunked\r\nContent-Length: 5\r\n\r\n",
            "\r\n\r\nPOST / HTTP/1.1\ncontent-length:0\ntransfer-encoding:chunked\n\n",
        ] {
            assert_eq!(verdicts(head.as_bytes(), &[true]), [false], "{head}");
        }
        let long = format!(
            "POST / HTTP/1.1\r\nX: {}\r\nContent-Length: 3\r\nX: {}\r\nTransfer-Encoding: chunked\r\n\r\n",
            "y".repeat(500),
            "z".repeat(500)
        );
        assert_eq!(verdicts(long.as_bytes(), &[true]), [false]);
    }

    #[test]
    fn bodies_are_jumped_over_and_what_they_hold_does_not_count() {
        let body = "Transfer-Encoding: chunked\r\nContent-Length: 9\r\n\r\n";
        let bytes = format!(
            "POST /1 HTTP/1.1\r\nContent-Length: {}\r\n\r\n{body}\
             POST /2 HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n{:x};ext=1\r\n{body}\r\n0\r\nTrailer: x\r\n\r\n\
             GET /3 HTTP/1.1\r\n\r\n\
             POST /4 HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n\
             POST /5 HTTP/1.1\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
            body.len(),
            body.len()
        );
        assert_eq!(
            verdicts(bytes.as_bytes(), &[false, true, false, true, true]),
            [true, true, true, true, false]
        );
    }

    #[test]
    fn what_cannot_be_followed_refuses_chunked_requests_only() {
        for junk in [
            "POST / HTTP/1.1\r\nContent-Length: 1x\r\n\r\n",
            "POST / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
            "POST / HTTP/1.1\r\nno colon\r\n\r\n",
        ] {
            assert_eq!(verdicts(junk.as_bytes(), &[true]), [false], "{junk}");
            assert_eq!(verdicts(junk.as_bytes(), &[false]), [true], "{junk}");
        }
        let bad = "POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n";
        assert_eq!(
            verdicts(bad.as_bytes(), &[true, true]),
            [true, false],
            "the next one is not known"
        );
        assert_eq!(
            verdicts(b"POST / HTTP/1.1\r\nHost: a\r\n\r\n", &[true]),
            [false],
            "hyper saw another request"
        );
    }
}
