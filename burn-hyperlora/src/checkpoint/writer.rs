//! Checkpoints written by all ranks together, while the training goes on.
//!
//! 1. Every rank copies its part to host memory: all that a step waits for.
//! 2. A thread of every rank writes the copy, syncs it and sums it up.
//! 3. Once all ranks have told rank 0 their sums, a thread of rank 0 puts the folder in its place.
//!
//! The ranks tell each other between steps, in [`CheckpointWriter::advance`], never from the threads. A checkpoint whose writing
//! was cut off in whatever moment stays a hidden folder, which the next start removes.

use std::thread;
use std::time::{Duration, Instant};

use hyperlora_core::files::StagedFolder;
use hyperlora_core::{Error, Result};
use hyperlora_ranks::{Collective, Failure};
use serde::{Deserialize, Serialize};

use super::part::{FileSums, Part};
use super::task::Task;
use super::{Checkpoint, CheckpointStore, OWNERSHIP, place};

/// Between two looks at a disk that is waited for.
const PAUSE: Duration = Duration::from_millis(1);

/// Writes checkpoints in the background, one at a time. All ranks call the same methods in the same order.
///
/// Dropped, it waits for its thread, and what is not in its place by then is given up.
pub struct CheckpointWriter {
    store: CheckpointStore,
    /// The longest wait for the ranks' disks.
    deadline: Duration,
    writing: Option<Writing>,
}

/// A checkpoint on its way to the disk.
struct Writing {
    checkpoint: Checkpoint,
    phase: Phase,
}

enum Phase {
    Parts(WrittenPart),
    /// On rank 0; the others have nothing left to do.
    Placing(Task<()>),
}

/// This rank's part, on its way.
struct WrittenPart {
    sums: Task<FileSums>,
    /// `None` where it could not be made, and once it was handed on.
    folder: Option<StagedFolder>,
    leads: bool,
    /// Whether rank 0 was told that it is there.
    told: bool,
    afterwards: Afterwards,
}

type Afterwards = Box<dyn FnOnce() -> Result<()> + Send>;

/// What a rank tells the others.
#[derive(Serialize, Deserialize)]
struct Word {
    note: Note,
    /// Whether it has waited beyond the deadline: the ranks' clocks differ, and all must give up in the same moment.
    late: bool,
}

/// How far it is with its work.
#[derive(Serialize, Deserialize)]
enum Note {
    Working,
    Done(FileSums),
    Failed(Failure),
}

impl CheckpointWriter {
    /// A writer into `store`; a disk is waited for up to `deadline`.
    pub fn new(store: CheckpointStore, deadline: Duration) -> Self {
        Self { store, deadline, writing: None }
    }

    /// Begins the checkpoint of `step`, once the last one is in its place. `copy` makes this rank's copy in host memory, and
    /// what it gives writes it, in a thread; rank 0's writes [`Part::state`] too. Rank 0 does `afterwards`, in a thread, when
    /// the checkpoint is in its place.
    ///
    /// What goes wrong with this checkpoint, [`advance`](Self::advance) and [`finish`](Self::finish) tell on all ranks.
    ///
    /// # Errors
    /// Those of the last one, see [`finish`](Self::finish).
    pub fn begin<W: FnOnce(&mut Part<'_>) -> Result<()> + Send + 'static>(
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
                        let mut part = Part::new(&path);
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

    /// Hears how far the ranks are, and goes on with what can be done. To be called between steps: it waits for no disk.
    /// Gives the checkpoint that came into its place, if one did.
    ///
    /// # Errors
    /// What kept this rank from writing its part: Disk for a full or failing disk, Input for a place that cannot be written
    /// to. Where another rank failed, PeerFailed that names it. Older checkpoints are intact.
    pub fn advance(&mut self, world: &dyn Collective) -> Result<Option<Checkpoint>> {
        self.hear(world, false)
    }

    /// [`advance`](Self::advance); where a rank is `late` and the disks are still at work, all ranks give up.
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
                // Nobody waits any longer for a disk that may hang; the next start removes what it has written.
                std::mem::forget(phase);
                let (path, seconds) = (writing.checkpoint.path.display(), self.deadline.as_secs());
                return Err(Error::Fault(format!(
                    "{path}: not written after {seconds} s\n  remedy: see what keeps the disk, or give it more time with train.collective_timeout_s (a tenth of these seconds)"
                )));
            }
            (None, phase) => Some(Writing { phase, ..writing }),
            (Some(sums), Phase::Parts(part)) => Some(Writing { phase: Phase::Placing(part.place(sums)), ..writing }),
            (Some(_), Phase::Placing(_)) => {
                if world.is_main() {
                    tracing::debug!("saved {}", writing.checkpoint.path.display());
                }
                return Ok(Some(writing.checkpoint));
            }
        };
        Ok(None)
    }

    /// Waits until the checkpoint that was begun last is in its place, and gives it where it was not given before. The ranks
    /// hear of each other all the while: one that hangs is noticed as in any step.
    ///
    /// # Errors
    /// As [`advance`](Self::advance); Fault, on all ranks, for a disk that does not end its work within the deadline.
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

    /// This rank's error.
    fn fail(&mut self) -> Result<()> {
        let failed = match &mut self.phase {
            Phase::Parts(part) => part.sums.take().map(|sums| sums.map(drop)),
            Phase::Placing(placed) => placed.take(),
        };
        failed.unwrap_or(Ok(()))
    }
}

impl WrittenPart {
    /// Rank 0 puts the folder with the files of `sums` in its place; the others leave it to that.
    fn place(mut self, sums: FileSums) -> Task<()> {
        let afterwards = std::mem::replace(&mut self.afterwards, Box::new(|| Ok(())));
        let Some(folder) = self.folder.take() else { return Task::done(Ok(())) };
        if self.leads {
            return Task::start(move || place(folder, &sums).and_then(|()| afterwards()));
        }
        folder.leave();
        Task::done(Ok(()))
    }
}

impl Drop for WrittenPart {
    /// Removes the folder, unless rank 0 may be about to put it in its place.
    fn drop(&mut self) {
        self.sums.wait();
        if let Some(folder) = self.folder.take_if(|_| self.told && !self.leads) {
            folder.leave();
        }
    }
}
