//! Faults of certificates and clocks: the control plane is away until certificates expire, clocks are set.
//!
//! Clocks are set for real programs by the library `libfaketime` (Debian package of that name), which answers their
//! questions for the time of day from a file; no program has a switch for it.

use std::io::{BufRead, BufReader, Read};
use std::time::{Duration, Instant};

use serde_json::json;

use crate::common::Cluster;
use crate::load::now;
use crate::mesh::Mesh;
use crate::run::Run;

/// Status of one request from a pod on a connection of its own; 0 when there was no answer.
fn status(cluster: &Cluster, pod: &str, url: &str) -> u16 {
    let output = cluster
        .command("kubectl")
        .args(["exec", "-n", "shop", pod, "-c", "load", "--"])
        .args([
            "curl",
            "-s",
            "-o",
            "/dev/null",
            "-w",
            "%{http_code}",
            "--max-time",
            "20",
            url,
        ])
        .output()
        .expect("kubectl runs");
    String::from_utf8_lossy(&output.stdout)
        .trim()
        .parse()
        .unwrap_or_default()
}

/// Asks again until the answer has this status; says how long that took.
fn becomes(cluster: &Cluster, pod: &str, url: &str, wanted: u16) -> Duration {
    let start = Instant::now();
    loop {
        let is = status(cluster, pod, url);
        if is == wanted {
            return start.elapsed();
        }
        assert!(
            start.elapsed() < Duration::from_secs(90),
            "{pod} is answered {is} by {url}, not {wanted}"
        );
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// A pod that calls when it is told to, with settings of its proxy.
fn idle_caller(cluster: &Cluster, name: &str, metadata: &serde_json::Value) {
    let config = json!({ "holdApplicationUntilProxyStarts": true, "proxyMetadata": metadata });
    let pod = json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {
            "name": name, "namespace": "shop", "labels": { "app": name },
            "annotations": { "proxy.istio.io/config": config.to_string() },
        },
        "spec": {
            "serviceAccountName": "caller", "terminationGracePeriodSeconds": 1,
            "containers": [{ "name": "load", "image": "python", "command": ["sleep", "infinity"] }],
        },
    });
    cluster.apply(&pod.to_string());
}

/// A server with settings of its proxy, and its Service.
fn server(cluster: &Cluster, name: &str, metadata: &serde_json::Value) {
    let config = json!({ "holdApplicationUntilProxyStarts": true, "proxyMetadata": metadata });
    let objects = json!({ "apiVersion": "v1", "kind": "List", "items": [
        {
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {
                "name": name, "namespace": "shop", "labels": { "app": name },
                "annotations": { "proxy.istio.io/config": config.to_string() },
            },
            "spec": {
                "serviceAccountName": "web", "terminationGracePeriodSeconds": 1,
                "containers": [{ "name": "web", "image": "mantlet/customers" }],
            },
        },
        {
            "apiVersion": "v1", "kind": "Service", "metadata": { "name": name, "namespace": "shop" },
            "spec": { "selector": { "app": name }, "ports": [{ "port": 80, "targetPort": 3000, "name": "http" }] },
        },
    ]});
    cluster.apply(&objects.to_string());
}

/// On one connection for the whole time; prints a line with the first answer, at the end how many requests were answered and how many were not.
const KEPT: &str = r#"
import http.client, sys, time
connection = http.client.HTTPConnection("web.shop", 80, timeout=30)
end, answered, failed = time.monotonic() + float(sys.argv[1]), 0, 0
while time.monotonic() < end:
    try:
        connection.request("GET", "/")
        response = connection.getresponse()
        response.read()
        answered, failed = (answered + 1, failed) if response.status == 200 else (answered, failed + 1)
        if answered + failed == 1:
            print("first", response.status, flush=True)
    except OSError:
        failed += 1
        connection.close()
    time.sleep(0.1)
print(answered, failed)
"#;

/// Seconds that a certificate of these pods lives.
const LIFE: u64 = 12;

