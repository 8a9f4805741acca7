//! Untrusted bytes on the connection between two ranks.

use std::io::Write;
use std::net::TcpStream;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use hyperlora_ranks::frames::read_frame;

use hyperlora_testing::fuzz::{Refusal, fuzz};

fn frame(kind: u8, payload: &[u8]) -> Vec<u8> {
    [&[kind][..], &(payload.len() as u64).to_le_bytes(), payload].concat()
}

#[test]
fn frames() {
    let seeds = [frame(0, b"{\"note\": [1, 2]}"), frame(1, b"rank 1 of node-1 failed"), frame(2, b"")];
    fuzz("frames", 2000, 1 << 20, "", |case| {
        let sent = case.one_binary(&seeds);
        // Stands in for a TCP connection, because a million of those would use up all ports.
        let (mut peer, own) = UnixStream::pair().unwrap();
        peer.write_all(&sent).unwrap();
        drop(peer);
        let mut own = TcpStream::from(OwnedFd::from(own));
        let read = read_frame(&mut own, Instant::now() + Duration::from_secs(20));
        let (_, payload) = read.map_err(|problem| Refusal::Reason(problem.to_string()))?;
        assert_eq!(payload, sent[9..9 + payload.len()]);
        Ok(())
    });
}
