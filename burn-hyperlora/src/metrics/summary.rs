//! `summary.json`: key figures of a run. Training and evaluation each write their own part and keep the other's.

use std::io;
use std::path::Path;

use hyperlora_core::files::write_whole;
use hyperlora_core::paths::read_regular;
use hyperlora_core::{Error, Result};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// Name of the file in the run folder.
const FILE: &str = "summary.json";

/// Maximum size of a summary file, in bytes.
const LARGEST: u64 = 16 << 20;

/// Key figures of a run. Fields that this version does not know are kept.
///
/// # Examples
/// ```no_run
/// use std::path::Path;
/// use burn_hyperlora::metrics::RunSummary;
///
/// for stage in RunSummary::read(Path::new("runs/quickstart"))?.stages {
///     println!("{}: {} steps, {:.1} images/s", stage.name, stage.steps, stage.images_per_second);
/// }
/// # Ok::<(), hyperlora_core::Error>(())
/// ```
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct RunSummary {
    /// Stages in the order in which they ran.
    #[serde(default)]
    pub stages: Vec<StageSummary>,
    /// Present once `hyperlora eval identity-gap` has run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub identity_gap: Option<IdentityGap>,
    /// All other fields of the file.
    #[serde(flatten)]
    pub other: Map<String, Value>,
}

/// Key figures of one training stage.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct StageSummary {
    /// Name as in the YAML.
    pub name: String,
    /// Optimiser steps done.
    pub steps: u64,
    /// Mean loss over the fixed set of photos, noises and timesteps at the start of the stage.
    pub fixed_set_loss_before: Option<f64>,
    /// Mean loss over the fixed set at the end of the stage; `None` until then.
    pub fixed_set_loss_after: Option<f64>,
    /// Training throughput, without start-up and evaluation.
    pub images_per_second: f64,
    /// Wall time of the training steps, over all resumes.
    pub seconds: f64,
    /// All other fields of the file.
    #[serde(flatten)]
    pub other: Map<String, Value>,
}

/// Identity gap: whether a LoRA of the right person denoises better than a LoRA of another person.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct IdentityGap {
    /// Held-out photos of people in the training set.
    pub known: GapStatistics,
    /// People that training never saw.
    pub unseen: GapStatistics,
    /// All other fields of the file.
    #[serde(flatten)]
    pub other: Map<String, Value>,
}

/// Statistics of the paired gap over photos: loss with another person's LoRA minus loss with the right person's.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct GapStatistics {
    /// Mean gap.
    pub mean: f64,
    /// T-statistic of the mean; `None` if undefined, such as for a single photo.
    pub t: Option<f64>,
    /// Number of photos.
    pub n: usize,
    /// All other fields of the file, such as the mean loss of each condition.
    #[serde(flatten)]
    pub other: Map<String, Value>,
}

impl RunSummary {
    /// Reads the summary of a run; empty if the run has none yet.
    ///
    /// # Errors
    /// Input: a file that is not a summary; Disk: a failing disk.
    pub fn read(run: &Path) -> Result<Self> {
        let path = run.join(FILE);
        let text = match read_regular(&path, LARGEST) {
            Err(source) if source.kind() == io::ErrorKind::NotFound => return Ok(Self::default()),
            text => text.map_err(|source| Error::read(&path, source))?,
        };
        serde_json::from_slice(&text).map_err(|source| {
            Error::file(
                &path,
                format!("is not a summary: {source}"),
                "move the file away: the next run writes a new one",
            )
        })
    }

    /// Reads the summary of a run, changes it, and writes the whole file.
    ///
    /// # Errors
    /// Errors of [`read`](Self::read); Input: a place that cannot be written to; Disk: a full or failing disk.
    pub fn update(run: &Path, change: impl FnOnce(&mut Self)) -> Result<()> {
        let path = run.join(FILE);
        let mut summary = Self::read(run)?;
        change(&mut summary);
        let text = serde_json::to_string_pretty(&summary)
            .map_err(|source| Error::Fault(format!("{}: cannot be written as JSON: {source}", path.display())))?;
        write_whole(&path, format!("{text}\n").as_bytes())
    }

    /// Returns the stage of that name, and appends it if it is new.
    pub fn stage(&mut self, name: &str) -> &mut StageSummary {
        let index = self.stages.iter().position(|stage| stage.name == name).unwrap_or_else(|| {
            self.stages.push(StageSummary { name: name.into(), ..StageSummary::default() });
            self.stages.len() - 1
        });
        &mut self.stages[index]
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn each_writer_keeps_what_the_others_wrote() {
        let run = tempfile::tempdir().unwrap();
        let text = r#"{"later": [1], "stages": [{"name": "base", "steps": 1, "images_per_second": 2.0, "seconds": 3.0, "peak": 9}]}"#;
        fs::write(run.path().join(FILE), text).unwrap();
        RunSummary::update(run.path(), |summary| summary.stage("base").steps = 5).unwrap();
        RunSummary::update(run.path(), |summary| summary.stage("id_clip").fixed_set_loss_before = Some(0.25)).unwrap();
        let known = GapStatistics { mean: 0.01, t: Some(5.5), n: 64, ..GapStatistics::default() };
        let gap = IdentityGap { known, ..IdentityGap::default() };
        RunSummary::update(run.path(), |summary| summary.identity_gap = Some(gap.clone())).unwrap();

        let json: Value = serde_json::from_slice(&fs::read(run.path().join(FILE)).unwrap()).unwrap();
        assert_eq!(json["later"][0], 1);
        assert_eq!((&json["stages"][0]["steps"], &json["stages"][0]["peak"]), (&5.into(), &9.into()));
        assert_eq!(json["stages"][1]["fixed_set_loss_before"], 0.25);
        assert_eq!(json["stages"][1]["fixed_set_loss_after"], Value::Null);
        assert_eq!(json["identity_gap"]["known"]["t"], 5.5);
        assert_eq!(RunSummary::read(run.path()).unwrap().identity_gap, Some(gap));
    }

    #[test]
    fn a_broken_file_is_named_and_left_alone() {
        let run = tempfile::tempdir().unwrap();
        fs::write(run.path().join(FILE), "{\"stages\": 3}").unwrap();
        let error = RunSummary::update(run.path(), |_| ()).unwrap_err();
        assert_eq!(error.exit_code(), 2);
        assert!(error.to_string().contains("summary.json"));
        assert_eq!(fs::read(run.path().join(FILE)).unwrap(), b"{\"stages\": 3}");
    }
}
