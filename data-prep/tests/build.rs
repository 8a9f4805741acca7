//! `data-prep build` from photos to shards, on real faces and with the real models that `launch/assets.sh` downloads.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::fs;
use std::num::NonZeroUsize;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use data_prep::pipeline::{PrepConfig, Progress, build};
use data_prep::shard::{FaceRecord, Manifest, ShardFolder};
use hyperlora_core::files::{Ownership, StagedFolder, UMASK};
use hyperlora_core::signals::StopFlag;
use image::codecs::jpeg::JpegEncoder;
use image::{ImageEncoder, RgbImage, Rgba, RgbaImage, imageops};

const CONFIG: &str = "
source:
  folder:
    root: photos
    labels: labels.csv
crop:
  margin: 1.6
  max_side: 200
filter:
  min_face: 50
caption:
  sidecar:
    fallback: a photo of a person
shards:
  rows_per_group: 2
  rows_per_shard: 4
face:
  min_score: 0.8
";

fn asset(name: &str) -> PathBuf {
    hyperlora_testing::asset("photos").join(name)
}

/// Makes a folder with `data.yaml`, labels and photos: six that stay, and one for each reason for rejection.
fn workplace() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let photos = dir.path().join("photos");
    fs::create_dir_all(photos.join("orl")).unwrap();
    fs::write(dir.path().join("data.yaml"), CONFIG).unwrap();
    let mut labels = "key,identity,split\n".to_owned();
    for (person, number) in [(1, 1), (1, 2), (1, 9), (2, 1), (2, 2)] {
        let key = format!("orl/s{person}-{number}.pgm");
        fs::copy(asset(&format!("orl/s{person:02}/{number}.pgm")), photos.join(&key)).unwrap();
        let split = if number == 9 { "held_out" } else { "train" };
        labels += &format!("{key},s{person},{split}\n");
    }
    fs::write(dir.path().join("labels.csv"), labels).unwrap();
    fs::write(photos.join("orl/s1-1.txt"), "a man with a serious face\n").unwrap();

    let portrait = image::open(asset("portraits/astronaut.png")).unwrap().into_rgb8();
    portrait.save(photos.join("colour.png")).unwrap();
    imageops::blur(&portrait, 3.0).save(photos.join("bad-blurred.png")).unwrap();
    imageops::thumbnail(&portrait, 200, 200).save(photos.join("bad-small.png")).unwrap();
    imageops::crop_imm(&portrait, 300, 0, 212, 120).to_image().save(photos.join("bad-no-face.png")).unwrap();
    fs::copy(asset("groups/sample6.jpg"), photos.join("bad-group.jpg")).unwrap();
    fs::copy(photos.join("orl/s1-1.pgm"), photos.join("repeated.pgm")).unwrap();
    let whole = fs::read(photos.join("colour.png")).unwrap();
    fs::write(photos.join("bad-cut.png"), &whole[..whole.len() / 3]).unwrap();
    fs::write(photos.join("bad-text.jpg"), "no picture").unwrap();
    std::os::unix::fs::symlink("nowhere.jpg", photos.join("bad-link.jpg")).unwrap();
    fs::copy(asset("orl/s02/3.pgm"), photos.join("bad-words.pgm")).unwrap();
    fs::write(photos.join("bad-words.txt"), [0xff, 0xfe]).unwrap();
    dir
}

fn prepare(dir: &Path, out: &str, workers: usize) -> hyperlora_core::Result<Manifest> {
    let config = PrepConfig::load(&dir.join("data.yaml"))?;
    let workers = NonZeroUsize::new(workers).unwrap();
    Ok(build(&config, dir, &dir.join(out), workers, &StopFlag::default(), &mut |_| {})?.unwrap())
}

fn rows(folder: &Path) -> Vec<FaceRecord> {
    let folder = ShardFolder::open(folder).unwrap();
    folder.verify().unwrap();
    folder.row_groups().iter().flat_map(|group| folder.read(group).unwrap()).collect()
}

