//! Hardware data: GPUs and their links.

use std::str::FromStr;

use serde::Serialize;

/// GPU model. Peaks are for dense matrix products on tensor cores with f32 accumulation, without sparsity.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Gpu {
    /// Name on the command line.
    pub name: &'static str,
    /// MemoryPlan in MiB, as reported by `nvidia-smi`.
    pub memory_mib: u64,
    /// Peak in bf16, TFLOP/s.
    pub bf16_tflops: f64,
    /// Peak in TF32, TFLOP/s, which f32 matrix products run in.
    pub tf32_tflops: f64,
    /// Share of the peak that a whole training step is assumed to reach; not a measurement.
    pub utilisation: f64,
    /// Link to the other GPUs in one machine.
    pub link: &'static str,
    /// Source of the figures.
    pub source: &'static str,
}

/// GPUs known to `--gpu`.
pub const GPUS: [Gpu; 9] = [
    Gpu {
        name: "a100-40g",
        memory_mib: 40_960,
        bf16_tflops: 312.0,
        tf32_tflops: 156.0,
        utilisation: 0.35,
        link: "nvlink3",
        source: "NVIDIA A100 Tensor Core GPU data sheet",
    },
    Gpu {
        name: "a100-80g",
        memory_mib: 81_920,
        bf16_tflops: 312.0,
        tf32_tflops: 156.0,
        utilisation: 0.35,
        link: "nvlink3",
        source: "NVIDIA A100 Tensor Core GPU data sheet",
    },
    Gpu {
        name: "h100-80g",
        memory_mib: 81_559,
        bf16_tflops: 989.4,
        tf32_tflops: 494.7,
        utilisation: 0.25,
        link: "nvlink4",
        source: "NVIDIA H100 Tensor Core GPU data sheet (SXM5; half of the figures with sparsity)",
    },
    Gpu {
        name: "h200",
        memory_mib: 143_771,
        bf16_tflops: 989.4,
        tf32_tflops: 494.7,
        utilisation: 0.25,
        link: "nvlink4",
        source: "NVIDIA H200 Tensor Core GPU data sheet (SXM; half of the figures with sparsity)",
    },
    Gpu {
        name: "l40s",
        memory_mib: 46_068,
        bf16_tflops: 362.0,
        tf32_tflops: 183.0,
        utilisation: 0.3,
        link: "pcie4",
        source: "NVIDIA L40S data sheet",
    },
    Gpu {
        name: "rtx-a6000",
        memory_mib: 49_140,
        bf16_tflops: 154.8,
        tf32_tflops: 77.4,
        utilisation: 0.35,
        link: "pcie4",
        source: "NVIDIA RTX A6000 data sheet (half of the figures with sparsity)",
    },
    Gpu {
        name: "a10g",
        memory_mib: 23_028,
        bf16_tflops: 70.0,
        tf32_tflops: 35.0,
        utilisation: 0.35,
        link: "pcie4",
        source: "NVIDIA A10G data sheet",
    },
    Gpu {
        name: "rtx-4090",
        memory_mib: 24_564,
        bf16_tflops: 165.2,
        tf32_tflops: 82.6,
        utilisation: 0.35,
        link: "pcie4",
        source: "NVIDIA Ada GPU architecture white paper",
    },
    Gpu {
        name: "rtx-3090",
        memory_mib: 24_576,
        bf16_tflops: 71.0,
        tf32_tflops: 35.6,
        utilisation: 0.35,
        link: "pcie4",
        source: "NVIDIA Ampere GA102 GPU architecture white paper",
    },
];

impl FromStr for Gpu {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        GPUS.into_iter().find(|gpu| gpu.name == name).ok_or_else(|| {
            let known: Vec<&str> = GPUS.iter().map(|gpu| gpu.name).collect();
            format!("expected one of {}; --gpu-memory and --mfu fit the nearest one to another card", known.join(", "))
        })
    }
}

/// Bandwidth of a GPU or of a machine's port, in one direction.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Link {
    /// Name as requested.
    pub name: String,
    /// Bandwidth in bytes per second.
    pub bytes_per_second: f64,
}

