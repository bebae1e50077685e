//! The protocol, message by message.

use envoy_types::pb::google::rpc::Status;

use super::*;

fn set(resources: &[(ResourceType, &str, &str)]) -> ResourceSet {
    let mut set = ResourceSet::default();
    for (kind, name, version) in resources {
        set.put_raw(*kind, name, version);
    }
    set
}

fn subscribe(kind: ResourceType, names: &[&str]) -> DeltaDiscoveryRequest {
    DeltaDiscoveryRequest {
        type_url: kind.url().into(),
        resource_names_subscribe: names.iter().map(|n| n.to_string()).collect(),
        ..DeltaDiscoveryRequest::default()
    }
}

fn answer(response: &DeltaDiscoveryResponse, error: Option<&str>) -> DeltaDiscoveryRequest {
    DeltaDiscoveryRequest {
        type_url: response.type_url.clone(),
        response_nonce: response.nonce.clone(),
        error_detail: error.map(|message| Status {
            code: 3,
            message: message.into(),
            details: vec![],
        }),
        ..DeltaDiscoveryRequest::default()
    }
}

/// `CDS +a +b -c` for each response.
fn summary(responses: &[DeltaDiscoveryResponse]) -> Vec<String> {
    let line = |r: &DeltaDiscoveryResponse| {
        let mut out = ResourceType::from_url(&r.type_url).unwrap().short().to_string();
        let mut names: Vec<_> = r.resources.iter().map(|r| format!(" +{}", r.name)).collect();
        names.extend(r.removed_resources.iter().map(|n| format!(" -{n}")));
        out.push_str(&names.concat());
        out
    };
    responses.iter().map(line).collect()
}

use ResourceType::{Cluster, Endpoints, Listener, Routes};

#[test]
fn sends_only_what_differs_in_order() {
    let mut server = DeltaServer::new("id");
    let first = set(&[
        (Cluster, "a", "1"),
        (Cluster, "b", "1"),
        (Listener, "l", "1"),
        (Endpoints, "a", "1"),
    ]);
    // Subscribed in no order, answered in order.
    server.on_request(subscribe(Listener, &[])).unwrap();
    server.on_request(subscribe(Endpoints, &["a"])).unwrap();
    server.on_request(subscribe(Cluster, &[])).unwrap();
    let responses = server.poll(&first);
    assert_eq!(summary(&responses), ["CDS +a +b", "EDS +a", "LDS +l"]);
    assert!(
        responses
            .iter()
            .all(|r| r.control_plane.as_ref().unwrap().identifier == "id")
    );
    assert!(server.poll(&first).is_empty(), "unanswered");
    for response in &responses {
        server.on_request(answer(response, None)).unwrap();
    }
    assert!(server.poll(&first).is_empty(), "up to date");

    let second = set(&[
        (Cluster, "a", "1"),
        (Cluster, "b", "2"),
        (Listener, "l", "1"),
        (Endpoints, "a", "2"),
    ]);
    assert_eq!(summary(&server.poll(&second)), ["CDS +b", "EDS +a"]);
    let events = server.take_events();
    assert_eq!(
        events.iter().filter(|e| matches!(e, StreamEvent::Acked { .. })).count(),
        3
    );
    assert_eq!(
        events
            .iter()
            .filter(|e| matches!(e, StreamEvent::Subscribed { .. }))
            .count(),
        3
    );
}

