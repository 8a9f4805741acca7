//! Kills a training run at random moments, as often as requested: every run that finishes must equal the undisturbed
//! one, bit for bit.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use std::{fs, thread};

use burn_hyperlora::checkpoint::CheckpointStore;
use burn_hyperlora::metrics::RunSummary;
use burn_hyperlora::run::{CHECKPOINTS, TENSORBOARD};
use hyperlora_core::random::{Purpose, below, for_sample, unit};
use rand_chacha::ChaCha8Rng;

use crate::experiment::STEPS;
use crate::state::{curves, tensors};
use crate::world::World;

/// Keeps few checkpoints, and logs every step in the curves.
const OFTEN: [(&str, &str); 2] = [("keep: 9", "keep: 3"), ("log_every: 2", "log_every: 1")];

/// Steps after which the next stage starts.
const STAGE_ENDS: [u64; 2] = [2, 6];

/// Longest life.
const PATIENCE: Duration = Duration::from_mins(5);

/// Number of kills from which every relevant moment must have been hit.
const MANY: usize = 100;

/// A signal, and the processes that receive it.
pub struct Blow {
    /// Name of the signal, as `kill` takes it.
    pub signal: &'static str,
    /// Ids of the processes.
    pub processes: Vec<u32>,
    /// Allowed exit codes of a life afterwards; `None` if a signal ends it.
    pub codes: &'static [Option<i32>],
}

/// Starts runs and kills them.
pub struct Kills {
    /// Command `hyperlora`, under its launcher if there is one. The test appends the arguments.
    pub command: fn() -> Command,
    /// Chooses the blow to the processes: the first is the one that was started, the others are its children.
    pub blow: fn(&mut ChaCha8Rng, &[u32]) -> Blow,
    /// Default number of kills, which `HYPERLORA_KILLS` overrides.
    pub routine: usize,
}

/// Progress of a life when it ended, according to its files.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Moment {
    /// Before the event file of this life.
    Starting,
    BeforeTheFirstCheckpoint,
    WritingACheckpoint,
    BetweenCheckpoints,
    BetweenStages,
    AfterTheLastCheckpoint,
}

/// Training process that is running.
struct Life {
    child: Child,
    run: PathBuf,
    /// Number of event files that existed before.
    event_files: usize,
    begun: Instant,
}

impl Kills {
    /// Kills as many lives as requested, and reports their moments.
    pub fn at_random(&self) {
        let count = std::env::var("HYPERLORA_KILLS").map_or(self.routine, |number| number.parse().unwrap());
        let world = World::small();
        world.write_yaml(&OFTEN);
        let undisturbed = self.live(&world, "undisturbed");
        let begun = undisturbed.begun;
        undisturbed.finishes();
        let length = begun.elapsed();

        let mut generator = for_sample(count as u64, 0, 0, Purpose::Order);
        let (mut moments, mut ends) = (BTreeMap::<Moment, usize>::new(), BTreeMap::<_, usize>::new());
        let mut finished = 0;
        while moments.values().sum::<usize>() < count {
            let run = format!("run-{finished}");
            let mut life = self.live(&world, &run);
            if life.lasts(pause(&mut generator, length)) {
                let blow = (self.blow)(&mut generator, &life.processes());
                let (moment, code) = life.ends(&blow);
                *moments.entry(moment).or_default() += 1;
                *ends.entry((blow.signal, code)).or_default() += 1;
            } else {
                life.finishes();
                is_alike(&world.path(&run), &world.path("undisturbed"));
                finished += 1;
            }
        }
        let run = format!("run-{finished}");
        self.live(&world, &run).finishes();
        is_alike(&world.path(&run), &world.path("undisturbed"));
        println!("{count} kills within {length:.1?} of a life; {} runs came to the undisturbed end", finished + 1);
        println!("  where: {moments:?}\n  signals and exit codes: {ends:?}");
        for moment in [Moment::Starting, Moment::WritingACheckpoint, Moment::BetweenCheckpoints, Moment::BetweenStages]
        {
            assert!(count < MANY || moments.contains_key(&moment), "{moment:?} was missed: {moments:?}");
        }
    }

    /// Starts or resumes `run`.
    fn live(&self, world: &World, run: &str) -> Life {
        let run = world.path(run);
        let words = fs::File::options().create(true).append(true).open(words_of(&run)).unwrap();
        let mut command = (self.command)();
        command.arg("train").arg(world.path("train.yaml")).arg("--out").arg(&run).stdin(Stdio::null());
        let event_files = names(&run.join(TENSORBOARD)).len();
        let child = command.stdout(words.try_clone().unwrap()).stderr(words).spawn().unwrap();
        Life { child, run, event_files, begun: Instant::now() }
    }
}

impl Life {
    /// Waits until `pause` after the start. Tells whether the process still lives.
    fn lasts(&mut self, pause: Duration) -> bool {
        while self.begun.elapsed() < pause && self.child.try_wait().unwrap().is_none() {
            thread::sleep(Duration::from_millis(1));
        }
        self.child.try_wait().unwrap().is_none()
    }

