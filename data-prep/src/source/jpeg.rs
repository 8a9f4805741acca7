//! Strict JPEG reader. The decoder of `image` fills the missing parts of a damaged or truncated file with grey; here
//! that is an error.

use std::borrow::Cow;

use image::{ColorType, DynamicImage, ImageBuffer};
use zune_core::bytestream::ZCursor;
use zune_core::colorspace::ColorSpace;
use zune_core::options::DecoderOptions;
use zune_jpeg::JpegDecoder;

/// Decodes the picture in `bytes`, of this size and these colours, as `image` would.
///
/// # Errors
/// Reason why it is incomplete.
pub(super) fn decode(bytes: &[u8], [width, height]: [u32; 2], colours: ColorType) -> Result<DynamicImage, String> {
    let outline = Outline::of(bytes).ok_or("the file ends before its picture does")?;
    let picture = outline.guarded(bytes);
    let (space, channels) = match colours {
        ColorType::L8 => (ColorSpace::Luma, 1),
        _ => (ColorSpace::RGB, 3),
    };
    // Bytes between headers and unknown segments do no harm: only the picture itself is read strictly.
    let lenient = DecoderOptions::default()
        .set_strict_mode(false)
        .set_max_width(usize::MAX)
        .set_max_height(usize::MAX)
        .jpeg_set_out_colorspace(space);
    let mut decoder = JpegDecoder::new_with_options(ZCursor::new(&*picture), lenient);
    // Some of its messages are quoted.
    let words = |error: zune_jpeg::errors::DecodeErrors| error.to_string().trim_matches('"').to_owned();
    decoder.decode_headers().map_err(words)?;
    decoder.set_options(lenient.set_strict_mode(true));
    let mut pixels = vec![0; width as usize * height as usize * channels];
    decoder.decode_into(&mut pixels).map_err(words)?;
    let decoded = match colours {
        ColorType::L8 => ImageBuffer::from_raw(width, height, pixels).map(DynamicImage::ImageLuma8),
        _ => ImageBuffer::from_raw(width, height, pixels).map(DynamicImage::ImageRgb8),
    };
    decoded.ok_or_else(|| "its size is not what its header says".into())
}

/// Codes of the markers used here (ITU T.81, table B.1).
mod marker {
    pub(super) const PROGRESSIVE: u8 = 0xc2;
    pub(super) const START: u8 = 0xd8;
    pub(super) const END: u8 = 0xd9;
    pub(super) const SCAN: u8 = 0xda;

    /// Tells whether a marker stands alone, without the length of a segment.
    pub(super) fn stands_alone(code: u8) -> bool {
        matches!(code, 0x01 | 0xd0..=START)
    }
}

/// Structure of a file's first picture, according to its markers.
#[derive(Debug, PartialEq, Eq)]
struct Outline {
    /// Position of its end marker. Cameras append more: previews, depth, a film.
    end: usize,
    scans: usize,
    progressive: bool,
}

impl Outline {
    /// Walks from marker to marker. Returns `None` if the file ends before the end marker.
    fn of(bytes: &[u8]) -> Option<Self> {
        let mut outline = Self { end: 0, scans: 0, progressive: false };
        let mut at = 0;
        loop {
            at = next_marker(bytes, at)?;
            match bytes[at] {
                marker::END => return Some(Self { end: at - 1, ..outline }),
                code if marker::stands_alone(code) => at += 1,
                code => {
                    outline.scans += usize::from(code == marker::SCAN);
                    outline.progressive |= code == marker::PROGRESSIVE;
                    let length = u16::from_be_bytes([*bytes.get(at + 1)?, *bytes.get(at + 2)?]);
                    at += 1 + usize::from(length);
                }
            }
        }
    }

