//! Counts the frames of an HTTP/2 connection as they are read, and ends it when most of them carry nothing.
//!
//! The codec bounds what a peer can make it keep; it does not bound what a peer can make it do. PING, SETTINGS, PRIORITY,
//! empty frames and the like cost work and bring no request (threats 54, 56 to 58, 62, 65), so each is noted here, and
//! requests, answers and time pay for them. It reads frame headers only and decides nothing else.

use std::cell::RefCell;
use std::io;
use std::rc::Rc;
use std::time::Instant;

use super::watched::Watch;
use crate::sniff::H2_PREFACE;

/// What a new request pays for: a PRIORITY, window updates for its answer, and its end.
const PER_REQUEST: u64 = 4;
/// Frames that each second pays for.
const PER_SECOND: u64 = 100;
/// Bytes written that pay for one frame: the smallest DATA frame may cause two window updates and a PING.
const BYTES_WRITTEN: u64 = 3;
/// What the answers to PING and SETTINGS are long; they pay for nothing.
const PONG: u64 = 17;
const SETTINGS_ACK: u64 = 9;
/// Most settings in one frame (nghttp2 has the same bound, after CVE-2020-11080).
const MAX_SETTINGS: u32 = 32;
const FRAME_HEAD: usize = 9;

/// Where in the bytes the reader is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum At {
    /// In the connection preface.
    Preface { left: usize },
    /// In a frame's header.
    Head,
    /// In a frame's payload.
    Payload { left: u32, data: bool },
}

/// Reads the frames of one connection.
#[derive(Debug)]
pub struct Meter {
    at: At,
    head: [u8; FRAME_HEAD],
    filled: usize,
    /// Whether a header block has begun and not ended.
    block: bool,
    /// Counts frames; those of one header block count as one.
    number: u64,
    /// Frames that carried nothing and that nothing has paid for yet.
    excess: u64,
    /// Most of them.
    limit: u64,
    /// Bytes written since the last reckoning, and the answers among them that the peer has asked for.
    written: u64,
    asked: u64,
    reckoned: Instant,
}

impl Meter {
    /// `limit` is how many frames without content the peer may be ahead.
    pub fn new(limit: u64) -> Self {
        Meter {
            at: At::Preface { left: H2_PREFACE.len() },
            head: [0; FRAME_HEAD],
            filled: 0,
            block: false,
            number: 0,
            excess: 0,
            limit,
            written: 0,
            asked: 0,
            reckoned: Instant::now(),
        }
    }

    /// Looks at bytes that were read; whether the connection may go on.
    fn feed(&mut self, mut bytes: &[u8]) -> bool {
        while !bytes.is_empty() {
            match self.at {
                At::Preface { left } => {
                    let here = left.min(bytes.len());
                    bytes = &bytes[here..];
                    self.at = if here == left {
                        At::Head
                    } else {
                        At::Preface { left: left - here }
                    };
                }
                At::Payload { left, data } => {
                    let here = bytes.len().min(left as usize);
                    bytes = &bytes[here..];
                    self.at = match left - here as u32 {
                        0 => At::Head,
                        left => At::Payload { left, data },
                    };
                }
                At::Head => {
                    let here = (FRAME_HEAD - self.filled).min(bytes.len());
                    if self.filled == 0 && !self.block {
                        self.number += 1;
                    }
                    self.head[self.filled..self.filled + here].copy_from_slice(&bytes[..here]);
                    self.filled += here;
                    bytes = &bytes[here..];
                    if self.filled == FRAME_HEAD {
                        self.filled = 0;
                        if !self.frame() {
                            return false;
                        }
                    }
                }
            }
        }
        true
    }

    /// A frame's header is complete.
    fn frame(&mut self) -> bool {
        let [high, middle, low, kind, flags, ..] = self.head;
        let length = u32::from_be_bytes([0, high, middle, low]);
        self.at = match length {
            0 => At::Head,
            left => At::Payload { left, data: kind == 0 },
        };
        match kind {
            // DATA: only an empty one that does not end its stream carries nothing.
            0 if length > 0 || flags & 1 != 0 => return true,
            // HEADERS and CONTINUATION, with END_HEADERS or without.
            1 => {
                self.block = flags & 4 == 0;
                self.excess = self.excess.saturating_sub(PER_REQUEST);
                return true;
            }
            9 => {
                self.block = flags & 4 == 0;
                if length > 0 {
                    return true;
                }
            }
            4 => {
                if length > MAX_SETTINGS * 6 {
                    return false;
                }
                self.asked += SETTINGS_ACK;
            }
            6 => self.asked += PONG,
            _ => {}
        }
        self.excess += 1;
        self.excess <= self.limit || self.reckon()
    }

