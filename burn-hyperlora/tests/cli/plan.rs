//! `hyperlora plan`.

use hyperlora_testing::repository;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::support::{Ended, World, hyperlora, run};

fn sdxl(name: &str) -> PathBuf {
    repository().join("experiments/sdxl").join(name)
}

fn plan(config: &Path, options: &[&str]) -> Ended {
    let arguments = [OsStr::new("plan"), config.as_os_str()].into_iter().chain(options.iter().map(OsStr::new));
    let mut command = hyperlora(arguments);
    // The test must not depend on files of this machine.
    command.env("HYPERLORA_MODELS", "/no/such/models").env("HYPERLORA_DATA", "/no/such/data");
    run(command)
}

#[test]
fn a_plan_is_a_page_of_tables_and_says_what_it_assumed() {
    let printed =
        plan(&sdxl("id-embedding.yaml"), &["--gpus", "16", "--gpu", "a100-80g", "--images", "4400000"]).with(0);
    let page = printed.stdout;
    for part in
        ["assumed: SDXL-Base-1.0", "2.567 B", "attention modules", "1.486 B", "ZeRO-1", "days", "fits into 80.0 GiB"]
    {
        assert!(page.contains(part), "{part}: {page}");
    }
    assert!(page.lines().count() < 80, "{page}");
    let tables = page.lines().skip_while(|line| !line.is_empty());
    assert!(tables.into_iter().all(|line| line.chars().count() < 100), "{page}");
}

#[test]
fn json_holds_the_same_figures() {
    let printed = plan(&sdxl("base.yaml"), &["--gpus", "16", "--gpu", "a100-80g", "--json"]).with(0);
    let figures: Value = serde_json::from_str(&printed.stdout).unwrap();
    assert_eq!(figures["frozen"][0]["parameters"], 2_567_463_684_u64);
    assert_eq!(figures["stages"][0]["gradient_bytes"], 4 * figures["stages"][0]["trainable"].as_u64().unwrap());
    assert_eq!(figures["stages"][0]["epochs"], Value::Null);
    assert_eq!(figures["fits"], true);
}

#[test]
fn a_measured_hop_and_link_replace_the_assumed_ones() {
    let options = ["--gpus", "4", "--gpu", "a100-80g", "--link", "1.7GB/s"];
    let seconds = |more: &[&str]| {
        let printed = plan(&sdxl("id-clip.yaml"), &[&options[..], &["--json"], more].concat()).with(0);
        let figures: Value = serde_json::from_str(&printed.stdout).unwrap();
        let stage = &figures["stages"][0];
        [&stage["all_reduce_seconds"], &stage["sent_bytes"], &stage["gradient_bytes"]].map(|x| x.as_f64().unwrap())
    };
    let [by_default, sent, gradients] = seconds(&[]);
    let hops = |seconds: f64| (gradients / f64::from(16 << 20)).ceil() * 6.0 * seconds;
    assert!((by_default - sent / 1.7e9 - hops(3.4e-6)).abs() < 1e-9);
    assert!((seconds(&["--hop", "7.1us"])[0] - sent / 1.7e9 - hops(7.1e-6)).abs() < 1e-9);
    let page = plan(&sdxl("id-clip.yaml"), &[&options[..], &["--hop", "7.1us"]].concat()).with(0).stdout;
    assert!(page.contains("assumed: 7.1 us per hop\n"), "{page}");
}

#[test]
fn what_does_not_fit_is_printed_with_what_to_turn_and_ends_with_2() {
    let printed = plan(&sdxl("id-clip.yaml"), &["--gpus", "16", "--gpu", "rtx-4090"]).with(2);
    assert!(printed.stdout.contains("DOES NOT FIT into 24.0 GiB"), "{}", printed.stdout);
    assert!(printed.stdout.contains("hyper_lora.basis: "), "{}", printed.stdout);
    plan(&sdxl("id-clip.yaml"), &["--gpus", "16", "--gpu", "rtx-4090", "--gpu-memory", "90GiB"]).with(0);
}

#[test]
fn the_shards_tell_how_many_samples_an_epoch_has() {
    let world = World::new();
    world.write_yaml(&[("shards: shards", "shards: shards\n  split: all")]);
    let manifest: Value = serde_json::from_slice(&fs::read(world.path("shards/manifest.json")).unwrap()).unwrap();
    let printed = plan(&world.path("train.yaml"), &["--gpu", "rtx-3090", "--json"]).with(0);
    let figures: Value = serde_json::from_str(&printed.stdout).unwrap();
    assert_eq!(figures["images"], manifest["kept"]);
    assert_eq!(figures["assumed"], Value::Array(vec![]));
}

#[test]
fn a_plan_that_cannot_be_made_is_one_error() {
    plan(&sdxl("base.yaml"), &["--gpus", "3", "--gpu", "a100-80g"]).refused(2, &["train.global_batch", "3 GPUs"]);
    plan(Path::new("no/such.yaml"), &["--gpu", "a100-80g"]).refused(2, &["no/such.yaml"]);
    for (option, value, part) in [
        ("--gpu", "gtx-970", "rtx-3090"),
        ("--link", "fast", "300GB/s"),
        ("--hop", "7.1", "7.1us"),
        ("--mfu", "0", "above 0"),
        ("--gpus", "0", "1.."),
        ("--images", "0", "1.."),
        ("--gpu-memory", "24", "24GiB"),
    ] {
        let mut options = vec!["--gpu", "a100-80g", option, value];
        if option == "--gpu" {
            options.drain(..2);
        }
        let stderr = plan(&sdxl("base.yaml"), &options).with(2).stderr;
        assert!(stderr.contains(part), "{option} {value}: {stderr}");
    }
}
