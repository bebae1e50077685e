//! Values of all model types, as wide as the wire can carry them.

use std::sync::Arc;

use ipnet::IpNet;
use mantlet_model::authz::{Action, Atom, Attribute, AuthzFilter, Expr, Matcher, Rule};
use mantlet_model::cluster::*;
use mantlet_model::endpoint::{Endpoint, Endpoints, Health, WorkloadRef};
use mantlet_model::ext_authz::*;
use mantlet_model::http::*;
use mantlet_model::listener::*;
use mantlet_model::names::Direction;
use mantlet_model::route::*;
use mantlet_model::tls::{ClientTls, SanMatch, ServerTls, TlsVersion};
use mantlet_model::{Cluster, Listener};
use proptest::collection::{btree_set, vec};
use proptest::option::of;
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::TestRunner;

/// One value, always the same.
pub(crate) fn sample<T: std::fmt::Debug>(strategy: impl Strategy<Value = T>) -> T {
    strategy.new_tree(&mut TestRunner::deterministic()).unwrap().current()
}

fn word() -> impl Strategy<Value = String> {
    "[a-z][a-z0-9-]{0,7}"
}

/// Text with everything that quoting could get wrong.
pub(crate) fn text() -> impl Strategy<Value = String> {
    "[a-z0-9 ./*+?()|{}^$\\\\é\\[\\]-]{1,8}"
}

fn name() -> impl Strategy<Value = String> {
    "[a-zA-Z0-9|_.:-]{1,20}"
}

fn ip() -> impl Strategy<Value = std::net::IpAddr> {
    prop_oneof![
        any::<[u8; 4]>().prop_map(Into::into),
        any::<[u8; 16]>().prop_map(Into::into)
    ]
}

fn net() -> impl Strategy<Value = IpNet> {
    (ip(), any::<u8>()).prop_map(|(ip, n)| {
        let max = if ip.is_ipv4() { 33 } else { 129 };
        IpNet::new(ip, (u16::from(n) % max) as u8).unwrap()
    })
}

fn ms() -> impl Strategy<Value = u64> {
    prop_oneof![Just(0), 1..100_000u64, Just(31_536_000_000)]
}

fn regex() -> impl Strategy<Value = String> {
    let samples = [
        "abc",
        "(a|[b-z])*",
        "/api/v[0-9]+/.*",
        ".+",
        ".*/ns/a-.*/.*",
        "spiffe://.*/sa/x",
        "spiffe://a[^/]*/.*",
    ];
    prop::sample::select(samples.map(String::from).to_vec())
}

pub(crate) fn endpoint() -> impl Strategy<Value = Endpoint> {
    let workload = (word(), word(), word(), word(), word()).prop_map(|(a, b, c, d, e)| {
        Arc::new(WorkloadRef {
            name: a,
            namespace: b,
            canonical_name: c,
            canonical_revision: d,
            cluster: e,
        })
    });
    let health = prop_oneof![Just(Health::Healthy), Just(Health::Unhealthy), Just(Health::Draining)];
    let address = prop_oneof![ip().prop_map(|i| i.to_string()), "[a-z]{1,8}\\.example\\.com"];
    (
        address,
        any::<u16>(),
        1..=u32::MAX,
        health,
        any::<bool>(),
        any::<bool>(),
        of(workload),
    )
        .prop_map(|(address, port, weight, health, mtls, mantlet, workload)| Endpoint {
            address,
            port,
            weight,
            health,
            mtls,
            mantlet,
            workload,
        })
}

pub(crate) fn endpoints() -> impl Strategy<Value = Endpoints> {
    (name(), vec(endpoint(), 0..4)).prop_map(|(cluster, endpoints)| Endpoints { cluster, endpoints })
}

fn version() -> impl Strategy<Value = TlsVersion> {
    prop_oneof![Just(TlsVersion::V1_2), Just(TlsVersion::V1_3)]
}

