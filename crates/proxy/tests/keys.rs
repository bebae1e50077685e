//! Private keys that were replaced are nowhere in the memory of the process any more: not as PEM, not as DER, not as the
//! number itself in either byte order. Read from outside through `/proc/PID/mem`, with no regard to who owns the bytes.
//!
//! The test must be able to find a key: while it is in force, it does.

mod common;

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::FileExt;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use common::control::Control;
use common::program::Program;
use common::*;
use mantlet_identity::{
    ClientTlsOptions, Csr, ExpectedServer, IssueRequest, KeyAlgorithm, PrivateKey, Serial, SubjectAltName, TlsIdentity,
    build_csr,
};
use mantlet_model::http::RouteSource;
use mantlet_model::listener::*;
use mantlet_model::names::Direction;
use mantlet_model::route::RouteAction;
use mantlet_model::secret::{KeyBytes, Secret, SecretValue};
use mantlet_model::snapshot::ProxySnapshot;
use mantlet_model::tls::{ServerTls, TlsVersion};
use mantlet_net::memory::{Wiping, wipe_freed};
use mantlet_testkit::ca::TestCert;
use mantlet_testkit::{EchoServer, TestCa, eventually};
use mantlet_xds::resources::ResourceSet;
use mantlet_xds::{Dialect, Options};
use rustls_pki_types::ServerName;
use time::OffsetDateTime;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

/// As in the program.
#[global_allocator]
static ALLOCATOR: Wiping<mimalloc::MiMalloc> = Wiping::where_asked(mimalloc::MiMalloc);

