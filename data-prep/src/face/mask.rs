//! CLIP input images (HyperLoRA, arXiv 2503.16944): the face alone, and the photo without the face.
//!
//! Both start from the outline of the face. It is drawn and blurred in the *mask crop*: the square centred on the
//! outline's mean with a half-side of 0.8 of its longer side, resampled to `size` x `size`. Blur radii are Gaussian
//! standard deviations in that crop at 512 x 512, and scale with `size`.

use image::{GrayImage, ImageBuffer, Luma, Pixel, Rgb, RgbImage, imageops};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::face::align::mean;
use crate::face::sampling::{Border, Sampling};

/// Outline of the face in the 106-point annotation: jaw and brows.
const OUTLINE_106: [usize; 43] = [
    1, 9, 10, 11, 12, 13, 14, 15, 16, 2, 3, 4, 5, 6, 7, 8, 0, 24, 23, 22, 21, 20, 19, 18, 32, 31, 30, 29, 28, 27, 26,
    25, 17, 101, 105, 104, 103, 102, 50, 51, 49, 48, 43,
];

/// Side for which the blur radii are given.
const REFERENCE_SIZE: f32 = 512.0;
const MASK_BLUR: f32 = 15.0;
const FACE_BLUR: f32 = 45.0;
/// Half-sides of the crops: in longer sides of the outline (mask), and of the box of all landmarks (ID).
const MASK_CROP: f32 = 0.8;
const ID_CROP: f32 = 0.75;
/// Upward shift of the ID crop's centre in half-sides, to show the forehead.
const ID_RAISED: f32 = 0.125;
/// Scale of the outline for the Base image, which hides more than the face itself.
const BASE_OUTLINE: f32 = 1.4;
const GREY: f32 = 127.0;

/// Size of the masks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct MaskConfig {
    /// Side in pixels at which faces are cut out and blurred, 1 to 8192; blur radii scale with it. The original uses
    /// 512; a CLIP encoder with a small input needs at most twice its own side.
    pub size: u32,
}

impl Default for MaskConfig {
    fn default() -> Self {
        Self { size: REFERENCE_SIZE as u32 }
    }
}

/// Returns the outline of a face, in pixels like the landmarks: jaw and brows of 68 (iBUG 300-W) or 106 (insightface)
/// points, or the convex hull of any other number of points.
pub fn outline(landmarks: &[[f32; 2]]) -> Vec<[f32; 2]> {
    match landmarks.len() {
        68 => (0..=16).chain((17..=26).rev()).map(|index| landmarks[index]).collect(),
        106 => OUTLINE_106.map(|index| landmarks[index]).to_vec(),
        _ => convex_hull(landmarks),
    }
}

/// Makes the CLIP input of the ID-LoRA: the face alone on grey (#7f7f7f), `size` x `size`. `landmarks` are in pixels of
/// `photo`.
pub fn id_image(photo: &RgbImage, landmarks: &[[f32; 2]], config: &MaskConfig) -> RgbImage {
    let size = config.size;
    let mask = FaceMask::new(&outline(landmarks), 1.0, size);
    let [x0, y0, x1, y1] = bounds(landmarks);
    let half = ID_CROP * (x1 - x0).max(y1 - y0);
    let centre = [(x0 + x1) / 2.0, (y0 + y1) / 2.0 - ID_RAISED * half];
    let crop = Sampling::of_box(square(centre, half), size, size);
    let mut image = crop.read(photo, size, size, Border::Nearest);
    for (u, v, pixel) in image.enumerate_pixels_mut() {
        let place = crop.apply(u as f32 + 0.5, v as f32 + 0.5);
        let shown = if contains(photo, place) { mask.at(place) } else { 0.0 };
        pixel.apply(|value| mix(GREY, f32::from(value), shown));
    }
    image
}

