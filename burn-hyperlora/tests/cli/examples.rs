//! Programs in `examples/`, run as their comments describe.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;

use hyperlora_testing::{asset, fixture};
use safetensors::SafeTensors;

use crate::support::{STEPS, World, contents, hyperlora, quickstart_base, run};

/// Builds a command for an example, which cargo builds beside the tests.
fn example(name: &str) -> Command {
    let program = Path::new(env!("CARGO_BIN_EXE_hyperlora")).with_file_name("examples").join(name);
    assert!(program.is_file(), "{} is missing: cargo build --examples", program.display());
    let mut command = Command::new(program);
    command.env("RAYON_NUM_THREADS", "1");
    command
}

#[test]
fn shards_are_read_face_by_face() {
    let world = World::new();
    let mut command = example("read_shards");
    command.arg(world.path("shards"));
    let lines = run(command).with(0).stdout;
    assert_eq!(lines.lines().count(), 16);
    assert!(lines.lines().all(|line| line.split('\t').count() == 4), "{lines}");
}

#[test]
fn a_loop_of_ones_own_trains_to_the_end_with_its_own_objective() {
    let world = World::new();
    let mut command = example("custom_loop");
    command.arg("train.yaml").current_dir(world.path(""));
    let ended = run(command).with(0);
    let steps: Vec<_> = ended.stdout.lines().filter(|line| line.starts_with("step ")).collect();
    assert!(steps.len() as u64 == STEPS && ended.stdout.contains("Finished"), "{}", ended.stdout);
    // With the objective and the learning rate of `hyperlora train`, the same run gets other weights.
    run(world.train("other", &[])).with(0);
    let last = format!("checkpoints/step-{STEPS:08}/weights");
    assert_ne!(contents(&world.path("runs/small").join(&last)), contents(&world.path("other").join(&last)));
    // A second start resumes at the end of the run.
    let mut command = example("custom_loop");
    command.arg("train.yaml").current_dir(world.path(""));
    let ended = run(command).with(0);
    assert!(!ended.stdout.contains("step 0") && ended.stdout.contains("Finished"), "{}", ended.stdout);
}

#[test]
fn a_program_trains_as_the_command_does() {
    let world = World::new();
    let mut command = example("train_tiny");
    command.arg(world.path("train.yaml")).arg(world.path("tiny"));
    let ended = run(command).with(0);
    assert!(ended.stdout.contains("Paused") && ended.stdout.contains("base: 2 steps"), "{}", ended.stdout);
    run(world.train("command", &["--max-steps", "3"])).with(0);
    let last = "checkpoints/step-00000003/weights";
    assert_eq!(contents(&world.path("tiny").join(last)), contents(&world.path("command").join(last)));
}

#[test]
fn a_program_writes_the_lora_that_the_command_writes() {
    let world = World::new();
    run(world.train("run", &[])).with(0);
    let [program, command] = ["program.safetensors", "command.safetensors"].map(|name| world.path(name));
    let mut generate = example("generate");
    generate.arg(world.path("run")).arg(&program).arg(asset("photos/orl/s36/1.pgm"));
    run(generate).with(0);
    let mut generate = hyperlora(["generate", "--dtype", "f16", "--checkpoint"]);
    generate.arg(world.path("run")).arg("--image").arg(asset("photos/orl/s36/1.pgm")).arg("-o").arg(&command);
    run(generate).with(0);
    let tensors = |path: &Path| {
        let bytes = fs::read(path).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        file.tensors().into_iter().map(|(name, view)| (name, view.data().to_vec())).collect::<BTreeMap<_, _>>()
    };
    assert_eq!(tensors(&program), tensors(&command));
}

#[test]
fn a_program_merges_as_the_command_does() {
    let world = World::new();
    let lora = fixture("loras/kohya.safetensors");
    let mut merge = example("merge");
    merge.arg(quickstart_base()).arg(&lora).arg(world.path("program"));
    run(merge).with(0);
    let mut merge = hyperlora(["merge", "--base"]);
    merge.arg(quickstart_base()).arg("--lora").arg(&lora).arg("-o").arg(world.path("command"));
    run(merge).with(0);
    assert_eq!(contents(&world.path("program")), contents(&world.path("command")));
}
