//! Safetensors files: what is read back, and what each kind of broken file is told.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use burn::tensor::{DType, Device, Tensor, TensorData};
use burn_hyperlora::error::Error;
use burn_hyperlora::weights::{TensorEntry, Weights, config, save, save_lazily};
use tempfile::TempDir;

fn saved(tensors: &[(&str, TensorData)]) -> (TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    save(&path, tensors.iter().map(|(name, data)| (name.to_string(), data.clone()))).unwrap();
    (folder, path)
}

fn open(path: &Path) -> Weights {
    Weights::open(path, &Device::flex()).unwrap()
}

/// The message of opening a file with these bytes, which must be blamed on the file.
fn refusal(bytes: &[u8]) -> String {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    fs::write(&path, bytes).unwrap();
    let error = Weights::open(&path, &Device::flex()).unwrap_err();
    assert_eq!(error.exit_code(), 2);
    error.to_string()
}

fn with_header(header: &str, data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), data].concat()
}

#[test]
fn layers_come_back_as_they_were_saved() {
    let (_folder, path) = saved(&[
        ("a.proj.weight", TensorData::from([[1.0f32, 2.0, 3.0], [4.0, 5.0, 6.0]])),
        ("a.proj.bias", TensorData::from([10.0f32, 20.0])),
        ("a.norm.weight", TensorData::from([0.5f32, 1.5])),
        ("a.norm.bias", TensorData::from([0.0f32, -1.0])),
        ("table.weight", TensorData::from([[1.0f32], [2.0]])),
    ]);
    let weights = open(path.parent().unwrap());
    let part = weights.at("a");
    let linear = part.at("proj").linear(3, 2, true);
    let norm = part.at("norm").layer_norm(2, 1e-5);
    let table = weights.at("table").embedding(2, 1);
    weights.finish().unwrap();

    let x = Tensor::<2>::from_data([[1.0, 0.0, -1.0]], &Device::flex());
    assert_eq!(linear.forward(x).into_data(), TensorData::from([[8.0f32, 18.0]]));
    assert_eq!(norm.gamma.val().into_data(), TensorData::from([0.5f32, 1.5]));
    assert_eq!(table.weight.val().into_data(), TensorData::from([[1.0f32], [2.0]]));
}

#[test]
fn half_precision_is_widened() {
    let values = TensorData::from([1.0f32, -0.5, 3.0e-5]);
    let (_folder, path) =
        saved(&[("bf16", values.clone().convert_dtype(DType::BF16)), ("f16", values.convert_dtype(DType::F16))]);
    let weights = open(&path);
    let all = weights.at("");
    let read = [all.tensor("f16", [3]), all.tensor("bf16", [3])].map(|tensor: Tensor<1>| tensor.into_data());
    weights.finish().unwrap();
    for (data, tolerance) in read.iter().zip([1e-3, 1e-2]) {
        let data = data.as_slice::<f32>().unwrap();
        assert_eq!(data[..2], [1.0, -0.5]);
        assert!((data[2] / 3.0e-5 - 1.0).abs() < tolerance, "{data:?}");
    }
}

#[test]
fn equal_tensors_give_equal_bytes_in_any_order() {
    let a = ("a", TensorData::from([1.0f32]));
    let b = ("b", TensorData::from([2i64]));
    let (_one, first) = saved(&[a.clone(), b.clone()]);
    let (_two, second) = saved(&[b, a]);
    assert_eq!(fs::read(first).unwrap(), fs::read(second).unwrap());
}

#[test]
fn tensors_made_while_writing_give_the_same_file() {
    let tensors = [("a", TensorData::from([1.0f32, 2.0])), ("b", TensorData::from([3i64])), ("c", [4.0f32].into())];
    let (folder, eager) = saved(&tensors);
    let lazy = folder.path().join("lazy.safetensors");
    let entries =
        || tensors.iter().map(|(name, data)| TensorEntry::new(*name, data.dtype(), data.shape().to_vec()).unwrap());
    let write = |produce: &mut dyn FnMut(&TensorEntry) -> burn_hyperlora::Result<Vec<u8>>| {
        save_lazily(&lazy, BTreeMap::new(), entries().collect(), produce)
    };
    let bytes =
        |entry: &TensorEntry| tensors.iter().find(|(name, _)| *name == entry.name).unwrap().1.as_bytes().to_vec();
    let mut asked = Vec::new();
    write(&mut |entry| {
        asked.push(entry.name.clone());
        Ok(bytes(entry))
    })
    .unwrap();
    assert_eq!(asked, ["b", "a", "c"], "once each, in the order of the file");
    assert_eq!(fs::read(&eager).unwrap(), fs::read(&lazy).unwrap());

    // A failure in the middle, or a tensor of another size, leaves the file that stood there and nothing beside it.
    let failing = write(&mut |entry| match entry.name.as_str() {
        "a" => Err(Error::input("a", "cannot be made", "none")),
        _ => Ok(bytes(entry)),
    });
    assert_eq!(failing.unwrap_err().exit_code(), 2, "the error is that of the maker, not one of the disk");
    let misfit = write(&mut |entry| Ok(vec![0; bytes(entry).len() - 1])).unwrap_err().to_string();
    assert!(misfit.contains("b is given as 7 bytes"), "{misfit}");
    assert_eq!(fs::read(&eager).unwrap(), fs::read(&lazy).unwrap());
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2);

    let twice = || entries().chain(entries()).collect();
    assert!(save_lazily(&lazy, BTreeMap::new(), twice(), |entry| Ok(bytes(entry))).is_err());
}

