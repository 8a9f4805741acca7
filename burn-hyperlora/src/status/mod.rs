//! Where a run stands, from its files alone. Nothing is written, and a run at work is not disturbed.

mod report;

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use hyperlora_core::paths::open_regular;
use hyperlora_core::{Error, Result, text};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::checkpoint::CheckpointStore;
use crate::data::quarantine;
use crate::experiment::Experiment;
use crate::metrics::{LastScalars, StageSummary, Summary};
use crate::run::state::TrainState;
use crate::run::{CHECKPOINTS, TENSORBOARD, is_claimed, skipped};
use crate::train::curves::{CUT_CAPTIONS, IMAGES_PER_SECOND, RANKS};

/// Lines of `run.log` that tell of the end of a run that did not finish.
const LAST_LINES: usize = 6;
/// They lie within this many bytes of its end.
const LAST_BYTES: u64 = 16 << 10;

/// Whether somebody is at work on a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Activity {
    /// A process trains.
    Running,
    /// All stages are done.
    Finished,
    /// No process trains: the run was stopped, failed or was killed.
    Stopped,
    /// The lock that would tell cannot be looked at.
    Unknown,
}

/// The last checkpoint of a run.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct LastCheckpoint {
    /// Optimiser steps in all.
    pub step: u64,
    /// The folder.
    pub path: PathBuf,
    /// Seconds since it was written.
    pub age_seconds: u64,
}

/// Where a run stands.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Status {
    /// The experiment's name.
    pub name: String,
    /// Whether somebody is at work.
    pub activity: Activity,
    /// The stage at hand; `None` once all are done.
    pub stage: Option<StageStatus>,
    /// Optimiser steps done in all: of a run at work the last one in its curves, else those that are saved.
    pub step: u64,
    /// Optimiser steps of all stages.
    pub steps: u64,
    /// The newest checkpoint.
    pub checkpoint: Option<LastCheckpoint>,
    /// Seconds since the last entry in the curves of the last start.
    pub last_entry_seconds: Option<u64>,
    /// Images per second, of all ranks.
    pub images_per_second: Option<f64>,
    /// Seconds to the end of the last stage at this speed.
    pub seconds_left: Option<f64>,
    /// Processes of the last start that got to an entry in the curves.
    pub ranks: Option<u64>,
    /// The last entry of every curve of losses, by its name.
    pub losses: BTreeMap<String, f64>,
    /// What `summary.json` says of each stage that was begun.
    pub stages: Vec<StageSummary>,
    /// Steps that were skipped because they would have done harm.
    pub skipped_steps: u64,
    /// The share of the captions whose ends were left out, where some were.
    pub cut_captions: Option<f64>,
    /// Row groups that are left out because they are damaged.
    pub quarantined_row_groups: u64,
    /// The end of `run.log`, where the run did not finish and nobody is at work.
    pub last_lines: Vec<String>,
}

/// One stage of the run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct StageStatus {
    /// As in the YAML.
    pub name: &'static str,
    /// From 1.
    pub number: usize,
    /// Stages in all.
    pub of: usize,
    /// Optimiser steps done in it.
    pub step: u64,
    /// Its optimiser steps.
    pub steps: u64,
}

/// The part of a checkpoint's `state.json` that matters here.
#[derive(Deserialize)]
struct Saved {
    train: TrainState,
    settings: Value,
}

