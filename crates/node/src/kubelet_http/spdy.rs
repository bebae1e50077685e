//! The server's half of SPDY/3.1 as far as port-forwarding uses it. No I/O: bytes in, events out; calls in, bytes out.
//!
//! kubectl carries these frames inside websocket messages. Its library has no flow control, so there is none here; what a
//! client may make this side keep is bounded instead.

use std::collections::BTreeMap;

use flate2::{Compress, Compression, Decompress, FlushCompress, FlushDecompress};

/// A frame's payload may have this many bytes.
const MAX_FRAME: usize = 1 << 20;
/// Decompressed headers of one stream.
const MAX_HEADERS: usize = 16 << 10;

const SYN_STREAM: u16 = 1;
const SYN_REPLY: u16 = 2;
const RST_STREAM: u16 = 3;
const PING: u16 = 6;
const GOAWAY: u16 = 7;
const VERSION: u16 = 3;
const FLAG_FIN: u8 = 1;
/// RST_STREAM status: the stream was refused.
pub(super) const REFUSED_STREAM: u32 = 3;

/// The names of the SPDY/3.1 draft's compression dictionary (section 2.6.10.1), each preceded by its length there.
const DICTIONARY_NAMES: &str = "options head post put delete trace accept accept-charset accept-encoding accept-language \
accept-ranges age allow authorization cache-control connection content-base content-encoding content-language content-length \
content-location content-md5 content-range content-type date etag expect expires from host if-match if-modified-since \
if-none-match if-range if-unmodified-since last-modified location max-forwards pragma proxy-authenticate proxy-authorization \
range referer retry-after server te trailer transfer-encoding upgrade user-agent vary via warning www-authenticate method get \
status";
const DICTIONARY_NAMES_2: [&str; 8] = [
    "200 OK",
    "version",
    "HTTP/1.1",
    "url",
    "public",
    "set-cookie",
    "keep-alive",
    "origin",
];
/// Its text without lengths.
const DICTIONARY_TEXT: &str = "100101201202205206300302303304305306307402405406407408409410411412413414415416417502504505\
203 Non-Authoritative Information204 No Content301 Moved Permanently400 Bad Request401 Unauthorized403 Forbidden404 Not Found\
500 Internal Server Error501 Not Implemented503 Service UnavailableJan Feb Mar Apr May Jun Jul Aug Sept Oct Nov Dec 00:00:00 \
Mon, Tue, Wed, Thu, Fri, Sat, Sun, GMTchunked,text/html,image/png,image/jpg,image/gif,application/xml,application/xhtml+xml,\
text/plain,text/javascript,publicprivatemax-age=gzip,deflate,sdchcharset=utf-8charset=iso-8859-1,utf-,*,enq=0.";

fn dictionary() -> Vec<u8> {
    let mut out = Vec::with_capacity(1423);
    for name in DICTIONARY_NAMES.split(' ').chain(DICTIONARY_NAMES_2) {
        out.extend(u32::try_from(name.len()).unwrap_or(0).to_be_bytes());
        out.extend(name.as_bytes());
    }
    out.extend(DICTIONARY_TEXT.as_bytes());
    out
}

/// What the client did.
#[derive(Debug, PartialEq)]
pub(super) enum Event {
    /// Opened a stream. `fin`: it will send nothing on it.
    Open {
        stream: u32,
        headers: BTreeMap<String, String>,
        fin: bool,
    },
    /// Sent data; `fin` with the last.
    Data { stream: u32, data: Vec<u8>, fin: bool },
    /// Gave a stream up.
    Reset { stream: u32 },
    /// Asks for an echo: send these bytes.
    Ping { answer: Vec<u8> },
    /// Will open no more streams.
    GoAway,
}

/// One connection.
pub(super) struct Spdy {
    buffer: Vec<u8>,
    inflate: Decompress,
    deflate: Compress,
    last_stream: u32,
}

impl Spdy {
    pub(super) fn new() -> Self {
        Self {
            buffer: Vec::new(),
            inflate: Decompress::new(true),
            deflate: Compress::new(Compression::fast(), true),
            last_stream: 0,
        }
    }

    /// Takes in bytes and gives what they complete.
    ///
    /// # Errors
    /// A message for the log; the connection cannot go on.
    pub(super) fn receive(&mut self, bytes: &[u8]) -> Result<Vec<Event>, String> {
        self.buffer.extend_from_slice(bytes);
        let mut events = Vec::new();
        while let Some(head) = self.buffer.first_chunk::<8>() {
            let head = *head;
            let flags = head[4];
            let length = u32::from_be_bytes([0, head[5], head[6], head[7]]) as usize;
            if length > MAX_FRAME {
                return Err(format!("a frame of {length} bytes"));
            }
            if self.buffer.len() < 8 + length {
                break;
            }
            let payload: Vec<u8> = self.buffer.drain(..8 + length).skip(8).collect();
            let word = u32::from_be_bytes([head[0], head[1], head[2], head[3]]);
            if word & 0x8000_0000 == 0 {
                events.push(Event::Data {
                    stream: word,
                    data: payload,
                    fin: flags & FLAG_FIN != 0,
                });
                continue;
            }
            let (version, kind) = ((word >> 16) as u16 & 0x7FFF, word as u16);
            if version != VERSION {
                return Err(format!("a frame of SPDY version {version}"));
            }
            events.extend(self.control(kind, flags, &payload)?);
        }
        Ok(events)
    }

