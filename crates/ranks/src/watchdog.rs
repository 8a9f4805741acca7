//! Deadline for waits that cannot be cancelled: library calls that another rank blocks, and the work that such a call
//! leaves behind.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// Interval at which the waits are checked.
const LOOK: Duration = Duration::from_millis(100);

/// Watches over any number of waits, from its own thread.
pub(super) struct Watchdog {
    waits: Arc<Mutex<Waits>>,
}

/// Waits by number.
type Waits = BTreeMap<u64, Wait>;

struct Wait {
    until: Instant,
    /// Message if the wait is late.
    line: String,
}

/// Wait that is watched until this is dropped. If it is leaked, the watch continues.
pub(super) struct Watch {
    number: u64,
    waits: Arc<Mutex<Waits>>,
}

impl Watchdog {
    /// Starts a thread that calls `bark` once, with the line of the first late wait. `bark` should end the process.
    pub(super) fn start(bark: impl FnOnce(&str) + Send + 'static) -> Self {
        let waits = Arc::default();
        let watched = Arc::downgrade(&waits);
        thread::spawn(move || {
            // Runs until the watchdog and all waits are gone.
            while let Some(waits) = watched.upgrade() {
                let late = held(&waits).values().find(|wait| wait.until < Instant::now()).map(|wait| wait.line.clone());
                if let Some(line) = late {
                    return bark(&line);
                }
                drop(waits);
                thread::sleep(LOOK);
            }
        });
        Self { waits }
    }

    /// Starts a wait that must end within `deadline`; otherwise `bark` gets `line`.
    pub(super) fn watch(&self, deadline: Duration, line: String) -> Watch {
        let mut waits = held(&self.waits);
        let number = waits.last_key_value().map_or(0, |(last, _)| last + 1);
        waits.insert(number, Wait { until: Instant::now() + deadline, line });
        Watch { number, waits: Arc::clone(&self.waits) }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        held(&self.waits).remove(&self.number);
    }
}

fn held(waits: &Mutex<Waits>) -> MutexGuard<'_, Waits> {
    waits.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::mem;
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn only_waits_that_are_late_and_not_over_are_said() {
        let (said, heard) = mpsc::channel();
        let dog = Watchdog::start(move |line| said.send(line.to_owned()).unwrap());
        let soon = Duration::from_millis(1);
        let over = dog.watch(soon, "over".into());
        drop(over);
        let _patient = dog.watch(Duration::from_mins(10), "patient".into());
        thread::sleep(3 * LOOK);
        assert!(heard.try_recv().is_err());
        // The watch continues without its holder and without the watchdog's.
        mem::forget(dog.watch(soon, "late".into()));
        drop(dog);
        assert_eq!(heard.recv_timeout(Duration::from_secs(20)).unwrap(), "late");
    }
}
