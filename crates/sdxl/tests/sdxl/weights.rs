//! Safetensors files: round trips, and the error message for each kind of broken file.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use burn::tensor::{DType, Device, FloatDType, Tensor, TensorData};
use hyperlora_core::Error;
use hyperlora_sdxl::weights::{SafetensorsFile, TensorEntry, Weights, config, save, save_lazily};
use safetensors::Dtype;
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

/// Returns the error message for a file with these bytes, which must be an input error.
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
    let write = |produce: &mut dyn FnMut(&TensorEntry) -> hyperlora_core::Result<Vec<u8>>| {
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

    // A failure in the middle, or a tensor of another size, leaves the previous file intact and no other file.
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
    assert!(refusal(b"GGUF\x03\x00\x00\x00").contains("GGUF"));
    assert!(refusal(b"abc").contains("ends after 3 bytes"));
    assert!(refusal(b"").contains("ends after 0 bytes"));
}

#[test]
fn a_header_may_be_as_long_as_a_pickle_begins() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    let header = r#"{"t":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#;
    // The header length's first two bytes equal those of a pickle or of a web page.
    for magic in [*b"\x80\x02", *b"\x80\x03", *b"\x80\x04", *b"\x80\x05", *b"<!", *b"<h"] {
        let length = usize::from(u16::from_le_bytes(magic));
        fs::write(&path, with_header(&format!("{header:<length$}"), &2.0_f32.to_le_bytes())).unwrap();
        let weights = open(&path);
        assert_eq!(weights.at("").tensor::<1>("t", [1]).into_scalar::<f32>(), 2.0, "{length}");
    }
}

#[test]
fn headers_that_lie_are_refused() {
    assert!(
        refusal(&[&u64::MAX.to_le_bytes()[..], b"{}"].concat()).contains("claims a header of 18446744073709551615")
    );
    assert!(refusal(&with_header("not json", b"")).contains("invalid header"));
    let tensor =
        |shape: &str, offsets: &str| format!(r#"{{"t":{{"dtype":"F32","shape":{shape},"data_offsets":{offsets}}}}}"#);
    assert!(refusal(&with_header(&tensor("[2]", "[0,8]"), b"1234")).contains("its header describes 8"));
    assert!(refusal(&with_header(&tensor("[1]", "[0,4]"), b"12345678")).contains("has 8 bytes of tensors"));
    assert!(refusal(&with_header(&tensor("[3]", "[0,8]"), b"12345678")).contains("invalid header"));
    assert!(refusal(&with_header(&tensor("[2]", "[8,0]"), b"12345678")).contains("invalid header"));
    let huge = tensor("[4611686018427387904,4]", "[0,0]");
    assert!(refusal(&with_header(&huge, b"")).contains("invalid header"));
}

#[test]
fn missing_places_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let absent = Weights::open(&folder.path().join("no.safetensors"), &Device::flex()).unwrap_err();
    assert!(absent.exit_code() == 2 && absent.to_string().contains("no.safetensors"));
    let empty = Weights::open(folder.path(), &Device::flex()).unwrap_err();
    assert!(empty.exit_code() == 2 && empty.to_string().contains("holds no diffusion_pytorch_model"));
}

#[test]
fn a_broken_config_tells_the_line() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("config.json"), "{\n  \"width\": \"wide\"\n}").unwrap();
    let problem = config::<std::collections::BTreeMap<String, usize>>(folder.path()).unwrap_err();
    let message = problem.to_string();
    assert!(message.contains("config.json") && message.contains("line 2"), "{message}");
}

#[test]
fn a_config_may_hold_what_python_writes() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("config.json");
    let read = || config::<std::collections::BTreeMap<String, serde_json::Value>>(folder.path());
    fs::write(&path, "\u{feff}{\"a\": -Infinity, \"b\": [NaN]}").unwrap();
    assert_eq!(read().unwrap()["a"], "-Infinity");
    fs::write(&path, "{\n\"a\": Infinity}").unwrap();
    let message = config::<std::collections::BTreeMap<String, f64>>(folder.path()).unwrap_err().to_string();
    assert!(message.contains("config.json") && message.contains("Infinity") && message.contains("line 2"), "{message}");

    fs::remove_file(&path).unwrap();
    std::os::unix::fs::symlink("/dev/zero", &path).unwrap();
    assert!(read().unwrap_err().to_string().contains("not a regular file"));
    fs::remove_file(&path).unwrap();
    assert!(std::process::Command::new("mkfifo").arg(&path).status().unwrap().success());
    assert!(read().unwrap_err().to_string().contains("not a regular file"));
    let pipe = SafetensorsFile::open(&path).unwrap_err().to_string();
    assert!(pipe.contains("not a regular file"), "{pipe}");
}

