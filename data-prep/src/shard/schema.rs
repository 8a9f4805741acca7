//! Columns of a shard, and the conversion between rows and Arrow batches.

use std::sync::Arc;

use arrow::array::{
    Array, ArrayRef, AsArray, BinaryArray, BinaryViewArray, FixedSizeListArray, Float32Array, ListArray, RecordBatch,
    StringArray, StringViewArray, UInt32Array,
};
use arrow::buffer::OffsetBuffer;
use arrow::datatypes::{DataType, Field, Fields, Float32Type, Schema, UInt32Type};
use arrow::error::ArrowError;

use crate::shard::access::Damage;
use crate::shard::limits::Budget;
use crate::shard::{EMBEDDING_DIM, FaceRecord, rows};

/// Version of the columns and the manifest. A reader refuses any other.
pub const SCHEMA_VERSION: u32 = 2;

/// Returns the columns of a shard, in order. Only `identity` and `split` may be null.
pub fn schema() -> Schema {
    Schema::new(vec![
        Field::new("key", DataType::Utf8, false),
        Field::new("image", DataType::Binary, false),
        Field::new("width", DataType::UInt32, false),
        Field::new("height", DataType::UInt32, false),
        Field::new("face_box", fixed_list(4), false),
        Field::new("points", fixed_list(10), false),
        Field::new("landmarks", DataType::List(Arc::new(element())), false),
        Field::new("score", DataType::Float32, false),
        Field::new("id_embedding", fixed_list(EMBEDDING_DIM as i32), false),
        Field::new("caption", DataType::Utf8, false),
        Field::new("sha256", DataType::Utf8, false),
        Field::new("identity", DataType::Utf8, true),
        Field::new("split", DataType::Utf8, true),
    ])
}

/// Returns the columns as a Parquet file without Arrow's own metadata has them: no list has a fixed length. That
/// metadata is ignored, because it could claim anything.
pub(super) fn columns() -> Fields {
    let column = |field: &Arc<Field>| match field.data_type() {
        DataType::FixedSizeList(element, _) => {
            field.as_ref().clone().with_data_type(DataType::List(Arc::clone(element)))
        }
        _ => field.as_ref().clone(),
    };
    schema().fields().iter().map(column).collect()
}

/// Describes the first column of `found` that is not the expected one, `None` if all columns are as expected.
pub(super) fn difference(found: &Fields) -> Option<String> {
    let expected = columns();
    for (position, field) in expected.iter().enumerate() {
        match found.get(position) {
            Some(column) if column.name() == field.name() && column.data_type() == field.data_type() => {}
            Some(column) => {
                return Some(format!(
                    "column {position} is `{}` of type {}, expected `{}` of type {}",
                    column.name(),
                    column.data_type(),
                    field.name(),
                    field.data_type()
                ));
            }
            None => return Some(format!("column {position}, `{}`, is missing", field.name())),
        }
    }
    let extra = found.get(expected.len())?;
    Some(format!("unknown column `{}`", extra.name()))
}

/// Converts rows to one Arrow batch.
pub(super) fn to_batch(records: &[FaceRecord]) -> Result<RecordBatch, ArrowError> {
    let strings =
        |get: fn(&FaceRecord) -> &str| -> ArrayRef { Arc::new(StringArray::from_iter_values(records.iter().map(get))) };
    let optional = |get: fn(&FaceRecord) -> Option<&str>| -> ArrayRef {
        Arc::new(records.iter().map(get).collect::<StringArray>())
    };
    let numbers =
        |get: fn(&FaceRecord) -> u32| -> ArrayRef { Arc::new(UInt32Array::from_iter_values(records.iter().map(get))) };
    let columns = vec![
        strings(|r| &r.key),
        Arc::new(BinaryArray::from_iter_values(records.iter().map(|r| &r.image))),
        numbers(|r| r.width),
        numbers(|r| r.height),
        fixed_lists(4, records.iter().flat_map(|r| r.face_box))?,
        fixed_lists(10, records.iter().flat_map(|r| r.points.as_flattened().iter().copied()))?,
        lists(records.iter().map(|r| r.landmarks.as_flattened()))?,
        Arc::new(Float32Array::from_iter_values(records.iter().map(|r| r.score))),
        fixed_lists(EMBEDDING_DIM as i32, records.iter().flat_map(|r| r.id_embedding.iter().copied()))?,
        strings(|r| &r.caption),
        strings(|r| &r.sha256),
        optional(|r| r.identity.as_deref()),
        optional(|r| r.split.as_deref()),
    ];
    RecordBatch::try_new(Arc::new(schema()), columns)
}

/// Converts one Arrow batch to rows. The batch has [`columns`], with views in place of texts and binaries. Copies at
/// most `budget`.
///
/// # Errors
/// A row with values that training cannot use, by its number and its key.
pub(super) fn from_batch(batch: &RecordBatch, budget: &Budget) -> Result<Vec<FaceRecord>, Damage> {
    let columns = Columns::new(batch)?;
    let copied: usize = (0..batch.num_rows()).map(|row| columns.copied_bytes(row)).sum();
    budget.take(copied as u64).map_err(|error| Damage(error.to_string()))?;
    let record = |row: usize| {
        let key = columns.key.value(row);
        let of_row = |problem: String| Damage(format!("row {row}, `{key}`: {problem}"));
        let record = columns.record(row).map_err(of_row)?;
        rows::problem(&record).map_or(Ok(record), |problem| Err(of_row(problem)))
    };
    (0..batch.num_rows()).map(record).collect()
}

