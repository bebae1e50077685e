//! The whole benchmark, small: it must run to its end and measure something, in every protocol variant.

use std::path::Path;
use std::process::Command;

#[test]
fn every_variant_runs_to_its_end() {
    let fleet = Path::new(env!("CARGO_BIN_EXE_bench-fleet"));
    let mantletd = fleet.with_file_name("mantletd");
    assert!(
        mantletd.exists(),
        "{} is missing: cargo build -p mantlet-control",
        mantletd.display()
    );
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("figures.json");
    let done = Command::new(fleet)
        .args([
            "run",
            "--sidecars",
            "6",
            "--services",
            "12",
            "--endpoints",
            "2",
            "--namespaces",
            "3",
        ])
        .args(["--writes", "2", "--seconds", "0.5", "--mantletd"])
        .arg(&mantletd)
        .arg("--out")
        .arg(&out)
        .output()
        .unwrap();
    let log = String::from_utf8_lossy(&done.stdout).into_owned() + &String::from_utf8_lossy(&done.stderr);
    assert!(done.status.success(), "{log}");
    let figures: serde_json::Value = serde_json::from_slice(&std::fs::read(out).unwrap()).unwrap();
    let rounds = figures["rounds"].as_array().unwrap();
    assert_eq!(rounds.len(), 3, "{log}");
    for round in rounds {
        for name in [
            "kB per proxy",
            "policy, mesh-wide, p50 ms",
            "endpoint changes without pause, /s",
            "certificates, /s",
        ] {
            let figure = round["figures"][name].as_f64().unwrap_or_default();
            assert!(figure > 0.0, "{name} in {round:#}");
        }
    }
    // Five of twelve services are less than all.
    let kb = |mode: &str| {
        let round = rounds.iter().find(|r| r["mode"] == mode).unwrap();
        round["figures"]["kB per proxy"].as_f64().unwrap()
    };
    assert!(kb("OnDemand") < kb("Delta"), "{log}");
}
