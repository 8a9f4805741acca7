//! A small world on disk: synthetic people in real shards, and the YAML of a short experiment on them.

use std::fs;
use std::io::Cursor;
use std::path::PathBuf;

use data_prep::shard::{EMBEDDING_DIM, FaceRecord, Manifest, SCHEMA_VERSION, ShardConfig, ShardWriter};
use image::{ImageFormat, Rgb, RgbImage};

/// Content of a world.
pub struct Recipe {
    /// Experiment; `BASE` in it stands for the base model.
    pub yaml: &'static str,
    /// Path of the base model.
    pub base: PathBuf,
    /// Number of people.
    pub people: usize,
    /// Photos per person.
    pub photos: usize,
    /// Split of a photo, by person and photo.
    pub split: fn(usize, usize) -> &'static str,
    /// Sizes of the shards.
    pub shards: ShardConfig,
}

/// Temporary folder with shards, YAML and runs.
pub struct World {
    root: tempfile::TempDir,
    recipe: Recipe,
}

impl World {
    /// Writes the shards and the YAML, without a run.
    pub fn of(recipe: Recipe) -> Self {
        let world = Self { root: tempfile::tempdir().unwrap(), recipe };
        world.write_shards();
        world.write_yaml(&[]);
        world
    }

    /// Returns a path in the folder: a run, or a file.
    pub fn path(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    /// Writes the YAML with some of its text replaced.
    pub fn write_yaml(&self, changes: &[(&str, &str)]) {
        let mut yaml = self.recipe.yaml.replace("BASE", &self.recipe.base.display().to_string());
        for (from, to) in changes {
            assert!(yaml.contains(from), "nothing to replace: {from}");
            yaml = yaml.replace(from, to);
        }
        fs::write(self.path("train.yaml"), yaml).unwrap();
    }

    fn write_shards(&self) {
        let Recipe { people, photos, split, ref shards, .. } = self.recipe;
        let folder = self.path("shards");
        fs::create_dir(&folder).unwrap();
        let mut writer = ShardWriter::new(&folder, shards, []);
        for (person, photo) in (0..people).flat_map(|person| (0..photos).map(move |photo| (person, photo))) {
            let sha256 = format!("{:064x}", person * photos + photo);
            writer
                .push(FaceRecord { sha256, split: Some(split(person, photo).into()), ..face(person, photo) })
                .unwrap();
        }
        let written = writer.finish().unwrap();
        let manifest = Manifest {
            schema_version: SCHEMA_VERSION,
            photos: people * photos,
            kept: people * photos,
            splits: Default::default(),
            rejected: Default::default(),
            notes: Default::default(),
            models: Default::default(),
            shards: written.shards,
            index: written.index,
            config: serde_json::json!({}),
        };
        manifest.write(&folder).unwrap();
    }
}

/// Draws one synthetic face: a disc in the person's colour, placed by the photo's number. Supports up to six people and
/// six photos.
fn face(person: usize, photo: usize) -> FaceRecord {
    let (width, height) = (44, 48);
    let centre = [20.0 + photo as f32, 22.0 + (photo % 3) as f32];
    let colour = [40 * person as u8 + 20, 230 - 35 * person as u8, (photo * 30) as u8];
    let image = RgbImage::from_fn(width, height, |x, y| {
        let inside = (x as f32 - centre[0]).hypot(y as f32 - centre[1]) < 11.0;
        Rgb(if inside { colour } else { [(x * 5) as u8, (y * 5) as u8, 90] })
    });
    let mut png = Cursor::new(Vec::new());
    image.write_to(&mut png, ImageFormat::Png).unwrap();
    let around = |part: usize, of: usize, radius: f32| {
        let angle = std::f32::consts::TAU * part as f32 / of as f32;
        [centre[0] + radius * angle.cos(), centre[1] + radius * angle.sin()]
    };
    let embedding: Vec<f32> =
        (0..EMBEDDING_DIM).map(|i| ((i * (person + 3)) as f32).sin() + 0.1 * ((i + photo) as f32).cos()).collect();
    let length = embedding.iter().map(|x| x * x).sum::<f32>().sqrt();
    FaceRecord {
        key: format!("p{person}/{photo}.png"),
        image: png.into_inner(),
        width,
        height,
        face_box: [centre[0] - 11.0, centre[1] - 11.0, centre[0] + 11.0, centre[1] + 11.0],
        points: std::array::from_fn(|i| around(i, 5, 5.0)),
        landmarks: (0..68).map(|i| around(i, 68, 10.0)).collect(),
        score: 0.9,
        id_embedding: embedding.iter().map(|x| x / length).collect(),
        caption: "a photo of a person".into(),
        sha256: String::new(),
        identity: Some(format!("p{person}")),
        split: None,
    }
}