fn sans() -> impl Strategy<Value = Vec<SanMatch>> {
    let one = prop_oneof![
        "spiffe://[a-z]{1,5}/ns/[a-z]{1,4}/sa/[a-z]{1,4}".prop_map(SanMatch::Exact),
        "spiffe://[a-z]{1,5}/".prop_map(SanMatch::Prefix),
        "[a-z]{1,5}\\.example\\.com".prop_map(SanMatch::Exact),
    ];
    vec(one, 0..3)
}

fn secret_name() -> impl Strategy<Value = String> {
    prop_oneof![
        Just("default".into()),
        Just("ROOTCA".into()),
        Just("file-root:system".into()),
        "kubernetes://[a-z]{1,6}"
    ]
}

fn server_tls() -> impl Strategy<Value = ServerTls> {
    (
        secret_name(),
        of(secret_name()),
        sans(),
        any::<bool>(),
        vec(word(), 0..3),
        version(),
        vec("[A-Z0-9-]{4,12}", 0..2),
    )
        .prop_map(
            |(certificate, trust_bundle, client_sans, require, alpn, min_version, ciphers)| ServerTls {
                certificate,
                trust_bundle,
                client_sans,
                require_client_certificate: require,
                alpn,
                min_version,
                ciphers,
            },
        )
}

fn client_tls() -> impl Strategy<Value = ClientTls> {
    (
        of(secret_name()),
        of(secret_name()),
        sans(),
        name(),
        vec(word(), 0..3),
        version(),
    )
        .prop_map(
            |(certificate, trust_bundle, server_sans, sni, alpn, min_version)| ClientTls {
                certificate,
                trust_bundle,
                server_sans,
                sni,
                alpn,
                min_version,
            },
        )
}

pub(crate) fn cluster() -> impl Strategy<Value = Cluster> {
    let discovery = prop_oneof![
        name().prop_map(|service| Discovery::Eds { service }),
        vec(endpoint(), 0..3).prop_map(Discovery::Static),
        vec(endpoint(), 0..3).prop_map(Discovery::Dns),
        of(any::<u16>()).prop_map(|port| Discovery::OriginalDestination { port }),
    ];
    let balancer = prop_oneof![
        Just(Balancer::LeastRequest),
        Just(Balancer::RoundRobin),
        Just(Balancer::Random),
        Just(Balancer::Provided)
    ];
    let tls = prop_oneof![
        Just(ClusterTls::Plain),
        client_tls().prop_map(|t| ClusterTls::Always(Box::new(t))),
        client_tls().prop_map(|t| ClusterTls::Auto(Box::new(t))),
    ];
    let protocol = prop_oneof![
        Just(UpstreamProtocol::Http1),
        Just(UpstreamProtocol::Http2),
        Just(UpstreamProtocol::Downstream)
    ];
    let limits = any::<[u32; 4]>().prop_map(|[connections, pending, requests, retries]| Limits {
        connections,
        pending,
        requests,
        retries,
    });
    let outlier =
        (0..5u32, 0..5u32, ms(), ms(), 0..=100u32).prop_map(|(a, b, interval_ms, base_ejection_ms, max)| Outlier {
            consecutive_5xx: a,
            consecutive_gateway_errors: b,
            interval_ms,
            base_ejection_ms,
            max_ejection_percent: max,
        });
    let service = (word(), word(), word()).prop_map(|(host, name, namespace)| ServiceRef { host, name, namespace });
    (
        (name(), discovery, ms(), balancer, tls, protocol),
        (of(ip()), limits, of(outlier), vec(service, 0..3), any::<bool>()),
    )
        .prop_map(
            |(
                (name, discovery, connect_timeout_ms, balancer, tls, protocol),
                (bind, limits, outlier, services, alpn),
            )| {
                Cluster {
                    name,
                    discovery,
                    connect_timeout_ms,
                    balancer,
                    tls,
                    protocol,
                    bind_source: bind,
                    limits,
                    outlier,
                    services,
                    alpn_override: alpn,
                }
            },
        )
}