fn bytes_of(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let files = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap());
    files.map(|entry| (entry.file_name().into_string().unwrap(), fs::read(entry.path()).unwrap())).collect()
}

fn names(dir: &Path) -> BTreeSet<OsString> {
    fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name()).collect()
}

fn run(args: &[&str], dir: &Path) -> (i32, Output) {
    let output = Command::new(env!("CARGO_BIN_EXE_data-prep")).args(args).current_dir(dir).output().unwrap();
    (output.status.code().unwrap(), output)
}

#[test]
fn good_photos_become_rows_bad_ones_are_counted_and_workers_change_nothing() {
    let dir = workplace();
    let manifest = prepare(dir.path(), "one", 1).unwrap();
    assert_eq!((manifest.photos, manifest.kept), (15, 6));
    let rejected = [
        ("bad_caption", 1),
        ("blurred", 1),
        ("duplicate", 1),
        ("face_too_small", 1),
        ("no_face", 1),
        ("several_faces", 1),
    ];
    let mut expected: BTreeMap<_, _> = rejected.into_iter().map(|(name, count)| (name.to_owned(), count)).collect();
    expected.insert("undecodable".into(), 3);
    assert_eq!(manifest.rejected, expected);
    assert_eq!(manifest.splits, BTreeMap::from([("held_out".into(), 1), ("train".into(), 4)]));

    let noted = "caption_fallback 5 (colour.png and more), unlabelled_photo 10 (bad-blurred.png and more)";
    assert_eq!(manifest.notes.to_string(), noted);

    let rows = rows(&dir.path().join("one"));
    let keys: Vec<_> = rows.iter().map(|row| row.key.as_str()).collect();
    let kept = ["colour.png", "orl/s1-1.pgm", "orl/s1-2.pgm", "orl/s1-9.pgm", "orl/s2-1.pgm", "orl/s2-2.pgm"];
    assert_eq!(keys, kept);
    assert_eq!((rows[0].identity.as_deref(), rows[0].split.as_deref()), (None, None));
    assert_eq!((rows[3].identity.as_deref(), rows[3].split.as_deref()), (Some("s1"), Some("held_out")));
    assert_eq!(rows[1].caption, "a man with a serious face");
    assert_eq!(rows[2].caption, "a photo of a person");
    for row in &rows {
        let crop = image::load_from_memory(&row.image).unwrap();
        assert_eq!((crop.width(), crop.height()), (row.width, row.height));
        assert!(row.width.max(row.height) <= 200);
        let inside = |[x, y]: [f32; 2]| (0.0..row.width as f32).contains(&x) && (0.0..row.height as f32).contains(&y);
        assert!(row.points.iter().all(|point| inside(*point)), "{}: {:?}", row.key, row.points);
        assert_eq!(row.landmarks.len(), 68);
    }
    let likeness = |a: usize, b: usize| -> f32 {
        rows[a].id_embedding.iter().zip(&rows[b].id_embedding).map(|(a, b)| a * b).sum()
    };
    assert!(likeness(1, 2) > likeness(1, 4) + 0.3, "{} {}", likeness(1, 2), likeness(1, 4));

    let list = fs::read_to_string(dir.path().join("one/rejected.csv")).unwrap();
    assert!(list.contains("repeated.pgm,duplicate,orl/s1-1.pgm\n"), "{list}");
    let sheet = image::open(dir.path().join("one/contact-sheet.png")).unwrap();
    assert!(sheet.width() > 1000);

    prepare(dir.path(), "two", 2).unwrap();
    assert_eq!(bytes_of(&dir.path().join("one")), bytes_of(&dir.path().join("two")));
}

