//! Service account tokens: signing, verification, and the binding to pods and service accounts.
//!
//! Tokens are JWTs (RFC 7519) signed ES256 or RS256 by the server's key. A token is valid only while the service account (and
//! the pod or secret it is bound to) exists with the same uid; deletion of either ends it at once.

use std::collections::BTreeMap;

use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::rsa;
use aws_lc_rs::signature::{self, EcdsaKeyPair, KeyPair, UnparsedPublicKey};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde_json::{Value, json};
use sha2::Digest;
use time::OffsetDateTime;

use super::Identity;
use crate::server::{ApiServer, OpenError};
use crate::store::Store;

const MAX_CLOCK_SKEW_S: i64 = 10;

enum Key {
    Ec(Box<EcdsaKeyPair>),
    Rsa(Box<rsa::KeyPair>),
}

/// The key that signs service account tokens.
pub(crate) struct Signer {
    key: Key,
    kid: String,
    public: Vec<u8>,
}

impl Signer {
    /// Reads a PKCS#8, SEC1 or PKCS#1 key in PEM.
    pub(crate) fn from_pem(pem: &str) -> Result<Self, OpenError> {
        use rustls_pki_types::{PrivateKeyDer, pem::PemObject};
        let bad = |why: String| OpenError::Config(format!("service account signing key: {why}"));
        let der = PrivateKeyDer::from_pem_slice(pem.as_bytes()).map_err(|e| bad(e.to_string()))?;
        let alg = &signature::ECDSA_P256_SHA256_FIXED_SIGNING;
        let key = match &der {
            PrivateKeyDer::Pkcs8(k) => EcdsaKeyPair::from_pkcs8(alg, k.secret_pkcs8_der())
                .map(|k| Key::Ec(Box::new(k)))
                .or_else(|_| rsa::KeyPair::from_pkcs8(k.secret_pkcs8_der()).map(|k| Key::Rsa(Box::new(k)))),
            PrivateKeyDer::Sec1(k) => {
                EcdsaKeyPair::from_private_key_der(alg, k.secret_sec1_der()).map(|k| Key::Ec(Box::new(k)))
            }
            PrivateKeyDer::Pkcs1(k) => rsa::KeyPair::from_der(k.secret_pkcs1_der()).map(|k| Key::Rsa(Box::new(k))),
            _ => return Err(bad("unknown key format".into())),
        }
        .map_err(|e| bad(format!("want ECDSA P-256 or RSA of 2048 bits or more: {e}")))?;
        let public = match &key {
            Key::Ec(k) => k.public_key().as_ref().to_vec(),
            Key::Rsa(k) => {
                if k.public_modulus_len() < 256 {
                    return Err(bad("RSA keys must have 2048 bits or more".into()));
                }
                k.public_key().as_ref().to_vec()
            }
        };
        let kid = URL_SAFE_NO_PAD.encode(sha2::Sha256::digest(&public));
        Ok(Self { key, kid, public })
    }

