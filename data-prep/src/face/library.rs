//! The library of ONNX Runtime: where it may come from.
//!
//! Its code is executed, and folders of models, data and runs come from strangers: only the environment, the download of
//! `launch/assets.sh` and the installation of the program itself name one.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

use hyperlora_core::config::ConfigPath;
use hyperlora_core::{Error, Result};

/// Environment variable that names the library.
const VARIABLE: &str = "ORT_DYLIB_PATH";

pub(super) const REMEDY: &str =
    "run launch/assets.sh, or set ORT_DYLIB_PATH to the absolute path of libonnxruntime.so (1.31 or newer)";

/// Place where `launch/assets.sh` puts the library.
const ASSET: &str = "${HYPERLORA_CACHE:-~/.cache/hyperlora}/lib/libonnxruntime.so";

/// Finds the library that `ORT_DYLIB_PATH` names; or else the one that `launch/assets.sh` downloads; or else the one that
/// pip installed with this program.
///
/// # Errors
/// Input: the name is not an absolute path.
pub(super) fn find() -> Result<PathBuf> {
    let installed = std::env::current_exe().ok().and_then(|program| installed(&program));
    choose(std::env::var_os(VARIABLE), ConfigPath::new(ASSET).resolve(Path::new("")), installed)
}

/// Returns the library's path, which must be absolute: a relative one depends on the current folder, and the system
/// would search for a bare name.
fn choose(named: Option<OsString>, asset: Result<PathBuf>, installed: Option<PathBuf>) -> Result<PathBuf> {
    let (place, path) = match named {
        Some(path) if !path.is_empty() => (VARIABLE, path.into()),
        _ => match (asset, installed) {
            (asset, Some(installed)) if !asset.as_ref().is_ok_and(|asset| asset.is_file()) => return Ok(installed),
            (asset, _) => ("HYPERLORA_CACHE", asset?),
        },
    };
    if path.is_absolute() {
        return Ok(path);
    }
    let problem = format!("names ONNX Runtime by `{}`, which is not an absolute path", path.display());
    Err(Error::input(place, problem, "give the absolute path: a library is not searched for"))
}

/// Finds the library in the Python environment that `program` was installed into: the wheel of this project depends on the
/// package `onnxruntime`. Whoever writes there could replace the program as well.
fn installed(program: &Path) -> Option<PathBuf> {
    let prefix = program.canonicalize().ok()?.parent()?.parent()?.to_owned();
    let names = |folder: &Path| -> Vec<PathBuf> {
        let mut names: Vec<_> =
            fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path()).collect();
        names.sort();
        names
    };
    let starts =
        |path: &Path, prefix: &str| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(prefix));
    let packages = names(&prefix.join("lib")).into_iter().filter(|path| starts(path, "python"));
    let packages: Vec<_> = packages.map(|python| python.join("site-packages")).collect();
    // An installation of the wheel, and not a folder that happens to lie above a program that somebody built.
    let ours = packages.into_iter().find(|folder| names(folder).iter().any(|path| starts(path, "burn_hyperlora-")))?;
    names(&ours.join("onnxruntime/capi")).into_iter().find(|path| starts(path, "libonnxruntime.so"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_library_is_named_by_an_absolute_path_or_pinned() {
        let found = |named: Option<&str>, asset: &str| choose(named.map(OsString::from), Ok(asset.into()), None);
        assert_eq!(found(Some("/opt/ort.so"), "/cache/ort.so").unwrap(), Path::new("/opt/ort.so"));
        for none in [None, Some("")] {
            assert_eq!(found(none, "/cache/ort.so").unwrap(), Path::new("/cache/ort.so"));
        }
        for (named, asset, place) in [
            (Some("libonnxruntime.so"), "/cache/ort.so", VARIABLE),
            (Some("./lib/libonnxruntime.so"), "/cache/ort.so", VARIABLE),
            (None, "cache/ort.so", "HYPERLORA_CACHE"),
        ] {
            let message = found(named, asset).unwrap_err().to_string();
            assert!(message.starts_with(place) && message.contains("not an absolute path"), "{message}");
        }
    }

    #[test]
    fn a_wheel_finds_the_library_that_pip_installed_with_it() {
        let folder = tempfile::tempdir().unwrap();
        let prefix = folder.path().canonicalize().unwrap();
        let (program, packages) = (prefix.join("bin/hyperlora"), prefix.join("lib/python3.11/site-packages"));
        let library = packages.join("onnxruntime/capi/libonnxruntime.so.1.32.0");
        for file in [&program, &library] {
            fs::create_dir_all(file.parent().unwrap()).unwrap();
            fs::write(file, "").unwrap();
        }
        // Another program's environment.
        assert_eq!(installed(&program), None);
        fs::create_dir(packages.join("burn_hyperlora-0.1.0.dist-info")).unwrap();
        assert_eq!(installed(&program).as_ref(), Some(&library));
        // A download that is there, and a name, come first.
        let asset = prefix.join("asset.so");
        let chosen =
            |named: Option<&str>| choose(named.map(OsString::from), Ok(asset.clone()), installed(&program)).unwrap();
        assert_eq!(chosen(None), library);
        fs::write(&asset, "").unwrap();
        assert_eq!(chosen(None), asset);
        assert_eq!(chosen(Some("/opt/ort.so")), Path::new("/opt/ort.so"));
    }
}
