//! Headers of ONNX files.

use std::fs;
use std::path::Path;

use data_prep::face::{FaceConfig, FaceModels};
use hyperlora_core::config::ConfigPath;

use hyperlora_testing::fuzz::{fuzz, scratch};

/// A fixture for each key of the config.
const ROLES: [(&str, &str); 4] = [
    ("detector", "antelopev2/scrfd_10g_bnkps.onnx"),
    ("landmarker", "antelopev2/2d106det.onnx"),
    ("embedder", "antelopev2/glintr100.onnx"),
    ("independent", "curricularface.onnx"),
];

#[test]
fn onnx() {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/faces");
    // One folder per role, in which that role's file is mutated.
    let folders = ROLES.map(|_| scratch());
    for folder in &folders {
        for (role, file) in ROLES {
            fs::copy(fixtures.join(file), folder.path().join(role)).unwrap();
        }
    }
    let seeds: Vec<Vec<u8>> = ROLES.iter().map(|(_, file)| fs::read(fixtures.join(file)).unwrap()).collect();
    let named = |role: usize| Some(ROLES[role].0.to_owned());
    fuzz("onnx", 2000, 16 << 20, "", |case| {
        let role = case.choose(ROLES.len());
        let folder = &folders[role];
        fs::write(folder.path().join(ROLES[role].0), case.binary(&seeds[role])).unwrap();
        case.named = folder.path().display().to_string();
        let config = FaceConfig {
            models: ConfigPath::new(folder.path()),
            detector: named(0),
            landmarker: named(1),
            embedder: named(2),
            independent_embedder: named(3),
            ..FaceConfig::default()
        };
        FaceModels::find(&config, Path::new(""))?;
        Ok(())
    });
}
