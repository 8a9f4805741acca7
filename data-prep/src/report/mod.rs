//! Report on the photos: counts, `rejected.csv` with every reason, and `contact-sheet.png` to look at.

mod canvas;

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};

use hyperlora_core::files::write_whole_with;
use hyperlora_core::{Error, Result};
use image::{Rgb, RgbImage};
use sha2::{Digest, Sha256};

use crate::face::Detection;
use crate::filter::{Reason, Rejection};
use crate::notes::Notes;
use crate::report::canvas::{Canvas, TEXT_HEIGHT, TEXT_WIDTH};
use crate::shard::FaceRecord;

/// Name of the list of rejected photos in the output folder: CSV with the columns key, reason, detail.
pub const REJECTED_FILE: &str = "rejected.csv";

/// Name of the contact sheet in the output folder.
pub const CONTACT_SHEET_FILE: &str = "contact-sheet.png";

/// Number of pictures on the sheet: of kept faces, and of rejected photos per reason.
const KEPT_SHOWN: usize = 48;
const REJECTED_SHOWN: usize = 16;

const COLUMNS: usize = 8;
const PICTURE: u32 = 136;
const GAP: u32 = 8;
const LINES: u32 = 3;
const CELL_WIDTH: u32 = PICTURE + GAP;
const CELL_HEIGHT: u32 = PICTURE + LINES * TEXT_HEIGHT + GAP;

const INK: Rgb<u8> = Rgb([30, 30, 30]);
const GREEN: Rgb<u8> = Rgb([0, 150, 60]);
const RED: Rgb<u8> = Rgb([200, 30, 30]);
const YELLOW: Rgb<u8> = Rgb([250, 200, 0]);

/// Collects the outcome of each photo, in key order.
pub struct Report {
    dir: PathBuf,
    list: csv::Writer<File>,
    kept: Sample,
    rejected: BTreeMap<Reason, Sample>,
}

/// Photo on the contact sheet.
pub struct Cell {
    /// `None` if nothing could be decoded.
    picture: Option<RgbImage>,
    note: String,
}

impl Cell {
    /// Makes the cell of a photo that could not be decoded.
    pub fn blank() -> Self {
        Self { picture: None, note: String::new() }
    }

    /// Makes the cell of a rejected photo, with the faces found in it.
    pub fn rejected(photo: &RgbImage, found: &[Detection]) -> Self {
        let (mut picture, scale) = thumbnail(photo);
        for face in found {
            picture.frame(face.face_box.map(|x| x * scale), RED);
        }
        Self { picture: Some(picture.into_image()), note: String::new() }
    }

    /// Makes the cell of a kept crop, with its box, its points and the measurements that it was judged by.
    pub fn kept(crop: &RgbImage, record: &FaceRecord, sharpness: f32) -> Self {
        let (mut picture, scale) = thumbnail(crop);
        picture.frame(record.face_box.map(|x| x * scale), GREEN);
        for point in &record.landmarks {
            picture.dot(point.map(|x| x * scale), YELLOW);
        }
        for point in &record.points {
            picture.dot(point.map(|x| x * scale), RED);
        }
        let note = format!("{:.2} sharp {sharpness:.0}", record.score);
        Self { picture: Some(picture.into_image()), note }
    }
}

impl Report {
    /// Starts a report in the existing folder `dir`.
    ///
    /// # Errors
    /// Input or Disk: the folder cannot be written.
    pub fn new(dir: &Path) -> Result<Self> {
        let path = dir.join(REJECTED_FILE);
        let file = File::create(&path).map_err(|source| Error::write(&path, source))?;
        let mut report = Self {
            dir: dir.into(),
            list: csv::Writer::from_writer(file),
            kept: Sample::new(KEPT_SHOWN),
            rejected: BTreeMap::new(),
        };
        report.list_row(["key", "reason", "detail"])?;
        Ok(report)
    }

    /// Counts a kept face.
    pub fn kept(&mut self, key: &str, cell: Cell) {
        let note = cell.note.clone();
        self.kept.add(key, cell, [note, String::new()]);
    }

    /// Counts a rejected photo and adds it to the list.
    ///
    /// # Errors
    /// Disk: the list cannot be written.
    pub fn rejected(&mut self, key: &str, why: &Rejection, cell: Cell) -> Result<()> {
        let lines = [why.reason.name().replace('_', " "), why.detail.clone()];
        self.rejected.entry(why.reason).or_insert_with(|| Sample::new(REJECTED_SHOWN)).add(key, cell, lines);
        self.list_row([key, why.reason.name(), &why.detail])
    }

