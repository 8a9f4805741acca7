//! Consistency check of the sizes in a WebP file (RFC 9649), before a decoder trusts one of them: it would allocate a
//! frame of 16383 x 16383 before it sees that the picture is 17 x 13.

/// Checks that every chunk is inside the file, and that every frame has the size announced for the picture or the
/// animation's frame. All other errors are left to the decoder.
///
/// # Errors
/// A description of the contradiction.
pub(super) fn check(file: &[u8]) -> Result<(), String> {
    let mut rest = file.get(12..).unwrap_or_default();
    let mut picture = None;
    while let Some((name, content, behind)) = next(rest)? {
        rest = behind;
        match name {
            b"VP8X" => picture = content.get(4..10).map(size),
            b"ANMF" => {
                let frame = content.get(6..12).map(size);
                let mut rest = content.get(16..).unwrap_or_default();
                while let Some((name, content, behind)) = next(rest)? {
                    rest = behind;
                    compare(name, content, frame)?;
                }
            }
            _ => compare(name, content, picture)?,
        }
    }
    Ok(())
}

/// Name and content of a chunk, and the bytes that follow it.
type Chunk<'a> = (&'a [u8; 4], &'a [u8], &'a [u8]);

/// Reads the first chunk of `file`. Returns `None` at the end.
fn next(file: &[u8]) -> Result<Option<Chunk<'_>>, String> {
    let Some(([name @ .., a, b, c, d], rest)) = file.split_first_chunk::<8>() else { return Ok(None) };
    let length = u32::from_le_bytes([*a, *b, *c, *d]) as usize;
    let (content, rest) = rest
        .split_at_checked(length)
        .ok_or_else(|| format!("the file ends within its chunk {}", name.escape_ascii()))?;
    // The next chunk begins at an even position.
    Ok(Some((name, content, rest.get(length % 2..).unwrap_or_default())))
}

/// Reads width and height, each minus 1 in three bytes.
fn size(bytes: &[u8]) -> [u32; 2] {
    let number = |place: usize| (0..3).rev().fold(1, |sum, byte| sum + (u32::from(bytes[place + byte]) << (8 * byte)));
    [number(0), number(3)]
}

/// Compares the size in a lossy frame's own header with the announced one.
fn compare(name: &[u8; 4], content: &[u8], announced: Option<[u32; 2]>) -> Result<(), String> {
    let (b"VP8 ", Some(&[a, b, c, d]), Some([width, height])) = (name, content.get(6..10), announced) else {
        return Ok(());
    };
    // The two highest bits encode scaling.
    let own = [[a, b], [c, d]].map(|bytes| u32::from(u16::from_le_bytes(bytes) & 0x3fff));
    if own == [width, height] {
        return Ok(());
    }
    Err(format!("a frame of {} x {} pixels is in a picture of {width} x {height}", own[0], own[1]))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chunk(name: &[u8; 4], content: &[u8]) -> Vec<u8> {
        let padding = if content.len() % 2 == 1 { &[0][..] } else { &[] };
        [name, &(content.len() as u32).to_le_bytes()[..], content, padding].concat()
    }

    fn file(chunks: &[Vec<u8>]) -> Vec<u8> {
        [&b"RIFF\0\0\0\0WEBP"[..], &chunks.concat()].concat()
    }

    /// Makes the beginning of a lossy frame.
    fn frame(width: u16, height: u16) -> Vec<u8> {
        let header = [&[0; 3][..], &[0x9d, 1, 0x2a], &width.to_le_bytes(), &height.to_le_bytes(), &[7]].concat();
        chunk(b"VP8 ", &header)
    }

    #[test]
    fn a_frame_is_as_large_as_what_it_is_of() {
        let canvas = chunk(b"VP8X", &[0, 0, 0, 0, 16, 0, 0, 12, 0, 0]);
        let animated = |frame: Vec<u8>| chunk(b"ANMF", &[&[0; 6][..], &[4, 0, 0, 5, 0, 0], &[0; 4], &frame].concat());
        for good in [
            vec![frame(17, 13)],
            vec![canvas.clone(), frame(17, 13)],
            // It asks to be shown larger.
            vec![canvas.clone(), frame(0x11 | 0x4000, 0x0d | 0x8000)],
            vec![canvas.clone(), animated(frame(5, 6))],
        ] {
            check(&file(&good)).unwrap();
        }
        for bad in [frame(16383, 16383), animated(frame(17, 13))] {
            let problem = check(&file(&[canvas.clone(), chunk(b"EXIF", b"odd"), bad])).unwrap_err();
            assert!(problem.starts_with("a frame of 1"), "{problem}");
        }
    }

    #[test]
    fn a_chunk_lies_in_the_file() {
        let mut cut = file(&[chunk(b"VP8X", &[0; 10]), chunk(b"EXIF", &[0; 30])]);
        check(&cut).unwrap();
        cut.pop();
        assert_eq!(check(&cut).unwrap_err(), "the file ends within its chunk EXIF");
        check(b"RIFF").unwrap();
    }
}
