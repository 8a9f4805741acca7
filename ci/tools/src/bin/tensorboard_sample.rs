//! Writes the event files of a short run that was killed after step 5 and resumed from step 3, for
//! `ci/parity/check_tensorboard.py`: `cargo run -p hyperlora-tools --bin tensorboard_sample -- RUN`.

use std::path::Path;

use burn_hyperlora::metrics::MetricsWriter;
use hyperlora_core::{Error, Result};
use image::{Rgb, RgbImage};

const TAGS: [&str; 7] = [
    "loss/base/all",
    "optim/learning_rate",
    "optim/gradient_norm",
    "coefficients/mean_abs",
    "speed/images_per_second",
    "speed/data_wait_share",
    "memory/resident_bytes",
];

/// Writes steps `first..=last`. Each value identifies the session that wrote it.
fn session(folder: &Path, session: f64, first: u64, last: u64) -> Result<()> {
    let mut writer = MetricsWriter::create(folder, first)?;
    writer.text(first, "config", &format!("session: {session}\nprompt: \"fcsks fxhks fhyks, ü\""));
    for step in first..=last {
        writer.scalars(step, &TAGS.map(|tag| (tag, session + step as f64 / 1000.0)));
    }
    writer.image(last, "samples", &RgbImage::from_pixel(6, 4, Rgb([200, 100, session as u8])));
    writer.take_error().map_or(Ok(()), Err)
}

fn main() -> Result<()> {
    let run = std::env::args_os()
        .nth(1)
        .ok_or_else(|| Error::input("tensorboard_sample", "no folder is given", "give the run folder to write into"))?;
    let folder = Path::new(&run).join("tensorboard");
    session(&folder, 1.0, 1, 5)?;
    session(&folder, 2.0, 4, 8)
}