    /// Returns the number of faces kept so far.
    pub fn kept_count(&self) -> usize {
        self.kept.count
    }

    /// Returns the number of photos rejected so far, by the reason's name.
    pub fn rejected_counts(&self) -> BTreeMap<String, usize> {
        self.rejected.iter().map(|(reason, sample)| (reason.name().to_owned(), sample.count)).collect()
    }

    /// Returns the rejections in words: `no_face 3, blurred 1`.
    pub fn reasons(&self) -> String {
        describe_counts(&self.rejected_counts())
    }

    /// Completes the list and draws the contact sheet, including the notes.
    ///
    /// # Errors
    /// Disk: a full or failing disk.
    pub fn finish(mut self, notes: &Notes) -> Result<()> {
        let list = self.dir.join(REJECTED_FILE);
        self.list.flush().map_err(|source| Error::write(&list, source))?;
        let sheet = self.draw(notes);
        let path = self.dir.join(CONTACT_SHEET_FILE);
        write_whole_with(&path, |file| {
            sheet.write_to(&mut std::io::BufWriter::new(file), image::ImageFormat::Png).map_err(|error| match error {
                image::ImageError::IoError(source) => source,
                other => std::io::Error::other(other),
            })
        })
    }

    fn list_row(&mut self, row: [&str; 3]) -> Result<()> {
        self.list.write_record(row).map_err(|error| {
            let path = self.dir.join(REJECTED_FILE);
            match error.into_kind() {
                csv::ErrorKind::Io(source) => Error::write(&path, source),
                other => Error::Fault(format!("{}: {other:?}", path.display())),
            }
        })
    }

    fn draw(&self, notes: &Notes) -> RgbImage {
        let photos = self.kept.count + self.rejected.values().map(|sample| sample.count).sum::<usize>();
        let kept = (format!("{} of {photos} photos kept", self.kept.count), GREEN, self.kept.in_key_order());
        let left_out = self.rejected.values().flat_map(Sample::in_key_order).collect();
        let left_out = (format!("left out: {}", self.reasons()), RED, left_out);
        let mut sections = if self.rejected.is_empty() { vec![kept] } else { vec![kept, left_out] };
        if !notes.is_empty() {
            sections.push((format!("noted: {notes}"), INK, Vec::new()));
        }

        let title = TEXT_HEIGHT + 2 * GAP;
        let rows = |shown: &Vec<&Shown>| shown.len().div_ceil(COLUMNS) as u32;
        let height = sections.iter().map(|(_, _, shown)| title + rows(shown) * CELL_HEIGHT).sum::<u32>();
        let mut sheet = Canvas::new(GAP + COLUMNS as u32 * CELL_WIDTH, height + GAP);
        let mut top = GAP;
        for (heading, ink, shown) in &sections {
            sheet.text([GAP, top], heading, *ink, sheet.width() / TEXT_WIDTH);
            for (position, entry) in shown.iter().enumerate() {
                let (row, column) = ((position / COLUMNS) as u32, (position % COLUMNS) as u32);
                let corner = [GAP + column * CELL_WIDTH, top + title - GAP + row * CELL_HEIGHT];
                entry.draw(&mut sheet, corner, *ink);
            }
            top += title + rows(shown) * CELL_HEIGHT;
        }
        sheet.into_image()
    }
}

/// Formats counts in words: `no_face 3, blurred 1`; `nothing` if there are none.
pub fn describe_counts(counts: &BTreeMap<String, usize>) -> String {
    if counts.is_empty() {
        return "nothing".into();
    }
    counts.iter().map(|(name, count)| format!("{name} {count}")).collect::<Vec<_>>().join(", ")
}

/// Sample of photos: those whose keys have the smallest hashes. The choice is unbiased and needs a single pass.
struct Sample {
    capacity: usize,
    count: usize,
    shown: BTreeMap<[u8; 32], Shown>,
}

/// Photo that was chosen for the sheet.
struct Shown {
    key: String,
    picture: Option<RgbImage>,
    lines: [String; 2],
}

impl Sample {
    fn new(capacity: usize) -> Self {
        Self { capacity, count: 0, shown: BTreeMap::new() }
    }

    fn add(&mut self, key: &str, cell: Cell, lines: [String; 2]) {
        self.count += 1;
        self.shown.insert(Sha256::digest(key).into(), Shown { key: key.into(), picture: cell.picture, lines });
        if self.shown.len() > self.capacity {
            self.shown.pop_last();
        }
    }

    fn in_key_order(&self) -> Vec<&Shown> {
        let mut shown: Vec<_> = self.shown.values().collect();
        shown.sort_unstable_by(|a, b| a.key.cmp(&b.key));
        shown
    }
}

