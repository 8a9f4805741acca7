//! Anonymous log output: removes host names and absolute paths, because users attach `run.log` to bug reports.

use std::io::{self, Write};
use std::path::Path;

use hyperlora_ranks::host_name;

/// Writer that removes absolute paths and host names, unlike the terminal.
#[derive(Debug)]
pub(super) struct Anonymous<W> {
    to: W,
    places: Places,
}

impl<W> Anonymous<W> {
    pub(super) fn new(to: W) -> Self {
        Self { to, places: Places::of_process() }
    }

    /// Creates a writer for one entry.
    pub(super) fn entry(&self) -> Entry<'_, W> {
        Entry(self)
    }
}

/// Writes one log entry, received in one piece.
pub(super) struct Entry<'a, W>(&'a Anonymous<W>);

impl<W> Write for Entry<'_, W>
where
    for<'a> &'a W: Write,
{
    fn write(&mut self, entry: &[u8]) -> io::Result<usize> {
        let text = self.0.places.taken_from(&String::from_utf8_lossy(entry));
        (&self.0.to).write_all(text.as_bytes())?;
        Ok(entry.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        (&self.0.to).flush()
    }
}

/// Texts that identify this machine, with their replacements.
#[derive(Debug)]
struct Places(Vec<(String, &'static str)>);

impl Places {
    fn of_process() -> Self {
        let folder = |path: &Path| path.parent().is_some().then(|| path.display().to_string());
        let here = std::env::current_dir().ok().and_then(|path| folder(&path)).map(|path| (path + "/", ""));
        let home = std::env::var_os("HOME").and_then(|path| folder(Path::new(&path))).map(|path| (path, "~"));
        // A shorter host name would also match parts of other words.
        let host = Some(host_name()).filter(|host| host.len() > 3 && host != "localhost").map(|host| (host, "here"));
        Self([here, home, host].into_iter().flatten().collect())
    }

    fn taken_from(&self, text: &str) -> String {
        let known = self.0.iter().fold(text.to_owned(), |text, (place, instead)| text.replace(place, instead));
        without_paths(&without_hosts(&known))
    }
}

/// Removes the host name from `rank 3 (gpu07)`.
fn without_hosts(text: &str) -> String {
    let mut pieces = text.split("rank ");
    let mut kept = pieces.next().unwrap_or_default().to_owned();
    for piece in pieces {
        let number = piece.len() - piece.trim_start_matches(|letter: char| letter.is_ascii_digit()).len();
        let host = piece[number..].strip_prefix(" (").and_then(|rest| rest.split_once(')'));
        kept.push_str("rank ");
        match host.filter(|(name, _)| number > 0 && !name.contains(char::is_whitespace)) {
            Some((_, rest)) => kept.extend([&piece[..number], rest]),
            None => kept.push_str(piece),
        }
    }
    kept
}

/// Reduces every absolute path to its last part.
fn without_paths(text: &str) -> String {
    let mut kept = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('/') {
        let (before, path) = rest.split_at(at);
        let ends = |letter: char| letter.is_whitespace() || "`'\"(),;:<>|".contains(letter);
        let begins = |letter: char| ends(letter) || "=[{".contains(letter);
        let end = path.find(ends).unwrap_or(path.len());
        let is_absolute = (kept.chars().next_back().filter(|_| before.is_empty()).or(before.chars().next_back()))
            .is_none_or(begins)
            && path[1..end].starts_with(|letter: char| letter != '/');
        kept.push_str(before);
        let (path, behind) = path.split_at(if is_absolute { end } else { 1 });
        if is_absolute {
            kept.push_str("…/");
            kept.push_str(path.trim_end_matches('/').rsplit('/').next().unwrap_or_default());
        } else {
            kept.push_str(path);
        }
        rest = behind;
    }
    kept.push_str(rest);
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_and_machines_are_left_out_and_the_rest_stays() {
        let place = |place: &str, instead| (place.to_owned(), instead);
        let places = Places(vec![place("/work/my runs/", ""), place("/home/ada b", "~"), place("gpu07", "here")]);
        for (text, kept) in [
            ("resuming from /work/my runs/runs/a/checkpoints", "resuming from runs/a/checkpoints"),
            ("/home/ada b/x: missing", "~/x: missing"),
            ("base: `/mnt/models/sdxl/` (/scratch/a)", "base: `…/sdxl` (…/a)"),
            ("/etc/a.yaml:3:5: unknown key", "…/a.yaml:3:5: unknown key"),
            ("a=/x/y \"/x/z\"", "a=…/y \"…/z\""),
            ("loss 0.5  2.0 images/s  1/20 // s3://bucket/a/b", "loss 0.5  2.0 images/s  1/20 // s3://bucket/a/b"),
            ("../runs/a and ~/b, a / b", "../runs/a and ~/b, a / b"),
            ("rank 3 (node-12.example) is lost; rank 0 (gpu07)", "rank 3 is lost; rank 0"),
            ("ranks (all of them), rank 2 (of 4 ranks)", "ranks (all of them), rank 2 (of 4 ranks)"),
            ("on gpu07", "on here"),
        ] {
            assert_eq!(places.taken_from(text), kept);
        }
    }
}
