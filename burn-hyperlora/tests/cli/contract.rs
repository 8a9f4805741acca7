//! The command line itself: help, refusals, silence.

use std::process::Command;

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
        asked("cuda:0").refused(2, &["--device cuda:0", "the CPU alone", "leave --device out"]);
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
