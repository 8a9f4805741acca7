//! Checkpoints that several ranks write in the background: present once all parts are written, never before.

use std::path::Path;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Barrier, Mutex};
use std::time::Duration;
use std::{fs, thread};

use burn::tensor::Tensor;
use burn_hyperlora::checkpoint::{Checkpoint, CheckpointStore, CheckpointWriter, RankPart};
use hyperlora_core::{Error, Result};
use hyperlora_ranks::{Collective, Pending};

/// Ranks that are threads of the test. They exchange notes but no tensors.
struct Threads {
    rank: usize,
    notes: Arc<Mutex<Vec<Vec<u8>>>>,
    gate: Arc<Barrier>,
    hosts: Vec<String>,
}

impl Threads {
    fn new(ranks: usize) -> Vec<Self> {
        let (notes, gate) = (Arc::new(Mutex::new(vec![Vec::new(); ranks])), Arc::new(Barrier::new(ranks)));
        let hosts = vec!["here".to_owned(); ranks];
        (0..ranks).map(|rank| Self { rank, notes: notes.clone(), gate: gate.clone(), hosts: hosts.clone() }).collect()
    }
}

impl Collective for Threads {
    fn rank(&self) -> usize {
        self.rank
    }

    fn world_size(&self) -> usize {
        self.hosts.len()
    }

    fn hosts(&self) -> &[String] {
        &self.hosts
    }

    fn all_reduce_mean<'a>(&'a self, what: &'a str, _: Tensor<1>) -> Result<Pending<'a>> {
        Err(Error::Fault(what.into()))
    }

    fn reduce_scatter_mean<'a>(&'a self, what: &'a str, _: Tensor<1>) -> Result<Pending<'a>> {
        Err(Error::Fault(what.into()))
    }

    fn all_gather<'a>(&'a self, what: &'a str, _: Tensor<1>) -> Result<Pending<'a>> {
        Err(Error::Fault(what.into()))
    }

    fn broadcast<'a>(&'a self, what: &'a str, _: Tensor<1>) -> Result<Pending<'a>> {
        Err(Error::Fault(what.into()))
    }

    fn exchange(&self, _what: &str, note: &[u8]) -> Result<Vec<Vec<u8>>> {
        self.notes.lock().unwrap()[self.rank] = note.to_vec();
        self.gate.wait();
        let all = self.notes.lock().unwrap().clone();
        self.gate.wait();
        Ok(all)
    }

    fn barrier(&self, _what: &str, _deadline: Duration) -> Result<()> {
        self.gate.wait();
        Ok(())
    }
}

/// Runs `work` on each of `ranks` ranks, each with its own writer to `root`, and returns the results by rank.
fn together<R: Send>(ranks: usize, root: &Path, work: impl Fn(&Threads, &mut CheckpointWriter) -> R + Sync) -> Vec<R> {
    each_into(&vec![root; ranks], Duration::from_mins(1), work)
}

