//! LoRA files as the tools write them: the same updates in every way of writing, and what is wrong with a file by name.
//! `ci/parity/lora_fixtures.py` made the files.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use burn::tensor::{Device, TensorData};
use burn_hyperlora::lora_file::{self, BaseNames, LoraFile};
use burn_hyperlora::sdxl::base_source::{BaseSource, Part, PartUpdates};
use burn_hyperlora::weights::{SafetensorsFile, Weights, save, save_with_metadata};

fn device() -> Device {
    Device::flex()
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_path_buf()
}

fn base() -> PathBuf {
    root().join("experiments/quickstart/base")
}

fn fixture(name: &str) -> PathBuf {
    root().join("burn-hyperlora/tests/fixtures/loras").join(name).with_extension("safetensors")
}

fn names() -> BaseNames {
    BaseNames::of(&BaseSource::open(&base(), None, None).unwrap()).unwrap()
}

/// Every weight that `updates` changes, with the changes.
fn changed(updates: &PartUpdates) -> BTreeMap<String, TensorData> {
    let mut found = BTreeMap::new();
    for (part, updates) in updates {
        let folder = part.folder();
        let weights = Weights::open(&base().join(folder), &device()).unwrap().with_updates(updates.clone());
        for name in updates.keys() {
            let shape = weights.shapes()[name.as_str()].to_vec();
            let data = match <[usize; 4]>::try_from(shape.as_slice()) {
                Ok(shape) => weights.at("").tensor(name, shape).into_data(),
                Err(_) => weights.at("").tensor(name, [shape[0], shape[1]]).into_data(),
            };
            found.insert(format!("{folder}.{name}"), data);
        }
    }
    found
}

fn updates(files: &[(&str, f32)]) -> PartUpdates {
    let loras: Vec<_> = files.iter().map(|(name, weight)| (LoraFile::open(&fixture(name)).unwrap(), *weight)).collect();
    lora_file::sum(&loras, &names()).unwrap()
}

#[test]
fn every_way_of_writing_makes_the_same_weights() {
    let expected = changed(&updates(&[("kohya", 1.0)]));
    assert_eq!(expected.len(), 20);
    for name in ["sgm", "peft", "diffusers_old"] {
        assert!(changed(&updates(&[(name, 1.0)])) == expected, "{name}");
    }
    assert!(changed(&updates(&[("kohya", 0.5)])) != expected);
}

#[test]
fn a_linear_layer_is_made_whichever_way_it_is_read() {
    let name = "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj";
    let open = || Weights::open(&base().join("unet"), &device()).unwrap();
    let [rows, columns] = <[usize; 2]>::try_from(open().shapes()[format!("{name}.weight").as_str()]).unwrap();
    let weights = open().with_updates(updates(&[("kohya", 1.0)])[&Part::Unet].clone());
    let stored = weights.at(name).tensor("weight", [rows, columns]).transpose();
    let linear = weights.at(name).linear(columns, rows, true);
    assert_eq!(linear.weight.val().into_data(), stored.clone().into_data());
    let halves = weights.at(name).linear_halves(columns, rows / 2);
    for (half, layer) in halves.into_iter().enumerate() {
        let expected = stored.clone().narrow(1, half * rows / 2, rows / 2);
        assert_eq!(layer.weight.val().into_data(), expected.into_data(), "half {half}");
    }
    assert_ne!(stored.into_data(), open().at(name).tensor("weight", [rows, columns]).transpose().into_data());
}

#[test]
fn several_loras_add_up() {
    let name = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.weight";
    let of = |files: &[(&str, f32)]| changed(&updates(files))[name].clone().try_to_vec::<f32>().unwrap();
    let nothing = of(&[("kohya", 0.0)]);
    let [first, second, both] =
        [of(&[("kohya", 0.8)]), of(&[("second", -0.5)]), of(&[("kohya", 0.8), ("second", -0.5)])];
    for (((first, second), both), nothing) in first.iter().zip(&second).zip(&both).zip(&nothing) {
        assert!((first + second - nothing - both).abs() < 1e-6);
    }
    assert!(first != both && second != both);
}

