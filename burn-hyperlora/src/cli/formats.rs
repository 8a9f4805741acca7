//! Number types and layouts of the files that commands write, and parsing of numbers on the command line.

use std::str::FromStr;

use burn::tensor::FloatDType;
use clap::ValueEnum;
use hyperlora_sdxl::lora::file::Layout;
use safetensors::Dtype;

/// Number format of a file.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub(super) enum FileDType {
    F16,
    Bf16,
    F32,
}

impl From<FileDType> for Dtype {
    fn from(dtype: FileDType) -> Self {
        match dtype {
            FileDType::F16 => Self::F16,
            FileDType::Bf16 => Self::BF16,
            FileDType::F32 => Self::F32,
        }
    }
}

impl From<FileDType> for FloatDType {
    fn from(dtype: FileDType) -> Self {
        match dtype {
            FileDType::F16 => Self::F16,
            FileDType::Bf16 => Self::BF16,
            FileDType::F32 => Self::F32,
        }
    }
}

/// Layout of a LoRA file.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub(super) enum LoraFormat {
    /// kohya's sd-scripts: loads in ComfyUI, the WebUIs and diffusers
    Kohya,
    /// diffusers with PEFT
    Diffusers,
}

impl From<LoraFormat> for Layout {
    fn from(format: LoraFormat) -> Self {
        match format {
            LoraFormat::Kohya => Self::Kohya,
            LoraFormat::Diffusers => Self::Diffusers,
        }
    }
}

/// Parses a finite number.
pub(super) fn finite<T: FromStr + Into<f64> + Copy>(text: &str) -> std::result::Result<T, String> {
    match text.parse::<T>() {
        Ok(number) if number.into().is_finite() => Ok(number),
        _ => Err("expected a finite number".into()),
    }
}
