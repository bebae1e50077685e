//! A server on an ephemeral port with its own certificates and state, and the real `kubectl` against it.

#![allow(dead_code, reason = "each test program uses its own part")]

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::Arc;

use mantlet_apiserver::{ApiServer, Config};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
};

/// A certificate authority.
pub(crate) struct Ca {
    pub(crate) pem: String,
    issuer: Issuer<'static, KeyPair>,
}

impl Ca {
    pub(crate) fn new(name: &str) -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name = subject(name, &[]);
        let cert = params.self_signed(&key).unwrap();
        Self {
            pem: cert.pem(),
            issuer: Issuer::new(params, key),
        }
    }

    /// A client certificate: user and groups.
    pub(crate) fn client(&self, user: &str, groups: &[&str]) -> (String, String) {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.distinguished_name = subject(user, groups);
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        (params.signed_by(&key, &self.issuer).unwrap().pem(), key.serialize_pem())
    }

    /// A server certificate for names and addresses.
    pub(crate) fn server(&self, names: &[&str]) -> (String, String) {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(names.iter().map(|n| (*n).to_owned()).collect::<Vec<_>>()).unwrap();
        params.distinguished_name = subject(names[0], &[]);
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        (params.signed_by(&key, &self.issuer).unwrap().pem(), key.serialize_pem())
    }
}

fn subject(name: &str, groups: &[&str]) -> DistinguishedName {
    let mut dn = DistinguishedName::new();
    dn.push(DnType::CommonName, name);
    for g in groups {
        dn.push(DnType::OrganizationName, *g);
    }
    dn
}

/// A configuration in a directory, with a fresh CA and signing key.
pub(crate) fn config(dir: &Path, ca: &Ca) -> Config {
    let mut config = Config::new(
        dir.join("store.redb"),
        ca.pem.clone(),
        KeyPair::generate().unwrap().serialize_pem(),
    );
    config.bookmark_seconds = 1;
    config
}

/// A running server with a kubeconfig for an administrator.
pub(crate) struct Cluster {
    pub(crate) server: Arc<ApiServer>,
    pub(crate) address: SocketAddr,
    pub(crate) ca: Ca,
    pub(crate) dir: tempfile::TempDir,
    serving: tokio::task::JoinHandle<()>,
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

impl Cluster {
    pub(crate) async fn start() -> Self {
        Self::start_with(|_| {}).await
    }

    pub(crate) async fn start_with(change: impl FnOnce(&mut Config)) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let ca = Ca::new("test-ca");
        let mut config = config(dir.path(), &ca);
        change(&mut config);
        let server = ApiServer::open(config).await.unwrap();
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (cert, key) = ca.server(&["127.0.0.1", "localhost"]);
        let tls = server.tls_config(&cert, &key).unwrap();
        let serving = tokio::spawn({
            let server = server.clone();
            async move { server.serve(listener, tls).await.unwrap() }
        });
        let cluster = Self {
            server,
            address,
            ca,
            dir,
            serving,
        };
        let (cert, key) = cluster.ca.client("admin", &["system:masters"]);
        cluster.kubeconfig(
            "admin",
            &format!(
                "client-certificate-data: {}\n    client-key-data: {}",
                b64(&cert),
                b64(&key)
            ),
        );
        for namespace in ["default", "kube-system"] {
            // The account controller is part of the node, not of this crate.
            cluster.client().create_account(namespace, "default").await;
        }
        cluster
    }

    /// A client in this process with all rights.
    pub(crate) fn client(&self) -> Client {
        Client(kube::Client::new(self.server.service_as_admin(), "default"))
    }

    /// Writes a kubeconfig for a user.
    pub(crate) fn kubeconfig(&self, user: &str, credentials: &str) -> PathBuf {
        let path = self.dir.path().join(format!("{user}.kubeconfig"));
        let text = format!(
            "apiVersion: v1\nkind: Config\ncurrent-context: t\nclusters:\n- name: t\n  cluster:\n    server: https://{}\n    certificate-authority-data: {}\ncontexts:\n- name: t\n  context: {{cluster: t, user: {user}}}\nusers:\n- name: {user}\n  user:\n    {credentials}\n",
            self.address,
            b64(&self.ca.pem)
        );
        std::fs::write(&path, text).unwrap();
        path
    }

