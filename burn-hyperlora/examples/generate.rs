//! Writes a LoRA of a person from photos, with a trained run or the released weights.
//!
//!     cargo run --release --example generate -- runs/quickstart anna.safetensors photo-1.jpg photo-2.jpg

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use burn::tensor::{Device, FloatDType};
use burn_hyperlora::export::save_lora;
use burn_hyperlora::generate::Generator;
use burn_hyperlora::generate::photos::{PhotoModels, PhotoReader};
use hyperlora_core::{Error, Result};
use hyperlora_sdxl::lora::file::Layout;

fn main() -> Result<()> {
    let arguments: Vec<PathBuf> = std::env::args().skip(1).map(PathBuf::from).collect();
    let [run, output, photos @ ..] = &arguments[..] else {
        return Err(Error::input(
            "generate",
            "takes a run, an output and photos",
            "give runs/quickstart a.safetensors 1.jpg",
        ));
    };
    let generator = Generator::open(run, None, &Device::flex())?;
    // 1. Photos to CLIP states and ID embedding, averaged over the photos.
    let mut reader = PhotoReader::open(&generator, &PhotoModels::default())?;
    let portraits = photos.iter().map(|photo| reader.portrait(photo)).collect::<Result<Vec<_>>>()?;
    let person = reader.person(&portraits, false);
    // 2. One forward pass of the hypernetwork: the ID-LoRA at weight 1, no Base-LoRA.
    let lora = generator.lora(&person, 1.0, 0.0)?;
    // 3. A file that ComfyUI, diffusers and kohya's tools load.
    write(output, &generator, &lora)
}

fn write(output: &Path, generator: &Generator, lora: &hyperlora_sdxl::lora::LoraWeights) -> Result<()> {
    let notes = BTreeMap::from([("ss_training_comment".into(), format!("trigger words: {}", generator.trigger()))]);
    save_lora(output, generator.sites(), lora, FloatDType::F16, Layout::Kohya, &notes)
}
