//! Netlink: a socket, and the messages of a datagram (linux/netlink.h).

use netlink_packet_core::{DefaultNla, Emitable as _, NLA_F_NESTED, NlasIterator};
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, setsockopt, socket, sockopt,
};
use std::{
    collections::BTreeMap,
    io,
    os::fd::{AsRawFd as _, OwnedFd},
};

/// Bytes of one answer; the kernel fills at most 32 KiB.
const ANSWER: usize = 32 << 10;
/// Length of `struct nlmsghdr`.
pub(crate) const HEADER: usize = 16;

/// A socket.
#[derive(Debug)]
pub(crate) struct Netlink {
    socket: OwnedFd,
}

impl Netlink {
    /// Of a netlink family.
    pub(crate) fn open(protocol: SockProtocol) -> io::Result<Self> {
        let socket = socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, protocol)?;
        Ok(Self { socket })
    }

    /// With room for so many bytes in each direction. Needs CAP_NET_ADMIN.
    pub(crate) fn with_buffers(self, bytes: usize) -> io::Result<Self> {
        setsockopt(&self.socket, sockopt::SndBufForce, &bytes)?;
        setsockopt(&self.socket, sockopt::RcvBufForce, &bytes)?;
        Ok(self)
    }

    /// Sends messages, which the kernel has carried out when this returns.
    pub(crate) fn send(&self, messages: &[u8]) -> io::Result<()> {
        Ok(send(self.socket.as_raw_fd(), messages, MsgFlags::empty()).map(drop)?)
    }

    /// Asks for one thing: the message with it, or none where the kernel says that there is no such thing.
    pub(crate) fn ask(&self, request: &[u8]) -> io::Result<Option<Vec<u8>>> {
        self.send(request)?;
        let mut found = Ok(None);
        // To the last datagram, which the next question must not take for its answer.
        while let Some(answer) = self.answer()? {
            for message in Messages(&answer) {
                found = match message.error() {
                    Some(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
                    Some(error) => Err(error),
                    None if i32::from(message.kind) == libc::NLMSG_ERROR => continue,
                    None => Ok(Some(message.body.to_vec())),
                };
            }
        }
        found
    }

    /// The next datagram; none where the kernel has nothing to say.
    pub(crate) fn answer(&self) -> io::Result<Option<Vec<u8>>> {
        let mut buffer = [0; ANSWER];
        loop {
            match recv(self.socket.as_raw_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT) {
                Ok(len) => return Ok(Some(buffer[..len].to_vec())),
                Err(nix::Error::EAGAIN) => return Ok(None),
                Err(nix::Error::EINTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}

/// A message of a kind, with the flags of its header.
pub(crate) fn message(kind: u16, flags: libc::c_int, body: &[u8]) -> Vec<u8> {
    let mut message = ((HEADER + body.len()) as u32).to_ne_bytes().to_vec();
    message.extend(kind.to_ne_bytes().into_iter().chain((flags as u16).to_ne_bytes()).chain([0; 8]));
    message.extend(body);
    message
}

/// An attribute.
pub(crate) fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let attribute = DefaultNla::new(kind, value.to_vec());
    let mut bytes = vec![0; attribute.buffer_len()];
    attribute.emit(&mut bytes);
    bytes
}

/// An attribute that holds others.
pub(crate) fn nested(kind: u16, attributes: &[Vec<u8>]) -> Vec<u8> {
    attribute(kind | NLA_F_NESTED, &attributes.concat())
}

/// Attributes of a message, by their kinds.
pub(crate) type Attributes = BTreeMap<u16, Vec<u8>>;

/// Reads attributes, as far as they are ones.
pub(crate) fn attributes(bytes: &[u8]) -> Attributes {
    // The two highest bits of a kind are flags.
    let nlas = NlasIterator::new(bytes).map_while(Result::ok);
    nlas.map(|nla| (nla.kind() & 0x3fff, nla.value().to_vec())).collect()
}

/// How many attributes there are, which may be of one kind: those of a list.
pub(crate) fn count(bytes: &[u8]) -> usize {
    NlasIterator::new(bytes).map_while(Result::ok).count()
}

/// The messages of a datagram.
pub(crate) struct Messages<'a>(pub(crate) &'a [u8]);

/// One message, after its header.
pub(crate) struct Message<'a> {
    pub(crate) kind: u16,
    pub(crate) body: &'a [u8],
}

impl<'a> Iterator for Messages<'a> {
    type Item = Message<'a>;

    fn next(&mut self) -> Option<Message<'a>> {
        let len = u32_at(self.0, 0)? as usize;
        let kind = u16_at(self.0, 4)?;
        let body = self.0.get(HEADER..len)?;
        self.0 = self.0.get(len.next_multiple_of(4)..).unwrap_or_default();
        Some(Message { kind, body })
    }
}

