//! The embedded API server as a process of its own, so that its memory and processor time are not the control plane's.

use std::path::Path;

use anyhow::{Context, Result};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use mantlet_apiserver::{ApiServer, Config};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
};
use tokio::net::TcpListener;

/// Name of the kubeconfig in the directory; its presence says that the server answers.
pub(crate) const KUBECONFIG: &str = "kubeconfig";

/// Serves until it is ended. The store and the kubeconfig of an administrator are in `dir`.
pub(crate) async fn run(dir: &Path) -> Result<()> {
    let ca_key = KeyPair::generate()?;
    let mut ca_params = CertificateParams::default();
    ca_params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    ca_params.distinguished_name = subject("fleet", None);
    let ca_pem = ca_params.self_signed(&ca_key)?.pem();
    let issuer = Issuer::new(ca_params, ca_key);

    let config = Config::new(
        dir.join("store.redb"),
        ca_pem.clone(),
        KeyPair::generate()?.serialize_pem(),
    );
    let server = ApiServer::open(config).await?;
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let address = listener.local_addr()?;

    let key = KeyPair::generate()?;
    let mut params = CertificateParams::new(vec!["127.0.0.1".to_string(), "localhost".to_string()])?;
    params.distinguished_name = subject("127.0.0.1", None);
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    let cert = params.signed_by(&key, &issuer)?.pem();
    let tls = server
        .tls_config(&cert, &key.serialize_pem())
        .context("server certificate")?;

    let user_key = KeyPair::generate()?;
    let mut params = CertificateParams::default();
    params.distinguished_name = subject("admin", Some("system:masters"));
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
    let user = params.signed_by(&user_key, &issuer)?.pem();
    let text = format!(
        "apiVersion: v1\nkind: Config\ncurrent-context: fleet\nclusters:\n- name: fleet\n  cluster:\n    server: https://{address}\n    certificate-authority-data: {}\ncontexts:\n- name: fleet\n  context: {{cluster: fleet, user: admin}}\nusers:\n- name: admin\n  user:\n    client-certificate-data: {}\n    client-key-data: {}\n",
        STANDARD.encode(ca_pem),
        STANDARD.encode(user),
        STANDARD.encode(user_key.serialize_pem()),
    );
    let half = dir.join("kubeconfig.new");
    std::fs::write(&half, text)?;
    std::fs::rename(half, dir.join(KUBECONFIG))?;
    server.serve(listener, tls).await?;
    Ok(())
}

fn subject(name: &str, group: Option<&str>) -> DistinguishedName {
    let mut dn = DistinguishedName::new();
    dn.push(DnType::CommonName, name);
    if let Some(group) = group {
        dn.push(DnType::OrganizationName, group);
    }
    dn
}