/// What to look for, masked, so that the list itself is not found.
struct Traces(Vec<(&'static str, Vec<u8>)>);

const MASK: u8 = 0xa5;
const PAGE: u64 = 4096;

impl Traces {
    /// Of a P-256 key in PKCS#8.
    fn of(pem: &str) -> Traces {
        let lines: Vec<&str> = pem.lines().collect();
        let der = STANDARD.decode(lines[1..lines.len() - 1].concat()).unwrap();
        // RFC 5915 in RFC 5208: the number follows as an octet string of 32 bytes.
        assert_eq!(der[34..36], [0x04, 0x20], "PKCS#8 of P-256");
        let number = &der[36..68];
        let reversed: Vec<u8> = number.iter().rev().copied().collect();
        let masked = |bytes: &[u8]| bytes.iter().map(|b| b ^ MASK).collect::<Vec<u8>>();
        Traces(vec![
            // The second line of the text is bytes 48 to 96, of which the key's are the first twenty.
            ("PEM", masked(&lines[2].as_bytes()[..24])),
            ("number, first half", masked(&number[..16])),
            ("number, second half", masked(&number[16..])),
            ("reversed, first half", masked(&reversed[..16])),
            ("reversed, second half", masked(&reversed[16..])),
        ])
    }

    fn to_text(&self) -> String {
        let parts = self.0.iter().map(|(_, bytes)| STANDARD.encode(bytes));
        parts.collect::<Vec<_>>().join(" ")
    }

    fn from_text(text: &str) -> Traces {
        let names = [
            "PEM",
            "number, first half",
            "number, second half",
            "reversed, first half",
            "reversed, second half",
        ];
        let parts = text.split_whitespace().map(|part| STANDARD.decode(part).unwrap());
        Traces(names.into_iter().zip(parts).collect())
    }

    /// Traces in the memory of a process, with the mapping they are in.
    fn found_in(&self, pid: u32) -> BTreeSet<String> {
        let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
        let memory = std::fs::File::open(format!("/proc/{pid}/mem")).unwrap();
        let pages = std::fs::File::open(format!("/proc/{pid}/pagemap")).unwrap();
        let mut begins = [false; 256];
        for (_, masked) in &self.0 {
            begins[usize::from(masked[0] ^ MASK)] = true;
        }
        let mut found = BTreeSet::new();
        for line in maps.lines().filter(|l| l.contains(" rw") && !l.contains("[v")) {
            let (from, to) = line.split(' ').next().unwrap().split_once('-').unwrap();
            let from = u64::from_str_radix(from, 16).unwrap() / PAGE;
            let to = u64::from_str_radix(to, 16).unwrap() / PAGE;
            let owner = line.split_whitespace().nth(5).unwrap_or("anonymous");
            // Allocators reserve much more than they use: runs of pages that exist.
            let mut entries = vec![0; ((to - from) * 8) as usize];
            pages.read_exact_at(&mut entries, from * 8).unwrap();
            let exists: Vec<bool> = entries.chunks(8).map(|entry| entry[7] & 0xc0 != 0).collect();
            let mut at = 0;
            for run in exists.chunk_by(|a, b| a == b) {
                let start = from + at;
                at += run.len() as u64;
                if !run[0] {
                    continue;
                }
                let mut bytes = vec![0; run.len() * PAGE as usize];
                // The process lives and may have given pages back meanwhile.
                let read = memory.read_at(&mut bytes, start * PAGE).unwrap_or(0);
                let bytes = &bytes[..read];
                let candidates = bytes.iter().enumerate().filter(|(_, byte)| begins[usize::from(**byte)]);
                for (place, _) in candidates {
                    for (name, masked) in &self.0 {
                        let here = bytes[place..].iter().zip(masked);
                        if bytes.len() - place >= masked.len() && here.into_iter().all(|(a, b)| *a == *b ^ MASK) {
                            found.insert(format!("{name} in {owner} at {:x}", start * PAGE + place as u64));
                        }
                    }
                }
            }
        }
        found
    }
}

/// Secret of a gateway, as the control plane serves it.
fn served(snapshot: &ProxySnapshot, certificate: &TestCert) -> Arc<ResourceSet> {
    let (_, chain) = certificate.response.split_last().unwrap();
    let secret = Secret {
        name: "kubernetes://shop".into(),
        value: SecretValue::KeyPair {
            chain: chain.concat().into_bytes(),
            key: KeyBytes::new(certificate.key.to_pem().as_bytes().to_vec()),
        },
    };
    Arc::new(ResourceSet::new(
        snapshot,
        [Arc::new(secret)],
        &Options::new(Dialect::Istio),
        None,
    ))
}

fn gateway() -> ProxySnapshot {
    let answer = RouteAction::Respond {
        status: 200,
        body: String::new(),
    };
    let routes = RouteSource::Inline(Box::new(table("shop", &["*"], answer)));
    let listener = Listener {
        name: "0.0.0.0_8443".into(),
        address: ([127, 0, 0, 1], 8443).into(),
        bind_to_port: true,
        use_original_dst: false,
        direction: Direction::Outbound,
        chains: vec![FilterChain {
            name: "main".into(),
            matches: ChainMatch::default(),
            tls: Some(ServerTls {
                certificate: "kubernetes://shop".into(),
                trust_bundle: None,
                client_sans: vec![],
                require_client_certificate: false,
                alpn: vec!["http/1.1".into()],
                min_version: TlsVersion::V1_2,
                ciphers: vec![],
            }),
            filters: Filters::Http(Box::new(http_manager(routes, false, vec![]))),
        }],
        default_chain: None,
        tls_inspector: Inspector::Off,
        http_inspector: Inspector::Off,
        detection_timeout_ms: 0,
        access_log: None,
    };
    let mut snapshot = ProxySnapshot::default();
    snapshot.listeners.insert(listener.name.clone(), Arc::new(listener));
    snapshot
}

/// Waits until the gateway presents this certificate to a client that verifies it.
async fn shows(program: &Program, connector: &TlsConnector, certificate: &TestCert) {
    eventually("the gateway shows the certificate", Duration::from_secs(20), || async {
        let tcp = program.net.run(|| std::net::TcpStream::connect("127.0.0.1:8443"));
        let tcp = tcp.map_err(|e| (e.to_string(), program.log()))?;
        tcp.set_nonblocking(true).unwrap();
        let tcp = TcpStream::from_std(tcp).unwrap();
        let name = ServerName::try_from("shop.example.com").unwrap();
        let tls = connector.connect(name, tcp).await;
        let tls = tls.map_err(|e| (e.to_string(), program.log()))?;
        let shown = tls.get_ref().1.peer_certificates().unwrap()[0].clone();
        if Some(&shown) == certificate.identity.chain().first() {
            Ok(())
        } else {
            Err(("another certificate".into(), String::new()))
        }
    })
    .await;
}

/// A secret that a gateway gets over its stream: TLS, HTTP/2, protobuf, PEM, and what each of them buffers.
#[tokio::test]
async fn keys_from_the_control_plane_are_gone_when_they_are_replaced() {
    let public = TestCa::new("public");
    let (old, new) = (public.host(&["shop.example.com"]), public.host(&["shop.example.com"]));
    let snapshot = gateway();
    let control = Control::new(Arc::new(TestCa::new("cluster.local")), served(&snapshot, &old), 3600);
    let mut program = Program::start("router", "gw", Some(control.clone()), &[]).await;
    let client = public.anonymous().client(&ClientTlsOptions {
        expected: ExpectedServer::ServerName,
        alpn: vec![b"http/1.1".to_vec()],
        present_certificate: false,
        min_tls13: false,
    });
    let connector = TlsConnector::from(client.unwrap());
    shows(&program, &connector, &old).await;
    let traces = Traces::of(&old.key.to_pem());
    let pid = program.process.id();
    assert!(!traces.found_in(pid).is_empty(), "the key in force is found");
    control.resources.send_replace(served(&snapshot, &new));
    shows(&program, &connector, &new).await;
    // What is still read into belongs to the stream: the last message lies in the buffers of TLS and HTTP/2 until the next
    // one. Everything else is gone at once.
    eventually(
        "only the stream has the former key",
        Duration::from_secs(20),
        || async {
            let found = traces.found_in(pid);
            if found.iter().all(|trace| trace.starts_with("PEM")) {
                Ok(())
            } else {
                Err(found)
            }
        },
    )
    .await;
    program.restart_control(control.clone());
    eventually(
        "the former key is gone with the stream",
        Duration::from_secs(20),
        || async {
            let found = traces.found_in(pid);
            if found.is_empty() { Ok(()) } else { Err(found) }
        },
    )
    .await;
    assert!(
        !Traces::of(&new.key.to_pem()).found_in(pid).is_empty(),
        "its successor is there"
    );
}

/// Says by its presence that this process is the one that is looked at.
const HOLDER: &str = "MANTLET_TEST_HOLDER";

/// The key of a workload, which nobody but its proxy ever sees: made, certified, used in handshakes, replaced. The process
/// that holds it is this test once more; it tells what to look for, in a mask.
#[test]
fn keys_of_workloads_are_gone_when_they_are_replaced() {
    if std::env::var(HOLDER).is_ok() {
        hold();
        return;
    }
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "keys_of_workloads_are_gone_when_they_are_replaced",
            "--nocapture",
        ])
        .env(HOLDER, "1")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let pid = child.id();
    let mut lines = BufReader::new(child.stdout.take().unwrap())
        .lines()
        .map_while(Result::ok);
    let mut stdin = child.stdin.take().unwrap();
    let mut after = |word: &str| {
        let line = lines.find_map(|l| l.split_once(word).map(|(_, rest)| rest.to_string()));
        line.unwrap_or_else(|| panic!("the holder ended before {word}"))
    };
    let traces = Traces::from_text(&after("HELD"));
    assert!(!traces.found_in(pid).is_empty(), "the key in force is found");
    writeln!(stdin, "go on").unwrap();
    after("REPLACED");
    assert_eq!(traces.found_in(pid), BTreeSet::new());
    writeln!(stdin, "end").unwrap();
    assert!(child.wait().unwrap().success());
}

