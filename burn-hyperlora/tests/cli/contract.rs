//! Command line: help, refusals and silence.

use hyperlora_testing::{fixture, repository};
use std::fs::{self, OpenOptions};
use std::process::{Command, Stdio};

use crate::support::{World, hyperlora, quickstart_base, run};

#[test]
fn every_command_shows_an_example() {
    let commands = ["train", "generate", "sample", "export", "slider", "fold", "plan"].map(|command| vec![command]);
    for command in commands.into_iter().chain([
        vec!["eval", "identity-gap"],
        vec!["checkpoint", "list"],
        vec!["checkpoint", "verify"],
        vec!["checkpoint", "consolidate"],
    ]) {
        let shown = run(hyperlora(command.iter().chain(&["--help"]))).with(0).stdout;
        let called = format!("  hyperlora {}", command.join(" "));
        assert!(shown.contains("Example") && shown.contains(&called), "{shown}");
        for option in ["--device", "--verbose", "--quiet"] {
            assert!(shown.contains(option), "{option}: {shown}");
        }
    }
    let version = run(hyperlora(["--version"])).with(0).stdout;
    assert_eq!(version.trim(), concat!("hyperlora ", env!("CARGO_PKG_VERSION")));
    let listed = run(hyperlora(["--help"])).with(0).stdout;
    assert!(["train", "generate", "sample", "plan", "eval"].iter().all(|command| listed.contains(command)), "{listed}");
}

#[test]
fn what_the_command_line_cannot_mean_is_refused() {
    let cases: [(&[&str], &str); 9] = [
        (&[], "Usage"),
        (&["trian"], "train"),
        (&["train"], "CONFIG"),
        (&["train", "a.yaml", "--restrat"], "--restart"),
        (&["train", "a.yaml", "--max-steps", "-1"], "-1"),
        (&["train", "a.yaml", "--device", "gpu"], "cuda:N"),
        (&["sample", "-o", "a.png"], "--checkpoint"),
        (&["generate", "--checkpoint", "c", "--image", "a.png", "--base-weight", "1", "-o", "a"], "  --base\n"),
        (&["sample", "--base", "b", "--prompt", "p", "--guidance", "nan", "-o", "a.png"], "finite"),
    ];
    for (arguments, part) in cases {
        let stderr = run(hyperlora(arguments)).with(2).stderr;
        assert!(stderr.contains(part), "{arguments:?}: {stderr}");
    }
}

#[test]
fn a_gpu_is_refused_by_commands_that_run_no_model() {
    for command in [
        &["fold", "--id", "a", "--base", "b", "--base-weight", "1", "-o", "c"][..],
        &["plan", "a.yaml", "--gpu", "a100-80g"],
        &["status", "run"],
        &["checkpoint", "list", "run"],
    ] {
        let asked = |device: &str| run(hyperlora(command.iter().chain(&["--device", device])));
        asked("cuda:0").refused(2, &["--device cuda:0", "the CPU only", "leave --device out"]);
        let stderr = asked("cpu").with(2).stderr;
        assert!(!stderr.contains("--device"), "{stderr}");
    }
}

#[cfg(not(feature = "cuda"))]
#[test]
fn a_build_without_cuda_says_how_to_make_one() {
    let stderr = run(hyperlora(["train", "a.yaml", "--device", "cuda:0"])).with(2).stderr;
    assert!(stderr.contains("--features burn-hyperlora/cuda"), "{stderr}");
}

/// Output that cannot be written to: a pipe whose reader has left.
fn left_pipe() -> Stdio {
    std::io::pipe().unwrap().1.into()
}

fn full_disk() -> Stdio {
    OpenOptions::new().write(true).open("/dev/full").unwrap().into()
}

#[test]
fn a_reader_that_leaves_is_no_fault_and_a_full_output_costs_no_result() {
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("folded.safetensors");
    let [id, base] = ["kohya", "second"].map(|name| fixture("loras").join(name).with_extension("safetensors"));
    let fold = || {
        let mut command = hyperlora(["fold", "--base-weight", "1", "--rank", "1", "--id"]);
        command.arg(&id).arg("--base").arg(&base).arg("-o").arg(&output);
        command
    };
    let plan = || {
        let mut command = hyperlora(["plan", "--gpu", "rtx-4090", "--images", "10"]);
        command.arg(repository().join("experiments/quickstart/train.yaml"));
        command
    };
    let ended = |mut command: Command, stdout: Stdio, stderr: Stdio| {
        let ended = command.stdout(stdout).stderr(stderr).output().unwrap();
        (ended.status.code(), String::from_utf8(ended.stderr).unwrap())
    };
    let printed = run(fold()).with(0);
    assert!(printed.stdout.starts_with("relative error of rank 1"), "{}", printed.stdout);
    let expected = fs::read(&output).unwrap();
    let made = || {
        let bytes = fs::read(&output).unwrap();
        fs::remove_file(&output).unwrap();
        bytes
    };
    assert!(made() == expected);
    run(plan()).with(0);

    for command in [fold(), plan()] {
        let (code, stderr) = ended(command, left_pipe(), Stdio::piped());
        assert!(code == Some(0) && !stderr.contains("error"), "{code:?} {stderr}");
    }
    assert!(made() == expected);
    for command in [fold(), plan()] {
        let (code, stderr) = ended(command, full_disk(), Stdio::piped());
        assert!(code == Some(1) && stderr.contains("standard output: writing failed"), "{code:?} {stderr}");
        assert!(!stderr.contains("panicked") && !stderr.contains("fault in the program"), "{stderr}");
    }
    assert!(made() == expected);
    for stderr in [left_pipe, full_disk] {
        assert_eq!(ended(fold(), Stdio::null(), stderr()).0, Some(0));
        assert!(made() == expected);
        let mut refused = fold();
        refused.args(["--id-weight", "0", "--base", "none"]);
        assert_eq!(ended(refused, Stdio::null(), stderr()).0, Some(2));
        let mut unread = hyperlora(["slider", "--positive", "none", "--negative", "none", "-o", "none"]);
        unread.current_dir(folder.path());
        assert_eq!(ended(unread, Stdio::null(), stderr()).0, Some(2));
    }
}

#[test]
fn quiet_is_silent_and_verbose_tells_more() {
    let world = World::new();
    let draw = |option: Option<&str>| -> Command {
        let mut command = hyperlora(["sample", "--prompt", "a face", "--steps", "1", "--size", "16", "--base"]);
        command.arg(quickstart_base()).arg("-o").arg(world.path("a.png")).args(option);
        command
    };
    let quiet = run(draw(Some("-q"))).with(0);
    assert_eq!(quiet.stdout + &quiet.stderr, "");
    let usual = run(draw(None)).with(0);
    assert!(usual.stderr.contains("a.png"), "{}", usual.stderr);
    run(hyperlora(["sample", "-q", "-v"])).with(2);

    let quiet = run(world.train("run", &["--max-steps", "1", "-q"])).with(0);
    assert_eq!(quiet.stdout + &quiet.stderr, "");
    let verbose = run(world.train("run", &["--max-steps", "1", "-v"])).with(0);
    assert!(verbose.stderr.contains("DEBUG"), "{}", verbose.stderr);
}
