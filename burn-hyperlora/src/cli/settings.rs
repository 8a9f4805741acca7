//! Settings of the tensor library. By default the library reads `burn.toml` and `cubecl.toml` from the current folder
//! or above it, and compiled kernels from a folder `target` there. Whoever made that folder could choose files to
//! overwrite and code to run, so this program accepts settings only from environment variables.

use burn::BurnConfig;
use cubecl_environment::config::RuntimeConfig;

/// Fixes the settings that the library would look for in the current folder. Call it before any tensor is made.
pub(super) fn pass_over_current_folder() {
    // Settings that are already fixed stay as they are.
    BurnConfig::try_set(BurnConfig::default().override_from_env());
}

/// Sets the cache file of compiled and tuned kernels for the next start. The name contains machine and rank, so that
/// two ranks of a run, or two machines on a network file system, do not write to the same file. `CUBECL_ENVIRONMENT`
/// overrides the name.
///
/// # Errors
/// Input: the cache folder cannot be resolved.
#[cfg(feature = "cuda")]
pub(super) fn keep_kernels(local_rank: usize) -> hyperlora_core::Result<()> {
    use cubecl_runtime::config::CubeClRuntimeConfig;
    use cubecl_runtime::config::cache::CacheConfig;
    use cubecl_runtime::config::environment::EnvironmentConfig;
    use hyperlora_core::config::ConfigPath;

    let mut config = CubeClRuntimeConfig::default().override_from_env();
    if config.environment.name == EnvironmentConfig::default().name {
        config.environment.name = format!("{}-{local_rank}", hyperlora_ranks::host_name());
    }
    let folder = ConfigPath::new("${HYPERLORA_CACHE:-~/.cache/hyperlora}/kernels").resolve(std::path::Path::new(""))?;
    let absolute = std::path::absolute(&folder).map_err(|source| hyperlora_core::Error::read(&folder, source))?;
    config.environment.path = CacheConfig::Directory(absolute);
    CubeClRuntimeConfig::try_set(config);
    Ok(())
}
