//! Invalid user input: each case gets one message, and nothing is lost.

use std::fs;
use std::path::Path;

use crate::support::{Damage, World, contents, flip_a_bit, hyperlora, quickstart_base, run, truncate};

#[test]
fn a_wrong_yaml_is_named_by_file_line_and_key() {
    let world = World::new();
    let no_such_url = if cfg!(feature = "cloud") { "give s3://" } else { "--features burn-hyperlora/cloud" };
    let cases = [
        ("seed: 5", "sed: 5", &["train.yaml:3:1", "`sed`", "did you mean `seed`?"][..]),
        ("micro_batch: 1", "mikro_batch: 1", &["train.yaml:19:3", "did you mean `micro_batch`?"]),
        ("- base: {steps: 2, optim: {", "- base: {steps: 2, optim: {momentum: 1, ", &["train.yaml:25", "`momentum`"]),
        ("seed: 5", "seed: five", &["train.yaml:3:7", "u64"]),
        ("micro_batch: 1", "micro_batch: [1]", &["train.yaml:19:16"]),
        ("learning_rate: 0.01", "learning_rate: .nan", &["train.yaml:25", "finite"]),
        ("- base:", "- bass:", &["train.yaml:25", "did you mean `base`?"]),
        ("micro_batch: 1", "micro_batch: 0", &["train.yaml: train.global_batch"]),
        ("micro_batch: 1", "micro_batch: 3", &["train.yaml: train.global_batch", "multiple"]),
        ("image_size: 32", "image_size: 40", &["train.yaml: data.image_size", "32 or 48"]),
        ("image_size: 32", "image_size: 1000000000000", &["train.yaml: data.image_size"]),
        ("clip_dim: 64", "clip_dim: 65", &["train.yaml: hyper_lora.clip_dim", "give 64"]),
        ("id_rank: 2", "id_rank: 0", &["train.yaml: hyper_lora.id_rank"]),
        ("basis: 8", "basis: 8000000000000", &["train.yaml: hyper_lora.basis", "1 to 65536"]),
        ("global_batch: 2", "global_batch: 2000000000000", &["train.yaml: train.global_batch", "at most"]),
        ("steps: 2", "steps: 9000000000000000000", &["train.yaml: train.stages[0].base.steps", "at most"]),
        ("name: small", "name: ../small", &["train.yaml: name"]),
        ("shards: shards", "shards: ${NOWHERE_SET}/shards", &["NOWHERE_SET", "is not set"]),
        ("shards: shards", "shards: nowhere", &["nowhere", "holds no manifest.json"]),
        ("shards: shards", "shards: ftp://host/faces", &["ftp://host/faces", no_such_url]),
        ("shards: shards", "shards: shards\n  remote: {cache_gib: 0}", &["train.yaml: data.remote.cache_gib", "1 to"]),
        ("shards: shards", "shards: shards\n  remote: {cach: there}", &["train.yaml:8:12", "did you mean `cache`?"]),
        ("shards: shards", "shards: shards\n  split: validation", &["shards", "`validation`", "held_out", "train"]),
        ("train:\n", "train: [\n", &["train.yaml:"]),
    ];
    for (from, to, parts) in cases {
        world.write_yaml(&[(from, to)]);
        run(world.train("run", &["--max-steps", "0"])).refused(2, parts);
        let checkpoints = world.path("run/checkpoints");
        assert!(!checkpoints.exists() || contents(&checkpoints).is_empty(), "{to}: a refused run leaves no checkpoint");
    }
    fs::write(world.path("train.yaml"), [0xff, 0xfe, 0x00]).unwrap();
    run(world.train("run", &[])).refused(2, &["train.yaml", "UTF-8"]);
    fs::remove_file(world.path("train.yaml")).unwrap();
    run(world.train("run", &[])).refused(2, &["train.yaml", "cannot be read"]);
}