fn string_match() -> impl Strategy<Value = StringMatch> {
    prop_oneof![
        text().prop_map(StringMatch::Exact),
        text().prop_map(StringMatch::Prefix),
        regex().prop_map(StringMatch::Regex)
    ]
}

fn header_changes() -> impl Strategy<Value = Vec<HeaderChange>> {
    // Removals come first on the wire.
    let remove = vec(word().prop_map(HeaderChange::Remove), 0..2);
    let add = vec(
        prop_oneof![
            (word(), text()).prop_map(|(n, v)| HeaderChange::Set(n, v)),
            (word(), text()).prop_map(|(n, v)| HeaderChange::Add(n, v))
        ],
        0..3,
    );
    (remove, add).prop_map(|(mut remove, add)| {
        remove.extend(add);
        remove
    })
}

fn route_match() -> impl Strategy<Value = RouteMatch> {
    let path = prop_oneof![
        text().prop_map(PathMatch::Prefix),
        text().prop_map(PathMatch::SegmentPrefix),
        text().prop_map(PathMatch::Exact),
        regex().prop_map(PathMatch::Regex)
    ];
    let header = (word(), of(string_match()), any::<bool>()).prop_map(|(name, value, invert)| HeaderMatch {
        name,
        value,
        invert,
    });
    let claim = (vec(word(), 1..3), of(string_match()), any::<bool>()).prop_map(|(path, value, invert)| ClaimMatch {
        path,
        value,
        invert,
    });
    let query = vec((word(), string_match()), 0..2);
    (path, vec(header, 0..3), query, vec(claim, 0..2)).prop_map(|(path, headers, query, claims)| RouteMatch {
        path,
        headers,
        query,
        claims,
    })
}

fn route_action() -> impl Strategy<Value = RouteAction> {
    let retry =
        (name(), 0..5u32, ms(), vec(400..600u32, 0..3)).prop_map(|(on, attempts, per_try_timeout_ms, statuses)| {
            Retry {
                on,
                attempts,
                per_try_timeout_ms,
                statuses,
            }
        });
    let forward = (vec((name(), 0..200u32), 1..4), of(text()), of(name()), ms(), of(retry)).prop_map(
        |(clusters, prefix_rewrite, host_rewrite, timeout_ms, retry)| {
            RouteAction::Forward(Forward {
                clusters,
                prefix_rewrite,
                host_rewrite,
                timeout_ms,
                retry,
            })
        },
    );
    let status = prop_oneof![Just(301u16), Just(302), Just(303), Just(307), Just(308)];
    let redirect = (of(name()), of(text()), of(1..=u16::MAX), any::<bool>(), status).prop_map(
        |(host, path, port, https, status)| {
            RouteAction::Redirect(Redirect {
                host,
                path,
                port,
                https,
                status,
            })
        },
    );
    prop_oneof![
        forward,
        redirect,
        (200..600u16, "[a-z ]{0,10}").prop_map(|(status, body)| RouteAction::Respond { status, body })
    ]
}

pub(crate) fn route_table() -> impl Strategy<Value = RouteTable> {
    let route = (
        name(),
        route_match(),
        route_action(),
        "[a-z:/*]{0,8}",
        header_changes(),
        header_changes(),
    )
        .prop_map(
            |(name, matches, action, decorator, request_headers, response_headers)| Route {
                name,
                matches,
                action,
                decorator,
                request_headers,
                response_headers,
            },
        );
    let host = (name(), vec("[a-z.*]{1,8}", 0..3), vec(route, 0..3), any::<bool>()).prop_map(
        |(name, domains, routes, attempt_count)| VirtualHost {
            name,
            domains,
            routes,
            attempt_count,
        },
    );
    (name(), vec(host, 0..3), any::<bool>(), any::<bool>()).prop_map(|(name, hosts, ignore_port_in_host, on_demand)| {
        RouteTable {
            name,
            hosts: hosts.into_iter().map(std::sync::Arc::new).collect(),
            ignore_port_in_host,
            on_demand,
        }
    })
}

