//! Training as several ranks: the result is that of one process.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;

use burn_hyperlora::metrics::LastScalars;
use burn_hyperlora::train::{CHECKPOINTS, TENSORBOARD};
use prost::Message;
use safetensors::SafeTensors;

use crate::mpirun::{end_of, mpirun};
use crate::world::World;

/// 20 steps of 8 samples.
const SAME: [(&str, &str); 6] = [
    ("micro_batch: 2", "micro_batch: 1"),
    ("global_batch: 4", "global_batch: 8"),
    ("log_every: 2", "log_every: 1"),
    ("base: {steps: 2", "base: {steps: 5"),
    ("id_clip: {steps: 4", "id_clip: {steps: 9"),
    ("id_embedding: {steps: 3", "id_embedding: {steps: 6"),
];
const STEPS: u64 = 20;

/// Trains into `run` as `ranks` processes; `more` are further arguments.
pub(crate) fn train(world: &World, ranks: usize, run: &str, more: &[&str]) -> (Option<i32>, String) {
    let program = env!("CARGO_BIN_EXE_hyperlora");
    let mut command = if ranks == 1 { Command::new(program) } else { mpirun(ranks) };
    if ranks > 1 {
        command.arg(program);
    }
    command.arg("train").arg(world.path().join("train.yaml")).arg("--out").arg(world.run(run)).args(more);
    end_of(&command.output().unwrap())
}

pub(crate) fn finished(world: &World, ranks: usize, run: &str) {
    let (code, text) = train(world, ranks, run, &[]);
    assert_eq!(code, Some(0), "{text}");
    assert_eq!(text.matches("finished after").count(), 1, "rank 0 alone reports: {text}");
}

/// All numbers of the checkpoint at `step`, by file and tensor; the moments of all ranks put together.
pub(crate) fn numbers(run: &Path, step: u64) -> BTreeMap<String, Vec<f32>> {
    let checkpoint = run.join(CHECKPOINTS).join(format!("step-{step:08}"));
    let mut numbers: BTreeMap<String, Vec<f32>> = BTreeMap::new();
    for folder in [checkpoint.clone(), checkpoint.join("weights")] {
        let mut paths: Vec<_> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
        paths.sort();
        for path in paths {
            if path.extension().is_none_or(|extension| extension != "safetensors") {
                continue;
            }
            let bytes = fs::read(&path).unwrap();
            for (name, view) in SafeTensors::deserialize(&bytes).unwrap().tensors() {
                let values = view.data().as_chunks::<4>().0.iter().map(|number| f32::from_le_bytes(*number));
                let file = path.file_stem().unwrap().to_str().unwrap();
                // Without `-00001-of-00004`.
                let file = file.split('-').next().unwrap();
                numbers.entry(format!("{file}: {name}")).or_default().extend(values);
            }
        }
    }
    assert!(numbers.len() > 50, "{}", numbers.len());
    numbers
}

/// Relative distance of all numbers together.
fn distance(a: &BTreeMap<String, Vec<f32>>, b: &BTreeMap<String, Vec<f32>>) -> f64 {
    assert!(a.keys().eq(b.keys()));
    let pairs = a.values().flatten().zip(b.values().flatten());
    let (difference, size) = pairs.fold((0.0, 0.0), |(difference, size), (a, b)| {
        (difference + f64::from(a - b).powi(2), size + f64::from(*a).powi(2))
    });
    (difference / size).sqrt()
}

/// The parts of TensorBoard's event that hold a scalar.
#[derive(Clone, PartialEq, Message)]
struct Event {
    #[prost(int64, tag = "2")]
    step: i64,
    #[prost(message, optional, tag = "5")]
    summary: Option<Scalars>,
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

/// The loss and the gradient norm of every step, from the curves.
fn curves(run: &Path) -> BTreeMap<(i64, String), f32> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(run.join(TENSORBOARD)).unwrap() {
        let bytes = fs::read(entry.unwrap().path()).unwrap();
        // A record: length (8 bytes), checksum (4), event, checksum (4).
        let mut rest = &bytes[..];
        while let Some((length, after)) = rest.split_first_chunk::<8>() {
            let length = u64::from_le_bytes(*length) as usize;
            let event = Event::decode(&after[4..4 + length]).unwrap();
            let scalars = event.summary.into_iter().flat_map(|summary| summary.values);
            let curves = scalars.filter(|s| s.tag.starts_with("loss/") || s.tag == "optim/gradient_norm");
            found.extend(curves.map(|scalar| ((event.step, scalar.tag), scalar.value)));
            rest = &after[8 + length..];
        }
    }
    found
}

#[test]
fn four_ranks_take_the_steps_of_one() {
    let world = World::new();
    world.experiment(&SAME).unwrap();
    finished(&world, 1, "one");
    finished(&world, 4, "four");
    let last = LastScalars::read(&world.run("four").join(TENSORBOARD)).unwrap().values;
    let share = last["speed/communication_share"];
    assert!(last["ranks/count"] == 4.0 && last["ranks/slowest"] < 4.0 && 0.0 < share && share < 1.0, "{last:?}");
    let (one, four) = (numbers(&world.run("one"), STEPS), numbers(&world.run("four"), STEPS));
    let apart = distance(&one, &four);
    assert!(apart < 1e-4, "{apart}");
    let (one, four) = (curves(&world.run("one")), curves(&world.run("four")));
    assert!(one.len() == 2 * STEPS as usize && one.keys().eq(four.keys()), "{one:?}\n{four:?}");
    for ((at, one), four) in one.iter().zip(four.values()) {
        let tolerance = if at.1.starts_with("loss/") { 1e-5 } else { 1e-3 * one };
        assert!((one - four).abs() <= tolerance, "{at:?}: {one} and {four}");
    }
    println!("4 ranks against 1 over {STEPS} steps: weights and moments differ by {apart:.1e}");

    // The optimiser's state divided among the ranks is the whole one, cut.
    world
        .experiment(&[&SAME[..], &[("recompute: false", "recompute: false\n  shard_optimizer: false")]].concat())
        .unwrap();
    finished(&world, 4, "whole");
    let apart = distance(&numbers(&world.run("four"), STEPS), &numbers(&world.run("whole"), STEPS));
    assert!(apart < 1e-6, "{apart}");
}

#[test]
fn a_run_goes_on_at_another_world_size() {
    let world = World::new();
    let experiment = world.experiment(&SAME).unwrap();
    world.train(&experiment, "one", None).unwrap();
    for (ranks, steps) in [(4, "7"), (2, "13")] {
        let (code, text) = train(&world, ranks, "changing", &["--max-steps", steps]);
        assert!(code == Some(0) && text.contains(&format!("paused after {steps} steps")), "{text}");
    }
    finished(&world, 1, "changing");
    let apart = distance(&numbers(&world.run("one"), STEPS), &numbers(&world.run("changing"), STEPS));
    assert!(apart < 1e-4, "{apart}");
}
