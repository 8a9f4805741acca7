//! Limits on what a shard folder may demand from its reader. Its author may be a stranger: a number from a file is
//! checked against these limits before anything is allocated for it.

use std::sync::atomic::{AtomicU64, Ordering};

use parquet::errors::ParquetError;

/// Size limit of `manifest.json` in bytes: about a million row groups.
pub(super) const MANIFEST_BYTES: u64 = 256 << 20;

/// Size limit of `index.parquet` in bytes.
pub(super) const INDEX_BYTES: u64 = 2 << 30;

/// Size limit of a row group in its file, in bytes.
pub(super) const GROUP_BYTES: u64 = 1 << 30;

/// Size limit of the footer of a Parquet file in bytes.
pub(super) const FOOTER_BYTES: u64 = 64 << 20;

/// Largest number of rows in a row group.
pub const ROWS_PER_GROUP: usize = 1 << 16;

/// Largest number of rows in a folder.
pub(super) const ROWS: usize = u32::MAX as usize;

/// Largest number of index rows per byte of its file. Every key differs from the previous one, which limits
/// compression.
pub(super) const INDEX_ROWS_PER_BYTE: usize = 64;

/// Size limit of a key, an identity and a split, in bytes.
pub(super) const LABEL_BYTES: usize = 4096;

/// Largest number of landmarks of a face.
pub(super) const LANDMARKS: usize = 1024;

/// Size limit of a decoded page of the index, in bytes.
const INDEX_PAGE: u64 = 64 << 20;

/// Memory budget for a part of a Parquet file.
#[derive(Debug)]
pub(super) struct Budget {
    left: AtomicU64,
    /// True if the budget applies to each page, because pages are freed one after the other.
    each_page: bool,
}

impl Budget {
    /// Makes the budget for all rows of a row group of `bytes` bytes. Pictures and embeddings hardly compress.
    pub(super) fn of_group(bytes: u64) -> Self {
        Self { left: ((64 << 20) + 16 * bytes).into(), each_page: false }
    }

    /// Makes the budget for the index.
    pub(super) fn of_index() -> Self {
        Self { left: INDEX_PAGE.into(), each_page: true }
    }

    /// Takes `bytes` from the budget.
    ///
    /// # Errors
    /// General: the budget is too small.
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
