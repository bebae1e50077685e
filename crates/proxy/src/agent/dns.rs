//! Addresses of host names in DNS clusters, looked up again and again through the system's resolver.
//!
//! `xds` says which names are wanted and compiles the answers into the configuration; workers never resolve.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::Duration;

use tokio::sync::watch;

use crate::config::Resolved;

/// Envoy's default refresh rate.
const REFRESH: Duration = Duration::from_secs(5);
/// Longest wait for one answer.
const TIMEOUT: Duration = Duration::from_secs(5);

/// Starts the resolver: send the wanted names, receive what they resolve to. It ends with its users.
pub fn start() -> (watch::Sender<BTreeSet<String>>, watch::Receiver<Resolved>) {
    let (names, wanted) = watch::channel(BTreeSet::new());
    let (answers, resolved) = watch::channel(Resolved::default());
    tokio::spawn(run(wanted, answers));
    (names, resolved)
}

async fn run(mut wanted: watch::Receiver<BTreeSet<String>>, answers: watch::Sender<Resolved>) {
    loop {
        let names = wanted.borrow_and_update().clone();
        let mut next = Resolved::default();
        for name in &names {
            let found = match tokio::time::timeout(TIMEOUT, tokio::net::lookup_host((name.as_str(), 0))).await {
                Ok(Ok(found)) => found.map(|a| a.ip()).collect::<BTreeSet<IpAddr>>(),
                Ok(Err(error)) => {
                    tracing::info!(target: "dns", "{name}: {error}");
                    BTreeSet::new()
                }
                Err(_) => BTreeSet::new(),
            };
            // A resolver that fails for a while must not take a working service away.
            let kept = answers.borrow().get(name).cloned().unwrap_or_default();
            next.insert(name.clone(), if found.is_empty() { kept } else { found });
        }
        answers.send_if_modified(|now| {
            let changed = *now != next;
            *now = next;
            changed
        });
        let again = if names.is_empty() {
            Duration::from_secs(3600)
        } else {
            REFRESH
        };
        tokio::select! {
            changed = wanted.changed() => if changed.is_err() { return },
            () = tokio::time::sleep(again) => {}
            () = answers.closed() => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn names_resolve_and_unknown_ones_stay_empty() {
        let (names, mut resolved) = start();
        names.send_replace(["localhost", "no-such-name.invalid"].map(String::from).into());
        let answer = tokio::time::timeout(
            Duration::from_secs(15),
            resolved.wait_for(|r| r.get("localhost").is_some_and(|a| !a.is_empty())),
        )
        .await
        .unwrap()
        .unwrap()
        .clone();
        assert!(answer["localhost"].iter().all(IpAddr::is_loopback));
        assert!(answer.get("no-such-name.invalid").is_none_or(BTreeSet::is_empty));
    }
}