#[test]
fn progress_counts_every_photo() {
    let dir = workplace();
    let config = PrepConfig::load(&dir.path().join("data.yaml")).unwrap();
    let mut seen = Vec::new();
    let stop = StopFlag::default();
    let mut note = |progress| seen.push(progress);
    build(&config, dir.path(), &dir.path().join("out"), NonZeroUsize::MIN, &stop, &mut note).unwrap();
    assert!(seen.is_sorted_by_key(|progress| progress.done) && seen.len() > 2);
    assert_eq!(seen.last(), Some(&Progress { done: 15, total: 15, kept: 6 }));
}

/// Encodes a photo as JPEG with this EXIF orientation (EXIF 2.3, tag 0x112).
fn jpeg(photo: &RgbImage, orientation: u8) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut encoder = JpegEncoder::new_with_quality(&mut bytes, 95);
    let exif = [&b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0"[..], &[orientation, 0, 0, 0, 0, 0, 0]].concat();
    encoder.set_exif_metadata(exif).unwrap();
    encoder.write_image(photo, photo.width(), photo.height(), image::ExtendedColorType::Rgb8).unwrap();
    bytes
}

#[test]
fn what_is_not_whole_or_not_ours_becomes_no_row_and_what_is_changed_is_counted() {
    let dir = tempfile::tempdir().unwrap();
    let photos = dir.path().join("photos");
    fs::create_dir_all(photos.join(".ipynb_checkpoints")).unwrap();
    fs::create_dir_all(photos.join("copies")).unwrap();
    fs::write(dir.path().join("data.yaml"), CONFIG).unwrap();
    let portrait = image::open(asset("portraits/astronaut.png")).unwrap().into_rgb8();

    // Copies of a labelled photo: in a hidden folder, and with a name that sorts first.
    let labelled = fs::read(asset("orl/s01/1.pgm")).unwrap();
    for name in ["s1.pgm", "copies/s1.pgm", ".ipynb_checkpoints/s1-checkpoint.pgm"] {
        fs::write(photos.join(name), &labelled).unwrap();
    }
    fs::write(dir.path().join("labels.csv"), "\u{feff}key,identity,split\ns1.pgm,s1,train\n").unwrap();
    fs::write(photos.join("s1.txt"), "\u{feff}a man").unwrap();

    // Truncated as by a broken download, and with an end marker appended.
    let whole = jpeg(&portrait, 1);
    let cut = &whole[..whole.len() * 3 / 10];
    fs::write(photos.join("bad-cut.jpg"), cut).unwrap();
    fs::write(photos.join("bad-cut-ended.jpg"), [cut, b"\xff\xd9"].concat()).unwrap();
    fs::write(photos.join("bad-name.jpg"), b"\0\0\0\x18ftypheic").unwrap();

    // Rotated, without and with EXIF orientation.
    fs::write(photos.join("turned.png"), png(&imageops::rotate90(&portrait))).unwrap();
    fs::write(photos.join("turned-exif.jpg"), jpeg(&imageops::rotate270(&portrait), 6)).unwrap();
    // Transparent pixels have the colours of noise.
    let mut cut_out = RgbaImage::from_fn(portrait.width(), portrait.height(), |x, y| {
        let [r, g, b] = portrait.get_pixel(x, y).0;
        let inside = (150..300).contains(&x) && (20..220).contains(&y);
        if inside { Rgba([r, g, b, 255]) } else { Rgba([(x * y) as u8, (x * 7 + y) as u8, (x ^ y) as u8, 0]) }
    });
    cut_out.put_pixel(0, 0, Rgba([0, 0, 0, 0]));
    cut_out.save(photos.join("transparent.png")).unwrap();

    // Traps of a stranger: pipes, and links to files of the machine.
    for pipe in ["pipe.jpg", "transparent.txt"] {
        assert!(Command::new("mkfifo").arg(photos.join(pipe)).status().unwrap().success());
    }
    fs::write(photos.join("secret.png"), png(&imageops::rotate180(&portrait))).unwrap();
    std::os::unix::fs::symlink("/etc/passwd", photos.join("secret.txt")).unwrap();
    std::os::unix::fs::symlink(asset("portraits/obama.jpg"), photos.join("obama.jpg")).unwrap();
    fs::write(photos.join("phone.heic"), "").unwrap();
    fs::write(photos.join("phone.caption"), "").unwrap();

    let manifest = prepare(dir.path(), "out", 2).unwrap();
    let rejected = [("bad_caption", 2), ("duplicate", 1), ("undecodable", 3)];
    assert_eq!(manifest.rejected, rejected.map(|(name, count)| (name.to_owned(), count)).into());
    let noted = "caption_fallback 2 (turned-exif.jpg and more), caption_file 1 (phone.caption), \
                 heic_file 1 (phone.heic), hidden_folder 1 (.ipynb_checkpoints), \
                 link_out_of_folder 2 (obama.jpg and more), no_regular_file 1 (pipe.jpg), \
                 turned_upright 1 (turned.png), unlabelled_photo 8 (bad-cut-ended.jpg and more)";
    assert_eq!(manifest.notes.to_string(), noted);
    let out = dir.path().join("out");
    let list = fs::read_to_string(out.join("rejected.csv")).unwrap();
    for line in [
        "copies/s1.pgm,duplicate,s1.pgm\n",
        "bad-name.jpg,undecodable,it is a HEIC or AVIF file\n",
        "bad-cut.jpg,undecodable,the file ends before its picture does\n",
        "secret.png,bad_caption,the caption cannot be read: a path led outside",
        "transparent.png,bad_caption,\"the caption cannot be read: it is a pipe",
    ] {
        assert!(list.contains(line), "{list}");
    }
    let found = rows(&out);
    let keys: Vec<_> = found.iter().map(|row| row.key.as_str()).collect();
    assert_eq!(keys, ["s1.pgm", "turned-exif.jpg", "turned.png"]);
    assert_eq!((found[0].identity.as_deref(), found[0].caption.as_str()), (Some("s1"), "a man"));
    let alike: f32 = found[1].id_embedding.iter().zip(&found[2].id_embedding).map(|(a, b)| a * b).sum();
    assert!(alike > 0.95, "{alike}");

    fs::remove_file(photos.join("transparent.txt")).unwrap();
    let manifest = prepare(dir.path(), "out", 2).unwrap();
    assert_eq!(manifest.notes.get("transparent_on_white").map(|noted| noted.count), Some(1));
    let row = rows(&out).into_iter().find(|row| row.key == "transparent.png").unwrap();
    let crop = image::load_from_memory(&row.image).unwrap().into_rgb8();
    assert_eq!(crop.get_pixel(0, crop.height() / 2).0, [255; 3]);
}

