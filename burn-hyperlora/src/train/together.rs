//! What the ranks tell each other about a step before they reduce its gradients: their losses, or what went wrong.
//!
//! Data are never prepared inside a collective: a rank whose data fail says so here, and the others stop at once instead of
//! waiting for its gradients.

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
    Failed(Failure),
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
    let note = own.map_or_else(|error| Note::Failed(Failure::of(error)), Note::Made);
    let broken = |error: serde_json::Error| Error::Fault(format!("a note between ranks cannot be read: {error}"));
    let notes = world.exchange(what, &serde_json::to_vec(&note).map_err(broken)?)?;
    let mut all = Vec::with_capacity(notes.len());
    for (rank, note) in notes.iter().enumerate().take_while(|_| own.is_ok()) {
        match serde_json::from_slice(note).map_err(broken)? {
            Note::Made(made) => all.push(made),
            Note::Failed(failure) => return Err(failure.heard_from(rank, world)),
        }
    }
    Ok(all)
}

/// The losses of all ranks, by rank.
///
/// # Errors
/// As [`share`].
pub(super) fn share_losses(
    world: &dyn Collective,
    own: std::result::Result<&[SampleLoss], &Error>,
) -> Result<Vec<SampleLoss>> {
    // A loss travels as its bits: JSON has no NaN.
    let own = own.map(|losses| -> Vec<(u32, Scenario, u32)> {
        losses.iter().map(|sample| (sample.loss.to_bits(), sample.scenario, sample.timestep)).collect()
    });
    let all = share(world, "all ranks to end their passes", own.as_ref().map_err(|error| *error))?;
    let sample = |(bits, scenario, timestep)| SampleLoss { loss: f32::from_bits(bits), scenario, timestep };
    Ok(all.into_iter().flatten().map(sample).collect())
}

/// Whether any rank was asked to stop, by the name of the signal: all ranks stop at the same place.
///
/// # Errors
/// Those of the collective.
pub(super) fn asked_to_stop(world: &dyn Collective, own: Option<&'static str>) -> Result<Option<&'static str>> {
    let notes = world.exchange("all ranks to go on", own.unwrap_or_default().as_bytes())?;
    let asked = notes.iter().find(|note| !note.is_empty());
    Ok(asked.map(|name| if name == b"SIGINT" { "SIGINT" } else { "SIGTERM" }))
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
