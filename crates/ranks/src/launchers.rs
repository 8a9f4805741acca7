//! Rank and world of this process, from the environment variables of the launcher.
//!
//! Three launchers are known. The innermost one counts, because an outer one only started it: torchrun, then mpirun,
//! then srun, whose variables an mpirun or a torchrun inside a Slurm job inherits.

use std::net::IpAddr;

use hyperlora_core::{Error, Result};

use super::Token;

/// Place of this process in its world, according to its launcher.
///
/// # Examples
/// ```
/// use hyperlora_ranks::Placement;
///
/// // `Placement::of_process` reads the variables of this process.
/// let torchrun = |name: &str| match name {
///     "RANK" | "LOCAL_RANK" => Some("1".into()),
///     "WORLD_SIZE" | "LOCAL_WORLD_SIZE" => Some("2".into()),
///     _ => None,
/// };
/// let placement = Placement::detect(torchrun)?.expect("a launcher");
/// assert_eq!((placement.launcher, placement.rank, placement.world_size), ("torchrun", 1, 2));
/// # Ok::<(), hyperlora_core::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Placement {
    /// Launcher, for messages.
    pub launcher: &'static str,
    /// Rank, from 0 to `world_size - 1`.
    pub rank: usize,
    /// Processes of the run, at least 1.
    pub world_size: usize,
    /// Rank among the processes of this machine, which is the index of the GPU to use.
    pub local_rank: usize,
    /// True if all ranks are on this machine, as far as the launcher says.
    pub one_machine: bool,
    /// Address where rank 0 waits for the others, from `MASTER_ADDR` and `MASTER_PORT`; `None` if neither is set.
    pub master: Option<(String, u16)>,
}

/// Environment variables of one launcher.
struct Launcher {
    name: &'static str,
    /// Variable that only processes of this launcher have.
    mark: &'static str,
    rank: &'static str,
    world_size: &'static str,
    local_rank: &'static str,
    /// Processes of this machine. Not a plain number if Slurm describes several machines, as in `8(x2)`.
    local_size: &'static str,
}

/// Launchers from the innermost to the outermost.
const LAUNCHERS: [Launcher; 3] = [
    Launcher {
        name: "torchrun",
        mark: "RANK",
        rank: "RANK",
        world_size: "WORLD_SIZE",
        local_rank: "LOCAL_RANK",
        local_size: "LOCAL_WORLD_SIZE",
    },
    Launcher {
        name: "mpirun",
        mark: "OMPI_COMM_WORLD_RANK",
        rank: "OMPI_COMM_WORLD_RANK",
        world_size: "OMPI_COMM_WORLD_SIZE",
        local_rank: "OMPI_COMM_WORLD_LOCAL_RANK",
        local_size: "OMPI_COMM_WORLD_LOCAL_SIZE",
    },
    // A batch script has SLURM_PROCID too but is not a rank: only srun starts a step of ranks.
    Launcher {
        name: "srun",
        mark: "SLURM_STEP_ID",
        rank: "SLURM_PROCID",
        world_size: "SLURM_NTASKS",
        local_rank: "SLURM_LOCALID",
        local_size: "SLURM_STEP_TASKS_PER_NODE",
    },
];

/// First of the numbers that Slurm gives to steps without ranks: a shell on the allocation (`salloc` with
/// `use_interactive_step`), a batch script, programs started otherwise, and a job that has no step yet (slurm.h, from
/// `SLURM_INTERACTIVE_STEP` on).
const SLURM_FIRST_SPECIAL_STEP: u32 = 0xffff_fffa;

/// Variables of launchers that restart a process without counting it: torchrun when a machine comes or goes (its
/// restart count covers only failures, seen by one machine's agent), Kubernetes when a Job is suspended and resumed.
const STARTS_AGAIN_UNCOUNTED: [(&str, &str); 3] = [
    ("TORCHELASTIC_RUN_ID", "torchrun"),
    ("TORCHELASTIC_MAX_RESTARTS", "torchrun"),
    ("JOB_COMPLETION_INDEX", "Kubernetes"),
];

