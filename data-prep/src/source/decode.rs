//! Decoding of files to pixels, within limits that a hostile file cannot exceed.

use std::io::Cursor;

use hyperlora_core::{Error, Result};
use image::{DynamicImage, ImageDecoder, ImageError, ImageFormat, ImageReader, Limits, RgbImage};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::source::{jpeg, webp};

/// Resource limits per photo. One that exceeds them counts as undecodable.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct DecodeConfig {
    /// Largest width and height in pixels, at least 1.
    pub max_side: u32,
    /// Largest file and largest allocation for decoding it, in bytes, at least 1: the default takes 89 megapixels. Each
    /// worker may need twice as much at a time.
    pub max_bytes: u64,
}

impl Default for DecodeConfig {
    fn default() -> Self {
        Self { max_side: 16_384, max_bytes: 256 << 20 }
    }
}

/// Decoded photo.
#[derive(Debug, Clone)]
pub struct Decoded {
    /// 8-bit RGB, upright by the EXIF orientation, on white where the photo is transparent.
    pub pixels: RgbImage,
    /// True if any pixel is transparent.
    pub transparent: bool,
}

impl DecodeConfig {
    /// Checks that no limit excludes every photo.
    ///
    /// # Errors
    /// Input, at `place`: a limit of zero.
    pub fn validate(&self, place: &str) -> Result<()> {
        if self.max_side == 0 || self.max_bytes == 0 {
            return Err(Error::input(place, "a limit is zero", "give positive limits, or leave the defaults"));
        }
        Ok(())
    }

    /// Decodes the photo in `bytes`.
    ///
    /// # Errors
    /// Reason why it cannot be decoded: an unknown format, damage, a missing part, or a limit.
    pub fn decode(&self, bytes: &[u8]) -> std::result::Result<Decoded, String> {
        let mut limits = Limits::no_limits();
        limits.max_alloc = Some(self.max_bytes);
        let failed = |error: ImageError| match error {
            ImageError::Limits(_) => {
                format!("decoding it needs more memory than decode.max_bytes allows ({} bytes)", self.max_bytes)
            }
            ImageError::Unsupported(_) if is_heif(bytes) => "it is a HEIC or AVIF file".into(),
            other => other.to_string(),
        };
        let mut reader =
            ImageReader::new(Cursor::new(bytes)).with_guessed_format().map_err(|error| error.to_string())?;
        reader.limits(limits);
        let format = reader.format();
        if format == Some(ImageFormat::WebP) {
            webp::check(bytes)?;
        }
        let mut decoder = reader.into_decoder().map_err(failed)?;
        // Not every decoder checks its limits itself, and none names them.
        let (width, height) = decoder.dimensions();
        let allowed = |key: &str, limit: u64| format!("more than decode.{key} allows ({limit})");
        if width.max(height) > self.max_side {
            let allowed = allowed("max_side", self.max_side.into());
            return Err(format!("it is {width} x {height} pixels large, {allowed}"));
        }
        let bytes_needed = decoder.total_bytes();
        if bytes_needed > self.max_bytes {
            let allowed = allowed("max_bytes", self.max_bytes);
            return Err(format!("its {width} x {height} pixels take {bytes_needed} bytes, {allowed}"));
        }
        // An unreadable orientation is no reason to lose the photo.
        let orientation = decoder.orientation().ok();
        let mut photo = match (format, decoder.color_type()) {
            (Some(ImageFormat::Jpeg), colours) => jpeg::decode(bytes, [width, height], colours)?,
            _ => DynamicImage::from_decoder(decoder).map_err(failed)?,
        };
        if let Some(orientation) = orientation {
            photo.apply_orientation(orientation);
        }
        Ok(on_white(photo))
    }
}

/// Blends a photo with white. The colour of a transparent pixel is often rubbish that no viewer shows, so it must not
/// become part of the picture.
fn on_white(photo: DynamicImage) -> Decoded {
    if !photo.color().has_alpha() {
        return Decoded { pixels: photo.into_rgb8(), transparent: false };
    }
    let photo = photo.into_rgba8();
    let transparent = photo.pixels().any(|pixel| pixel.0[3] != 255);
    let pixels = RgbImage::from_fn(photo.width(), photo.height(), |x, y| {
        let [r, g, b, alpha] = photo.get_pixel(x, y).0.map(u32::from);
        image::Rgb([r, g, b].map(|value| ((value * alpha + 255 * (255 - alpha) + 127) / 255) as u8))
    });
    Decoded { pixels, transparent }
}

