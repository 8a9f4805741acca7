//! Square pictures as planes of numbers: their form from decoding to the input of a model.

use burn::tensor::{Device, Tensor, TensorData};
use image::{Rgb, RgbImage};

/// Square RGB picture, channels first: `[3, side, side]`.
#[derive(Debug, Clone, PartialEq)]
pub struct Planes {
    /// Height and width in pixels.
    pub side: usize,
    /// Values by channel, row by row.
    pub data: Vec<f32>,
}

impl Planes {
    /// Converts a square picture. `value` maps the level of a channel.
    pub fn new(picture: &RgbImage, value: impl Fn(usize, u8) -> f32) -> Self {
        debug_assert_eq!(picture.width(), picture.height(), "the picture is not square");
        let value = &value;
        let plane = |channel: usize| picture.pixels().map(move |pixel| value(channel, pixel[channel]));
        Self { side: picture.width() as usize, data: (0..3).flat_map(plane).collect() }
    }

    /// Converts back to a picture. `level` maps a value.
    pub fn picture(&self, level: impl Fn(f32) -> u8) -> RgbImage {
        RgbImage::from_fn(self.side as u32, self.side as u32, |x, y| {
            let at = y as usize * self.side + x as usize;
            Rgb([0, 1, 2].map(|channel| level(self.data[channel * self.side * self.side + at])))
        })
    }

    /// Stacks pictures of one side to `[B, 3, side, side]`.
    pub fn stack(pictures: &[&Self], device: &Device) -> Tensor<4> {
        let side = pictures.first().map_or(0, |picture| picture.side);
        let values = pictures.iter().map(|picture| &picture.data[..]).collect::<Vec<_>>().concat();
        Tensor::from_data(TensorData::new(values, [pictures.len(), 3, side, side]), device)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn channels_come_first_and_the_picture_comes_back() {
        let mut picture = RgbImage::new(2, 2);
        picture.put_pixel(1, 0, Rgb([255, 7, 0]));
        picture.put_pixel(0, 1, Rgb([0, 128, 9]));
        let planes = Planes::new(&picture, |_, level| f32::from(level));
        assert_eq!(planes.data, [0.0, 255.0, 0.0, 0.0, 0.0, 7.0, 128.0, 0.0, 0.0, 0.0, 9.0, 0.0]);
        assert_eq!(planes.picture(|value| value as u8), picture);
        assert_eq!(Planes::stack(&[&planes, &planes], &Device::flex()).dims(), [2, 3, 2, 2]);
    }
}