/// Makes the CLIP input of the Base-LoRA: the photo with the face blurred away, in the photo's size. `landmarks` are in
/// pixels of `photo`.
pub fn base_image(photo: &RgbImage, landmarks: &[[f32; 2]], config: &MaskConfig) -> RgbImage {
    let size = config.size;
    let mask = FaceMask::new(&outline(landmarks), BASE_OUTLINE, size);
    let crop = Sampling::of_box(mask.square, size, size);
    let blurred = blur(&crop.read(photo, size, size, Border::Nearest), FACE_BLUR * size as f32 / REFERENCE_SIZE);
    // Map back to the photo's pixels, so that each of them reads its own place in the crop.
    let (width, height) = photo.dimensions();
    let [left, top, right, bottom] = mask.square;
    let per_pixel = size as f32 / (right - left);
    let back =
        Sampling { origin: [-left * per_pixel, -top * per_pixel], across: [per_pixel, 0.0], down: [0.0, per_pixel] };
    let mut image = photo.clone();
    for y in clamped(top, height)..clamped(bottom.ceil(), height) {
        for x in clamped(left, width)..clamped(right.ceil(), width) {
            let [u, v] = [x as f32 + 0.5, y as f32 + 0.5];
            let hidden = mask.at([u, v]);
            if hidden > 0.0 {
                let smooth: [f32; 3] = bilinear(&blurred, back.apply(u, v));
                let pixel = image.get_pixel_mut(x, y);
                *pixel = Rgb([0, 1, 2].map(|c| mix(f32::from(pixel.0[c]), smooth[c], hidden)));
            }
        }
    }
    image
}

/// Mask of the face: the degree to which each place of the photo belongs to it.
struct FaceMask {
    /// Mask crop x0, y0, x1, y1 in the photo.
    square: [f32; 4],
    /// 255 inside, 0 outside, blurred in between.
    alpha: GrayImage,
}

impl FaceMask {
    /// Makes the mask of `outline` scaled by `grown` around its mean. The crop is that of the unscaled outline.
    fn new(outline: &[[f32; 2]], grown: f32, size: u32) -> Self {
        let centre = mean(outline);
        let [x0, y0, x1, y1] = bounds(outline);
        // At least a pixel, so that an outline of a single point does not cause a division by zero.
        let half = (MASK_CROP * (x1 - x0).max(y1 - y0)).max(1.0);
        let square = square(centre, half);
        let per_pixel = size as f32 / (2.0 * half);
        let corners: Vec<_> = outline
            .iter()
            .map(|point| [0, 1].map(|axis| (grown * (point[axis] - centre[axis]) + half) * per_pixel))
            .collect();
        Self { square, alpha: blur(&filled(&corners, size), MASK_BLUR * size as f32 / REFERENCE_SIZE) }
    }

    /// Returns the mask at a place of the photo, in 0..1; 0 outside the crop.
    fn at(&self, [x, y]: [f32; 2]) -> f32 {
        let [x0, y0, x1, y1] = self.square;
        if !((x0..x1).contains(&x) && (y0..y1).contains(&y)) {
            return 0.0;
        }
        let size = self.alpha.width() as f32;
        let [alpha] = bilinear(&self.alpha, [(x - x0) / (x1 - x0) * size, (y - y0) / (y1 - y0) * size]);
        alpha / 255.0
    }
}

/// Draws a white polygon on a black square: a pixel is white if its centre lies inside (even-odd rule).
fn filled(corners: &[[f32; 2]], size: u32) -> GrayImage {
    let mut image = GrayImage::new(size, size);
    for y in 0..size {
        let line = y as f32 + 0.5;
        let mut crossings: Vec<f32> = Vec::new();
        for (from, to) in corners.iter().zip(corners.iter().cycle().skip(1)) {
            if (from[1] <= line) != (to[1] <= line) {
                crossings.push(from[0] + (line - from[1]) / (to[1] - from[1]) * (to[0] - from[0]));
            }
        }
        crossings.sort_by(f32::total_cmp);
        let (spans, _) = crossings.as_chunks::<2>();
        for [enter, leave] in spans {
            for x in clamped((enter - 0.5).ceil(), size)..clamped((leave - 0.5).ceil(), size) {
                image.put_pixel(x, y, Luma([255]));
            }
        }
    }
    image
}

/// Gaussian blur: exact for small radii, three box blurs for large ones, whose steps are then fine enough.
fn blur<P: Pixel<Subpixel = u8> + 'static>(image: &ImageBuffer<P, Vec<u8>>, deviation: f32) -> ImageBuffer<P, Vec<u8>> {
    const EXACT: f32 = 8.0;
    if image.is_empty() || deviation <= 0.0 {
        image.clone()
    } else if deviation < EXACT {
        imageops::blur(image, deviation)
    } else {
        imageops::fast_blur(image, deviation)
    }
}