#[test]
fn fp8_and_doubles_are_read_in_any_form() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    // 1, -1.5, 0.5: an odd number of bytes, more than one conversion chunk.
    let (rows, columns) = (257, 259);
    let value = |index: usize| [1.0_f32, -1.5, 0.5][index * index % 3];
    let write = |dtype: Dtype, bytes: &dyn Fn(f32) -> Vec<u8>| {
        let entry = TensorEntry { name: "a.weight".into(), dtype, shape: vec![rows, columns] };
        let all: Vec<u8> = (0..rows * columns).flat_map(|index| bytes(value(index))).collect();
        save_lazily(&path, BTreeMap::new(), vec![entry], |_| Ok(all.clone())).unwrap();
    };
    let read = || {
        let weights = open(&path);
        let data = weights.at("a").linear(columns, rows, false).weight.val().transpose().into_data();
        assert_eq!(data, weights.at("").tensor("a.weight", [rows, columns]).into_data());
        weights.finish().unwrap();
        data
    };
    write(Dtype::F32, &|value| value.to_le_bytes().to_vec());
    let expected = read();
    write(Dtype::F64, &|value| f64::from(value).to_le_bytes().to_vec());
    assert_eq!(read(), expected);
    let bits =
        |codes: [u8; 3]| move |value: f32| vec![codes[[1.0, -1.5, 0.5].iter().position(|v| *v == value).unwrap()]];
    write(Dtype::F8_E4M3, &bits([0x38, 0xbc, 0x30]));
    assert_eq!(read(), expected);
    write(Dtype::F8_E5M2, &bits([0x3c, 0xbe, 0x38]));
    assert_eq!(read(), expected);
    write(Dtype::F8_E4M3, &|_| vec![0x7f]);
    let weights = open(&path);
    weights.at("").tensor::<2>("a.weight", [rows, columns]);
    assert!(weights.finish().unwrap_err().to_string().contains("not finite"));
    write(Dtype::F8_E8M0, &|_| vec![0x7f]);
    let weights = open(&path);
    weights.at("").tensor::<2>("a.weight", [rows, columns]);
    let message = weights.finish().unwrap_err().to_string();
    assert!(message.contains("type F8_E8M0, which is not read") && message.contains("other types"), "{message}");
}

