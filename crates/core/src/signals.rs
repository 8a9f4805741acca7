//! Orderly stop: SIGTERM, SIGINT and SIGHUP request a stop, and the run saves before it exits.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::flag;

use crate::{Error, Result};

/// Stop request of the process. Clones share it.
#[derive(Debug, Clone, Default)]
pub struct StopFlag {
    /// Signal number, 0 before any signal.
    signal: Arc<AtomicUsize>,
}

impl StopFlag {
    /// Makes a flag that SIGTERM, SIGINT and SIGHUP raise. A later SIGINT ends the process at once (exit code 1).
    /// SIGHUP stays ignored in a process that was started with it ignored, as `nohup` does.
    ///
    /// # Errors
    /// Fault: the system refuses the handlers.
    pub fn install() -> Result<Self> {
        let raised = Self::default();
        let asked = Arc::new(AtomicBool::new(false));
        // Handlers run in the order of registration: the conditional exit must run before this signal sets the flag.
        let installed = flag::register_conditional_shutdown(SIGINT, 1, Arc::clone(&asked)).and_then(|_| {
            let hang_up = Some(SIGHUP).filter(|_| !is_ignored(SIGHUP));
            for signal in [SIGINT, SIGTERM].into_iter().chain(hang_up) {
                flag::register(signal, Arc::clone(&asked))?;
                flag::register_usize(signal, Arc::clone(&raised.signal), signal as usize)?;
            }
            Ok(())
        });
        installed.map_err(|source| Error::Fault(format!("cannot listen for SIGINT, SIGTERM and SIGHUP: {source}")))?;
        Ok(raised)
    }

    /// Raises the flag as SIGINT does, for a user who asks for a stop in another way.
    pub fn raise(&self) {
        self.signal.store(SIGINT as usize, Ordering::Relaxed);
    }

    /// Returns the name of the signal that requested a stop, if any.
    pub fn raised_by(&self) -> Option<&'static str> {
        match self.signal.load(Ordering::Relaxed) {
            0 => None,
            number if number == SIGINT as usize => Some("SIGINT"),
            number if number == SIGHUP as usize => Some("SIGHUP"),
            _ => Some("SIGTERM"),
        }
    }
}

/// Tells whether this process ignores a signal, according to the system.
fn is_ignored(signal: i32) -> bool {
    std::fs::read_to_string("/proc/self/status").is_ok_and(|status| ignores(&status, signal))
}

/// Looks for `signal` in the mask of ignored signals of a `/proc/PID/status`.
fn ignores(status: &str, signal: i32) -> bool {
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0);
    mask >> (signal - 1) & 1 == 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signal_raises_the_flag_and_the_process_lives_on() -> Result<()> {
        let stop = StopFlag::install()?;
        let elsewhere = stop.clone();
        assert_eq!(stop.raised_by(), None);
        signal_hook::low_level::raise(SIGTERM).map_err(|e| Error::Fault(e.to_string()))?;
        assert_eq!(elsewhere.raised_by(), Some("SIGTERM"));
        signal_hook::low_level::raise(SIGHUP).map_err(|e| Error::Fault(e.to_string()))?;
        // These tests may run under nohup too.
        assert_eq!(elsewhere.raised_by(), Some(if is_ignored(SIGHUP) { "SIGTERM" } else { "SIGHUP" }));
        Ok(())
    }

    #[test]
    fn a_signal_that_is_ignored_is_known() {
        let status = |mask: &str| format!("Name:\thyperlora\nSigBlk:\tffffffffffffffff\nSigIgn:\t{mask}\n");
        assert!(ignores(&status("0000000000000001"), SIGHUP) && ignores(&status("0000000000001003"), SIGINT));
        assert!(!ignores(&status("0000000000001002"), SIGHUP) && !ignores("", SIGHUP));
    }
}
