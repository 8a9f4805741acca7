//! Shared run folders: the traces that they carry of their machine, and the effects that they may have on the next one.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::pictures::photo;
use crate::support::{World, contents, hyperlora, quickstart_base, run};

/// Lists paths and names of this machine that must stay private.
fn own_places(world: &World) -> Vec<String> {
    let host = fs::read_to_string("/proc/sys/kernel/hostname").unwrap().trim().to_owned();
    let places = [world.path("").display().to_string(), quickstart_base().display().to_string(), host];
    places.into_iter().filter(|place| place.len() > 3).collect()
}

/// Returns the first of `places` that occurs in `text`.
fn told<'a>(text: &[u8], places: &'a [String]) -> Option<&'a String> {
    places.iter().find(|place| text.windows(place.len()).any(|window| window == place.as_bytes()))
}

fn generate(world: &World, run: &str, more: &[&str]) -> Command {
    let mut command = hyperlora(["generate", "--checkpoint"]);
    command.arg(world.path(run)).arg("--image").arg(photo()).arg("-o").arg(world.path("a.safetensors")).args(more);
    command
}

fn models() -> PathBuf {
    photo().ancestors().nth(4).unwrap().join("models")
}

#[test]
fn what_is_shared_of_a_run_tells_nothing_of_the_machine() {
    let world = World::new();
    let shards = world.path("shards").display().to_string();
    world.write_yaml(&[("shards: shards", &format!("shards: {shards}"))]);
    run(world.train("run", &["--max-steps", "3"])).with(0);
    let places = own_places(&world);
    for (name, bytes) in contents(&world.path("run")) {
        if name == Path::new("paths.yaml") {
            continue;
        }
        assert_eq!(told(&bytes, &places), None, "{}", name.display());
        assert_eq!(told(name.as_os_str().as_encoded_bytes(), &places), None, "{}", name.display());
    }
    run(generate(&world, "run", &[])).with(0);
    assert_eq!(told(&fs::read(world.path("a.safetensors")).unwrap(), &places), None);

    // On its own machine the run resumes and is read by other commands, with the local paths of paths.yaml.
    run(world.train("run", &["--max-steps", "4"])).with(0);
    let own = fs::read_to_string(world.path("run/paths.yaml")).unwrap();
    assert!(own.contains(&format!("data.shards: {shards}\n")), "{own}");
    run(hyperlora([Path::new("plan"), &world.path("run/config.yaml"), Path::new("--gpu"), Path::new("l40s")])).with(0);

    // On another machine the local paths are unknown.
    fs::remove_file(world.path("run/paths.yaml")).unwrap();
    run(generate(&world, "run", &[])).refused(2, &["config.yaml: names `", "paths.yaml", "--faces"]);
    let encoder = quickstart_base().join("image_encoder").display().to_string();
    let preprocessing = quickstart_base().join("feature_extractor").display().to_string();
    let faces = models().display().to_string();
    let named = ["--image-encoder", &encoder, "--feature-extractor", &preprocessing, "--faces", &faces];
    run(generate(&world, "run", &named)).with(0);
    let places = format!("base.path: {}\nfaces.models: {faces}\n", quickstart_base().display());
    fs::write(world.path("run/paths.yaml"), places).unwrap();
    run(generate(&world, "run", &[])).with(0);

    // Format of older versions: one file, with absolute paths and a key for the library.
    let config = fs::read_to_string(world.path("run/config.yaml")).unwrap();
    let old = config
        .replace("  path: base\n", &format!("  path: {}\n", quickstart_base().display()))
        .replace("  models: ", &format!("  runtime: null\n  models: {faces} # "))
        .replace("  shards: shards\n", &format!("  shards: {shards}\n"));
    assert!(old.contains("runtime") && old.contains(&shards), "{old}");
    fs::write(world.path("run/config.yaml"), old).unwrap();
    fs::remove_file(world.path("run/paths.yaml")).unwrap();
    run(generate(&world, "run", &[])).with(0);
}

