//! Meeting of the ranks: rank 0 listens, the others connect, and both sides prove that they know the run's token.
//!
//! Everything ends at one deadline that is fixed at the start, however many connect and stay silent.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::sync::mpsc;
use std::time::{Duration, Instant};
use std::{mem, thread};

use hyperlora_core::{Error, Result};

use super::frames::{read_until, waits};
use super::handshake::{HELLO, Handshake, Side, WORD, hello, nonce, read_hello};
use super::token::{Token, TokenFile};

/// Time that a new connection has to show that it belongs to the run.
const INTRODUCTION: Duration = Duration::from_secs(2);
/// Connections that may introduce themselves at the same time.
const MOST_GUESTS: usize = 256;
/// Refused connections that are logged one by one.
const TOLD: usize = 5;
/// Pause between two attempts to reach rank 0.
const PAUSE: Duration = Duration::from_millis(50);
/// Interval at which rank 0 polls its connections.
const ROUND: Duration = Duration::from_millis(5);

/// Participants and place of a meeting.
#[derive(Debug, Clone)]
pub struct Meeting<'a> {
    /// Rank of this process.
    pub rank: usize,
    /// Number of ranks.
    pub world_size: usize,
    /// Address where rank 0 listens.
    pub address: (&'a str, u16),
    /// True if all ranks share a machine: they meet on its loopback interface, whatever the address.
    pub one_machine: bool,
    /// Token that keeps strangers and the ranks of other runs out.
    pub token: &'a Token,
    /// Name of this machine, for messages.
    pub host: &'a str,
}

/// Rank 0: returns the connections by rank, once every rank has introduced itself.
pub(super) fn gather(meeting: &Meeting<'_>, until: Instant) -> Result<Vec<TcpStream>> {
    let listener = listen(meeting, until)?;
    // Only the process that holds the port writes a token: another run on the same port waits for it.
    let file = token_file(meeting)?;
    let laid = file.as_ref().map(|file| file.lay_down().map_err(|source| Error::write(file.path(), source)));
    let laid = laid.transpose()?;
    let token = match (meeting.token, &laid) {
        (_, Some(laid)) => laid.token.as_slice(),
        (Token::Given(token) | Token::HandedOver(token), None) => token.as_bytes(),
    };
    let mut door = Door { meeting, token, guests: Vec::new(), turned_away: 0 };
    let mut found: Vec<Option<TcpStream>> = (1..meeting.world_size).map(|_| None).collect();
    while found.iter().any(Option::is_none) {
        if Instant::now() > until {
            let missing: Vec<usize> =
                (1..).zip(&found).filter(|(_, peer)| peer.is_none()).map(|(rank, _)| rank).collect();
            return Err(Error::Peer(format!("waiting for all ranks to meet: ranks {missing:?} did not come")));
        }
        door.let_in(&listener);
        for (rank, stream) in door.hear() {
            // A rank that connects again has given up its first connection.
            found[rank - 1] = Some(stream);
        }
        thread::sleep(ROUND);
    }
    if door.turned_away > TOLD {
        tracing::warn!("{} connections on the port of the ranks were turned away", door.turned_away);
    }
    Ok(found.into_iter().flatten().collect())
}

/// Returns the file by which ranks on one machine share their token.
fn token_file(meeting: &Meeting<'_>) -> Result<Option<TokenFile>> {
    match meeting.token {
        Token::Given(_) => Ok(None),
        Token::HandedOver(run) => TokenFile::of_user(meeting.address.1, run).map(Some),
    }
}

/// Connections on the port of the ranks that have not introduced themselves yet.
struct Door<'a> {
    meeting: &'a Meeting<'a>,
    token: &'a [u8],
    guests: Vec<Guest>,
    turned_away: usize,
}

struct Guest {
    stream: TcpStream,
    from: SocketAddr,
    until: Instant,
    heard: Vec<u8>,
    /// Set once the guest has said hello.
    handshake: Option<Handshake>,
}

