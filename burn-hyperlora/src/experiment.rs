//! The experiment YAML, typed: composes the config of every room and validates it once.
