//! A thread that writes what others hand over: whoever has a line for a file or a pipe never waits for it.
//!
//! The queue is bounded. What finds it full is dropped and counted, and the sink is told how much, so that a reader learns
//! what is missing. `log` and the proxy's access log write through it; it does not know what it carries, nor where to.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// What the writing thread gives to its sink, one after the other.
#[derive(Debug, PartialEq, Eq)]
pub enum Work<T> {
    /// Something that was handed over.
    Item(T),
    /// So many items were dropped since the last one was written, for lack of room.
    Lost(u64),
}

struct State<T> {
    waiting: VecDeque<T>,
    /// Items taken in so far, and how many of them are written.
    accepted: u64,
    written: u64,
    /// Items dropped so far, and how many of them the sink knows of.
    dropped: u64,
    told: u64,
    /// No item will come any more.
    closed: bool,
}

struct Shared<T> {
    state: Mutex<State<T>>,
    capacity: usize,
    /// Something waits, or nothing will any more.
    work: Condvar,
    /// Something has been written.
    progress: Condvar,
}

impl<T> Shared<T> {
    fn lock(&self) -> MutexGuard<'_, State<T>> {
        // No code of a caller runs under the lock.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The thread: ends when the queue is empty and closed.
    fn run(&self, mut sink: impl FnMut(Work<T>)) {
        let mut state = self.lock();
        loop {
            let Some(item) = state.waiting.pop_front() else {
                if state.closed {
                    return;
                }
                state = self.work.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            let lost = state.dropped - state.told;
            state.told = state.dropped;
            drop(state);
            sink(Work::Item(item));
            if lost > 0 {
                sink(Work::Lost(lost));
            }
            state = self.lock();
            state.written += 1;
            self.progress.notify_all();
        }
    }
}

/// Closes the queue when the last [`Writer`] is gone.
struct Close<T>(Arc<Shared<T>>);

impl<T> Drop for Close<T> {
    fn drop(&mut self) {
        self.0.lock().closed = true;
        self.0.work.notify_all();
    }
}

/// The way to a writing thread. Clones share it; when the last one is gone, the thread writes what waits and ends.
pub struct Writer<T>(Arc<Close<T>>);

impl<T> Clone for Writer<T> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<T: Send + 'static> Writer<T> {
    /// Starts a thread of this name; at most `capacity` items wait for it. `sink` may block for as long as it likes.
    ///
    /// # Errors
    /// When there is no thread to be had.
    pub fn start(name: &str, capacity: usize, sink: impl FnMut(Work<T>) + Send + 'static) -> std::io::Result<Self> {
        let shared = Arc::new(Shared {
            state: Mutex::new(State {
                waiting: VecDeque::new(),
                accepted: 0,
                written: 0,
                dropped: 0,
                told: 0,
                closed: false,
            }),
            capacity,
            work: Condvar::new(),
            progress: Condvar::new(),
        });
        let writing = shared.clone();
        std::thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || writing.run(sink))?;
        Ok(Self(Arc::new(Close(shared))))
    }

    /// Hands an item over, or drops and counts it when the queue is full. Never waits for the sink.
    pub fn send(&self, item: T) {
        let shared = &self.0.0;
        let mut state = shared.lock();
        if state.waiting.len() >= shared.capacity {
            state.dropped += 1;
            return;
        }
        state.waiting.push_back(item);
        state.accepted += 1;
        drop(state);
        shared.work.notify_one();
    }

    /// Items dropped so far.
    pub fn dropped(&self) -> u64 {
        self.0.0.lock().dropped
    }

    /// Waits until everything handed over so far is written, at most `limit`; says whether it is. For the end of the
    /// process.
    pub fn finish(&self, limit: Duration) -> bool {
        let shared = &self.0.0;
        let state = shared.lock();
        let target = state.accepted;
        let behind = |state: &mut State<T>| state.written < target;
        let waited = shared.progress.wait_timeout_while(state, limit, behind);
        let (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        state.written >= target
    }
}

impl<T> std::fmt::Debug for Writer<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Writer({} waiting)", self.0.0.lock().waiting.len())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, Sender, channel};
    use std::time::Instant;

    use super::*;

    /// A sink that takes one item per permit and says what it got. Dropping the permits lets it run freely.
    fn held(capacity: usize) -> (Writer<u32>, Sender<()>, Receiver<Work<u32>>) {
        let (permit, permits) = channel::<()>();
        let (seen, all) = channel();
        let writer = Writer::start("test", capacity, move |work| {
            if matches!(work, Work::Item(_)) {
                let _ = permits.recv();
            }
            let _ = seen.send(work);
        });
        (writer.expect("a thread"), permit, all)
    }

    #[test]
    fn what_finds_the_queue_full_is_dropped_counted_and_told() {
        let (writer, permit, all) = held(2);
        // The first one is with the sink once there is room for two more.
        writer.send(0);
        while !writer.0.0.lock().waiting.is_empty() {
            std::thread::yield_now();
        }
        for n in 1..=5 {
            writer.send(n);
        }
        assert_eq!(writer.dropped(), 3);
        drop(permit);
        assert!(writer.finish(Duration::from_secs(60)));
        let got: Vec<_> = all.try_iter().collect();
        assert_eq!(
            got,
            [Work::Item(0), Work::Item(1), Work::Lost(3), Work::Item(2)],
            "in order, and the gap is told once"
        );
        assert_eq!(writer.dropped(), 3);
    }

    #[test]
    fn the_end_waits_for_the_last_item_and_no_longer_than_its_limit() {
        let (writer, permit, all) = held(1);
        writer.send(0);
        while !writer.0.0.lock().waiting.is_empty() {
            std::thread::yield_now();
        }
        writer.send(1);
        // Nobody reads and the queue is full.
        let start = Instant::now();
        assert!(!writer.finish(Duration::from_millis(50)));
        let took = start.elapsed();
        assert!(
            (Duration::from_millis(50)..Duration::from_secs(30)).contains(&took),
            "{took:?}"
        );
        drop(permit);
        assert!(writer.finish(Duration::from_secs(60)));
        assert_eq!(all.try_iter().count(), 2);
    }

    #[test]
    fn what_waits_is_written_after_the_last_handle_is_gone() {
        let (writer, permit, all) = held(8);
        for n in 0..5 {
            writer.clone().send(n);
        }
        drop(writer);
        drop(permit);
        // Ends when the thread has dropped its sink.
        assert_eq!(all.iter().count(), 5);
    }
}
