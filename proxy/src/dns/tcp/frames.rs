//! Messages on a stream, each after its length (RFC 1035 §4.2.2).

use bytes::{Buf as _, BytesMut};
use std::{io, time::Duration};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    time::timeout,
};

/// Longest message.
pub(super) const MAX_MESSAGE: usize = u16::MAX as usize;
const PREFIX: usize = 2;

/// The messages of a stream.
#[derive(Debug)]
pub(super) struct Frames<R> {
    read: R,
    buffer: BytesMut,
    max: usize,
}

impl<R: AsyncRead + Unpin> Frames<R> {
    /// A message longer than `max` is an error.
    pub(super) fn new(read: R, max: usize) -> Self {
        Self { read, buffer: BytesMut::new(), max }
    }

    /// The next message; none where the stream ended after the last one. Nothing is lost when it is no longer waited for.
    pub(super) async fn next(&mut self) -> io::Result<Option<Vec<u8>>> {
        loop {
            if let Some(message) = self.take()? {
                return Ok(Some(message));
            }
            if self.read.read_buf(&mut self.buffer).await? == 0 {
                return if self.buffer.is_empty() {
                    Ok(None)
                } else {
                    Err(io::ErrorKind::UnexpectedEof.into())
                };
            }
        }
    }

    fn take(&mut self) -> io::Result<Option<Vec<u8>>> {
        let Some(prefix) = self.buffer.first_chunk::<PREFIX>() else { return Ok(None) };
        let len = usize::from(u16::from_be_bytes(*prefix));
        if len > self.max {
            return Err(io::Error::new(io::ErrorKind::InvalidData, format!("a message of {len} bytes")));
        }
        if self.buffer.len() < PREFIX + len {
            self.buffer.reserve(PREFIX + len - self.buffer.len());
            return Ok(None);
        }
        self.buffer.advance(PREFIX);
        Ok(Some(self.buffer.split_to(len).to_vec()))
    }
}

/// Writes a message, with its length in the same segment (RFC 7766 §8).
pub(super) async fn write(
    stream: &mut (impl AsyncWrite + Unpin),
    message: &[u8],
    limit: Duration,
) -> io::Result<()> {
    let len = u16::try_from(message.len())
        .map_err(|_| io::Error::new(io::ErrorKind::InvalidInput, "a message longer than 65535 bytes"))?;
    let frame = [&len.to_be_bytes(), message].concat();
    timeout(limit, stream.write_all(&frame)).await?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn messages_come_whole_however_they_are_cut() {
        let bytes = b"\x00\x03abc\x00\x00\x00\x01d";
        for cut in 0..bytes.len() {
            let mut frames = Frames::new(tokio::io::AsyncReadExt::chain(&bytes[..cut], &bytes[cut..]), 3);
            for message in [&b"abc"[..], b"", b"d"] {
                assert_eq!(frames.next().await.unwrap().as_deref(), Some(message), "cut at {cut}");
            }
            assert_eq!(frames.next().await.unwrap(), None);
        }
    }

    #[tokio::test]
    async fn what_is_too_long_or_ends_early_is_an_error() {
        for bytes in [&b"\x00\x04abcd"[..], b"\x00\x03ab", b"\x00"] {
            Frames::new(bytes, 3).next().await.unwrap_err();
        }
    }

    #[tokio::test]
    async fn a_message_is_written_after_its_length() {
        let mut written = Vec::new();
        write(&mut written, b"abc", Duration::from_secs(1)).await.unwrap();
        assert_eq!(written, b"\x00\x03abc");
        write(&mut written, &vec![0; MAX_MESSAGE + 1], Duration::from_secs(1)).await.unwrap_err();
    }

    #[test]
    fn messages_are_what_was_framed_wherever_the_stream_is_cut() {
        let seeds: [&[u8]; 2] = [b"\x00\x03abc\x00\x00\x00\x01d", b"\xff\xff"];
        fuzz::damaged!(seeds, ["\0\0", "\0\x01", "\0\x05"], |input: &[u8]| {
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            let read = |cut: usize| {
                let mut frames =
                    Frames::new(tokio::io::AsyncReadExt::chain(&input[..cut], &input[cut..]), 64);
                let mut messages = Vec::new();
                while let Ok(Some(message)) = runtime.block_on(frames.next()) {
                    messages.push(message);
                }
                messages
            };
            let whole = read(0);
            assert_eq!(read(input.len() / 2), whole);
            let framed = |message: &Vec<u8>| [&(message.len() as u16).to_be_bytes()[..], message].concat();
            assert!(input.starts_with(&whole.iter().flat_map(framed).collect::<Vec<u8>>()));
            assert!(whole.iter().all(|message| message.len() <= 64));
        });
    }
}
