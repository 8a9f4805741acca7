//! Pages of a Parquet file, decompressed within a budget: the size that a page states is not trusted.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use arrow::array::RecordBatch;
use arrow::datatypes::{DataType, Field, Fields};
use arrow::error::ArrowError;
use bytes::Bytes;
use parquet::arrow::arrow_reader::{ArrowReaderMetadata, ArrowReaderOptions, ParquetRecordBatchReader, RowGroups};
use parquet::arrow::{ProjectionMask, parquet_to_arrow_field_levels};
use parquet::basic::{Compression, Encoding};
use parquet::column::page::{Page, PageIterator, PageMetadata, PageReader};
use parquet::errors::{ParquetError, Result};
use parquet::file::metadata::{ColumnChunkMetaData, ParquetMetaData, RowGroupMetaData};
use parquet::file::reader::ChunkReader;
use parquet::file::serialized_reader::SerializedPageReader;
use zstd::bulk::Decompressor;
use zstd::zstd_safe::get_frame_content_size;

use crate::shard::limits::Budget;

/// Bytes of a value besides its content: its offset, levels, or a view of it.
const PER_VALUE: u64 = 16;

/// Reads the footer of a file. Ignores Arrow's own metadata about the columns, because the columns are sufficient.
pub(super) fn footer(file: &impl ChunkReader) -> Result<ArrowReaderMetadata> {
    let options = ArrowReaderOptions::new().with_skip_arrow_metadata(true);
    without_panic(|| ArrowReaderMetadata::load(file, options))?
}

/// Reads the batches of one row group, for the columns in `mask`. Texts and binaries are views of the pages: a page
/// that repeats a value a thousand times takes no more memory than one copy.
pub(super) fn batches<R: ChunkReader + 'static>(
    reader: &Arc<R>,
    metadata: &ParquetMetaData,
    group: usize,
    (fields, mask): (&Fields, ProjectionMask),
    (batch_size, budget): (usize, &Arc<Budget>),
) -> Result<Batches> {
    let schema = metadata.file_metadata().schema_descr();
    let levels = parquet_to_arrow_field_levels(schema, mask, Some(&viewed(fields)))?;
    let group = Group { reader: Arc::clone(reader), metadata, group, budget: Arc::clone(budget) };
    let reader =
        without_panic(|| ParquetRecordBatchReader::try_new_with_row_groups(&levels, &group, batch_size, None))??;
    Ok(Batches(Some(reader)))
}

/// The batches of a row group, up to the first that cannot be read.
pub(super) struct Batches(Option<ParquetRecordBatchReader>);

impl Iterator for Batches {
    type Item = std::result::Result<RecordBatch, ArrowError>;

    fn next(&mut self) -> Option<Self::Item> {
        let mut reader = self.0.take()?;
        let batch = without_panic(|| reader.next()).unwrap_or_else(|error| Some(Err(error.into())));
        if let Some(Ok(_)) = batch {
            self.0 = Some(reader);
        }
        batch
    }
}

/// Runs what the library does with bytes of a file. It panics at some that contradict themselves, such as a run of levels
/// that ends behind its page: that is the file's fault as well. What it was at work on must not be used again.
fn without_panic<T>(read: impl FnOnce() -> T) -> Result<T> {
    catch_unwind(AssertUnwindSafe(read)).map_err(|_| general("what it holds contradicts itself"))
}

/// Returns the same columns, with views in place of texts and binaries.
fn viewed(fields: &Fields) -> Fields {
    let view = |field: &Arc<Field>| match field.data_type() {
        DataType::Utf8 => field.as_ref().clone().with_data_type(DataType::Utf8View),
        DataType::Binary => field.as_ref().clone().with_data_type(DataType::BinaryView),
        _ => field.as_ref().clone(),
    };
    fields.iter().map(view).collect()
}

struct Group<'a, R> {
    reader: Arc<R>,
    metadata: &'a ParquetMetaData,
    group: usize,
    budget: Arc<Budget>,
}

impl<R: ChunkReader + 'static> RowGroups for Group<'_, R> {
    fn num_rows(&self) -> usize {
        usize::try_from(self.metadata.row_group(self.group).num_rows()).unwrap_or(0)
    }

    fn column_chunks(&self, column: usize) -> Result<Box<dyn PageIterator>> {
        let chunk = self.metadata.row_group(self.group).column(column);
        let pages = Pages::new(Arc::clone(&self.reader), chunk, self.num_rows(), Arc::clone(&self.budget))?;
        Ok(Box::new(Chunk(Some(Box::new(pages)))))
    }

