//! How much a shard folder may ask of its reader. A stranger may have written it: nothing is allocated by a number of a file
//! before it was held against these.

use std::sync::atomic::{AtomicU64, Ordering};

use parquet::errors::ParquetError;

/// Largest `manifest.json`: about a million row groups.
pub(super) const MANIFEST_BYTES: u64 = 256 << 20;

/// Largest `index.parquet`.
pub(super) const INDEX_BYTES: u64 = 2 << 30;

/// Largest row group, as it lies in its file.
pub(super) const GROUP_BYTES: u64 = 1 << 30;

/// Largest footer of a Parquet file.
pub(super) const FOOTER_BYTES: u64 = 64 << 20;

/// Most rows of a row group.
pub const ROWS_PER_GROUP: usize = 1 << 16;

/// Most rows of a folder.
pub(super) const ROWS: usize = u32::MAX as usize;

/// Most rows of the index for each of its bytes. Every key differs from the one before.
pub(super) const INDEX_ROWS_PER_BYTE: usize = 64;

/// Longest key, identity and split, in bytes.
pub(super) const LABEL_BYTES: usize = 4096;

/// Most landmarks of a face.
pub(super) const LANDMARKS: usize = 1024;

/// Largest page of the index, decoded.
const INDEX_PAGE: u64 = 64 << 20;

/// Memory that a part of a Parquet file may take.
#[derive(Debug)]
pub(super) struct Budget {
    left: AtomicU64,
    /// Whether each page has it anew: pages are let go one after the other.
    each_page: bool,
}

impl Budget {
    /// For a row group of so many bytes, all of its rows. Pictures and embeddings hardly shrink when they are written.
    pub(super) fn of_group(bytes: u64) -> Self {
        Self { left: ((64 << 20) + 16 * bytes).into(), each_page: false }
    }

    /// For the index.
    pub(super) fn of_index() -> Self {
        Self { left: INDEX_PAGE.into(), each_page: true }
    }

    /// Takes `bytes` of it.
    ///
    /// # Errors
    /// General where it does not hold as much.
    pub(super) fn take(&self, bytes: u64) -> Result<(), ParquetError> {
        let rest = |left: u64| left.checked_sub(bytes).map(|rest| if self.each_page { left } else { rest });
        match self.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, rest) {
            Ok(_) => Ok(()),
            Err(left) => {
                let problem =
                    format!("{bytes} more bytes would be decoded, and {left} may be: far more than were written");
                Err(ParquetError::General(problem))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;

    #[test]
    fn a_row_group_has_its_budget_once_and_the_index_anew_for_each_page() {
        let (group, index) = (Budget::of_group(1 << 20), Budget::of_index());
        for budget in [&group, &index] {
            budget.take(60 << 20).unwrap();
        }
        // 64 and 16 MiB.
        group.take(20 << 20).unwrap();
        assert!(group.take(1).unwrap_err().to_string().contains("1 more bytes would be decoded, and 0 may be"));
        index.take(INDEX_PAGE).unwrap();
        assert!(index.take(INDEX_PAGE + 1).is_err());
    }
}
