//! Invalid model folders: each gives one error with the file and the remedy, and never a panic.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use data_prep::face::{FaceAnalyser, FaceConfig};
use hyperlora_core::config::ConfigPath;
use image::RgbImage;
use proptest::prelude::*;
use proptest::test_runner::RngSeed;

const PACK: [&str; 3] = ["scrfd_10g_bnkps.onnx", "glintr100.onnx", "2d106det.onnx"];

fn fixture(file: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/faces").join(file)
}

/// Makes a folder with the needed files of antelopev2.
fn pack() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for file in PACK {
        fs::copy(fixture("antelopev2").join(file), folder.path().join(file)).unwrap();
    }
    folder
}

fn load(folder: &Path) -> hyperlora_core::Result<FaceAnalyser> {
    FaceAnalyser::load(&FaceConfig { models: ConfigPath::new(folder), ..FaceConfig::default() }, Path::new(""))
}

fn refusal(folder: &Path) -> String {
    let error = load(folder).unwrap_err();
    assert_eq!(error.exit_code(), 2, "{error}");
    error.to_string()
}

#[test]
fn what_lies_in_a_models_place_is_named_with_its_remedy() {
    let whole = fs::read(fixture("antelopev2/glintr100.onnx")).unwrap();
    let pointer =
        "version https://git-lfs.github.com/spec/v1\noid sha256:4ab1d6435d639628a6f3e5008dd4f929edf4c4124b1a7169";
    for (bytes, problem, remedy) in [
        (&b""[..], "is empty", "fetch the file again"),
        (pointer.as_bytes(), "is a Git LFS pointer", "git lfs pull"),
        (b"\n<!DOCTYPE html><html>404</html>", "is an HTML or XML page", "download the file itself"),
        (b"PK\x03\x04 and so on", "is a ZIP archive", "unpack it"),
        (&whole[..whole.len() / 2], "ends early", "compare its size"),
        (&whole[..1], "ends early", "compare its size"),
        (b"\x08\x07", "holds no model graph", "compare its size"),
        (b"\x89PNG\r\n\x1a\n", "glintr100.onnx: ", "fetch the file again"),
    ] {
        let folder = pack();
        fs::write(folder.path().join("glintr100.onnx"), bytes).unwrap();
        let message = refusal(folder.path());
        assert!(message.contains("glintr100.onnx: ") && message.contains(problem), "{message}");
        assert!(message.contains(remedy), "{message}");
    }
}

#[test]
fn a_folder_without_a_role_says_which_and_what_it_holds() {
    for (file, what) in PACK.into_iter().zip(["a face detector", "an ID embedder", "a landmark model"]) {
        let folder = pack();
        fs::remove_file(folder.path().join(file)).unwrap();
        // A file with the right name and the wrong shape.
        fs::copy(fixture("antelopev2/genderage.onnx"), folder.path().join(file)).unwrap();
        let message = refusal(folder.path());
        assert!(message.contains("holds no file that is ") && message.contains(what), "{message}");
        assert!(message.contains(&format!("{file} takes data [?, 3, 96, 96] and gives fc1 [1, 3]")), "{message}");
        assert!(message.contains("name it with `"), "{message}");
    }
    let empty = tempfile::tempdir().unwrap();
    assert!(refusal(empty.path()).contains("holds no ONNX files"));
    assert!(refusal(&empty.path().join("nowhere")).contains("nowhere: cannot be read"));
    let folder = pack();
    fs::create_dir(folder.path().join("more.onnx")).unwrap();
    assert!(refusal(folder.path()).contains("more.onnx: is not a file"));
}

/// Encodes a protobuf field of bytes.
fn field(number: u8, content: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for mut number in [u64::from(number) << 3 | 2, content.len() as u64] {
        while number >= 0x80 {
            bytes.push(number as u8 | 0x80);
            number >>= 7;
        }
        bytes.push(number as u8);
    }
    [bytes, content.to_vec()].concat()
}

/// Encodes a tensor of one number that is stored in another file.
fn external_tensor(location: &str) -> Vec<u8> {
    let entry = [field(1, b"location"), field(2, location.as_bytes())].concat();
    // Fields: dims 1, FLOAT, name, external_data, EXTERNAL.
    [&[0x08, 1, 0x10, 1], &field(8, b"stray")[..], &field(13, &entry), &[0x70, 1]].concat()
}

