//! Face models on real photos: the files that `launch/assets.sh` downloads.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::{Path, PathBuf};

use data_prep::face::{Detection, FaceAnalyser, FaceConfig};
use image::{RgbImage, imageops};

fn photos() -> PathBuf {
    let cache = std::env::var_os("HYPERLORA_CACHE").map(PathBuf::from);
    cache.unwrap_or_else(|| Path::new(&std::env::var_os("HOME").unwrap()).join(".cache/hyperlora")).join("photos")
}

fn open(name: &str) -> RgbImage {
    image::open(photos().join(name)).unwrap().to_rgb8()
}

fn analyser() -> FaceAnalyser {
    FaceAnalyser::load(&FaceConfig::default(), Path::new("")).unwrap()
}

/// Returns the only face of a photo.
fn only_face(analyser: &mut FaceAnalyser, name: &str) -> (RgbImage, Detection) {
    let photo = open(name);
    let mut faces = analyser.detect(&photo).unwrap();
    assert_eq!(faces.len(), 1, "{name}");
    (photo, faces.remove(0))
}

fn cosine(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
}

/// Returns the mean cosine over pairs of the same person, and over pairs of two people.
fn same_and_other(embeddings: &[(u32, Vec<f32>)]) -> (f64, f64) {
    let (mut same, mut other) = (Vec::new(), Vec::new());
    for (index, (person, a)) in embeddings.iter().enumerate() {
        for (another, b) in &embeddings[..index] {
            if person == another { &mut same } else { &mut other }.push(cosine(a, b));
        }
    }
    let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len() as f64;
    (mean(&same), mean(&other))
}

fn centre(points: &[[f32; 2]]) -> [f32; 2] {
    [0, 1].map(|axis| points.iter().map(|point| point[axis]).sum::<f32>() / points.len() as f32)
}

#[test]
fn embeddings_tell_people_apart_and_landmarks_sit_on_the_face() {
    let mut analyser = analyser();
    let (mut identity, mut independent) = (Vec::new(), Vec::new());
    for person in 1..=10 {
        for photo in [1, 4, 8] {
            let (photo, face) = only_face(&mut analyser, &format!("orl/s{person:02}/{photo}.pgm"));
            let described = analyser.describe(&photo, &face).unwrap();
            let own = cosine(&described.id_embedding, &described.id_embedding);
            assert!(described.id_embedding.len() == 512 && (own - 1.0).abs() < 1e-5, "{own}");

            // The detector and the landmark model are independent: they must agree on eyes, nose and mouth.
            let points = &described.landmarks;
            assert_eq!(points.len(), 68);
            let found =
                [&points[36..42], &points[42..48], &points[30..31], &points[48..49], &points[54..55]].map(centre);
            let [left, right, ..] = face.points;
            let between_eyes = (right[0] - left[0]).hypot(right[1] - left[1]);
            for (landmark, point) in found.iter().zip(face.points) {
                let apart = (landmark[0] - point[0]).hypot(landmark[1] - point[1]) / between_eyes;
                assert!(apart < 0.3, "s{person:02}: {landmark:?} is far from {point:?}");
            }
            identity.push((person, described.id_embedding));
            independent.push((person, analyser.embed_independent(&photo, &face).unwrap()));
        }
    }
    assert_eq!(independent[0].1.len(), 128);
    let (same, other) = same_and_other(&identity);
    assert!(same > 0.6 && other < 0.3, "512-d: same person {same:.3}, other {other:.3}");
    let (same, other) = same_and_other(&independent);
    assert!(same > 0.6 && other < 0.3, "128-d: same person {same:.3}, other {other:.3}");
}

#[test]
fn a_portrait_shows_one_face_and_a_group_several() {
    let mut analyser = analyser();
    let (_, face) = only_face(&mut analyser, "portraits/astronaut.png");
    // Position of the face in this well-known photo.
    let [x, y] = centre(&face.points);
    assert!((200.0..250.0).contains(&x) && (90.0..150.0).contains(&y), "{x} {y}");
    assert!(face.score > 0.8, "{}", face.score);

    let faces: usize = (1..=6)
        .map(|number| {
            let found = analyser.detect(&open(&format!("groups/sample{number}.jpg"))).unwrap();
            assert!(found.len() >= 3, "sample{number}: {}", found.len());
            assert!(found.is_sorted_by(|a, b| a.score >= b.score));
            found.len()
        })
        .sum();
    assert!((20..=26).contains(&faces), "{faces}");
}