impl Door<'_> {
    /// Accepts the new connections. If there are too many, drops the oldest that said nothing.
    fn let_in(&mut self, listener: &TcpListener) {
        for _ in 0..MOST_GUESTS / 4 {
            let Ok((stream, from)) = listener.accept() else { return };
            if stream.set_nonblocking(true).and_then(|()| stream.set_nodelay(true)).is_err() {
                continue;
            }
            if self.guests.len() >= MOST_GUESTS {
                let silent = self.guests.iter().position(|guest| guest.handshake.is_none()).unwrap_or(0);
                let guest = self.guests.remove(silent);
                self.turn_away(guest.from, &"too many connect and say nothing");
            }
            let until = Instant::now() + INTRODUCTION;
            self.guests.push(Guest { stream, from, until, heard: Vec::new(), handshake: None });
        }
    }

    /// Returns the ranks that have proved their identity since the last call.
    fn hear(&mut self) -> Vec<(usize, TcpStream)> {
        let mut known = Vec::new();
        for mut guest in mem::take(&mut self.guests) {
            match guest.hear(self.meeting.world_size, self.token) {
                Ok(Some(rank)) => known.push((rank, guest.stream)),
                Ok(None) if Instant::now() < guest.until => self.guests.push(guest),
                Ok(None) => self.turn_away(guest.from, &"it does not say who it is"),
                Err(problem) => self.turn_away(guest.from, &problem),
            }
        }
        known
    }

    fn turn_away(&mut self, from: SocketAddr, problem: &dyn std::fmt::Display) {
        self.turned_away += 1;
        if self.turned_away <= TOLD {
            tracing::warn!("{from} on the port of the ranks is turned away: {problem}");
        }
    }
}

impl Guest {
    /// Advances the handshake as far as the received bytes allow. Returns the rank once it is known. Never waits.
    fn hear(&mut self, world_size: usize, token: &[u8]) -> io::Result<Option<usize>> {
        loop {
            let wanted = if self.handshake.is_none() { HELLO } else { WORD };
            let mut rest = [0; HELLO];
            match self.stream.read(&mut rest[..wanted - self.heard.len()]) {
                Ok(0) => return Err(io::Error::new(ErrorKind::UnexpectedEof, "it left before it said who it is")),
                Ok(read) => self.heard.extend(&rest[..read]),
                Err(problem) if waits(&problem) || problem.kind() == ErrorKind::Interrupted => return Ok(None),
                Err(problem) => return Err(problem),
            }
            if self.heard.len() < wanted {
                continue;
            }
            let heard = mem::take(&mut self.heard);
            let Some(handshake) = &self.handshake else {
                let (rank, others) = read_hello(&heard, world_size)?;
                let firsts = nonce()?;
                self.stream.write_all(&firsts)?;
                self.handshake = Some(Handshake { rank, world_size, others, firsts });
                continue;
            };
            handshake.check(Side::Other, token, &heard)?;
            self.stream.write_all(&handshake.proof(Side::First, token)?)?;
            self.stream.set_nonblocking(false)?;
            return Ok(Some(handshake.rank));
        }
    }
}

/// Listens on the port of the ranks. Retries while it is in use, because its holder may release it: a connection that
/// got it by chance, or the previous run.
fn listen(meeting: &Meeting<'_>, until: Instant) -> Result<TcpListener> {
    const ANOTHER: &str = "set MASTER_PORT to another port; the one after it must be free too";
    let (host, port) = meeting.address;
    let mut warned = false;
    loop {
        let problem = match bind(port, meeting.one_machine) {
            Ok(listener) => return Ok(listener),
            Err(problem) => problem,
        };
        if problem.kind() != ErrorKind::AddrInUse {
            let place = format!("port {port} of {host}");
            return Err(Error::input(place, format!("listening failed: {problem}"), ANOTHER));
        }
        if Instant::now() > until {
            let line = format!("waiting for port {port} of {host}: another program keeps it\n  remedy: {ANOTHER}");
            return Err(Error::Peer(line));
        }
        if !mem::replace(&mut warned, true) {
            tracing::warn!("port {port} of {host} is in use: waiting for it; {ANOTHER}");
        }
        thread::sleep(Duration::from_millis(100));
    }
}

/// Binds the port, on the loopback interface alone if all ranks share this machine: then no other machine can connect.
fn bind(port: u16, one_machine: bool) -> io::Result<TcpListener> {
    let listener = if one_machine {
        TcpListener::bind(&loopback(port)[..])
    } else {
        // A listener on IPv6, where available, also accepts IPv4.
        match TcpListener::bind((Ipv6Addr::UNSPECIFIED, port)) {
            Err(problem) if problem.kind() != ErrorKind::AddrInUse => TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)),
            bound => bound,
        }
    }?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

fn loopback(port: u16) -> [SocketAddr; 2] {
    [(Ipv4Addr::LOCALHOST, port).into(), (Ipv6Addr::LOCALHOST, port).into()]
}

/// Other ranks: connects to rank 0, which may start later.
pub(super) fn reach(meeting: &Meeting<'_>, until: Instant) -> Result<TcpStream> {
    let (host, port) = meeting.address;
    let file = token_file(meeting)?;
    loop {
        let problem = match connect(meeting, file.as_ref(), until) {
            Ok(stream) => return Ok(stream),
            Err(problem) => problem,
        };
        // Leaves the last attempt enough time to finish.
        if Instant::now() + 2 * PAUSE > until {
            return Err(Error::Peer(format!("waiting for rank 0: it cannot be reached at {host}:{port}: {problem}")));
        }
        thread::sleep(PAUSE);
    }
}

