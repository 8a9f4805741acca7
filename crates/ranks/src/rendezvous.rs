//! Short notes between ranks over TCP, all through rank 0: its connections show which rank is late or gone, and it
//! tells the others the name.
//!
//! GPU ranks find each other this way before NCCL can communicate, and exchange small things afterwards. While they
//! wait for NCCL, which names nobody, they watch these connections.

use std::cell::RefCell;
use std::io::{self, ErrorKind};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use hyperlora_core::{Error, Result};

use super::frames::{Kind, next_kind, read_frame, waits, write_frame};
use super::meeting::{Meeting, gather, reach};

/// Extra time that the others wait beyond rank 0, so that its message about a late rank reaches them.
const HEAD_START: Duration = Duration::from_secs(5);
/// Time that rank 0 listens for answers to the roll call.
const ROLL_TIME: Duration = Duration::from_secs(5);
/// Time that rank 0 waits for one rank before it checks the others.
const GLANCE: Duration = Duration::from_millis(10);

/// Connections of one rank: rank 0 has one to each other rank, the others have one to rank 0.
pub struct Rendezvous {
    rank: usize,
    world_size: usize,
    /// By rank, without rank 0; on the other ranks only rank 0.
    peers: RefCell<Vec<TcpStream>>,
    hosts: Vec<String>,
    timeout: Duration,
}

impl Rendezvous {
    /// Meets all ranks within `start_timeout`; later waits last at most `timeout`.
    ///
    /// # Errors
    /// Peer: names the ranks that did not come, or rank 0's port if another program keeps it. Input: rank 0 may not
    /// listen at the port, or there is no private folder for the token file.
    pub fn meet(meeting: &Meeting<'_>, start_timeout: Duration, timeout: Duration) -> Result<Self> {
        let until = Instant::now() + start_timeout;
        let peers = if meeting.rank == 0 { gather(meeting, until)? } else { vec![reach(meeting, until)?] };
        let Meeting { rank, world_size, host, .. } = *meeting;
        let mut met = Self { rank, world_size, peers: RefCell::new(peers), hosts: Vec::new(), timeout };
        // One deadline for both steps: a rank that connects late shortens the time left.
        let left = until.saturating_duration_since(Instant::now());
        let hosts = met.exchange_within("all ranks to meet", host.as_bytes(), left)?;
        met.hosts = hosts.iter().map(|host| String::from_utf8_lossy(host).into_owned()).collect();
        Ok(met)
    }

    /// Returns the machine of every rank.
    pub fn hosts(&self) -> &[String] {
        &self.hosts
    }

    /// See [`Collective::exchange`](super::Collective::exchange).
    ///
    /// # Errors
    /// Peer: names the first rank that is late or gone.
    pub fn exchange(&self, what: &str, note: &[u8]) -> Result<Vec<Vec<u8>>> {
        self.exchange_within(what, note, self.timeout)
    }

    /// Exchanges notes like [`exchange`](Self::exchange), with its own deadline.
    ///
    /// # Errors
    /// As [`exchange`](Self::exchange).
    pub fn exchange_within(&self, what: &str, note: &[u8], deadline: Duration) -> Result<Vec<Vec<u8>>> {
        let mut peers = self.peers.borrow_mut();
        if self.rank == 0 {
            self.collect(&mut peers, what, note, deadline)
        } else {
            self.deliver(&mut peers, what, note, deadline)
        }
    }

    /// Checks the connections of a rank that waits for `what` by other means, without blocking. Returns true if the
    /// roll is called: the rank must then [answer](Self::call_the_roll).
    ///
    /// # Errors
    /// Peer: names a lost rank, or reports what else rank 0 found out.
    pub fn glance(&self, what: &str) -> Result<bool> {
        self.look(&mut self.peers.borrow_mut(), what)
    }

