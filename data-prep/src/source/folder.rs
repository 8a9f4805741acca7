//! A folder of image files, with an optional CSV list of identities and splits.

use std::collections::HashMap;
use std::path::Path;

use serde::{Deserialize, Serialize};
use walkdir::WalkDir;

use crate::config::ConfigPath;
use crate::error::{Error, Result};
use crate::source::Photo;

/// A folder that is searched through all its subfolders.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FolderConfig {
    /// The folder.
    pub root: ConfigPath,
    /// A CSV list with the header `key,identity,split`; photos that it does not name have neither.
    #[serde(default)]
    pub labels: Option<ConfigPath>,
    /// Extensions of the files to look at, in lower case; files in any case match.
    #[serde(default = "image_extensions")]
    pub extensions: Vec<String>,
}

fn image_extensions() -> Vec<String> {
    ["bmp", "jpeg", "jpg", "pgm", "png", "ppm", "webp"].map(String::from).to_vec()
}

/// A row of the list.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Label {
    key: String,
    identity: Option<String>,
    split: Option<String>,
}

impl FolderConfig {
    pub(super) fn photos(&self, base_dir: &Path) -> Result<Vec<Photo>> {
        let root = self.root.resolve(base_dir)?;
        if !root.is_dir() {
            return Err(Error::file(&root, "is not a folder", "set source.folder.root to the folder of the photos"));
        }
        let mut labels = match &self.labels {
            Some(path) => read_labels(&path.resolve(base_dir)?)?,
            None => HashMap::new(),
        };
        let mut photos = Vec::new();
        for entry in WalkDir::new(&root).follow_links(true) {
            let path = match entry {
                Ok(entry) if entry.file_type().is_file() && self.wants(entry.path()) => entry.into_path(),
                Ok(_) => continue,
                // Below the root it is one photo's trouble: reading that photo fails too, and is counted.
                Err(error) => match error.path().filter(|_| error.depth() > 0) {
                    Some(path) => path.to_path_buf(),
                    None => return Err(walk_error(&root, error)),
                },
            };
            let key = key_of(path.strip_prefix(&root).unwrap_or(&path));
            let label = labels.remove(&key);
            let (identity, split) = label.map_or((None, None), |label| (label.identity, label.split));
            photos.push(Photo { key, path, identity, split });
        }
        if photos.is_empty() {
            let problem = format!("holds no files ending in {}", self.extensions.join(", "));
            return Err(Error::file(&root, problem, "set source.folder.root and extensions to where photos are"));
        }
        if !labels.is_empty() {
            tracing::warn!("{} photos of the label list are not in {}", labels.len(), root.display());
        }
        photos.sort_unstable_by(|a, b| a.key.cmp(&b.key));
        Ok(photos)
    }

    fn wants(&self, path: &Path) -> bool {
        let extension = path.extension().map(|extension| extension.to_string_lossy().to_lowercase());
        extension.is_some_and(|extension| self.extensions.contains(&extension))
    }
}

fn read_labels(path: &Path) -> Result<HashMap<String, Label>> {
    const REMEDY: &str = "write it as CSV with the header `key,identity,split`, each key once";
    let file = std::fs::File::open(path).map_err(|source| Error::read(path, source))?;
    let mut labels = HashMap::new();
    let mut rows = csv::Reader::from_reader(file);
    let mut row = csv::StringRecord::new();
    let broken = |error: csv::Error| {
        let line = error.position().map_or(1, csv::Position::line);
        Error::input(format!("{}:{line}", path.display()), error, REMEDY)
    };
    let header = rows.headers().map_err(broken)?.clone();
    while rows.read_record(&mut row).map_err(broken)? {
        let label: Label = row.deserialize(Some(&header)).map_err(broken)?;
        let line = row.position().map_or(1, csv::Position::line);
        if let Some(twice) = labels.insert(label.key.clone(), label) {
            let place = format!("{}:{line}", path.display());
            return Err(Error::input(place, format!("the key `{}` stands here a second time", twice.key), REMEDY));
        }
    }
    Ok(labels)
}

/// Path parts joined by `/` on every system.
fn key_of(relative: &Path) -> String {
    relative.iter().map(|part| part.to_string_lossy()).collect::<Vec<_>>().join("/")
}

fn walk_error(root: &Path, error: walkdir::Error) -> Error {
    let path = error.path().unwrap_or(root).to_path_buf();
    match error.into_io_error() {
        Some(source) => Error::read(&path, source),
        None => Error::file(&path, "is a link to a folder that holds it", "remove the link"),
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;

    fn folder(labels: &str) -> (tempfile::TempDir, FolderConfig) {
        let dir = tempfile::tempdir().unwrap();
        for name in ["b/2.PNG", "b/10.jpg", "a.pgm", "notes.txt"] {
            let path = dir.path().join("photos").join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, b"x").unwrap();
        }
        std::fs::write(dir.path().join("list.csv"), labels).unwrap();
        let config = FolderConfig {
            root: ConfigPath::new("photos"),
            labels: Some(ConfigPath::new("list.csv")),
            extensions: image_extensions(),
        };
        (dir, config)
    }

    #[test]
    fn photos_come_in_key_order_with_their_labels() {
        let (dir, config) = folder("key,identity,split\nb/2.PNG,ada,train\nb/10.jpg,,unseen\nmissing.png,x,y\n");
        let photos = config.photos(dir.path()).unwrap();
        let seen: Vec<_> = photos.iter().map(|p| (p.key.as_str(), p.identity.as_deref(), p.split.as_deref())).collect();
        let expected =
            [("a.pgm", None, None), ("b/10.jpg", None, Some("unseen")), ("b/2.PNG", Some("ada"), Some("train"))];
        assert_eq!(seen, expected);
        assert!(photos.iter().all(|photo| photo.path.is_file()));
    }

    #[test]
    fn what_cannot_be_read_below_the_root_is_a_photo_that_reading_rejects() {
        let (dir, config) = folder("key,identity,split\n");
        let photos = dir.path().join("photos");
        std::os::unix::fs::symlink("nowhere.png", photos.join("dangling.png")).unwrap();
        std::os::unix::fs::symlink("..", photos.join("b/loop")).unwrap();
        let keys: Vec<_> = config.photos(dir.path()).unwrap().into_iter().map(|photo| photo.key).collect();
        assert_eq!(keys, ["a.pgm", "b/10.jpg", "b/2.PNG", "b/loop", "dangling.png"]);
    }

    #[test]
    fn a_broken_list_names_its_line() {
        for (labels, line, word) in [
            ("key,identity,split\na,b,c\nd,e\n", ":3: ", "fields"),
            ("key,identity,split\na,b,c\na,b,c\n", ":3: ", "second time"),
            ("key,person,split\na,b,c\n", ":2: ", "person"),
        ] {
            let (dir, config) = folder(labels);
            let error = config.photos(dir.path()).unwrap_err();
            assert_eq!(error.exit_code(), 2);
            let message = error.to_string();
            assert!(message.contains(&format!("list.csv{line}")) && message.contains(word), "{message}");
        }
    }

    #[test]
    fn a_missing_or_empty_folder_is_named() {
        let (dir, mut config) = folder("key,identity,split\n");
        config.extensions = vec!["webp".into()];
        assert!(config.photos(dir.path()).unwrap_err().to_string().contains("holds no files ending in webp"));
        config.root = ConfigPath::new("nowhere");
        assert!(config.photos(dir.path()).unwrap_err().to_string().contains("nowhere: is not a folder"));
    }
}
