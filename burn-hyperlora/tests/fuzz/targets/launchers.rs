//! Environment variables of launchers.

use std::collections::BTreeMap;

use hyperlora_ranks::{Placement, earlier_life};

use hyperlora_testing::fuzz::fuzz;

/// One line per variable.
const SEEDS: [&str; 4] = [
    "RANK=5\nWORLD_SIZE=8\nLOCAL_RANK=1\nLOCAL_WORLD_SIZE=4\nMASTER_ADDR=node-0\nMASTER_PORT=29500\nHYPERLORA_TOKEN=x\n",
    "OMPI_COMM_WORLD_RANK=1\nOMPI_COMM_WORLD_SIZE=2\nOMPI_COMM_WORLD_LOCAL_RANK=1\nOMPI_COMM_WORLD_LOCAL_SIZE=2\n",
    "SLURM_STEP_ID=0\nSLURM_PROCID=3\nSLURM_NTASKS=4\nSLURM_LOCALID=0\nSLURM_STEP_TASKS_PER_NODE=2(x2)\n\
     HYPERLORA_TOKEN=x\nSLURM_RESTART_COUNT=1\n",
    "SLURM_JOB_ID=7\n",
];

const WORDS: [&str; 26] = [
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "HYPERLORA_TOKEN",
    "OMPI_COMM_WORLD_RANK",
    "OMPI_COMM_WORLD_SIZE",
    "SLURM_STEP_ID",
    "SLURM_PROCID",
    "SLURM_NTASKS",
    "SLURM_LOCALID",
    "SLURM_RESTART_COUNT",
    "TORCHELASTIC_RUN_ID",
    "JOB_COMPLETION_INDEX",
    "SLURM_JOB_ID",
    "=",
    "\n",
    " ",
    "65535",
    "65536",
    "localhost",
    "::1",
    "4294967290",
    "2(x2),1",
];

#[test]
fn environment() {
    fuzz("environment", 4000, 1 << 20, "", |case| {
        let text = String::from_utf8_lossy(&case.one_text(&SEEDS, &WORDS)).into_owned();
        let set: BTreeMap<&str, &str> = text.lines().filter_map(|line| line.split_once('=')).collect();
        let variable = |name: &str| set.get(name).map(|value| (*value).to_owned());
        if let Some(placement) = Placement::detect(variable)? {
            assert!(placement.rank < placement.world_size && placement.local_rank <= placement.rank);
            placement.token(variable)?;
        }
        earlier_life(variable)?;
        Ok(())
    });
}
