//! Ranks that meet over TCP: rank 0 listens, the others connect, and short notes go round through rank 0.
//!
//! This is how GPU ranks find each other before NCCL can speak, and how they exchange small things afterwards: rank 0 knows
//! who is late, and tells the others by name. A frame is a kind (1 byte), a length (8 bytes, little-endian) and the payload.

use std::cell::RefCell;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream, ToSocketAddrs};
use std::thread;
use std::time::{Duration, Instant};

use sha2::{Digest, Sha256};

use crate::error::{Error, Result};

const NOTE: u8 = 0;
const FAILURE: u8 = 1;
/// Longer frames come from no rank of ours.
const LONGEST: u64 = 64 << 20;
/// How much longer the others wait than rank 0, so that its word about who is late reaches them.
const HEAD_START: Duration = Duration::from_secs(5);
/// A stranger on the port is given this long to say who it is.
const INTRODUCTION: Duration = Duration::from_secs(2);

/// The connections of one rank: to all others on rank 0, to rank 0 on the others.
pub struct Rendezvous {
    rank: usize,
    /// By rank, without rank 0; on the others rank 0 alone.
    peers: RefCell<Vec<TcpStream>>,
    hosts: Vec<String>,
    timeout: Duration,
}

/// Who meets where.
#[derive(Debug, Clone)]
pub struct Meeting<'a> {
    /// This process.
    pub rank: usize,
    /// All of them.
    pub world_size: usize,
    /// Where rank 0 listens.
    pub address: (&'a str, u16),
    /// Keeps strangers and the ranks of other runs out: the same text on all ranks.
    pub token: &'a str,
    /// The name of this machine, for messages.
    pub host: &'a str,
}

impl Rendezvous {
    /// Meets all ranks within `start_timeout`; later waits last at most `timeout`.
    ///
    /// # Errors
    /// Peer that names the ranks that did not come; Input for an address that rank 0 cannot listen at.
    pub fn meet(meeting: &Meeting<'_>, start_timeout: Duration, timeout: Duration) -> Result<Self> {
        let until = Instant::now() + start_timeout;
        let peers = if meeting.rank == 0 { gather(meeting, until)? } else { vec![reach(meeting, until)?] };
        let mut met =
            Self { rank: meeting.rank, peers: RefCell::new(peers), hosts: Vec::new(), timeout: start_timeout };
        let hosts = met.exchange("all ranks to meet", meeting.host.as_bytes())?;
        met.hosts = hosts.iter().map(|host| String::from_utf8_lossy(host).into_owned()).collect();
        met.timeout = timeout;
        Ok(met)
    }

    /// The machine of every rank.
    pub fn hosts(&self) -> &[String] {
        &self.hosts
    }

    /// See [`Collective::exchange`](super::Collective::exchange).
    ///
    /// # Errors
    /// Peer that names the first rank that is late or gone.
    pub fn exchange(&self, what: &str, note: &[u8]) -> Result<Vec<Vec<u8>>> {
        self.exchange_within(what, note, self.timeout)
    }

    /// As [`exchange`](Self::exchange), with a deadline of its own.
    ///
    /// # Errors
    /// As there.
    pub fn exchange_within(&self, what: &str, note: &[u8], deadline: Duration) -> Result<Vec<Vec<u8>>> {
        let mut peers = self.peers.borrow_mut();
        if self.rank == 0 {
            self.collect(&mut peers, what, note, deadline)
        } else {
            self.deliver(&mut peers, what, note, deadline)
        }
    }

    /// Rank 0: takes everyone's note, then gives everyone all of them.
    fn collect(&self, peers: &mut [TcpStream], what: &str, note: &[u8], deadline: Duration) -> Result<Vec<Vec<u8>>> {
        let until = Instant::now() + deadline;
        let mut notes = vec![note.to_vec()];
        for (rank, peer) in (1..).zip(peers.iter_mut()) {
            match read_frame(peer, until) {
                Ok((_, note)) => notes.push(note),
                Err(problem) => {
                    let line = format!("waiting for {what}: {} {}", self.name_of(rank), in_words(&problem, deadline));
                    for (_, other) in (1..).zip(peers.iter_mut()).filter(|(other, _)| *other != rank) {
                        // Whoever cannot be told finds out by the closed connection.
                        let _ = write_frame(other, FAILURE, line.as_bytes());
                    }
                    return Err(Error::Peer(line));
                }
            }
        }
        let all: Vec<u8> =
            notes.iter().flat_map(|note| [&(note.len() as u64).to_le_bytes()[..], note].concat()).collect();
        for (rank, peer) in (1..).zip(peers) {
            let told = write_frame(peer, NOTE, &all);
            told.map_err(|problem| self.lost(rank, what, &problem, deadline))?;
        }
        Ok(notes)
    }

