//! TensorBoard event files: `TFRecord` frames around protobuf events, one `write` per event.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Cursor, Seek, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use hyperlora_core::text::mask_urls;
use hyperlora_core::{Error, Result};
use image::{ImageFormat, RgbImage};
use prost::Message;

use crate::metrics::event::{
    Content, Dim, Event, Image, PluginData, SESSION_START, SessionLog, Summary, SummaryMetadata, Tensor, TensorShape,
    Value, What,
};

const RGB: i32 = 3;
const STRING: i32 = 7;

/// Writes one event file. Monitoring never stops a run: after the first error, such as a full disk, later calls do
/// nothing. [`take_error`](Self::take_error) returns that error.
///
/// # Examples
/// ```
/// use burn_hyperlora::metrics::MetricsWriter;
///
/// # let folder = tempfile::tempdir().expect("a temporary folder");
/// # let folder = folder.path();
/// let mut curves = MetricsWriter::create(&folder.join("tensorboard"), 1)?;
/// curves.scalar(1, "loss", 0.12);
/// curves.text(1, "notes", "first step");
/// assert!(curves.take_error().is_none());
/// # Ok::<(), hyperlora_core::Error>(())
/// ```
#[derive(Debug)]
pub struct MetricsWriter {
    path: PathBuf,
    /// `None` once a write has failed.
    file: Option<File>,
    error: Option<Error>,
}

impl MetricsWriter {
    /// Creates a new event file in `folder`, and the folder if absent.
    ///
    /// `first_step` is the first step that this process will write. TensorBoard drops that step and later ones from
    /// older files in the folder, so a resumed run shows each step once.
    ///
    /// # Errors
    /// Input: a folder that cannot be written to; Disk: a failing disk.
    pub fn create(folder: &Path, first_step: u64) -> Result<Self> {
        let failed = |source| Error::write(folder, source);
        fs::create_dir_all(folder).map_err(failed)?;
        // TensorBoard reads files in name order, so the time in the name must be later than any other's.
        let now = seconds_since_1970() as u64;
        let seconds = latest_start(folder).map_err(failed)?.map_or(now, |latest| now.max(latest + 1));
        // Other programs put the host name between the numbers; it is left out because recipients of the file need not
        // know it.
        let name = format!("events.out.tfevents.{seconds:010}.hyperlora.{}", std::process::id());
        Self::append_to(&folder.join(name), first_step)
    }

    fn append_to(path: &Path, first_step: u64) -> Result<Self> {
        let file = OpenOptions::new().append(true).create(true).open(path).map_err(|e| Error::write(path, e))?;
        let mut writer = Self { path: path.into(), file: Some(file), error: None };
        writer.event(0, What::FileVersion("brain.Event:2".into()));
        writer.event(first_step, What::SessionLog(SessionLog { status: SESSION_START }));
        Ok(writer)
    }

    /// Path of the event file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Writes one scalar.
    pub fn scalar(&mut self, step: u64, tag: &str, value: f64) {
        self.scalars(step, &[(tag, value)]);
    }

    /// Writes several scalars of one step.
    pub fn scalars(&mut self, step: u64, values: &[(impl AsRef<str>, f64)]) {
        let value = values
            .iter()
            .map(|(tag, value)| Value {
                tag: tag.as_ref().into(),
                metadata: None,
                content: Some(Content::Scalar(*value as f32)),
            })
            .collect();
        self.event(step, What::Summary(Summary { value }));
    }

    /// Writes a picture.
    pub fn image(&mut self, step: u64, tag: &str, picture: &RgbImage) {
        let mut png = Cursor::new(Vec::new());
        if let Err(problem) = picture.write_to(&mut png, ImageFormat::Png) {
            self.fail(Error::Fault(format!("{tag}: the picture cannot be encoded as PNG: {problem}")));
            return;
        }
        let image = Image {
            height: picture.height() as i32,
            width: picture.width() as i32,
            colorspace: RGB,
            encoded_image_string: png.into_inner(),
        };
        let value = Value { tag: tag.into(), metadata: None, content: Some(Content::Image(image)) };
        self.event(step, What::Summary(Summary { value: vec![value] }));
    }

    /// Writes a text, which TensorBoard shows as Markdown.
    pub fn text(&mut self, step: u64, tag: &str, text: &str) {
        let plugin_data = Some(PluginData { plugin_name: "text".into() });
        let tensor = Tensor {
            dtype: STRING,
            shape: Some(TensorShape { dim: vec![Dim { size: 1 }] }),
            string_val: vec![mask_urls(text).into()],
        };
        let value = Value {
            tag: tag.into(),
            metadata: Some(SummaryMetadata { plugin_data }),
            content: Some(Content::Tensor(tensor)),
        };
        self.event(step, What::Summary(Summary { value: vec![value] }));
    }

    /// Takes the error that stopped the writing, for the log and the final report; returns it once.
    pub fn take_error(&mut self) -> Option<Error> {
        self.error.take()
    }

    fn event(&mut self, step: u64, what: What) {
        let Some(file) = &mut self.file else { return };
        let event = Event { wall_time: seconds_since_1970(), step: step as i64, what: Some(what) };
        if let Err(source) = append(file, &frame(&event.encode_to_vec())) {
            self.fail(Error::write(&self.path, source));
        }
    }

    fn fail(&mut self, error: Error) {
        self.file = None;
        self.error = Some(error);
    }
}

