//! Data folder of one rank that vanishes during a training run.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use std::{fs, thread};

use burn_hyperlora::checkpoint::CheckpointStore;
use burn_hyperlora::data::quarantine::{self, QUARANTINE_FILE};
use burn_hyperlora::metrics::LastScalars;
use burn_hyperlora::run::{CHECKPOINTS, TENSORBOARD};

use hyperlora_testing::mpirun::{end_of, mpirun};
use hyperlora_testing::state::tensors;
use hyperlora_testing::world::World;

/// Gives each rank its own data folder, with almost nothing of it kept in memory.
const OWN_FOLDERS: [(&str, &str); 3] = [
    ("shards: shards", "shards: ${SHARDS_OF_THE_RANK}\n  cache_mib: 0\n  prefetch_mib: 0"),
    ("{every: 2, keep: 9}", "{every: 1, keep: 3}"),
    ("base: {steps: 2", "base: {steps: 30"),
];
const STEPS: u64 = 37;

/// Prints the exit code of each rank, because mpirun reports only one rank's.
const TELL_THE_CODE: &str =
    r#"trap : TERM; "$@"; code=$?; echo "rank $OMPI_COMM_WORLD_RANK: exit code $code"; exit $code"#;

/// Builds the training command for two ranks.
fn command(world: &World, run: &str) -> Command {
    let mut command = mpirun(1);
    for rank in 0..2 {
        if rank > 0 {
            command.args([":", "-n", "1"]);
        }
        let shards = format!("SHARDS_OF_THE_RANK={}", world.path(&format!("shards-{rank}")).display());
        command.args(["-x", &shards, "bash", "-c", TELL_THE_CODE, "rank", env!("CARGO_BIN_EXE_hyperlora"), "train"]);
        command.arg(world.path("train.yaml")).arg("--out").arg(world.path(run));
    }
    command
}

/// Copies the shards into each rank's data folder.
fn copy_shards(world: &World) {
    for rank in 0..2 {
        let folder = world.path(&format!("shards-{rank}"));
        fs::create_dir(&folder).unwrap();
        for file in fs::read_dir(world.path("shards")).unwrap().map(Result::unwrap) {
            fs::copy(file.path(), folder.join(file.file_name())).unwrap();
        }
    }
}

/// Moves all files of a folder to another one. Renaming is not enough: an open folder stays readable.
fn carry(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for file in fs::read_dir(from).unwrap().map(Result::unwrap) {
        fs::rename(file.path(), to.join(file.file_name())).unwrap();
    }
}

#[test]
fn a_vanished_data_folder_ends_all_ranks_and_once_it_is_back_the_run_goes_on() {
    let world = World::small();
    world.write_yaml(&OWN_FOLDERS);
    copy_shards(&world);
    let (code, text) = end_of(&command(&world, "undisturbed").output().unwrap());
    assert_eq!(code, Some(0), "{text}");

    let run = world.path("run");
    let store = CheckpointStore::at(&run.join(CHECKPOINTS));
    for victim in [1, 0] {
        let begun = Instant::now();
        let before = store.latest().unwrap().map_or(0, |latest| latest.step);
        let mut launched = command(&world, "run").stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        while store.latest().unwrap().is_none_or(|latest| latest.step < before + 2) {
            assert!(begun.elapsed() < Duration::from_mins(4) && launched.try_wait().unwrap().is_none());
            thread::sleep(Duration::from_millis(5));
        }
        let (folder, away) = (world.path(&format!("shards-{victim}")), world.path("away"));
        carry(&folder, &away);
        let clock = Instant::now();
        let (code, text) = end_of(&launched.wait_with_output().unwrap());
        assert!(code == Some(2) && clock.elapsed() < Duration::from_mins(4), "{code:?} {text}");
        for exit in [0, 1].map(|rank| format!("rank {rank}: exit code 2")) {
            assert!(text.contains(&exit), "not `{exit}`: {text}");
        }
        let missing = format!("error: {}/shard-0000", folder.display());
        let named = format!("error: rank {victim} (");
        let says = |words: &str| text.lines().filter(|line| line.contains(words)).collect::<Vec<_>>();
        assert!(matches!(says(&missing)[..], [line] if line.contains("cannot be read: No such file")), "{text}");
        assert!(matches!(says(&named)[..], [line] if line.contains(") failed: ")), "{text}");
        // Missing data does not count as damaged.
        assert!(!run.join(QUARANTINE_FILE).exists());
        store.latest().unwrap().unwrap().verify().unwrap();
        carry(&away, &folder);
    }
    let (code, text) = end_of(&command(&world, "run").output().unwrap());
    assert_eq!(code, Some(0), "{text}");
    assert!(tensors(&run, STEPS) == tensors(&world.path("undisturbed"), STEPS));
}

#[test]
fn what_one_rank_alone_leaves_out_is_in_the_curves_of_all() {
    let world = World::small();
    world.write_yaml(&OWN_FOLDERS[..1]);
    copy_shards(&world);
    let shard = world.path("shards-1/shard-00000.parquet");
    let mut bytes = fs::read(&shard).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&shard, bytes).unwrap();
    let (code, text) = end_of(&command(&world, "run").output().unwrap());
    assert_eq!(code, Some(0), "{text}");
    assert_eq!(quarantine::count(&world.path("run"), None).unwrap(), 1);
    let curves = LastScalars::read(&world.path("run").join(TENSORBOARD)).unwrap().values;
    assert_eq!(curves["data/left_out_row_groups"], 1.0);
}
