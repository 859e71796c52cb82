//! Netlink: a socket, and the messages of a datagram (linux/netlink.h).

use netlink_packet_core::NlasIterator;
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

/// Attributes of a message, by their kinds.
pub(crate) type Attributes = BTreeMap<u16, Vec<u8>>;

/// Reads attributes, as far as they are ones.
pub(crate) fn attributes(bytes: &[u8]) -> Attributes {
    // The two highest bits of a kind are flags.
    let nlas = NlasIterator::new(bytes).map_while(Result::ok);
    nlas.map(|nla| (nla.kind() & 0x3fff, nla.value().to_vec())).collect()
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
        (code != 0).then(|| io::Error::from_raw_os_error(-code))
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
}
