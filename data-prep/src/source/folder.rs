//! A folder of image files, with an optional CSV list of identities and splits.

use std::collections::HashMap;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use hyperlora_core::config::ConfigPath;
use hyperlora_core::paths::{Root, read_regular};
use hyperlora_core::{Error, Result};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use walkdir::{DirEntry, WalkDir};

use crate::notes::Notes;
use crate::source::labels::{self, Label};
use crate::source::photo::{Photo, Source, SourceFiles, key_of};

/// Folder that is searched with all its subfolders, except hidden ones and those that tools keep.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct FolderConfig {
    /// Root folder of the photos.
    pub root: ConfigPath,
    /// CSV list with the header `key,identity,split`; either of the last two may be empty. Keys are plain relative
    /// paths; the file may have 1 GiB. Photos that are not in it have neither.
    #[serde(default)]
    pub labels: Option<ConfigPath>,
    /// Extensions of the photos, in lower case; files in any case match.
    #[serde(default = "image_extensions")]
    pub extensions: Vec<String>,
    /// Follows links that are absolute or lead out of the folder. Relative links that stay in it are always followed.
    /// Photos and captions are regular files either way: pipes and devices are never opened.
    #[serde(default)]
    pub follow_links: bool,
}

fn image_extensions() -> Vec<String> {
    ["bmp", "jpeg", "jpg", "pgm", "png", "ppm", "webp"].map(String::from).to_vec()
}

/// Names without a leading dot that systems and tools keep next to photos: thumbnails, waste bins, copies.
const KEPT_BY_TOOLS: [&str; 9] = [
    "@eaDir",
    "@Recycle",
    "@__thumb",
    "__MACOSX",
    "#recycle",
    "#snapshot",
    "$RECYCLE.BIN",
    "lost+found",
    "System Volume Information",
];

impl FolderConfig {
    pub(super) fn open(&self, base_dir: &Path, captions_beside: bool) -> Result<Source> {
        let root = self.root.resolve(base_dir)?;
        if !root.is_dir() {
            return Err(Error::file(&root, "is not a folder", "set source.folder.root to the folder of the photos"));
        }
        let real_root = root.canonicalize().map_err(|source| Error::read(&root, source))?;
        let files = SourceFiles { root: Root::open(&root)?, follow_links: self.follow_links };
        let list = self.labels.as_ref().map(|path| path.resolve(base_dir)).transpose()?;
        let labels = list.as_deref().map(|path| read_labels(path, &root, &files)).transpose()?;
        let search = Search {
            config: self,
            root: &root,
            real_root,
            list: list.as_deref(),
            captions_beside,
            paths: Vec::new(),
            texts: Vec::new(),
            notes: Notes::default(),
        };
        let (photos, notes) = search.run()?.labelled(labels);
        if photos.is_empty() {
            let mut problem = format!("holds no files ending in {}", self.extensions.join(", "));
            if !notes.is_empty() {
                problem += &format!("; passed over: {notes}");
            }
            return Err(Error::file(&root, problem, "set source.folder.root and extensions to where photos are"));
        }
        Ok(Source { photos, files, notes })
    }

    fn wants(&self, path: &Path) -> bool {
        let extension = path.extension().map(|extension| extension.to_string_lossy().to_lowercase());
        extension.is_some_and(|extension| self.extensions.contains(&extension))
    }
}

/// Search through a folder.
struct Search<'a> {
    config: &'a FolderConfig,
    root: &'a Path,
    real_root: PathBuf,
    list: Option<&'a Path>,
    captions_beside: bool,
    /// Keys and paths of the photos.
    paths: Vec<(String, PathBuf)>,
    /// Keys of the text files, which are captions if they are next to a photo.
    texts: Vec<String>,
    notes: Notes,
}