    /// Lets time and answers pay.
    fn reckon(&mut self) -> bool {
        let answers = self.written.saturating_sub(self.asked) / BYTES_WRITTEN;
        let seconds = self.reckoned.elapsed().as_secs();
        self.excess = self.excess.saturating_sub(answers + seconds * PER_SECOND);
        (self.written, self.asked) = (0, 0);
        if seconds > 0 {
            self.reckoned = Instant::now();
        }
        self.excess <= self.limit
    }

    /// The number of what the peer has begun and not finished: the preface, a header block, a control frame. A part of a
    /// DATA frame is progress of a body, which has its own limit.
    pub fn unfinished(&self) -> Option<u64> {
        match self.at {
            At::Head if self.filled == 0 && !self.block => None,
            At::Payload { data: true, .. } => None,
            _ => Some(self.number),
        }
    }
}

impl Watch for Rc<RefCell<Meter>> {
    fn read(&self, bytes: &[u8]) -> io::Result<()> {
        if self.borrow_mut().feed(bytes) {
            return Ok(());
        }
        // As Envoy does, the connection ends at once: whoever floods would not read a GOAWAY.
        Err(io::Error::other("too many HTTP/2 frames without content"))
    }

    fn wrote(&self, count: usize) {
        self.borrow_mut().written += count as u64;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(kind: u8, flags: u8, payload: usize) -> Vec<u8> {
        let length = (payload as u32).to_be_bytes();
        let mut out = vec![length[1], length[2], length[3], kind, flags, 0, 0, 0, 1];
        out.resize(FRAME_HEAD + payload, 0);
        out
    }

    /// Frames until the meter has enough, read in pieces of `step` bytes.
    fn until_refused(meter: &mut Meter, frames: &[u8], step: usize) -> Option<usize> {
        for round in 0..10_000 {
            for piece in frames.chunks(step) {
                if !meter.feed(piece) {
                    return Some(round);
                }
            }
        }
        None
    }

    fn begun() -> Meter {
        let mut meter = Meter::new(100);
        assert!(meter.feed(H2_PREFACE));
        meter
    }

    #[test]
    fn frames_without_content_run_out_however_they_are_cut() {
        for step in [1, 7, 9, 64, 100_000] {
            for (name, bytes) in [
                ("ping", frame(6, 0, 8)),
                ("settings", frame(4, 0, 6)),
                ("priority", frame(2, 0, 5)),
                ("reset", frame(3, 0, 4)),
                ("window update", frame(8, 0, 4)),
                ("unknown", frame(0x4d, 0, 3)),
                ("empty data", frame(0, 0, 0)),
                ("empty continuation", frame(9, 0, 0)),
            ] {
                assert_eq!(until_refused(&mut begun(), &bytes, step), Some(100), "{name} by {step}");
            }
        }
        assert_eq!(until_refused(&mut begun(), &frame(4, 0, 33 * 6), 50), Some(0));
    }

    #[test]
    fn requests_answers_and_bodies_pay() {
        let mut call = frame(1, 4, 20);
        for other in [
            frame(0, 0, 10),
            frame(0, 1, 0),
            frame(8, 0, 4),
            frame(8, 0, 4),
            frame(2, 0, 5),
            frame(3, 0, 4),
        ] {
            call.extend(other);
        }
        assert_eq!(until_refused(&mut begun(), &call, 13), None);
        // A peer that reads a long answer in small frames, and measures the line with PINGs.
        let mut meter = begun();
        for _ in 0..10_000 {
            meter.written += 10 + PONG;
            let reading: Vec<u8> = [frame(8, 0, 4), frame(8, 0, 4), frame(6, 0, 8)].concat();
            assert!(meter.feed(&reading));
        }
        // The answers to PINGs alone pay for none.
        let mut meter = begun();
        let refused = (0..1000).find(|_| {
            meter.written += PONG;
            !meter.feed(&frame(6, 0, 8))
        });
        assert_eq!(refused, Some(100));
    }

    #[test]
    fn what_is_begun_has_a_number_until_it_is_finished() {
        let mut meter = Meter::new(100);
        assert_eq!(meter.unfinished(), Some(0));
        meter.feed(H2_PREFACE);
        assert_eq!(meter.unfinished(), None);
        meter.feed(&frame(1, 0, 20));
        assert_eq!(meter.unfinished(), Some(1));
        meter.feed(&frame(9, 0, 5));
        assert_eq!(meter.unfinished(), Some(1), "a block that grows is still the same");
        meter.feed(&frame(9, 4, 5));
        assert_eq!(meter.unfinished(), None);
        meter.feed(&frame(0, 0, 50)[..30]);
        assert_eq!(meter.unfinished(), None, "bodies may come slowly");
        meter.feed(&[0; 29]);
        meter.feed(&frame(6, 0, 8)[..4]);
        assert_eq!(meter.unfinished(), Some(3));
    }
}
