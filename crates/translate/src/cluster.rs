//! Outbound clusters with their endpoints: TLS decision, balancing, bounds (SEMANTICS 1d, 1f, 6c).

use std::net::IpAddr;

use mantlet_api::destination_rule::{ClientTlsMode, ClientTlsSettings, H2UpgradePolicy, SimpleLb};
use mantlet_model::cluster::{Balancer, Cluster, ClusterTls, Discovery, Limits, Outlier, ServiceRef, UpstreamProtocol};
use mantlet_model::endpoint::{Endpoint, Endpoints};
use mantlet_model::names::{self, ClusterName};
use mantlet_model::tls::{ClientTls, SanMatch};

use crate::destination_rule::{Applied, Settings};
use crate::endpoint::{self, Resolved};
use crate::mesh::Mesh;
use crate::peer_authentication::{self, Mode};
use crate::protocol::Protocol;
use crate::tls;
use crate::world::World;
use crate::world::service::{Resolution, Service, ServicePort};

pub use mantlet_model::names::INBOUND_SOURCE;

/// Who builds clusters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// A sidecar.
    Sidecar,
    /// A gateway; it may use secrets by name and has no original destination to follow.
    Gateway,
}

/// The clusters of one service port: the plain one, then one per subset.
pub fn outbound(
    world: &World,
    side: Side,
    service: &Service,
    port: &ServicePort,
    applied: Option<&Applied<'_>>,
) -> Vec<(Cluster, Option<Endpoints>)> {
    let resolved = endpoint::resolve(world, service, port);
    let build = |subset: Option<&str>, members: Vec<Resolved<'_>>| {
        let settings = applied.map(|a| a.settings(port.number, subset)).unwrap_or_default();
        let secrets_allowed = side == Side::Gateway || applied.is_some_and(|a| a.selects_clients);
        Builder {
            world,
            side,
            service,
            port,
            settings,
            secrets_allowed,
            subset: subset.unwrap_or_default(),
        }
        .build(&members)
    };
    let mut out = vec![build(None, resolved.clone())];
    for subset in applied.iter().flat_map(|a| &a.subsets) {
        let members = resolved
            .iter()
            .filter(|r| {
                r.labels
                    .is_some_and(|labels| mantlet_api::selector::subset(&subset.labels, labels))
            })
            .cloned()
            .collect();
        out.push(build(Some(&subset.name), members));
    }
    out
}

struct Builder<'a> {
    world: &'a World,
    side: Side,
    service: &'a Service,
    port: &'a ServicePort,
    settings: Settings<'a>,
    secrets_allowed: bool,
    subset: &'a str,
}

