//! Outputs of commands: they overwrite or reveal nothing of the user's, and nothing outside of the named paths.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use hyperlora_core::files::{OutputFile, Ownership, StagedFolder, UMASK};
use serde_json::{Value, json};

use crate::support::{World, contents, copy_folder, hyperlora, quickstart_base, run};

fn lora(name: &str) -> PathBuf {
    hyperlora_testing::fixture("loras").join(name).with_extension("safetensors")
}

fn fold(id: &Path, output: &Path) -> Command {
    let mut command = hyperlora(["fold", "--base-weight", "0.5", "--id"]);
    command.arg(id).arg("--base").arg(lora("second")).arg("-o").arg(output);
    command
}

fn checkpoint(arguments: &[&str], path: &Path) -> Command {
    let mut command = hyperlora(["checkpoint"]);
    command.args(arguments).arg(path);
    command
}

/// Trains a run with one checkpoint; returns both folders.
fn trained(world: &World) -> (PathBuf, PathBuf) {
    run(world.train("run", &["--max-steps", "1"])).with(0);
    (world.path("run"), world.path("run/checkpoints/step-00000001"))
}

#[test]
fn a_checkpoint_from_elsewhere_writes_and_reads_nothing_outside_of_it() {
    let world = World::new();
    let (_, step) = trained(&world);
    let victim = world.path("victim");
    fs::write(&victim, "mine").unwrap();
    let hostile = world.path("hostile/checkpoints/step-00000001");
    let list = hostile.join("checksums.json");
    let fresh = || {
        fs::create_dir_all(hostile.parent().unwrap()).unwrap();
        copy_folder(&step, &hostile);
    };
    let sum = json!({"bytes": 4, "sha256": "c4ffdbe1ad37e24b2c8d84bb4dd5b4e9c6cf5a4dcd7f0dc1a2e93dc3f35e6b70"});
    let absolute = victim.display().to_string();
    for name in ["weights/../../../../victim", absolute.as_str(), "../../../victim", "a//b", "a\\b"] {
        fresh();
        let mut sums: Value = serde_json::from_slice(&fs::read(&list).unwrap()).unwrap();
        sums[name] = sum.clone();
        fs::write(&list, sums.to_string()).unwrap();
        let before = contents(&world.path("hostile"));
        for command in ["verify", "consolidate"] {
            run(checkpoint(&[command], &hostile)).refused(2, &["checksums.json", "names the file"]);
        }
        let listed = run(checkpoint(&["list"], &hostile)).with(0);
        assert!(listed.stdout.contains("no"), "{}", listed.stdout);
        assert_eq!(fs::read(&victim).unwrap(), b"mine");
        let mut after = contents(&world.path("hostile"));
        after.remove(Path::new(".lock"));
        assert!(after == before);
        fs::remove_dir_all(world.path("hostile")).unwrap();
    }
    // Links: a listed file that lies elsewhere, and one that no checksum covers.
    for (file, words) in [("optimizer.safetensors", "checksums.json covers"), ("notes.txt", "checksums.json covers")] {
        fresh();
        let elsewhere = world.path("elsewhere");
        _ = fs::rename(hostile.join(file), &elsewhere);
        _ = fs::write(&elsewhere, fs::read(&elsewhere).unwrap_or_default());
        symlink(&elsewhere, hostile.join(file)).unwrap();
        run(checkpoint(&["verify"], &hostile)).refused(2, &[file, words]);
        fs::remove_dir_all(&hostile).unwrap();
    }
    // A file beside the listed ones would be read with them.
    fresh();
    fs::copy(hostile.join("optimizer.safetensors"), hostile.join("optimizer-2.safetensors")).unwrap();
    run(checkpoint(&["verify"], &hostile)).refused(2, &["optimizer-2.safetensors", "move it out"]);
    let mut generate = hyperlora(["generate", "--image", "a.png", "--checkpoint"]);
    generate.arg(&hostile).arg("-o").arg(world.path("a.safetensors"));
    run(generate).refused(2, &["optimizer-2.safetensors"]);
}

