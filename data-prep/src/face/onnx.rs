//! What an ONNX file says about itself, read without ONNX Runtime and without its weights.
//!
//! The file is a protobuf message (onnx.proto of ONNX 1.x: `ModelProto`, `GraphProto`, `ValueInfoProto`). Only the fields
//! named here are looked at; the rest is stepped over, so that the headers of a folder of models cost next to nothing, and
//! a damaged file is told with its remedy before a native library sees it.

use std::collections::HashSet;
use std::fmt;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;

use crate::error::{Error, Result};

/// Inputs, outputs and the beginning of a model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Header {
    /// What a caller has to give: inputs with a stored value are left out.
    pub(super) inputs: Vec<Slot>,
    pub(super) outputs: Vec<Slot>,
    /// Names of the first eight nodes; insightface tells by them how pixels are normalised.
    pub(super) first_nodes: Vec<String>,
}

/// An input or output.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Slot {
    pub(super) name: String,
    /// f32 tensor: its lengths, `None` where any goes. Empty for another type.
    pub(super) shape: Vec<Option<usize>>,
}

impl fmt::Display for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let lengths: Vec<_> =
            self.shape.iter().map(|length| length.map_or("?".to_owned(), |length| length.to_string())).collect();
        write!(f, "{} [{}]", self.name, lengths.join(", "))
    }
}

const REMEDY: &str = "fetch the file again and compare its size with the original's";
const FIRST_NODES: usize = 8;
const FLOAT: u64 = 1;
/// Longest name of a tensor or node that makes sense, in bytes.
const LONGEST_NAME: u64 = 4096;

/// Reads the header of the ONNX file `file`.
///
/// # Errors
/// Input: missing, no ONNX file, or one that ends early. Disk: reading failed.
pub(super) fn read_header(file: &Path) -> Result<Header> {
    let failed = |source| Error::read(file, source);
    let opened = File::open(file).map_err(failed)?;
    let metadata = opened.metadata().map_err(failed)?;
    if !metadata.is_file() {
        return Err(Error::file(file, "is not a file", "give the ONNX file's own path"));
    }
    let mut reader = BufReader::new(opened);
    refuse_lookalikes(file, reader.fill_buf().map_err(failed)?)?;

    let mut walker = Walker { file, reader, at: 0 };
    let mut model = Fields { at: 0, end: metadata.len() };
    let (mut version, mut graph) = (None, None);
    while let Some(field) = walker.next(&mut model)? {
        match field {
            (1, Value::Number(number)) => version = Some(number),
            (7, Value::Bytes(fields)) => graph = Some(fields),
            _ => {}
        }
    }
    match (version, graph) {
        (Some(1..), Some(graph)) => walker.graph(graph),
        _ => Err(walker.damaged("holds no model graph")),
    }
}

/// What downloads leave in a model's place.
fn refuse_lookalikes(file: &Path, start: &[u8]) -> Result<()> {
    let (problem, remedy) = if start.is_empty() {
        ("is empty", "fetch the file again")
    } else if start.starts_with(b"version https://git-lfs") {
        ("is a Git LFS pointer, not the model", "run `git lfs pull` where it came from, or download the file itself")
    } else if start.trim_ascii_start().starts_with(b"<") {
        ("is an HTML or XML page, not a model", "download the file itself, not the page that shows it")
    } else if start.starts_with(b"PK\x03\x04") {
        ("is a ZIP archive, not a model", "unpack it, and give the folder with the ONNX files")
    } else {
        return Ok(());
    };
    Err(Error::file(file, problem, remedy))
}

/// A message's fields that are still to come, by their places in the file.
#[derive(Debug, Clone, Copy)]
struct Fields {
    at: u64,
    end: u64,
}

/// A field's value.
enum Value {
    Number(u64),
    /// A text or a message.
    Bytes(Fields),
    /// A number of fixed width, which no field that is read here has.
    Fixed,
}

/// Steps through the file.
struct Walker<'a> {
    file: &'a Path,
    reader: BufReader<File>,
    at: u64,
}

