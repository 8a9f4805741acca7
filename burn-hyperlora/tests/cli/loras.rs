//! `sample` and `merge` with LoRA files, compared with the output of diffusers; `ci/parity/lora_fixtures.py` made the
//! files and latents.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use burn::tensor::{Device, TensorData};
use hyperlora_sdxl::weights::{Weights, save};

use crate::support::{World, contents, hyperlora, quickstart_base, run};
use hyperlora_testing::stability::stability;

const SHAPE: [usize; 4] = [1, 4, 8, 12];

fn fixture(name: &str) -> PathBuf {
    hyperlora_testing::fixture("loras").join(name).with_extension("safetensors")
}

fn latents(path: &Path, name: &str) -> Vec<f32> {
    let weights = Weights::open(path, &Device::flex()).unwrap();
    weights.at("").tensor(name, SHAPE).into_data().try_into_vec().unwrap()
}

/// Returns the largest difference divided by the largest expected magnitude.
fn relative_error(actual: &[f32], expected: &[f32]) -> f32 {
    let worst = actual.iter().zip(expected).fold(0.0, |worst: f32, (a, b)| {
        let difference = (a - b).abs();
        if difference <= worst { worst } else { difference }
    });
    worst / expected.iter().fold(0.0, |largest: f32, value| largest.max(value.abs()))
}

/// Builds a `sample` command with the settings of the fixtures.
fn sample(world: &World, base: &Path, more: &[&str]) -> Command {
    let initial = world.path("initial.safetensors");
    let values = latents(&fixture("drawings"), "initial");
    save(&initial, [("latents".to_owned(), TensorData::new(values, SHAPE))]).unwrap();
    let mut command = hyperlora(["sample", "-q", "--prompt", "a photo of a smiling man", "--steps", "20"]);
    command.args(["--guidance", "3", "--height", "32", "--width", "48", "--base"]).arg(base).args(more);
    command.arg("--latents").arg(initial).arg("--save-latents").arg(world.path("final.safetensors"));
    command.arg("-o").arg(world.path("picture.png"));
    command
}

fn drawn(world: &World, base: &Path, more: &[&str]) -> Vec<f32> {
    run(sample(world, base, more)).with(0);
    latents(&world.path("final.safetensors"), "latents")
}

#[test]
fn pictures_are_those_of_diffusers() {
    let world = World::new();
    let [peft, kohya, second] = ["peft", "kohya", "second"].map(|name| fixture(name).display().to_string());
    let with_lora = ["--lora", &peft, "--lora-weight", "0.8"];
    let mut cases: Vec<(String, Vec<&str>)> = Vec::new();
    for sampler in ["euler", "dpmpp-2m-karras", "ddim"] {
        cases.push((sampler.into(), vec!["--sampler", sampler]));
        cases.push((format!("{sampler}.lora"), [&["--sampler", sampler], &with_lora[..]].concat()));
    }
    cases.push(("euler.lora".into(), vec!["--lora", &kohya, "--lora-weight", "0.8"]));
    cases.push(("two".into(), [&with_lora[..], &["--lora", &second, "--lora-weight", "-0.5"]].concat()));
    let conditioned = ["--original-size", "96x64", "--crop", "4,8", "--target-size", "64x72"];
    cases.push(("conditioned".into(), [&["--negative-prompt", "a woman with glasses"], &conditioned[..]].concat()));
    for (name, options) in cases {
        let expected = latents(&fixture("drawings"), &name);
        let error = relative_error(&drawn(&world, &quickstart_base(), &options), &expected);
        assert!(error < 1e-3, "{name}, {options:?}: relative error {error:e}");
    }
}

fn merge(base: &Path, output: &Path, more: &[&str]) -> Command {
    let mut command = hyperlora(["merge", "-q", "--base"]);
    command.arg(base).args(more).arg("-o").arg(output);
    command
}

