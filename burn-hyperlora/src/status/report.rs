//! Status as text.

use std::fmt::{self, Display, Formatter};
use std::time::Duration;

use hyperlora_core::text::name;
use indicatif::HumanDuration;

use crate::status::{Activity, Status};

impl Display for Status {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let activity = match self.activity {
            Activity::Running => "running",
            Activity::Finished => "finished",
            Activity::Stopped => "not running; the same command resumes the run",
            Activity::Unknown => "unknown: the lock that a running process holds cannot be checked",
        };
        let ranks = match self.ranks {
            Some(ranks) if ranks > 1 => format!(", {ranks} ranks"),
            _ => String::new(),
        };
        writeln!(f, "{}: {activity}{ranks}", self.name)?;
        for (key, text) in self.progress().into_iter().chain(self.notes()) {
            writeln!(f, "  {key:<11} {text}")?;
        }
        self.last_lines.iter().try_for_each(|line| writeln!(f, "    {line}"))
    }
}

/// Name and content of a line.
type Row = (&'static str, String);

impl Status {
    /// Position, speed and results of the run.
    fn progress(&self) -> Vec<Row> {
        let in_all = format!("{} of {} steps", self.step, self.steps);
        let mut rows = vec![match &self.stage {
            Some(stage) => {
                let (name, step, steps) = (&stage.name, stage.step, stage.steps);
                let place = format!("({} of {}), step {step} of {steps}", stage.number, stage.of);
                ("stage", format!("{name} {place}; {in_all} in all"))
            }
            None => ("stage", format!("all are done, {in_all}")),
        }];
        if let (Some(speed), Some(left)) = (self.images_per_second, self.seconds_left) {
            let left = if self.stage.is_some() { format!("; {} left", human(left)) } else { String::new() };
            rows.push(("speed", format!("{speed:.1} images/s{left}")));
        }
        rows.extend(self.losses.iter().map(|(curve, loss)| ("loss", format!("{loss:.5}  {}", name(curve)))));
        for stage in &self.stages {
            if let (Some(before), Some(after)) = (stage.fixed_set_loss_before, stage.fixed_set_loss_after) {
                let (steps, stage) = (stage.steps, name(&stage.name));
                rows.push((
                    "learnt",
                    format!("{before:.5} -> {after:.5} on the fixed set in {steps} steps of {stage}"),
                ));
            }
        }
        rows
    }

    /// Ages of the files, and everything that was left out.
    fn notes(&self) -> Vec<Row> {
        let mut rows = vec![match &self.checkpoint {
            Some(last) => {
                let (age, path) = (human(last.age_seconds as f64), last.path.to_string_lossy());
                ("checkpoint", format!("step {}, {age} ago: {}", last.step, name(&path)))
            }
            None => ("checkpoint", "none yet".into()),
        }];
        if let Some(seconds) = self.last_entry_seconds {
            rows.push(("last entry", format!("in the curves {} ago", human(seconds as f64))));
        }
        if self.skipped_steps > 0 {
            rows.push(("skipped", format!("{} steps that would have done harm: skipped.jsonl", self.skipped_steps)));
        }
        if let Some(share) = self.cut_captions {
            let share = 100.0 * share;
            rows.push(("captions", format!("{share:.1} % are truncated: longer than the text encoders accept")));
        }
        if self.quarantined_row_groups > 0 {
            let count = self.quarantined_row_groups;
            rows.push(("left out", format!("{count} damaged row groups: quarantine.jsonl")));
        }
        if !self.last_lines.is_empty() {
            rows.push(("run.log", "ends with".into()));
        }
        rows
    }
}

fn human(seconds: f64) -> HumanDuration {
    HumanDuration(Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX))
}
