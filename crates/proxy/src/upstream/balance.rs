//! Choice of an endpoint, and ejection of endpoints that fail.

use std::cell::Cell;
use std::rc::Rc;
use std::time::{Duration, Instant};

use mantlet_model::cluster::{Balancer, Outlier};
use rand::Rng;

use super::Endpoint;

/// What outlier detection remembers of an endpoint.
#[derive(Default)]
pub struct OutlierState {
    consecutive_5xx: Cell<u32>,
    consecutive_gateway: Cell<u32>,
    ejections: Cell<u32>,
    until: Cell<Option<Instant>>,
}

impl OutlierState {
    /// Whether the endpoint is ejected now.
    pub fn ejected(&self) -> bool {
        match self.until.get() {
            Some(until) if Instant::now() < until => true,
            Some(_) => {
                self.until.set(None);
                false
            }
            None => false,
        }
    }

    /// Notes the status of a response (connection failures count as 503).
    pub fn note(&self, settings: &Outlier, status: u16, all: &[Rc<Endpoint>]) {
        if status < 500 {
            self.consecutive_5xx.set(0);
            self.consecutive_gateway.set(0);
            return;
        }
        self.consecutive_5xx.set(self.consecutive_5xx.get() + 1);
        if matches!(status, 502..=504) {
            self.consecutive_gateway.set(self.consecutive_gateway.get() + 1);
        } else {
            self.consecutive_gateway.set(0);
        }
        let over = |limit: u32, seen: u32| limit > 0 && seen >= limit;
        if !over(settings.consecutive_5xx, self.consecutive_5xx.get())
            && !over(settings.consecutive_gateway_errors, self.consecutive_gateway.get())
        {
            return;
        }
        let ejected = all.iter().filter(|e| e.outlier.ejected()).count();
        // At least one endpoint may be ejected whatever the share says (Envoy's rule).
        if ejected > 0 && (ejected + 1) * 100 > all.len() * settings.max_ejection_percent as usize {
            return;
        }
        self.consecutive_5xx.set(0);
        self.consecutive_gateway.set(0);
        let times = self.ejections.get().saturating_add(1);
        self.ejections.set(times);
        let length = Duration::from_millis(settings.base_ejection_ms.max(1)).saturating_mul(times);
        self.until
            .set(Some(Instant::now() + length.min(Duration::from_secs(300))));
    }
}

/// Chooses among the healthy endpoints that are not ejected; when all are ejected, among the healthy ones, since a
/// guess is better than a certain failure. `avoid` is taken only when there is no other.
pub fn choose(
    all: &[Rc<Endpoint>],
    balancer: Balancer,
    next: &Cell<usize>,
    avoid: Option<&Rc<Endpoint>>,
) -> Option<Rc<Endpoint>> {
    if let [only] = all {
        return only.healthy.get().then(|| only.clone());
    }
    let fits = |level: u8, e: &Rc<Endpoint>| {
        e.healthy.get()
            && (level > 0 || !e.outlier.ejected())
            && (level > 1 || !avoid.is_some_and(|a| Rc::ptr_eq(a, e)))
    };
    for level in 0..=2 {
        let count = all.iter().filter(|e| fits(level, e)).count();
        if count == 0 {
            continue;
        }
        let nth = |n: usize| all.iter().filter(|e| fits(level, e)).nth(n).cloned();
        return match balancer {
            Balancer::RoundRobin => {
                let at = next.get();
                next.set(at.wrapping_add(1));
                nth(at % count)
            }
            Balancer::Random | Balancer::Provided => nth(rand::rng().random_range(0..count)),
            Balancer::LeastRequest => {
                let mut rng = rand::rng();
                let a = nth(rng.random_range(0..count))?;
                let b = nth(rng.random_range(0..count))?;
                // Compared without division: active per weight.
                let load = |x: &Endpoint, y: &Endpoint| u64::from(x.active.get() + 1) * u64::from(y.weight.get());
                Some(if load(&a, &b) <= load(&b, &a) { a } else { b })
            }
        };
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn endpoints(n: u16) -> Vec<Rc<Endpoint>> {
        (0..n)
            .map(|i| Rc::new(Endpoint::new(([10, 0, 0, 1], 1000 + i).into(), None, None)))
            .collect()
    }

    #[test]
    fn round_robin_visits_all_in_turn_and_skips_unhealthy_ones() {
        let all = endpoints(4);
        all[2].healthy.set(false);
        let next = Cell::new(0);
        let ports: Vec<u16> = (0..6)
            .map(|_| choose(&all, Balancer::RoundRobin, &next, None).unwrap().address.port())
            .collect();
        assert_eq!(ports, [1000, 1001, 1003, 1000, 1001, 1003]);
    }

    #[test]
    fn least_request_prefers_the_idle_endpoint() {
        let all = endpoints(2);
        all[0].active.set(50);
        let next = Cell::new(0);
        let idle = (0..200)
            .filter(|_| {
                choose(&all, Balancer::LeastRequest, &next, None)
                    .unwrap()
                    .address
                    .port()
                    == 1001
            })
            .count();
        // The busy one is taken only when both draws hit it: a quarter of the time.
        assert!((110..190).contains(&idle), "{idle} of 200");
    }

    #[test]
    fn a_retry_goes_elsewhere_if_there_is_an_elsewhere() {
        let all = endpoints(2);
        let next = Cell::new(0);
        for _ in 0..20 {
            let got = choose(&all, Balancer::LeastRequest, &next, Some(&all[0])).unwrap();
            assert_eq!(got.address.port(), 1001);
        }
        all[1].healthy.set(false);
        assert!(choose(&all, Balancer::LeastRequest, &next, Some(&all[0])).is_some());
        all[0].healthy.set(false);
        assert!(choose(&all, Balancer::LeastRequest, &next, None).is_none());
    }

    #[test]
    fn consecutive_errors_eject_up_to_the_share() {
        let settings = Outlier {
            consecutive_5xx: 3,
            consecutive_gateway_errors: 0,
            interval_ms: 10_000,
            base_ejection_ms: 30_000,
            max_ejection_percent: 50,
        };
        let all = endpoints(3);
        for _ in 0..2 {
            all[0].outlier.note(&settings, 500, &all);
        }
        all[0].outlier.note(&settings, 200, &all);
        all[0].outlier.note(&settings, 500, &all);
        assert!(!all[0].outlier.ejected(), "a success in between starts the count again");
        for _ in 0..2 {
            all[0].outlier.note(&settings, 503, &all);
        }
        assert!(all[0].outlier.ejected());
        for _ in 0..3 {
            all[1].outlier.note(&settings, 503, &all);
        }
        assert!(!all[1].outlier.ejected(), "2 of 3 is more than half");
    }
}