/// Detects the container of HEIC and AVIF (ISO/IEC 14496-12), which phones write and people rename.
fn is_heif(bytes: &[u8]) -> bool {
    bytes.get(4..8) == Some(b"ftyp")
}

#[cfg(test)]
mod tests {
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
        assert_eq!(limits.decode(&whole).unwrap().pixels.dimensions(), (30, 20));
        assert!(limits.decode(&whole[..whole.len() / 2]).is_err());
        assert!(limits.decode(b"not an image").is_err());
        assert!(limits.decode(b"").is_err());
    }

    #[test]
    fn no_format_fills_in_what_is_missing() {
        let photo = image::DynamicImage::from(RgbImage::from_fn(61, 47, |x, y| {
            image::Rgb([((x * 37) ^ (y * 91)) as u8, (x * y) as u8, (x + 3 * y) as u8])
        }));
        use ImageFormat::{Bmp, Jpeg, Png, Pnm, WebP};
        for format in [Bmp, Jpeg, Png, Pnm, WebP] {
            let mut bytes = Cursor::new(Vec::new());
            photo.write_to(&mut bytes, format).unwrap();
            let whole = bytes.into_inner();
            let decode = |bytes: &[u8]| DecodeConfig::default().decode(bytes);
            assert_eq!(decode(&whole).unwrap().pixels.dimensions(), (61, 47), "{format:?}");
            // The last bytes of a PNG only mark its end, and a line of a BMP is padded.
            for cut in (0..whole.len() - 16).step_by(7) {
                assert!(decode(&whole[..cut]).is_err(), "{format:?} cut at {cut} of {}", whole.len());
            }
        }
    }

    #[test]
    fn transparent_pixels_are_white_whatever_their_colour() {
        let photo = image::RgbaImage::from_fn(3, 1, |x, _| image::Rgba([200, 100, 0, [0, 255, 128][x as usize]]));
        let mut bytes = Cursor::new(Vec::new());
        photo.write_to(&mut bytes, ImageFormat::Png).unwrap();
        let decoded = DecodeConfig::default().decode(&bytes.into_inner()).unwrap();
        assert!(decoded.transparent);
        assert_eq!(decoded.pixels.into_raw(), [255, 255, 255, 200, 100, 0, 227, 177, 127]);
    }

    #[test]
    fn no_frame_of_a_webp_is_larger_than_its_picture() {
        // A picture of 17 x 13 with a frame of 16383 x 16383.
        let canvas = [&b"VP8X\x0a\0\0\0"[..], &[0, 0, 0, 0, 16, 0, 0, 12, 0, 0]].concat();
        let frame = [&b"VP8 \x0a\0\0\0"[..], &[0, 0, 0, 0x9d, 1, 0x2a, 0xff, 0x3f, 0xff, 0x3f]].concat();
        let file = [&b"RIFF\x28\0\0\0WEBP"[..], &canvas, &frame].concat();
        let problem = DecodeConfig::default().decode(&file).unwrap_err();
        assert_eq!(problem, "a frame of 16383 x 16383 pixels is in a picture of 17 x 13");
    }

    #[test]
    fn limits_hold() {
        for (max_side, max_bytes, holds) in [(1, 1, true), (0, 1, false), (1, 0, false)] {
            assert_eq!(DecodeConfig { max_side, max_bytes }.validate("data.yaml: decode").is_ok(), holds);
        }
        let narrow = DecodeConfig { max_side: 25, ..DecodeConfig::default() };
        assert!(narrow.decode(&png(25, 25)).is_ok());
        assert!(narrow.decode(&png(26, 2)).is_err());
        let small = DecodeConfig { max_bytes: 3 * 100 * 100, ..DecodeConfig::default() };
        assert!(small.decode(&png(100, 100)).is_ok());
        let message = small.decode(&png(100, 101)).unwrap_err();
        assert_eq!(message, "its 100 x 101 pixels take 30300 bytes, more than decode.max_bytes allows (30000)");
        let message = narrow.decode(&png(2, 26)).unwrap_err();
        assert_eq!(message, "it is 2 x 26 pixels large, more than decode.max_side allows (25)");
        // A header that announces far more than the file contains.
        let bomb = b"P6\n16000 16000\n255\n\0\0\0";
        assert!(small.decode(bomb).is_err());
    }
}
