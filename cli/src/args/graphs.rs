//! The arguments of commands about declared programs and what should run next.

use std::path::PathBuf;

use clap::Subcommand;

/// What to do about what programs declare.
#[derive(Debug, Subcommand)]
pub enum GraphCommand {
    /// Declare the steps of programs, from a file of our own or from traces of OpenTelemetry.
    Declare(DeclareArgs),
    /// The steps of a program: how far they are, what they take, how far from the end.
    Show {
        /// The program's id.
        program: String,
        /// Whose program it is. Operators only.
        #[arg(long)]
        tenant: Option<String>,
    },
    /// Say which steps began and ended.
    Progress {
        /// The program's id.
        program: String,
        /// A step that began. May be given several times.
        #[arg(long, value_name = "STEP", required_unless_present = "ended")]
        began: Vec<String>,
        /// A step that ended. May be given several times.
        #[arg(long, value_name = "STEP")]
        ended: Vec<String>,
        /// Whose program it is. Operators only.
        #[arg(long)]
        tenant: Option<String>,
    },
    /// Forget what a program declared.
    Remove {
        /// The program's id.
        program: String,
        /// Whose program it is. Operators only.
        #[arg(long)]
        tenant: Option<String>,
    },
}

/// What to declare.
#[derive(Debug, clap::Args)]
#[command(group = clap::ArgGroup::new("from").required(true).args(["file", "otel"]))]
pub struct DeclareArgs {
    /// A program, or several in an array, as JSON; - is standard input.
    pub file: Option<PathBuf>,
    /// Spans of OpenTelemetry as JSON, each trace a program; - is standard input.
    #[arg(long, value_name = "FILE")]
    pub otel: Option<PathBuf>,
    /// The program's id, in the place of the file's; for one program.
    #[arg(long, value_name = "ID")]
    pub program: Option<String>,
    /// Print what would be declared, as a file of our own with --json. Needs no daemon.
    #[arg(long)]
    pub dry_run: bool,
    /// Whose programs they are. Operators only.
    #[arg(long)]
    pub tenant: Option<String>,
}

/// What should run next.
#[derive(Debug, clap::Args)]
pub struct NextArgs {
    /// Only steps of this program or branch. May be given several times.
    #[arg(long = "program", value_name = "ID")]
    pub programs: Vec<String>,
    /// Print at most this many steps.
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub limit: u32,
    /// Steps that run already too.
    #[arg(long)]
    pub running: bool,
    /// Whose programs. Operators only.
    #[arg(long)]
    pub tenant: Option<String>,
}
