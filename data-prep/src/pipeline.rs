//! The whole of `data-prep build`: source -> face -> filter -> crop -> caption -> shard.

use std::cmp::Reverse;
use std::collections::{BTreeMap, HashMap};
use std::io::{Cursor, ErrorKind};
use std::num::NonZeroUsize;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use hyperlora_core::files::{StagedFolder, apart};
use hyperlora_core::hash::hex;
use hyperlora_core::signals::StopFlag;
use hyperlora_core::{Error, Result, config};
use image::codecs::png::{CompressionType, FilterType, PngEncoder};
use image::{ImageEncoder, RgbImage};
use rayon::prelude::*;
use schemars::{JsonSchema, Schema};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::caption::Captioner;
use crate::crop::CropConfig;
use crate::face::{FaceAnalyser, FaceConfig, FaceModels, Upright};
use crate::filter::{FilterConfig, Reason, Rejection};
use crate::notes::Notes;
use crate::prepared::PREPARED;
use crate::report::{Cell, Report};
use crate::shard::{FaceRecord, Manifest, SCHEMA_VERSION, ShardConfig, ShardWriter, Written};
use crate::source::{DecodeConfig, Decoded, Photo, Source, SourceConfig, SourceFiles};

/// YAML of `data-prep build`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(title = "Data preparation", transform = add_earlier_names)]
pub struct PrepConfig {
    /// Source of the photos.
    pub source: SourceConfig,
    /// Resource limits per photo.
    #[serde(default)]
    pub decode: DecodeConfig,
    /// Face models.
    #[serde(default)]
    // Name in the YAML files of earlier versions.
    #[serde(alias = "face")]
    pub faces: FaceConfig,
    /// Requirements for a face.
    #[serde(default)]
    pub filter: FilterConfig,
    /// Extent of the photo around the face.
    #[serde(default)]
    pub crop: CropConfig,
    /// Captions. They have no placeholders: a name in the caption would let the text encoder do what the hypernetwork
    /// has to learn.
    pub caption: Captioner,
    /// Sizes of row groups and files.
    #[serde(default)]
    pub shards: ShardConfig,
}

/// Adds to the schema the aliases, which the derive leaves out.
fn add_earlier_names(schema: &mut Schema) {
    let Some(keys) = schema.get_mut("properties").and_then(serde_json::Value::as_object_mut) else { return };
    if let Some(mut faces) = keys.get("faces").cloned() {
        faces["deprecated"] = true.into();
        keys.insert("face".into(), faces);
    }
}

/// Progress of the build.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// Photos processed.
    pub done: usize,
    /// Photos in the source.
    pub total: usize,
    /// Faces kept.
    pub kept: usize,
}

/// Photos in flight per worker: enough that no worker waits for the slowest, few enough to bound memory.
const PHOTOS_PER_WORKER: usize = 4;

impl PrepConfig {
    /// Reads and checks the YAML at `path`.
    ///
    /// # Errors
    /// Input: as [`config::load`], or a value out of its range.
    pub fn load(path: &Path) -> Result<Self> {
        let config: Self = config::load(path)?;
        let place = |key: &str| format!("{}: {key}", path.display());
        config.decode.validate(&place("decode"))?;
        config.faces.validate(&place("faces"))?;
        config.filter.validate(&place("filter"))?;
        config.crop.validate(&place("crop"))?;
        config.caption.validate(&place("caption"))?;
        config.shards.validate(&place("shards"))?;
        Ok(config)
    }
}

