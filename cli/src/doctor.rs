//! `kvtier doctor`: what this machine offers kvtierd, what that means, and what to change.
//!
//! Everything is optional to kvtierd but Linux itself, so an absent feature is a finding and never an error. Files are read
//! below a root that tests and containers choose; limits, io_uring and libraries are those of this process.

mod accelerator;
mod disk;
mod kernel;
mod library;
mod limits;
mod memory;
mod rdma;
mod root;

use std::path::Path;
use std::time::Duration;

use kvtier_proto::v1;
use serde::Serialize;

use crate::address::Address;
use crate::client::Client;
use crate::error::CliError;
use crate::report::Report;
use crate::table::printable;
use root::Root;

/// How good a finding is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// As kvtierd wants it.
    Ok,
    /// It works, but slower or less safely than it could.
    Warn,
    /// The machine does not have it; kvtierd does without.
    Absent,
}

/// One line of the doctor.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What was looked at: a stable name.
    pub check: String,
    /// How good it is.
    pub level: Level,
    /// What was found.
    pub found: String,
    /// What that means for kvtierd; empty where it is plain.
    pub meaning: String,
    /// What to change; empty when nothing.
    pub advice: String,
}

impl Finding {
    /// All is well.
    pub(crate) fn ok(check: &str, found: impl Into<String>) -> Self {
        Self::new(check, Level::Ok, found)
    }

    /// It could be better: `meaning` says how, `advice` what to do.
    pub(crate) fn warn(check: &str, found: impl Into<String>, (meaning, advice): (&str, &str)) -> Self {
        Self { advice: advice.to_owned(), ..Self::new(check, Level::Warn, found).meaning(meaning) }
    }

    /// The machine does not have it: `meaning` says what is lost, `advice` how to get it.
    pub(crate) fn absent(check: &str, found: impl Into<String>, (meaning, advice): (&str, &str)) -> Self {
        Self { advice: advice.to_owned(), ..Self::new(check, Level::Absent, found).meaning(meaning) }
    }

    /// With a meaning.
    pub(crate) fn meaning(mut self, meaning: &str) -> Self {
        meaning.clone_into(&mut self.meaning);
        self
    }

    fn new(check: &str, level: Level, found: impl Into<String>) -> Self {
        Self { check: check.to_owned(), level, found: found.into(), meaning: String::new(), advice: String::new() }
    }
}

/// Looks at the machine whose files lie below `root`, and at `data_dir` there.
#[must_use]
pub fn examine(root: &Path, data_dir: &Path) -> Vec<Finding> {
    let root = Root::new(root);
    let mut findings = vec![kernel::version(&root), kernel::io_uring(&root)];
    findings.extend(disk::examine(&root, data_dir));
    findings.extend([memory::total(&root), memory::huge_pages(&root), memory::transparent_pages(&root)]);
    findings.extend([memory::shared_memory(&root), memory::numa(&root)]);
    findings.extend([limits::locked_memory(), limits::open_files()]);
    findings.push(accelerator::cuda(&root));
    findings.push(accelerator::ucx());
    findings.extend(rdma::examine(&root));
    findings
}

/// Whether the daemon answers, and how it reaches other nodes.
pub async fn daemon(address: &Address, timeout: Duration) -> Vec<Finding> {
    let answer = match Client::connect(address, timeout).await {
        Ok(mut client) => client.status().await,
        Err(error) => Err(error),
    };
    let transports = answer.as_ref().map(transports).unwrap_or_default();
    let daemon = match answer {
        Ok(status) if status.state == "serving" => {
            Finding::ok("daemon", format!("{} serving at {address}, version {}", status.node_id, status.version))
        }
        Ok(status) => Finding::warn(
            "daemon",
            format!("{} {} at {address}", status.node_id, status.state),
            ("engines get no hits from it now", "wait, or see its log"),
        ),
        Err(CliError::Unreachable { reason, advice, .. }) => Finding::absent(
            "daemon",
            format!("none at {address}: {reason}"),
            ("engines on this node run without the cache", &advice),
        ),
        Err(error) => Finding::warn(
            "daemon",
            error.to_string().replace('\n', " "),
            ("engines treat it as a miss and recompute", "see the daemon's log"),
        ),
    };
    std::iter::once(daemon).chain(transports).collect()
}

/// The transports that the daemon's configuration names, best first.
fn transports(status: &v1::StatusReply) -> Vec<Finding> {
    let finding = |t: &v1::TransportStatus| {
        let check = format!("transport {}", t.kind);
        if t.state == "ok" {
            return Finding::ok(&check, format!("{} links, {} failed reads", t.links, t.failed_reads));
        }
        let advice = "mend what is said here, or take it out of transport.order";
        Finding::warn(&check, t.state.clone(), ("blocks of other nodes come by the next transport", advice))
    };
    status.transports.iter().map(finding).collect()
}

/// The report: it is always complete, since what is absent is a finding.
#[must_use]
pub fn report(findings: &[Finding]) -> Report {
    #[derive(Serialize)]
    struct Doctor<'a> {
        findings: &'a [Finding],
    }
    Report::new(findings.iter().map(text).collect(), &Doctor { findings }, true)
}

/// Width of the widest check name that is usual.
const CHECK_WIDTH: usize = 18;

fn text(finding: &Finding) -> String {
    let level = match finding.level {
        Level::Ok => "ok",
        Level::Warn => "warn",
        Level::Absent => "absent",
    };
    let mut out = format!("{level:<7} {:<CHECK_WIDTH$} {}\n", finding.check, printable(&finding.found));
    for (label, line) in [("means", &finding.meaning), ("change", &finding.advice)] {
        if !line.is_empty() {
            out.push_str(&format!("{:8}{label:>CHECK_WIDTH$} {}\n", "", line.replace('\n', " ")));
        }
    }
    out
}

#[cfg(test)]
mod tests;