    fn control(&mut self, kind: u16, flags: u8, payload: &[u8]) -> Result<Option<Event>, String> {
        let number = |at: usize| -> Result<u32, String> {
            let bytes = payload.get(at..at + 4).and_then(|b| b.try_into().ok());
            bytes
                .map(u32::from_be_bytes)
                .ok_or_else(|| format!("a frame of type {kind} is too short"))
        };
        Ok(match kind {
            SYN_STREAM => {
                let stream = number(0)? & 0x7FFF_FFFF;
                // Clients use odd numbers, each once.
                if stream % 2 == 0 || stream <= self.last_stream {
                    return Err(format!("stream number {stream} is out of order"));
                }
                self.last_stream = stream;
                let headers = self.headers(payload.get(10..).ok_or("a SYN_STREAM frame is too short")?)?;
                Some(Event::Open {
                    stream,
                    headers,
                    fin: flags & FLAG_FIN != 0,
                })
            }
            RST_STREAM => Some(Event::Reset {
                stream: number(0)? & 0x7FFF_FFFF,
            }),
            PING => Some(Event::Ping {
                answer: control_frame(PING, 0, payload),
            }),
            GOAWAY => Some(Event::GoAway),
            // SETTINGS, HEADERS, WINDOW_UPDATE: nothing here depends on them.
            _ => None,
        })
    }

    fn headers(&mut self, mut block: &[u8]) -> Result<BTreeMap<String, String>, String> {
        let mut text = Vec::new();
        let mut chunk = [0u8; 2048];
        loop {
            let (before_in, before_out) = (self.inflate.total_in(), self.inflate.total_out());
            let result = self.inflate.decompress(block, &mut chunk, FlushDecompress::Sync);
            block = &block[(self.inflate.total_in() - before_in) as usize..];
            let produced = (self.inflate.total_out() - before_out) as usize;
            text.extend_from_slice(&chunk[..produced]);
            match result {
                Err(error) if error.needs_dictionary().is_some() => {
                    self.inflate
                        .set_dictionary(&dictionary())
                        .map_err(|e| format!("headers: {e}"))?;
                    continue;
                }
                // Nothing more can be made of what is there.
                Err(error) if !block.is_empty() => return Err(format!("headers: {error}")),
                _ => {}
            }
            if text.len() > MAX_HEADERS {
                return Err("headers are too large".into());
            }
            if produced < chunk.len() {
                break;
            }
        }
        let count = text
            .first_chunk::<4>()
            .map(|head| u32::from_be_bytes(*head))
            .ok_or("headers are cut off")?;
        let mut rest = text.get(4..).unwrap_or_default();
        let mut headers = BTreeMap::new();
        let mut field = || -> Result<String, String> {
            let head = rest.first_chunk::<4>().ok_or("headers are cut off")?;
            let length = u32::from_be_bytes(*head) as usize;
            let value = rest.get(4..4 + length).ok_or("headers are cut off")?;
            rest = &rest[4 + length..];
            Ok(String::from_utf8_lossy(value).into_owned())
        };
        for _ in 0..count.min(256) {
            let (name, value) = (field()?.to_ascii_lowercase(), field()?);
            headers.insert(name, value);
        }
        Ok(headers)
    }

    /// Accepts a stream.
    pub(super) fn reply(&mut self, stream: u32) -> Vec<u8> {
        // No headers: the number 0, compressed with the connection's state.
        let mut block = Vec::with_capacity(64);
        // Its output buffer is larger than anything that four bytes can become.
        let _ = self
            .deflate
            .compress_vec(&0u32.to_be_bytes(), &mut block, FlushCompress::Sync);
        let mut payload = stream.to_be_bytes().to_vec();
        payload.extend(block);
        control_frame(SYN_REPLY, 0, &payload)
    }
}

fn control_frame(kind: u16, flags: u8, payload: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(8 + payload.len());
    out.extend((0x8000 | VERSION).to_be_bytes());
    out.extend(kind.to_be_bytes());
    out.push(flags);
    out.extend(&u32::try_from(payload.len()).unwrap_or(0).to_be_bytes()[1..]);
    out.extend(payload);
    out
}

