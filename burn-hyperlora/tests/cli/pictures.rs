//! `sample` and `generate`: equal input gives equal bytes, and unusable input is named.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use burn::tensor::{Device, Distribution, FloatDType, Tensor};
use burn_hyperlora::export::save_lora;
use hyperlora_sdxl::lora::file::Layout;
use hyperlora_sdxl::lora::{AttentionLora, AttentionSite, LoraPair, LoraWeights};
use hyperlora_sdxl::models::unet::UNet2DConditionModel;
use image::{ImageFormat, RgbImage};

use crate::support::{World, hyperlora, quickstart_base, run};

/// Writes a random LoRA for attention modules whose text input is `more` wider than the quickstart's.
fn write_lora(path: &Path, more: usize) {
    let device = Device::flex();
    let mut sites =
        UNet2DConditionModel::load(&quickstart_base().join("unet"), &device).unwrap().attention_sites().to_vec();
    for site in &mut sites {
        site.cross_attention_dim = site.cross_attention_dim.map(|width| width + more);
    }
    let pair = |input: usize, output: usize| LoraPair {
        down: Tensor::random([1, input, 2], Distribution::Normal(0.0, 0.3), &device),
        up: Tensor::random([1, 2, output], Distribution::Normal(0.0, 0.3), &device),
    };
    let module = |site: &AttentionSite| {
        let (width, text) = (site.hidden_size, site.cross_attention_dim.unwrap_or(site.hidden_size));
        AttentionLora { q: pair(width, width), k: pair(text, width), v: pair(text, width), out: pair(width, width) }
    };
    let lora = LoraWeights { modules: sites.iter().map(module).collect() };
    save_lora(path, &sites, &lora, FloatDType::F16, Layout::Kohya, &BTreeMap::new()).unwrap();
}

fn sample(output: &Path, more: &[&str]) -> Command {
    let mut command = hyperlora(["sample", "-q", "--base"]);
    command.arg(quickstart_base()).arg("-o").arg(output).args(more);
    for (option, value) in [("--prompt", "a face"), ("--steps", "2"), ("--size", "32")] {
        if !more.contains(&option) {
            command.args([option, value]);
        }
    }
    command
}

#[test]
fn words_that_no_encoder_reads_are_told() {
    let world = World::new();
    let long = "a face ".repeat(40);
    let mut command = hyperlora(["sample", "--steps", "1", "--size", "32", "--base"]);
    command
        .arg(quickstart_base())
        .args(["--negative-prompt", "a hat", "--prompt", &long, "-o"])
        .arg(world.path("a.png"));
    let said = run(command).with(0).stderr;
    assert!(said.contains("--prompt: its last 5 tokens are left out: the text encoders take 75"), "{said}");
    assert!(!said.contains("--negative-prompt"), "{said}");
}

#[test]
fn equal_input_draws_equal_pictures() {
    let world = World::new();
    let lora = world.path("lora.safetensors");
    write_lora(&lora, 0);
    let lora = lora.display().to_string();
    let latents = world.path("latents.safetensors").display().to_string();
    let mut drawings = 0;
    let mut draw = |more: &[&str]| {
        drawings += 1;
        let output = world.path(&format!("{drawings}.png"));
        run(sample(&output, more)).with(0);
        fs::read(output).unwrap()
    };
    let plain = draw(&[]);
    assert!(draw(&[]) == plain);
    assert!(draw(&["--seed", "1"]) != plain);
    assert!(draw(&["--prompt", "a hat"]) != plain);
    assert!(draw(&["--negative-prompt", "a hat"]) != plain);
    assert!(draw(&["--sampler", "euler"]) == plain, "the base's own");
    assert!(draw(&["--sampler", "dpmpp-2m-karras"]) != plain);
    assert!(draw(&["--original-size", "32x32", "--crop", "0,0", "--target-size", "32x32"]) == plain);
    assert!(draw(&["--original-size", "16x32"]) != plain);
    assert!(draw(&["--crop", "0,8"]) != plain);
    assert!(draw(&["--target-size", "32x16"]) != plain);
    let wide = image::load_from_memory(&draw(&["--width", "48"])).unwrap();
    assert_eq!((wide.width(), wide.height()), (48, 32));
    let with_lora = draw(&["--lora", &lora]);
    assert!(with_lora != plain);
    assert!(draw(&["--lora", &lora, "--lora-weight", "1"]) == with_lora);
    assert!(draw(&["--lora", &lora, "--lora-weight", "0"]) == plain);
    assert!(draw(&["--lora", &lora, "--lora-weight", "-1"]) != with_lora);

    // Saved latents are the same every time, and a drawing can start from them.
    assert!(draw(&["--save-latents", &latents]) == plain);
    let saved = fs::read(&latents).unwrap();
    draw(&["--save-latents", &latents]);
    assert!(fs::read(&latents).unwrap() == saved);
    let onwards = draw(&["--latents", &latents]);
    assert!(onwards != plain);
    assert!(draw(&["--latents", &latents, "--seed", "1"]) == onwards);
    let picture = image::load_from_memory(&plain).unwrap();
    assert_eq!((picture.width(), picture.height()), (32, 32));
}

