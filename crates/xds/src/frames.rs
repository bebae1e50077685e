//! The response side of a gRPC stream: messages as frames of exactly their size.
//!
//! tonic's own encoder keeps the buffer of the largest message for as long as the stream lives, which is megabytes for each proxy
//! that has once got all of a large mesh. Here nothing of a message is left once it was sent. Called by [`crate::ads`]; it does not
//! know what the messages are.

use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::{BufMut, Bytes};
use http::{HeaderMap, HeaderValue, header};
use http_body::{Body, Frame};
use prost::Message;
use tokio::sync::mpsc;
use tonic::Status;

/// A message with gRPC's prefix: not compressed, length.
///
/// # Errors
/// It is larger than `limit` bytes.
pub(crate) fn framed(message: &impl Message, limit: usize) -> Result<Bytes, Status> {
    let size = message.encoded_len();
    let length = u32::try_from(size).ok().filter(|_| size <= limit);
    let length =
        length.ok_or_else(|| Status::out_of_range(format!("a message of {size} bytes, the limit is {limit} bytes")))?;
    let mut out = Vec::with_capacity(5 + size);
    out.put_u8(0);
    out.put_u32(length);
    // A vector grows, so there is always room.
    message.encode(&mut out).map_err(|e| Status::internal(e.to_string()))?;
    Ok(out.into())
}

/// The body of a streaming response: messages as they come, then the status.
pub(crate) struct Frames {
    messages: mpsc::Receiver<Result<Bytes, Status>>,
    ended: bool,
}

impl Frames {
    /// Sends what comes here; its end, or an error, ends the stream.
    pub(crate) fn new(messages: mpsc::Receiver<Result<Bytes, Status>>) -> Frames {
        Frames { messages, ended: false }
    }

    /// The whole response.
    pub(crate) fn into_response(self) -> http::Response<tonic::body::Body> {
        let mut response = http::Response::new(tonic::body::Body::new(self));
        let kind = HeaderValue::from_static("application/grpc");
        response.headers_mut().insert(header::CONTENT_TYPE, kind);
        response
    }
}

impl Body for Frames {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        if self.ended {
            return Poll::Ready(None);
        }
        let status = match self.messages.poll_recv(cx) {
            Poll::Pending => return Poll::Pending,
            Poll::Ready(Some(Ok(message))) => return Poll::Ready(Some(Ok(Frame::data(message)))),
            Poll::Ready(Some(Err(status))) => status,
            Poll::Ready(None) => Status::ok(""),
        };
        self.ended = true;
        let mut trailers = HeaderMap::new();
        Poll::Ready(Some(
            status.add_header(&mut trailers).map(|()| Frame::trailers(trailers)),
        ))
    }
}

#[cfg(test)]
mod tests {
    use envoy_types::pb::envoy::service::discovery::v3::DiscoveryResponse;
    use futures::future::poll_fn;

    use super::*;

    fn message(size: usize) -> DiscoveryResponse {
        DiscoveryResponse {
            nonce: "x".repeat(size),
            ..DiscoveryResponse::default()
        }
    }

    #[tokio::test]
    async fn nothing_of_a_message_is_left_once_it_was_taken() {
        let (tx, rx) = mpsc::channel(4);
        let mut frames = Frames::new(rx);
        let large = message(1 << 20);
        tx.send(framed(&large, 2 << 20)).await.unwrap();
        tx.send(Err(Status::unavailable("gone"))).await.unwrap();
        let mut next = async || poll_fn(|cx| Pin::new(&mut frames).poll_frame(cx)).await;

        let data = next().await.unwrap().unwrap().into_data().unwrap();
        assert!(data.is_unique(), "the body still holds a part of it");
        let (prefix, rest) = data.split_at(5);
        assert_eq!(prefix, [&[0][..], &(rest.len() as u32).to_be_bytes()].concat());
        assert_eq!(DiscoveryResponse::decode(rest).unwrap(), large);

        let trailers = next().await.unwrap().unwrap().into_trailers().unwrap();
        assert_eq!(trailers["grpc-status"], "14");
        assert!(next().await.is_none());
    }

    #[test]
    fn a_message_over_the_limit_is_refused() {
        assert!(framed(&message(100), 103).is_ok());
        let refused = framed(&message(100), 101).unwrap_err();
        assert_eq!(refused.code(), tonic::Code::OutOfRange);
    }
}
