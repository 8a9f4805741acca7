//! Leaving in order: SIGTERM and SIGINT ask for a stop, and the run saves before it goes.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;

use crate::error::{Error, Result};

/// Whether someone asked the run to stop; clones share the answer.
#[derive(Debug, Clone, Default)]
pub struct StopFlag {
    /// The signal's number, 0 while none has come.
    signal: Arc<AtomicUsize>,
}

impl StopFlag {
    /// A flag that SIGTERM and SIGINT raise. A SIGINT after that ends the process at once (exit code 1).
    ///
    /// # Errors
    /// Fault when the system refuses the handlers.
    pub fn install() -> Result<Self> {
        let raised = Self::default();
        let asked = Arc::new(AtomicBool::new(false));
        // Handlers run in the order of registration: the exit must look before this signal itself is noted.
        let installed = flag::register_conditional_shutdown(SIGINT, 1, Arc::clone(&asked)).and_then(|_| {
            for signal in [SIGINT, SIGTERM] {
                flag::register(signal, Arc::clone(&asked))?;
                flag::register_usize(signal, Arc::clone(&raised.signal), signal as usize)?;
            }
            Ok(())
        });
        installed.map_err(|source| Error::Fault(format!("cannot listen for SIGINT and SIGTERM: {source}")))?;
        Ok(raised)
    }

    /// The name of the signal that asked for a stop, if one did.
    pub fn raised_by(&self) -> Option<&'static str> {
        match self.signal.load(Ordering::Relaxed) {
            0 => None,
            number if number == SIGINT as usize => Some("SIGINT"),
            _ => Some("SIGTERM"),
        }
    }
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
        Ok(())
    }
}
