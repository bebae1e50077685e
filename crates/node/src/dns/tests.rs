//! Answers of the zone, and the server over real sockets.

use std::collections::HashMap;

use super::records::{Entry, Target};
use super::*;
use hickory_proto::op::Query;

#[derive(Default)]
struct Fixture {
    services: HashMap<(&'static str, &'static str), Entry>,
    endpoints: Vec<Target>,
}

impl Zone for Fixture {
    fn service(&self, namespace: &str, name: &str) -> Option<Entry> {
        let found = self
            .services
            .iter()
            .find(|(key, _)| key.0 == namespace && key.1 == name);
        found.map(|(_, entry)| entry.clone())
    }

    fn endpoints(&self, _namespace: &str, name: &str) -> Vec<Target> {
        if name == "db" {
            self.endpoints.clone()
        } else {
            Vec::new()
        }
    }

    fn namespace(&self, name: &str) -> bool {
        name == "default"
    }

    fn reverse(&self, address: Ipv4Addr) -> Vec<String> {
        if address == Ipv4Addr::new(10, 96, 0, 5) {
            vec!["customers.default".to_owned()]
        } else {
            Vec::new()
        }
    }
}

fn zone() -> Fixture {
    let targets: Vec<_> = (2..4)
        .map(|last| Target {
            address: Ipv4Addr::new(10, 244, 0, last),
            host: format!("db-{last}"),
            ports: vec![("sql".to_owned(), "tcp".to_owned(), 5432)],
        })
        .collect();
    Fixture {
        services: HashMap::from([
            (
                ("default", "customers"),
                Entry::Cluster {
                    addresses: vec![Ipv4Addr::new(10, 96, 0, 5)],
                    ports: vec![("http".to_owned(), "tcp".to_owned(), 80)],
                },
            ),
            (("default", "db"), Entry::Headless(targets.clone())),
            (
                ("default", "alias"),
                Entry::External("customers.default.svc.cluster.local".to_owned()),
            ),
            (("default", "outside"), Entry::External("www.example.com".to_owned())),
        ]),
        endpoints: targets,
    }
}

fn ask_zone(name: &str, kind: RecordType) -> String {
    let name = Name::from_ascii(name).expect("a name");
    match records::answer(&zone(), &name, kind) {
        Answer::Records(records) => records
            .iter()
            .map(|record| record.data.to_string())
            .collect::<Vec<_>>()
            .join(" "),
        Answer::Empty(_) => "empty".to_owned(),
        Answer::NoSuchName(_) => "nxdomain".to_owned(),
        Answer::NotOurs => "not ours".to_owned(),
    }
}

#[test]
fn names_of_the_cluster() {
    let table = [
        ("customers.default.svc.cluster.local.", RecordType::A, "10.96.0.5"),
        ("CUSTOMERS.Default.svc.cluster.local.", RecordType::A, "10.96.0.5"),
        ("customers.default.svc.cluster.local.", RecordType::AAAA, "empty"),
        ("customers.other.svc.cluster.local.", RecordType::A, "nxdomain"),
        ("customers.default.cluster.local.", RecordType::A, "nxdomain"),
        ("db.default.svc.cluster.local.", RecordType::A, "10.244.0.2 10.244.0.3"),
        ("db-3.db.default.svc.cluster.local.", RecordType::A, "10.244.0.3"),
        ("10-244-0-3.db.default.svc.cluster.local.", RecordType::A, "10.244.0.3"),
        ("db-9.db.default.svc.cluster.local.", RecordType::A, "nxdomain"),
        (
            "_http._tcp.customers.default.svc.cluster.local.",
            RecordType::SRV,
            "0 100 80 customers.default.svc.cluster.local.",
        ),
        (
            "_http._udp.customers.default.svc.cluster.local.",
            RecordType::SRV,
            "nxdomain",
        ),
        (
            "_sql._tcp.db.default.svc.cluster.local.",
            RecordType::SRV,
            "0 100 5432 db-2.db.default.svc.cluster.local. 0 100 5432 db-3.db.default.svc.cluster.local.",
        ),
        ("10-244-0-9.default.pod.cluster.local.", RecordType::A, "10.244.0.9"),
        ("10-244-0-9.missing.pod.cluster.local.", RecordType::A, "nxdomain"),
        ("default.svc.cluster.local.", RecordType::A, "empty"),
        ("cluster.local.", RecordType::A, "empty"),
        (
            "5.0.96.10.in-addr.arpa.",
            RecordType::PTR,
            "customers.default.svc.cluster.local.",
        ),
        ("9.0.96.10.in-addr.arpa.", RecordType::PTR, "nxdomain"),
        ("8.8.8.8.in-addr.arpa.", RecordType::PTR, "not ours"),
        ("www.example.com.", RecordType::A, "not ours"),
        ("outside.default.svc.cluster.local.", RecordType::A, "www.example.com."),
    ];
    for (name, kind, expected) in table {
        assert_eq!(ask_zone(name, kind), expected, "{name} {kind}");
    }
}