/// Appends a whole record or nothing.
fn append(file: &mut File, record: &[u8]) -> io::Result<()> {
    let end = file.seek(io::SeekFrom::End(0))?;
    file.write_all(record).inspect_err(|_| {
        // The error of the write is the one to report. Readers skip an incomplete record at the end, so a failed
        // truncation does no harm.
        let _ = file.set_len(end);
    })
}

/// Frames a `TFRecord`: length and data, each followed by its masked CRC-32C, little-endian.
fn frame(data: &[u8]) -> Vec<u8> {
    let length = (data.len() as u64).to_le_bytes();
    [&length[..], &masked_crc(&length), data, &masked_crc(data)].concat()
}

pub(super) fn masked_crc(data: &[u8]) -> [u8; 4] {
    crc32c::crc32c(data).rotate_right(15).wrapping_add(0xa282_ead8).to_le_bytes()
}

fn seconds_since_1970() -> f64 {
    // A clock before 1970 only shifts points along TensorBoard's time axis.
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}

/// Returns the latest start time in the names of the folder's event files.
fn latest_start(folder: &Path) -> io::Result<Option<u64>> {
    let mut latest = None;
    for entry in fs::read_dir(folder)? {
        let name = entry?.file_name();
        let name = name.to_string_lossy();
        let start = name.strip_prefix("events.out.tfevents.").and_then(|rest| rest.split('.').next()?.parse().ok());
        latest = latest.max(start);
    }
    Ok(latest)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Reads every event of a file, and checks both checksums of each record.
    fn events(path: &Path) -> Vec<Event> {
        let bytes = fs::read(path).unwrap();
        let mut rest = &bytes[..];
        let mut events = Vec::new();
        while !rest.is_empty() {
            let (length, after) = rest.split_at(8);
            let size = u64::from_le_bytes(length.try_into().unwrap()) as usize;
            let data = &after[4..4 + size];
            assert_eq!(after[..4], masked_crc(length));
            assert_eq!(after[4 + size..8 + size], masked_crc(data));
            events.push(Event::decode(data).unwrap());
            rest = &after[8 + size..];
        }
        events
    }

    #[test]
    fn the_checksum_is_tensorflows() {
        // CRC-32C of "123456789" is 0xe3069283 (RFC 3720); the mask rotates it right by 15 and adds 0xa282ead8.
        assert_eq!(u32::from_le_bytes(masked_crc(b"123456789")), 0xc78a_b0e5);
    }

    #[test]
    fn events_are_what_was_given() {
        let folder = tempfile::tempdir().unwrap();
        let mut writer = MetricsWriter::create(folder.path(), 7).unwrap();
        writer.scalars(8, &[("loss/base", 0.5), ("lr", 1e-4)]);
        writer.image(8, "samples", &RgbImage::new(4, 2));
        assert!(writer.take_error().is_none());

        let events = events(writer.path());
        assert_eq!(events[0].what, Some(What::FileVersion("brain.Event:2".into())));
        assert_eq!((events[1].step, &events[1].what), (7, &Some(What::SessionLog(SessionLog { status: 1 }))));
        let Some(What::Summary(scalars)) = &events[2].what else { unreachable!("a summary was written") };
        assert_eq!(scalars.value[1].tag, "lr");
        assert_eq!(scalars.value[1].content, Some(Content::Scalar(1e-4)));
        let Some(What::Summary(image)) = &events[3].what else { unreachable!("a summary was written") };
        let Some(Content::Image(image)) = &image.value[0].content else { unreachable!("an image was written") };
        assert_eq!((image.width, image.height), (4, 2));
        assert!(image.encode_to_vec().windows(4).any(|bytes| bytes == b"\x89PNG"));
    }

    #[test]
    fn a_later_file_has_a_later_name() {
        let folder = tempfile::tempdir().unwrap();
        let paths = [0, 1, 2].map(|step| MetricsWriter::create(folder.path(), step).unwrap().path().to_path_buf());
        assert!(paths.is_sorted_by(|earlier, later| earlier < later), "{paths:?}");
        let name = paths[0].file_name().unwrap().to_string_lossy();
        let parts: Vec<&str> = name.split('.').collect();
        assert_eq!((parts[..3].join("."), parts[4]), ("events.out.tfevents".into(), "hyperlora"));
        // Older files have the host name there.
        let old = folder.path().join("events.out.tfevents.9999999998.gpu07.example.org.4711");
        fs::write(old, "").unwrap();
        let after = MetricsWriter::create(folder.path(), 3).unwrap();
        let name = after.path().file_name().unwrap().to_string_lossy();
        assert!(name.starts_with("events.out.tfevents.9999999999."), "{name}");
    }

    #[test]
    fn a_full_disk_is_told_once_and_survived() {
        // Every write to /dev/full fails with ENOSPC.
        let mut writer = MetricsWriter::append_to(Path::new("/dev/full"), 0).unwrap();
        writer.scalar(1, "loss", 1.0);
        let error = writer.take_error().unwrap();
        assert_eq!(error.exit_code(), 1);
        assert!(error.to_string().contains("/dev/full") && error.to_string().contains("free some space"), "{error}");
        writer.scalar(2, "loss", 1.0);
        assert!(writer.take_error().is_none());
    }

    #[test]
    fn a_folder_that_cannot_be_made_is_the_users_to_mend() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("file"), "").unwrap();
        let error = MetricsWriter::create(&folder.path().join("file/tensorboard"), 0).unwrap_err();
        assert_eq!(error.exit_code(), 2);
    }
}
