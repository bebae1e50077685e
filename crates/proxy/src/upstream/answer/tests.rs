//! How answers are read: one reading or none, whatever the pieces in which they come.

use super::*;

/// A response that was read: status, body, trailers, and whether the connection can go on.
type Whole = (u16, Vec<u8>, Option<HeaderMap>, bool);

/// Reads a response that comes in these pieces, behind which the connection ends.
fn pieces(pieces: &[&[u8]], bodiless: bool) -> Result<Option<Whole>, Garbled> {
    let mut reader = Reader::default();
    reader.expect(bodiless);
    let mut status = None;
    let (mut body, mut trailers) = (Vec::new(), None);
    for piece in pieces {
        reader.input.extend_from_slice(piece);
        if status.is_none() {
            status = reader.head()?.map(|head| head.status().as_u16());
        }
        if status.is_some() {
            while let Found::Frame(frame) = reader.part()? {
                match frame.into_data() {
                    Ok(data) => body.extend_from_slice(&data),
                    Err(frame) => trailers = frame.into_trailers().ok(),
                }
            }
        }
    }
    let reusable = reader.is_reusable();
    Ok(status
        .filter(|_| reader.end())
        .map(|status| (status, body, trailers, reusable)))
}

/// The same for every way to cut the bytes in two, and byte by byte.
fn read_as(bytes: &[u8], bodiless: bool) -> Result<Option<Whole>, Garbled> {
    let whole = pieces(&[bytes], bodiless);
    for at in 0..bytes.len() {
        assert_eq!(
            pieces(&[&bytes[..at], &bytes[at..]], bodiless).is_ok(),
            whole.is_ok(),
            "cut at {at}"
        );
        if whole.is_ok() {
            assert_eq!(pieces(&[&bytes[..at], &bytes[at..]], bodiless), whole, "cut at {at}");
        }
    }
    let single: Vec<&[u8]> = bytes.chunks(1).collect();
    assert_eq!(pieces(&single, bodiless).is_ok(), whole.is_ok(), "byte by byte");
    whole
}

fn read(text: &str) -> Result<Option<Whole>, Garbled> {
    read_as(text.as_bytes(), false)
}

fn plain(status: u16, body: &str, reusable: bool) -> Result<Option<Whole>, Garbled> {
    Ok(Some((status, body.as_bytes().to_vec(), None, reusable)))
}

#[test]
fn bodies_end_where_the_head_says() {
    assert_eq!(
        read("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"),
        plain(200, "ok", true)
    );
    assert_eq!(
        read("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"),
        plain(200, "", true)
    );
    assert_eq!(read("HTTP/1.1 204 No Content\r\n\r\n"), plain(204, "", true));
    assert_eq!(
        read("HTTP/1.1 304 x\r\ncontent-length: 7\r\n\r\n"),
        plain(304, "", true)
    );
    assert_eq!(
        read("HTTP/1.1 200 OK\r\n\r\nuntil the end"),
        plain(200, "until the end", false)
    );
    assert_eq!(
        read("HTTP/1.0 200 OK\r\ncontent-length: 2\r\n\r\nok"),
        plain(200, "ok", false)
    );
    let close = "HTTP/1.1 200 OK\r\nconnection: x, Close\r\ncontent-length: 2\r\n\r\nok";
    assert_eq!(read(close), plain(200, "ok", false));
    let head = b"HTTP/1.1 200 OK\r\ncontent-length: 12345\r\n\r\n";
    assert_eq!(read_as(head, true), plain(200, "", true));
    let chunks = "HTTP/1.1 200 OK\r\ntransfer-encoding: Chunked\r\n\r\n2;a=b\r\nok\r\nA \r\n0123456789\r\n0\r\n\r\n";
    assert_eq!(read(chunks), plain(200, "ok0123456789", true));
}

#[test]
fn trailers_follow_the_last_chunk() {
    let text = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\nx-sum: 1\r\n\r\n";
    let (_, body, trailers, reusable) = read(text).unwrap().unwrap();
    assert_eq!((&body[..], reusable), (&b"ok"[..], true));
    assert_eq!(trailers.unwrap()["x-sum"], "1");
}