/// A changed cluster waits for its endpoints, also if the answer to their last sending is still on its way.
#[test]
fn endpoints_follow_a_changed_cluster_even_when_they_were_unanswered() {
    let with_timeout = |connect_timeout_ms| {
        let mut snapshot = mantlet_model::ProxySnapshot::default();
        let cluster = mantlet_model::cluster::Cluster {
            name: "a".into(),
            discovery: mantlet_model::cluster::Discovery::Eds { service: "a".into() },
            connect_timeout_ms,
            balancer: mantlet_model::cluster::Balancer::LeastRequest,
            tls: mantlet_model::cluster::ClusterTls::Plain,
            protocol: mantlet_model::cluster::UpstreamProtocol::Http1,
            bind_source: None,
            limits: Default::default(),
            outlier: None,
            services: vec![],
            alpn_override: false,
        };
        snapshot.clusters.insert("a".into(), cluster.into());
        let endpoints = mantlet_model::endpoint::Endpoints {
            cluster: "a".into(),
            endpoints: vec![],
        };
        snapshot.endpoints.insert("a".into(), endpoints.into());
        let secrets = Vec::<std::sync::Arc<mantlet_model::Secret>>::new();
        ResourceSet::new(&snapshot, secrets, &crate::Options::default(), None)
    };
    let mut server = DeltaServer::new("id");
    server.on_request(subscribe(Cluster, &[])).unwrap();
    server.on_request(subscribe(Endpoints, &["a"])).unwrap();
    let first = server.poll(&with_timeout(1));
    assert_eq!(summary(&first), ["CDS +a", "EDS +a"]);
    server.on_request(answer(&first[0], None)).unwrap();
    // The cluster changes before the endpoints are acknowledged.
    let second = server.poll(&with_timeout(2));
    assert_eq!(summary(&second), ["CDS +a"]);
    server.on_request(answer(&first[1], None)).unwrap();
    assert_eq!(summary(&server.poll(&with_timeout(2))), ["EDS +a"]);
}

#[test]
fn clusters_go_after_their_referrers() {
    let mut server = DeltaServer::new("id");
    for kind in [Cluster, Listener] {
        server.on_request(subscribe(kind, &[])).unwrap();
    }
    let before = set(&[(Cluster, "old", "1"), (Listener, "l", "1")]);
    for response in server.poll(&before) {
        server.on_request(answer(&response, None)).unwrap();
    }
    let after = set(&[(Cluster, "new", "1"), (Listener, "l", "2")]);
    let responses = server.poll(&after);
    assert_eq!(summary(&responses), ["CDS +new", "LDS +l"]);
    server.on_request(answer(&responses[0], None)).unwrap();
    assert!(
        server.poll(&after).is_empty(),
        "the old cluster stays while the listener may still use it"
    );
    server.on_request(answer(&responses[1], Some("no"))).unwrap();
    assert!(
        server.poll(&after).is_empty(),
        "the refused listener leaves the old one in force"
    );
    let better = set(&[(Cluster, "new", "1"), (Listener, "l", "3")]);
    let responses = server.poll(&better);
    assert_eq!(summary(&responses), ["LDS +l"]);
    server.on_request(answer(&responses[0], None)).unwrap();
    assert_eq!(summary(&server.poll(&better)), ["CDS -old"]);
}

#[test]
fn refused_content_is_not_repeated() {
    let mut server = DeltaServer::new("id");
    server.on_request(subscribe(Listener, &[])).unwrap();
    let bad = set(&[(Listener, "l", "bad"), (Listener, "m", "1")]);
    let responses = server.poll(&bad);
    server
        .on_request(answer(&responses[0], Some("l: field x not supported")))
        .unwrap();
    assert!(server.poll(&bad).is_empty());
    let events = server.take_events();
    let nack = events.iter().find_map(|e| match e {
        StreamEvent::Nacked { message, .. } => Some(message.as_str()),
        _ => None,
    });
    assert_eq!(nack, Some("l: field x not supported"));
    let good = set(&[(Listener, "l", "good"), (Listener, "m", "1")]);
    // The whole response was refused, but only changed content is tried again.
    assert_eq!(summary(&server.poll(&good)), ["LDS +l"]);
}

