//! Training from shards behind a URL, by the provider's own protocol: gives the same weights as the local folder.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::{Arc, Mutex};

use crate::support::{STEPS, World, contents, flip_a_bit, run};
use hyperlora_testing::file_server::FileServer;

/// Configures a command to find the providers at `server`, with valid credentials.
fn at(mut command: Command, server: &FileServer) -> Command {
    let address = server.url("");
    let address = address.trim_end_matches('/');
    let credentials = [("AWS_ACCESS_KEY_ID", "me"), ("AWS_SECRET_ACCESS_KEY", "secret"), ("AWS_REGION", "here")];
    command.envs(credentials).env("AWS_ENDPOINT", address).env("AWS_ALLOW_HTTP", "true");
    command.env("GOOGLE_BASE_URL", address).env("GOOGLE_SKIP_SIGNATURE", "true");
    command
}

/// Reads all tensor files of a run's last checkpoint.
fn weights(run: &Path) -> Vec<Vec<u8>> {
    let files = contents(&run.join(format!("checkpoints/step-{STEPS:08}")));
    let tensors = files.into_iter().filter(|(path, _)| path.extension().is_some_and(|it| it == "safetensors"));
    let tensors: Vec<_> = tensors.map(|(_, bytes)| bytes).collect();
    assert!(tensors.len() >= 5);
    tensors
}

#[test]
#[cfg_attr(not(feature = "cloud"), ignore = "needs the feature cloud")]
fn a_run_from_a_url_ends_with_the_weights_of_one_from_the_folder() {
    let world = World::new();
    run(world.train("local", &[])).with(0);
    let expected = weights(&world.path("local"));

    let asked = Arc::<Mutex<Vec<String>>>::default();
    let seen = Arc::clone(&asked);
    let server = FileServer::start(&world.path(""), move |request, mut answer| {
        seen.lock().unwrap().push(request.to_owned());
        // Google's clients need the version headers.
        answer.head.push_str("ETag: \"1\"\r\nLast-Modified: Sun, 06 Nov 1994 08:49:37 GMT\r\n");
        Some(answer)
    });
    let shards = |url: &str, cache: &str| {
        let remote = format!("shards: \"{url}\"\n  remote: {{cache: {cache}, deadline_seconds: 4}}");
        world.write_yaml(&[("shards: shards", &remote)]);
    };
    for (name, url) in [("http", &*server.url("shards")), ("s3", "s3://shards"), ("gs", "gs://shards")] {
        shards(url, name);
        run(at(world.train(&format!("from {name}"), &[]), &server)).with(0);
        assert!(weights(&world.path(&format!("from {name}"))) == expected, "{name}");
        let mut requests = std::mem::take(&mut *asked.lock().unwrap());
        assert!(requests.iter().all(|request| request.starts_with("GET /shards/")), "{requests:?}");
        // Everything except the manifest is requested once.
        requests.retain(|request| !request.contains("manifest.json"));
        requests.sort();
        assert!(requests.len() >= 4 && requests.is_sorted_by(|one, next| one < next), "{requests:?}");
    }

    // A row group that is damaged at the source is left out, like one in a folder.
    flip_a_bit(&world.path("shards/shard-00000.parquet"));
    world.write_yaml(&[]);
    run(world.train("local, damaged", &[])).with(0);
    shards(&server.url("shards"), "damaged");
    run(world.train("damaged", &[])).with(0);
    assert!(weights(&world.path("damaged")) == weights(&world.path("local, damaged")));
    let left_out = |name: &str| fs::read_to_string(world.path(name).join("quarantine.jsonl")).unwrap();
    assert_eq!(left_out("damaged"), left_out("local, damaged"));

    // The server is gone: the kept copy is all that a run needs, and no run starts without it.
    let url = server.url("shards");
    drop(server);
    shards(&url, "http");
    run(world.train("alone", &[])).with(0);
    assert!(weights(&world.path("alone")) == expected);
    shards(&url, "empty");
    run(world.train("nothing", &[])).refused(1, &["/shards/manifest.json: reading failed", "refused"]);
}