    /// Returns the id of the started process and those of its children.
    fn processes(&self) -> Vec<u32> {
        let started = self.child.id();
        // Read the file directly: starting a program would take longer than a start-up of the run.
        let children = fs::read_to_string(format!("/proc/{started}/task/{started}/children")).unwrap_or_default();
        let children = children.split_whitespace().map(|child| child.parse::<u32>().unwrap());
        [started].into_iter().chain(children).collect()
    }

    /// Waits for a successful end, without a kill.
    fn finishes(mut self) {
        assert_eq!(self.child.wait().unwrap().code(), Some(0), "{}", self.words());
    }

    /// Strikes the blow, and checks that every process ends and that all checkpoints are whole. Returns the moment and
    /// the exit code.
    fn ends(mut self, blow: &Blow) -> (Moment, Option<i32>) {
        let Blow { signal, processes, codes } = blow;
        if *signal == "KILL" && *processes == [self.child.id()] {
            self.child.kill().unwrap();
        } else {
            let processes = processes.iter().map(u32::to_string);
            // A process may have ended meanwhile.
            Command::new("kill").arg(format!("-{signal}")).args(processes).stderr(Stdio::null()).status().unwrap();
        }
        assert!(!self.lasts(PATIENCE), "{signal}: {}", self.words());
        let code = self.child.wait().unwrap().code();
        assert!(code == Some(0) || codes.contains(&code), "{signal} to {processes:?}: {code:?} {}", self.words());
        while is_at_work(&self.run) {
            assert!(self.begun.elapsed() < 2 * PATIENCE, "{signal}: a process stays: {}", self.words());
            thread::sleep(Duration::from_millis(5));
        }

        let checkpoints = CheckpointStore::at(&self.run.join(CHECKPOINTS)).list().unwrap();
        checkpoints.iter().for_each(|checkpoint| checkpoint.verify().unwrap());
        let step = checkpoints.last().map_or(0, |latest| latest.step);
        if code == Some(3) {
            let told = format!("stopped by SIGTERM after {step} steps, everything is saved");
            assert!(self.words().contains(&told), "not `{told}`: {}", self.words());
        }
        let event_files = names(&self.run.join(TENSORBOARD)).len();
        let half_written = names(&self.run.join(CHECKPOINTS)).iter().any(|name| name.starts_with('.'));
        let moment = match step {
            // A half-written checkpoint of an earlier life is still there.
            _ if event_files == self.event_files => Moment::Starting,
            _ if half_written => Moment::WritingACheckpoint,
            0 => Moment::BeforeTheFirstCheckpoint,
            STEPS => Moment::AfterTheLastCheckpoint,
            step if STAGE_ENDS.contains(&step) => Moment::BetweenStages,
            _ => Moment::BetweenCheckpoints,
        };
        (moment, code)
    }

    /// Returns the output of all processes of the run.
    fn words(&self) -> String {
        fs::read_to_string(words_of(&self.run)).unwrap()
    }
}

/// Checks that a run equals the undisturbed one: weights and moments, the figures of the stages, the curves, and no
/// extra files.
fn is_alike(run: &Path, undisturbed: &Path) {
    let (found, expected) = (tensors(run, STEPS), tensors(undisturbed, STEPS));
    assert!(found.keys().eq(expected.keys()));
    for (file, bytes) in expected {
        assert!(found[&file] == bytes, "{}: {file} differs", run.display());
    }
    let stages = |run: &Path| -> Vec<_> {
        let stages = RunSummary::read(run).unwrap().stages.into_iter();
        stages.map(|of| (of.name, of.steps, of.fixed_set_loss_before, of.fixed_set_loss_after)).collect()
    };
    assert_eq!(stages(run), stages(undisturbed));
    let points = |run: &Path| {
        let mut points = curves(run);
        // A resumed run repeats and logs again what was measured before a stage's first checkpoint.
        points.values_mut().for_each(Vec::dedup);
        points
    };
    assert_eq!(points(run), points(undisturbed));
    assert_eq!(names(run), names(undisturbed));
    // A stop between two checkpoints leaves one of its own step: their number is the same, and none is half-written.
    let (found, expected) = (names(&run.join(CHECKPOINTS)), names(&undisturbed.join(CHECKPOINTS)));
    assert!(found.len() == expected.len() && found.iter().all(|name| name.starts_with("step-")), "{found:?}");
}

/// Returns the file for the output of a run's processes.
fn words_of(run: &Path) -> PathBuf {
    run.with_extension("words")
}

/// Returns the names in a folder, none if it does not exist.
fn names(folder: &Path) -> BTreeSet<String> {
    let entries = fs::read_dir(folder).into_iter().flatten();
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

/// Tells whether a process has the run on its command line.
fn is_at_work(run: &Path) -> bool {
    let found = Command::new("pgrep").arg("-f").arg(run).stdout(Stdio::null()).status().unwrap();
    found.success()
}

/// Draws the time before a kill, within `length`, the duration of an undisturbed run. Start-up is a short part of it
/// but happens in every life, so one pause in four falls into it.
fn pause(generator: &mut ChaCha8Rng, length: Duration) -> Duration {
    let range = if below(generator, 4) == 0 { 0.1 } else { 1.0 };
    length.mul_f64(range * unit(generator))
}
