//! Socket options that the proxy needs beyond what tokio offers.
//!
//! Called by the proxy's listeners and connectors. Every function takes anything that lends a descriptor, so the same
//! code serves std, tokio and raw sockets.

use std::io;
use std::net::{IpAddr, SocketAddr, SocketAddrV4};
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use rustix::net::sockopt as rso;
use rustix::net::{AddressFamily, SocketFlags, SocketType};

/// The address that a redirected connection was going to before nft changed it (`SO_ORIGINAL_DST`).
///
/// Where conntrack is active, a connection that was not redirected has an answer too: the socket's own local address. A
/// listener that gets that has been dialled directly.
///
/// # Errors
/// `ENOENT` when conntrack does not know the connection; callers then use the local address.
pub fn original_dst(socket: impl AsFd) -> io::Result<SocketAddr> {
    let fd = socket.as_fd();
    match rso::socket_domain(fd)? {
        AddressFamily::INET6 => match rso::ipv6_original_dst(fd) {
            Ok(v6) => Ok(unmap(SocketAddr::V6(v6))),
            // A dual-stack socket that accepted an IPv4 peer has its entry in the IPv4 table.
            Err(_) => Ok(SocketAddr::V4(rso::ip_original_dst(fd)?)),
        },
        _ => Ok(SocketAddr::V4(rso::ip_original_dst(fd)?)),
    }
}

/// `::ffff:a.b.c.d` as plain IPv4.
fn unmap(addr: SocketAddr) -> SocketAddr {
    match addr.ip() {
        IpAddr::V6(v6) => match v6.to_ipv4_mapped() {
            Some(v4) => SocketAddr::V4(SocketAddrV4::new(v4, addr.port())),
            None => addr,
        },
        IpAddr::V4(_) => addr,
    }
}

/// Makes the next `close` send a reset instead of a FIN (`SO_LINGER` with 0 s): what a client of a STRICT port sees
/// when it speaks plaintext.
///
/// # Errors
/// The kernel's, when the descriptor is no socket.
pub fn reset_on_close(socket: impl AsFd) -> io::Result<()> {
    Ok(rso::set_socket_linger(socket, Some(Duration::ZERO))?)
}

/// `IP_TRANSPARENT`: bind or accept addresses that are not local. Needs `CAP_NET_ADMIN`.
///
/// # Errors
/// `EPERM` without the capability.
pub fn set_transparent(socket: impl AsFd) -> io::Result<()> {
    nix::sys::socket::setsockopt(&socket.as_fd(), nix::sys::socket::sockopt::IpTransparent, &true)?;
    Ok(())
}

/// `IP_FREEBIND`: bind an address that is not (yet) configured.
///
/// # Errors
/// The kernel's, when the descriptor is no IPv4 socket.
pub fn set_freebind(socket: impl AsFd) -> io::Result<()> {
    Ok(rso::set_ip_freebind(socket, true)?)
}

/// `IP_BIND_ADDRESS_NO_PORT`: choose the source port at `connect`, so that many connections may share a bound source
/// address (127.0.0.6) without running out of ports.
///
/// # Errors
/// The kernel's, when the descriptor is no IP socket.
pub fn set_bind_address_no_port(socket: impl AsFd) -> io::Result<()> {
    nix::sys::socket::setsockopt(&socket.as_fd(), nix::sys::socket::sockopt::IpBindAddressNoPort, &true)?;
    Ok(())
}

/// `TCP_NODELAY`.
///
/// # Errors
/// The kernel's, when the descriptor is no TCP socket.
pub fn set_nodelay(socket: impl AsFd) -> io::Result<()> {
    Ok(rso::set_tcp_nodelay(socket, true)?)
}

/// TCP keepalive: first probe after `idle`, then every `interval`, dead after `count` unanswered ones.
///
/// # Errors
/// The kernel's, when the descriptor is no TCP socket or a time is below one second.
pub fn set_keepalive(socket: impl AsFd, idle: Duration, interval: Duration, count: u32) -> io::Result<()> {
    let fd = socket.as_fd();
    rso::set_socket_keepalive(fd, true)?;
    rso::set_tcp_keepidle(fd, idle)?;
    rso::set_tcp_keepintvl(fd, interval)?;
    rso::set_tcp_keepcnt(fd, count)?;
    Ok(())
}

