//! Choice of virtual host and route.

use super::*;
use crate::route::{RouteAction, RouteMatch};

#[derive(Default)]
struct Request {
    authority: &'static str,
    path: &'static str,
    query: Option<&'static str>,
    headers: Vec<(&'static str, &'static str)>,
}

impl RouteRequest for Request {
    fn authority(&self) -> &str {
        self.authority
    }
    fn path(&self) -> &str {
        self.path
    }
    fn query(&self) -> Option<&str> {
        self.query
    }
    fn header(&self, name: &str) -> Vec<&str> {
        self.headers
            .iter()
            .filter(|(n, _)| *n == name)
            .map(|(_, v)| *v)
            .collect()
    }
}

fn route(name: &str, matches: RouteMatch) -> Route {
    Route {
        name: name.into(),
        matches,
        action: RouteAction::Respond {
            status: 200,
            body: String::new(),
        },
        decorator: String::new(),
        request_headers: vec![],
        response_headers: vec![],
    }
}

fn host(name: &str, domains: &[&str], routes: Vec<Route>) -> VirtualHost {
    VirtualHost {
        name: name.into(),
        domains: domains.iter().map(|d| d.to_string()).collect(),
        routes,
        attempt_count: false,
    }
}

fn table(hosts: Vec<VirtualHost>, ignore_port_in_host: bool) -> CompiledRoutes {
    CompiledRoutes::new(Arc::new(RouteTable {
        name: "80".into(),
        hosts: hosts.into_iter().map(Arc::new).collect(),
        ignore_port_in_host,
        on_demand: false,
    }))
}

#[test]
fn domains_by_order_of_closeness() {
    let all = || vec![route("r", RouteMatch::default())];
    let hosts = vec![
        host("any", &["*"], all()),
        host("prefix", &["web.*"], all()),
        host("longer prefix", &["web.a.*"], all()),
        host("suffix", &["*.com"], all()),
        host("longer suffix", &["*.example.com"], all()),
        host("exact", &["web.example.com", "10.0.0.1"], all()),
        host("v6", &["[fd00::1]"], all()),
    ];
    let cases = [
        ("web.example.com", "exact"),
        ("WEB.Example.COM", "exact"),
        ("web.example.com:8080", "exact"),
        ("10.0.0.1:80", "exact"),
        ("a.example.com", "longer suffix"),
        (".example.com", "suffix"),
        ("example.com", "suffix"),
        ("web.a.b", "longer prefix"),
        ("web.b", "prefix"),
        ("web.", "any"),
        ("[fd00::1]:80", "v6"),
        ("[fd00::1]", "v6"),
        ("fd00::1", "any"),
        ("", "any"),
    ];
    let ported = table(hosts.clone(), true);
    for (authority, expected) in cases {
        assert_eq!(ported.host(authority).unwrap().name, expected, "{authority}");
    }
    let strict = table(hosts, false);
    assert_eq!(strict.host("web.example.com:8080").unwrap().name, "prefix");
    assert!(table(vec![host("h", &["a"], vec![])], true).host("b").is_none());
}

#[test]
fn the_first_route_that_matches() {
    let path = |path| RouteMatch {
        path,
        ..RouteMatch::default()
    };
    let with_header = |value, invert| RouteMatch {
        path: PathMatch::Prefix("/h".into()),
        headers: vec![HeaderMatch {
            name: "x-v".into(),
            value,
            invert,
        }],
        query: vec![],
        claims: vec![],
    };
    let routes = vec![
        route("exact", path(PathMatch::Exact("/a".into()))),
        route("segment", path(PathMatch::SegmentPrefix("/s".into()))),
        route("regex", path(PathMatch::Regex("/r/[0-9]+".into()))),
        route("broken", path(PathMatch::Regex("(".into()))),
        route("header", with_header(Some(StringMatch::Exact("1".into())), false)),
        route("two", with_header(Some(StringMatch::Exact("2".into())), false)),
        route("present", with_header(None, false)),
        route("not 3", with_header(Some(StringMatch::Exact("3".into())), true)),
        route(
            "query",
            RouteMatch {
                path: PathMatch::Prefix("/q".into()),
                headers: vec![],
                query: vec![("k".into(), StringMatch::Prefix("v".into()))],
                claims: vec![],
            },
        ),
    ];
    let table = table(vec![host("h", &["*"], routes)], true);
    let select = |request: &Request| table.select(request).map(|(_, route)| route.name.clone());
    let at = |path| Request {
        path,
        ..Request::default()
    };
    for (path, expected) in [
        ("/a", Some("exact")),
        ("/a/b", None),
        ("/s", Some("segment")),
        ("/s/x", Some("segment")),
        ("/sx", None),
        ("/r/12", Some("regex")),
        ("/r/12/x", None),
        ("(", None),
        ("/h", Some("not 3")),
        ("/q", None),
    ] {
        assert_eq!(select(&at(path)).as_deref(), expected, "{path}");
        let slow = table.table().select(&at(path)).map(|(_, route)| route.name.as_str());
        assert_eq!(slow, expected, "{path}");
    }
    for (headers, expected) in [
        (vec![("x-v", "1")], "header"),
        (vec![("x-v", "9"), ("x-v", "2")], "two"),
        (vec![("x-v", "1,2")], "present"),
        (vec![("x-v", "3")], "present"),
    ] {
        let request = Request { headers, ..at("/h") };
        assert_eq!(select(&request).as_deref(), Some(expected));
    }
    for (query, expected) in [
        ("k=v1", Some("query")),
        ("x=1&k=v", Some("query")),
        ("k=w&k=v", None),
        ("k", None),
    ] {
        let request = Request {
            query: Some(query),
            ..at("/q")
        };
        assert_eq!(select(&request).as_deref(), expected, "{query}");
    }
}