/// Prepares the photos of `config` into the folder `out`, which appears whole or not at all. Relative paths of `config`
/// start at `base_dir`. The bytes in `out` depend on the photos, the models and the config, but not on `workers`.
/// Returns `None`, with nothing changed, if `stop` was raised before the end.
///
/// # Errors
/// Input: `out` contains something else, is inside the source or around it, or is being written by another process; the
/// source or a model is missing; no photo contains a usable face. Disk: a full or failing disk. An existing folder at
/// `out` then stays.
///
/// # Examples
/// ```no_run
/// use std::num::NonZeroUsize;
/// use std::path::Path;
/// use data_prep::pipeline::{PrepConfig, build};
/// use hyperlora_core::signals::StopFlag;
///
/// let yaml_folder = Path::new("experiments/quickstart");
/// let config = PrepConfig::load(&yaml_folder.join("data.yaml"))?;
/// let stop = StopFlag::install()?;
/// let mut progress = |progress: data_prep::pipeline::Progress| println!("{} of {}", progress.done, progress.total);
/// let manifest = build(&config, yaml_folder, Path::new("shards"), NonZeroUsize::MIN, &stop, &mut progress)?;
/// println!("{:?} faces kept", manifest.map(|manifest| manifest.kept));
/// # Ok::<(), hyperlora_core::Error>(())
/// ```
pub fn build(
    config: &PrepConfig,
    base_dir: &Path,
    out: &Path,
    workers: NonZeroUsize,
    stop: &StopFlag,
    progress: &mut dyn FnMut(Progress),
) -> Result<Option<Manifest>> {
    // 1. Refuse everything that can be refused before the work begins.
    apart(out, config.source.places(base_dir)?)?;
    apart(out, [config.faces.models.resolve(base_dir)?])?;
    let staged = StagedFolder::new(out, PREPARED)?;
    let Source { photos, files, notes } = config.source.open(base_dir, config.caption.reads_files())?;
    let models = FaceModels::find(&config.faces, base_dir)?.fingerprints()?;
    let analysers = Analysers::load(config, base_dir, workers, &files)?;

    // 2. Process the photos in key order, a chunk at a time.
    let mut build = Build {
        writer: ShardWriter::new(staged.path(), &config.shards, &models),
        report: Report::new(staged.path())?,
        notes,
        splits: BTreeMap::new(),
    };
    let mut first_of = analysers.labelled_copies(&photos);
    let mut done = 0;
    for chunk in photos.chunks(workers.get() * PHOTOS_PER_WORKER) {
        if stop.raised_by().is_some() {
            return Ok(None);
        }
        let files = analysers.read_all(chunk);
        let files = chunk.iter().zip(files).map(|(photo, file)| {
            let file = file?;
            let first = *first_of.entry(file.sha256).or_insert(&photo.key);
            Ok((file, (first != photo.key).then_some(first)))
        });
        let files = files.collect();
        for (photo, outcome) in chunk.iter().zip(analysers.process_all(chunk, files)) {
            build.take(photo, outcome?)?;
        }
        done += chunk.len();
        progress(Progress { done, total: photos.len(), kept: build.report.kept_count() });
    }

    // 3. Report it to the user if nothing is usable. Otherwise, everything becomes visible at once.
    let manifest = build.finish(staged.path(), config, photos.len(), models)?;
    staged.commit()?;
    Ok(Some(manifest))
}

/// Content of a shard folder while it is made.
struct Build {
    writer: ShardWriter,
    report: Report,
    notes: Notes,
    /// Kept faces by split.
    splits: BTreeMap<String, usize>,
}

impl Build {
    /// Adds a processed photo.
    fn take(&mut self, photo: &Photo, outcome: Outcome) -> Result<()> {
        match outcome {
            Outcome::Kept { record, cell, changes } => {
                changes.iter().for_each(|change| self.notes.add(change, &photo.key));
                if let Some(split) = &record.split {
                    *self.splits.entry(split.clone()).or_insert(0) += 1;
                }
                self.report.kept(&photo.key, cell);
                self.writer.push(*record)
            }
            Outcome::Rejected { why, cell } => {
                tracing::debug!("{}: {} {}", photo.key, why.reason.name(), why.detail);
                self.report.rejected(&photo.key, &why, cell)
            }
        }
    }

    /// Writes what remains, the report and the manifest into `folder`.
    ///
    /// # Errors
    /// Input: no photo holds a usable face. Disk: a full or failing disk.
    fn finish(
        self,
        folder: &Path,
        config: &PrepConfig,
        photos: usize,
        models: BTreeMap<String, String>,
    ) -> Result<Manifest> {
        let Self { writer, report, notes, splits } = self;
        if report.kept_count() == 0 {
            let problem = format!("none of {photos} photos holds a usable face ({})", report.reasons());
            return Err(Error::input("source", problem, "check the photos and the filter's thresholds"));
        }
        let Written { shards, index } = writer.finish()?;
        let manifest = Manifest {
            schema_version: SCHEMA_VERSION,
            photos,
            kept: report.kept_count(),
            splits,
            rejected: report.rejected_counts(),
            notes,
            models,
            shards,
            index,
            config: as_json(config)?,
        };
        report.finish(&manifest.notes)?;
        manifest.write(folder)?;
        Ok(manifest)
    }
}

