//! Frames on the connections between ranks: a kind (1 byte), a length (8 bytes, little-endian) and the payload.

use std::io::{self, ErrorKind, Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

/// Longest payload in bytes. No rank of this program sends a longer one.
const LONGEST: u64 = 64 << 20;
/// Bytes of a frame that are read at once.
const PIECE: usize = 64 << 10;

/// Kind of a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A rank's note in an exchange; from rank 0 the notes of all.
    Note,
    /// From rank 0: the reason why the world has ended, which every rank reports.
    Failure,
    /// The sender is alive and still waits.
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

/// Sends a frame, which must be written by `until`: a peer that reads nothing blocks nobody.
pub(super) fn write_frame(stream: &mut TcpStream, kind: Kind, payload: &[u8], until: Instant) -> io::Result<()> {
    let length = payload.len() as u64;
    if length > LONGEST {
        return Err(io::Error::new(ErrorKind::InvalidInput, format!("a frame of {length} bytes")));
    }
    // One write: two small ones would wait for each other's acknowledgement.
    let frame = [&[kind as u8][..], &length.to_le_bytes(), payload].concat();
    let mut left = &frame[..];
    while !left.is_empty() {
        stream.set_write_timeout(Some(time_left(until)))?;
        match stream.write(left) {
            Ok(0) => return Err(ErrorKind::WriteZero.into()),
            Ok(written) => left = &left[written..],
            Err(problem) if problem.kind() == ErrorKind::Interrupted => {}
            Err(problem) => return Err(problem),
        }
    }
    Ok(())
}

/// Reads the next frame, which must arrive by `until`.
///
/// # Errors
/// The system's; `InvalidData` for bytes that are not a frame of this program.
pub fn read_frame(stream: &mut TcpStream, until: Instant) -> io::Result<(Kind, Vec<u8>)> {
    let mut head = [0; 9];
    read_until(stream, &mut head, until)?;
    let kind = Kind::of(head[0])?;
    let mut length = [0; 8];
    length.copy_from_slice(&head[1..]);
    let length = u64::from_le_bytes(length);
    if length > LONGEST {
        return Err(io::Error::new(ErrorKind::InvalidData, format!("a frame of {length} bytes")));
    }
    // Memory grows with the bytes received, not with the length announced.
    let mut payload = Vec::new();
    while payload.len() < length as usize {
        let begun = payload.len();
        payload.resize((length as usize).min(begun + PIECE), 0);
        read_until(stream, &mut payload[begun..], until)?;
    }
    Ok((kind, payload))
}

/// Peeks at the kind of the next frame, if it begins to arrive within `patience`. Consumes nothing.
pub(super) fn next_kind(stream: &TcpStream, patience: Duration) -> io::Result<Option<Kind>> {
    // A timeout of zero is an error, so it becomes non-blocking instead.
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

/// Tells whether an error only means that nothing has arrived.
pub(super) fn waits(problem: &io::Error) -> bool {
    matches!(problem.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut)
}

/// Fills `buffer` by the deadline, which a peer that sends byte by byte does not extend.
pub(super) fn read_until(stream: &mut TcpStream, buffer: &mut [u8], until: Instant) -> io::Result<()> {
    let mut filled = 0;
    while filled < buffer.len() {
        stream.set_read_timeout(Some(time_left(until)))?;
        match stream.read(&mut buffer[filled..]) {
            Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
            Ok(read) => filled += read,
            Err(problem) if problem.kind() == ErrorKind::Interrupted => {}
            Err(problem) => return Err(problem),
        }
    }
    Ok(())
}

/// Returns the time left, at least 1 ms, because a socket timeout of zero is an error.
fn time_left(until: Instant) -> Duration {
    until.saturating_duration_since(Instant::now()).max(Duration::from_millis(1))
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    fn pair() -> [TcpStream; 2] {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let one = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        [one, listener.accept().unwrap().0]
    }

    fn soon() -> Instant {
        Instant::now() + Duration::from_millis(200)
    }

    #[test]
    fn frames_arrive_whole_and_what_is_no_frame_is_refused() {
        let [mut one, mut other] = pair();
        let long = vec![7; PIECE * 3 + 5];
        let sent = long.clone();
        let sender = std::thread::spawn(move || {
            write_frame(&mut one, Kind::Note, &sent, soon() + Duration::from_secs(20)).unwrap();
            write_frame(&mut one, Kind::RollCall, &[], soon()).unwrap();
            one
        });
        let until = soon() + Duration::from_secs(20);
        assert_eq!(read_frame(&mut other, until).unwrap(), (Kind::Note, long));
        assert_eq!(read_frame(&mut other, until).unwrap(), (Kind::RollCall, Vec::new()));
        let mut one = sender.join().unwrap();

        one.write_all(&[&[Kind::Note as u8][..], &u64::MAX.to_le_bytes()].concat()).unwrap();
        assert_eq!(read_frame(&mut other, until).unwrap_err().kind(), ErrorKind::InvalidData);
        let [mut one, mut other] = pair();
        one.write_all(&[9; 9]).unwrap();
        assert_eq!(read_frame(&mut other, until).unwrap_err().kind(), ErrorKind::InvalidData);
        // Announced but never sent.
        let [mut one, mut other] = pair();
        one.write_all(&[&[Kind::Note as u8][..], &LONGEST.to_le_bytes(), &[1; 20]].concat()).unwrap();
        assert!(waits(&read_frame(&mut other, soon()).unwrap_err()));
    }

    #[test]
    fn a_peer_that_takes_nothing_does_not_hold_the_sender() {
        let [mut one, _other] = pair();
        let more_than_fits = vec![0; LONGEST as usize];
        assert!(waits(&write_frame(&mut one, Kind::Note, &more_than_fits, soon()).unwrap_err()));
    }
}
