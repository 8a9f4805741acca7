//! Fuzz targets, one for every reader of a foreign file; `ci/fuzz.sh` runs each of them for long.

mod base_files;
mod frames;
mod launchers;
mod runs;
mod samples;
mod tensor_files;
