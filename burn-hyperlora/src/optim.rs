//! AdamW over named parameters, learning-rate schedules, gradient clipping.
