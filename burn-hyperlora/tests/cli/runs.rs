//! Training runs from outside: their files, and that killed, stopped and paused runs end with the same result as
//! uninterrupted ones.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use crate::support::{Ended, STEPS, World, contents, hyperlora, run};

/// Reads the weights and moments of a run's last checkpoint, by file.
fn tensors(run: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut files = contents(&run.join(format!("checkpoints/step-{STEPS:08}")));
    files.retain(|path, _| path.extension().is_some_and(|extension| extension == "safetensors"));
    assert!(files.len() >= 5, "{:?}", files.keys());
    files
}

#[track_caller]
fn assert_same_end(resumed: &Path, whole: &Path) {
    let (resumed, whole) = (tensors(resumed), tensors(whole));
    assert!(resumed.keys().eq(whole.keys()));
    for (file, bytes) in whole {
        assert!(resumed[&file] == bytes, "{} differs", file.display());
    }
}

fn checkpoints(run: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(run.join("checkpoints")) else { return Vec::new() };
    let mut names: Vec<String> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.retain(|name| name.starts_with("step-"));
    names.sort();
    names
}

/// Starts a command and waits until its run has a checkpoint that is not in `known`; `None` if the command ended first.
fn until_next_checkpoint(mut command: Command, run: &Path, known: &[String]) -> Option<Child> {
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let start = Instant::now();
    loop {
        if child.try_wait().unwrap().is_some() {
            return None;
        }
        if checkpoints(run).iter().any(|name| !known.contains(name)) {
            return Some(child);
        }
        assert!(start.elapsed() < Duration::from_mins(5), "no checkpoint came");
        sleep(Duration::from_millis(5));
    }
}

fn signal(name: &str, child: &Child) {
    let sent = Command::new("kill").arg("-s").arg(name).arg(child.id().to_string()).status().unwrap();
    assert!(sent.success());
}

#[test]
fn a_run_leaves_its_story_and_ends_the_same_however_often_it_is_killed() {
    let world = World::new();
    let whole = world.path("whole");
    let ended = run(world.train("whole", &[])).with(0);
    assert!(ended.stderr.contains(&format!("finished after {STEPS} steps")), "{}", ended.stderr);
    for file in ["config.yaml", "summary.json", "run.log", "checkpoints", "tensorboard"] {
        assert!(whole.join(file).exists(), "{file}");
    }
    assert_eq!(checkpoints(&whole), ["step-00000004", "step-00000005", "step-00000006"]);
    assert!(fs::read_dir(whole.join("tensorboard")).unwrap().count() > 0);
    let summary: serde_json::Value = serde_json::from_slice(&fs::read(whole.join("summary.json")).unwrap()).unwrap();
    let stages = summary["stages"].as_array().unwrap();
    assert_eq!(stages.iter().map(|stage| stage["steps"].as_u64()).collect::<Vec<_>>(), [Some(2); 3]);

    // Each process is killed at a different time after a checkpoint appeared: immediately, and while the next step
    // computes or is saved.
    let killed = world.path("killed");
    let mut lives = 0;
    for wait in [0, 40, 150, 400, 90, 0, 250].into_iter().map(Duration::from_millis) {
        let Some(mut child) = until_next_checkpoint(world.train("killed", &[]), &killed, &checkpoints(&killed)) else {
            break;
        };
        sleep(wait);
        child.kill().unwrap();
        child.wait().unwrap();
        lives += 1;
    }
    assert!(lives >= 2, "{lives}");
    run(world.train("killed", &[])).with(0);
    assert_same_end(&killed, &whole);
    assert!(!contents(&killed.join("checkpoints")).keys().any(|path| path.to_string_lossy().contains("partial")));

    // A run that is asked to stop saves, reports it, and can resume.
    let stopped = world.path("stopped");
    for (name, word) in [("TERM", "SIGTERM"), ("INT", "SIGINT")] {
        let child = until_next_checkpoint(world.train("stopped", &[]), &stopped, &checkpoints(&stopped)).unwrap();
        signal(name, &child);
        let ended = Ended::of(child.wait_with_output().unwrap()).with(3);
        assert!(ended.stderr.contains(&format!("stopped by {word} after")), "{}", ended.stderr);
    }
    run(world.train("stopped", &[])).with(0);
    assert_same_end(&stopped, &whole);

    // With nothing left to do, the same command changes nothing.
    run(world.train("stopped", &[])).with(0);
    assert_same_end(&stopped, &whole);
}