impl Walker<'_> {
    fn graph(&mut self, mut graph: Fields) -> Result<Header> {
        let mut header = Header { inputs: Vec::new(), outputs: Vec::new(), first_nodes: Vec::new() };
        let mut stored = HashSet::new();
        while let Some(field) = self.next(&mut graph)? {
            match field {
                (1, Value::Bytes(node)) if header.first_nodes.len() < FIRST_NODES => {
                    header.first_nodes.push(self.text_of(node, 3)?);
                }
                (5, Value::Bytes(tensor)) => {
                    stored.insert(self.text_of(tensor, 8)?);
                }
                (11, Value::Bytes(input)) => header.inputs.push(self.slot(input)?),
                (12, Value::Bytes(output)) => header.outputs.push(self.slot(output)?),
                _ => {}
            }
        }
        header.inputs.retain(|input| !stored.contains(&input.name));
        Ok(header)
    }

    /// A `ValueInfoProto`.
    fn slot(&mut self, mut info: Fields) -> Result<Slot> {
        let mut slot = Slot { name: String::new(), shape: Vec::new() };
        while let Some(field) = self.next(&mut info)? {
            match field {
                (1, Value::Bytes(name)) => slot.name = self.text(name)?,
                (2, Value::Bytes(mut kind)) => {
                    while let Some(field) = self.next(&mut kind)? {
                        if let (1, Value::Bytes(tensor)) = field {
                            slot.shape = self.shape(tensor)?;
                        }
                    }
                }
                _ => {}
            }
        }
        Ok(slot)
    }

    /// A `TypeProto.Tensor`.
    fn shape(&mut self, mut tensor: Fields) -> Result<Vec<Option<usize>>> {
        let (mut element, mut shape) = (0, Vec::new());
        while let Some(field) = self.next(&mut tensor)? {
            match field {
                (1, Value::Number(number)) => element = number,
                (2, Value::Bytes(mut dimensions)) => {
                    while let Some(field) = self.next(&mut dimensions)? {
                        if let (1, Value::Bytes(dimension)) = field {
                            shape.push(self.length(dimension)?);
                        }
                    }
                }
                _ => {}
            }
        }
        if element != FLOAT {
            shape.clear();
        }
        Ok(shape)
    }

    /// A `TensorShapeProto.Dimension`; zero and negative lengths stand for any.
    fn length(&mut self, mut dimension: Fields) -> Result<Option<usize>> {
        let mut length = None;
        while let Some(field) = self.next(&mut dimension)? {
            if let (1, Value::Number(number)) = field {
                length = i64::try_from(number).ok().and_then(|number| usize::try_from(number).ok());
            }
        }
        Ok(length.filter(|&length| length > 0))
    }

    /// The text in the field with this number; empty where there is none.
    fn text_of(&mut self, mut message: Fields, number: u64) -> Result<String> {
        let mut text = String::new();
        while let Some((found, value)) = self.next(&mut message)? {
            if let Value::Bytes(bytes) = value
                && found == number
            {
                text = self.text(bytes)?;
            }
        }
        Ok(text)
    }

    fn text(&mut self, bytes: Fields) -> Result<String> {
        let length = bytes.end - bytes.at;
        if length > LONGEST_NAME {
            return Err(self.damaged(format_args!("has a name of {length} bytes")));
        }
        self.seek(bytes.at)?;
        let mut text = vec![0; length as usize];
        self.fill(&mut text)?;
        String::from_utf8(text).map_err(|_| self.damaged("has a name that is not UTF-8"))
    }

    /// The next field of a message: its number and value. Moves `fields` behind it.
    fn next(&mut self, fields: &mut Fields) -> Result<Option<(u64, Value)>> {
        if fields.at == fields.end {
            return Ok(None);
        }
        self.seek(fields.at)?;
        let tag = self.varint(fields.end)?;
        let (value, end) = match tag & 7 {
            0 => (Value::Number(self.varint(fields.end)?), self.at),
            1 => (Value::Fixed, self.at.saturating_add(8)),
            2 => {
                let length = self.varint(fields.end)?;
                let inner = Fields { at: self.at, end: self.at.saturating_add(length) };
                (Value::Bytes(inner), inner.end)
            }
            5 => (Value::Fixed, self.at.saturating_add(4)),
            _ => return Err(self.damaged("is no ONNX file")),
        };
        if end > fields.end {
            let (at, missing) = (self.at, end - fields.end);
            return Err(self.damaged(format_args!("ends early: what stands at byte {at} lacks {missing} bytes")));
        }
        fields.at = end;
        Ok(Some((tag >> 3, value)))
    }

    /// A number of up to ten bytes with seven bits each, the lowest first.
    fn varint(&mut self, end: u64) -> Result<u64> {
        let mut number = 0;
        for shift in (0..64).step_by(7) {
            if self.at >= end {
                return Err(self.damaged("ends early: in the middle of a number"));
            }
            let mut byte = [0];
            self.fill(&mut byte)?;
            number |= u64::from(byte[0] & 0x7f) << shift;
            if byte[0] < 0x80 {
                return Ok(number);
            }
        }
        Err(self.damaged("is no ONNX file"))
    }

    fn seek(&mut self, to: u64) -> Result<()> {
        let failed = |source| Error::read(self.file, source);
        self.reader.seek_relative(to.wrapping_sub(self.at).cast_signed()).map_err(failed)?;
        self.at = to;
        Ok(())
    }

    fn fill(&mut self, bytes: &mut [u8]) -> Result<()> {
        self.reader.read_exact(bytes).map_err(|source| Error::read(self.file, source))?;
        self.at += bytes.len() as u64;
        Ok(())
    }

    fn damaged(&self, problem: impl fmt::Display) -> Error {
        Error::file(self.file, problem, REMEDY)
    }
}
