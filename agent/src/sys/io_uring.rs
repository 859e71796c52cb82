//! Connecting through `io_uring(7)`.

#![expect(unsafe_code, reason = "the ring is handed addresses of what it works on")]

use io_uring::{
    IoUring, opcode,
    squeue::Flags,
    types::{Fd, Timespec},
};
use socket2::{SockAddr, Socket};
use std::{io, os::fd::AsRawFd as _, time::Duration};

const CONNECT: u64 = 1;
const LIMIT: u64 = 2;

/// A ring for one connect. Linux 5.5; may be switched off (`kernel.io_uring_disabled`) or filtered (seccomp(2)).
pub(crate) struct Ring(IoUring);

impl Ring {
    pub(crate) fn new() -> io::Result<Self> {
        IoUring::new(2).map(Self)
    }

    /// Connects a socket, within a time.
    pub(crate) fn connect(mut self, socket: &Socket, to: &SockAddr, patience: Duration) -> io::Result<()> {
        let patience = Timespec::from(patience);
        let connect = opcode::Connect::new(Fd(socket.as_raw_fd()), to.as_ptr().cast(), to.len()).build();
        let connect = connect.flags(Flags::IO_LINK).user_data(CONNECT);
        let limit = opcode::LinkTimeout::new(&raw const patience).build().user_data(LIMIT);
        // SAFETY: the socket, the address and the time outlive both entries, whose completions are waited for here.
        unsafe { self.0.submission().push_multiple(&[connect, limit]) }.map_err(io::Error::other)?;
        let mut waited = 0;
        let mut result = None;
        while waited < 2 {
            self.0.submit_and_wait(1)?;
            for completion in self.0.completion() {
                waited += 1;
                if completion.user_data() == CONNECT {
                    result = Some(completion.result());
                }
            }
        }
        match result {
            Some(0) => Ok(()),
            // The limit has ended it.
            Some(error) if error == -libc::ECANCELED => Err(io::ErrorKind::TimedOut.into()),
            Some(error) => Err(io::Error::from_raw_os_error(-error)),
            None => Err(io::Error::other("the ring did not say how the connect ended")),
        }
    }
}
