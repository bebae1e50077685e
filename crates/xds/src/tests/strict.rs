//! What the model has no place for is refused by name.

use envoy_types::pb::envoy::config::cluster::v3::Cluster as Proto;
use envoy_types::pb::envoy::config::core::v3::HealthCheck;
use envoy_types::pb::envoy::config::listener::v3::{Filter, FilterChain, Listener as ProtoListener, filter};
use envoy_types::pb::envoy::extensions::filters::http::cors::v3::Cors;
use envoy_types::pb::envoy::extensions::filters::network::echo::v3::Echo;
use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3::{
    HttpConnectionManager, HttpFilter, http_filter,
};
use prost::Message;

use super::{generate, istio};
use crate::wire::pack;
use crate::{Any, decode, encode};

#[test]
fn unknown_fields_of_known_messages_are_named() {
    let cluster = generate::sample(generate::cluster());
    let mut proto = Proto::decode(encode::cluster(&cluster, &istio()).value.as_slice()).unwrap();
    proto.health_checks.push(HealthCheck::default());
    proto.ignore_health_on_host_removal = true;
    let error = decode::cluster(&pack(&proto)).unwrap_err().to_string();
    assert!(
        error.contains("health_checks, ignore_health_on_host_removal not supported"),
        "{error}"
    );
}

#[test]
fn field_numbers_of_the_future_are_refused() {
    let cluster = generate::sample(generate::cluster());
    let mut any = encode::cluster(&cluster, &istio());
    // Field 900, a varint.
    prost::encoding::encode_key(900, prost::encoding::WireType::Varint, &mut any.value);
    any.value.push(1);
    let error = decode::cluster(&any).unwrap_err().to_string();
    assert!(error.contains("field 900"), "{error}");
}

#[test]
fn unknown_filters_are_named() {
    let listener = generate::sample(generate::listener_with_http());
    let any = encode::listener(&listener, &istio());

    let mut proto = ProtoListener::decode(any.value.as_slice()).unwrap();
    proto.filter_chains[0].filters = vec![Filter {
        name: "my-echo".into(),
        config_type: Some(filter::ConfigType::TypedConfig(pack(&Echo {}))),
    }];
    let error = decode::listener(&pack(&proto)).unwrap_err().to_string();
    assert!(
        error.contains("my-echo") && error.contains("envoy.extensions.filters.network.echo.v3.Echo"),
        "{error}"
    );

    let mut proto = ProtoListener::decode(any.value.as_slice()).unwrap();
    edit_http(&mut proto.filter_chains[0], |manager| {
        let cors = HttpFilter {
            name: "envoy.filters.http.cors".into(),
            config_type: Some(http_filter::ConfigType::TypedConfig(pack(&Cors {}))),
            ..HttpFilter::default()
        };
        manager.http_filters.insert(0, cors);
    });
    let error = decode::listener(&pack(&proto)).unwrap_err().to_string();
    assert!(error.contains("envoy.filters.http.cors"), "{error}");
    assert!(error.contains("filter_chains["), "{error}");
}

#[test]
fn filters_out_of_order_are_refused() {
    let mut listener = generate::sample(generate::listener_with_http());
    let mantlet_model::listener::Filters::Http(http) = &mut listener.chains[0].filters else {
        panic!("HTTP chain expected");
    };
    http.jwt = Some(mantlet_model::http::JwtAuthn { providers: vec![] });
    http.authz = vec![generate::sample(generate::filter())];
    let any = encode::listener(&listener, &istio());
    assert!(decode::listener(&any).is_ok());
    let mut proto = ProtoListener::decode(any.value.as_slice()).unwrap();
    // Authorization before the token is verified.
    edit_http(&mut proto.filter_chains[0], |manager| manager.http_filters.swap(0, 1));
    let error = decode::listener(&pack(&proto)).unwrap_err().to_string();
    assert!(error.contains("out of order"), "{error}");
}

