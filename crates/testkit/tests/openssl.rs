//! The mesh's TLS configurations against OpenSSL as the other party: what the lab's commands meet.

use std::process::Stdio;

use mantlet_identity::{ClientAuth, ServerTlsOptions, TrustDomainRule};
use mantlet_testkit::{EchoServer, TestCa, program};
use tokio::io::AsyncWriteExt;

async fn s_client(server: &EchoServer, args: &[&str]) -> (bool, String) {
    let mut child = tokio::process::Command::new(program("openssl"))
        .args(["s_client", "-connect", &server.address().to_string(), "-ign_eof"])
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let mut input = child.stdin.take().unwrap();
    // A refused handshake closes the pipe early, which is part of what is observed.
    let _ = input
        .write_all(b"GET /hello HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        .await;
    let out = tokio::time::timeout(std::time::Duration::from_secs(20), child.wait_with_output())
        .await
        .expect("openssl does not end")
        .unwrap();
    drop(input);
    (
        out.status.success(),
        String::from_utf8_lossy(&[out.stdout, out.stderr].concat()).into_owned(),
    )
}

#[tokio::test]
async fn openssl_gets_in_with_a_certificate_in_both_versions_and_not_without() {
    let ca = TestCa::new("cluster.local");
    let tls = ca
        .workload("default", "customers")
        .identity
        .server(&ServerTlsOptions {
            client_auth: ClientAuth::Required(TrustDomainRule::one_of(["cluster.local".parse().unwrap()])),
            alpn: vec![b"h2".to_vec(), b"http/1.1".to_vec()],
            min_tls13: false,
        })
        .unwrap();
    let server = EchoServer::start_tls(tls).await;
    let dir = tempfile::tempdir().unwrap();
    let files = ca.workload("default", "sleep").write_to(dir.path());
    let path = |p: &std::path::Path| p.to_str().unwrap().to_owned();
    let (cert, key, roots) = (path(&files.chain), path(&files.key), path(&files.roots));
    let own = ["-cert", &cert, "-key", &key, "-CAfile", &roots, "-verify_return_error"];

    for (version, name) in [("-tls1_2", "TLSv1.2"), ("-tls1_3", "TLSv1.3")] {
        let (_, text) = s_client(&server, &[&own[..], &[version]].concat()).await;
        assert!(text.contains("/hello"), "{text}");
        assert!(
            text.contains(name) && text.contains("Verify return code: 0 (ok)"),
            "{text}"
        );
        let seen = server.take();
        assert_eq!(seen[0].peer_id, Some(ca.id("default", "sleep")));
    }

    // Without a certificate the handshake fails, yet the server's own is on record: `-showcerts` in the lab.
    let (_, text) = s_client(&server, &["-showcerts", "-CAfile", &roots]).await;
    assert!(text.contains("-----BEGIN CERTIFICATE-----"), "{text}");
    assert!(
        text.contains("alert certificate required") || text.contains("alert number 116"),
        "{text}"
    );
    let pem = &text[text.find("-----BEGIN CERTIFICATE-----").unwrap()..];
    let der = mantlet_identity::pem::read_certificates("showcerts", pem.as_bytes()).unwrap();
    let leaf = mantlet_identity::PeerCertificate::parse(&der[0]).unwrap();
    assert_eq!(leaf.uris, [ca.id("default", "customers").as_str()]);

    // A certificate of another mesh, and suites without forward secrecy.
    let foreign = tempfile::tempdir().unwrap();
    let files = TestCa::new("cluster.local")
        .workload("default", "sleep")
        .write_to(foreign.path());
    let stranger = [
        "-cert",
        &path(&files.chain),
        "-key",
        &path(&files.key),
        "-CAfile",
        &roots,
    ]
    .map(str::to_owned);
    let stranger: Vec<&str> = stranger.iter().map(String::as_str).collect();
    let (_, text) = s_client(&server, &stranger).await;
    assert!(text.contains("alert") && !text.contains("/hello"), "{text}");
    let weak = ["-tls1_2", "-cipher", "AES128-GCM-SHA256:AES256-GCM-SHA384"];
    let (ok, text) = s_client(&server, &[&own[..], &weak].concat()).await;
    assert!(!ok && text.contains("handshake failure"), "{text}");
    assert!(server.requests().is_empty());
}
