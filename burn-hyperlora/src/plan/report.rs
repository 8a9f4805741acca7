//! Plan as text: aligned tables on a screen or two.

use std::fmt::{self, Display, Formatter};

use hyperlora_core::text::name;

use crate::plan::Plan;
use crate::plan::hardware::PER_MACHINE;
use crate::plan::memory::{MemoryPlan, gib};
use crate::plan::setup::ModelPart;
use crate::plan::stage::StagePlan;

/// Formats a count: 2.568 B, 83.65 M.
fn count(number: u64) -> String {
    let number = number as f64;
    match number {
        1e9.. => format!("{:.3} B", number / 1e9),
        1e6.. => format!("{:.2} M", number / 1e6),
        1e3.. => format!("{:.1} K", number / 1e3),
        _ => format!("{number}"),
    }
}

/// Formats bytes in decimal units, as for files.
fn bytes(number: f64) -> String {
    match number {
        1e9.. => format!("{:.2} GB", number / 1e9),
        1e6.. => format!("{:.2} MB", number / 1e6),
        _ => format!("{:.1} kB", number / 1e3),
    }
}

fn tera(flops: f64) -> String {
    match flops {
        1e10.. => format!("{:.3} T", flops / 1e12),
        _ => format!("{:.2} M", flops / 1e6),
    }
}

/// Name of a row, and its cell for each stage.
type Row<T, V> = (&'static str, fn(&T) -> V);

/// Table of cells: the first column is left-aligned, the others right-aligned.
struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    fn new<const N: usize>(head: [&str; N]) -> Self {
        Self { rows: vec![head.map(String::from).to_vec()] }
    }

    /// Creates a table with a name column and one column per stage.
    fn of_stages(title: &str, stages: &[StagePlan]) -> Self {
        let names = stages.iter().map(|stage| stage.name.to_owned());
        Self { rows: vec![std::iter::once(title.to_owned()).chain(names).collect()] }
    }

    fn row(&mut self, name: &str, cells: impl IntoIterator<Item = String>) {
        self.rows.push(std::iter::once(name.to_owned()).chain(cells).collect());
    }
}

impl Display for Table {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let cells = |column: usize| self.rows.iter().filter_map(move |row| row.get(column));
        let widths: Vec<usize> =
            (0..columns).map(|column| cells(column).map(|cell| cell.chars().count()).max().unwrap_or(0)).collect();
        for (line, row) in self.rows.iter().enumerate() {
            let indent = if line == 0 { "" } else { "  " };
            let first = widths[0] + 2 - indent.len();
            let mut text = format!("{indent}{:<first$}", row.first().map_or("", String::as_str));
            for (cell, width) in row.iter().zip(&widths).skip(1) {
                text.push_str(&format!("  {cell:>width$}"));
            }
            writeln!(f, "{}", text.trim_end())?;
        }
        Ok(())
    }
}

impl Display for Plan {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        self.head(f)?;
        writeln!(f, "\n{}\n{}", self.parameters(), self.memory())?;
        writeln!(f, "{}\n{}", self.work(), self.time())?;
        let verdict = if self.fits { "fits" } else { "DOES NOT FIT" };
        let room = gib(self.cluster.memory);
        writeln!(f, "{verdict} into {room} GiB; {:.2} days in all", self.days)?;
        self.advice.iter().try_for_each(|line| writeln!(f, "  {line}"))
    }
}

impl Plan {
    fn head(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let cluster = &self.cluster;
        let (gpu, link) = (cluster.gpu, &cluster.link);
        writeln!(f, "{} on {} x {} of {} GiB", self.experiment, cluster.gpus, gpu.name, gib(cluster.memory))?;
        let share = 100.0 * cluster.utilisation;
        let link_speed = link.bytes_per_second / 1e9;
        writeln!(
            f,
            "assumed: {share:.0} % of {} TFLOP/s in bf16 and {} in TF32; link {} ({link_speed} GB/s)",
            gpu.bf16_tflops, gpu.tf32_tflops, link.name,
        )?;
        let (inside, between) = (1e6 * cluster.hops.inside, 1e6 * cluster.hops.between_machines);
        if cluster.gpus > PER_MACHINE {
            writeln!(f, "assumed: {inside:.1} us per hop inside a machine, {between:.1} us from machine to machine")?;
        } else if cluster.gpus > 1 {
            writeln!(f, "assumed: {inside:.1} us per hop")?;
        }
        for assumed in &self.assumed {
            writeln!(f, "assumed: {}", name(assumed))?;
        }
        writeln!(
            f,
            "step: {} samples = {} GPUs x micro-batch {} x {} passes; {} px, UNet in {}, {}, K {}",
            self.global_batch,
            cluster.gpus,
            self.micro_batch,
            self.accumulation,
            self.image_size,
            self.unet_dtype,
            if self.recompute { "activations recomputed" } else { "activations kept" },
            self.basis,
        )
    }

