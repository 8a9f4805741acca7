//! The columns of a shard, and the way between rows and Arrow batches.

use std::sync::Arc;

use arrow::array::{
    Array, ArrayRef, AsArray, BinaryArray, FixedSizeListArray, Float32Array, ListArray, RecordBatch, StringArray,
    UInt32Array,
};
use arrow::buffer::OffsetBuffer;
use arrow::datatypes::{DataType, Field, Fields, Float32Type, Schema, UInt32Type};
use arrow::error::ArrowError;

use crate::shard::FaceRecord;

/// Version of the columns and the manifest. A reader refuses any other.
pub const SCHEMA_VERSION: u32 = 2;

/// Length of an identity embedding.
pub const EMBEDDING_DIM: usize = 512;

/// The columns of a shard, in order. Only `identity` and `split` may be null.
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

/// The first column of `found` that is not the expected one, in words; `None` where all columns are as expected.
pub(super) fn difference(found: &Fields) -> Option<String> {
    let expected = schema();
    for (position, field) in expected.fields().iter().enumerate() {
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
    let extra = found.get(expected.fields().len())?;
    Some(format!("unknown column `{}`", extra.name()))
}

/// Rows to one Arrow batch.
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

/// One Arrow batch to rows; the batch has the columns of [`schema`].
pub(super) fn from_batch(batch: &RecordBatch) -> Result<Vec<FaceRecord>, ArrowError> {
    let columns = Columns::new(batch)?;
    (0..batch.num_rows()).map(|row| columns.record(row)).collect()
}

/// The columns of a batch, each as what it holds.
struct Columns<'a> {
    key: &'a StringArray,
    image: &'a BinaryArray,
    width: &'a UInt32Array,
    height: &'a UInt32Array,
    face_box: &'a FixedSizeListArray,
    points: &'a FixedSizeListArray,
    landmarks: &'a ListArray,
    score: &'a Float32Array,
    id_embedding: &'a FixedSizeListArray,
    caption: &'a StringArray,
    sha256: &'a StringArray,
    identity: &'a StringArray,
    split: &'a StringArray,
}

impl<'a> Columns<'a> {
    fn new(batch: &'a RecordBatch) -> Result<Self, ArrowError> {
        let get = |name: &str| batch.column_by_name(name).ok_or_else(|| misread(name, "is missing"));
        let strings = |name: &str| get(name)?.as_string_opt::<i32>().ok_or_else(|| misread(name, "is no string"));
        let lists = |name: &str| get(name)?.as_fixed_size_list_opt().ok_or_else(|| misread(name, "is no fixed list"));
        let numbers =
            |name: &str| get(name)?.as_primitive_opt::<UInt32Type>().ok_or_else(|| misread(name, "is no u32"));
        Ok(Self {
            key: strings("key")?,
            image: get("image")?.as_binary_opt().ok_or_else(|| misread("image", "is not binary"))?,
            width: numbers("width")?,
            height: numbers("height")?,
            face_box: lists("face_box")?,
            points: lists("points")?,
            landmarks: get("landmarks")?.as_list_opt().ok_or_else(|| misread("landmarks", "is no list"))?,
            score: get("score")?.as_primitive_opt().ok_or_else(|| misread("score", "is no f32"))?,
            id_embedding: lists("id_embedding")?,
            caption: strings("caption")?,
            sha256: strings("sha256")?,
            identity: strings("identity")?,
            split: strings("split")?,
        })
    }

    fn record(&self, row: usize) -> Result<FaceRecord, ArrowError> {
        let optional = |column: &StringArray| column.is_valid(row).then(|| column.value(row).to_owned());
        let face_box = floats(&self.face_box.value(row), "face_box")?;
        let points = pairs(&self.points.value(row), "points")?;
        Ok(FaceRecord {
            key: self.key.value(row).into(),
            image: self.image.value(row).into(),
            width: self.width.value(row),
            height: self.height.value(row),
            face_box: face_box.try_into().map_err(|_| misread("face_box", "has not 4 values"))?,
            points: points.try_into().map_err(|_| misread("points", "has not 5 points"))?,
            landmarks: pairs(&self.landmarks.value(row), "landmarks")?,
            score: self.score.value(row),
            id_embedding: floats(&self.id_embedding.value(row), "id_embedding")?,
            caption: self.caption.value(row).into(),
            sha256: self.sha256.value(row).into(),
            identity: optional(self.identity),
            split: optional(self.split),
        })
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

fn floats(list: &ArrayRef, column: &str) -> Result<Vec<f32>, ArrowError> {
    let values = list.as_primitive_opt::<Float32Type>().ok_or_else(|| misread(column, "holds no f32"))?;
    Ok(values.values().to_vec())
}

fn pairs(list: &ArrayRef, column: &str) -> Result<Vec<[f32; 2]>, ArrowError> {
    let values = floats(list, column)?;
    let (pairs, rest) = values.as_chunks();
    if rest.is_empty() { Ok(pairs.to_vec()) } else { Err(misread(column, "has an odd number of coordinates")) }
}

fn misread(column: &str, problem: &str) -> ArrowError {
    ArrowError::SchemaError(format!("column `{column}` {problem}"))
}
