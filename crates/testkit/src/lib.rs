//! Fixtures for tests: a certificate authority, servers that remember what they were asked, network namespaces, programs
//! of the machine. A dev-dependency only.
//!
//! Its law: leaf fixtures only. It may use `identity`, and no crate above it; whatever needs the whole product is in the
//! top-level `tests/`. A missing program or privilege is a failure that says what to install, never a skipped test.
//! Fixtures panic: inside a test a panic is the report.

pub mod ca;
pub mod echo;
pub mod jwt;
pub mod netns;
pub mod ports;
pub mod process;
pub mod programs;
pub mod wait;

pub use ca::TestCa;
pub use echo::{EchoServer, Recorded, TcpEcho};
pub use netns::NetNs;
pub use ports::{free_address, free_port};
pub use process::ChildGuard;
pub use programs::{envoy, program};
pub use wait::eventually;
