//! What the fuzz targets check, as plain functions; `make fuzz` runs them under libFuzzer.

use std::collections::BTreeMap;

use mantlet_differential::normalize;
use mantlet_differential::world::Normalization;
use mantlet_identity::jws::{KeySet, Token};
use mantlet_model::authz::Engine;
use mantlet_model::http::PathNormalization;
use mantlet_proxy::sniff::{Inspect, sniff};
use mantlet_translate::authz::{Form, Target, filters, problems};
use mantlet_translate::mesh::Mesh;
use mantlet_translate::world::{Kind, World};
use mantlet_xds::{Any, ResourceType, decode, encode};

/// YAML → validation → translation: no panic, and what comes out can be compiled.
pub(crate) fn policies(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let Ok(objects) = mantlet_api::yaml::read_all(text) else {
        return;
    };
    let mut world = World::new(Mesh::default());
    for object in objects.iter().take(50) {
        let _ = mantlet_api::validate::object(object);
        let kind = object["kind"].as_str().and_then(Kind::by_name);
        if let (Some(kind), true) = (kind, object.is_object()) {
            world.set_config(kind, object);
        }
    }
    let labels = BTreeMap::from([("app".to_string(), "web".to_string())]);
    for namespace in ["default", "istio-system"] {
        let target = Target {
            namespace,
            labels: &labels,
            gateway: false,
        };
        for form in [Form::Http, Form::Tcp] {
            let _ = Engine::new(&filters(&world, target, form));
        }
        for policy in world.authorization_policies(namespace) {
            let _ = problems(&world, policy);
        }
        let _ = mantlet_translate::request_authentication::authentication(&world, target);
    }
}

/// A token, then a newline, then a key set: whatever is no token is refused, and nothing unsigned is accepted.
pub(crate) fn token(data: &[u8]) {
    let split = data.iter().position(|b| *b == b'\n').unwrap_or(data.len());
    let keys = KeySet::parse(data.get(split + 1..).unwrap_or_default());
    let Ok(text) = std::str::from_utf8(&data[..split]) else {
        return;
    };
    let Ok(token) = Token::parse(text) else { return };
    let _ = token.check_time(1_700_000_000);
    let _ = token.check_audience(&["web".to_string()]);
    if let Ok(keys) = keys
        && token.verify(&keys).is_ok()
    {
        assert!(keys.len() > 0, "a signature without a key");
        assert!(
            text.rsplit('.').next().is_some_and(|s| !s.is_empty()),
            "an empty signature"
        );
    }
}

/// First byte: the mode. The normal form has no dot segments, and the naive reading finds the same one.
pub(crate) fn path(data: &[u8]) {
    use PathNormalization as Mode;
    let Some((mode, path)) = data.split_first() else { return };
    let Ok(path) = std::str::from_utf8(path) else { return };
    if path.contains(['?', '#']) {
        return;
    }
    let (mode, naive) = match mode % 4 {
        0 => (Mode::None, Normalization::None),
        1 => (Mode::Base, Normalization::Base),
        2 => (Mode::MergeSlashes, Normalization::MergeSlashes),
        _ => (Mode::DecodeAndMergeSlashes, Normalization::DecodeAndMergeSlashes),
    };
    let Ok(normal) = mantlet_proxy::path::normalize(path, mode) else {
        return;
    };
    if path == "*" {
        return;
    }
    assert!(normal.starts_with('/'));
    if mode != Mode::None {
        assert!(!normal.contains('\\'));
        assert!(
            !normal.split('/').any(|s| s == "." || s == ".."),
            "{path:?} became {normal:?}"
        );
    }
    let expected = normalize::target(path.as_bytes(), naive).map(|(path, _)| path);
    assert_eq!(Some(normal.as_bytes()), expected.as_deref(), "{path:?} in {mode:?}");
}

/// First byte: the type. Bytes that decode are the same after another trip over the wire.
pub(crate) fn wire(data: &[u8]) {
    let Some((kind, bytes)) = data.split_first() else {
        return;
    };
    let kind = ResourceType::ALL[usize::from(*kind) % ResourceType::ALL.len()];
    let any = Any {
        type_url: kind.url().into(),
        value: bytes.to_vec(),
    };
    let options = encode::Options::new(encode::Dialect::Istio);
    match kind {
        ResourceType::Listener => {
            if let Ok(model) = decode::listener(&any) {
                let again = decode::listener(&encode::listener(&model, &options));
                assert_eq!(again.as_ref(), Ok(&model));
            }
        }
        ResourceType::Routes => {
            if let Ok(model) = decode::route_table(&any) {
                assert_eq!(decode::route_table(&encode::route_table(&model, &options)), Ok(model));
            }
        }
        ResourceType::Cluster => {
            if let Ok(model) = decode::cluster(&any) {
                assert_eq!(decode::cluster(&encode::cluster(&model, &options)), Ok(model));
            }
        }
        ResourceType::Endpoints => {
            if let Ok(model) = decode::endpoints(&any) {
                assert_eq!(decode::endpoints(&encode::endpoints(&model, &options)), Ok(model));
            }
        }
        ResourceType::VirtualHosts => {
            if let Ok(model) = decode::virtual_host(&any) {
                assert_eq!(decode::virtual_host(&encode::virtual_host(&model)), Ok(model));
            }
        }
        ResourceType::Destinations => {
            if let Ok(model) = decode::destinations(&any) {
                assert_eq!(decode::destinations(&encode::destinations(&model)), Ok(model));
            }
        }
        ResourceType::Secret => {
            let _ = decode::secret(&any);
        }
    }
}

/// The first bytes of a connection, in pieces of the size that the first byte says.
pub(crate) fn hello(data: &[u8]) {
    let Some((size, bytes)) = data.split_first() else {
        return;
    };
    let Ok(runtime) = tokio::runtime::Builder::new_current_thread().build() else {
        return;
    };
    let inspect = Inspect { tls: true, http: true };
    runtime.block_on(async {
        let mut whole = bytes::BytesMut::new();
        let mut stream = bytes;
        let _ = sniff(&mut stream, inspect, &mut whole).await;
        let (mut writer, mut reader) = tokio::io::duplex(usize::from(*size).max(1));
        let mut pieces = bytes::BytesMut::new();
        let (_, _) = tokio::join!(sniff(&mut reader, inspect, &mut pieces), async {
            use tokio::io::AsyncWriteExt;
            // The reader may have seen enough; then the rest stays.
            let written = writer.write_all(bytes);
            let _ = tokio::select! {
                biased;
                done = written => done,
                () = tokio::task::yield_now() => Ok(()),
            };
            drop(writer);
        });
        assert!(
            bytes.starts_with(&whole) && bytes.starts_with(&pieces),
            "bytes that nobody sent"
        );
    });
}
