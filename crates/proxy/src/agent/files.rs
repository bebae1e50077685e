//! Certificates, keys and roots in files, which DestinationRules and servers may name (`file-cert:CERT~KEY`, `file-root:FILE`,
//! `file-root:system`, S1.114).
//!
//! `xds` says which names its configuration holds; the files are read here, again and again, since they are replaced in place
//! when certificates are renewed. What cannot be read stays as it was, or is absent: then the connections that need it fail.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Read;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use mantlet_identity::TrustBundle;
use mantlet_model::secret::{KeyBytes, Secret, SecretValue};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use tokio::sync::watch;
use zeroize::Zeroizing;

use crate::secrets::Secrets;
use crate::worker::Shared;

/// Time between two looks.
const INTERVAL: Duration = Duration::from_secs(5);
/// Largest file.
const MAX_FILE: u64 = 1 << 20;
/// How names of roots in files begin.
const ROOT: &str = "file-root:";
/// How names of key pairs in files begin.
const PAIR: &str = "file-cert:";
/// The roots of the operating system.
const SYSTEM: &str = "file-root:system";
/// Where systems keep them, as in Istio's list.
const SYSTEM_FILES: [&str; 6] = [
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/pki/tls/cacert.pem",
    "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",
    "/etc/ssl/cert.pem",
];

/// Whether a secret of this name is in files.
pub fn is_file(name: &str) -> bool {
    name.starts_with(ROOT) || name.starts_with(PAIR)
}

/// Starts reading: send the names that are wanted. It ends with its user.
pub fn start(shared: Arc<Shared>) -> watch::Sender<BTreeSet<String>> {
    let (names, wanted) = watch::channel(BTreeSet::new());
    tokio::spawn(run(wanted, shared));
    names
}

async fn run(mut wanted: watch::Receiver<BTreeSet<String>>, shared: Arc<Shared>) {
    let mut files = Files::default();
    loop {
        let names = wanted.borrow_and_update().clone();
        let again = if names.is_empty() {
            Duration::from_secs(3600)
        } else {
            let shared = shared.clone();
            // Disks may be slow, and a network's file system may hang.
            files = match tokio::task::spawn_blocking(move || {
                files.look(&names, &shared.secrets);
                files
            })
            .await
            {
                Ok(files) => files,
                Err(error) => {
                    tracing::error!(target: "secrets", "reading certificate files: {error}");
                    Files::default()
                }
            };
            INTERVAL
        };
        tokio::select! {
            changed = wanted.changed() => if changed.is_err() { return },
            () = tokio::time::sleep(again) => {}
        }
    }
}

/// The bytes behind a name: one file, or certificate and key.
type Content = Vec<Zeroizing<Vec<u8>>>;

/// What was read last.
#[derive(Default)]
struct Files {
    content: BTreeMap<String, Result<Content, String>>,
}

impl Files {
    /// Reads all names; what is new or different goes to the store, errors that are new to the log.
    fn look(&mut self, names: &BTreeSet<String>, secrets: &Secrets) {
        self.content.retain(|name, _| names.contains(name));
        for name in names {
            let found = read(name);
            if self.content.get(name) == Some(&found) {
                continue;
            }
            let kept = found.and_then(|content| store(name, &content, secrets).map(|()| content));
            if let Err(error) = &kept
                && self.content.get(name) != Some(&kept)
            {
                tracing::warn!(target: "secrets", "{name}: {error}");
            }
            self.content.insert(name.clone(), kept);
        }
    }
}

fn read(name: &str) -> Result<Content, String> {
    if name == SYSTEM {
        let found = SYSTEM_FILES.iter().find(|path| Path::new(path).is_file());
        return Ok(vec![file(found.ok_or("the system has no file of trust anchors")?)?]);
    }
    if let Some(path) = name.strip_prefix(ROOT) {
        return Ok(vec![file(path)?]);
    }
    let files = name.strip_prefix(PAIR).and_then(|files| files.split_once('~'));
    let (chain, key) = files.ok_or("not of the form file-cert:CERTIFICATE~KEY")?;
    Ok(vec![file(chain)?, file(key)?])
}

fn store(name: &str, content: &[Zeroizing<Vec<u8>>], secrets: &Secrets) -> Result<(), String> {
    if name == SYSTEM {
        let certificates = content.iter().flat_map(|pem| CertificateDer::pem_slice_iter(pem));
        let certificates = certificates.filter_map(Result::ok);
        let bundle = TrustBundle::from_system(certificates).ok_or("no usable trust anchor")?;
        secrets.set_bundle(name, bundle);
        return Ok(());
    }
    let value = match content {
        [roots] => SecretValue::TrustBundle(roots.to_vec()),
        [chain, key] => SecretValue::KeyPair {
            chain: chain.to_vec(),
            key: KeyBytes::new(key.to_vec()),
        },
        _ => return Err("nothing was read".to_string()),
    };
    let secret = Secret {
        name: name.to_string(),
        value,
    };
    secrets.set_named(&[secret]).map_err(|e| e.to_string())
}

fn file(path: &str) -> Result<Zeroizing<Vec<u8>>, String> {
    let open = std::fs::File::open(path).map_err(|e| format!("{path}: {e}"))?;
    let mut bytes = Zeroizing::new(Vec::new());
    open.take(MAX_FILE + 1)
        .read_to_end(&mut bytes)
        .map_err(|e| format!("{path}: {e}"))?;
    if bytes.len() as u64 > MAX_FILE {
        return Err(format!("{path}: larger than {MAX_FILE} bytes"));
    }
    Ok(bytes)
}