    fn row_groups(&self) -> Box<dyn Iterator<Item = &RowGroupMetaData> + '_> {
        Box::new(std::iter::once(self.metadata.row_group(self.group)))
    }

    fn metadata(&self) -> &ParquetMetaData {
        self.metadata
    }
}

/// Iterator over the only chunk of a column.
struct Chunk(Option<Box<dyn PageReader>>);

impl Iterator for Chunk {
    type Item = Result<Box<dyn PageReader>>;

    fn next(&mut self) -> Option<Self::Item> {
        self.0.take().map(Ok)
    }
}

impl PageIterator for Chunk {}

/// Pages of a chunk.
struct Pages<R: ChunkReader> {
    /// Reader of the raw pages. It was told that they are not compressed, so that it leaves the decompression to this
    /// type.
    packed: SerializedPageReader<R>,
    /// Set if the pages are compressed.
    decompressor: Option<Decompressor<'static>>,
    /// True once the chunk's dictionary was read: the library panics if values refer to a missing one.
    dictionary: bool,
    budget: Arc<Budget>,
}

impl<R: ChunkReader> Pages<R> {
    fn new(reader: Arc<R>, chunk: &ColumnChunkMetaData, rows: usize, budget: Arc<Budget>) -> Result<Self> {
        let start = chunk.dictionary_page_offset().unwrap_or(chunk.data_page_offset());
        if start < 0 || chunk.compressed_size() < 0 {
            return Err(general("a column begins or ends before the file"));
        }
        let decompressor = match chunk.compression() {
            Compression::UNCOMPRESSED => None,
            Compression::ZSTD(_) => Some(Decompressor::new()?),
            other => return Err(general(format!("it is compressed with {other}: only zstd is read"))),
        };
        let as_it_lies = chunk.clone().into_builder().set_compression(Compression::UNCOMPRESSED).build()?;
        let packed = SerializedPageReader::new(reader, &as_it_lies, rows, None)?;
        Ok(Self { packed, decompressor, dictionary: false, budget })
    }

    fn unpack(&mut self, mut page: Page) -> Result<Page> {
        if page.encoding() == Encoding::DELTA_BYTE_ARRAY {
            return Err(general("its texts are written as differences, which are not read"));
        }
        let refers = matches!(page.encoding(), Encoding::RLE_DICTIONARY | Encoding::PLAIN_DICTIONARY);
        match page {
            Page::DictionaryPage { .. } => self.dictionary = true,
            _ if refers && !self.dictionary => {
                return Err(general("its values refer to a dictionary that is not there"));
            }
            _ => {}
        }
        self.budget.take(u64::from(page.num_values()) * PER_VALUE)?;
        match &mut page {
            Page::DataPage { buf, .. } | Page::DictionaryPage { buf, .. } => *buf = self.decompress(buf)?,
            // The levels precede the compressed part.
            Page::DataPageV2 { buf, def_levels_byte_len, rep_levels_byte_len, is_compressed: true, .. } => {
                let levels = u64::from(*def_levels_byte_len) + u64::from(*rep_levels_byte_len);
                let levels = usize::try_from(levels)?;
                if levels > buf.len() {
                    return Err(general("the levels of a page end behind it"));
                }
                let values = self.decompress(&buf.split_off(levels))?;
                *buf = [&buf[..], &values].concat().into();
            }
            Page::DataPageV2 { .. } => {}
        }
        Ok(page)
    }

    fn decompress(&mut self, packed: &Bytes) -> Result<Bytes> {
        let Some(decompressor) = self.decompressor.as_mut().filter(|_| !packed.is_empty()) else {
            self.budget.take(packed.len() as u64)?;
            return Ok(packed.clone());
        };
        let size = get_frame_content_size(packed).ok().flatten();
        let size = size.ok_or_else(|| general("a page does not tell its decompressed size"))?;
        self.budget.take(size)?;
        // The buffer has the announced size and no more.
        let unpacked = decompressor.decompress(packed, usize::try_from(size)?)?;
        Ok(unpacked.into())
    }
}

impl<R: ChunkReader> Iterator for Pages<R> {
    type Item = Result<Page>;

    fn next(&mut self) -> Option<Self::Item> {
        self.get_next_page().transpose()
    }
}

impl<R: ChunkReader> PageReader for Pages<R> {
    fn get_next_page(&mut self) -> Result<Option<Page>> {
        self.packed.get_next_page()?.map(|page| self.unpack(page)).transpose()
    }

    fn peek_next_page(&mut self) -> Result<Option<PageMetadata>> {
        self.packed.peek_next_page()
    }

    fn skip_next_page(&mut self) -> Result<()> {
        self.packed.skip_next_page()
    }
}

fn general(problem: impl Into<String>) -> ParquetError {
    ParquetError::General(problem.into())
}
