//! Safetensors files with false headers: read as plain files, LoRAs, bases, hypernetworks and features.

use std::fs;
use std::path::Path;

use burn_hyperlora::generate::features;
use burn_hyperlora::hypernet::{HyperLora, HyperLoraConfig, read_sites};
use hyperlora_sdxl::lora::LoraSet;
use hyperlora_sdxl::lora::file::{BaseNames, LoraFile, sum};
use hyperlora_sdxl::source::{BaseSource, Component};
use hyperlora_sdxl::weights::Weights;
use serde_json::{Value, json};

use crate::safetensors::read_all;
use crate::support::{base, device, fixture};
use hyperlora_testing::fuzz::{Case, fuzz, scratch};

/// Builds a file of this header and these tensors.
pub(crate) fn with_header(header: &[u8], data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header, data].concat()
}

/// Header and tensors of a file.
struct Parts {
    header: Vec<u8>,
    data: Vec<u8>,
}

impl Parts {
    fn of(bytes: &[u8]) -> Self {
        let (length, rest) = bytes.split_at(8);
        let (header, data) = rest.split_at(u64::from_le_bytes(length.try_into().unwrap()) as usize);
        Self { header: header.to_vec(), data: data.to_vec() }
    }

    fn read(path: &Path) -> Self {
        Self::of(&fs::read(path).unwrap())
    }

    /// Returns the file with its header changed token by token, with any bytes changed, or cut short.
    fn changed(&self, case: &mut Case) -> Vec<u8> {
        if case.random.one_in(5) {
            return case.binary(&with_header(&self.header, &self.data));
        }
        let header = case.text(&self.header, &WORDS);
        // Without tensor bytes, only the shapes matter.
        let data = if !case.unchanged && case.random.one_in(8) { &[][..] } else { &self.data };
        with_header(&header, data)
    }
}

const WORDS: [&str; 52] = [
    "\"dtype\"",
    "\"shape\"",
    "\"data_offsets\"",
    "\"__metadata__\"",
    "\"F32\"",
    "\"F16\"",
    "\"BF16\"",
    "\"F64\"",
    "\"I64\"",
    "\"F8_E4M3\"",
    "\"F4\"",
    "\"BOOL\"",
    "\"U8\"",
    "[0]",
    "[0,0]",
    "[1]",
    "[1,1,1,1]",
    "[]",
    "[0,18446744073709551615]",
    "[1099511627776,1099511627776]",
    "[0,4]",
    "[4,0]",
    ".alpha",
    ".lora_down.weight",
    ".lora_up.weight",
    ".lora_A.weight",
    ".lora_A.default.weight",
    ".dora_scale",
    ".diff",
    ".diff_b",
    ".hada_w1_a",
    ".lokr_w1",
    "lora_unet_",
    "lora_te1_",
    "unet.",
    "text_encoder.",
    "base_model.model.",
    "down_blocks",
    "up_blocks.99",
    "attn1",
    "to_q",
    "processor",
    "bundle_emb.",
    "lora_adapter_metadata",
    "999999999999999999999999",
    "\\u0000",
    "\\ud800",
    "é",
    ".",
    "_",
    "{\"dtype\":\"F32\",\"shape\":[],\"data_offsets\":[0,4]}",
    "{\"dtype\":\"F32\",\"shape\":[0],\"data_offsets\":[0,0]}",
];

const LORAS: [&str; 5] = ["kohya", "sgm", "peft", "diffusers_old", "second"];

fn lora_seeds() -> Vec<Parts> {
    LORAS.iter().map(|name| Parts::read(&fixture("loras").join(name).with_extension("safetensors"))).collect()
}

#[test]
fn safetensors() {
    let seeds =
        [Parts::read(&fixture("loras/second.safetensors")), Parts::read(&fixture("hypernet/id_projector.safetensors"))];
    let folder = scratch();
    let path = folder.path().join("model.safetensors");
    let named = path.display().to_string();
    fuzz("safetensors", 1000, 16 << 20, &named, |case| {
        let seed = &seeds[case.choose(seeds.len())];
        fs::write(&path, seed.changed(case)).unwrap();
        Ok(read_all(&path)?)
    });
}