/// Creates a linear layer's tensors with odd sizes, larger than one conversion chunk.
fn odd_linear(columns: usize) -> (Vec<(&'static str, TensorData)>, Vec<f32>) {
    let rows = 311;
    let values: Vec<f32> = (0..rows * columns).map(|index| (index % 251) as f32 - 125.0).collect();
    let weight = TensorData::new(values.clone(), [rows, columns]);
    (vec![("weight", weight), ("bias", TensorData::zeros::<f32, _>([rows]))], values)
}

#[test]
fn any_type_becomes_the_one_asked_for_and_is_transposed_exactly() {
    // 70000 columns exceed one read.
    for columns in [1, 457, 70_000] {
        let (tensors, values) = odd_linear(columns);
        for stored in [DType::F32, DType::F16, DType::BF16] {
            let converted: Vec<_> =
                tensors.iter().map(|(name, data)| (*name, data.clone().convert_dtype(stored))).collect();
            let (_folder, path) = saved(&converted);
            for (dtype, wanted) in [(FloatDType::F32, DType::F32), (FloatDType::BF16, DType::BF16)] {
                let weights = open(&path).with_dtype(dtype);
                let linear = weights.at("").linear(columns, 311, true);
                let whole: Tensor<2> = weights.at("").tensor("weight", [311, columns]);
                weights.finish().unwrap();
                assert!([linear.weight.dtype(), whole.dtype()].iter().all(|&dtype| dtype == wanted));
                let whole = whole.into_data().convert_dtype(DType::F32);
                assert!(whole.as_slice::<f32>().unwrap() == values, "{stored:?} to {wanted:?}");
                let turned = linear.weight.val().swap_dims(0, 1).into_data().convert_dtype(DType::F32);
                assert!(turned.as_slice::<f32>().unwrap() == values, "{stored:?} to {wanted:?}, transposed");
            }
        }
    }
}

#[test]
fn halves_of_a_linear_are_its_rows() {
    let (tensors, values) = odd_linear(4);
    let rows = |data: &TensorData| TensorData::new(data.as_slice::<f32>().unwrap()[..310 * 4].to_vec(), [310, 4]);
    let bias = TensorData::new((0..310).map(|index| index as f32).collect::<Vec<_>>(), [310]);
    let (_folder, path) = saved(&[("weight", rows(&tensors[0].1)), ("bias", bias)]);
    let weights = open(&path);
    let [value, gate] = weights.at("").linear_halves(4, 155);
    weights.finish().unwrap();
    for (half, linear) in [value, gate].into_iter().enumerate() {
        let turned = linear.weight.val().swap_dims(0, 1).into_data();
        assert_eq!(turned.as_slice::<f32>().unwrap(), &values[half * 620..(half + 1) * 620]);
        let bias = linear.bias.unwrap().val().into_data();
        assert_eq!(bias.as_slice::<f32>().unwrap()[..2], [half as f32 * 155.0, half as f32 * 155.0 + 1.0]);
    }
}

#[test]
fn values_that_are_not_finite_are_refused() {
    let (_folder, path) =
        saved(&[("nan", TensorData::from([1.0f32, f32::NAN])), ("wide", TensorData::from([f32::MAX]))]);
    let weights = open(&path).with_dtype(FloatDType::BF16);
    let _: Tensor<1> = weights.at("").tensor("nan", [2]);
    let _: Tensor<1> = weights.at("").tensor("wide", [1]);
    let message = weights.finish().unwrap_err().to_string();
    assert!(message.contains("nan: holds values that are not finite"), "{message}");
    assert!(message.contains("wide: holds values that are not finite"), "{message}");
}

/// Writes shards of one tensor each, named for `variant`, and their index.
fn sharded(folder: &Path, index: &str, infix: &str) {
    for (shard, name) in ["a", "b"].into_iter().enumerate() {
        let file = format!("model{infix}-0000{}-of-00002.safetensors", shard + 1);
        save(&folder.join(file), [(name.to_owned(), TensorData::from([shard as f32 + 1.0]))]).unwrap();
    }
    let map = [("a", 1), ("b", 2)]
        .map(|(name, shard)| format!(r#""{name}":"model{infix}-0000{shard}-of-00002.safetensors""#));
    fs::write(folder.join(index), format!(r#"{{"metadata":{{"total_size":8}},"weight_map":{{{}}}}}"#, map.join(",")))
        .unwrap();
}

fn values_in(folder: &Path, variant: Option<&str>) -> [f32; 2] {
    let weights = Weights::open_variant(folder, variant, &Device::flex()).unwrap();
    let values = ["a", "b"].map(|name| weights.at("").tensor::<1>(name, [1]).into_scalar::<f32>());
    weights.finish().unwrap();
    values
}

#[test]
fn shards_are_one_model() {
    let folder = tempfile::tempdir().unwrap();
    let index = "model.safetensors.index.json";
    sharded(folder.path(), index, "");
    assert_eq!(values_in(folder.path(), None), [1.0, 2.0]);
    // `total_size` is unused, and some tools divide it before writing it.
    let text = fs::read_to_string(folder.path().join(index)).unwrap();
    for metadata in ["{\"total_size\":8.0}", "{\"total_size\":NaN}", "null", "\"8\""] {
        let other = text.replace("{\"total_size\":8}", metadata);
        assert_ne!(other, text);
        fs::write(folder.path().join(index), other).unwrap();
        assert_eq!(values_in(folder.path(), None), [1.0, 2.0], "{metadata}");
    }
}

#[test]
fn a_variant_is_preferred_where_it_is_there() {
    for index in ["model.safetensors.index.fp16.json", "model.fp16.safetensors.index.json"] {
        let folder = tempfile::tempdir().unwrap();
        sharded(folder.path(), index, ".fp16");
        // The only variant is used, requested or not.
        assert_eq!(values_in(folder.path(), None), [1.0, 2.0]);
        let plain = ["a", "b"].map(|name| (name.to_owned(), TensorData::from([5.0f32])));
        save(&folder.path().join("model.safetensors"), plain).unwrap();
        assert_eq!(values_in(folder.path(), None), [5.0, 5.0]);
        assert_eq!(values_in(folder.path(), Some("fp16")), [1.0, 2.0]);
        assert_eq!(values_in(folder.path(), Some("bf16")), [5.0, 5.0]);
    }
}

#[test]
fn shards_that_do_not_fit_their_index_are_refused() {
    let index = "model.safetensors.index.json";
    let refusal = |spoil: &dyn Fn(&Path)| {
        let folder = tempfile::tempdir().unwrap();
        sharded(folder.path(), index, "");
        spoil(folder.path());
        let error = Weights::open(folder.path(), &Device::flex()).unwrap_err();
        assert_eq!(error.exit_code(), 2);
        error.to_string()
    };
    let second = "model-00002-of-00002.safetensors";
    let message = refusal(&|folder| fs::remove_file(folder.join(second)).unwrap());
    assert!(message.contains(index) && message.contains(second) && message.contains("not beside it"), "{message}");
    let message = refusal(&|folder| {
        let whole = fs::read(folder.join(second)).unwrap();
        fs::write(folder.join(second), &whole[..whole.len() - 1]).unwrap();
    });
    assert!(message.contains(second) && message.contains("its header describes 4"), "{message}");
    let message = refusal(&|folder| {
        save(&folder.join(second), [("c".to_owned(), TensorData::from([1.0f32]))]).unwrap();
    });
    assert!(message.contains("tensors that the shards lack, 1 in all") && message.contains("b in model"), "{message}");
    let message = refusal(&|folder| {
        let two = ["b", "c"].map(|name| (name.to_owned(), TensorData::from([1.0f32])));
        save(&folder.join(second), two).unwrap();
    });
    assert!(message.contains("lacks tensors of its shards") && message.contains("c in model"), "{message}");
    let message = refusal(&|folder| {
        fs::write(folder.join(index), r#"{"weight_map":{"a":"../model.safetensors"}}"#).unwrap();
    });
    assert!(message.contains("not a plain file name"), "{message}");
    let message = refusal(&|folder| fs::write(folder.join(index), "<html>").unwrap());
    assert!(message.contains("not an index of shards"), "{message}");
}

#[test]
fn a_file_can_be_copied_tensor_by_tensor() {
    let (_folder, path) = saved(&[("narrow", TensorData::from([1u8, 2])), ("wide", TensorData::from([[3i64], [4]]))]);
    let file = SafetensorsFile::open(&path).unwrap();
    let entries: Vec<_> = file.entries().map(|entry| (entry.name, entry.dtype, entry.shape)).collect();
    assert_eq!(entries, [("wide".into(), Dtype::I64, vec![2, 1]), ("narrow".into(), Dtype::U8, vec![2])]);
    assert_eq!(file.metadata()["format"], "pt");
    assert_eq!(file.read_raw("narrow").unwrap(), [1, 2]);
    assert_eq!(file.read_raw("wide").unwrap(), [3i64.to_le_bytes(), 4i64.to_le_bytes()].concat());
    assert_eq!(file.read_raw("absent").unwrap_err().exit_code(), 1);
}

#[test]
fn names_and_shapes_alone_check_a_model() {
    let list = |width| [("weight".to_owned(), vec![width, 1 << 40]), ("bias".to_owned(), vec![1 << 40])];
    let weights = Weights::without_data(list(1 << 40));
    assert_eq!(weights.at("").linear(1 << 40, 1 << 40, true).weight.dims(), [1 << 40, 1 << 40]);
    weights.finish().unwrap();
    let weights = Weights::without_data(list(3));
    let _ = weights.at("").linear(1 << 40, 1 << 40, true);
    assert!(weights.finish().unwrap_err().to_string().contains("weight: shape [3, 1099511627776]"));
}
