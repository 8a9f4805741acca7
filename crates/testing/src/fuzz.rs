//! Runs a reader on case after case and checks the guarantees of every reader. The fuzz tests of both crates use this
//! file.
//!
//! A case is a function of the target, a seed and its number, so that one can be rerun alone:
//! `HYPERLORA_FUZZ_FIRST=NUMBER HYPERLORA_FUZZ_CASES=1`. The first cases are the unchanged seeds, which must be
//! accepted.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use hyperlora_core::Error;

use crate::ALLOCATOR;
use crate::mutate::{Random, mutate_binary, mutate_text};

/// Runs one case at a time, because its memory is measured.
pub static TURN: Mutex<()> = Mutex::new(());

/// Time after which a case counts as hung: the slowest takes milliseconds.
const HANG: Duration = Duration::from_secs(100);

/// Failures after which a target is stopped.
const ENOUGH: usize = 20;

/// Longest message in bytes, generous for a human reader.
const LONGEST_MESSAGE: usize = 20_000;

/// Reason why a reader rejected a file.
pub enum Refusal {
    /// Error for the user.
    Error(Error),
    /// Reason that is counted, or reported with a place that the caller adds.
    Reason(String),
}

impl From<Error> for Refusal {
    fn from(error: Error) -> Self {
        Self::Error(error)
    }
}

/// Result of a reader.
pub type Answer = Result<(), Refusal>;

/// A case: its source of randomness, and its limits.
pub struct Case {
    /// Number of the case.
    pub number: u64,
    /// Randomness of the case.
    pub random: Random,
    /// Bytes that the reader may allocate.
    pub memory: usize,
    /// True if the file is an unchanged seed, which must be accepted.
    pub unchanged: bool,
    /// Name that an error must contain.
    pub named: String,
}

impl Case {
    /// Chooses the seed of this case out of `count`. The first cases use each seed unchanged.
    pub fn choose(&mut self, count: usize) -> usize {
        self.unchanged = self.number < count as u64;
        if self.unchanged { self.number as usize } else { self.random.below(count) }
    }

    /// Returns a binary file: the seed, unchanged or mutated.
    pub fn binary(&mut self, seed: &[u8]) -> Vec<u8> {
        if self.unchanged { seed.to_vec() } else { mutate_binary(&mut self.random, seed) }
    }

    /// Returns a text, unchanged or mutated token by token. `words` are those with a meaning in the format.
    pub fn text(&mut self, seed: &[u8], words: &[&str]) -> Vec<u8> {
        if self.unchanged { seed.to_vec() } else { mutate_text(&mut self.random, seed, words) }
    }

    /// Returns one of several binary files, like [`binary`](Self::binary).
    pub fn one_binary(&mut self, seeds: &[Vec<u8>]) -> Vec<u8> {
        let seed = self.choose(seeds.len());
        self.binary(&seeds[seed])
    }

    /// Returns one of several texts, like [`text`](Self::text).
    pub fn one_text(&mut self, seeds: &[&str], words: &[&str]) -> Vec<u8> {
        let seed = self.choose(seeds.len());
        self.text(seeds[seed].as_bytes(), words)
    }
}

/// Runs `read` on `HYPERLORA_FUZZ_CASES` cases, or on `cases` by default.
#[track_caller]
pub fn fuzz(target: &str, cases: u64, memory: usize, named: &str, mut read: impl FnMut(&mut Case) -> Answer) {
    let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let (seed, first) = (number("HYPERLORA_FUZZ_SEED").unwrap_or(3), number("HYPERLORA_FUZZ_FIRST").unwrap_or(0));
    let cases = number("HYPERLORA_FUZZ_CASES").unwrap_or(cases);
    let watch = Watch::over(target);
    let begin = Instant::now();
    let (mut accepted, mut failures) = (0_u64, Vec::new());
    for number in first..first + cases {
        watch.begins(number);
        let random = Random::of_case(seed, target, number);
        let mut case = Case { number, random, memory, unchanged: false, named: named.into() };
        match hold(&mut case, &mut read) {
            Ok(was_accepted) => accepted += u64::from(was_accepted),
            Err(problem) => failures.push(format!("case {number}: {problem}")),
        }
        if failures.len() == ENOUGH {
            break;
        }
    }
    let seconds = begin.elapsed().as_secs_f64();
    println!("fuzz\t{target}\t{cases}\t{seconds:.1}\t{accepted} accepted\t{} failures", failures.len());
    drop(turn);
    assert!(failures.is_empty(), "{target}, seed {seed}:\n{}", failures.join("\n"));
}

