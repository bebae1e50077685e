//! Ports of LoadBalancers that the cluster's user may not open on the host, and the ones that stand in for them. Pure.
//!
//! Below `net.ipv4.ip_unprivileged_port_start` (1024 unless the administrator has changed it) only root may listen. The load
//! balancer then opens a higher port of the same address and says so in an annotation of the Service, which
//! `mantlet cluster ports` and the lab runner read. It knows no sockets.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::Service;

/// Annotation of a Service: `80=8080,443=8443`, port of the Service = port of its address on the host. Absent while
/// they are all equal.
pub const ANNOTATION: &str = "mantlet.io/host-ports";

/// Port of the Service → port on the host, where they differ.
pub type HostPorts = BTreeMap<u16, u16>;

/// What a Service's annotation says; what cannot be understood is not there.
pub fn of(service: &Service) -> HostPorts {
    let annotations = service.metadata.annotations.as_ref();
    let text = annotations.and_then(|annotations| annotations.get(ANNOTATION));
    text.into_iter()
        .flat_map(|text| text.split(','))
        .filter_map(|pair| {
            let (port, host) = pair.split_once('=')?;
            Some((port.trim().parse().ok()?, host.trim().parse().ok()?))
        })
        .collect()
}

/// The annotation's text.
pub fn text(ports: &HostPorts) -> String {
    let pairs: Vec<_> = ports.iter().map(|(port, host)| format!("{port}={host}")).collect();
    pairs.join(",")
}

/// The ports that may stand in for `port`, in the order in which they are tried: the one of the last time, 8000 more (80 → 8080,
/// 443 → 8443), then more by 10,000 each.
pub fn stand_ins(port: u16, before: Option<u16>) -> impl Iterator<Item = u16> {
    let more = [8_000, 10_000, 20_000, 30_000, 40_000, 50_000, 60_000];
    before
        .filter(|before| *before >= 1024)
        .into_iter()
        .chain(more.into_iter().filter_map(move |more| port.checked_add(more)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_annotation_reads_back_and_nonsense_is_left_out() {
        let ports = HostPorts::from([(80, 8080), (443, 8443)]);
        assert_eq!(text(&ports), "80=8080,443=8443");
        let mut service = Service::default();
        assert!(of(&service).is_empty());
        for (written, read) in [
            (text(&ports), ports),
            ("80=x,,=,443 = 8443,70000=1".to_owned(), HostPorts::from([(443, 8443)])),
        ] {
            service.metadata.annotations = Some(BTreeMap::from([(ANNOTATION.to_owned(), written)]));
            assert_eq!(of(&service), read);
        }
    }

    #[test]
    fn stand_ins_are_the_known_ones_first() {
        assert_eq!(stand_ins(80, None).take(2).collect::<Vec<_>>(), [8080, 10080]);
        assert_eq!(stand_ins(443, Some(9443)).take(2).collect::<Vec<_>>(), [9443, 8443]);
        assert_eq!(stand_ins(80, Some(81)).next(), Some(8080), "a port that is no better");
        assert!(stand_ins(1023, None).all(|port| port > 1023));
    }
}
