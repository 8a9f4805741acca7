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
        let mut row = |key: &str, text: String| writeln!(f, "  {key:<11} {text}");
        let in_all = format!("{} of {} steps", self.step, self.steps);
        match &self.stage {
            Some(stage) => row(
                "stage",
                format!(
                    "{} ({} of {}), step {} of {}; {in_all} in all",
                    stage.name, stage.number, stage.of, stage.step, stage.steps
                ),
            )?,
            None => row("stage", format!("all are done, {in_all}"))?,
        }
        if let (Some(speed), Some(left)) = (self.images_per_second, self.seconds_left) {
            let left = if self.stage.is_some() { format!("; {} left", human(left)) } else { String::new() };
            row("speed", format!("{speed:.1} images/s{left}"))?;
        }
        for (curve, loss) in &self.losses {
            row("loss", format!("{loss:.5}  {}", name(curve)))?;
        }
        for stage in &self.stages {
            if let (Some(before), Some(after)) = (stage.fixed_set_loss_before, stage.fixed_set_loss_after) {
                let stage_name = name(&stage.name);
                row(
                    "learnt",
                    format!("{before:.5} -> {after:.5} on the fixed set in {} steps of {stage_name}", stage.steps),
                )?;
            }
        }
        match &self.checkpoint {
            Some(last) => {
                let (age, path) = (human(last.age_seconds as f64), last.path.to_string_lossy());
                row("checkpoint", format!("step {}, {age} ago: {}", last.step, name(&path)))?;
            }
            None => row("checkpoint", "none yet".into())?,
        }
        if let Some(seconds) = self.last_entry_seconds {
            row("last entry", format!("in the curves {} ago", human(seconds as f64)))?;
        }
        if self.skipped_steps > 0 {
            row("skipped", format!("{} steps that would have done harm: skipped.jsonl", self.skipped_steps))?;
        }
        if let Some(share) = self.cut_captions {
            row("captions", format!("{:.1} % are truncated: longer than the text encoders accept", 100.0 * share))?;
        }
        if self.quarantined_row_groups > 0 {
            let count = self.quarantined_row_groups;
            row("left out", format!("{count} damaged row groups: quarantine.jsonl"))?;
        }
        if !self.last_lines.is_empty() {
            row("run.log", "ends with".into())?;
            self.last_lines.iter().try_for_each(|line| writeln!(f, "    {line}"))?;
        }
        Ok(())
    }
}

fn human(seconds: f64) -> HumanDuration {
    HumanDuration(Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX))
}
