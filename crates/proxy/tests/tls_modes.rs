//! TLS as DestinationRules and servers ask for it, on the wire: one-way, mutual, without verification, from files, with chosen
//! ciphers (S1.22, S1.113–S1.115).

mod common;

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;

use common::*;
use mantlet_identity::{ClientAuth, ServerTlsOptions};
use mantlet_model::cluster::ClusterTls;
use mantlet_model::tls::{ClientTls, SanMatch};
use mantlet_proxy::agent::files;
use mantlet_testkit::ca::TestCert;
use mantlet_testkit::{EchoServer, TestCa, program};

/// A server with a certificate of this name; it asks for a client's certificate if `mutual`.
async fn server(cert: &TestCert, mutual: bool) -> EchoServer {
    let options = ServerTlsOptions {
        client_auth: if mutual {
            ClientAuth::RequiredAnyName
        } else {
            ClientAuth::None
        },
        alpn: vec![b"http/1.1".to_vec()],
        min_tls13: false,
    };
    EchoServer::start_tls(cert.identity.server(&options).unwrap()).await
}

fn simple(roots: Option<String>, names: &[&str], sni: &str) -> ClientTls {
    ClientTls {
        certificate: None,
        trust_bundle: roots,
        server_sans: names.iter().map(|n| SanMatch::Exact(n.to_string())).collect(),
        sni: sni.into(),
        alpn: Vec::new(),
        min_version: Default::default(),
    }
}

/// A client's proxy before a server.
struct Client {
    proxy: Proxy,
    outbound: Outbound,
}

impl Client {
    fn new(upstream: &EchoServer) -> Client {
        let proxy = Proxy::start("sleep", 1);
        // The proxy knows the mesh's roots, which have nothing to do with the server's.
        proxy.identity(&TestCa::new("cluster.local"), "sleep");
        *proxy.destination.lock().unwrap() = std::net::SocketAddr::from(([10, 96, 0, 20], 80));
        let outbound = Outbound {
            listen: free_address(),
            port: 80,
            endpoints: vec![upstream.address()],
            mtls: false,
            sans: vec![],
            protocol: mantlet_model::cluster::UpstreamProtocol::Http1,
            retry: None,
            tcp: false,
        };
        Client { proxy, outbound }
    }

    /// The status that the client's application gets with this TLS.
    async fn call(&self, tls: ClientTls) -> CurlOutput {
        let mut snapshot = self.outbound.snapshot();
        let name = self.outbound.cluster_name();
        let mut cluster = (*snapshot.clusters[&name]).clone();
        cluster.tls = ClusterTls::Always(Box::new(tls));
        snapshot.clusters.insert(name, Arc::new(cluster));
        self.proxy.apply(snapshot).await;
        let host = format!("host: {HOST}");
        curl(&["-H", &host, &format!("http://{}/x", self.outbound.listen)]).await
    }

    /// Starts reading these files, and waits until the store has them.
    async fn read(&self, names: &[&str]) -> tokio::sync::watch::Sender<BTreeSet<String>> {
        let sender = files::start(self.proxy.shared.clone());
        let mut generations = self.proxy.shared.secrets.subscribe();
        let before = *generations.borrow_and_update();
        sender.send_replace(names.iter().map(|n| n.to_string()).collect());
        let count = names.len() as u64;
        tokio::time::timeout(
            std::time::Duration::from_secs(60),
            generations.wait_for(|g| *g >= before + count),
        )
        .await
        .expect("the files are read")
        .unwrap();
        sender
    }
}

fn write(dir: &Path, name: &str, text: &str) -> String {
    let path = dir.join(name);
    std::fs::write(&path, text).unwrap();
    path.display().to_string()
}

