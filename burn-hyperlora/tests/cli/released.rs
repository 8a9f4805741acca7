//! Hypernetwork in the released layout, without a run, and features instead of photos.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use burn::tensor::{DType, Device, FloatDType, TensorData};
use burn_hyperlora::hypernet::{HyperLora, HyperLoraConfig, ResamplerConfig, TOKENS_PER_SITE};
use hyperlora_sdxl::lora::AttentionSite;
use hyperlora_sdxl::weights::{SafetensorsFile, save};
use image::{RgbImage, imageops};

use crate::pictures::photo;
use crate::support::{STEPS, World, contents, copy_folder, hyperlora, quickstart_base, run};

/// HypernetSettings of the small world's hypernetwork.
const CLIP_DIM: usize = 64;
const ID_DIM: usize = 512;

/// Trains a world, and moves its weights out of the run folder.
fn trained() -> (World, PathBuf) {
    let world = World::new();
    run(world.train("run", &[])).with(0);
    let released = world.path("released");
    copy_folder(&world.path(&format!("run/checkpoints/step-{STEPS:08}/weights")), &released);
    (world, released)
}

/// Returns numbers without a pattern, in -1..1.
fn numbers(count: usize, seed: usize) -> Vec<f32> {
    (0..count).map(|i| ((i * 7 + seed * 13) as f32 * 0.37).sin()).collect()
}

/// Writes features of two images; the second's ID embedding is `scale` times its normalised one.
fn features(path: &Path, scale: f32, with_base: bool) {
    let mut embedding: Vec<f32> = Vec::new();
    for (seed, scale) in [(1, 1.0), (2, scale)] {
        let row = numbers(ID_DIM, seed);
        let length = row.iter().map(|x| x * x).sum::<f32>().sqrt();
        embedding.extend(row.iter().map(|x| x / length * scale));
    }
    let states = |seed| TensorData::new(numbers(2 * 5 * CLIP_DIM, seed), [2, 5, CLIP_DIM]);
    let mut tensors = vec![
        ("clip_hidden_states".to_owned(), states(3)),
        ("id_embedding".to_owned(), TensorData::new(embedding, [2, ID_DIM])),
    ];
    if with_base {
        tensors.push(("base_clip_hidden_states".to_owned(), states(4)));
    }
    save(path, tensors).unwrap();
}

fn generate(checkpoint: &Path, output: &Path, more: &[&str]) -> Command {
    let mut command = hyperlora(["generate", "--dtype", "f32", "--checkpoint"]);
    command.arg(checkpoint).arg("-o").arg(output).args(more);
    command
}

#[test]
fn a_released_folder_generates_what_its_run_does() {
    let (world, released) = trained();
    let path = |name: &str| world.path(name).display().to_string();
    let written = |checkpoint: &Path, more: &[&str]| {
        let output = world.path("lora.safetensors");
        run(generate(checkpoint, &output, more)).with(0);
        fs::read(output).unwrap()
    };
    let of_run = |more: &[&str]| written(&world.path("run"), more);
    let of_folder = |more: &[&str]| written(&released, &[more, &["--head-dim", "8"]].concat());

    let ready = path("features");
    features(Path::new(&ready), 1.0, true);
    let from_features = of_run(&["--features", &ready]);
    assert!(of_folder(&["--features", &ready]) == from_features);
    let with_base = of_run(&["--features", &ready, "--base"]);
    assert!(of_folder(&["--features", &ready, "--base"]) == with_base && with_base != from_features);

    // An embedding of another length is the same person, but the program reports it.
    let long = path("long");
    features(Path::new(&long), 2.0, true);
    let output = world.path("long.safetensors");
    let ended = run(generate(&world.path("run"), &output, &["--features", &long])).with(0);
    assert!(ended.stderr.contains("length 2") && ended.stderr.contains("id_embedding"), "{}", ended.stderr);
    assert!(fs::read(&output).unwrap() == from_features);

    // Photos: CLIP and the face models are options here, because no run names them.
    let image = photo().display().to_string();
    let models = photo().ancestors().nth(4).unwrap().join("models").display().to_string();
    let encoder = quickstart_base().join("image_encoder").display().to_string();
    let from_photo = of_run(&["--image", &image, "--base"]);
    let named = ["--image", &image, "--image-encoder", &encoder, "--faces", &models, "--base"];
    let of_photo = of_folder(&named);
    // The run has its own sizes of mask and crop; a released folder gets the defaults.
    assert!(of_photo.len() == from_photo.len() && of_photo != from_photo);
    assert!(of_run(&named) == from_photo);
}

