//! Where a connection or a datagram was going before it was steered here, and who made it: asked of the kernel.

use socket2::SockRef;
use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::AsRawFd,
};

/// The private `getsockopt` level of mesh-redirect's hooks.
const SOL_MESH_REDIRECT: libc::c_int = 0x4d52;
const OPTION_ORIGIN: libc::c_int = 1;
const OPTION_HEARTBEAT: libc::c_int = 2;
const OPTION_RESOLVER: libc::c_int = 3;

/// A steered connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Origin {
    /// Where it was going.
    pub(crate) destination: SocketAddr,
    /// The service that made it, where the kernel tells; with nftables it does not.
    pub(crate) service: Option<String>,
}

/// The origin of an accepted connection; none for one that was made to this proxy on purpose.
pub(crate) fn of(
    socket: &(impl AsRawFd + std::os::fd::AsFd),
    local: SocketAddr,
) -> io::Result<Option<Origin>> {
    let mut whole = [0; WHOLE_LEN];
    match option(socket, OPTION_ORIGIN, &mut whole) {
        Ok(_) => return parse(&whole).map(Some),
        // Without the hooks, and without an origin, the kernel does not know the option.
        Err(error) if is_absent(&error) => {}
        Err(error) => return Err(error),
    }
    let socket = SockRef::from(socket);
    let original = if local.is_ipv4() { socket.original_dst_v4() } else { socket.original_dst_v6() };
    match original.map(|address| address.as_socket()) {
        Ok(Some(destination)) if destination != local => Ok(Some(Origin { destination, service: None })),
        Ok(_) => Ok(None),
        Err(error) if is_absent(&error) => Ok(None),
        Err(error) => Err(error),
    }
}

/// The resolver whose queries are steered to a socket for datagrams; none where there is none.
pub(crate) fn resolver(socket: &impl AsRawFd) -> io::Result<Option<SocketAddr>> {
    let mut value = [0; RESOLVER_LEN];
    match option(socket, OPTION_RESOLVER, &mut value) {
        Ok(_) => address(&value).map(Some),
        Err(error) if is_absent(&error) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Tells the kernel that a listener is being served: it stops steering to one that was silent for three seconds.
/// Where the hooks are not there, nobody needs to know.
pub(crate) fn heartbeat(listener: &impl AsRawFd) {
    let _without_hooks = option(listener, OPTION_HEARTBEAT, &mut [0; 4]);
}

fn is_absent(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENOPROTOOPT | libc::EOPNOTSUPP))
}

/// Length of a resolver's address, and of the same in a whole origin.
const RESOLVER_LEN: usize = 24;
/// Length of the whole origin.
const WHOLE_LEN: usize = 104;

/// Reads the whole origin: an address as below, uid u32, pid u32, cgroup u64, service 64 bytes NUL padded; in host order.
fn parse(whole: &[u8; WHOLE_LEN]) -> io::Result<Origin> {
    let destination = address(whole.first_chunk().unwrap_or(&[0; RESOLVER_LEN]))?;
    let name = whole[40..].split(|&byte| byte == 0).next().unwrap_or_default();
    let service = (!name.is_empty()).then(|| String::from_utf8_lossy(name).into_owned());
    Ok(Origin { destination, service })
}

/// Reads an address: version u32, family u16, port u16, in host order; address 16 bytes, in network order.
fn address(bytes: &[u8; RESOLVER_LEN]) -> io::Result<SocketAddr> {
    let field = |at: usize| [bytes[at], bytes[at + 1]];
    let version = u32::from_ne_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
    let (family, port) = (u16::from_ne_bytes(field(4)), u16::from_ne_bytes(field(6)));
    let mut address = [0; 16];
    address.copy_from_slice(&bytes[8..]);
    let ip = match (version, libc::c_int::from(family)) {
        (1, libc::AF_INET) => IpAddr::from(Ipv4Addr::new(address[0], address[1], address[2], address[3])),
        (1, libc::AF_INET6) => IpAddr::from(Ipv6Addr::from(address)),
        _ => return Err(io::Error::other(format!("an origin of version {version} and family {family}"))),
    };
    Ok(SocketAddr::new(ip, port))
}

