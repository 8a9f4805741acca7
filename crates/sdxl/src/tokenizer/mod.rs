//! CLIP's byte-pair tokenizer (transformers `CLIPTokenizer`), from `vocab.json` and `merges.txt` or from
//! `tokenizer.json`.

use std::path::{Path, PathBuf};

use hyperlora_core::{Error, Result};
use serde_json::{Value, json};
use tokenizers::models::bpe::BPE;
use tokenizers::normalizers::replace::ReplacePattern;
use tokenizers::normalizers::{Lowercase, NFC, Replace, Sequence as Normalizers};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence as PreTokenizers;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{AddedToken, SplitDelimiterBehavior, Tokenizer};

use self::vocabulary::{START, WORD_END};
use crate::weights::{parse_json, read_text};

mod vocabulary;

pub(crate) use self::vocabulary::END;

/// Tokens of every encoded prompt.
pub const PROMPT_TOKENS: usize = 77;

/// Largest token id: ids index an embedding table as 32-bit integers.
const LARGEST_ID: u64 = i32::MAX as u64;

/// Tokens of text in a prompt, between the start and end tokens.
pub const TEXT_TOKENS: usize = PROMPT_TOKENS - 2;

/// Pattern that splits text before byte-pair encoding: contractions, words, single digits, runs of anything else.
const PIECES: &str = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+";

/// A CLIP tokenizer.
///
/// # Examples
/// ```
/// use hyperlora_sdxl::tokenizer::{ClipTokenizer, PROMPT_TOKENS};
///
/// // `ClipTokenizer::load` reads the vocabulary of a base instead.
/// let tokenizer = ClipTokenizer::built_in("<|endoftext|>")?;
/// let tokens = tokenizer.encode("a photo of a person")?;
/// assert_eq!(tokens[..7], [49406, 320, 1125, 539, 320, 2533, 49407]);
/// assert_eq!(tokens.len(), PROMPT_TOKENS);
/// assert_eq!(tokenizer.count("a photo of a person")?, 5);
/// # Ok::<(), hyperlora_core::Error>(())
/// ```
#[derive(Debug)]
pub struct ClipTokenizer {
    tokenizer: Tokenizer,
    start: i32,
    end: i32,
    pad: i32,
}

impl ClipTokenizer {
    /// Loads a folder in either layout of transformers. The pad token comes from `tokenizer_config.json` or
    /// `special_tokens_map.json` (SDXL's second tokenizer pads with `!`) and defaults to `<|endoftext|>`.
    ///
    /// # Errors
    /// Input: files are missing or broken, or the vocabulary lacks tokens that CLIP needs.
    pub fn load(folder: &Path) -> Result<Self> {
        let (vocabulary, merges, origin) = read_vocabulary(folder)?;
        Self::new(vocabulary, merges, &origin, &pad_token(folder)?)
    }

    /// Loads CLIP's own vocabulary of 49408 tokens, padding with `pad`.
    ///
    /// # Errors
    /// Fault: the built-in data is damaged.
    pub fn built_in(pad: &str) -> Result<Self> {
        let (vocabulary, merges) = vocabulary::built_in()?;
        Self::new(vocabulary, merges, Path::new("the built-in vocabulary"), pad)
    }

    fn new(vocabulary: Value, merges: Value, origin: &Path, pad: &str) -> Result<Self> {
        let broken = |problem: &dyn std::fmt::Display| {
            Error::file(origin, format!("no CLIP vocabulary: {problem}"), "use the tokenizer folder of the base model")
        };
        let ids = vocabulary.as_object().into_iter().flatten();
        if let Some((token, id)) = ids.into_iter().find(|(_, id)| id.as_u64().is_some_and(|id| id > LARGEST_ID)) {
            return Err(broken(&format_args!("token {token} has the id {id}")));
        }
        // The model is built from JSON, because the library's file reader only accepts borrowed text, and one path
        // serves both sources.
        let model = json!({
            "type": "BPE",
            "vocab": vocabulary,
            "merges": merges,
            "dropout": null,
            "unk_token": END,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": WORD_END,
            "fuse_unk": false,
        });
        let model: BPE = serde_json::from_str(&model.to_string()).map_err(|problem| broken(&problem))?;

        let mut tokenizer = Tokenizer::new(model);
        let id = |token: &str| {
            let id = tokenizer.token_to_id(token).and_then(|id| i32::try_from(id).ok());
            id.ok_or_else(|| broken(&format_args!("token {token} is missing")))
        };
        let (start, end, pad_id) = (id(START)?, id(END)?, id(pad)?);

        let spaces = Replace::new(ReplacePattern::Regex(r"\s+".into()), " ").map_err(fault)?;
        let normalizers = Normalizers::new(vec![NFC.into(), spaces.into(), Lowercase.into()]);
        let pieces = Split::new(SplitPattern::Regex(PIECES.into()), SplitDelimiterBehavior::Removed, true);
        let pieces = pieces.map_err(fault)?;
        let bytes = ByteLevel::new(false, true, true);
        tokenizer.with_normalizer(Some(normalizers));
        tokenizer.with_pre_tokenizer(Some(PreTokenizers::new(vec![pieces.into(), bytes.into()])));
        tokenizer.add_special_tokens(&[START, END, pad].map(|token| AddedToken::from(token, true)));
        Ok(Self { tokenizer, start, end, pad: pad_id })
    }