    /// A kubeconfig for a user with a client certificate of this cluster.
    pub(crate) fn user(&self, user: &str, groups: &[&str]) {
        let (cert, key) = self.ca.client(user, groups);
        self.kubeconfig(
            user,
            &format!(
                "client-certificate-data: {}\n    client-key-data: {}",
                b64(&cert),
                b64(&key)
            ),
        );
    }

    /// A kubectl command as a user.
    pub(crate) fn kubectl_as(&self, user: &str, args: &[&str]) -> Command {
        let mut c = Command::new("kubectl");
        c.args(args)
            .env("KUBECONFIG", self.dir.path().join(format!("{user}.kubeconfig")))
            .env("HOME", self.dir.path())
            .env("KUBECACHEDIR", self.dir.path().join("cache"))
            .current_dir(self.dir.path());
        c
    }

    /// Runs kubectl as the administrator with a document on its standard input.
    pub(crate) async fn run_with(&self, args: &[&str], stdin: &str) -> Output {
        self.run_as("admin", args, stdin).await
    }

    /// Runs kubectl as a user.
    pub(crate) async fn run_as(&self, user: &str, args: &[&str], stdin: &str) -> Output {
        let mut command = self.kubectl_as(user, args);
        let stdin = stdin.to_owned();
        tokio::task::spawn_blocking(move || {
            use std::io::Write;
            let mut child = command
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .stderr(Stdio::piped())
                .spawn()
                .expect("kubectl is not installed; these tests need the real kubectl 1.32 or newer in PATH");
            child.stdin.take().unwrap().write_all(stdin.as_bytes()).unwrap();
            child.wait_with_output().unwrap()
        })
        .await
        .unwrap()
    }

    /// Runs kubectl, which must succeed, and returns what it printed.
    pub(crate) async fn ok(&self, args: &[&str]) -> String {
        self.ok_with(args, "").await
    }

    /// The same with a document on standard input.
    pub(crate) async fn ok_with(&self, args: &[&str], stdin: &str) -> String {
        let out = self.run_with(args, stdin).await;
        assert!(
            out.status.success(),
            "kubectl {args:?} failed:\n{}\n{}",
            String::from_utf8_lossy(&out.stdout),
            String::from_utf8_lossy(&out.stderr)
        );
        String::from_utf8(out.stdout).unwrap()
    }

    /// Runs kubectl, which must fail, and returns its complaint.
    pub(crate) async fn fails(&self, args: &[&str], stdin: &str) -> String {
        let out = self.run_with(args, stdin).await;
        assert!(
            !out.status.success(),
            "kubectl {args:?} succeeded:\n{}",
            String::from_utf8_lossy(&out.stdout)
        );
        String::from_utf8(out.stderr).unwrap()
    }
}

fn b64(text: &str) -> String {
    use base64::Engine;
    base64::engine::general_purpose::STANDARD.encode(text)
}

/// A kube client with shortcuts.
pub(crate) struct Client(pub(crate) kube::Client);

impl Client {
    pub(crate) async fn create_account(&self, namespace: &str, name: &str) {
        use k8s_openapi::api::core::v1::ServiceAccount;
        let api: kube::Api<ServiceAccount> = kube::Api::namespaced(self.0.clone(), namespace);
        let account = ServiceAccount {
            metadata: kube::core::ObjectMeta {
                name: Some(name.into()),
                ..Default::default()
            },
            ..Default::default()
        };
        match api.create(&Default::default(), &account).await {
            Ok(_) => {}
            Err(kube::Error::Api(e)) if e.code == 409 => {}
            Err(e) => panic!("creating account {namespace}/{name}: {e}"),
        }
    }
}
