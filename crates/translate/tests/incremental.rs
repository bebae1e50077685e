//! Configuration that is brought up to date by differences equals configuration made from scratch, whatever has changed in whatever
//! order and whoever was asked for in between; and a change tells every proxy that it influences. A dependency that is
//! missed here would leave a policy without force.

mod support;

use std::collections::BTreeMap;

use mantlet_model::ProxySnapshot;
use mantlet_translate::mesh::Mesh;
use mantlet_translate::node::ProxyNode;
use mantlet_translate::world::{Effect, Kind, World};
use mantlet_translate::{Translator, translate};
use proptest::prelude::*;
use serde_json::{Value, json};
use support::{router, sidecar};

const SPACES: [&str; 3] = ["a", "b", "istio-system"];

/// One change: what, where, and a number that chooses among its forms.
type Step = (u8, u8, u8);

fn pick<'a, T: ?Sized>(from: &[&'a T], by: u8) -> &'a T {
    from[usize::from(by) % from.len()]
}

fn labels(n: u8) -> Value {
    let mut labels = json!({"app": pick(&["web", "db"], n), "version": pick(&["v1", "v2"], n / 2)});
    if !n.is_multiple_of(3) {
        labels["security.istio.io/tlsMode"] = json!("istio");
    }
    labels
}

fn change(world: &mut World, (what, at, form): Step) -> Effect {
    let space = pick(&SPACES, at);
    let name = format!("n{}", at / 3 % 3);
    let gone = form % 5 == 4;
    let meta = |kind: &str| json!({"name": format!("{kind}-{name}"), "namespace": space, "creationTimestamp": format!("2026-01-0{}T00:00:00Z", 1 + at % 5)});
    let mut config = |kind: Kind, spec: Value| {
        let meta = meta("c");
        if gone {
            world.remove_config(kind, space, meta["name"].as_str().unwrap())
        } else {
            world.set_config(kind, &json!({"metadata": meta, "spec": spec}))
        }
    };
    let host = format!("s-{name}.{}.svc.cluster.local", pick(&SPACES, form));
    let mode = pick(&["DISABLE", "PERMISSIVE", "STRICT", "UNSET"], form);
    match what % 14 {
        0 | 1 if gone => world.remove_service(space, &format!("s-{name}")),
        0 | 1 => {
            let port = pick(&["http", "tcp", "grpc", "tls", ""], form);
            let mut service = json!({"metadata": meta("s"), "spec": {
                "clusterIP": if form % 7 == 0 { "None".to_string() } else { format!("10.96.{}.{}", at % 3, at / 3 % 3 + 1) },
                "selector": {"app": pick(&["web", "db"], form / 2)},
                "ports": [{"name": port, "port": pick(&[&80u16, &90], form), "targetPort": if form % 4 == 0 { json!("named") } else { json!(8080) }}]}});
            if form % 11 == 0 {
                service["metadata"]["annotations"] = json!({"networking.istio.io/exportTo": "."});
            }
            world.set_service(&serde_json::from_value(service).unwrap())
        }
        2 | 3 if gone => world.remove_slice(space, &format!("e-{name}")),
        2 | 3 => {
            let owner = format!("s-n{}", form % 3);
            let port = pick(&["http", "tcp", "grpc", "tls", ""], form);
            let endpoints: Vec<Value> = (0..form % 3 + 1)
                .map(|n| {
                    json!({"addresses": [format!("10.0.{}.{n}", at % 3)], "conditions": {"ready": form % 6 != 0},
                        "targetRef": {"kind": "Pod", "name": format!("p-n{n}"), "namespace": space}})
                })
                .collect();
            let slice = json!({"addressType": "IPv4", "metadata": {"name": format!("e-{name}"), "namespace": space,
                "labels": {"kubernetes.io/service-name": owner}},
                "ports": [{"name": port, "port": 8080, "protocol": "TCP"}], "endpoints": endpoints});
            world.set_slice(&serde_json::from_value(slice).unwrap())
        }
        4 | 5 if gone => world.remove_pod(space, &format!("p-{name}")),
        4 | 5 => {
            let pod = json!({"metadata": {"name": format!("p-{name}"), "namespace": space, "labels": labels(form)},
                "spec": {"serviceAccountName": pick(&["x", "y"], form), "containers": [
                    {"name": "app", "ports": [{"name": "named", "containerPort": 8080 + u16::from(form % 2)}]}]},
                "status": {"podIP": format!("10.0.{}.{}", at % 3, at / 3 % 3)}});
            world.set_pod(&serde_json::from_value(pod).unwrap())
        }
        6 => {
            let mut spec = json!({"mtls": {"mode": mode}});
            if form % 2 == 0 {
                spec["selector"] = json!({"matchLabels": {"app": "web"}});
                spec["portLevelMtls"] = json!({"8080": {"mode": pick(&["DISABLE", "STRICT"], form / 2)}});
            }
            config(Kind::PeerAuthentication, spec)
        }
        7 => {
            let mut spec = json!({"action": pick(&["ALLOW", "DENY", "CUSTOM"], form), "rules": [{"from": [{"source": {"principals": [format!("p{form}")]}}]}]});
            if spec["action"] == "CUSTOM" {
                spec["provider"] = json!({"name": "asked"});
            }
            if form % 2 == 0 {
                spec["selector"] = json!({"matchLabels": {"app": "web"}});
            }
            config(Kind::AuthorizationPolicy, spec)
        }
        8 => {
            let rule = match form % 2 {
                0 => json!({"issuer": "inline", "jwks": "{\"keys\":[]}"}),
                _ => json!({"issuer": "fetched", "jwksUri": "https://keys.example"}),
            };
            config(Kind::RequestAuthentication, json!({"jwtRules": [rule]}))
        }
        9 => {
            let mut spec = json!({"host": host, "subsets": [{"name": "one", "labels": {"version": "v1"}}],
                "trafficPolicy": {"tls": {"mode": pick(&["ISTIO_MUTUAL", "DISABLE", "SIMPLE"], form)}}});
            if form % 3 == 0 {
                spec["workloadSelector"] = json!({"matchLabels": {"app": "web"}});
            }
            if form % 4 == 0 {
                spec["exportTo"] = json!(["."]);
            }
            if form % 7 == 0 {
                spec["trafficPolicy"] = json!({"loadBalancer": {"simple": "PASSTHROUGH"}});
            }
            config(Kind::DestinationRule, spec)
        }
        10 => {
            let mut route =
                json!({"route": [{"destination": {"host": host, "subset": if form % 2 == 0 { "one" } else { "" }}}]});
            if form % 3 == 0 {
                route["match"] = json!([{"sourceLabels": {"app": "web"}}]);
            }
            config(
                Kind::VirtualService,
                json!({"hosts": [host, "own.example"], "http": [route],
                "gateways": if form % 4 == 0 { json!(["mesh", "istio-system/c-n0"]) } else { json!(["mesh"]) }}),
            )
        }
        11 => {
            let mut spec = json!({"hosts": [if form % 3 == 0 { host } else { format!("e{form}.example") }],
                "ports": [{"number": 80, "name": pick(&["http", "tcp"], form), "protocol": pick(&["HTTP", "TCP"], form)}],
                "resolution": pick(&["STATIC", "DNS", "NONE"], form), "location": pick(&["MESH_INTERNAL", "MESH_EXTERNAL"], form / 2)});
            if form % 2 == 0 {
                spec["workloadSelector"] = json!({"labels": {"app": "web"}});
            } else {
                spec["endpoints"] = json!([{"address": "10.9.9.9"}]);
            }
            config(Kind::ServiceEntry, spec)
        }
        12 => config(
            Kind::Gateway,
            json!({"selector": {"app": "web"}, "servers": [{"port": {"number": 80, "name": "http", "protocol": "HTTP"}, "hosts": ["*"]}]}),
        ),
        _ => match form % 4 {
            0 => world.set_key_set(
                "fetched",
                "https://keys.example",
                (at % 2 == 0).then(|| "{\"keys\":[]}".into()),
            ),
            n => {
                let provider =
                    json!({"name": "asked", "envoyExtAuthzHttp": {"service": "s-n0.b.svc.cluster.local", "port": 80}});
                let (config, _) = mantlet_api::MeshConfig::from_value(json!({
                    "enableAutoMtls": n != 1, "trustDomain": pick(&["cluster.local", "other"], at),
                    "extensionProviders": if at % 3 == 0 { json!([]) } else { json!([provider]) },
                }))
                .unwrap();
                world.set_mesh(Mesh::from_config(&config))
            }
        },
    }
}

