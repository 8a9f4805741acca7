//! Starts programs under mpirun.

use std::process::{Command, Output, Stdio};

/// Makes the command `mpirun -n ranks`, as root or not, on any number of cores. The caller appends a program and its
/// arguments.
pub fn mpirun(ranks: usize) -> Command {
    let mut command = Command::new("mpirun");
    command.args(["-n", &ranks.to_string()]);
    for (name, value) in [
        ("OMPI_ALLOW_RUN_AS_ROOT", "1"),
        ("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1"),
        ("OMPI_MCA_rmaps_base_oversubscribe", "1"),
        ("OMPI_MCA_mpi_yield_when_idle", "1"),
        ("OMPI_MCA_hwloc_base_binding_policy", "none"),
        // Seconds between mpirun's SIGTERM and SIGKILL when it ends all ranks because of one: time for their last
        // output.
        ("OMPI_MCA_odls_base_sigkill_timeout", "10"),
        // The ranks share the machine: one thread each.
        ("RAYON_NUM_THREADS", "1"),
    ] {
        command.env(name, value);
    }
    command.stdin(Stdio::null());
    command
}

/// Returns the exit code and the output on both streams.
pub fn end_of(output: &Output) -> (Option<i32>, String) {
    let text = [&output.stdout[..], &output.stderr].concat();
    (output.status.code(), String::from_utf8_lossy(&text).into_owned())
}