    fn alg(&self) -> &'static str {
        match self.key {
            Key::Ec(_) => "ES256",
            Key::Rsa(_) => "RS256",
        }
    }

    /// Signs claims.
    pub(crate) fn sign(&self, claims: &Value) -> Result<String, String> {
        let header = json!({"alg": self.alg(), "kid": self.kid});
        let body = format!(
            "{}.{}",
            URL_SAFE_NO_PAD.encode(header.to_string()),
            URL_SAFE_NO_PAD.encode(claims.to_string())
        );
        let rng = SystemRandom::new();
        let signature = match &self.key {
            Key::Ec(k) => k
                .sign(&rng, body.as_bytes())
                .map_err(|_| "signing failed")?
                .as_ref()
                .to_vec(),
            Key::Rsa(k) => {
                let mut out = vec![0; k.public_modulus_len()];
                k.sign(&signature::RSA_PKCS1_SHA256, &rng, body.as_bytes(), &mut out)
                    .map_err(|_| "signing failed")?;
                out
            }
        };
        Ok(format!("{body}.{}", URL_SAFE_NO_PAD.encode(signature)))
    }

    /// Checks the signature and returns the claims. Nothing of the token is believed before.
    pub(crate) fn verify(&self, token: &str) -> Result<Value, String> {
        let mut parts = token.split('.');
        let (Some(h), Some(c), Some(s), None) = (parts.next(), parts.next(), parts.next(), parts.next()) else {
            return Err("not a JWT".into());
        };
        let decode = |s: &str| URL_SAFE_NO_PAD.decode(s).map_err(|_| "not base64url".to_owned());
        let header: Value = serde_json::from_slice(&decode(h)?).map_err(|_| "header is not JSON")?;
        if header["alg"].as_str() != Some(self.alg()) || header.get("crit").is_some() {
            return Err("algorithm is not the server's".into());
        }
        if header["kid"].as_str().is_some_and(|k| k != self.kid) {
            return Err("unknown key id".into());
        }
        let signed = &token.as_bytes()[..h.len() + 1 + c.len()];
        let signature = decode(s)?;
        let verified = match self.key {
            Key::Ec(_) => {
                UnparsedPublicKey::new(&signature::ECDSA_P256_SHA256_FIXED, &self.public).verify(signed, &signature)
            }
            Key::Rsa(_) => {
                UnparsedPublicKey::new(&signature::RSA_PKCS1_2048_8192_SHA256, &self.public).verify(signed, &signature)
            }
        };
        verified.map_err(|_| "signature does not verify".to_owned())?;
        serde_json::from_slice(&decode(c)?).map_err(|_| "claims are not JSON".into())
    }

    /// The public key as a JSON web key set.
    pub(crate) fn jwks(&self) -> Value {
        let b64 = |b: &[u8]| URL_SAFE_NO_PAD.encode(b);
        let key = match &self.key {
            Key::Ec(_) => json!({
                "use": "sig", "kty": "EC", "kid": self.kid, "crv": "P-256", "alg": "ES256",
                "x": b64(&self.public[1..33]), "y": b64(&self.public[33..65]),
            }),
            Key::Rsa(k) => json!({
                "use": "sig", "kty": "RSA", "kid": self.kid, "alg": "RS256",
                "n": b64(k.public_key().modulus().big_endian_without_leading_zero()),
                "e": b64(k.public_key().exponent().big_endian_without_leading_zero()),
            }),
        };
        json!({"keys": [key]})
    }
}

/// The object a token is bound to.
#[derive(Debug, Clone)]
pub(crate) struct Bound {
    pub(crate) kind: String,
    pub(crate) name: String,
    pub(crate) uid: String,
    /// Node of a bound pod.
    pub(crate) node: Option<(String, String)>,
}

/// Makes a token for a service account.
pub(crate) fn issue(
    server: &ApiServer,
    namespace: &str,
    name: &str,
    uid: &str,
    audiences: &[String],
    seconds: i64,
    bound: Option<&Bound>,
) -> Result<(String, OffsetDateTime), String> {
    let now = OffsetDateTime::now_utc();
    let expires = now + time::Duration::seconds(seconds);
    let mut private = json!({"namespace": namespace, "serviceaccount": {"name": name, "uid": uid}});
    if let Some(b) = bound {
        private[b.kind.to_lowercase()] = json!({"name": b.name, "uid": b.uid});
        if let Some((node, uid)) = &b.node {
            private["node"] = json!({"name": node, "uid": uid});
        }
    }
    let claims = json!({
        "aud": audiences,
        "exp": expires.unix_timestamp(),
        "iat": now.unix_timestamp(),
        "nbf": now.unix_timestamp(),
        "iss": server.config().issuer,
        "jti": crate::names::new_uid(),
        "kubernetes.io": private,
        "sub": format!("system:serviceaccount:{namespace}:{name}"),
    });
    Ok((server.signer().sign(&claims)?, expires))
}

