//! Loads the UNet of a base and prints time and memory of loading.
//!
//!     cargo run -p hyperlora-tools --bin load_unet -- sdxl/ f32
//!     cargo run -p hyperlora-tools --bin load_unet -- sdxl.safetensors bf16

use std::path::Path;
use std::time::Instant;

use burn::tensor::{Device, FloatDType};
use hyperlora_core::{Error, Result};
use hyperlora_sdxl::models::unet::{UNet2DConditionConfig, UNet2DConditionModel};
use hyperlora_sdxl::source::{BaseSource, Component};

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [path, dtype] = arguments.as_slice() else {
        return Err(Error::input("load_unet", "needs a base and a type", "load_unet DIR|FILE f32|bf16"));
    };
    let (dtype, bytes) = match dtype.as_str() {
        "f32" => (FloatDType::F32, 4),
        "bf16" => (FloatDType::BF16, 2),
        other => return Err(Error::input("load_unet", format!("{other} is not a type"), "give f32 or bf16")),
    };
    let start = Instant::now();
    let source = BaseSource::open(Path::new(path), None, None)?;
    let weights = source.weights(Component::Unet, &Device::flex())?.with_dtype(dtype);
    let parameters: usize = weights.shapes().values().map(|shape| shape.iter().product::<usize>()).sum();
    let unet = UNet2DConditionModel::new(UNet2DConditionConfig::parse(&source.config(Component::Unet)?)?, weights)?;
    let seconds = start.elapsed().as_secs_f64();

    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    let weights = (parameters * bytes) as u64;
    let (peak, now) = (memory("VmHWM")?, memory("VmRSS")?);
    println!(
        "{parameters} parameters, {} attention modules, {:.0} MiB of weights: peak {:.0} MiB, {:.0} above the weights, \
         {:.0} in the end; {seconds:.1} s",
        unet.attention_sites().len(),
        mib(weights),
        mib(peak),
        mib(peak) - mib(weights),
        mib(now),
    );
    Ok(())
}

/// Reads an entry of this process's memory on Linux, in bytes.
fn memory(key: &str) -> Result<u64> {
    let path = Path::new("/proc/self/status");
    let text = std::fs::read_to_string(path).map_err(|source| Error::read(path, source))?;
    let line = text.lines().find_map(|line| line.strip_prefix(key)).and_then(|line| line.split_whitespace().nth(1));
    let kib: Option<u64> = line.and_then(|number| number.parse().ok());
    kib.map(|kib| kib * 1024).ok_or_else(|| Error::Fault(format!("{} has no {key}", path.display())))
}
