//! The cluster's name server: authoritative for `cluster.local`, forwarding the rest to the host's resolvers.
//!
//! Called by the cluster process, inside the cluster's network namespace; it binds the node's address, and the Service
//! `kube-system/kube-dns` (10.96.0.10) leads there. [`records`] holds the answers (pure), this file the sockets. Everything
//! is bounded: message sizes, concurrent forwards, TCP connections and their idle time.

pub mod records;

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use hickory_proto::op::{Message, MessageType, OpCode, ResponseCode};
use hickory_proto::rr::{Name, RData, Record, RecordType};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use records::{Answer, Zone};

/// Queries that wait for an upstream resolver at the same time.
const MAX_FORWARDS: usize = 256;
/// TCP connections at the same time.
const MAX_CONNECTIONS: usize = 128;
/// A TCP connection without a complete query is closed after this.
const IDLE: Duration = Duration::from_secs(10);
/// How long an upstream may take, per attempt.
const UPSTREAM_LIMIT: Duration = Duration::from_secs(2);
/// Largest UDP answer, as announced by EDNS clients; beyond it the client must come over TCP.
const MAX_UDP: usize = 1232;
/// Largest UDP answer without EDNS (RFC 1035).
const PLAIN_UDP: usize = 512;

/// Where to listen and whom to ask.
#[derive(Clone, Debug)]
pub struct Config {
    /// Address and port, UDP and TCP.
    pub listen: SocketAddr,
    /// Resolvers for names outside the cluster; without any such names end in SERVFAIL at once.
    pub upstreams: Vec<SocketAddr>,
}

impl Config {
    /// The node's address, without upstreams: what a cluster in its own network namespace can reach.
    pub fn on_node() -> Self {
        Self {
            listen: SocketAddr::from((crate::sandbox::NODE_ADDRESS, 53)),
            upstreams: Vec::new(),
        }
    }
}

/// The name servers listed in the text of a resolv.conf, at most three, without those on a loopback address.
pub fn parse_resolv_conf(text: &str) -> Vec<SocketAddr> {
    text.lines()
        .filter_map(|line| line.trim().strip_prefix("nameserver"))
        .filter_map(|address| address.trim().parse::<Ipv4Addr>().ok())
        .filter(|address| !address.is_loopback())
        .take(3)
        .map(|address| SocketAddr::from((address, 53)))
        .collect()
}

/// Binds the sockets and serves until `stop` is cancelled.
///
/// # Errors
/// The address cannot be bound.
pub async fn serve(zone: Arc<dyn Zone>, config: Config, stop: CancellationToken) -> std::io::Result<()> {
    let udp = Arc::new(UdpSocket::bind(config.listen).await?);
    let tcp = TcpListener::bind(config.listen).await?;
    let server = Arc::new(Server {
        zone,
        upstreams: config.upstreams,
        forwards: Semaphore::new(MAX_FORWARDS),
    });
    tokio::spawn(server.clone().serve_udp(udp, stop.clone()));
    tokio::spawn(server.serve_tcp(tcp, stop));
    Ok(())
}

struct Server {
    zone: Arc<dyn Zone>,
    upstreams: Vec<SocketAddr>,
    forwards: Semaphore,
}

impl Server {
    async fn serve_udp(self: Arc<Self>, socket: Arc<UdpSocket>, stop: CancellationToken) {
        let mut buffer = [0_u8; 4096];
        loop {
            let received = tokio::select! {
                () = stop.cancelled() => return,
                received = socket.recv_from(&mut buffer) => received,
            };
            let (length, peer) = match received {
                Ok(received) => received,
                Err(error) => {
                    // An ICMP error of an earlier answer shows up here.
                    tracing::debug!(%error, "dns: receive failed");
                    continue;
                }
            };
            let Ok(query) = Message::from_vec(&buffer[..length]) else {
                continue;
            };
            if query.metadata.message_type != MessageType::Query {
                // Answering an answer would let two servers talk for ever.
                continue;
            }
            let limit = match &query.edns {
                Some(edns) => usize::from(edns.max_payload()).clamp(PLAIN_UDP, MAX_UDP),
                None => PLAIN_UDP,
            };
            match self.local(&query) {
                Step::Done(answer) => {
                    if let Some(bytes) = encode(&answer, limit) {
                        let _ = socket.send_to(&bytes, peer).await;
                    }
                }
                Step::Ask(answer) => {
                    let (server, socket) = (self.clone(), socket.clone());
                    tokio::spawn(async move {
                        let answer = server.forward(&query, answer).await;
                        if let Some(bytes) = encode(&answer, limit) {
                            let _ = socket.send_to(&bytes, peer).await;
                        }
                    });
                }
            }
        }
    }

