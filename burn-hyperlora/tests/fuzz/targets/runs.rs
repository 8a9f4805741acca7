//! Files of a run folder: the experiment, checkpoints, curves and lists, as read by `status`, a resume and the tools.

use hyperlora_testing::repository;
use std::fs;
use std::path::Path;

use burn_hyperlora::checkpoint::Checkpoint;
use burn_hyperlora::data::quarantine::Quarantine;
use burn_hyperlora::experiment::Experiment;
use burn_hyperlora::metrics::{MetricsWriter, RunSummary};
use burn_hyperlora::run::archive;
use burn_hyperlora::run::moments::MomentFiles;
use burn_hyperlora::run::saved::SavedState;
use burn_hyperlora::run::state::TrainState;
use burn_hyperlora::status::Status;
use hyperlora_core::config;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::support::fixture;
use crate::targets::tensor_files::with_header;
use hyperlora_testing::fuzz::{Answer, Case, fuzz, scratch};

const STEP: &str = "checkpoints/step-00000004";

/// YAML syntax, and the keys of an experiment.
const YAML: [&str; 34] = [
    "&a ",
    "*a",
    "<<: *a",
    "!!binary ",
    "!!float ",
    "|",
    ">-",
    "? ",
    "- ",
    "---\n",
    "\t",
    "\n",
    ": ",
    "#",
    "'",
    "~",
    ".inf",
    "0x1F",
    "steps:",
    "learning_rate:",
    "micro_batch:",
    "global_batch:",
    "schedule:",
    "cosine:",
    "every:",
    "keep:",
    "image_size:",
    "groups:",
    "basis:",
    "heads:",
    "streams:",
    "id_clip:",
    "base:",
    "https://user:pass@host/${HOME}",
];

const JSON: [&str; 26] = [
    "\"train\"",
    "\"stage\"",
    "\"stage_step\"",
    "\"global_step\"",
    "\"next_draw\"",
    "\"records\"",
    "\"spikes\"",
    "\"settings\"",
    "\"data\"",
    "\"shards\"",
    "\"bytes\"",
    "\"sha256\"",
    "\"state.json\"",
    "\"checksums.json\"",
    "\"stages\"",
    "\"name\"",
    "\"steps\"",
    "\"seconds\"",
    "\"group\"",
    "\"ids\"",
    "\"d/../../x\"",
    "\"/etc/passwd\"",
    "\"weights/a\"",
    "\"other\"",
    "\n",
    ",",
];

fn experiment_yaml() -> String {
    fs::read_to_string(repository().join("experiments/quickstart/train.yaml")).unwrap()
}

#[test]
fn experiment() {
    let folder = scratch();
    let path = folder.path().join("train.yaml");
    let text = experiment_yaml();
    let seeds = [text.as_str(), &text.lines().filter(|line| !line.starts_with('#')).collect::<Vec<_>>().join("\n")];
    fuzz("experiment", 1500, 32 << 20, "train.yaml", |case| {
        fs::write(&path, case.one_text(&seeds, &YAML)).unwrap();
        let experiment = Experiment::load(&path)?;
        let yaml = config::to_yaml(&experiment)?;
        assert!(yaml.contains("train:"), "{yaml}");
        Ok(())
    });
}

/// Writes a checkpoint with two tensors of moments.
fn write_checkpoint(folder: &Path) {
    let place = folder.join(STEP);
    fs::create_dir_all(place.join("weights")).unwrap();
    let state = SavedState {
        train: TrainState { stage: 0, stage_step: 4, global_step: 4, next_draw: 64, ..TrainState::default() },
        taught: None,
        optimizer_steps: [("a".to_owned(), 4)].into(),
        settings: json!({"seed": 7, "data": {"shards": "abc"}}),
    };
    fs::write(place.join("state.json"), serde_json::to_vec(&state).unwrap()).unwrap();
    let moments = json!({
        "a.m": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]},
        "a.v": {"dtype": "F32", "shape": [3], "data_offsets": [12, 24]},
    });
    fs::write(place.join("optimizer.safetensors"), with_header(moments.to_string().as_bytes(), &[0; 24])).unwrap();
    fs::copy(fixture("hypernet/hyper_lora_modules.json"), place.join("weights/hyper_lora_modules.json")).unwrap();
    checksum(&place);
}

/// Writes the checksums of the current files.
fn checksum(place: &Path) {
    let names = ["state.json", "optimizer.safetensors", "weights/hyper_lora_modules.json"];
    let sum = |name: &str| {
        let bytes = fs::read(place.join(name)).unwrap();
        let sha256: String = Sha256::digest(&bytes).iter().map(|byte| format!("{byte:02x}")).collect();
        (name.to_owned(), json!({"bytes": bytes.len(), "sha256": sha256}))
    };
    let sums: serde_json::Map<String, Value> = names.map(sum).into_iter().collect();
    fs::write(place.join("checksums.json"), serde_json::to_vec(&sums).unwrap()).unwrap();
}

