//! Photos of every format, with EXIF.

use std::fs;
use std::path::Path;

use data_prep::source::DecodeConfig;

use hyperlora_testing::fuzz::{Case, Refusal, fuzz};

/// Returns the memory that a photo may take: twice the limit, and what its decoder needs besides. A lossless WebP of
/// any size may request 65,536 groups of codes.
fn allowed(config: &DecodeConfig, target: &str) -> usize {
    2 * config.max_bytes as usize + if target == "webp" { 16 << 20 } else { 4 << 20 }
}

fn seeds(extensions: &[&str]) -> Vec<Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz/seeds");
    let mut files: Vec<_> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files.retain(|file| file.extension().is_some_and(|it| extensions.iter().any(|extension| it == *extension)));
    assert!(!files.is_empty());
    files.iter().map(|file| fs::read(file).unwrap()).collect()
}

/// Decodes the photos with these extensions, under limits that a false size soon exceeds; occasionally under the
/// default ones.
fn photos(target: &str, extensions: &[&str]) {
    let seeds = seeds(extensions);
    let small = DecodeConfig { max_side: 5000, max_bytes: 1 << 20 };
    let usual = DecodeConfig::default();
    fuzz(target, 1500, 0, "", |case: &mut Case| {
        let limits = if case.random.one_in(1000) { &usual } else { &small };
        case.memory = allowed(limits, target);
        let photo = limits.decode(&case.one_binary(&seeds)).map_err(Refusal::Reason)?.pixels;
        assert!(photo.width().max(photo.height()) <= limits.max_side);
        Ok(())
    });
}

#[test]
fn jpeg() {
    photos("jpeg", &["jpg"]);
}

#[test]
fn png() {
    photos("png", &["png"]);
}

#[test]
fn webp() {
    photos("webp", &["webp"]);
}

#[test]
fn bmp() {
    photos("bmp", &["bmp"]);
}

#[test]
fn pnm() {
    photos("pnm", &["pbm", "pgm", "ppm", "pam"]);
}
