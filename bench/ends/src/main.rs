//! What the benchmark needs beside the ready-made load generators: an application that speaks gRPC, a client that keeps to
//! a schedule, and a stopwatch for the start of a program. Called by `bench/harness`; it knows nothing of proxies.

mod grpc;
mod paced;
mod starts;

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

const USAGE: &str = "usage: bench-ends grpc ADDRESS
       bench-ends paced ADDRESS PATH --rate N --seconds N --connections N
       bench-ends start READY [--log FILE] -- PROGRAM ARGUMENTS…   (READY: http://ADDRESS/PATH or tcp://ADDRESS)";

fn main() -> Result<()> {
    let all: Vec<String> = std::env::args().skip(1).collect();
    let split = all.iter().position(|a| a == "--").unwrap_or(all.len());
    let (own, program) = (&all[..split], all.get(split + 1..).unwrap_or_default());
    let mut words = Vec::new();
    let mut named = std::collections::HashMap::new();
    let mut arguments = own.iter();
    while let Some(argument) = arguments.next() {
        if let Some(name) = argument.strip_prefix("--") {
            named.insert(
                name,
                arguments.next().with_context(|| format!("{argument} needs a value"))?,
            );
        } else {
            words.push(argument.as_str());
        }
    }
    let number = |name: &str| -> Result<f64> {
        let text = named.get(name).with_context(|| format!("--{name} is missing"))?;
        let value: f64 = text.parse().with_context(|| format!("--{name} {text:?}"))?;
        ensure!(value > 0.0, "--{name} must be more than 0");
        Ok(value)
    };
    match words.as_slice() {
        ["grpc", address] => grpc::serve(address.parse()?),
        ["paced", address, path] => {
            let plan = paced::Plan {
                address: address.parse()?,
                path: (*path).to_owned(),
                interval: Duration::from_secs_f64(1.0 / number("rate")?),
                length: Duration::from_secs_f64(number("seconds")?),
                connections: number("connections")? as u32,
            };
            println!("{}", paced::run(&plan)?);
            Ok(())
        }
        ["start", ready] => {
            println!(
                "{}",
                starts::run(&ready.parse()?, named.get("log").map(|p| p.as_ref()), program)?
            );
            Ok(())
        }
        _ => bail!("{USAGE}"),
    }
}