#[test]
fn shard_index() {
    const NAMES: [&str; 8] = [
        "\"a\"",
        "\"b\"",
        "\"1.safetensors\"",
        "\"2.safetensors\"",
        "\"weight_map\"",
        "\"total_size\"",
        "\"../1.safetensors\"",
        "\"model.safetensors.index.json\"",
    ];
    let folder = scratch();
    for (shard, name) in [("1", "a"), ("2", "b")] {
        let header = json!({name: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).to_string();
        fs::write(folder.path().join(shard).with_extension("safetensors"), with_header(header.as_bytes(), &[0; 4]))
            .unwrap();
    }
    let path = folder.path().join("model.safetensors.index.json");
    let seeds = [
        r#"{"metadata": {"total_size": 8}, "weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}"#,
        r#"{"weight_map": {"b": "2.safetensors"}}"#,
    ];
    let named = folder.path().display().to_string();
    fuzz("shard_index", 2000, 8 << 20, &named, |case| {
        fs::write(&path, case.one_text(&seeds, &NAMES)).unwrap();
        Weights::open(folder.path(), &device())?;
        Ok(())
    });
}

#[test]
fn loras() {
    let seeds = lora_seeds();
    let names = BaseNames::of(&BaseSource::open(&base(), None, None).unwrap()).unwrap();
    let folder = scratch();
    let path = folder.path().join("lora.safetensors");
    let named = path.display().to_string();
    fuzz("loras", 500, 16 << 20, &named, |case| {
        let seed = &seeds[case.choose(seeds.len())];
        fs::write(&path, seed.changed(case)).unwrap();
        let lora = LoraFile::open(&path)?;
        // Reading it for an export needs no base.
        LoraSet::open(&path)?;
        sum(&[(lora, 0.5)], &names)?;
        Ok(())
    });
}

/// Builds a tiny checkpoint in Stability naming, without values, with every name that has its own reading rule.
fn single_file() -> String {
    let tensor = |shape: &[usize]| json!({"dtype": "F16", "shape": shape, "data_offsets": [0, 0]});
    json!({
        "model.diffusion_model.input_blocks.0.0.weight": tensor(&[0, 4, 3, 3]),
        "first_stage_model.encoder.mid.attn_1.q.weight": tensor(&[0, 32, 1, 1]),
        "conditioner.embedders.0.transformer.text_model.final_layer_norm.bias": tensor(&[0]),
        "conditioner.embedders.1.model.text_projection": tensor(&[0, 64]),
        "conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight": tensor(&[0, 64]),
    })
    .to_string()
}

#[test]
fn single_files() {
    let seed = Parts { header: single_file().into_bytes(), data: Vec::new() };
    let folder = scratch();
    let path = folder.path().join("base.safetensors");
    let named = folder.path().display().to_string();
    fuzz("single_files", 500, 64 << 20, &named, |case| {
        case.choose(1);
        fs::write(&path, seed.changed(case)).unwrap();
        let source = BaseSource::open(&path, None, Some(&base()))?;
        let part = *case.random.pick(&Component::ALL);
        let weights = source.weights(part, &device())?;
        for (name, shape) in weights.shapes() {
            if let [rows, columns] = *shape {
                weights.at(name.trim_end_matches(".weight")).linear(columns, rows, false);
            }
        }
        source.schedule()?;
        Ok(())
    });
}

/// Width of an attention head in the fixture.
const HEAD_DIM: usize = 5;

#[test]
fn hypernetworks() {
    const FILES: [&str; 5] = [
        "hyper_lora_modules.json",
        "hyper_lora_modules.safetensors",
        "resampler.safetensors",
        "id_projector.safetensors",
        "base_resampler.safetensors",
    ];
    const NAMES: [&str; 10] = [
        "\"hidden_size\"",
        "\"cross_attention_dim\"",
        "lora_unet_",
        "input_blocks_4_1",
        "middle_block_1",
        "attn1",
        "attn2",
        "transformer_blocks_99999999999",
        "down_blocks_1",
        "up_blocks_0",
    ];
    let folders = FILES.map(|_| scratch());
    for folder in &folders {
        for file in FILES {
            fs::copy(fixture("hypernet").join(file), folder.path().join(file)).unwrap();
        }
    }
    let json = fs::read(fixture("hypernet").join(FILES[0])).unwrap();
    let seeds: Vec<Parts> = FILES[1..].iter().map(|file| Parts::read(&fixture("hypernet").join(file))).collect();
    fuzz("hypernetworks", 300, 64 << 20, "", |case| {
        let which = case.choose(FILES.len());
        let folder = folders[which].path();
        case.named = folder.display().to_string();
        let bytes = if which == 0 { case.text(&json, &NAMES) } else { seeds[which - 1].changed(case) };
        fs::write(folder.join(FILES[which]), bytes).unwrap();
        let sites = read_sites(folder)?;
        let config = HyperLoraConfig::of_folder(folder, HEAD_DIM)?;
        // Building one takes far longer than reading its inputs.
        if case.unchanged || case.random.one_in(16) {
            HyperLora::load(folder, &config, &sites, &device())?;
        }
        Ok(())
    });
}

#[test]
fn ready_features() {
    let config = HyperLoraConfig::of_folder(&fixture("hypernet"), HEAD_DIM).unwrap();
    let (clip, id) = (config.clip_dim, config.id_embedding_dim);
    let shapes: [(&str, Vec<usize>); 3] = [
        ("clip_hidden_states", vec![2, 3, clip]),
        ("id_embedding", vec![2, id]),
        ("base_clip_hidden_states", vec![1, 3, clip]),
    ];
    let (mut header, mut end) = (serde_json::Map::new(), 0);
    for (name, shape) in shapes {
        let start = end;
        end += 4 * shape.iter().product::<usize>();
        header.insert(name.into(), json!({"dtype": "F32", "shape": shape, "data_offsets": [start, end]}));
    }
    let data: Vec<u8> = (0..end / 4).flat_map(|number| (number as f32 / 100.0 - 0.3).to_le_bytes()).collect();
    let seed = Parts { header: Value::Object(header).to_string().into_bytes(), data };
    let folder = scratch();
    let path = folder.path().join("a.features.safetensors");
    let named = path.display().to_string();
    fuzz("ready_features", 1500, 16 << 20, &named, |case| {
        case.choose(1);
        fs::write(&path, seed.changed(case)).unwrap();
        features::read(&path, &config, &device())?;
        Ok(())
    });
}
