//! Notes on what was skipped or changed without rejecting a photo, so that no such change is silent.

use std::collections::BTreeMap;
use std::fmt::{self, Display, Formatter};

use hyperlora_core::text::name;
use serde::{Deserialize, Serialize};

/// Occurrences of one kind.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Noted {
    /// Number of occurrences.
    pub count: usize,
    /// Name of one of them: the first in the order of names.
    pub first: String,
}

/// Notes by kind.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Notes(BTreeMap<String, Noted>);

impl Notes {
    /// Counts `thing` among those of `kind`.
    pub fn add(&mut self, kind: &str, thing: &str) {
        match self.0.get_mut(kind) {
            Some(noted) => {
                noted.count += 1;
                if thing < noted.first.as_str() {
                    noted.first = thing.into();
                }
            }
            None => {
                self.0.insert(kind.into(), Noted { count: 1, first: thing.into() });
            }
        }
    }

    /// Returns the notes of `kind`.
    pub fn get(&self, kind: &str) -> Option<&Noted> {
        self.0.get(kind)
    }

    /// Tells whether there are no notes.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Returns the number of kinds.
    pub fn kinds(&self) -> usize {
        self.0.len()
    }
}

/// Writes the notes in words: `caption_fallback 5 (a.png and more), hidden_folder 1 (.git)`.
impl Display for Notes {
    fn fmt(&self, out: &mut Formatter<'_>) -> fmt::Result {
        for (index, (kind, Noted { count, first })) in self.0.iter().enumerate() {
            let comma = if index == 0 { "" } else { ", " };
            let more = if *count > 1 { " and more" } else { "" };
            write!(out, "{comma}{} {count} ({}{more})", name(kind), name(first))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_is_counted_and_named_once_whatever_the_order() {
        let mut notes = Notes::default();
        for (kind, thing) in [("heic_file", "b.heic"), ("hidden_folder", ".git\n"), ("heic_file", "a.heic")] {
            notes.add(kind, thing);
        }
        assert_eq!(notes.to_string(), "heic_file 2 (a.heic and more), hidden_folder 1 (.git\\n)");
        assert_eq!(Notes::default().to_string(), "");
    }
}