    /// Finds out which ranks are alive, for a rank with a `problem` that names nobody: every waiting rank answers at
    /// once. The world is unusable afterwards.
    pub fn call_the_roll(&self, problem: &str) -> Error {
        let mut peers = self.peers.borrow_mut();
        if self.rank == 0 {
            return self.take_the_roll(&mut peers, problem);
        }
        let Some(first) = peers.first_mut() else { return unconnected() };
        // If it cannot be sent, there will be no answer either.
        let until = Instant::now() + self.roll_time() + HEAD_START;
        let _ = write_frame(first, Kind::RollCall, &[], until);
        loop {
            match read_frame(first, until) {
                Ok((Kind::Failure, line)) => return told(&line),
                Ok(_) => {}
                Err(lost) => {
                    let words = in_words(&lost, || "does not answer".into());
                    return Error::Peer(format!("{problem}; {} {words}", self.name_of(0)));
                }
            }
        }
    }

    /// Rank 0: asks all ranks, and tells all which ones did not answer.
    fn take_the_roll(&self, peers: &mut [TcpStream], problem: &str) -> Error {
        let until = Instant::now() + self.roll_time();
        for peer in &mut *peers {
            // A rank that cannot be asked counts as one that does not answer.
            let _ = write_frame(peer, Kind::RollCall, &[], until);
        }
        let mut missing = Vec::new();
        for (rank, peer) in (1..).zip(&mut *peers) {
            // Any frame is an answer: a note comes from a rank that waits in an exchange.
            if let Err(lost) = read_frame(peer, until) {
                missing.push(format!("{} {}", self.name_of(rank), in_words(&lost, || "does not answer".into())));
            }
        }
        let found = if missing.is_empty() { "every rank answers".into() } else { missing.join(", ") };
        self.end(peers, format!("{problem}; {found}"))
    }

    fn roll_time(&self) -> Duration {
        ROLL_TIME.min(self.timeout)
    }

    fn look(&self, peers: &mut [TcpStream], what: &str) -> Result<bool> {
        let mut called = false;
        for index in 0..peers.len() {
            match next_kind(&peers[index], Duration::ZERO) {
                Ok(Some(Kind::RollCall)) => called = true,
                Ok(Some(Kind::Failure)) => {
                    let line = read_frame(&mut peers[index], Instant::now() + HEAD_START);
                    return Err(line.map_or_else(
                        |lost| self.lost(peers, index, what, &lost, HEAD_START),
                        |(_, line)| told(&line),
                    ));
                }
                // A note for the next exchange.
                Ok(_) => {}
                Err(lost) => return Err(self.lost(peers, index, what, &lost, Duration::ZERO)),
            }
        }
        Ok(called)
    }

    /// Rank 0: collects the note of every rank, then sends all of them to every rank.
    fn collect(&self, peers: &mut [TcpStream], what: &str, note: &[u8], deadline: Duration) -> Result<Vec<Vec<u8>>> {
        let until = Instant::now() + deadline;
        let mut notes = vec![note.to_vec()];
        for index in 0..peers.len() {
            notes.push(self.note_of(peers, index, what, until, deadline)?);
        }
        let all: Vec<u8> =
            notes.iter().flat_map(|note| [&(note.len() as u64).to_le_bytes()[..], note].concat()).collect();
        for index in 0..peers.len() {
            if let Err(lost) = write_frame(&mut peers[index], Kind::Note, &all, until + HEAD_START) {
                return Err(self.lost(peers, index, what, &lost, deadline));
            }
        }
        Ok(notes)
    }

