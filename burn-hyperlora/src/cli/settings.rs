//! Settings of the tensor library. By itself it takes them from `burn.toml` and `cubecl.toml` in the current folder or above
//! it, and compiled kernels from a folder `target` there: whoever made that folder would choose files to overwrite and code
//! to run. Only environment variables change them here.

use burn::BurnConfig;
use cubecl_environment::config::RuntimeConfig;

/// Settles what would be looked for in the current folder. To be called before any tensor is made.
pub(super) fn pass_over_current_folder() {
    // Where it is settled already, it stays as it is.
    BurnConfig::try_set(BurnConfig::default().override_from_env());
}

/// Names the file in which compiled and tuned kernels are kept for the next start: by machine and rank, so that no two ranks of
/// a run write to the same one, nor two machines over a network file system. `CUBECL_ENVIRONMENT` gives it another name.
///
/// # Errors
/// Input where the cache folder cannot be resolved.
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