#[test]
fn a_picture_is_what_its_name_says() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    for (name, format) in [
        ("a.png", ImageFormat::Png),
        ("a", ImageFormat::Png),
        ("a.JPG", ImageFormat::Jpeg),
        ("a.jpeg", ImageFormat::Jpeg),
        ("a.webp", ImageFormat::WebP),
    ] {
        run(sample(&path(name), &[])).with(0);
        assert_eq!(image::guess_format(&fs::read(path(name)).unwrap()).unwrap(), format, "{name}");
    }
    let pixels = |name: &str| image::load_from_memory(&fs::read(path(name)).unwrap()).unwrap().into_rgb8();
    assert!(pixels("a.webp") == pixels("a.png"));
    // Refused before any work: the base does not exist.
    let refused = |command: &str, output: &str, more: &[&str], parts: &[&str]| {
        let mut command = hyperlora([command, "-q"]);
        command.args(more).arg("-o").arg(path(output));
        run(command).refused(2, parts);
        assert!(!path(output).exists());
    };
    let sample = ["--base", "no-base", "--prompt", "a"];
    refused("sample", "a.tiff", &sample, &["a.tiff", ".tiff", ".png, .jpg, .jpeg, .webp"]);
    let latents = path("latents.png").display().to_string();
    refused(
        "sample",
        "b.png",
        &[&sample[..], &["--save-latents", &latents]].concat(),
        &["latents.png", ".safetensors"],
    );
    let two = ["--positive", "no-a", "--negative", "no-b"];
    refused("slider", "a.ckpt", &two, &["a.ckpt", "end the name in .safetensors"]);
    let two = ["--id", "no-a", "--base", "no-b", "--base-weight", "1"];
    refused("fold", "a.pt", &two, &["a.pt", "end the name in .safetensors"]);
    refused("export", "a.bin", &["--format", "kohya", "--lora", "no-a"], &["a.bin", "end the name in .safetensors"]);
    let person = ["--checkpoint", "no-a", "--features", "no-b"];
    refused("generate", "a.pth", &person, &["a.pth", "end the name in .safetensors"]);
}

