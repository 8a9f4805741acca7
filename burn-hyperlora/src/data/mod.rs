//! Parquet shards -> batches: which sample comes when, and everything that is drawn for it.
//!
//! The order of the samples is a function of (seed, stage, epoch), the randomness of a sample one of (seed, stage, draw
//! index): neither knows the batch size or the number of processes, so that two batches of one equal one batch of two, on
//! one rank or on two, and a single counter tells where a stage stands.

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
use serde::{Deserialize, Serialize};

/// Where the samples come from and how they become tensors: `data:` of an experiment.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataConfig {
    /// Folder that `data-prep build` wrote, or its URL: `s3://BUCKET/PREFIX`, `gs://BUCKET/PREFIX`, `https://HOST/PATH`.
    pub shards: ConfigPath,
    /// How shards behind a URL are read.
    #[serde(default)]
    pub remote: RemoteShards,
    /// The split to learn from: rows with this label; unlabelled sets use `all`.
    #[serde(default = "default_split")]
    pub split: String,
    /// Side of the target images in pixels.
    pub image_size: usize,
    /// The random crop around the face.
    #[serde(default)]
    pub crop: CropConfig,
    /// Mirrors half of the targets; the reference photo stays as it is.
    #[serde(default)]
    pub flip: bool,
    /// What the UNet is told about size and crop.
    #[serde(default)]
    pub size_conditioning: SizeConditioning,
    /// How faces are cut out and blurred for the conditions.
    #[serde(default)]
    pub mask: MaskConfig,
    /// Canonical streams: the parts of an epoch that are read side by side. The number of processes divides it.
    #[serde(default = "default_streams")]
    pub streams: usize,
    /// Row groups of a stream whose rows are shuffled among each other.
    #[serde(default = "default_shuffle_window")]
    pub shuffle_window: usize,
    /// Rows kept in memory, their photos encoded, in MiB.
    #[serde(default = "default_cache_mib")]
    pub cache_mib: usize,
    /// Damaged row groups that a run leaves out before it stops.
    #[serde(default = "default_bad_row_groups")]
    pub bad_row_groups: usize,
    /// Threads that decode, crop and mask ahead of the training step.
    #[serde(default = "default_workers")]
    pub workers: usize,
    /// Samples in the making or ready ahead of the step, in MiB; one micro-batch always may.
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

/// How shards behind a URL are read: `data.remote`. No part of what binds a checkpoint.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RemoteShards {
    /// Folder that keeps what was read, shared by the processes of a machine.
    pub cache: ConfigPath,
    /// Its size in GiB; what was not used for longest makes room.
    pub cache_gib: usize,
    /// Seconds after which a read that still fails ends the run. Below the time that ranks wait for each other, so that
    /// the message names the cause.
    pub deadline_seconds: usize,
}

impl Default for RemoteShards {
    fn default() -> Self {
        let cache = ConfigPath::new("${HYPERLORA_CACHE:-~/.cache/hyperlora}/shards");
        Self { cache, cache_gib: 64, deadline_seconds: 45 }
    }
}

/// The random square around a face; it always holds the whole face where the photo is large enough.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CropConfig {
    /// Smallest side, in longer sides of the face box.
    pub smallest: f32,
    /// Largest side, in longer sides of the face box; the photo's shorter side bounds it too.
    pub largest: f32,
}

impl Default for CropConfig {
    fn default() -> Self {
        Self { smallest: 1.2, largest: 4.0 }
    }
}

/// SDXL's size micro-conditions (arXiv 2307.01952, section 2.2).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SizeConditioning {
    /// The photo's size, and where the crop lies in the photo resized so that the crop has the target size.
    #[default]
    Crop,
    /// The crop counts as the whole photo: target size, offset (0, 0), target size.
    Whole,
}

/// Which photo the hypernetwork sees of the person in the target photo.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reference {
    /// The target photo itself: for sets without identities.
    #[default]
    #[serde(rename = "self")]
    Target,
    /// Another photo of the person, never the target. Targets without a second photo are left out, and counted.
    SameIdentity,
}

/// Largest memory in MiB: 16 TiB.
const LARGEST_MIB: usize = 1 << 24;

/// Largest value of a size in pixels or a count: a mistyped one shall not exhaust the memory.
const LARGEST: usize = 8192;

impl DataConfig {
    /// Checks what does not need the shards.
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

    /// Opens the shards; relative paths start at `yaml_folder`.
    ///
    /// # Errors
    /// As [`ShardFolder::open`] and [`ShardFolder::open_remote`].
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