#[test]
fn max_steps_pauses_and_restart_keeps_the_old_run_aside() {
    let world = World::new();
    let first = world.path("run");
    let ended = run(world.train("run", &["--max-steps", "1"])).with(0);
    assert!(ended.stderr.contains("paused after 1 steps"), "{}", ended.stderr);
    let saved = |run: &Path| contents(&run.join("checkpoints"));
    let before = saved(&first);
    assert!(before.len() >= 3);
    assert_eq!(checkpoints(&first), ["step-00000001"]);

    let aside = world.path("run.1");
    let again = |name: &str, value: &str| {
        let mut again = world.train("run", &["--max-steps", "1", "--restart"]);
        again.env(name, value);
        let ended = run(again);
        assert!(!aside.exists() && saved(&first) == before, "{}", ended.stderr);
        ended
    };
    // A requeued job repeats the command, and the run resumes.
    let ended = again("SLURM_RESTART_COUNT", "2").with(0);
    assert!(ended.stderr.contains("--restart is ignored"), "{}", ended.stderr);
    // Launchers that do not report a repeated start would move the run aside each time.
    for (name, value) in
        [("TORCHELASTIC_MAX_RESTARTS", "20"), ("TORCHELASTIC_RUN_ID", "a"), ("JOB_COMPLETION_INDEX", "0")]
    {
        again(name, value).refused(2, &["--restart", name, "by hand", "--out"]);
    }

    let anew = world.train("run", &["--max-steps", "0", "--restart"]);
    let ended = run(anew).with(0);
    assert!(ended.stderr.contains(&aside.display().to_string()), "{}", ended.stderr);
    assert!(saved(&aside) == before);
    assert_eq!(checkpoints(&first), ["step-00000000"]);
}

#[test]
fn pictures_are_drawn_along_the_way() {
    let world = World::new();
    world.write_yaml(&[(
        "  log_every: 1\n",
        "  log_every: 1\n  samples: {every: 1, count: 2, steps: 1}\n  fixed_set: {triples: 3}\n",
    )]);
    run(world.train("run", &["--max-steps", "1", "-q"])).with(0);
    let picture = image::open(world.path("run/samples/step-00000001.png")).unwrap();
    // Two people; reference, without LoRA, with LoRA.
    assert_eq!((picture.width(), picture.height()), (3 * 32, 2 * 32));
}

#[test]
fn a_run_is_named_by_its_yaml_and_all_paths_may_be_relative() {
    let world = World::new();
    let from_inside = |arguments: &[&str]| {
        let mut command = hyperlora(arguments);
        command.current_dir(world.path("."));
        run(command).with(0)
    };
    from_inside(&["train", "train.yaml", "--max-steps", "1"]);
    assert_eq!(checkpoints(&world.path("runs/small")), ["step-00000001"]);
    from_inside(&["train", "train.yaml", "--max-steps", "3", "--out", "runs/small/"]);
    assert_eq!(checkpoints(&world.path("runs/small")).len(), 3);
    from_inside(&["train", "train.yaml", "--max-steps", "0", "--out", "runs/small/", "--restart"]);
    assert_eq!(checkpoints(&world.path("runs/small")), ["step-00000000"]);
    assert_eq!(checkpoints(&world.path("runs/small.1")).len(), 3);
    // The resolved configuration works from any folder.
    run(hyperlora([OsStr::new("eval"), OsStr::new("identity-gap"), world.path("runs/small.1").as_os_str()])).with(0);
}
