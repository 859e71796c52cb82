//! What is listened on. The outbound listener is one socket for each worker and family, shared by the kernel.

use crate::origin;
use socket2::{Domain, Protocol, Socket, Type};
use std::{
    future, io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    time::Duration,
};
use tokio::net::{TcpListener, TcpStream, UdpSocket};

const BACKLOG: i32 = 4096;
/// Pause after an error such as "too many open files", which is there again at once.
const PAUSE: Duration = Duration::from_millis(50);

/// A worker's listening sockets.
#[derive(Debug)]
pub(crate) struct Listeners {
    ipv4: TcpListener,
    /// Absent on hosts without IPv6.
    ipv6: Option<TcpListener>,
}

impl Listeners {
    /// On 127.0.0.1 and ::1. Must be called within the worker's runtime.
    pub(crate) fn bind(port: u16) -> io::Result<Self> {
        let ipv4 = listen((Ipv4Addr::LOCALHOST, port).into())?;
        let ipv6 = match listen((Ipv6Addr::LOCALHOST, port).into()) {
            Ok(listener) => Some(listener),
            Err(error) if is_without_ipv6(&error) => {
                tracing::warn!("this host has no IPv6 ({error}): listening on 127.0.0.1 only");
                None
            }
            Err(error) => return Err(error),
        };
        Ok(Self { ipv4, ipv6 })
    }

    /// The next connection.
    pub(crate) async fn accept(&self) -> TcpStream {
        loop {
            let ipv6 = async {
                match &self.ipv6 {
                    Some(listener) => listener.accept().await,
                    None => future::pending().await,
                }
            };
            let accepted = tokio::select! {
                accepted = self.ipv4.accept() => accepted,
                accepted = ipv6 => accepted,
            };
            match accepted {
                Ok((stream, _)) => return stream,
                Err(error) => {
                    tracing::warn!("accept: {error}");
                    tokio::time::sleep(PAUSE).await;
                }
            }
        }
    }

    /// A connection that is there already.
    pub(crate) async fn accept_waiting(&self) -> Option<TcpStream> {
        tokio::select! {
            biased;
            stream = self.accept() => Some(stream),
            () = future::ready(()) => None,
        }
    }

    /// Tells the kernel that these sockets are being served.
    pub(crate) fn heartbeat(&self) {
        origin::heartbeat(&self.ipv4);
        if let Some(listener) = &self.ipv6 {
            origin::heartbeat(listener);
        }
    }
}

/// A listening socket at a name's own address. Must be bound within the worker's runtime.
pub(crate) fn bind_named(address: SocketAddr) -> io::Result<TcpListener> {
    listen(address)
}

/// The next connection to a name.
pub(crate) async fn accept_named(listener: &TcpListener) -> TcpStream {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => return stream,
            Err(error) => {
                tracing::warn!("accept: {error}");
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
}

/// A socket for datagrams. Must be bound within a runtime.
pub(crate) fn bind_datagrams(address: SocketAddr) -> io::Result<UdpSocket> {
    let socket = || {
        let socket = std::net::UdpSocket::bind(address)?;
        socket.set_nonblocking(true)?;
        UdpSocket::from_std(socket)
    };
    socket().map_err(not_listening(address))
}

fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = || {
        let socket =
            Socket::new(Domain::for_address(address), Type::STREAM.nonblocking(), Some(Protocol::TCP))?;
        if address.is_ipv6() {
            socket.set_only_v6(true)?;
        }
        socket.set_reuse_address(true)?;
        socket.set_reuse_port(true)?;
        socket.bind(&address.into())?;
        socket.listen(BACKLOG)?;
        TcpListener::from_std(socket.into())
    };
    socket().map_err(not_listening(address))
}

fn not_listening(address: SocketAddr) -> impl FnOnce(io::Error) -> io::Error {
    move |error| io::Error::new(error.kind(), NotListening { address, error })
}

/// An address that cannot be listened on.
#[derive(Debug, thiserror::Error)]
#[error("listen on {address}: {error}")]
struct NotListening {
    address: SocketAddr,
    error: io::Error,
}

/// Whether an address could not be bound because this host has no IPv6.
pub(crate) fn is_without_ipv6(error: &io::Error) -> bool {
    let inner = error.get_ref().and_then(|inner| inner.downcast_ref::<NotListening>());
    let errno = inner.and_then(|inner| inner.error.raw_os_error());
    matches!(errno, Some(libc::EAFNOSUPPORT | libc::EADDRNOTAVAIL))
}
