//! Roles of the model files in a folder (detector, embedder, ...), recognised by their inputs and outputs.
//!
//! Supports folders in the layout of insightface's packs (antelopev2, buffalo_l) and the one that `launch/assets.sh` makes.
//! Ignores models that are not needed here (3D landmarks, gender and age).

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use hyperlora_core::hash::sha256_of_file;
use hyperlora_core::paths::is_plain;
use hyperlora_core::{Error, Result};

use crate::face::FaceConfig;
use crate::face::onnx::{Header, Slot, read_header};

/// Models of a folder by their roles.
#[derive(Debug, Clone)]
pub struct FaceModels {
    pub(super) folder: PathBuf,
    pub(super) detector: ModelFile,
    pub(super) landmarker: ModelFile,
    pub(super) embedder: ModelFile,
    /// Only evaluation needs it.
    pub(super) independent: Option<ModelFile>,
}

/// File of a model, with its kind.
#[derive(Debug, Clone)]
pub(super) struct ModelFile {
    pub(super) path: PathBuf,
    pub(super) header: Header,
    pub(super) kind: Kind,
}

/// Kind of a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// YuNet (2023mar): 640 x 640, twelve outputs `cls_8` ... `kps_32`.
    YuNet,
    /// SCRFD with points: scores, boxes and points of three or five strides.
    Scrfd,
    /// 68 points from 64 x 64 grey.
    Landmarks68,
    /// insightface's 106 points from 192 x 192 RGB.
    Landmarks106,
    /// 512 numbers from 112 x 112 RGB: the ArcFace family.
    Embedding512,
    /// 512 numbers from 112 x 112 RGB, in a file named after CurricularFace: reserved for evaluation.
    CurricularFace,
    /// 128 numbers from 112 x 112 RGB: SFace.
    Embedding128,
    /// Not needed here.
    Other,
}

impl Kind {
    fn of(header: &Header, path: &Path) -> Self {
        let [input] = &header.inputs[..] else { return Self::Other };
        let outputs = &header.outputs[..];
        let sees = |channels: usize, side: usize| fits(input, &[1, channels, side, side]);
        let gives = |length: usize| matches!(outputs, [only] if last(only) == Some(length));
        if is_yunet(outputs) && sees(3, 640) {
            Self::YuNet
        } else if is_scrfd(outputs) && is_square_view(input) {
            Self::Scrfd
        } else if sees(1, 64) && gives(2 * 68) {
            Self::Landmarks68
        } else if sees(3, 192) && gives(2 * 106) {
            Self::Landmarks106
        } else if sees(3, 112) && gives(512) {
            let name = file_name(path).to_lowercase();
            if name.contains("curricular") { Self::CurricularFace } else { Self::Embedding512 }
        } else if sees(3, 112) && gives(128) {
            Self::Embedding128
        } else {
            Self::Other
        }
    }
}

fn is_yunet(outputs: &[Slot]) -> bool {
    let has = |part: &str, stride: &str| outputs.iter().any(|output| output.name == format!("{part}_{stride}"));
    ["cls", "obj", "bbox", "kps"].iter().all(|part| ["8", "16", "32"].iter().all(|stride| has(part, stride)))
}

/// Tells whether these are SCRFD's outputs: three groups with one output per stride (1 score, 4 distances and 10
/// offsets to an anchor).
fn is_scrfd(outputs: &[Slot]) -> bool {
    let strides = outputs.len() / 3;
    matches!(outputs.len(), 9 | 15)
        && outputs.chunks_exact(strides).zip([1, 4, 10]).all(|(group, width)| {
            group.iter().all(|output| matches!(output.shape.len(), 2 | 3) && last(output).is_none_or(|it| it == width))
        })
}

/// Tells whether an input takes pictures of any size, or square ones that the strides divide.
fn is_square_view(input: &Slot) -> bool {
    matches!(input.shape[..], [_, _, height, width] if height == width && height.is_none_or(|side| side % 32 == 0))
        && fits(&Slot { shape: input.shape[..2].to_vec(), ..input.clone() }, &[1, 3])
}

/// Tells whether a tensor with these lengths fits the slot.
fn fits(slot: &Slot, lengths: &[usize]) -> bool {
    slot.shape.len() == lengths.len()
        && slot.shape.iter().zip(lengths).all(|(length, want)| length.is_none_or(|length| length == *want))
}

fn last(slot: &Slot) -> Option<usize> {
    slot.shape.last().copied().flatten()
}

fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// Role of a model.
struct Role {
    /// Key of [`FaceConfig`] that names a file for it.
    key: &'static str,
    what: &'static str,
    /// Suitable kinds. The first one that the folder contains is used.
    kinds: &'static [Kind],
}

const DETECTOR: Role = Role {
    key: "detector",
    what: "a face detector with five points (SCRFD as scrfd_10g_bnkps.onnx or det_10g.onnx, or YuNet)",
    kinds: &[Kind::Scrfd, Kind::YuNet],
};
const LANDMARKER: Role = Role {
    key: "landmarker",
    what: "a landmark model (106 points as 2d106det.onnx, or 68 points from 64 x 64 grey)",
    kinds: &[Kind::Landmarks106, Kind::Landmarks68],
};
const EMBEDDER: Role = Role {
    key: "embedder",
    what: "an ID embedder (512 numbers from 112 x 112 RGB, as glintr100.onnx)",
    kinds: &[Kind::Embedding512],
};
const INDEPENDENT: Role = Role {
    key: "independent_embedder",
    what: "an embedder for evaluation (curricularface.onnx, or SFace: 128 numbers from 112 x 112 RGB)",
    kinds: &[Kind::CurricularFace, Kind::Embedding128],
};

