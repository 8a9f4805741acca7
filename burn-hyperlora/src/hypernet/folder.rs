//! Released folder layout.
