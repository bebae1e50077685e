//! Exchanges over a pipe: bodies of both directions, ends in every place, connections that may be used again.

use super::*;
use http_body_util::BodyExt;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::LocalSet;

async fn pair() -> (Http1Lease, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let near = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
    let (far, _) = listener.accept().await.unwrap();
    (Http1Lease::new(Stream::plain(near, Bytes::new())), far)
}

fn request(method: Method, body: Bytes) -> Request<RequestBody> {
    let mut request = Request::new(RequestBody::own(body));
    *request.method_mut() = method;
    *request.uri_mut() = "/path?query".parse().unwrap();
    request.headers_mut().insert("host", HeaderValue::from_static("web"));
    request
}

/// Reads until the bytes end so.
async fn until(far: &mut TcpStream, end: &[u8]) -> String {
    let mut seen = Vec::new();
    while !seen.ends_with(end) {
        assert!(
            far.read_buf(&mut seen).await.unwrap() > 0,
            "{}",
            String::from_utf8_lossy(&seen)
        );
    }
    String::from_utf8(seen).unwrap()
}

#[tokio::test]
async fn one_exchange_after_the_other() {
    let (lease, mut far) = pair().await;
    let peer = async {
        let head = until(&mut far, b"\r\n\r\n").await;
        assert_eq!(head, "GET /path?query HTTP/1.1\r\nhost: web\r\n\r\n");
        far.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")
            .await
            .unwrap();
        let post = until(&mut far, b"five!").await;
        assert_eq!(
            post,
            "POST /path?query HTTP/1.1\r\nhost: web\r\ncontent-length: 5\r\n\r\nfive!"
        );
        far.write_all(b"HTTP/1.1 204 No Content\r\n\r\n").await.unwrap();
    };
    let asking = async {
        let response = exchange(&lease, request(Method::GET, Bytes::new())).await.ok().unwrap();
        assert_eq!(response.into_body().collect().await.unwrap().to_bytes(), "ok");
        assert!(lease.rest() && lease.is_alive());
        let response = exchange(&lease, request(Method::POST, Bytes::from_static(b"five!"))).await;
        assert_eq!(response.ok().unwrap().status(), 204);
        assert!(lease.rest());
    };
    tokio::join!(peer, asking);
}

#[tokio::test]
async fn idle_connections_that_end_or_speak_are_not_alive() {
    for say in [&b""[..], b"HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\nforged"] {
        let (lease, mut far) = pair().await;
        assert!(lease.is_alive());
        far.write_all(say).await.unwrap();
        if say.is_empty() {
            drop(far);
        }
        while lease.is_alive() {
            tokio::task::yield_now().await;
        }
    }
}

/// What the peer got must not look whole, and nothing that it says counts.
#[tokio::test]
async fn a_body_that_is_shorter_or_longer_than_its_length_ends_the_connection() {
    for length in ["4", "6"] {
        let (lease, mut far) = pair().await;
        let mut asked = request(Method::POST, Bytes::from_static(b"five!"));
        asked
            .headers_mut()
            .insert("content-length", HeaderValue::from_static(length));
        let failed = exchange(&lease, asked).await.err().unwrap();
        assert!(matches!(failed.error, BodyError::Http1(Http1Error::Body)) && failed.back.is_none());
        assert!(!lease.rest());
        drop(lease);
        let mut seen = String::new();
        far.read_to_string(&mut seen).await.unwrap();
        assert!(!seen.ends_with("\r\n\r\nfive"), "{seen}");
    }
}

/// The answer of a peer that does not read the body comes through, and its connection serves no other request.
#[tokio::test]
async fn answers_do_not_wait_for_the_end_of_the_request() {
    LocalSet::new()
        .run_until(async {
            let (lease, mut far) = pair().await;
            let body = Bytes::from(vec![b'x'; 64 << 20]);
            let asking = exchange(&lease, request(Method::POST, body));
            let peer = async {
                let mut some = [0; 64];
                far.read_exact(&mut some).await.unwrap();
                let answer = b"HTTP/1.1 413 Content Too Large\r\ncontent-length: 0\r\n\r\n";
                far.write_all(answer).await.unwrap();
            };
            let (response, ()) = tokio::join!(asking, peer);
            assert_eq!(response.ok().unwrap().status(), 413);
            assert!(!lease.rest());
        })
        .await;
}

#[tokio::test]
async fn a_request_of_which_nothing_left_comes_back() {
    let (lease, _far) = pair().await;
    poll_fn(|cx| Pin::new(&mut lease.connection.borrow_mut().stream).poll_shutdown(cx))
        .await
        .unwrap();
    let failed = exchange(&lease, request(Method::POST, Bytes::new()))
        .await
        .err()
        .unwrap();
    assert_eq!(failed.back.unwrap().method(), Method::POST);
}