fn access_log() -> impl Strategy<Value = AccessLog> {
    let json = proptest::collection::btree_map(word(), text(), 1..4).prop_map(|m| m.into_iter().collect());
    let format = prop_oneof![
        Just((String::new(), Vec::new())),
        text().prop_map(|t| (t, Vec::new())),
        json.prop_map(|j| (String::new(), j))
    ];
    (text(), format).prop_map(|(path, (format, json))| AccessLog { path, format, json })
}

fn jwt() -> impl Strategy<Value = JwtAuthn> {
    let provider = (
        (
            (text(), vec(text(), 0..2), text(), vec((word(), text()), 0..2)),
            (vec(word(), 0..2), any::<bool>()),
        ),
        (
            vec(word(), 0..2),
            vec(word(), 0..2),
            any::<bool>(),
            of(word()),
            vec((word(), word()), 0..2),
        ),
    )
        .prop_map(
            |(
                ((issuer, audiences, jwks, from_headers), (space_delimited, clear_route_cache)),
                (from_params, from_cookies, forward, payload_header, claims),
            )| {
                JwtProvider {
                    name: String::new(),
                    issuer,
                    audiences,
                    jwks: jwks.into(),
                    from_headers,
                    from_params,
                    from_cookies,
                    forward,
                    payload_header,
                    claim_headers: claims,
                    space_delimited,
                    clear_route_cache,
                }
            },
        );
    vec(provider, 0..4).prop_map(|mut providers| {
        for (index, provider) in providers.iter_mut().enumerate() {
            provider.name = format!("origins-{index}");
        }
        JwtAuthn { providers }
    })
}

fn direction() -> impl Strategy<Value = Direction> {
    prop_oneof![Just(Direction::Inbound), Just(Direction::Outbound)]
}

fn http() -> impl Strategy<Value = HttpManager> {
    let codec = prop_oneof![Just(Codec::Auto), Just(Codec::Http1), Just(Codec::Http2)];
    let routes = prop_oneof![
        name().prop_map(RouteSource::Named),
        route_table().prop_map(|t| RouteSource::Inline(Box::new(t)))
    ];
    let normalization = prop_oneof![
        Just(PathNormalization::None),
        Just(PathNormalization::Base),
        Just(PathNormalization::MergeSlashes),
        Just(PathNormalization::DecodeAndMergeSlashes)
    ];
    let certificates = prop_oneof![
        Just(ForwardedClientCert::Sanitize),
        Just(ForwardedClientCert::AppendForward),
        Just(ForwardedClientCert::SanitizeSet),
        Just(ForwardedClientCert::ForwardOnly),
        Just(ForwardedClientCert::AlwaysForwardOnly)
    ];
    let reporter = prop_oneof![Just(Reporter::Source), Just(Reporter::Destination)];
    (
        (
            name(),
            codec,
            routes,
            normalization,
            certificates,
            any::<bool>(),
            any::<u32>(),
            "[a-z-]{0,8}",
        ),
        (
            any::<bool>(),
            any::<bool>(),
            ms(),
            (vec(stage(true), 0..3), of(jwt())),
            vec(filter(), 0..3),
            any::<bool>(),
            of(reporter),
            of(access_log()),
        ),
    )
        .prop_map(|(a, b)| HttpManager {
            stat_prefix: a.0,
            codec: a.1,
            routes: a.2,
            normalization: a.3,
            forwarded_client_cert: a.4,
            use_remote_address: a.5,
            trusted_hops: a.6,
            server_name: a.7,
            generate_request_id: b.0,
            websocket: b.1,
            stream_idle_timeout_ms: b.2,
            custom: b.3.0,
            jwt: b.3.1,
            authz: b.4,
            istio_alpn: b.5,
            telemetry: b.6,
            access_log: b.7,
        })
}

