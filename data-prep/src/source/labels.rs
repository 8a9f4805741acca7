//! CSV list of identities and splits.

use std::collections::HashMap;
use std::path::Path;

use hyperlora_core::paths::is_plain;
use hyperlora_core::{Error, Result, text};
use serde::Deserialize;

use crate::source::photo::key_of;

/// Size limit of the list in bytes: ten million rows take less.
pub(super) const MAX_BYTES: u64 = 1 << 30;

const REMEDY: &str = "write it as CSV with the header `key,identity,split`, each key once";

/// Row of the list.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Label {
    pub(super) key: String,
    pub(super) identity: Option<String>,
    pub(super) split: Option<String>,
}

/// Parses `bytes`, the content of the list at `path`, into rows by key.
///
/// # Errors
/// Input that names the line: not CSV with this header, or a key that is repeated or not a plain relative path.
pub(super) fn parse(bytes: Vec<u8>, path: &Path) -> Result<HashMap<String, Label>> {
    let text = text::decode(bytes).map_err(|problem| Error::file(path, format!("it {problem}"), REMEDY))?;
    let mut labels = HashMap::new();
    let mut rows = csv::Reader::from_reader(text.as_bytes());
    let mut row = csv::StringRecord::new();
    let broken = |error: csv::Error| {
        let line = error.position().map_or(1, csv::Position::line);
        Error::input(format!("{}:{line}", path.display()), error, REMEDY)
    };
    let header = rows.headers().map_err(broken)?.clone();
    while rows.read_record(&mut row).map_err(broken)? {
        let label: Label = row.deserialize(Some(&header)).map_err(broken)?;
        let line = row.position().map_or(1, csv::Position::line);
        let place = || format!("{}:{line}", path.display());
        if !is_plain(&label.key) {
            let remedy = "write keys as the photos' paths from source.folder.root, such as ada/1.jpg";
            return Err(Error::input(place(), format!("the key `{}` is not a plain relative path", label.key), remedy));
        }
        if let Some(twice) = labels.insert(key_of(Path::new(&label.key)), label) {
            return Err(Error::input(place(), format!("the key `{}` appears a second time", twice.key), REMEDY));
        }
    }
    Ok(labels)
}
