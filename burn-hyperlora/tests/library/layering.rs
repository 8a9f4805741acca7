//! Imports run one way: a module uses only modules listed above it in `lib.rs`, and no files of a crate import each
//! other in a circle.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

/// Path of a module or of an item in it, without `crate`.
type Names = Vec<String>;

/// Imports of one file.
#[derive(Default)]
struct Module {
    /// Items that it uses, by their paths.
    uses: Vec<Names>,
    /// Paths of the items that it passes on, by their names here.
    passed_on: BTreeMap<String, Names>,
}

/// Reads every source file below `folder`, without the tests.
fn read_sources(folder: &Path, module: &[String], found: &mut BTreeMap<Names, String>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_stem().unwrap().to_str().unwrap().to_owned();
        let inside = [module, std::slice::from_ref(&name)].concat();
        if path.is_dir() && name != "bin" {
            read_sources(&path, &inside, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") && name != "tests" {
            let module = if ["lib", "mod"].contains(&name.as_str()) { module.to_vec() } else { inside };
            let text = fs::read_to_string(&path).unwrap();
            let code = text.split("#[cfg(test)]\nmod tests {").next().unwrap();
            found.insert(
                module,
                code.lines().map(|line| line.split("//").next().unwrap()).collect::<Vec<_>>().join("\n"),
            );
        }
    }
}

/// Splits a source text into names, `::` and single signs.
fn tokens(code: &str) -> Vec<&str> {
    let mut tokens = Vec::new();
    let mut rest = code.trim_start();
    while let Some(first) = rest.chars().next() {
        let is_name = |c: char| c.is_alphanumeric() || c == '_';
        let length = match first {
            _ if is_name(first) => rest.find(|c| !is_name(c)).unwrap_or(rest.len()),
            ':' if rest.starts_with("::") => 2,
            _ => first.len_utf8(),
        };
        tokens.push(&rest[..length]);
        rest = rest[length..].trim_start();
    }
    tokens
}

