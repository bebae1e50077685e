//! Secrets (SDS).

use envoy_types::pb::envoy::config::core::v3::DataSource;
use envoy_types::pb::envoy::config::core::v3::data_source::Specifier;
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::{
    CertificateValidationContext, Secret as Proto, TlsCertificate, secret,
};
use mantlet_model::Secret;
use mantlet_model::secret::{KeyBytes, SecretValue};

use crate::wire::{At, Result, done, fault};

fn bytes(content: &[u8]) -> Option<DataSource> {
    Some(DataSource {
        specifier: Some(Specifier::InlineBytes(content.to_vec())),
        ..DataSource::default()
    })
}

fn take_bytes(field: &mut Option<DataSource>, name: &str) -> Result<Vec<u8>> {
    let Some(mut source) = field.take() else {
        return fault(name, "missing");
    };
    let content = match source.specifier.take() {
        Some(Specifier::InlineBytes(bytes)) => bytes,
        Some(Specifier::InlineString(text)) => text.into_bytes(),
        _ => return fault(name, "only inline content is supported"),
    };
    done(source).at(name)?;
    Ok(content)
}

pub(crate) fn encode(model: &Secret) -> Proto {
    let value = match &model.value {
        SecretValue::KeyPair { chain, key } => secret::Type::TlsCertificate(TlsCertificate {
            certificate_chain: bytes(chain),
            private_key: bytes(key.expose()),
            ..TlsCertificate::default()
        }),
        SecretValue::TrustBundle(pem) => secret::Type::ValidationContext(CertificateValidationContext {
            trusted_ca: bytes(pem),
            ..CertificateValidationContext::default()
        }),
    };
    Proto {
        name: model.name.clone(),
        r#type: Some(value),
    }
}

pub(crate) fn decode(proto: Proto) -> Result<Secret> {
    let value = match proto.r#type {
        Some(secret::Type::TlsCertificate(mut certificate)) => {
            let chain = take_bytes(&mut certificate.certificate_chain, "tls_certificate.certificate_chain")?;
            let key = take_bytes(&mut certificate.private_key, "tls_certificate.private_key")?;
            done(certificate).at("tls_certificate")?;
            SecretValue::KeyPair {
                chain,
                key: KeyBytes::new(key),
            }
        }
        Some(secret::Type::ValidationContext(mut context)) => {
            let pem = take_bytes(&mut context.trusted_ca, "validation_context.trusted_ca")?;
            done(context).at("validation_context")?;
            SecretValue::TrustBundle(pem)
        }
        Some(secret::Type::GenericSecret(_)) => return fault("generic_secret", "not supported"),
        Some(secret::Type::SessionTicketKeys(_)) => return fault("session_ticket_keys", "not supported"),
        None => return fault("type", "missing"),
    };
    Ok(Secret {
        name: proto.name,
        value,
    })
}
