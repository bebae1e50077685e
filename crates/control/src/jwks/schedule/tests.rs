//! The schedule under a simulated clock: every time is an offset that the test chooses.

use super::*;

const REFRESH_EVERY: Duration = Duration::from_secs(1200);

struct Clock {
    start: Instant,
    schedule: Schedule,
    /// Fetches that were started: seconds, issuer, timeout.
    log: Vec<(f64, String, Duration)>,
}

fn need(issuer: &str) -> KeySetNeed {
    KeySetNeed {
        issuer: issuer.into(),
        jwks_uri: format!("http://{issuer}.example/keys"),
        timeout: Duration::from_secs(5),
    }
}

fn keys(text: &str) -> KeySet {
    text.into()
}

impl Clock {
    fn new() -> Clock {
        Clock {
            start: Instant::now(),
            schedule: Schedule::new(REFRESH_EVERY),
            log: Vec::new(),
        }
    }

    fn at(&self, seconds: f64) -> Instant {
        self.start + Duration::from_secs_f64(seconds)
    }

    fn need(&mut self, issuers: &[&str], seconds: f64) {
        let needs: Vec<KeySetNeed> = issuers.iter().map(|i| need(i)).collect();
        let now = self.at(seconds);
        self.schedule.need(&needs, now);
    }

    /// Issuers whose fetches start now.
    fn start(&mut self, seconds: f64) -> Vec<String> {
        let jobs = self.schedule.start(self.at(seconds));
        for job in &jobs {
            self.log.push((seconds, job.source.issuer.clone(), job.timeout));
        }
        jobs.into_iter().map(|j| j.source.issuer).collect()
    }

    fn finish(&mut self, issuer: &str, result: Result<&str, &str>, seconds: f64) -> Option<Update> {
        let now = self.at(seconds);
        self.schedule
            .finished(&source_of(&need(issuer)), result.map(keys).map_err(String::from), now)
    }

    /// Runs from one wake-up to the next until `end`; `answer` says how a fetch ends, `takes` how long it takes.
    fn run(&mut self, mut now: f64, end: f64, takes: f64, mut answer: impl FnMut(&str, f64) -> Result<String, String>) {
        while now <= end {
            self.schedule.sweep(self.at(now));
            let started = self.start(now);
            if started.is_empty() {
                match self.schedule.next(self.at(now)) {
                    Some(next) => now = next.duration_since(self.start).as_secs_f64(),
                    None => return,
                }
            } else {
                now += takes;
                for issuer in started {
                    let result = answer(&issuer, now).map(|k| keys(&k));
                    let at = self.at(now);
                    self.schedule.finished(&source_of(&need(&issuer)), result, at);
                }
            }
        }
    }

    fn times(&self) -> Vec<f64> {
        self.log.iter().map(|(at, ..)| (at * 10.0).round() / 10.0).collect()
    }
}

#[test]
fn a_good_issuer_is_fetched_at_once_and_then_every_interval() {
    let mut clock = Clock::new();
    clock.need(&["a"], 0.0);
    clock.run(0.0, 3700.0, 0.0, |_, _| Ok("k".into()));
    assert_eq!(clock.times(), [0.0, 1200.0, 2400.0, 3600.0]);
    assert!(clock.schedule.rows(clock.at(3700.0))[0].keys);
}

#[test]
fn only_a_changed_set_is_an_update() {
    let mut clock = Clock::new();
    clock.need(&["a"], 0.0);
    assert_eq!(clock.start(0.0), ["a"]);
    assert!(!clock.schedule.settled(&source_of(&need("a"))));
    assert_eq!(clock.finish("a", Ok("k1"), 0.1).unwrap().keys, Some(keys("k1")));
    assert!(clock.schedule.settled(&source_of(&need("a"))));
    clock.start(1300.0);
    assert_eq!(clock.finish("a", Ok("k1"), 1300.0), None);
    clock.start(2600.0);
    assert_eq!(clock.finish("a", Ok("k2"), 2600.0).unwrap().keys, Some(keys("k2")));
}

