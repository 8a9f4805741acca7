//! Background writer of checkpoints, run by all ranks together while training continues.
//!
//! 1. Every rank copies its part to host memory; a step waits only for this.
//! 2. A thread of every rank writes the copy, syncs it and computes its checksums.
//! 3. Once all ranks have sent the main rank their checksums, a thread of the main rank moves the folder into place.
//!
//! The ranks exchange notes between steps, in [`CheckpointWriter::advance`], never from the threads. A checkpoint that
//! was interrupted at any point stays a hidden folder, which the next start removes.

use std::thread;
use std::time::{Duration, Instant};

use hyperlora_core::files::StagedFolder;
use hyperlora_core::{Error, Result};
use hyperlora_ranks::{Collective, Failure};
use serde::{Deserialize, Serialize};

use super::part::{FileSums, RankPart};
use super::task::Task;
use super::{Checkpoint, CheckpointStore, OWNERSHIP, commit};

/// Pause between two checks of a disk being waited for.
const PAUSE: Duration = Duration::from_millis(1);

/// Writes checkpoints in the background, one at a time. All ranks call the same methods in the same order.
///
/// Dropping it waits for its thread and abandons a checkpoint that is not in its place by then.
pub struct CheckpointWriter {
    store: CheckpointStore,
    /// Longest wait for the ranks' disks.
    deadline: Duration,
    writing: Option<Writing>,
}

/// Checkpoint being written.
struct Writing {
    checkpoint: Checkpoint,
    phase: Phase,
}

enum Phase {
    Parts(WrittenPart),
    /// On the main rank only; the others have nothing left to do.
    Placing(Task<()>),
}

/// This rank's part while it is written.
struct WrittenPart {
    sums: Task<FileSums>,
    /// `None` if it could not be created, or once it was handed on.
    folder: Option<StagedFolder>,
    leads: bool,
    /// True once the main rank was told that the part is written.
    told: bool,
    afterwards: Afterwards,
}

type Afterwards = Box<dyn FnOnce() -> Result<()> + Send>;

/// Message from one rank to the others.
#[derive(Serialize, Deserialize)]
struct Word {
    note: Note,
    /// True if this rank has waited beyond the deadline. The ranks' clocks differ, and all must give up together.
    late: bool,
}

/// Progress of a rank's work.
#[derive(Serialize, Deserialize)]
enum Note {
    Working,
    Done(FileSums),
    Failed(Failure),
}

impl CheckpointWriter {
    /// Creates a writer into `store` that waits for a disk up to `deadline`.
    pub fn new(store: CheckpointStore, deadline: Duration) -> Self {
        Self { store, deadline, writing: None }
    }

