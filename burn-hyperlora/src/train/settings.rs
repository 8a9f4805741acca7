//! Settings that all ranks must share, and settings that a resume must match.

use hyperlora_core::{Error, Result};
use serde_json::{Value, json};

use crate::data::DataConfig;
use crate::hypernet::HyperLoraConfig;
use crate::train::config::TrainConfig;

/// Returns the settings that all ranks of a run must share: those that decide what a step computes, and those that
/// decide when the ranks synchronise.
///
/// File locations, threads and memory may differ between ranks; the content of the files is compared separately.
///
/// # Errors
/// Fault: a setting cannot be written as JSON.
pub(super) fn common_settings(
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

/// Returns the settings that decide what the next step computes, as a tree that can be compared key by key: the common
/// settings that a run may not change, with the checksums of base and shards.
///
/// Settings that only control the distribution over ranks or the monitoring are left out.
pub(super) fn binding_settings(mut common: Value, base: Value, shards: &str) -> Value {
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

#[cfg(test)]
mod tests {
    use std::path::Path;

    use hyperlora_core::config::parse;

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
}