/// File of a photo in memory.
struct PhotoFile {
    bytes: Vec<u8>,
    sha256: [u8; 32],
}

/// File of a photo, or the reason why it is missing.
type ReadOutcome = std::result::Result<PhotoFile, Rejection>;

/// File of a photo with the key of an earlier one that has the same bytes.
type FileOutcome<'a> = std::result::Result<(PhotoFile, Option<&'a str>), Rejection>;

fn read(photo: &Photo, config: &PrepConfig, files: &SourceFiles) -> ReadOutcome {
    let limit = config.decode.max_bytes;
    let unreadable = |error: std::io::Error| match error.kind() {
        ErrorKind::FileTooLarge => format!("its file is larger than decode.max_bytes allows ({limit})"),
        _ => format!("it cannot be read: {error}"),
    };
    let bytes = files.read(&photo.path, limit);
    let bytes = bytes.map_err(|error| Rejection::new(Reason::Undecodable, unreadable(error)))?;
    let sha256 = Sha256::digest(&bytes).into();
    Ok(PhotoFile { bytes, sha256 })
}

/// Result for one photo.
enum Outcome {
    Kept {
        record: Box<FaceRecord>,
        cell: Cell,
        /// Changes and fallbacks to note.
        changes: Vec<&'static str>,
    },
    Rejected {
        why: Rejection,
        cell: Cell,
    },
}

/// Workers, with one set of models each.
struct Analysers<'a> {
    config: &'a PrepConfig,
    files: &'a SourceFiles,
    pool: rayon::ThreadPool,
    models: Vec<Mutex<FaceAnalyser>>,
}

impl<'a> Analysers<'a> {
    fn load(config: &'a PrepConfig, base_dir: &Path, workers: NonZeroUsize, files: &'a SourceFiles) -> Result<Self> {
        let models = (0..workers.get())
            .map(|_| Ok(Mutex::new(FaceAnalyser::load(&config.faces, base_dir)?)))
            .collect::<Result<_>>()?;
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(workers.get())
            .build()
            .map_err(|error| Error::Fault(format!("{workers} worker threads: {error}")))?;
        Ok(Self { config, files, pool, models })
    }

    fn read_all(&self, photos: &[Photo]) -> Vec<ReadOutcome> {
        self.pool.install(|| photos.par_iter().map(|photo| read(photo, self.config, self.files)).collect())
    }

