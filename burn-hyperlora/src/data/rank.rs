//! Assignment of a run's draws to ranks.

use std::ops::Range;

use hyperlora_core::{Error, Result};

/// A rank, as seen by the data. Draw `d` belongs to rank `d % world_size`: every global batch is split evenly, and
/// within an epoch a rank gets whole streams, because the world size divides their number
/// ([`crate::data::order::epoch_order`]).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rank {
    rank: u64,
    world_size: u64,
}

impl Rank {
    /// The only rank of a run.
    pub const ALONE: Self = Self { rank: 0, world_size: 1 };

    /// Creates rank `rank` of `world_size`, counted from 0.
    ///
    /// # Errors
    /// Fault: the number is not below the world size.
    pub fn new(rank: usize, world_size: usize) -> Result<Self> {
        if rank >= world_size {
            return Err(Error::Fault(format!("rank {rank} in a world of {world_size}")));
        }
        Ok(Self { rank: rank as u64, world_size: world_size as u64 })
    }

    /// Iterates over this rank's draws in a range.
    pub fn draws(self, draws: Range<u64>) -> impl Iterator<Item = u64> {
        let Self { rank, world_size } = self;
        let first = draws.start + (rank + world_size - draws.start % world_size) % world_size;
        (first..draws.end).step_by(world_size as usize)
    }

    /// Returns the next draw after every rank has served as many draws as this one has with `draw`.
    pub fn after(self, draw: u64) -> u64 {
        draw - draw % self.world_size + self.world_size
    }

    /// Checks that the world size divides streams and batches evenly; `place` names the file.
    ///
    /// # Errors
    /// Input, naming the key and the world sizes that fit.
    pub fn check(self, place: &str, streams: usize, micro_batch: usize, global_batch: usize) -> Result<()> {
        let ranks = self.world_size as usize;
        let uneven = |streams: usize, ranks: usize| !streams.is_multiple_of(ranks);
        let passes = global_batch / micro_batch.max(1);
        let fitting = || {
            let sizes = (1..=streams.min(passes)).filter(|&size| !uneven(streams, size) && !uneven(passes, size));
            let sizes: Vec<String> = sizes.map(|size| size.to_string()).collect();
            format!("start one of {} processes", sizes.join(", "))
        };
        if uneven(streams, ranks) {
            return Err(Error::input(
                format!("{place}: data.streams"),
                format!("{streams} streams cannot be split evenly among {ranks} processes"),
                format!("{}, or begin a new run with a multiple of {ranks} streams", fitting()),
            ));
        }
        if uneven(passes, ranks) {
            return Err(Error::input(
                format!("{place}: train.global_batch"),
                format!(
                    "{global_batch} samples are {passes} micro-batches of {micro_batch}: not the same number for each of {ranks} processes"
                ),
                format!("{}, or begin a new run with another train.micro_batch", fitting()),
            ));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn draws_are_dealt_in_turn_wherever_the_range_begins() {
        for (start, world_size) in (0..14).flat_map(|start| [1, 2, 3, 4].map(|size| (start, size))) {
            let mut dealt: Vec<u64> = Vec::new();
            for rank in 0..world_size {
                let own: Vec<u64> = Rank { rank, world_size }.draws(start..start + 12).collect();
                assert_eq!(own.len() as u64, 12 / world_size);
                assert!(own.iter().all(|draw| draw % world_size == rank));
                dealt.extend(own);
            }
            dealt.sort_unstable();
            assert_eq!(dealt, (start..start + 12).collect::<Vec<_>>());
        }
        assert_eq!((Rank { rank: 1, world_size: 4 }.after(9), Rank::ALONE.after(9)), (12, 10));
        assert!(Rank::new(4, 4).is_err());
    }

    #[test]
    fn a_world_size_that_deals_unevenly_is_refused_with_those_that_fit() {
        let check =
            |ranks| Rank { rank: 0, world_size: ranks }.check("train.yaml", 12, 2, 16).map_err(|e| e.to_string());
        assert_eq!([1, 2, 4].map(check), [Ok(()), Ok(()), Ok(())]);
        let streams = check(5).unwrap_err();
        assert!(streams.contains("data.streams") && streams.contains("start one of 1, 2, 4 processes"), "{streams}");
        let batch = check(3).unwrap_err();
        assert!(batch.contains("train.global_batch") && batch.contains("8 micro-batches of 2"), "{batch}");
    }
}
