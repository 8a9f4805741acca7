//! Whole training runs, on synthetic people and a tiny random pipeline.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use burn::tensor::Device;
use burn_hyperlora::checkpoint::CheckpointStore;
use burn_hyperlora::experiment::Experiment;
use burn_hyperlora::metrics::{RunSummary, StageSummary};
use burn_hyperlora::run::{CHECKPOINTS, SKIPPED};
use burn_hyperlora::train::{Outcome, TrainOptions};
use hyperlora_core::signals::StopFlag;

use hyperlora_testing::experiment::{STEPS, YAML};
use hyperlora_testing::state::{distance, numbers, tensors};
use hyperlora_testing::world::World;

/// Reads all numbers of a checkpoint's weights, by tensor.
fn weights(run: &Path, step: u64) -> BTreeMap<String, Vec<f32>> {
    let mut numbers = numbers(run, step);
    numbers.retain(|name, _| name.starts_with("weights/"));
    numbers
}

/// Makes the first step of the second stage ruin the weights.
pub(crate) const RUINOUS: (&str, &str) = (
    "steps: 4, reference: same_identity, optim: {learning_rate: 0.01",
    "steps: 4, reference: same_identity, optim: {learning_rate: 1.0e+30",
);

/// Reads the lines of the run's skipped steps.
pub(crate) fn skipped(run: &Path) -> Vec<serde_json::Value> {
    let text = fs::read_to_string(run.join(SKIPPED)).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn finished(outcome: Outcome) {
    assert!(matches!(outcome, Outcome::Finished { step: STEPS, .. }), "{outcome:?}");
}

#[test]
fn a_killed_run_goes_on_bit_for_bit() {
    let world = World::small();
    let experiment = world.experiment(&[]).unwrap();
    finished(world.train(&experiment, "whole", None).unwrap());
    let whole = tensors(&world.path("whole"), STEPS);

    // A kill leaves the checkpoints written before it: of a run stopped after `stop` steps, those after `left` go.
    for (stop, left) in [(5, 5), (5, 4), (2, 2), (3, 2), (6, 6), (8, 8), (7, 6)] {
        let name = format!("killed-{stop}-{left}");
        let run = world.path(&name);
        let outcome = world.train(&experiment, &name, Some(stop)).unwrap();
        assert!(matches!(outcome, Outcome::Paused { step, .. } if step == stop), "{outcome:?}");
        for checkpoint in CheckpointStore::at(&run.join(CHECKPOINTS)).list().unwrap() {
            if checkpoint.step > left {
                fs::remove_dir_all(checkpoint.path()).unwrap();
            }
        }
        assert_eq!(CheckpointStore::at(&run.join(CHECKPOINTS)).latest().unwrap().unwrap().step, left);
        finished(world.train(&experiment, &name, None).unwrap());
        let resumed = tensors(&run, STEPS);
        for (file, bytes) in &whole {
            assert!(resumed.get(file) == Some(bytes), "{name}: {file} differs");
        }
        let losses = |run: &str| -> Vec<f64> {
            let stages = RunSummary::read(&world.path(run)).unwrap().stages;
            assert_eq!(stages.iter().map(|stage| stage.steps).collect::<Vec<_>>(), [2, 4, 3]);
            let both = |stage: StageSummary| [stage.fixed_set_loss_before, stage.fixed_set_loss_after];
            stages.into_iter().flat_map(both).map(Option::unwrap).collect()
        };
        for (resumed, whole) in losses(&name).into_iter().zip(losses("whole")) {
            assert!((resumed - whole).abs() < 1e-12, "{name}: {resumed} and {whole}");
        }
    }
}

#[test]
fn a_run_with_a_bf16_unet_goes_on_bit_for_bit() {
    let world = World::small();
    let full = world.experiment(&[]).unwrap();
    world.train(&full, "full", Some(3)).unwrap();
    let half = world.experiment(&[("encoders}", "encoders, dtype: bf16}")]).unwrap();
    world.train(&half, "whole", Some(3)).unwrap();
    // Step 2 ends the Base stage; the third step starts another.
    for stop in [1, 2] {
        let name = format!("stopped-{stop}");
        world.train(&half, &name, Some(stop)).unwrap();
        world.train(&half, &name, Some(3)).unwrap();
        assert!(tensors(&world.path(&name), 3) == tensors(&world.path("whole"), 3), "stopped after {stop}");
    }
    let apart = distance(&weights(&world.path("full"), 3), &weights(&world.path("whole"), 3));
    assert!(apart > 0.0 && apart < 0.1, "relative distance {apart}");
}

#[test]
fn every_stage_moves_its_own_groups_and_nothing_else() {
    let world = World::small();
    finished(world.train(&world.experiment(&[]).unwrap(), "run", None).unwrap());
    let run = world.path("run");
    let start = {
        // The weights before the first step: a run that is stopped immediately.
        world.train(&world.experiment(&[]).unwrap(), "start", Some(0)).unwrap();
        weights(&world.path("start"), 0)
    };
    let [base, id_clip, id_embedding] = [2, 6, 9].map(|step| weights(&run, step));
    let moved = |a: &BTreeMap<String, Vec<f32>>, b: &BTreeMap<String, Vec<f32>>| -> Vec<String> {
        a.iter().filter(|(name, values)| b[*name] != **values).map(|(name, _)| name.clone()).collect()
    };
    let all = |names: &[String], parts: &[&str]| names.iter().all(|name| parts.iter().any(|part| name.contains(part)));

    let names = moved(&start, &base);
    assert!(!names.is_empty() && all(&names, &["base_resampler", "base_down_basis", "base_up_basis"]), "{names:?}");

    let names = moved(&base, &id_clip);
    assert!(names.iter().any(|name| name.contains("attn3")) && names.iter().any(|name| name.contains("id_up_basis")));
    assert!(!names.iter().any(|name| name.contains("attn2") || name.contains("proj_in.")), "{names:?}");
    assert!(!names.iter().any(|name| name.contains("base_") || name.contains("id_projector")), "{names:?}");

    let names = moved(&id_clip, &id_embedding);
    assert!(names.iter().any(|name| name.contains("id_projector")), "{names:?}");
    assert!(all(&names, &["id_projector", "attn2", "weights/resampler: proj_in."]), "{names:?}");
}

#[test]
fn the_batch_may_be_cut_as_one_likes_and_blocks_recomputed() {
    let world = World::small();
    let reference = world.experiment(&[]).unwrap();
    finished(world.train(&reference, "reference", None).unwrap());
    let expected = weights(&world.path("reference"), STEPS);
    for (name, from, to) in [
        ("one-by-one", "micro_batch: 2", "micro_batch: 1"),
        ("at-once", "micro_batch: 2", "micro_batch: 4"),
        ("recomputed", "recompute: false", "recompute: true"),
    ] {
        finished(world.train(&world.experiment(&[(from, to)]).unwrap(), name, None).unwrap());
        let distance = distance(&expected, &weights(&world.path(name), STEPS));
        assert!(distance < 1e-4, "{name}: {distance}");
    }
    // The distance measure does detect a different run.
    finished(world.train(&world.experiment(&[("seed: 5", "seed: 6")]).unwrap(), "other", None).unwrap());
    assert!(distance(&expected, &weights(&world.path("other"), STEPS)) > 0.1);
}

#[test]
fn passes_side_by_side_give_the_bits_of_passes_in_turn() {
    let world = World::small();
    // Three passes per step: on two threads they run as two and one.
    let uneven = [("micro_batch: 2", "micro_batch: 1"), ("global_batch: 4", "global_batch: 3")];
    let experiment = world.experiment(&uneven).unwrap();
    let runs = [1, 2, 3].map(|threads| {
        let name = format!("threads-{threads}");
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        finished(pool.install(|| world.train(&experiment, &name, None)).unwrap());
        tensors(&world.path(&name), STEPS)
    });
    assert!(runs[0] == runs[1] && runs[0] == runs[2]);
}

#[test]
fn training_lowers_the_loss_on_photos_it_does_not_see() {
    let world = World::small();
    let changes = [("- base: {steps: 2", "- base: {steps: 25"), ("{triples: 6}", "{triples: 16}")];
    let experiment = world.experiment(&changes).unwrap();
    world.train(&experiment, "run", Some(25)).unwrap();
    let summary = RunSummary::read(&world.path("run")).unwrap();
    let (before, after) = (summary.stages[0].fixed_set_loss_before, summary.stages[0].fixed_set_loss_after);
    assert!(after.unwrap() < 0.98 * before.unwrap(), "{before:?} -> {after:?}");
}

#[test]
fn a_signal_saves_and_tells() {
    let world = World::small();
    let experiment = world.experiment(&[]).unwrap();
    let stop = StopFlag::install().unwrap();
    signal_hook::low_level::raise(signal_hook::consts::SIGTERM).unwrap();
    let options = TrainOptions { stop, ..TrainOptions::default() };
    let outcome = experiment.train(&world.path("run"), &Device::flex(), options).unwrap();
    let Outcome::Stopped { signal: "SIGTERM", step: 0, checkpoint } = outcome else {
        unreachable!("{outcome:?}");
    };
    let latest = CheckpointStore::at(&world.path("run").join(CHECKPOINTS)).latest().unwrap().unwrap();
    assert_eq!(latest.path(), checkpoint);
    latest.verify().unwrap();
    finished(world.train(&experiment, "run", None).unwrap());
}

#[test]
fn a_run_goes_on_only_with_its_own_settings() {
    let world = World::small();
    let experiment = world.experiment(&[]).unwrap();
    world.train(&experiment, "run", Some(1)).unwrap();
    for (from, to, key) in [
        ("seed: 5", "seed: 6", "seed"),
        ("id_clip: {steps: 4", "id_clip: {steps: 5", "train.stages.1.id_clip.steps"),
        ("recompute: false", "recompute: true", "train.recompute"),
        ("basis: 8", "basis: 16", "hyper_lora.basis"),
        ("flip: true", "flip: false", "data.flip"),
    ] {
        let error = world.train(&world.experiment(&[(from, to)]).unwrap(), "run", None).unwrap_err();
        assert_eq!(error.exit_code(), 2);
        let message = error.to_string();
        assert!(message.contains(&format!("{key}: ")) && message.contains("--restart"), "{message}");
    }
    let harmless = [("{every: 2", "{every: 3"), ("log_every: 2", "log_every: 1")];
    finished(world.train(&world.experiment(&harmless).unwrap(), "run", None).unwrap());
}

#[test]
fn what_cannot_be_trained_is_refused_before_the_first_step() {
    let world = World::small();
    for (from, to, part) in [
        ("shards: shards", "shards: nowhere", "nowhere"),
        ("shards: shards", "shards: shards\n  split: validation", "`validation`"),
        ("image_size: 32", "image_size: 30", "data.image_size"),
        ("clip_dim: 24", "clip_dim: 32", "hyper_lora.clip_dim"),
        ("clip_dim: 24", "clip_dim: 24\n  id_embedding_dim: 128", "hyper_lora.id_embedding_dim"),
        ("{triples: 6}", "{triples: 6, split: train}", "train.fixed_set.split"),
        ("{triples: 6}", "{triples: 6, split: all}", "train.fixed_set.split"),
        ("shards: shards", "shards: shards\n  split: all", "train.fixed_set.split"),
        ("draws: 3", "draws: 3, known: {photos: train, references: train}", "eval.identity_gap.known.photos"),
        ("draws: 3", "draws: 3, unseen: {photos: train, references: train}", "eval.identity_gap.unseen.photos"),
        ("log_every: 2", "log_every: 2\n  samples: {every: 2, steps: 1001}", "train.samples.steps"),
        ("global_batch: 4", "global_batch: 3", "train.global_batch"),
        ("base: {path: ", "base: {path: /nowhere", "base.path"),
        ("seed: 5", "seed: 5\nsede: 6", "sede"),
    ] {
        let refused = world.experiment(&[(from, to)]).and_then(|experiment| world.train(&experiment, "run", None));
        let error = refused.unwrap_err();
        assert_eq!(error.exit_code(), 2, "{error}");
        assert!(error.to_string().contains(part), "{error}");
    }
}

/// Copies the fixture pipeline, component by component, into its own folder.
fn base_copy(folder: &Path) {
    for part in fs::read_dir(hyperlora_testing::fixture("encoders")).unwrap() {
        let part = part.unwrap().path();
        if part.is_dir() {
            let copy = folder.join(part.file_name().unwrap());
            fs::create_dir_all(&copy).unwrap();
            for file in fs::read_dir(&part).unwrap() {
                let file = file.unwrap().path();
                fs::copy(&file, copy.join(file.file_name().unwrap())).unwrap();
            }
        }
    }
}

#[test]
fn models_that_do_not_go_together_are_refused() {
    let world = World::small();
    let base = world.path("base");
    let edit = |file: &str, from: &str, to: &str| {
        let text = fs::read_to_string(base.join(file)).unwrap();
        assert!(text.contains(from), "{text}");
        fs::write(base.join(file), text.replace(from, to)).unwrap();
    };
    let elsewhere = format!("base: {{path: {}}} #", base.display());
    let refused = || {
        let experiment = world.experiment(&[("base: {path:", &elsewhere)]).unwrap();
        let error = world.train(&experiment, "run", None).unwrap_err();
        assert_eq!(error.exit_code(), 2, "{error}");
        error.to_string()
    };
    base_copy(&base);
    edit("feature_extractor/preprocessor_config.json", "32", "40");
    let message = refused();
    assert!(message.contains("40 pixels") && message.contains("takes 32"), "{message}");

    base_copy(&base);
    for file in fs::read_dir(base.join("text_encoder_2")).unwrap() {
        let file = file.unwrap().path();
        fs::copy(&file, base.join("text_encoder").join(file.file_name().unwrap())).unwrap();
    }
    let message = refused();
    assert!(message.contains("cross_attention_dim") && message.contains("make 48"), "{message}");
}

#[test]
fn a_run_goes_on_with_its_base_elsewhere_and_never_with_another() {
    let world = World::small();
    let base = world.path("base");
    base_copy(&base);
    world.train(&world.experiment(&[]).unwrap(), "run", Some(1)).unwrap();
    let elsewhere = format!("base: {{path: {}}} #", base.display());
    let moved = world.experiment(&[("base: {path:", &elsewhere)]).unwrap();
    world.train(&moved, "run", Some(2)).unwrap();

    let vae = base.join("vae/diffusion_pytorch_model.safetensors");
    let mut bytes = fs::read(&vae).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&vae, bytes).unwrap();
    let error = world.train(&moved, "run", Some(3)).unwrap_err();
    assert!(error.exit_code() == 2 && error.to_string().contains("base.vae"), "{error}");
}