/// Checks a token and that what it stands for still exists. Returns the identity and the accepted audiences.
pub(crate) fn authenticate(
    server: &ApiServer,
    token: &str,
    accepted: &[String],
) -> Result<(Identity, Vec<String>), String> {
    let claims = server.signer().verify(token)?;
    let now = OffsetDateTime::now_utc().unix_timestamp();
    if claims["iss"].as_str() != Some(&server.config().issuer) {
        return Err("issuer is not this cluster's".into());
    }
    let exp = claims["exp"].as_i64().ok_or("token has no expiry")?;
    if now >= exp {
        return Err("token has expired".into());
    }
    if claims["nbf"].as_i64().is_some_and(|nbf| now + MAX_CLOCK_SKEW_S < nbf) {
        return Err("token is not valid yet".into());
    }
    let audiences: Vec<String> = match &claims["aud"] {
        Value::String(s) => vec![s.clone()],
        Value::Array(a) => a.iter().filter_map(|v| v.as_str().map(str::to_owned)).collect(),
        _ => vec![],
    };
    let matching: Vec<String> = audiences.into_iter().filter(|a| accepted.contains(a)).collect();
    if matching.is_empty() {
        return Err("token audiences are not accepted here".into());
    }
    let private = &claims["kubernetes.io"];
    let text = |v: &Value| v.as_str().map(str::to_owned).unwrap_or_default();
    let (ns, name, uid) = (
        text(&private["namespace"]),
        text(&private["serviceaccount"]["name"]),
        text(&private["serviceaccount"]["uid"]),
    );
    if claims["sub"].as_str() != Some(&format!("system:serviceaccount:{ns}:{name}")) || ns.is_empty() || name.is_empty()
    {
        return Err("subject is no service account".into());
    }
    still_there(server.store(), "serviceaccounts", &ns, &name, &uid)?;
    let mut extra = BTreeMap::new();
    if let Some(jti) = claims["jti"].as_str() {
        extra.insert(
            "authentication.kubernetes.io/credential-id".to_owned(),
            vec![format!("JTI={jti}")],
        );
    }
    if private["pod"].is_object() {
        let (pod, pod_uid) = (text(&private["pod"]["name"]), text(&private["pod"]["uid"]));
        still_there(server.store(), "pods", &ns, &pod, &pod_uid)?;
        extra.insert("authentication.kubernetes.io/pod-name".into(), vec![pod]);
        extra.insert("authentication.kubernetes.io/pod-uid".into(), vec![pod_uid]);
    }
    if private["secret"].is_object() {
        still_there(
            server.store(),
            "secrets",
            &ns,
            &text(&private["secret"]["name"]),
            &text(&private["secret"]["uid"]),
        )?;
    }
    if let Some(node) = private["node"]["name"].as_str() {
        extra.insert("authentication.kubernetes.io/node-name".into(), vec![node.to_owned()]);
        if let Some(uid) = private["node"]["uid"].as_str() {
            extra.insert("authentication.kubernetes.io/node-uid".into(), vec![uid.to_owned()]);
        }
    }
    let identity = Identity {
        username: format!("system:serviceaccount:{ns}:{name}"),
        uid,
        groups: vec![
            "system:serviceaccounts".into(),
            format!("system:serviceaccounts:{ns}"),
            "system:authenticated".into(),
        ],
        extra,
    };
    Ok((identity, matching))
}

