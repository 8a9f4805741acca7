//! Two ranks, of which one, both, or their launcher are killed at any point.

use hyperlora_core::random::below;

use hyperlora_testing::kills::{Blow, Kills};
use hyperlora_testing::mpirun::mpirun;

#[test]
fn killed_at_random_moments_the_same_command_ends_with_the_same_bits() {
    let kills = Kills {
        command: || {
            let mut command = mpirun(2);
            // A remaining rank cannot save without the others, so it needs no long grace period.
            command.env("OMPI_MCA_odls_base_sigkill_timeout", "1").arg(env!("CARGO_BIN_EXE_hyperlora"));
            command
        },
        // mpirun comes first in the list. Before the ranks exist, it takes their place, and SIGTERM ends it with 1.
        blow: |generator, processes| {
            let rank = processes.len().min(2) - 1 + below(generator, processes.len().saturating_sub(1) as u64) as usize;
            match below(generator, 6) {
                0 if rank == 0 => {
                    Blow { signal: "TERM", processes: processes.into(), codes: &[Some(1), Some(143), None] }
                }
                // SIGTERM ends a rank like any process, before the program listens for the signal.
                0 => Blow { signal: "TERM", processes: vec![processes[rank]], codes: &[Some(3), Some(143)] },
                1 => Blow { signal: "KILL", processes: processes.into(), codes: &[None] },
                2 => Blow { signal: "KILL", processes: vec![processes[0]], codes: &[None] },
                _ => Blow { signal: "KILL", processes: vec![processes[rank]], codes: &[Some(137), None] },
            }
        },
        routine: 4,
    };
    kills.at_random();
}