#[tokio::test(flavor = "multi_thread")]
async fn one_way_tls_verifies_the_chain_and_the_name() {
    let ca = TestCa::new("example");
    let upstream = server(&ca.host(&[HOST]), false).await;
    let client = Client::new(&upstream);
    let dir = tempfile::tempdir().unwrap();
    let roots = format!("file-root:{}", write(dir.path(), "ca.pem", &ca.root_pem()));
    let strange = format!(
        "file-root:{}",
        write(dir.path(), "other.pem", &TestCa::new("other").root_pem())
    );
    let _reading = client.read(&[&roots, &strange]).await;

    assert_eq!(
        client.call(simple(Some(roots.clone()), &[HOST], HOST)).await.status,
        200
    );
    assert_eq!(client.call(simple(Some(roots.clone()), &[], HOST)).await.status, 200);
    for (what, tls) in [
        ("another name", simple(Some(roots.clone()), &["other.example"], HOST)),
        ("another server name", simple(Some(roots), &[], "other.example")),
        ("another root", simple(Some(strange), &[HOST], HOST)),
        (
            "roots that were never read",
            simple(Some("file-root:/nowhere".into()), &[HOST], HOST),
        ),
        // Mesh roots do not vouch for it.
        ("the mesh's roots", simple(Some("ROOTCA".into()), &[HOST], HOST)),
        ("names without roots", simple(None, &[HOST], HOST)),
    ] {
        let answer = client.call(tls).await;
        assert_eq!(answer.status, 503, "{what}: {}", answer.body);
    }
    assert_eq!(upstream.requests().len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn without_verification_any_server_will_do() {
    let ca = TestCa::new("nobody-knows");
    let upstream = server(&ca.host(&["other.example"]), false).await;
    let client = Client::new(&upstream);
    assert_eq!(client.call(simple(None, &[], HOST)).await.status, 200);
    // But it must be TLS.
    let plain = EchoServer::start().await;
    let client = Client::new(&plain);
    assert_eq!(client.call(simple(None, &[], HOST)).await.status, 503);
    assert!(plain.requests().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn mutual_tls_from_files_follows_their_renewal() {
    let ca = TestCa::new("example");
    let upstream = server(&ca.host(&[HOST]), true).await;
    let client = Client::new(&upstream);
    let dir = tempfile::tempdir().unwrap();
    // The certificate of a stranger first.
    let wrong = TestCa::new("stranger").workload("a", "b");
    let chain = write(
        dir.path(),
        "chain.pem",
        &wrong.response[..wrong.response.len() - 1].concat(),
    );
    let key = write(dir.path(), "key.pem", &wrong.key.to_pem());
    let roots = format!("file-root:{}", write(dir.path(), "ca.pem", &ca.root_pem()));
    let pair = format!("file-cert:{chain}~{key}");
    let _reading = client.read(&[&roots, &pair]).await;
    let tls = ClientTls {
        certificate: Some(pair),
        ..simple(Some(roots.clone()), &[HOST], HOST)
    };
    assert_eq!(client.call(tls.clone()).await.status, 503);
    assert_eq!(
        client.call(simple(Some(roots), &[HOST], HOST)).await.status,
        503,
        "no certificate at all"
    );
    assert!(upstream.requests().is_empty());

    // Renewed in place.
    let good = ca.workload("a", "b");
    let mut generations = client.proxy.shared.secrets.subscribe();
    let before = *generations.borrow_and_update();
    write(
        dir.path(),
        "chain.pem",
        &good.response[..good.response.len() - 1].concat(),
    );
    write(dir.path(), "key.pem", &good.key.to_pem());
    tokio::time::timeout(
        std::time::Duration::from_secs(60),
        generations.wait_for(|g| *g > before),
    )
    .await
    .expect("the new files are read")
    .unwrap();
    assert_eq!(client.call(tls).await.status, 200);
    assert_eq!(upstream.requests()[0].peer_id.as_ref().unwrap().service_account(), "b");
}

#[tokio::test(flavor = "multi_thread")]
async fn servers_speak_the_ciphers_that_they_are_told_to() {
    let app = EchoServer::start().await;
    let mesh = Mesh::new(app.address(), Port::Http, common::Mode::Strict).await;
    let dir = tempfile::tempdir().unwrap();
    let client = mesh.ca.workload("default", "sleep");
    let files = client_files(dir.path(), &client);
    let set = |ciphers: &'static [&'static str]| {
        let mut snapshot = mesh.inbound.snapshot();
        for listener in snapshot.listeners.values_mut() {
            let listener = Arc::make_mut(listener);
            for tls in listener
                .chains
                .iter_mut()
                .chain(&mut listener.default_chain)
                .filter_map(|c| c.tls.as_mut())
            {
                tls.ciphers = ciphers.iter().map(|c| c.to_string()).collect();
            }
        }
        snapshot
    };
    let handshake = async |version: &str, cipher: Option<&str>| -> bool {
        let mut command = tokio::process::Command::new(program("openssl"));
        command.args([
            "s_client",
            "-connect",
            &mesh.inbound.listen.to_string(),
            version,
            "-cert",
            &files.0,
            "-key",
            &files.1,
        ]);
        if let Some(cipher) = cipher {
            command.args(["-cipher", cipher]);
        }
        let output = command.stdin(std::process::Stdio::null()).output().await.unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        text.contains("Verification") && !text.contains("Cipher is (NONE)") && !text.contains("Cipher    : 0000")
    };
    const STRONG: &str = "ECDHE-ECDSA-AES256-GCM-SHA384";
    const LIGHT: &str = "ECDHE-ECDSA-AES128-GCM-SHA256";
    // Without a list: all of the mesh's.
    for cipher in [STRONG, LIGHT] {
        assert!(handshake("-tls1_2", Some(cipher)).await, "{cipher}");
    }
    mesh.server.apply(set(&["AES256-GCM-SHA384", STRONG])).await;
    assert!(handshake("-tls1_2", Some(STRONG)).await);
    assert!(!handshake("-tls1_2", Some(LIGHT)).await);
    assert!(handshake("-tls1_3", None).await);
    // None that there is here: TLS 1.2 is over, TLS 1.3 is not.
    mesh.server.apply(set(&["AES128-SHA"])).await;
    assert!(!handshake("-tls1_2", None).await);
    assert!(handshake("-tls1_3", None).await);
}

fn client_files(dir: &Path, cert: &TestCert) -> (String, String) {
    let chain = write(dir, "client.pem", &cert.response[..cert.response.len() - 1].concat());
    let key = write(dir, "client-key.pem", &cert.key.to_pem());
    (chain, key)
}
