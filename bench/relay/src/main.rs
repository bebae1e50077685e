//! The floor of the benchmark: bytes in, bytes out, mutual TLS between, nothing else. One thread, one file.
//!
//! `bench-relay client|server --cert F --key F --root F [--expect SPIFFE] LISTEN=CONNECT…`: a client takes plaintext and
//! dials TLS, a server takes TLS and dials plaintext. It uses the same TLS configurations as the product, so the
//! difference to it is what the proxy itself costs.

use std::net::SocketAddr;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use mantlet_identity::tls::mesh_provider;
use mantlet_identity::{
    ClientAuth, ClientTlsOptions, ExpectedServer, ServerTlsOptions, TlsIdentity, TrustBundle, TrustDomainRule,
};
use rustls_pki_types::ServerName;
use tokio::io::{BufReader, copy_bidirectional_with_sizes};
use tokio::net::{TcpListener, TcpStream};
use tokio::signal::unix::{SignalKind, signal};
use tokio_rustls::{TlsAcceptor, TlsConnector};

/// Copy buffer per direction: a few TLS records, so that bulk costs few system calls.
const BUFFER: usize = 64 * 1024;

#[derive(Clone)]
enum Side {
    Client(TlsConnector),
    Server(TlsAcceptor),
}

fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let role = arguments.next().context("the first argument is client or server")?;
    let (mut cert, mut key, mut root, mut expect, mut pairs) = (None, None, None, Vec::new(), Vec::new());
    while let Some(argument) = arguments.next() {
        let mut value = || arguments.next().with_context(|| format!("{argument} needs a value"));
        match argument.as_str() {
            "--cert" => cert = Some(std::fs::read(value()?)?),
            "--key" => key = Some(std::fs::read(value()?)?),
            "--root" => root = Some(std::fs::read(value()?)?),
            "--expect" => expect.push(value()?),
            pair => {
                let (listen, connect) = pair
                    .split_once('=')
                    .with_context(|| format!("{pair:?} is not LISTEN=CONNECT"))?;
                pairs.push((listen.parse::<SocketAddr>()?, connect.parse::<SocketAddr>()?));
            }
        }
    }
    let bundle = TrustBundle::from_pem("--root", &root.context("--root is missing")?)?;
    let identity = TlsIdentity::from_pem(
        &cert.context("--cert is missing")?,
        &key.context("--key is missing")?,
        bundle,
        mesh_provider(),
    )?;
    let side = match role.as_str() {
        "client" => Side::Client(TlsConnector::from(identity.client(&ClientTlsOptions {
            expected: ExpectedServer::from_names(expect),
            alpn: Vec::new(),
            present_certificate: true,
            min_tls13: false,
        })?)),
        "server" => Side::Server(TlsAcceptor::from(
            identity
                .server(&ServerTlsOptions {
                    client_auth: ClientAuth::Required(TrustDomainRule::one_of(["cluster.local".parse()?])),
                    alpn: Vec::new(),
                    min_tls13: false,
                })?
                .strict(),
        )),
        other => bail!("unknown role {other:?}"),
    };
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?
        .block_on(async {
            let mut tasks = tokio::task::JoinSet::new();
            for (listen, connect) in pairs {
                let listener = TcpListener::bind(listen)
                    .await
                    .with_context(|| format!("binding {listen}"))?;
                tasks.spawn(accept(listener, connect, side.clone()));
            }
            // An orderly end, so that counts of a build that counts are written.
            let mut end = signal(SignalKind::terminate())?;
            tokio::select! {
                _ = end.recv() => Ok(()),
                Some(ended) = tasks.join_next() => ended?,
            }
        })
}

async fn accept(listener: TcpListener, connect: SocketAddr, side: Side) -> Result<()> {
    let side = Arc::new(side);
    loop {
        let (stream, _) = listener.accept().await?;
        let side = side.clone();
        tokio::spawn(async move {
            // A failed connection is visible at the client; the relay has no log.
            let _ = relay(stream, connect, &side).await;
        });
    }
}

async fn relay(mut near: TcpStream, connect: SocketAddr, side: &Side) -> Result<()> {
    near.set_nodelay(true)?;
    match side {
        Side::Client(connector) => {
            let far = TcpStream::connect(connect).await?;
            far.set_nodelay(true)?;
            // The TLS library reads 4 KiB at a time; the buffer below makes that one system call for many records.
            let far = BufReader::with_capacity(BUFFER, far);
            let mut far = connector.connect(ServerName::from(connect.ip()), far).await?;
            copy_bidirectional_with_sizes(&mut near, &mut far, BUFFER, BUFFER).await?;
        }
        Side::Server(acceptor) => {
            let mut near = acceptor.accept(BufReader::with_capacity(BUFFER, near)).await?;
            let mut far = TcpStream::connect(connect).await?;
            far.set_nodelay(true)?;
            copy_bidirectional_with_sizes(&mut near, &mut far, BUFFER, BUFFER).await?;
        }
    }
    Ok(())
}