#[test]
fn a_run_from_elsewhere_has_its_log_written_into_no_other_file() {
    let world = World::new();
    let (folder, _) = trained(&world);
    let victim = world.path("victim");
    fs::write(&victim, "mine").unwrap();
    for name in ["run.log", ".lock"] {
        fs::remove_file(folder.join(name)).unwrap();
        symlink(&victim, folder.join(name)).unwrap();
        run(world.train("run", &["--max-steps", "1"])).refused(2, &[name, "it is a link"]);
        fs::remove_file(folder.join(name)).unwrap();
    }
    // A file that is written whole replaces a link.
    fs::remove_file(folder.join("config.yaml")).unwrap();
    symlink(&victim, folder.join("config.yaml")).unwrap();
    run(world.train("run", &["--max-steps", "1"])).with(0);
    assert!(!fs::symlink_metadata(folder.join("config.yaml")).unwrap().is_symlink());
    assert_eq!(fs::read(&victim).unwrap(), b"mine");
}

#[test]
fn the_configuration_of_a_run_is_verified_and_an_old_run_goes_on() {
    let world = World::new();
    let (folder, _) = trained(&world);
    let config = folder.join("config.yaml");
    let ended = run(checkpoint(&["verify"], &folder)).with(0);
    assert_eq!(ended.stdout.lines().filter(|line| line.ends_with(": whole")).count(), 2, "{}", ended.stdout);
    let sealed = fs::read_to_string(&config).unwrap();
    fs::write(&config, sealed.replace("seed: 5", "seed: 6")).unwrap();
    run(checkpoint(&["verify"], &folder)).refused(2, &["config.yaml", "does not match its checksum"]);
    // Configuration as an older version wrote it.
    let (old, _) = sealed.trim_end().rsplit_once('\n').unwrap();
    fs::write(&config, format!("{old}\n")).unwrap();
    run(checkpoint(&["verify"], &folder)).refused(2, &["config.yaml", "no checksum", "older version"]);
    run(world.train("run", &["--max-steps", "2"])).with(0);
    assert_eq!(fs::read_to_string(&config).unwrap(), sealed);
    run(checkpoint(&["verify"], &folder)).with(0);
}

#[test]
fn a_folder_is_replaced_only_where_the_program_wrote_all_of_it() {
    let world = World::new();
    let (folder, step) = trained(&world);
    let consolidate = |to: &Path| {
        let mut command = checkpoint(&["consolidate"], &step);
        command.arg("-o").arg(to);
        run(command)
    };
    let mine = world.path("mine");
    fs::create_dir(&mine).unwrap();
    fs::write(mine.join("thesis.txt"), "years of work").unwrap();
    consolidate(&mine).refused(2, &["mine", "is not empty", "name another folder"]);
    assert_eq!(contents(&mine).len(), 1);
    let made = world.path("deep/made");
    for _ in 0..2 {
        consolidate(&made).with(0);
    }
    let whole = contents(&made);
    fs::write(made.join("notes.txt"), "mine").unwrap();
    consolidate(&made).refused(2, &["made", "`notes.txt`"]);
    fs::remove_file(made.join("notes.txt")).unwrap();
    assert!(contents(&made) == whole);
    for (to, words) in [(&step, "is the input"), (&step.join("x"), "lies in the input"), (&folder, "holds the input")] {
        consolidate(to).refused(2, &[words]);
    }
    let held = StagedFolder::new(&made, Ownership::Marked).unwrap();
    consolidate(&made).refused(2, &["made", "another process"]);
    drop(held);
    // A link to another disk is kept.
    let link = world.path("link");
    symlink("deep/linked", &link).unwrap();
    consolidate(&link).with(0);
    assert!(fs::symlink_metadata(&link).unwrap().is_symlink() && contents(&link) == whole);
    run(checkpoint(&["verify"], &step)).with(0);
}

#[test]
fn an_output_file_is_refused_before_the_work_where_it_cannot_be_written() {
    let world = World::new();
    let id = world.path("id.safetensors");
    fs::copy(lora("kohya"), &id).unwrap();
    let before = fs::read(&id).unwrap();
    let output = world.path("both.safetensors");
    run(fold(&id, &id)).refused(2, &["id.safetensors", "is the input"]);
    let linked = world.path("linked.safetensors");
    symlink(&id, &linked).unwrap();
    run(fold(&id, &linked)).refused(2, &["is the input"]);
    assert_eq!(fs::read(&id).unwrap(), before);
    run(fold(&id, &world.path("both/"))).refused(2, &["names a folder"]);
    let held = OutputFile::claim(&output, [&id]).unwrap();
    run(fold(&id, &output)).refused(2, &["both.safetensors", "another process"]);
    drop(held);
    // The output path is checked first, whatever is wrong with the input.
    run(fold(&world.path("missing"), &world.path("nowhere/x.safetensors"))).refused(2, &["nowhere/x.safetensors"]);
    let dangling = world.path("dangling.safetensors");
    symlink("real.safetensors", &dangling).unwrap();
    run(fold(&id, &dangling)).with(0);
    run(fold(&id, &output)).with(0);
    assert_eq!(fs::read(world.path("real.safetensors")).unwrap(), fs::read(&output).unwrap());
    assert!(!contents(&world.path(".")).keys().any(|path| path.to_string_lossy().contains(".hyperlora.")));
}

