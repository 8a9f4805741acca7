//! Settings of the face models.

use std::sync::Once;

use hyperlora_core::config::ConfigPath;
use hyperlora_core::{Error, Result};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Longest side of a detector's input, in pixels.
const LARGEST_SIDE: u32 = 640;

/// Models that find and measure faces. Everything has a default: the files that `launch/assets.sh` downloads.
///
/// The role of each model in a folder follows from its inputs and outputs. Name a file only if several fit a role.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct FaceConfig {
    /// Folder of the ONNX files, such as insightface's antelopev2. Default: the files that `launch/assets.sh` downloads.
    pub models: ConfigPath,
    /// Ignored, with a warning: a file that comes with data or a run must not load a library. Only `ORT_DYLIB_PATH`
    /// names one.
    #[serde(skip_serializing)]
    #[schemars(extend("deprecated" = true))]
    pub runtime: Option<String>,
    /// File of the face detector: SCRFD with points, or YuNet (2023mar).
    pub detector: Option<String>,
    /// File of the landmark model: 106 points from 192 x 192 RGB, or 68 from 64 x 64 grey.
    pub landmarker: Option<String>,
    /// File of the ID embedder: 512 numbers from 112 x 112 RGB.
    pub embedder: Option<String>,
    /// File of the embedder that only evaluation uses: CurricularFace, SFace, or another that takes 112 x 112 RGB.
    pub independent_embedder: Option<String>,
    /// Lowest accepted score of a face, above 0 and below 1. Default: 0.5 with SCRFD, as in insightface, and 0.6 with
    /// YuNet.
    pub min_score: Option<f32>,
    /// Longest sides of the photo in the detector's input, 32 to 640 pixels, tried in this order until a face is found.
    /// The smaller ones are for faces that fill the photo.
    pub detector_sides: Vec<u32>,
}

impl Default for FaceConfig {
    fn default() -> Self {
        Self {
            models: ConfigPath::new("${HYPERLORA_CACHE:-~/.cache/hyperlora}/models"),
            runtime: None,
            detector: None,
            landmarker: None,
            embedder: None,
            independent_embedder: None,
            min_score: None,
            detector_sides: vec![640, 480, 320, 256],
        }
    }
}

impl FaceConfig {
    /// Checks the sizes and the score.
    ///
    /// # Errors
    /// Input, at `place`: a detector side or a score is out of its range.
    pub fn validate(&self, place: &str) -> Result<()> {
        let sides = &self.detector_sides;
        if sides.is_empty() || sides.iter().any(|side| !(32..=LARGEST_SIDE).contains(side)) {
            let problem = format!("{sides:?} is not a list of sides in 32..={LARGEST_SIDE}");
            return Err(Error::input(format!("{place}.detector_sides"), problem, "give e.g. [640, 480, 320, 256]"));
        }
        if let Some(score) = self.min_score
            && !(score > 0.0 && score < 1.0)
        {
            let problem = format!("{score} is not a score between 0 and 1");
            return Err(Error::input(format!("{place}.min_score"), problem, "give e.g. 0.6"));
        }
        Ok(())
    }

    /// Warns once that the library named in the YAML is not loaded.
    pub(super) fn warn_of_runtime(&self) {
        static SAID: Once = Once::new();
        if let Some(library) = &self.runtime {
            SAID.call_once(|| {
                tracing::warn!(
                    "`runtime: {library}` of the face models is passed over: to load another ONNX Runtime than that of \
                     launch/assets.sh, set ORT_DYLIB_PATH to its path"
                );
            });
        }
    }
}