fn wait_for_word() {
    std::io::stdin().lock().read_line(&mut String::new()).unwrap();
}

/// As the agent does it: a key, a request, a certificate.
fn certified(ca: &TestCa, serial: u8) -> (TlsIdentity, Traces) {
    let key = PrivateKey::generate(KeyAlgorithm::EcdsaP256).unwrap();
    let id = ca.id("default", "web");
    let csr = Csr::from_pem(&build_csr(&key, &id).unwrap()).unwrap();
    let issued = ca
        .material()
        .issue(&IssueRequest {
            csr: &csr,
            names: &[SubjectAltName::Spiffe(id)],
            ttl: time::Duration::hours(1),
            now: OffsetDateTime::now_utc(),
            serial: Serial::from_random([serial; 16]),
        })
        .unwrap();
    let provider = mantlet_identity::tls::mesh_provider();
    let identity = TlsIdentity::from_csr_response(&issued.to_response(), &key, provider).unwrap();
    (identity, Traces::of(&key.to_pem()))
}

fn hold() {
    wipe_freed();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .on_thread_start(wipe_freed)
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let app = EchoServer::start().await;
        let mesh = Mesh::with_workers(app.address(), Port::Http, Mode::Strict, 1).await;
        let url = format!("http://{}/", mesh.entry());
        let host = format!("host: {HOST}");
        let (first, traces) = certified(&mesh.ca, 1);
        mesh.server.shared.secrets.set_identity(first);
        assert_eq!(curl(&["-H", &host, &url]).await.status, 200);
        println!("\nHELD {}", traces.to_text());
        wait_for_word();
        let (second, _) = certified(&mesh.ca, 2);
        mesh.server.shared.secrets.set_identity(second);
        // The client's proxy renews its connections too, so that this one is under the new key.
        mesh.client.identity(&mesh.ca, "sleep");
        assert_eq!(curl(&["-H", &host, &url]).await.status, 200);
        println!("\nREPLACED ");
        wait_for_word();
    });
}