    /// Chooses among photos with the same bytes. The first in key order stays, unless a later one has more labels:
    /// returns the keys of those by checksum. Reads only files of equal size, and only if their labels differ.
    fn labelled_copies<'p>(&self, photos: &'p [Photo]) -> HashMap<[u8; 32], &'p str> {
        let labels = |photo: &Photo| usize::from(photo.identity.is_some()) + usize::from(photo.split.is_some());
        let differ = |photos: &[&Photo]| photos.iter().any(|photo| labels(photo) != labels(photos[0]));
        if !differ(&photos.iter().collect::<Vec<_>>()) {
            return HashMap::new();
        }
        let mut by_size: HashMap<u64, Vec<&Photo>> = HashMap::new();
        for photo in photos {
            by_size.entry(self.files.size(&photo.path)).or_default().push(photo);
        }
        let alike: Vec<&Photo> = by_size.into_values().filter(|alike| differ(alike)).flatten().collect();
        let checksum = |photo: &&'p Photo| Some((read(photo, self.config, self.files).ok()?.sha256, *photo));
        let checksums: Vec<_> = self.pool.install(|| alike.par_iter().filter_map(checksum).collect());
        let mut best: HashMap<[u8; 32], &Photo> = HashMap::new();
        for (checksum, photo) in checksums {
            let rank = |photo: &'p Photo| (labels(photo), Reverse(&photo.key));
            let kept = best.entry(checksum).or_insert(photo);
            if rank(photo) > rank(kept) {
                *kept = photo;
            }
        }
        best.into_iter().map(|(checksum, photo)| (checksum, photo.key.as_str())).collect()
    }

    fn process_all(&self, photos: &[Photo], files: Vec<FileOutcome<'_>>) -> Vec<Result<Outcome>> {
        self.pool.install(|| photos.par_iter().zip(files).map(|(photo, file)| self.process(photo, file)).collect())
    }

    /// Processes one photo. An error comes from the models or the disk, never from the photo.
    fn process(&self, photo: &Photo, file: FileOutcome<'_>) -> Result<Outcome> {
        let (file, earlier) = match file {
            Ok(file) => file,
            Err(why) => return Ok(Outcome::Rejected { why, cell: Cell::blank() }),
        };
        let Decoded { pixels, transparent } = match self.config.decode.decode(&file.bytes) {
            Ok(decoded) => decoded,
            Err(error) => {
                let why = Rejection::new(Reason::Undecodable, error);
                return Ok(Outcome::Rejected { why, cell: Cell::blank() });
            }
        };
        if let Some(earlier) = earlier {
            let why = Rejection::new(Reason::Duplicate, earlier);
            return Ok(Outcome::Rejected { why, cell: Cell::rejected(&pixels, &[]) });
        }
        let worker = rayon::current_thread_index().unwrap_or(0);
        let mut analyser = self.models[worker].lock().unwrap_or_else(PoisonError::into_inner);
        let Upright { photo: pixels, faces: found, turned } = analyser.detect_upright(pixels)?;
        let (face, sharpness) = match self.config.filter.select(&pixels, &found) {
            Ok(selected) => selected,
            Err(why) => return Ok(Outcome::Rejected { why, cell: Cell::rejected(&pixels, &found) }),
        };
        let caption = match self.config.caption.caption(self.files, &photo.path) {
            Ok(caption) => caption,
            Err(why) => return Ok(Outcome::Rejected { why, cell: Cell::rejected(&pixels, &found) }),
        };
        let description = analyser.describe(&pixels, face)?;
        let crop = self.config.crop.cut(&pixels, face.face_box);
        let record = FaceRecord {
            key: photo.key.clone(),
            image: encode_png(&crop.image)?,
            width: crop.image.width(),
            height: crop.image.height(),
            face_box: crop.place_box(face.face_box),
            points: face.points.map(|point| crop.to_crop(point)),
            landmarks: description.landmarks.into_iter().map(|point| crop.to_crop(point)).collect(),
            score: face.score,
            id_embedding: description.id_embedding,
            caption: caption.text,
            sha256: hex(&file.sha256),
            identity: photo.identity.clone(),
            split: photo.split.clone(),
        };
        let cell = Cell::kept(&crop.image, &record, sharpness);
        let changes =
            [(caption.fallback, "caption_fallback"), (transparent, "transparent_on_white"), (turned, "turned_upright")];
        let changes = changes.into_iter().filter_map(|(made, change)| made.then_some(change)).collect();
        Ok(Outcome::Kept { record: Box::new(record), cell, changes })
    }
}

/// Converts by way of text, where a 32-bit float is as short as in the YAML; a JSON value would widen it to 64 bits.
fn as_json(config: &PrepConfig) -> Result<serde_json::Value> {
    serde_json::to_string(config)
        .and_then(|text| serde_json::from_str(&text))
        .map_err(|error| Error::Fault(format!("the config cannot be written as JSON: {error}")))
}

fn encode_png(image: &RgbImage) -> Result<Vec<u8>> {
    let mut bytes = Cursor::new(Vec::new());
    PngEncoder::new_with_quality(&mut bytes, CompressionType::Default, FilterType::Adaptive)
        .write_image(image, image.width(), image.height(), image::ExtendedColorType::Rgb8)
        .map_err(|error| Error::Fault(format!("a crop cannot be encoded as PNG: {error}")))?;
    Ok(bytes.into_inner())
}

#[cfg(test)]
mod tests {
    use hyperlora_testing::reference::check_config;

    use super::PrepConfig;

    #[test]
    fn the_reference_of_the_configuration_is_up_to_date() {
        check_config::<PrepConfig>("data");
    }
}