/// Returns the variable and value by which the launcher says that it has started this run before. The same command then
/// resumes the run. `None` at a first start; `variable` looks one up.
///
/// # Errors
/// Input: a launcher may have started the run before without saying so. A run that starts afresh at every start would
/// never end.
pub fn earlier_life(variable: impl Fn(&str) -> Option<String>) -> Result<Option<String>> {
    if let Some((name, launcher)) = STARTS_AGAIN_UNCOUNTED.into_iter().find(|(name, _)| variable(name).is_some()) {
        return Err(Error::input(
            format!("--restart under {launcher} ({name} is set)"),
            format!("{launcher} starts a run again with the same command, and does not always say so"),
            "leave --restart out, and move the run folder aside by hand or give another one with --out",
        ));
    }
    let requeued = "SLURM_RESTART_COUNT";
    let count = variable(requeued).filter(|count| !["", "0"].contains(&count.trim()));
    Ok(count.map(|count| format!("{requeued}={count}")))
}

/// Returns the name of this machine.
pub fn host_name() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    Some(name.trim()).filter(|name| !name.is_empty()).unwrap_or("localhost").to_owned()
}

const START_AGAIN: &str =
    "start every process by torchrun, srun or mpirun, or unset the variables for a single process";

impl Placement {
    /// Reads the placement from the environment of this process.
    ///
    /// # Errors
    /// See [`detect`](Self::detect).
    pub fn of_process() -> Result<Option<Self>> {
        Self::detect(|name| std::env::var(name).ok())
    }

    /// Reads the placement from variables; `variable` looks one up. Returns `None` if no launcher set any.
    ///
    /// # Errors
    /// Input: the variables are incomplete, out of range or contradict another launcher's.
    pub fn detect(variable: impl Fn(&str) -> Option<String>) -> Result<Option<Self>> {
        let mut found: Option<Self> = None;
        for launcher in &LAUNCHERS {
            if !launcher.started(&variable) {
                continue;
            }
            let Some(inner) = &found else {
                found = Some(launcher.read(&variable)?);
                continue;
            };
            // mpirun started by torchrun or the reverse makes no sense; srun may have started either.
            if launcher.name != "srun" {
                let outer = launcher.read(&variable)?;
                if (outer.rank, outer.world_size) != (inner.rank, inner.world_size) {
                    return Err(Error::input(
                        format!("environment: {}, {}", launcher.rank, launcher.world_size),
                        format!(
                            "{} says rank {} of {}, {} says rank {} of {}",
                            outer.launcher, outer.rank, outer.world_size, inner.launcher, inner.rank, inner.world_size
                        ),
                        "start with one launcher only, or unset the variables of the other",
                    ));
                }
            }
        }
        Ok(found)
    }

    /// Returns the secret that keeps strangers and the ranks of other runs from the port where the ranks meet:
    /// `HYPERLORA_TOKEN`, joined with torchrun's run id. Ranks on one machine need none: rank 0 makes one for each
    /// meeting.
    ///
    /// # Errors
    /// Input: ranks on several machines without a secret.
    pub fn token(&self, variable: impl Fn(&str) -> Option<String>) -> Result<Token> {
        let secret = variable("HYPERLORA_TOKEN").filter(|secret| !secret.trim().is_empty());
        let run = variable("TORCHELASTIC_RUN_ID");
        match secret {
            // A restarted JobSet gets a new torchrun id, which keeps latecomers of the previous start out.
            Some(secret) => Ok(Token::Given([Some(secret), run].into_iter().flatten().collect::<Vec<_>>().join("\n"))),
            None if self.one_machine => {
                Ok(Token::HandedOver(run.or_else(|| variable("SLURM_JOB_ID")).unwrap_or_default()))
            }
            None => Err(Error::input(
                "environment: HYPERLORA_TOKEN",
                "is not set: over the network the ranks know each other by it",
                "export the same one on all machines, such as `openssl rand -hex 16` makes",
            )),
        }
    }
}

