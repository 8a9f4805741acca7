//! Data loader: prepares samples ahead of the training step on its own threads, within a memory limit.

use std::collections::VecDeque;
use std::ops::{ControlFlow, Range};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::time::Duration;

use hyperlora_core::{Error, Result};
use rayon::prelude::*;
use rayon::{ThreadPool, ThreadPoolBuilder};

use crate::data::batch::{Batch, Draws};
use crate::data::rank::Rank;
use crate::data::sample::{Request, Sample, SampleMaker};

/// Interval between stop checks.
const LOOK: Duration = Duration::from_millis(50);

/// Returns the name of the stop signal once the run has received one.
pub type Stop<'a> = &'a dyn Fn() -> Option<&'static str>;

/// Delivers the batches of a range of draws in order.
pub struct Loader {
    pool: ThreadPool,
    maker: Arc<SampleMaker>,
    source: Draws,
    /// Draws of this rank that no thread has started.
    draws: Box<dyn Iterator<Item = u64> + Send>,
    end: u64,
    config: LoaderConfig,
    /// Samples in preparation, in order.
    ahead: VecDeque<Pending>,
    /// Size in bytes of the largest delivered sample.
    largest: usize,
    /// Set once nobody waits for samples any more.
    stopped: Arc<AtomicBool>,
}

struct Pending {
    draw: u64,
    sample: Receiver<Result<Sample>>,
}

/// Loader settings.
#[derive(Debug, Clone, Copy)]
pub struct LoaderConfig {
    /// Batch size of this rank; the last batch may be smaller.
    pub batch_size: usize,
    /// Number of threads that prepare samples.
    pub workers: usize,
    /// Memory limit in bytes of samples in preparation or ready; one batch is always allowed.
    pub prefetch_bytes: usize,
    /// Rank whose draws are delivered.
    pub rank: Rank,
}

impl Loader {
    /// Starts preparing the batches of this rank's share of `draws`.
    ///
    /// # Errors
    /// Fault: the system provides no threads.
    pub fn start(maker: SampleMaker, source: Draws, draws: Range<u64>, config: LoaderConfig) -> Result<Self> {
        let pool = data_threads(config.workers)?;
        let end = draws.end;
        let mut loader = Self {
            pool,
            maker: Arc::new(maker),
            source,
            draws: Box::new(config.rank.draws(draws)),
            end,
            config,
            ahead: VecDeque::new(),
            largest: 0,
            stopped: Arc::default(),
        };
        loader.fill();
        Ok(loader)
    }

    /// Returns the next batch; `None` after the last.
    ///
    /// # Errors
    /// Error of the first failing sample, see [`crate::data::batch::DrawPlan::readable`] and [`SampleMaker::make`].
    pub fn next_batch(&mut self) -> Result<Option<Batch>> {
        let batch = self.next_batch_unless(&|| None)?;
        Ok(batch.continue_value().flatten())
    }