#[test]
fn a_run_without_an_id_stage_so_far_has_no_identity_gap() {
    let world = World::small();
    world.train(&world.experiment(&[]).unwrap(), "run", Some(2)).unwrap();
    let error = Experiment::identity_gap(&world.path("run"), &Device::flex()).unwrap_err();
    assert!(error.exit_code() == 2 && error.to_string().contains("no ID-LoRA"), "{error}");
}

#[test]
fn a_run_folder_tells_its_story() {
    let world = World::small();
    let pictures = ("log_every: 2", "log_every: 2\n  samples: {every: 2, count: 2, steps: 2}");
    finished(world.train(&world.experiment(&[pictures]).unwrap(), "run", None).unwrap());
    let run = world.path("run");

    let events = fs::read_dir(run.join("tensorboard")).unwrap().next().unwrap().unwrap().path();
    let events = fs::read(events).unwrap();
    for tag in [
        "loss/id_clip",
        "loss_by_scenario/id_clip/full",
        "loss_by_timestep/id_clip/quartile_1",
        "optim/learning_rate",
        "optim/gradient_norm",
        "coefficients/spread",
        "speed/images_per_second",
        "speed/data_wait_share",
        "memory/resident_mib",
        "fixed_set/base",
        "samples/base",
        "id_tokens: 2",
    ] {
        assert!(events.windows(tag.len()).any(|window| window == tag.as_bytes()), "{tag}");
    }
    let grid = image::open(run.join("samples/step-00000002.png")).unwrap();
    assert_eq!((grid.width(), grid.height()), (3 * 32, 2 * 32));

    // The resolved configuration works from any folder; evaluations read it.
    let resolved = Experiment::of_run(&run).unwrap();
    assert_eq!(resolved.train.stages[1].config().groups.len(), 8);
    let first = Experiment::identity_gap(&run, &Device::flex()).unwrap();
    let again = Experiment::identity_gap(&run, &Device::flex()).unwrap();
    assert_eq!(first, again);
    assert_eq!((first.known.n, first.unseen.n), (4, 12));
    assert!(first.known.t.is_some_and(f64::is_finite) && first.known.mean != 0.0);
    let summary = RunSummary::read(&run).unwrap();
    let known = summary.identity_gap.unwrap().known;
    assert!(known.n == 4 && (known.mean - first.known.mean).abs() < 1e-12);
    assert_eq!(summary.stages.iter().map(|stage| stage.steps).collect::<Vec<_>>(), [2, 4, 3]);
    assert!(summary.stages.iter().all(|stage| stage.images_per_second > 0.0 && stage.seconds > 0.0));
}

