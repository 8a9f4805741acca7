//! Last value of every scalar, read back from event files.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use hyperlora_core::paths::open_regular;
use hyperlora_core::{Error, Result};
use prost::Message;

use crate::metrics::event::{Content, Event, What};
use crate::metrics::tensorboard::masked_crc;

/// Maximum record size in bytes for scalars; longer records hold pictures.
const LONGEST_OF_SCALARS: u64 = 1 << 20;

/// Last values of the curves in a folder.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct LastScalars {
    /// Values by tag, such as `loss/id_clip`.
    pub values: BTreeMap<String, f64>,
    /// Last step with a scalar in the newest file; `None` if its process has written none yet.
    pub step: Option<u64>,
    /// Time of that scalar, in seconds since 1970.
    pub written: Option<f64>,
}

impl LastScalars {
    /// Reads the event files of `folder`, from the newest back to one that holds scalars. Skips an incomplete record at
    /// the end, which an active writer leaves. A missing folder holds nothing.
    ///
    /// # Errors
    /// Input or Disk: a file cannot be read.
    pub fn read(folder: &Path) -> Result<Self> {
        let mut last = Self::default();
        for (age, path) in event_files(folder).map_err(|source| Error::read(folder, source))?.into_iter().enumerate() {
            let mut file = Self::default();
            file.read_file(&path).map_err(|source| Error::read(&path, source))?;
            if age == 0 {
                (last.step, last.written) = (file.step, file.written);
            }
            if !file.values.is_empty() {
                last.values = file.values;
                break;
            }
        }
        Ok(last)
    }

    fn read_file(&mut self, path: &Path) -> io::Result<()> {
        let mut file = BufReader::new(open_regular(path)?);
        let end = file.get_ref().metadata()?.len();
        let mut at = 0;
        let mut head = [0; 12];
        while at + 12 <= end {
            file.read_exact(&mut head)?;
            let (length, checksum) = head.split_at(8);
            if masked_crc(length) != checksum {
                break;
            }
            let length = u64::from_le_bytes(head[..8].try_into().unwrap_or_default());
            let Some(next) = at.checked_add(16).and_then(|at| at.checked_add(length)).filter(|next| *next <= end)
            else {
                break;
            };
            if length <= LONGEST_OF_SCALARS {
                let mut record = vec![0; length as usize];
                file.read_exact(&mut record)?;
                if let Ok(event) = Event::decode(&record[..]) {
                    self.note(event);
                }
            }
            file.seek(SeekFrom::Start(next))?;
            at = next;
        }
        Ok(())
    }

    fn note(&mut self, event: Event) {
        let Some(What::Summary(summary)) = event.what else { return };
        for value in summary.value {
            if let Some(Content::Scalar(number)) = value.content {
                self.values.insert(value.tag, number.into());
                self.step = u64::try_from(event.step).ok();
                self.written = Some(event.wall_time);
            }
        }
    }
}

/// Lists event files, newest first; their names hold their start time.
fn event_files(folder: &Path) -> io::Result<Vec<PathBuf>> {
    let entries = match fs::read_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let mut files = entries.map(|entry| Ok(entry?.path())).collect::<io::Result<Vec<_>>>()?;
    files.retain(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("events.out.")));
    files.sort();
    files.reverse();
    Ok(files)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use image::RgbImage;

    use super::*;
    use crate::metrics::MetricsWriter;

    #[test]
    fn the_last_values_are_those_of_the_newest_file_that_has_any() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(LastScalars::read(&folder.path().join("none")).unwrap(), LastScalars::default());
        let mut writer = MetricsWriter::create(folder.path(), 1).unwrap();
        for step in 1..=3 {
            writer.scalars(step, &[("loss/base", 0.5 * step as f64), ("speed/images_per_second", 8.0)]);
            let noise =
                RgbImage::from_fn(700, 700, |x, y| image::Rgb([(x * y) as u8, (x ^ y) as u8, (x * x + y) as u8]));
            writer.image(step, "samples/base", &noise);
        }
        // An active writer has written half of a record.
        let mut file = fs::OpenOptions::new().append(true).open(writer.path()).unwrap();
        let length = 50_u64.to_le_bytes();
        file.write_all(&[&length[..], &masked_crc(&length), b"half"].concat()).unwrap();
        let last = LastScalars::read(folder.path()).unwrap();
        assert_eq!((last.step, last.values["loss/base"], last.values.len()), (Some(3), 1.5, 2));

        // A new process has started and has no scalar yet.
        MetricsWriter::create(folder.path(), 3).unwrap();
        let last = LastScalars::read(folder.path()).unwrap();
        assert_eq!((last.step, last.values["loss/base"]), (None, 1.5));
    }
}