    /// Rank 0: receives the note of one rank while it watches the others.
    fn note_of(
        &self,
        peers: &mut [TcpStream],
        index: usize,
        what: &str,
        until: Instant,
        deadline: Duration,
    ) -> Result<Vec<u8>> {
        loop {
            let left = until.saturating_duration_since(Instant::now());
            match next_kind(&peers[index], left.min(GLANCE)) {
                Ok(Some(Kind::Note)) => {
                    let note = read_frame(&mut peers[index], until);
                    return note.map(|(_, note)| note).map_err(|lost| self.lost(peers, index, what, &lost, deadline));
                }
                Ok(None) if left.is_zero() => {
                    return Err(self.lost(peers, index, what, &ErrorKind::TimedOut.into(), deadline));
                }
                Ok(_) => {}
                Err(lost) => return Err(self.lost(peers, index, what, &lost, deadline)),
            }
            if self.look(peers, what)? {
                return Err(self.take_the_roll(peers, &format!("waiting for {what}")));
            }
        }
    }

    fn deliver(&self, peers: &mut [TcpStream], what: &str, note: &[u8], deadline: Duration) -> Result<Vec<Vec<u8>>> {
        let Some(first) = peers.first_mut() else { return Err(unconnected()) };
        // If sending fails, rank 0 may have said why before it went: read on.
        let until = Instant::now() + deadline + HEAD_START;
        let sent = write_frame(first, Kind::Note, note, until);
        let all = loop {
            match read_frame(first, until) {
                Ok((Kind::Note, all)) => break all,
                Ok((Kind::Failure, line)) => return Err(told(&line)),
                Ok((Kind::RollCall, _)) => {
                    // If it cannot be sent, the next read reports it.
                    let _ = write_frame(first, Kind::RollCall, &[], until);
                }
                Err(lost) => return Err(self.lost(peers, 0, what, &sent.err().unwrap_or(lost), deadline)),
            }
        };
        match split_notes(&all, self.world_size) {
            Some(notes) => Ok(notes),
            None => Err(self.lost(peers, 0, what, &ErrorKind::InvalidData.into(), deadline)),
        }
    }

    /// Ends the world because peer `index` is lost.
    fn lost(
        &self,
        peers: &mut [TcpStream],
        index: usize,
        what: &str,
        problem: &io::Error,
        deadline: Duration,
    ) -> Error {
        let rank = if self.rank == 0 { index + 1 } else { 0 };
        let words = in_words(problem, || format!("did not come within {} s", deadline.as_secs()));
        self.end(peers, format!("waiting for {what}: {} {words}", self.name_of(rank)))
    }

    /// Ends the world; rank 0 tells the others.
    fn end(&self, peers: &mut [TcpStream], line: String) -> Error {
        for peer in peers.iter_mut().filter(|_| self.rank == 0) {
            // A rank that cannot be told notices the closed connection.
            let _ = write_frame(peer, Kind::Failure, line.as_bytes(), Instant::now() + HEAD_START);
        }
        Error::Peer(line)
    }

    fn name_of(&self, rank: usize) -> String {
        self.hosts.get(rank).map_or_else(|| format!("rank {rank}"), |host| format!("rank {rank} ({host})"))
    }
}

/// Splits a frame from rank 0 into notes: one of each rank, nothing left over.
fn split_notes(mut all: &[u8], world_size: usize) -> Option<Vec<Vec<u8>>> {
    let mut notes = Vec::new();
    while let Some((length, rest)) = all.split_first_chunk::<8>() {
        let (note, rest) = rest.split_at_checked(usize::try_from(u64::from_le_bytes(*length)).ok()?)?;
        notes.push(note.to_vec());
        all = rest;
    }
    (all.is_empty() && notes.len() == world_size).then_some(notes)
}

fn unconnected() -> Error {
    Error::Fault("not connected to rank 0".into())
}

/// Returns the failure that rank 0 reported.
fn told(line: &[u8]) -> Error {
    Error::Peer(String::from_utf8_lossy(line).into_owned())
}

/// Describes a rank whose connection gave `problem`; `silent` if nothing arrived.
fn in_words(problem: &io::Error, silent: impl FnOnce() -> String) -> String {
    match problem.kind() {
        _ if waits(problem) => silent(),
        ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset | ErrorKind::BrokenPipe => "is gone".into(),
        _ => format!("cannot be reached: {problem}"),
    }
}

#[cfg(test)]
mod tests;
