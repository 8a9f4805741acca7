//! `hyperlora plan`: cost estimate of a training run.

use std::path::PathBuf;
use std::process::ExitCode;

use burn_hyperlora::data::dataset::ALL_SPLITS;
use burn_hyperlora::experiment::Experiment;
use burn_hyperlora::plan::hardware::{
    BETWEEN_MACHINES, Gpu, Hops, Link, PER_MACHINE, PORTS, between_machines, parse_memory, parse_time,
};
use burn_hyperlora::plan::{Cluster, Setup};
use clap::Args;
use clap::builder::RangedU64ValueParser;
use data_prep::shard::Manifest;
use hyperlora_core::{Error, Result, output};

use crate::cli::options::Common;

/// Estimate memory, traffic, speed and days of a training from its configs alone
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  hyperlora plan experiments/sdxl/id-embedding.yaml --gpus 16 --gpu a100-80g --images 4400000\n  hyperlora plan experiments/sdxl/one-gpu-24g.yaml --gpu rtx-4090\n\nExit codes: 0 it fits, 2 it does not (the report says why and what to change) or the input needs fixing.\nThe formulas and assumptions are in docs/design/planning.md."
)]
pub(super) struct PlanArgs {
    /// YAML of the experiment
    config: PathBuf,
    /// Number of GPUs
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = RangedU64ValueParser::<u64>::new().range(1..=1 << 16))]
    gpus: u64,
    /// GPU model: a100-40g, a100-80g, h100-80g, h200, l40s, rtx-a6000, a10g, rtx-4090 or rtx-3090
    #[arg(long, value_name = "NAME")]
    gpu: Gpu,
    /// Link between GPUs: a speed per direction (300GB/s, 200Gb/s), nvlink3..5, pcie3..5, infiniband-edr, -hdr or -ndr,
    /// ethernet-10g, -25g or -100g. Speed per GPU; above eight GPUs, which run in machines of eight, per port of a
    /// machine [default: the GPU's own link, above eight infiniband-hdr]
    #[arg(long, value_name = "SPEED")]
    link: Option<Link>,
    /// Ports from each machine to the others, if there are several machines
    #[arg(long, value_name = "N", default_value_t = PORTS, value_parser = RangedU64ValueParser::<u64>::new().range(1..=64))]
    ports: u64,
    /// Latency of a message from one GPU to the next, whatever its length; a measured value such as 7.1us applies to
    /// every hop [default: NCCL's own: 3.4us over NVLink, 5.7us over PCIe, 14us from machine to machine]
    #[arg(long, value_name = "TIME", value_parser = parse_time)]
    hop: Option<f64>,
    /// Images per epoch [default: those of the shards]
    #[arg(long, value_name = "N", value_parser = RangedU64ValueParser::<u64>::new().range(1..))]
    images: Option<u64>,
    /// Fraction of the GPU's peak that a step reaches, above 0, at most 1
    #[arg(long, value_name = "SHARE", value_parser = share)]
    mfu: Option<f64>,
    /// Memory of one GPU instead of the model's own, such as 24GiB
    #[arg(long, value_name = "SIZE", value_parser = parse_memory)]
    gpu_memory: Option<u64>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

fn share(text: &str) -> std::result::Result<f64, String> {
    match text.parse::<f64>() {
        Ok(share) if share > 0.0 && share <= 1.0 => Ok(share),
        _ => Err("expected a number above 0, at most 1".into()),
    }
}

pub(super) fn run(args: &PlanArgs, common: &Common) -> Result<ExitCode> {
    common.start_log(None)?;
    let experiment = Experiment::load(&args.config)?;
    let setup = Setup::read(&experiment, args.cluster()?, args.images(&experiment)?)?;
    let plan = setup.plan();
    if args.json {
        let text = serde_json::to_string_pretty(&plan)
            .map_err(|problem| Error::Fault(format!("the plan cannot be written as JSON: {problem}")))?;
        output::line(format_args!("{text}"))?;
    } else {
        output::text(format_args!("{plan}"))?;
    }
    Ok(if plan.fits { ExitCode::SUCCESS } else { ExitCode::from(2) })
}

impl PlanArgs {
    fn cluster(&self) -> Result<Cluster> {
        let several = self.gpus > PER_MACHINE;
        let fault = |problem| Error::Fault(format!("{}: {problem}", self.gpu.name));
        let link = match &self.link {
            Some(link) => link.clone(),
            None => if several { BETWEEN_MACHINES } else { self.gpu.link }.parse().map_err(fault)?,
        };
        let link = if several { between_machines(&self.gpu, &link, self.ports).map_err(fault)? } else { link };
        Ok(Cluster {
            gpu: self.gpu,
            gpus: self.gpus,
            memory: self.gpu_memory.unwrap_or(self.gpu.memory_mib << 20),
            link,
            hops: self.hop.map_or_else(|| Hops::of_nccl(&self.gpu), Hops::all),
            utilisation: self.mfu.unwrap_or(self.gpu.utilisation),
        })
    }

    /// Returns the number of images: the option's, or the split's count in the shards' manifest if there are shards.
    fn images(&self, experiment: &Experiment) -> Result<Option<u64>> {
        let shards = experiment.data.shards.resolve(experiment.folder())?;
        if self.images.is_some() || !shards.is_dir() {
            return Ok(self.images);
        }
        let manifest = Manifest::read(&shards)?;
        let split = &experiment.data.split;
        let images = if split == ALL_SPLITS { Some(manifest.kept) } else { manifest.splits.get(split).copied() };
        Ok(images.map(|images| images as u64).filter(|images| *images > 0))
    }
}