fn png(photo: &RgbImage) -> Vec<u8> {
    let mut bytes = std::io::Cursor::new(Vec::new());
    photo.write_to(&mut bytes, image::ImageFormat::Png).unwrap();
    bytes.into_inner()
}

#[test]
fn a_signal_ends_the_build_and_leaves_nothing_behind() {
    let dir = workplace();
    let names = || fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect::<Vec<_>>();
    let before = names().len();
    for (signal, name) in [("-TERM", "SIGTERM"), ("-INT", "SIGINT")] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_data-prep"));
        command.args(["build", "data.yaml", "--out", "out", "--workers", "1"]).current_dir(dir.path());
        let child = command.stderr(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        // A new name shows that the processing of photos has started.
        while names().len() == before {
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        assert!(Command::new("kill").args([signal, &child.id().to_string()]).status().unwrap().success());
        let output = child.wait_with_output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(3), "{said}");
        assert!(said.contains(&format!("stopped by {name}: nothing is written")), "{said}");
        assert_eq!(names().len(), before, "{:?}", names());
    }
}

#[test]
fn the_result_is_there_though_nobody_reads_what_is_printed() {
    let dir = workplace();
    for (out, print, code) in [("closed", Stdio::piped(), 0), ("full", full(), 1)] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_data-prep"));
        command.args(["build", "data.yaml", "--out", out, "--workers", "2"]).current_dir(dir.path());
        let mut child = command.stdout(print).stderr(Stdio::piped()).spawn().unwrap();
        drop(child.stdout.take());
        let output = child.wait_with_output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(code), "{said}");
        assert!(!said.contains("panicked"), "{said}");
        assert_eq!(Manifest::read(&dir.path().join(out)).unwrap().kept, 6);
    }
}

