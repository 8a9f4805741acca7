//! Secret by which the ranks of a run recognise each other: the user's own, or, for ranks on one machine, one that rank
//! 0 makes and passes on in a file that no other user of the machine can read.

use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use hyperlora_core::{Error, Result};
use rustix::fs::{self, AtFlags, FileType, Mode, OFlags, Stat};
use rustix::process::geteuid;
use sha2::{Digest, Sha256};

use super::handshake;

/// Bytes that are read at most: a longer file is not from this program.
const LONGEST: u64 = 256;

/// Source of the ranks' secret.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Token {
    /// The same text on all ranks.
    Given(String),
    /// Made by rank 0, for ranks that share a machine. The text distinguishes simultaneous runs, and is not secret.
    HandedOver(String),
}

/// File that contains a token until the ranks of a machine have met.
#[derive(Debug)]
pub(super) struct TokenFile {
    folder: OwnedFd,
    path: PathBuf,
    name: String,
}

impl TokenFile {
    /// Returns the file of the run that meets at `port`, in the user's own folder.
    ///
    /// # Errors
    /// Input: there is no folder that only the user can read.
    pub(super) fn of_user(port: u16, run: &str) -> Result<Self> {
        let runtime = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from).filter(|folder| folder.is_absolute());
        if let Some(Ok(folder)) = runtime.map(|folder| Self::open(&folder, port, run)) {
            return Ok(folder);
        }
        let folder = std::env::temp_dir().join(format!("hyperlora-{}", geteuid().as_raw()));
        match fs::mkdir(&folder, Mode::RWXU) {
            Ok(()) | Err(rustix::io::Errno::EXIST) => Self::open(&folder, port, run),
            Err(problem) => Err(io::Error::from(problem)),
        }
        .map_err(|problem| {
            Error::file(
                &folder,
                format!("the ranks cannot hand their token over here: {problem}"),
                "remove it, or export HYPERLORA_TOKEN, the same on all ranks, such as `openssl rand -hex 16` makes",
            )
        })
    }

    /// Returns the file in `folder`, which must belong to the user alone.
    fn open(folder: &Path, port: u16, run: &str) -> io::Result<Self> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let opened = fs::open(folder, flags, Mode::empty())?;
        private(&fs::fstat(&opened)?, FileType::Directory)?;
        let run = hyperlora_core::hash::hex(&Sha256::digest(run)[..6]);
        let name = format!("hyperlora-{port}-{run}.token");
        Ok(Self { folder: opened, path: folder.join(&name), name })
    }

    /// Returns the file's path, for messages.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Rank 0: makes a token and writes it. Dropping the result removes the file.
    pub(super) fn lay_down(&self) -> io::Result<Laid<'_>> {
        let token = handshake::nonce()?;
        // Whole or absent: nobody reads half a token, and the leftover of a killed run is replaced.
        let beside = format!("{}.partial", self.name);
        self.remove(&beside)?;
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = fs::openat(&self.folder, &beside, flags, Mode::RUSR | Mode::WUSR)?;
        File::from(file).write_all(&token)?;
        fs::renameat(&self.folder, &beside, &self.folder, &self.name)?;
        Ok(Laid { file: self, token: token.to_vec() })
    }

    /// Other ranks: reads the current token.
    pub(super) fn read(&self) -> io::Result<Vec<u8>> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = fs::openat(&self.folder, &self.name, flags, Mode::empty())?;
        private(&fs::fstat(&file)?, FileType::RegularFile)?;
        let mut token = Vec::new();
        File::from(file).take(LONGEST).read_to_end(&mut token)?;
        if token.len() != handshake::WORD {
            return Err(io::Error::new(ErrorKind::InvalidData, format!("holds {} bytes", token.len())));
        }
        Ok(token)
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        match fs::unlinkat(&self.folder, name, AtFlags::empty()) {
            Ok(()) | Err(rustix::io::Errno::NOENT) => Ok(()),
            Err(problem) => Err(problem.into()),
        }
    }
}