/// Interpolates the value at a place of an image, 0..255, from the four nearest pixel centres. Edge values extend
/// outwards.
fn bilinear<P: Pixel<Subpixel = u8>, const C: usize>(image: &ImageBuffer<P, Vec<u8>>, [x, y]: [f32; 2]) -> [f32; C] {
    let (right, bottom) = (image.width().saturating_sub(1), image.height().saturating_sub(1));
    let (x, y) = ((x - 0.5).clamp(0.0, right as f32), (y - 0.5).clamp(0.0, bottom as f32));
    let (left, top) = (x as u32, y as u32);
    let (fx, fy) = (x - left as f32, y - top as f32);
    let (next_x, next_y) = ((left + 1).min(right), (top + 1).min(bottom));
    let corners = [
        (left, top, (1.0 - fx) * (1.0 - fy)),
        (next_x, top, fx * (1.0 - fy)),
        (left, next_y, (1.0 - fx) * fy),
        (next_x, next_y, fx * fy),
    ];
    let mut sum = [0.0; C];
    for (x, y, weight) in corners {
        for (sum, value) in sum.iter_mut().zip(image.get_pixel(x, y).channels()) {
            *sum += weight * f32::from(*value);
        }
    }
    sum
}

/// Returns the bounding box x0, y0, x1, y1 of some points; all zero for none.
fn bounds(points: &[[f32; 2]]) -> [f32; 4] {
    let Some(&[x, y]) = points.first() else { return [0.0; 4] };
    points.iter().fold([x, y, x, y], |[x0, y0, x1, y1], &[x, y]| [x0.min(x), y0.min(y), x1.max(x), y1.max(y)])
}

fn square([x, y]: [f32; 2], half: f32) -> [f32; 4] {
    [x - half, y - half, x + half, y + half]
}

fn contains(photo: &RgbImage, [x, y]: [f32; 2]) -> bool {
    (0.0..photo.width() as f32).contains(&x) && (0.0..photo.height() as f32).contains(&y)
}

/// Clamps to a pixel index between 0 and `length`.
fn clamped(value: f32, length: u32) -> u32 {
    value.clamp(0.0, length as f32) as u32
}

fn mix(from: f32, to: f32, share: f32) -> u8 {
    (from + (to - from) * share).round() as u8
}