#[test]
fn colour_portraits_of_one_person_are_alike_and_results_repeat() {
    let mut analyser = analyser();
    let mut embed = |name: &str| {
        let (photo, face) = only_face(&mut analyser, name);
        analyser.describe(&photo, &face).unwrap().id_embedding
    };
    let [first, second, other] =
        ["obama.jpg", "obama2.jpg", "biden.jpg"].map(|name| embed(&format!("portraits/{name}")));
    let (same, different) = (cosine(&first, &second), cosine(&first, &other));
    assert!(same > 0.5 && different < 0.3, "{same:.3} {different:.3}");
    assert_eq!(embed("portraits/obama.jpg"), first);
}

#[test]
fn a_face_on_its_side_or_on_its_head_is_set_upright() {
    let mut analyser = analyser();
    let turns: [fn(&RgbImage) -> RgbImage; 3] = [imageops::rotate90, imageops::rotate180, imageops::rotate270];
    for name in ["portraits/astronaut.png", "orl/s01/1.pgm", "orl/s22/1.pgm"] {
        let photo = open(name);
        let upright = analyser.detect_upright(photo.clone()).unwrap();
        assert!(upright.faces.len() == 1 && !upright.turned && upright.photo == photo, "{name}");
        let embedding = analyser.describe(&photo, &upright.faces[0]).unwrap().id_embedding;
        for turn in turns {
            let view = turn(&photo);
            let found = analyser.detect_upright(view.clone()).unwrap();
            // A face that is not detected at all is rejected and counted.
            if found.faces.is_empty() {
                continue;
            }
            assert!(found.turned && found.photo == photo && found.faces == upright.faces, "{name}: {:?}", found.faces);
            // Embedded without the turn, it would be another person.
            if let [face] = &analyser.detect(&view).unwrap()[..] {
                let askew = analyser.describe(&view, face).unwrap().id_embedding;
                assert!(cosine(&embedding, &askew) < 0.5, "{name}");
            }
        }
    }
}

#[test]
fn upright_photos_stay_as_they_are() {
    let mut analyser = analyser();
    let orl = (1..=40).map(|person| format!("orl/s{person:02}/{}.pgm", 1 + person % 10));
    let portraits = ["obama.jpg", "obama2.jpg", "obama3.jpg", "biden.jpg"].map(|name| format!("portraits/{name}"));
    for name in orl.chain(portraits) {
        let found = analyser.detect_upright(open(&name)).unwrap();
        assert!(found.faces.len() == 1 && !found.turned, "{name}: {:?}", found.faces);
    }
}

#[test]
fn a_face_that_fills_the_photo_is_found_at_a_smaller_size() {
    let config = FaceConfig { detector_sides: vec![640], min_score: Some(0.85), ..FaceConfig::default() };
    let mut large_only = FaceAnalyser::load(&config, Path::new("")).unwrap();
    let config = FaceConfig { detector_sides: vec![640, 320], ..config };
    let mut retrying = FaceAnalyser::load(&config, Path::new("")).unwrap();
    // Crop from brow to chin, with nothing around it.
    let close_up = imageops::crop_imm(&open("portraits/astronaut.png"), 192, 80, 64, 77).to_image();
    let close_up = imageops::resize(&close_up, 384, 462, imageops::FilterType::Triangle);
    assert_eq!(large_only.detect(&close_up).unwrap().len(), 0);
    assert_eq!(retrying.detect(&close_up).unwrap().len(), 1);
}

#[test]
fn photos_without_a_face_have_none() {
    let mut analyser = analyser();
    for photo in [RgbImage::new(0, 0), RgbImage::new(1, 1), RgbImage::new(300, 2), RgbImage::new(200, 200)] {
        assert_eq!(analyser.detect(&photo).unwrap(), []);
    }
}

#[test]
fn what_does_not_fit_is_named_with_its_remedy() {
    let failing = |config: FaceConfig, base: &Path| {
        let error = FaceAnalyser::load(&config, base).unwrap_err();
        assert_eq!(error.exit_code(), 2);
        error.to_string()
    };
    let nowhere = tempfile::tempdir().unwrap();
    let missing = FaceConfig { detector: Some("absent.onnx".into()), ..FaceConfig::default() };
    assert!(failing(missing, nowhere.path()).contains("absent.onnx: cannot be read"));

    let swapped = FaceConfig { landmarker: Some("fr_feature.onnx".into()), ..FaceConfig::default() };
    let message = failing(swapped, nowhere.path());
    assert!(message.contains("fr_feature.onnx: is not a landmark model"), "{message}");
    assert!(message.contains("it takes input [1, 3, 112, 112] and gives output [1, 512]"), "{message}");
    assert!(message.contains("name another file with `landmarker`"), "{message}");

    let sides = FaceConfig { detector_sides: vec![640, 900], ..FaceConfig::default() };
    assert!(failing(sides, nowhere.path()).contains("faces.detector_sides"));
}