    fn deliver(&self, peers: &mut [TcpStream], what: &str, note: &[u8], deadline: Duration) -> Result<Vec<Vec<u8>>> {
        let Some(first) = peers.first_mut() else { return Err(Error::Fault("not connected to rank 0".into())) };
        let lost = |problem: io::Error| self.lost(0, what, &problem, deadline);
        write_frame(first, NOTE, note).map_err(lost)?;
        let (kind, mut all) = read_frame(first, Instant::now() + deadline + HEAD_START).map_err(lost)?;
        if kind == FAILURE {
            return Err(Error::Peer(String::from_utf8_lossy(&all).into_owned()));
        }
        let mut notes = Vec::new();
        while let Some((length, _)) = all.split_first_chunk::<8>() {
            let end = 8 + u64::from_le_bytes(*length) as usize;
            let Some(note) = all.get(8..end) else { return Err(lost(ErrorKind::InvalidData.into())) };
            notes.push(note.to_vec());
            all.drain(..end);
        }
        Ok(notes)
    }

    fn lost(&self, rank: usize, what: &str, problem: &io::Error, deadline: Duration) -> Error {
        Error::Peer(format!("waiting for {what}: {} {}", self.name_of(rank), in_words(problem, deadline)))
    }

    fn name_of(&self, rank: usize) -> String {
        self.hosts.get(rank).map_or_else(|| format!("rank {rank}"), |host| format!("rank {rank} ({host})"))
    }
}

/// What became of a rank whose connection gave `problem`.
fn in_words(problem: &io::Error, deadline: Duration) -> String {
    match problem.kind() {
        ErrorKind::WouldBlock | ErrorKind::TimedOut => format!("did not come within {} s", deadline.as_secs()),
        ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset | ErrorKind::BrokenPipe => "is gone".into(),
        _ => format!("cannot be reached: {problem}"),
    }
}

/// Rank 0: connections by rank, once every rank has introduced itself.
fn gather(meeting: &Meeting<'_>, until: Instant) -> Result<Vec<TcpStream>> {
    let (host, port) = meeting.address;
    let listen = || {
        let listener = TcpListener::bind(("0.0.0.0", port))?;
        listener.set_nonblocking(true)?;
        Ok(listener)
    };
    let listener = listen().map_err(|source: io::Error| {
        Error::input(
            format!("port {port} of {host}"),
            format!("cannot be listened at: {source}"),
            "set MASTER_PORT to another port; the one after it must be free too",
        )
    })?;
    let mut found: Vec<Option<TcpStream>> = (1..meeting.world_size).map(|_| None).collect();
    while found.iter().any(Option::is_none) {
        if Instant::now() > until {
            let missing: Vec<usize> =
                (1..).zip(&found).filter(|(_, peer)| peer.is_none()).map(|(rank, _)| rank).collect();
            return Err(Error::Peer(format!("waiting for all ranks to meet: ranks {missing:?} did not come")));
        }
        match listener.accept() {
            Ok((stream, from)) => match introduced(stream, meeting) {
                Ok((rank, stream)) => found[rank - 1] = Some(stream),
                Err(problem) => tracing::warn!("{from} on the port of the ranks is turned away: {problem}"),
            },
            Err(_) => thread::sleep(Duration::from_millis(10)),
        }
    }
    Ok(found.into_iter().flatten().collect())
}

/// A connection of one of our ranks, by its introduction.
fn introduced(mut stream: TcpStream, meeting: &Meeting<'_>) -> io::Result<(usize, TcpStream)> {
    stream.set_nonblocking(false)?;
    stream.set_nodelay(true)?;
    let mut said = [0; 40];
    stream.set_read_timeout(Some(INTRODUCTION))?;
    stream.read_exact(&mut said)?;
    let mut rank = [0; 8];
    rank.copy_from_slice(&said[32..]);
    let rank = u64::from_le_bytes(rank) as usize;
    if said[..32] == secret(meeting)[..] && (1..meeting.world_size).contains(&rank) {
        Ok((rank, stream))
    } else {
        Err(io::Error::new(ErrorKind::PermissionDenied, "it does not know the token"))
    }
}

/// The others: a connection to rank 0, which may start later.
fn reach(meeting: &Meeting<'_>, until: Instant) -> Result<TcpStream> {
    let (host, port) = meeting.address;
    loop {
        let problem = match connect(meeting) {
            Ok(stream) => return Ok(stream),
            Err(problem) => problem,
        };
        if Instant::now() > until {
            return Err(Error::Peer(format!("waiting for rank 0: it cannot be reached at {host}:{port}: {problem}")));
        }
        thread::sleep(Duration::from_millis(50));
    }
}

fn connect(meeting: &Meeting<'_>) -> io::Result<TcpStream> {
    let addresses = meeting.address.to_socket_addrs()?;
    let mut failed = io::Error::from(ErrorKind::AddrNotAvailable);
    for address in addresses {
        match TcpStream::connect_timeout(&address, INTRODUCTION) {
            Ok(mut stream) => {
                stream.set_nodelay(true)?;
                stream.write_all(&secret(meeting))?;
                stream.write_all(&(meeting.rank as u64).to_le_bytes())?;
                return Ok(stream);
            }
            Err(problem) => failed = problem,
        }
    }
    Err(failed)
}

