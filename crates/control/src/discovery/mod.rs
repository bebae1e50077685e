//! From the API server's objects to pushes: watch → world → translation → xDS streams.
//!
//! [`watch`] turns Kubernetes events into changes, [`lanes`] keep their order where some wait for
//! keys, [`hub`] is the single owner of the world and decides who is pushed what,
//! [`ads`] admits streams, [`secrets`] fetches what gateways need, [`board`] remembers what every proxy was sent and
//! accepted, [`unread`] says which objects have no effect, [`metrics`] counts. Nothing here keeps state beyond the objects: after a restart the same comes out.

pub mod ads;
pub mod board;
pub mod hub;
pub mod lanes;
pub mod metrics;
pub mod secrets;
pub mod status;
pub mod unread;
pub mod watch;