/// Reverses the order of a hypernetwork's modules in its JSON, its bases and its query tokens.
fn turn_modules(folder: &Path) {
    let json = folder.join("hyper_lora_modules.json");
    let entries: serde_json::Map<_, _> = serde_json::from_str(&fs::read_to_string(&json).unwrap()).unwrap();
    let last = entries.len() - 1;
    let turned: serde_json::Map<_, _> = entries.into_iter().rev().collect();
    fs::write(json, serde_json::to_string(&turned).unwrap()).unwrap();
    for stem in ["hyper_lora_modules", "resampler", "base_resampler"] {
        let path = folder.join(stem).with_extension("safetensors");
        let file = SafetensorsFile::open(&path).unwrap();
        let tensors = file.entries().map(|entry| {
            let mut bytes = file.read_raw(&entry.name).unwrap();
            if entry.name == "latents" {
                let module = TOKENS_PER_SITE * entry.shape[2] * size_of::<f32>();
                bytes = bytes.rchunks(module).flatten().copied().collect();
            }
            let number =
                entry.name.split_once('.').and_then(|(first, rest)| Some((first.parse::<usize>().ok()?, rest)));
            let name = match number {
                Some((module, rest)) if stem == "hyper_lora_modules" => format!("{}.{rest}", last - module),
                _ => entry.name,
            };
            (name, TensorData::from_bytes_vec(bytes, entry.shape, DType::F32))
        });
        save(&path, tensors.collect::<Vec<_>>()).unwrap();
    }
}

/// Returns the largest difference between two pictures of equal size, in levels.
fn difference(one: &RgbImage, other: &RgbImage) -> u8 {
    one.iter().zip(other.iter()).map(|(one, other)| one.abs_diff(*other)).max().unwrap()
}

#[test]
fn a_released_folder_draws_the_grid_of_its_run() {
    let world = World::new();
    // Uses the default mask and crop, which apply without a run.
    world.write_yaml(&[("  crop: {smallest: 1.2, largest: 1.8}\n  mask: {size: 64}\n", "")]);
    run(world.train("run", &[])).with(0);
    let path = |name: &str| world.path(name).display().to_string();
    let (of_checkpoint, released, turned) = (format!("run/checkpoints/step-{STEPS:08}"), "released", "turned");
    copy_folder(&world.path(&of_checkpoint).join("weights"), &world.path(released));
    copy_folder(&world.path(released), &world.path(turned));
    turn_modules(&world.path(turned));

    let (image, output) = (photo().display().to_string(), world.path("grid.png"));
    let grid = |checkpoint: &str, more: &[&[&str]]| {
        let mut command =
            hyperlora(["sample", "-q", "--steps", "2", "--size", "32", "--image", &image, "--checkpoint"]);
        command.arg(world.path(checkpoint)).arg("-o").arg(&output).args(more.concat());
        run(command)
    };
    let drawn = |checkpoint: &str, more: &[&[&str]]| {
        grid(checkpoint, more).with(0);
        image::open(&output).unwrap().into_rgb8()
    };
    let faces = photo().ancestors().nth(4).unwrap().join("models").display().to_string();
    let encoder = quickstart_base().join("image_encoder").display().to_string();
    let base = quickstart_base().display().to_string();
    let (models, heads, base) =
        (["--faces", &faces, "--image-encoder", &encoder], ["--head-dim", "8"], ["--base", &base]);

    let of_run = drawn("run", &[]);
    assert_eq!(of_run.dimensions(), (4 * 32, 32));
    let columns: Vec<_> = (0..4).map(|x| imageops::crop_imm(&of_run, x * 32, 0, 32, 32).to_image()).collect();
    assert!((1..4).all(|i| !columns[..i].contains(&columns[i])), "every column is another picture");
    assert!(drawn(&of_checkpoint, &[]) == of_run);
    assert!(drawn(released, &[&models, &heads, &base]) == of_run);
    // Attention sums over the query tokens in another order, so rounding may differ.
    assert!(difference(&drawn(turned, &[&models, &heads, &base]), &of_run) <= 1);
    assert!(drawn(released, &[&models, &heads, &base, &["--prompt", "a hat"]]) != of_run);

    fs::remove_file(&output).unwrap();
    grid(released, &[&models, &heads]).refused(2, &["released", "which base", "--base"]);
    grid(released, &[&heads, &base]).refused(2, &["--faces", "antelopev2"]);
    grid(released, &[&models, &base]).refused(2, &["released", "head width 64", "--head-dim"]);
    grid(released, &[&models, &heads, &["--base", &path("none")]]).refused(2, &["none"]);
    grid("run", &[&["--dtype", "bf16"]]).with(2);

    // The run's own base may differ from the base to draw with.
    let settings = world.path("run/paths.yaml");
    let text = fs::read_to_string(&settings).unwrap();
    fs::write(&settings, text.replace(base[1], "/no-base")).unwrap();
    grid("run", &[&models]).refused(2, &["/no-base"]);
    assert!(!output.exists());
    assert!(drawn("run", &[&models, &base]) == of_run);
    assert!(drawn("run", &[&models, &base, &["--dtype", "bf16"]]) != of_run);
}