/// Runs `work` like [`together`], with a folder for each rank and a disk deadline.
fn each_into<R: Send>(
    roots: &[&Path],
    deadline: Duration,
    work: impl Fn(&Threads, &mut CheckpointWriter) -> R + Sync,
) -> Vec<R> {
    roots.iter().for_each(|root| drop(CheckpointStore::open(root).unwrap()));
    thread::scope(|scope| {
        let ranks: Vec<_> = Threads::new(roots.len())
            .into_iter()
            .zip(roots)
            .map(|(world, root)| {
                let work = &work;
                scope.spawn(move || {
                    let mut writer = CheckpointWriter::new(CheckpointStore::at(root), deadline);
                    work(&world, &mut writer)
                })
            })
            .collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

/// Writes this rank's file, and the state on the main rank.
fn part(rank: usize) -> impl FnOnce(&mut RankPart<'_>) -> Result<()> + Send + 'static {
    move |part| {
        let write = |path: &Path| fs::write(path, vec![rank as u8; 1_000]).map_err(|source| Error::write(path, source));
        part.file(&format!("weights/{rank}"), write)?;
        if rank == 0 { part.state(&rank) } else { Ok(()) }
    }
}

fn list(root: &Path) -> Vec<u64> {
    CheckpointStore::at(root).list().unwrap().iter().map(|checkpoint| checkpoint.step).collect()
}

/// Delays a part until it is released.
fn held(rank: usize) -> (Sender<()>, impl FnOnce(&mut RankPart<'_>) -> Result<()> + Send + 'static) {
    let (go, wait): (Sender<()>, Receiver<()>) = channel();
    let held = move |to: &mut RankPart<'_>| {
        let _ = wait.recv();
        part(rank)(to)
    };
    (go, held)
}

#[test]
fn a_checkpoint_is_there_once_the_last_rank_has_written_and_no_step_waits_for_it() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    let placed = together(3, root, |world, writer| {
        let (go, held) = held(world.rank());
        if world.rank() == 2 {
            writer.begin(world, 7, || Ok(held), || Ok(())).unwrap();
        } else {
            writer.begin(world, 7, || Ok(part(world.rank())), || Ok(())).unwrap();
        }
        // Ten steps pass while rank 2 writes.
        for _ in 0..10 {
            assert_eq!(writer.advance(world).unwrap(), None);
            assert!(list(root).is_empty());
        }
        go.send(()).ok();
        writer.finish(world).unwrap()
    });
    let whole = CheckpointStore::at(root).latest().unwrap().unwrap();
    assert_eq!(placed, vec![Some(whole.clone()); 3]);
    whole.verify().unwrap();
    for rank in 0..3 {
        assert_eq!(fs::read(whole.path().join(format!("weights/{rank}"))).unwrap(), vec![rank; 1_000]);
        fs::remove_file(whole.path().join(format!("weights/{rank}"))).unwrap();
        let missing = whole.verify().unwrap_err();
        assert!(missing.to_string().contains(&format!("weights/{rank}: is missing")), "{missing}");
        fs::write(whole.path().join(format!("weights/{rank}")), vec![rank; 1_000]).unwrap();
    }
}

#[test]
fn the_next_one_waits_for_the_last_and_steps_alone_bring_it_home() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    together(2, root, |world, writer| {
        for step in 1..=3 {
            // When the copy is made, the previous checkpoint is complete: only one is written at a time.
            let copy = || {
                assert_eq!(list(root), (1..step).collect::<Vec<_>>());
                Ok(part(world.rank()))
            };
            writer.begin(world, step, copy, || Ok(())).unwrap();
        }
        let mut steps = 0;
        while writer.advance(world).unwrap().is_none() {
            steps += 1;
            assert!(steps < 100_000);
        }
        assert_eq!(writer.advance(world).unwrap(), None);
        assert_eq!(writer.finish(world).unwrap(), None);
    });
    assert_eq!(list(root), [1, 2, 3]);
    let names = fs::read_dir(root).unwrap().count();
    assert_eq!(names, 3);
}

#[test]
fn one_rank_that_cannot_write_ends_it_for_all_and_leaves_the_older_ones() {
    let full = |part: &mut RankPart<'_>| {
        part.file("optimizer", |path| {
            fs::write(path, "half").unwrap();
            Err(Error::write(path, std::io::ErrorKind::StorageFull.into()))
        })
    };
    for bad in 0..3 {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path();
        let errors = together(3, root, |world, writer| {
            writer.begin(world, 1, || Ok(part(world.rank())), || Ok(())).unwrap();
            if world.rank() == bad {
                writer.begin(world, 2, || Ok(full), || Ok(())).unwrap();
            } else {
                writer.begin(world, 2, || Ok(part(world.rank())), || Ok(())).unwrap();
            }
            writer.finish(world).unwrap_err()
        });
        for (rank, error) in errors.iter().enumerate() {
            let message = error.to_string();
            if rank == bad {
                assert!(error.exit_code() == 1 && message.contains("optimizer") && message.contains("free some space"));
            } else {
                assert!(error.exit_code() == 1 && message.contains(&format!("rank {bad} (here) failed:")), "{message}");
            }
        }
        assert_eq!(list(root), [1]);
        CheckpointStore::at(root).latest().unwrap().unwrap().verify().unwrap();
        CheckpointStore::open(root).unwrap();
        assert_eq!(fs::read_dir(root).unwrap().count(), 1);
    }
}

#[test]
fn what_rank_0_does_afterwards_sees_it_in_its_place_and_its_failure_counts() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    let ends = together(2, root, |world, writer| {
        let seen = root.to_owned();
        let afterwards = move || {
            assert_eq!(list(&seen), [4]);
            Err(Error::input("keep", "the disk is gone", "mount it"))
        };
        writer.begin(world, 4, || Ok(part(world.rank())), afterwards).unwrap();
        writer.finish(world).map_err(|error| error.exit_code())
    });
    assert_eq!(ends, [Err(2), Err(2)]);
    assert_eq!(list(root), [4]);
}

