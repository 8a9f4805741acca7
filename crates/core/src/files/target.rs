//! Output paths that the user named: resolved to their real place, checked before the work begins, and never an input.

use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::lock::Lock;
use super::place::parent_of;
use crate::{Error, Result};

/// Links in a row that Linux follows.
const LINKS: usize = 40;

/// Output file of a command, checked and locked before the work begins until it is dropped.
///
/// # Examples
/// ```
/// use hyperlora_core::files::{OutputFile, write_whole};
///
/// # let folder = tempfile::tempdir().expect("a temporary folder");
/// # let folder = folder.path();
/// # let inputs = [folder.join("photo.jpg")];
/// let output = OutputFile::claim(&folder.join("anna.safetensors"), &inputs)?;
/// // Long work goes here. No other process of this program can claim the same file meanwhile.
/// write_whole(output.path(), b"weights")?;
/// assert!(folder.join("anna.safetensors").is_file());
/// # Ok::<(), hyperlora_core::Error>(())
/// ```
#[derive(Debug)]
pub struct OutputFile {
    path: PathBuf,
    _lock: Lock,
}

impl OutputFile {
    /// Claims the file at `path`, which the user named: a link there is followed. `inputs` are the files and folders
    /// that the command reads.
    ///
    /// # Errors
    /// Input: the file is an input, another process writes to it, the place cannot be written to or contains something
    /// other than a file. Disk: a failing disk.
    pub fn claim<I: AsRef<Path>>(path: &Path, inputs: impl IntoIterator<Item = I>) -> Result<Self> {
        if path.as_os_str().as_bytes().ends_with(b"/") {
            return Err(Error::file(path, "names a folder", "name a file"));
        }
        let real = resolve(path)?;
        if fs::metadata(&real).is_ok_and(|stands| !stands.is_file()) {
            return Err(no_file(path));
        }
        apart(&real, inputs)?;
        let lock = Lock::claim(&real)?;
        Ok(Self { path: real, _lock: lock })
    }

