//! Full disk: exit code 1, one message, and the run resumes once there is space.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::support::{STEPS, World, contents, run};

/// Limits the files that the command writes to `kib` KiB, which acts like a full disk for any user.
fn limited(command: &Command, kib: u64) -> Command {
    let mut limited = Command::new("bash");
    limited.arg("-c").arg(format!("trap '' XFSZ; ulimit -f {kib}; exec \"$@\"")).arg("limited");
    limited.arg(command.get_program()).args(command.get_args());
    limited
}

#[test]
fn a_refused_write_leaves_what_stood_there() {
    let world = World::new();
    run(world.train("run", &["--max-steps", "1"])).with(0);
    let before = contents(&world.path("run/checkpoints"));
    run(limited(&world.train("run", &[]), 16)).refused(1, &["step-00000002", "free some space"]);
    assert_eq!(contents(&world.path("run/checkpoints")), before);
    run(world.train("run", &["--max-steps", "2"])).with(0);
}

/// Small file system, removed with the test.
struct SmallDisk {
    place: PathBuf,
}

impl SmallDisk {
    /// Mounts the file system; `None` if mounting is not allowed.
    fn mount(place: PathBuf, kib: usize) -> Option<Self> {
        fs::create_dir(&place).unwrap();
        let mounted = mount(&["-t", "tmpfs", "-o", &format!("size={kib}k"), "tmpfs"], &place);
        mounted.then_some(Self { place })
    }

    fn grow(&self, kib: usize) {
        assert!(mount(&["-o", &format!("remount,size={kib}k")], &self.place));
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let unmounted = Command::new("umount").arg(&self.place).status();
        assert!(unmounted.is_ok_and(|status| status.success()), "{} stays mounted", self.place.display());
    }
}

fn mount(options: &[&str], place: &Path) -> bool {
    Command::new("mount").args(options).arg(place).output().is_ok_and(|output| output.status.success())
}

#[test]
fn a_full_disk_ends_the_run_and_space_lets_it_go_on() {
    let world = World::new();
    run(world.train("whole", &[])).with(0);
    let whole = contents(&world.path(&format!("whole/checkpoints/step-{STEPS:08}")));
    let one = whole.values().map(|bytes| bytes.len().div_ceil(4096) * 4).sum::<usize>();

    // Room for one checkpoint and most of a second.
    let Some(disk) = SmallDisk::mount(world.path("disk"), one * 8 / 5 + 64) else {
        eprintln!("skipped: mounting a small file system takes root");
        return;
    };
    let first = format!("step-{:08}", 1);
    run(world.train("disk/run", &[])).refused(1, &["disk/run/checkpoints", "No space left", "free some space"]);
    let left = contents(&disk.place.join("run/checkpoints"));
    assert!(left.len() == whole.len() && left.keys().all(|file| file.starts_with(&first)), "{:?}", left.keys());

    disk.grow(one * 8);
    run(world.train("disk/run", &[])).with(0);
    let end = contents(&disk.place.join(format!("run/checkpoints/step-{STEPS:08}")));
    for (file, bytes) in whole.iter().filter(|(file, _)| file.extension().is_some_and(|end| end == "safetensors")) {
        assert!(end.get(file) == Some(bytes), "{} differs", file.display());
    }
}
