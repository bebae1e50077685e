//! Reads HTTP/1.1 responses out of bytes: where the head ends, what it says, where the body ends.
//!
//! `http1` feeds it. A response has one reading or none: what two parsers may read differently is refused, and what
//! follows a response belongs to no request. It has no socket and knows nothing of requests but whether one was HEAD.

use std::mem::MaybeUninit;

use bytes::{Buf, Bytes, BytesMut};
use http::header::{self, HeaderMap, HeaderName, HeaderValue};
use http::{Response, StatusCode, Version};
use hyper::body::Frame;

use crate::http::framing::chunk_size;

/// Largest head of a response.
const MAX_HEAD: usize = 64 * 1024;
/// Most fields of a response, and of its trailers.
const MAX_FIELDS: usize = 100;
/// Most interim responses (1xx) before the final one.
const MAX_INTERIM: u32 = 16;
/// Longest line with a chunk's size, its extensions included.
const MAX_CHUNK_LINE: usize = 4096;
/// Most bytes of trailers.
const MAX_TRAILERS: usize = 16 * 1024;

/// What makes a response none, in words for the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the response is no HTTP/1.1: {0}")]
pub struct Garbled(pub &'static str);

/// What of a response is still to come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Rest {
    /// Its head.
    Head,
    /// So many bytes of its body.
    Length(u64),
    /// The line with a chunk's size.
    Size,
    /// So many bytes of a chunk.
    Chunk(u64),
    /// The line end behind a chunk.
    ChunkEnd,
    /// Trailers and the empty line behind them.
    Trailers,
    /// Whatever comes until the connection ends.
    UntilEnd,
    /// Nothing.
    Nothing,
}

/// What a look at the bytes gave.
#[derive(Debug)]
pub enum Found {
    /// A part of the body, or its trailers.
    Frame(Frame<Bytes>),
    /// The body has ended.
    End,
    /// More bytes are needed.
    More,
}

/// Reads the response to one request after the other.
#[derive(Debug)]
pub struct Reader {
    /// Read and not yet understood.
    pub input: BytesMut,
    rest: Rest,
    /// So many bytes were looked at and hold no whole head.
    seen: usize,
    interim: u32,
    /// Whether the request was HEAD.
    bodiless: bool,
    /// Whether the connection may carry another request after this response.
    keep: bool,
}

impl Default for Reader {
    fn default() -> Self {
        Reader {
            input: BytesMut::new(),
            rest: Rest::Nothing,
            seen: 0,
            interim: 0,
            bodiless: false,
            keep: true,
        }
    }
}

impl Reader {
    /// Begins to wait for the response to a request; `bodiless` says that it was HEAD.
    pub fn expect(&mut self, bodiless: bool) {
        self.rest = Rest::Head;
        (self.seen, self.interim) = (0, 0);
        self.bodiless = bodiless;
    }

    /// Whether the response has been read to its end.
    pub fn is_done(&self) -> bool {
        self.rest == Rest::Nothing
    }

    /// Whether another request may follow: this response has ended, said nothing against it, and nothing came behind it.
    pub fn is_reusable(&self) -> bool {
        self.keep && self.is_done() && self.input.is_empty()
    }

    /// Bytes still to come of a body, if its head has said so.
    pub fn left(&self) -> Option<u64> {
        match self.rest {
            Rest::Length(left) => Some(left),
            Rest::Nothing => Some(0),
            _ => None,
        }
    }

    /// The connection has ended: whether that is the response's end, too.
    pub fn end(&mut self) -> bool {
        self.keep = false;
        if self.rest == Rest::UntilEnd {
            self.rest = Rest::Nothing;
        }
        self.is_done()
    }

    /// The head of the final response, once it is there.
    ///
    /// # Errors
    /// When it is none, or has more than one reading.
    pub fn head(&mut self) -> Result<Option<Response<()>>, Garbled> {
        loop {
            let Some(head) = self.one_head()? else {
                return match self.input.len() {
                    ..MAX_HEAD => Ok(None),
                    _ => Err(Garbled("its head is too large")),
                };
            };
            let status = head.status();
            if status.is_informational() && status != StatusCode::SWITCHING_PROTOCOLS {
                self.interim += 1;
                if self.interim > MAX_INTERIM {
                    return Err(Garbled("it has too many interim responses"));
                }
                continue;
            }
            self.rest = self.framing(&head)?;
            return Ok(Some(head));
        }
    }

