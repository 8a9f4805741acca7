//! All that the next step depends on, and the settings that a resume must match.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::data::DataConfig;
use crate::error::{Error, Result};
use crate::hypernet::{HyperLoraConfig, Stage};
use crate::metrics::StageSummary;
use crate::train::config::{StageEntry, TrainConfig};
use crate::train::spikes::SpikeWatch;
use crate::train::step::StepReport;

/// Where a run stands. With the weights and the optimiser's moments it is all that the next step depends on.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct TrainState {
    /// Index of the stage that the next step belongs to; the number of stages when all are done.
    pub stage: usize,
    /// Steps done in that stage.
    pub stage_step: u64,
    /// Steps done in all.
    pub global_step: u64,
    /// The draw of that stage that comes next: the position in the data.
    pub next_draw: u64,
    /// One entry per stage that was begun.
    pub records: Vec<StageSummary>,
    /// What the last steps of the stage were like.
    #[serde(default)]
    pub spikes: SpikeWatch,
    /// Step of the last checkpoint that was due, by its interval or at the end of a stage. Weights go back to that one: where
    /// a run was interrupted, and saved something in between, has no say.
    #[serde(default)]
    pub last_due: Option<u64>,
}

impl TrainState {
    /// Counts a step.
    pub fn count(&mut self, report: &StepReport, elapsed: Duration) {
        self.stage_step += 1;
        self.global_step += 1;
        self.next_draw = report.next_draw;
        if let Some(record) = self.records.last_mut() {
            let images = record.images_per_second * record.seconds + report.losses.len() as f64;
            record.steps = self.stage_step;
            record.seconds += elapsed.as_secs_f64();
            record.images_per_second = images / record.seconds.max(f64::MIN_POSITIVE);
        }
    }

    /// What the last step taught; `None` before the first.
    pub fn taught(&self, stages: &[StageEntry]) -> Option<Stage> {
        let index = if self.stage_step > 0 { Some(self.stage) } else { self.stage.checked_sub(1) };
        index.and_then(|index| stages.get(index)).map(StageEntry::kind)
    }

    /// Goes over to the next stage.
    pub fn finish_stage(&mut self) {
        self.stage += 1;
        self.stage_step = 0;
        self.next_draw = 0;
        self.spikes = SpikeWatch::default();
        self.last_due = Some(self.global_step);
    }
}

/// The settings that all ranks of a run must have in common: those that decide what a step computes, and those that decide
/// when the ranks meet.
///
/// Where a rank's files lie is its own affair, as are its threads and its memory: what is in the files is compared by itself.
///
/// # Errors
/// Fault when a setting cannot be written as JSON.
pub fn common_settings(
    seed: u64,
    data: &DataConfig,
    hyper_lora: &HyperLoraConfig,
    train: &TrainConfig,
) -> Result<Value> {
    let tree = |value: serde_json::Result<Value>| {
        value.map_err(|error| Error::Fault(format!("the settings cannot be written as JSON: {error}")))
    };
    let mut data = tree(serde_json::to_value(data))?;
    remove(&mut data, &["shards", "remote", "cache_mib", "workers", "prefetch_mib"]);
    let mut train = tree(serde_json::to_value(train))?;
    remove(&mut train, &["init_from"]);
    let hyper_lora = tree(serde_json::to_value(hyper_lora))?;
    Ok(json!({"seed": seed, "data": data, "hyper_lora": hyper_lora, "train": train}))
}

/// The settings that decide what the next step computes, as a tree that can be compared key by key: of the common ones those
/// that a run may not change on its way, with the checksums of base and shards.
///
/// What only decides how things go on several ranks, or what is looked at along the way, is left out.
pub fn binding_settings(mut common: Value, base: Value, shards: &str) -> Value {
    remove(&mut common["data"], &["bad_row_groups"]);
    common["data"]["shards"] = shards.into();
    let along_the_way = ["checkpoints", "samples", "log_every", "fixed_set", "collective_timeout_s", "shard_optimizer"];
    remove(&mut common["train"], &along_the_way);
    common["base"] = base;
    common
}

