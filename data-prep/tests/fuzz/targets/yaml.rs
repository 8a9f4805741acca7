//! YAML of `data-prep`, and variables in its paths.

use std::path::Path;

use data_prep::pipeline::PrepConfig;
use hyperlora_core::config::{self, ConfigPath};

use hyperlora_testing::fuzz::{fuzz, scratch};

/// Tokens with a meaning in YAML.
const WORDS: [&str; 40] = [
    "&a ",
    "*a",
    "<<: *a",
    "!!binary ",
    "!!float ",
    "!!str ",
    "!x ",
    "|",
    ">-",
    "? ",
    "- ",
    "---\n",
    "...\n",
    "%YAML 1.2\n",
    "\t",
    "\n",
    ": ",
    "#",
    "'",
    "~",
    "yes",
    "0x1F",
    "0o7",
    "1_000",
    ".inf",
    "-.inf",
    "2001-01-01",
    "source:",
    "folder:",
    "root:",
    "labels:",
    "extensions:",
    "decode:",
    "max_side:",
    "max_bytes:",
    "sidecar:",
    "fallback:",
    "template:",
    "text:",
    "rows_per_group:",
];

const SEEDS: [&str; 3] = [
    "source: {folder: {root: photos, labels: list.csv}}\ncaption: {template: {text: a photo of a person}}\n",
    "source:\n  folder:\n    root: ${HYPERLORA_CACHE:-~/.cache}/orl\n    extensions: [png, \"jpg\"]\n\
     decode: {max_side: 4096, max_bytes: 1000000}\n\
     face: {models: antelopev2, detector: a.onnx, min_score: 0.5, detector_sides: [640, 320]}\n\
     filter:\n  min_face: 48\n  min_sharpness: 1.5e1\n\
     crop:\n  margin: 1.5\n\
     caption:\n  sidecar:\n    fallback: >-\n      a photo\n      of a person\n\
     shards: {rows_per_group: 16, rows_per_shard: 64}\n",
    "source: &s {folder: {root: x}}\ncaption: {template: {text: 'a photo'}} # words\nshards:\n  rows_per_group: 1\n  rows_per_shard: 1\n",
];

#[test]
fn yaml() {
    let folder = scratch();
    let path = folder.path().join("data.yaml");
    fuzz("yaml", 4000, 32 << 20, "data.yaml", |case| {
        std::fs::write(&path, case.one_text(&SEEDS, &WORDS)).unwrap();
        let config = PrepConfig::load(&path)?;
        // A manifest contains the config without anything that describes a machine: of an absolute path, only the last
        // part.
        let yaml = config::to_yaml(&config)?;
        let again: PrepConfig = config::parse(&yaml, &path)?;
        assert_eq!(config::to_yaml(&again)?, yaml);
        Ok(())
    });
}

#[test]
fn variables() {
    const WORDS: [&str; 12] = ["${", "}", ":-", "$", "~", "/", "HOME", "://", "..", "A", "${A:-${B:-c}}", "\0"];
    let seeds = ["photos/${A:-x}/y", "~/photos", "${HOME}", "https://host/${A:-b}"];
    fuzz("variables", 4000, 1 << 20, "", |case| {
        let text = String::from_utf8_lossy(&case.one_text(&seeds, &WORDS)).into_owned();
        ConfigPath::new(text).resolve(Path::new("base"))?;
        Ok(())
    });
}
