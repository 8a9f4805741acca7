//! Imports run one way: a module uses only modules listed above it in `lib.rs`.

use std::fs;
use std::path::{Path, PathBuf};

/// Top-level modules in the order of `lib.rs`, in which they may be used.
fn order(lib: &str) -> Vec<&str> {
    lib.lines().filter_map(|line| line.strip_prefix("pub mod ")?.strip_suffix(';')).collect()
}

fn rust_files(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            rust_files(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

/// Iterates over the top-level module of each `crate::` path in a source text.
fn used(source: &str) -> impl Iterator<Item = &str> {
    source
        .lines()
        .filter(|line| !line.trim_start().starts_with("//"))
        .flat_map(|line| line.split("crate::").skip(1))
        .map(|rest| rest.split(|c: char| !c.is_alphanumeric() && c != '_').next().unwrap_or_default())
}

/// Lists `file uses later` for every import against the order.
fn upward_imports(src: &Path) -> Vec<String> {
    let lib = fs::read_to_string(src.join("lib.rs")).unwrap();
    let order = order(&lib);
    let place = |module: &str| order.iter().position(|name| *name == module);
    let mut files = Vec::new();
    rust_files(src, &mut files);
    let mut wrong = Vec::new();
    for file in files {
        let inside = file.strip_prefix(src).unwrap();
        let module = inside.iter().next().unwrap().to_str().unwrap().trim_end_matches(".rs");
        let Some(own) = place(module) else { continue };
        let source = fs::read_to_string(&file).unwrap();
        for name in used(&source) {
            if place(name).is_some_and(|other| other > own) {
                wrong.push(format!("{} uses {name}", inside.display()));
            }
        }
    }
    wrong
}

#[test]
fn imports_run_one_way() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    assert!(order(&fs::read_to_string(src.join("lib.rs")).unwrap()).len() > 10);
    assert_eq!(upward_imports(&src), Vec::<String>::new());
}

#[test]
fn an_upward_import_is_found() {
    let src = tempfile::tempdir().unwrap();
    fs::write(src.path().join("lib.rs"), "pub mod lora;\npub mod train;\n").unwrap();
    fs::write(src.path().join("lora.rs"), "use crate::train::Step;\n").unwrap();
    fs::write(src.path().join("train.rs"), "use crate::lora::LoraPair;\n").unwrap();
    assert_eq!(upward_imports(src.path()), ["lora.rs uses train"]);
}
