//! The `kvtier` command.
//!
//! Exit codes: 0 done, 1 failed or some target was not done, 2 wrong usage, 3 no daemon answered (a little later one may).
#![forbid(unsafe_code)]

use std::io::Write;
use std::process::ExitCode;

use clap::Parser;
use kvtier_cli::args::Args;
use kvtier_cli::run::run;

/// Nothing was done because the command line is wrong; clap uses the same code.
const EXIT_USAGE: u8 = 2;
/// No daemon answered, or it cannot now.
const EXIT_NO_DAEMON: u8 = 3;

fn main() -> ExitCode {
    let args = Args::parse();
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("kvtier: cannot start: {error}");
            return ExitCode::FAILURE;
        }
    };
    match runtime.block_on(run(&args)) {
        Ok(report) => {
            let out = if args.json { report.json_text() } else { report.text.clone() };
            // A reader that closed the pipe (`kvtier ls | head`) has had all it wanted.
            let printed = std::io::stdout().write_all(out.as_bytes()).is_ok();
            if report.complete && printed { ExitCode::SUCCESS } else { ExitCode::FAILURE }
        }
        Err(error) => {
            eprintln!("kvtier: {error}");
            if error.is_usage() {
                ExitCode::from(EXIT_USAGE)
            } else if error.may_pass() {
                ExitCode::from(EXIT_NO_DAEMON)
            } else {
                ExitCode::FAILURE
            }
        }
    }
}
