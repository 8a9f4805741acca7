//! Two ranks, of which one, both, or their launcher are killed at whatever moment.

use hyperlora_core::random::below;

use hyperlora_testing::kills::{Blow, Kills};
use hyperlora_testing::mpirun::mpirun;

#[test]
fn killed_at_random_moments_the_same_command_ends_with_the_same_bits() {
    let kills = Kills {
        command: || {
            let mut command = mpirun(2);
            // Whoever is left has nobody to save with: no long time for last words.
            command.env("OMPI_MCA_odls_base_sigkill_timeout", "1").arg(env!("CARGO_BIN_EXE_hyperlora"));
            command
        },
        // mpirun comes first; as long as there are no ranks, it stands for them, and SIGTERM ends it with 1.
        blow: |generator, processes| {
            let rank = processes.len().min(2) - 1 + below(generator, processes.len().saturating_sub(1) as u64) as usize;
            match below(generator, 6) {
                0 if rank == 0 => {
                    Blow { signal: "TERM", processes: processes.into(), codes: &[Some(1), Some(143), None] }
                }
                // Before the program listens for it, SIGTERM ends a rank as it does any process.
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