/// The tensors of the kohya file, changed by `edit`, in a new file.
fn edited(folder: &Path, edit: impl Fn(&mut BTreeMap<String, TensorData>)) -> PathBuf {
    let source = SafetensorsFile::open(&fixture("kohya")).unwrap();
    let mut tensors = BTreeMap::new();
    for entry in source.entries() {
        let values = Weights::open(&fixture("kohya"), &device()).unwrap();
        let data = match entry.shape.as_slice() {
            [] => TensorData::new(vec![values.at("").scalar(&entry.name)], Vec::<usize>::new()),
            [a, b] => values.at("").tensor(&entry.name, [*a, *b]).into_data(),
            shape => values.at("").tensor(&entry.name, <[usize; 4]>::try_from(shape).unwrap()).into_data(),
        };
        tensors.insert(entry.name, data);
    }
    edit(&mut tensors);
    let path = folder.join("edited.safetensors");
    save(&path, tensors).unwrap();
    path
}

/// The message with which a file is refused.
fn refusal(path: &Path) -> String {
    let mut updates = PartUpdates::new();
    let error = LoraFile::open(path).and_then(|lora| lora.add_to(&mut updates, &names(), 1.0)).unwrap_err();
    assert_eq!(error.exit_code(), 2, "{error}");
    error.to_string()
}

#[test]
fn what_is_wrong_with_a_file_is_named() {
    const Q: &str = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q";
    let folder = tempfile::tempdir().unwrap();
    let tensor = |shape: &[usize]| TensorData::new(vec![0.5f32; shape.iter().product()], shape.to_vec());
    let with = |name: String, shape: &[usize]| {
        edited(folder.path(), |tensors| _ = tensors.insert(name.clone(), tensor(shape)))
    };
    let without = |name: String| edited(folder.path(), |tensors| _ = tensors.remove(&name).unwrap());
    let cases = [
        (refusal(&with(format!("{Q}.dora_scale"), &[48, 1])), "DoRA"),
        (refusal(&with(format!("{Q}.hada_w1_a"), &[48, 2])), "LoHa"),
        (refusal(&with(format!("{Q}.lokr_w1"), &[4, 4])), "LoKr"),
        (refusal(&with(format!("{Q}.lora_mid.weight"), &[2, 2, 3, 3])), "lora_mid"),
        (refusal(&with("lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight".into(), &[2, 8])), "Flux"),
        (refusal(&with("lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight".into(), &[2, 8])), "matrices"),
        (refusal(&with("model.weight".into(), &[2, 8])), "model.weight: no tensor of a LoRA"),
        (refusal(&without(format!("{Q}.lora_up.weight"))), "lacks one of its two matrices"),
        (refusal(&with(format!("{Q}.lora_up.weight"), &[48, 3])), "shape [48, 3], expected [48, 4]"),
        (refusal(&with(format!("{Q}.lora_down.weight"), &[4, 47])), "shape [4, 47], expected [4, 48]"),
        (refusal(&with(format!("{Q}.lora_down.weight"), &[0, 48])), "shape [0, 48]"),
        (refusal(&with(format!("{Q}.alpha"), &[2])), "alpha: no finite number"),
    ];
    for (message, part) in cases {
        assert!(message.contains(part), "{part}: {message}");
    }

    // A whole LoRA of Stable Diffusion 1.5: its first blocks have attention, SDXL's have none.
    let sd15 = edited(folder.path(), |tensors| {
        tensors.clear();
        for module in 0..12 {
            let name = format!("lora_unet_down_blocks_0_attentions_{module}_proj_in");
            tensors.insert(format!("{name}.lora_down.weight"), tensor(&[2, 320]));
            tensors.insert(format!("{name}.lora_up.weight"), tensor(&[320, 2]));
        }
    });
    let message = refusal(&sd15);
    for part in ["12 modules", "down_blocks_0_attentions_0_proj_in: the base has no such module", "and 2 more"] {
        assert!(message.contains(part), "{part}: {message}");
    }

    let infinite = edited(folder.path(), |tensors| {
        tensors.insert(format!("{Q}.lora_up.weight"), TensorData::new(vec![f32::INFINITY; 48 * 4], [48, 4]));
    });
    assert!(refusal(&infinite).contains("not finite"));
    let empty = edited(folder.path(), BTreeMap::clear);
    assert!(refusal(&empty).contains("holds no LoRA"));
    let path = folder.path().join("metadata.safetensors");
    let metadata = [("lora_adapter_metadata".to_owned(), "{".to_owned())].into();
    let pair = [("unet.conv_in.lora_A.weight", [1, 4, 3, 3]), ("unet.conv_in.lora_B.weight", [32, 1, 1, 1])];
    let pair = pair.map(|(name, shape)| (name.to_owned(), tensor(&shape)));
    save_with_metadata(&path, metadata, pair).unwrap();
    assert!(refusal(&path).contains("lora_adapter_metadata"));
    fs::write(&path, "<!DOCTYPE html>").unwrap();
    assert!(refusal(&path).contains("web page"));
}