impl Message<'_> {
    /// Whether it is the last one of a list.
    pub(crate) fn is_done(&self) -> bool {
        i32::from(self.kind) == libc::NLMSG_DONE
    }

    /// What an acknowledgement says went wrong.
    pub(crate) fn error(&self) -> Option<io::Error> {
        let code = u32_at(self.body, 0).filter(|_| i32::from(self.kind) == libc::NLMSG_ERROR)?.cast_signed();
        (code != 0).then(|| io::Error::from_raw_os_error(code.wrapping_neg()))
    }

    /// The kind of message that an acknowledgement is for.
    pub(crate) fn acknowledged(&self) -> Option<u16> {
        u16_at(self.body, 8)
    }
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_again() {
        let body = [nested(2, &[attribute(1, &[17]), attribute(3, b"abcd")]), attribute(4, &[])].concat();
        let message = message(7, libc::NLM_F_REQUEST, &body);
        let read = Messages(&message).next().unwrap();
        assert_eq!((read.kind, message[6]), (7, 1));
        let outer = attributes(read.body);
        assert_eq!(attributes(&outer[&2]), BTreeMap::from([(1, vec![17]), (3, b"abcd".to_vec())]));
        assert!(outer[&4].is_empty());
    }

    #[test]
    fn broken_answers_end_and_never_panic() {
        let mut good = 24_u32.to_ne_bytes().to_vec();
        good.extend([7, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 8, 0, 1, 0, b'a', b'b', b'c', 0]);
        let message = Messages(&good).next().unwrap();
        assert_eq!((message.kind, attributes(message.body)), (7, BTreeMap::from([(1, b"abc\0".to_vec())])));
        for end in 0..good.len() {
            assert_eq!(Messages(&good[..end]).count(), 0);
        }
        for first in [0_u32, 3, 15, u32::MAX] {
            let mut broken = good.clone();
            broken[..4].copy_from_slice(&first.to_ne_bytes());
            assert_eq!(Messages(&broken).count(), 0, "{first}");
        }
    }

    #[test]
    fn no_datagram_holds_more_than_its_bytes_and_what_is_written_comes_back() {
        let refusal = [&(-2_i32).to_ne_bytes()[..], &[0; 16]].concat();
        let body = [nested(2, &[attribute(1, &[17]), attribute(3, b"abcd")]), attribute(4, &[])].concat();
        let good = [message(7, 1, &body), message(libc::NLMSG_ERROR as u16, 0, &refusal)].concat();
        let least =
            [message(libc::NLMSG_ERROR as u16, 0, &i32::MIN.to_ne_bytes()), message(3, 0, &[])].concat();
        fuzz::damaged!([&good[..], &least], ["\x10\0\0\0", "\x04\0\x01\0", "\0\0\0\0"], |input: &[u8]| {
            let messages: Vec<Message<'_>> = Messages(input).collect();
            let read: usize = messages.iter().map(|message| HEADER + message.body.len()).sum();
            assert!(read <= input.len() && messages.len() <= input.len() / HEADER);
            for message in messages {
                let _whatever_it_says = (message.error(), message.acknowledged(), message.is_done());
                let values: usize = attributes(message.body).values().map(|value| 4 + value.len()).sum();
                assert!(values <= message.body.len());
            }
            let mine = nested(9, &[attribute(5, input)]);
            assert_eq!(attributes(&attributes(&mine)[&9])[&5], input);
        });
    }
}
