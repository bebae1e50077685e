//! The node of an embedded cluster: sandbox, pod network, pod processes, kubelet, controllers, DNS and service addresses.
//!
//! Called by the `cluster` command, which composes these parts in one process inside the cluster's own namespaces.
//! Everything here speaks to the API as an ordinary Kubernetes client (`kube::Client`); nothing here may know how the
//! API server stores its objects.

pub mod controllers;
pub mod dns;
pub mod images;
pub mod kubelet;
mod kubelet_http;
pub mod podnet;
pub mod probes;
pub mod rootfs;
pub mod sandbox;
pub mod services;
pub mod shim;
mod volumes;
