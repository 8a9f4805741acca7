//! What a run leaves, for comparison: the tensors of a checkpoint and the points of the curves.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use burn_hyperlora::run::{CHECKPOINTS, TENSORBOARD};
use prost::Message;
use safetensors::SafeTensors;

/// Every safetensors file of the checkpoint at `step`, by its path in the checkpoint.
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

/// All numbers of the checkpoint at `step`, by file and tensor; what the ranks divided is put together.
pub fn numbers(run: &Path, step: u64) -> BTreeMap<String, Vec<f32>> {
    let mut numbers: BTreeMap<String, Vec<f32>> = BTreeMap::new();
    for (file, bytes) in tensors(run, step) {
        // Without `-00001-of-00004`.
        let file = file.trim_end_matches(".safetensors").split('-').next().unwrap();
        for (name, view) in SafeTensors::deserialize(&bytes).unwrap().tensors() {
            let values = view.data().as_chunks::<4>().0.iter().map(|number| f32::from_le_bytes(*number));
            numbers.entry(format!("{file}: {name}")).or_default().extend(values);
        }
    }
    numbers
}

/// Relative distance of all numbers together.
pub fn distance(a: &BTreeMap<String, Vec<f32>>, b: &BTreeMap<String, Vec<f32>>) -> f64 {
    assert!(a.keys().eq(b.keys()));
    let pairs = a.values().flatten().zip(b.values().flatten());
    let (difference, size) = pairs.fold((0.0, 0.0), |(difference, size), (a, b)| {
        (difference + f64::from(a - b).powi(2), size + f64::from(*a).powi(2))
    });
    (difference / size).sqrt()
}

/// The parts of TensorBoard's event that matter here.
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

/// The start of a process.
#[derive(Clone, PartialEq, Message)]
struct Session {
    #[prost(int32, tag = "1")]
    status: i32,
}

/// The curves that follow from the settings alone, as TensorBoard shows them: losses, gradient norm, learning rate. Values of
/// the same step, of which there should be one, stand side by side.
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
                // What a process begins with, it writes again.
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