/// The control plane is away for longer than certificates live. Connections go on; nobody gets a new one with an expired
/// certificate, neither its client nor its server; and all is well soon after the control plane is back.
pub(crate) fn certificates_expire(run: &Run) {
    run.fault("certificates expire while mantletd is away", |mesh| {
        let cluster = &mesh.cluster;
        let short = json!({ "SECRET_TTL": format!("{LIFE}s") });
        // They know every destination without having spoken with any: what fails then fails for its certificate.
        let eager = json!({ "MANTLET_EAGER": "true" });
        let both = json!({ "SECRET_TTL": format!("{LIFE}s"), "MANTLET_EAGER": "true" });
        idle_caller(cluster, "expiring", &both);
        idle_caller(cluster, "expiring-kept", &short);
        idle_caller(cluster, "lasting", &eager);
        server(cluster, "short", &short);
        for pod in ["expiring", "expiring-kept", "lasting", "short"] {
            mesh.ready("shop", pod);
        }
        // No certificate is looked at twice: `expiring` and `lasting` have not spoken with anybody yet.
        let (_, process) = mesh.control_plane();
        let mut kept = cluster
            .command("kubectl")
            .args([
                "exec",
                "-n",
                "shop",
                "expiring-kept",
                "-c",
                "load",
                "--",
                "python3",
                "-c",
                KEPT,
            ])
            .arg((LIFE + 10).to_string())
            .stdout(std::process::Stdio::piped())
            .spawn()
            .expect("kubectl runs");
        let mut said = BufReader::new(kept.stdout.take().expect("its output"));
        let mut first = String::new();
        said.read_line(&mut first).expect("the first answer");
        assert_eq!(first.trim(), "first 200");
        let kept = process.stopped(|| {
            std::thread::sleep(Duration::from_secs(LIFE + 1));
            assert_eq!(
                status(cluster, "expiring", "http://web.shop/"),
                503,
                "the client's certificate is expired"
            );
            assert_eq!(
                status(cluster, "lasting", "http://short.shop/"),
                503,
                "the server's certificate is expired"
            );
            assert_eq!(
                status(cluster, "lasting", "http://web.shop/"),
                200,
                "both certificates are good"
            );
            let mut numbers = String::new();
            said.read_to_string(&mut numbers).expect("the caller ends");
            kept.wait().expect("kubectl ends");
            numbers
        });
        let numbers: Vec<u64> = kept.split_whitespace().filter_map(|n| n.parse().ok()).collect();
        assert!(
            matches!(numbers[..], [answered, 0] if answered > 20),
            "answered, failed: {kept}"
        );
        let first = becomes(cluster, "expiring", "http://web.shop/", 200);
        let second = becomes(cluster, "lasting", "http://short.shop/", 200);
        println!(
            "  new connections again {:.1} s after mantletd went on",
            (first + second).as_secs_f64()
        );
        let mut names = vec!["delete", "-n", "shop", "--wait=false", "service/short"];
        names.extend(["pod/expiring", "pod/expiring-kept", "pod/lasting", "pod/short"]);
        cluster.kubectl(&names);
        vec![]
    });
}

/// Where the proxies of these pods look for their time.
const CLOCK: &str = "/etc/istio/proxy/clock";
/// Where mantletd does: the only directory that it may write to.
const CONTROL_CLOCK: &str = "/var/run/secrets/istio-dns/clock";

fn clock_settings(file: &str) -> serde_json::Value {
    // The loader puts the system's library directory in for $LIB.
    json!({
        "LD_PRELOAD": "/usr/$LIB/faketime/libfaketimeMT.so.1",
        "FAKETIME_TIMESTAMP_FILE": file,
        // Each question is answered from the file: a clock that is set is set at once.
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        "DONT_FAKE_MONOTONIC": "1",
        "FAKETIME_DISABLE_SHM": "1",
    })
}