#[test]
fn all_misfits_are_reported_at_once() {
    let (_folder, path) = saved(&[
        ("misshaped.weight", TensorData::from([[1.0f32, 2.0]])),
        ("integer", TensorData::from([1i64])),
        ("stray", TensorData::from([1.0f32])),
        ("known", TensorData::from([1.0f32])),
    ]);
    let weights = open(&path);
    let all = weights.at("");
    let linear = all.at("misshaped").linear(3, 1, false);
    assert_eq!(linear.weight.dims(), [3, 1], "building goes on with a placeholder");
    let _: Tensor<1> = all.tensor("integer", [1]);
    all.ignore("known");
    for index in 0..12 {
        let _: Tensor<2> = all.tensor(&format!("missing{index}"), [1 << 40, 1 << 20]);
    }
    let message = weights.finish().unwrap_err().to_string();
    assert!(message.contains("15 tensors"), "{message}");
    assert!(message.contains("misshaped.weight: shape [1, 2], expected [1, 3]"), "{message}");
    assert!(message.contains("integer: type I64"), "{message}");
    assert!(message.contains("missing7: missing") && !message.contains("missing8"), "{message}");
    assert!(message.contains("and 5 more"), "{message}");

    let weights = open(&path);
    for name in ["misshaped.weight", "integer", "known"] {
        weights.at("").ignore(name);
    }
    assert!(weights.finish().unwrap_err().to_string().contains("stray: not a part of this model"));
}

#[test]
fn files_of_other_kinds_are_named() {
    assert!(refusal(b"PK\x03\x04 archive/data.pkl").contains("PyTorch pickle"));
    assert!(refusal(b"\x80\x02}q\x00.  ").contains("Python pickle"));
    assert!(refusal(b"<!DOCTYPE html><html>").contains("web page"));
    assert!(refusal(b"version https://git-lfs.github.com/spec/v1").contains("LFS"));
    assert!(refusal(b"abc").contains("ends after 3 bytes"));
    assert!(refusal(b"").contains("ends after 0 bytes"));
}

#[test]
fn headers_that_lie_are_refused() {
    assert!(
        refusal(&[&u64::MAX.to_le_bytes()[..], b"{}"].concat()).contains("claims a header of 18446744073709551615")
    );
    assert!(refusal(&with_header("not json", b"")).contains("header that does not hold"));
    let tensor =
        |shape: &str, offsets: &str| format!(r#"{{"t":{{"dtype":"F32","shape":{shape},"data_offsets":{offsets}}}}}"#);
    assert!(refusal(&with_header(&tensor("[2]", "[0,8]"), b"1234")).contains("its header tells of 8"));
    assert!(refusal(&with_header(&tensor("[1]", "[0,4]"), b"12345678")).contains("has 8 bytes of tensors"));
    assert!(refusal(&with_header(&tensor("[3]", "[0,8]"), b"12345678")).contains("header that does not hold"));
    assert!(refusal(&with_header(&tensor("[2]", "[8,0]"), b"12345678")).contains("header that does not hold"));
    let huge = tensor("[4611686018427387904,4]", "[0,0]");
    assert!(refusal(&with_header(&huge, b"")).contains("header that does not hold"));
}

#[test]
fn missing_places_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let absent = Weights::open(&folder.path().join("no.safetensors"), &Device::flex()).unwrap_err();
    assert!(absent.exit_code() == 2 && absent.to_string().contains("no.safetensors"));
    let empty = Weights::open(folder.path(), &Device::flex()).unwrap_err();
    assert!(empty.exit_code() == 2 && empty.to_string().contains("diffusion_pytorch_model.safetensors"));
}

#[test]
fn a_broken_config_tells_the_line() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("config.json"), "{\n  \"width\": \"wide\"\n}").unwrap();
    let problem = config::<std::collections::BTreeMap<String, usize>>(folder.path()).unwrap_err();
    let message = problem.to_string();
    assert!(message.contains("config.json") && message.contains("line 2"), "{message}");
}
