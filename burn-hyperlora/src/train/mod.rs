//! The training run: stages, steps, state.
