//! What a verifier remembers of chains that it has proven.
//!
//! Proxies see the same few certificates in every handshake, and checking who signed one costs as much as checking that the peer
//! holds its key. The first answer depends on three things only: the bytes of the chain, the roots, and the time. A
//! [`Proven`] belongs to one verifier, so to one set of roots; its key is the digest of every byte of the chain, in order; and an
//! answer counts only at a time when every certificate of the chain is valid. Whatever is not exactly that is checked in
//! full. Only good answers are kept. Names and the proof of the key are no part of it: verifiers check them every time.

use std::collections::HashMap;
use std::sync::Mutex;

use aws_lc_rs::digest;
use rustls_pki_types::{CertificateDer, UnixTime};
use x509_parser::prelude::{FromDer, X509Certificate};

/// Most chains that are remembered; peers choose them, but only those that the roots vouch for.
const MAX_CHAINS: usize = 1024;

type Key = [u8; digest::SHA256_OUTPUT_LEN];

/// When every certificate of a chain is valid, in seconds since 1970, both included.
#[derive(Clone, Copy, Debug)]
struct Validity {
    from: u64,
    to: u64,
}

impl Validity {
    fn contains(self, now: UnixTime) -> bool {
        (self.from..=self.to).contains(&now.as_secs())
    }
}

/// Chains that lead to the roots of one verifier.
#[derive(Debug, Default)]
pub(crate) struct Proven {
    chains: Mutex<HashMap<Key, Validity>>,
}

impl Proven {
    /// Runs `check`, which proves the chain at the time `now`, unless exactly this chain has been proven and every certificate
    /// of it is valid now.
    ///
    /// # Errors
    /// Those of `check`; nothing is remembered then.
    pub(crate) fn or_check<E>(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
        check: impl FnOnce() -> Result<(), E>,
    ) -> Result<(), E> {
        let key = key(end_entity, intermediates);
        // A lock that a panic has poisoned is no reason to trust, nor to refuse: everything is checked.
        if let Ok(chains) = self.chains.lock()
            && chains.get(&key).is_some_and(|validity| validity.contains(now))
        {
            return Ok(());
        }
        check()?;
        if let Some(validity) = validity(end_entity, intermediates)
            && validity.contains(now)
            && let Ok(mut chains) = self.chains.lock()
        {
            if chains.len() >= MAX_CHAINS {
                chains.clear();
            }
            chains.insert(key, validity);
        }
        Ok(())
    }
}

/// Lengths are part of it, so that no two chains have the same bytes.
fn key(end_entity: &CertificateDer<'_>, intermediates: &[CertificateDer<'_>]) -> Key {
    let mut context = digest::Context::new(&digest::SHA256);
    for certificate in std::iter::once(end_entity).chain(intermediates) {
        context.update(&(certificate.len() as u64).to_be_bytes());
        context.update(certificate);
    }
    let mut key = Key::default();
    key.copy_from_slice(context.finish().as_ref());
    key
}

fn validity(end_entity: &CertificateDer<'_>, intermediates: &[CertificateDer<'_>]) -> Option<Validity> {
    let mut all = Validity { from: 0, to: u64::MAX };
    for certificate in std::iter::once(end_entity).chain(intermediates) {
        let (_, parsed) = X509Certificate::from_der(certificate).ok()?;
        let one = parsed.validity();
        all.from = all.from.max(u64::try_from(one.not_before.timestamp()).ok()?);
        all.to = all.to.min(u64::try_from(one.not_after.timestamp()).ok()?);
    }
    Some(all)
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::time::Duration;

    use mantlet_testkit::TestCa;

    use super::*;

    fn chain(ca: &TestCa, account: &str) -> CertificateDer<'static> {
        let text = &ca.workload("default", account).response[0];
        crate::pem::read_certificates("leaf", text.as_bytes())
            .unwrap()
            .remove(0)
    }

    /// Whether the full check ran.
    fn checked(proven: &Proven, leaf: &CertificateDer<'_>, rest: &[CertificateDer<'_>], now: UnixTime) -> bool {
        let ran = Cell::new(false);
        let done: Result<(), ()> = proven.or_check(leaf, rest, now, || {
            ran.set(true);
            Ok(())
        });
        done.unwrap();
        ran.get()
    }

    #[test]
    fn only_the_same_bytes_at_a_time_of_validity_are_spared_the_check() {
        let ca = TestCa::new("cluster.local");
        let (leaf, other) = (chain(&ca, "a"), chain(&ca, "b"));
        let now = UnixTime::now();
        let at = |seconds: i64| {
            let then = now.as_secs().checked_add_signed(seconds).unwrap();
            UnixTime::since_unix_epoch(Duration::from_secs(then))
        };
        let proven = Proven::default();
        assert!(checked(&proven, &leaf, &[], now));
        assert!(!checked(&proven, &leaf, &[], now));
        assert!(!checked(&proven, &leaf, &[], at(3600)));
        // The clock went past the end, or back before the beginning.
        assert!(checked(&proven, &leaf, &[], at(48 * 3600)));
        assert!(checked(&proven, &leaf, &[], at(-48 * 3600)));
        // What was found good at such a time (by a check that knows better) is not good at another.
        assert!(checked(&proven, &leaf, &[], at(48 * 3600)));
        // Another chain: other bytes, one more, one bit.
        assert!(checked(&proven, &other, &[], now));
        assert!(checked(&proven, &leaf, std::slice::from_ref(&other), now));
        let mut bent = leaf.to_vec();
        let last = bent.len() - 1;
        bent[last] ^= 1;
        assert!(checked(&proven, &CertificateDer::from(bent), &[], now));
        // Another verifier has proven nothing.
        assert!(checked(&Proven::default(), &leaf, &[], now));
    }

    #[test]
    fn refusals_are_not_remembered_and_memory_is_bounded() {
        let ca = TestCa::new("cluster.local");
        let leaf = chain(&ca, "a");
        let proven = Proven::default();
        for _ in 0..2 {
            assert_eq!(proven.or_check(&leaf, &[], UnixTime::now(), || Err("no")), Err("no"));
        }
        assert!(checked(&proven, &leaf, &[], UnixTime::now()));
        for number in 0..MAX_CHAINS {
            let mut full = Key::default();
            full[..8].copy_from_slice(&(number as u64).to_be_bytes());
            let mut chains = proven.chains.lock().unwrap();
            chains.insert(full, Validity { from: 0, to: 1 });
        }
        let other = chain(&ca, "b");
        assert!(checked(&proven, &other, &[], UnixTime::now()));
        assert_eq!(proven.chains.lock().unwrap().len(), 1);
    }
}
