//! File bytes to pixels, within limits that a hostile file cannot exceed.

use std::io::Cursor;

use image::{DynamicImage, ImageDecoder, ImageError, ImageReader, Limits, RgbImage};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// What a photo may cost. A larger one counts as undecodable.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DecodeConfig {
    /// Largest width and height in pixels.
    pub max_side: u32,
    /// Largest file, and most bytes that decoding it may allocate. Each worker may need twice as much at a time.
    pub max_bytes: u64,
}

impl Default for DecodeConfig {
    fn default() -> Self {
        Self { max_side: 16_384, max_bytes: 256 << 20 }
    }
}

impl DecodeConfig {
    /// Checks that something can be decoded at all.
    ///
    /// # Errors
    /// Input, at `place`: a limit of zero.
    pub fn validate(&self, place: &str) -> Result<()> {
        if self.max_side == 0 || self.max_bytes == 0 {
            return Err(Error::input(place, "a limit is zero", "give positive limits, or leave the defaults"));
        }
        Ok(())
    }

    /// The photo in `bytes` as 8-bit RGB, upright by its EXIF orientation.
    ///
    /// # Errors
    /// Why it cannot be decoded: an unknown format, damage, or a limit.
    pub fn decode(&self, bytes: &[u8]) -> std::result::Result<RgbImage, ImageError> {
        let mut limits = Limits::default();
        limits.max_image_width = Some(self.max_side);
        limits.max_image_height = Some(self.max_side);
        limits.max_alloc = Some(self.max_bytes);

        let mut reader = ImageReader::new(Cursor::new(bytes)).with_guessed_format()?;
        reader.limits(limits.clone());
        let mut decoder = reader.into_decoder()?;
        // Not every decoder checks its limits by itself.
        let (width, height) = decoder.dimensions();
        limits.check_dimensions(width, height)?;
        limits.reserve(decoder.total_bytes())?;
        // Orientation that cannot be read is no reason to lose the photo.
        let orientation = decoder.orientation().ok();
        let mut photo = DynamicImage::from_decoder(decoder)?;
        if let Some(orientation) = orientation {
            photo.apply_orientation(orientation);
        }
        Ok(photo.into_rgb8())
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;

    fn png(width: u32, height: u32) -> Vec<u8> {
        let mut bytes = Cursor::new(Vec::new());
        RgbImage::from_pixel(width, height, image::Rgb([9, 8, 7]))
            .write_to(&mut bytes, image::ImageFormat::Png)
            .unwrap();
        bytes.into_inner()
    }

    #[test]
    fn good_bytes_decode_and_bad_ones_do_not() {
        let limits = DecodeConfig::default();
        let whole = png(30, 20);
        assert_eq!(limits.decode(&whole).unwrap().dimensions(), (30, 20));
        assert!(limits.decode(&whole[..whole.len() / 2]).is_err());
        assert!(limits.decode(b"not an image").is_err());
        assert!(limits.decode(b"").is_err());
    }

    #[test]
    fn limits_hold() {
        let narrow = DecodeConfig { max_side: 25, ..DecodeConfig::default() };
        assert!(narrow.decode(&png(25, 25)).is_ok());
        assert!(narrow.decode(&png(26, 2)).is_err());
        let small = DecodeConfig { max_bytes: 3 * 100 * 100, ..DecodeConfig::default() };
        assert!(small.decode(&png(100, 100)).is_ok());
        assert!(small.decode(&png(100, 101)).is_err());
        // A header that promises far more than the file holds.
        let bomb = b"P6\n16000 16000\n255\n\0\0\0";
        assert!(small.decode(bomb).is_err());
    }
}
