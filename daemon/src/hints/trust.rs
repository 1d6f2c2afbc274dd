//! How far clients are believed.
//!
//! | | `none` | `identity` | `all`, and `ApplyHints` |
//! |---|---|---|---|
//! | program, session, types, tolerations | no | yes | yes |
//! | times | no | up to `hints.max_ttl` | up to `hints.max_ttl` |
//! | priorities, taints, pins | no | no | yes |
//! | signals | no | those that free nothing | yes |
//!
//! A toleration is no right: what a tenant may not read lies under its own salt. `NoServe` keeps blocks from requests that
//! do not know of it.

use std::time::Duration;

use kvtier_types::Outcome;
use kvtier_types::hints::Said;
use serde::Deserialize;

/// How far clients are believed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Trust {
    /// Not at all.
    None,
    /// Who they are, what blocks mean, and for how long.
    #[default]
    Identity,
    /// In all that an authenticated caller may say.
    All,
}

const UNTRUSTED: &str = "hints.trust is \"none\"";
const NEEDS_ALL: &str = "needs hints.trust = \"all\", or an authenticated ApplyHints";

/// Takes back what is not trusted, and says so in the notes.
pub(super) fn admit(said: &mut Said, trust: Trust, max_ttl: Duration) {
    if trust == Trust::None {
        let mut notes = std::mem::take(&mut said.notes);
        notes.iter_mut().filter(|note| !note.is_empty()).for_each(|note| note.settle(Outcome::Rejected, UNTRUSTED));
        *said = Said { notes, ..Said::default() };
        return;
    }
    let Said { spans, signals, notes, .. } = said;
    for span in spans.iter_mut() {
        let note = &mut notes[span.note];
        if trust != Trust::All {
            if span.priority.take().is_some() {
                note.revoke(&format!("a priority {NEEDS_ALL}"));
            }
            for _ in std::mem::take(&mut span.taints) {
                note.revoke(&format!("a taint {NEEDS_ALL}"));
            }
            if std::mem::take(&mut span.pin) {
                span.ttl = None;
                note.settle(Outcome::Rejected, &format!("a pin {NEEDS_ALL}"));
            }
        }
        if let Some(ttl) = span.ttl.as_mut().filter(|ttl| **ttl > max_ttl) {
            *ttl = max_ttl;
            note.refuse(&format!("at most {} s (hints.max_ttl)", max_ttl.as_secs()));
        }
    }
    spans.retain(|span| !span.is_empty());
    if trust != Trust::All {
        signals.retain(|signal| {
            if signal.frees() {
                notes[signal.note].settle(Outcome::Rejected, &format!("{} {NEEDS_ALL}", signal.kind));
            }
            !signal.frees()
        });
    }
}