fn remove(tree: &mut Value, keys: &[&str]) {
    if let Some(object) = tree.as_object_mut() {
        keys.iter().for_each(|key| {
            object.shift_remove(*key);
        });
    }
}

/// The first key whose value differs: its path, the value in `then` and the value in `now`.
pub fn first_difference(then: &Value, now: &Value) -> Option<(String, String, String)> {
    match (then, now) {
        (Value::Object(a), Value::Object(b)) => a
            .keys()
            .chain(b.keys().filter(|key| !a.contains_key(*key)))
            .find_map(|key| within(key, a.get(key).unwrap_or(&Value::Null), b.get(key).unwrap_or(&Value::Null))),
        (Value::Array(a), Value::Array(b)) => (0..a.len().max(b.len())).find_map(|index| {
            let at = |array: &[Value]| array.get(index).cloned().unwrap_or(Value::Null);
            within(&index.to_string(), &at(a), &at(b))
        }),
        (a, b) => (a != b).then(|| (String::new(), plain(a), plain(b))),
    }
}

fn plain(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

fn within(key: &str, then: &Value, now: &Value) -> Option<(String, String, String)> {
    first_difference(then, now).map(|(path, then, now)| {
        let path = if path.is_empty() { key.to_owned() } else { format!("{key}.{path}") };
        (path, then, now)
    })
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

    use std::path::Path;

    use data_prep::config::parse;

    use super::*;

    #[test]
    fn ranks_share_what_orders_their_steps_and_a_resume_less_but_never_paths() {
        let settings = |data: &str, train: &str| {
            let place = Path::new("train.yaml");
            let data: DataConfig = parse(&format!("image_size: 64\n{data}"), place).unwrap();
            let stages = "micro_batch: 1\nglobal_batch: 4\nstages: [{base: {steps: 2}}]";
            let train: TrainConfig = parse(&format!("{stages}\n{train}"), place).unwrap();
            let hyper_lora: HyperLoraConfig = parse("{}", place).unwrap();
            let common = common_settings(5, &data, &hyper_lora, &train).unwrap();
            (common.clone(), binding_settings(common, json!({"unet": "abc"}), "def"))
        };
        let here = settings("shards: here", "init_from: here");
        let there = settings("shards: there\nremote: {cache: there}\nworkers: 7", "init_from: there");
        assert_eq!(here, there);
        for (data, train) in [("", "log_every: 3"), ("", "fixed_set: {}"), ("bad_row_groups: 1", "")] {
            let other = settings(&format!("shards: here\n{data}"), train);
            assert!(here.0 != other.0 && here.1 == other.1, "{data}{train}");
        }
        let other = settings("shards: here\nflip: true", "");
        assert!(here.0 != other.0 && here.1 != other.1);
        assert_eq!((&here.1["data"]["shards"], &here.1["base"]["unet"]), (&"def".into(), &"abc".into()));
    }

    #[test]
    fn the_first_differing_key_is_named_by_its_path() {
        let then = json!({"seed": 1, "train": {"stages": [{"base": {"steps": 5}}]}});
        assert_eq!(first_difference(&then, &then.clone()), None);
        let now = json!({"seed": 1, "train": {"stages": [{"base": {"steps": 6}}]}});
        let (path, before, after) = first_difference(&then, &now).unwrap_or_default();
        assert_eq!((path.as_str(), before.as_str(), after.as_str()), ("train.stages.0.base.steps", "5", "6"));
        let now = json!({"seed": 1, "train": {"stages": [{"base": {"steps": 5}}, {"id_clip": 1}]}});
        assert_eq!(first_difference(&then, &now).map(|found| found.0), Some("train.stages.1".into()));
    }
}
