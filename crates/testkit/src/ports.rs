//! Ports for programs that must be told where to listen.

use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU16, Ordering};

/// Below the range that the kernel gives to clients, so that no connection takes one before its program binds it.
const PORTS: std::ops::Range<u16> = 10_000..32_000;

/// A port of 127.0.0.1 that is free for TCP. No two calls in a process give the same one, and processes begin at
/// different places.
pub fn free_port() -> u16 {
    static NEXT: OnceLock<AtomicU16> = OnceLock::new();
    let count = PORTS.end - PORTS.start;
    let next = NEXT.get_or_init(|| AtomicU16::new((std::process::id() % u32::from(count)) as u16));
    for _ in 0..count {
        let port = PORTS.start + next.fetch_add(1, Ordering::Relaxed) % count;
        if TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok() {
            return port;
        }
    }
    panic!("no free port between {} and {}", PORTS.start, PORTS.end);
}

/// [`free_port`] with its address.
pub fn free_address() -> SocketAddr {
    (Ipv4Addr::LOCALHOST, free_port()).into()
}
