//! CUSTOM policies and their providers: who is asked, how, and what denies (SEMANTICS 2k).

mod support;

use std::collections::BTreeMap;

use mantlet_model::ext_authz::{BAD_SUFFIX, CheckProtocol, CustomStage, ExtAuthz, Then};
use mantlet_translate::authz::{Form, Target, custom, filters, problems};
use mantlet_translate::mesh::Mesh;
use mantlet_translate::world::World;
use support::world;

const SERVICES: &str = "
apiVersion: v1
kind: Service
metadata: {name: ext, namespace: foo}
spec: {clusterIP: 10.96.0.9, ports: [{name: http, port: 8000}, {name: grpc, port: 9000}]}
---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: a, namespace: a}
spec: {hosts: [twice.example.com], ports: [{number: 80, name: http, protocol: HTTP}], resolution: DNS}
---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: b, namespace: b}
spec: {hosts: [twice.example.com], ports: [{number: 80, name: http, protocol: HTTP}], resolution: DNS}
";

const HTTP: &str = "{service: ext.foo.svc.cluster.local, port: 8000}";
const GRPC: &str = "{service: ext.foo.svc.cluster.local, port: 9000}";

/// A world with these providers (name, kind, settings) and policies (provider, rest of the spec).
fn case(providers: &[(&str, &str, &str)], policies: &[(&str, &str)]) -> World {
    let mut yaml = String::from("kind: MeshConfig\nspec:\n  extensionProviders:\n");
    for (name, kind, settings) in providers {
        yaml.push_str(&format!("  - {{name: {name:?}, {kind}: {settings}}}\n"));
    }
    if providers.is_empty() {
        yaml = "kind: MeshConfig\nspec: {}\n".to_string();
    }
    yaml.push_str("---");
    yaml.push_str(SERVICES);
    for (index, (provider, rest)) in policies.iter().enumerate() {
        yaml.push_str(&format!(
            "---\napiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: p{index}}}\nspec: {{action: CUSTOM, provider: {{name: {provider:?}}}, {rest}}}\n"
        ));
    }
    world(&yaml)
}

const ALL: &str = "rules: [{}]";

fn stages(world: &World, form: Form) -> Vec<CustomStage> {
    let labels = BTreeMap::from([("app".to_string(), "web".to_string())]);
    let target = Target {
        namespace: "default",
        labels: &labels,
        gateway: false,
    };
    assert!(filters(world, target, form).is_empty(), "CUSTOM is in no other filter");
    custom(world, target, form)
}

fn asked(stage: &CustomStage) -> &ExtAuthz {
    match &stage.then {
        Then::Ask(provider) => provider,
        Then::Deny => panic!("nobody is asked: {stage:?}"),
    }
}

fn message(world: &World) -> String {
    let policy = &world.authorization_policies("default")[0];
    let all = problems(world, policy);
    all.into_iter().map(|p| p.message).collect::<Vec<_>>().join("; ")
}

#[test]
fn one_provider_is_asked_on_the_chains_it_knows() {
    let http = case(
        &[("ext", "envoyExtAuthzHttp", HTTP)],
        &[("ext", ALL), ("ext", "rules: [{}, {}]")],
    );
    let found = stages(&http, Form::Http);
    assert_eq!(found.len(), 1);
    let ids: Vec<&str> = found[0].rules.iter().map(|r| r.id.as_str()).collect();
    assert_eq!(
        ids,
        [
            "istio-ext-authz-ext-ns[default]-policy[p0]-rule[0]",
            "istio-ext-authz-ext-ns[default]-policy[p1]-rule[0]",
            "istio-ext-authz-ext-ns[default]-policy[p1]-rule[1]"
        ],
        "S2.93"
    );
    let provider = asked(&found[0]);
    assert_eq!(provider.cluster, "outbound|8000||ext.foo.svc.cluster.local", "S2.148");
    assert_eq!(
        (provider.timeout_ms, provider.fail_open, provider.status_on_error),
        (600_000, false, None),
        "S2.149"
    );
    assert!(stages(&http, Form::Tcp).is_empty(), "S2.146");
    assert_eq!(message(&http), "");

    let grpc = case(
        &[("ext", "envoyExtAuthzGrpc", GRPC)],
        &[("ext", "rules: [{to: [{operation: {methods: [GET], ports: ['81']}}]}]")],
    );
    let found = stages(&grpc, Form::Http);
    let CheckProtocol::Grpc { authority } = &asked(&found[0]).protocol else {
        panic!("not gRPC");
    };
    assert_eq!(authority, "outbound_.9000_._.ext.foo.svc.cluster.local");
    let tcp = stages(&grpc, Form::Tcp);
    let rule = format!("{:?}", tcp[0].rules[0].expr);
    assert!(rule.contains("Port(81)") && !rule.contains("GET"), "S2.81: {rule}");
    assert!(
        stages(
            &case(&[("ext", "envoyExtAuthzHttp", HTTP)], &[("ext", "rules: []")]),
            Form::Http
        )
        .is_empty(),
        "2b"
    );
}

