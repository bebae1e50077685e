//! Laws of the conversions, over values of the whole model.

mod authz;
pub(crate) mod generate;
mod strict;

use mantlet_model::authz::canonical_filter;
use mantlet_model::listener::{FilterChain, Filters};
use mantlet_model::secret::{KeyBytes, Secret, SecretValue};
use mantlet_model::{Listener, RouteTable};
use proptest::prelude::*;

use crate::encode::{Dialect, Options};
use crate::{decode, encode};

fn istio() -> Options {
    Options::new(Dialect::Istio)
}

/// The spelling that comes back from the wire: authorization canonical, everything else as it was.
fn canonical(mut listener: Listener) -> Listener {
    let chain = |chain: &mut FilterChain| {
        let (custom, authz) = match &mut chain.filters {
            Filters::Http(http) => (&mut http.custom, &mut http.authz),
            Filters::Tcp(tcp) => (&mut tcp.custom, &mut tcp.authz),
        };
        for stage in custom {
            stage.rules = canonical_filter(&stage.selector()).rules;
        }
        for filter in authz {
            *filter = canonical_filter(filter);
        }
    };
    listener.chains.iter_mut().for_each(chain);
    listener.default_chain.iter_mut().for_each(chain);
    listener
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn listeners_come_back(listener in generate::listener()) {
        let any = encode::listener(&listener, &istio());
        prop_assert_eq!(decode::listener(&any).unwrap(), canonical(listener));
    }

    #[test]
    fn route_tables_come_back(table in generate::route_table()) {
        let back: RouteTable = decode::route_table(&encode::route_table(&table, &istio())).unwrap();
        prop_assert_eq!(back, table);
    }

    #[test]
    fn clusters_come_back(cluster in generate::cluster()) {
        prop_assert_eq!(decode::cluster(&encode::cluster(&cluster, &istio())).unwrap(), cluster);
    }

    #[test]
    fn endpoints_come_back(endpoints in generate::endpoints()) {
        prop_assert_eq!(decode::endpoints(&encode::endpoints(&endpoints, &istio())).unwrap(), endpoints);
    }

    #[test]
    fn secrets_come_back(name in "[a-z/:-]{1,20}", a in any::<Vec<u8>>(), b in any::<Vec<u8>>(), kind in 0..2) {
        let value = match kind {
            0 => SecretValue::KeyPair { chain: a, key: KeyBytes::new(b) },
            _ => SecretValue::TrustBundle(a),
        };
        let secret = Secret { name, value };
        prop_assert!(decode::secret(&encode::secret(&secret)).unwrap() == secret);
    }

    /// Nor do valid resources with a few bytes changed.
    #[test]
    fn decoding_survives_damage(
        listener in generate::listener(),
        damage in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
    ) {
        let mut any = encode::listener(&listener, &istio());
        for (index, byte) in damage {
            let at = index.index(any.value.len());
            any.value[at] = byte;
        }
        let _ = decode::listener(&any);
    }

    /// Whatever bytes a peer sends, decoding ends with a value or an error.
    #[test]
    fn decoding_never_panics(bytes in any::<Vec<u8>>()) {
        for kind in crate::ResourceType::ALL {
            let any = crate::Any { type_url: kind.url().into(), value: bytes.clone() };
            let _ = (decode::listener(&any), decode::route_table(&any), decode::cluster(&any));
            let _ = (decode::endpoints(&any), decode::secret(&any));
        }
    }
}

#[test]
fn versions_are_of_the_content() {
    use std::sync::Arc;

    use crate::{ResourceSet, ResourceType};
    let listener = generate::sample(generate::listener_with_http());
    let mut other = listener.clone();
    other.detection_timeout_ms += 1;
    let set = |listener: &Listener, previous| {
        let mut snapshot = mantlet_model::ProxySnapshot::default();
        snapshot
            .listeners
            .insert(listener.name.clone(), Arc::new(listener.clone()));
        ResourceSet::new(&snapshot, [], &istio(), previous)
    };
    let version = |set: &ResourceSet| {
        set.get(ResourceType::Listener, &listener.name)
            .unwrap()
            .version()
            .to_string()
    };
    let first = set(&listener, None);
    // Protobuf maps have no order; the version does not depend on it.
    for _ in 0..8 {
        assert_eq!(version(&set(&listener, None)), version(&first));
    }
    let second = set(&listener, Some(&first));
    let kept = |s: &ResourceSet| s.get(ResourceType::Listener, &listener.name).unwrap().clone();
    assert!(
        Arc::ptr_eq(&kept(&second), &kept(&first)),
        "equal content is not encoded again"
    );
    assert_ne!(version(&set(&other, Some(&first))), version(&first));
}
