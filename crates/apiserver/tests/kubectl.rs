//! The real kubectl over TLS.

mod common;

use common::Cluster;

const DEPLOYMENT: &str = r#"
apiVersion: apps/v1
kind: Deployment
metadata: {name: web, labels: {app: web}}
spec:
  replicas: 2
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec:
      containers:
      - {name: web, image: "web:1", ports: [{containerPort: 8080}]}
---
apiVersion: v1
kind: Service
metadata: {name: web}
spec:
  selector: {app: web}
  ports: [{name: http, port: 80, targetPort: 8080}]
"#;

#[tokio::test(flavor = "multi_thread")]
async fn everyday_commands() {
    let c = Cluster::start().await;
    let version = c.ok(&["version"]).await;
    assert!(version.contains("Server Version: v1.32"), "{version}");

    assert_eq!(c.ok(&["create", "ns", "shop"]).await, "namespace/shop created\n");
    assert_eq!(
        c.ok(&["label", "ns", "shop", "istio-injection=enabled"]).await,
        "namespace/shop labeled\n"
    );
    let ns = c.ok(&["get", "ns", "-L", "istio-injection", "--no-headers"]).await;
    assert!(
        ns.lines()
            .any(|l| l.starts_with("shop") && l.contains("Active") && l.ends_with("enabled")),
        "{ns}"
    );
    assert_eq!(
        c.ok(&["create", "sa", "bob", "-n", "shop"]).await,
        "serviceaccount/bob created\n"
    );
    c.ok(&["create", "configmap", "cm", "--from-literal=a=b"]).await;
    c.ok(&["create", "secret", "generic", "s", "--from-literal=k=v"]).await;
    assert_eq!(c.ok(&["get", "secret", "s", "-o", "jsonpath={.data.k}"]).await, "dg==");

    assert_eq!(
        c.ok_with(&["apply", "-f", "-"], DEPLOYMENT).await,
        "deployment.apps/web created\nservice/web created\n"
    );
    assert_eq!(
        c.ok_with(&["apply", "-f", "-"], DEPLOYMENT).await,
        "deployment.apps/web unchanged\nservice/web unchanged\n"
    );
    let changed = DEPLOYMENT.replace("web:1", "web:2");
    assert_eq!(
        c.ok_with(&["apply", "-f", "-"], &changed).await,
        "deployment.apps/web configured\nservice/web unchanged\n"
    );
    assert_eq!(
        c.ok(&[
            "get",
            "deploy",
            "web",
            "-o",
            "jsonpath={.spec.template.spec.containers[0].image} {.metadata.generation}"
        ])
        .await,
        "web:2 2"
    );
    let table = c.ok(&["get", "deploy,svc,cm", "-o", "wide"]).await;
    for want in [
        "deployment.apps/web   0/2",
        "service/web",
        "ClusterIP",
        "80/TCP",
        "app=web",
        "configmap/cm",
    ] {
        assert!(table.contains(want), "{want} not in\n{table}");
    }
    let all = c.ok(&["get", "all", "-A"]).await;
    assert!(all.contains("service/kubernetes") && all.contains("10.96.0.1"), "{all}");
    assert_eq!(
        c.ok(&["get", "deploy", "-l", "app=web", "-o", "name"]).await,
        "deployment.apps/web\n"
    );
    assert_eq!(c.ok(&["get", "deploy", "-l", "app!=web", "-o", "name"]).await, "");

    c.ok(&["scale", "deploy", "web", "--replicas=5"]).await;
    assert_eq!(
        c.ok(&["get", "deploy", "web", "-o", "jsonpath={.spec.replicas}"]).await,
        "5"
    );
    c.ok(&["annotate", "deploy", "web", "a=b"]).await;
    c.ok(&["set", "image", "deploy/web", "web=web:3"]).await;
    c.ok(&["rollout", "restart", "deploy", "web"]).await;
    c.ok(&[
        "patch",
        "deploy",
        "web",
        "--type=json",
        "-p",
        r#"[{"op":"replace","path":"/spec/replicas","value":1}]"#,
    ])
    .await;
    c.ok(&[
        "patch",
        "deploy",
        "web",
        "--type=merge",
        "-p",
        r#"{"spec":{"paused":true}}"#,
    ])
    .await;
    c.ok(&["set", "env", "deploy/web", "K=V"]).await;
    let got = c.ok(&["get", "deploy", "web", "-o", "jsonpath={.spec.replicas} {.spec.paused} {.spec.template.spec.containers[0].image} {.spec.template.spec.containers[0].env[0].value}"]).await;
    assert_eq!(got, "1 true web:3 V");
    let yaml = c.ok(&["get", "deploy", "web", "-o", "yaml"]).await;
    assert_eq!(
        c.ok_with(&["replace", "-f", "-"], &yaml).await,
        "deployment.apps/web replaced\n"
    );
    let diff = c.run_with(&["diff", "-f", "-"], DEPLOYMENT).await;
    assert_eq!(diff.status.code(), Some(1), "{}", String::from_utf8_lossy(&diff.stderr));
    let explained = c.ok(&["explain", "deploy.spec.replicas"]).await;
    assert!(explained.contains("replicas <integer>"), "{explained}");
    assert!(c.ok(&["describe", "svc", "web"]).await.contains("Selector:"));
    assert!(c.ok(&["api-resources"]).await.contains("endpointslices"));

    assert_eq!(
        c.ok(&["delete", "deploy", "web"]).await,
        "deployment.apps \"web\" deleted\n"
    );
    assert!(
        c.fails(&["get", "deploy", "web"], "")
            .await
            .contains("Error from server (NotFound): deployments.apps \"web\" not found")
    );
    assert_eq!(
        c.ok_with(&["delete", "-f", "-", "--ignore-not-found"], DEPLOYMENT)
            .await,
        "service \"web\" deleted\n"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_wrong_is_said() {
    let c = Cluster::start().await;
    let unknown = DEPLOYMENT.replace("replicas: 2", "replicsa: 2");
    let e = c.fails(&["apply", "-f", "-"], &unknown).await;
    assert!(
        e.contains("strict decoding error: unknown field \"spec.replicsa\" (did you mean \"replicas\"?)"),
        "{e}"
    );
    let e = c.fails(&["create", "ns", "Bad_Name"], "").await;
    assert!(
        e.contains("a lowercase RFC 1123 label must consist of") && e.contains("(did you mean \"bad-name\"?)"),
        "{e}"
    );
    let e = c.fails(&["create", "cm", "x", "-n", "nowhere"], "").await;
    assert!(e.contains("namespaces \"nowhere\" not found"), "{e}");
    let e = c
        .fails(
            &["apply", "-f", "-"],
            &DEPLOYMENT.replace("matchLabels: {app: web}", "matchLabels: {app: other}"),
        )
        .await;
    assert!(e.contains("`selector` does not match template `labels`"), "{e}");
    let e = c
        .fails(
            &["apply", "-f", "-"],
            &DEPLOYMENT.replace("replicas: 2", "replicas: two"),
        )
        .await;
    assert!(e.contains("cannot unmarshal string into Go struct field"), "{e}");
    c.ok(&["create", "ns", "twice"]).await;
    let e = c.fails(&["create", "ns", "twice"], "").await;
    assert!(
        e.contains("Error from server (AlreadyExists): namespaces \"twice\" already exists"),
        "{e}"
    );
    let e = c
        .fails(
            &["apply", "-f", "-"],
            "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {name: x}\n",
        )
        .await;
    assert!(e.contains("no matches for kind \"PeerAuthentication\""), "{e}");
}

const CRD: &str = r#"
apiVersion: apiextensions.k8s.io/v1
kind: CustomResourceDefinition
metadata: {name: peerauthentications.security.istio.io}
spec:
  group: security.istio.io
  scope: Namespaced
  names: {kind: PeerAuthentication, plural: peerauthentications, shortNames: [pa], categories: [istio-io]}
  versions:
  - name: v1
    served: true
    storage: false
    schema: &schema
      openAPIV3Schema:
        type: object
        properties:
          spec:
            type: object
            properties:
              mtls:
                type: object
                properties:
                  mode: {type: string, enum: [UNSET, DISABLE, PERMISSIVE, STRICT]}
              selector:
                type: object
                properties: {matchLabels: {type: object, additionalProperties: {type: string}}}
          status: {type: object, x-kubernetes-preserve-unknown-fields: true}
    subresources: {status: {}}
    additionalPrinterColumns:
    - {name: Mode, type: string, jsonPath: .spec.mtls.mode}
    - {name: Age, type: date, jsonPath: .metadata.creationTimestamp}
  - name: v1beta1
    served: true
    storage: true
    schema: *schema
    subresources: {status: {}}
"#;

#[tokio::test(flavor = "multi_thread")]
async fn custom_resources() {
    let c = Cluster::start().await;
    c.ok_with(&["apply", "-f", "-"], CRD).await;
    c.ok(&[
        "wait",
        "--for=condition=Established",
        "crd/peerauthentications.security.istio.io",
        "--timeout=10s",
    ])
    .await;
    let object = "apiVersion: security.istio.io/v1beta1\nkind: PeerAuthentication\nmetadata: {name: default}\nspec: {mtls: {mode: STRICT}}\n";
    assert_eq!(
        c.ok_with(&["apply", "-f", "-"], object).await,
        "peerauthentication.security.istio.io/default created\n"
    );
    assert_eq!(
        c.ok_with(&["apply", "-f", "-"], object).await,
        "peerauthentication.security.istio.io/default unchanged\n"
    );
    let permissive = object.replace("STRICT", "PERMISSIVE");
    assert_eq!(
        c.ok_with(&["apply", "-f", "-"], &permissive).await,
        "peerauthentication.security.istio.io/default configured\n"
    );
    let table = c.ok(&["get", "peerauthentication"]).await;
    let mut lines = table.lines();
    assert_eq!(
        lines.next().unwrap().split_whitespace().collect::<Vec<_>>(),
        ["NAME", "MODE", "AGE"]
    );
    assert_eq!(
        lines.next().unwrap().split_whitespace().collect::<Vec<_>>()[..2],
        ["default", "PERMISSIVE"]
    );
    assert_eq!(
        c.ok(&["get", "pa", "default", "-o", "jsonpath={.apiVersion}"]).await,
        "security.istio.io/v1"
    );
    assert_eq!(
        c.ok(&["get", "istio-io", "-o", "name"]).await,
        "peerauthentication.security.istio.io/default\n"
    );
    let e = c
        .fails(
            &["apply", "-f", "-"],
            &object.replace("STRICT", "strict").replace("default", "x"),
        )
        .await;
    assert!(e.contains("spec.mtls.mode: Unsupported value: \"strict\": supported values: \"DISABLE\", \"PERMISSIVE\", \"STRICT\", \"UNSET\""), "{e}");
    let e = c
        .fails(
            &["apply", "-f", "-"],
            &object.replace("mtls:", "mtsl:").replace("default", "x"),
        )
        .await;
    assert!(
        e.contains("unknown field \"spec.mtsl\" (did you mean \"mtls\"?)"),
        "{e}"
    );
    // A file that lost its indentation, with a client that does not look at it first.
    let flat =
        "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata:\nname: a\nspec:\nmtls:\nmode: STRICT\n";
    let e = c.fails(&["create", "-f", "-"], flat).await;
    assert!(
        e.contains("unknown field \"mode\", unknown field \"mtls\" (it belongs below \"spec\", indented), unknown field \"name\" (it belongs below \"metadata\", indented)"),
        "{e}"
    );
    let e = c.fails(&["apply", "-f", "-"], flat).await;
    assert!(
        e.contains("resource name may not be empty"),
        "kubectl's own message: {e}"
    );
    let e = c
        .fails(&["apply", "-f", "-"], &object.replace("default", "example_jwt"))
        .await;
    assert!(
        e.contains("metadata.name: Invalid value: \"example_jwt\": a lowercase RFC 1123 subdomain")
            && e.contains("(did you mean \"example-jwt\"?)"),
        "{e}"
    );
    let e = c
        .fails(
            &["apply", "-n", "example_1", "-f", "-"],
            &object.replace("default", "x"),
        )
        .await;
    assert!(
        e.contains("namespaces \"example_1\" not found (no namespace can have this name; did you mean \"example-1\"?)"),
        "{e}"
    );
    let explained = c.ok(&["explain", "pa.spec.mtls.mode"]).await;
    assert!(
        explained.contains("ENUM:") && explained.contains("STRICT"),
        "{explained}"
    );
    c.ok_with(
        &["apply", "--server-side", "-f", "-"],
        &object.replace("default", "ssa"),
    )
    .await;
    assert_eq!(
        c.ok_with(&["delete", "-f", "-"], CRD).await,
        "customresourcedefinition.apiextensions.k8s.io \"peerauthentications.security.istio.io\" deleted\n"
    );
    let out = c.run_with(&["get", "pa"], "").await;
    assert!(!out.status.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn server_side_apply_and_watch() {
    let c = Cluster::start().await;
    let cm = "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: x}\ndata: {a: '1', b: '2'}\n";
    c.ok_with(&["apply", "--server-side", "--field-manager=alice", "-f", "-"], cm)
        .await;
    let e = c
        .fails(
            &["apply", "--server-side", "--field-manager=bob", "-f", "-"],
            &cm.replace("'1'", "'9'"),
        )
        .await;
    assert!(
        e.contains("Apply failed with 1 conflict: conflict with \"alice\": .data.a"),
        "{e}"
    );
    c.ok_with(
        &[
            "apply",
            "--server-side",
            "--field-manager=bob",
            "--force-conflicts",
            "-f",
            "-",
        ],
        &cm.replace("'1'", "'9'"),
    )
    .await;
    assert_eq!(c.ok(&["get", "cm", "x", "-o", "jsonpath={.data.a}"]).await, "9");

    use std::io::{BufRead, BufReader};
    let mut watch = c
        .kubectl_as("admin", &["get", "cm", "-w", "--no-headers"])
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(watch.stdout.take().unwrap()).lines();
    let mut next = || lines.next().unwrap().unwrap();
    assert!(next().starts_with("x "));
    c.ok(&["create", "cm", "y"]).await;
    assert!(next().starts_with("y "));
    c.ok(&["label", "cm", "y", "a=b"]).await;
    assert!(next().starts_with("y "));
    watch.kill().unwrap();
    watch.wait().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn rights() {
    let c = Cluster::start().await;
    c.user("eve", &["devs"]);
    let denied = c.run_as("eve", &["get", "pods"], "").await;
    assert_eq!(
        String::from_utf8_lossy(&denied.stderr).trim(),
        "Error from server (Forbidden): pods is forbidden: User \"eve\" cannot list resource \"pods\" in API group \"\" in the namespace \"default\""
    );
    assert_eq!(
        c.run_as("eve", &["auth", "can-i", "get", "pods"], "").await.stdout,
        b"no\n"
    );
    c.ok(&["create", "role", "reader", "--verb=get,list", "--resource=pods"])
        .await;
    c.ok(&["create", "rolebinding", "devs", "--role=reader", "--group=devs"])
        .await;
    assert_eq!(
        c.run_as("eve", &["auth", "can-i", "get", "pods"], "").await.stdout,
        b"yes\n"
    );
    assert!(c.run_as("eve", &["get", "pods"], "").await.status.success());
    assert!(
        !c.run_as("eve", &["get", "pods", "-n", "kube-system"], "")
            .await
            .status
            .success()
    );
    assert!(
        !c.run_as(
            "eve",
            &[
                "create",
                "rolebinding",
                "more",
                "--clusterrole=cluster-admin",
                "--user=eve"
            ],
            ""
        )
        .await
        .status
        .success()
    );
    let who = String::from_utf8(c.run_as("eve", &["auth", "whoami"], "").await.stdout).unwrap();
    assert!(who.contains("eve") && who.contains("devs"), "{who}");

    // Service account tokens.
    let token = c.ok(&["create", "token", "default"]).await;
    c.kubeconfig("account", &format!("token: {}", token.trim()));
    let who = String::from_utf8(
        c.run_as(
            "account",
            &["auth", "whoami", "-o", "jsonpath={.status.userInfo.username}"],
            "",
        )
        .await
        .stdout,
    )
    .unwrap();
    assert_eq!(who, "system:serviceaccount:default:default");
    c.kubeconfig("forged", &format!("token: {}x", token.trim()));
    let forged = c.run_as("forged", &["get", "ns"], "").await;
    assert!(
        String::from_utf8_lossy(&forged.stderr).contains("Unauthorized"),
        "{forged:?}"
    );
    // A token ends with its account.
    c.ok(&["delete", "sa", "default"]).await;
    assert!(!c.run_as("account", &["auth", "whoami"], "").await.status.success());
}

/// One command and what it must print.
type Step = (&'static str, &'static str);

#[tokio::test(flavor = "multi_thread")]
async fn the_breadth_of_kubectl() {
    let c = Cluster::start().await;
    c.ok_with(&["create", "-f", "-"], "apiVersion: v1\nkind: Node\nmetadata: {name: n1}\nstatus: {conditions: [{type: Ready, status: 'True'}], nodeInfo: {kubeletVersion: v1.32.0}}\n").await;
    let steps: &[Step] = &[
        (
            "create deployment d --image=i:1 --replicas=0",
            "deployment.apps/d created",
        ),
        ("expose deployment d --port=80 --target-port=8080", "service/d exposed"),
        ("create service clusterip s1 --tcp=80:8080", "service/s1 created"),
        ("create service nodeport s2 --tcp=80", "service/s2 created"),
        ("create service loadbalancer s3 --tcp=80", "service/s3 created"),
        (
            "create service externalname s4 --external-name=example.com",
            "service/s4 created",
        ),
        ("get svc s4 --no-headers", "ExternalName   <none>"),
        ("get svc s3 --no-headers", "LoadBalancer"),
        ("get svc s3 --no-headers", "<pending>"),
        ("create job j --image=i -- sleep 1", "job.batch/j created"),
        (
            "create cronjob cj --image=i --schedule=*/5_*_*_*_* -- date",
            "cronjob.batch/cj created",
        ),
        ("create job j2 --from=cronjob/cj", "job.batch/j2 created"),
        ("get job,cronjob", "job.batch/j"),
        (
            "create role r --verb=get --resource=pods",
            "role.rbac.authorization.k8s.io/r created",
        ),
        (
            "create clusterrole cr --verb=get,list --resource=pods,deployments.apps",
            "clusterrole.rbac.authorization.k8s.io/cr created",
        ),
        (
            "create rolebinding rb --clusterrole=cr --serviceaccount=default:default",
            "rolebinding.rbac.authorization.k8s.io/rb created",
        ),
        (
            "create clusterrolebinding crb --clusterrole=cr --group=g",
            "clusterrolebinding.rbac.authorization.k8s.io/crb created",
        ),
        ("get rolebinding rb -o wide --no-headers", "default/default"),
        (
            "create ingress ing --rule=a.example/path=d:80",
            "ingress.networking.k8s.io/ing created",
        ),
        ("get ingress ing --no-headers", "a.example"),
        (
            "create pdb p --selector=app=d --min-available=1",
            "poddisruptionbudget.policy/p created",
        ),
        (
            "create priorityclass pc --value=0 --description=x",
            "priorityclass.scheduling.k8s.io/pc created",
        ),
        ("create quota q --hard=pods=3", "resourcequota/q created"),
        ("create secret tls missing --cert=x --key=y", "!"),
        (
            "autoscale deployment d --min=1 --max=3 --cpu-percent=50",
            "horizontalpodautoscaler.autoscaling/d autoscaled",
        ),
        (
            "run pod1 --image=i --restart=Never --labels=app=x -- sleep 1",
            "pod/pod1 created",
        ),
        ("get pods", "Pending"),
        ("get pods --field-selector=status.phase!=Running -o name", "pod/pod1"),
        ("get pods -l app=x -o custom-columns=N:.metadata.name", "pod1"),
        ("get pods --sort-by=.metadata.name -o wide", "<none>"),
        ("get pod pod1 -o jsonpath={.spec.serviceAccountName}", "default"),
        ("describe pod pod1", "kube-api-access-"),
        (
            "describe deployment d",
            "RollingUpdateStrategy:  25% max unavailable, 25% max surge",
        ),
        ("describe node n1", "Ready"),
        ("get nodes", "v1.32.0"),
        ("cordon n1", "node/n1 cordoned"),
        ("get nodes", "Ready,SchedulingDisabled"),
        ("uncordon n1", "node/n1 uncordoned"),
        ("taint node n1 k=v:NoSchedule", "node/n1 tainted"),
        ("label pods --all tier=web", "pod/pod1 labeled"),
        ("annotate pod pod1 a=b", "annotated"),
        ("label pods pod1 tier-", "unlabeled"),
        (
            "patch pod pod1 --subresource=status --type=merge -p {\"status\":{\"phase\":\"Succeeded\"}}",
            "pod/pod1 patched",
        ),
        (
            "wait pod/pod1 --for=jsonpath={.status.phase}=Succeeded --timeout=5s",
            "condition met",
        ),
        ("rollout status deployment/d --watch=false", "Waiting for deployment"),
        ("rollout history deployment/d", "deployment.apps/d"),
        ("rollout pause deployment/d", "paused"),
        (
            "set resources deployment/d --limits=cpu=1",
            "resource requirements updated",
        ),
        ("set serviceaccount deployment/d default", "serviceaccount updated"),
        ("get hpa d --no-headers", "50%"),
        ("auth can-i --list", "*.*"),
        ("auth can-i delete pods --as=nobody", "!no"),
        ("get --raw /healthz", "ok"),
        ("get --raw /api/v1/namespaces/default/pods/pod1/status", "Succeeded"),
        ("cluster-info", "Kubernetes control plane"),
        ("api-versions", "admissionregistration.k8s.io/v1"),
        ("api-resources --api-group=apps -o wide", "deployments"),
        ("explain pods.spec.containers.image", "FIELD: image <string>"),
        ("explain svc --recursive", "clusterIP"),
        ("get events", "!No resources found in default namespace."),
        ("events", "!No events found in default namespace."),
        ("get all", "pod/pod1"),
        ("get cs", "No resources found"),
        (
            "get sa,secret,cm,ep,endpointslices,leases,netpol,sc,csr,pv,pvc,hpa,limits,quota,crd -A",
            "serviceaccount/default",
        ),
        (
            "get mutatingwebhookconfigurations,validatingwebhookconfigurations,validatingadmissionpolicies,flowschemas,runtimeclasses,apiservices -A",
            "",
        ),
        ("delete pods --all --wait=true", "pod \"pod1\" deleted"),
        ("delete deployment,svc -l app=d", "deleted"),
        (
            "delete job j j2 --cascade=orphan --wait=false",
            "job.batch \"j\" deleted",
        ),
        ("create ns gone", "created"),
        ("delete ns gone --wait=false", "namespace \"gone\" deleted"),
        ("get ns gone --no-headers", "Terminating"),
    ];
    let mut wrong = Vec::new();
    for (line, want) in steps {
        let args: Vec<String> = line
            .split(' ')
            .map(|a| {
                if a.starts_with("--schedule") {
                    a.replace('_', " ")
                } else {
                    a.to_owned()
                }
            })
            .collect();
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        let out = c.run_with(&args, "").await;
        let text = format!(
            "{}{}",
            String::from_utf8_lossy(&out.stdout),
            String::from_utf8_lossy(&out.stderr)
        );
        // A leading "!" says that the exit code may be a failure.
        let good = match want.strip_prefix('!') {
            Some(w) => text.contains(w),
            None => out.status.success() && text.contains(want),
        };
        if !good {
            wrong.push(format!("kubectl {line}\n  wanted: {want}\n  got: {text}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
