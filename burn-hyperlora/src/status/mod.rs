//! Status of a run, read from its files only. Nothing is written, and an active run is not disturbed.

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
use crate::metrics::{LastScalars, RunSummary, StageSummary};
use crate::run::state::TrainState;
use crate::run::{CHECKPOINTS, TENSORBOARD, is_claimed, skipped};
use crate::train::curves::{CUT_CAPTIONS, IMAGES_PER_SECOND, RANKS};

/// Number of last lines of `run.log` to show for a run that did not finish.
const LAST_LINES: usize = 6;
/// Number of bytes at the end of `run.log` that hold those lines.
const LAST_BYTES: u64 = 16 << 10;

/// Activity of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Activity {
    /// A process trains.
    Running,
    /// All stages are done.
    Finished,
    /// No process trains: the run was stopped, failed or was killed.
    Stopped,
    /// The lock cannot be checked.
    Unknown,
}

/// Last checkpoint of a run.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct LastCheckpoint {
    /// Optimiser steps in total.
    pub step: u64,
    /// Checkpoint folder.
    pub path: PathBuf,
    /// Seconds since it was written.
    pub age_seconds: u64,
}

/// Status of a run.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Status {
    /// Name of the experiment.
    pub name: String,
    /// Activity of the run.
    pub activity: Activity,
    /// Current stage; `None` once all are done.
    pub stage: Option<StageStatus>,
    /// Optimiser steps done in total: for an active run the last one in its curves, else those that are saved.
    pub step: u64,
    /// Optimiser steps of all stages.
    pub steps: u64,
    /// Newest checkpoint.
    pub checkpoint: Option<LastCheckpoint>,
    /// Seconds since the last entry in the curves of the last start.
    pub last_entry_seconds: Option<u64>,
    /// Images per second of all ranks.
    pub images_per_second: Option<f64>,
    /// Seconds to the end of the last stage at this speed.
    pub seconds_left: Option<f64>,
    /// Number of processes of the last start that reached an entry in the curves.
    pub ranks: Option<u64>,
    /// Last entry of every loss curve, by name.
    pub losses: BTreeMap<String, f64>,
    /// RunSummary of each stage that was begun, from `summary.json`.
    pub stages: Vec<StageSummary>,
    /// Steps that were skipped because they would have done harm.
    pub skipped_steps: u64,
    /// Fraction of captions that were truncated, if any were.
    pub cut_captions: Option<f64>,
    /// Row groups that are left out because they are damaged.
    pub quarantined_row_groups: u64,
    /// Last lines of `run.log`, if the run did not finish and no process trains.
    pub last_lines: Vec<String>,
}

/// One stage of the run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct StageStatus {
    /// Name as in the YAML.
    pub name: &'static str,
    /// Stage number, from 1.
    pub number: usize,
    /// Number of stages.
    pub of: usize,
    /// Optimiser steps done in the stage.
    pub step: u64,
    /// Optimiser steps of the stage.
    pub steps: u64,
}

/// Fields of a checkpoint's `state.json` that the status needs.
#[derive(Deserialize)]
struct Saved {
    train: TrainState,
    settings: Value,
}

impl Status {
    /// Reads the run folder `run`.
    ///
    /// # Errors
    /// Input: a folder that holds no run; Disk: a failing disk.
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
            stages: RunSummary::read(run)?.stages,
            skipped_steps: skipped::count(run)? as u64,
            cut_captions: curves.values.get(CUT_CAPTIONS).copied().filter(|share| *share > 0.0),
            quarantined_row_groups: quarantine::count(run, shards)? as u64,
            last_lines: if over { Vec::new() } else { last_lines(&run.join("run.log"))? },
            name: experiment.name,
        })
    }
}

/// Returns the stage of the step after `step`.
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

/// Returns the newest readable checkpoint and its settings. An active run may remove an old checkpoint at any moment.
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
    // The log is sanitised again, because the folder may come from an untrusted source or be older than the filter that
    // keeps secrets out of the log.
    Ok(lines[lines.len().saturating_sub(LAST_LINES)..].iter().map(|line| text::shown(line).to_string()).collect())
}

fn now() -> f64 {
    since_1970(SystemTime::now())
}

fn since_1970(time: SystemTime) -> f64 {
    time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}

/// Returns the whole seconds from `then` to `now`; the clocks of two machines may differ slightly.
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
