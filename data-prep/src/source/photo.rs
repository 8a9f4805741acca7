//! Photos of a source, and checked access to their files.

use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use hyperlora_core::paths::{Root, read_regular};

use crate::notes::Notes;

/// Content of a source.
#[derive(Debug)]
pub struct Source {
    /// All photos, in the order of their keys.
    pub photos: Vec<Photo>,
    /// Reader of their files.
    pub files: SourceFiles,
    /// Notes on skipped files.
    pub notes: Notes,
}

/// One photo that has not been read yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Photo {
    /// Name in the source: unique, and the same on every machine.
    pub key: String,
    /// Path of its file, relative to the source's root.
    pub path: PathBuf,
    /// Identity of the person, if the source names it.
    pub identity: Option<String>,
    /// Split of the photo, if the source names it.
    pub split: Option<String>,
}

/// Files of a source. The author of the folder may be a stranger: only regular files are read, and no link is followed
/// out of it unless the user wants that.
#[derive(Debug)]
pub struct SourceFiles {
    pub(super) root: Root,
    pub(super) follow_links: bool,
}

impl SourceFiles {
    /// Reads the file at `path` from the root, of at most `limit` bytes.
    ///
    /// # Errors
    /// As [`Root::read`].
    pub fn read(&self, path: &Path, limit: u64) -> io::Result<Vec<u8>> {
        if self.follow_links { read_regular(&self.root.path().join(path), limit) } else { self.root.read(path, limit) }
    }

    /// Returns the size in bytes of the file at `path` from the root, 0 if unknown.
    pub fn size(&self, path: &Path) -> u64 {
        std::fs::metadata(self.root.path().join(path)).map_or(0, |file| file.len())
    }
}

/// Converts a path from the root to a key: UTF-8, and unique. A byte that is not UTF-8 becomes U+FFFD and two
/// hexadecimal digits, and so do the bytes of U+FFFD itself.
pub(super) fn key_of(relative: &Path) -> String {
    let mut key = String::new();
    let escape = |key: &mut String, bytes: &[u8]| bytes.iter().for_each(|byte| *key += &format!("\u{fffd}{byte:02x}"));
    for chunk in relative.as_os_str().as_bytes().utf8_chunks() {
        for (index, part) in chunk.valid().split('\u{fffd}').enumerate() {
            if index > 0 {
                escape(&mut key, "\u{fffd}".as_bytes());
            }
            key += part;
        }
        escape(&mut key, chunk.invalid());
    }
    key
}
