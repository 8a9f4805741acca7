//! Bicubic resizing that matches Pillow's 8-bit arithmetic bit for bit, because CLIP was trained on such images.

use image::{Rgb, RgbImage};

/// Fraction bits of a tap's weight.
const PRECISION: u32 = 22;
/// Radius of the kernel, in pixels of the coarser grid.
const SUPPORT: f64 = 2.0;

/// Source pixels and weights of one result pixel.
struct Taps {
    first: u32,
    weights: Vec<i64>,
}

/// Resizes with antialiasing, horizontally first; each pass is rounded and clamped to 8 bits.
pub(super) fn bicubic(picture: &RgbImage, width: u32, height: u32) -> RgbImage {
    let columns = taps(picture.width(), width);
    let wide =
        RgbImage::from_fn(width, picture.height(), |x, y| mix(&columns[x as usize], |from| picture.get_pixel(from, y)));
    let rows = taps(picture.height(), height);
    RgbImage::from_fn(width, height, |x, y| mix(&rows[y as usize], |from| wide.get_pixel(x, from)))
}

fn mix<'a>(taps: &Taps, pixel: impl Fn(u32) -> &'a Rgb<u8>) -> Rgb<u8> {
    let mut sums = [1_i64 << (PRECISION - 1); 3];
    for (from, weight) in (taps.first..).zip(&taps.weights) {
        for (sum, &level) in sums.iter_mut().zip(&pixel(from).0) {
            *sum += weight * i64::from(level);
        }
    }
    Rgb(sums.map(|sum| (sum >> PRECISION).clamp(0, 255) as u8))
}

fn taps(from: u32, to: u32) -> Vec<Taps> {
    let scale = f64::from(from) / f64::from(to);
    // The kernel widens when downscaling, which antialiases.
    let stretch = scale.max(1.0);
    let make = |i: u32| {
        let centre = (f64::from(i) + 0.5) * scale;
        // The casts saturate at 0.
        let first = (centre - SUPPORT * stretch + 0.5) as u32;
        let end = ((centre + SUPPORT * stretch + 0.5) as u32).min(from);
        let weights: Vec<f64> = (first..end).map(|x| kernel((f64::from(x) - centre + 0.5) / stretch)).collect();
        let sum: f64 = weights.iter().sum();
        let fixed = |weight: &f64| (weight / sum * f64::from(1_u32 << PRECISION)).round() as i64;
        Taps { first, weights: weights.iter().map(fixed).collect() }
    };
    (0..to).map(make).collect()
}

/// Keys' cubic kernel with a = -0.5.
fn kernel(x: f64) -> f64 {
    const A: f64 = -0.5;
    let x = x.abs();
    if x < 1.0 {
        ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0
    } else if x < SUPPORT {
        (((x - 5.0) * x + 8.0) * x - 4.0) * A
    } else {
        0.0
    }
}
