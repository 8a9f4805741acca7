//! Skipped steps: one line each in `skipped.jsonl`, with the photos of the batch.

use std::collections::BTreeSet;
use std::io::{self, Read, Write};
use std::path::Path;

use hyperlora_core::paths::read_regular;
use hyperlora_core::{Error, Result, files};
use hyperlora_ranks::Ranks;
use serde::{Deserialize, Serialize};

use crate::run::SKIPPED;

#[derive(Serialize, Deserialize)]
struct Line {
    step: u64,
    stage: String,
    reason: String,
    /// Keys of the target photos of all ranks, in draw order.
    photos: Vec<String>,
}

/// Records that `step` was skipped. `own` holds the draws of this rank's samples and the keys of their photos.
///
/// # Errors
/// On all ranks, Input or Disk: the main rank cannot write the file. Also errors of the collective.
pub(crate) fn note(
    ranks: &Ranks,
    run: &Path,
    step: u64,
    stage: &str,
    reason: &str,
    own: &[(u64, String)],
) -> Result<()> {
    let shares = ranks.share("the photos of a skipped step", Ok(&own.to_vec()))?;
    ranks.on_main("rank 0 to note a skipped step", || {
        let mut photos: Vec<(u64, String)> = shares.into_iter().flatten().collect();
        photos.sort();
        let photos = photos.into_iter().map(|(_, key)| key).collect();
        let line = Line { step, stage: stage.into(), reason: reason.into(), photos };
        let line = serde_json::to_string(&line).map_err(|error| Error::Fault(format!("{SKIPPED}: {error}")))?;
        let path = run.join(SKIPPED);
        append(&path, &line).map_err(|source| Error::write(&path, source))
    })
}

/// Maximum size of a file to read, in bytes: a few hundred thousand steps.
const LARGEST: u64 = 1 << 28;

/// Appends a line in one write. First ends a line that a dying process left incomplete.
fn append(path: &Path, line: &str) -> io::Result<()> {
    let mut file = files::append(path)?;
    let mut text = Vec::new();
    file.read_to_end(&mut text)?;
    let broken = if text.last().is_none_or(|last| *last == b'\n') { "" } else { "\n" };
    file.write_all(format!("{broken}{line}\n").as_bytes())
}

/// Counts the steps that `run` skipped. A step repeated after a kill counts once; an incomplete line from a dying
/// process does not count.
///
/// # Errors
/// Same as [`Error::read`].
pub fn count(run: &Path) -> Result<usize> {
    let path = run.join(SKIPPED);
    let text = match read_regular(&path, LARGEST) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(0),
        text => text.map_err(|source| Error::read(&path, source))?,
    };
    // A line may have been cut within a character.
    let text = String::from_utf8_lossy(&text);
    let lines = text.lines().filter_map(|line| serde_json::from_str::<Line>(line).ok());
    Ok(lines.map(|line| line.step).collect::<BTreeSet<_>>().len())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn a_half_written_line_costs_no_other_one() {
        let run = tempfile::tempdir().unwrap();
        let path = run.path().join(SKIPPED);
        let line = |step| {
            let line = Line { step, stage: "base".into(), reason: "NaN".into(), photos: vec!["a".into()] };
            serde_json::to_string(&line).unwrap()
        };
        assert_eq!(count(run.path()).unwrap(), 0);
        append(&path, &line(3)).unwrap();
        let whole = fs::read_to_string(&path).unwrap();
        assert_eq!(whole, format!("{}\n", line(3)));
        // Killed in the middle of a line, in the middle of a character, and before the line's end.
        for (step, left) in [(4, &line(4).as_bytes()[..20]), (5, b"{\"reason\": \"\xc3"), (6, line(7).as_bytes())] {
            let mut text = fs::read(&path).unwrap();
            text.extend(left);
            fs::write(&path, text).unwrap();
            append(&path, &line(step)).unwrap();
        }
        assert_eq!(count(run.path()).unwrap(), 5);
    }
}
