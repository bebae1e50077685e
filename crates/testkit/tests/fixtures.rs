//! The fixtures themselves, used as tests use them.

use std::time::Duration;

use mantlet_identity::{ClientAuth, ClientTlsOptions, ExpectedServer, ServerTlsOptions, TrustDomainRule};
use mantlet_testkit::{ChildGuard, EchoServer, NetNs, TcpEcho, TestCa, eventually, program};
use rustls_pki_types::ServerName;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

#[tokio::test]
async fn http_echo_records_what_curl_sends_in_both_versions() {
    let server = EchoServer::start().await;
    let url = format!("http://{}/a?b=c", server.address());
    for (flag, version) in [
        ("--http1.1", http::Version::HTTP_11),
        ("--http2-prior-knowledge", http::Version::HTTP_2),
    ] {
        let out = tokio::process::Command::new(program("curl"))
            .args(["-sS", "--max-time", "10", flag, "-H", "x-test: 1", "-d", "body", &url])
            .output()
            .await
            .unwrap();
        assert_eq!(out.stdout, b"body", "{out:?}");
        let seen = server.take();
        assert_eq!(seen.len(), 1);
        assert_eq!((seen[0].version, seen[0].path.as_str()), (version, "/a?b=c"));
        assert_eq!(seen[0].headers["x-test"], "1");
        assert_eq!(seen[0].host, server.address().to_string());
    }
}

#[tokio::test]
async fn tls_echo_knows_its_client_and_tcp_echo_its_bytes() {
    let ca = TestCa::new("cluster.local");
    let tls = ca
        .workload("default", "server")
        .identity
        .server(&ServerTlsOptions {
            client_auth: ClientAuth::Required(TrustDomainRule::one_of(["cluster.local".parse().unwrap()])),
            alpn: vec![b"http/1.1".to_vec()],
            min_tls13: false,
        })
        .unwrap();
    let server = EchoServer::start_tls(tls).await;
    let config = ca
        .workload("default", "client")
        .identity
        .client(&ClientTlsOptions {
            expected: ExpectedServer::Names(vec![ca.id("default", "server").to_string()]),
            alpn: vec![b"istio".to_vec()],
            present_certificate: true,
            min_tls13: true,
        })
        .unwrap();
    let stream = TcpStream::connect(server.address()).await.unwrap();
    let name = ServerName::try_from("server").unwrap();
    let mut stream = tokio_rustls::TlsConnector::from(config)
        .connect(name, stream)
        .await
        .unwrap();
    stream
        .write_all(b"GET /x HTTP/1.1\r\nhost: h\r\nconnection: close\r\n\r\n")
        .await
        .unwrap();
    let mut answer = String::new();
    // The server closes without close_notify at times; what counts has arrived by then.
    let _ = stream.read_to_string(&mut answer).await;
    assert!(answer.ends_with("/x"), "{answer}");
    let seen = server.requests();
    assert_eq!(seen[0].peer_id, Some(ca.id("default", "client")));
    assert_eq!(seen[0].alpn, None, "went on without a common protocol");

    let tcp = TcpEcho::start(b"hello ").await;
    let mut stream = TcpStream::connect(tcp.address()).await.unwrap();
    stream.write_all(b"world").await.unwrap();
    let mut answer = [0; 11];
    stream.read_exact(&mut answer).await.unwrap();
    assert_eq!(&answer, b"hello world");
    assert_eq!(tcp.received()[0].1, b"world");
}

#[tokio::test]
async fn namespaces_are_apart_until_connected_and_gone_afterwards() {
    let (a, b) = (NetNs::new("a"), NetNs::new("b"));
    a.connect(&b, "192.0.2.1/24", "192.0.2.2/24");
    let listener = b.run(|| std::net::TcpListener::bind("192.0.2.2:0").unwrap());
    let address = listener.local_addr().unwrap();
    eventually("a reaches b", Duration::from_secs(5), || {
        let reached = a.run(|| std::net::TcpStream::connect_timeout(&address, Duration::from_millis(300)).map(drop));
        async move { reached }
    })
    .await;
    let here = || std::fs::read_link("/proc/thread-self/ns/net").unwrap();
    assert!(a.run(here) != here() && a.run(here) != b.run(here));
    let path = a.path();
    drop(a);
    assert!(!path.exists());
}

#[test]
fn a_child_is_ended_and_a_missing_program_names_its_package() {
    let child = std::process::Command::new(program("sleep")).arg("600").spawn().unwrap();
    let pid = child.id();
    drop(ChildGuard::new(child));
    assert!(!std::path::Path::new(&format!("/proc/{pid}")).exists());
    let missing = std::panic::catch_unwind(|| program("no-such-program-here")).unwrap_err();
    let text = missing.downcast_ref::<String>().unwrap();
    assert!(text.contains("apt-get install"), "{text}");
}
