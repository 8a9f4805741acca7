//! What the ranks tell each other about a step before they reduce its gradients: their losses, or what went wrong.
//!
//! Data are never prepared inside a collective: a rank whose data fail says so here, and the others stop at once instead of
//! waiting for its gradients.

use std::ops::ControlFlow;
use std::time::Duration;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::collective::{Collective, Failure};
use crate::data::scenario::Scenario;
use crate::error::{Error, Result};
use crate::train::step::SampleLoss;

#[derive(Serialize, Deserialize)]
enum Note<T> {
    Made(T),
    /// Asked to stop by the signal of this name while it waited for its data.
    Stopped(String),
    Failed(Failure),
}

/// A signal by its name, which came from another rank.
fn signal(name: &[u8]) -> &'static str {
    ["SIGINT", "SIGHUP"].into_iter().find(|known| known.as_bytes() == name).unwrap_or("SIGTERM")
}

/// What every rank made of its work, by rank: `what` is waited for. A rank that failed (`own` is its error) says so, and gets
/// nothing.
///
/// # Errors
/// PeerFailed that names the first other rank that failed, and why; those of the collective.
pub(super) fn share<T: Serialize + DeserializeOwned>(
    world: &dyn Collective,
    what: &str,
    own: std::result::Result<&T, &Error>,
) -> Result<Vec<T>> {
    let all = share_unless_stopped(world, what, own.map(ControlFlow::Continue))?;
    all.continue_value().ok_or_else(|| Error::Fault("a rank stopped where none is asked to".into()))
}

/// As [`share`], for work that waits for data: where one rank was asked to stop before it had them, all stop.
///
/// # Errors
/// As there.
pub(super) fn share_unless_stopped<T: Serialize + DeserializeOwned>(
    world: &dyn Collective,
    what: &str,
    own: std::result::Result<ControlFlow<&'static str, &T>, &Error>,
) -> Result<ControlFlow<&'static str, Vec<T>>> {
    let note = match own {
        Ok(ControlFlow::Continue(made)) => Note::Made(made),
        Ok(ControlFlow::Break(signal)) => Note::Stopped(signal.into()),
        Err(error) => Note::Failed(Failure::of(error)),
    };
    let broken = |error: serde_json::Error| Error::Fault(format!("a note between ranks cannot be read: {error}"));
    let notes = world.exchange(what, &serde_json::to_vec(&note).map_err(broken)?)?;
    let mut all = Vec::with_capacity(notes.len());
    let mut stopped = None;
    for (rank, note) in notes.iter().enumerate().take_while(|_| own.is_ok()) {
        match serde_json::from_slice(note).map_err(broken)? {
            Note::Made(made) => all.push(made),
            Note::Stopped(name) => stopped = Some(signal(name.as_bytes())),
            Note::Failed(failure) => return Err(failure.heard_from(rank, world)),
        }
    }
    Ok(stopped.map_or(ControlFlow::Continue(all), ControlFlow::Break))
}

/// The losses of all ranks, by rank, unless one of them was asked to stop before it had its data.
///
/// # Errors
/// As [`share`].
pub(super) fn share_losses(
    world: &dyn Collective,
    own: std::result::Result<ControlFlow<&'static str, &[SampleLoss]>, &Error>,
) -> Result<ControlFlow<&'static str, Vec<SampleLoss>>> {
    // A loss travels as its bits: JSON has no NaN.
    let bits = |losses: &[SampleLoss]| -> Vec<(u32, Scenario, u32)> {
        losses.iter().map(|sample| (sample.loss.to_bits(), sample.scenario, sample.timestep)).collect()
    };
    let own = own.map(|losses| losses.map_continue(bits));
    let own = match &own {
        Ok(ControlFlow::Continue(losses)) => Ok(ControlFlow::Continue(losses)),
        Ok(ControlFlow::Break(signal)) => Ok(ControlFlow::Break(*signal)),
        Err(error) => Err(*error),
    };
    let all = share_unless_stopped(world, "all ranks to end their passes", own)?;
    let sample = |(bits, scenario, timestep)| SampleLoss { loss: f32::from_bits(bits), scenario, timestep };
    Ok(all.map_continue(|all| all.into_iter().flatten().map(sample).collect()))
}

/// Whether any rank was asked to stop, by the name of the signal: all ranks stop at the same place.
///
/// # Errors
/// Those of the collective.
pub(super) fn asked_to_stop(world: &dyn Collective, own: Option<&'static str>) -> Result<Option<&'static str>> {
    let notes = world.exchange("all ranks to go on", own.unwrap_or_default().as_bytes())?;
    Ok(notes.iter().find(|note| !note.is_empty()).map(|name| signal(name)))
}

/// Lets every rank do `work` by itself, for up to `deadline`: no rank goes on where one failed.
///
/// # Errors
/// Those of `work` on the rank itself; where another failed, as [`share`].
pub(crate) fn all_or_none<T>(
    world: &dyn Collective,
    what: &str,
    deadline: Duration,
    work: impl FnOnce() -> Result<T>,
) -> Result<T> {
    let own = work();
    let heard = world.barrier(what, deadline).and_then(|()| share(world, what, own.as_ref().map(|_| &())));
    let own = own?;
    heard.map(|_| own)
}

/// Lets rank 0 do `work` alone while the others wait for up to `deadline`.
///
/// # Errors
/// As [`all_or_none`].
pub(super) fn lead_alone(
    world: &dyn Collective,
    what: &str,
    deadline: Duration,
    work: impl FnOnce() -> Result<()>,
) -> Result<()> {
    all_or_none(world, what, deadline, || if world.leads() { work() } else { Ok(()) })
}
