//! The build without the feature `tui`: no curves are ever opened.

/// Tells whether this build can draw live curves.
pub(in crate::metrics) const AVAILABLE: bool = false;

pub(in crate::metrics) fn is_open() -> bool {
    false
}

/// Curves that no build without the feature `tui` opens.
#[derive(Debug)]
pub enum LiveCurves {}

impl LiveCurves {
    /// Opens nothing.
    pub fn open(_stages: usize) -> Option<Self> {
        None
    }

    /// Shows nothing.
    pub fn begin_stage(&mut self, _index: usize, _name: &str, _done: u64, _total: u64) {
        match *self {}
    }

    /// Shows nothing.
    pub fn step(&mut self, _done: u64) {
        match *self {}
    }

    /// Shows nothing.
    pub fn add(&mut self, _values: &[(String, f64)]) {
        match *self {}
    }

    /// Cannot be called.
    pub fn asked_to_stop(&self) -> bool {
        match *self {}
    }
}
