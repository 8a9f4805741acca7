//! Samples made ahead of the training step, on threads of their own, within a bound of bytes.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, sync_channel};

use rayon::prelude::*;
use rayon::{ThreadPool, ThreadPoolBuilder};

use crate::data::batch::{Batch, Draws};
use crate::data::rank::Rank;
use crate::data::sample::{Request, Sample, SampleMaker};
use crate::error::{Error, Result};

/// Delivers the batches of a range of draws in order.
pub struct Loader {
    pool: ThreadPool,
    maker: Arc<SampleMaker>,
    source: Draws,
    /// This rank's draws that nobody works on yet.
    draws: Box<dyn Iterator<Item = u64> + Send>,
    end: u64,
    config: LoaderConfig,
    /// What is being made, in order.
    ahead: VecDeque<Pending>,
    /// The largest sample that was delivered.
    largest: usize,
    /// Raised once nobody listens any more.
    stopped: Arc<AtomicBool>,
}

struct Pending {
    draw: u64,
    sample: Receiver<Result<Sample>>,
}

/// How batches are made ahead.
#[derive(Debug, Clone, Copy)]
pub struct LoaderConfig {
    /// Samples in a batch of this rank; the last one may hold fewer.
    pub batch_size: usize,
    /// Threads that make samples.
    pub workers: usize,
    /// Bytes of samples that may be in the making or wait ready; one batch always may.
    pub prefetch_bytes: usize,
    /// Which of the draws are delivered.
    pub rank: Rank,
}

impl Loader {
    /// Starts to make the batches of this rank's part of `draws`.
    ///
    /// # Errors
    /// Fault when the system gives no threads.
    pub fn start(maker: SampleMaker, source: Draws, draws: Range<u64>, config: LoaderConfig) -> Result<Self> {
        let pool = ThreadPoolBuilder::new()
            .num_threads(config.workers)
            .thread_name(|index| format!("data-{index}"))
            // The sample's receiver notices; without a handler the process would abort.
            .panic_handler(|_| {})
            .build()
            .map_err(|error| Error::Fault(format!("cannot start the data threads: {error}")))?;
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

    /// The next batch; `None` after the last.
    ///
    /// # Errors
    /// What kept the first failing sample from being made, see [`crate::data::batch::DrawPlan::readable`] and [`SampleMaker::make`].
    pub fn next_batch(&mut self) -> Result<Option<Batch>> {
        let mut samples = Vec::with_capacity(self.config.batch_size);
        let mut next_draw = self.end;
        while samples.len() < self.config.batch_size.max(1)
            && let Some(Pending { draw, sample }) = self.ahead.pop_front()
        {
            let made = sample.recv().map_err(|_| Error::Fault("a data thread stopped before its sample".into()))?;
            let sample = made.inspect_err(|_| self.stopped.store(true, Ordering::Relaxed))?;
            self.largest = self.largest.max(sample.bytes());
            samples.push(sample);
            next_draw = self.config.rank.after(draw).min(self.end);
            self.fill();
        }
        Ok((!samples.is_empty()).then_some(Batch { samples, next_draw }))
    }

    /// Sets the threads to work on as many samples as there is room for. Until a first sample tells how large they are,
    /// that is one batch.
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
                    // Nobody may listen any more: then the sample is not missed.
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

/// Makes samples on the current thread pool, in the order of the requests; the first failing one decides the error.
///
/// # Errors
/// See [`SampleMaker::make`].
pub fn make_all(maker: &SampleMaker, requests: Vec<Request>) -> Result<Vec<Sample>> {
    let made: Vec<Result<Sample>> = requests.into_par_iter().map(|request| maker.make(request)).collect();
    made.into_iter().collect()
}
