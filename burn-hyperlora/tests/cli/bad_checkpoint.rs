//! Damaged checkpoints and checkpoints of another experiment: named, never overwritten.

use std::fs;

use crate::support::{Damage, World, contents, copy_folder, first_file, flip_a_bit, hyperlora, run, truncate};

const LATEST: &str = "checkpoints/step-00000002";

#[test]
fn a_damaged_checkpoint_is_named_and_its_remedy_helps() {
    let world = World::new();
    run(world.train("good", &["--max-steps", "2"])).with(0);
    let cases: [(Damage, &str, &str); 8] = [
        (|step| flip_a_bit(&first_file(&step.join("weights"), ".safetensors")), "weights/", "checksum"),
        (|step| flip_a_bit(&step.join("state.json")), "state.json", "checksum"),
        (|step| flip_a_bit(&step.join("optimizer.safetensors")), "optimizer.safetensors", "checksum"),
        (|step| truncate(&step.join("optimizer.safetensors")), "optimizer.safetensors", "bytes instead of"),
        (|step| fs::remove_file(step.join("state.json")).unwrap(), "state.json", "is missing"),
        (|step| truncate(&step.join("checksums.json")), "checksums.json", "cannot be read"),
        (|step| fs::remove_file(step.join("checksums.json")).unwrap(), "checksums.json", "is missing"),
        (|step| fs::remove_dir_all(step.join("weights")).unwrap(), "weights/", "is missing"),
    ];
    let damaged = world.path("damaged");
    for (damage, file, problem) in cases {
        copy_folder(&world.path("good"), &damaged);
        damage(&damaged.join(LATEST));
        let before = contents(&damaged.join("checkpoints"));
        run(world.train("damaged", &[])).refused(2, &[LATEST, file, problem, "delete the folder"]);
        assert_eq!(contents(&damaged.join("checkpoints")), before);
        let mut generate = hyperlora(["generate", "--image", "a.png", "--checkpoint"]);
        generate.arg(&damaged).arg("-o").arg(world.path("a.safetensors"));
        run(generate).refused(2, &[LATEST, file, problem]);
        fs::remove_dir_all(&damaged).unwrap();
    }

    copy_folder(&world.path("good"), &damaged);
    flip_a_bit(&damaged.join(LATEST).join("state.json"));
    fs::remove_dir_all(damaged.join(LATEST)).unwrap();
    let ended = run(world.train("damaged", &["--max-steps", "2"])).with(0);
    assert!(ended.stderr.contains("step-00000001"), "{}", ended.stderr);
    let [good, again] =
        [world.path("good"), damaged].map(|run| fs::read(run.join(LATEST).join("optimizer.safetensors")));
    assert!(good.unwrap() == again.unwrap());
}

#[test]
fn a_run_of_another_experiment_is_left_alone() {
    let world = World::new();
    run(world.train("run", &["--max-steps", "1"])).with(0);
    let before = contents(&world.path("run/checkpoints"));
    let resolved = fs::read(world.path("run/config.yaml")).unwrap();
    for (from, to, key) in [
        ("seed: 5", "seed: 6", "train.yaml: seed"),
        ("basis: 8", "basis: 4", "train.yaml: hyper_lora.basis"),
        ("global_batch: 2", "global_batch: 4", "train.yaml: train.global_batch"),
        ("learning_rate: 0.01", "learning_rate: 0.02", "train.stages.0.base.optim.learning_rate"),
    ] {
        world.write_yaml(&[(from, to)]);
        run(world.train("run", &[])).refused(2, &[key, "the run's checkpoint was made with", "--restart"]);
    }
    assert_eq!(contents(&world.path("run/checkpoints")), before);
    assert_eq!(fs::read(world.path("run/config.yaml")).unwrap(), resolved);
}

#[test]
fn weights_of_other_sizes_are_no_beginning() {
    let world = World::new();
    run(world.train("first", &["--max-steps", "0"])).with(0);
    let from = world.path("first/checkpoints/step-00000000/weights");
    let init_from = format!("recompute: false\n  init_from: {}", from.display());
    world.write_yaml(&[("recompute: false", &init_from)]);
    run(world.train("second", &["--max-steps", "0"])).with(0);
    for (what, change) in [("basis", ("basis: 8", "basis: 4")), ("rank", ("id_rank: 2", "id_rank: 3"))] {
        world.write_yaml(&[("recompute: false", &init_from), change]);
        run(world.train(what, &["--max-steps", "0"])).refused(2, &["first/checkpoints/step-00000000/weights"]);
    }
    world.write_yaml(&[("recompute: false", "recompute: false\n  init_from: nowhere")]);
    run(world.train("third", &["--max-steps", "0"])).refused(2, &["nowhere"]);
}

#[test]
fn two_runs_never_share_a_folder() {
    let world = World::new();
    let mut first = world.train("run", &["-q"]).spawn().unwrap();
    while !world.path("run/checkpoints").exists() && first.try_wait().unwrap().is_none() {
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
    run(world.train("run", &[])).refused(2, &["run", "another process"]);
    assert!(first.wait().unwrap().success());
    run(world.train("run", &[])).with(0);
}
