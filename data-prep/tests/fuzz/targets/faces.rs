//! Numbers about a face from a model or a shard: boxes, points and landmarks that are out of range, or not numbers.

use data_prep::crop::CropConfig;
use data_prep::face::Detection;
use data_prep::face::align::portrait;
use data_prep::face::mask::{MaskConfig, base_image, id_image, outline};
use data_prep::filter::FilterConfig;
use image::{Rgb, RgbImage};

use hyperlora_testing::fuzz::{Case, Refusal, fuzz};

/// Draws a coordinate, mostly one of a photo of 40 pixels.
fn coordinate(case: &mut Case) -> f32 {
    let random = &mut case.random;
    match random.below(20) {
        0 => f32::from_bits(random.next() as u32),
        1 => *random.pick(&[f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::MAX, f32::MIN, 1e30, -1e9, 0.0, 2e9]),
        2 => random.below(4000) as f32 - 2000.0,
        _ => random.below(400) as f32 / 10.0,
    }
}

fn landmarks(case: &mut Case) -> Vec<[f32; 2]> {
    let count = *case.random.pick(&[0, 1, 2, 5, 68, 68, 68, 106, 106]);
    (0..count).map(|_| [coordinate(case), coordinate(case)]).collect()
}

#[test]
fn faces() {
    let photo = RgbImage::from_fn(40, 30, |x, y| Rgb([(x * 6) as u8, (y * 8) as u8, (x * y) as u8]));
    let narrow = RgbImage::new(1, 1);
    let crop = CropConfig { margin: 1.5, max_side: 24 };
    let filter = FilterConfig { min_face: 0.0, min_sharpness: 0.0 };
    let mask = MaskConfig { size: 8 };
    fuzz("faces", 1000, 4 << 20, "face", |case| {
        let photo = if case.random.one_in(8) { &narrow } else { &photo };
        // One function per case, because masks take far longer than the others.
        match case.random.below(40) {
            0 => {
                let landmarks = landmarks(case);
                assert_eq!(id_image(photo, &landmarks, &mask).dimensions(), (mask.size, mask.size));
            }
            1 => {
                let landmarks = landmarks(case);
                assert_eq!(base_image(photo, &landmarks, &mask).dimensions(), photo.dimensions());
            }
            2..8 => {
                let landmarks = landmarks(case);
                assert!(outline(&landmarks).len() <= landmarks.len());
            }
            8..14 => drop(portrait(photo, &[(); 5].map(|()| [coordinate(case), coordinate(case)]))?),
            14..20 => {
                let cut = crop.cut(photo, [(); 4].map(|()| coordinate(case))).image;
                assert!(cut.width() > 0 && cut.height() > 0 && cut.width().max(cut.height()) <= 24);
            }
            _ => {
                let found = [Detection {
                    face_box: [(); 4].map(|()| coordinate(case)),
                    points: [(); 5].map(|()| [coordinate(case), coordinate(case)]),
                    score: coordinate(case),
                }];
                let (face, _) = filter.select(photo, &found).map_err(|why| Refusal::Reason(why.detail))?;
                assert!(face.face_box.iter().chain(face.points.as_flattened()).all(|number| number.is_finite()));
            }
        }
        Ok(())
    });
}
