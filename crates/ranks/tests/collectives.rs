//! Tests of the collectives, through the program with which a user checks a cluster (feature `mpi`).
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::time::{Duration, Instant};

use hyperlora_testing::mpirun::{end_of, mpirun};

fn check(ranks: usize, arguments: &[&str]) -> (Option<i32>, String) {
    end_of(&mpirun(ranks).arg(env!("CARGO_BIN_EXE_collective-check")).args(arguments).output().unwrap())
}

#[test]
fn every_collective_gives_what_a_rank_can_work_out_alone() {
    for ranks in [2, 3, 4] {
        let (code, text) = check(ranks, &[]);
        assert!(code == Some(0) && text.contains(&format!("{ranks} ranks on")), "{text}");
    }
}

#[test]
fn the_rank_that_falls_silent_is_named_within_the_deadline() {
    let clock = Instant::now();
    let (code, text) = check(3, &["--silent", "1", "--timeout", "10"]);
    assert_eq!(code, Some(75), "{text}");
    for rank in [0, 2] {
        let said = |line: &str| {
            let here = line.contains(&format!(" rank {rank} (")) && line.contains(" waited ");
            here && line.contains("for the check: no word from rank 1 (") && line.matches("rank").count() == 2
        };
        assert!(text.lines().any(said), "rank {rank}: {text}");
    }
    assert!(clock.elapsed() < Duration::from_mins(4));
}

#[test]
fn the_rank_that_runs_something_else_is_named() {
    let (code, text) = check(3, &["--differ", "2"]);
    assert_eq!(code, Some(2), "{text}");
    assert!(text.contains("rank 2 (") && text.contains("its configuration is true, that of rank 0"), "{text}");
}