impl FaceModels {
    /// Finds the models of `config`, whose relative paths start at `base_dir`. Reads only headers.
    ///
    /// # Errors
    /// Input: no folder, no model or several for a role, or a file that is damaged or of another kind than its key
    /// requires.
    pub fn find(config: &FaceConfig, base_dir: &Path) -> Result<Self> {
        let folder = config.models.resolve(base_dir)?;
        let mut files = Vec::new();
        let named = [&config.detector, &config.landmarker, &config.embedder, &config.independent_embedder];
        if named.iter().any(|name| name.is_none()) {
            files = onnx_files(&folder)?.iter().map(|path| ModelFile::open(path)).collect::<Result<Vec<_>>>()?;
        }
        let needed = |role: &Role, name: &Option<String>| match name {
            Some(name) => role.named(&folder, name),
            None => role.find(&folder, &files)?.ok_or_else(|| role.missing(&folder, &files)),
        };
        Ok(Self {
            detector: needed(&DETECTOR, &config.detector)?,
            landmarker: needed(&LANDMARKER, &config.landmarker)?,
            embedder: needed(&EMBEDDER, &config.embedder)?,
            independent: match &config.independent_embedder {
                Some(name) => Some(INDEPENDENT.named(&folder, name)?),
                None => INDEPENDENT.find(&folder, &files)?,
            },
            folder,
        })
    }

    /// Identifies the models in a shard's manifest: role to `FILE sha256:CHECKSUM`.
    ///
    /// # Errors
    /// As [`Error::read`].
    pub fn fingerprints(&self) -> Result<BTreeMap<String, String>> {
        [(DETECTOR, &self.detector), (LANDMARKER, &self.landmarker), (EMBEDDER, &self.embedder)]
            .into_iter()
            .map(|(role, file)| {
                let checksum = sha256_of_file(&file.path)?;
                Ok((role.key.to_owned(), format!("{} sha256:{checksum}", file_name(&file.path))))
            })
            .collect()
    }

    /// Returns the embedder that training never uses.
    pub(super) fn independent(&self) -> Result<&ModelFile> {
        self.independent.as_ref().ok_or_else(|| INDEPENDENT.missing(&self.folder, &[]))
    }
}

impl ModelFile {
    fn open(path: &Path) -> Result<Self> {
        let header = read_header(path)?;
        Ok(Self { kind: Kind::of(&header, path), path: path.into(), header })
    }

    /// Describes inputs and outputs, for messages.
    fn shape(&self) -> String {
        let list = |slots: &[Slot]| {
            let shown: Vec<_> = slots.iter().take(3).map(Slot::to_string).collect();
            let more = if slots.len() > 3 { format!(" and {} more", slots.len() - 3) } else { String::new() };
            shown.join(", ") + &more
        };
        format!("takes {} and gives {}", list(&self.header.inputs), list(&self.header.outputs))
    }
}

impl Role {
    /// Opens the file of `folder` that the configuration names.
    fn named(&self, folder: &Path, name: &str) -> Result<ModelFile> {
        if !is_plain(name) {
            let problem = format!("`{}: {name}` leads out of the models' folder", self.key);
            return Err(Error::file(folder, problem, "name a file of this folder, or give another folder"));
        }
        let path = &folder.join(name);
        let file = ModelFile::open(path)?;
        // Any embedder may judge; it only has to differ from training's.
        let fits = self.kinds.contains(&file.kind)
            || matches!(file.kind, Kind::Embedding512 | Kind::CurricularFace)
                && matches!(self.key, "embedder" | "independent_embedder");
        if fits {
            return Ok(file);
        }
        let problem = format!("is not {}: it {}", self.what, file.shape());
        Err(Error::file(path, problem, format!("name another file with `{}`", self.key)))
    }

    /// Finds the only file of the folder for this role.
    fn find(&self, folder: &Path, files: &[ModelFile]) -> Result<Option<ModelFile>> {
        for kind in self.kinds {
            let found: Vec<_> = files.iter().filter(|file| file.kind == *kind).collect();
            match found[..] {
                [] => {}
                [one] => return Ok(Some(one.clone())),
                _ => {
                    let names: Vec<_> = found.iter().map(|file| file_name(&file.path)).collect();
                    let problem = format!("holds {}, and each can be {}", names.join(", "), self.what);
                    return Err(Error::file(folder, problem, format!("name one with `{}`", self.key)));
                }
            }
        }
        Ok(None)
    }

    fn missing(&self, folder: &Path, files: &[ModelFile]) -> Error {
        let found: Vec<_> = files.iter().map(|file| format!("{} {}", file_name(&file.path), file.shape())).collect();
        let found = if found.is_empty() { String::new() } else { format!("; {}", found.join("; ")) };
        Error::file(
            folder,
            format!("holds no file that is {}{found}", self.what),
            format!("add one or name it with `{}`; `launch/assets.sh` brings a free set of models", self.key),
        )
    }
}

/// Lists the ONNX files of a folder, sorted by name.
fn onnx_files(folder: &Path) -> Result<Vec<PathBuf>> {
    const REMEDY: &str = "give the folder of the ONNX files (such as antelopev2), or run launch/assets.sh";
    let failed = |source| Error::read(folder, source).with_remedy(REMEDY);
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        if path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("onnx")) {
            files.push(path);
        }
    }
    if files.is_empty() {
        return Err(Error::file(folder, "holds no ONNX files", REMEDY));
    }
    files.sort();
    Ok(files)
}
