//! Selection of faces, with reasons for rejection.

use hyperlora_core::{Error, Result};
use image::imageops::{self, FilterType};
use image::{GrayImage, RgbImage};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::face::Detection;

/// Reason to reject a photo.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Reason {
    /// Not an image, damaged, or over the decoding limits.
    Undecodable,
    /// Same bytes as an earlier photo.
    Duplicate,
    /// No face found.
    NoFace,
    /// More than one face found.
    SeveralFaces,
    /// Face too small.
    FaceTooSmall,
    /// Face blurred.
    Blurred,
    /// Invalid caption file next to the photo: not UTF-8, far too long, or unreadable.
    BadCaption,
}

impl Reason {
    /// Returns the name in manifests and reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Undecodable => "undecodable",
            Self::Duplicate => "duplicate",
            Self::NoFace => "no_face",
            Self::SeveralFaces => "several_faces",
            Self::FaceTooSmall => "face_too_small",
            Self::Blurred => "blurred",
            Self::BadCaption => "bad_caption",
        }
    }
}

/// Rejected photo: the reason, and the measurements.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rejection {
    /// Reason that is counted.
    pub reason: Reason,
    /// Details for humans.
    pub detail: String,
}

impl Rejection {
    /// Makes a rejection for `reason`.
    pub fn new(reason: Reason, detail: impl ToString) -> Self {
        Self { reason, detail: detail.to_string() }
    }
}

/// Requirements for a face.
///
/// # Examples
/// ```
/// use data_prep::face::Detection;
/// use data_prep::filter::{FilterConfig, Reason};
/// use image::RgbImage;
///
/// let photo = RgbImage::new(200, 200);
/// let points = [[85.0, 90.0], [115.0, 90.0], [100.0, 105.0], [90.0, 120.0], [110.0, 120.0]];
/// let face = Detection { face_box: [60.0, 60.0, 140.0, 140.0], points, score: 0.9 };
/// // A black photo shows no detail.
/// let rejection = FilterConfig::default().select(&photo, &[face]).unwrap_err();
/// assert_eq!((rejection.reason, rejection.reason.name()), (Reason::Blurred, "blurred"));
/// ```
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct FilterConfig {
    /// Least length of the shorter side of the face box, in pixels of the photo; 0 keeps all.
    pub min_face: f32,
    /// Least [`sharpness`] of the face, the variance of the Laplacian; 0 keeps all.
    pub min_sharpness: f32,
}

impl Default for FilterConfig {
    fn default() -> Self {
        Self { min_face: 64.0, min_sharpness: 30.0 }
    }
}

impl FilterConfig {
    /// Checks the thresholds.
    ///
    /// # Errors
    /// Input, at `place`: a negative threshold.
    pub fn validate(&self, place: &str) -> Result<()> {
        if self.min_face < 0.0 || self.min_sharpness < 0.0 {
            return Err(Error::input(place, "a threshold is negative", "give 0 to switch a filter off"));
        }
        Ok(())
    }

    /// Selects the only face of `photo` among those `found` in it, with its [`sharpness`].
    ///
    /// # Errors
    /// Reason to reject the photo.
    pub fn select<'a>(
        &self,
        photo: &RgbImage,
        found: &'a [Detection],
    ) -> std::result::Result<(&'a Detection, f32), Rejection> {
        let face = match found {
            [] => return Err(Rejection::new(Reason::NoFace, "")),
            [face] => face,
            several => return Err(Rejection::new(Reason::SeveralFaces, format!("{} faces", several.len()))),
        };
        let numbers = face.face_box.iter().chain(face.points.as_flattened());
        if !numbers.copied().all(f32::is_finite) {
            return Err(Rejection::new(Reason::NoFace, "the detector returned coordinates that are not numbers"));
        }
        let [x0, y0, x1, y1] = face.face_box;
        let side = (x1 - x0).min(y1 - y0);
        // Points that coincide cannot be aligned, and no usable face has both eyes in one place.
        let [left_eye, right_eye, ..] = face.points;
        let eyes = (left_eye[0] - right_eye[0]).hypot(left_eye[1] - right_eye[1]);
        if side < self.min_face || eyes < 1.0 {
            return Err(Rejection::new(Reason::FaceTooSmall, format!("{side:.0} px")));
        }
        let sharpness = sharpness(photo, face.face_box);
        if sharpness < self.min_sharpness {
            return Err(Rejection::new(Reason::Blurred, format!("sharpness {sharpness:.0}")));
        }
        Ok((face, sharpness))
    }
}

/// Longest side of the face when its sharpness is measured: the input size of the ID embedder.
const MEASURED_SIDE: f32 = 112.0;