/// Tells whether the case was accepted. An error names the broken guarantee.
fn hold(case: &mut Case, read: &mut impl FnMut(&mut Case) -> Answer) -> Result<bool, String> {
    ALLOCATOR.reset_peak_usage();
    let before = ALLOCATOR.current_usage();
    let answer = catch_unwind(AssertUnwindSafe(|| read(case)));
    let peak = ALLOCATOR.peak_usage().saturating_sub(before);
    let answer = answer.map_err(|panic| {
        let said = panic.downcast_ref::<String>().map(String::as_str);
        format!("panics: {}", said.or(panic.downcast_ref::<&str>().copied()).unwrap_or("without words"))
    })?;
    if peak > case.memory {
        return Err(format!("takes {} KiB of {}", peak >> 10, case.memory >> 10));
    }
    match answer {
        Ok(()) => Ok(true),
        Err(Refusal::Error(error)) => check(case, &error).map(|()| false),
        Err(Refusal::Reason(reason)) if case.unchanged => Err(format!("refuses an unchanged seed: {reason}")),
        Err(Refusal::Reason(reason)) if reason.len() > LONGEST_MESSAGE => Err("says too much".into()),
        Err(Refusal::Reason(_)) => Ok(false),
    }
}

fn check(case: &Case, error: &Error) -> Result<(), String> {
    let message = error.to_string();
    let problem = match () {
        () if case.unchanged => "refuses an unchanged seed",
        () if error.exit_code() != 2 => "tells the file's fault as another's",
        () if !message.contains(&case.named) => "does not name the file",
        () if !message.contains("remedy: ") => "tells no remedy",
        () if message.len() > LONGEST_MESSAGE => "says too much",
        () if message.contains(|c: char| c.is_control() && c != '\n') => "lets control characters through",
        () => return Ok(()),
    };
    let shown: String = message.chars().take(1000).collect();
    Err(format!("{problem} (exit code {}): {shown:?}", error.exit_code()))
}

fn number(variable: &str) -> Option<u64> {
    let text = std::env::var(variable).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{variable} is `{text}`, not a whole number")))
}

/// Makes a temporary folder, in memory if the machine has `/dev/shm`.
pub fn scratch() -> tempfile::TempDir {
    let memory = Path::new("/dev/shm");
    if memory.is_dir() { tempfile::tempdir_in(memory).unwrap() } else { tempfile::tempdir().unwrap() }
}

/// Ends the process if a case hangs. Writes the case's number into the folder `HYPERLORA_FUZZ_STATE` for the event that
/// the process itself dies.
struct Watch {
    current: Arc<AtomicU64>,
    state: Option<File>,
}

impl Watch {
    fn over(target: &str) -> Self {
        let current = Arc::new(AtomicU64::new(u64::MAX));
        let state = std::env::var_os("HYPERLORA_FUZZ_STATE")
            .map(|dir| File::create(Path::new(&dir).join(format!("{target}_case"))).unwrap());
        let (target, watched) = (target.to_owned(), Arc::downgrade(&current));
        thread::spawn(move || {
            let mut seen = (u64::MAX, Instant::now());
            while let Some(current) = watched.upgrade().map(|current| current.load(Ordering::Relaxed)) {
                if current != seen.0 {
                    seen = (current, Instant::now());
                } else if seen.1.elapsed() > HANG {
                    eprintln!("{target}, case {current}: hangs");
                    std::process::abort();
                }
                thread::sleep(Duration::from_millis(200));
            }
        });
        Self { current, state }
    }

    fn begins(&self, number: u64) {
        self.current.store(number, Ordering::Relaxed);
        if let Some(state) = &self.state {
            state.write_all_at(format!("{number:<20}\n").as_bytes(), 0).unwrap();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failure(read: impl FnMut(&mut Case) -> Answer) -> String {
        let failed = catch_unwind(AssertUnwindSafe(|| fuzz("harness", 40, 1 << 20, "a.txt", read)));
        failed.unwrap_err().downcast_ref::<String>().unwrap().clone()
    }

    #[test]
    fn every_broken_promise_is_noticed() {
        let refuse = |place: &str, problem: &str, remedy: &str| Err(Error::input(place, problem, remedy).into());
        assert!(failure(|_| panic!("here")).contains("panics: here"));
        assert!(failure(|_| Err(Error::Fault("a.txt\n  remedy: none".into()).into())).contains("as another's"));
        assert!(failure(|_| refuse("b.txt", "is bad", "mend it")).contains("does not name the file"));
        assert!(failure(|_| Err(Refusal::Reason("x".repeat(30_000)))).contains("says too much"));
        let seeds = [b"seed".to_vec()];
        let unchanged = |case: &mut Case| {
            case.one_binary(&seeds);
            refuse("a.txt", "is bad", "mend it")
        };
        assert!(failure(unchanged).contains("case 0: refuses an unchanged seed"));
        let hungry = |_: &mut Case| {
            std::hint::black_box(vec![1_u8; 2 << 20]);
            Ok(())
        };
        assert!(failure(hungry).contains("KiB of 1024"));
    }
}
