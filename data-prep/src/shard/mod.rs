//! The contract between preparation and training: what a shard folder holds, how it is written and read.
//!
//! `docs/reference/formats.md` describes the format for readers in other languages.

pub mod index;
mod limits;
pub mod manifest;
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

pub use index::INDEX_FILE;
pub use limits::ROWS_PER_GROUP;
pub use manifest::{IndexFile, MANIFEST_FILE, Manifest, RowGroupPiece, ShardFile};
pub use reader::{RowGroup, ShardFolder};
pub use schema::{EMBEDDING_DIM, SCHEMA_VERSION};
pub use store::{Damage, RemoteConfig};
pub use writer::{ShardConfig, ShardWriter, Written};

/// One kept face: a row of a shard.
///
/// All coordinates are pixels of the crop in `image`, x to the right and y down, the origin at the upper left corner of
/// the upper left pixel. Left and right are the viewer's.
#[derive(Debug, Clone, PartialEq)]
pub struct FaceRecord {
    /// The photo's path relative to the root of its source, with `/` between the parts. Unique in a shard folder.
    pub key: String,
    /// The encoded crop around the face (PNG), 8-bit RGB.
    pub image: Vec<u8>,
    /// Width of the crop in pixels.
    pub width: u32,
    /// Height of the crop in pixels.
    pub height: u32,
    /// The detector's box: x0, y0, x1, y1. It may reach over the edge of the crop where the photo ends.
    pub face_box: [f32; 4],
    /// Left eye, right eye, nose, left and right corner of the mouth.
    pub points: [[f32; 2]; 5],
    /// 68 or 106 landmarks, in the order of the landmark model.
    pub landmarks: Vec<[f32; 2]>,
    /// The detector's confidence, 0 to 1.
    pub score: f32,
    /// Identity embedding, L2-normalised, [`EMBEDDING_DIM`] long.
    pub id_embedding: Vec<f32>,
    /// What the picture shows.
    pub caption: String,
    /// SHA-256 of the photo's file, in lower-case hexadecimal.
    pub sha256: String,
    /// Who it is, where the source says so.
    pub identity: Option<String>,
    /// Which part of an experiment the photo belongs to (`train`, `held_out`, `unseen`), where the source says so.
    pub split: Option<String>,
}