#[test]
fn a_copy_that_fails_is_told_like_a_disk_that_fails() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    let ends = together(2, root, |world, writer| {
        let copy = || if world.rank() == 1 { Err(Error::Fault("the device is lost".into())) } else { Ok(part(0)) };
        writer.begin(world, 4, copy, || Ok(())).unwrap();
        writer.finish(world).map_err(|error| error.to_string())
    });
    assert_eq!(ends[1], Err("the device is lost".into()));
    assert_eq!(ends[0], Err("rank 1 (here) failed: the device is lost".into()));
    let found: Vec<Checkpoint> = CheckpointStore::open(root).unwrap().list().unwrap();
    assert_eq!(found, []);
}

#[test]
fn parts_in_folders_that_are_not_shared_make_no_checkpoint() {
    let (one, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let errors = each_into(&[one.path(), other.path()], Duration::from_mins(1), |world, writer| {
        writer.begin(world, 4, || Ok(part(world.rank())), || Ok(())).unwrap();
        writer.finish(world).unwrap_err()
    });
    let missing = "weights/1: is not here, though its rank wrote it";
    assert!(errors.iter().all(|error| error.exit_code() == 2 && error.to_string().contains(missing)), "{errors:?}");
    assert!(errors[0].to_string().contains("one run folder that they share"), "{errors:?}");
    assert!(list(one.path()).is_empty() && list(other.path()).is_empty());
}

#[test]
fn a_part_of_another_length_makes_no_checkpoint() {
    let folder = tempfile::tempdir().unwrap();
    let cut = |to: &mut RankPart<'_>| {
        let mut written = None;
        to.file("weights/1", |path| {
            written = Some(path.to_owned());
            fs::write(path, "whole").map_err(|source| Error::write(path, source))
        })?;
        fs::write(written.unwrap(), "cut").unwrap();
        Ok(())
    };
    let errors = together(2, folder.path(), |world, writer| {
        if world.rank() == 1 {
            writer.begin(world, 4, || Ok(cut), || Ok(())).unwrap();
        } else {
            writer.begin(world, 4, || Ok(part(0)), || Ok(())).unwrap();
        }
        writer.finish(world).unwrap_err()
    });
    assert!(errors[0].to_string().contains("weights/1: has 3 bytes, its rank wrote 5"), "{errors:?}");
    assert!(list(folder.path()).is_empty());
}

#[test]
fn all_ranks_give_up_a_disk_that_hangs_with_the_same_words() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    let errors = each_into(&[root, root], Duration::from_millis(100), |world, writer| {
        let (go, wait): (Sender<()>, Receiver<()>) = channel();
        let hung = move |_: &mut RankPart<'_>| {
            let _ = wait.recv();
            Err(Error::Fault("let go".into()))
        };
        if world.rank() == 1 {
            writer.begin(world, 4, || Ok(hung), || Ok(())).unwrap();
            // This rank's deadline starts after the main rank's has expired.
            thread::sleep(Duration::from_millis(300));
        } else {
            writer.begin(world, 4, || Ok(part(0)), || Ok(())).unwrap();
        }
        let error = writer.finish(world).unwrap_err();
        drop(go);
        (error.exit_code(), error.to_string())
    });
    assert!(errors[0] == errors[1] && errors[0].0 == 1 && errors[0].1.contains("not written after"), "{errors:?}");
}