#[test]
fn what_a_released_folder_lacks_is_asked_for() {
    let (world, released) = trained();
    let path = |name: &str| world.path(name).display().to_string();
    let ready = path("features");
    features(Path::new(&ready), 1.0, false);
    let save_one = |name: &str, tensors: &[(&str, TensorData)]| {
        save(&world.path(name), tensors.iter().map(|(key, data)| ((*key).to_owned(), data.clone()))).unwrap();
        path(name)
    };
    let states = TensorData::new(numbers(5 * CLIP_DIM, 1), [1, 5, CLIP_DIM]);
    let zeros = TensorData::new(vec![0.0f32; ID_DIM], [1, ID_DIM]);
    let narrow = save_one("narrow", &[("clip_hidden_states", TensorData::new(numbers(50, 1), [1, 5, 10]))]);
    let nobody = save_one("nobody", &[("clip_hidden_states", states.clone()), ("id_embedding", zeros)]);
    let clip_only = save_one("clip-only", &[("clip_hidden_states", states.clone())]);
    let nan = save_one("nan", &[("clip_hidden_states", TensorData::new(vec![f32::NAN; CLIP_DIM], [1, 1, CLIP_DIM]))]);
    let stray = save_one("stray", &[("clip_hidden_states", states), ("hidden", TensorData::from([1.0f32]))]);
    let image = photo().display().to_string();
    let empty = path("run");

    let heads = ["--head-dim", "8"];
    let cases: [(&[&str], &[&str]); 11] = [
        (&["--features", &narrow], &["narrow", "clip_hidden_states: shape [1, 5, 10], expected [1, 5, 64]"]),
        (&["--features", &nobody], &["nobody: id_embedding", "row 0 has the length 0"]),
        (&["--features", &clip_only], &["released", "id_embedding"]),
        (&["--features", &nan], &["nan", "clip_hidden_states: holds values that are not finite"]),
        (&["--features", &stray], &["stray", "hidden: not a part"]),
        (&["--features", &ready, "--base"], &["Base-LoRA", "base_clip_hidden_states"]),
        (&["--features", &image], &["1.pgm"]),
        (&["--features", &path("none")], &["none", "cannot be read"]),
        (&["--image", &image], &["--faces", "antelopev2"]),
        (&["--image", &image, "--faces", "models"], &["--image-encoder", "ViT-L/14"]),
        (&["--image", &image, "--faces", "models", "--image-encoder", &empty], &["config.json"]),
    ];
    let output = world.path("lora.safetensors");
    for (arguments, parts) in cases {
        run(generate(&released, &output, &[arguments, &heads].concat())).refused(2, parts);
        assert!(!output.exists());
    }
    run(generate(&released, &output, &["--features", &ready])).refused(2, &["released", "head width 64", "--head-dim"]);
    let of_run = run(generate(&world.path("run"), &output, &["--features", &ready, "--head-dim", "8"]));
    of_run.refused(2, &["--head-dim", "knows its own"]);
    run(generate(&world.path("shards"), &output, &["--features", &ready]))
        .refused(2, &["shards", "hyper_lora_modules"]);
    fs::remove_file(released.join("id_projector.safetensors")).unwrap();
    run(generate(&released, &output, &["--features", &ready])).refused(2, &["id_projector.safetensors"]);
}

#[test]
fn training_begins_from_a_run_a_checkpoint_or_a_released_folder() {
    let (world, released) = trained();
    let checkpoint = world.path(&format!("run/checkpoints/step-{STEPS:08}"));
    let begin = |name: &str, from: &Path| {
        let init_from = format!("recompute: false\n  init_from: {}", from.display());
        world.write_yaml(&[("recompute: false", &init_from)]);
        run(world.train(name, &["--max-steps", "0"])).with(0);
        fs::read(world.path(name).join("checkpoints/step-00000000/weights/hyper_lora_modules.safetensors")).unwrap()
    };
    let trained = fs::read(released.join("hyper_lora_modules.safetensors")).unwrap();
    for (name, from) in [("a", world.path("run")), ("b", checkpoint), ("c", released)] {
        assert!(begin(name, &from) == trained, "{name}");
    }
}