#[test]
fn old_answers_are_ignored() {
    let mut server = DeltaServer::new("id");
    server.on_request(subscribe(Listener, &[])).unwrap();
    let response = server.poll(&set(&[(Listener, "l", "1")])).remove(0);
    let mut old = answer(&response, None);
    old.response_nonce = "0".into();
    server.on_request(old).unwrap();
    assert!(server.in_flight(Listener));
    server.on_request(answer(&response, None)).unwrap();
    assert!(!server.in_flight(Listener));
}

#[test]
fn missing_names_are_said_once_and_found_later() {
    let mut server = DeltaServer::new("id");
    server.on_request(subscribe(Routes, &["r", "s"])).unwrap();
    let without = set(&[(Routes, "s", "1"), (Routes, "other", "1")]);
    let responses = server.poll(&without);
    assert_eq!(summary(&responses), ["RDS +s -r"]);
    server.on_request(answer(&responses[0], None)).unwrap();
    assert!(server.poll(&without).is_empty());
    let with = set(&[(Routes, "s", "1"), (Routes, "r", "1")]);
    let responses = server.poll(&with);
    assert_eq!(summary(&responses), ["RDS +r"]);
    server.on_request(answer(&responses[0], None)).unwrap();
    // Unsubscribed names are no longer sent.
    let mut request = subscribe(Routes, &[]);
    request.resource_names_unsubscribe = vec!["r".into()];
    server.on_request(request).unwrap();
    assert!(server.poll(&set(&[(Routes, "s", "1"), (Routes, "r", "2")])).is_empty());
}

#[test]
fn a_new_stream_goes_on_with_the_versions_at_hand() {
    let mut server = DeltaServer::new("id");
    let mut request = subscribe(Cluster, &[]);
    request.initial_resource_versions = [("same", "1"), ("changed", "1"), ("gone", "1")]
        .map(|(n, v)| (n.to_string(), v.to_string()))
        .into();
    server.on_request(request).unwrap();
    let mut request = subscribe(Endpoints, &["same"]);
    request.initial_resource_versions = [("same".to_string(), "1".to_string())].into();
    server.on_request(request).unwrap();
    let now = set(&[
        (Cluster, "same", "1"),
        (Cluster, "changed", "2"),
        (Endpoints, "same", "1"),
    ]);
    let responses = server.poll(&now);
    // Endpoints are answered, empty, because they were asked for.
    assert_eq!(summary(&responses), ["CDS +changed", "EDS"]);
    server.on_request(answer(&responses[0], None)).unwrap();
    assert_eq!(summary(&server.poll(&now)), ["CDS -gone"]);
}

#[test]
fn unknown_types_are_left_unanswered() {
    let mut server = DeltaServer::new("id");
    let request = DeltaDiscoveryRequest {
        type_url: "type.googleapis.com/x.Y".into(),
        ..DeltaDiscoveryRequest::default()
    };
    server.on_request(request).unwrap();
    assert!(server.poll(&set(&[(Cluster, "a", "1")])).is_empty());
    assert!(matches!(
        server.take_events().as_slice(),
        [StreamEvent::UnknownType { .. }]
    ));
}

#[test]
fn too_many_names_end_the_stream() {
    let names: Vec<String> = (0..=MAX_SUBSCRIPTIONS).map(|n| n.to_string()).collect();
    let delta = DeltaDiscoveryRequest {
        type_url: Endpoints.url().into(),
        resource_names_subscribe: names.clone(),
        ..DeltaDiscoveryRequest::default()
    };
    assert!(DeltaServer::new("id").on_request(delta).is_err());
    let sotw = DiscoveryRequest {
        type_url: Endpoints.url().into(),
        resource_names: names,
        ..DiscoveryRequest::default()
    };
    assert!(SotwServer::new("id").on_request(sotw).is_err());
}

