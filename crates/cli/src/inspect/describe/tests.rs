//! Descriptions of a guestbook, as whole texts.

use k8s_openapi::api::core::v1::{Pod, Service};
use mantlet_translate::world::World;
use serde_json::Value;

use super::Mesh;

const GUESTBOOK: &str = r#"
apiVersion: v1
kind: Pod
metadata: {name: guestbook-v2-x, namespace: default, labels: {app: guestbook, version: "2.0", security.istio.io/tlsMode: istio}, annotations: {istio.io/rev: default}}
spec:
  containers:
  - {name: guestbook, ports: [{name: http-server, containerPort: 3000}]}
  - {name: istio-proxy, ports: [{containerPort: 15090}]}
---
apiVersion: v1
kind: Service
metadata: {name: guestbook, namespace: default}
spec: {clusterIP: 10.0.0.1, selector: {app: guestbook}, ports: [{name: http, port: 80, targetPort: http-server}]}
---
apiVersion: v1
kind: Pod
metadata: {name: gw, namespace: istio-system, labels: {istio: ingressgateway}}
spec: {containers: [{name: istio-proxy}]}
---
apiVersion: v1
kind: Service
metadata: {name: istio-ingressgateway, namespace: istio-system}
spec: {selector: {istio: ingressgateway}, ports: [{name: http2, port: 80, targetPort: 8080}]}
status: {loadBalancer: {ingress: [{ip: 159.23.74.230}]}}
"#;

const RULE: &str = r#"
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: destination-rule-guestbook, namespace: default}
spec:
  host: guestbook
  subsets: [{name: v1, labels: {version: "1.0"}}, {name: v2, labels: {version: "2.0"}}]
  trafficPolicy: {tls: {mode: ISTIO_MUTUAL}}
"#;

const GATEWAY: &str = r#"
apiVersion: networking.istio.io/v1
kind: Gateway
metadata: {name: guestbook-gateway, namespace: default}
spec: {selector: {istio: ingressgateway}, servers: [{port: {number: 80, name: http, protocol: HTTP}, hosts: ["*"]}]}
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: virtual-service-guestbook, namespace: default}
spec:
  hosts: ["*"]
  gateways: [guestbook-gateway]
  http: [{route: [{destination: {host: guestbook, subset: v2}}]}]
"#;

const STRICT: &str = r#"
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: default, namespace: istio-system}
spec: {mtls: {mode: STRICT}}
"#;

fn mesh(parts: &[&str]) -> (Mesh, Vec<Value>) {
    let objects: Vec<Value> = parts
        .iter()
        .flat_map(|text| mantlet_api::yaml::read_all(text).unwrap())
        .collect();
    let (world, unreadable) = World::of_objects(&objects, "default");
    assert!(unreadable.is_empty(), "{unreadable:?}");
    let services = objects
        .iter()
        .filter(|o| o["kind"] == "Service")
        .map(|o| serde_json::from_value::<Service>(o.clone()).unwrap())
        .collect();
    (Mesh { world, services }, objects)
}

fn pod(parts: &[&str]) -> String {
    let (mesh, objects) = mesh(parts);
    let pod: Pod = serde_json::from_value(objects.iter().find(|o| o["kind"] == "Pod").unwrap().clone()).unwrap();
    mesh.pod(&pod)
}

#[test]
fn the_article_s_pod() {
    assert_eq!(
        pod(&[GUESTBOOK, RULE, GATEWAY, STRICT]),
        "\
Pod: guestbook-v2-x
   Pod Revision: default
   Pod Ports: 3000 (guestbook), 15090 (istio-proxy)
--------------------
Service: guestbook
   Port: http 80/HTTP targets pod port 3000
DestinationRule: destination-rule-guestbook for \"guestbook\"
   Matching subsets: v2
      (Non-matching subsets v1)
   Traffic Policy TLS Mode: ISTIO_MUTUAL
Pod is STRICT and clients are ISTIO_MUTUAL
--------------------
Effective PeerAuthentication:
   Workload mTLS mode: STRICT
Applied PeerAuthentication:
   default.istio-system
Exposed on Ingress Gateway http://159.23.74.230
VirtualService: virtual-service-guestbook
   1 HTTP route(s)
"
    );
}

#[test]
fn a_pod_that_nothing_is_said_about() {
    let text = pod(&[GUESTBOOK]);
    assert!(
        text.contains("Pod is PERMISSIVE, clients configured automatically\n"),
        "{text}"
    );
    assert!(
        text.ends_with("Effective PeerAuthentication:\n   Workload mTLS mode: PERMISSIVE\n"),
        "{text}"
    );
}

fn mesh_routes(http: &str) -> String {
    format!(
        "apiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: {{name: vs, namespace: default}}\nspec:\n  hosts: [guestbook]\n  \
         http: {http}\n"
    )
}