#[test]
fn providers_that_cannot_be_asked_deny_what_is_matched() {
    for (fact, providers, provider, why) in [
        (
            "S2.144",
            vec![],
            "ext",
            "not in meshConfig.extensionProviders (there are: none)",
        ),
        (
            "S2.144",
            vec![("other", "envoyExtAuthzHttp", HTTP)],
            "ext",
            "there are: other",
        ),
        (
            "S2.144",
            vec![("ext", "envoyExtAuthzHttp", HTTP)],
            "",
            "names no provider",
        ),
        (
            "S2.144",
            vec![("ext", "zipkin", "{service: z, port: 1}")],
            "ext",
            "no external authorizer",
        ),
        ("S2.145", vec![("Ext", "envoyExtAuthzHttp", HTTP)], "Ext", "lower-case"),
        (
            "S2.145",
            vec![("-ext", "envoyExtAuthzHttp", HTTP)],
            "-ext",
            "lower-case",
        ),
        (
            "S2.145",
            vec![("ext", "envoyExtAuthzHttp", HTTP), ("ext", "envoyExtAuthzGrpc", GRPC)],
            "ext",
            "used twice",
        ),
        (
            "S2.148",
            vec![(
                "ext",
                "envoyExtAuthzHttp",
                "{service: none.foo.svc.cluster.local, port: 8000}",
            )],
            "ext",
            "could not find",
        ),
        (
            "S2.148",
            vec![(
                "ext",
                "envoyExtAuthzHttp",
                "{service: bar/ext.foo.svc.cluster.local, port: 8000}",
            )],
            "ext",
            "could not find",
        ),
        (
            "S2.148",
            vec![("ext", "envoyExtAuthzHttp", "{service: twice.example.com, port: 80}")],
            "ext",
            "several namespaces (a, b)",
        ),
        (
            "S2.148",
            vec![(
                "ext",
                "envoyExtAuthzHttp",
                "{service: ext.foo.svc.cluster.local, port: 8001}",
            )],
            "ext",
            "no port 8001",
        ),
        (
            "S2.148",
            vec![(
                "ext",
                "envoyExtAuthzHttp",
                "{service: ext.foo.svc.cluster.local, port: 0}",
            )],
            "ext",
            "[1, 65535]",
        ),
        (
            "S2.151",
            vec![(
                "ext",
                "envoyExtAuthzHttp",
                "{service: ext.foo.svc.cluster.local, port: 8000, statusOnError: '499'}",
            )],
            "ext",
            "statusOnError",
        ),
        (
            "S2.153",
            vec![(
                "ext",
                "envoyExtAuthzHttp",
                "{service: ext.foo.svc.cluster.local, port: 8000, includeRequestHeadersInCheck: ['*']}",
            )],
            "ext",
            "single wildcard",
        ),
        (
            "S2.153",
            vec![(
                "ext",
                "envoyExtAuthzHttp",
                "{service: ext.foo.svc.cluster.local, port: 8000, pathPrefix: check}",
            )],
            "ext",
            "pathPrefix",
        ),
        (
            "S2.154",
            vec![(
                "ext",
                "envoyExtAuthzHttp",
                "{service: ext.foo.svc.cluster.local, port: 8000, includeAdditionalHeadersInCheck: {'a b': c}}",
            )],
            "ext",
            "no header",
        ),
        (
            "S2.158",
            vec![(
                "ext",
                "envoyExtAuthzGrpc",
                "{service: ext.foo.svc.cluster.local, port: 9000, includeRequestBodyInCheck: {maxRequestBytes: 0}}",
            )],
            "ext",
            "maxRequestBytes",
        ),
    ] {
        // failOpen changes nothing about any of them.
        let providers: Vec<(&str, &str, String)> = providers
            .into_iter()
            .map(|(name, kind, settings)| (name, kind, settings.replacen('{', "{failOpen: true, ", 1)))
            .collect();
        let providers: Vec<_> = providers.iter().map(|(n, k, s)| (*n, *k, s.as_str())).collect();
        let world = case(&providers, &[(provider, ALL)]);
        for form in [Form::Http, Form::Tcp] {
            let found = stages(&world, form);
            assert_eq!(found.len(), 1, "{fact} {why}");
            assert_eq!(found[0].then, Then::Deny, "{fact} {why}");
            let dash = if provider.is_empty() { "" } else { "-" };
            let id = format!("istio-ext-authz{dash}{provider}-ns[default]-policy[p0]-rule[0]{BAD_SUFFIX}");
            assert_eq!(found[0].rules[0].id, id, "{fact}");
        }
        let said = message(&world);
        assert!(
            said.contains(why) && said.contains("are denied"),
            "{fact}: {said:?} lacks {why:?}"
        );
    }
}