async fn start(upstreams: Vec<SocketAddr>) -> (SocketAddr, CancellationToken) {
    let stop = CancellationToken::new();
    // UDP and TCP need the same free port: try until both are free.
    for _ in 0..50 {
        let probe = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let listen = probe.local_addr().expect("bound");
        drop(probe);
        let config = Config {
            listen,
            upstreams: upstreams.clone(),
        };
        if serve(Arc::new(zone()), config, stop.clone()).await.is_ok() {
            return (listen, stop);
        }
    }
    panic!("no port is free for both UDP and TCP");
}

fn query(name: &str, kind: RecordType) -> Message {
    let mut message = Message::query();
    message.metadata.recursion_desired = true;
    message.add_query(Query::query(Name::from_ascii(name).expect("a name"), kind));
    message
}

#[tokio::test]
async fn udp_and_tcp_answer_alike_and_aliases_are_chased() {
    let (server, stop) = start(Vec::new()).await;
    let question = query("alias.default.svc.cluster.local.", RecordType::A);
    let answer = ask(server, &question).await.expect("an answer");
    assert_eq!(answer.answers.len(), 2, "{answer}");
    let bytes = question.to_vec().expect("encodes");
    let mut stream = TcpStream::connect(server).await.expect("connects");
    for _ in 0..2 {
        stream.write_u16(bytes.len() as u16).await.expect("writes");
        stream.write_all(&bytes).await.expect("writes");
        let length = stream.read_u16().await.expect("reads");
        let mut reply = vec![0; usize::from(length)];
        stream.read_exact(&mut reply).await.expect("reads");
        assert_eq!(Message::from_vec(&reply).expect("decodes").answers, answer.answers);
    }
    stop.cancel();
}

#[tokio::test]
async fn outside_names_fail_at_once_without_upstreams_and_are_forwarded_with_one() {
    let (lone, stop_lone) = start(Vec::new()).await;
    let question = query("www.example.com.", RecordType::A);
    let answer = ask(lone, &question).await.expect("an answer");
    assert_eq!(answer.metadata.response_code, ResponseCode::ServFail);
    // Another server of ours stands for the host's resolver.
    let (front, stop) = start(vec![lone]).await;
    let answer = ask(front, &question).await.expect("an answer");
    assert_eq!(answer.metadata.response_code, ResponseCode::ServFail);
    stop.cancel();
    stop_lone.cancel();
}

#[tokio::test]
async fn garbage_is_ignored_and_the_server_lives_on() {
    let (server, stop) = start(Vec::new()).await;
    let socket = UdpSocket::bind("127.0.0.1:0").await.expect("binds");
    for junk in [&b""[..], b"x", &[0xff; 40], &[0; 12]] {
        socket.send_to(junk, server).await.expect("sends");
    }
    let answer = ask(server, &query("customers.default.svc.cluster.local.", RecordType::A))
        .await
        .expect("an answer");
    assert_eq!(answer.answers.len(), 1);
    stop.cancel();
}

#[test]
fn resolv_conf_is_read_without_loopback_servers() {
    let text =
        "# comment\nnameserver 127.0.0.53\nnameserver 192.0.2.1\nnameserver ::1\nsearch x\n nameserver 192.0.2.2\n";
    let found: Vec<_> = parse_resolv_conf(text).iter().map(ToString::to_string).collect();
    assert_eq!(found, ["192.0.2.1:53", "192.0.2.2:53"]);
}
