//! The cluster's own keys: CA, server certificate, admin client certificate, service account key.
//!
//! Made once by `up`, all below `pki/` with mode 0600. The CA key never enters the cluster process's configuration; it
//! stays in the directory only so that certificates that run out can be renewed by the next `up`.

use std::path::Path;

use anyhow::{Context, Result};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    SanType,
};
use time::{Duration, OffsetDateTime};

use super::paths::write_private;

/// Certificates are renewed by `up` when they end within this time.
const RENEW_BEFORE: Duration = Duration::days(30);
const LEAF_LIFE: Duration = Duration::days(365);
const CA_LIFE: Duration = Duration::days(3650);

/// Names and addresses under which the API server is reached.
const SERVER_NAMES: [&str; 6] = [
    "localhost",
    "kubernetes",
    "kubernetes.default",
    "kubernetes.default.svc",
    "kubernetes.default.svc.cluster.local",
    "mantlet",
];
const SERVER_ADDRESSES: [[u8; 4]; 3] = [[127, 0, 0, 1], [10, 96, 0, 1], [10, 244, 0, 1]];

/// The texts, PEM.
#[derive(Clone)]
pub struct Pki {
    /// CA certificate, for clients of the API and for verifying theirs.
    pub ca_cert: String,
    /// Server certificate.
    pub server_cert: String,
    /// Server key.
    pub server_key: String,
    /// Client certificate of group `system:masters`.
    pub admin_cert: String,
    /// Its key.
    pub admin_key: String,
    /// Key that signs service account tokens.
    pub sa_key: String,
}

/// Reads what is there, makes what is missing or about to run out.
///
/// # Errors
/// A file cannot be read, written or understood.
pub fn ensure(dir: &Path, now: OffsetDateTime) -> Result<Pki> {
    std::fs::create_dir_all(dir).with_context(|| format!("making {}", dir.display()))?;
    let (ca_cert, ca_key) = match (read(dir, "ca.crt")?, read(dir, "ca.key")?) {
        (Some(cert), Some(key)) => (cert, key),
        _ => make_ca(dir, now)?,
    };
    let key = KeyPair::from_pem(&ca_key).with_context(|| damaged(dir, "ca.key"))?;
    let issuer = Issuer::from_ca_cert_pem(&ca_cert, key).with_context(|| damaged(dir, "ca.crt"))?;
    let (server_cert, server_key) = leaf(dir, "apiserver", &issuer, server_params(now)?, now)?;
    let (admin_cert, admin_key) = leaf(dir, "admin", &issuer, admin_params(now)?, now)?;
    let sa_key = match read(dir, "sa.key")? {
        Some(key) => key,
        None => {
            let key = KeyPair::generate()?.serialize_pem();
            write_private(&dir.join("sa.key"), key.as_bytes())?;
            key
        }
    };
    Ok(Pki {
        ca_cert,
        server_cert,
        server_key,
        admin_cert,
        admin_key,
        sa_key,
    })
}

/// Reads all of it without making anything: what the cluster process does.
///
/// # Errors
/// A file is missing or cannot be read.
pub fn load(dir: &Path) -> Result<Pki> {
    let get = |name: &str| read(dir, name)?.with_context(|| format!("{} is missing", dir.join(name).display()));
    Ok(Pki {
        ca_cert: get("ca.crt")?,
        server_cert: get("apiserver.crt")?,
        server_key: get("apiserver.key")?,
        admin_cert: get("admin.crt")?,
        admin_key: get("admin.key")?,
        sa_key: get("sa.key")?,
    })
}

fn damaged(dir: &Path, name: &str) -> String {
    format!(
        "{} is damaged; `mantlet cluster down --purge` removes it with the cluster's state",
        dir.join(name).display()
    )
}

fn read(dir: &Path, name: &str) -> Result<Option<String>> {
    let path = dir.join(name);
    match std::fs::read_to_string(&path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).with_context(|| format!("reading {}", path.display())),
    }
}

