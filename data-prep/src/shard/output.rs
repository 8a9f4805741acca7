//! Parquet files that are written: common settings, and the kind of an error.

use std::path::Path;

use hyperlora_core::Error;
use parquet::basic::{Compression, ZstdLevel};
use parquet::errors::ParquetError;
use parquet::file::properties::WriterPropertiesBuilder;

/// Makes the bytes reproducible for the same rows, and small.
pub(super) fn reproducible(properties: WriterPropertiesBuilder) -> WriterPropertiesBuilder {
    properties
        .set_compression(Compression::ZSTD(ZstdLevel::default()))
        // The library's default contains its own version: an upgrade would change every byte.
        .set_created_by("hyperlora data-prep".into())
}

/// Maps a write error: an I/O error is the disk's, everything else a fault of the program.
pub(super) fn write_error(path: &Path, error: ParquetError) -> Error {
    match error {
        ParquetError::External(source) => match source.downcast::<std::io::Error>() {
            Ok(source) => Error::write(path, *source),
            Err(other) => Error::Fault(format!("{}: {other}", path.display())),
        },
        other => Error::Fault(format!("{}: {other}", path.display())),
    }
}
