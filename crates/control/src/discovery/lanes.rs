//! Order per object where some changes wait for something first.
//!
//! A RequestAuthentication goes to the hub when the first fetch of its keys is over, so that a policy that works does not begin
//! with refusing good tokens. Each object has a lane of its own: what comes later for the same object waits for what came
//! earlier, and no object waits for another one.

use std::collections::HashMap;
use std::future::Future;
use std::pin::Pin;

use tokio::sync::oneshot;
use tokio::task::JoinSet;

/// Namespace and name.
pub type Key = (String, String);
/// What a change waits for.
pub type Wait = Pin<Box<dyn Future<Output = ()> + Send>>;

/// The lanes of one kind's objects. Dropped, nothing that waits is done any more.
#[derive(Default)]
pub struct Lanes {
    tails: HashMap<Key, oneshot::Receiver<()>>,
    tasks: JoinSet<()>,
}

impl Lanes {
    /// Does `then` after `wait` and after everything that was given for `key` before; at once when there is nothing to wait for.
    pub fn run(&mut self, key: Key, wait: Option<Wait>, then: impl FnOnce() + Send + 'static) {
        // Lanes that have come to their end.
        self.tails
            .retain(|_, tail| matches!(tail.try_recv(), Err(oneshot::error::TryRecvError::Empty)));
        while self.tasks.try_join_next().is_some() {}
        let before = self.tails.remove(&key);
        if before.is_none() && wait.is_none() {
            then();
            return;
        }
        let (done, tail) = oneshot::channel::<()>();
        self.tails.insert(key, tail);
        self.tasks.spawn(async move {
            if let Some(before) = before {
                // Ends also when the task before fails: its sender is dropped.
                let _ = before.await;
            }
            if let Some(wait) = wait {
                wait.await;
            }
            then();
            let _ = done.send(());
        });
    }

    /// Returns when nothing waits any more.
    pub async fn settled(&mut self) {
        while self.tasks.join_next().await.is_some() {}
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    fn key(name: &str) -> Key {
        ("default".into(), name.into())
    }

    #[tokio::test]
    async fn objects_keep_their_order_and_do_not_wait_for_each_other() {
        let log: Arc<Mutex<Vec<&'static str>>> = Arc::default();
        let note = |what: &'static str| {
            let log = log.clone();
            move || log.lock().unwrap().push(what)
        };
        let (open, gate) = oneshot::channel::<()>();
        let mut lanes = Lanes::default();
        let wait: Wait = Box::pin(async move {
            let _ = gate.await;
        });
        lanes.run(key("slow"), Some(wait), note("slow 1"));
        lanes.run(key("slow"), None, note("slow 2"));
        lanes.run(key("fast"), None, note("fast"));
        assert_eq!(*log.lock().unwrap(), ["fast"]);
        open.send(()).unwrap();
        lanes.settled().await;
        assert_eq!(*log.lock().unwrap(), ["fast", "slow 1", "slow 2"]);
        // The lane is free again.
        lanes.run(key("slow"), None, note("slow 3"));
        assert_eq!(log.lock().unwrap().last(), Some(&"slow 3"));
    }

    #[tokio::test]
    async fn a_failure_does_not_close_the_lane() {
        let (tell, told) = oneshot::channel();
        let mut lanes = Lanes::default();
        lanes.run(key("x"), Some(Box::pin(async { panic!("on purpose") })), || {});
        lanes.run(key("x"), None, move || tell.send(()).unwrap());
        lanes.settled().await;
        told.await.unwrap();
    }
}
