//! Resource usage of a run: memory, waiting time, and means over the window between two reports.

use std::collections::BTreeMap;
use std::fs;
use std::time::{Duration, Instant};

/// ProcessMemory of the process, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ProcessMemory {
    /// Current use (`VmRSS`).
    pub resident: u64,
    /// Peak use so far (`VmHWM`).
    pub peak: u64,
}

impl ProcessMemory {
    /// Reads `/proc/self/status`; `None` if the system has none.
    pub fn now() -> Option<Self> {
        let status = fs::read_to_string("/proc/self/status").ok()?;
        Some(Self { resident: kibibytes(&status, "VmRSS:")?, peak: kibibytes(&status, "VmHWM:")? })
    }
}

/// `VmRSS:   1234 kB` -> 1234 * 1024
fn kibibytes(status: &str, key: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix(key))?;
    Some(line.trim().strip_suffix("kB")?.trim_end().parse::<u64>().ok()? * 1024)
}

/// Measures the fraction of time spent waiting, mainly for the next batch.
#[derive(Debug)]
pub struct WaitClock {
    since: Instant,
    waited: Duration,
}

impl Default for WaitClock {
    fn default() -> Self {
        Self { since: Instant::now(), waited: Duration::ZERO }
    }
}

impl WaitClock {
    /// Runs `wait` and counts its time as waiting.
    pub fn waiting<T>(&mut self, wait: impl FnOnce() -> T) -> T {
        let start = Instant::now();
        let result = wait();
        self.waited += start.elapsed();
        result
    }

    /// Returns the fraction of time spent waiting since the last call, in `[0, 1]`, and resets the clock.
    pub fn take_share(&mut self) -> f64 {
        let Self { since, waited } = std::mem::take(self);
        let whole = since.elapsed().as_secs_f64();
        if whole > 0.0 { (waited.as_secs_f64() / whole).min(1.0) } else { 0.0 }
    }
}

/// Means by name of the values added since the last [`take`](Self::take).
#[derive(Debug, Clone, Default)]
pub struct RunningMeans {
    sums: BTreeMap<String, (f64, u64)>,
}

impl RunningMeans {
    /// Adds one value under `name`, such as `loss/id_clip/quartile_0`.
    pub fn add(&mut self, name: impl Into<String>, value: f64) {
        let (sum, count) = self.sums.entry(name.into()).or_default();
        *sum += value;
        *count += 1;
    }

    /// Returns every name with its mean, in name order, and resets the means.
    pub fn take(&mut self) -> Vec<(String, f64)> {
        std::mem::take(&mut self.sums).into_iter().map(|(name, (sum, count))| (name, sum / count as f64)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_this_process() {
        let memory = ProcessMemory::now();
        assert!(memory.is_some_and(|memory| memory.resident > 1 << 20 && memory.peak >= memory.resident));
        assert_eq!(kibibytes("Name:\tx\nVmRSS:\t    1234 kB\n", "VmRSS:"), Some(1234 * 1024));
        assert_eq!(kibibytes("Name:\tx\n", "VmRSS:"), None);
    }

    #[test]
    fn waiting_is_a_share_of_the_time() {
        let mut clock = WaitClock::default();
        let pause = || std::thread::sleep(Duration::from_millis(20));
        assert_eq!(clock.take_share(), 0.0);
        assert_eq!(clock.waiting(|| (pause(), 7)).1, 7);
        pause();
        let share = clock.take_share();
        assert!(share > 0.0 && share < 1.0, "{share}");
        pause();
        assert_eq!(clock.take_share(), 0.0);
    }

    #[test]
    fn means_are_by_name_and_begin_anew() {
        let mut means = RunningMeans::default();
        for (name, value) in [("b", 1.0), ("a", 2.0), ("a", 4.0)] {
            means.add(name, value);
        }
        assert_eq!(means.take(), [("a".to_owned(), 3.0), ("b".to_owned(), 1.0)]);
        assert!(means.take().is_empty());
    }
}
