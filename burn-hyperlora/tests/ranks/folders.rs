//! Run folder of several ranks: the same for all, or an error.

use std::fs;

use burn_hyperlora::run::CHECKPOINTS;

use crate::training::finished;
use hyperlora_testing::mpirun::{end_of, mpirun};
use hyperlora_testing::world::World;

/// Trains two ranks, each with its own value of `--out`.
fn train(world: &World, runs: [&str; 2], more: &[&str]) -> (Option<i32>, String) {
    let mut command = mpirun(1);
    // Ranks that refuse end immediately, but mpirun waits for this whole time, once for each.
    command.env("OMPI_MCA_odls_base_sigkill_timeout", "3");
    for (separator, run) in [&[][..], &[":", "-n", "1"]].into_iter().zip(runs) {
        command.args(separator).arg(env!("CARGO_BIN_EXE_hyperlora")).arg("train").arg(world.path("train.yaml"));
        command.arg("--out").arg(world.path(run)).args(more);
    }
    end_of(&command.output().unwrap())
}

#[test]
fn ranks_whose_run_folders_differ_are_told_before_they_begin() {
    let world = World::small();
    // The other ranks look for the main rank's folder for a quarter of this time.
    world.experiment(&[("recompute: false", "recompute: false\n  collective_timeout_s: 20")]).unwrap();
    fs::create_dir(world.path("other")).unwrap();
    for other in ["other", "not-there"] {
        let (code, text) = train(&world, ["run", other], &[]);
        assert_eq!(code, Some(2), "{text}");
        let (own, first) = (world.path(other), world.path("run"));
        let told = format!("its run folder {} is not that of rank 0 (", own.display());
        assert!(text.contains("error: rank 1 (") && text.contains(&told), "{text}");
        assert!(text.contains(&first.display().to_string()) && text.contains("--out"), "{text}");
        assert!(!first.join(CHECKPOINTS).exists() && !own.join(CHECKPOINTS).exists());
    }
    // The same folder by another name is accepted.
    std::os::unix::fs::symlink(world.path("run"), world.path("also-run")).unwrap();
    let (code, text) = train(&world, ["run", "also-run"], &["--max-steps", "2"]);
    assert_eq!(code, Some(0), "{text}");
    finished(&world, 2, "run");
    let marks = fs::read_dir(world.path("run"))
        .unwrap()
        .filter(|entry| entry.as_ref().unwrap().file_name().to_string_lossy().starts_with(".mark"));
    assert_eq!(marks.count(), 0);
}
