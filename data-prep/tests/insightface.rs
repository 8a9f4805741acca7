//! Model folders in insightface's layout, compared with the results of insightface on the same files
//! (`ci/parity/face_fixtures.py`: random graphs with the right inputs and outputs).
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use data_prep::face::mask::{self, MaskConfig};
use data_prep::face::{Detection, FaceAnalyser, FaceConfig};
use hyperlora_core::config::ConfigPath;
use image::{Rgb, RgbImage};
use serde::Deserialize;

#[derive(Deserialize)]
struct Expected {
    detections: Vec<ExpectedDetections>,
    faces: Vec<ExpectedFace>,
}

#[derive(Deserialize)]
struct ExpectedDetections {
    model: String,
    photo: String,
    side: u32,
    /// x0, y0, x1, y1, score.
    boxes: Vec<[f32; 5]>,
    points: Vec<[[f32; 2]; 5]>,
}

#[derive(Deserialize)]
struct ExpectedFace {
    photo: String,
    #[serde(rename = "box")]
    face_box: [f32; 4],
    points: [[f32; 2]; 5],
    landmarks: BTreeMap<String, Vec<[f32; 2]>>,
    embeddings: BTreeMap<String, Vec<f32>>,
}

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/faces")
}

fn expected() -> Expected {
    serde_json::from_slice(&fs::read(fixtures().join("expected.json")).unwrap()).unwrap()
}

fn photo(name: &str) -> RgbImage {
    image::open(fixtures().join(name)).unwrap().to_rgb8()
}

/// Pack of models. All models of the fixtures are below it in `more`, because only files of its own folder may be
/// named.
static PACK: LazyLock<PathBuf> = LazyLock::new(|| {
    let pack = Path::new(env!("CARGO_TARGET_TMPDIR")).join("insightface");
    for (from, to) in [("antelopev2", ""), ("", "more"), ("antelopev2", "more/antelopev2")] {
        fs::create_dir_all(pack.join(to)).unwrap();
        for entry in fs::read_dir(fixtures().join(from)).unwrap() {
            let entry = entry.unwrap();
            if entry.path().extension().is_some_and(|extension| extension == "onnx") {
                fs::copy(entry.path(), pack.join(to).join(entry.file_name())).unwrap();
            }
        }
    }
    pack
});

/// Returns the unchanged pack.
fn antelopev2() -> FaceConfig {
    FaceConfig { models: ConfigPath::new(&*PACK), ..FaceConfig::default() }
}

/// Returns a file of the fixtures, to use in place of one of the pack's.
fn instead(file: &str) -> Option<String> {
    Some(format!("more/{file}"))
}

fn load(config: &FaceConfig) -> FaceAnalyser {
    FaceAnalyser::load(config, Path::new("")).unwrap()
}

/// Returns the largest difference between two lists of the same length.
fn apart<'a>(got: impl IntoIterator<Item = &'a f32>, want: impl IntoIterator<Item = &'a f32>) -> f32 {
    let (got, want): (Vec<_>, Vec<_>) = (got.into_iter().collect(), want.into_iter().collect());
    assert_eq!(got.len(), want.len());
    got.iter().zip(want).map(|(got, want)| (**got - want).abs()).fold(0.0, f32::max)
}

#[test]
fn scrfd_finds_what_insightface_finds() {
    let mut worst = [0.0_f32; 2];
    for case in expected().detections {
        let config = FaceConfig { detector: instead(&case.model), detector_sides: vec![case.side], ..antelopev2() };
        let found = load(&config).detect(&photo(&case.photo)).unwrap();
        assert_eq!(found.len(), case.boxes.len(), "{}", case.model);
        assert!(found.is_sorted_by(|a, b| a.score >= b.score));
        for (want, points) in case.boxes.iter().zip(&case.points) {
            // OpenCV's rounding can swap scores, so faces are matched by their places.
            let distance = |face: &&Detection| apart(&face.face_box, &want[..4]);
            let face = found.iter().min_by(|a, b| distance(a).total_cmp(&distance(b))).unwrap();
            worst[0] = worst[0].max((face.score - want[4]).abs());
            worst[1] = worst[1].max(distance(&face).max(apart(face.points.as_flattened(), points.as_flattened())));
        }
    }
    println!("scores differ by {:.5}, places by {:.4} pixels", worst[0], worst[1]);
    assert!(worst[0] < 4e-3 && worst[1] < 0.1, "{worst:?}");
}

#[test]
fn a_model_with_one_size_sees_smaller_photos_in_its_corner() {
    let case = &expected().detections[1];
    let sides = |sides: Vec<u32>| {
        let config = FaceConfig { detector: instead("batched.onnx"), detector_sides: sides, ..antelopev2() };
        load(&config).detect(&photo(&case.photo)).unwrap()
    };
    // 640 exceeds the model's input; 64 leaves three quarters of it black.
    assert_eq!(sides(vec![640]), sides(vec![128]));
    assert_ne!(sides(vec![64]), sides(vec![128]));
}

#[test]
fn smaller_views_are_tried_where_nothing_is_found() {
    let case = &expected().detections[0];
    let sides = |sides: &[u32]| {
        let config = FaceConfig { min_score: Some(0.99), detector_sides: sides.to_vec(), ..antelopev2() };
        load(&config).detect(&photo(&case.photo)).unwrap()
    };
    let found_at: Vec<_> = [480, 320, 96].into_iter().filter(|&side| !sides(&[side]).is_empty()).collect();
    let first = found_at[0];
    let missed = (1..=640 / 32).map(|step| 32 * step).find(|&side| sides(&[side]).is_empty()).unwrap();
    assert_eq!(sides(&[missed, first]), sides(&[first]));
}