impl Status {
    /// Reads the run folder `run`.
    ///
    /// # Errors
    /// Input for a folder that holds no run, Disk for a failing disk.
    pub fn read(run: &Path) -> Result<Self> {
        let experiment = Experiment::of_run(run)?;
        let claimed = is_claimed(run);
        let stages: Vec<(&str, u64)> =
            experiment.train.stages.iter().map(|entry| (entry.name(), entry.config().steps)).collect();
        let steps = stages.iter().map(|(_, steps)| steps).sum();
        let (checkpoint, settings) = last_checkpoint(run)?.unzip();
        let curves = LastScalars::read(&run.join(TENSORBOARD))?;

        let saved = checkpoint.as_ref().map_or(0, |checkpoint| checkpoint.step);
        let step = if claimed == Some(false) { saved } else { curves.step.unwrap_or(0).max(saved) };
        let activity = match claimed {
            Some(true) => Activity::Running,
            _ if saved >= steps => Activity::Finished,
            Some(false) => Activity::Stopped,
            None => Activity::Unknown,
        };
        let images_per_second = curves.values.get(IMAGES_PER_SECOND).copied().filter(|speed| *speed > 0.0);
        let images_left = steps.saturating_sub(step) * experiment.train.global_batch as u64;
        let over = matches!(activity, Activity::Running | Activity::Finished);
        let shards = settings.as_ref().and_then(|settings| settings["data"]["shards"].as_str());
        let losses = curves.values.iter().filter(|(tag, _)| tag.starts_with("loss/") || tag.starts_with("fixed_set/"));
        Ok(Self {
            activity,
            stage: stage_of(&stages, step),
            step,
            steps,
            checkpoint,
            last_entry_seconds: curves.written.map(|written| age(written, now())),
            images_per_second,
            seconds_left: images_per_second.map(|speed| images_left as f64 / speed),
            ranks: curves.values.get(RANKS).map(|ranks| *ranks as u64),
            losses: losses.map(|(tag, loss)| (tag.clone(), *loss)).collect(),
            stages: Summary::read(run)?.stages,
            skipped_steps: skipped::count(run)? as u64,
            cut_captions: curves.values.get(CUT_CAPTIONS).copied().filter(|share| *share > 0.0),
            quarantined_row_groups: quarantine::count(run, shards)? as u64,
            last_lines: if over { Vec::new() } else { last_lines(&run.join("run.log"))? },
            name: experiment.name,
        })
    }
}

/// The stage that the step after `step` belongs to.
fn stage_of(stages: &[(&'static str, u64)], step: u64) -> Option<StageStatus> {
    let mut before = 0;
    for (index, &(name, steps)) in stages.iter().enumerate() {
        if step < before + steps {
            return Some(StageStatus { name, number: index + 1, of: stages.len(), step: step - before, steps });
        }
        before += steps;
    }
    None
}

/// The newest checkpoint that can be read, and the settings in it: a run at work may remove an old one at any moment.
fn last_checkpoint(run: &Path) -> Result<Option<(LastCheckpoint, Value)>> {
    let mut found = CheckpointStore::at(&run.join(CHECKPOINTS)).list()?;
    found.reverse();
    let readable = |checkpoint: &crate::checkpoint::Checkpoint| {
        let saved: Saved = checkpoint.state().ok()?;
        let written = fs::metadata(checkpoint.path()).and_then(|data| data.modified()).ok()?;
        let age_seconds = age(since_1970(written), now());
        let last = LastCheckpoint { step: saved.train.global_step, path: checkpoint.path().into(), age_seconds };
        Some((last, saved.settings))
    };
    Ok(found.iter().find_map(readable))
}

fn last_lines(log: &Path) -> Result<Vec<String>> {
    let failed = |source| Error::read(log, source);
    let mut file = match open_regular(log) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        file => file.map_err(failed)?,
    };
    let length = file.metadata().map_err(failed)?.len();
    let mut bytes = Vec::new();
    file.seek(SeekFrom::Start(length.saturating_sub(LAST_BYTES))).map_err(failed)?;
    file.take(LAST_BYTES).read_to_end(&mut bytes).map_err(failed)?;
    let bytes = String::from_utf8_lossy(&bytes);
    let lines: Vec<&str> = bytes.lines().collect();
    // The folder may be a stranger's, or older than what keeps secrets out of the log.
    Ok(lines[lines.len().saturating_sub(LAST_LINES)..].iter().map(|line| text::shown(line).to_string()).collect())
}

fn now() -> f64 {
    since_1970(SystemTime::now())
}

fn since_1970(time: SystemTime) -> f64 {
    time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}

/// Whole seconds from `then` to `now`; clocks of two machines may disagree by a little.
fn age(then: f64, now: f64) -> u64 {
    (now - then).max(0.0) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_belongs_to_the_stage_that_goes_on_after_it() {
        let stages = [("base", 5), ("id_clip", 3)];
        let at = |step| stage_of(&stages, step).map(|stage| (stage.number, stage.step, stage.steps));
        assert_eq!(at(0), Some((1, 0, 5)));
        assert_eq!(at(4), Some((1, 4, 5)));
        assert_eq!(at(5), Some((2, 0, 3)));
        assert_eq!(at(8), None);
    }
}
