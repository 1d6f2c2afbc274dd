//! docs/CLI.md is true: every command is in it, and every line of it is one.

use clap::{CommandFactory, Parser};
use kvtier_cli::args::Args;

const DOCUMENT: &str = include_str!("../../../docs/CLI.md");

/// The command lines of the document's examples; a pipe has several.
fn examples() -> Vec<&'static str> {
    let mut within = false;
    let lines = DOCUMENT.lines().filter(move |line| {
        within ^= line.starts_with("```");
        within && !line.starts_with("```")
    });
    lines.flat_map(|line| line.split('|').map(str::trim)).collect()
}

#[test]
fn every_example_of_the_document_is_a_command_line() {
    assert!(examples().len() > 40);
    for example in examples() {
        assert!(example.starts_with("kvtier "), "{example}");
        assert!(Args::try_parse_from(example.split_whitespace()).is_ok(), "{example}");
    }
}

#[test]
fn the_document_shows_every_command() {
    for command in Args::command().get_subcommands() {
        let name = command.get_name();
        assert!(DOCUMENT.contains(&format!("**{name}**")), "{name} is not told");
        let begin = format!("kvtier {name}");
        assert!(examples().iter().any(|e| *e == begin || e.starts_with(&format!("{begin} "))), "{name} has no example");
    }
}