#[expect(unsafe_code, reason = "no crate knows a private socket option")]
fn option(socket: &impl AsRawFd, name: libc::c_int, value: &mut [u8]) -> io::Result<usize> {
    let mut len = value.len() as libc::socklen_t;
    // SAFETY: the kernel writes at most `len` bytes, which is how long the value is, and `len` itself.
    let result = unsafe {
        libc::getsockopt(socket.as_raw_fd(), SOL_MESH_REDIRECT, name, value.as_mut_ptr().cast(), &raw mut len)
    };
    if result == 0 { Ok(len as usize) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn whole(version: u32, family: u16, address: &[u8], service: &str) -> [u8; WHOLE_LEN] {
        let mut whole = [0; WHOLE_LEN];
        whole[0..4].copy_from_slice(&version.to_ne_bytes());
        whole[4..6].copy_from_slice(&family.to_ne_bytes());
        whole[6..8].copy_from_slice(&8080_u16.to_ne_bytes());
        whole[8..8 + address.len()].copy_from_slice(address);
        whole[40..40 + service.len()].copy_from_slice(service.as_bytes());
        whole
    }

    #[test]
    fn origins_of_both_families_are_read() {
        let origin = parse(&whole(1, 2, &[10, 0, 0, 7], "shop")).unwrap();
        assert_eq!(
            origin,
            Origin { destination: "10.0.0.7:8080".parse().unwrap(), service: Some("shop".into()) }
        );
        let address = "fd00::7".parse::<Ipv6Addr>().unwrap().octets();
        let origin = parse(&whole(1, 10, &address, "")).unwrap();
        assert_eq!(origin.destination, "[fd00::7]:8080".parse().unwrap());
        assert_eq!(origin.service, None);
    }

    #[test]
    fn a_name_that_fills_its_field_ends_with_it() {
        let origin = parse(&whole(1, 2, &[1, 1, 1, 1], &"x".repeat(64))).unwrap();
        assert_eq!(origin.service, Some("x".repeat(64)));
    }

    #[test]
    fn an_origin_of_another_version_or_family_is_an_error_not_a_guess() {
        parse(&whole(2, 2, &[10, 0, 0, 7], "shop")).unwrap_err();
        parse(&whole(1, 1, &[10, 0, 0, 7], "shop")).unwrap_err();
    }

    #[test]
    fn a_connection_that_nobody_steered_has_no_origin() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let _client = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (accepted, _) = listener.accept().unwrap();
        assert_eq!(of(&accepted, accepted.local_addr().unwrap()).unwrap(), None);
        heartbeat(&listener);
        let datagrams = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        assert_eq!(resolver(&datagrams).unwrap(), None);
    }

    #[test]
    fn the_address_of_a_resolver_is_read() {
        let whole = whole(1, 2, &[10, 0, 0, 53], "");
        assert_eq!(address(whole.first_chunk().unwrap()).unwrap(), "10.0.0.53:8080".parse().unwrap());
    }

    #[test]
    fn an_origin_is_read_or_refused_and_its_name_ends_with_its_field() {
        let seeds = [whole(1, 2, &[10, 0, 0, 7], "shop"), whole(1, 10, &[0xfd; 16], &"x".repeat(64))];
        fuzz::damaged!([&seeds[0][..], &seeds[1]], ["\x01\0\0\0", "\x02\0", "\n\0"], |input: &[u8]| {
            let mut whole = [0; WHOLE_LEN];
            let len = input.len().min(WHOLE_LEN);
            whole[..len].copy_from_slice(&input[..len]);
            let Ok(Origin { destination, service }) = parse(&whole) else { return };
            assert_eq!(address(whole.first_chunk().unwrap()).unwrap(), destination);
            let name = service.unwrap_or_default();
            assert!(!name.contains('\0') && name.chars().count() <= WHOLE_LEN - 40);
        });
    }
}