/// Convex hull by Andrew's monotone chain.
fn convex_hull(points: &[[f32; 2]]) -> Vec<[f32; 2]> {
    let mut sorted = points.to_vec();
    sorted.sort_by(|a, b| a[0].total_cmp(&b[0]).then(a[1].total_cmp(&b[1])));
    let turns_left =
        |[a, b]: [[f32; 2]; 2], c: [f32; 2]| (b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0]) > 0.0;
    let chain = |points: &mut dyn Iterator<Item = [f32; 2]>| {
        let mut kept: Vec<[f32; 2]> = Vec::new();
        for point in points {
            while let [.., a, b] = kept[..]
                && !turns_left([a, b], point)
            {
                kept.pop();
            }
            kept.push(point);
        }
        kept.pop();
        kept
    };
    let mut hull = chain(&mut sorted.iter().copied());
    hull.extend(chain(&mut sorted.iter().rev().copied()));
    hull
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Makes 68 points whose jaw is the lower half of a circle around (50, 50) and whose brows are a line across its
    /// top.
    fn face() -> Vec<[f32; 2]> {
        let mut points = vec![[50.0, 50.0]; 68];
        for (index, point) in points.iter_mut().enumerate().take(17) {
            let angle = std::f32::consts::PI * (1.0 - index as f32 / 16.0);
            *point = [50.0 + 20.0 * angle.cos(), 50.0 + 20.0 * angle.sin()];
        }
        for (column, point) in points[17..27].iter_mut().enumerate() {
            *point = [32.0 + 4.0 * column as f32, 40.0];
        }
        points
    }

    fn photo() -> RgbImage {
        RgbImage::from_fn(100, 100, |x, y| if (x + y) % 2 == 0 { Rgb([255, 200, 0]) } else { Rgb([55, 0, 200]) })
    }

    #[test]
    fn the_outline_goes_once_around() {
        let points = face();
        let outline_68 = outline(&points);
        assert_eq!((outline_68.len(), outline_68[16], outline_68[17]), (27, points[16], points[26]));
        let numbered: Vec<_> = (0..106).map(|index| [index as f32, 0.0]).collect();
        let outline_106 = outline(&numbered);
        assert_eq!((outline_106.len(), outline_106[0][0], outline_106[42][0]), (43, 1.0, 43.0));
        let hull = outline(&[[0.0, 0.0], [4.0, 0.0], [2.0, 1.0], [4.0, 4.0], [0.0, 4.0]]);
        assert_eq!(hull, [[0.0, 0.0], [4.0, 0.0], [4.0, 4.0], [0.0, 4.0]]);
    }

    #[test]
    fn a_polygon_fills_its_inside() {
        let image = filled(&[[2.0, 2.0], [6.0, 2.0], [6.0, 7.0], [2.0, 7.0]], 10);
        assert_eq!(image.pixels().filter(|pixel| pixel.0 == [255]).count(), 20);
        assert_eq!((image.get_pixel(2, 2).0, image.get_pixel(6, 6).0), ([255], [0]));
    }

    #[test]
    fn the_id_image_is_the_face_on_grey() {
        let photo = RgbImage::from_pixel(100, 100, Rgb([200, 10, 10]));
        let image = id_image(&photo, &face(), &MaskConfig { size: 128 });
        assert_eq!(image.dimensions(), (128, 128));
        for corner in [(0, 0), (127, 0), (0, 127), (127, 127)] {
            assert_eq!(image.get_pixel(corner.0, corner.1).0, [127; 3]);
        }
        // The landmarks' box is x 30..70, y 40..70: half-side 30, centre (50, 55 - 3.75). (50, 55) is well inside.
        let v = ((55.0 - (51.25 - 30.0)) / 60.0 * 128.0) as u32;
        assert_eq!(image.get_pixel(64, v).0, [200, 10, 10]);
        // On the straight edge between brow and forehead, half of the blurred mask remains.
        let v = ((40.0 - (51.25 - 30.0)) / 60.0 * 128.0) as u32;
        let on_edge = image.get_pixel(64, v).0[0];
        assert!((150..=177).contains(&on_edge), "{on_edge}");
    }

    #[test]
    fn the_base_image_loses_the_face_and_keeps_the_rest() {
        let photo = photo();
        let image = base_image(&photo, &face(), &MaskConfig { size: 128 });
        assert_eq!(image.dimensions(), photo.dimensions());
        for (x, y) in [(0, 0), (99, 0), (5, 50), (50, 8), (50, 95)] {
            assert_eq!(image.get_pixel(x, y), photo.get_pixel(x, y), "{x} {y}");
        }
        for (x, y) in [(50, 50), (45, 55), (55, 60)] {
            let [r, g, b] = image.get_pixel(x, y).0;
            assert!(r.abs_diff(155) < 6 && g.abs_diff(100) < 6 && b.abs_diff(100) < 6, "{x} {y}: {r} {g} {b}");
        }
    }

    #[test]
    fn a_smaller_size_blurs_as_far() {
        let photo = RgbImage::from_pixel(100, 100, Rgb([255; 3]));
        let [large, small] = [512, 64].map(|size| id_image(&photo, &face(), &MaskConfig { size }));
        let shrunk = imageops::resize(&large, 64, 64, imageops::FilterType::Triangle);
        let worst = shrunk.iter().zip(small.iter()).map(|(a, b)| a.abs_diff(*b)).max();
        assert!(worst < Some(16), "{worst:?}");
    }

    #[test]
    fn landmarks_outside_the_photo_or_none_at_all_do_no_harm() {
        let photo = photo();
        let config = MaskConfig { size: 64 };
        let beside: Vec<_> = face().iter().map(|[x, y]| [x + 500.0, *y]).collect();
        for landmarks in [&beside[..], &[]] {
            assert_eq!(base_image(&photo, landmarks, &config), photo);
            assert!(id_image(&photo, landmarks, &config).pixels().all(|pixel| pixel.0 == [127; 3]));
        }
    }
}