/// Token whose file exists until this is dropped.
pub(super) struct Laid<'a> {
    file: &'a TokenFile,
    pub(super) token: Vec<u8>,
}

impl Drop for Laid<'_> {
    fn drop(&mut self) {
        if let Err(problem) = self.file.remove(&self.file.name) {
            tracing::warn!("{}: the ranks' token cannot be removed: {problem}", self.file.path.display());
        }
    }
}

/// Checks that a file has this kind, belongs to the user and is closed to everybody else.
fn private(stat: &Stat, kind: FileType) -> io::Result<()> {
    let problem = match () {
        () if FileType::from_raw_mode(stat.st_mode) != kind => "it is of another kind",
        () if stat.st_uid != geteuid().as_raw() => "it belongs to another user",
        () if Mode::from_raw_mode(stat.st_mode).intersects(Mode::RWXG | Mode::RWXO) => "others may open it",
        () => return Ok(()),
    };
    Err(io::Error::new(ErrorKind::PermissionDenied, problem))
}

#[cfg(test)]
mod tests {
    use std::fs::{self, Permissions};
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    fn private_folder() -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        fs::set_permissions(folder.path(), Permissions::from_mode(0o700)).unwrap();
        folder
    }

    #[test]
    fn a_token_is_new_every_time_private_and_gone_after_the_meeting() {
        let folder = private_folder();
        let file = || TokenFile::open(folder.path(), 29_500, "run").unwrap();
        let (first, other) = (file(), file());
        assert_eq!(other.read().unwrap_err().kind(), ErrorKind::NotFound);
        let laid = first.lay_down().unwrap();
        assert_eq!(other.read().unwrap(), laid.token);
        assert_eq!(fs::metadata(first.path()).unwrap().permissions().mode() & 0o777, 0o600);
        // A killed run leaves its file, which the next run replaces.
        let earlier = laid.token.clone();
        std::mem::forget(laid);
        let laid = first.lay_down().unwrap();
        assert_ne!(laid.token, earlier);
        assert_eq!(other.read().unwrap(), laid.token);
        assert_ne!(TokenFile::open(folder.path(), 29_500, "another").unwrap().path(), first.path());
        drop(laid);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn what_others_could_have_laid_there_is_not_believed() {
        let folder = private_folder();
        let file = TokenFile::open(folder.path(), 29_500, "run").unwrap();
        let stolen = folder.path().join("stolen");
        fs::write(&stolen, [0; 32]).unwrap();
        fs::set_permissions(&stolen, Permissions::from_mode(0o600)).unwrap();
        symlink(&stolen, file.path()).unwrap();
        assert!(file.read().is_err(), "a link");
        fs::remove_file(file.path()).unwrap();
        fs::write(file.path(), [0; 32]).unwrap();
        fs::set_permissions(file.path(), Permissions::from_mode(0o644)).unwrap();
        assert!(file.read().is_err(), "others may read it");
        fs::set_permissions(file.path(), Permissions::from_mode(0o600)).unwrap();
        file.read().unwrap();
        fs::write(file.path(), [0; 31]).unwrap();
        assert!(file.read().is_err(), "of another length");

        fs::set_permissions(folder.path(), Permissions::from_mode(0o711)).unwrap();
        assert!(TokenFile::open(folder.path(), 29_500, "run").is_err(), "others may enter the folder");
        let around = private_folder();
        let link = around.path().join("link");
        let inner = around.path().join("inner");
        fs::create_dir(&inner).unwrap();
        fs::set_permissions(&inner, Permissions::from_mode(0o700)).unwrap();
        symlink(&inner, &link).unwrap();
        assert!(TokenFile::open(&link, 29_500, "run").is_err(), "the folder is a link");
        TokenFile::open(&inner, 29_500, "run").unwrap();
    }
}