#[test]
fn what_cannot_be_drawn_with_is_named() {
    let world = World::new();
    let path = |name: &str| world.path(name).display().to_string();
    let (other, text, latents, cut) = (path("other.safetensors"), path("text.txt"), path("latents"), path("cut"));
    write_lora(Path::new(&other), 8);
    fs::write(&text, "not a LoRA").unwrap();
    run(sample(Path::new(&path("a.png")), &["--save-latents", &latents])).with(0);
    let bytes = fs::read(&other).unwrap();
    fs::write(&cut, &bytes[..bytes.len() - 100]).unwrap();

    let output = world.path("b.png");
    fs::write(&output, "what stood there").unwrap();
    let cases: [(&[&str], &[&str]); 10] = [
        (&["--lora", &other], &["other.safetensors", "attn2_to_k.lora_down", "made for this base"]),
        (&["--lora", &latents], &["latents", "no LoRA"]),
        (&["--lora", &cut], &["cut", "whole safetensors"]),
        (&["--lora", &text], &["text.txt"]),
        (&["--lora", &path("none")], &["none", "cannot be read"]),
        (&["--latents", &other], &["other.safetensors", "latents: missing"]),
        (&["--latents", &latents, "--size", "64"], &["latents", "[1, 4, 16, 16]", "height and width"]),
        (&["--size", "30"], &["30", "multiple of 4"]),
        (&["--steps", "0"], &["steps", "0"]),
        (&["--steps", "1001", "--sampler", "ddim"], &["steps", "1001"]),
    ];
    for (arguments, parts) in cases {
        run(sample(&output, arguments)).refused(2, parts);
        assert_eq!(fs::read(&output).unwrap(), b"what stood there");
    }
    for arguments in [["--sampler", "heun"], ["--crop", "8"], ["--original-size", "8,8"], ["--target-size", "-1x8"]] {
        run(sample(&output, &arguments)).with(2);
    }
    let folder = world.path("folder");
    fs::create_dir(&folder).unwrap();
    run(sample(&folder, &[])).refused(2, &["folder", "not a regular file"]);
    run(sample(&world.path("nowhere/a.png"), &[])).refused(2, &["nowhere/a.png", "may write to"]);
}

/// Returns a photo of the asset cache.
pub(crate) fn photo() -> PathBuf {
    let photo = hyperlora_testing::asset("photos/orl/s36/1.pgm");
    assert!(photo.exists(), "{} is missing: run launch/assets.sh", photo.display());
    photo
}

#[test]
fn a_lora_is_made_of_photos_of_one_face() {
    let world = World::new();
    run(world.train("run", &["--max-steps", "3"])).with(0);
    let output = world.path("lora.safetensors");
    let generate = |images: &[&Path], more: &[&str]| {
        let mut command = hyperlora(["generate", "-q", "--checkpoint"]);
        command.arg(world.path("run")).arg("-o").arg(&output).args(more);
        images.iter().for_each(|image| {
            command.arg("--image").arg(image);
        });
        command
    };
    let photo = photo();
    let written = |more: &[&str]| {
        run(generate(&[&photo, &photo.with_file_name("2.pgm")], more)).with(0);
        fs::read(&output).unwrap()
    };
    let with_base = written(&["--base"]);
    assert!(written(&["--base"]) == with_base);
    let id_only = written(&[]);
    assert!(id_only != with_base);

    // The same photo rotated by 90 degrees gives the same LoRA.
    let portrait = photo.with_file_name("../../portraits/astronaut.png");
    let turned = world.path("turned.png");
    image::open(&portrait).unwrap().rotate90().save(&turned).unwrap();
    let [upright, turned] = [&portrait, &turned].map(|image| {
        run(generate(&[image], &[])).with(0);
        fs::read(&output).unwrap()
    });
    assert!(turned == upright && upright != id_only);
    assert!(written(&[]) == id_only);

    let pipe = world.path("pipe.png");
    assert!(Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    run(generate(&[&photo, &pipe], &[])).refused(2, &["pipe.png", "not a regular file"]);

    let (text, blank) = (world.path("text.png"), world.path("blank.png"));
    fs::write(&text, "This is a text.").unwrap();
    RgbImage::new(96, 96).save(&blank).unwrap();
    run(generate(&[&photo, &text], &[])).refused(2, &["text.png", "cannot be decoded as a photo"]);
    run(generate(&[&blank], &[])).refused(2, &["blank.png", "shows 0 faces"]);
    run(generate(&[&world.path("none.png")], &[])).refused(2, &["none.png", "cannot be read"]);
    assert!(fs::read(&output).unwrap() == id_only);

    run(sample(&world.path("a.png"), &["--lora", &output.display().to_string()])).with(0);

    let settings = world.path("run/paths.yaml");
    let text = fs::read_to_string(&settings).unwrap();
    fs::write(&settings, text.replace("/models", "/no-models")).unwrap();
    run(generate(&[&photo], &[])).refused(2, &["/no-models", "launch/assets.sh"]);
}
