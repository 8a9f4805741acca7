//! Work of several ranks: one alone while the others wait, or each by itself, with one outcome for all.
//!
//! No work that can fail on one rank alone runs inside a collective. A rank reports its failure here, and the others
//! stop at once instead of waiting for it.

use std::ops::{ControlFlow, Deref};
use std::rc::Rc;
use std::time::Duration;

use hyperlora_core::{Error, Result};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::{Collective, Failure, WorldOfOne};

/// Ranks of a run, with their deadline for work that takes longer than a collective: reading models, writing
/// checkpoints, generating pictures.
///
/// # Examples
/// ```
/// use hyperlora_ranks::Ranks;
///
/// let ranks = Ranks::alone();
/// // The main rank works alone, and all ranks learn of its failure.
/// ranks.on_main("rank 0 to write the summary", || Ok(()))?;
/// // Every rank works, and none continues if one failed.
/// let samples = ranks.try_on_all("all ranks to open the data", || Ok(100))?;
/// // Every rank receives the results of all.
/// assert_eq!(ranks.share("the sample counts", Ok(&samples))?, [100]);
/// # Ok::<(), hyperlora_core::Error>(())
/// ```
#[derive(Clone)]
pub struct Ranks {
    collective: Rc<dyn Collective>,
    deadline: Duration,
}

/// Outcome of a rank's work, as the others receive it.
#[derive(Serialize, Deserialize)]
enum Note<T> {
    Made(T),
    /// Name of a signal that arrived while the rank waited for its data.
    Stopped(String),
    Failed(Failure),
}

impl Ranks {
    /// Makes the ranks behind `collective`, with `deadline` for [`on_main`](Self::on_main) and
    /// [`try_on_all`](Self::try_on_all).
    pub fn new(collective: Rc<dyn Collective>, deadline: Duration) -> Self {
        Self { collective, deadline }
    }

    /// Makes a single process, which waits for nobody.
    pub fn alone() -> Self {
        Self::new(Rc::new(WorldOfOne::new()), Duration::ZERO)
    }

    /// Returns the same ranks with another deadline.
    #[must_use]
    pub fn with_deadline(&self, deadline: Duration) -> Self {
        Self { collective: self.collective(), deadline }
    }

    /// Returns the same ranks, whose collectives go through `collective`.
    #[must_use]
    pub fn through(&self, collective: Rc<dyn Collective>) -> Self {
        Self { collective, deadline: self.deadline }
    }

    /// Returns the collectives of these ranks.
    pub fn collective(&self) -> Rc<dyn Collective> {
        Rc::clone(&self.collective)
    }

    /// Returns the longest wait for the work of another rank.
    pub fn deadline(&self) -> Duration {
        self.deadline
    }

    /// Runs `work` on the main rank alone while the others wait. `what` completes the sentence "waiting for ...".
    ///
    /// # Errors
    /// As [`try_on_all`](Self::try_on_all).
    pub fn on_main(&self, what: &str, work: impl FnOnce() -> Result<()>) -> Result<()> {
        self.try_on_all(what, || if self.is_main() { work() } else { Ok(()) })
    }

    /// Runs `work` on every rank. No rank continues if one of them failed.
    ///
    /// # Errors
    /// Those of `work` on this rank. PeerFailed: another rank failed; carries its name and its error. Peer: a rank does
    /// not arrive within the deadline.
    pub fn try_on_all<T>(&self, what: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
        let own = work();
        let heard = self.barrier(what, self.deadline).and_then(|()| self.share(what, own.as_ref().map(|_| &())));
        let own = own?;
        heard.map(|_| own)
    }

    /// Gives every rank the results of all, by rank. A rank that failed passes its error, and receives nothing.
    ///
    /// # Errors
    /// PeerFailed: names the first other rank that failed. Otherwise those of [`Collective::exchange`].
    pub fn share<T: Serialize + DeserializeOwned>(
        &self,
        what: &str,
        own: std::result::Result<&T, &Error>,
    ) -> Result<Vec<T>> {
        let all = self.share_unless_stopped(what, own.map(ControlFlow::Continue))?;
        all.continue_value().ok_or_else(|| Error::Fault("a rank stopped where none is asked to".into()))
    }

    /// Shares results like [`share`](Self::share), for work that waits for data: a rank that was asked to stop
    /// meanwhile breaks with the name of the signal, and all ranks stop with it.
    ///
    /// # Errors
    /// As [`share`](Self::share).
    pub fn share_unless_stopped<T: Serialize + DeserializeOwned>(
        &self,
        what: &str,
        own: std::result::Result<ControlFlow<&'static str, &T>, &Error>,
    ) -> Result<ControlFlow<&'static str, Vec<T>>> {
        let note = match own {
            Ok(ControlFlow::Continue(made)) => Note::Made(made),
            Ok(ControlFlow::Break(signal)) => Note::Stopped(signal.into()),
            Err(error) => Note::Failed(Failure::of(error)),
        };
        let broken = |error: serde_json::Error| Error::Fault(format!("a note between ranks cannot be read: {error}"));
        let notes = self.exchange(what, &serde_json::to_vec(&note).map_err(broken)?)?;
        let mut all = Vec::with_capacity(notes.len());
        let mut stopped = None;
        for (rank, note) in notes.iter().enumerate().take_while(|_| own.is_ok()) {
            match serde_json::from_slice(note).map_err(broken)? {
                Note::Made(made) => all.push(made),
                Note::Stopped(name) => stopped = Some(signal(name.as_bytes())),
                Note::Failed(failure) => return Err(failure.heard_from(rank, &*self.collective)),
            }
        }
        Ok(stopped.map_or(ControlFlow::Continue(all), ControlFlow::Break))
    }

    /// Returns the name of a signal that asked any rank to stop; `own` is this rank's. All ranks get the same answer.
    ///
    /// # Errors
    /// Those of [`Collective::exchange`].
    pub fn asked_to_stop(&self, own: Option<&'static str>) -> Result<Option<&'static str>> {
        let notes = self.exchange("all ranks to go on", own.unwrap_or_default().as_bytes())?;
        Ok(notes.iter().find(|note| !note.is_empty()).map(|name| signal(name)))
    }
}

impl Deref for Ranks {
    type Target = dyn Collective;

    fn deref(&self) -> &Self::Target {
        &*self.collective
    }
}

/// Returns the signal with the name that another rank sent.
fn signal(name: &[u8]) -> &'static str {
    ["SIGINT", "SIGHUP"].into_iter().find(|known| known.as_bytes() == name).unwrap_or("SIGTERM")
}