impl Launcher {
    fn started(&self, variable: &impl Fn(&str) -> Option<String>) -> bool {
        let step = variable("SLURM_STEP_ID").and_then(|step| step.parse::<u32>().ok());
        if self.mark == "SLURM_STEP_ID" && step.is_some_and(|step| step >= SLURM_FIRST_SPECIAL_STEP) {
            return false;
        }
        // torchrun's names are so common that even one of a pair alone must be noticed.
        variable(self.mark).is_some() || (self.mark == self.rank && variable(self.world_size).is_some())
    }

    fn read(&self, variable: &impl Fn(&str) -> Option<String>) -> Result<Placement> {
        let number = |name: &str| {
            let wrong = |problem: String| Error::input(format!("environment: {name}"), problem, START_AGAIN);
            let text = variable(name).ok_or_else(|| {
                wrong(format!("is not set, but {} is the launcher ({} is set)", self.name, self.set(variable)))
            })?;
            text.parse::<usize>().map_err(|_| wrong(format!("is `{text}`, not a whole number")))
        };
        let (rank, world_size) = (number(self.rank)?, number(self.world_size)?);
        // Kubeflow's PyTorchJob starts one process per pod, and sets no local rank.
        let alone = self.name == "torchrun"
            && [self.local_rank, self.local_size, "TORCHELASTIC_RUN_ID"].iter().all(|name| variable(name).is_none());
        let local_rank = if alone { 0 } else { number(self.local_rank)? };
        if rank >= world_size || local_rank > rank {
            return Err(Error::input(
                format!("environment: {}, {}, {}", self.rank, self.world_size, self.local_rank),
                format!("rank {rank} of {world_size} with local rank {local_rank} is impossible"),
                START_AGAIN,
            ));
        }
        let master = master(variable)?;
        let at_home = |(host, _): &(String, u16)| {
            host == "localhost" || host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
        };
        let one_machine = match variable(self.local_size) {
            Some(size) => size.parse() == Ok(world_size),
            // The first pod of a PyTorchJob gets `localhost`, the others its name.
            None => !alone && master.as_ref().is_some_and(at_home),
        };
        Ok(Placement { launcher: self.name, rank, world_size, local_rank, one_machine, master })
    }

    /// Returns the variable that revealed the launcher.
    fn set(&self, variable: &impl Fn(&str) -> Option<String>) -> &'static str {
        if variable(self.mark).is_some() { self.mark } else { self.world_size }
    }
}