/// What a rank of this run alone can say.
fn secret(meeting: &Meeting<'_>) -> [u8; 32] {
    let version = env!("CARGO_PKG_VERSION");
    Sha256::digest(format!("hyperlora {version}\n{}\n{}", meeting.world_size, meeting.token)).into()
}

fn write_frame(stream: &mut TcpStream, kind: u8, payload: &[u8]) -> io::Result<()> {
    // One write: two small ones would wait for each other's acknowledgement.
    stream.write_all(&[&[kind][..], &(payload.len() as u64).to_le_bytes(), payload].concat())
}

fn read_frame(stream: &mut TcpStream, until: Instant) -> io::Result<(u8, Vec<u8>)> {
    let mut head = [0; 9];
    read_until(stream, &mut head, until)?;
    let mut length = [0; 8];
    length.copy_from_slice(&head[1..]);
    let length = u64::from_le_bytes(length);
    if length > LONGEST {
        return Err(io::Error::new(ErrorKind::InvalidData, format!("a frame of {length} bytes")));
    }
    let mut payload = vec![0; length as usize];
    read_until(stream, &mut payload, until)?;
    Ok((head[0], payload))
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

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

    use std::sync::{Mutex, mpsc};

    use super::*;

    fn free_port() -> u16 {
        TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
    }

    /// `rank` meets the others as `node-{rank}`.
    fn meet(rank: usize, world_size: usize, port: u16, token: &str, timeout: u64) -> Result<Rendezvous> {
        let meeting = Meeting { rank, world_size, address: ("127.0.0.1", port), token, host: &format!("node-{rank}") };
        Rendezvous::meet(&meeting, Duration::from_secs(20), Duration::from_millis(timeout))
    }

    /// What each of `world_size` threads makes of its rank.
    fn world<T: Send>(world_size: usize, rank: impl Fn(usize, u16) -> T + Sync) -> Vec<T> {
        let port = free_port();
        thread::scope(|scope| {
            let rank = &rank;
            let threads: Vec<_> = (0..world_size).map(|number| scope.spawn(move || rank(number, port))).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        })
    }

    #[test]
    fn every_rank_gets_the_notes_of_all() {
        let notes = world(4, |rank, port| {
            let met = meet(rank, 4, port, "run 7", 20_000).unwrap();
            assert_eq!(met.hosts(), ["node-0", "node-1", "node-2", "node-3"]);
            assert_eq!(met.exchange("nothing", &[]).unwrap(), vec![Vec::<u8>::new(); 4]);
            met.exchange("the notes", &vec![rank as u8; 3 * rank]).unwrap()
        });
        for of_rank in notes {
            assert_eq!(of_rank, [vec![], vec![1; 3], vec![2; 6], vec![3; 9]]);
        }
    }

    #[test]
    fn a_rank_that_is_late_or_gone_is_named_to_all() {
        for (pause, words) in [(3000, "did not come within 0 s"), (0, "is gone")] {
            let ends = world(3, |rank, port| {
                let met = meet(rank, 3, port, "", 500).unwrap();
                if rank == 2 {
                    thread::sleep(Duration::from_millis(pause));
                    return None;
                }
                Some(met.exchange("step 5", &[]).unwrap_err())
            });
            for error in ends.into_iter().flatten() {
                assert_eq!(error.exit_code(), 75);
                assert_eq!(error.to_string(), format!("waiting for step 5: rank 2 (node-2) {words}"));
            }
        }
    }

    #[test]
    fn strangers_are_turned_away_and_do_not_disturb() {
        // Rank 1 comes after them: once all ranks have met, nobody listens any more.
        let (strangers, told) = mpsc::channel();
        let told = Mutex::new(told);
        let met = world(3, |rank, port| {
            if rank == 2 {
                // A rank of another run, and something that is no rank at all.
                let stranger =
                    Meeting { rank: 1, world_size: 2, address: ("127.0.0.1", port), token: "other", host: "" };
                reach(&stranger, Instant::now() + Duration::from_secs(20)).unwrap();
                let mut scanner = TcpStream::connect(("127.0.0.1", port)).unwrap();
                let asked = scanner.write_all(b"GET / HTTP/1.0\r\n\r\nis anybody there?                ").is_ok();
                strangers.send(()).unwrap();
                return asked;
            }
            if rank == 1 {
                told.lock().unwrap().recv_timeout(Duration::from_secs(20)).unwrap();
            }
            meet(rank, 2, port, "ours", 20_000).unwrap().exchange("a word", b"word").is_ok()
        });
        assert_eq!(met, [true; 3]);
    }
}