/// Reads the path or the tree of paths that begins `tokens`. Adds each with its name here, and returns what follows.
fn read_paths<'a>(mut tokens: &'a [&'a str], mut path: Names, found: &mut Vec<(Names, String)>) -> &'a [&'a str] {
    while let [name, rest @ ..] = tokens {
        tokens = rest;
        if *name == "{" {
            while !matches!(tokens, [] | ["}", ..]) {
                tokens = read_paths(tokens, path.clone(), found);
                tokens = tokens.strip_prefix(&[","]).unwrap_or(tokens);
            }
            return tokens.get(1..).unwrap_or_default();
        }
        if *name != "self" || path.is_empty() {
            path.push((*name).to_owned());
        }
        match tokens {
            ["::", rest @ ..] if rest.first().is_some_and(|next| *next != "<") => tokens = rest,
            ["as", name, rest @ ..] => {
                found.push((path, (*name).to_owned()));
                return rest;
            }
            _ => break,
        }
    }
    let name = path.last().cloned().unwrap_or_default();
    found.push((path, name));
    tokens
}

/// Path from the crate's root of a path as `module` writes it; `None` if it leads out of the crate.
fn from_root(module: &[String], path: &[String], modules: &BTreeMap<Names, String>) -> Option<Names> {
    // A lone name is an item's own, or a part of `pub(super)`.
    if path.len() < 2 {
        return None;
    }
    let ups = path.iter().take_while(|name| *name == "super").count();
    let child = [module, &path[..1]].concat();
    match path[0].as_str() {
        "crate" => Some(path[1..].to_vec()),
        "self" => Some([module, &path[1..]].concat()),
        "super" => Some([&module[..module.len().checked_sub(ups)?], &path[ups..]].concat()),
        _ => modules.contains_key(&child).then(|| [module, path].concat()),
    }
}

/// Returns the modules that each module of a crate uses.
fn imports(src: &Path) -> BTreeMap<Names, BTreeSet<Names>> {
    let mut sources = BTreeMap::new();
    read_sources(src, &[], &mut sources);
    let read = |(name, code): (&Names, &String)| {
        let (mut module, mut words) = (Module::default(), BTreeSet::new());
        let all = tokens(code);
        let (mut rest, mut before) = (&all[..], "");
        while let [first, after @ ..] = rest {
            let mut found = Vec::new();
            let imported = *first == "use";
            let follows = read_paths(if imported { after } else { rest }, Names::new(), &mut found);
            for (path, here) in found {
                let public = imported && matches!(before, "pub" | ")");
                match from_root(name, &path, &sources) {
                    Some(path) if public => _ = module.passed_on.insert(here, path),
                    Some(path) => module.uses.push(path),
                    None if !imported => words.extend(path.into_iter().next()),
                    None => {}
                }
            }
            (rest, before) = (follows, first);
        }
        let used_here = module.passed_on.iter().filter(|(here, _)| words.contains(*here));
        module.uses.extend(used_here.map(|(_, path)| path.clone()).collect::<Vec<_>>());
        (name.clone(), module)
    };
    let modules: BTreeMap<Names, Module> = sources.iter().map(read).collect();
    // Follows what modules pass on to the module that holds the item.
    let home = |mut path: Names| loop {
        let length = (0..=path.len()).rev().find(|length| modules.contains_key(&path[..*length]))?;
        let next = path.get(length).and_then(|item| modules[&path[..length]].passed_on.get(item));
        match next {
            Some(next) => path = [next, &path[length + 1..]].concat(),
            None => break Some(path[..length].to_vec()),
        }
    };
    let uses = |name: &Names, module: &Module| {
        module.uses.iter().filter_map(|path| home(path.clone())).filter(|other| other != name).collect()
    };
    modules.iter().map(|(name, module)| (name.clone(), uses(name, module))).collect()
}

/// Lists the modules that lie on a circle of imports.
fn circles(imports: &BTreeMap<Names, BTreeSet<Names>>) -> Vec<String> {
    let mut left = imports.clone();
    // A module that uses none of those left, or that none of those left uses, is on no circle.
    loop {
        let used: BTreeSet<Names> = left.values().flatten().cloned().collect();
        let before = left.len();
        left.retain(|name, uses| used.contains(name) && !uses.is_empty());
        let kept: BTreeSet<Names> = left.keys().cloned().collect();
        left.values_mut().for_each(|uses| uses.retain(|other| kept.contains(other)));
        if left.len() == before && left.values().all(|uses| !uses.is_empty()) {
            let named = |(name, uses): (&Names, &BTreeSet<Names>)| {
                let uses: Vec<_> = uses.iter().map(|other| other.join("::")).collect();
                format!("{} uses {}", name.join("::"), uses.join(", "))
            };
            return left.iter().map(named).collect();
        }
    }
}

/// Lists the imports of top-level modules that `lib.rs` lists further down.
fn upward(src: &Path) -> Vec<String> {
    let lib = fs::read_to_string(src.join("lib.rs")).unwrap();
    let order: Vec<_> = lib.lines().filter_map(|line| line.strip_prefix("pub mod ")?.strip_suffix(';')).collect();
    let place = |name: &Names| order.iter().position(|top| name.first().is_some_and(|first| first == top));
    let found = imports(src);
    let edges = found.iter().flat_map(|(name, uses)| uses.iter().map(move |other| (name, other)));
    let wrong = edges.filter(|(name, other)| place(name).is_some_and(|own| place(other) > Some(own)));
    wrong.map(|(name, other)| format!("{} uses {}", name.join("::"), other.join("::"))).collect()
}

#[test]
fn imports_run_one_way() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    assert_eq!(upward(&root.join("src")), Vec::<String>::new());
    for folder in ["src", "../data-prep/src", "../crates/core/src", "../crates/ranks/src", "../crates/sdxl/src"] {
        let found = imports(&root.join(folder));
        assert!(found.values().map(BTreeSet::len).sum::<usize>() > 10, "{folder}: the imports are not read");
        assert_eq!(circles(&found), Vec::<String>::new(), "{folder}");
    }
}

#[test]
fn an_upward_import_and_a_circle_are_found() {
    let src = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| fs::write(src.path().join(name), text).unwrap();
    fs::create_dir(src.path().join("lora")).unwrap();
    write("lib.rs", "pub mod lora;\npub mod train;\n");
    write("lora/mod.rs", "mod file;\nmod set;\npub use {file::File, set::Set};\n");
    write("lora/file.rs", "use std::fs;\nuse crate::{lora::Set as Loras, train};\n");
    write("lora/set.rs", "fn open() { super::file::read::<u8>(); }\n");
    write("train.rs", "use crate::lora::Set; // use crate::lora::File\n");
    assert_eq!(upward(src.path()), ["lora::file uses train"]);
    let circle = ["lora::file uses lora::set, train", "lora::set uses lora::file", "train uses lora::set"];
    assert_eq!(circles(&imports(src.path())), circle);
}
