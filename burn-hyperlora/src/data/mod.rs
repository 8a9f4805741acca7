//! Data pipeline from Parquet shards to batches: the sample order, and all random draws per sample.
//!
//! The sample order is a function of (seed, stage, epoch), and a sample's randomness one of (seed, stage, draw index).
//! Neither depends on the batch size or the number of processes. Two batches of one therefore equal one batch of two,
//! on one rank or on two, and a single counter is enough to resume a stage.

pub mod batch;
mod cache;
pub mod crop;
pub mod dataset;
pub mod loader;
pub mod order;
pub mod pairs;
pub mod quarantine;
pub mod rank;
pub mod sample;
pub mod scenario;

use std::path::Path;
use std::time::Duration;

use data_prep::face::mask::MaskConfig;
use data_prep::shard::{RemoteConfig, ShardFolder};
use hyperlora_core::config::{ConfigPath, is_url};
use hyperlora_core::{Error, Result};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Data source and preprocessing: `data:` of an experiment.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct DataConfig {
    /// Folder written by `data-prep build`, or its URL: `s3://BUCKET/PREFIX`, `gs://BUCKET/PREFIX`,
    /// `https://HOST/PATH`.
    pub shards: ConfigPath,
    /// Settings for shards behind a URL.
    #[serde(default)]
    pub remote: RemoteShards,
    /// Split to train on: rows with this label; `all` for unlabelled sets. Photos to evaluate (`train.fixed_set.split`,
    /// `eval.identity_gap.*.photos`) must be in other splits: evaluating on training data would hide overfitting.
    #[serde(default = "default_split")]
    pub split: String,
    /// Side of the target images in pixels, 1 to 8192.
    pub image_size: usize,
    /// Random crop around the face.
    #[serde(default)]
    pub crop: CropConfig,
    /// Mirrors half of the targets; the reference photo stays unchanged.
    #[serde(default)]
    pub flip: bool,
    /// Size and crop that the UNet is conditioned on: SDXL's size micro-conditions (arXiv 2307.01952, section 2.2).
    #[serde(default)]
    pub size_conditioning: SizeConditioning,
    /// Masking and blurring of faces for the conditions.
    #[serde(default)]
    pub mask: MaskConfig,
    /// Number of canonical streams: the parts of an epoch that are read in parallel; 1 to 8192. It must be a multiple
    /// of the world size.
    #[serde(default = "default_streams")]
    pub streams: usize,
    /// Number of a stream's row groups whose rows are shuffled together, 1 to 8192.
    #[serde(default = "default_shuffle_window")]
    pub shuffle_window: usize,
    /// Memory in MiB for cached row groups, with encoded photos. It should hold `streams` / world size x
    /// `shuffle_window` of them.
    #[serde(default = "default_cache_mib")]
    pub cache_mib: usize,
    /// Number of damaged row groups that a run leaves out before it stops.
    #[serde(default = "default_bad_row_groups")]
    pub bad_row_groups: usize,
    /// Number of threads that decode, crop and mask ahead of the training step, 1 to 8192.
    #[serde(default = "default_workers")]
    pub workers: usize,
    /// Memory in MiB for samples in preparation or ready; one micro-batch is always allowed.
    #[serde(default = "default_prefetch_mib")]
    pub prefetch_mib: usize,
}

fn default_split() -> String {
    "train".into()
}

fn default_streams() -> usize {
    48
}

fn default_shuffle_window() -> usize {
    1
}

fn default_cache_mib() -> usize {
    512
}

fn default_bad_row_groups() -> usize {
    3
}

fn default_workers() -> usize {
    2
}

fn default_prefetch_mib() -> usize {
    512
}

/// Settings for shards behind a URL: `data.remote`. A resumed run may change them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct RemoteShards {
    /// Folder that keeps the shards that were read, shared by the processes of a machine.
    pub cache: ConfigPath,
    /// Cache size in GiB, 1 to 8192; the least recently used files are evicted.
    pub cache_gib: usize,
    /// Seconds after which a failing read ends the run, 1 to 8192. Keep it below the time that ranks wait for each
    /// other (`train.collective_timeout_s`), so that the message names the cause.
    pub deadline_seconds: usize,
}