impl Shown {
    fn draw(&self, sheet: &mut Canvas, [left, top]: [u32; 2], ink: Rgb<u8>) {
        match &self.picture {
            Some(picture) => sheet.picture([left, top], picture),
            None => sheet.crossed_box([left, top], PICTURE, RED),
        }
        let fits = PICTURE / TEXT_WIDTH;
        let lines = [(tail(&self.key, fits as usize), INK), (self.lines[0].clone(), ink), (self.lines[1].clone(), INK)];
        for (line, (text, ink)) in (0..).zip(lines) {
            sheet.text([left, top + PICTURE + 1 + line * TEXT_HEIGHT], &text, ink, fits);
        }
    }
}

/// Returns the end of a key, which is more informative than its beginning.
fn tail(key: &str, fits: usize) -> String {
    let length = key.chars().count();
    if length <= fits { key.into() } else { format!("..{}", key.chars().skip(length + 2 - fits).collect::<String>()) }
}

/// Returns a picture of at most [`PICTURE`] pixels, and its scale.
fn thumbnail(image: &RgbImage) -> (Canvas, f32) {
    let scale = PICTURE as f32 / image.width().max(image.height()).max(1) as f32;
    let size = |side: u32| ((side as f32 * scale).round() as u32).clamp(1, PICTURE);
    let (width, height) = (size(image.width()), size(image.height()));
    let small = if scale < 1.0 {
        image::imageops::thumbnail(image, width, height)
    } else {
        image::imageops::resize(image, width, height, image::imageops::FilterType::Triangle)
    };
    (Canvas::from(small), scale)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn photo(shade: u8) -> RgbImage {
        RgbImage::from_pixel(300, 200, Rgb([shade; 3]))
    }

    #[test]
    fn the_sheet_shows_each_photo_and_the_list_names_each_rejection() {
        let dir = tempfile::tempdir().unwrap();
        let mut report = Report::new(dir.path()).unwrap();
        let plain = |shade| Cell { picture: Some(thumbnail(&photo(shade)).0.into_image()), note: "0.9".into() };
        report.kept("a.png", plain(100));
        report.rejected("b, c.png", &Rejection::new(Reason::NoFace, ""), Cell::rejected(&photo(50), &[])).unwrap();
        report.rejected("d.png", &Rejection::new(Reason::Undecodable, "cut \"off\""), Cell::blank()).unwrap();
        assert_eq!(report.reasons(), "no_face 1, undecodable 1");
        report.finish(&Notes::default()).unwrap();

        let list = std::fs::read_to_string(dir.path().join(REJECTED_FILE)).unwrap();
        assert_eq!(list, "key,reason,detail\n\"b, c.png\",no_face,\nd.png,undecodable,\"cut \"\"off\"\"\"\n");
        let sheet = image::open(dir.path().join(CONTACT_SHEET_FILE)).unwrap().into_rgb8();
        let title = TEXT_HEIGHT + 2 * GAP;
        assert_eq!(sheet.dimensions(), (GAP + 8 * CELL_WIDTH, GAP + 2 * (title + CELL_HEIGHT)));
        let middle = |row: u32, column: u32| {
            let y = GAP + row * (title + CELL_HEIGHT) + title - GAP + 30;
            sheet.get_pixel(GAP + column * CELL_WIDTH + PICTURE / 2, y).0
        };
        assert_eq!(middle(0, 0), [100; 3]);
        assert_eq!(middle(1, 1), [50; 3], "rejections stand in the order of the reasons");
        assert!(sheet.pixels().any(|pixel| *pixel == RED));
    }

    #[test]
    fn a_sample_is_bounded_and_independent_of_the_order() {
        let keys: Vec<String> = (0..200).map(|number| format!("{number}.png")).collect();
        let sample = |keys: &mut dyn Iterator<Item = &String>| {
            let mut sample = Sample::new(5);
            keys.for_each(|key| sample.add(key, Cell::blank(), Default::default()));
            assert_eq!(sample.count, 200);
            sample.in_key_order().iter().map(|shown| shown.key.clone()).collect::<Vec<_>>()
        };
        let forwards = sample(&mut keys.iter());
        assert_eq!(forwards.len(), 5);
        assert_eq!(forwards, sample(&mut keys.iter().rev()));
    }

    #[test]
    fn long_keys_keep_their_end() {
        assert_eq!(tail("orl/s01/1.pgm", 17), "orl/s01/1.pgm");
        assert_eq!(tail("a/very/long/path/to/1.pgm", 10), "..to/1.pgm");
    }
}