/// Links by name: GB/s in one direction, per GPU or port. A port of 200 Gb/s carries 25 GB/s.
pub const LINKS: [(&str, f64); 12] = [
    ("nvlink3", 300.0),
    ("nvlink4", 450.0),
    ("nvlink5", 900.0),
    ("pcie3", 16.0),
    ("pcie4", 32.0),
    ("pcie5", 64.0),
    ("infiniband-edr", 12.5),
    ("infiniband-hdr", 25.0),
    ("infiniband-ndr", 50.0),
    ("ethernet-10g", 1.25),
    ("ethernet-25g", 3.125),
    ("ethernet-100g", 12.5),
];

/// Default port to other machines.
pub const BETWEEN_MACHINES: &str = "infiniband-hdr";

/// Number of GPUs in one machine.
pub const PER_MACHINE: u64 = 8;

/// Default number of a machine's ports to other machines: one per GPU.
pub const PORTS: u64 = PER_MACHINE;

/// Bandwidth per GPU of rings through several machines. NCCL runs a ring through every port, each with its share of the
/// bytes: together they have the bandwidth of all ports of a machine, but at most that of the GPUs' own link.
///
/// # Errors
/// The expected names, for a GPU with an unknown link.
pub fn between_machines(gpu: &Gpu, port: &Link, ports: u64) -> Result<Link, String> {
    let own: Link = gpu.link.parse()?;
    let all_ports = ports as f64 * port.bytes_per_second;
    Ok(Link { name: format!("{ports} x {}", port.name), bytes_per_second: all_ports.min(own.bytes_per_second) })
}

/// Latency in seconds of a ring message from one GPU to the next, whatever its length.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Hops {
    /// Latency within a machine.
    pub inside: f64,
    /// Latency between machines.
    pub between_machines: f64,
}

impl Hops {
    /// Returns the latencies of NCCL's tuner (ring, simple protocol), over NVLink or PCIe depending on `gpu`.
    pub fn of_nccl(gpu: &Gpu) -> Self {
        Self { inside: if gpu.link.starts_with("nvlink") { 3.4e-6 } else { 5.7e-6 }, between_machines: 14e-6 }
    }

    /// Sets every hop to the same `seconds`, as fitted to measured collectives.
    pub fn all(seconds: f64) -> Self {
        Self { inside: seconds, between_machines: seconds }
    }

    /// Latency in seconds of a bucket's reduce-scatter and all-gather over `gpus`: 2 (n - 1) hops, of which
    /// 2 (machines - 1) are between machines.
    pub fn seconds(self, gpus: u64) -> f64 {
        let between = gpus.div_ceil(PER_MACHINE).saturating_sub(1);
        let inside = gpus.saturating_sub(1).saturating_sub(between);
        2.0 * (inside as f64 * self.inside + between as f64 * self.between_machines)
    }
}

/// Parses a time with its unit to seconds: `7.1us`, `0.014ms`, `800ns`.
///
/// # Errors
/// The expected format.
pub fn parse_time(text: &str) -> Result<f64, String> {
    let seconds = [("ns", 1e-9), ("us", 1e-6), ("ms", 1e-3)]
        .into_iter()
        .find_map(|(unit, factor)| Some(text.strip_suffix(unit)?.trim_end().parse::<f64>().ok()? * factor));
    match seconds {
        Some(seconds) if seconds.is_finite() && seconds >= 0.0 => Ok(seconds),
        _ => Err("expected a time such as 7.1us or 0.014ms".into()),
    }
}

impl FromStr for Link {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let link = |gigabytes: f64| Self { name: text.into(), bytes_per_second: gigabytes * 1e9 };
        if let Some((_, gigabytes)) = LINKS.iter().find(|(name, _)| *name == text) {
            return Ok(link(*gigabytes));
        }
        // GB/s are bytes, Gb/s bits; only the case differs.
        let speed = [("GB/s", 1.0), ("Gb/s", 0.125), ("MB/s", 1e-3)]
            .into_iter()
            .find_map(|(unit, factor)| Some(text.strip_suffix(unit)?.trim_end().parse::<f64>().ok()? * factor));
        match speed {
            Some(speed) if speed.is_finite() && speed > 0.0 => Ok(link(speed)),
            _ => {
                let known: Vec<&str> = LINKS.iter().map(|(name, _)| *name).collect();
                Err(format!("expected a speed such as 300GB/s or 200Gb/s, or one of {}", known.join(", ")))
            }
        }
    }
}

