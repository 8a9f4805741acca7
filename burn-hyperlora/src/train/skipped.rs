//! The steps that were not taken: a line each in `skipped.jsonl`, with the photos of the batch.

use std::collections::BTreeSet;
use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::train::together::{lead_alone, share};
use crate::train::{SKIPPED, TrainSetup};

#[derive(Serialize, Deserialize)]
struct Line {
    step: u64,
    stage: String,
    reason: String,
    /// Keys of the target photos of all ranks, in the order of their draws.
    photos: Vec<String>,
}

/// Writes down that `step` was skipped; `own` are the draws of this rank's samples and the keys of their photos.
///
/// # Errors
/// On all ranks, Input or Disk for a file that rank 0 cannot write; those of the collective.
pub(super) fn note(setup: &TrainSetup<'_>, step: u64, stage: &str, reason: &str, own: &[(u64, String)]) -> Result<()> {
    let shares = share(setup.world, "the photos of a skipped step", Ok(&own.to_vec()))?;
    lead_alone(setup.world, "rank 0 to note a skipped step", setup.train.long_timeout(), || {
        let mut photos: Vec<(u64, String)> = shares.into_iter().flatten().collect();
        photos.sort();
        let photos = photos.into_iter().map(|(_, key)| key).collect();
        let line = Line { step, stage: stage.into(), reason: reason.into(), photos };
        let line = serde_json::to_string(&line).map_err(|error| Error::Fault(format!("{SKIPPED}: {error}")))?;
        let path = setup.run.join(SKIPPED);
        let file = OpenOptions::new().create(true).append(true).open(&path);
        file.and_then(|mut file| writeln!(file, "{line}")).map_err(|source| Error::write(&path, source))
    })
}

/// Steps that `run` skipped. One that came again after a kill counts once; a line that a dying process left half-written does
/// not count.
///
/// # Errors
/// As [`Error::read`].
pub fn count(run: &Path) -> Result<usize> {
    let path = run.join(SKIPPED);
    let text = match fs::read_to_string(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(0),
        text => text.map_err(|source| Error::read(&path, source))?,
    };
    let lines = text.lines().filter_map(|line| serde_json::from_str::<Line>(line).ok());
    Ok(lines.map(|line| line.step).collect::<BTreeSet<_>>().len())
}
