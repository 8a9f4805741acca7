//! Metrics and logs of a run: TensorBoard events, progress, the log, `summary.json` and resource usage.

mod anonymous;
mod event;
mod history;
mod live;
pub mod log;
mod progress;
mod summary;
mod tensorboard;
mod usage;

pub use history::LastScalars;
pub use live::LiveCurves;
pub use progress::{Display, Progress};
pub use summary::{GapStatistics, IdentityGap, RunSummary, StageSummary};
pub use tensorboard::MetricsWriter;
pub use usage::{ProcessMemory, RunningMeans, WaitClock};