/// How [`listen_tcp`] sets up its socket.
#[derive(Clone, Copy, Debug)]
pub struct ListenOptions {
    /// Several sockets on one port, one per worker (`SO_REUSEPORT`).
    pub reuse_port: bool,
    /// Accept connections to foreign addresses (TPROXY).
    pub transparent: bool,
    /// Accept queue length.
    pub backlog: i32,
}

impl Default for ListenOptions {
    fn default() -> Self {
        Self {
            reuse_port: false,
            transparent: false,
            backlog: 4096,
        }
    }
}

/// A non-blocking, close-on-exec listening TCP socket.
///
/// # Errors
/// The kernel's: address in use, no permission for the port, no such address.
pub fn listen_tcp(addr: SocketAddr, options: ListenOptions) -> io::Result<std::net::TcpListener> {
    let socket = tcp_socket(addr.ip())?;
    rso::set_socket_reuseaddr(&socket, true)?;
    if options.reuse_port {
        rso::set_socket_reuseport(&socket, true)?;
    }
    if options.transparent {
        set_transparent(&socket)?;
    }
    rustix::net::bind(&socket, &addr)?;
    rustix::net::listen(&socket, options.backlog)?;
    Ok(std::net::TcpListener::from(socket))
}

/// An unconnected, non-blocking TCP socket bound to a source address (127.0.0.6 for inbound pass-through). With
/// `transparent` the address may be foreign.
///
/// # Errors
/// The kernel's: no such address, no permission.
pub fn bound_tcp(source: IpAddr, transparent: bool) -> io::Result<OwnedFd> {
    let socket = tcp_socket(source)?;
    if transparent {
        set_transparent(&socket)?;
    }
    set_bind_address_no_port(&socket)?;
    rustix::net::bind(&socket, &SocketAddr::new(source, 0))?;
    Ok(socket)
}

fn tcp_socket(ip: IpAddr) -> io::Result<OwnedFd> {
    let family = if ip.is_ipv4() {
        AddressFamily::INET
    } else {
        AddressFamily::INET6
    };
    Ok(rustix::net::socket_with(
        family,
        SocketType::STREAM,
        SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
        None,
    )?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};

    #[test]
    fn a_reset_socket_gives_the_peer_a_connection_reset() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("bind");
        let mut client = std::net::TcpStream::connect(listener.local_addr().expect("addr")).expect("connect");
        let (server, _) = listener.accept().expect("accept");
        client.write_all(b"plaintext").expect("write");
        reset_on_close(&server).expect("linger");
        drop(server);
        let err = client.read(&mut [0u8; 8]).expect_err("must be reset, not closed");
        assert_eq!(err.kind(), io::ErrorKind::ConnectionReset);
    }

    #[test]
    fn the_source_127_0_0_6_can_be_bound_many_times_without_choosing_ports() {
        let listener = listen_tcp("127.0.0.1:0".parse().expect("addr"), ListenOptions::default()).expect("listen");
        let target = listener.local_addr().expect("addr");
        let sockets: Vec<_> = (0..3)
            .map(|_| bound_tcp("127.0.0.6".parse().expect("ip"), false).expect("bind"))
            .collect();
        for socket in &sockets {
            let result = rustix::net::connect(socket, &target);
            assert!(result.is_ok() || result == Err(rustix::io::Errno::INPROGRESS));
            let local = std::net::TcpStream::from(socket.try_clone().expect("dup"))
                .local_addr()
                .expect("local");
            assert_eq!(local.ip().to_string(), "127.0.0.6");
        }
    }

    #[test]
    fn a_connection_that_was_not_redirected_has_no_original_destination() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("bind");
        let client = std::net::TcpStream::connect(listener.local_addr().expect("addr")).expect("connect");
        assert!(original_dst(&client).is_err());
    }
}
