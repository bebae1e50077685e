//! Counting across threads, exposition text, bounds.

use super::*;

#[test]
fn text_format_is_prometheus() {
    let registry = Registry::new();
    let requests = registry.counter("istio_requests_total", "Requests.", &["response_code", "path"]);
    requests.with(&["200", "/a\"b\\c\nd"]).add(3);
    registry.gauge("up", "", &[]).with(&[]).set(1.5);
    let durations = registry.histogram("d_milliseconds", "Time.", &["x"], &[0.5, 5.0]);
    let handle = durations.with(&["y"]);
    for value in [0.5, 0.6, 5.0, 100.0] {
        handle.observe(value);
    }
    assert_eq!(
        registry.render(),
        "# HELP d_milliseconds Time.\n# TYPE d_milliseconds histogram\n\
         d_milliseconds_bucket{x=\"y\",le=\"0.5\"} 1\nd_milliseconds_bucket{x=\"y\",le=\"5\"} 3\n\
         d_milliseconds_bucket{x=\"y\",le=\"+Inf\"} 4\nd_milliseconds_sum{x=\"y\"} 106.1\n\
         d_milliseconds_count{x=\"y\"} 4\n\
         # HELP istio_requests_total Requests.\n# TYPE istio_requests_total counter\n\
         istio_requests_total{response_code=\"200\",path=\"/a\\\"b\\\\c\\nd\"} 3\n\
         # TYPE up gauge\nup 1.5\n"
    );
}

#[test]
fn shards_of_many_threads_add_up_and_outlive_their_handles() {
    let registry = Registry::new();
    let family = registry.counter("c", "", &["l"]);
    let kept = family.with(&["a"]);
    kept.add(5);
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                let mine = family.with(&["a"]);
                for _ in 0..10_000 {
                    mine.inc();
                }
            });
        }
    });
    assert_eq!(family.total(&["a"]), 80_005);
    // Folded once, not twice.
    assert_eq!(family.total(&["a"]), 80_005);
    kept.inc();
    assert_eq!(family.total(&["a"]), 80_006);
    assert_eq!(family.total(&["b"]), 0);
}

#[test]
fn a_scrape_never_sees_a_counter_go_back_while_handles_come_and_go() {
    let registry = Registry::new();
    let family = registry.counter("c", "", &[]);
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                family.with(&[]).inc();
            }
        });
        let mut last = 0;
        for _ in 0..20_000 {
            let now = family.total(&[]);
            assert!(now >= last, "{now} after {last}");
            last = now;
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
    });
}

/// A handle per event, as where labels come from the event: nothing of it may stay until somebody scrapes.
#[test]
fn handles_that_come_and_go_leave_nothing_behind_without_a_scrape() {
    let registry = Registry::new();
    let family = registry.counter("c", "", &[]);
    let kept: Vec<_> = (0..20).map(|_| family.with(&[])).collect();
    for _ in 0..10_000 {
        family.with(&[]).inc();
    }
    let shards = family.0.shards(&[]);
    assert!(shards <= 2 * kept.len(), "{shards} shards for {} handles", kept.len());
    kept[0].inc();
    assert_eq!(family.total(&[]), 10_001);
}

#[test]
fn gauges_are_shared_and_keep_their_value() {
    let registry = Registry::new();
    let family = registry.gauge("g", "", &["l"]);
    family.with(&["a"]).set(4.0);
    let one = family.with(&["a"]);
    let two = family.with(&["a"]);
    one.add(1.0);
    assert_eq!(two.get(), 5.0);
    {
        let _guard = two.hold();
        assert_eq!(family.value(&["a"]), 6.0);
    }
    drop((one, two));
    assert_eq!(family.value(&["a"]), 5.0);
    assert_eq!(family.with(&["a"]).get(), 5.0);
    assert!(family.remove(&["a"]));
    assert_eq!(family.value(&["a"]), 0.0);
}

#[test]
fn a_family_is_bounded_and_says_so() {
    let registry = Registry::with_max_series(2);
    let family = registry.counter("c", "", &["l"]);
    for value in ["a", "b", "c"] {
        family.with(&[value]).inc();
    }
    assert_eq!(family.total(&["c"]), 0);
    assert!(
        registry.render().contains("1 series of c were not kept"),
        "{}",
        registry.render()
    );
}

#[test]
fn two_shapes_of_one_name_do_not_mix() {
    let registry = Registry::new();
    registry.counter("c", "", &["l"]).with(&["a"]).inc();
    registry.gauge("c", "", &[]).with(&[]).set(9.0);
    assert_eq!(registry.render(), "# TYPE c counter\nc{l=\"a\"} 1\n");
}

#[test]
fn process_metrics_are_read_at_scrape_time() {
    let registry = Registry::new();
    register_process_metrics(&registry);
    let text = registry.render();
    let value = |name: &str| -> f64 {
        let line = text
            .lines()
            .find(|l| l.starts_with(name))
            .unwrap_or_else(|| panic!("{name} in {text}"));
        line.rsplit(' ').next().unwrap().parse().unwrap()
    };
    assert!(value("process_resident_memory_bytes") > 1e6);
    assert!(value("process_open_fds") >= 3.0);
    assert!(value("process_cpu_seconds_total") > 0.0);
}