#[test]
fn checkpoint() {
    const FILES: [&str; 3] = ["checksums.json", "state.json", "optimizer.safetensors"];
    let folders = FILES.map(|_| scratch());
    folders.iter().for_each(|folder| write_checkpoint(folder.path()));
    let seeds = FILES.map(|file| fs::read(folders[0].path().join(STEP).join(file)).unwrap());
    fuzz("checkpoint", 1500, 8 << 20, "", |case| {
        let which = case.choose(FILES.len());
        let place = folders[which].path().join(STEP);
        case.named = place.display().to_string();
        let bytes = if which == 2 { case.binary(&seeds[which]) } else { case.text(&seeds[which], &JSON) };
        fs::write(place.join(FILES[which]), bytes).unwrap();
        // An attacker who changes a file updates its checksum as well.
        if which > 0 {
            checksum(&place);
        }
        let checkpoint = Checkpoint::at(&place)?;
        archive::summary(&checkpoint);
        checkpoint.verify()?;
        checkpoint.files()?;
        let _: SavedState = checkpoint.state()?;
        let moments = MomentFiles::open(&checkpoint)?;
        for (name, length) in moments.lengths() {
            moments.read(name, 0..length)?;
        }
        Ok(())
    });
}

/// Frames a record of an event file.
fn framed(payload: &[u8]) -> Vec<u8> {
    let masked = |bytes: &[u8]| crc32c::crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8).to_le_bytes();
    let length = (payload.len() as u64).to_le_bytes();
    [&length[..], &masked(&length), payload, &masked(payload)].concat()
}

/// Returns the payloads of an event file.
fn payloads(mut file: &[u8]) -> Vec<Vec<u8>> {
    let mut found = Vec::new();
    while let Some((head, rest)) = file.split_at_checked(12) {
        let length = u64::from_le_bytes(head[..8].try_into().unwrap()) as usize;
        found.push(rest[..length].to_vec());
        file = &rest[length + 4..];
    }
    found
}

const RUN_FILES: [&str; 8] = [
    "config.yaml",
    "checkpoints/step-00000004/state.json",
    "summary.json",
    "skipped.jsonl",
    "quarantine.jsonl",
    "run.log",
    "tensorboard/events.out.tfevents.1.a",
    "tensorboard/events.out.tfevents.2.a",
];

fn write_run(folder: &Path) {
    write_checkpoint(folder);
    fs::write(folder.join("config.yaml"), experiment_yaml()).unwrap();
    let stage =
        json!({"name": "base", "steps": 4, "fixed_set_loss_before": 0.5, "images_per_second": 2.0, "seconds": 3.0});
    fs::write(folder.join("summary.json"), json!({"stages": [stage], "later": 1}).to_string()).unwrap();
    let skipped = json!({"step": 3, "stage": "base", "reason": "NaN", "photos": ["a/1.png"]});
    fs::write(folder.join("skipped.jsonl"), format!("{skipped}\n{skipped}\n")).unwrap();
    let bad = json!({"shards": "abc", "group": 7, "file": "shard-00000.parquet", "row_group": 1, "first_row": 5, "rows": 1,
        "ids": ["a/1.png"], "reason": "its SHA-256"});
    fs::write(folder.join("quarantine.jsonl"), format!("{bad}\n")).unwrap();
    fs::write(folder.join("run.log"), "one\ntwo\nError: three\n").unwrap();
    fs::create_dir(folder.join("tensorboard")).unwrap();
    for name in &RUN_FILES[6..] {
        let written = scratch();
        let mut writer = MetricsWriter::create(written.path(), 1).unwrap();
        writer.scalars(3, &[("loss/base", 0.5), ("speed/images_per_second", 8.0), ("ranks", 2.0)]);
        fs::copy(writer.path(), folder.join(name)).unwrap();
    }
}

fn changed_events(case: &mut Case, file: &[u8]) -> Vec<u8> {
    if case.unchanged || case.random.one_in(3) {
        return case.binary(file);
    }
    let mut payloads = payloads(file);
    let place = case.random.below(payloads.len());
    payloads[place] = case.binary(&payloads[place]);
    payloads.iter().flat_map(|payload| framed(payload)).collect()
}

fn read_run(run: &Path) -> Answer {
    let status = Status::read(run)?;
    assert!(status.to_string().contains("steps"));
    serde_json::to_string(&status).unwrap();
    RunSummary::read(run)?;
    Quarantine::open(run, 5, "abc")?;
    Ok(())
}

#[test]
fn run_folder() {
    let folders = RUN_FILES.map(|_| scratch());
    folders.iter().for_each(|folder| write_run(folder.path()));
    let seeds = RUN_FILES.map(|file| fs::read(folders[0].path().join(file)).unwrap());
    fuzz("run_folder", 1500, 32 << 20, "", |case| {
        let which = case.choose(RUN_FILES.len());
        let run = folders[which].path();
        case.named = run.display().to_string();
        let bytes = match which {
            0 => case.text(&seeds[which], &YAML),
            1..=4 => case.text(&seeds[which], &JSON),
            5 => case.binary(&seeds[which]),
            _ => changed_events(case, &seeds[which]),
        };
        fs::write(run.join(RUN_FILES[which]), bytes).unwrap();
        read_run(run)
    });
}