#[test]
fn a_strangers_run_loads_no_library_and_reads_no_variable() {
    let world = World::new();
    run(world.train("run", &["--max-steps", "3"])).with(0);
    let library = world.path("evil.so");
    fs::write(&library, "no library: loading it fails").unwrap();
    let config = world.path("run/config.yaml");
    let text = fs::read_to_string(&config).unwrap();
    let with_library = text.replace("faces:\n", &format!("faces:\n  runtime: {}\n", library.display()));
    assert!(with_library.contains("runtime"), "{text}");
    fs::write(&config, with_library).unwrap();
    let ended = run(generate(&world, "run", &[])).with(0);
    assert!(ended.stderr.contains("evil.so` of the face models is passed over"), "{}", ended.stderr);

    // A library in the current folder is not loaded either, by any name.
    fs::copy(&library, world.path("libonnxruntime.so")).unwrap();
    for name in ["libonnxruntime.so", "./libonnxruntime.so"] {
        let mut command = generate(&world, "run", &[]);
        command.current_dir(world.path("")).env("ORT_DYLIB_PATH", name);
        run(command).refused(2, &["ORT_DYLIB_PATH", "not an absolute path"]);
    }

    let places = world.path("run/paths.yaml");
    let own = fs::read_to_string(&places).unwrap();
    for (key, place) in [
        ("faces.models", "/tmp/${HYPERLORA_TEST_SECRET_KEY}"),
        ("base.image_encoder", "https://host/${HYPERLORA_TEST_SECRET_KEY}"),
        ("base.image_encoder", "~/clip"),
        ("base.image_encoder", "https://me:hush-hush@host/clip"),
    ] {
        let kept: Vec<&str> = own.lines().filter(|line| !line.starts_with(key)).collect();
        fs::write(&places, format!("{}\n{key}: \"{place}\"\n", kept.join("\n"))).unwrap();
        let mut command = generate(&world, "run", &[]);
        command.env("HYPERLORA_TEST_SECRET_KEY", "hush-hush");
        let ended = run(command).with(2);
        assert!(!ended.stderr.contains("hush-hush") && ended.stderr.contains("remedy: "), "{}", ended.stderr);
    }
    fs::write(&places, "base.pfad: /models\n").unwrap();
    run(generate(&world, "run", &[])).refused(2, &["paths.yaml: unknown key `base.pfad`", "base.path"]);
}

#[test]
fn secrets_of_a_url_reach_no_message_and_no_file() {
    let world = World::new();
    for url in [
        "https://me:hush-hush@127.0.0.1:9/faces",
        "https://127.0.0.1:9/faces?X-Amz-Signature=hush-hush",
        "https://127.0.0.1:9/${HYPERLORA_TEST_SECRET_KEY}",
    ] {
        world.write_yaml(&[("shards: shards", &format!("shards: \"{url}\""))]);
        let mut command = world.train("run", &["-vv"]);
        command.env("HYPERLORA_TEST_SECRET_KEY", "hush-hush");
        let ended = run(command).with(2);
        assert!(!ended.stderr.contains("hush-hush") && ended.stderr.contains("take it out"), "{}", ended.stderr);
        let secret = ["hush-hush".to_owned()];
        for (name, bytes) in contents(&world.path("")) {
            let is_own = name == Path::new("train.yaml");
            assert!(is_own || told(&bytes, &secret).is_none(), "{}", name.display());
        }
    }
}

#[test]
fn settings_in_the_current_folder_are_not_read() {
    let world = World::new();
    let precious = world.path("precious");
    fs::write(&precious, "what stood there").unwrap();
    let logger = format!("file = \"{}\"\nappend = false\nlevel = \"full\"\n", precious.display());
    fs::write(world.path("burn.toml"), format!("[autodiff.logger]\n{logger}[fusion.logger]\n{logger}")).unwrap();
    let mut command = world.train("run", &["--max-steps", "1"]);
    command.current_dir(world.path(""));
    run(command).with(0);
    assert_eq!(fs::read_to_string(&precious).unwrap(), "what stood there");
}
