//! Background task in its own thread.

use std::thread::{Builder, JoinHandle};

use hyperlora_core::{Error, Result};

/// Task in its own thread, with its result. Dropping it waits for the thread.
pub(super) struct Task<T> {
    thread: Option<JoinHandle<Result<T>>>,
    ended: Option<Result<T>>,
}

impl<T: Send + 'static> Task<T> {
    /// Starts `work`.
    pub(super) fn start(work: impl FnOnce() -> Result<T> + Send + 'static) -> Self {
        match Builder::new().name("checkpoint".into()).spawn(work) {
            Ok(thread) => Self { thread: Some(thread), ended: None },
            Err(source) => Self::done(Err(Error::Fault(format!("the checkpoint thread cannot be started: {source}")))),
        }
    }
}

impl<T> Task<T> {
    /// Creates a task that has already ended.
    pub(super) fn done(result: Result<T>) -> Self {
        Self { thread: None, ended: Some(result) }
    }

    /// Returns the result; `None` while the task runs.
    pub(super) fn result(&mut self) -> Option<&Result<T>> {
        if self.thread.as_ref().is_some_and(JoinHandle::is_finished) {
            self.wait();
        }
        self.ended.as_ref()
    }

    /// Waits for the end of the task.
    pub(super) fn wait(&mut self) {
        if let Some(thread) = self.thread.take() {
            let panicked = |_| Err(Error::Fault("the thread that writes the checkpoint panicked".into()));
            self.ended = Some(thread.join().unwrap_or_else(panicked));
        }
    }

    /// Waits for the result and takes it out.
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