#[test]
fn a_hypernetwork_is_exported_for_the_released_nodes() {
    let world = World::new();
    let site = |attention: u8, cross_attention_dim| AttentionSite {
        path: format!("mid_block.attentions.0.transformer_blocks.0.attn{attention}"),
        hidden_size: 8,
        cross_attention_dim,
    };
    // The smallest size that the nodes load.
    let resampler = ResamplerConfig { dim: 64, depth: 4, heads: 4, head_dim: 32, ff_mult: 2 };
    let config = HyperLoraConfig { id_rank: 2, base_rank: 1, basis: 32, id_tokens: 4, resampler, ..Default::default() };
    let write = |name: &str, config: &HyperLoraConfig| {
        let model = HyperLora::new(config, &[site(1, None), site(2, Some(6))], 1, &Device::flex());
        model.save(&world.path(name), FloatDType::F32).unwrap();
    };
    write("fit", &config);
    write("odd", &HyperLoraConfig { id_rank: 3, ..config.clone() });
    let export = |from: &str, more: &[&str]| {
        let mut command = hyperlora(["export", "--format", "comfyui", "--head-dim", "32", "--checkpoint"]);
        command.arg(world.path(from)).arg("-o").arg(world.path("nodes")).args(more);
        run(command)
    };
    export("odd", &[]).refused(2, &["odd: id_rank: is 3, the released nodes load 2 to 32 in steps of 2"]);
    assert!(!world.path("nodes").exists());

    let ended = export("fit", &["--dtype", "f32"]).with(0);
    assert!(ended.stderr.contains("dim 64, dim_head 32, heads 4, depth 4, ff_mult 2"), "{}", ended.stderr);
    let files = |folder: &str| contents(&world.path(folder));
    assert_eq!(files("nodes"), files("fit"), "f32 as it was: every byte");
    export("fit", &["--no-base"]).with(0);
    assert!(!world.path("nodes/base_resampler.safetensors").exists());
    let halved = HyperLoraConfig::of_folder(&world.path("nodes"), 32).unwrap();
    assert_eq!(halved, HyperLoraConfig { base_rank: 0, ..config });

    for (arguments, part) in [
        (&["export", "--format", "kohya", "--checkpoint", "a", "-o", "b"][..], "give --lora"),
        (&["export", "--format", "comfyui", "--lora", "a", "-o", "b"], "give --checkpoint"),
    ] {
        run(hyperlora(arguments)).refused(2, &["--format", part]);
    }
}

#[test]
fn loras_are_converted_and_combined() {
    let (world, _) = trained();
    let path = |name: &str| world.path(name).display().to_string();
    let read = |name: &str| fs::read(world.path(name)).unwrap();
    features(&world.path("features"), 1.0, true);
    let make = |output: &str, more: &[&str]| {
        let ready = path("features");
        run(generate(&world.path("run"), &world.path(output), &[&["--features", &ready], more].concat())).with(0);
    };
    make("kohya", &[]);
    make("diffusers", &["--format", "diffusers"]);
    make("both", &["--base", "--id-weight", "1", "--base-weight", "0.25"]);
    make("base", &["--base", "--id-weight", "0", "--base-weight", "1"]);
    let command = |arguments: &[&str]| run(hyperlora(arguments)).with(0);
    command(&["export", "--format", "diffusers", "--lora", &path("kohya"), "-o", &path("converted")]);
    assert!(read("converted") == read("diffusers"));
    command(&["export", "--format", "kohya", "--lora", &path("diffusers"), "-o", &path("back")]);
    assert!(read("back") == read("kohya"));

    let (kohya, base) = (path("kohya"), path("base"));
    let fold = ["fold", "--id", &kohya, "--base", &base, "--base-weight", "0.25", "-o"];
    command(&[&fold[..], &[&path("folded")]].concat());
    assert!(read("folded").len() > read("both").len(), "the ID-LoRA of weight 0 in `base` has ranks, too");
    let ended = command(&[&fold[..], &[&path("cut"), "--rank", "2"]].concat());
    assert!(ended.stdout.contains("relative error of rank 2: mean"), "{}", ended.stdout);
    assert!(read("cut").len() < read("folded").len());
    let slider = ["slider", "--positive", &kohya, "--negative", &base, "-o"];
    command(&[&slider[..], &[&path("slider")]].concat());
    assert!(read("slider").len() > read("kohya").len());
    let refused = run(hyperlora(["slider", "--positive", &kohya, "--negative", &path("features"), "-o", &path("no")]));
    refused.refused(2, &["features"]);
    assert!(!world.path("no").exists());
}