    /// Returns the next batch like [`next_batch`](Self::next_batch), unless the run is asked to stop first: a data
    /// thread may be stuck in a read forever.
    ///
    /// # Errors
    /// Same as [`next_batch`](Self::next_batch).
    pub fn next_batch_unless(&mut self, stop: Stop<'_>) -> Result<ControlFlow<&'static str, Option<Batch>>> {
        let mut samples = Vec::with_capacity(self.config.batch_size);
        let mut next_draw = self.end;
        while samples.len() < self.config.batch_size.max(1)
            && let Some(Pending { draw, sample }) = self.ahead.pop_front()
        {
            let made = wait(&sample, stop).inspect_err(|_| self.stopped.store(true, Ordering::Relaxed))?;
            let sample = match made {
                ControlFlow::Continue(sample) => sample,
                ControlFlow::Break(signal) => return Ok(ControlFlow::Break(signal)),
            };
            self.largest = self.largest.max(sample.bytes());
            samples.push(sample);
            next_draw = self.config.rank.after(draw).min(self.end);
            self.fill();
        }
        Ok(ControlFlow::Continue((!samples.is_empty()).then_some(Batch { samples, next_draw })))
    }

    /// Starts as many samples as fit the memory limit: one batch, until the first sample shows the size.
    fn fill(&mut self) {
        let room = self.config.prefetch_bytes.checked_div(self.largest).unwrap_or(0);
        while self.ahead.len() < room.max(self.config.batch_size).max(1)
            && let Some(draw) = self.draws.next()
        {
            let request = self.source.request(draw);
            let (maker, plan, stopped) = (Arc::clone(&self.maker), self.source.plan(), Arc::clone(&self.stopped));
            let (sender, receiver) = sync_channel(1);
            self.pool.spawn_fifo(move || {
                if !stopped.load(Ordering::Relaxed) {
                    // The receiver may be gone; then the sample is not needed.
                    let _ = sender.send(plan.readable(&maker.dataset, request).and_then(|request| maker.make(request)));
                }
            });
            self.ahead.push_back(Pending { draw, sample: receiver });
        }
    }
}

impl Drop for Loader {
    fn drop(&mut self) {
        self.stopped.store(true, Ordering::Relaxed);
    }
}

/// Creates threads that read and prepare data. Nobody waits for their end.
fn data_threads(number: usize) -> Result<ThreadPool> {
    ThreadPoolBuilder::new()
        .num_threads(number)
        .thread_name(|index| format!("data-{index}"))
        // The sample's receiver notices a panic; without a handler the process would abort.
        .panic_handler(|_| {})
        .build()
        .map_err(|error| Error::Fault(format!("cannot start the data threads: {error}")))
}

/// Waits for the result of a data thread.
fn wait<T>(made: &Receiver<Result<T>>, stop: Stop<'_>) -> Result<ControlFlow<&'static str, T>> {
    loop {
        match made.recv_timeout(LOOK) {
            Ok(made) => return made.map(ControlFlow::Continue),
            Err(RecvTimeoutError::Timeout) => {
                if let Some(signal) = stop() {
                    return Ok(ControlFlow::Break(signal));
                }
            }
            Err(RecvTimeoutError::Disconnected) => {
                return Err(Error::Fault("a data thread stopped before its sample".into()));
            }
        }
    }
}

/// Reads data on separate threads, so that the training thread can react to a stop request while a read is stuck. They
/// are not the threads that compute tensors, so a stuck read does not keep a checkpoint from being written.
pub struct Aside {
    pool: ThreadPool,
}

impl Aside {
    /// Starts as many threads as compute threads.
    ///
    /// # Errors
    /// Fault: the system provides no threads.
    pub fn start() -> Result<Self> {
        Ok(Self { pool: data_threads(rayon::current_num_threads())? })
    }

    /// Runs `work`, unless the run is asked to stop first.
    ///
    /// # Errors
    /// Errors of `work`; Fault: it panics.
    pub fn read<T: Send + 'static>(
        &self,
        stop: Stop<'_>,
        work: impl FnOnce() -> Result<T> + Send + 'static,
    ) -> Result<ControlFlow<&'static str, T>> {
        let (sender, made) = sync_channel(1);
        self.pool.spawn(move || {
            // The receiver may be gone; then the result is not needed.
            let _ = sender.send(work());
        });
        wait(&made, stop)
    }
}

/// Prepares samples on the current thread pool, in the order of the requests. The first failing one determines the
/// error.
///
/// # Errors
/// Same as [`SampleMaker::make`].
pub fn make_all(maker: &SampleMaker, requests: Vec<Request>) -> Result<Vec<Sample>> {
    let made: Vec<Result<Sample>> = requests.into_par_iter().map(|request| maker.make(request)).collect();
    made.into_iter().collect()
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;
    use std::sync::mpsc::channel;

    use super::*;

    #[test]
    fn a_read_that_is_stuck_holds_up_nobody_who_is_to_stop() {
        let aside = Aside::start().unwrap();
        assert_eq!(aside.read(&|| Some("SIGTERM"), || Ok(7)).unwrap(), ControlFlow::Continue(7));
        assert!(aside.read::<()>(&|| None, || Err(Error::Fault("unreadable".into()))).is_err());

        // More reads than there are threads, and none ever ends.
        let (hold, held) = channel::<()>();
        let held = Arc::new(std::sync::Mutex::new(held));
        for _ in 0..2 * rayon::current_num_threads() {
            let (looks, held) = (AtomicUsize::new(0), Arc::clone(&held));
            let asked_later = || (looks.fetch_add(1, Ordering::Relaxed) == 1).then_some("SIGHUP");
            let stuck = move || held.lock().unwrap().recv().map_err(|_| Error::Fault("let go".into()));
            assert_eq!(aside.read(&asked_later, stuck).unwrap(), ControlFlow::Break("SIGHUP"));
        }
        drop(aside);
        drop(hold);
    }
}