impl Builder<'_> {
    fn build(&self, members: &[Resolved<'_>]) -> (Cluster, Option<Endpoints>) {
        let mesh = self.world.mesh();
        let name = ClusterName::outbound(self.port.number, self.subset, &self.service.host);
        let protocol = self.protocol();
        let http2 = protocol == UpstreamProtocol::Http2;

        let original = match self.side {
            Side::Sidecar => {
                self.service.resolution == Resolution::OriginalDestination
                    || self.settings.load_balancer.and_then(|lb| lb.simple) == Some(SimpleLb::Passthrough)
            }
            // A gateway dials addresses it was told; there is no original destination behind its listeners.
            Side::Gateway => false,
        };
        let auto = mesh.auto_mtls && !self.service.external && self.namespace_mode() != Mode::Disable;
        let mutual = || {
            Box::new(tls::mesh_client(
                mesh,
                name.sni(),
                endpoint::server_names(self.world, self.service, members),
                http2,
            ))
        };
        let (tls, member_mtls): (Result<ClusterTls, Refusal>, MemberTls) = match self.settings.tls {
            Some(settings) => {
                let everywhere = settings.mode == ClientTlsMode::IstioMutual;
                let member = if everywhere { MemberTls::All } else { MemberTls::None };
                (self.by_rule(settings, &name, members, http2), member)
            }
            None if !auto => (Ok(ClusterTls::Plain), MemberTls::None),
            // One cluster for all addresses cannot choose per endpoint (S1.71).
            None if original => {
                let all = !members.is_empty() && members.iter().all(|m| self.member_auto(m));
                if all {
                    (Ok(ClusterTls::Always(mutual())), MemberTls::All)
                } else {
                    (Ok(ClusterTls::Plain), MemberTls::None)
                }
            }
            None => (Ok(ClusterTls::Auto(mutual())), MemberTls::ByPolicy),
        };

        let endpoints: Vec<Endpoint> = members
            .iter()
            .map(|m| {
                let mtls = match member_mtls {
                    MemberTls::All => true,
                    MemberTls::None => false,
                    MemberTls::ByPolicy => self.member_auto(m),
                };
                Endpoint {
                    mtls,
                    mantlet: m.endpoint.mantlet && mtls,
                    ..m.endpoint.clone()
                }
            })
            .collect();

        let alpn_override = !matches!(
            self.settings.tls.map(|t| t.mode),
            Some(ClientTlsMode::Simple | ClientTlsMode::Mutual)
        );
        let mut cluster = Cluster {
            name: name.to_string(),
            discovery: Discovery::Static(Vec::new()),
            connect_timeout_ms: self
                .settings
                .connection_pool
                .and_then(|p| p.tcp.as_ref()?.connect_timeout)
                .map_or(mesh.connect_timeout_ms, millis),
            balancer: self.balancer(original),
            tls: ClusterTls::Plain,
            protocol,
            bind_source: None,
            limits: self.limits(),
            outlier: self.outlier(),
            services: vec![service_ref(self.service)],
            alpn_override,
        };
        match tls {
            Ok(tls) => cluster.tls = tls,
            // Settings that Istio would silently turn into plaintext (S1.115, S1.116), or that are not supported: nothing leaves
            // instead.
            Err(Refusal) => return (cluster, None),
        }
        if original {
            cluster.discovery = Discovery::OriginalDestination { port: None };
            return (cluster, None);
        }
        if self.service.resolution == Resolution::Dns {
            cluster.discovery = Discovery::Dns(endpoints);
            return (cluster, None);
        }
        cluster.discovery = Discovery::Eds {
            service: cluster.name.clone(),
        };
        let assignment = Endpoints {
            cluster: cluster.name.clone(),
            endpoints,
        };
        (cluster, Some(assignment))
    }

    /// Effective server mode at the level of the whole service (S1.61).
    fn namespace_mode(&self) -> Mode {
        peer_authentication::namespace_mode(self.world, &self.service.namespace).unwrap_or(Mode::Permissive)
    }

    fn member_auto(&self, member: &Resolved<'_>) -> bool {
        member.auto_mtls(self.world, &self.service.namespace)
    }

    /// TLS as a DestinationRule says it (S1.113–S1.116).
    fn by_rule(
        &self,
        settings: &ClientTlsSettings,
        name: &ClusterName<'_>,
        members: &[Resolved<'_>],
        http2: bool,
    ) -> Result<ClusterTls, Refusal> {
        let mesh = self.world.mesh();
        if settings.mode == ClientTlsMode::Disable {
            return Ok(ClusterTls::Plain);
        }
        let given_sans = || settings.subject_alt_names.clone();
        if settings.mode == ClientTlsMode::IstioMutual {
            let sni = if settings.sni.is_empty() {
                name.sni()
            } else {
                settings.sni.clone()
            };
            let names = if settings.subject_alt_names.is_empty() {
                endpoint::server_names(self.world, self.service, members)
            } else {
                given_sans()
            };
            return Ok(ClusterTls::Always(Box::new(tls::mesh_client(mesh, sni, names, http2))));
        }
        // A revoked certificate that is accepted is what the list was written against.
        if !settings.ca_crl.is_empty() && settings.insecure_skip_verify != Some(true) {
            return Err(Refusal);
        }
        let credential = (!settings.credential_name.is_empty()).then_some(settings.credential_name.as_str());
        if credential.is_some() && !self.secrets_allowed {
            return Err(Refusal);
        }
        let certificate = match (settings.mode, credential) {
            (ClientTlsMode::Simple, _) => None,
            (_, Some(secret)) => Some(format!("kubernetes://{secret}")),
            (_, None) if !settings.client_certificate.is_empty() && !settings.private_key.is_empty() => Some(format!(
                "file-cert:{}~{}",
                settings.client_certificate, settings.private_key
            )),
            _ => return Err(Refusal),
        };
        let skip = settings.insecure_skip_verify == Some(true);
        let trust_bundle = if skip {
            None
        } else if let Some(secret) = credential {
            Some(format!("kubernetes://{secret}-cacert"))
        } else if !settings.ca_certificates.is_empty() {
            Some(format!("file-root:{}", settings.ca_certificates))
        } else {
            Some("file-root:system".to_string())
        };
        // Whose certificate is not verified may carry any name (S1.114). Without names and without `sni`, the server must be
        // the host itself (S1.115).
        let sans = if skip {
            Vec::new()
        } else if !settings.subject_alt_names.is_empty() {
            given_sans()
        } else if !self.service.extra_sans.is_empty() {
            self.service.extra_sans.clone()
        } else if settings.sni.is_empty() && !self.service.host.starts_with('*') {
            vec![self.service.host.clone()]
        } else {
            Vec::new()
        };
        Ok(ClusterTls::Always(Box::new(ClientTls {
            certificate,
            trust_bundle,
            server_sans: sans.into_iter().map(SanMatch::Exact).collect(),
            sni: if settings.sni.is_empty() {
                self.service.host.clone()
            } else {
                settings.sni.clone()
            },
            alpn: if http2 { vec!["h2".into()] } else { Vec::new() },
            min_version: Default::default(),
        })))
    }

    fn protocol(&self) -> UpstreamProtocol {
        let http = self.settings.connection_pool.and_then(|p| p.http.as_ref());
        match self.port.protocol {
            Protocol::Http2 | Protocol::Grpc => UpstreamProtocol::Http2,
            Protocol::Auto => UpstreamProtocol::Downstream,
            _ if http.is_some_and(|h| h.use_client_protocol) => UpstreamProtocol::Downstream,
            Protocol::Http if http.is_some_and(|h| h.h2_upgrade_policy == H2UpgradePolicy::Upgrade) => {
                UpstreamProtocol::Http2
            }
            _ => UpstreamProtocol::Http1,
        }
    }

    fn balancer(&self, original: bool) -> Balancer {
        if original {
            return Balancer::Provided;
        }
        match self.settings.load_balancer.and_then(|lb| lb.simple) {
            Some(SimpleLb::RoundRobin) => Balancer::RoundRobin,
            Some(SimpleLb::Random) => Balancer::Random,
            _ => Balancer::LeastRequest,
        }
    }

    fn limits(&self) -> Limits {
        let mut limits = Limits::default();
        let set = |slot: &mut u32, value: i32| {
            if let Ok(value) = u32::try_from(value)
                && value > 0
            {
                *slot = value;
            }
        };
        if let Some(pool) = self.settings.connection_pool {
            if let Some(tcp) = &pool.tcp {
                set(&mut limits.connections, tcp.max_connections);
            }
            if let Some(http) = &pool.http {
                set(&mut limits.pending, http.http1_max_pending_requests);
                set(&mut limits.requests, http.http2_max_requests);
                set(&mut limits.retries, http.max_retries);
            }
        }
        limits
    }

    fn outlier(&self) -> Option<Outlier> {
        let detection = self.settings.outlier?;
        Some(Outlier {
            consecutive_5xx: detection.consecutive_5xx_errors.unwrap_or_else(|| {
                // With the gateway counter set alone, the general one is off.
                if detection.consecutive_gateway_errors.is_some() {
                    0
                } else {
                    5
                }
            }),
            consecutive_gateway_errors: detection.consecutive_gateway_errors.unwrap_or(0),
            interval_ms: detection.interval.map_or(10_000, millis),
            base_ejection_ms: detection.base_ejection_time.map_or(30_000, millis),
            max_ejection_percent: u32::try_from(detection.max_ejection_percent)
                .ok()
                .filter(|p| (1..=100).contains(p))
                .unwrap_or(10),
        })
    }
}

#[derive(Clone, Copy)]
enum MemberTls {
    All,
    None,
    ByPolicy,
}

struct Refusal;

/// A service as cluster metadata.
pub fn service_ref(service: &Service) -> ServiceRef {
    ServiceRef {
        host: service.host.clone(),
        name: service.name.clone(),
        namespace: service.namespace.clone(),
    }
}

fn millis(duration: mantlet_api::Duration) -> u64 {
    u64::try_from(duration.0.as_millis()).unwrap_or(u64::MAX)
}

/// A cluster that follows the original destination.
pub fn original_destination(name: String, mesh: &Mesh, protocol: UpstreamProtocol, bind: Option<IpAddr>) -> Cluster {
    Cluster {
        name,
        discovery: Discovery::OriginalDestination { port: None },
        connect_timeout_ms: mesh.connect_timeout_ms,
        balancer: Balancer::Provided,
        tls: ClusterTls::Plain,
        protocol,
        bind_source: bind,
        limits: Limits::default(),
        outlier: None,
        services: Vec::new(),
        alpn_override: true,
    }
}

/// The cluster that refuses everything.
pub fn black_hole(mesh: &Mesh) -> Cluster {
    Cluster {
        discovery: Discovery::Static(Vec::new()),
        balancer: Balancer::LeastRequest,
        protocol: UpstreamProtocol::Http1,
        ..original_destination(names::BLACK_HOLE.into(), mesh, UpstreamProtocol::Http1, None)
    }
}
