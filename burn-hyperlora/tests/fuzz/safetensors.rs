//! Safetensors files and shard indices with false headers.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use burn_hyperlora::hypernet::{HyperLora, HyperLoraConfig, read_sites};
use hyperlora_core::Result;
use hyperlora_sdxl::source::{BaseSource, Component};
use hyperlora_sdxl::weights::{Form, SafetensorsFile, Weights};
use proptest::prelude::*;
use proptest::sample::Index;
use serde_json::{Value, json};

use crate::json::{Change, changed, changes};
use crate::support::{base, bounded, device, fixture, survives, with_file};

/// Splits a file into header and tensors.
pub(crate) fn parts(path: &Path) -> (Value, Vec<u8>) {
    let bytes = fs::read(path).unwrap();
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    (serde_json::from_slice(&bytes[8..8 + length]).unwrap(), bytes[8 + length..].to_vec())
}

/// Builds a file of this header and these tensors.
pub(crate) fn file(header: &[u8], data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header, data].concat()
}

/// Reads a file in every supported way: as it is, as a model's weights, under other names.
pub(crate) fn read_all(path: &Path) -> Result<()> {
    let file = Arc::new(SafetensorsFile::open(path)?);
    for entry in file.entries() {
        file.read_raw(&entry.name)?;
    }
    for form in [Form::Same, Form::Transposed, Form::Third(2), Form::Linear] {
        let weights = Weights::renamed(&file, |key| vec![(key.to_owned(), form)], &device());
        let shapes: Vec<_> =
            weights.shapes().into_iter().map(|(name, shape)| (name.to_owned(), shape.to_vec())).collect();
        for (name, shape) in shapes {
            match *shape.as_slice() {
                [] => _ = weights.at("").scalar(&name),
                [a] => _ = weights.at("").tensor(&name, [a]),
                [a, b] => _ = weights.at("").tensor(&name, [a, b]),
                [a, b, c, d] => _ = weights.at("").tensor(&name, [a, b, c, d]),
                _ => _ = weights.at("").tensor(&name, [1]),
            }
        }
        weights.finish()?;
    }
    Ok(())
}

/// Checks the outcome for a file of these bytes; returns whether it was read.
fn outcome(bytes: &[u8]) -> bool {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    fs::write(&path, bytes).unwrap();
    survives(&path, || read_all(&path))
}

/// Generates a tensor of no bytes with an arbitrary shape.
fn empty_tensor() -> impl Strategy<Value = Value> {
    let axis = prop::sample::select(vec![0, 1, 3, 1 << 20, 1 << 40, usize::MAX / 2, usize::MAX]);
    let dtype = prop::sample::select(vec!["F32", "F16", "BF16", "I64", "BOOL", "F4"]);
    (prop::collection::vec(axis, 0..6), dtype)
        .prop_map(|(shape, dtype)| json!({"dtype": dtype, "shape": shape, "data_offsets": [0, 0]}))
}

fn small() -> PathBuf {
    fixture("loras/second.safetensors")
}

proptest! {
    #![proptest_config(bounded(192))]

    #[test]
    fn random_bytes_are_refused(bytes in prop::collection::vec(any::<u8>(), 0..600), short in any::<bool>()) {
        // A valid header length gets the random bytes further into the reader.
        let bytes = if short { file(&bytes, b"") } else { bytes };
        prop_assert!(!outcome(&bytes));
    }

    #[test]
    fn a_shortened_or_lengthened_file_is_refused(part in 0.0..1.0_f64, more in 0..20_usize) {
        let mut bytes = fs::read(small()).unwrap();
        match more {
            0 => bytes.truncate((bytes.len() as f64 * part) as usize),
            more => bytes.resize(bytes.len() + more, 0),
        }
        prop_assert!(!outcome(&bytes));
    }

    #[test]
    fn changed_bytes_are_survived(
        changes in prop::collection::vec((any::<Index>(), any::<u8>()), 1..6),
        reach in prop::sample::select(vec![12, 400, usize::MAX]),
    ) {
        let mut bytes = fs::read(small()).unwrap();
        let reach = reach.min(bytes.len());
        for (place, value) in changes {
            bytes[place.index(reach)] = value;
        }
        outcome(&bytes);
    }

    #[test]
    fn a_changed_header_is_survived(changes in changes(), keep in any::<bool>()) {
        let (header, data) = parts(&small());
        let header = changed(header, changes).to_string();
        outcome(&file(header.as_bytes(), if keep { &data } else { b"" }));
    }

    #[test]
    fn tensors_without_bytes_are_survived(tensors in prop::collection::vec(empty_tensor(), 1..4)) {
        let header: serde_json::Map<_, _> =
            tensors.into_iter().enumerate().map(|(index, tensor)| (index.to_string(), tensor)).collect();
        outcome(&file(Value::Object(header).to_string().as_bytes(), b""));
    }

    #[test]
    fn a_name_that_comes_twice_is_survived(times in 2..5_usize, end in 0..12_usize) {
        let entry = format!(r#""a":{{"dtype":"F32","shape":[{}],"data_offsets":[0,{end}]}}"#, end / 4);
        let other = r#""a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}"#;
        let header = format!("{{{},{other}}}", vec![entry; times].join(","));
        outcome(&file(header.as_bytes(), &[0; 4]));
    }

    #[test]
    fn a_changed_index_is_survived(changes in changes()) {
        let index = json!({"metadata": {"total_size": 8}, "weight_map": {"a": "1.safetensors", "b": "2.safetensors"}});
        let folder = tempfile::tempdir().unwrap();
        for (shard, name) in [("1", "a"), ("2", "b")] {
            let header = json!({name: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}});
            let shard = folder.path().join(shard).with_extension("safetensors");
            fs::write(shard, file(header.to_string().as_bytes(), &[0; 4])).unwrap();
        }
        let path = folder.path().join("model.safetensors.index.json");
        fs::write(&path, changed(index, changes).to_string()).unwrap();
        survives(folder.path(), || Weights::open(folder.path(), &device()).map(drop));
    }
}