#[test]
fn state_of_the_world_sends_only_changed_endpoints() {
    let request = |names: &[&str], nonce: &str| DiscoveryRequest {
        type_url: Endpoints.url().into(),
        resource_names: names.iter().map(|n| n.to_string()).collect(),
        response_nonce: nonce.into(),
        ..DiscoveryRequest::default()
    };
    let names = ["a", "b", "c"];
    let mut server = SotwServer::new("id");
    server.on_request(request(&names, "")).unwrap();
    let of = |b: &str| set(&[(Endpoints, "a", "1"), (Endpoints, "b", b), (Endpoints, "c", "1")]);
    let first = server.poll(&of("1"));
    assert_eq!(first[0].resources.len(), 3);
    server.on_request(request(&names, &first[0].nonce)).unwrap();
    let second = server.poll(&of("2"));
    let [only] = second[0].resources.as_slice() else {
        panic!("{second:?}")
    };
    assert_eq!(only.value, b"2");

    // Of a response that was refused nothing counts as held, so the next one has all.
    let mut refusal = request(&names, &second[0].nonce);
    refusal.error_detail = Some(Status::default());
    server.on_request(refusal).unwrap();
    let third = server.poll(&of("3"));
    assert_eq!(third[0].resources.len(), 3);
    server.on_request(request(&names, &third[0].nonce)).unwrap();

    // What comes back after it was gone is sent.
    assert!(
        server
            .poll(&set(&[(Endpoints, "a", "1"), (Endpoints, "c", "1")]))
            .is_empty()
    );
    let back = server.poll(&of("3"));
    assert_eq!(back[0].resources.len(), 1);
    server.on_request(request(&names[..1], &back[0].nonce)).unwrap();
    assert!(server.poll(&of("4")).is_empty(), "nobody asks for b any more");
}

#[test]
fn state_of_the_world_sends_all_of_a_type() {
    let request = |kind: ResourceType, names: &[&str], nonce: &str| DiscoveryRequest {
        type_url: kind.url().into(),
        resource_names: names.iter().map(|n| n.to_string()).collect(),
        response_nonce: nonce.into(),
        ..DiscoveryRequest::default()
    };
    let mut server = SotwServer::new("id");
    server.on_request(request(Cluster, &[], "")).unwrap();
    server.on_request(request(Endpoints, &["a"], "")).unwrap();
    let first = set(&[
        (Cluster, "a", "1"),
        (Cluster, "b", "1"),
        (Endpoints, "a", "1"),
        (Endpoints, "b", "1"),
    ]);
    let responses = server.poll(&first);
    assert_eq!(responses.iter().map(|r| r.resources.len()).collect::<Vec<_>>(), [2, 1]);
    assert!(server.poll(&first).is_empty(), "unanswered");
    server.on_request(request(Cluster, &[], &responses[0].nonce)).unwrap();
    server
        .on_request(request(Endpoints, &["a"], &responses[1].nonce))
        .unwrap();
    assert!(server.poll(&first).is_empty(), "up to date");

    // A name more is answered although no resource changed.
    server
        .on_request(request(Endpoints, &["a", "b"], &responses[1].nonce))
        .unwrap();
    let responses = server.poll(&first);
    assert_eq!(responses[0].resources.len(), 2);
    server
        .on_request(request(Endpoints, &["a", "b"], &responses[0].nonce))
        .unwrap();

    // A lost cluster is told, lost endpoints are not: that type cannot express it.
    let second = set(&[(Cluster, "a", "1"), (Endpoints, "a", "1")]);
    let responses = server.poll(&second);
    assert_eq!(responses[0].type_url, Cluster.url());
    assert_eq!(responses[0].resources.len(), 1);
    let mut refusal = request(Cluster, &[], &responses[0].nonce);
    refusal.error_detail = Some(Status {
        code: 3,
        message: "no".into(),
        details: vec![],
    });
    server.on_request(refusal).unwrap();
    assert!(
        !server.poll(&second).iter().any(|r| r.type_url == Cluster.url()),
        "refused content is not repeated"
    );
    let third = set(&[(Cluster, "a", "2")]);
    assert_eq!(server.poll(&third)[0].resources.len(), 1);
}
