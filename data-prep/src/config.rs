//! Reading YAML configurations: unknown keys are errors that name line, column and the nearest key.
