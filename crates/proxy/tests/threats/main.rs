//! Attacks that were met elsewhere, by their number in the list of threats, over real sockets: `reg_NUMBER_what`. Groups:
//! paths (A), hosts (B), headers (C), framing and switches of protocol (D), floods and slow peers (E), peers without a name (I).
//!
//! Where the defence is a number, the same attack runs a second time without it and must then succeed, so that the test
//! shows that it could fail. Costs are counted (frames, requests, bytes held), never timed.

#[path = "../common/mod.rs"]
mod common;

mod floods;
mod h2spec;
mod headers;
mod hosts;
mod paths;
mod peers;
mod slow;
mod smuggling;
mod wire;
