//! What a run reports: TensorBoard event files, progress, summary.
