//! Progress display: a bar on a terminal, else a line at intervals.

use std::io::{self, IsTerminal};
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use indicatif::{HumanDuration, MultiProgress, ProgressBar, ProgressStyle};

use crate::metrics::live::AVAILABLE;

/// All bars of the process, so that log lines can be printed around them.
static BARS: LazyLock<MultiProgress> = LazyLock::new(MultiProgress::new);

/// Time between two lines.
const LINE_INTERVAL: Duration = Duration::from_secs(10);

const TEMPLATE: &str = "{prefix} {bar:30} {pos}/{len}  {msg}";

/// Display mode of progress.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Display {
    /// Bar at a fixed place on the terminal; lines go to the log file only.
    Bar,
    /// Live curves that fill the terminal (feature `tui`); lines go to the log file only.
    Curves,
    /// Log line at intervals.
    Lines,
    /// Log line at intervals, in the log file only.
    Hidden,
}

impl Display {
    /// Selects hidden if `quiet`, else a bar if stderr is a terminal, else lines.
    pub fn detect(quiet: bool) -> Self {
        match (quiet, io::stderr().is_terminal()) {
            (true, _) => Self::Hidden,
            (false, true) => Self::Bar,
            (false, false) => Self::Lines,
        }
    }

    /// Selects live curves for a training, if this build has them and the terminal is free for them.
    pub fn detect_for_training(quiet: bool) -> Self {
        match Self::detect(quiet) {
            Self::Bar if AVAILABLE && io::stdout().is_terminal() => Self::Curves,
            other => other,
        }
    }
}

/// Progress of one stage.
#[derive(Debug)]
pub struct Progress {
    stage: String,
    total: u64,
    bar: Option<ProgressBar>,
    display: Display,
    pace: Pace,
    last_line: Option<Instant>,
}

/// Speed of this process in the stage.
#[derive(Debug)]
struct Pace {
    begun: Instant,
    steps: u64,
    images: u64,
}

impl Pace {
    fn images_per_second(&self, elapsed: f64) -> f64 {
        if elapsed > 0.0 { self.images as f64 / elapsed } else { 0.0 }
    }

    fn left(&self, elapsed: f64, steps_left: u64) -> Duration {
        let per_step = if self.steps > 0 { elapsed / self.steps as f64 } else { 0.0 };
        Duration::try_from_secs_f64(per_step * steps_left as f64).unwrap_or(Duration::MAX)
    }
}

impl Progress {
    /// Creates the progress of `stage`, which starts at `done` of `total` steps.
    pub fn new(stage: &str, done: u64, total: u64, display: Display) -> Self {
        let bar = (display == Display::Bar).then(|| {
            let style = ProgressStyle::with_template(TEMPLATE).unwrap_or_else(|_| ProgressStyle::default_bar());
            let bar = BARS.add(ProgressBar::new(total).with_style(style).with_prefix(stage.to_owned()));
            bar.set_position(done);
            bar
        });
        let pace = Pace { begun: Instant::now(), steps: 0, images: 0 };
        Self { stage: stage.into(), total, bar, display, pace, last_line: None }
    }

    /// Records that `step` steps are done, the last one with `images` images. Sampling has no loss.
    pub fn step(&mut self, step: u64, loss: impl Into<Option<f64>>, images: usize) {
        self.pace.steps += 1;
        self.pace.images += images as u64;
        let state = self.state(step, loss.into(), self.pace.begun.elapsed().as_secs_f64());
        if let Some(bar) = &self.bar {
            bar.set_position(step);
            bar.set_message(state.clone());
        }
        let due = self.last_line.is_none_or(|last| last.elapsed() >= LINE_INTERVAL);
        if due || step == self.total {
            self.last_line = Some(Instant::now());
            let Self { stage, total, .. } = self;
            match self.display {
                Display::Lines => tracing::info!("{stage} {step}/{total}  {state}"),
                Display::Bar | Display::Curves | Display::Hidden => tracing::debug!("{stage} {step}/{total}  {state}"),
            }
        }
    }

    /// Returns the images per second of this process in the stage.
    pub fn images_per_second(&self) -> f64 {
        self.pace.images_per_second(self.pace.begun.elapsed().as_secs_f64())
    }

    /// Leaves the bar as it is.
    pub fn finish(self) {
        if let Some(bar) = self.bar {
            bar.abandon();
        }
    }

    fn state(&self, step: u64, loss: Option<f64>, elapsed: f64) -> String {
        let left = HumanDuration(self.pace.left(elapsed, self.total.saturating_sub(step)));
        // Steps without a loss are sampling steps, several per image, so their images per second mean nothing.
        let Some(loss) = loss else { return format!("{left} left") };
        let speed = self.pace.images_per_second(elapsed);
        format!("loss {loss:.4}  {speed:.1} images/s  {left} left")
    }
}

/// Runs `print` with the bars hidden.
pub(super) fn around_bars<T>(print: impl FnOnce() -> T) -> T {
    BARS.suspend(print)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tells_speed_and_time_left() {
        let mut progress = Progress::new("base", 10, 100, Display::Hidden);
        for step in 11..=20 {
            progress.step(step, 0.5, 4);
        }
        // 10 steps of 4 images in 20 s, with 80 steps left.
        assert_eq!(progress.state(20, Some(0.125), 20.0), "loss 0.1250  2.0 images/s  3 minutes left");
        assert_eq!(progress.state(20, None, 20.0), "3 minutes left");
        assert_eq!(
            Progress::new("base", 0, 9, Display::Hidden).state(0, Some(1.0), 0.0),
            "loss 1.0000  0.0 images/s  0 seconds left"
        );
    }

    #[test]
    fn the_template_of_the_bar_holds() {
        assert!(ProgressStyle::with_template(TEMPLATE).is_ok());
        let mut progress = Progress::new("base", 0, 2, Display::Bar);
        progress.step(1, 0.5, 4);
        assert_eq!(progress.bar.as_ref().map(ProgressBar::position), Some(1));
        progress.finish();
    }
}