#[test]
fn a_run_folder_is_no_input_and_has_a_name_of_its_own() {
    let world = World::new();
    for (out, words) in [("shards", "is the input"), ("shards/run", "lies in the input"), (".", "holds the input")] {
        let mut train = hyperlora(["train"]);
        train.arg(world.path("train.yaml")).arg("--out").arg(world.path(out));
        run(train).refused(2, &[words]);
    }
    assert!(!world.path("shards/run").exists() && !world.path("run.log").exists());
    for name in ["..", ".", "a/b", "''"] {
        world.write_yaml(&[("name: small", &format!("name: {name}"))]);
        run(world.train("run", &[])).refused(2, &["train.yaml: name", "cannot name a folder"]);
    }
    // Longer than the maximum folder name.
    world.write_yaml(&[("name: small", &format!("name: {}", "n".repeat(300)))]);
    let mut train = hyperlora(["train", "train.yaml"]);
    train.current_dir(world.path("."));
    run(train).refused(2, &["choose a shorter name"]);
    // The folder behind a link is moved aside in its place; the link is kept.
    world.write_yaml(&[]);
    fs::create_dir(world.path("disk")).unwrap();
    symlink("disk/real", world.path("link")).unwrap();
    run(world.train("link", &["--max-steps", "0"])).with(0);
    run(world.train("link/", &["--max-steps", "0", "--restart"])).with(0);
    assert!(world.path("disk/real.1/checkpoints").is_dir() && world.path("disk/real/checkpoints").is_dir());
    assert!(fs::symlink_metadata(world.path("link")).unwrap().is_symlink());
}

/// Lists the files and folders below `folder` whose mode differs from the expected one.
fn other_modes(folder: &Path, file_mode: u32, folder_mode: u32) -> Vec<String> {
    let mut found = Vec::new();
    let mut folders = vec![folder.to_path_buf()];
    while let Some(folder) = folders.pop() {
        for path in fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()).chain([folder.clone()]) {
            let mode = fs::symlink_metadata(&path).unwrap().permissions().mode() & 0o777;
            let expected = if path.is_dir() { folder_mode } else { file_mode };
            if mode != expected {
                found.push(format!("{}: {mode:o}", path.display()));
            }
            if path.is_dir() && path != folder {
                folders.push(path);
            }
        }
    }
    found
}

#[test]
fn only_the_user_may_read_what_is_written_unless_the_umask_is_told() {
    let world = World::new();
    for (name, umask, file_mode, folder_mode) in [("own", None, 0o600, 0o700), ("group", Some("027"), 0o640, 0o750)] {
        let with_umask = |mut command: Command| {
            command.env_remove(UMASK).envs(umask.map(|umask| (UMASK, umask)));
            run(command).with(0);
        };
        with_umask(world.train(name, &["--max-steps", "1"]));
        let folder = world.path(name);
        let event_files = contents(&folder.join("tensorboard"));
        assert!(!event_files.is_empty() && folder.join("run.log").is_file());
        with_umask(fold(&lora("kohya"), &folder.join("lora.safetensors")));
        let mut consolidate = checkpoint(&["consolidate"], &folder);
        consolidate.arg("-o").arg(folder.join("released"));
        with_umask(consolidate);
        with_umask(checkpoint(&["consolidate"], &folder));
        let mut merge = hyperlora(["merge", "--lora"]);
        merge.arg(lora("kohya")).arg("--base").arg(quickstart_base()).arg("-o").arg(folder.join("merged"));
        with_umask(merge);
        let mut others = other_modes(&folder, file_mode, folder_mode);
        // Large files of the base that no LoRA changes are hard links to the base's own.
        others.retain(|path| !(path.contains("/merged/") && path.contains(".safetensors: ")));
        assert_eq!(others, [""; 0]);
        assert_eq!(other_modes(&folder.join("merged/unet"), file_mode, folder_mode), [""; 0]);
    }
    for umask in ["rwx", "777", ""] {
        let mut refused = hyperlora(["checkpoint", "list", "."]);
        refused.env(UMASK, umask);
        run(refused).refused(2, &[UMASK, "octal"]);
    }
}