#[test]
fn another_type_is_refused() {
    let any = Any {
        type_url: "type.googleapis.com/envoy.config.cluster.v3.Clutter".into(),
        value: vec![],
    };
    let error = decode::cluster(&any).unwrap_err().to_string();
    assert!(error.contains("Clutter"), "{error}");
}

fn edit_http(chain: &mut FilterChain, edit: impl FnOnce(&mut HttpConnectionManager)) {
    let Some(filter::ConfigType::TypedConfig(any)) = &mut chain.filters[0].config_type else {
        panic!("configuration expected");
    };
    let mut manager = HttpConnectionManager::decode(any.value.as_slice()).unwrap();
    edit(&mut manager);
    *any = pack(&manager);
}

/// A proxy does not fetch keys: a provider that wants it to is refused, as are providers that the rule does not ask.
#[test]
fn token_providers_that_cannot_be_obeyed_are_refused() {
    use envoy_types::pb::envoy::extensions::filters::http::jwt_authn::v3::jwt_provider::JwksSourceSpecifier;
    use envoy_types::pb::envoy::extensions::filters::http::jwt_authn::v3::{
        JwtAuthentication, JwtProvider, RemoteJwks, RequirementRule,
    };
    use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3::http_filter;

    let mut listener = generate::sample(generate::listener_with_http());
    let mantlet_model::listener::Filters::Http(http) = &mut listener.chains[0].filters else {
        panic!("HTTP chain expected");
    };
    let provider = mantlet_model::http::JwtProvider {
        name: "origins-0".into(),
        issuer: "i".into(),
        audiences: vec![],
        jwks: "{}".into(),
        from_headers: vec![],
        from_params: vec![],
        from_cookies: vec![],
        forward: false,
        payload_header: None,
        claim_headers: vec![],
        space_delimited: vec![],
        clear_route_cache: false,
    };
    http.jwt = Some(mantlet_model::http::JwtAuthn {
        providers: vec![provider],
    });
    let refused = |edit: &dyn Fn(&mut JwtAuthentication)| {
        let any = encode::listener(&listener, &istio());
        let mut proto = ProtoListener::decode(any.value.as_slice()).unwrap();
        edit_http(&mut proto.filter_chains[0], |manager| {
            let jwt = manager
                .http_filters
                .iter_mut()
                .find(|f| f.name == "envoy.filters.http.jwt_authn")
                .unwrap();
            let Some(http_filter::ConfigType::TypedConfig(any)) = &mut jwt.config_type else {
                panic!("configuration expected");
            };
            let mut config = JwtAuthentication::decode(any.value.as_slice()).unwrap();
            edit(&mut config);
            *any = pack(&config);
        });
        decode::listener(&pack(&proto)).err().map(|e| e.to_string())
    };
    fn first(config: &mut JwtAuthentication) -> &mut JwtProvider {
        config.providers.get_mut("origins-0").unwrap()
    }
    assert_eq!(refused(&|_| {}), None);
    let remote = refused(&|c| {
        first(c).jwks_source_specifier = Some(JwksSourceSpecifier::RemoteJwks(RemoteJwks::default()));
    });
    assert!(remote.is_some_and(|e| e.contains("remote_jwks")));
    let edits: [&dyn Fn(&mut JwtAuthentication); 9] = [
        &|c| first(c).jwks_source_specifier = None,
        &|c| first(c).payload_in_metadata = "other".into(),
        &|c| first(c).normalize_payload_in_metadata = None,
        &|c| first(c).clock_skew_seconds = 5,
        &|c| first(c).require_expiration = true,
        &|c| first(c).pad_forward_payload_header = true,
        &|c| c.bypass_cors_preflight = false,
        &|c| c.rules.push(RequirementRule::default()),
        &|c| c.rules.clear(),
    ];
    for (index, edit) in edits.iter().enumerate() {
        assert!(refused(edit).is_some(), "edit {index}");
    }
}