#[test]
fn routes_that_do_not_reach_the_pod() {
    let to = |subset: &str| format!("{{route: [{{destination: {{host: guestbook, subset: {subset}}}}}]}}");
    let text = pod(&[GUESTBOOK, RULE, &mesh_routes(&format!("[{}]", to("v1")))]);
    assert!(
        text.contains(
            "VirtualService: vs\n   WARNING: No destinations match pod subsets (checked 1 HTTP routes)\n      Route to non-matching \
             subset v1 for (everything)\n"
        ),
        "{text}"
    );
    let text = pod(&[GUESTBOOK, RULE, &mesh_routes(&format!("[{}]", to("v3")))]);
    assert!(
        text.contains("      Warning: Route to UNKNOWN subset v3; check DestinationRule destination-rule-guestbook\n"),
        "{text}"
    );
    let text = pod(&[GUESTBOOK, &mesh_routes(&format!("[{}]", to("v1")))]);
    assert!(
        text.contains("      Warning: Route to subset v1 but NO DESTINATION RULE defining subsets!\n"),
        "{text}"
    );
}

#[test]
fn routes_with_conditions_and_weights() {
    let text = pod(&[
        GUESTBOOK,
        RULE,
        &mesh_routes(
            "[{match: [{uri: {prefix: /api}}, {headers: {end-user: {exact: jason}}}], route: [{destination: {host: guestbook, subset: v2}}]}, \
             {route: [{destination: {host: guestbook, subset: v1}, weight: 80}, {destination: {host: guestbook, subset: v2}, weight: 20}]}, \
             {redirect: {uri: /x}}]",
        ),
    ]);
    assert!(
        text.contains(
            "VirtualService: vs\n   Match: /api*, Match: when headers are end-user=jason\n   Weight 20%\n   1 additional destination(s) \
             that will not reach this pod\n"
        ),
        "{text}"
    );
}

#[test]
fn modes_that_do_not_fit() {
    let disabled = RULE.replace("ISTIO_MUTUAL", "DISABLE");
    let text = pod(&[GUESTBOOK, &disabled, STRICT]);
    assert!(
        text.contains("Pod is STRICT and clients are DISABLE\n   WARNING: these do not fit"),
        "{text}"
    );
    let other = RULE.replace("\"2.0\"", "\"3.0\"");
    let text = pod(&[GUESTBOOK, &other]);
    assert!(
        text.contains(
            "   WARNING POD DOES NOT MATCH ANY SUBSETS.  (Non matching subsets v1,v2)\n   Matching subsets:\n      (Non-matching subsets \
             v1,v2)\n"
        ),
        "{text}"
    );
}

#[test]
fn policies_in_force() {
    let text = pod(&[
        GUESTBOOK,
        "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {name: ports, namespace: default}\nspec: {selector: \
         {matchLabels: {app: guestbook}}, mtls: {mode: STRICT}, portLevelMtls: {3000: {mode: DISABLE}}}\n",
        "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {name: nothing, namespace: istio-system}\nspec: {selector: \
         {matchLabels: {app: guestbook}}, mtls: {mode: STRICT}}\n",
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: access, namespace: default}\nspec: {rules: [{to: \
         [{operation: {methods: [POST]}}]}]}\n",
        "apiVersion: security.istio.io/v1\nkind: RequestAuthentication\nmetadata: {name: users, namespace: default}\nspec: {jwtRules: \
         [{issuer: https://issuer.example, jwks: '{\"keys\":[]}'}]}\n",
    ]);
    assert!(
        text.contains("Pod is DISABLE, clients configured automatically\n"),
        "{text}"
    );
    assert!(
        text.contains("RBAC policies: ns[default]-policy[access]-rule[0]"),
        "{text}"
    );
    assert!(
        text.contains("   Workload mTLS mode: STRICT\n   Port Level mTLS mode:\n      3000: DISABLE\nApplied PeerAuthentication:\n   ports.default\n"),
        "{text}"
    );
    assert!(
        text.contains("Applied RequestAuthentication:\n   users.default (issuers https://issuer.example)\n"),
        "{text}"
    );
    assert!(
        text.contains("Applied AuthorizationPolicy:\n   access.default (ALLOW, 1 rule(s))\n"),
        "{text}"
    );
}

#[test]
fn services_and_pods_outside_of_the_mesh() {
    let (mesh, _) = mesh(&[GUESTBOOK, RULE]);
    let text = mesh.service("guestbook", "default").unwrap();
    assert!(
        text.starts_with("--------------------\nService: guestbook\n   Port: http 80/HTTP targets pod port 3000\n"),
        "{text}"
    );
    assert!(mesh.service("nobody", "default").is_err());
    let bare = GUESTBOOK.replace("  - {name: istio-proxy, ports: [{containerPort: 15090}]}\n", "");
    let text = pod(&[&bare]);
    assert!(
        text.contains("WARNING: guestbook-v2-x is not part of mesh; no Istio sidecar\n"),
        "{text}"
    );
    assert!(text.contains("no policy is enforced at this pod"), "{text}");
}
