//! Sampling of a photo at the places of an affine map.

use image::{Rgb, RgbImage};

/// Map of an output pixel to its place in the photo: `origin + u * across + v * down`, in continuous pixels of both.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Sampling {
    /// Place of the output's corner in the photo.
    pub(super) origin: [f32; 2],
    /// Step of one output pixel to the right.
    pub(super) across: [f32; 2],
    /// Step of one output pixel down.
    pub(super) down: [f32; 2],
}

/// Colour around the photo.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Border {
    /// Black.
    Black,
    /// The nearest pixel of the photo.
    Nearest,
}

/// Limit of points per output pixel and axis, if the photo is larger than the output.
const MAX_TAPS: f32 = 16.0;

impl Sampling {
    /// Maps the box (x0, y0, x1, y1) of the photo to `width` x `height` output pixels.
    pub(super) fn of_box([x0, y0, x1, y1]: [f32; 4], width: u32, height: u32) -> Self {
        Self { origin: [x0, y0], across: [(x1 - x0) / width as f32, 0.0], down: [0.0, (y1 - y0) / height as f32] }
    }

    /// Returns the place of an output point in the photo.
    pub(super) fn apply(&self, u: f32, v: f32) -> [f32; 2] {
        [0, 1].map(|axis| self.origin[axis] + u * self.across[axis] + v * self.down[axis])
    }

    /// Reads `width` x `height` pixels: bilinear, averaged over the area of each output pixel.
    pub(super) fn read(&self, photo: &RgbImage, width: u32, height: u32, border: Border) -> RgbImage {
        let taps = |step: [f32; 2]| step[0].hypot(step[1]).ceil().clamp(1.0, MAX_TAPS) as u32;
        self.read_taps(photo, [width, height], border, [taps(self.across), taps(self.down)])
    }

    /// Reads `width` x `height` pixels: bilinear at each pixel's centre only, as OpenCV does (`INTER_LINEAR`).
    pub(super) fn read_centres(&self, photo: &RgbImage, width: u32, height: u32, border: Border) -> RgbImage {
        self.read_taps(photo, [width, height], border, [1, 1])
    }

    fn read_taps(
        &self,
        photo: &RgbImage,
        [width, height]: [u32; 2],
        border: Border,
        [across, down]: [u32; 2],
    ) -> RgbImage {
        let weight = 1.0 / (across * down) as f32;
        RgbImage::from_fn(width, height, |u, v| {
            let mut sum = [0.0; 3];
            for row in 0..down {
                for column in 0..across {
                    let u = u as f32 + (column as f32 + 0.5) / across as f32;
                    let v = v as f32 + (row as f32 + 0.5) / down as f32;
                    let colour = bilinear(photo, self.apply(u, v), border);
                    sum.iter_mut().zip(colour).for_each(|(sum, value)| *sum += value * weight);
                }
            }
            Rgb(sum.map(|value| value.round() as u8))
        })
    }
}

/// Interpolates the photo's colour at a place, 0..255, from the four nearest pixel centres.
fn bilinear(photo: &RgbImage, [x, y]: [f32; 2], border: Border) -> [f32; 3] {
    let (x, y) = (x - 0.5, y - 0.5);
    let (left, top) = (x.floor(), y.floor());
    let (fx, fy) = (x - left, y - top);
    let pixel = |dx: f32, dy: f32| -> [f32; 3] {
        let (x, y) = (left + dx, top + dy);
        let (right, bottom) = (photo.width() as f32 - 1.0, photo.height() as f32 - 1.0);
        let inside = (0.0..=right).contains(&x) && (0.0..=bottom).contains(&y);
        if !inside && (border == Border::Black || photo.is_empty()) {
            return [0.0; 3];
        }
        photo.get_pixel(x.clamp(0.0, right) as u32, y.clamp(0.0, bottom) as u32).0.map(f32::from)
    };
    let corners = [pixel(0.0, 0.0), pixel(1.0, 0.0), pixel(0.0, 1.0), pixel(1.0, 1.0)];
    let weights = [(1.0 - fx) * (1.0 - fy), fx * (1.0 - fy), (1.0 - fx) * fy, fx * fy];
    [0, 1, 2].map(|channel| corners.iter().zip(weights).map(|(corner, weight)| corner[channel] * weight).sum())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_whole_photo_at_its_own_size_is_the_photo() {
        let photo = RgbImage::from_fn(7, 5, |x, y| Rgb([x as u8 * 30, y as u8 * 40, 9]));
        for border in [Border::Black, Border::Nearest] {
            assert_eq!(Sampling::of_box([0.0, 0.0, 7.0, 5.0], 7, 5).read(&photo, 7, 5, border), photo);
        }
    }

    #[test]
    fn a_smaller_output_averages_where_it_is_asked_to_and_the_border_counts() {
        let photo = RgbImage::from_fn(8, 8, |x, _| Rgb([if x % 2 == 0 { 0 } else { 200 }; 3]));
        let half = Sampling::of_box([0.0, 0.0, 8.0, 8.0], 4, 4).read(&photo, 4, 4, Border::Nearest);
        assert_eq!(half.get_pixel(1, 1).0, [100; 3]);
        let third = Sampling::of_box([0.0, 0.0, 6.0, 6.0], 2, 2);
        assert_eq!(third.read(&photo, 2, 2, Border::Nearest).get_pixel(0, 0).0, [67; 3]);
        assert_eq!(third.read_centres(&photo, 2, 2, Border::Nearest).get_pixel(0, 0).0, [200; 3]);
        let beside = Sampling::of_box([8.0, 0.0, 16.0, 8.0], 8, 8);
        assert_eq!(beside.read(&photo, 8, 8, Border::Black).get_pixel(3, 3).0, [0; 3]);
        assert_eq!(beside.read(&photo, 8, 8, Border::Nearest).get_pixel(3, 3).0, [200; 3]);
    }
}
