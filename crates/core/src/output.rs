//! Standard output and standard error. The reader may leave early (`status | head -1`) and the disk may be full: the
//! macros of the standard library panic there. A command saves its result before it prints.

use std::fmt::Arguments;
use std::io::{self, ErrorKind, Write};

use crate::{Error, Result};

/// Prints one line on standard output.
///
/// # Errors
/// As [`text`].
pub fn line(line: Arguments<'_>) -> Result<()> {
    text(format_args!("{line}\n"))
}

/// Prints text on standard output, up to its last byte. A reader that closed the pipe is no error: the command
/// continues and ends as usual.
///
/// # Errors
/// Disk: the output is a file on a full or failing disk.
pub fn text(text: Arguments<'_>) -> Result<()> {
    print(&mut io::stdout().lock(), text)
}

/// Prints one line on standard error, and ignores a failure because nobody could be told.
pub fn note(line: Arguments<'_>) {
    // One write, because several processes may share standard error.
    let _ = io::stderr().lock().write_all(format!("{line}\n").as_bytes());
}

fn print(out: &mut dyn Write, text: Arguments<'_>) -> Result<()> {
    match out.write_fmt(text).and_then(|()| out.flush()) {
        Err(source) if source.kind() != ErrorKind::BrokenPipe => Err(Error::Disk {
            path: "standard output".into(),
            problem: "writing failed".into(),
            source,
            remedy: "free some space there, or print elsewhere: the files that the command made are whole".into(),
        }),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::io::BufWriter;

    use super::*;

    #[test]
    fn a_reader_that_left_is_no_error_and_a_full_disk_is_one() {
        let (reader, mut writer) = io::pipe().unwrap();
        print(&mut writer, format_args!("one\n")).unwrap();
        drop(reader);
        print(&mut writer, format_args!("two\n")).unwrap();
        // Standard output is buffered: the failure shows when the buffer is written.
        let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
        let error = print(&mut BufWriter::new(full), format_args!("one")).unwrap_err();
        assert_eq!(error.exit_code(), 1);
        assert!(error.to_string().starts_with("standard output: writing failed"), "{error}");
    }
}
