//! Checks of the values that training uses unchecked, once for each row group.

use crate::crop::LARGEST_SIDE;
use crate::shard::limits::{LABEL_BYTES, LANDMARKS};
use crate::shard::{EMBEDDING_DIM, FaceRecord};

/// Tolerance of an embedding's length around 1.
const LENGTH_TOLERANCE: f32 = 0.01;

/// Describes the problem of a row.
pub(super) fn problem(record: &FaceRecord) -> Option<String> {
    let FaceRecord { width, height, score, .. } = *record;
    for (name, side) in [("width", width), ("height", height)] {
        if !(1..=LARGEST_SIDE).contains(&side) {
            return Some(format!("`{name}` is {side}, not 1 to {LARGEST_SIDE} pixels"));
        }
    }
    let optional = |text: &Option<String>| text.as_ref().map_or(0, String::len);
    for (name, bytes) in
        [("key", record.key.len()), ("identity", optional(&record.identity)), ("split", optional(&record.split))]
    {
        if bytes > LABEL_BYTES {
            return Some(format!("`{name}` has {bytes} bytes, more than {LABEL_BYTES}"));
        }
    }
    if !(0.0..=1.0).contains(&score) {
        return Some(format!("`score` is {score}, not between 0 and 1"));
    }
    let [x0, y0, x1, y1] = record.face_box;
    let corners = [[x0, y0], [x1, y1]];
    if x0 >= x1 || y0 >= y1 {
        return Some(format!("`face_box` is {:?}: no box", record.face_box));
    }
    let of_picture = [("face_box", &corners[..]), ("points", &record.points), ("landmarks", &record.landmarks)];
    of_picture
        .into_iter()
        .find_map(|(name, points)| misplaced([width, height], points).map(|problem| format!("`{name}` {problem}")))
        .or_else(|| unfit_landmarks(&record.landmarks))
        .or_else(|| unfit_embedding(&record.id_embedding))
}

/// Describes `points` that do not fit into a picture of this size. Some may be outside: a face at the edge of its photo
/// extends beyond it.
fn misplaced(size: [u32; 2], points: &[[f32; 2]]) -> Option<String> {
    for (axis, side) in size.into_iter().enumerate() {
        let side = side as f32;
        let values = || points.iter().map(|point| point[axis]);
        // Points may be beyond an edge by the picture's size; a NaN is never in range.
        if let Some(value) = values().find(|value| !(-side..=2.0 * side).contains(value)) {
            return Some(format!("has a coordinate of {value}, far outside the picture's {side} pixels"));
        }
        if values().all(|value| value < 0.0) || values().all(|value| value > side) {
            return Some("is outside the picture".into());
        }
    }
    None
}

/// Describes landmarks that cannot outline a face: its mask is cut along them.
fn unfit_landmarks(landmarks: &[[f32; 2]]) -> Option<String> {
    let count = landmarks.len();
    if !(3..=LANDMARKS).contains(&count) {
        return Some(format!("`landmarks` has {count} points, not 3 to {LANDMARKS}"));
    }
    let flat = |axis: usize| landmarks.windows(2).all(|pair| pair[0][axis] == pair[1][axis]);
    (flat(0) || flat(1)).then(|| "`landmarks` are all on one line".into())
}

fn unfit_embedding(embedding: &[f32]) -> Option<String> {
    if embedding.len() != EMBEDDING_DIM {
        return Some(format!("`id_embedding` has {} values, not {EMBEDDING_DIM}", embedding.len()));
    }
    let length = embedding.iter().map(|value| value * value).sum::<f32>().sqrt();
    // Also false for a NaN.
    let is_unit = (length - 1.0).abs() <= LENGTH_TOLERANCE;
    (!is_unit).then(|| format!("`id_embedding` is {length} long, not 1"))
}
