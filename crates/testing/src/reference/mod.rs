//! Reference pages that are generated from the program, and the check that they are up to date.

use std::fs;
use std::path::Path;

use clap::{Arg, Command};

use crate::repository;

mod config;

pub use config::{check_config, config_schema, config_table};

/// Compares the part of the page `docs/reference/{page}` between the two comments that name `part` with `text`. With the
/// environment variable `HYPERLORA_BLESS` set, the part is written instead.
#[track_caller]
pub fn check(page: &str, part: &str, text: &str) {
    let path = repository().join("docs/reference").join(page);
    let whole = fs::read_to_string(&path).unwrap();
    let (begin, end) = (format!("<!-- generated: {part} -->\n"), format!("<!-- end: {part} -->\n"));
    let (head, rest) = whole.split_once(&begin).unwrap_or_else(|| panic!("{page} has no part {part}"));
    let (found, tail) = rest.split_once(&end).unwrap_or_else(|| panic!("{page}: {part} does not end"));
    let wanted = format!("\n{}\n\n", text.trim());
    if found == wanted {
        return;
    }
    if std::env::var_os("HYPERLORA_BLESS").is_some() {
        write(&path, &format!("{head}{begin}{wanted}{end}{tail}"));
        return;
    }
    let line = found.lines().zip(wanted.lines()).find(|(found, wanted)| found != wanted);
    panic!("{page}: {part} is out of date, first at {line:?}: HYPERLORA_BLESS=1 cargo test --workspace writes it anew");
}

/// Writes a generated file whole, as [`check`] does with a part of a page.
#[track_caller]
pub fn check_file(path: &Path, text: &str) {
    if fs::read_to_string(path).is_ok_and(|found| found == text) {
        return;
    }
    assert!(
        std::env::var_os("HYPERLORA_BLESS").is_some(),
        "{} is out of date: HYPERLORA_BLESS=1 cargo test --workspace writes it anew",
        path.display()
    );
    write(path, text);
}

fn write(path: &Path, text: &str) {
    fs::write(path, text).unwrap();
}

/// Describes a program in Markdown: every command with its arguments, defaults and values.
pub fn command_line(mut program: Command) -> String {
    program.build();
    let mut page = String::new();
    describe(&program, &program, &mut page);
    page
}

fn describe(program: &Command, command: &Command, page: &mut String) {
    let name = command.get_bin_name().unwrap_or(command.get_name());
    let is_program = std::ptr::eq(program, command);
    if is_program || command.get_subcommands().next().is_none() {
        // Options of the whole program are described once, with it.
        let global = |argument: &Arg| program.get_arguments().any(|known| known.get_id() == argument.get_id());
        let own: Vec<&Arg> = command
            .get_arguments()
            .filter(|argument| !["help", "version"].contains(&argument.get_id().as_str()))
            .filter(|argument| !argument.is_hide_set() && (is_program || !global(argument)))
            .collect();
        if !is_program {
            *page += &format!("### `{name}`\n\n{}.\n\n", text(command.get_about()).trim_end_matches('.'));
        } else if !own.is_empty() {
            *page += &format!("### `{name}`, options of every command\n\n");
        }
        if !own.is_empty() {
            *page += "| argument | meaning |\n|---|---|\n";
            own.into_iter().for_each(|argument| *page += &row(argument));
            *page += "\n";
        }
    }
    for below in command.get_subcommands().filter(|below| below.get_name() != "help" && !below.is_hide_set()) {
        describe(program, below, page);
    }
}

fn row(argument: &Arg) -> String {
    let values: Vec<String> = argument.get_value_names().unwrap_or_default().iter().map(ToString::to_string).collect();
    let takes = argument.get_num_args().is_some_and(|range| range.takes_values());
    let flags =
        [argument.get_short().map(|short| format!("-{short}")), argument.get_long().map(|long| format!("--{long}"))];
    let flags: Vec<String> = flags.into_iter().flatten().collect();
    let name = match (flags.is_empty(), takes) {
        (true, _) => values.join(" "),
        (false, true) => format!("{} {}", flags.join(", "), values.join(" ")),
        (false, false) => flags.join(", "),
    };
    let mut meaning = text(argument.get_help());
    let choices: Vec<_> = argument.get_possible_values().into_iter().filter(|value| !value.is_hide_set()).collect();
    if takes && !choices.is_empty() {
        let choices: Vec<String> = choices.iter().map(|value| format!("`{}`", value.get_name())).collect();
        meaning += &format!(". One of {}", choices.join(", "));
    }
    let defaults: Vec<_> = argument.get_default_values().iter().map(|value| value.to_string_lossy()).collect();
    if takes && !defaults.is_empty() {
        meaning += &format!(". Default: `{}`", defaults.join(" "));
    }
    let needed = if argument.is_required_set() && !flags.is_empty() { ". Required" } else { "" };
    format!(
        "| `{}` | {}{needed} |\n",
        name.trim().replace('|', "\\|"),
        meaning.replace('|', "\\|").replace('<', "\\<").replace(".. ", ". ")
    )
}

fn text(styled: Option<&clap::builder::StyledStr>) -> String {
    styled.map(ToString::to_string).unwrap_or_default().split_whitespace().collect::<Vec<_>>().join(" ")
}