/// A data frame; with `fin` the last of its stream from this side.
pub(super) fn data_frame(stream: u32, data: &[u8], fin: bool) -> Vec<u8> {
    let mut out = Vec::with_capacity(8 + data.len());
    out.extend((stream & 0x7FFF_FFFF).to_be_bytes());
    out.push(if fin { FLAG_FIN } else { 0 });
    out.extend(&u32::try_from(data.len()).unwrap_or(0).to_be_bytes()[1..]);
    out.extend(data);
    out
}

/// Refuses or gives up a stream.
pub(super) fn reset_frame(stream: u32, status: u32) -> Vec<u8> {
    let mut payload = stream.to_be_bytes().to_vec();
    payload.extend(status.to_be_bytes());
    control_frame(RST_STREAM, 0, &payload)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a client sends to open a stream, with its own compression state.
    fn open(deflate: &mut Compress, stream: u32, headers: &[(&str, &str)], fin: bool) -> Vec<u8> {
        let mut text = u32::try_from(headers.len()).expect("few").to_be_bytes().to_vec();
        for (name, value) in headers {
            for part in [name, value] {
                text.extend(u32::try_from(part.len()).expect("short").to_be_bytes());
                text.extend(part.as_bytes());
            }
        }
        let mut block = Vec::with_capacity(1024);
        deflate
            .compress_vec(&text, &mut block, FlushCompress::Sync)
            .expect("compress");
        let mut payload = stream.to_be_bytes().to_vec();
        payload.extend([0; 6]);
        payload.extend(block);
        control_frame(SYN_STREAM, u8::from(fin), &payload)
    }

    fn client() -> Compress {
        let mut deflate = Compress::new(Compression::default(), true);
        deflate.set_dictionary(&dictionary()).expect("dictionary");
        deflate
    }

    #[test]
    fn the_dictionary_is_that_of_the_draft() {
        // Length and Adler-32 (the dictionary's id in zlib streams) are given there.
        let (mut a, mut b) = (1u32, 0u32);
        for byte in dictionary() {
            a = (a + u32::from(byte)) % 65_521;
            b = (b + a) % 65_521;
        }
        assert_eq!((dictionary().len(), b << 16 | a), (1423, 0xe3c6_a7c2));
    }

    #[test]
    fn streams_share_one_compression_state_and_frames_may_come_in_pieces() {
        let mut deflate = client();
        let mut bytes = open(&mut deflate, 1, &[("streamtype", "error"), ("port", "80")], true);
        bytes.extend(open(&mut deflate, 3, &[("streamtype", "data"), ("port", "80")], false));
        bytes.extend(data_frame(3, b"hello", true));
        let mut spdy = Spdy::new();
        let mut events = Vec::new();
        for piece in bytes.chunks(7) {
            events.extend(spdy.receive(piece).expect("valid"));
        }
        let headers = |kind: &str| {
            BTreeMap::from([
                ("port".to_owned(), "80".to_owned()),
                ("streamtype".to_owned(), kind.to_owned()),
            ])
        };
        assert_eq!(
            events,
            [
                Event::Open {
                    stream: 1,
                    headers: headers("error"),
                    fin: true
                },
                Event::Open {
                    stream: 3,
                    headers: headers("data"),
                    fin: false
                },
                Event::Data {
                    stream: 3,
                    data: b"hello".to_vec(),
                    fin: true
                },
            ]
        );
    }

    #[test]
    fn hostile_frames_end_the_connection() {
        let error = |bytes: &[u8]| Spdy::new().receive(bytes).expect_err("must be refused");
        assert!(error(&[0, 0, 0, 1, 0, 0xFF, 0xFF, 0xFF]).contains("a frame of"));
        assert!(error(&control_frame(SYN_STREAM, 0, &[0, 0, 0, 2, 0, 0, 0, 0, 0, 0])).contains("out of order"));
        assert!(error(&control_frame(SYN_STREAM, 0, &[0, 0, 0, 1])).contains("too short"));
        let mut garbage = vec![0, 0, 0, 1, 0, 0, 0, 0, 0, 0];
        garbage.extend([0xFF; 40]);
        assert!(error(&control_frame(SYN_STREAM, 0, &garbage)).contains("headers"));
        // A bomb: far more headers than allowed, well compressed.
        let value = "x".repeat(1 << 20);
        let mut deflate = client();
        let mut text = 1u32.to_be_bytes().to_vec();
        text.extend([0, 0, 0, 1, b'n']);
        text.extend(u32::try_from(value.len()).expect("fits").to_be_bytes());
        text.extend(value.as_bytes());
        let mut block = Vec::with_capacity(64 << 10);
        deflate
            .compress_vec(&text, &mut block, FlushCompress::Sync)
            .expect("compress");
        let mut payload = vec![0, 0, 0, 1, 0, 0, 0, 0, 0, 0];
        payload.extend(block);
        assert!(error(&control_frame(SYN_STREAM, 0, &payload)).contains("too large"));
    }
}