    /// Returns the picture with a guard of one-bits after its last scan. No Huffman code is all ones (ITU T.81, C.2),
    /// so a decoder that runs out of data fails there; at the end marker it would continue with zeros. For the same
    /// reason the end marker is omitted if the decoder does not require it. A progressive picture with one scan stays
    /// unchanged, because the decoder requires the marker right after that scan.
    fn guarded<'a>(&self, bytes: &'a [u8]) -> Cow<'a, [u8]> {
        const GUARD: usize = 16;
        let picture = &bytes[..self.end];
        if self.progressive && self.scans == 1 {
            return Cow::Borrowed(&bytes[..self.end + 2]);
        }
        let mut guarded = [picture, &[0xff, 0x00].repeat(GUARD)].concat();
        if self.progressive {
            guarded.extend([0xff, marker::END]);
        }
        Cow::Owned(guarded)
    }
}

/// Returns the position of the next marker's code, from `at` on. A 0xFF in the picture's data is followed by 0, which
/// is not a code.
fn next_marker(bytes: &[u8], mut at: usize) -> Option<usize> {
    loop {
        at += bytes.get(at..)?.iter().position(|byte| *byte == 0xff)?;
        at += bytes[at..].iter().position(|byte| *byte != 0xff)?;
        if bytes[at] != 0 {
            return Some(at);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Small files of libjpeg-turbo: 40 x 40 pixels, 4:2:0.
    const FILES: [(&str, &[u8]); 3] = [
        ("baseline", include_bytes!("../../tests/fixtures/jpeg/baseline.jpg")),
        ("progressive", include_bytes!("../../tests/fixtures/jpeg/progressive.jpg")),
        ("restarts", include_bytes!("../../tests/fixtures/jpeg/restarts.jpg")),
    ];

    #[test]
    fn whole_files_decode_as_image_decodes_them_and_what_follows_them_does_no_harm() {
        for (name, bytes) in FILES {
            let lenient = image::load_from_memory(bytes).unwrap();
            let strict = |bytes: &[u8]| decode(bytes, [40, 40], ColorType::Rgb8);
            assert_eq!(strict(bytes).as_ref(), Ok(&lenient), "{name}");
            let more = [bytes, b"MotionPhoto_Data", bytes, b"\xff"].concat();
            assert_eq!(strict(&more).as_ref(), Ok(&lenient), "{name}");
        }
    }

    #[test]
    fn no_cut_file_decodes_not_even_with_an_end_put_on_it() {
        for (name, bytes) in FILES {
            let scan = next_scan(bytes);
            for cut in 2..bytes.len() - 2 {
                assert!(decode(&bytes[..cut], [40, 40], ColorType::Rgb8).is_err(), "{name} cut at {cut}");
                // A progressive file may end after any of its scans: it is then coarse, not damaged.
                if name != "progressive" && cut > scan && cut < bytes.len() - 8 {
                    let ended = [&bytes[..cut], b"\xff\xd9"].concat();
                    assert!(decode(&ended, [40, 40], ColorType::Rgb8).is_err(), "{name} ended at {cut}");
                }
            }
        }
    }

    #[test]
    fn a_progressive_file_of_one_scan_is_coarse_and_whole() {
        let (_, bytes) = FILES[1];
        let scan = next_scan(bytes) + 2;
        let data = scan + usize::from(u16::from_be_bytes([bytes[scan], bytes[scan + 1]]));
        let cut = next_marker(bytes, data).unwrap() - 1;
        let coarse = [&bytes[..cut], b"\xff\xd9"].concat();
        assert_eq!(Outline::of(&coarse).unwrap().scans, 1);
        assert!(decode(&coarse, [40, 40], ColorType::Rgb8).is_ok());
    }

    fn next_scan(bytes: &[u8]) -> usize {
        bytes.windows(2).position(|pair| pair == [0xff, marker::SCAN]).unwrap()
    }

    #[test]
    fn markers_are_found_and_what_stands_in_segments_is_none() {
        let bytes =
            b"\xff\xd8\xff\xe1\0\x06\xff\xd9\xff\xd8 junk\xff\xff\xda\0\x02ab\xff\0c\xff\xd0d\xff\xd9 film \xff\xd9";
        assert_eq!(Outline::of(bytes), Some(Outline { end: 28, scans: 1, progressive: false }));
        for cut in 0..30 {
            assert_eq!(Outline::of(&bytes[..cut]), None, "{cut}");
        }
    }
}
