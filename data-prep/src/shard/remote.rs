//! A shard folder in S3, Google Cloud Storage or behind HTTP, through a cache on this machine's disk.

use std::future::Future;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::Bytes;
use object_store::path::Path as ObjectPath;
use object_store::{Error as StoreError, ObjectStore, ObjectStoreExt, parse_url_opts};
use tokio::runtime::{Builder, Runtime};
use url::Url;

use crate::error::{Error, Result};
use crate::shard::manifest::{Piece, sha256_of};
use crate::shard::piece_cache::PieceCache;
use crate::shard::store::{Damage, RemoteConfig};

/// Time for one request; the store's client tries again after that, until the deadline.
const REQUEST_SECONDS: u64 = 60;

/// Prefixes of the environment variables that hold credentials and settings of the providers.
const ENVIRONMENT: [&str; 2] = ["AWS_", "GOOGLE_"];

/// A folder behind a URL.
#[derive(Debug)]
pub(super) struct Remote {
    url: String,
    store: Box<dyn ObjectStore>,
    folder: ObjectPath,
    runtime: Runtime,
    cache: PieceCache,
    deadline: Duration,
}

impl Remote {
    /// # Errors
    /// Input for a URL or setting that is not understood, Input or Disk for a cache folder that cannot be used.
    pub(super) fn open(url: &str, config: &RemoteConfig) -> Result<Self> {
        const REMEDY: &str = "give s3://BUCKET/PREFIX, gs://BUCKET/PREFIX or https://HOST/PATH";
        let parsed = Url::parse(url).map_err(|error| Error::input(url, format!("is no URL: {error}"), REMEDY))?;
        let (store, folder) = parse_url_opts(&parsed, options(&parsed, config))
            .map_err(|error| Error::input(url, format!("cannot be opened: {error}"), REMEDY))?;
        let runtime = Builder::new_multi_thread()
            .worker_threads(2)
            .thread_name("data-net")
            .enable_all()
            .build()
            .map_err(|error| Error::Fault(format!("cannot start the network threads: {error}")))?;
        let cache = PieceCache::open(&config.cache, config.cache_bytes)?;
        let url = url.trim_end_matches('/').to_owned();
        Ok(Self { url, store, folder, runtime, cache, deadline: config.deadline })
    }

    pub(super) fn place(&self, file: &str) -> PathBuf {
        Path::new(&self.url).join(file)
    }

    /// A whole object, never from the cache.
    pub(super) fn read(&self, file: &str) -> Result<Bytes> {
        let path = self.folder.clone().join(file);
        self.wait(file, async { self.store.get(&path).await?.bytes().await })
    }

    /// A part of an object, from the cache where it is there. What arrives with another checksum is asked for once more.
    pub(super) fn read_piece(&self, file: &str, piece: &Piece) -> Result<std::result::Result<Bytes, Damage>> {
        if let Some(bytes) = self.cache.get(piece) {
            return Ok(Ok(bytes));
        }
        let path = self.folder.clone().join(file);
        let range = piece.offset..piece.offset + piece.bytes;
        for _ in 0..2 {
            let bytes = self.wait(file, self.store.get_range(&path, range.clone()))?;
            if sha256_of(&bytes) == piece.sha256 {
                self.cache.put(piece, &bytes);
                return Ok(Ok(bytes));
            }
        }
        Ok(Err(Damage::of_checksum()))
    }

    fn wait<T>(&self, file: &str, request: impl Future<Output = object_store::Result<T>>) -> Result<T> {
        let answer = self.runtime.block_on(async { tokio::time::timeout(self.deadline, request).await });
        match answer {
            Ok(Ok(content)) => Ok(content),
            Ok(Err(error)) => Err(self.failure(file, error)),
            Err(_) => {
                let seconds = self.deadline.as_secs();
                let silence = std::io::Error::new(std::io::ErrorKind::TimedOut, format!("nothing came in {seconds} s"));
                Err(self.unreachable(file, silence))
            }
        }
    }

    fn failure(&self, file: &str, error: StoreError) -> Error {
        let place = self.place(file);
        match error {
            StoreError::NotFound { .. } => {
                Error::file(&place, "does not exist", "check data.shards, and that the folder was copied whole")
            }
            StoreError::PermissionDenied { .. } | StoreError::Unauthenticated { .. } => {
                let remedy = "set the provider's credentials in the environment (AWS_ACCESS_KEY_ID and \
                    AWS_SECRET_ACCESS_KEY, GOOGLE_SERVICE_ACCOUNT), or let them read it";
                Error::file(&place, format!("may not be read: {error}"), remedy)
            }
            other => self.unreachable(file, std::io::Error::other(other)),
        }
    }

    fn unreachable(&self, file: &str, source: std::io::Error) -> Error {
        Error::Disk {
            path: self.place(file),
            problem: "reading failed".into(),
            source,
            remedy: "check the network and the provider, then run the same command again".into(),
        }
    }
}

/// Settings in the names that `object_store` reads; the caller's overrule the environment's.
fn options(url: &Url, config: &RemoteConfig) -> Vec<(String, String)> {
    let environment =
        std::env::vars_os().filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)));
    let of_providers = environment.filter(|(name, _)| ENVIRONMENT.iter().any(|prefix| name.starts_with(prefix)));
    let mut options = vec![("timeout".to_owned(), format!("{REQUEST_SECONDS} seconds"))];
    if url.scheme() == "http" {
        options.push(("allow_http".into(), "true".into()));
    }
    options.extend(of_providers.map(|(name, value)| (name.to_ascii_lowercase(), value)));
    options.extend(config.options.iter().cloned());
    options
}
