//! List of labels, and captions next to photos.

use std::fs;
use std::path::Path;

use data_prep::caption::Captioner;
use data_prep::source::{FolderConfig, SourceConfig};
use hyperlora_core::config::ConfigPath;

use hyperlora_testing::fuzz::{Refusal, fuzz, scratch};

#[test]
fn labels() {
    const WORDS: [&str; 14] =
        ["key", "identity", "split", ",", "\n", "\r\n", "\"", "\"\"", "\u{feff}", "a.png", "b/c.jpg", ";", "\t", "\0"];
    let folder = scratch();
    fs::create_dir_all(folder.path().join("photos/b")).unwrap();
    for name in ["a.png", "b/c.jpg"] {
        fs::write(folder.path().join("photos").join(name), "x").unwrap();
    }
    let source = SourceConfig::Folder(FolderConfig {
        root: ConfigPath::new("photos"),
        labels: Some(ConfigPath::new("list.csv")),
        extensions: vec!["png".into(), "jpg".into()],
        follow_links: false,
    });
    let seeds = [
        "key,identity,split\na.png,ada,train\nb/c.jpg,,unseen\n",
        "split,key,identity\r\ntrain,\"a.png\",\"Lovelace, Ada \"\"A\"\"\"\r\n",
        "key,identity,split\n",
    ];
    fuzz("labels", 2000, 8 << 20, "list.csv", |case| {
        fs::write(folder.path().join("list.csv"), case.one_text(&seeds, &WORDS)).unwrap();
        let photos = source.open(folder.path(), false)?.photos;
        assert_eq!(photos.len(), 2);
        Ok(())
    });
}

#[test]
fn captions() {
    let folder = scratch();
    fs::write(folder.path().join("x.jpg"), "x").unwrap();
    let source = SourceConfig::Folder(FolderConfig {
        root: ConfigPath::new("."),
        labels: None,
        extensions: vec!["jpg".into()],
        follow_links: false,
    });
    let files = source.open(folder.path(), true).unwrap().files;
    let captioner = Captioner::Sidecar { fallback: "a photo".into() };
    let seeds = [b"a woman in a hat\n".to_vec(), b"\xef\xbb\xbf a man \r\n with glasses".to_vec(), b" \n".to_vec()];
    fuzz("captions", 4000, 4 << 20, "", |case| {
        let seed = case.choose(seeds.len());
        let bytes = match case.random.one_in(2) {
            true => case.binary(&seeds[seed]),
            false => case.text(&seeds[seed], &["\u{2028}", "\u{0}", "\t", "\u{1b}", "é", "\u{a0}"]),
        };
        fs::write(folder.path().join("x.txt"), bytes).unwrap();
        let caption = captioner.caption(&files, Path::new("x.jpg")).map_err(|why| Refusal::Reason(why.detail))?.text;
        assert!(!caption.is_empty() && !caption.contains('\n'), "{caption:?}");
        Ok(())
    });
}