impl Search<'_> {
    fn run(mut self) -> Result<Self> {
        let mut entries = WalkDir::new(self.root).follow_links(true).into_iter();
        while let Some(entry) = entries.next() {
            match entry {
                Ok(entry) if entry.depth() == 0 => {}
                Ok(entry) => {
                    if !self.look_at(&entry) && entry.file_type().is_dir() {
                        entries.skip_current_dir();
                    }
                }
                Err(error) => match error.path().filter(|_| error.depth() > 0) {
                    Some(path) => self.fail_at(path, &error),
                    None => return Err(walk_error(self.root, error)),
                },
            }
        }
        self.paths.sort_unstable();
        for text in std::mem::take(&mut self.texts) {
            if !self.is_beside_photo(&text) {
                self.notes.add("txt_file", &text);
            }
        }
        Ok(self)
    }

    /// Records an entry. Tells whether to descend into it if it is a folder.
    fn look_at(&mut self, entry: &DirEntry) -> bool {
        let path = entry.path();
        let relative = path.strip_prefix(self.root).unwrap_or(path);
        let (key, folder) = (key_of(relative), entry.file_type().is_dir());
        let name = entry.file_name().as_bytes();
        if name.starts_with(b".") || KEPT_BY_TOOLS.iter().any(|kept| name.eq_ignore_ascii_case(kept.as_bytes())) {
            self.notes.add(if folder { "hidden_folder" } else { "hidden_file" }, &key);
            return false;
        }
        if entry.path_is_symlink() && !self.config.follow_links && self.leads_out(path) {
            self.notes.add("link_out_of_folder", &key);
            return false;
        }
        if !folder {
            if self.config.wants(path) {
                if entry.file_type().is_file() {
                    self.paths.push((key, relative.into()));
                } else {
                    self.notes.add("no_regular_file", &key);
                }
            } else if self.captions_beside && path.extension().is_some_and(|extension| extension == "txt") {
                self.texts.push(key);
            } else if self.list != Some(path) {
                self.pass_over(path, &key);
            }
        }
        true
    }

    /// Records an entry that cannot be accessed.
    fn fail_at(&mut self, path: &Path, error: &walkdir::Error) {
        let relative = path.strip_prefix(self.root).unwrap_or(path);
        let key = key_of(relative);
        if error.loop_ancestor().is_some() {
            self.notes.add("link_loop", &key);
        } else if !path.is_symlink() {
            tracing::warn!("{error}: the photos in this folder are missing");
            self.notes.add("unreadable_folder", &key);
        } else if self.config.wants(path) {
            // Only one photo is affected: reading it fails too, and is counted.
            self.paths.push((key, relative.into()));
        } else {
            self.notes.add("broken_link", &key);
        }
    }

    /// Counts a file that is neither photo nor caption by its extension.
    fn pass_over(&mut self, path: &Path, key: &str) {
        // Enough for every format of photos and captions, and a limit so that a stranger's extensions cannot fill the
        // manifest.
        const MOST_KINDS: usize = 40;
        let extension = path.extension().map(|extension| extension.to_string_lossy().to_lowercase());
        let kind = match extension {
            Some(extension) if extension.len() <= 10 && extension.chars().all(char::is_alphanumeric) => {
                format!("{extension}_file")
            }
            _ => "other_file".into(),
        };
        let known = self.notes.get(&kind).is_some() || self.notes.kinds() < MOST_KINDS;
        self.notes.add(if known { &kind } else { "other_file" }, key);
    }

    /// Tells whether a link leads out of the folder. An absolute one does so on the next machine.
    fn leads_out(&self, link: &Path) -> bool {
        let inside = |real: PathBuf| real.starts_with(&self.real_root);
        !(link.read_link().is_ok_and(|target| target.is_relative()) && link.canonicalize().is_ok_and(inside))
    }

    /// Tells whether a photo has the same name as a text file, except for the extension.
    fn is_beside_photo(&self, text: &str) -> bool {
        let stem = text.strip_suffix("txt").unwrap_or(text);
        let start = self.paths.partition_point(|(key, _)| key.as_str() < stem);
        let alike = self.paths[start..].iter().map_while(|(key, _)| key.strip_prefix(stem));
        alike.into_iter().any(|extension| !extension.contains(['.', '/']))
    }

    /// Returns the photos with their labels.
    fn labelled(mut self, labels: Option<HashMap<String, Label>>) -> (Vec<Photo>, Notes) {
        let listed = labels.is_some();
        let mut labels = labels.unwrap_or_default();
        let photos = self.paths.into_iter().map(|(key, path)| {
            let label = labels.remove(&key);
            if listed && label.is_none() {
                self.notes.add("unlabelled_photo", &key);
            }
            if key.contains(char::REPLACEMENT_CHARACTER) {
                self.notes.add("name_not_utf8", &key);
            }
            let (identity, split) = label.map_or((None, None), |label| (label.identity, label.split));
            Photo { key, path, identity, split }
        });
        let photos = photos.collect();
        for key in labels.keys() {
            self.notes.add("label_without_photo", key);
        }
        (photos, self.notes)
    }
}