fn nodes() -> Vec<ProxyNode> {
    let mut out: Vec<ProxyNode> = SPACES
        .iter()
        .flat_map(|space| {
            let node = |n: u8| {
                sidecar(
                    &format!("p-n{n}"),
                    space,
                    &format!("10.0.{n}.{n}"),
                    &[("app", "web"), ("version", "v2")],
                )
            };
            [node(0), node(1)]
        })
        .collect();
    out.push(router("p-n2", "istio-system", "10.0.2.2", &[("app", "web")]));
    out
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn differences_lead_where_a_fresh_start_leads(
        steps in prop::collection::vec((any::<Step>(), any::<u8>()), 1..60),
    ) {
        let mut world = World::default();
        let mut translator = Translator::default();
        let nodes = nodes();
        let mut last: BTreeMap<String, ProxySnapshot> = nodes.iter().map(|n| (n.id.clone(), translate(&world, n))).collect();
        let end = steps.len() - 1;
        for (index, (step, asked)) in steps.into_iter().enumerate() {
            let effect = change(&mut world, step);
            for (bit, node) in nodes.iter().enumerate() {
                let fresh = translate(&world, node);
                if !effect.touches_pod(&node.namespace, &node.name) {
                    prop_assert!(fresh == last[&node.id], "{} was not told of {step:?}", node.id);
                }
                // Not everybody is asked for every time, as streams come and go.
                if asked >> (bit % 8) & 1 == 1 || index == end {
                    let kept = translator.snapshot(&world, node).to_snapshot();
                    prop_assert!(kept == fresh, "{} after {step:?}", node.id);
                }
                last.insert(node.id.clone(), fresh);
            }
        }
    }
}

/// The random changes must be ones that matter: each kind of them changes somebody's configuration somewhere.
#[test]
fn every_kind_of_change_matters() {
    let mut seen = [false; 14];
    let mut world = World::default();
    let nodes = nodes();
    let mut random = 12345u32;
    let mut next = || {
        random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (random >> 24) as u8
    };
    for _ in 0..1500 {
        let step = (next(), next(), next());
        let before: Vec<ProxySnapshot> = nodes.iter().map(|n| translate(&world, n)).collect();
        change(&mut world, step);
        let after: Vec<ProxySnapshot> = nodes.iter().map(|n| translate(&world, n)).collect();
        seen[usize::from(step.0 % 14)] |= before != after;
        if seen.iter().all(|s| *s) {
            return;
        }
    }
    panic!("changes without any influence: {seen:?}");
}
