//! Short notes between ranks over TCP, all through rank 0: its connections show who is late or gone, and it tells the others by name.
//!
//! This is how GPU ranks find each other before NCCL can speak, and how they exchange small things afterwards. While they wait
//! for NCCL, which names nobody, they keep an eye on these connections.

use std::cell::RefCell;
use std::io::{self, ErrorKind};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use super::frames::{Kind, next_kind, read_frame, waits, write_frame};
use super::meeting::{Meeting, gather, reach};
use crate::error::{Error, Result};

/// How much longer the others wait than rank 0, so that its word about who is late reaches them.
const HEAD_START: Duration = Duration::from_secs(5);
/// How long rank 0 listens for who answers the roll call.
const ROLL_TIME: Duration = Duration::from_secs(5);
/// How long rank 0 waits for one rank before it looks at the others.
const GLANCE: Duration = Duration::from_millis(10);

/// The connections of one rank: to all others on rank 0, to rank 0 on the others.
pub struct Rendezvous {
    rank: usize,
    /// By rank, without rank 0; on the others rank 0 alone.
    peers: RefCell<Vec<TcpStream>>,
    hosts: Vec<String>,
    timeout: Duration,
}

impl Rendezvous {
    /// Meets all ranks within `start_timeout`; later waits last at most `timeout`.
    ///
    /// # Errors
    /// Peer that names the ranks that did not come, or rank 0's port where another program keeps it; Input for a port that
    /// rank 0 may not listen at.
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

    /// A look at the connections of a rank that waits for `what` by other means; it takes no time. True when the roll is called:
    /// the rank must then [answer](Self::call_the_roll).
    ///
    /// # Errors
    /// Peer that names a rank that is gone, or what else rank 0 found out.
    pub fn glance(&self, what: &str) -> Result<bool> {
        self.look(&mut self.peers.borrow_mut(), what)
    }

    /// Finds out who is alive, for a rank with a `problem` that names nobody: every rank that waits answers at once. The world
    /// is then of no more use.
    pub fn call_the_roll(&self, problem: &str) -> Error {
        let mut peers = self.peers.borrow_mut();
        if self.rank == 0 {
            return self.take_the_roll(&mut peers, problem);
        }
        let Some(first) = peers.first_mut() else { return unconnected() };
        // If it cannot be sent, there will be no answer either.
        let _ = write_frame(first, Kind::RollCall, &[]);
        let until = Instant::now() + self.roll_time() + HEAD_START;
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

    /// Rank 0: asks all, and tells all who did not answer.
    fn take_the_roll(&self, peers: &mut [TcpStream], problem: &str) -> Error {
        for peer in &mut *peers {
            // Whoever cannot be asked does not answer.
            let _ = write_frame(peer, Kind::RollCall, &[]);
        }
        let until = Instant::now() + self.roll_time();
        let mut missing = Vec::new();
        for (rank, peer) in (1..).zip(&mut *peers) {
            // Any frame will do: a note is that of a rank which waits in an exchange.
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
                // A note for the exchange that comes next.
                Ok(_) => {}
                Err(lost) => return Err(self.lost(peers, index, what, &lost, Duration::ZERO)),
            }
        }
        Ok(called)
    }

    /// Rank 0: takes everyone's note, then gives everyone all of them.
    fn collect(&self, peers: &mut [TcpStream], what: &str, note: &[u8], deadline: Duration) -> Result<Vec<Vec<u8>>> {
        let until = Instant::now() + deadline;
        let mut notes = vec![note.to_vec()];
        for index in 0..peers.len() {
            notes.push(self.note_of(peers, index, what, until, deadline)?);
        }
        let all: Vec<u8> =
            notes.iter().flat_map(|note| [&(note.len() as u64).to_le_bytes()[..], note].concat()).collect();
        for index in 0..peers.len() {
            if let Err(lost) = write_frame(&mut peers[index], Kind::Note, &all) {
                return Err(self.lost(peers, index, what, &lost, deadline));
            }
        }
        Ok(notes)
    }

    /// Rank 0: the note of one rank, with an eye on the others.
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
        // Where it cannot be sent, rank 0 may have said why before it went.
        let sent = write_frame(first, Kind::Note, note);
        let until = Instant::now() + deadline + HEAD_START;
        let mut all = loop {
            match read_frame(first, until) {
                Ok((Kind::Note, all)) => break all,
                Ok((Kind::Failure, line)) => return Err(told(&line)),
                Ok((Kind::RollCall, _)) => {
                    // If it cannot be sent, the next read tells.
                    let _ = write_frame(first, Kind::RollCall, &[]);
                }
                Err(lost) => return Err(self.lost(peers, 0, what, &sent.err().unwrap_or(lost), deadline)),
            }
        };
        let mut notes = Vec::new();
        while let Some((length, _)) = all.split_first_chunk::<8>() {
            let end = u64::from_le_bytes(*length).saturating_add(8) as usize;
            let Some(note) = all.get(8..end) else {
                return Err(self.lost(peers, 0, what, &ErrorKind::InvalidData.into(), deadline));
            };
            notes.push(note.to_vec());
            all.drain(..end);
        }
        Ok(notes)
    }

    /// The end of the world by the loss of peer `index`.
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

    /// The end of the world, which rank 0 tells the others.
    fn end(&self, peers: &mut [TcpStream], line: String) -> Error {
        for peer in peers.iter_mut().filter(|_| self.rank == 0) {
            // Whoever cannot be told finds out by the closed connection.
            let _ = write_frame(peer, Kind::Failure, line.as_bytes());
        }
        Error::Peer(line)
    }

    fn name_of(&self, rank: usize) -> String {
        self.hosts.get(rank).map_or_else(|| format!("rank {rank}"), |host| format!("rank {rank} ({host})"))
    }
}

