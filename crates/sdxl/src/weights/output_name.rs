//! File names of safetensors output.

use std::path::Path;

use hyperlora_core::{Error, Result};

/// Extension of a safetensors file.
const ENDING: &str = "safetensors";

/// Extensions of other formats, which a safetensors file must not have, because tools choose the reader by extension.
const OTHERS: [&str; 15] =
    ["bin", "ckpt", "gguf", "h5", "jpeg", "jpg", "json", "msgpack", "npz", "onnx", "pkl", "png", "pt", "pth", "webp"];

/// Checks the name of a safetensors file before any work starts. A name without a known extension passes with a
/// warning, because other tools would not find the file.
///
/// # Errors
/// Input: the extension belongs to another format.
pub fn check_name(path: &Path) -> Result<()> {
    let ending = path.extension().unwrap_or_default().to_string_lossy().to_lowercase();
    if OTHERS.contains(&ending.as_str()) {
        let problem = format!("ends in .{ending}, but the output is a safetensors file");
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
