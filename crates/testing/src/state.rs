//! Results of a run for comparison: the tensors of a checkpoint and the points of the curves.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use burn_hyperlora::run::{CHECKPOINTS, TENSORBOARD};
use prost::Message;
use safetensors::SafeTensors;

/// Reads every safetensors file of the checkpoint at `step`, by its path in the checkpoint.
pub fn tensors(run: &Path, step: u64) -> BTreeMap<String, Vec<u8>> {
    let checkpoint = run.join(CHECKPOINTS).join(format!("step-{step:08}"));
    let mut found = BTreeMap::new();
    for folder in [checkpoint.clone(), checkpoint.join("weights")] {
        for entry in fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            if path.extension().is_some_and(|extension| extension == "safetensors") {
                let name = path.strip_prefix(&checkpoint).unwrap().display().to_string();
                found.insert(name, fs::read(&path).unwrap());
            }
        }
    }
    assert!(found.len() > 3, "{:?}", found.keys());
    found
}

/// Reads all numbers of the checkpoint at `step`, by file and tensor, with the parts of the ranks joined.
pub fn numbers(run: &Path, step: u64) -> BTreeMap<String, Vec<f32>> {
    let mut numbers: BTreeMap<String, Vec<f32>> = BTreeMap::new();
    for (file, bytes) in tensors(run, step) {
        // Removes `-00001-of-00004`.
        let file = file.trim_end_matches(".safetensors").split('-').next().unwrap();
        for (name, view) in SafeTensors::deserialize(&bytes).unwrap().tensors() {
            let values = view.data().as_chunks::<4>().0.iter().map(|number| f32::from_le_bytes(*number));
            numbers.entry(format!("{file}: {name}")).or_default().extend(values);
        }
    }
    numbers
}

/// Returns the relative distance over all numbers.
pub fn distance(a: &BTreeMap<String, Vec<f32>>, b: &BTreeMap<String, Vec<f32>>) -> f64 {
    assert!(a.keys().eq(b.keys()));
    let pairs = a.values().flatten().zip(b.values().flatten());
    let (difference, size) = pairs.fold((0.0, 0.0), |(difference, size), (a, b)| {
        (difference + f64::from(a - b).powi(2), size + f64::from(*a).powi(2))
    });
    (difference / size).sqrt()
}

/// TensorBoard event, reduced to the fields that matter here.
#[derive(Clone, PartialEq, Message)]
struct Event {
    #[prost(int64, tag = "2")]
    step: i64,
    #[prost(message, optional, tag = "5")]
    summary: Option<Scalars>,
    #[prost(message, optional, tag = "7")]
    session: Option<Session>,
}

#[derive(Clone, PartialEq, Message)]
struct Scalars {
    #[prost(message, repeated, tag = "1")]
    values: Vec<Scalar>,
}

#[derive(Clone, PartialEq, Message)]
struct Scalar {
    #[prost(string, tag = "1")]
    tag: String,
    #[prost(float, tag = "2")]
    value: f32,
}

/// Start of a process.
#[derive(Clone, PartialEq, Message)]
struct Session {
    #[prost(int32, tag = "1")]
    status: i32,
}

/// Returns the curves that depend only on the settings, as TensorBoard shows them: losses, gradient norm, learning
/// rate. Lists all values of a step, of which there should be one.
pub fn curves(run: &Path) -> BTreeMap<(String, i64), Vec<f32>> {
    let mut files: Vec<_> = fs::read_dir(run.join(TENSORBOARD)).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    let mut found: BTreeMap<(String, i64), Vec<f32>> = BTreeMap::new();
    for path in files {
        let bytes = fs::read(path).unwrap();
        // A record: length (8 bytes), checksum (4), event, checksum (4).
        let mut rest = &bytes[..];
        while let Some((length, after)) = rest.split_first_chunk::<8>() {
            let length = u64::from_le_bytes(*length) as usize;
            let event = Event::decode(&after[4..4 + length]).unwrap();
            rest = &after[8 + length..];
            if event.session.is_some() {
                // A resumed process writes the steps from its start on again.
                found.retain(|(_, step), _| *step < event.step);
            }
            for scalar in event.summary.into_iter().flat_map(|summary| summary.values) {
                let (group, name) = scalar.tag.split_once('/').unwrap_or_default();
                if matches!(group, "loss" | "fixed_set") || matches!(name, "gradient_norm" | "learning_rate") {
                    found.entry((scalar.tag, event.step)).or_default().push(scalar.value);
                }
            }
        }
    }
    found
}