    /// Vocabulary size: one more than the highest id.
    pub fn vocabulary_size(&self) -> usize {
        self.tokenizer.get_vocab(true).into_values().max().map_or(0, |id| id as usize + 1)
    }

    /// Counts the tokens of `text`, of which [`encode`](Self::encode) takes the first [`TEXT_TOKENS`].
    ///
    /// # Errors
    /// Same as [`encode`](Self::encode).
    pub fn count(&self, text: &str) -> Result<usize> {
        Ok(self.tokenizer.encode_fast(text, false).map_err(fault)?.len())
    }

    /// Encodes `text` to token ids: start, at most 75 of the text, end, then padding up to [`PROMPT_TOKENS`].
    ///
    /// # Errors
    /// Fault: the tokenizer library fails on the text.
    pub fn encode(&self, text: &str) -> Result<Vec<i32>> {
        let encoding = self.tokenizer.encode_fast(text, false).map_err(fault)?;
        let mut ids = Vec::with_capacity(PROMPT_TOKENS);
        ids.push(self.start);
        for &id in encoding.get_ids().iter().take(TEXT_TOKENS) {
            ids.push(i32::try_from(id).map_err(|problem| fault(problem.into()))?);
        }
        ids.push(self.end);
        ids.resize(PROMPT_TOKENS, self.pad);
        Ok(ids)
    }
}

fn fault(problem: tokenizers::Error) -> Error {
    Error::Fault(format!("tokenizer: {problem}"))
}

/// Reads the vocabulary and merges, and returns their file for messages.
fn read_vocabulary(folder: &Path) -> Result<(Value, Value, PathBuf)> {
    let path = folder.join("vocab.json");
    if path.is_file() {
        let merges = folder.join("merges.txt");
        let text = read_text(&merges)?;
        let lines = text.lines().filter(|line| !line.starts_with("#version") && !line.is_empty());
        return Ok((read_json(&path)?, lines.collect(), path));
    }
    let path = folder.join("tokenizer.json");
    if !path.is_file() {
        return Err(Error::file(
            folder,
            "holds neither vocab.json with merges.txt nor tokenizer.json",
            "use the tokenizer folder of the base model",
        ));
    }
    let mut whole = read_json(&path)?;
    let mut part = |name| whole.pointer_mut(name).map(Value::take).unwrap_or_default();
    Ok((part("/model/vocab"), part("/model/merges"), path))
}

fn pad_token(folder: &Path) -> Result<String> {
    for name in ["tokenizer_config.json", "special_tokens_map.json"] {
        let path = folder.join(name);
        if !path.is_file() {
            continue;
        }
        // The pad token is a plain string, or an object that describes it.
        let json = read_json(&path)?;
        let token = json.get("pad_token").filter(|token| !token.is_null());
        let Some(token) = token else { continue };
        return token.as_str().or(token["content"].as_str()).map(String::from).ok_or_else(|| {
            let place = format!("{}: pad_token", path.display());
            Error::input(place, format!("{token} is not a token"), "give the token as a string")
        });
    }
    Ok(END.into())
}

fn read_json(path: &Path) -> Result<Value> {
    parse_json(&read_text(path)?)
        .map_err(|problem| Error::file(path, problem, "use the tokenizer folder of the base model"))
}