#[test]
fn stages_may_run_one_by_one() {
    let world = World::small();
    let experiment = world.experiment(&[]).unwrap();
    world.train(&experiment, "first", Some(2)).unwrap();
    let from = world.path("first").join("checkpoints/step-00000002/weights");
    let yaml = YAML;
    let base_stage = yaml.lines().find(|line| line.contains("- base:")).unwrap();
    let changes =
        [(base_stage, ""), ("recompute: false", &format!("recompute: false\n  init_from: {}", from.display()))];
    let experiment = world.experiment(&changes).unwrap();
    world.train(&experiment, "second", Some(0)).unwrap();
    assert_eq!(weights(&world.path("second"), 0), weights(&world.path("first"), 2));
    let outcome = world.train(&experiment, "second", None).unwrap();
    assert!(matches!(outcome, Outcome::Finished { step: 7, .. }), "{outcome:?}");
}

#[test]
fn a_training_that_diverges_stops_and_keeps_its_last_checkpoint() {
    let world = World::small();
    let experiment =
        world.experiment(&[RUINOUS, ("recompute: false", "recompute: false\n  spikes: {most: 1}")]).unwrap();
    let diverges = || {
        let error = world.train(&experiment, "run", None).unwrap_err();
        assert!(error.exit_code() == 1 && error.to_string().contains("diverged"), "{error}");
        skipped(&world.path("run")).iter().map(|line| line["step"].as_u64().unwrap()).collect::<Vec<_>>()
    };
    // Step 3 ruins the weights, step 4 detects that and rolls back to those of step 2; then the same happens again.
    assert_eq!(diverges(), [4, 6]);
    assert!(skipped(&world.path("run")).iter().all(|line| line["photos"].as_array().unwrap().len() == 4));
    let latest = CheckpointStore::at(&world.path("run").join(CHECKPOINTS)).latest().unwrap().unwrap();
    assert_eq!(latest.step, 4);
    let two = weights(&world.path("run"), 2);
    assert_eq!(two, weights(&world.path("run"), 4), "step 4 has the weights that it went back to");
    latest.verify().unwrap();
    // No step of the stage is in those weights, so there are no moments to restore, and the run still resumes.
    assert_eq!(diverges(), [4, 6, 6]);
}

