//! Headers of ONNX files, read without ONNX Runtime and without the weights.
//!
//! The file is a protobuf message (onnx.proto of ONNX 1.x: `ModelProto`, `GraphProto`, `ValueInfoProto`). Only the
//! fields named here are read and the rest is skipped, so that reading the headers of a folder costs almost nothing,
//! and a damaged file is reported with its remedy before a native library opens it.

use std::collections::{BTreeSet, HashSet};
use std::fmt;
use std::fs::File;
use std::io::{BufRead, BufReader, ErrorKind, Read};
use std::path::Path;

use hyperlora_core::paths::{Root, is_plain, open_regular};
use hyperlora_core::{Error, Result};

/// Inputs, outputs and first nodes of a model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Header {
    /// Inputs that a caller must provide, without those that have a stored value.
    pub(super) inputs: Vec<Slot>,
    pub(super) outputs: Vec<Slot>,
    /// Names of the first eight nodes, from which insightface infers how pixels are normalised.
    pub(super) first_nodes: Vec<String>,
}

/// Input or output of a model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Slot {
    pub(super) name: String,
    /// Lengths of an f32 tensor, `None` for any length. Empty for another type.
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
/// Longest plausible name of a tensor or node, in bytes.
const LONGEST_NAME: u64 = 4096;

/// Reads the header of the ONNX file `file`.
///
/// # Errors
/// Input: missing, not an ONNX file, or truncated. Disk: reading failed.
pub(super) fn read_header(file: &Path) -> Result<Header> {
    let (mut walker, mut model) = Walker::open(file)?;
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

/// Checks that a model keeps its external weights in files below its own folder: ONNX Runtime would read any file that
/// they name.
///
/// # Errors
/// As [`read_header`]. Input also for a name that leads elsewhere.
pub(super) fn check_external_data(file: &Path) -> Result<()> {
    let (mut walker, model) = Walker::open(file)?;
    let mut names = BTreeSet::new();
    walker.external_data(Message::Model, model, 0, &mut names)?;
    if names.is_empty() {
        return Ok(());
    }
    let folder = file.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let root = Root::open(folder)?;
    for name in names {
        // A name with `*` denotes a memory address: `*/_ORT_MEM_ADDR_/*`.
        let opened = if is_plain(&name) && !name.contains('*') {
            root.open_file(Path::new(&name)).map_err(|source| source.to_string())
        } else {
            Err("which leads out of the model's folder".into())
        };
        if let Err(problem) = opened {
            let remedy = "use a model whose weights lie in regular files beside it, or in its own file";
            return Err(Error::file(file, format!("keeps weights in `{name}`: {problem}"), remedy));
        }
    }
    Ok(())
}

/// Message of onnx.proto that contains weights, directly or in another message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Message {
    Model,
    Training,
    Function,
    Graph,
    Node,
    Attribute,
    SparseTensor,
    Tensor,
    /// A `StringStringEntryProto` in `TensorProto.external_data`.
    External,
}

impl Message {
    /// Returns the message in the field with this number.
    fn inner(self, number: u64) -> Option<Self> {
        Some(match (self, number) {
            (Self::Model, 7) | (Self::Training, 1 | 2) | (Self::Attribute, 6 | 11) => Self::Graph,
            (Self::Model, 20) => Self::Training,
            (Self::Model, 25) => Self::Function,
            (Self::Graph, 1) | (Self::Function, 7) => Self::Node,
            (Self::Node, 5) | (Self::Function, 11) => Self::Attribute,
            (Self::Graph, 15) | (Self::Attribute, 22 | 23) => Self::SparseTensor,
            (Self::Graph, 5) | (Self::Attribute, 5 | 10) | (Self::SparseTensor, 1 | 2) => Self::Tensor,
            (Self::Tensor, 13) => Self::External,
            _ => return None,
        })
    }
}

/// Nesting depth of messages that protobuf accepts.
const DEEPEST: usize = 100;

/// Refuses files that a failed download leaves in place of a model.
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

/// Range of a message's unread fields in the file.
#[derive(Debug, Clone, Copy)]
struct Fields {
    at: u64,
    end: u64,
}

/// Value of a field.
enum Value {
    Number(u64),
    /// Text or a message.
    Bytes(Fields),
    /// Number of fixed width, which no field read here uses.
    Fixed,
}

/// Cursor through the file.
struct Walker<'a> {
    file: &'a Path,
    reader: BufReader<File>,
    at: u64,
}

impl<'a> Walker<'a> {
    /// Opens a file at its start, and returns the fields of the model.
    fn open(file: &'a Path) -> Result<(Self, Fields)> {
        let failed = |source: std::io::Error| match source.kind() {
            ErrorKind::InvalidInput => Error::file(file, "is not a file", "give the ONNX file's own path"),
            _ => Error::read(file, source),
        };
        let opened = open_regular(file).map_err(failed)?;
        let end = opened.metadata().map_err(failed)?.len();
        let mut reader = BufReader::new(opened);
        refuse_lookalikes(file, reader.fill_buf().map_err(failed)?)?;
        Ok((Self { file, reader, at: 0 }, Fields { at: 0, end }))
    }

    /// Collects the names of all files in which a message keeps weights.
    fn external_data(
        &mut self,
        message: Message,
        mut fields: Fields,
        depth: usize,
        names: &mut BTreeSet<String>,
    ) -> Result<()> {
        if depth > DEEPEST {
            return Err(self.damaged("has too many graphs within each other"));
        }
        let (mut is_location, mut values) = (false, Vec::new());
        while let Some((number, value)) = self.next(&mut fields)? {
            match (value, message.inner(number)) {
                (Value::Bytes(inner), Some(kind)) => self.external_data(kind, inner, depth + 1, names)?,
                (Value::Bytes(text), None) if message == Message::External => match number {
                    1 => is_location |= self.text(text)? == "location",
                    2 => values.push(self.text(text)?),
                    _ => {}
                },
                _ => {}
            }
        }
        names.extend(values.into_iter().filter(|_| is_location));
        Ok(())
    }

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

    /// Reads a `ValueInfoProto`.
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

    /// Reads a `TypeProto.Tensor`.
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

    /// Reads a `TensorShapeProto.Dimension`. Zero and negative lengths mean any length.
    fn length(&mut self, mut dimension: Fields) -> Result<Option<usize>> {
        let mut length = None;
        while let Some(field) = self.next(&mut dimension)? {
            if let (1, Value::Number(number)) = field {
                length = i64::try_from(number).ok().and_then(|number| usize::try_from(number).ok());
            }
        }
        Ok(length.filter(|&length| length > 0))
    }

    /// Returns the text in the field with this number, empty if absent.
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

    /// Reads the number and value of the next field of a message, and moves `fields` past it.
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
            _ => return Err(self.damaged("is not an ONNX file")),
        };
        if end > fields.end {
            let (at, missing) = (self.at, end - fields.end);
            return Err(self.damaged(format_args!("ends early: the field at byte {at} lacks {missing} bytes")));
        }
        fields.at = end;
        Ok(Some((tag >> 3, value)))
    }

    /// Reads a number of up to ten bytes with seven bits each, lowest first.
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
        Err(self.damaged("is not an ONNX file"))
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