fn chain(http_only: bool) -> impl Strategy<Value = FilterChain> {
    let transport = prop_oneof![Just(Transport::Raw), Just(Transport::Tls)];
    let matches = (
        of(any::<u16>()),
        vec(net(), 0..2),
        vec(name(), 0..2),
        of(transport),
        vec(name(), 0..3),
    )
        .prop_map(
            |(destination_port, destination_ranges, server_names, transport, application_protocols)| ChainMatch {
                destination_port,
                destination_ranges,
                server_names,
                transport,
                application_protocols,
            },
        );
    let tcp = (
        name(),
        vec(stage(false), 0..3),
        vec(filter(), 0..3),
        name(),
        of(ms()),
        any::<bool>(),
    )
        .prop_map(|(stat_prefix, custom, authz, cluster, idle_timeout_ms, telemetry)| {
            Filters::Tcp(TcpManager {
                stat_prefix,
                custom,
                authz,
                cluster,
                idle_timeout_ms,
                telemetry,
            })
        });
    let http = http().prop_map(|h| Filters::Http(Box::new(h)));
    let filters = if http_only {
        http.boxed()
    } else {
        prop_oneof![tcp, http].boxed()
    };
    (name(), matches, of(server_tls()), filters).prop_map(|(name, matches, tls, filters)| FilterChain {
        name,
        matches,
        tls,
        filters,
    })
}

fn inspector() -> impl Strategy<Value = Inspector> {
    prop_oneof![
        Just(Inspector::Off),
        btree_set(any::<u16>(), 0..4).prop_map(|p| Inspector::Except(p.into_iter().collect()))
    ]
}

pub(crate) fn listener_with_http() -> impl Strategy<Value = Listener> {
    listener_of(vec(chain(true), 1..2))
}

pub(crate) fn listener() -> impl Strategy<Value = Listener> {
    listener_of(vec(chain(false), 0..4))
}

fn listener_of(chains: impl Strategy<Value = Vec<FilterChain>>) -> impl Strategy<Value = Listener> {
    (
        (name(), ip(), any::<u16>(), any::<bool>(), any::<bool>(), direction()),
        (
            chains,
            of(chain(false)),
            inspector(),
            inspector(),
            ms(),
            of(access_log()),
        ),
    )
        .prop_map(|(a, b)| Listener {
            name: a.0,
            address: (a.1, a.2).into(),
            bind_to_port: a.3,
            use_original_dst: a.4,
            direction: a.5,
            chains: b.0,
            default_chain: b.1,
            tls_inspector: b.2,
            http_inspector: b.3,
            detection_timeout_ms: b.4,
            access_log: b.5,
        })
}

/// Matchers of text, expressions included.
fn text_matcher() -> impl Strategy<Value = Matcher> {
    prop_oneof![
        text().prop_map(Matcher::Exact),
        text().prop_map(Matcher::Prefix),
        text().prop_map(Matcher::Suffix),
        Just(Matcher::Present),
        regex().prop_map(Matcher::Regex)
    ]
}

