//! The same tokens go through a real Envoy and through this proxy, both fed with the same model: answer, body,
//! `www-authenticate` and what the application sees are equal, outside the listed deviations.

#[path = "../common/mod.rs"]
mod common;

mod cases;
mod pair;
mod routing;
mod threats;

use pair::{Outcome, Pair};

/// Every case of the table.
#[tokio::test]
async fn tokens_mean_what_they_mean_to_envoy() {
    let issuer = mantlet_testkit::jwt::Issuer::new();
    let scenarios = cases::scenarios(&issuer);
    let pair = Pair::start(scenarios.iter().map(|s| s.jwt.clone()).collect()).await;
    let listed = include_str!("../../../../docs/deviations.toml");
    let (mut count, mut passed, mut deviating) = (0, 0, 0);
    let mut wrong = Vec::new();
    for (index, scenario) in scenarios.iter().enumerate() {
        for case in &scenario.cases {
            let theirs = pair.envoy(index, &case.request).await;
            let ours = pair.ours(index, &case.request).await;
            count += 1;
            passed += usize::from(ours.status == 200);
            let good = match case.deviation {
                None => theirs == ours,
                // A deviation denies, and is needed: Envoy lets it pass.
                Some(cases::Deviation::Denies(id)) => {
                    deviating += 1;
                    assert!(listed.contains(&format!("id = \"{id}\"")), "{id} is not listed");
                    theirs.status == 200 && matches!(ours.status, 401 | 403)
                }
                Some(cases::Deviation::ForwardsOther(id)) => {
                    deviating += 1;
                    assert!(listed.contains(&format!("id = \"{id}\"")), "{id} is not listed");
                    (theirs.status, ours.status) == (200, 200) && theirs != ours
                }
            };
            if !good {
                let name = format!("{} / {}", scenario.name, case.name);
                wrong.push(format!("{name}\n  envoy: {theirs:?}\n  ours:  {ours:?}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{} of {count}:\n{}", wrong.len(), wrong.join("\n"));
    assert!(count >= 200, "only {count} cases");
    assert!(
        passed * 10 >= count && passed * 10 <= count * 8,
        "{passed} of {count} pass: one-sided"
    );
    println!("{count} requests, {passed} pass, {deviating} in listed deviations");
    pair.stop();
}

/// What the table is worth: an outcome that differs in any part is a difference.
#[test]
fn outcomes_are_compared_in_full() {
    let one = Outcome {
        status: 401,
        body: "Jwt is expired".into(),
        challenge: Some("Bearer realm=\"http://web/\", error=\"invalid_token\"".into()),
        upstream: None,
    };
    let mut other = one.clone();
    other.challenge = None;
    assert_ne!(one, other);
}
