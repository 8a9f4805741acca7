//! Crop of a photo around a face, as training sees it.

use hyperlora_core::{Error, Result};
use image::RgbImage;
use image::imageops::{self, FilterType};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Longest side of a crop in pixels. A reader of shards decodes no larger one.
pub const LARGEST_SIDE: u32 = 8192;

/// Extent of the photo around the face that a crop keeps.
///
/// # Examples
/// ```
/// use data_prep::crop::CropConfig;
/// use image::RgbImage;
///
/// let face_box = [300.0, 200.0, 500.0, 400.0];
/// let crop = CropConfig { margin: 2.5, max_side: 250 }.cut(&RgbImage::new(1200, 900), face_box);
/// // 2.5 times the face, scaled from 500 pixels to 250.
/// assert_eq!(crop.image.dimensions(), (250, 250));
/// assert_eq!(crop.place_box(face_box), [75.0, 75.0, 175.0, 175.0]);
/// ```
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct CropConfig {
    /// Side of the square crop as a multiple of the longer side of the face box, at least 1. Near an edge the square
    /// moves inwards; if it is larger than the photo, the photo's edges cut it.
    pub margin: f32,
    /// Longest side of a crop in pixels, 1 to 8192. Larger crops are scaled down to it.
    pub max_side: u32,
}

impl Default for CropConfig {
    fn default() -> Self {
        Self { margin: 2.5, max_side: 1024 }
    }
}

/// Crop of a photo, with the map of coordinates from the photo into it.
#[derive(Debug, Clone, PartialEq)]
pub struct Crop {
    /// Pixels of the crop.
    pub image: RgbImage,
    origin: [f32; 2],
    scale: [f32; 2],
}

impl CropConfig {
    /// Checks that a crop contains its face and has a valid size.
    ///
    /// # Errors
    /// Input, at `place`.
    pub fn validate(&self, place: &str) -> Result<()> {
        if !self.margin.is_finite() || self.margin < 1.0 {
            let problem = format!("margin is {}: the crop would cut the face", self.margin);
            return Err(Error::input(place, problem, "give a margin of at least 1"));
        }
        if !(1..=LARGEST_SIDE).contains(&self.max_side) {
            return Err(Error::input(
                place,
                format!("max_side is {}", self.max_side),
                format!("give the longest side of a crop in pixels, 1 to {LARGEST_SIDE}, such as 1024"),
            ));
        }
        Ok(())
    }

    /// Cuts `photo` around `face_box` (x0, y0, x1, y1 in its pixels).
    pub fn cut(&self, photo: &RgbImage, face_box: [f32; 4]) -> Crop {
        let [x0, y0, x1, y1] = face_box;
        let side = self.margin * (x1 - x0).max(y1 - y0);
        let (left, width) = window((x0 + x1) / 2.0, side, photo.width());
        let (top, height) = window((y0 + y1) / 2.0, side, photo.height());
        let cut = imageops::crop_imm(photo, left, top, width, height);

        let longest = width.max(height);
        if longest <= self.max_side {
            return Crop { image: cut.to_image(), origin: [left as f32, top as f32], scale: [1.0; 2] };
        }
        let shrunk = |side: u32| {
            let exact = f64::from(side) * f64::from(self.max_side) / f64::from(longest);
            (exact.round() as u32).max(1)
        };
        let image = imageops::resize(&*cut, shrunk(width), shrunk(height), FilterType::Lanczos3);
        let scale = [image.width() as f32 / width as f32, image.height() as f32 / height as f32];
        Crop { image, origin: [left as f32, top as f32], scale }
    }
}

impl Crop {
    /// Maps a point of the photo to pixels of the crop.
    pub fn to_crop(&self, point: [f32; 2]) -> [f32; 2] {
        [(point[0] - self.origin[0]) * self.scale[0], (point[1] - self.origin[1]) * self.scale[1]]
    }

    /// Maps a box (x0, y0, x1, y1) of the photo to pixels of the crop.
    pub fn place_box(&self, [x0, y0, x1, y1]: [f32; 4]) -> [f32; 4] {
        let ([x0, y0], [x1, y1]) = (self.to_crop([x0, y0]), self.to_crop([x1, y1]));
        [x0, y0, x1, y1]
    }
}

/// Returns the start and length of a window of `side` around `centre`, moved and cut to lie in 0..`limit`.
fn window(centre: f32, side: f32, limit: u32) -> (u32, u32) {
    let length = (side.round().max(1.0) as u32).min(limit);
    let start = (centre - length as f32 / 2.0).round().max(0.0) as u32;
    (start.min(limit - length), length)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Red encodes x, green encodes y.
    fn ramp(width: u32, height: u32) -> RgbImage {
        RgbImage::from_fn(width, height, |x, y| image::Rgb([x as u8, y as u8, 0]))
    }

    #[test]
    fn the_face_is_in_the_middle_and_coordinates_follow() {
        let crop = CropConfig { margin: 2.0, max_side: 512 }.cut(&ramp(200, 200), [80.0, 90.0, 110.0, 130.0]);
        assert_eq!(crop.image.dimensions(), (80, 80));
        assert_eq!(crop.image.get_pixel(0, 0).0, [55, 70, 0]);
        assert_eq!(crop.place_box([80.0, 90.0, 110.0, 130.0]), [25.0, 20.0, 55.0, 60.0]);
    }

    #[test]
    fn near_an_edge_the_square_moves_and_in_a_small_photo_it_is_cut() {
        let config = CropConfig { margin: 2.0, max_side: 512 };
        let corner = config.cut(&ramp(200, 200), [0.0, 160.0, 30.0, 190.0]);
        assert_eq!(corner.image.dimensions(), (60, 60));
        assert_eq!(corner.image.get_pixel(0, 0).0, [0, 140, 0]);
        let small = config.cut(&ramp(92, 112), [20.0, 20.0, 80.0, 100.0]);
        assert_eq!(small.image, ramp(92, 112));
        assert_eq!(small.to_crop([5.0, 6.0]), [5.0, 6.0]);
    }

    #[test]
    fn large_crops_shrink_with_their_coordinates() {
        let crop = CropConfig { margin: 1.0, max_side: 50 }.cut(&ramp(240, 240), [20.0, 40.0, 220.0, 240.0]);
        assert_eq!(crop.image.dimensions(), (50, 50));
        assert_eq!(crop.to_crop([120.0, 140.0]), [25.0, 25.0]);
        let [x, y, _] = crop.image.get_pixel(25, 25).0;
        assert!(x.abs_diff(122) <= 2 && y.abs_diff(142) <= 2, "{x} {y}");
    }

    #[test]
    fn a_crop_that_cuts_the_face_is_refused() {
        assert!(CropConfig { margin: 0.9, max_side: 5 }.validate("crop").is_err());
        assert!(CropConfig { margin: 1.0, max_side: 0 }.validate("crop").is_err());
        assert!(CropConfig::default().validate("crop").is_ok());
    }
}
