//! Drawing for the contact sheet: pictures, frames, dots, and text in an 8 x 8 bitmap font.

use font8x8::legacy::BASIC_LEGACY;
use image::{Rgb, RgbImage};

/// Width of a character in pixels.
pub(super) const TEXT_WIDTH: u32 = 8;

/// Height of a line of text in pixels.
pub(super) const TEXT_HEIGHT: u32 = 10;

const PAPER: Rgb<u8> = Rgb([245, 245, 242]);

/// Picture to draw on. Clips everything outside.
pub(super) struct Canvas(RgbImage);

impl From<RgbImage> for Canvas {
    fn from(image: RgbImage) -> Self {
        Self(image)
    }
}

impl Canvas {
    pub(super) fn new(width: u32, height: u32) -> Self {
        Self(RgbImage::from_pixel(width, height, PAPER))
    }

    pub(super) fn width(&self) -> u32 {
        self.0.width()
    }

    pub(super) fn into_image(self) -> RgbImage {
        self.0
    }

    pub(super) fn picture(&mut self, [left, top]: [u32; 2], picture: &RgbImage) {
        image::imageops::replace(&mut self.0, picture, left.into(), top.into());
    }

    /// Draws the outline of the box x0, y0, x1, y1, one pixel wide.
    pub(super) fn frame(&mut self, face_box: [f32; 4], ink: Rgb<u8>) {
        let [x0, y0, x1, y1] = face_box.map(|x| x.round() as i64);
        for x in x0..=x1 {
            self.put(x, y0, ink);
            self.put(x, y1, ink);
        }
        for y in y0..=y1 {
            self.put(x0, y, ink);
            self.put(x1, y, ink);
        }
    }

    /// Draws a dot of one pixel at a continuous coordinate.
    pub(super) fn dot(&mut self, [x, y]: [f32; 2], ink: Rgb<u8>) {
        self.put(x.floor() as i64, y.floor() as i64, ink);
    }

    /// Draws a square with both diagonals, in place of a missing picture.
    pub(super) fn crossed_box(&mut self, [left, top]: [u32; 2], side: u32, ink: Rgb<u8>) {
        let (left, top, last) = (i64::from(left), i64::from(top), i64::from(side) - 1);
        for step in 0..=last {
            let edges = [(step, 0), (step, last), (0, step), (last, step), (step, step), (step, last - step)];
            for (x, y) in edges {
                self.put(left + x, top + y, ink);
            }
        }
    }

    /// Draws one line of at most `fits` characters. Other characters than ASCII become `?`.
    pub(super) fn text(&mut self, [left, top]: [u32; 2], text: &str, ink: Rgb<u8>, fits: u32) {
        for (place, character) in (0..fits).zip(text.chars()) {
            let glyph = usize::try_from(u32::from(character)).ok().and_then(|code| BASIC_LEGACY.get(code));
            let rows = glyph.unwrap_or(&BASIC_LEGACY[usize::from(b'?')]);
            for (y, row) in (0..).zip(rows) {
                for x in (0..TEXT_WIDTH).filter(|x| row >> x & 1 == 1) {
                    self.put(i64::from(left + place * TEXT_WIDTH + x), i64::from(top) + y, ink);
                }
            }
        }
    }

    fn put(&mut self, x: i64, y: i64, ink: Rgb<u8>) {
        if let (Ok(x), Ok(y)) = (u32::try_from(x), u32::try_from(y))
            && let Some(pixel) = self.0.get_pixel_mut_checked(x, y)
        {
            *pixel = ink;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const INK: Rgb<u8> = Rgb([1, 2, 3]);

    fn inked(canvas: Canvas) -> Vec<(u32, u32)> {
        canvas.into_image().enumerate_pixels().filter(|(_, _, pixel)| **pixel == INK).map(|(x, y, _)| (x, y)).collect()
    }

    #[test]
    fn shapes_are_cut_at_the_edge() {
        let mut canvas = Canvas::new(4, 4);
        canvas.frame([-5.0, 1.0, 2.0, 90.0], INK);
        canvas.dot([f32::NAN, 99.0], INK);
        assert_eq!(inked(canvas), [(0, 1), (1, 1), (2, 1), (2, 2), (2, 3)]);
    }

    #[test]
    fn text_is_readable_left_to_right_and_stops_where_told() {
        let mut canvas = Canvas::new(40, 10);
        canvas.text([0, 0], "L||", INK, 2);
        let pixels = inked(canvas);
        // An L has ink at the lower right, none at the upper right.
        assert!(pixels.iter().any(|(x, y)| (4..8).contains(x) && (5..8).contains(y)));
        assert!(!pixels.iter().any(|(x, y)| (4..8).contains(x) && *y < 4));
        assert!(pixels.iter().any(|(x, _)| (8..16).contains(x)) && pixels.iter().all(|(x, _)| *x < 16));
    }
}
