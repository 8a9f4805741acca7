//! ONNX Runtime, loaded once per process, and a model with one input.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use ort::environment::Environment;
use ort::logging::LogLevel;
use ort::session::Session;
use ort::value::{Tensor, ValueType};

use crate::error::{Error, Result};

/// The process can hold one copy of the library; the first path that loads stays.
static ENVIRONMENT: Mutex<Option<Environment>> = Mutex::new(None);

const REMEDY: &str = "run ci/assets.sh, or set `runtime` or ORT_DYLIB_PATH to libonnxruntime.so (1.31 or newer)";

/// ONNX Runtime, ready to load models.
#[derive(Clone)]
pub(super) struct Runtime(Environment);

impl fmt::Debug for Runtime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Runtime")
    }
}

impl Runtime {
    /// Loads `library`, by default the one beside the folder `models`, else the one that `ORT_DYLIB_PATH` names.
    ///
    /// # Errors
    /// Input: no library there, or one that does not load.
    pub(super) fn load(library: Option<PathBuf>, models: &Path) -> Result<Self> {
        let library = library.unwrap_or_else(|| default_library(models));
        let mut environment = ENVIRONMENT.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(loaded) = environment.as_ref() {
            return Ok(Self(loaded.clone()));
        }
        // Checked here because ort panics where it has to look for the library itself.
        if !library.is_file() {
            return Err(Error::file(&library, "ONNX Runtime's library is not there", REMEDY));
        }
        let absolute = library.canonicalize().map_err(|source| Error::read(&library, source))?;
        let loaded = ort::init_from(&absolute)
            .map_err(|error| Error::file(&absolute, format!("ONNX Runtime does not load: {error}"), REMEDY))?
            .with_telemetry(false)
            .build()
            .map_err(|error| Error::file(&absolute, format!("ONNX Runtime does not start: {error}"), REMEDY))?;
        Ok(Self(environment.insert(loaded).clone()))
    }
}

fn default_library(models: &Path) -> PathBuf {
    let beside = models.parent().unwrap_or(Path::new("..")).join("lib/libonnxruntime.so");
    match std::env::var_os("ORT_DYLIB_PATH") {
        Some(path) if !path.is_empty() && !beside.is_file() => path.into(),
        _ => beside,
    }
}

/// An ONNX model with one input of a fixed shape, run on one thread: the same numbers every time.
pub(super) struct Model {
    session: Session,
    file: PathBuf,
    shape: [usize; 4],
}

impl fmt::Debug for Model {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Model").field("file", &self.file).field("shape", &self.shape).finish_non_exhaustive()
    }
}

impl Model {
    /// Loads `file`, whose input must be f32 of `shape`: [B, C, H, W].
    ///
    /// # Errors
    /// Input: the file is missing, broken, or wants another input.
    pub(super) fn load(runtime: &Runtime, file: &Path, shape: [usize; 4]) -> Result<Self> {
        if !file.is_file() {
            return Err(Error::file(file, "the model file is not there", "run ci/assets.sh, or correct `models`"));
        }
        let session = open(runtime, file).map_err(|error| {
            Error::file(file, format!("is not a usable ONNX model: {error}"), "remove it, then run ci/assets.sh")
        })?;
        let fits = match session.inputs() {
            [input] => match input.dtype() {
                ValueType::Tensor { shape: dims, .. } => {
                    dims.len() == shape.len()
                        && dims.iter().zip(shape).all(|(&dim, want)| dim < 0 || usize::try_from(dim) == Ok(want))
                }
                _ => false,
            },
            _ => false,
        };
        if !fits {
            let given: Vec<_> = session.inputs().iter().map(|input| input.dtype().to_string()).collect();
            let problem = format!("wants {}, not one tensor {shape:?}", given.join(" and "));
            return Err(Error::file(file, problem, "name a model of the kind that this key asks for"));
        }
        Ok(Self { session, file: file.into(), shape })
    }

    /// Runs the model on `input`, [B, C, H, W] flattened, and takes the named outputs, which must have these lengths.
    ///
    /// # Errors
    /// Input: another model than expected. Fault: ONNX Runtime fails.
    pub(super) fn run<const N: usize>(
        &mut self,
        input: Vec<f32>,
        outputs: [(&str, usize); N],
    ) -> Result<[Vec<f32>; N]> {
        let fault = |error: ort::Error| Error::Fault(format!("{}: running failed: {error}", self.file.display()));
        let input = Tensor::from_array((self.shape, input)).map_err(fault)?;
        let results = self.session.run(ort::inputs![input]).map_err(fault)?;
        let mut taken = [const { Vec::new() }; N];
        for (values, (name, length)) in taken.iter_mut().zip(outputs) {
            let found = results.get(name).and_then(|value| value.try_extract_tensor::<f32>().ok());
            *values = match found {
                Some((_, numbers)) if numbers.len() == length && numbers.iter().all(|x| x.is_finite()) => {
                    numbers.to_vec()
                }
                _ => {
                    let problem = format!("gives no output `{name}` of {length} finite numbers");
                    return Err(Error::file(&self.file, problem, "name a model of the kind that this key asks for"));
                }
            };
        }
        Ok(taken)
    }
}

fn open(runtime: &Runtime, file: &Path) -> ort::Result<Session> {
    Session::builder(&runtime.0)?
        .with_intra_threads(1)?
        .with_inter_threads(1)?
        .with_parallel_execution(false)?
        .with_deterministic_compute(true)?
        .with_log_level(LogLevel::Error)?
        .commit_from_file(file)
}
