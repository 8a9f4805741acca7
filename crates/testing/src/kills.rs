//! Kills a training at random moments, as often as asked for: every run that comes to its end must be the undisturbed one, bit
//! for bit.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use std::{fs, thread};

use burn_hyperlora::checkpoint::CheckpointStore;
use burn_hyperlora::metrics::Summary;
use burn_hyperlora::run::{CHECKPOINTS, TENSORBOARD};
use hyperlora_core::random::{Purpose, below, for_sample, unit};
use rand_chacha::ChaCha8Rng;

use crate::experiment::STEPS;
use crate::state::{curves, tensors};
use crate::world::World;

/// Few checkpoints are kept, and every step stands in the curves.
const OFTEN: [(&str, &str); 2] = [("keep: 9", "keep: 3"), ("log_every: 2", "log_every: 1")];

/// Steps after which the next stage begins.
const STAGE_ENDS: [u64; 2] = [2, 6];

/// The longest life.
const PATIENCE: Duration = Duration::from_secs(300);

/// From this number of kills on, the moments that matter must all have been hit.
const MANY: usize = 100;

/// A signal, and the processes that get it.
pub struct Blow {
    /// Name of the signal, as `kill` takes it.
    pub signal: &'static str,
    /// Ids of the processes.
    pub processes: Vec<u32>,
    /// The exit codes that a life may end with after it; `None` where a signal ends it.
    pub codes: &'static [Option<i32>],
}

/// Starts runs, and ends them.
pub struct Kills {
    /// `hyperlora` under its launcher, where it has one; arguments are to follow.
    pub command: fn() -> Command,
    /// Chooses what is done to the process that was started, the first, and its children.
    pub blow: fn(&mut ChaCha8Rng, &[u32]) -> Blow,
    /// How many, where `HYPERLORA_KILLS` does not say it.
    pub routine: usize,
}

/// Where a life was in its run when it ended, as the files tell.
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

/// A training that is under way.
struct Life {
    child: Child,
    run: PathBuf,
    /// Event files that were there before.
    event_files: usize,
    begun: Instant,
}

impl Kills {
    /// Ends as many lives as asked for, and says where they were.
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

    /// Begins `run`, or goes on with it.
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
    /// Waits that long; whether it still lives.
    fn lasts(&mut self, pause: Duration) -> bool {
        while self.begun.elapsed() < pause && self.child.try_wait().unwrap().is_none() {
            thread::sleep(Duration::from_millis(1));
        }
        self.child.try_wait().unwrap().is_none()
    }

    /// What was started, and its children.
    fn processes(&self) -> Vec<u32> {
        let started = self.child.id();
        // Read, not asked of a program: that would take longer than a start-up.
        let children = fs::read_to_string(format!("/proc/{started}/task/{started}/children")).unwrap_or_default();
        let children = children.split_whitespace().map(|child| child.parse::<u32>().unwrap());
        [started].into_iter().chain(children).collect()
    }

    /// Comes to its end, undisturbed.
    fn finishes(mut self) {
        assert_eq!(self.child.wait().unwrap().code(), Some(0), "{}", self.words());
    }

    /// After the blow every process goes, and all checkpoints that are there are whole. Gives the moment and the exit code.
    fn ends(mut self, blow: &Blow) -> (Moment, Option<i32>) {
        let Blow { signal, processes, codes } = blow;
        if *signal == "KILL" && *processes == [self.child.id()] {
            self.child.kill().unwrap();
        } else {
            let processes = processes.iter().map(u32::to_string);
            // A process may be gone meanwhile.
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
            // What a life before left half-written is still there.
            _ if event_files == self.event_files => Moment::Starting,
            _ if half_written => Moment::WritingACheckpoint,
            0 => Moment::BeforeTheFirstCheckpoint,
            STEPS => Moment::AfterTheLastCheckpoint,
            step if STAGE_ENDS.contains(&step) => Moment::BetweenStages,
            _ => Moment::BetweenCheckpoints,
        };
        (moment, code)
    }

    /// All that the run's processes have said.
    fn words(&self) -> String {
        fs::read_to_string(words_of(&self.run)).unwrap()
    }
}

/// The run is the undisturbed one: weights and moments, the figures of the stages, the curves; and nothing more lies about.
fn is_alike(run: &Path, undisturbed: &Path) {
    let (found, expected) = (tensors(run, STEPS), tensors(undisturbed, STEPS));
    assert!(found.keys().eq(expected.keys()));
    for (file, bytes) in expected {
        assert!(found[&file] == bytes, "{}: {file} differs", run.display());
    }
    let stages = |run: &Path| -> Vec<_> {
        let stages = Summary::read(run).unwrap().stages.into_iter();
        stages.map(|of| (of.name, of.steps, of.fixed_set_loss_before, of.fixed_set_loss_after)).collect()
    };
    assert_eq!(stages(run), stages(undisturbed));
    let points = |run: &Path| {
        let mut points = curves(run);
        // What was measured before a stage's first checkpoint is measured, and shown, again.
        points.values_mut().for_each(Vec::dedup);
        points
    };
    assert_eq!(points(run), points(undisturbed));
    assert_eq!(names(run), names(undisturbed));
    // A stop in between leaves a checkpoint of its own step: their number is the same, and none is half-written.
    let (found, expected) = (names(&run.join(CHECKPOINTS)), names(&undisturbed.join(CHECKPOINTS)));
    assert!(found.len() == expected.len() && found.iter().all(|name| name.starts_with("step-")), "{found:?}");
}

/// Where the words of a run's processes go.
fn words_of(run: &Path) -> PathBuf {
    run.with_extension("words")
}

/// The names in a folder; none where it does not stand yet.
fn names(folder: &Path) -> BTreeSet<String> {
    let entries = fs::read_dir(folder).into_iter().flatten();
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

/// Whether a process has the run on its command line.
fn is_at_work(run: &Path) -> bool {
    let found = Command::new("pgrep").arg("-f").arg(run).stdout(Stdio::null()).status().unwrap();
    found.success()
}

/// How long a life is let be: anywhere in `length`, that of an undisturbed run. The start is a short part of it, and comes in
/// every life: one pause in four falls there.
fn pause(generator: &mut ChaCha8Rng, length: Duration) -> Duration {
    let range = if below(generator, 4) == 0 { 0.1 } else { 1.0 };
    length.mul_f64(range * unit(generator))
}