/// Parses a memory size with its unit to whole bytes: `24GiB`, `24564MiB`, `80GB`.
///
/// # Errors
/// The expected format.
pub fn parse_memory(text: &str) -> Result<u64, String> {
    let units = [("GiB", (1_u64 << 30) as f64), ("MiB", (1_u64 << 20) as f64), ("GB", 1e9), ("MB", 1e6)];
    let bytes = units
        .into_iter()
        .find_map(|(unit, factor)| Some(text.strip_suffix(unit)?.trim_end().parse::<f64>().ok()? * factor));
    match bytes {
        // Every whole number below 2^53 is exact in f64.
        Some(bytes) if (1.0..9e15).contains(&bytes) => Ok(bytes as u64),
        _ => Err("expected a size such as 24GiB or 24564MiB".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_have_names_or_speeds() {
        let speed = |text: &str| text.parse::<Link>().map(|link| link.bytes_per_second);
        assert_eq!(speed("300GB/s"), Ok(300e9));
        assert_eq!(speed("200 Gb/s"), Ok(25e9));
        assert_eq!(speed("nvlink3"), Ok(300e9));
        for wrong in ["", "300", "GB/s", "-1GB/s", "nanGB/s", "infGB/s", "0GB/s", "nvlink"] {
            assert!(speed(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn every_gpu_has_a_link_and_a_peak_that_halves_from_bf16_to_tf32() {
        for gpu in GPUS {
            assert_eq!(gpu.name.parse(), Ok(gpu));
            assert!(gpu.link.parse::<Link>().is_ok(), "{}", gpu.name);
            assert!((gpu.bf16_tflops / gpu.tf32_tflops - 2.0).abs() < 0.05, "{}", gpu.name);
        }
        assert!(BETWEEN_MACHINES.parse::<Link>().is_ok());
        assert!("gtx-970".parse::<Gpu>().is_err_and(|message| message.contains("rtx-4090")));
    }

    #[test]
    fn hops_inside_and_between_machines_add_up() {
        let seconds = |gpus| Hops::of_nccl(&GPUS[1]).seconds(gpus);
        assert_eq!(seconds(1), 0.0);
        assert!((seconds(8) - 14.0 * 3.4e-6).abs() < 1e-12);
        assert!((seconds(16) - (28.0 * 3.4e-6 + 2.0 * 14e-6)).abs() < 1e-12);
        assert!((Hops::of_nccl(&GPUS[4]).seconds(2) - 2.0 * 5.7e-6).abs() < 1e-12);
        assert!((Hops::all(1e-6).seconds(16) - 30e-6).abs() < 1e-12);
    }

    #[test]
    fn a_time_has_a_unit() {
        let microseconds = |text: &str| parse_time(text).map(|seconds| (1e6 * seconds).round());
        assert_eq!(microseconds("14us"), Ok(14.0));
        assert_eq!(microseconds("0.014 ms"), Ok(14.0));
        assert_eq!(microseconds("14000ns"), Ok(14.0));
        assert_eq!(microseconds("0us"), Ok(0.0));
        for wrong in ["", "14", "us", "-1us", "nanus", "infms", "14s "] {
            assert!(parse_time(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn rings_are_as_wide_as_all_ports_or_the_gpus_own_link() {
        let speed = |gpu: &str, port: &str, ports| {
            let ring = gpu.parse().and_then(|gpu| between_machines(&gpu, &port.parse()?, ports));
            ring.map(|ring| (ring.name, ring.bytes_per_second))
        };
        assert_eq!(speed("a100-80g", "infiniband-hdr", 8), Ok(("8 x infiniband-hdr".into(), 200e9)));
        assert_eq!(speed("a100-80g", "infiniband-hdr", 4), Ok(("4 x infiniband-hdr".into(), 100e9)));
        assert_eq!(speed("a100-80g", "infiniband-ndr", 8), Ok(("8 x infiniband-ndr".into(), 300e9)));
        assert_eq!(speed("l40s", "50GB/s", 1), Ok(("1 x 50GB/s".into(), 32e9)));
    }

    #[test]
    fn memory_has_a_unit() {
        assert_eq!(parse_memory("24GiB"), Ok(24 << 30));
        assert_eq!(parse_memory("1.5 GiB"), Ok(3 << 29));
        for wrong in ["24", "GiB", "-1GiB", "0GiB", "nanGiB", "1e99GiB"] {
            assert!(parse_memory(wrong).is_err(), "{wrong}");
        }
    }
}
