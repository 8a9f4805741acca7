//! `--device`: the device that a command computes on.

use std::fmt::{self, Display, Formatter};
use std::str::FromStr;

use burn::tensor::Device;
use hyperlora_core::{Error, Result};

#[cfg(feature = "cuda")]
use crate::cli::settings;

/// Device name, checked while the command line is parsed.
#[derive(Debug, Clone, Copy)]
pub(super) enum DeviceChoice {
    Cpu,
    /// The GPU of this rank if the number is omitted.
    Cuda(Option<usize>),
}

impl FromStr for DeviceChoice {
    type Err = String;

    fn from_str(name: &str) -> std::result::Result<Self, String> {
        match name.strip_prefix("cuda:").map(str::parse::<usize>) {
            None if name == "cpu" => Ok(Self::Cpu),
            None if name == "cuda" => Ok(Self::Cuda(None)),
            Some(Ok(index)) => Ok(Self::Cuda(Some(index))),
            _ => Err("expected `cpu`, `cuda` or `cuda:N`, for example cuda:0".into()),
        }
    }
}

impl Display for DeviceChoice {
    fn fmt(&self, out: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cpu => out.write_str("cpu"),
            Self::Cuda(None) => out.write_str("cuda"),
            Self::Cuda(Some(index)) => write!(out, "cuda:{index}"),
        }
    }
}

impl DeviceChoice {
    /// Opens the device; `useful` is true if the command runs models.
    pub(super) fn open(self, useful: bool) -> Result<Device> {
        match self {
            Self::Cpu => Ok(Device::flex()),
            Self::Cuda(_) if !useful => Err(Error::input(
                format!("--device {self}"),
                "this command does not use a GPU: it runs on the CPU only",
                "leave --device out",
            )),
            #[cfg(feature = "cuda")]
            Self::Cuda(asked) => {
                let local_rank = hyperlora_ranks::Placement::of_process()?.map(|placement| placement.local_rank);
                settings::keep_kernels(local_rank.unwrap_or(0))?;
                let visible = Device::enumerate(burn::tensor::DeviceType::Cuda).len();
                Ok(Device::cuda(choose_gpu(asked, local_rank, visible)?))
            }
            #[cfg(not(feature = "cuda"))]
            Self::Cuda(_) => Err(Error::input(
                format!("--device {self}"),
                "this binary was built without CUDA",
                "cargo build --release --features burn-hyperlora/cuda",
            )),
        }
    }
}

/// Chooses the index of the GPU among the `visible` ones: `asked`, or that of the rank. A launcher may show each rank
/// only its own GPU (`srun --gpus-per-task=1`, a container per GPU), which then has index 0.
#[cfg(any(feature = "cuda", test))]
fn choose_gpu(asked: Option<usize>, local_rank: Option<usize>, visible: usize) -> Result<usize> {
    let index = asked.unwrap_or(if visible == 1 { 0 } else { local_rank.unwrap_or(0) });
    if index < visible {
        return Ok(index);
    }
    let place = asked.map_or_else(|| "--device cuda".into(), |index| format!("--device cuda:{index}"));
    if visible == 0 {
        let remedy =
            "check that nvidia-smi lists a GPU here, and CUDA_VISIBLE_DEVICES; or leave --device out for the CPU";
        return Err(Error::input(place, "no NVIDIA GPU is visible to this process", remedy));
    }
    let range = if visible == 1 { "only number 0 is".into() } else { format!("numbers 0 to {} are", visible - 1) };
    let problem = match (asked, local_rank) {
        (None, Some(rank)) => format!("local rank {rank} has no GPU: {range} visible"),
        _ => format!("there is no such GPU: {range} visible"),
    };
    Err(Error::input(
        place,
        problem,
        "start as many ranks per machine as it has GPUs; see nvidia-smi and CUDA_VISIBLE_DEVICES",
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_rank_gets_its_gpu_or_the_only_one_it_sees() {
        for (asked, local_rank, visible, chosen) in [
            (None, None, 8, 0),
            (None, Some(5), 8, 5),
            // `--gpus-per-task=1`: every rank sees one GPU, whatever its own number.
            (None, Some(5), 1, 0),
            (Some(3), Some(5), 8, 3),
        ] {
            assert_eq!(choose_gpu(asked, local_rank, visible).unwrap(), chosen);
        }
        for (asked, local_rank, visible, words) in [
            (None, None, 0, "no NVIDIA GPU is visible"),
            (None, Some(2), 2, "local rank 2 has no GPU: numbers 0 to 1 are visible"),
            (Some(1), None, 1, "--device cuda:1: there is no such GPU: only number 0 is visible"),
        ] {
            let error = choose_gpu(asked, local_rank, visible).unwrap_err();
            assert!(error.exit_code() == 2 && error.to_string().contains(words), "{error}");
        }
    }
}
