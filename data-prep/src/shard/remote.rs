//! Shard folder in S3, Google Cloud Storage or behind HTTP, with a cache on this machine's disk.

use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::StreamExt;
use hyperlora_core::hash::sha256_of;
use hyperlora_core::{Error, Result};
use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey};
use object_store::gcp::{GoogleCloudStorageBuilder, GoogleConfigKey};
use object_store::http::HttpBuilder;
use object_store::path::Path as ObjectPath;
use object_store::{
    BackoffConfig, ClientConfigKey, Error as StoreError, GetOptions, GetRange, GetResult, ObjectStore,
    ObjectStoreScheme, RetryConfig,
};
use tokio::runtime::{Builder, Runtime};
use tokio::time::{sleep, timeout_at};
use url::{Position, Url};

use crate::shard::access::{Damage, ReadError, RemoteConfig};
use crate::shard::limits::MANIFEST_BYTES;
use crate::shard::manifest::{MANIFEST_FILE, Piece};
use crate::shard::piece_cache::PieceCache;

/// Pause before an object whose content stopped arriving is requested again.
const PAUSE: Duration = Duration::from_millis(500);

/// Characters of a provider's answer that an error shows at most, because some answer with a page.
const CAUSE_CHARACTERS: usize = 300;

/// Answer of every provider if an object ends before the requested part; `object_store` has no error kind for it.
const BEYOND_THE_END: &str = "416 Range Not Satisfiable";

/// Folder behind a URL.
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
    /// Opens the folder behind `url`, with its cache.
    ///
    /// # Errors
    /// Input: an unsupported URL or setting. Input or Disk: an unusable cache folder.
    pub(super) fn open(url: &str, config: &RemoteConfig) -> Result<Self> {
        let refused = |problem: String| {
            Error::input(url, problem, "give s3://BUCKET/PREFIX, gs://BUCKET/PREFIX or https://HOST/PATH")
        };
        let parsed = Url::parse(url).map_err(|error| refused(format!("is not a URL: {error}")))?;
        // A query would not reach the server, and a password would be written into the run folder.
        if parsed[Position::AfterPath..] != *"" || !parsed.username().is_empty() || parsed.password().is_some() {
            return Err(refused("has a user, a `?` or a `#` part, which is not understood".into()));
        }
        let (store, folder) =
            open_store(&parsed, config.deadline).map_err(|error| refused(format!("cannot be opened: {error}")))?;
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

    pub(super) fn locate(&self, file: &str) -> PathBuf {
        Path::new(&self.url).join(file)
    }

    /// Reads the current manifest, or the last one received if the server does not answer.
    pub(super) fn read_manifest(&self) -> Result<Bytes> {
        let place = self.locate(MANIFEST_FILE);
        let remedy = "check that the URL is the folder's own and needs no sign-in page";
        match self.get(MANIFEST_FILE, GetOptions::default(), MANIFEST_BYTES, Instant::now() + self.deadline) {
            Ok(Some(text)) if text.starts_with(b"{") => {
                self.cache.put_latest(&place, &text);
                Ok(text)
            }
            Ok(None) => Err(Error::file(
                &place,
                format!("is not a manifest: it holds more than {MANIFEST_BYTES} bytes"),
                remedy,
            )),
            Ok(Some(text)) => {
                let begin: String = String::from_utf8_lossy(&text).chars().take(20).collect();
                Err(Error::file(&place, format!("is not a manifest: it begins with {begin:?}"), remedy))
            }
            Err(error) => match (self.failure(MANIFEST_FILE, &error), self.cache.latest(&place, MANIFEST_BYTES)) {
                (Error::Disk { .. }, Some(text)) => {
                    let cause = cause(&error);
                    tracing::warn!("{}: cannot be reached ({cause}): read as it was last time", place.display());
                    Ok(text)
                }
                (failure, _) => Err(failure),
            },
        }
    }

    /// Reads a part of an object, from the cache if present. If the received part has another checksum, it is requested
    /// once more.
    pub(super) fn read_piece(&self, file: &str, piece: &Piece) -> std::result::Result<Bytes, ReadError> {
        if let Some(bytes) = self.cache.get(&piece.sha256, piece.bytes) {
            return Ok(bytes);
        }
        // One process of this machine requests the part; the others wait and read it from the cache.
        let _turn = self.cache.turn(&piece.sha256, Instant::now() + self.deadline);
        if let Some(bytes) = self.cache.get(&piece.sha256, piece.bytes) {
            return Ok(bytes);
        }
        // The deadline starts again after the wait, because this process has requested nothing yet.
        let until = Instant::now() + self.deadline;
        let range = GetRange::Bounded(piece.offset..piece.offset + piece.bytes);
        for _ in 0..2 {
            let options = GetOptions { range: Some(range.clone()), ..GetOptions::default() };
            match self.get(file, options, piece.bytes, until) {
                Ok(Some(bytes)) if sha256_of(&bytes) == piece.sha256 => {
                    self.cache.put(&piece.sha256, &bytes);
                    return Ok(bytes);
                }
                Ok(_) => {}
                Err(error) if cause(&error).contains(BEYOND_THE_END) => return Err(Damage::of_end().into()),
                Err(error) => return Err(self.failure(file, &error).into()),
            }
        }
        Err(Damage::of_checksum().into())
    }

    /// Requests an object until the deadline. The client retries failed requests, but not every content that stops
    /// arriving. Returns `None` for content of more than `limit` bytes.
    fn get(&self, file: &str, options: GetOptions, limit: u64, until: Instant) -> object_store::Result<Option<Bytes>> {
        let path = self.folder.clone().join(file);
        let mut stopped = None;
        let answer = self.runtime.block_on(async {
            let asking = async {
                loop {
                    match content(self.store.get_opts(&path, options.clone()).await?, limit).await {
                        Ok(content) => return Ok(content),
                        Err(error) => stopped = Some(error),
                    }
                    sleep(PAUSE).await;
                }
            };
            timeout_at(until.into(), asking).await
        });
        answer.unwrap_or_else(|_| {
            let silence = io::Error::new(ErrorKind::TimedOut, format!("nothing came in {} s", self.deadline.as_secs()));
            Err(stopped.unwrap_or(StoreError::Generic { store: "network", source: silence.into() }))
        })
    }

    fn failure(&self, file: &str, error: &StoreError) -> Error {
        let place = self.locate(file);
        match error {
            StoreError::NotFound { .. } => {
                Error::file(&place, "does not exist", "check the URL, and that the folder was copied there whole")
            }
            StoreError::PermissionDenied { .. } | StoreError::Unauthenticated { .. } => {
                let remedy = "set the provider's credentials in the environment (AWS_ACCESS_KEY_ID and \
                    AWS_SECRET_ACCESS_KEY, GOOGLE_SERVICE_ACCOUNT), or let them read it";
                Error::file(&place, format!("may not be read: {}", cause(error)), remedy)
            }
            StoreError::NotSupported { .. } => {
                let problem = "the server sent something else than the part that was asked for";
                let remedy = "let a server that answers range requests serve the folder, without a page in place of it";
                Error::file(&place, problem, remedy)
            }
            other => Error::Disk {
                path: place,
                problem: "reading failed".into(),
                source: io::Error::other(cause(other)),
                remedy: "check the network, the provider and its credentials, then run the same command again".into(),
            },
        }
    }
}