#[test]
fn failures_are_tried_seven_times_and_then_wait_from_a_minute_to_an_hour() {
    let mut clock = Clock::new();
    let mut long = need("a");
    long.timeout = Duration::from_secs(30);
    clock.schedule.need(&[long], clock.start);
    clock.run(0.0, 5.0 * 3600.0, 0.0, |_, _| Err("refused".into()));
    let times = clock.times();
    // The first use has one try; the background attempt follows at once, seven tries a second apart.
    assert_eq!(times[..8], [0.0, 0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
    let attempts: Vec<f64> = times[1..].chunks(7).map(|tries| tries[0]).collect();
    let waits: Vec<f64> = attempts.windows(2).map(|w| (w[1] - w[0] - 6.0) / 60.0).collect();
    assert_eq!(waits[..8], [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0]);
    // Every attempt has one deadline: its later tries get what is left of it.
    assert_eq!(clock.log[1].2, Duration::from_secs(30));
    assert_eq!(clock.log[7].2, Duration::from_secs(24));
}

#[test]
fn an_attempt_ends_with_the_rules_timeout() {
    let mut clock = Clock::new();
    clock.need(&["a"], 0.0);
    // Each try takes two of the five seconds.
    clock.run(0.0, 30.0, 2.0, |_, _| Err("slow".into()));
    assert_eq!(clock.times(), [0.0, 2.0, 5.0]);
    assert_eq!(clock.log[2].2, Duration::from_secs(2));
}

#[test]
fn last_good_keys_outlive_a_day_of_failures_but_not_a_week() {
    let mut clock = Clock::new();
    clock.need(&["a"], 0.0);
    clock.start(0.0);
    clock.finish("a", Ok("k"), 0.0);
    let day = 24.0 * 3600.0;
    clock.run(1.0, day, 0.0, |_, _| Err("down".into()));
    assert!(clock.schedule.rows(clock.at(day))[0].keys);
    clock.run(day, 6.9 * day, 0.0, |_, _| Err("down".into()));
    assert!(clock.schedule.rows(clock.at(6.9 * day))[0].keys);
    let dropped = clock.schedule.sweep(clock.at(7.0 * day));
    assert_eq!(dropped.len(), 1);
    assert_eq!(dropped[0].keys, None);
    // It is still asked for, and has keys again when it answers.
    let before = clock.log.len();
    clock.run(7.0 * day, 7.2 * day, 0.0, |_, _| Ok("k".into()));
    assert!(clock.log.len() > before);
    assert!(clock.schedule.rows(clock.at(7.2 * day))[0].keys);
}

#[test]
fn a_success_ends_the_backoff() {
    let mut clock = Clock::new();
    clock.need(&["a"], 0.0);
    clock.run(0.0, 1000.0, 0.0, |_, at| {
        if at < 600.0 { Err("down".into()) } else { Ok("k".into()) }
    });
    let last = *clock.times().last().unwrap();
    clock.log.clear();
    clock.run(last, last + 3700.0, 0.0, |_, _| Ok("k".into()));
    assert_eq!(clock.times(), [last + 1200.0, last + 2400.0, last + 3600.0]);
}

#[test]
fn unused_sources_are_not_fetched_and_forgotten_after_a_week() {
    let mut clock = Clock::new();
    clock.need(&["a"], 0.0);
    clock.run(0.0, 100.0, 0.0, |_, _| Ok("k".into()));
    clock.need(&[], 100.0);
    clock.run(100.0, 6.0 * 24.0 * 3600.0, 0.0, |_, _| Ok("k".into()));
    assert_eq!(clock.times(), [0.0], "nobody names it");
    assert_eq!(clock.schedule.rows(clock.at(0.0)).len(), 1);
    let dropped = clock.schedule.sweep(clock.at(100.0 + 7.0 * 24.0 * 3600.0));
    assert_eq!(dropped.len(), 1);
    assert!(clock.schedule.rows(clock.at(0.0)).is_empty());
}

#[test]
fn a_source_that_comes_back_is_asked_before_its_old_keys_count() {
    let mut clock = Clock::new();
    clock.need(&["a"], 0.0);
    clock.run(0.0, 1.0, 0.0, |_, _| Ok("old".into()));
    clock.need(&[], 10.0);
    // Soon: the keys are fresh enough.
    let at = clock.at(60.0);
    clock.schedule.announce(&need("a"), at);
    assert!(clock.schedule.settled(&source_of(&need("a"))));
    // Late: they are not.
    let at = clock.at(5000.0);
    clock.schedule.announce(&need("a"), at);
    assert!(!clock.schedule.settled(&source_of(&need("a"))));
    assert_eq!(clock.start(5000.0), ["a"]);
    assert_eq!(clock.finish("a", Ok("new"), 5000.1).unwrap().keys, Some(keys("new")));
}

#[test]
fn unknown_keys_cause_one_fetch_per_ten_seconds_whatever_their_number() {
    let mut clock = Clock::new();
    clock.need(&["a"], 0.0);
    clock.run(0.0, 0.0, 0.0, |_, _| Ok("k".into()));
    clock.log.clear();
    let source = key_set_name(b"k");
    // A flood for a minute: ten thousand reports per second, thinned to the instants that matter here.
    for tenth in 1..600 {
        let now = f64::from(tenth) / 10.0;
        for _ in 0..1000 {
            let at = clock.at(now);
            clock.schedule.unknown_key(&source, at);
        }
        for issuer in clock.start(now) {
            clock.finish(&issuer, Ok("k"), now);
        }
    }
    assert_eq!(clock.times(), [10.0, 20.0, 30.0, 40.0, 50.0]);
    // What was still asked for at the end of the flood is answered; a rotation long after the last fetch is seen at once.
    assert_eq!(clock.start(60.0), ["a"]);
    clock.finish("a", Ok("k"), 60.0);
    let at = clock.at(500.0);
    clock.schedule.unknown_key(&source, at);
    assert_eq!(clock.schedule.next(clock.at(499.9)), Some(at));
    assert_eq!(clock.start(500.0), ["a"]);
    assert!(clock.finish("a", Ok("rotated"), 500.2).is_some());
}

#[test]
fn unknown_keys_do_not_move_the_regular_fetches_of_a_failing_issuer() {
    let failing = |report: bool| {
        let mut clock = Clock::new();
        clock.need(&["a"], 0.0);
        let source = key_set_name(NO_KEYS.as_bytes());
        let mut now = 0.0;
        while now < 1000.0 {
            if report {
                let at = clock.at(now);
                clock.schedule.unknown_key(&source, at);
            }
            for issuer in clock.start(now) {
                clock.finish(&issuer, Err("down"), now);
            }
            now += 0.5;
        }
        clock.times()
    };
    let (quiet, flooded) = (failing(false), failing(true));
    assert!(flooded.len() > quiet.len());
    let missing: Vec<&f64> = quiet.iter().filter(|t| !flooded.contains(t)).collect();
    assert!(missing.is_empty(), "regular fetches were lost: {missing:?}");
    assert!(flooded.len() <= quiet.len() + 100, "{}", flooded.len());
}

#[test]
fn a_stranger_cannot_make_unused_or_unknown_sources_fetched() {
    let mut clock = Clock::new();
    let at = clock.at(0.0);
    clock.schedule.unknown_key(&key_set_name(b"others"), at);
    assert!(clock.start(100.0).is_empty());
    clock.need(&["a"], 0.0);
    clock.run(0.0, 0.0, 0.0, |_, _| Ok("k".into()));
    clock.need(&[], 1.0);
    let at = clock.at(50.0);
    clock.schedule.unknown_key(&key_set_name(b"k"), at);
    assert!(clock.start(100.0).is_empty());
}

#[test]
fn one_server_gets_few_places_and_others_go_on() {
    let mut clock = Clock::new();
    let slow: Vec<KeySetNeed> = (0..50)
        .map(|i| KeySetNeed {
            issuer: format!("slow-{i}"),
            jwks_uri: format!("http://slow.example/{i}"),
            timeout: Duration::from_secs(5),
        })
        .collect();
    let mut all = slow.clone();
    all.push(need("good"));
    clock.schedule.need(&all, clock.start);
    let started = clock.start(0.0);
    assert_eq!(started.len(), MAX_PER_SERVER + 1);
    assert!(started.contains(&"good".to_string()), "{started:?}");
    // A place that becomes free is taken by the next one.
    let first = started.iter().find(|s| s.starts_with("slow")).unwrap();
    let need = slow.iter().find(|n| n.issuer == *first).unwrap();
    let now = clock.at(5.0);
    clock.schedule.finished(&source_of(need), Err("timeout".into()), now);
    assert_eq!(clock.start(5.0).len(), 1);
}

#[test]
fn the_number_of_sources_is_bounded_and_unused_ones_make_room() {
    let mut clock = Clock::new();
    let many: Vec<KeySetNeed> = (0..MAX_SOURCES).map(|i| need(&format!("i{i}"))).collect();
    clock.schedule.need(&many, clock.start);
    clock.schedule.announce(&need("extra"), clock.start);
    assert_eq!(clock.schedule.sources().count(), MAX_SOURCES);
    assert!(
        clock.schedule.settled(&source_of(&need("extra"))),
        "nobody waits for it"
    );
    let later = clock.at(1.0);
    clock.schedule.need(&many[1..], later);
    clock.schedule.announce(&need("extra"), later);
    assert_eq!(clock.schedule.sources().count(), MAX_SOURCES);
    assert!(clock.schedule.sources().any(|s| s.issuer == "extra"));
}

#[test]
fn timeouts_of_rules_are_cut() {
    let mut clock = Clock::new();
    let mut long = need("a");
    long.timeout = Duration::from_secs(86_400);
    clock.schedule.need(&[long], clock.start);
    clock.start(0.0);
    assert_eq!(clock.log[0].2, MAX_TIMEOUT);
}
