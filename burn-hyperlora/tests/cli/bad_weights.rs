//! Invalid weights and LoRA files given to `sample`: one message each, and nothing is drawn.

use std::fs;
use std::path::Path;

use hyperlora_sdxl::weights::SafetensorsFile;

use crate::support::{Damage, World, hyperlora, quickstart_base, run, truncate};

#[test]
fn a_damaged_shard_of_the_unet_is_named_and_nothing_is_drawn() {
    const WHOLE: &str = "diffusion_pytorch_model.safetensors";
    const SHARD: &str = "diffusion_pytorch_model-00001-of-00001.safetensors";
    let world = World::new();
    let unet = world.copy_base("base").join("unet");
    let file = SafetensorsFile::open(&unet.join(WHOLE)).unwrap();
    let names = file.entries().map(|entry| (entry.name, SHARD.into()));
    let index = serde_json::json!({"weight_map": names.collect::<serde_json::Map<_, _>>()});
    fs::write(unet.join(format!("{WHOLE}.index.json")), index.to_string()).unwrap();
    fs::rename(unet.join(WHOLE), unet.join(SHARD)).unwrap();
    let whole = fs::read(unet.join(SHARD)).unwrap();
    let output = world.path("a.png");
    let sample = || {
        let mut sample = hyperlora(["sample", "-q", "--prompt", "a", "--steps", "1", "--base"]);
        sample.arg(world.path("base")).arg("-o").arg(&output);
        run(sample)
    };
    let lying: Damage = |shard| edit_bytes(shard, b"\"data_offsets\":[0,", b"\"data_offsets\":[8,");
    let cases: [(Damage, &str); 3] = [
        (truncate, "bytes of tensors"),
        (lying, "invalid header"),
        (|shard| fs::write(shard, "<!DOCTYPE html>").unwrap(), "web page"),
    ];
    for (damage, problem) in cases {
        damage(&unet.join(SHARD));
        sample().refused(2, &[SHARD, problem]);
        assert!(!output.exists(), "{problem}");
        fs::write(unet.join(SHARD), &whole).unwrap();
    }
    sample().with(0);
    assert!(output.exists());
}

#[test]
fn a_file_that_is_no_lora_for_sdxl_is_named_and_nothing_is_drawn() {
    let world = World::new();
    let file = world.path("lora.safetensors");
    let pair = |module: &str| {
        let tensor = |shape: &str, from: usize| {
            format!(r#"{{"dtype":"F32","shape":{shape},"data_offsets":[{from},{}]}}"#, from + 8)
        };
        let (down, up) = (tensor("[1,2]", 0), tensor("[2,1]", 8));
        let header = format!(r#"{{"{module}.lora_down.weight":{down},"{module}.lora_up.weight":{up}}}"#);
        [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &[0; 16]].concat()
    };
    let cases: [(Vec<u8>, &str); 4] = [
        (pair("lora_unet_double_blocks_0_img_attn_qkv"), "Flux"),
        (pair("lora_unet_down_blocks_0_attentions_0_proj_in"), "the base has no such module"),
        (b"PK\x03\x04archive/data.pkl".to_vec(), "pickle"),
        (b"<!DOCTYPE html>".to_vec(), "web page"),
    ];
    let output = world.path("a.png");
    for (content, problem) in cases {
        fs::write(&file, content).unwrap();
        let mut sample = hyperlora(["sample", "-q", "--prompt", "a", "--base"]);
        sample.arg(quickstart_base()).arg("--lora").arg(&file).arg("-o").arg(&output);
        run(sample).refused(2, &["lora.safetensors", problem]);
        assert!(!output.exists(), "{problem}");
    }
}

/// Replaces the first `from` in a file.
fn edit_bytes(path: &Path, from: &[u8], to: &[u8]) {
    let bytes = fs::read(path).unwrap();
    let place = bytes.windows(from.len()).position(|window| window == from).unwrap();
    overwrite(path, place, to);
}

fn overwrite(path: &Path, at: usize, with: &[u8]) {
    let mut bytes = fs::read(path).unwrap();
    bytes[at..at + with.len()].copy_from_slice(with);
    fs::write(path, bytes).unwrap();
}
