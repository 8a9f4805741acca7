//! Work in a thread of its own.

use std::thread::{Builder, JoinHandle};

use hyperlora_core::{Error, Result};

/// Work in a thread of its own, and what came of it. Dropped, it waits for the thread.
pub(super) struct Task<T> {
    thread: Option<JoinHandle<Result<T>>>,
    ended: Option<Result<T>>,
}

impl<T: Send + 'static> Task<T> {
    /// Begins `work`.
    pub(super) fn start(work: impl FnOnce() -> Result<T> + Send + 'static) -> Self {
        match Builder::new().name("checkpoint".into()).spawn(work) {
            Ok(thread) => Self { thread: Some(thread), ended: None },
            Err(source) => Self::done(Err(Error::Fault(format!("no thread for the checkpoint: {source}")))),
        }
    }
}

impl<T> Task<T> {
    /// Work that has ended already.
    pub(super) fn done(result: Result<T>) -> Self {
        Self { thread: None, ended: Some(result) }
    }

    /// What came of it; `None` while it is at work.
    pub(super) fn result(&mut self) -> Option<&Result<T>> {
        if self.thread.as_ref().is_some_and(JoinHandle::is_finished) {
            self.wait();
        }
        self.ended.as_ref()
    }

    /// Waits until it has ended.
    pub(super) fn wait(&mut self) {
        if let Some(thread) = self.thread.take() {
            let panicked = |_| Err(Error::Fault("the thread that writes the checkpoint panicked".into()));
            self.ended = Some(thread.join().unwrap_or_else(panicked));
        }
    }

    /// Waits for what comes of it.
    pub(super) fn take(&mut self) -> Option<Result<T>> {
        self.wait();
        self.ended.take()
    }
}

impl<T> Drop for Task<T> {
    fn drop(&mut self) {
        self.wait();
    }
}