/// Measures the variance of the Laplacian of the face's grey values (0 to 255). Scales larger faces down to 112 pixels
/// first, so that one threshold serves all resolutions. A uniform face has 0. The ORL faces (about 74 x 95 pixels)
/// measure 190 to 4000 with a median of 740; blurred by a Gaussian of 1 pixel 54, of 1.5 pixels 18, of 2 pixels 8.
pub fn sharpness(photo: &RgbImage, face_box: [f32; 4]) -> f32 {
    let [x0, y0, x1, y1] = face_box;
    let left = x0.clamp(0.0, photo.width() as f32) as u32;
    let top = y0.clamp(0.0, photo.height() as f32) as u32;
    let width = (x1.clamp(0.0, photo.width() as f32) as u32).saturating_sub(left);
    let height = (y1.clamp(0.0, photo.height() as f32) as u32).saturating_sub(top);
    // A box outside the photo has no sharpness.
    if width == 0 || height == 0 {
        return 0.0;
    }
    let face = imageops::grayscale(&*imageops::crop_imm(photo, left, top, width, height));
    let scale = MEASURED_SIDE / width.max(height).max(1) as f32;
    if scale >= 1.0 {
        return laplacian_variance(&face);
    }
    let size = |side: u32| ((side as f32 * scale).round() as u32).max(1);
    laplacian_variance(&imageops::resize(&face, size(width), size(height), FilterType::Triangle))
}

/// Returns the variance of the four-neighbour Laplacian over the inner pixels, 0 if there are none.
fn laplacian_variance(grey: &GrayImage) -> f32 {
    let at = |x: u32, y: u32| f64::from(grey.get_pixel(x, y).0[0]);
    let (mut count, mut sum, mut squares) = (0.0, 0.0, 0.0);
    for y in 1..grey.height().saturating_sub(1) {
        for x in 1..grey.width().saturating_sub(1) {
            let value = at(x - 1, y) + at(x + 1, y) + at(x, y - 1) + at(x, y + 1) - 4.0 * at(x, y);
            count += 1.0;
            sum += value;
            squares += value * value;
        }
    }
    if count == 0.0 { 0.0 } else { (squares / count - (sum / count).powi(2)) as f32 }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn face(side: f32) -> Detection {
        let at = |x: f32, y: f32| [10.0 + x * side, 10.0 + y * side];
        Detection {
            face_box: [10.0, 10.0, 10.0 + side, 10.0 + side],
            points: [at(0.3, 0.4), at(0.7, 0.4), at(0.5, 0.6), at(0.35, 0.8), at(0.65, 0.8)],
            score: 0.9,
        }
    }

    fn noise(side: u32) -> RgbImage {
        RgbImage::from_fn(side, side, |x, y| {
            let grey = (x.wrapping_mul(2_654_435_761) ^ y.wrapping_mul(40_503)).wrapping_mul(69_069) >> 24;
            image::Rgb([grey as u8; 3])
        })
    }

    fn reason(photo: &RgbImage, found: &[Detection]) -> Reason {
        FilterConfig::default().select(photo, found).unwrap_err().reason
    }

    #[test]
    fn every_reason_is_given_where_it_holds() {
        let sharp = noise(200);
        let grey = RgbImage::from_pixel(200, 200, image::Rgb([128; 3]));
        let alone = [face(100.0)];
        let (kept, _) = FilterConfig::default().select(&sharp, &alone).unwrap();
        assert_eq!(kept, &alone[0]);
        assert_eq!(reason(&sharp, &[]), Reason::NoFace);
        assert_eq!(reason(&sharp, &[face(100.0), face(80.0)]), Reason::SeveralFaces);
        assert_eq!(reason(&sharp, &[face(63.0)]), Reason::FaceTooSmall);
        assert_eq!(reason(&grey, &[face(100.0)]), Reason::Blurred);
        let mut cross_eyed = face(100.0);
        cross_eyed.points = [[50.0, 50.0]; 5];
        assert_eq!(reason(&sharp, &[cross_eyed]), Reason::FaceTooSmall);
        for nowhere in [f32::NAN, f32::INFINITY] {
            let (mut boxed, mut pointed) = (face(100.0), face(100.0));
            boxed.face_box[2] = nowhere;
            pointed.points[4][1] = nowhere;
            assert_eq!(reason(&sharp, &[boxed]), Reason::NoFace);
            assert_eq!(reason(&sharp, &[pointed]), Reason::NoFace);
        }
    }

    #[test]
    fn sharpness_is_the_variance_of_the_laplacian() {
        // One white pixel on black: Laplacian -4 * 255 there, 255 at its four neighbours, 0 at the rest of 5 x 5.
        let mut dot = RgbImage::new(7, 7);
        dot.put_pixel(3, 3, image::Rgb([255; 3]));
        let expected = (16.0 + 4.0) * 255.0_f32.powi(2) / 25.0;
        let found = sharpness(&dot, [0.0, 0.0, 7.0, 7.0]);
        assert!((found - expected).abs() < 1e-3 * expected, "{found} instead of {expected}");
    }

    #[test]
    fn blur_lowers_sharpness_and_a_box_over_the_edge_is_cut() {
        let sharp = noise(150);
        let blurred = imageops::fast_blur(&sharp, 3.0);
        let whole = [-20.0, -20.0, 400.0, 400.0];
        assert!(sharpness(&sharp, whole) > 20.0 * sharpness(&blurred, whole));
        for beside in [[200.0, 200.0, 300.0, 300.0], [-90.0, 20.0, -10.0, 90.0], [20.0, 160.0, 90.0, 300.0]] {
            assert_eq!(sharpness(&sharp, beside), 0.0);
        }
    }
}