#[test]
fn weights_are_read_from_the_models_own_folder_alone() {
    let whole = fs::read(fixture("antelopev2/glintr100.onnx")).unwrap();
    let outer = tempfile::tempdir().unwrap();
    let folder = outer.path().join("pack");
    fs::create_dir(&folder).unwrap();
    for file in PACK {
        fs::copy(fixture("antelopev2").join(file), folder.join(file)).unwrap();
    }
    for path in [outer.path().join("secret"), folder.join("weights.bin")] {
        fs::write(path, 1.0_f32.to_le_bytes()).unwrap();
    }
    symlink("../secret", folder.join("link.bin")).unwrap();
    let absolute = outer.path().join("secret").display().to_string();
    fs::create_dir_all(folder.join("*/_ORT_MEM_ADDR_")).unwrap();
    fs::write(folder.join("*/_ORT_MEM_ADDR_/*"), 1.0_f32.to_le_bytes()).unwrap();
    // Tensors in the graph, in a sparse tensor, in a node's attribute, in an attribute's graph, in a function and in
    // training info.
    let ways: [fn(Vec<u8>) -> Vec<u8>; 6] = [
        |tensor| field(7, &field(5, &tensor)),
        |tensor| field(7, &field(15, &field(1, &tensor))),
        |tensor| field(7, &field(1, &field(5, &field(5, &tensor)))),
        |tensor| field(7, &field(1, &field(5, &field(6, &field(5, &tensor))))),
        |tensor| field(25, &field(7, &field(5, &field(10, &tensor)))),
        |tensor| field(20, &field(1, &field(5, &tensor))),
    ];
    for way in ways {
        for location in ["../secret", &absolute, "link.bin", "nothing.bin", "*/_ORT_MEM_ADDR_/*"] {
            fs::write(folder.join("glintr100.onnx"), [way(external_tensor(location)), whole.clone()].concat()).unwrap();
            let message = refusal(&folder);
            assert!(message.contains(&format!("glintr100.onnx: keeps weights in `{location}`")), "{message}");
        }
    }
    // A graph in an attribute of a node of a graph, and so on.
    let deep =
        (0..40).fold(field(5, &external_tensor("weights.bin")), |graph, _| field(1, &field(5, &field(6, &graph))));
    fs::write(folder.join("glintr100.onnx"), [field(7, &deep), whole.clone()].concat()).unwrap();
    assert!(refusal(&folder).contains("has too many graphs within each other"));
    fs::write(folder.join("glintr100.onnx"), [ways[0](external_tensor("weights.bin")), whole].concat()).unwrap();
    load(&folder).unwrap();
}

#[test]
fn models_lie_in_the_folder_that_is_named() {
    let outer = tempfile::tempdir().unwrap();
    let outside = outer.path().join("glintr100.onnx");
    fs::copy(fixture("antelopev2/glintr100.onnx"), &outside).unwrap();
    let folder = pack();
    for name in [outside.to_str().unwrap(), "../glintr100.onnx"] {
        let models = ConfigPath::new(folder.path());
        let config = FaceConfig { models, embedder: Some(name.into()), ..FaceConfig::default() };
        let message = FaceAnalyser::load(&config, Path::new("")).unwrap_err().to_string();
        assert!(message.contains(&format!("`embedder: {name}` leads out of the models' folder")), "{message}");
    }
}

#[test]
fn no_library_beside_the_models_or_in_their_config_is_loaded() {
    let outer = tempfile::tempdir().unwrap();
    let folder = outer.path().join("models");
    fs::create_dir_all(outer.path().join("lib")).unwrap();
    fs::create_dir(&folder).unwrap();
    for file in PACK {
        fs::copy(fixture("antelopev2").join(file), folder.join(file)).unwrap();
    }
    let library = outer.path().join("lib/libonnxruntime.so");
    fs::write(&library, "no library").unwrap();
    let runtime = Some(library.display().to_string());
    let config = FaceConfig { models: ConfigPath::new(&folder), runtime, ..FaceConfig::default() };
    FaceAnalyser::load(&config, Path::new("")).unwrap();
}

/// Limits proptest to some tens of cases, the same ones every time: ONNX Runtime is not this project's code to fuzz for
/// long.
fn bounded() -> ProptestConfig {
    ProptestConfig { cases: 48, rng_seed: RngSeed::Fixed(3), failure_persistence: None, ..ProptestConfig::default() }
}

/// Checks that any content of a file gives an error, or models that answer or fail with a message.
fn survives(file: &str, bytes: &[u8]) {
    let folder = pack();
    fs::write(folder.path().join(file), bytes).unwrap();
    if let Ok(mut analyser) = load(folder.path()) {
        let photo = RgbImage::new(40, 30);
        let faces = analyser.detect(&photo).unwrap_or_default();
        for face in faces.iter().take(2) {
            let _answer_or_error = analyser.describe(&photo, face);
        }
    }
}

proptest! {
    #![proptest_config(bounded())]

    #[test]
    fn random_bytes_are_refused(bytes in prop::collection::vec(any::<u8>(), 0..4000)) {
        let folder = pack();
        fs::write(folder.path().join("glintr100.onnx"), &bytes).unwrap();
        let message = refusal(folder.path());
        prop_assert!(message.contains("remedy: "), "{}", message);
    }

    #[test]
    fn a_shortened_model_is_refused(file in prop::sample::select(&PACK[..]), part in 0.0..1.0_f64) {
        let folder = pack();
        let whole = fs::read(folder.path().join(file)).unwrap();
        fs::write(folder.path().join(file), &whole[..(whole.len() as f64 * part) as usize]).unwrap();
        let message = refusal(folder.path());
        prop_assert!(message.contains(file) && message.contains("remedy: "), "{}", message);
    }

    #[test]
    fn a_changed_model_answers_or_fails_in_words(
        file in prop::sample::select(&PACK[..]),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        early in any::<bool>(),
    ) {
        let mut bytes = fs::read(fixture("antelopev2").join(file)).unwrap();
        // The structure is in the first and last bytes; the weights between them can be anything.
        let reach = if early { 400 } else { bytes.len() };
        for (place, value) in changes {
            bytes[place.index(reach)] = value;
        }
        survives(file, &bytes);
    }
}
