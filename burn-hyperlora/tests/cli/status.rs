//! `hyperlora status` on an active, a killed and a finished run, without leaving a trace.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::support::{STEPS, World, contents, hyperlora, run};

fn status(folder: &Path) -> Value {
    let ended = run(hyperlora(["status", "--json"].map(Path::new).into_iter().chain([folder]))).with(0);
    serde_json::from_str(&ended.stdout).unwrap()
}

fn told(folder: &Path) -> String {
    run(hyperlora([Path::new("status"), folder])).with(0).stdout
}

#[test]
fn a_run_tells_where_it_stands_at_work_killed_and_finished() {
    let world = World::new();
    let folder = world.path("run");
    run(hyperlora([Path::new("status"), &folder])).refused(2, &["is not a run folder"]);

    // An active run that is paused: it keeps its lock.
    let mut child = world.train("run", &[]).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let start = Instant::now();
    while !folder.join("checkpoints/step-00000001").exists() {
        assert!(start.elapsed() < Duration::from_mins(5), "no checkpoint came");
        sleep(Duration::from_millis(5));
    }
    assert!(Command::new("kill").args(["-s", "STOP"]).arg(child.id().to_string()).status().unwrap().success());
    let at_work = status(&folder);
    assert!(at_work["activity"] == "running" && at_work["last_lines"] == Value::Array(Vec::new()), "{at_work}");
    assert!(told(&folder).starts_with("small: running\n"), "{}", told(&folder));
    child.kill().unwrap();
    child.wait().unwrap();

    let before = contents(&folder);
    let killed = status(&folder);
    let step = killed["step"].as_u64().unwrap();
    assert!(killed["activity"] == "stopped" && (1..STEPS).contains(&step), "{killed}");
    assert_eq!((&killed["checkpoint"]["step"], &killed["steps"]), (&step.into(), &STEPS.into()));
    assert_eq!(killed["stage"]["step"].as_u64(), Some(step % 2));
    assert!(!killed["last_lines"].as_array().unwrap().is_empty());
    let text = told(&folder);
    assert!(text.contains("not running") && text.contains("run.log     ends with"), "{text}");
    assert!(contents(&folder) == before, "status writes nothing");

    run(world.train("run", &[])).with(0);
    // Step 3 repeats after a kill; a row group is listed twice, another belongs to other shards; both end mid-line.
    let skipped = |step: u64| json!({"step": step, "stage": "base", "reason": "", "photos": []});
    fs::write(folder.join("skipped.jsonl"), format!("{}\n{}\n{}\n{{\"st", skipped(3), skipped(4), skipped(3))).unwrap();
    let saved = fs::read(folder.join(format!("checkpoints/step-{STEPS:08}/state.json"))).unwrap();
    let saved: Value = serde_json::from_slice(&saved).unwrap();
    let left_out = |shards: &Value| json!({"shards": shards, "group": 1, "file": "", "row_group": 1, "first_row": 5, "rows": 5, "ids": [], "reason": ""});
    let (own, other) = (left_out(&saved["settings"]["data"]["shards"]), left_out(&"other".into()));
    fs::write(folder.join("quarantine.jsonl"), format!("{own}\n{own}\n{other}\n{{\"sh")).unwrap();
    let finished = status(&folder);
    assert_eq!(finished["activity"], "finished");
    assert_eq!((&finished["stage"], &finished["step"]), (&Value::Null, &STEPS.into()));
    assert_eq!((&finished["skipped_steps"], &finished["quarantined_row_groups"]), (&2.into(), &1.into()));
    assert!(finished["images_per_second"].as_f64().unwrap() > 0.0 && finished["seconds_left"] == 0.0, "{finished}");
    assert!(finished["losses"]["loss/id_embedding"].is_number() && finished["ranks"] == 1, "{finished}");
    assert!(told(&folder).starts_with("small: finished\n"), "{}", told(&folder));

    // A read-only run folder.
    let read_only = Command::new("chmod").args(["-R", "a-w"]).arg(&folder).status().unwrap();
    assert!(read_only.success());
    assert_eq!(status(&folder)["activity"], "finished");
    assert!(Command::new("chmod").args(["-R", "u+w"]).arg(&folder).status().unwrap().success());
}