#[test]
fn a_part_is_never_the_whole() {
    for text in [
        "",
        "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n",
        "HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nok",
        "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n",
        "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n",
        "HTTP/1.1 100 Continue\r\n\r\n",
    ] {
        assert_eq!(read(text), Ok(None), "{text}");
    }
}

#[test]
fn interim_responses_are_passed_over_and_bounded() {
    let interim = "HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n";
    let last = "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok";
    let some = format!("{}{last}", interim.repeat(MAX_INTERIM as usize));
    assert_eq!(read(&some), plain(200, "ok", true));
    assert!(read(&format!("{interim}{some}")).is_err());
}

/// The connection of a response with bytes behind it carries no other request: they would answer it.
#[test]
fn what_follows_a_response_is_no_response() {
    let ok = "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok";
    assert_eq!(
        pieces(&[format!("{ok}{ok}").as_bytes()], false),
        plain(200, "ok", false)
    );
    let more = "HTTP/1.1 204 No Content\r\ncontent-length: 2\r\n\r\nok";
    assert_eq!(pieces(&[more.as_bytes()], false), plain(204, "", false));
    let switch = "HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n";
    assert_eq!(read(switch), plain(101, "", false));
}

#[test]
fn what_has_two_readings_is_refused() {
    for fields in [
        "content-length: 2\r\ntransfer-encoding: chunked\r\n",
        "transfer-encoding: chunked\r\ncontent-length: 2\r\n",
        "content-length: 2\r\ncontent-length: 3\r\n",
        "content-length: 2, 2\r\n",
        "content-length: +2\r\n",
        "content-length: 0x2\r\n",
        "content-length:\r\n",
        "content-length: 99999999999999999999\r\n",
        "transfer-encoding: gzip, chunked\r\n",
        "transfer-encoding: chunked\r\ntransfer-encoding: chunked\r\n",
        "transfer-encoding: identity\r\n",
        "content-length : 2\r\n",
        "x: y\r\n folded\r\n",
        "x: a\0b\r\n",
        " x: y\r\n",
        "no colon\r\n",
    ] {
        assert!(
            read(&format!("HTTP/1.1 200 OK\r\n{fields}\r\n0\r\n\r\n")).is_err(),
            "{fields}"
        );
    }
    assert!(read("HTTP/1.0 200 OK\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n").is_err());
    assert!(read("HTTP/2.0 200 OK\r\n\r\n").is_err());
    assert!(read("HTTP/1.1 20 OK\r\n\r\n").is_err());
    assert!(read("this is not HTTP\r\n\r\n").is_err());
    let same = "HTTP/1.1 200 OK\r\ncontent-length: 2\r\ncontent-length: 2\r\n\r\nok";
    assert_eq!(read(same), plain(200, "ok", true));
}

#[test]
fn chunks_are_chunks() {
    let head = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n";
    for body in [
        "2\nok\r\n0\r\n\r\n",
        "2\r\nokay\r\n0\r\n\r\n",
        "2\r\nok\n0\r\n\r\n",
        "-2\r\nok\r\n0\r\n\r\n",
        " 2\r\nok\r\n0\r\n\r\n",
        "\r\n",
        "2;a\rb\r\nok\r\n0\r\n\r\n",
        "fffffffffffffffff\r\nok\r\n",
        "0\r\nno colon\r\n\r\n",
    ] {
        assert!(read(&format!("{head}{body}")).is_err(), "{body:?}");
    }
    assert!(pieces(&[format!("{head}2;{}", "x".repeat(MAX_CHUNK_LINE)).as_bytes()], false).is_err());
}

#[test]
fn heads_and_trailers_are_bounded() {
    let long = "x".repeat(MAX_HEAD);
    for text in [
        format!("HTTP/1.1 200 OK\r\nx: {long}"),
        format!("HTTP/1.1 200 OK\r\nx: {long}\r\ncontent-length: 0\r\n\r\n"),
        format!("HTTP/1.1 200 OK\r\n{}\r\n", "x: y\r\n".repeat(MAX_FIELDS + 1)),
        format!("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n0\r\nx: {long}"),
    ] {
        assert!(pieces(&[text.as_bytes()], false).is_err());
    }
}
