//! Batches made ahead of the training step: a bounded queue filled by threads of its own.

use std::ops::Range;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::{self, JoinHandle};

use rayon::ThreadPoolBuilder;
use rayon::prelude::*;

use crate::data::batch::{Batch, Draws};
use crate::data::sample::{Request, Sample, SampleMaker};
use crate::error::{Error, Result};

/// Delivers the batches of a range of draws in order.
pub struct Loader {
    /// `None` once the loader is being dropped.
    batches: Option<Receiver<Result<Batch>>>,
    thread: Option<JoinHandle<()>>,
}

/// How batches are made ahead.
#[derive(Debug, Clone, Copy)]
pub struct LoaderConfig {
    /// Samples in a batch; the last one may hold fewer.
    pub batch_size: usize,
    /// Threads that make samples.
    pub workers: usize,
    /// Batches that may wait ready.
    pub prefetch: usize,
}

impl Loader {
    /// Starts to make the batches of `draws`.
    ///
    /// # Errors
    /// Fault when the system gives no threads.
    pub fn start(maker: SampleMaker, mut source: Draws, draws: Range<u64>, config: LoaderConfig) -> Result<Self> {
        let no_threads = |problem: String| Error::Fault(format!("cannot start the data threads: {problem}"));
        let pool = ThreadPoolBuilder::new()
            .num_threads(config.workers)
            .thread_name(|index| format!("data-{index}"))
            .build()
            .map_err(|error| no_threads(error.to_string()))?;
        let (sender, receiver) = sync_channel(config.prefetch);
        let produce = move || {
            let size = config.batch_size.max(1) as u64;
            let starts = (draws.start..draws.end).step_by(size as usize);
            for start in starts {
                let next_draw = (start + size).min(draws.end);
                let requests: Vec<Request> = (start..next_draw).map(|draw| source.request(draw)).collect();
                let made = pool.install(|| make_all(&maker, requests));
                let failed = made.is_err();
                if !deliver(&sender, made.map(|samples| Batch { samples, next_draw })) || failed {
                    return;
                }
            }
        };
        let thread =
            thread::Builder::new().name("data".into()).spawn(produce).map_err(|error| no_threads(error.to_string()))?;
        Ok(Self { batches: Some(receiver), thread: Some(thread) })
    }

    /// The next batch; `None` after the last.
    ///
    /// # Errors
    /// What kept the batch from being made, see [`SampleMaker::make`].
    pub fn next_batch(&mut self) -> Result<Option<Batch>> {
        let received = self.batches.as_ref().and_then(|batches| batches.recv().ok());
        match received {
            Some(batch) => batch.map(Some),
            None if self.join() => Ok(None),
            None => Err(Error::Fault("a data thread stopped before its last batch".into())),
        }
    }

    /// Whether the thread ended in order.
    fn join(&mut self) -> bool {
        self.thread.take().is_none_or(|thread| thread.join().is_ok())
    }
}

impl Drop for Loader {
    fn drop(&mut self) {
        // Without a receiver the thread's next delivery fails, and it ends.
        self.batches = None;
        self.join();
    }
}

/// Makes samples on the current thread pool, in the order of the requests; the first failing one decides the error.
///
/// # Errors
/// See [`SampleMaker::make`].
pub fn make_all(maker: &SampleMaker, requests: Vec<Request>) -> Result<Vec<Sample>> {
    let made: Vec<Result<Sample>> = requests.into_par_iter().map(|request| maker.make(request)).collect();
    made.into_iter().collect()
}

/// False once nobody listens any more.
fn deliver(sender: &SyncSender<Result<Batch>>, batch: Result<Batch>) -> bool {
    sender.send(batch).is_ok()
}