fn unconnected() -> Error {
    Error::Fault("not connected to rank 0".into())
}

/// What rank 0 found out.
fn told(line: &[u8]) -> Error {
    Error::Peer(String::from_utf8_lossy(line).into_owned())
}

/// What became of a rank whose connection gave `problem`; `silent` where it gave nothing.
fn in_words(problem: &io::Error, silent: impl FnOnce() -> String) -> String {
    match problem.kind() {
        _ if waits(problem) => silent(),
        ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset | ErrorKind::BrokenPipe => "is gone".into(),
        _ => format!("cannot be reached: {problem}"),
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

    use std::io::Write;
    use std::net::TcpListener;
    use std::sync::{Barrier, Mutex, mpsc};
    use std::thread;

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

    /// A rank that waits for `step 5` by other means, until it hears from the others; it answers the roll call.
    fn wait_elsewhere(met: &Rendezvous) -> Error {
        let until = Instant::now() + Duration::from_secs(20);
        loop {
            assert!(Instant::now() < until, "nobody says anything");
            match met.glance("step 5") {
                Ok(true) => return met.call_the_roll("waiting for step 5"),
                Ok(false) => thread::sleep(Duration::from_millis(1)),
                Err(error) => return error,
            }
        }
    }

    #[test]
    fn a_rank_that_is_gone_is_named_at_once_wherever_the_others_wait() {
        let ends = world(3, |rank, port| {
            let met = meet(rank, 3, port, "", 60_000).unwrap();
            (rank != 2).then(|| wait_elsewhere(&met))
        });
        for error in ends.into_iter().flatten() {
            assert_eq!(error.exit_code(), 75);
            assert_eq!(error.to_string(), "waiting for step 5: rank 2 (node-2) is gone");
        }
        // Rank 0 waits for the note of rank 1, which is late by itself.
        let met = Barrier::new(2);
        let ends = world(3, |rank, port| {
            let own = meet(rank, 3, port, "", 60_000).unwrap();
            let exchange = || Some(own.exchange("step 5", &[]).unwrap_err().to_string());
            match rank {
                0 => (exchange(), met.wait()).0,
                1 => (met.wait(), exchange()).1,
                _ => None,
            }
        });
        for line in ends.into_iter().flatten() {
            assert_eq!(line, "waiting for step 5: rank 2 (node-2) is gone");
        }
    }

    #[test]
    fn the_roll_call_names_who_is_silent_whoever_began_to_wait_first() {
        for impatient in 0..3 {
            let over = Barrier::new(4);
            let ends = world(4, |rank, port| {
                let met = meet(rank, 4, port, "", 500).unwrap();
                let line = (rank < 3).then(|| match rank {
                    _ if rank == impatient => met.call_the_roll("waiting for step 5"),
                    _ => wait_elsewhere(&met),
                });
                over.wait();
                line
            });
            for error in ends.into_iter().flatten() {
                assert_eq!(error.exit_code(), 75);
                assert_eq!(error.to_string(), "waiting for step 5; rank 3 (node-3) does not answer", "{impatient}");
            }
        }
    }

    #[test]
    fn a_roll_call_is_not_taken_for_a_note() {
        for impatient in 0..3 {
            let ends = world(3, |rank, port| {
                let met = meet(rank, 3, port, "", 20_000).unwrap();
                if rank == impatient {
                    met.call_the_roll("waiting for step 5")
                } else {
                    met.exchange("step 5", b"a note").unwrap_err()
                }
            });
            for error in ends {
                assert_eq!(error.to_string(), "waiting for step 5; every rank answers", "{impatient}");
            }
        }
    }

    #[test]
    fn ranks_meet_over_ipv4_and_ipv6_once_the_port_is_free() {
        for host in ["127.0.0.1", "::1"] {
            let Ok(keeper) = TcpListener::bind((host, 0)) else {
                // Only a machine without IPv6 may refuse.
                assert_eq!(host, "::1");
                continue;
            };
            let port = keeper.local_addr().unwrap().port();
            let meet = |rank, start| {
                let meeting = Meeting { rank, world_size: 2, address: (host, port), token: "", host: "node" };
                Rendezvous::meet(&meeting, Duration::from_millis(start), Duration::from_secs(20))
            };
            let error = meet(0, 200).err().unwrap();
            assert_eq!(error.exit_code(), 75);
            assert!(error.to_string().contains(&format!("port {port} of {host}")), "{error}");
            thread::scope(|scope| {
                let first = scope.spawn(|| meet(0, 20_000).unwrap().exchange("a word", b"0").unwrap());
                thread::sleep(Duration::from_millis(300));
                drop(keeper);
                // Whoever connected to the keeper of the port would be lost with it.
                let second = meet(1, 20_000).unwrap().exchange("a word", b"1").unwrap();
                assert_eq!(first.join().unwrap(), second);
            });
        }
    }
}
