//! The arithmetic of a Deployment's rollout: how many replicas each replica set should have next.
//!
//! Pure, called by `deployment` only. The rules are those of Kubernetes' rolling update: never more than
//! `replicas + maxSurge` pods, never fewer than `replicas - maxUnavailable` available ones; pods that are not available
//! anyway go first.

/// One replica set as the arithmetic sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Set {
    /// `spec.replicas`.
    pub(crate) wanted: i32,
    /// `status.availableReplicas`.
    pub(crate) available: i32,
}

/// Limits of the rollout, resolved to numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Limits {
    pub(crate) replicas: i32,
    pub(crate) max_surge: i32,
    pub(crate) max_unavailable: i32,
}

/// What the new replica set may grow (or must shrink) to now.
pub(crate) fn scale_new(new: Set, old: &[Set], limits: Limits) -> i32 {
    if new.wanted >= limits.replicas {
        return limits.replicas;
    }
    let total = old.iter().map(|set| set.wanted).sum::<i32>() + new.wanted;
    let room = limits.replicas + limits.max_surge - total;
    if room <= 0 {
        return new.wanted;
    }
    new.wanted + room.min(limits.replicas - new.wanted)
}

/// What each old replica set (oldest first) may shrink to now.
pub(crate) fn scale_old(new: Set, old: &[Set], limits: Limits) -> Vec<i32> {
    let mut targets: Vec<i32> = old.iter().map(|set| set.wanted).collect();
    let total = targets.iter().sum::<i32>() + new.wanted;
    let minimum = limits.replicas - limits.max_unavailable;
    let new_unavailable = (new.wanted - new.available).max(0);
    let mut room = total - minimum - new_unavailable;
    if room <= 0 {
        return targets;
    }
    // First what serves nobody.
    for (target, set) in targets.iter_mut().zip(old) {
        let unavailable = (set.wanted - set.available).clamp(0, *target);
        let surplus = unavailable.min(room);
        *target -= surplus;
        room -= surplus;
    }
    // Then available pods, as far as the available ones of all sets allow.
    let available = old.iter().map(|set| set.available).sum::<i32>() + new.available;
    let mut spare = available - minimum;
    for target in &mut targets {
        if spare <= 0 {
            break;
        }
        let surplus = (*target).min(spare);
        *target -= surplus;
        spare -= surplus;
    }
    targets
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONE: Limits = Limits {
        replicas: 1,
        max_surge: 1,
        max_unavailable: 0,
    };

    fn set(wanted: i32, available: i32) -> Set {
        Set { wanted, available }
    }

    #[test]
    fn a_single_replica_is_replaced_only_when_its_successor_is_available() {
        assert_eq!(scale_new(set(0, 0), &[set(1, 1)], ONE), 1);
        assert_eq!(scale_old(set(1, 0), &[set(1, 1)], ONE), [1]);
        assert_eq!(scale_old(set(1, 1), &[set(1, 1)], ONE), [0]);
    }

    #[test]
    fn broken_old_pods_go_first() {
        let limits = Limits {
            replicas: 4,
            max_surge: 1,
            max_unavailable: 1,
        };
        assert_eq!(scale_old(set(1, 0), &[set(4, 3)], limits), [3]);
    }

    /// Simulates every pace of readiness and checks both bounds at each step until the end.
    #[test]
    fn bounds_hold_at_every_step() {
        for replicas in 1..6 {
            for (max_surge, max_unavailable) in [(1, 0), (0, 1), (2, 1), (3, 3)] {
                let limits = Limits {
                    replicas,
                    max_surge,
                    max_unavailable,
                };
                let mut new = set(0, 0);
                let mut old = set(replicas, replicas);
                for _ in 0..100 {
                    new.wanted = scale_new(new, &[old], limits);
                    assert!(new.wanted + old.wanted <= replicas + max_surge);
                    old.wanted = scale_old(new, &[old], limits)[0];
                    old.available = old.available.min(old.wanted);
                    assert!(new.available + old.available >= replicas - max_unavailable);
                    if new.available < new.wanted {
                        new.available += 1;
                    }
                }
                assert_eq!((new, old), (set(replicas, replicas), set(0, 0)), "{limits:?}");
            }
        }
    }
}