fn still_there(store: &dyn Store, plural: &str, namespace: &str, name: &str, uid: &str) -> Result<(), String> {
    let what = plural.trim_end_matches('s');
    let (entry, _) = store
        .get(&format!("/core/{plural}/{namespace}/{name}"))
        .map_err(|e| e.to_string())?;
    let entry = entry.ok_or_else(|| format!("{what} {namespace}/{name} does not exist any more"))?;
    let object: Value = serde_json::from_slice(&entry.value).map_err(|e| e.to_string())?;
    if crate::meta::text(&object, "uid") != uid || uid.is_empty() {
        return Err(format!(
            "{what} {namespace}/{name} is another one than the token was made for"
        ));
    }
    // A deleted pod's token stays good for its grace period, so that it can say goodbye.
    if let Some(deleted) = crate::meta::parse_time(crate::meta::text(&object, "deletionTimestamp"))
        && deleted + time::Duration::seconds(60) < OffsetDateTime::now_utc()
    {
        return Err(format!("{what} {namespace}/{name} has been deleted"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn server(dir: &tempfile::TempDir) -> std::sync::Arc<ApiServer> {
        let key = rcgen::KeyPair::generate().unwrap();
        let config = crate::Config::new(dir.path().join("store.redb"), "", key.serialize_pem());
        ApiServer::open(config).await.unwrap()
    }

    #[tokio::test]
    async fn only_good_claims_are_believed() {
        let dir = tempfile::tempdir().unwrap();
        let server = server(&dir).await;
        let account = json!({"metadata": {"name": "a", "namespace": "n", "uid": "u"}});
        let txn = crate::store::Txn::create("/core/serviceaccounts/n/a", account.to_string().into());
        server.store().commit(txn).await.unwrap();
        let now = OffsetDateTime::now_utc().unix_timestamp();
        let good = json!({"iss": server.config().issuer, "aud": ["x"], "exp": now + 600, "nbf": now, "sub": "system:serviceaccount:n:a",
            "kubernetes.io": {"namespace": "n", "serviceaccount": {"name": "a", "uid": "u"}}});
        let accepted = ["x".to_owned()];
        let ask = |claims: &Value| authenticate(&server, &server.signer().sign(claims).unwrap(), &accepted);
        assert_eq!(ask(&good).unwrap().0.username, "system:serviceaccount:n:a");
        for (path, value, why) in [
            ("/exp", json!(now), "expired"),
            ("/exp", json!("soon"), "no expiry"),
            ("/exp", Value::Null, "no expiry"),
            ("/nbf", json!(now + 60), "not valid yet"),
            ("/iss", json!("https://elsewhere"), "issuer"),
            ("/aud", json!(["y"]), "audiences"),
            ("/aud", Value::Null, "audiences"),
            ("/sub", json!("system:serviceaccount:n:other"), "subject"),
            ("/kubernetes.io/serviceaccount/uid", json!("v"), "another one"),
            ("/kubernetes.io/serviceaccount/uid", json!(""), "another one"),
            ("/kubernetes.io/namespace", json!("kube-system"), "subject"),
            ("/kubernetes.io", json!({}), "subject"),
        ] {
            let mut claims = good.clone();
            *claims.pointer_mut(path).unwrap() = value;
            let e = ask(&claims).unwrap_err();
            assert!(e.contains(why), "{path}: {e}");
        }
        let mut bound = good.clone();
        bound["kubernetes.io"]["pod"] = json!({"name": "gone", "uid": "x"});
        assert!(ask(&bound).unwrap_err().contains("does not exist any more"));
    }

    #[tokio::test]
    async fn only_the_servers_signature_counts() {
        let dir = tempfile::tempdir().unwrap();
        let server = server(&dir).await;
        let other = Signer::from_pem(&rcgen::KeyPair::generate().unwrap().serialize_pem()).unwrap();
        let claims = json!({"sub": "x"});
        let own = server.signer().sign(&claims).unwrap();
        assert_eq!(server.signer().verify(&own).unwrap(), claims);
        assert!(server.signer().verify(&other.sign(&claims).unwrap()).is_err());
        let parts: Vec<&str> = own.split('.').collect();
        let header = |h: Value| URL_SAFE_NO_PAD.encode(h.to_string());
        for forged in [
            format!("{}.{}.", header(json!({"alg": "none"})), parts[1]),
            format!("{}.{}.{}", header(json!({"alg": "HS256"})), parts[1], parts[2]),
            format!(
                "{}.{}.{}",
                header(json!({"alg": "ES256", "crit": ["x"]})),
                parts[1],
                parts[2]
            ),
            format!(
                "{}.{}.{}",
                parts[0],
                URL_SAFE_NO_PAD.encode("{\"sub\":\"y\"}"),
                parts[2]
            ),
            format!("{}.{}", parts[0], parts[1]),
            format!("{own}.x"),
            "..".into(),
        ] {
            assert!(server.signer().verify(&forged).is_err(), "{forged}");
        }
        // The published key is the one that verifies.
        let jwk = &server.signer().jwks()["keys"][0];
        let decode = |f: &str| URL_SAFE_NO_PAD.decode(jwk[f].as_str().unwrap()).unwrap();
        let point = [vec![4], decode("x"), decode("y")].concat();
        let (signed, signature) = own.rsplit_once('.').unwrap();
        let signature = URL_SAFE_NO_PAD.decode(signature).unwrap();
        UnparsedPublicKey::new(&signature::ECDSA_P256_SHA256_FIXED, point)
            .verify(signed.as_bytes(), &signature)
            .unwrap();
    }
}