    async fn serve_tcp(self: Arc<Self>, listener: TcpListener, stop: CancellationToken) {
        let permits = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        loop {
            let Ok(permit) = permits.clone().acquire_owned().await else {
                return;
            };
            let accepted = tokio::select! {
                () = stop.cancelled() => return,
                accepted = listener.accept() => accepted,
            };
            match accepted {
                Ok((stream, _)) => {
                    let server = self.clone();
                    tokio::spawn(async move {
                        let _permit = permit;
                        if let Err(error) = server.connection(stream).await {
                            tracing::debug!(%error, "dns: a connection ended");
                        }
                    });
                }
                Err(error) => {
                    tracing::warn!(%error, "dns: accept failed");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
    }

    async fn connection(&self, mut stream: TcpStream) -> std::io::Result<()> {
        loop {
            let read = async {
                let length = stream.read_u16().await?;
                let mut bytes = vec![0; usize::from(length)];
                stream.read_exact(&mut bytes).await?;
                Ok::<_, std::io::Error>(bytes)
            };
            let bytes = tokio::time::timeout(IDLE, read)
                .await
                .map_err(|_| std::io::ErrorKind::TimedOut)??;
            let query = Message::from_vec(&bytes).map_err(|_| std::io::ErrorKind::InvalidData)?;
            let answer = match self.local(&query) {
                Step::Done(answer) => answer,
                Step::Ask(answer) => self.forward(&query, answer).await,
            };
            let Some(bytes) = encode(&answer, usize::from(u16::MAX)) else {
                return Ok(());
            };
            let length = u16::try_from(bytes.len()).map_err(|_| std::io::ErrorKind::InvalidData)?;
            let write = async {
                stream.write_u16(length).await?;
                stream.write_all(&bytes).await
            };
            tokio::time::timeout(IDLE, write)
                .await
                .map_err(|_| std::io::ErrorKind::TimedOut)??;
        }
    }

    /// What can be said without asking anybody.
    fn local(&self, query: &Message) -> Step {
        let mut answer = Message::response(query.metadata.id, query.metadata.op_code);
        answer.metadata.recursion_desired = query.metadata.recursion_desired;
        answer.metadata.recursion_available = true;
        answer.add_queries(query.queries.iter().cloned());
        if let Some(theirs) = &query.edns {
            let mut edns = hickory_proto::op::Edns::new();
            edns.set_max_payload(u16::try_from(MAX_UDP).unwrap_or(512));
            edns.set_version(0);
            if theirs.version() > 0 {
                answer.metadata.response_code = ResponseCode::BADVERS;
                answer.set_edns(edns);
                return Step::Done(answer);
            }
            answer.set_edns(edns);
        }
        if query.metadata.op_code != OpCode::Query {
            answer.metadata.response_code = ResponseCode::NotImp;
            return Step::Done(answer);
        }
        let [question] = query.queries.as_slice() else {
            answer.metadata.response_code = ResponseCode::FormErr;
            return Step::Done(answer);
        };
        match records::answer(self.zone.as_ref(), question.name(), question.query_type()) {
            Answer::Records(records) => {
                answer.metadata.authoritative = true;
                // An ExternalName leads on; a stub resolver expects the whole chain in one answer.
                let target = records.iter().find_map(|record| match &record.data {
                    RData::CNAME(name) => Some(name.0.clone()),
                    _ => None,
                });
                answer.add_answers(records);
                if let Some(target) = target.filter(|_| question.query_type() != RecordType::CNAME) {
                    return self.chase(answer, &target, question.query_type());
                }
                Step::Done(answer)
            }
            Answer::Empty(soa) => {
                answer.metadata.authoritative = true;
                answer.add_authority(soa);
                Step::Done(answer)
            }
            Answer::NoSuchName(soa) => {
                answer.metadata.authoritative = true;
                answer.metadata.response_code = ResponseCode::NXDomain;
                answer.add_authority(soa);
                Step::Done(answer)
            }
            Answer::NotOurs => Step::Ask(answer),
        }
    }

    fn chase(&self, mut answer: Message, target: &Name, kind: RecordType) -> Step {
        match records::answer(self.zone.as_ref(), target, kind) {
            Answer::Records(records) => answer.add_answers(records),
            Answer::NotOurs => return Step::Ask(answer),
            Answer::Empty(_) | Answer::NoSuchName(_) => &mut answer,
        };
        Step::Done(answer)
    }

    /// Asks the upstreams for what is still missing in `answer`: the question, or the target of its last CNAME.
    async fn forward(&self, query: &Message, mut answer: Message) -> Message {
        let Some(question) = query.queries.first() else {
            return answer;
        };
        let alias = answer.answers.iter().rev().find_map(|record| match &record.data {
            RData::CNAME(name) => Some(name.0.clone()),
            _ => None,
        });
        let mut wanted = question.clone();
        if let Some(alias) = alias {
            wanted.set_name(alias);
        }
        let found = match self.forwards.try_acquire() {
            Ok(_permit) => self.ask_upstreams(&wanted).await,
            Err(_) => None,
        };
        match found {
            Some(found) => {
                answer.metadata.authoritative = false;
                answer.metadata.response_code = found.metadata.response_code;
                answer.add_answers(found.answers);
                answer.add_authorities(found.authorities);
            }
            None => answer.metadata.response_code = ResponseCode::ServFail,
        }
        answer
    }

    async fn ask_upstreams(&self, question: &hickory_proto::op::Query) -> Option<Message> {
        for upstream in &self.upstreams {
            let mut query = Message::query();
            query.metadata.recursion_desired = true;
            query.add_query(question.clone());
            match tokio::time::timeout(UPSTREAM_LIMIT, ask(*upstream, &query)).await {
                Ok(Ok(answer)) => return Some(answer),
                Ok(Err(error)) => tracing::debug!(%upstream, %error, "dns: upstream failed"),
                Err(_) => tracing::debug!(%upstream, "dns: upstream did not answer"),
            }
        }
        None
    }
}

enum Step {
    Done(Message),
    Ask(Message),
}

/// One exchange over UDP from a fresh port, over TCP if the answer is truncated.
async fn ask(upstream: SocketAddr, query: &Message) -> std::io::Result<Message> {
    let invalid = |_| std::io::Error::from(std::io::ErrorKind::InvalidData);
    let bytes = query.to_vec().map_err(|_| std::io::ErrorKind::InvalidData)?;
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).await?;
    socket.connect(upstream).await?;
    socket.send(&bytes).await?;
    let mut buffer = [0_u8; 4096];
    loop {
        let length = socket.recv(&mut buffer).await?;
        let Ok(answer) = Message::from_vec(&buffer[..length]) else {
            continue;
        };
        if answer.metadata.id != query.metadata.id || answer.queries != query.queries {
            continue;
        }
        if !answer.metadata.truncation {
            return Ok(answer);
        }
        let mut stream = TcpStream::connect(upstream).await?;
        stream
            .write_u16(u16::try_from(bytes.len()).map_err(|_| std::io::ErrorKind::InvalidData)?)
            .await?;
        stream.write_all(&bytes).await?;
        let length = stream.read_u16().await?;
        let mut bytes = vec![0; usize::from(length)];
        stream.read_exact(&mut bytes).await?;
        return Message::from_vec(&bytes).map_err(invalid);
    }
}

/// The answer's bytes, with the truncation bit and no records when they are more than `limit`.
fn encode(answer: &Message, limit: usize) -> Option<Vec<u8>> {
    let bytes = match answer.to_vec() {
        Ok(bytes) => bytes,
        Err(error) => {
            tracing::warn!(%error, "dns: an answer could not be written");
            return None;
        }
    };
    if bytes.len() <= limit {
        return Some(bytes);
    }
    answer.truncate().to_vec().ok()
}

/// Makes a record with the cluster's time to live.
fn record(name: &Name, ttl: u32, data: RData) -> Record {
    Record::from_rdata(name.clone(), ttl, data)
}

#[cfg(test)]
mod tests;
