//! `paths.yaml` of a run folder: the local places of the paths in `config.yaml`. It is not shared with the run.

use std::collections::BTreeMap;
use std::path::Path;

use hyperlora_core::config::{self, ConfigPath};
use hyperlora_core::{Error, Result};

use crate::experiment::Experiment;

/// First line of the file.
const HEADER: &str = "# Local paths of the files and folders that config.yaml names. Do not share this file.\n";

impl Experiment {
    /// Returns the resolved places of all paths, as YAML by their keys.
    ///
    /// # Errors
    /// Input: a path that cannot be resolved; Fault: a path that YAML cannot express.
    pub(super) fn places_yaml(&self) -> Result<String> {
        let folder = std::path::absolute(self.folder()).map_err(|source| Error::read(self.folder(), source))?;
        let base = &self.base;
        let optional = [
            ("base.config", &base.config),
            ("base.image_encoder", &base.image_encoder),
            ("base.feature_extractor", &base.feature_extractor),
            ("train.init_from", &self.train.init_from),
        ];
        let optional = optional.into_iter().filter_map(|(key, path)| Some((key, path.as_ref()?)));
        let faces = self.faces.iter().map(|faces| ("faces.models", &faces.models));
        let always = [("base.path", &base.path), ("data.shards", &self.data.shards)];
        let places = always.into_iter().chain(optional).chain(faces).map(|(key, path)| {
            let resolved = path.resolve(&folder)?;
            let place = resolved.canonicalize().unwrap_or(resolved);
            let place = place.into_os_string().into_string().map_err(|place| {
                let problem = format!("leads to {}, which is not UTF-8", place.display());
                Error::input(format!("{}: {key}", self.origin()), problem, "rename the folder")
            })?;
            Ok((key, place))
        });
        let places: BTreeMap<&str, String> = places.collect::<Result<_>>()?;
        Ok(HEADER.to_owned() + &config::to_yaml(&places)?)
    }

    /// Sets the paths of a run's configuration to the places in the file `path`.
    ///
    /// # Errors
    /// Input: a file that is not a list of places.
    pub(super) fn take_places(&mut self, path: &Path) -> Result<()> {
        let places: BTreeMap<String, ConfigPath> = config::load_found(path)?;
        for (key, place) in places {
            let base = &mut self.base;
            match key.as_str() {
                "base.path" => base.path = place,
                "base.config" => base.config = Some(place),
                "base.image_encoder" => base.image_encoder = Some(place),
                "base.feature_extractor" => base.feature_extractor = Some(place),
                "data.shards" => self.data.shards = place,
                "train.init_from" => self.train.init_from = Some(place),
                "faces.models" => self.faces.get_or_insert_default().models = place,
                _ => {
                    let remedy = "known here: base.path, base.config, base.image_encoder, base.feature_extractor, \
                        data.shards, train.init_from, faces.models";
                    return Err(Error::file(path, format!("unknown key `{key}`"), remedy));
                }
            }
        }
        Ok(())
    }
}
