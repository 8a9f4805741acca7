//! Contract of a world: the operations that every implementation offers to its ranks.

use std::time::Duration;

use burn::tensor::Tensor;
use hyperlora_core::Result;

/// Exit code of a rank that lost another one (`EX_TEMPFAIL`).
pub const PEER_LOST: u8 = 75;

/// Ranks of a run.
///
/// A method fails with [`hyperlora_core::Error::Peer`] if another rank was lost or did not arrive in time. The world is then unusable,
/// and the process should end. If the underlying library cannot cancel a wait, it ends the process itself.
pub trait Collective {
    /// Rank of this process, from 0.
    fn rank(&self) -> usize {
        0
    }

    /// Processes of the run, at least 1.
    fn world_size(&self) -> usize {
        1
    }

    /// Machine of every rank.
    fn hosts(&self) -> &[String];

    /// Replaces `bucket` (any length, the same on all ranks) by its mean over the ranks.
    ///
    /// # Errors
    /// Peer, see [`Collective`].
    fn all_reduce_mean<'a>(&'a self, what: &'a str, bucket: Tensor<1>) -> Result<Pending<'a>>;

    /// Cuts `bucket` into [`world_size`](Self::world_size) equal parts, and replaces part `r` on rank `r` by its mean
    /// over the ranks. The content of the other parts is undefined afterwards.
    ///
    /// # Errors
    /// Peer, see [`Collective`].
    fn reduce_scatter_mean<'a>(&'a self, what: &'a str, bucket: Tensor<1>) -> Result<Pending<'a>>;

    /// Concatenates the parts of all ranks, which have equal length.
    ///
    /// # Errors
    /// Peer, see [`Collective`].
    fn all_gather<'a>(&'a self, what: &'a str, part: Tensor<1>) -> Result<Pending<'a>>;

    /// Copies rank 0's tensor to every rank; the others pass one of the same length.
    ///
    /// # Errors
    /// Peer, see [`Collective`].
    fn broadcast<'a>(&'a self, what: &'a str, tensor: Tensor<1>) -> Result<Pending<'a>>;

    /// Gives every rank the notes of all, by rank. Notes are short, and may differ in length.
    ///
    /// # Errors
    /// Peer, see [`Collective`].
    fn exchange(&self, what: &str, note: &[u8]) -> Result<Vec<Vec<u8>>>;

    /// Waits until all ranks are here, for at most `deadline`. Meant for waits that are longer than others, such as for
    /// work of one rank alone.
    ///
    /// # Errors
    /// Peer, see [`Collective`].
    fn barrier(&self, what: &str, deadline: Duration) -> Result<()>;

    /// Leaves in order. It is the last call of all ranks: a launcher reports a process that ends without it as failed.
    fn leave(&self) {}

    /// Name of a rank in messages: `rank 3 (node-1)`.
    fn name_of(&self, rank: usize) -> String {
        match self.hosts().get(rank) {
            Some(host) => format!("rank {rank} ({host})"),
            None => format!("rank {rank}"),
        }
    }

    /// Tells whether this is the main rank, which writes the files that a run has once: checkpoints, curves, the log.
    fn is_main(&self) -> bool {
        self.rank() == 0
    }
}

/// Running collective: call it for the result. Several may run at once, and complete in the order of their start.
pub type Pending<'a> = Box<dyn FnOnce() -> Result<Tensor<1>> + 'a>;

/// Timeouts for joining a world.
#[derive(Debug, Clone)]
pub struct JoinConfig {
    /// Longest wait for the other ranks in one collective.
    pub timeout: Duration,
    /// Longest wait for the other ranks at the start, because launchers take time.
    pub start_timeout: Duration,
}