#[test]
fn another_embedder_than_the_shards_were_made_with_is_refused() {
    let world = World::new();
    run(world.train("run", &["--max-steps", "1"])).with(0);
    let manifest = world.path("shards/manifest.json");
    let made_with =
        r#""models": {"embedder": "glintr100.onnx sha256:4ab1", "detector": "scrfd_10g_bnkps.onnx sha256:5838"}"#;
    let text = fs::read_to_string(&manifest).unwrap();
    assert!(text.contains(r#""models": {}"#));
    fs::write(&manifest, text.replace(r#""models": {}"#, made_with)).unwrap();
    let refusal = ["shards: ", "made with glintr100.onnx sha256:4ab1", "`faces` finds fr_feature.onnx", "remedy: "];
    run(world.train("other", &["--max-steps", "0"])).refused(2, &refusal);
    let mut generate = hyperlora(["generate", "--image", "a.png", "--checkpoint"]);
    generate.arg(world.path("run")).arg("-o").arg(world.path("a.safetensors"));
    run(generate).refused(2, &refusal);

    // Without face models there is nothing to compare with, and training does not need them.
    world
        .write_yaml(&[("faces: {models: \"${HYPERLORA_CACHE:-~/.cache/hyperlora}/models\"}", "faces: {models: none}")]);
    run(world.train("without", &["--max-steps", "1"])).with(0);
}

#[test]
fn a_missing_or_damaged_base_model_is_named_by_its_file() {
    const UNET: &str = "unet/diffusion_pytorch_model.safetensors";
    let world = World::new();
    let cases: [(&str, Damage, &[&str]); 12] = [
        ("no folder", |base| fs::remove_dir_all(base).unwrap(), &["base: is not there", "base.path"]),
        (
            "no UNet weights",
            |base| fs::remove_file(base.join(UNET)).unwrap(),
            &["unet", "holds no diffusion_pytorch_model"],
        ),
        ("no VAE", |base| fs::remove_dir_all(base.join("vae")).unwrap(), &["vae/config.json", "cannot be read"]),
        (
            "no vocabulary",
            |base| fs::remove_file(base.join("tokenizer/vocab.json")).unwrap(),
            &["base/tokenizer", "vocab.json"],
        ),
        ("cut off", |base| truncate(&base.join(UNET)), &[UNET, "bytes of tensors"]),
        ("empty", |base| fs::write(base.join(UNET), "").unwrap(), &[UNET, "ends after 0 bytes"]),
        ("a pickle", |base| fs::write(base.join(UNET), b"PK\x03\x04....").unwrap(), &[UNET, "pickle"]),
        ("a broken header", |base| overwrite(&base.join(UNET), 40, b"}}}}"), &[UNET, "header"]),
        ("not a number", |base| not_a_number(&base.join(UNET)), &[UNET, "finite"]),
        (
            "other widths",
            |base| {
                edit(
                    &base.join("unet/config.json"),
                    "projection_class_embeddings_input_dim\": 160",
                    "projection_class_embeddings_input_dim\": 164",
                );
            },
            &["unet"],
        ),
        ("broken JSON", |base| truncate(&base.join("text_encoder/config.json")), &["text_encoder/config.json"]),
        (
            "another architecture",
            |base| edit(&base.join("unet/config.json"), "\"UNetMidBlock2DCrossAttn\"", "\"UNetMidBlock2D\""),
            &["unet/config.json"],
        ),
    ];
    for (what, damage, parts) in cases {
        let base = world.copy_base("base");
        damage(&base);
        world.write_yaml(&[(&format!("path: {}", quickstart_base().display()), "path: base")]);
        let before = base.exists().then(|| contents(&base));
        eprintln!("{what}");
        run(world.train("run", &["--max-steps", "0"])).refused(2, parts);
        assert_eq!(base.exists().then(|| contents(&base)), before);
        if base.exists() {
            fs::remove_dir_all(&base).unwrap();
        }
    }
}

fn edit(path: &Path, from: &str, to: &str) {
    let text = fs::read_to_string(path).unwrap();
    assert!(text.contains(from), "nothing to replace: {from}");
    fs::write(path, text.replacen(from, to, 1)).unwrap();
}

fn overwrite(path: &Path, at: usize, with: &[u8]) {
    let mut bytes = fs::read(path).unwrap();
    bytes[at..at + with.len()].copy_from_slice(with);
    fs::write(path, bytes).unwrap();
}

/// Sets the last number of an f16 file to NaN.
fn not_a_number(path: &Path) {
    let end = fs::read(path).unwrap().len();
    overwrite(path, end - 2, &[0xff, 0x7f]);
}

#[test]
fn damaged_shards_are_named_by_their_file() {
    let world = World::new();
    let whole = contents(&world.path("shards"));
    let cases: [(&str, Damage, &[&str]); 5] = [
        ("cut off", |shards| truncate(&shards.join("shard-00000.parquet")), &["shard-00000.parquet", "bytes"]),
        ("a flipped bit", |shards| flip_a_bit(&shards.join("index.parquet")), &["index.parquet", "SHA-256"]),
        ("missing", |shards| fs::remove_file(shards.join("shard-00000.parquet")).unwrap(), &["shard-00000.parquet"]),
        (
            "no manifest",
            |shards| fs::remove_file(shards.join("manifest.json")).unwrap(),
            &["shards", "data-prep build"],
        ),
        ("a damaged manifest", |shards| truncate(&shards.join("manifest.json")), &["manifest.json", "is damaged"]),
    ];
    for (what, damage, parts) in cases {
        let shards = world.path("shards");
        fs::remove_dir_all(&shards).unwrap();
        fs::create_dir(&shards).unwrap();
        whole.iter().for_each(|(name, bytes)| fs::write(shards.join(name), bytes).unwrap());
        damage(&shards);
        eprintln!("{what}");
        run(world.train(what, &["--max-steps", "1"])).refused(2, parts);
    }
}

#[test]
fn a_run_folder_that_cannot_be_written_is_named() {
    let world = World::new();
    fs::write(world.path("file"), "mine").unwrap();
    run(world.train("file/run", &["--max-steps", "0"])).refused(2, &["file/run", "may write to"]);
    run(world.train("file", &["--max-steps", "0"])).refused(2, &["file"]);
    assert_eq!(fs::read_to_string(world.path("file")).unwrap(), "mine");
}

#[test]
fn commands_that_read_a_run_name_what_is_no_run() {
    let world = World::new();
    let nowhere = world.path("nowhere").display().to_string();
    run(hyperlora(["eval", "identity-gap", &nowhere])).refused(2, &[&nowhere, "not a run folder"]);
    let output = world.path("a.safetensors").display().to_string();
    run(hyperlora(["generate", "--checkpoint", &nowhere, "--image", &nowhere, "-o", &output]))
        .refused(2, &[&nowhere, "not a checkpoint folder"]);
    assert!(!Path::new(&output).exists());
}
