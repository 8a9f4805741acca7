//! ONNX Runtime, loaded once per process, and a model with one input.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use hyperlora_core::{Error, Result};
use ort::environment::Environment;
use ort::logging::LogLevel;
use ort::session::Session;
use ort::value::Tensor;

use crate::face::library::{self, REMEDY};
use crate::face::onnx::check_external_data;

/// Environment of the process, which can load only one copy of the library: the first path that loads stays.
static ENVIRONMENT: Mutex<Option<Environment>> = Mutex::new(None);

/// ONNX Runtime, ready to load models.
#[derive(Clone)]
pub(super) struct Runtime(Environment);

impl fmt::Debug for Runtime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Runtime")
    }
}

impl Runtime {
    /// Loads the library that [`library::find`] finds.
    ///
    /// # Errors
    /// Input: there is no library, or it does not load.
    pub(super) fn load() -> Result<Self> {
        let library = library::find()?;
        let mut environment = ENVIRONMENT.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(loaded) = environment.as_ref() {
            return Ok(Self(loaded.clone()));
        }
        // Checked here because ort panics if it has to search for the library itself.
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

/// ONNX model with one input. Runs on one thread, so that the numbers are the same every time.
pub(super) struct Model {
    session: Session,
    file: PathBuf,
}

impl fmt::Debug for Model {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Model").field("file", &self.file).finish_non_exhaustive()
    }
}

impl Model {
    /// Loads `file`, whose header was checked before.
    ///
    /// # Errors
    /// Input: the file is broken, uses features that ONNX Runtime does not support, or keeps weights outside its
    /// folder.
    pub(super) fn load(runtime: &Runtime, file: &Path) -> Result<Self> {
        check_external_data(file)?;
        let session = open(runtime, file).map_err(|error| {
            let remedy = "fetch the file again, and check that this ONNX Runtime is new enough for it";
            Error::file(file, format!("is not a usable ONNX model: {error}"), remedy)
        })?;
        Ok(Self { session, file: file.into() })
    }

    /// Runs the model on `input`, [B, C, H, W] flattened, and returns the named outputs, which must have these lengths.
    ///
    /// # Errors
    /// Input: not the expected model. Fault: ONNX Runtime fails.
    pub(super) fn run(
        &mut self,
        shape: [usize; 4],
        input: Vec<f32>,
        outputs: &[(&str, usize)],
    ) -> Result<Vec<Vec<f32>>> {
        let fault = |error: ort::Error| Error::Fault(format!("{}: running failed: {error}", self.file.display()));
        let input = Tensor::from_array((shape, input)).map_err(fault)?;
        let results = self.session.run(ort::inputs![input]).map_err(fault)?;
        let taken = outputs.iter().map(|&(name, length)| {
            let found = results.get(name).and_then(|value| value.try_extract_tensor::<f32>().ok());
            match found {
                Some((_, numbers)) if numbers.len() == length && numbers.iter().all(|x| x.is_finite()) => {
                    Ok(numbers.to_vec())
                }
                _ => {
                    let problem = format!("gives no output `{name}` of {length} finite numbers");
                    Err(Error::file(&self.file, problem, "name a model of the kind that this key asks for"))
                }
            }
        });
        taken.collect()
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
