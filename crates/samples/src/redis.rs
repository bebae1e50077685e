//! The little of Redis' protocol (RESP 2) that the guestbook needs: one command per connection, one reply.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;

/// How long a command may take, connecting included.
const LIMIT: Duration = Duration::from_secs(5);
/// Longest text of a reply.
const MAX_TEXT: usize = 64 << 10;
/// Most elements of a reply.
const MAX_ITEMS: usize = 1000;

/// A server.
#[derive(Clone, Debug)]
pub(crate) struct Redis {
    address: String,
}

/// A reply: a number, or texts.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Reply {
    Number(i64),
    Texts(Vec<String>),
}

impl Redis {
    /// `address` is `host:port`.
    pub(crate) fn new(address: &str) -> Redis {
        Redis {
            address: address.to_owned(),
        }
    }

    /// Appends to a list; answers with its length.
    pub(crate) async fn push(&self, key: &str, value: &str) -> Result<i64> {
        match self.command(&["RPUSH", key, value]).await? {
            Reply::Number(length) => Ok(length),
            Reply::Texts(_) => bail!("redis answers RPUSH with texts"),
        }
    }

    /// The last elements of a list, oldest first.
    pub(crate) async fn last(&self, key: &str, count: usize) -> Result<Vec<String>> {
        match self.command(&["LRANGE", key, &format!("-{count}"), "-1"]).await? {
            Reply::Texts(texts) => Ok(texts),
            Reply::Number(_) => bail!("redis answers LRANGE with a number"),
        }
    }

    async fn command(&self, words: &[&str]) -> Result<Reply> {
        let exchange = async {
            let stream = TcpStream::connect(&self.address).await?;
            let mut stream = BufReader::new(stream);
            stream.get_mut().write_all(&encode(words)).await?;
            read_reply(&mut stream).await
        };
        tokio::time::timeout(LIMIT, exchange)
            .await
            .with_context(|| format!("{} does not answer", self.address))?
            .with_context(|| format!("asking redis at {}", self.address))
    }
}

fn encode(words: &[&str]) -> Vec<u8> {
    let mut out = format!("*{}\r\n", words.len()).into_bytes();
    for word in words {
        out.extend_from_slice(format!("${}\r\n{word}\r\n", word.len()).as_bytes());
    }
    out
}

async fn read_reply<R: AsyncBufReadExt + Unpin>(stream: &mut R) -> Result<Reply> {
    let line = read_line(stream).await?;
    match line.split_at_checked(1) {
        Some((":", number)) => Ok(Reply::Number(number.parse()?)),
        Some(("-", error)) => bail!("redis refuses: {error}"),
        Some(("*", count)) => {
            let count: usize = count.parse().context("length of a list")?;
            if count > MAX_ITEMS {
                bail!("a list of {count} elements is over the limit of {MAX_ITEMS}");
            }
            let mut texts = Vec::new();
            for _ in 0..count {
                let line = read_line(stream).await?;
                let length: usize = line.strip_prefix('$').context("an element that is no text")?.parse()?;
                if length > MAX_TEXT {
                    bail!("a text of {length} bytes is over the limit of {MAX_TEXT}");
                }
                let mut bytes = vec![0; length + 2];
                stream.read_exact(&mut bytes).await?;
                bytes.truncate(length);
                texts.push(String::from_utf8_lossy(&bytes).into_owned());
            }
            Ok(Reply::Texts(texts))
        }
        _ => bail!("an answer that is not Redis': {line:?}"),
    }
}

async fn read_line<R: AsyncBufReadExt + Unpin>(stream: &mut R) -> Result<String> {
    let mut bytes = Vec::new();
    // `take` bounds what a broken peer can make us keep.
    stream.take(256).read_until(b'\n', &mut bytes).await?;
    let line = bytes.strip_suffix(b"\r\n").context("the connection has ended")?;
    Ok(String::from_utf8_lossy(line).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn read(text: &str) -> Result<Reply> {
        read_reply(&mut text.as_bytes()).await
    }

    #[tokio::test]
    async fn replies() {
        assert_eq!(read(":3\r\n").await.unwrap(), Reply::Number(3));
        assert_eq!(
            read("*2\r\n$1\r\na\r\n$0\r\n\r\n").await.unwrap(),
            Reply::Texts(vec!["a".into(), String::new()])
        );
        for bad in [
            "",
            "x\r\n",
            "-ERR no\r\n",
            "*1\r\n:1\r\n",
            "*9999\r\n",
            "*1\r\n$99999999\r\n",
            "*2\r\n$1\r\na\r\n",
        ] {
            assert!(read(bad).await.is_err(), "{bad:?}");
        }
    }

    #[test]
    fn commands_carry_any_text() {
        assert_eq!(
            encode(&["RPUSH", "k", "a\r\nb"]),
            b"*3\r\n$5\r\nRPUSH\r\n$1\r\nk\r\n$4\r\na\r\nb\r\n"
        );
    }
}