#[test]
fn landmarks_and_embeddings_are_insightfaces() {
    let mut worst = [0.0_f32; 2];
    for face in expected().faces {
        let photo = photo(&face.photo);
        let detection = Detection { face_box: face.face_box, points: face.points, score: 1.0 };
        for (file, want) in &face.landmarks {
            let config = FaceConfig { landmarker: instead(file), ..antelopev2() };
            let found = load(&config).describe(&photo, &detection).unwrap().landmarks;
            assert_eq!(found.len(), 106);
            worst[0] = worst[0].max(apart(found.as_flattened(), want.as_flattened()));
        }
        for (file, want) in &face.embeddings {
            let config = FaceConfig { embedder: instead(file), independent_embedder: instead(file), ..antelopev2() };
            let mut analyser = load(&config);
            let found = analyser.describe(&photo, &detection).unwrap().id_embedding;
            worst[1] = worst[1].max(apart(&found, want));
            assert_eq!(analyser.embed_independent(&photo, &detection).unwrap(), found);
        }
    }
    println!("landmarks differ by {:.4} pixels, embeddings by {:.6}", worst[0], worst[1]);
    assert!(worst[0] < 0.1 && worst[1] < 5e-5, "{worst:?}");
}

#[test]
fn the_files_of_a_pack_are_told_apart_whatever_their_names() {
    let folder = tempfile::tempdir().unwrap();
    let renamed = [
        ("antelopev2/scrfd_10g_bnkps.onnx", "det_10g.onnx"),
        ("antelopev2/glintr100.onnx", "w600k_r50.onnx"),
        ("antelopev2/2d106det.onnx", "a.ONNX"),
        ("antelopev2/1k3d68.onnx", "b.onnx"),
        ("antelopev2/genderage.onnx", "c.onnx"),
    ];
    for (from, to) in renamed {
        fs::copy(fixtures().join(from), folder.path().join(to)).unwrap();
    }
    let config = FaceConfig { models: ConfigPath::new(folder.path()), ..FaceConfig::default() };
    let face = &expected().faces[0];
    let detection = Detection { face_box: face.face_box, points: face.points, score: 1.0 };
    let photo = photo(&face.photo);
    let mut analyser = load(&config);
    let of_the_pack = load(&antelopev2()).describe(&photo, &detection).unwrap();
    assert_eq!(analyser.describe(&photo, &detection).unwrap(), of_the_pack);

    // CurricularFace is used for evaluation as soon as it is present, and never as the embedder.
    let error = analyser.embed_independent(&photo, &detection).unwrap_err();
    assert!(error.exit_code() == 2 && error.to_string().contains("curricularface.onnx"), "{error}");
    fs::copy(fixtures().join("curricularface.onnx"), folder.path().join("CurricularFace_IR101.onnx")).unwrap();
    let judged = load(&config).embed_independent(&photo, &detection).unwrap();
    assert!(apart(&judged, &face.embeddings["curricularface.onnx"]) < 5e-5);

    // Two embedders are ambiguous until one is named.
    fs::copy(fixtures().join("mxnet.onnx"), folder.path().join("other.onnx")).unwrap();
    let error = FaceAnalyser::load(&config, Path::new("")).unwrap_err().to_string();
    assert!(error.contains("holds other.onnx, w600k_r50.onnx") && error.contains("`embedder`"), "{error}");
    load(&FaceConfig { embedder: Some("w600k_r50.onnx".into()), ..config });
}

#[test]
fn the_crops_take_106_points() {
    // insightface's order: 0 is the chin, 1 and 9..16 the jaw of one side, 17 and 25..32 of the other, brows above.
    let mut points = vec![[50.0, 50.0]; 106];
    let jaw = [1, 9, 10, 11, 12, 13, 14, 15, 16, 2, 3, 4, 5, 6, 7, 8, 0, 24, 23, 22, 21, 20, 19, 18, 32, 31, 30, 29]
        .into_iter()
        .chain([28, 27, 26, 25, 17]);
    for (step, index) in jaw.enumerate() {
        let angle = std::f32::consts::PI * (1.0 - step as f32 / 32.0);
        points[index] = [50.0 + 20.0 * angle.cos(), 50.0 + 20.0 * angle.sin()];
    }
    for (step, index) in [101, 105, 104, 103, 102, 50, 51, 49, 48, 43].into_iter().enumerate() {
        points[index] = [68.0 - 4.0 * step as f32, 40.0];
    }
    let photo = RgbImage::from_fn(100, 100, |x, _| if x % 2 == 0 { Rgb([255, 90, 0]) } else { Rgb([55, 90, 0]) });
    let config = MaskConfig { size: 128 };
    let face = mask::id_image(&photo, &points, &config);
    // The box of the points is x 30..70, y 40..70: half-side 30, centre (50, 51.25).
    let at = |x: f32, y: f32| face.get_pixel(((x - 20.0) / 60.0 * 128.0) as u32, ((y - 21.25) / 60.0 * 128.0) as u32);
    assert_eq!((at(50.0, 55.0).0[2], at(24.0, 55.0).0, at(50.0, 26.0).0), (0, [127; 3], [127; 3]));
    let without = mask::base_image(&photo, &points, &config);
    assert!(without.get_pixel(50, 55).0[0].abs_diff(155) < 6, "{:?}", without.get_pixel(50, 55));
    assert_eq!(without.get_pixel(50, 90), photo.get_pixel(50, 90));
}
