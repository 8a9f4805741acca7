//! Live curves in a terminal: the renderer of burn-train, fed by the training session.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use burn_train::Interrupter;
use burn_train::logger::TrainingProgressLogger;
use burn_train::metric::{MetricDefinition, MetricEntry, MetricId, NumericAttributes, NumericEntry, SerializedEntry};
use burn_train::renderer::tui::TuiMetricsRendererWrapper;
use burn_train::renderer::{MetricState, MetricsRenderer, MetricsRendererTraining};

/// Tells whether this build can draw live curves.
pub(in crate::metrics) const AVAILABLE: bool = true;

/// Set while the curves fill the terminal: a log line would tear them.
static OPEN: AtomicBool = AtomicBool::new(false);

/// Returns true while curves fill the terminal.
pub(in crate::metrics) fn is_open() -> bool {
    OPEN.load(Ordering::Relaxed)
}

/// Curves on the terminal until it is dropped.
pub struct LiveCurves {
    renderer: TuiMetricsRendererWrapper,
    interrupter: Interrupter,
    metrics: BTreeMap<String, MetricId>,
    stages: usize,
}

impl LiveCurves {
    /// Opens the curves of a training with `stages` stages.
    pub fn open(stages: usize) -> Option<Self> {
        OPEN.store(true, Ordering::Relaxed);
        let interrupter = Interrupter::new();
        let renderer = TuiMetricsRendererWrapper::new(interrupter.clone(), None);
        Some(Self { renderer, interrupter, metrics: BTreeMap::new(), stages })
    }

    /// Shows the progress of stage `index`, called `name`, which stands at `done` of `total` steps.
    pub fn begin_stage(&mut self, index: usize, name: &str, done: u64, total: u64) {
        self.renderer.start(self.stages, index + 1, Some(total as usize), Some(name));
        self.renderer.start_split("train", total as usize);
        self.step(done);
    }

    /// Shows that `done` steps of the stage are done.
    pub fn step(&mut self, done: u64) {
        self.renderer.update_split(done as usize);
    }

    /// Adds a point to each curve; a new name begins a curve.
    pub fn add(&mut self, values: &[(String, f64)]) {
        for (name, value) in values {
            let id = match self.metrics.get(name) {
                Some(id) => id.clone(),
                None => self.register(name),
            };
            let text = format!("{value:.5}");
            let entry = MetricEntry::new(id, SerializedEntry::new(text.clone(), text));
            self.renderer.update_train(MetricState::Numeric(entry, Some(NumericEntry::Value(*value))));
        }
    }

    /// Returns true once the user pressed `q` and confirmed.
    pub fn asked_to_stop(&self) -> bool {
        self.interrupter.should_stop()
    }

    fn register(&mut self, name: &str) -> MetricId {
        let name = Arc::new(name.to_owned());
        let id = MetricId::new(Arc::clone(&name));
        self.metrics.insert(name.to_string(), id.clone());
        self.renderer.register_metric(MetricDefinition {
            metric_id: id.clone(),
            name,
            description: None,
            attributes: NumericAttributes { unit: None, higher_is_better: false }.into(),
        });
        id
    }
}

impl fmt::Debug for LiveCurves {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.debug_struct("LiveCurves").field("metrics", &self.metrics.len()).finish_non_exhaustive()
    }
}

impl Drop for LiveCurves {
    fn drop(&mut self) {
        // The renderer restores the terminal when it is dropped, after this.
        OPEN.store(false, Ordering::Relaxed);
    }
}