    fn parameters(&self) -> Table {
        let mut table = Table::new(["parameters", "in memory", "not read"]);
        let mut list = |title: &str, parts: &[ModelPart]| {
            for part in parts {
                let left_out = if part.left_out > 0 { count(part.left_out) } else { String::new() };
                table.row(part.name, [count(part.parameters), left_out]);
            }
            table.row(title, [count(parts.iter().map(|part| part.parameters).sum()), String::new()]);
        };
        list("= frozen", &self.frozen);
        list("= hypernetwork", &self.trainable);
        table.row("attention modules", [self.attention_modules.to_string()]);
        table
    }

    fn memory(&self) -> Table {
        let mut table = Table::of_stages("memory per GPU, GiB", &self.stages);
        let rows: [Row<MemoryPlan, u64>; 11] = [
            ("UNet", |memory| memory.unet),
            ("encoders, f32", |memory| memory.encoders),
            ("hypernetwork, f32", |memory| memory.hypernetwork),
            ("AdamW moments, f32", |memory| memory.moments),
            ("gradients of the window, f32", |memory| memory.window),
            ("one of: encoding", |memory| memory.encoding),
            ("        UNet pass", |memory| memory.unet_pass),
            ("        hypernetwork backward", |memory| memory.hypernetwork_backward),
            ("workspace", |memory| memory.workspace),
            ("= peak", MemoryPlan::peak),
            ("= with sharded moments (ZeRO-1)", MemoryPlan::peak_sharded),
        ];
        for (name, value) in rows {
            table.row(name, self.stages.iter().map(|stage| gib(value(&stage.memory))));
        }
        table
    }

    fn work(&self) -> Table {
        let mut table = Table::of_stages("FLOPs per image", &self.stages);
        let rows: [Row<StagePlan, f64>; 8] = [
            ("UNet forward", |stage| stage.flops.unet_forward),
            ("UNet recomputed", |stage| stage.flops.unet_recompute),
            ("UNet backward", |stage| stage.flops.unet_backward),
            ("  its attention, f32", |stage| stage.flops.unet_attention_backward),
            ("VAE encoder, f32", |stage| stage.flops.vae_encoder),
            ("text encoders, f32", |stage| stage.flops.text_encoders),
            ("image encoder, f32", |stage| stage.flops.image_encoder),
            ("hypernetwork, f32", |stage| stage.flops.hypernetwork),
        ];
        for (name, value) in rows {
            table.row(name, self.stages.iter().map(|stage| tera(value(stage))));
        }
        table
    }

    fn time(&self) -> Table {
        let mut table = Table::of_stages("stage", &self.stages);
        let rows: [Row<StagePlan, String>; 11] = [
            ("trained parameters", |stage| count(stage.trainable)),
            ("optimiser steps", |stage| stage.steps.to_string()),
            ("all-reduced per step", |stage| bytes(stage.gradient_bytes as f64)),
            ("sent per GPU and step", |stage| bytes(stage.sent_bytes)),
            ("all-reduce, s", |stage| format!("{:.3}", stage.all_reduce_seconds)),
            ("step, s", |stage| format!("{:.2}", stage.step_seconds)),
            ("images/s", |stage| format!("{:.1}", stage.images_per_second)),
            ("samples drawn", |stage| count(stage.samples)),
            ("checkpoint", |stage| bytes(stage.checkpoint_bytes as f64)),
            ("disk for checkpoints", |stage| bytes(stage.disk_bytes as f64)),
            ("days", |stage| format!("{:.2}", stage.days)),
        ];
        for (name, value) in rows {
            table.row(name, self.stages.iter().map(value));
        }
        match self.images {
            Some(images) => {
                let epochs = self.stages.iter().map(|stage| format!("{:.2}", stage.epochs.unwrap_or(0.0)));
                table.row(&format!("epochs of {images} samples"), epochs);
            }
            None => table.row("epochs", self.stages.iter().map(|_| "? (--images N)".to_owned())),
        }
        table
    }
}