/// Returns a standard output on a disk without space.
fn full() -> Stdio {
    fs::OpenOptions::new().write(true).open("/dev/full").unwrap().into()
}

#[test]
fn no_usable_face_changes_nothing_on_the_disk() {
    let dir = workplace();
    let out = dir.path().join("out");
    prepare(dir.path(), "out", 1).unwrap();
    let before = bytes_of(&out);
    fs::write(dir.path().join("data.yaml"), CONFIG.replace("min_face: 50", "min_face: 5000")).unwrap();
    let (code, output) = run(&["build", "data.yaml", "--out", "out"], dir.path());
    let message = String::from_utf8(output.stderr).unwrap();
    assert_eq!(code, 2, "{message}");
    assert!(message.contains("none of 15 photos holds a usable face"), "{message}");
    assert!(message.contains("face_too_small 9") && message.contains("undecodable 3"), "{message}");
    assert_eq!(bytes_of(&out), before);
    assert!(!dir.path().join(".out.hyperlora.partial").exists());
}

#[test]
fn only_prepared_data_is_replaced() {
    let dir = workplace();
    fs::create_dir(dir.path().join("mine")).unwrap();
    fs::write(dir.path().join("mine/thesis.txt"), "years of work").unwrap();
    fs::write(dir.path().join("file"), "mine").unwrap();
    for (out, word) in [("mine", "is not empty, and nothing in it tells"), ("file", "is a file"), ("..", "name")] {
        let error = prepare(dir.path(), out, 1).unwrap_err();
        assert_eq!(error.exit_code(), 2);
        assert!(error.to_string().contains(word), "{error}");
    }
    assert_eq!(fs::read(dir.path().join("mine/thesis.txt")).unwrap(), b"years of work");
    prepare(dir.path(), "out", 1).unwrap();
    prepare(dir.path(), "out", 1).unwrap();
    fs::write(dir.path().join("out/notes.txt"), "mine").unwrap();
    let error = prepare(dir.path(), "out", 1).unwrap_err();
    assert!(error.exit_code() == 2 && error.to_string().contains("`notes.txt`"), "{error}");
    assert!(dir.path().join("out/notes.txt").exists());
}

#[test]
fn no_output_is_put_into_the_photos_around_them_or_beside_another_build() {
    let dir = workplace();
    let before = names(dir.path());
    for (out, words) in [
        ("photos", "is the input"),
        ("photos/shards", "lies in the input"),
        ("labels.csv", "is the input"),
        (".", "holds the input"),
    ] {
        let error = prepare(&dir.path().join("."), out, 1).unwrap_err();
        assert!(error.exit_code() == 2 && error.to_string().contains(words), "{out}: {error}");
    }
    let held = StagedFolder::new(&dir.path().join("out"), Ownership::Never).unwrap();
    let error = prepare(dir.path(), "out", 1).unwrap_err();
    assert!(error.exit_code() == 2 && error.to_string().contains("another process"), "{error}");
    drop(held);
    assert_eq!(names(dir.path()), before);
    // Nor into the models, empty ones here.
    fs::create_dir(dir.path().join("models")).unwrap();
    fs::write(dir.path().join("data.yaml"), format!("{CONFIG}  models: models\n")).unwrap();
    let error = prepare(dir.path(), "models/shards", 1).unwrap_err();
    assert!(error.exit_code() == 2 && error.to_string().contains("lies in the input"), "{error}");
    assert_eq!(names(&dir.path().join("models")), BTreeSet::new());
}

