//! Five-point alignment: rotates, scales and moves the face to the position that embedders expect.

use hyperlora_core::{Error, Result};
use image::RgbImage;

use crate::face::sampling::{Border, Sampling};

/// Side of an aligned portrait in pixels.
pub const PORTRAIT: u32 = 112;

/// Positions of the five points in an aligned portrait: left eye, right eye, nose, left and right mouth corner as the
/// viewer sees them (insightface `face_align.arcface_dst`).
const TEMPLATE: [[f32; 2]; 5] =
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]];

/// Rotation, scaling and shift: (x, y) -> (a x - b y + tx, b x + a y + ty).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Similarity {
    /// Scale times cosine.
    pub a: f32,
    /// Scale times sine.
    pub b: f32,
    /// Shift in pixels.
    pub shift: [f32; 2],
}

impl Similarity {
    /// Fits the map that brings `from` closest to `to` in the least-squares sense (Umeyama 1991 without reflection,
    /// which in two dimensions has this closed form). `None` if the points of one side all coincide.
    pub fn fit(from: &[[f32; 2]], to: &[[f32; 2]]) -> Option<Self> {
        let (centre_from, centre_to) = (mean(from), mean(to));
        let (mut dot, mut cross, mut spread) = (0.0, 0.0, 0.0);
        for (from, to) in from.iter().zip(to) {
            let [x, y] = [from[0] - centre_from[0], from[1] - centre_from[1]];
            let [u, v] = [to[0] - centre_to[0], to[1] - centre_to[1]];
            dot += x * u + y * v;
            cross += x * v - y * u;
            spread += x * x + y * y;
        }
        let (a, b) = (dot / spread, cross / spread);
        let [x, y] = centre_from;
        let shift = [centre_to[0] - a * x + b * y, centre_to[1] - b * x - a * y];
        let usable = a * a + b * b > 0.0 && [a, b, shift[0], shift[1]].iter().all(|value| value.is_finite());
        usable.then_some(Self { a, b, shift })
    }

    /// Maps a point.
    pub fn apply(&self, [x, y]: [f32; 2]) -> [f32; 2] {
        [self.a * x - self.b * y + self.shift[0], self.b * x + self.a * y + self.shift[1]]
    }

    /// Returns the inverse of [`apply`](Self::apply).
    pub(super) fn inverse(&self) -> Self {
        let scale = self.a * self.a + self.b * self.b;
        let (a, b) = (self.a / scale, -self.b / scale);
        let [tx, ty] = self.shift;
        Self { a, b, shift: [b * ty - a * tx, -b * tx - a * ty] }
    }

    /// Warps the photo by this map to `side` x `side` pixels, black outside the photo. Follows OpenCV's `warpAffine`,
    /// whose pictures insightface's models were trained on: the map is between pixel centres counted from zero, and
    /// each pixel samples one place.
    pub(super) fn warp(&self, photo: &RgbImage, side: u32) -> RgbImage {
        let Self { a, b, shift } = self.inverse();
        let mut sampling = Sampling { origin: shift, across: [a, b], down: [-b, a] };
        let corner = sampling.apply(-0.5, -0.5);
        sampling.origin = corner.map(|place| place + 0.5);
        sampling.read_centres(photo, side, side, Border::Black)
    }
}

/// Returns the 112 x 112 portrait of the face with these five points, black outside the photo (insightface
/// `face_align.norm_crop`).
///
/// # Errors
/// Input: the points all coincide.
pub fn portrait(photo: &RgbImage, points: &[[f32; 2]; 5]) -> Result<RgbImage> {
    let aligned = Similarity::fit(points, &TEMPLATE).ok_or_else(|| {
        Error::input(
            "face",
            format!("its points {points:?} span nothing"),
            "detect the face again: it cannot be aligned",
        )
    })?;
    Ok(aligned.warp(photo, PORTRAIT))
}

/// Returns the centre of some points.
pub(super) fn mean(points: &[[f32; 2]]) -> [f32; 2] {
    let count = points.len().max(1) as f32;
    [0, 1].map(|axis| points.iter().map(|point| point[axis]).sum::<f32>() / count)
}

#[cfg(test)]
mod tests {
    use image::Rgb;

    use super::*;

    #[test]
    fn fit_finds_a_known_map_and_its_inverse() {
        let known = Similarity { a: 0.8 * 0.3_f32.cos(), b: 0.8 * 0.3_f32.sin(), shift: [12.5, -40.0] };
        let from = TEMPLATE;
        let to = from.map(|point| known.apply(point));
        let found = Similarity::fit(&from, &to).unwrap();
        let error = [found.a - known.a, found.b - known.b, found.shift[0] - 12.5, found.shift[1] + 40.0];
        assert!(error.iter().all(|difference| difference.abs() < 1e-4), "{found:?}");
        let back = found.inverse();
        for (from, to) in from.iter().zip(to) {
            let [x, y] = back.apply(to);
            assert!((x - from[0]).hypot(y - from[1]) < 1e-3, "{x} {y}");
        }
        assert_eq!(Similarity::fit(&[[3.0, 3.0]; 5], &TEMPLATE), None);
    }

    #[test]
    fn a_turned_photo_gives_the_upright_portrait() {
        let upright = |x: f32, y: f32| [(2.0 * x) as u8, (2.0 * y) as u8, 77];
        let turn = Similarity { a: 0.0, b: 1.5, shift: [200.0, 10.0] };
        let back = turn.inverse();
        let photo = RgbImage::from_fn(220, 190, |x, y| {
            let [x, y] = back.apply([x as f32, y as f32]);
            Rgb(upright(x, y))
        });
        let aligned = portrait(&photo, &TEMPLATE.map(|point| turn.apply(point))).unwrap();
        for (x, y) in [(20, 20), (56, 56), (80, 30), (100, 100)] {
            let want = upright(x as f32, y as f32);
            let got = aligned.get_pixel(x, y).0;
            assert!(want.iter().zip(got).all(|(&want, got)| want.abs_diff(got) <= 2), "{x} {y}: {got:?}, not {want:?}");
        }
    }
}
