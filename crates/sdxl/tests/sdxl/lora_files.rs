//! LoRA files of all tools: every layout gives the same updates, and errors name what is wrong with a file.
//! `ci/parity/lora_fixtures.py` made the files.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use burn::tensor::{Device, TensorData};
use hyperlora_sdxl::lora::file::{BaseNames, LoraFile, sum};
use hyperlora_sdxl::source::{BaseSource, Component, ComponentUpdates};
use hyperlora_sdxl::weights::{SafetensorsFile, TensorEntry, Weights, save, save_lazily, save_with_metadata};
use safetensors::Dtype;

fn device() -> Device {
    Device::flex()
}

fn base() -> PathBuf {
    hyperlora_testing::repository().join("experiments/quickstart/base")
}

fn fixture(name: &str) -> PathBuf {
    hyperlora_testing::fixture("loras").join(name).with_extension("safetensors")
}

fn names() -> BaseNames {
    BaseNames::of(&BaseSource::open(&base(), None, None).unwrap()).unwrap()
}

/// Reads every weight that `updates` changes, with the changes.
fn changed(updates: &ComponentUpdates) -> BTreeMap<String, TensorData> {
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

fn updates(files: &[(&str, f32)]) -> ComponentUpdates {
    let loras: Vec<_> = files.iter().map(|(name, weight)| (LoraFile::open(&fixture(name)).unwrap(), *weight)).collect();
    sum(&loras, &names()).unwrap()
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
    let weights = open().with_updates(updates(&[("kohya", 1.0)])[&Component::Unet].clone());
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

/// Writes the tensors of the kohya file, changed by `edit`, to a new file.
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

/// Returns the error message for a rejected file.
fn refusal(path: &Path) -> String {
    let mut updates = ComponentUpdates::new();
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
        (refusal(&with(format!("{Q}.alpha"), &[2])), "alpha: holds 2 numbers, one is needed"),
        (refusal(&with(format!("{Q}.diff"), &[48, 48])), "a full difference of weights"),
        (refusal(&with("base_model.model.text_model.a.lora_A.weight".into(), &[2, 8])), "belongs to a text encoder"),
    ];
    for (message, part) in cases {
        assert!(message.contains(part), "{part}: {message}");
    }

    // A complete LoRA of Stable Diffusion 1.5: its first blocks have attention, SDXL's have none.
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

type Raw = (Dtype, Vec<usize>, Vec<u8>);

/// Writes a file of these tensors, of any types.
fn raw(folder: &Path, tensors: &BTreeMap<String, Raw>) -> PathBuf {
    let path = folder.join("raw.safetensors");
    let entries = tensors
        .iter()
        .map(|(name, (dtype, shape, _))| TensorEntry { name: name.clone(), dtype: *dtype, shape: shape.clone() })
        .collect();
    save_lazily(&path, BTreeMap::new(), entries, |entry| Ok(tensors[&entry.name].2.clone())).unwrap();
    path
}

fn made_by(path: &Path) -> BTreeMap<String, TensorData> {
    changed(&sum(&[(LoraFile::open(path).unwrap(), 1.0)], &names()).unwrap())
}

fn f32s(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

#[test]
fn alphas_may_be_of_any_type() {
    let folder = tempfile::tempdir().unwrap();
    let source = SafetensorsFile::open(&fixture("kohya")).unwrap();
    let with_alphas = |dtype: Dtype, bytes: &[u8]| {
        let tensors = source.entries().map(|TensorEntry { name, dtype: own, shape }| {
            let stored = source.read_raw(&name).unwrap();
            let alpha = name.ends_with(".alpha");
            (name, if alpha { (dtype, vec![1], bytes.to_vec()) } else { (own, shape, stored) })
        });
        made_by(&raw(folder.path(), &tensors.collect()))
    };
    let expected = with_alphas(Dtype::F32, &f32s(&[3.0]));
    assert!(with_alphas(Dtype::F32, &f32s(&[2.0])) != expected);
    assert!(with_alphas(Dtype::I64, &3_i64.to_le_bytes()) == expected);
    assert!(with_alphas(Dtype::I32, &3_i32.to_le_bytes()) == expected);
    assert!(with_alphas(Dtype::F64, &3_f64.to_le_bytes()) == expected);
    assert!(with_alphas(Dtype::U8, &[3]) == expected);
}

#[test]
fn one_module_is_the_same_under_every_name() {
    const DIFFUSERS: &str = "down_blocks.1.attentions.0.transformer_blocks.0.attn1";
    const STABILITY: &str = "input_blocks.4.1.transformer_blocks.0.attn1";
    let folder = tempfile::tempdir().unwrap();
    let numbers = |seed: usize| (0..4 * 48).map(|i| ((i * i * 7 + seed) as f32 * 0.3).sin()).collect::<Vec<_>>();
    let pair = |down: &str, up: &str| {
        BTreeMap::from([
            (down.to_owned(), (Dtype::F32, vec![4, 48], f32s(&numbers(1)))),
            (up.to_owned(), (Dtype::F32, vec![48, 4], f32s(&numbers(2)))),
        ])
    };
    let of = |module: &str, down: &str, up: &str| {
        let tensors = pair(&format!("{module}{down}"), &format!("{module}{up}"));
        made_by(&raw(folder.path(), &tensors))
    };
    let flat = format!("lora_unet_{}_to_q", DIFFUSERS.replace('.', "_"));
    let expected = of(&flat, ".lora_down.weight", ".lora_up.weight");
    assert_eq!(expected.len(), 1);
    for (module, down, up) in [
        (format!("unet.{DIFFUSERS}.to_q"), ".lora_A.weight", ".lora_B.weight"),
        (format!("base_model.model.{DIFFUSERS}.to_q"), ".lora_A.weight", ".lora_B.weight"),
        (format!("base_model.model.{DIFFUSERS}.to_q"), ".lora_A.default.weight", ".lora_B.default.weight"),
        (format!("unet.base_model.model.{DIFFUSERS}.to_q"), ".lora_A.anna.weight", ".lora_B.anna.weight"),
        (format!("model.diffusion_model.{STABILITY}.to_q"), ".lora_down.weight", ".lora_up.weight"),
        (format!("diffusion_model.{STABILITY}.to_q"), ".lora_A.weight", ".lora_B.weight"),
        (format!("{DIFFUSERS}.processor.to_q"), "_lora.down.weight", "_lora.up.weight"),
        (format!("unet.{DIFFUSERS}.processor.to_q"), "_lora.down.weight", "_lora.up.weight"),
        (format!("{DIFFUSERS}.to_q"), ".lora.down.weight", ".lora.up.weight"),
    ] {
        assert!(of(&module, down, up) == expected, "{module}{down}");
    }

    // Bundled embeddings are skipped; a second adapter is an error.
    let mut tensors = pair(&format!("{flat}.lora_down.weight"), &format!("{flat}.lora_up.weight"));
    for part in ["clip_l", "clip_g"] {
        tensors.insert(format!("bundle_emb.anna.{part}"), (Dtype::F32, vec![2], f32s(&[1.0, 2.0])));
    }
    assert!(made_by(&raw(folder.path(), &tensors)) == expected);
    tensors.retain(|name, _| name.starts_with("bundle_emb"));
    assert!(refusal(&raw(folder.path(), &tensors)).contains("holds no LoRA"));
    let [mut both, second] = ["a", "b"].map(|adapter| {
        let key = |side: &str| format!("unet.{DIFFUSERS}.to_q.lora_{side}.{adapter}.weight");
        pair(&key("A"), &key("B"))
    });
    both.extend(second);
    assert!(refusal(&raw(folder.path(), &both)).contains("has another one for the same module"));
}

#[test]
fn the_alpha_of_a_peft_folder_lies_beside_the_file() {
    let folder = tempfile::tempdir().unwrap();
    let source = SafetensorsFile::open(&fixture("peft")).unwrap();
    let unet = source.entries().filter_map(|TensorEntry { name, dtype, shape }| {
        let bytes = source.read_raw(&name).unwrap();
        Some((format!("base_model.model.{}", name.strip_prefix("unet.")?), (dtype, shape, bytes)))
    });
    let path = folder.path().join("adapter_model.safetensors");
    fs::rename(raw(folder.path(), &unet.collect()), &path).unwrap();
    let metadata: serde_json::Value = serde_json::from_str(&source.metadata()["lora_adapter_metadata"]).unwrap();
    let own = metadata.as_object().unwrap().iter();
    let mut config: serde_json::Map<_, _> =
        own.filter_map(|(key, value)| Some((key.strip_prefix("unet.")?.to_owned(), value.clone()))).collect();
    let beside = folder.path().join("adapter_config.json");
    let written = |config: &serde_json::Map<String, serde_json::Value>| {
        fs::write(&beside, serde_json::to_vec(config).unwrap()).unwrap();
    };
    let mut expected = changed(&updates(&[("peft", 1.0)]));
    expected.retain(|name, _| name.starts_with("unet."));
    assert!(made_by(&path) != expected, "without its config every scale is 1");
    written(&config);
    assert!(made_by(&path) == expected);
    config.insert("use_dora".into(), true.into());
    written(&config);
    assert!(refusal(&path).contains("DoRA"));
}

#[test]
fn fp8_is_read_and_scaled_fp8_is_refused_as_such() {
    const Q: &str = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q";
    let folder = tempfile::tempdir().unwrap();
    // 0.5, -1 and 0 in both formats.
    let of = |dtype: Dtype, values: [&[u8]; 3]| -> BTreeMap<String, Raw> {
        let bytes = |seed: usize| (0..4 * 48).flat_map(|i| values[(i * i + seed) % 3].to_vec()).collect::<Vec<u8>>();
        BTreeMap::from([
            (format!("{Q}.lora_down.weight"), (dtype, vec![4, 48], bytes(0))),
            (format!("{Q}.lora_up.weight"), (dtype, vec![48, 4], bytes(1))),
            (format!("{Q}.alpha"), (Dtype::F32, vec![], f32s(&[2.0]))),
        ])
    };
    let [half, one, zero] = [0.5_f32, -1.0, 0.0].map(f32::to_le_bytes);
    let expected = made_by(&raw(folder.path(), &of(Dtype::F32, [&half, &one, &zero])));
    assert!(made_by(&raw(folder.path(), &of(Dtype::F8_E4M3, [&[0x30], &[0xb8], &[0]]))) == expected);
    assert!(made_by(&raw(folder.path(), &of(Dtype::F8_E5M2, [&[0x38], &[0xbc], &[0]]))) == expected);
    let [half, one, zero] = [0.5_f64, -1.0, 0.0].map(f64::to_le_bytes);
    assert!(made_by(&raw(folder.path(), &of(Dtype::F64, [&half, &one, &zero]))) == expected);

    let mut scaled = of(Dtype::F8_E4M3, [&[0x30], &[0xb8], &[0]]);
    scaled.insert(format!("{Q}.scale_weight"), (Dtype::F32, vec![], f32s(&[0.1])));
    let message = refusal(&raw(folder.path(), &scaled));
    assert!(message.contains("fp8") && message.contains("scale_weight") && message.contains("bf16"), "{message}");
    let message = refusal(&raw(folder.path(), &of(Dtype::I8, [&[1], &[2], &[3]])));
    assert!(message.contains("type I8, which is not read: F64, F32"), "{message}");
}

#[test]
fn a_key_of_a_megabyte_makes_a_message_of_a_page() {
    let folder = tempfile::tempdir().unwrap();
    let key = format!("{}\u{1b}[2J.weight", "k".repeat(1 << 20));
    let tensors = BTreeMap::from([(key, (Dtype::F32, vec![1], f32s(&[1.0])))]);
    let message = refusal(&raw(folder.path(), &tensors));
    assert!(message.len() < 10_000 && message.contains("holds no LoRA"), "{} bytes", message.len());
    assert!(!message.contains('\u{1b}'));
}
