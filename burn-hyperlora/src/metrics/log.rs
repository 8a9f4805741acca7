//! Log: stderr at the level set by `-v` and `-q`, and `run.log` in the run folder.

use std::fmt::Display;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;

use hyperlora_core::files::append;
use hyperlora_core::text::log_fields;
use hyperlora_core::{Error, Result};
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::fmt::{self, MakeWriter};
use tracing_subscriber::layer::{Layer, SubscriberExt};
use tracing_subscriber::util::SubscriberInitExt;

use crate::metrics::anonymous::{Anonymous, Entry};
use crate::metrics::live::is_open;
use crate::metrics::progress::around_bars;

/// Starts the log, once per process.
///
/// `verbosity` is the number of `-v` minus that of `-q`: below 0, stderr shows warnings only; 0 adds progress and
/// results, 1 details, 2 everything including dependencies. `run.log` in `run` is appended to and always holds the
/// details, without absolute paths and host names. If its disk is full, lines are lost and the run continues.
///
/// # Errors
/// Input: `run.log` cannot be opened for writing; Disk: a failing disk; Fault: a log was started before.
pub fn init(verbosity: i8, run: Option<&Path>) -> Result<()> {
    start(verbosity, run, String::new())
}

/// Starts the log of a rank other than the main rank, once per process: stderr only, one level below `verbosity`, with
/// the rank on each line.
///
/// # Errors
/// Fault: a log was started before.
pub fn init_follower(verbosity: i8, rank: usize) -> Result<()> {
    start(verbosity - 1, None, format!("rank {rank}: "))
}

fn start(verbosity: i8, run: Option<&Path>, prefix: String) -> Result<()> {
    let own = |level| Targets::new().with_default(LevelFilter::WARN).with_targets(OWN.map(|target| (target, level)));
    let shown = match verbosity {
        ..0 => own(LevelFilter::WARN),
        0 => own(LevelFilter::INFO),
        1 => own(LevelFilter::DEBUG),
        2.. => Targets::new().with_default(LevelFilter::TRACE),
    };
    let shown = shown.with_target(FAILURE, LevelFilter::OFF);
    // After a SIGHUP stderr may be gone, and reporting that to stderr would panic.
    let stderr = fmt::layer().fmt_fields(log_fields()).with_ansi(false).log_internal_errors(false);
    let stderr = stderr.without_time().with_target(verbosity > 0).with_writer(BesideBars { prefix });
    let file = match run {
        Some(run) => {
            let layer = fmt::layer().fmt_fields(log_fields()).with_ansi(false).log_internal_errors(false);
            Some(layer.with_writer(RunLog(Anonymous::new(open(run)?))))
        }
        None => None,
    };
    tracing_subscriber::registry()
        .with(stderr.with_filter(shown))
        .with(file.with_filter(own(LevelFilter::DEBUG)))
        .try_init()
        .map_err(|problem| Error::Fault(format!("the log cannot be started: {problem}")))
}

/// Writes the error that ended the program to `run.log` only. The caller prints it to stderr, with or without a log.
pub fn note_failure(problem: &dyn Display) {
    tracing::error!(target: FAILURE, "{problem}");
}

/// Target of messages that stderr does not show.
const FAILURE: &str = "hyperlora::failure";

/// Crates of this program.
const OWN: [&str; 3] = ["hyperlora", "burn_hyperlora", "data_prep"];

fn open(run: &Path) -> Result<File> {
    let path = run.join("run.log");
    fs::create_dir_all(run).and_then(|()| append(&path)).map_err(|source| Error::write(&path, source))
}

/// Writer of `run.log`.
struct RunLog(Anonymous<File>);

impl<'a> MakeWriter<'a> for RunLog {
    type Writer = Entry<'a, File>;

    fn make_writer(&'a self) -> Self::Writer {
        self.0.entry()
    }
}

/// Stderr writer that hides the progress bars while it writes.
#[derive(Clone)]
struct BesideBars {
    /// Text before each entry.
    prefix: String,
}

impl Write for BesideBars {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        // The line stands in run.log. Here it would tear the curves.
        if !is_open() {
            around_bars(|| io::stderr().write_all(&[self.prefix.as_bytes(), line].concat()))?;
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}

impl MakeWriter<'_> for BesideBars {
    type Writer = Self;

    fn make_writer(&self) -> Self::Writer {
        self.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn details_go_into_the_run_folder_and_a_second_start_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let run = folder.path().join("runs/a");
        fs::create_dir_all(folder.path().join("taken/run.log")).unwrap();
        assert!(init(0, Some(&folder.path().join("taken"))).is_err());

        init(-1, Some(&run)).unwrap();
        tracing::debug!("learning rate 1e-4");
        tracing::debug!("resuming from {}\u{7}, https://a:b@h/x", run.join("checkpoints").display());
        tracing::trace!("too small to note");
        note_failure(&"the disk is full");
        let text = fs::read_to_string(run.join("run.log")).unwrap();
        assert!(text.contains("DEBUG") && text.contains("learning rate 1e-4") && !text.contains("too small"), "{text}");
        assert!(text.contains("resuming from …/checkpoints\\u{7}, https://***@h/x\n"), "{text}");
        assert!(text.contains("ERROR") && text.contains("the disk is full"), "{text}");
        assert_eq!(init(0, None).unwrap_err().exit_code(), 1);
    }
}
