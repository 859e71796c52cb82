//! Where a client was going, which is where it gets unless its protocol tells better.

use std::net::SocketAddr;

/// See the module.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Target<'a> {
    /// Where it was going before it was steered; never a virtual address.
    Origin(SocketAddr),
    /// A domain of a virtual host.
    Name(&'a str),
}
