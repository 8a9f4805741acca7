//! Conversion of pixels to the input of insightface's models.

use image::RgbImage;

use crate::face::onnx::Header;

/// Map of pixel values 0..255 to a model's input: (x - shift) / scale.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Normalisation {
    pub(super) shift: f32,
    pub(super) scale: f32,
}

impl Normalisation {
    /// Applies insightface's rule (`ArcFaceONNX`, `Landmark`): a model whose first eight nodes are named like a
    /// subtraction and a multiplication, or whose first three include `bn_data`, takes 0..255 unchanged; the others
    /// need (x - 127.5) / `scale`.
    pub(super) fn of(header: &Header, scale: f32) -> Self {
        let any = |prefixes: [&str; 2]| {
            header.first_nodes.iter().any(|name| prefixes.iter().any(|prefix| name.starts_with(prefix)))
        };
        let by_itself = any(["Sub", "_minus"]) && any(["Mul", "_mul"])
            || header.first_nodes.iter().take(3).any(|name| name == "bn_data");
        if by_itself { Self { shift: 0.0, scale: 1.0 } } else { Self { shift: 127.5, scale } }
    }

    /// Places the picture in the upper left of a black square: `[3, side, side]`, RGB.
    pub(super) fn planes(self, picture: &RgbImage, side: usize) -> Vec<f32> {
        let seen = |value: f32| (value - self.shift) / self.scale;
        let mut planes = vec![seen(0.0); 3 * side * side];
        for (x, y, pixel) in picture.enumerate_pixels() {
            let at = y as usize * side + x as usize;
            for (plane, value) in pixel.0.into_iter().enumerate() {
                planes[plane * side * side + at] = seen(f32::from(value));
            }
        }
        planes
    }
}

#[cfg(test)]
mod tests {
    use image::Rgb;

    use super::*;

    #[test]
    fn the_first_nodes_tell_who_normalises() {
        let by_itself = |names: &[&str]| {
            let first_nodes = names.iter().map(|name| (*name).to_owned()).collect();
            Normalisation::of(&Header { inputs: Vec::new(), outputs: Vec::new(), first_nodes }, 128.0).scale == 1.0
        };
        assert!(by_itself(&["_minusscalar0", "_mulscalar0", "conv0"]) && by_itself(&["Conv_0", "Sub_1", "Mul_2"]));
        assert!(by_itself(&["id", "x", "bn_data"]) && !by_itself(&["id", "x", "conv", "bn_data"]));
        assert!(!by_itself(&["Sub_0", "Conv_1"]) && !by_itself(&["Mul_0"]) && !by_itself(&[]));
    }

    #[test]
    fn planes_are_rgb_and_black_beside_the_picture() {
        let picture = RgbImage::from_pixel(2, 1, Rgb([255, 0, 51]));
        let planes = Normalisation { shift: 127.5, scale: 127.5 }.planes(&picture, 2);
        assert_eq!(planes, [1.0, 1.0, -1.0, -1.0, -1.0, -1.0, -1.0, -1.0, -0.6, -0.6, -1.0, -1.0]);
    }
}