/// Columns of a batch, by type.
struct Columns<'a> {
    key: &'a StringViewArray,
    image: &'a BinaryViewArray,
    width: &'a UInt32Array,
    height: &'a UInt32Array,
    face_box: &'a ListArray,
    points: &'a ListArray,
    landmarks: &'a ListArray,
    score: &'a Float32Array,
    id_embedding: &'a ListArray,
    caption: &'a StringViewArray,
    sha256: &'a StringViewArray,
    identity: &'a StringViewArray,
    split: &'a StringViewArray,
}

impl<'a> Columns<'a> {
    fn new(batch: &'a RecordBatch) -> Result<Self, Damage> {
        let column = |name: &str| batch.column_by_name(name).ok_or_else(|| misread(name, "is missing"));
        // A null would read as a zero or as an empty value.
        let filled = |name: &str| {
            let column = column(name)?;
            match (0..column.len()).find(|row| column.is_null(*row)) {
                Some(row) => Err(misread(name, &format!("is null in row {row}"))),
                None => Ok(column),
            }
        };
        let text = |column: &'a ArrayRef, name: &str| {
            column.as_string_view_opt().ok_or_else(|| misread(name, "is not a string"))
        };
        let list = |name: &str| {
            let list = filled(name)?.as_list_opt::<i32>().ok_or_else(|| misread(name, "is not a list"))?;
            if list.values().null_count() > 0 {
                return Err(misread(name, "holds nulls"));
            }
            Ok(list)
        };
        let number =
            |name: &str| filled(name)?.as_primitive_opt::<UInt32Type>().ok_or_else(|| misread(name, "is not u32"));
        Ok(Self {
            key: text(filled("key")?, "key")?,
            image: filled("image")?.as_binary_view_opt().ok_or_else(|| misread("image", "is not binary"))?,
            width: number("width")?,
            height: number("height")?,
            face_box: list("face_box")?,
            points: list("points")?,
            landmarks: list("landmarks")?,
            score: filled("score")?.as_primitive_opt().ok_or_else(|| misread("score", "is not f32"))?,
            id_embedding: list("id_embedding")?,
            caption: text(filled("caption")?, "caption")?,
            sha256: text(filled("sha256")?, "sha256")?,
            identity: text(column("identity")?, "identity")?,
            split: text(column("split")?, "split")?,
        })
    }

    fn record(&self, row: usize) -> Result<FaceRecord, String> {
        let optional = |column: &StringViewArray| column.is_valid(row).then(|| column.value(row).to_owned());
        let face_box = floats(&self.face_box.value(row), "face_box")?;
        let points = pairs(&self.points.value(row), "points")?;
        Ok(FaceRecord {
            key: self.key.value(row).into(),
            image: self.image.value(row).into(),
            width: self.width.value(row),
            height: self.height.value(row),
            face_box: face_box.try_into().map_err(|_| "`face_box` has not 4 values")?,
            points: points.try_into().map_err(|_| "`points` has not 5 points")?,
            landmarks: pairs(&self.landmarks.value(row), "landmarks")?,
            score: self.score.value(row),
            id_embedding: floats(&self.id_embedding.value(row), "id_embedding")?,
            caption: self.caption.value(row).into(),
            sha256: self.sha256.value(row).into(),
            identity: optional(self.identity),
            split: optional(self.split),
        })
    }

    /// Returns the bytes that copies of a row's texts and image take.
    fn copied_bytes(&self, row: usize) -> usize {
        let texts = [self.key, self.caption, self.sha256, self.identity, self.split];
        self.image.value(row).len() + texts.map(|text| text.value(row).len()).iter().sum::<usize>()
    }
}

fn element() -> Field {
    Field::new("element", DataType::Float32, false)
}

fn fixed_list(length: i32) -> DataType {
    DataType::FixedSizeList(Arc::new(element()), length)
}

fn fixed_lists(length: i32, values: impl Iterator<Item = f32>) -> Result<ArrayRef, ArrowError> {
    let values = Arc::new(Float32Array::from_iter_values(values));
    Ok(Arc::new(FixedSizeListArray::try_new(Arc::new(element()), length, values, None)?))
}

fn lists<'a>(rows: impl Iterator<Item = &'a [f32]> + Clone) -> Result<ArrayRef, ArrowError> {
    let offsets = OffsetBuffer::from_lengths(rows.clone().map(<[f32]>::len));
    let values = Arc::new(Float32Array::from_iter_values(rows.flatten().copied()));
    Ok(Arc::new(ListArray::try_new(Arc::new(element()), offsets, values, None)?))
}

fn floats(list: &ArrayRef, column: &str) -> Result<Vec<f32>, String> {
    let values = list.as_primitive_opt::<Float32Type>().ok_or_else(|| format!("`{column}` holds no f32"))?;
    Ok(values.values().to_vec())
}

fn pairs(list: &ArrayRef, column: &str) -> Result<Vec<[f32; 2]>, String> {
    let values = floats(list, column)?;
    let (pairs, rest) = values.as_chunks();
    if rest.is_empty() { Ok(pairs.to_vec()) } else { Err(format!("`{column}` has an odd number of coordinates")) }
}

fn misread(column: &str, problem: &str) -> Damage {
    Damage(format!("column `{column}` {problem}"))
}