    /// Returns the path to write to.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

pub(super) fn no_file(path: &Path) -> Error {
    Error::file(path, "is not a regular file", "name a file that may be written or replaced")
}

/// Checks that writing to `target` overwrites none of the input files and folders, and writes into none of them. Skips
/// inputs that do not exist, because reading them gives a better error.
///
/// # Errors
/// Input: the target is an input, is inside one or contains one.
///
/// # Examples
/// ```
/// use hyperlora_core::files::apart;
///
/// # let folder = tempfile::tempdir().expect("a temporary folder");
/// # let folder = folder.path();
/// let photos = folder.join("photos");
/// # std::fs::create_dir(&photos).expect("a folder");
/// apart(&folder.join("shards"), [&photos])?;
/// let refused = apart(&photos.join("shards"), [&photos]).unwrap_err();
/// assert!(refused.to_string().contains("lies in the input"));
/// # Ok::<(), hyperlora_core::Error>(())
/// ```
pub fn apart<I: AsRef<Path>>(target: &Path, inputs: impl IntoIterator<Item = I>) -> Result<()> {
    let real = real(&follow(target)?);
    for input in inputs {
        let input = input.as_ref();
        let Ok(read) = input.canonicalize() else { continue };
        let relation = match () {
            () if real == read => "is",
            () if real.starts_with(&read) => "lies in",
            () if read.starts_with(&real) => "holds",
            () => continue,
        };
        return Err(Error::file(
            target,
            format!("{relation} the input {}", input.display()),
            "name a place of its own for the output",
        ));
    }
    Ok(())
}

/// Resolves the place of `path`, which need not exist: follows links in its last part and ignores a trailing `/`.
///
/// # Errors
/// Input: a path without a name, or links in a circle.
pub fn follow(path: &Path) -> Result<PathBuf> {
    let mut place = path.to_path_buf();
    for _ in 0..LINKS {
        let Some(name) = place.file_name() else {
            return Err(Error::file(path, "has no name of its own", "name a new file or folder, such as out/faces"));
        };
        place = place.with_file_name(name);
        let Ok(link) = fs::read_link(&place) else { return Ok(place) };
        place = parent_of(&place).join(link);
    }
    Err(Error::file(path, "is a link that leads in a circle", "name another place"))
}

/// Resolves a place like [`follow`], for an output that is renamed into it.
///
/// # Errors
/// As [`follow`]. Input also for a mount point: a file next to it is on another file system.
pub(super) fn resolve(path: &Path) -> Result<PathBuf> {
    let place = follow(path)?;
    let disk = |path: &Path| fs::metadata(path).map(|found| found.dev()).ok();
    match (disk(&place), disk(parent_of(&place))) {
        (Some(own), Some(parents)) if own != parents => Err(Error::file(
            path,
            "is where a file system is mounted, which cannot be replaced",
            format!("name a folder on it, such as {}", path.join("out").display()),
        )),
        _ => Ok(place),
    }
}

/// Removes links from `path`, as far as it exists.
fn real(path: &Path) -> PathBuf {
    path.canonicalize().unwrap_or_else(|_| match path.file_name() {
        Some(name) => real(parent_of(path)).join(name),
        None => path.into(),
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;
    use crate::files::write_whole;

    const NONE: [&str; 0] = [];

    fn claimed(path: &Path) -> Result<OutputFile> {
        OutputFile::claim(path, NONE)
    }

    #[test]
    fn an_output_file_is_tried_before_the_work() {
        let folder = tempfile::tempdir().unwrap();
        let place = |name: &str| folder.path().join(name);
        fs::create_dir(place("folder")).unwrap();
        symlink("a", place("circle")).unwrap();
        symlink("circle", place("a")).unwrap();
        let long = "x".repeat(300);
        for (name, words) in [
            ("new/", "names a folder"),
            ("folder", "not a regular file"),
            ("missing/new", "cannot be written"),
            ("..", "has no name of its own"),
            ("circle", "in a circle"),
            (&long, "choose a shorter name"),
        ] {
            let error = claimed(&place(name)).unwrap_err();
            assert!(error.exit_code() == 2 && error.to_string().contains(words), "{name}: {error}");
        }
        let held = claimed(&place("new")).unwrap();
        let refused = claimed(&place("new")).unwrap_err();
        assert!(refused.to_string().contains("another process"), "{refused}");
        write_whole(held.path(), b"made").unwrap();
        drop(held);
        drop(claimed(&place("new")).unwrap());
        assert!(!place(".new.hyperlora.lock").exists());
    }

    #[test]
    fn a_link_is_followed_to_the_file_it_names() {
        let folder = tempfile::tempdir().unwrap();
        let place = |name: &str| folder.path().join(name);
        fs::create_dir(place("disk")).unwrap();
        symlink("disk/real", place("link")).unwrap();
        symlink("link", place("chain")).unwrap();
        for content in ["made", "made again"] {
            let output = claimed(&place("chain")).unwrap();
            write_whole(output.path(), content.as_bytes()).unwrap();
            assert_eq!(fs::read_to_string(place("disk/real")).unwrap(), content);
            assert!(fs::symlink_metadata(place("chain")).unwrap().is_symlink());
        }
    }

    #[test]
    fn an_output_is_no_input_in_none_and_around_none() {
        let folder = tempfile::tempdir().unwrap();
        let place = |name: &str| folder.path().join(name);
        fs::create_dir_all(place("run/checkpoints")).unwrap();
        fs::write(place("a.png"), "").unwrap();
        symlink("run", place("link")).unwrap();
        let inputs = [place("a.png"), place("run/checkpoints"), place("missing"), "s3://bucket/shards".into()];
        for (output, words) in [
            ("a.png", "is the input"),
            ("./a.png/", "is the input"),
            ("link/checkpoints", "is the input"),
            ("run/checkpoints/deep/new", "lies in the input"),
            ("link/checkpoints/new", "lies in the input"),
            ("run", "holds the input"),
            ("link/", "holds the input"),
        ] {
            let error = apart(&place(output), &inputs).unwrap_err();
            assert!(error.exit_code() == 2 && error.to_string().contains(words), "{output}: {error}");
        }
        for output in ["run/new", "checkpoints", "missing", "a.png.2", "new/deep"] {
            apart(&place(output), &inputs).unwrap();
        }
    }
}
