//! Names of files that are written as safetensors.

use std::path::Path;

use hyperlora_core::{Error, Result};

/// The ending of a safetensors file.
const ENDING: &str = "safetensors";

/// Endings of other formats, which a file of safetensors must not have: tools choose the reader by them.
const OTHERS: [&str; 15] =
    ["bin", "ckpt", "gguf", "h5", "jpeg", "jpg", "json", "msgpack", "npz", "onnx", "pkl", "png", "pt", "pth", "webp"];

/// Checks the name of a safetensors file before the work for it begins. A name without an ending of its own passes, with a
/// warning: other tools would not find the file.
///
/// # Errors
/// Input for the ending of another format.
pub fn check_name(path: &Path) -> Result<()> {
    let ending = path.extension().unwrap_or_default().to_string_lossy().to_lowercase();
    if OTHERS.contains(&ending.as_str()) {
        let problem = format!("ends in .{ending}, and a safetensors file is what is written");
        return Err(Error::file(path, problem, format!("end the name in .{ENDING}")));
    }
    if ending != ENDING {
        tracing::warn!("{}: other tools look for names that end in .{ENDING}", path.display());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ending_of_another_format_is_refused() {
        for (name, passes) in [
            ("a.safetensors", true),
            ("a.SafeTensors", true),
            ("anna.v2", true),
            ("anna", true),
            ("a.ckpt", false),
            ("a.PT", false),
            ("folder/a.bin", false),
        ] {
            assert_eq!(check_name(Path::new(name)).is_ok(), passes, "{name}");
        }
    }
}
