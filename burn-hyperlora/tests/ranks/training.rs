//! Training with several ranks gives the result of one process.

use std::process::Command;

use burn_hyperlora::metrics::LastScalars;
use burn_hyperlora::run::TENSORBOARD;

use hyperlora_testing::mpirun::{end_of, mpirun};
use hyperlora_testing::state::{curves, distance, numbers};
use hyperlora_testing::world::World;

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
    command.arg("train").arg(world.path("train.yaml")).arg("--out").arg(world.path(run)).args(more);
    end_of(&command.output().unwrap())
}

pub(crate) fn finished(world: &World, ranks: usize, run: &str) {
    let (code, text) = train(world, ranks, run, &[]);
    assert_eq!(code, Some(0), "{text}");
    assert_eq!(text.matches("finished after").count(), 1, "rank 0 alone reports: {text}");
}

#[test]
fn four_ranks_take_the_steps_of_one() {
    let world = World::small();
    world.experiment(&SAME).unwrap();
    finished(&world, 1, "one");
    finished(&world, 4, "four");
    let last = LastScalars::read(&world.path("four").join(TENSORBOARD)).unwrap().values;
    let share = last["speed/communication_share"];
    assert!(last["ranks/count"] == 4.0 && last["ranks/slowest"] < 4.0 && 0.0 < share && share < 1.0, "{last:?}");
    let (one, four) = (numbers(&world.path("one"), STEPS), numbers(&world.path("four"), STEPS));
    let apart = distance(&one, &four);
    assert!(apart < 1e-4, "{apart}");
    let (one, four) = (curves(&world.path("one")), curves(&world.path("four")));
    // Loss, gradient norm and learning rate of every step; the fixed set before and after each of three stages.
    assert!(one.len() == 3 * STEPS as usize + 6 && one.keys().eq(four.keys()), "{one:?}\n{four:?}");
    for ((at, one), four) in one.iter().zip(four.values()) {
        let (&[one], &[four]) = (&one[..], &four[..]) else { unreachable!("{at:?}: {one:?} and {four:?}") };
        let tolerance = if at.0.starts_with("optim/") { 1e-3 * one } else { 1e-5 };
        assert!((one - four).abs() <= tolerance, "{at:?}: {one} and {four}");
    }
    println!("4 ranks against 1 over {STEPS} steps: weights and moments differ by {apart:.1e}");

    // The sharded optimiser state is the whole one, cut into parts.
    world
        .experiment(&[&SAME[..], &[("recompute: false", "recompute: false\n  shard_optimizer: false")]].concat())
        .unwrap();
    finished(&world, 4, "whole");
    let apart = distance(&numbers(&world.path("four"), STEPS), &numbers(&world.path("whole"), STEPS));
    assert!(apart < 1e-6, "{apart}");
}

/// Returns the bytes of moments in the last stage: whole and sharded over `ranks`, as `hyperlora plan` predicts, and
/// the maximum that the run's ranks held.
fn moments(world: &World, ranks: usize, run: &str) -> [f64; 3] {
    let mut plan = Command::new(env!("CARGO_BIN_EXE_hyperlora"));
    plan.arg("plan").arg(world.path("train.yaml"));
    let planned = plan.args(["--gpu", "a100-80g", "--json", "--gpus", &ranks.to_string()]).output().unwrap();
    let planned: serde_json::Value = serde_json::from_slice(&planned.stdout).unwrap();
    let memory = &planned["stages"][2]["memory"];
    let held = LastScalars::read(&world.path(run).join(TENSORBOARD)).unwrap().values["memory/moments_mib_max"];
    [memory["moments"].as_f64().unwrap(), memory["moments_sharded"].as_f64().unwrap(), held * f64::from(1 << 20)]
}

#[test]
fn the_optimizer_state_of_a_rank_is_what_the_plan_says() {
    let world = World::small();
    world.experiment(&SAME).unwrap();
    finished(&world, 1, "one");
    finished(&world, 4, "four");
    let [whole, divided, held] = moments(&world, 1, "one");
    assert!(whole > 4096.0 && whole == divided && held == whole, "{whole} {divided} {held}");
    let [whole_of_four, divided, held] = moments(&world, 4, "four");
    assert_eq!(whole_of_four, whole);
    // A bucket's parts have equal length, so there are at most three more elements in total, in each of two moments.
    assert!((divided..=divided + 8.0).contains(&held) && divided == (whole / 4.0).ceil(), "{divided} {held}");
    println!("moments of a rank: {whole} bytes alone, {held} of 4 ranks; the plan says {divided}");
}

#[test]
fn a_run_goes_on_at_another_world_size() {
    let world = World::small();
    world.experiment(&SAME).unwrap();
    finished(&world, 1, "one");
    for (ranks, steps) in [(4, "7"), (2, "13")] {
        let (code, text) = train(&world, ranks, "changing", &["--max-steps", steps]);
        assert!(code == Some(0) && text.contains(&format!("paused after {steps} steps")), "{text}");
    }
    finished(&world, 1, "changing");
    let apart = distance(&numbers(&world.path("one"), STEPS), &numbers(&world.path("changing"), STEPS));
    assert!(apart < 1e-4, "{apart}");
}
