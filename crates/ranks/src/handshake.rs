//! Handshake by which a rank and rank 0 prove that they know the run's token, without revealing it.
//!
//! The rank sends a hello with its number and a nonce, rank 0 answers with its own nonce, the rank sends its proof, and
//! rank 0 sends its own. A proof is the HMAC-SHA256 under the token of the side that gives it, the program's version,
//! the rank, the world size and both nonces. It holds for this one connection, and a proof cannot be reflected to the
//! side that gave it.

use std::io::{self, ErrorKind};

use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;

/// Bytes of a nonce and of a proof.
pub(super) const WORD: usize = 32;
/// Bytes of a rank's hello.
pub(super) const HELLO: usize = GREETING.len() + size_of::<u64>() + WORD;

/// Distinguishes this protocol from others.
const GREETING: &[u8; 8] = b"hlranks2";

/// Nonce or proof.
pub(super) type Word = [u8; WORD];

/// Side that gives a proof.
#[derive(Debug, Clone, Copy)]
pub(super) enum Side {
    /// Rank 0.
    First,
    /// Any other rank.
    Other,
}

/// Returns random bytes that nobody can guess.
pub(super) fn nonce() -> io::Result<Word> {
    let mut nonce = [0; WORD];
    getrandom::fill(&mut nonce).map_err(io::Error::other)?;
    Ok(nonce)
}

/// Makes the hello of `rank`.
pub(super) fn hello(rank: usize, nonce: &Word) -> Vec<u8> {
    [&GREETING[..], &(rank as u64).to_le_bytes(), nonce].concat()
}

/// Reads the rank and the nonce from a `hello`.
pub(super) fn read_hello(hello: &[u8], world_size: usize) -> io::Result<(usize, Word)> {
    let stranger = || io::Error::new(ErrorKind::InvalidData, "it is not a rank of this program");
    let rest = hello.strip_prefix(GREETING).ok_or_else(stranger)?;
    let (rank, nonce) = rest.split_first_chunk::<8>().ok_or_else(stranger)?;
    let nonce = nonce.try_into().map_err(|_| stranger())?;
    let rank = u64::from_le_bytes(*rank);
    if !(1..world_size as u64).contains(&rank) {
        let problem = format!("it calls itself rank {rank}, and {world_size} ranks meet here");
        return Err(io::Error::new(ErrorKind::InvalidData, problem));
    }
    Ok((rank as usize, nonce))
}

/// Content of both proofs of one connection.
pub(super) struct Handshake {
    pub(super) rank: usize,
    pub(super) world_size: usize,
    /// Nonce of the other rank.
    pub(super) others: Word,
    /// Nonce of rank 0.
    pub(super) firsts: Word,
}

impl Handshake {
    /// Returns the proof of `side`, under the token.
    pub(super) fn proof(&self, side: Side, token: &[u8]) -> io::Result<Word> {
        Ok(self.mac(side, token)?.finalize().into_bytes().into())
    }

    /// Checks that `proof` is that of `side`, in constant time.
    pub(super) fn check(&self, side: Side, token: &[u8], proof: &[u8]) -> io::Result<()> {
        let unknown = |_| io::Error::new(ErrorKind::PermissionDenied, "it does not know the token of this run");
        self.mac(side, token)?.verify_slice(proof).map_err(unknown)
    }

    fn mac(&self, side: Side, token: &[u8]) -> io::Result<Hmac<Sha256>> {
        let side = match side {
            Side::First => "rank 0",
            Side::Other => "another rank",
        };
        // Every part has a fixed length or ends in a zero byte, so that no two contents produce the same text.
        let mut mac = Hmac::<Sha256>::new_from_slice(token).map_err(io::Error::other)?;
        for text in ["hyperlora ranks meet", env!("CARGO_PKG_VERSION"), side] {
            mac.update(text.as_bytes());
            mac.update(&[0]);
        }
        mac.update(&(self.rank as u64).to_le_bytes());
        mac.update(&(self.world_size as u64).to_le_bytes());
        mac.update(&self.others);
        mac.update(&self.firsts);
        Ok(mac)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn handshake() -> Handshake {
        Handshake { rank: 1, world_size: 4, others: [1; WORD], firsts: [2; WORD] }
    }

    #[test]
    fn a_proof_holds_for_one_side_one_rank_one_world_and_one_connection() {
        let proof = handshake().proof(Side::Other, b"token").unwrap();
        handshake().check(Side::Other, b"token", &proof).unwrap();
        assert!(handshake().check(Side::First, b"token", &proof).is_err(), "reflected");
        assert!(handshake().check(Side::Other, b"other", &proof).is_err(), "another token");
        assert!(handshake().check(Side::Other, b"token", &proof[..31]).is_err(), "cut");
        for other in [
            Handshake { rank: 2, ..handshake() },
            Handshake { world_size: 5, ..handshake() },
            Handshake { others: [3; WORD], ..handshake() },
            Handshake { firsts: [3; WORD], ..handshake() },
            Handshake { others: [2; WORD], firsts: [1; WORD], ..handshake() },
        ] {
            assert!(other.check(Side::Other, b"token", &proof).is_err());
        }
        assert_ne!(nonce().unwrap(), nonce().unwrap());
    }

    #[test]
    fn only_a_rank_of_the_world_says_hello() {
        let said = hello(3, &[7; WORD]);
        assert_eq!(said.len(), HELLO);
        assert_eq!(read_hello(&said, 4).unwrap(), (3, [7; WORD]));
        for wrong in [&said[..HELLO - 1], &hello(0, &[7; WORD]), &hello(4, &[7; WORD]), &[b'G'; HELLO], b""] {
            assert!(read_hello(wrong, 4).is_err());
        }
    }
}
