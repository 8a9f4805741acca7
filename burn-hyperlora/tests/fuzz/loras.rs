//! LoRA files with changed names, shapes and alphas.

use std::fs;

use hyperlora_core::Result;
use hyperlora_sdxl::lora::file::{BaseNames, LoraFile, sum};
use hyperlora_sdxl::models::unet::UNet2DConditionModel;
use hyperlora_sdxl::models::unet::config::UNet2DConditionConfig;
use hyperlora_sdxl::source::{BaseSource, Component};
use proptest::prelude::*;
use proptest::sample::Index;
use serde_json::Value;

use crate::json::{changed, changes};
use crate::safetensors::{file, parts};
use crate::support::{base, bounded, device, fixture, survives};

const FILES: [&str; 5] = ["kohya", "sgm", "peft", "diffusers_old", "second"];

/// Reads a LoRA and builds the UNet that it changes.
fn apply(path: &std::path::Path) -> Result<()> {
    let source = BaseSource::open(&base(), None, None)?;
    let updates = sum(&[(LoraFile::open(path)?, 1.0)], &BaseNames::of(&source)?)?;
    let source = source.with_updates(updates);
    let config = UNet2DConditionConfig::parse(&source.config(Component::Unet)?)?;
    UNet2DConditionModel::new(config, source.weights(Component::Unet, &device())?).map(drop)
}

fn outcome(bytes: &[u8]) -> bool {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("lora.safetensors");
    fs::write(&path, bytes).unwrap();
    survives(folder.path(), || apply(&path))
}

/// Pieces of LoRA keys, valid and invalid.
fn pieces() -> impl Strategy<Value = &'static str> {
    prop::sample::select(vec![
        "",
        ".",
        "_",
        "lora_unet_",
        "unet.",
        "text_encoder.",
        "lora_te2_",
        ".alpha",
        ".lora_down.weight",
        ".lora_A.weight",
        ".processor.to_q_lora.down.weight",
        ".dora_scale",
        "up_blocks",
        "999999999999999999999999",
        "é",
        "\0",
    ])
}

#[test]
fn what_is_not_changed_is_applied() {
    for name in FILES {
        assert!(outcome(&fs::read(fixture("loras").join(name).with_extension("safetensors")).unwrap()), "{name}");
    }
}

proptest! {
    #![proptest_config(bounded(96))]

    #[test]
    fn changed_headers_are_survived(name in prop::sample::select(&FILES[..]), changes in changes()) {
        let (header, data) = parts(&fixture("loras").join(name).with_extension("safetensors"));
        outcome(&file(changed(header, changes).to_string().as_bytes(), &data));
    }

    #[test]
    fn changed_names_are_survived(
        name in prop::sample::select(&FILES[..]),
        place in any::<Index>(),
        cut in any::<Index>(),
        piece in pieces(),
        rest in any::<bool>(),
    ) {
        let (header, data) = parts(&fixture("loras").join(name).with_extension("safetensors"));
        let mut header = header.as_object().unwrap().clone();
        let keys: Vec<String> = header.keys().cloned().collect();
        let key: &String = place.get(&keys);
        let tensor = header.remove(key).unwrap();
        let (before, after) = key.split_at(cut.index(key.len() + 1));
        header.insert(format!("{before}{piece}{}", if rest { after } else { "" }), tensor);
        outcome(&file(Value::Object(header).to_string().as_bytes(), &data));
    }

    /// Shapes with an unchanged product, and arbitrary values: NaN, infinities, the largest.
    #[test]
    fn changed_shapes_and_values_are_survived(
        name in prop::sample::select(&FILES[..]),
        place in any::<Index>(),
        axes in prop::sample::select(vec![0, 1, 2, 3]),
        fill in prop::option::of(prop::sample::select(vec![[0xff, 0x7f], [0x7f, 0x7f], [0, 0xfc], [0, 0], [0x80, 0x7f]])),
    ) {
        let (mut header, mut data) = parts(&fixture("loras").join(name).with_extension("safetensors"));
        let mut tensors: Vec<&mut Value> =
            header.as_object_mut().unwrap().values_mut().filter(|value| value.get("shape").is_some()).collect();
        let index = place.index(tensors.len());
        let tensor = &mut *tensors[index];
        let shape: Vec<u64> = serde_json::from_value(tensor["shape"].clone()).unwrap();
        tensor["shape"] = match axes {
            0 => shape.iter().rev().copied().collect(),
            1 => shape.iter().copied().chain([1, 1]).collect(),
            2 => vec![1, shape.iter().product()].into(),
            _ => vec![shape.iter().product::<u64>()].into(),
        };
        if let Some(fill) = fill {
            let [start, end]: [usize; 2] = serde_json::from_value(tensor["data_offsets"].clone()).unwrap();
            data[start..end].chunks_exact_mut(2).for_each(|pair| pair.copy_from_slice(&fill));
        }
        outcome(&file(header.to_string().as_bytes(), &data));
    }
}