#[test]
fn where_a_run_is_interrupted_does_not_move_what_it_goes_back_to() {
    let world = World::small();
    // Step 3 ruins the weights, steps 4 to 6 are skipped, and the third skip rolls the weights back to those of step 2.
    let changes = [RUINOUS, ("{every: 2, keep: 9}", "{every: 2, keep: 1}")];
    let experiment = world.experiment(&changes).unwrap();
    finished(world.train(&experiment, "whole", None).unwrap());
    assert_eq!(skipped(&world.path("whole")).len(), 3);
    let whole = tensors(&world.path("whole"), STEPS);
    for stop in [3, 5] {
        let run = format!("stopped-{stop}");
        world.train(&experiment, &run, Some(stop)).unwrap();
        finished(world.train(&experiment, &run, None).unwrap());
        assert!(tensors(&world.path(&run), STEPS) == whole, "stopped after {stop}");
    }
}

#[test]
fn a_stage_that_ends_among_bad_steps_goes_back_to_good_weights() {
    let world = World::small();
    // Step 3 ruins the weights; steps 4 to 6 are skipped, too few for a rollback, and step 6 ends the stage.
    let patient = ("recompute: false", "recompute: false\n  spikes: {most: 4}");
    let experiment = world.experiment(&[RUINOUS, patient]).unwrap();
    finished(world.train(&experiment, "run", None).unwrap());
    assert_eq!(skipped(&world.path("run")).len(), 3, "those of the next stage are good");
    assert_eq!(weights(&world.path("run"), 6), weights(&world.path("run"), 2));
    world.train(&experiment, "interrupted", Some(5)).unwrap();
    finished(world.train(&experiment, "interrupted", None).unwrap());
    assert!(tensors(&world.path("interrupted"), STEPS) == tensors(&world.path("run"), STEPS));

    // The first stage has nothing to roll back to.
    let ruinous = ("base: {steps: 2, optim: {learning_rate: 0.01}", "base: {steps: 2, optim: {learning_rate: 1.0e+30}");
    let error = world.train(&world.experiment(&[ruinous, patient]).unwrap(), "first", None).unwrap_err();
    assert!(error.exit_code() == 1 && error.to_string().contains("the last step of stage base was skipped"), "{error}");
}