impl Default for RemoteShards {
    fn default() -> Self {
        let cache = ConfigPath::new("${HYPERLORA_CACHE:-~/.cache/hyperlora}/shards");
        Self { cache, cache_gib: 64, deadline_seconds: 45 }
    }
}

/// Random square crop around a face. It contains the whole face if the photo is large enough.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct CropConfig {
    /// Smallest side, in units of the face box's longer side; at least 1.
    pub smallest: f32,
    /// Largest side, in units of the face box's longer side; at least `smallest`. The photo's shorter side limits it
    /// too.
    pub largest: f32,
}

impl Default for CropConfig {
    fn default() -> Self {
        Self { smallest: 1.2, largest: 4.0 }
    }
}

/// SDXL's size micro-conditions (arXiv 2307.01952, section 2.2).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum SizeConditioning {
    /// Photo size, and the crop's offset in the photo resized so that the crop has the target size.
    #[default]
    Crop,
    /// The crop counts as the whole photo: target size, offset (0, 0), target size.
    Whole,
}

/// Choice of the reference photo: the photo of the target's person that the hypernetwork sees.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Reference {
    /// The target photo itself, for sets without identities.
    #[default]
    #[serde(rename = "self")]
    Target,
    /// Another photo of the person, never the target. Targets without a second photo are left out and counted.
    SameIdentity,
}

/// Upper limit of memory settings in MiB: 16 TiB.
const LARGEST_MIB: usize = 1 << 24;

/// Upper limit of sizes in pixels and of counts, so that a mistyped one does not exhaust the memory.
const LARGEST: usize = 8192;

impl DataConfig {
    /// Checks all settings that do not need the shards.
    ///
    /// # Errors
    /// Input, naming the key.
    pub fn validate(&self, place: &str) -> Result<()> {
        let CropConfig { smallest, largest } = self.crop;
        let sane = smallest.is_finite() && largest.is_finite() && smallest >= 1.0 && largest >= smallest;
        if !sane {
            return Err(Error::input(
                format!("{place}: data.crop"),
                format!("smallest {smallest}, largest {largest}"),
                "give 1 <= smallest <= largest, in longer sides of the face box",
            ));
        }
        for (key, value) in [
            ("image_size", self.image_size),
            ("mask.size", self.mask.size as usize),
            ("streams", self.streams),
            ("shuffle_window", self.shuffle_window),
            ("workers", self.workers),
            ("remote.cache_gib", self.remote.cache_gib),
            ("remote.deadline_seconds", self.remote.deadline_seconds),
        ] {
            if !(1..=LARGEST).contains(&value) {
                let remedy = format!("give 1 to {LARGEST}");
                return Err(Error::input(format!("{place}: data.{key}"), format!("is {value}"), remedy));
            }
        }
        for (key, mib) in [("cache_mib", self.cache_mib), ("prefetch_mib", self.prefetch_mib)] {
            if mib > LARGEST_MIB {
                let remedy = format!("give at most {LARGEST_MIB}, in MiB");
                return Err(Error::input(format!("{place}: data.{key}"), format!("is {mib}"), remedy));
            }
        }
        Ok(())
    }

    /// Opens the shards; relative paths are resolved against `yaml_folder`.
    ///
    /// # Errors
    /// Same as [`ShardFolder::open`] and [`ShardFolder::open_remote`].
    pub fn open_shards(&self, yaml_folder: &Path) -> Result<ShardFolder> {
        let place = self.shards.resolve(yaml_folder)?;
        let Some(url) = place.to_str().filter(|place| is_url(place)) else { return ShardFolder::open(&place) };
        let RemoteShards { cache, cache_gib, deadline_seconds } = &self.remote;
        let remote = RemoteConfig {
            cache: cache.resolve(yaml_folder)?,
            cache_bytes: (*cache_gib as u64) << 30,
            deadline: Duration::from_secs(*deadline_seconds as u64),
        };
        ShardFolder::open_remote(url, &remote)
    }
}
