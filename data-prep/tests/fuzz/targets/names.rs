//! Names that were read from a file, and text from outside in messages.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Component, Path};

use hyperlora_core::{paths, text};

use hyperlora_testing::fuzz::{Refusal, fuzz, scratch};

#[test]
fn names() {
    const WORDS: [&str; 16] =
        ["..", ".", "/", "//", "\\", "\0", "C:", "~", "a", "b", "up", "out", "\u{202e}", "\n", "etc/passwd", "pipe"];
    let outer = scratch();
    let root = outer.path().join("root");
    fs::create_dir_all(root.join("a")).unwrap();
    fs::write(root.join("a/b"), "inside").unwrap();
    fs::write(root.join("b"), "inside").unwrap();
    fs::write(outer.path().join("secret"), "secret").unwrap();
    symlink("..", root.join("up")).unwrap();
    symlink("../secret", root.join("out")).unwrap();
    symlink("a/b", root.join("in")).unwrap();
    symlink("/dev/zero", root.join("zero")).unwrap();
    let opened = paths::Root::open(&root).unwrap();
    let seeds = ["a/b", "b", "in", "Zoë 1.png"];
    fuzz("names", 4000, 1 << 20, "list.json", |case| {
        let name = String::from_utf8_lossy(&case.one_text(&seeds, &WORDS)).into_owned();
        if let Ok(bytes) = opened.read(Path::new(&name), 100) {
            assert_eq!(bytes, b"inside", "{name:?} leads out");
        }
        let path = paths::below(&root, &name, Path::new("list.json"))?;
        assert!(paths::is_plain(&name));
        let rest = path.strip_prefix(&root).unwrap();
        assert!(rest.components().all(|part| matches!(part, Component::Normal(_))), "{name:?}");
        assert!(rest.components().count() > 0, "{name:?}");
        Ok(())
    });
}

#[test]
fn messages() {
    const SECRET: &str = "S3CRET";
    const WORDS: [&str; 18] = [
        "://",
        "https://",
        "s3://",
        "@",
        "?",
        "#",
        "&",
        "=",
        "/",
        " ",
        "\u{1b}[2J",
        "\u{202e}",
        "\r",
        "\n",
        "\u{7f}",
        "`",
        "'",
        "é",
    ];
    let seeds = ["see https://host/a/b?c=d#e and s3://b/k", "a photo\n  of Zoë\u{1b}[0m"];
    fuzz("messages", 4000, 4 << 20, "", |case| {
        let outside = String::from_utf8_lossy(&case.one_text(&seeds, &WORDS)).into_owned();
        let shown = text::shown(&outside).to_string();
        let name = text::name(&outside).to_string();
        assert!(!name.contains(|c: char| c.is_control()), "{name:?}");
        assert!(!shown.contains(|c: char| c.is_control() && c != '\n'), "{shown:?}");
        assert_eq!(text::mask_urls(&text::mask_urls(&outside)), text::mask_urls(&outside), "{outside:?}");
        // Secrets of the next URL are masked whatever precedes it; a quote or a bracket starts a new text.
        let signed = format!("{outside} https://user:{SECRET}@host/a?sig={SECRET}");
        assert!(!text::mask_urls(&signed).contains(SECRET), "{signed:?}");
        if shown.is_empty() { Err(Refusal::Reason("nothing to show".into())) } else { Ok(()) }
    });
}
