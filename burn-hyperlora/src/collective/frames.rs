//! What the ranks' connections carry: frames of a kind (1 byte), a length (8 bytes, little-endian) and the payload.

use std::io::{self, ErrorKind, Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

/// Longer frames come from no rank of ours.
const LONGEST: u64 = 64 << 20;

/// What a frame is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// A rank's word in an exchange; from rank 0 the words of all.
    Note,
    /// From rank 0: why the world has ended, for every rank to say.
    Failure,
    /// The sender is alive, and waits in vain.
    RollCall,
}

impl Kind {
    fn of(byte: u8) -> io::Result<Self> {
        [Self::Note, Self::Failure, Self::RollCall]
            .into_iter()
            .find(|kind| *kind as u8 == byte)
            .ok_or_else(|| io::Error::new(ErrorKind::InvalidData, format!("a frame of kind {byte}")))
    }
}

/// Sends a frame.
pub(super) fn write_frame(stream: &mut TcpStream, kind: Kind, payload: &[u8]) -> io::Result<()> {
    // One write: two small ones would wait for each other's acknowledgement.
    stream.write_all(&[&[kind as u8][..], &(payload.len() as u64).to_le_bytes(), payload].concat())
}

/// Takes the next frame, which must be here at `until`.
pub(super) fn read_frame(stream: &mut TcpStream, until: Instant) -> io::Result<(Kind, Vec<u8>)> {
    let mut head = [0; 9];
    read_until(stream, &mut head, until)?;
    let kind = Kind::of(head[0])?;
    let mut length = [0; 8];
    length.copy_from_slice(&head[1..]);
    let length = u64::from_le_bytes(length);
    if length > LONGEST {
        return Err(io::Error::new(ErrorKind::InvalidData, format!("a frame of {length} bytes")));
    }
    let mut payload = vec![0; length as usize];
    read_until(stream, &mut payload, until)?;
    Ok((kind, payload))
}

/// The kind of the next frame, if it begins to arrive within `patience`; it is left where it is.
pub(super) fn next_kind(stream: &TcpStream, patience: Duration) -> io::Result<Option<Kind>> {
    // A timeout of zero would be none at all.
    stream.set_nonblocking(patience.is_zero())?;
    stream.set_read_timeout(Some(patience.max(Duration::from_millis(1))))?;
    let mut first = [0];
    let seen = stream.peek(&mut first);
    stream.set_nonblocking(false)?;
    match seen {
        Ok(0) => Err(ErrorKind::UnexpectedEof.into()),
        Ok(_) => Kind::of(first[0]).map(Some),
        Err(problem) if waits(&problem) || problem.kind() == ErrorKind::Interrupted => Ok(None),
        Err(problem) => Err(problem),
    }
}

/// Whether nothing is wrong but that nothing has come.
pub(super) fn waits(problem: &io::Error) -> bool {
    matches!(problem.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut)
}

/// Fills `buffer`; a peer that sends byte by byte does not move the deadline.
fn read_until(stream: &mut TcpStream, buffer: &mut [u8], until: Instant) -> io::Result<()> {
    let mut filled = 0;
    while filled < buffer.len() {
        let left = until.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
        stream.set_read_timeout(Some(left))?;
        match stream.read(&mut buffer[filled..]) {
            Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
            Ok(read) => filled += read,
            Err(problem) if problem.kind() == ErrorKind::Interrupted => {}
            Err(problem) => return Err(problem),
        }
    }
    Ok(())
}