#[test]
fn only_the_user_may_read_what_was_prepared_unless_the_umask_is_told() {
    let dir = workplace();
    for (umask, file_mode, folder_mode) in [(None, 0o600, 0o700), (Some("027"), 0o640, 0o750)] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_data-prep"));
        command.args(["build", "data.yaml", "--out", "out", "-q"]).current_dir(dir.path()).env_remove(UMASK);
        command.envs(umask.map(|umask| (UMASK, umask)));
        assert!(command.status().unwrap().success());
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        let out = dir.path().join("out");
        assert_eq!(mode(&out), folder_mode);
        for entry in fs::read_dir(&out).unwrap() {
            let path = entry.unwrap().path();
            assert_eq!(mode(&path), file_mode, "{}", path.display());
        }
    }
    let mut command = Command::new(env!("CARGO_BIN_EXE_data-prep"));
    let refused = command.args(["build", "data.yaml", "--out", "out"]).env(UMASK, "rwx").output().unwrap();
    let message = String::from_utf8(refused.stderr).unwrap();
    assert!(refused.status.code() == Some(2) && message.contains(UMASK), "{message}");
}

#[test]
fn what_the_user_got_wrong_is_named_with_exit_code_2() {
    let dir = workplace();
    for (from, to, words) in [
        ("margin:", "marign:", "data.yaml:7:3: unknown key `marign`: did you mean `margin`?"),
        ("margin: 1.6", "margin: wide", "data.yaml:7:11: "),
        ("margin: 1.6", "margin: .inf", "data.yaml:7:11: `.inf` is not a finite number"),
        ("margin: 1.6", "margin: 0.5", "data.yaml: crop: margin is 0.5"),
        ("min_score: 0.8", "min_score: 8", "data.yaml: faces.min_score: 8 is not a score"),
        ("rows_per_shard: 4", "rows_per_shard: 3", "data.yaml: shards: rows_per_shard is 3"),
        ("a photo of a person", "'a photo of {identity}'", "data.yaml: caption: "),
        ("root: photos", "root: pictures", "pictures: is not a folder"),
        ("labels.csv", "list.csv", "list.csv: cannot be read"),
        ("min_score: 0.8", "models: nowhere", "nowhere: cannot be read"),
    ] {
        assert!(CONFIG.contains(from));
        fs::write(dir.path().join("data.yaml"), CONFIG.replace(from, to)).unwrap();
        let (code, output) = run(&["build", "data.yaml", "--out", "out"], dir.path());
        let message = String::from_utf8(output.stderr).unwrap();
        assert_eq!(code, 2, "{message}");
        assert!(message.contains(words) && message.contains("remedy: "), "{message}");
        assert!(!dir.path().join("out").exists());
    }
}

#[test]
fn help_shows_an_example_and_the_command_reports_what_it_did() {
    let dir = workplace();
    let (code, output) = run(&["build", "--help"], dir.path());
    assert_eq!(code, 0);
    assert!(
        String::from_utf8(output.stdout).unwrap().contains("data-prep build experiments/quickstart/data.yaml --out")
    );
    let (code, output) = run(&["--help"], dir.path());
    assert_eq!(code, 0);
    assert!(String::from_utf8(output.stdout).unwrap().contains("Example:"));
    let (code, output) = run(&["build", "data.yaml", "--out", "out", "--device", "cuda:0"], dir.path());
    assert_eq!(code, 2);
    assert!(String::from_utf8(output.stderr).unwrap().contains("run on the CPU only"));
    let (code, output) = run(&["build", "data.yaml", "--out", "out", "--workers", "2", "--device", "cpu"], dir.path());
    let said = String::from_utf8(output.stdout).unwrap();
    assert_eq!(code, 0, "{}", String::from_utf8_lossy(&output.stderr));
    assert!(said.contains("kept 6 of 15 photos (held_out 1, train 4)"), "{said}");
    let (code, output) = run(&["build", "data.yaml", "--out", "out", "-q"], dir.path());
    assert_eq!((code, output.stdout.len(), output.stderr.len()), (0, 0, 0));
}