/// Atoms of every attribute with every matcher that applies to it.
pub(crate) fn atom() -> impl Strategy<Value = Atom> {
    let make = |(attribute, matcher)| Atom { attribute, matcher };
    let plain = "[a-z.-]{1,6}";
    prop_oneof![
        (Just(Attribute::PeerUri), text_matcher()).prop_map(make),
        (
            Just(Attribute::PeerUri),
            "spiffe://[a-z]{0,3}/?[a-z]{0,3}/?".prop_map(Matcher::Prefix)
        )
            .prop_map(make),
        (Just(Attribute::PeerNamespace), plain.prop_map(Matcher::Exact)).prop_map(make),
        (Just(Attribute::PeerNamespace), "[a-z*.]{1,6}".prop_map(Matcher::Glob)).prop_map(make),
        (
            Just(Attribute::PeerServiceAccount),
            "[a-z.-]{1,6}/[a-z.-]{1,6}".prop_map(Matcher::Exact)
        )
            .prop_map(make),
        (Just(Attribute::PeerTrustDomain), plain.prop_map(Matcher::Exact)).prop_map(make),
        (
            Just(Attribute::PeerTrustDomain),
            "[a-z.]{0,3}\\*[a-z.]{0,3}".prop_map(Matcher::Glob)
        )
            .prop_map(make),
        (Just(Attribute::SourceIp), net().prop_map(Matcher::Cidr)).prop_map(make),
        (Just(Attribute::RemoteIp), net().prop_map(Matcher::Cidr)).prop_map(make),
        (Just(Attribute::DestinationIp), net().prop_map(Matcher::Cidr)).prop_map(make),
        (Just(Attribute::DestinationPort), any::<u16>().prop_map(Matcher::Port)).prop_map(make),
        (Just(Attribute::Sni), text_matcher()).prop_map(make),
        (Just(Attribute::Host), text_matcher()).prop_map(make),
        (Just(Attribute::Method), text_matcher()).prop_map(make),
        (Just(Attribute::Path), text_matcher()).prop_map(make),
        (
            Just(Attribute::Path),
            "(/[a-z]{1,3}|/\\{\\*\\}){1,3}(/\\{\\*\\*\\}(/[a-z]{1,3})?)?".prop_map(Matcher::Template)
        )
            .prop_map(make),
        (word().prop_map(Attribute::Header), text_matcher()).prop_map(make),
        (Just(Attribute::Header(":authority".into())), text_matcher()).prop_map(make),
        (vec(word(), 1..3).prop_map(Attribute::Claim), text_matcher()).prop_map(make),
        (
            vec(word(), 1..3).prop_map(Attribute::Claim),
            Just(Matcher::Exact(String::new()))
        )
            .prop_map(make),
        (
            (word(), word()).prop_map(|(f, k)| Attribute::Metadata(f, k)),
            text_matcher()
        )
            .prop_map(make),
        (
            (word(), word()).prop_map(|(f, k)| Attribute::Metadata(f, k)),
            "\\[[a-z]{1,3}\\]".prop_map(Matcher::Exact)
        )
            .prop_map(make),
    ]
}

/// Any expression, constants included.
pub(crate) fn expr() -> impl Strategy<Value = Expr> {
    atom().prop_map(Expr::Atom).prop_recursive(4, 24, 4, |inner| {
        prop_oneof![
            vec(inner.clone(), 0..4).prop_map(Expr::And),
            vec(inner.clone(), 0..4).prop_map(Expr::Or),
            inner.prop_map(Expr::not)
        ]
    })
}

/// Expressions as Istio's API makes them: alternatives of peers, alternatives of operations, conditions.
pub(crate) fn istio_expr() -> impl Strategy<Value = Expr> {
    let group = |want_peer: bool| {
        let leaf = atom().prop_filter("of one side", move |atom| {
            let is_peer = matches!(
                atom.attribute,
                Attribute::PeerUri
                    | Attribute::PeerNamespace
                    | Attribute::PeerServiceAccount
                    | Attribute::PeerTrustDomain
                    | Attribute::SourceIp
                    | Attribute::RemoteIp
                    | Attribute::Header(_)
                    | Attribute::Claim(_)
            );
            is_peer == want_peer
        });
        let field = (vec(leaf.prop_map(Expr::Atom), 1..3), any::<bool>()).prop_map(|(values, not)| match not {
            true => Expr::Or(values).not(),
            false => Expr::Or(values),
        });
        vec(vec(field, 1..3).prop_map(Expr::And), 0..3)
    };
    (group(true), group(false)).prop_map(|(from, to)| {
        let mut all = Vec::new();
        if !from.is_empty() {
            all.push(Expr::Or(from));
        }
        if !to.is_empty() {
            all.push(Expr::Or(to));
        }
        Expr::And(all)
    })
}

