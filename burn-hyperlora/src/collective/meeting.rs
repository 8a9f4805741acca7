//! How ranks on several machines find each other: rank 0 listens, the others connect and show that they belong to the run.

use std::io::{self, ErrorKind, Read, Write};
use std::mem;
use std::net::{Ipv4Addr, Ipv6Addr, TcpListener, TcpStream, ToSocketAddrs};
use std::thread;
use std::time::{Duration, Instant};

use sha2::{Digest, Sha256};

use crate::error::{Error, Result};

/// A stranger on the port is given this long to say who it is.
const INTRODUCTION: Duration = Duration::from_secs(2);

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

/// Rank 0: connections by rank, once every rank has introduced itself.
pub(super) fn gather(meeting: &Meeting<'_>, until: Instant) -> Result<Vec<TcpStream>> {
    let listener = listen(meeting, until)?;
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

/// The port of the ranks. What keeps it may leave it in time: a connection that was given it by chance, or the run before.
fn listen(meeting: &Meeting<'_>, until: Instant) -> Result<TcpListener> {
    const ANOTHER: &str = "set MASTER_PORT to another port; the one after it must be free too";
    let (host, port) = meeting.address;
    let mut warned = false;
    loop {
        let problem = match bind(port) {
            Ok(listener) => return Ok(listener),
            Err(problem) => problem,
        };
        if problem.kind() != ErrorKind::AddrInUse {
            let place = format!("port {port} of {host}");
            return Err(Error::input(place, format!("cannot be listened at: {problem}"), ANOTHER));
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

fn bind(port: u16) -> io::Result<TcpListener> {
    // Where there is IPv6, its listener hears IPv4 too.
    let listener = match TcpListener::bind((Ipv6Addr::UNSPECIFIED, port)) {
        Err(problem) if problem.kind() != ErrorKind::AddrInUse => TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)),
        bound => bound,
    }?;
    listener.set_nonblocking(true)?;
    Ok(listener)
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
pub(super) fn reach(meeting: &Meeting<'_>, until: Instant) -> Result<TcpStream> {
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