fn make_ca(dir: &Path, now: OffsetDateTime) -> Result<(String, String)> {
    let key = KeyPair::generate()?;
    let mut params = params(now, CA_LIFE)?;
    params.distinguished_name.push(DnType::CommonName, "mantlet cluster CA");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![
        KeyUsagePurpose::KeyCertSign,
        KeyUsagePurpose::CrlSign,
        KeyUsagePurpose::DigitalSignature,
    ];
    let cert = params.self_signed(&key)?.pem();
    let key = key.serialize_pem();
    write_private(&dir.join("ca.key"), key.as_bytes())?;
    write_private(&dir.join("ca.crt"), cert.as_bytes())?;
    Ok((cert, key))
}

fn params(now: OffsetDateTime, life: Duration) -> Result<CertificateParams> {
    let mut params = CertificateParams::new(Vec::new())?;
    params.distinguished_name = rcgen::DistinguishedName::new();
    // Clocks differ a little even on one machine's containers.
    params.not_before = now - Duration::minutes(5);
    params.not_after = now + life;
    Ok(params)
}

fn server_params(now: OffsetDateTime) -> Result<CertificateParams> {
    let mut params = params(now, LEAF_LIFE)?;
    params.distinguished_name.push(DnType::CommonName, "kube-apiserver");
    for name in SERVER_NAMES {
        params.subject_alt_names.push(SanType::DnsName(name.try_into()?));
    }
    for address in SERVER_ADDRESSES {
        params.subject_alt_names.push(SanType::IpAddress(address.into()));
    }
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    Ok(params)
}

fn admin_params(now: OffsetDateTime) -> Result<CertificateParams> {
    let mut params = params(now, LEAF_LIFE)?;
    params
        .distinguished_name
        .push(DnType::OrganizationName, "system:masters");
    params.distinguished_name.push(DnType::CommonName, "kubernetes-admin");
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
    Ok(params)
}

fn leaf(
    dir: &Path,
    name: &str,
    issuer: &Issuer<'_, KeyPair>,
    params: CertificateParams,
    now: OffsetDateTime,
) -> Result<(String, String)> {
    let (cert_name, key_name) = (format!("{name}.crt"), format!("{name}.key"));
    if let (Some(cert), Some(key)) = (read(dir, &cert_name)?, read(dir, &key_name)?)
        && end_of(&cert).with_context(|| damaged(dir, &cert_name))? > now + RENEW_BEFORE
    {
        return Ok((cert, key));
    }
    let key = KeyPair::generate()?;
    let cert = params.signed_by(&key, issuer)?.pem();
    let key = key.serialize_pem();
    write_private(&dir.join(key_name), key.as_bytes())?;
    write_private(&dir.join(cert_name), cert.as_bytes())?;
    Ok((cert, key))
}

fn end_of(cert: &str) -> Result<OffsetDateTime> {
    let (_, pem) = x509_parser::pem::parse_x509_pem(cert.as_bytes())?;
    let cert = pem.parse_x509()?;
    Ok(OffsetDateTime::from_unix_timestamp(
        cert.validity().not_after.timestamp(),
    )?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn files_are_private_kept_and_renewed() {
        let dir = tempfile::tempdir().expect("a directory");
        let now = OffsetDateTime::now_utc();
        let first = ensure(dir.path(), now).expect("made");
        for entry in std::fs::read_dir(dir.path()).expect("readable") {
            let entry = entry.expect("an entry");
            let mode = entry.metadata().expect("metadata").permissions().mode();
            assert_eq!(mode & 0o777, 0o600, "{:?}", entry.path());
        }
        let again = ensure(dir.path(), now + Duration::days(1)).expect("kept");
        assert_eq!((&first.server_cert, &first.sa_key), (&again.server_cert, &again.sa_key));
        let later = ensure(dir.path(), now + Duration::days(340)).expect("renewed");
        assert_ne!(first.admin_cert, later.admin_cert);
        assert_eq!((&first.ca_cert, &first.sa_key), (&later.ca_cert, &later.sa_key));
    }

    #[test]
    fn a_damaged_file_says_what_to_do() {
        let dir = tempfile::tempdir().expect("a directory");
        ensure(dir.path(), OffsetDateTime::now_utc()).expect("made");
        std::fs::write(dir.path().join("apiserver.crt"), "junk").expect("writable");
        let error = ensure(dir.path(), OffsetDateTime::now_utc()).err().expect("refused");
        assert!(format!("{error:#}").contains("--purge"), "{error:#}");
    }
}