fn master(variable: &impl Fn(&str) -> Option<String>) -> Result<Option<(String, u16)>> {
    let wrong = |name: &str, problem: &str| {
        let remedy = "set both: the machine of rank 0 and a free port below 65535 on it";
        Err(Error::input(format!("environment: {name}"), problem, remedy))
    };
    match (variable("MASTER_ADDR"), variable("MASTER_PORT")) {
        (None, None) => Ok(None),
        (None, Some(_)) => wrong("MASTER_ADDR", "is not set, but MASTER_PORT is"),
        (Some(_), None) => wrong("MASTER_PORT", "is not set, but MASTER_ADDR is"),
        (Some(host), Some(port)) => match port.parse::<u16>() {
            // The port itself belongs to torchrun; the rendezvous of the ranks uses the next one.
            Ok(port) if (1..u16::MAX).contains(&port) => Ok(Some((host, port))),
            _ => wrong("MASTER_PORT", &format!("is `{port}`")),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn detect(set: &[(&str, &str)]) -> Result<Option<Placement>> {
        Placement::detect(|name| set.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).into()))
    }

    const TORCHRUN: [(&str, &str); 5] =
        [("RANK", "5"), ("WORLD_SIZE", "8"), ("LOCAL_RANK", "1"), ("MASTER_ADDR", "node-0"), ("MASTER_PORT", "29500")];
    const MPIRUN: [(&str, &str); 3] =
        [("OMPI_COMM_WORLD_RANK", "1"), ("OMPI_COMM_WORLD_SIZE", "2"), ("OMPI_COMM_WORLD_LOCAL_RANK", "1")];
    const SRUN: [(&str, &str); 4] =
        [("SLURM_STEP_ID", "0"), ("SLURM_PROCID", "3"), ("SLURM_NTASKS", "4"), ("SLURM_LOCALID", "0")];

    #[test]
    fn every_launcher_is_understood() {
        assert_eq!(detect(&[]).unwrap(), None);
        let placement = detect(&TORCHRUN).unwrap().unwrap();
        assert_eq!((placement.rank, placement.world_size, placement.local_rank), (5, 8, 1));
        assert_eq!(placement.master, Some(("node-0".into(), 29500)));
        let placement = detect(&MPIRUN).unwrap().unwrap();
        assert_eq!((placement.launcher, placement.rank, placement.world_size), ("mpirun", 1, 2));
        let placement = detect(&SRUN).unwrap().unwrap();
        assert_eq!((placement.launcher, placement.rank, placement.world_size), ("srun", 3, 4));
    }

    #[test]
    fn a_first_start_is_told_from_a_later_one_or_refused() {
        let ask = |set: &[(&str, &str)]| {
            earlier_life(|name| set.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).into()))
        };
        for first in [&[][..], &[("SLURM_RESTART_COUNT", "0")], &[("SLURM_RESTART_COUNT", "")], &MPIRUN, &SRUN] {
            assert_eq!(ask(first).unwrap(), None);
        }
        assert_eq!(ask(&[("SLURM_RESTART_COUNT", "2")]).unwrap(), Some("SLURM_RESTART_COUNT=2".into()));
        // The first start is refused like later ones: torchrun would take the second start for a resumed run.
        for (set, named) in [
            (&[("TORCHELASTIC_RUN_ID", "a"), ("TORCHELASTIC_RESTART_COUNT", "0")][..], "torchrun"),
            (&[("TORCHELASTIC_MAX_RESTARTS", "20"), ("TORCHELASTIC_RESTART_COUNT", "1")], "torchrun"),
            (&[("TORCHELASTIC_MAX_RESTARTS", "0"), ("SLURM_RESTART_COUNT", "1")], "torchrun"),
            (&[("JOB_COMPLETION_INDEX", "0")], "Kubernetes"),
        ] {
            let error = ask(set).unwrap_err();
            let text = error.to_string();
            assert!(error.exit_code() == 2 && text.contains(named) && text.contains("--out"), "{set:?}: {text}");
        }
    }

    #[test]
    fn ranks_on_several_machines_need_a_secret() {
        let token = |set: &[(&str, &str)], more: &[(&str, &str)]| {
            let set = [set, more].concat();
            let of = |name: &str| set.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned());
            detect(&set).unwrap().unwrap().token(of)
        };
        let at_home = [("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "29500"), ("SLURM_JOB_ID", "7")];
        for (set, more) in [
            (&TORCHRUN[..], &[("LOCAL_WORLD_SIZE", "4")][..]),
            (&TORCHRUN, &[("TORCHELASTIC_RUN_ID", "hyperlora"), ("HYPERLORA_TOKEN", " ")]),
            (&MPIRUN, &[("MASTER_ADDR", "node-0"), ("MASTER_PORT", "29500")]),
            (&SRUN, &[("SLURM_STEP_TASKS_PER_NODE", "2(x2)"), ("SLURM_JOB_ID", "7")]),
        ] {
            let error = token(set, more).unwrap_err();
            assert!(error.exit_code() == 2 && error.to_string().contains("openssl rand -hex 16"), "{error}");
            let whole = token(set, &[&[("HYPERLORA_TOKEN", "secret")], more].concat()).unwrap();
            assert!(matches!(&whole, Token::Given(whole) if whole.starts_with("secret")), "{whole:?}");
        }
        // On one machine the run's id is not a secret, it only keeps runs apart.
        let handed_over = |run: &str| Token::HandedOver(run.into());
        let torchrun = [("LOCAL_WORLD_SIZE", "8"), ("TORCHELASTIC_RUN_ID", "a")];
        assert_eq!(token(&TORCHRUN, &torchrun).unwrap(), handed_over("a"));
        let srun = [("SLURM_STEP_TASKS_PER_NODE", "4"), ("SLURM_JOB_ID", "7")];
        assert_eq!(token(&SRUN, &srun).unwrap(), handed_over("7"));
        assert_eq!(token(&MPIRUN, &at_home).unwrap(), handed_over("7"));
        let both = [("HYPERLORA_TOKEN", "secret"), ("TORCHELASTIC_RUN_ID", "a")];
        assert_eq!(token(&TORCHRUN, &both).unwrap(), Token::Given("secret\na".into()));
    }

    #[test]
    fn a_pod_of_a_pytorchjob_is_its_only_process() {
        let pod = |rank: &'static str, size: &'static str, master: &'static str| {
            let set = [("RANK", rank), ("WORLD_SIZE", size), ("MASTER_ADDR", master), ("MASTER_PORT", "23456")];
            detect(&set).unwrap().unwrap()
        };
        let alone = pod("0", "1", "localhost");
        assert_eq!((alone.rank, alone.world_size, alone.local_rank), (0, 1, 0));
        for placement in [pod("0", "4", "localhost"), pod("3", "4", "job-master-0")] {
            assert_eq!((placement.local_rank, placement.one_machine), (0, false));
            assert!(placement.token(|_| None).is_err());
        }
    }

    #[test]
    fn a_step_of_slurm_without_ranks_is_no_rank() {
        for special in ["4294967290", "4294967291", "4294967292", "4294967293", "4294967294", "4294967295"] {
            let step = ("SLURM_STEP_ID", special);
            assert_eq!(detect(&[step]).unwrap(), None);
            assert_eq!(detect(&[&[step][..], &SRUN[1..]].concat()).unwrap(), None);
            // mpirun in such a shell.
            let within = detect(&[&[step][..], &SRUN[1..], &MPIRUN].concat()).unwrap().unwrap();
            assert_eq!((within.launcher, within.rank), ("mpirun", 1));
        }
        assert_eq!(detect(&[&[("SLURM_STEP_ID", "4294967289")][..], &SRUN[1..]].concat()).unwrap().unwrap().rank, 3);
    }

    #[test]
    fn the_inner_launcher_counts_within_a_slurm_job() {
        let inside = [&TORCHRUN[..], &SRUN[..]].concat();
        assert_eq!(detect(&inside).unwrap().unwrap().rank, 5);
        // A batch script is not a rank, whatever Slurm says about the job.
        assert_eq!(detect(&SRUN[1..]).unwrap(), None);
    }

    #[test]
    fn what_is_partial_or_contradictory_is_refused_by_name() {
        let with = |from: &str, to: &'static str| -> Vec<(&str, &str)> {
            TORCHRUN.into_iter().map(|(key, value)| (key, if key == from { to } else { value })).collect()
        };
        for (set, named) in [
            (TORCHRUN[..1].to_vec(), "WORLD_SIZE"),
            (TORCHRUN[1..2].to_vec(), "RANK"),
            ([&TORCHRUN[..2], &[("TORCHELASTIC_RUN_ID", "a")]].concat(), "LOCAL_RANK"),
            ([&TORCHRUN[..2], &[("LOCAL_WORLD_SIZE", "8")]].concat(), "LOCAL_RANK"),
            (TORCHRUN[..4].to_vec(), "MASTER_PORT"),
            (with("RANK", "8"), "rank 8 of 8"),
            (with("RANK", "minus one"), "minus one"),
            (with("MASTER_PORT", "65535"), "MASTER_PORT"),
            (SRUN[..2].to_vec(), "SLURM_NTASKS"),
            ([&TORCHRUN[..], &MPIRUN[..]].concat(), "one launcher only"),
        ] {
            let error = detect(&set).unwrap_err();
            assert!(error.exit_code() == 2 && error.to_string().contains(named), "{set:?}: {error}");
        }
    }
}