    fn one_head(&mut self) -> Result<Option<Response<()>>, Garbled> {
        // A head that comes in small pieces is parsed once it may be whole, not with each of them.
        if self.input.is_empty() || (self.seen > 0 && !has_empty_line(&self.input[self.seen.saturating_sub(3)..])) {
            self.seen = self.input.len();
            return Ok(None);
        }
        let mut fields = [const { MaybeUninit::uninit() }; MAX_FIELDS];
        let mut parsed = httparse::Response::new(&mut []);
        let parser = httparse::ParserConfig::default();
        let length = match parser.parse_response_with_uninit_headers(&mut parsed, &self.input, &mut fields) {
            Ok(httparse::Status::Complete(length)) if length <= MAX_HEAD => length,
            Ok(httparse::Status::Complete(_)) => return Err(Garbled("its head is too large")),
            Ok(httparse::Status::Partial) => {
                self.seen = self.input.len();
                return Ok(None);
            }
            Err(httparse::Error::TooManyHeaders) => return Err(Garbled("it has too many fields")),
            Err(_) => return Err(Garbled("its head cannot be parsed")),
        };
        let status = parsed.code.and_then(|code| StatusCode::from_u16(code).ok());
        let status = status.ok_or(Garbled("its status is none"))?;
        let version = match parsed.version {
            Some(0) => Version::HTTP_10,
            _ => Version::HTTP_11,
        };
        let base = self.input.as_ptr() as usize;
        let mut places = Vec::with_capacity(parsed.headers.len());
        for field in parsed.headers.iter() {
            let name = HeaderName::from_bytes(field.name.as_bytes()).map_err(|_| Garbled("a name of a field"))?;
            let start = field.value.as_ptr() as usize - base;
            places.push((name, start..start + field.value.len()));
        }
        // Values are parts of the bytes that were read: no copies.
        let bytes = self.input.split_to(length).freeze();
        self.seen = 0;
        let mut head = Response::new(());
        *head.status_mut() = status;
        *head.version_mut() = version;
        let fields = head.headers_mut();
        // Room for what the proxy adds.
        fields.reserve(places.len() + 4);
        for (name, place) in places {
            let value = HeaderValue::from_maybe_shared(bytes.slice(place)).map_err(|_| Garbled("a field's value"))?;
            if name == header::CONTENT_LENGTH && fields.get(&name) == Some(&value) {
                continue;
            }
            fields.append(name, value);
        }
        Ok(Some(head))
    }

    /// RFC 9112 section 6.3, without what it tolerates.
    fn framing(&mut self, head: &Response<()>) -> Result<Rest, Garbled> {
        let fields = head.headers();
        let old = head.version() < Version::HTTP_11;
        let close = fields
            .get_all(header::CONNECTION)
            .iter()
            .flat_map(|value| value.as_bytes().split(|b| *b == b','))
            .any(|token| token.trim_ascii().eq_ignore_ascii_case(b"close"));
        self.keep = !old && !close;
        let mut lengths = fields.get_all(header::CONTENT_LENGTH).iter();
        let length = lengths.next();
        if lengths.next().is_some() {
            return Err(Garbled("it has two lengths"));
        }
        let length = length.map(|value| digits(value.as_bytes()).ok_or(Garbled("its length is no number")));
        let length = length.transpose()?;
        let mut codings = fields.get_all(header::TRANSFER_ENCODING).iter();
        let coding = codings.next();
        if let Some(coding) = coding {
            if length.is_some() {
                return Err(Garbled("it has a length and chunks"));
            }
            if old || codings.next().is_some() || !coding.as_bytes().eq_ignore_ascii_case(b"chunked") {
                return Err(Garbled("its transfer coding is not known"));
            }
        }
        let status = head.status();
        if status == StatusCode::SWITCHING_PROTOCOLS {
            // What follows is no HTTP.
            self.keep = false;
            return Ok(Rest::Nothing);
        }
        if self.bodiless || matches!(status, StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED) {
            return Ok(Rest::Nothing);
        }
        Ok(match (coding, length) {
            (Some(_), _) => Rest::Size,
            (None, Some(0)) => Rest::Nothing,
            (None, Some(length)) => Rest::Length(length),
            (None, None) => {
                self.keep = false;
                Rest::UntilEnd
            }
        })
    }