#[test]
fn several_providers_deny_unless_the_switch_is_on() {
    let mut world = case(
        &[("opa-2", "envoyExtAuthzGrpc", GRPC), ("opa", "envoyExtAuthzHttp", HTTP)],
        &[("opa-2", ALL), ("opa", "rules: [{to: [{operation: {paths: [/a]}}]}]")],
    );
    world.set_pod(&serde_json::from_value(support::pod("web", "default", "10.0.0.1", true)).unwrap());
    for form in [Form::Http, Form::Tcp] {
        let found = stages(&world, form);
        assert_eq!(found.len(), 2, "S2.142");
        assert!(
            found
                .iter()
                .all(|s| s.then == Then::Deny && s.rules[0].id.ends_with(BAD_SUFFIX))
        );
    }
    assert!(
        message(&world).contains("PILOT_ENABLE_MULTIPLE_CUSTOM_AUTHZ_PROVIDERS"),
        "{}",
        message(&world)
    );
    world.set_mesh(Mesh {
        multiple_custom_providers: true,
        ..world.mesh().clone()
    });
    let found = stages(&world, Form::Http);
    let names: Vec<&str> = found.iter().map(|s| asked(s).provider.as_str()).collect();
    assert_eq!(names, ["opa", "opa-2"], "S2.143: in the order of names");
    // S2.141: each stage has its own rules, so that a name that begins with another one triggers nothing.
    assert!(found[0].rules.iter().all(|r| r.id.contains("policy[p1]")));
    assert!(found[1].rules.iter().all(|r| r.id.contains("policy[p0]")));
    assert_eq!(message(&world), "");
}

#[test]
fn trial_runs_of_custom_policies_deny() {
    let mut yaml = String::new();
    yaml.push_str("kind: MeshConfig\nspec: {extensionProviders: [{name: ext, envoyExtAuthzHttp: ");
    yaml.push_str(HTTP);
    yaml.push_str("}]}\n---");
    yaml.push_str(SERVICES);
    yaml.push_str("---\napiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: p0, annotations: {istio.io/dry-run: 'true'}}\nspec: {action: CUSTOM, provider: {name: ext}, rules: [{}]}\n");
    let world = world(&yaml);
    let found = stages(&world, Form::Http);
    assert_eq!((found.len(), &found[0].then), (1, &Then::Deny), "S2.136");
    assert!(message(&world).contains("no meaning for CUSTOM"), "{}", message(&world));
}

#[test]
fn gateways_know_the_cluster_of_their_provider() {
    let yaml = format!(
        "kind: MeshConfig\nspec: {{extensionProviders: [{{name: ext, envoyExtAuthzHttp: {HTTP}}}]}}\n---{SERVICES}---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {{name: p, namespace: istio-system}}
spec: {{selector: {{matchLabels: {{istio: ingressgateway}}}}, action: CUSTOM, provider: {{name: ext}}, rules: [{{}}]}}
---
apiVersion: networking.istio.io/v1
kind: Gateway
metadata: {{name: g, namespace: istio-system}}
spec: {{selector: {{istio: ingressgateway}}, servers: [{{port: {{number: 80, name: http, protocol: HTTP}}, hosts: ['*']}}]}}
"
    );
    let node = support::router("gw", "istio-system", "10.0.0.5", &[("istio", "ingressgateway")]);
    let snapshot = mantlet_translate::translate(&world(&yaml), &node);
    assert!(
        snapshot
            .clusters
            .contains_key("outbound|8000||ext.foo.svc.cluster.local"),
        "{:?}",
        snapshot.clusters.keys()
    );
    assert_eq!(snapshot.dangling(), []);
}