fn rules() -> impl Strategy<Value = Vec<Rule>> {
    vec(istio_expr(), 0..4).prop_map(|exprs| {
        let rule = |(index, expr)| Rule {
            id: format!("ns[foo]-policy[p]-rule[{index}]"),
            expr,
        };
        exprs.into_iter().enumerate().map(rule).collect()
    })
}

pub(crate) fn filter() -> impl Strategy<Value = AuthzFilter> {
    let action = prop_oneof![Just(Action::Log), Just(Action::Deny), Just(Action::Allow)];
    (action, any::<bool>(), rules(), rules()).prop_map(|(action, enforced, rules, shadow)| AuthzFilter {
        action,
        enforced,
        rules: if enforced { rules } else { Vec::new() },
        shadow,
    })
}

/// A CUSTOM stage; on TCP with gRPC providers and without what only HTTP has.
fn stage(http: bool) -> impl Strategy<Value = CustomStage> {
    let pattern = prop_oneof![
        "[a-z-]{1,8}".prop_map(HeaderPattern::Exact),
        "[a-z-]{1,8}".prop_map(HeaderPattern::Prefix),
        "[a-z-]{1,8}".prop_map(HeaderPattern::Suffix)
    ];
    let patterns = || vec(pattern.clone(), 0..3);
    let check = (
        "[a-z.]{1,12}",
        "(/[a-z]{1,5})?",
        patterns(),
        vec(("[a-z-]{1,8}", "[ -~]{0,8}"), 0..3),
        patterns(),
        patterns(),
        patterns(),
    )
        .prop_map(|(host, path_prefix, request, add_headers, upstream, deny, allow)| {
            CheckProtocol::Http(HttpCheck {
                host,
                path_prefix,
                request_headers: request,
                add_headers,
                upstream_headers: upstream,
                deny_headers: deny,
                allow_headers: allow,
            })
        });
    let grpc = name().prop_map(|authority| CheckProtocol::Grpc { authority });
    let protocol = if http {
        prop_oneof![check, grpc].boxed()
    } else {
        grpc.boxed()
    };
    let body =
        (1..100_000u32, any::<bool>(), any::<bool>()).prop_map(|(max_bytes, allow_partial, as_bytes)| BodyInCheck {
            max_bytes,
            allow_partial,
            as_bytes,
        });
    let ask = (
        prop_oneof![Just(String::new()), "[a-z]([a-z0-9-]{0,8}[a-z])?"],
        name(),
        protocol,
        ms(),
        any::<bool>(),
        of(Just(503u16)),
        of(body),
    )
        .prop_map(
            move |(provider, cluster, protocol, timeout_ms, fail_open, status_on_error, body)| {
                Then::Ask(Box::new(ExtAuthz {
                    provider,
                    cluster,
                    protocol,
                    timeout_ms,
                    fail_open,
                    status_on_error: status_on_error.filter(|_| http),
                    body: body.filter(|_| http),
                }))
            },
        );
    (rules(), prop_oneof![Just(Then::Deny), ask]).prop_map(|(mut rules, then)| {
        if rules.is_empty() && then == Then::Deny {
            rules.push(Rule {
                id: "ns[a]-policy[b]-rule[0]".into(),
                expr: Expr::never(),
            });
        }
        let provider = match &then {
            Then::Ask(ask) => ask.provider.clone(),
            Then::Deny => "any".into(),
        };
        for rule in &mut rules {
            rule.id = match provider.as_str() {
                "" => format!("istio-ext-authz-{}", rule.id),
                provider => format!("istio-ext-authz-{provider}-{}", rule.id),
            };
        }
        CustomStage { rules, then }
    })
}