#[test]
fn a_deep_header_is_refused() {
    let deep = format!("{}{}", "[".repeat(1 << 20), "]".repeat(1 << 20));
    for header in [deep.clone(), format!(r#"{{"a":{deep}}}"#), format!(r#"{{"a":{{"dtype":"F32","shape":{deep}"#)] {
        assert!(!outcome(&file(header.as_bytes(), b"")));
    }
}

#[test]
fn a_shape_of_a_million_axes_is_refused_in_few_words() {
    let shape = vec!["1"; 1 << 20].join(",");
    let header = format!(r#"{{"a":{{"dtype":"F32","shape":[{shape}],"data_offsets":[0,4]}}}}"#);
    assert!(!outcome(&file(header.as_bytes(), &[0; 4])));
}

/// Builds a tiny checkpoint in Stability naming, without values, with every name that has its own reading rule.
fn single_file() -> Value {
    let tensor = |shape: &[usize]| json!({"dtype": "F16", "shape": shape, "data_offsets": [0, 0]});
    json!({
        "model.diffusion_model.input_blocks.0.0.weight": tensor(&[0, 4, 3, 3]),
        "first_stage_model.encoder.mid.attn_1.q.weight": tensor(&[0, 32, 1, 1]),
        "conditioner.embedders.0.transformer.text_model.final_layer_norm.bias": tensor(&[0]),
        "conditioner.embedders.1.model.text_projection": tensor(&[0, 64]),
        "conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight": tensor(&[0, 64]),
    })
}

/// Width of an attention head in the fixture.
const HEAD_DIM: usize = 5;

fn load_hypernetwork(path: &Path) -> Result<()> {
    let config = HyperLoraConfig::of_folder(path, HEAD_DIM)?;
    let sites = read_sites(path)?;
    HyperLora::load(path, &config, &sites, &device()).map(drop)
}

fn hypernetwork_with(name: &str, bytes: &[u8]) -> bool {
    let folder = with_file(&fixture("hypernet"), name, bytes);
    survives(folder.path(), || load_hypernetwork(folder.path()))
}

#[test]
fn what_is_not_changed_is_read() {
    assert!(outcome(&fs::read(small()).unwrap()));
    let (header, data) = parts(&small());
    assert!(outcome(&file(header.to_string().as_bytes(), &data)));
    let json = fs::read(fixture("hypernet/hyper_lora_modules.json")).unwrap();
    assert!(hypernetwork_with("hyper_lora_modules.json", &json));
}

proptest! {
    #![proptest_config(bounded(96))]

    #[test]
    fn a_changed_checkpoint_is_survived(changes in changes(), shapes in prop::collection::vec(empty_tensor(), 5)) {
        let mut header = single_file();
        for (tensor, other) in header.as_object_mut().unwrap().values_mut().zip(shapes) {
            *tensor = other;
        }
        for header in [header.clone(), changed(header, changes)] {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("base.safetensors");
            fs::write(&path, file(header.to_string().as_bytes(), b"")).unwrap();
            survives(folder.path(), || {
                let source = BaseSource::open(&path, None, Some(&base()))?;
                for part in Component::ALL {
                    let weights = source.weights(part, &device())?;
                    let matrices: Vec<_> = weights.shapes().into_iter().filter(|(_, shape)| shape.len() == 2).collect();
                    for (name, shape) in matrices {
                        let layer = name.trim_end_matches(".weight");
                        let _ = weights.at(layer).linear(shape[1], shape[0], false);
                    }
                }
                source.vae(&device()).map(drop)
            });
        }
    }

    #[test]
    fn a_changed_hypernetwork_is_survived(
        stem in prop::sample::select(vec!["hyper_lora_modules", "resampler", "id_projector", "base_resampler"]),
        changes in changes(),
        shape in prop::option::of((any::<Index>(), empty_tensor())),
    ) {
        let name = format!("{stem}.safetensors");
        let (mut header, data) = parts(&fixture("hypernet").join(&name));
        let data = match shape {
            // All tensors have no bytes, so that only the shapes matter.
            Some((index, other)) => {
                for tensor in header.as_object_mut().unwrap().values_mut().filter(|value| value.get("shape").is_some()) {
                    *tensor = json!({"dtype": "F32", "shape": [0], "data_offsets": [0, 0]});
                }
                let keys: Vec<String> = header.as_object().unwrap().keys().cloned().collect();
                let key: &String = index.get(&keys);
                header[key] = other;
                Vec::new()
            }
            None => {
                header = changed(header, changes);
                data
            }
        };
        hypernetwork_with(&name, &file(header.to_string().as_bytes(), &data));
    }

    #[test]
    fn a_changed_list_of_modules_is_survived(changes in changes()) {
        let json = fs::read(fixture("hypernet/hyper_lora_modules.json")).unwrap();
        let json = changed(serde_json::from_slice(&json).unwrap(), changes as Vec<Change>);
        hypernetwork_with("hyper_lora_modules.json", json.to_string().as_bytes());
    }
}
