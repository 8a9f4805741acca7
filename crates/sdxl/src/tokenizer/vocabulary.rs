//! Built-in CLIP vocabulary, for bases without one: single-file checkpoints.

use std::io::Read;

use flate2::read::GzDecoder;
use hyperlora_core::{Error, Result};
use serde_json::{Map, Value};

pub(super) const START: &str = "<|startoftext|>";
pub(crate) const END: &str = "<|endoftext|>";
/// Suffix of a token that ends a word.
pub(super) const WORD_END: &str = "</w>";

/// Merges of OpenAI's CLIP, one per line, most frequent first (`ci/parity/clip_vocab.py`; licence beside it).
const MERGES: &[u8] = include_bytes!("merges.txt.gz");

/// Returns vocabulary and merges in the form of `vocab.json` and `merges.txt`.
pub(super) fn built_in() -> Result<(Value, Value)> {
    let mut text = String::new();
    GzDecoder::new(MERGES)
        .read_to_string(&mut text)
        .map_err(|problem| Error::Fault(format!("built-in vocabulary: {problem}")))?;
    // Ids are indices of this list: bytes, bytes that end a word, merged pairs, and the start and end tokens.
    let bytes: Vec<String> = byte_characters().map(String::from).collect();
    let ends = bytes.iter().map(|byte| format!("{byte}{WORD_END}"));
    let merged = text.lines().map(|line| line.replace(' ', ""));
    let marks = [START, END].map(String::from);
    let tokens = bytes.iter().cloned().chain(ends).chain(merged).chain(marks);
    let vocabulary: Map<_, _> = tokens.enumerate().map(|(id, token)| (token, id.into())).collect();
    Ok((vocabulary.into(), text.lines().collect()))
}

/// Maps each byte to a printable character: bytes printable in Latin-1 come first and map to themselves, the others map
/// to characters above 255.
fn byte_characters() -> impl Iterator<Item = char> {
    let printable = || (b'!'..=b'~').chain(0xa1..=0xac).chain(0xae..=0xff);
    let others = (0..=u8::MAX).filter(move |byte| !printable().any(|other| other == *byte)).enumerate();
    printable().map(char::from).chain(others.filter_map(|(index, _)| char::from_u32(0x100 + index as u32)))
}
