//! Random square crop around a face, and the size condition of the UNet.

use hyperlora_core::random::unit;
use image::RgbImage;
use image::imageops::{self, FilterType};
use rand_core::RngCore;

use crate::data::{CropConfig, SizeConditioning};

/// A square of a photo, in pixels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Square {
    /// Left edge.
    pub x: u32,
    /// Top edge.
    pub y: u32,
    /// Side, at least 1.
    pub side: u32,
}

impl Square {
    /// Returns the middle one of the squares that [`draw`](Self::draw) may draw.
    pub fn middle(photo: (u32, u32), face_box: [f32; 4], config: &CropConfig) -> Self {
        Self::at(photo, face_box, config, [0.5; 3])
    }

    /// Draws a square that contains `face_box` (x0, y0, x1, y1) in a photo of `width` x `height`: the side
    /// log-uniformly, then the position uniformly. A face larger than the photo's shorter side gets the largest square,
    /// as close to its centre as possible.
    pub fn draw(photo: (u32, u32), face_box: [f32; 4], config: &CropConfig, generator: &mut impl RngCore) -> Self {
        Self::at(photo, face_box, config, [(); 3].map(|()| unit(generator) as f32))
    }

    /// Returns the square for three numbers in [0, 1): its size, and its horizontal and vertical position.
    fn at(
        (width, height): (u32, u32),
        face_box: [f32; 4],
        config: &CropConfig,
        [size, across, down]: [f32; 3],
    ) -> Self {
        let [x0, y0, x1, y1] = face_box;
        let face = (x1 - x0).max(y1 - y0).max(1.0);
        let shorter = width.min(height).max(1);
        let largest = (face * config.largest).min(shorter as f32);
        let smallest = (face * config.smallest).min(largest);
        let drawn = smallest * (largest / smallest).powf(size);
        let side = (drawn.ceil() as u32).clamp(1, shorter);
        Self { x: position(across, side, width, x0, x1), y: position(down, side, height, y0, y1), side }
    }

    /// Crops `photo` to the square and resizes it to `size` x `size`.
    pub fn cut(self, photo: &RgbImage, size: u32) -> RgbImage {
        let view = imageops::crop_imm(photo, self.x, self.y, self.side, self.side).to_image();
        if self.side == size { view } else { imageops::resize(&view, size, size, FilterType::CatmullRom) }
    }

    /// Converts points of the photo to the square's own pixels.
    pub fn points(self, points: &[[f32; 2]]) -> Vec<[f32; 2]> {
        points.iter().map(|[x, y]| [x - self.x as f32, y - self.y as f32]).collect()
    }

    /// Returns the square with the same content in a photo of `width` mirrored horizontally.
    #[must_use]
    pub fn mirrored(self, width: u32) -> Self {
        Self { x: width - self.x - self.side, ..self }
    }

    /// Time ids in the order of diffusers' `add_time_ids`: original height and width, crop top and left, target height
    /// and width.
    pub fn time_ids(self, (width, height): (u32, u32), size: u32, conditioning: SizeConditioning) -> [f32; 6] {
        let target = size as f32;
        match conditioning {
            SizeConditioning::Whole => [target, target, 0.0, 0.0, target, target],
            SizeConditioning::Crop => {
                let factor = target / self.side as f32;
                let at = |offset: u32| (offset as f32 * factor).round();
                [height as f32, width as f32, at(self.y), at(self.x), target, target]
            }
        }
    }
}

/// Offset of a span of `side` within `extent` that contains `from..to`, chosen by a number in [0, 1).
fn position(drawn: f32, side: u32, extent: u32, from: f32, to: f32) -> u32 {
    let room = extent - side.min(extent);
    let lowest = (to.ceil() - side as f32).max(0.0);
    let highest = from.floor().max(0.0);
    let offset = if lowest <= highest {
        lowest + (drawn * (highest - lowest + 1.0)).floor().min(highest - lowest)
    } else {
        ((from + to - side as f32) / 2.0).round().max(0.0)
    };
    (offset as u32).min(room)
}

#[cfg(test)]
mod tests {
    use hyperlora_core::random::{Purpose, for_sample};

    use super::*;

    const PHOTO: (u32, u32) = (92, 112);

    #[test]
    fn the_square_always_holds_the_face_and_moves_and_grows() {
        let face_box = [30.4, 40.2, 60.9, 75.5];
        let mut squares = Vec::new();
        for index in 0..500 {
            let drawn = Square::draw(
                PHOTO,
                face_box,
                &CropConfig::default(),
                &mut for_sample(7, 0, index, Purpose::Augmentation),
            );
            assert!(drawn.x as f32 <= 30.4 && (drawn.x + drawn.side) as f32 >= 60.9, "{drawn:?}");
            assert!(drawn.y as f32 <= 40.2 && (drawn.y + drawn.side) as f32 >= 75.5, "{drawn:?}");
            assert!(drawn.x + drawn.side <= PHOTO.0 && drawn.y + drawn.side <= PHOTO.1, "{drawn:?}");
            squares.push((drawn.x, drawn.y, drawn.side));
        }
        let sides = squares.iter().map(|square| square.2);
        assert!(sides.clone().min() < Some(50) && sides.max() > Some(80));
        squares.sort_unstable();
        squares.dedup();
        assert!(squares.len() > 300, "{} different squares", squares.len());
    }

    #[test]
    fn a_face_larger_than_the_photo_gets_the_largest_square() {
        let drawn = Square::draw(
            PHOTO,
            [-20.0, -10.0, 120.0, 118.0],
            &CropConfig::default(),
            &mut for_sample(7, 0, 0, Purpose::Augmentation),
        );
        assert_eq!((drawn.x, drawn.side), (0, 92));
        assert!(drawn.y + drawn.side <= 112);
    }

    #[test]
    fn a_mirrored_square_is_as_far_from_the_other_edge() {
        let square = Square { x: 10, y: 20, side: 32 };
        assert_eq!(square.mirrored(PHOTO.0), Square { x: 92 - 10 - 32, y: 20, side: 32 });
        assert_eq!(square.mirrored(PHOTO.0).mirrored(PHOTO.0), square);
    }

    #[test]
    fn time_ids_tell_the_photo_s_size_and_the_offset_in_target_pixels() {
        let square = Square { x: 10, y: 20, side: 32 };
        assert_eq!(square.time_ids(PHOTO, 64, SizeConditioning::Crop), [112.0, 92.0, 40.0, 20.0, 64.0, 64.0]);
        assert_eq!(square.time_ids(PHOTO, 64, SizeConditioning::Whole), [64.0, 64.0, 0.0, 0.0, 64.0, 64.0]);
    }
}