fn connect(meeting: &Meeting<'_>, file: Option<&TokenFile>, until: Instant) -> io::Result<TcpStream> {
    let laid;
    let token = match (meeting.token, file) {
        // Read it again at every attempt: the first file may come from a previous run.
        (_, Some(file)) => {
            let named = |problem: io::Error| {
                let path = file.path().display();
                io::Error::new(problem.kind(), format!("the token {path} that rank 0 lays down: {problem}"))
            };
            laid = file.read().map_err(named)?;
            laid.as_slice()
        }
        (Token::Given(token) | Token::HandedOver(token), None) => token.as_bytes(),
    };
    let mut failed = io::Error::from(ErrorKind::AddrNotAvailable);
    for address in addresses(meeting, until)? {
        match introduce(meeting, address, token, until) {
            Ok(stream) => return Ok(stream),
            // A refusal is more informative than an address where nobody listens.
            Err(_) if failed.kind() == ErrorKind::PermissionDenied => {}
            Err(problem) => failed = problem,
        }
    }
    Err(failed)
}

/// Resolves the addresses of rank 0 within the deadline: the system's resolver has its own timeout, which may be
/// longer.
fn addresses(meeting: &Meeting<'_>, until: Instant) -> io::Result<Vec<SocketAddr>> {
    let (host, port) = meeting.address;
    if meeting.one_machine {
        return Ok(loopback(port).into());
    }
    let (sender, found) = mpsc::sync_channel(1);
    let host = host.to_owned();
    thread::spawn(move || {
        // The receiver may have given up: then nobody misses the answer.
        let _ = sender.send((host.as_str(), port).to_socket_addrs().map(Iterator::collect));
    });
    found.recv_timeout(until.saturating_duration_since(Instant::now())).map_err(|_| ErrorKind::TimedOut)?
}

/// Connects to `address` and checks that it is rank 0 of this run.
fn introduce(meeting: &Meeting<'_>, address: SocketAddr, token: &[u8], until: Instant) -> io::Result<TcpStream> {
    let until = until.min(Instant::now() + INTRODUCTION);
    let left = until.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
    let mut stream = TcpStream::connect_timeout(&address, left)?;
    stream.set_nodelay(true)?;
    let own = nonce()?;
    stream.write_all(&hello(meeting.rank, &own))?;
    let mut firsts = [0; WORD];
    read_until(&mut stream, &mut firsts, until)?;
    let handshake = Handshake { rank: meeting.rank, world_size: meeting.world_size, others: own, firsts };
    stream.write_all(&handshake.proof(Side::Other, token)?)?;
    let mut proof = [0; WORD];
    // Rank 0 closes the connection of a rank with another token.
    read_until(&mut stream, &mut proof, until).map_err(|problem| match problem.kind() {
        ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset => {
            io::Error::new(ErrorKind::PermissionDenied, "it does not take this rank's token")
        }
        _ => problem,
    })?;
    handshake.check(Side::First, token, &proof)?;
    Ok(stream)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_on_one_machine_listen_to_nobody_else() {
        let hears = |one_machine| bind(0, one_machine).unwrap().local_addr().unwrap().ip();
        assert!(hears(true).is_loopback());
        assert!(hears(false).is_unspecified());
    }

    #[test]
    fn the_first_who_say_nothing_make_room_and_those_who_spoke_stay() {
        let listener = bind(0, true).unwrap();
        let call = || TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let token = Token::Given("ours".into());
        let meeting = Meeting { rank: 0, world_size: 2, address: ("", 0), one_machine: true, token: &token, host: "" };
        let mut door = Door { meeting: &meeting, token: b"ours", guests: Vec::new(), turned_away: 0 };
        let mut rank = call();
        rank.write_all(&hello(1, &[1; WORD])).unwrap();
        while door.guests.first().is_none_or(|guest| guest.handshake.is_none()) {
            door.let_in(&listener);
            assert!(door.hear().is_empty());
        }
        let mut silent = Vec::new();
        while door.turned_away < 10 {
            silent.push(call());
            door.let_in(&listener);
        }
        assert_eq!(door.guests.len(), MOST_GUESTS);
        assert!(door.guests[0].handshake.is_some());
        let (last, newest) = (door.guests.last().unwrap(), silent.last().unwrap());
        assert_eq!(last.from, newest.local_addr().unwrap());
    }
}
