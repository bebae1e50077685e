//! Passing descriptors over Unix sockets (`SCM_RIGHTS`), framed as length-prefixed messages.
//!
//! Used between the node agent and its shims, and between the cluster process and the broker. A frame is a 4-byte
//! big-endian length and that many bytes; its descriptors travel with the length. Blocking and non-blocking sockets both
//! work for receiving: [`FrameReader`] keeps what has arrived.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
};

/// Frames above this many bytes are refused: a pod's specification with its files is far below.
pub const MAX_FRAME: usize = 8 << 20;
/// Descriptors in one frame at most.
pub const MAX_FDS: usize = 8;

/// Sends one frame with its descriptors; waits (by poll) where a non-blocking socket is full.
///
/// # Errors
/// The kernel's, or `InvalidInput` for a frame above [`MAX_FRAME`] or more than [`MAX_FDS`] descriptors.
pub fn send_frame(socket: impl AsFd, body: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    if body.len() > MAX_FRAME || fds.len() > MAX_FDS {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!(
                "frame of {} bytes and {} descriptors is over the limit",
                body.len(),
                fds.len()
            ),
        ));
    }
    let fd = socket.as_fd();
    let head = u32::try_from(body.len())
        .map_err(|_| io::ErrorKind::InvalidInput)?
        .to_be_bytes();
    let mut sent = 0;
    while sent < head.len() {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        // The descriptors go with the first byte that the kernel accepts.
        if sent == 0 && !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        sent += retry(fd, || {
            rustix::net::sendmsg(fd, &[IoSlice::new(&head[sent..])], &mut control, SendFlags::NOSIGNAL)
        })?;
    }
    let mut rest = body;
    while !rest.is_empty() {
        let n = retry(fd, || rustix::net::send(fd, rest, SendFlags::NOSIGNAL))?;
        rest = &rest[n..];
    }
    Ok(())
}

fn retry(fd: BorrowedFd<'_>, mut op: impl FnMut() -> rustix::io::Result<usize>) -> io::Result<usize> {
    loop {
        match op() {
            Ok(n) => return Ok(n),
            Err(rustix::io::Errno::INTR) => {}
            Err(rustix::io::Errno::AGAIN) => {
                let mut poll = [rustix::event::PollFd::from_borrowed_fd(
                    fd,
                    rustix::event::PollFlags::OUT,
                )];
                match rustix::event::poll(&mut poll, None) {
                    Ok(_) | Err(rustix::io::Errno::INTR) => {}
                    Err(error) => return Err(error.into()),
                }
            }
            Err(error) => return Err(error.into()),
        }
    }
}

/// One received frame.
#[derive(Debug)]
pub struct Frame {
    /// The message.
    pub body: Vec<u8>,
    /// The descriptors that came with it, close-on-exec.
    pub fds: Vec<OwnedFd>,
}

/// What [`FrameReader::read`] found.
#[derive(Debug)]
pub enum Read {
    /// A whole frame.
    Frame(Frame),
    /// Nothing more to read now (non-blocking socket).
    Pending,
    /// The peer has closed.
    Closed,
}

/// Reassembles frames from a stream socket.
#[derive(Debug, Default)]
pub struct FrameReader {
    buffer: Vec<u8>,
    fds: Vec<OwnedFd>,
}

impl FrameReader {
    /// Reads until a frame is complete, the socket would block, or the peer is gone. Reads never pass the end of a frame,
    /// so descriptors cannot be mixed up between frames.
    ///
    /// # Errors
    /// The kernel's, or `InvalidData` for a frame above the limits.
    pub fn read(&mut self, socket: impl AsFd) -> io::Result<Read> {
        let fd = socket.as_fd();
        loop {
            let want = match self.buffer.first_chunk::<4>() {
                None => 4 - self.buffer.len(),
                Some(head) => {
                    let length = u32::from_be_bytes(*head) as usize;
                    if length > MAX_FRAME {
                        return Err(io::Error::new(
                            io::ErrorKind::InvalidData,
                            format!("frame of {length} bytes"),
                        ));
                    }
                    let missing = 4 + length - self.buffer.len();
                    if missing == 0 {
                        let body = self.buffer.split_off(4);
                        self.buffer.clear();
                        return Ok(Read::Frame(Frame {
                            body,
                            fds: std::mem::take(&mut self.fds),
                        }));
                    }
                    missing
                }
            };
            let old = self.buffer.len();
            self.buffer.resize(old + want.min(1 << 16), 0);
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let result = rustix::net::recvmsg(
                fd,
                &mut [IoSliceMut::new(&mut self.buffer[old..])],
                &mut control,
                RecvFlags::CMSG_CLOEXEC,
            );
            let count = result.as_ref().map(|r| r.bytes).unwrap_or(0);
            self.buffer.truncate(old + count);
            match result {
                Ok(_) => {
                    for message in control.drain() {
                        if let RecvAncillaryMessage::ScmRights(rights) = message {
                            self.fds.extend(rights);
                        }
                    }
                    if self.fds.len() > MAX_FDS {
                        return Err(io::Error::new(
                            io::ErrorKind::InvalidData,
                            "too many descriptors in a frame",
                        ));
                    }
                    if count == 0 {
                        return Ok(Read::Closed);
                    }
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::AGAIN) => return Ok(Read::Pending),
                Err(rustix::io::Errno::CONNRESET) => return Ok(Read::Closed),
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// A connected pair of close-on-exec Unix stream sockets.
///
/// # Errors
/// The kernel's, when descriptors run out.
pub fn socket_pair() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(rustix::net::socketpair(
        rustix::net::AddressFamily::UNIX,
        rustix::net::SocketType::STREAM,
        rustix::net::SocketFlags::CLOEXEC,
        None,
    )?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read as _, Seek, Write};

    fn expect_frame(reader: &mut FrameReader, fd: &OwnedFd) -> Frame {
        match reader.read(fd).expect("read") {
            Read::Frame(frame) => frame,
            other => panic!("expected a frame, got {other:?}"),
        }
    }

    #[test]
    fn frames_keep_their_own_descriptors() {
        let (a, b) = socket_pair().expect("pair");
        let mut file = tempfile::tempfile().expect("file");
        file.write_all(b"passed").expect("write");
        send_frame(&a, b"first", &[]).expect("send");
        send_frame(&a, b"second", &[file.as_fd()]).expect("send");
        send_frame(&a, b"", &[]).expect("send");
        let mut reader = FrameReader::default();
        let first = expect_frame(&mut reader, &b);
        assert_eq!((first.body.as_slice(), first.fds.len()), (b"first".as_slice(), 0));
        let mut second = expect_frame(&mut reader, &b);
        assert_eq!(second.body, b"second");
        let mut passed = std::fs::File::from(second.fds.pop().expect("one descriptor"));
        passed.rewind().expect("rewind");
        let mut text = String::new();
        passed.read_to_string(&mut text).expect("read");
        assert_eq!(text, "passed");
        assert!(expect_frame(&mut reader, &b).body.is_empty());
        drop(a);
        assert!(matches!(reader.read(&b).expect("read"), Read::Closed));
    }

    #[test]
    fn an_oversized_length_is_refused() {
        let (a, b) = socket_pair().expect("pair");
        rustix::net::send(&a, &u32::MAX.to_be_bytes(), SendFlags::empty()).expect("send");
        let error = FrameReader::default().read(&b).expect_err("must refuse");
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    }
}