    /// Begins the checkpoint of `step`, once the previous one is in its place. `copy` copies this rank's part to host
    /// memory and returns a closure that writes it, which runs in a thread; the main rank's closure also writes
    /// [`RankPart::state`]. The main rank runs `afterwards`, in a thread, once the checkpoint is in its place.
    ///
    /// Errors of this checkpoint are reported on all ranks by [`advance`](Self::advance) and [`finish`](Self::finish).
    ///
    /// # Errors
    /// Errors of the previous checkpoint; see [`finish`](Self::finish).
    pub fn begin<W: FnOnce(&mut RankPart<'_>) -> Result<()> + Send + 'static>(
        &mut self,
        world: &dyn Collective,
        step: u64,
        copy: impl FnOnce() -> Result<W>,
        afterwards: impl FnOnce() -> Result<()> + Send + 'static,
    ) -> Result<()> {
        self.finish(world)?;
        let checkpoint = self.store.of_step(step);
        let (folder, sums) =
            match StagedFolder::shared(&checkpoint.path, OWNERSHIP).and_then(|folder| Ok((folder, copy()?))) {
                Ok((folder, write)) => {
                    let path = folder.path().to_owned();
                    let sums = Task::start(move || {
                        let mut part = RankPart::new(&path);
                        write(&mut part)?;
                        part.finish()
                    });
                    (Some(folder), sums)
                }
                Err(error) => (None, Task::done(Err(error))),
            };
        let leads = world.is_main();
        let part = WrittenPart { sums, folder, leads, told: false, afterwards: Box::new(afterwards) };
        self.writing = Some(Writing { checkpoint, phase: Phase::Parts(part) });
        Ok(())
    }

    /// Exchanges progress with the other ranks and starts the next phase if all are ready. Call it between steps: it
    /// waits for no disk. Returns the checkpoint that was moved into place, if any.
    ///
    /// # Errors
    /// Disk: this rank's disk is full or failing; Input: the place cannot be written to; PeerFailed: names another rank
    /// that failed. Older checkpoints are intact.
    pub fn advance(&mut self, world: &dyn Collective) -> Result<Option<Checkpoint>> {
        self.hear(world, false)
    }

    /// Runs [`advance`](Self::advance). If any rank is `late` while disks are still busy, all ranks give up.
    fn hear(&mut self, world: &dyn Collective, late: bool) -> Result<Option<Checkpoint>> {
        let Some(mut writing) = self.writing.take() else { return Ok(None) };
        let what = format!("all ranks to write {}", writing.checkpoint.path.display());
        let broken = |error: serde_json::Error| Error::Fault(format!("a note between ranks cannot be read: {error}"));
        let own = serde_json::to_vec(&Word { note: writing.note(), late }).map_err(broken)?;
        let words = world.exchange(&what, &own)?;
        let mut all = Some(FileSums::new());
        let mut any_late = false;
        for (rank, word) in words.iter().enumerate() {
            let Word { note, late } = serde_json::from_slice(word).map_err(broken)?;
            any_late |= late;
            match note {
                Note::Done(sums) => all.iter_mut().for_each(|all| all.extend(sums.clone())),
                Note::Working => all = None,
                Note::Failed(_) if rank == world.rank() => writing.fail()?,
                Note::Failed(failure) => return Err(failure.heard_from(rank, world)),
            }
        }
        self.writing = match (all, writing.phase) {
            (None, phase) if any_late => {
                // The task is leaked, because waiting for a disk that hangs would hang too. The next start removes what
                // it wrote.
                std::mem::forget(phase);
                let (path, seconds) = (writing.checkpoint.path.display(), self.deadline.as_secs());
                return Err(Error::Fault(format!(
                    "{path}: not written after {seconds} s\n  remedy: check why the disk is slow, or allow more time with train.collective_timeout_s (a tenth of these seconds)"
                )));
            }
            (None, phase) => Some(Writing { phase, ..writing }),
            (Some(sums), Phase::Parts(part)) => Some(Writing { phase: Phase::Placing(part.commit(sums)), ..writing }),
            (Some(_), Phase::Placing(_)) => {
                if world.is_main() {
                    tracing::debug!("saved {}", writing.checkpoint.path.display());
                }
                return Ok(Some(writing.checkpoint));
            }
        };
        Ok(None)
    }

    /// Waits until the last checkpoint is in its place, and returns it unless it was returned before. The ranks
    /// exchange progress meanwhile, so a rank that hangs is noticed as in any step.
    ///
    /// # Errors
    /// Same as [`advance`](Self::advance); Fault, on all ranks: a disk that does not finish within the deadline.
    pub fn finish(&mut self, world: &dyn Collective) -> Result<Option<Checkpoint>> {
        let begun = Instant::now();
        while self.writing.is_some() {
            if let Some(checkpoint) = self.hear(world, begun.elapsed() > self.deadline)? {
                return Ok(Some(checkpoint));
            }
            thread::sleep(PAUSE);
        }
        Ok(None)
    }
}

impl Writing {
    fn note(&mut self) -> Note {
        let told = |error: &Error| Note::Failed(Failure::of(error));
        match &mut self.phase {
            Phase::Parts(part) => {
                let note = match part.sums.result() {
                    None => Note::Working,
                    Some(Ok(sums)) => Note::Done(sums.clone()),
                    Some(Err(error)) => told(error),
                };
                part.told |= matches!(note, Note::Done(_));
                note
            }
            Phase::Placing(placed) => match placed.result() {
                None => Note::Working,
                Some(Ok(())) => Note::Done(FileSums::new()),
                Some(Err(error)) => told(error),
            },
        }
    }

    /// Takes this rank's error.
    fn fail(&mut self) -> Result<()> {
        let failed = match &mut self.phase {
            Phase::Parts(part) => part.sums.take().map(|sums| sums.map(drop)),
            Phase::Placing(placed) => placed.take(),
        };
        failed.unwrap_or(Ok(()))
    }
}

impl WrittenPart {
    /// Moves the folder with the files of `sums` into place on the main rank; does nothing on the others.
    fn commit(mut self, sums: FileSums) -> Task<()> {
        let afterwards = std::mem::replace(&mut self.afterwards, Box::new(|| Ok(())));
        let Some(folder) = self.folder.take() else { return Task::done(Ok(())) };
        if self.leads {
            return Task::start(move || commit(folder, &sums).and_then(|()| afterwards()));
        }
        folder.leave();
        Task::done(Ok(()))
    }
}

impl Drop for WrittenPart {
    /// Removes the folder, unless the main rank may be about to move it into place.
    fn drop(&mut self) {
        self.sums.wait();
        if let Some(folder) = self.folder.take_if(|_| self.told && !self.leads) {
            folder.leave();
        }
    }
}