    /// The next part of the body.
    ///
    /// # Errors
    /// When the chunks are none.
    pub fn part(&mut self) -> Result<Found, Garbled> {
        loop {
            match self.rest {
                Rest::Nothing => return Ok(Found::End),
                Rest::Head => return Ok(Found::More),
                _ if self.input.is_empty() => return Ok(Found::More),
                Rest::UntilEnd => return Ok(Found::Frame(Frame::data(self.input.split().freeze()))),
                Rest::Length(left) => {
                    let (piece, left) = self.take(left);
                    self.rest = match left {
                        0 => Rest::Nothing,
                        left => Rest::Length(left),
                    };
                    return Ok(Found::Frame(Frame::data(piece)));
                }
                Rest::Chunk(left) => {
                    let (piece, left) = self.take(left);
                    self.rest = match left {
                        0 => Rest::ChunkEnd,
                        left => Rest::Chunk(left),
                    };
                    // The end often comes with the last chunk, and can then leave with it. A fault is seen by the next look.
                    while matches!(self.rest, Rest::ChunkEnd | Rest::Size) && self.step() == Ok(true) {}
                    if self.rest == Rest::Trailers && self.input.starts_with(b"\r\n") {
                        self.last_line();
                    }
                    return Ok(Found::Frame(Frame::data(piece)));
                }
                Rest::ChunkEnd | Rest::Size => {
                    if !self.step()? {
                        return Ok(Found::More);
                    }
                }
                Rest::Trailers if self.input.starts_with(b"\r\n") => self.last_line(),
                Rest::Trailers => {
                    return Ok(match self.trailers()? {
                        Some(trailers) => Found::Frame(Frame::trailers(trailers)),
                        None => Found::More,
                    });
                }
            }
        }
    }

    fn take(&mut self, left: u64) -> (Bytes, u64) {
        let here = usize::try_from(left).unwrap_or(usize::MAX).min(self.input.len());
        (self.input.split_to(here).freeze(), left - here as u64)
    }

    fn last_line(&mut self) {
        self.input.advance(2);
        self.rest = Rest::Nothing;
    }

    /// Between chunks: whether a line was read.
    fn step(&mut self) -> Result<bool, Garbled> {
        if self.rest == Rest::ChunkEnd {
            if self.input.len() < 2 {
                return Ok(false);
            }
            if !self.input.starts_with(b"\r\n") {
                return Err(Garbled("a chunk is longer than its size"));
            }
            self.input.advance(2);
            self.rest = Rest::Size;
            return Ok(true);
        }
        let within = &self.input[..self.input.len().min(MAX_CHUNK_LINE)];
        let Some(end) = within.iter().position(|b| *b == b'\n') else {
            return match within.len() {
                MAX_CHUNK_LINE => Err(Garbled("the line of a chunk's size is too long")),
                _ => Ok(false),
            };
        };
        let size = within[..end]
            .strip_suffix(b"\r")
            .filter(|line| !line.contains(&b'\r'))
            .and_then(|line| chunk_size(line, false))
            .ok_or(Garbled("the size of a chunk is none"))?;
        self.input.advance(end + 1);
        self.rest = match size {
            0 => Rest::Trailers,
            size => Rest::Chunk(size),
        };
        Ok(true)
    }

    fn trailers(&mut self) -> Result<Option<HeaderMap>, Garbled> {
        let mut fields = [httparse::EMPTY_HEADER; MAX_FIELDS];
        let (length, found) = match httparse::parse_headers(&self.input, &mut fields) {
            Ok(httparse::Status::Complete(parsed)) => parsed,
            Ok(httparse::Status::Partial) if self.input.len() < MAX_TRAILERS => return Ok(None),
            Ok(httparse::Status::Partial) => return Err(Garbled("its trailers are too large")),
            Err(_) => return Err(Garbled("its trailers cannot be parsed")),
        };
        let mut trailers = HeaderMap::with_capacity(found.len());
        for field in found {
            let name = HeaderName::from_bytes(field.name.as_bytes()).map_err(|_| Garbled("a name of a trailer"))?;
            let value = HeaderValue::from_bytes(field.value).map_err(|_| Garbled("a trailer's value"))?;
            trailers.append(name, value);
        }
        self.input.advance(length);
        self.rest = Rest::Nothing;
        Ok(Some(trailers))
    }
}

fn has_empty_line(bytes: &[u8]) -> bool {
    bytes.windows(2).any(|w| w == b"\n\n") || bytes.windows(3).any(|w| w == b"\n\r\n")
}

/// A length: digits and nothing else.
pub fn digits(value: &[u8]) -> Option<u64> {
    let all = !value.is_empty() && value.iter().all(u8::is_ascii_digit);
    std::str::from_utf8(value).ok().filter(|_| all)?.parse().ok()
}

#[cfg(test)]
mod tests;