/// Reads the list of labels. A list outside the photos' folder is the user's; one inside is as foreign as the photos.
fn read_labels(path: &Path, root: &Path, files: &SourceFiles) -> Result<HashMap<String, Label>> {
    let bytes = match path.strip_prefix(root) {
        Ok(inside) => files.read(inside, labels::MAX_BYTES),
        Err(_) => read_regular(path, labels::MAX_BYTES),
    };
    labels::parse(bytes.map_err(|source| Error::read(path, source))?, path)
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
    use std::ffi::OsStr;
    use std::fs;
    use std::os::unix::fs::symlink;

    use cap_std::ambient_authority;
    use cap_std::fs::Dir;

    use super::*;

    fn folder(labels: &str) -> (tempfile::TempDir, FolderConfig) {
        let dir = tempfile::tempdir().unwrap();
        for name in ["b/2.PNG", "b/10.jpg", "a.pgm", "notes.txt"] {
            put(dir.path(), name);
        }
        fs::write(dir.path().join("list.csv"), labels).unwrap();
        let config = FolderConfig {
            root: ConfigPath::new("photos"),
            labels: Some(ConfigPath::new("list.csv")),
            extensions: image_extensions(),
            follow_links: false,
        };
        (dir, config)
    }

    fn put(dir: &Path, name: impl AsRef<Path>) {
        let path = dir.join("photos").join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, b"x").unwrap();
    }

    fn keys(source: &Source) -> Vec<&str> {
        source.photos.iter().map(|photo| photo.key.as_str()).collect()
    }

    #[test]
    fn photos_come_in_key_order_with_their_labels() {
        // The list begins with the byte-order mark that some editors write.
        let list = "\u{feff}key,identity,split\nb/2.PNG,ada,train\nb/10.jpg,,unseen\nmissing.png,x,y\n";
        let (dir, config) = folder(list);
        let Source { photos, files, notes } = config.open(dir.path(), false).unwrap();
        let seen: Vec<_> = photos.iter().map(|p| (p.key.as_str(), p.identity.as_deref(), p.split.as_deref())).collect();
        let expected =
            [("a.pgm", None, None), ("b/10.jpg", None, Some("unseen")), ("b/2.PNG", Some("ada"), Some("train"))];
        assert_eq!(seen, expected);
        assert!(photos.iter().all(|photo| files.read(&photo.path, 1).unwrap() == b"x" && files.size(&photo.path) == 1));
        let noted = "label_without_photo 1 (missing.png), txt_file 1 (notes.txt), unlabelled_photo 1 (a.pgm)";
        assert_eq!(notes.to_string(), noted);
    }

    #[test]
    fn a_list_among_the_photos_is_not_counted() {
        let (dir, mut config) = folder("");
        config.labels = Some(ConfigPath::new("photos/list.csv"));
        fs::write(dir.path().join("photos/list.csv"), "key,identity,split\na.pgm,ada,\n").unwrap();
        let Source { photos, notes, .. } = config.open(dir.path(), false).unwrap();
        assert_eq!(photos[0].identity.as_deref(), Some("ada"));
        assert_eq!(notes.to_string(), "txt_file 1 (notes.txt), unlabelled_photo 2 (b/10.jpg and more)");
    }

    #[test]
    fn what_is_no_photo_is_counted_by_its_kind() {
        let (dir, config) = folder("key,identity,split\na.pgm,,\nb/2.PNG,,\nb/10.jpg,,\n");
        for name in
            ["x.heic", "y.HEIC", "a.txt", "a.pgm.txt", "b/10.caption", "README", "b/10.x.txt", "c.d.jpg", "c.txt"]
        {
            put(dir.path(), name);
        }
        let source = config.open(dir.path(), true).unwrap();
        assert_eq!(keys(&source), ["a.pgm", "b/10.jpg", "b/2.PNG", "c.d.jpg"]);
        let noted = "caption_file 1 (b/10.caption), heic_file 2 (x.heic and more), other_file 1 (README), \
                     txt_file 4 (a.pgm.txt and more), unlabelled_photo 1 (c.d.jpg)";
        assert_eq!(source.notes.to_string(), noted);
        (0..100).for_each(|number| put(dir.path(), format!("z.e{number}")));
        assert!(config.open(dir.path(), true).unwrap().notes.kinds() < 50);
    }

    #[test]
    fn hidden_folders_and_those_of_tools_are_not_searched() {
        let (dir, mut config) = folder("");
        config.labels = None;
        for name in
            [".ipynb_checkpoints/a-checkpoint.pgm", "b/@eaDir/2.PNG", "__MACOSX/a.pgm", "._a.pgm", "@EADIR/1.jpg"]
        {
            put(dir.path(), name);
        }
        let source = config.open(dir.path(), true).unwrap();
        assert_eq!(keys(&source), ["a.pgm", "b/10.jpg", "b/2.PNG"]);
        let noted = "hidden_file 1 (._a.pgm), hidden_folder 4 (.ipynb_checkpoints and more), txt_file 1 (notes.txt)";
        assert_eq!(source.notes.to_string(), noted);
        // The folder that the user names may itself be hidden.
        config.root = ConfigPath::new("photos/.ipynb_checkpoints");
        assert_eq!(keys(&config.open(dir.path(), true).unwrap()), ["a-checkpoint.pgm"]);
    }

    #[test]
    fn links_stay_in_the_folder_unless_the_user_wants_them() {
        let (dir, mut config) = folder("");
        config.labels = None;
        let (photos, outside) = (dir.path().join("photos"), dir.path().join("outside"));
        fs::create_dir(&outside).unwrap();
        fs::write(outside.join("o.png"), b"secret").unwrap();
        for (target, link) in [
            ("nowhere.png", "dangling.png"),
            ("..", "b/loop"),
            ("../a.pgm", "b/inside.pgm"),
            ("b", "c"),
            ("../outside", "out"),
            ("../outside/o.png", "o.png"),
            ("/dev/zero", "zero.png"),
            ("/etc/hostname", "a.txt"),
            ("nowhere", "broken.dat"),
        ] {
            symlink(target, photos.join(link)).unwrap();
        }
        // It leads to the folder on this machine alone.
        symlink(photos.join("a.pgm"), photos.join("absolute.pgm")).unwrap();
        let pipe = std::process::Command::new("mkfifo").arg(photos.join("pipe.jpg")).status().unwrap();
        assert!(pipe.success());
        let source = config.open(dir.path(), true).unwrap();
        let inside =
            ["a.pgm", "b/10.jpg", "b/2.PNG", "b/inside.pgm", "c/10.jpg", "c/2.PNG", "c/inside.pgm", "dangling.png"];
        assert_eq!(keys(&source), inside);
        let noted = "broken_link 1 (broken.dat), link_loop 2 (b/loop and more), \
                     link_out_of_folder 5 (a.txt and more), no_regular_file 1 (pipe.jpg), txt_file 1 (notes.txt)";
        assert_eq!(source.notes.to_string(), noted);
        assert_eq!(source.files.read(Path::new("c/inside.pgm"), 9).unwrap(), b"x");
        for refused in ["dangling.png", "out/o.png", "o.png", "zero.png", "a.txt", "pipe.jpg"] {
            assert!(source.files.read(Path::new(refused), 1 << 20).is_err(), "{refused}");
        }

        config.follow_links = true;
        let source = config.open(dir.path(), true).unwrap();
        assert!(keys(&source).ends_with(&["dangling.png", "o.png", "out/o.png"]), "{:?}", keys(&source));
        assert_eq!(source.files.read(Path::new("out/o.png"), 9).unwrap(), b"secret");
        assert!(source.files.read(Path::new("zero.png"), 9).is_err());
    }

    #[test]
    fn a_folder_that_cannot_be_read_is_counted_as_one() {
        let (dir, mut config) = folder("");
        config.labels = None;
        // Deeper than the longest path: nobody can open the last folders by their paths, not even root.
        let mut at = Dir::open_ambient_dir(dir.path().join("photos"), ambient_authority()).unwrap();
        for _ in 0..17 {
            at.create_dir("d".repeat(250)).unwrap();
            at = at.open_dir("d".repeat(250)).unwrap();
        }
        at.write("lost.jpg", b"x").unwrap();
        let source = config.open(dir.path(), true).unwrap();
        assert_eq!(keys(&source), ["a.pgm", "b/10.jpg", "b/2.PNG"]);
        let noted = source.notes.get("unreadable_folder").unwrap();
        assert!(noted.count == 1 && noted.first.starts_with("dddd"), "{noted:?}");
    }

    #[test]
    fn names_that_are_not_utf8_have_keys_of_their_own() {
        let (dir, config) = folder("key,identity,split\n\u{fffd}.jpg,ada,\n");
        for name in [&b"\xff.jpg"[..], b"\xfe.jpg", "\u{fffd}.jpg".as_bytes()] {
            put(dir.path(), OsStr::from_bytes(name));
        }
        let source = config.open(dir.path(), true).unwrap();
        let escaped = ["\u{fffd}ef\u{fffd}bf\u{fffd}bd.jpg", "\u{fffd}fe.jpg", "\u{fffd}ff.jpg"];
        assert_eq!(keys(&source)[3..], escaped);
        assert_eq!(source.photos[3].identity.as_deref(), Some("ada"));
        assert_eq!(source.notes.get("name_not_utf8").map(|noted| noted.count), Some(3));
        assert!(source.photos.iter().all(|photo| source.files.read(&photo.path, 1).is_ok()));
    }

    #[test]
    fn a_broken_list_names_its_line() {
        for (labels, line, word) in [
            ("key,identity,split\na,b,c\nd,e\n", ":3: ", "fields"),
            ("key,identity,split\na,b,c\na,b,c\n", ":3: ", "second time"),
            ("key,person,split\na,b,c\n", ":2: ", "person"),
            ("key,identity,split\na,b,c\n../../etc/shadow,b,c\n", ":3: ", "not a plain relative path"),
            ("key,identity,split\n/etc/shadow,b,c\n", ":2: ", "not a plain relative path"),
        ] {
            let (dir, config) = folder(labels);
            let error = config.open(dir.path(), true).unwrap_err();
            assert_eq!(error.exit_code(), 2);
            let message = error.to_string();
            assert!(message.contains(&format!("list.csv{line}")) && message.contains(word), "{message}");
        }
    }

    #[test]
    fn a_list_is_a_regular_file() {
        let (dir, mut config) = folder("");
        symlink("/etc/passwd", dir.path().join("photos/labels.csv")).unwrap();
        for list in ["/dev/zero", "photos/labels.csv", "photos"] {
            config.labels = Some(ConfigPath::new(list));
            let error = config.open(dir.path(), true).unwrap_err();
            assert!(error.exit_code() == 2 && error.to_string().contains("cannot be read"), "{error}");
            assert_eq!(error.to_string().contains("not a regular file"), list == "/dev/zero", "{error}");
        }
        fs::File::create(dir.path().join("huge.csv")).unwrap().set_len(labels::MAX_BYTES + 1).unwrap();
        config.labels = Some(ConfigPath::new("huge.csv"));
        assert!(config.open(dir.path(), true).unwrap_err().to_string().contains("it holds more than"));
        fs::write(dir.path().join("list.csv"), b"\xff\xfek\0e\0y\0").unwrap();
        config.labels = Some(ConfigPath::new("list.csv"));
        assert!(config.open(dir.path(), true).unwrap_err().to_string().contains("is UTF-16 text"));
    }

    #[test]
    fn a_missing_or_empty_folder_is_named() {
        let (dir, mut config) = folder("key,identity,split\n");
        config.extensions = vec!["webp".into()];
        let message = config.open(dir.path(), true).unwrap_err().to_string();
        assert!(message.contains("holds no files ending in webp; passed over: jpg_file 1 (b/10.jpg)"), "{message}");
        config.root = ConfigPath::new("nowhere");
        assert!(config.open(dir.path(), true).unwrap_err().to_string().contains("nowhere: is not a folder"));
    }
}