#[test]
fn a_merged_folder_draws_what_the_lora_draws() {
    let world = World::new();
    let [kohya, second] = ["kohya", "second"].map(|name| fixture(name).display().to_string());
    let options = ["--lora", &kohya, "--lora", &second, "--lora-weight", "0.8", "--lora-weight", "-0.5"];
    let base = world.copy_base("base");
    fs::write(base.join("unet/diffusion_pytorch_model.bin"), "old weights in another format").unwrap();
    let merged = world.path("merged");
    run(merge(&base, &merged, &options)).with(0);
    let [expected, actual] = [drawn(&world, &base, &options), drawn(&world, &merged, &[])];
    assert!(actual != drawn(&world, &base, &[]));
    // The base is stored in f16, to which the merged weights are rounded once.
    let error = relative_error(&actual, &expected);
    assert!(error < 1e-3, "relative error {error:e}");

    let changed = ["unet", "text_encoder", "text_encoder_2"];
    let (before, after) = (contents(&base), contents(&merged));
    for (path, bytes) in &before {
        match changed.iter().any(|part| path.starts_with(part)) && !path.ends_with("config.json") {
            false => assert!(after.get(path) == Some(bytes), "{}", path.display()),
            true if path.extension().is_some_and(|ending| ending == "bin") => assert!(!after.contains_key(path)),
            true => assert!(after[path].len() == bytes.len() && after[path] != *bytes, "{}", path.display()),
        }
    }
    assert_eq!(after.len() + 1, before.len());
    // Tensors that no LoRA changes are the same.
    let open = |base: &Path| Weights::open(&base.join("unet"), &Device::flex()).unwrap();
    let value = |base: &Path, name| open(base).at("").tensor::<4>(name, [32, 32, 3, 3]).into_data();
    let (untouched, touched) = ("down_blocks.0.resnets.0.conv1.weight", "down_blocks.0.resnets.1.conv1.weight");
    assert_eq!(value(&base, untouched), value(&merged, untouched));
    assert_ne!(value(&base, touched), value(&merged, touched));
}

#[test]
fn a_single_file_draws_and_merges_as_its_folder_does() {
    let world = World::new();
    let (single, merged) = (world.path("base.safetensors"), world.path("merged.safetensors"));
    save(&single, stability()).unwrap();
    let folder = quickstart_base().display().to_string();
    let described = ["--base-config", folder.as_str()];
    assert_eq!(drawn(&world, &single, &described), drawn(&world, &quickstart_base(), &[]));

    let kohya = fixture("kohya").display().to_string();
    let lora = ["--lora", kohya.as_str()];
    let options = [described, lora].concat();
    run(merge(&single, &merged, &options)).with(0);
    // The file is in f32, so nothing is rounded.
    assert_eq!(drawn(&world, &merged, &described), drawn(&world, &single, &options));
    assert_ne!(drawn(&world, &merged, &described), drawn(&world, &single, &described));
    // Without a description, the file must have SDXL's own sizes.
    run(sample(&world, &single, &[])).refused(2, &["base.safetensors", "tensors do not fit"]);
}

#[test]
fn what_cannot_be_merged_is_named_and_nothing_is_written() {
    let world = World::new();
    let base = world.copy_base("base");
    let before = contents(&base);
    let kohya = fixture("kohya").display().to_string();
    let text = world.path("text.safetensors");
    fs::write(&text, "<html>").unwrap();
    let (merged, inside) = (world.path("merged"), base.join("merged"));
    let stands = world.path("stands");
    fs::create_dir(&stands).unwrap();
    fs::write(stands.join("mine"), "").unwrap();
    let good = ["--lora", kohya.as_str()];
    run(merge(&base, &base, &good)).refused(2, &["the input"]);
    run(merge(&base, &inside, &good)).refused(2, &["the input"]);
    run(merge(&base, base.parent().unwrap(), &good)).refused(2, &["the input"]);
    run(merge(&base, &stands, &good)).refused(2, &["stands", "exists already"]);
    run(merge(&base, &merged, &[])).refused(2, &["--lora", "no LoRA"]);
    run(merge(&base, &merged, &["--lora", &text.display().to_string()])).refused(2, &["text.safetensors", "web page"]);
    let two = ["--lora", kohya.as_str(), "--lora-weight", "1", "--lora-weight", "1"];
    run(merge(&base, &merged, &two)).refused(2, &["more weights than LoRAs"]);
    assert!(!merged.exists() && contents(&base) == before);
}