/// Makes the provider's client, with credentials and settings from the environment, and returns the folder's path in
/// it. All retries of the client end before the deadline, so that its error names the cause.
fn open_store(url: &Url, deadline: Duration) -> object_store::Result<(Box<dyn ObjectStore>, ObjectPath)> {
    let (scheme, folder) = ObjectStoreScheme::parse(url)?;
    let retry = RetryConfig {
        backoff: BackoffConfig { max_backoff: deadline / 8, ..BackoffConfig::default() },
        max_retries: usize::MAX,
        retry_timeout: deadline / 2,
    };
    let silence = format!("{}ms", (deadline / 4).as_millis());
    // The deadline applies to the whole request; the client's default limit of 30 s would abort slow ones.
    let limits = [
        (ClientConfigKey::Timeout, format!("{}ms", deadline.as_millis())),
        (ClientConfigKey::ConnectTimeout, silence.clone()),
        (ClientConfigKey::ReadTimeout, silence),
    ];
    let store: Box<dyn ObjectStore> = match scheme {
        ObjectStoreScheme::AmazonS3 => {
            let builder = AmazonS3Builder::from_env().with_url(url.as_str()).with_retry(retry);
            let with =
                |builder: AmazonS3Builder, (key, value)| builder.with_config(AmazonS3ConfigKey::Client(key), value);
            Box::new(limits.into_iter().fold(builder, with).build()?)
        }
        ObjectStoreScheme::GoogleCloudStorage => {
            let builder = GoogleCloudStorageBuilder::from_env().with_url(url.as_str()).with_retry(retry);
            let with = |builder: GoogleCloudStorageBuilder, (key, value)| {
                builder.with_config(GoogleConfigKey::Client(key), value)
            };
            Box::new(limits.into_iter().fold(builder, with).build()?)
        }
        ObjectStoreScheme::Http => {
            let builder = HttpBuilder::new().with_url(&url[..Position::BeforePath]).with_retry(retry);
            let builder = limits.into_iter().fold(builder, |builder, (key, value)| builder.with_config(key, value));
            // A user who writes http:// accepts it; what arrives must match its checksum.
            Box::new(builder.with_config(ClientConfigKey::AllowHttp, "true").build()?)
        }
        other => return Err(StoreError::NotSupported { source: format!("{other:?} is not read").into() }),
    };
    Ok((store, folder))
}

/// Reads the content of an answer. Returns `None` if its announced or actual size exceeds `limit` bytes.
async fn content(answer: GetResult, limit: u64) -> object_store::Result<Option<Bytes>> {
    let said = answer.range.end.saturating_sub(answer.range.start);
    if said > limit {
        return Ok(None);
    }
    let mut content = Vec::with_capacity(usize::try_from(said).unwrap_or(0));
    let mut parts = answer.into_stream();
    while let Some(part) = parts.next().await.transpose()? {
        if (content.len() + part.len()) as u64 > limit {
            return Ok(None);
        }
        content.extend_from_slice(&part);
    }
    Ok(Some(content.into()))
}

/// Returns the innermost cause of an error, on one line: the outer ones only wrap it.
fn cause(error: &StoreError) -> String {
    let mut innermost: &dyn std::error::Error = error;
    while let Some(source) = innermost.source() {
        innermost = source;
    }
    let words: Vec<String> = innermost.to_string().split_whitespace().map(str::to_owned).collect();
    words.join(" ").chars().take(CAUSE_CHARACTERS).collect()
}
