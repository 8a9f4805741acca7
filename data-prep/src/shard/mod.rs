//! Contract between preparation and training: the content of a shard folder, its writer and its reader.
//!
//! `docs/reference/formats.md` describes the format for readers in other languages.

mod access;
pub mod index;
mod limits;
pub mod manifest;
mod output;
mod pages;
#[cfg(feature = "cloud")]
mod piece_cache;
pub mod reader;
#[cfg(feature = "cloud")]
mod remote;
mod rows;
pub mod schema;
pub mod store;
pub mod writer;

pub use access::{Damage, ReadError, RemoteConfig};
pub use index::INDEX_FILE;
pub use limits::ROWS_PER_GROUP;
pub use manifest::{IndexFile, MANIFEST_FILE, Manifest, RowGroupPiece, ShardFile};
pub use reader::{RowGroup, ShardFolder};
pub use schema::SCHEMA_VERSION;
pub use writer::{ShardConfig, ShardWriter, Written};

/// Length of an identity embedding.
pub const EMBEDDING_DIM: usize = 512;

/// One kept face: a row of a shard.
///
/// All coordinates are pixels of the crop in `image`, x to the right and y down, with the origin at the upper left
/// corner of the upper left pixel. Left and right are the viewer's.
#[derive(Debug, Clone, PartialEq)]
pub struct FaceRecord {
    /// Path of the photo relative to the root of its source, with `/` between the parts. Unique in a shard folder.
    pub key: String,
    /// Encoded crop around the face (PNG), 8-bit RGB.
    pub image: Vec<u8>,
    /// Width of the crop in pixels.
    pub width: u32,
    /// Height of the crop in pixels.
    pub height: u32,
    /// Box of the detector: x0, y0, x1, y1. May extend beyond the crop where the photo ends.
    pub face_box: [f32; 4],
    /// Left eye, right eye, nose, left and right corner of the mouth.
    pub points: [[f32; 2]; 5],
    /// 68 or 106 landmarks, in the order of the landmark model.
    pub landmarks: Vec<[f32; 2]>,
    /// Confidence of the detector, in 0..1.
    pub score: f32,
    /// Identity embedding, L2-normalised, of length [`EMBEDDING_DIM`].
    pub id_embedding: Vec<f32>,
    /// Caption of the picture.
    pub caption: String,
    /// SHA-256 of the photo's file, in lower-case hexadecimal.
    pub sha256: String,
    /// Identity of the person, if the source names it.
    pub identity: Option<String>,
    /// Part of an experiment that the photo belongs to (`train`, `held_out`, `unseen`), if the source names it.
    pub split: Option<String>,
}