fn set_clock(cluster: &Cluster, namespace: &str, pod: &str, container: &str, file: &str, offset: &str) {
    let command = format!("echo '{offset}' > {file}");
    cluster.kubectl(&[
        "exec", "-n", namespace, pod, "-c", container, "--", "sh", "-c", &command,
    ]);
    let shown = cluster.kubectl(&["exec", "-n", namespace, pod, "-c", container, "--", "date", "+%s"]);
    let shown: f64 = shown.parse().expect("seconds");
    let days: f64 = offset.trim_end_matches('d').parse().expect("days");
    let wanted = now() + days * 86_400.0;
    assert!(
        (shown - wanted).abs() < 600.0,
        "the clock of {pod} is not set: is the package libfaketime installed? {shown} instead of {wanted}"
    );
}

/// Clocks are set by days while the mesh runs: of one proxy, of the control plane, of all.
#[test]
fn clocks_that_are_set() {
    let mesh = Mesh::bare("clocks", &|install| {
        for (name, value) in clock_settings(CONTROL_CLOCK).as_object().expect("an object") {
            let value = value.as_str().expect("a text");
            // A number would be no text in an environment.
            install.args(["--set", &format!("values.pilot.env.{name}=\"{value}\"")]);
        }
    });
    let cluster = &mesh.cluster;
    let settings = clock_settings(CLOCK);
    idle_caller(cluster, "caller", &settings);
    server(cluster, "server", &settings);
    for pod in ["caller", "server"] {
        mesh.ready("shop", pod);
    }
    let istiod = mesh.pods("istio-system", "app=istiod").remove(0);
    let control = |offset: &str| set_clock(cluster, "istio-system", &istiod, "discovery", CONTROL_CLOCK, offset);
    let caller = |offset: &str| set_clock(cluster, "shop", "caller", "istio-proxy", CLOCK, offset);
    let server = |offset: &str| set_clock(cluster, "shop", "server", "istio-proxy", CLOCK, offset);
    let url = "http://server.shop/";
    becomes(cluster, "caller", url, 200);

    // All clocks forward by more than a certificate's life, as of a machine that slept: everybody renews at once.
    for set in [&control as &dyn Fn(&str), &server, &caller] {
        set("+2d");
    }
    let took = becomes(cluster, "caller", url, 200);
    println!(
        "all clocks two days forward: answered after {:.1} s",
        took.as_secs_f64()
    );

    // And back: certificates that are not valid yet are renewed too.
    for set in [&control as &dyn Fn(&str), &server, &caller] {
        set("+0d");
    }
    let took = becomes(cluster, "caller", url, 200);
    println!("all clocks back: answered after {:.1} s", took.as_secs_f64());

    // The authority's clock alone is wrong: what proxies hold stays good. Who starts now gets no certificate that is good for
    // anything, and stays closed until the authority is right again.
    control("+2d");
    assert_eq!(status(cluster, "caller", url), 200);
    let restarts = mesh.restarts("shop", "caller", "istio-proxy");
    mesh.process("caller", "mantlet-proxy").kill();
    mesh.wait_until("the proxy is started again", || {
        mesh.restarts("shop", "caller", "istio-proxy") > restarts
    });
    assert_ne!(status(cluster, "caller", url), 200, "without a certificate");
    control("+0d");
    let took = becomes(cluster, "caller", url, 200);
    println!(
        "the authority's clock wrong and right again: answered after {:.1} s",
        took.as_secs_f64()
    );

    // One proxy's clock is wrong. It cannot judge certificates: closed, until the clock is right again.
    caller("+2d");
    let process = mesh.process("server", "mantlet-proxy");
    let restarts = mesh.restarts("shop", "server", "istio-proxy");
    // Connections that were made before go on; a new one is needed.
    process.kill();
    mesh.restarted("shop", "server", "istio-proxy", restarts);
    becomes(cluster, "caller", url, 503);
    caller("+0d");
    let took = becomes(cluster, "caller", url, 200);
    println!(
        "one proxy's clock wrong and right again: answered after {:.1} s",
        took.as_secs_f64()
    );
}
