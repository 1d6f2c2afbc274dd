//! Which writers were heard of lately, in this node's own eyes.
//!
//! *Invariants*: a writer is absent for as long as others were heard of but not it; the time in which nobody could be heard
//! (the directory was away) counts for [`MAX_GAP`] at most, and what was before this start does not count
//! (`an_outage_of_the_directory_makes_nobody_absent`).
//! *Bounds*: the writers that had packs at the last collection, and those heard of since.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use kvtier_types::NodeId;
use tokio::time::Instant;

/// Most time between two words from the cluster that counts: twice the longest pause between heartbeats.
const MAX_GAP: Duration = Duration::from_secs(120);

/// When writers were there.
#[derive(Debug, Default)]
pub(super) struct Presence {
    /// How long the cluster was listened to.
    listened: Duration,
    heard_at: Option<Instant>,
    /// What `listened` was when a writer was alive last or, if it never was, when its packs were seen first.
    seen: BTreeMap<NodeId, Duration>,
}

impl Presence {
    /// These are alive.
    pub(super) fn heard(&mut self, now: Instant, alive: impl IntoIterator<Item = NodeId>) {
        let gap = self.heard_at.map_or(Duration::ZERO, |at| now.saturating_duration_since(at));
        self.heard_at = self.heard_at.max(Some(now));
        self.listened = self.listened.saturating_add(gap.min(MAX_GAP));
        let listened = self.listened;
        self.seen.extend(alive.into_iter().map(|writer| (writer, listened)));
    }

    /// The writers among those with `folders` that have been absent for `dead_after`. Forgets those without.
    pub(super) fn absent<T>(&mut self, folders: &BTreeMap<NodeId, T>, dead_after: Duration) -> BTreeSet<NodeId> {
        let listened = self.listened;
        self.seen.retain(|writer, _| folders.contains_key(writer));
        for writer in folders.keys() {
            self.seen.entry(writer.clone()).or_insert(listened);
        }
        let absent = self.seen.iter().filter(|(_, seen)| listened.saturating_sub(**seen) >= dead_after);
        absent.map(|(writer, _)| writer.clone()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: Duration = Duration::from_secs(3600);
    const BEAT: Duration = Duration::from_secs(10);

    fn node(name: &str) -> NodeId {
        NodeId::new(name).unwrap()
    }

    fn folders(names: &[&str]) -> BTreeMap<NodeId, ()> {
        names.iter().map(|name| (node(name), ())).collect()
    }

    /// Beats for `time`, with only "reader" alive. Returns when the last beat was.
    fn beat_for(presence: &mut Presence, from: Instant, time: Duration) -> Instant {
        let mut now = from;
        while now < from + time {
            now += BEAT;
            presence.heard(now, [node("reader")]);
        }
        now
    }

    #[test]
    fn a_writer_is_absent_once_it_was_not_heard_of_for_long() {
        let (mut presence, start) = (Presence::default(), Instant::now());
        presence.heard(start, [node("reader"), node("idle")]);
        let now = beat_for(&mut presence, start, Duration::from_secs(60));
        let both = folders(&["idle", "reader"]);
        assert!(presence.absent(&both, HOUR).is_empty(), "alive a minute ago");
        let now = beat_for(&mut presence, now, HOUR - BEAT - Duration::from_secs(60));
        assert!(presence.absent(&both, HOUR).is_empty());
        let now = beat_for(&mut presence, now, BEAT);
        assert_eq!(presence.absent(&both, HOUR), BTreeSet::from([node("idle")]));
        presence.heard(now, [node("idle")]);
        assert!(presence.absent(&both, HOUR).is_empty(), "it is back");
    }

    #[test]
    fn a_writer_never_heard_of_counts_from_when_its_packs_were_seen() {
        let (mut presence, start) = (Presence::default(), Instant::now());
        let now = beat_for(&mut presence, start, HOUR * 2);
        let gone = folders(&["gone"]);
        assert!(presence.absent(&gone, HOUR).is_empty(), "it may only be about to say that it is there");
        let now = beat_for(&mut presence, now, HOUR - BEAT);
        assert!(presence.absent(&gone, HOUR).is_empty());
        beat_for(&mut presence, now, BEAT);
        assert_eq!(presence.absent(&gone, HOUR), BTreeSet::from([node("gone")]));
    }

    #[test]
    fn an_outage_of_the_directory_makes_nobody_absent() {
        let (mut presence, start) = (Presence::default(), Instant::now());
        presence.heard(start, [node("idle")]);
        presence.heard(start + HOUR * 5, [node("reader")]);
        assert!(presence.absent(&folders(&["idle"]), HOUR).is_empty());
    }

    #[test]
    fn writers_without_packs_are_forgotten() {
        let (mut presence, start) = (Presence::default(), Instant::now());
        presence.heard(start, [node("a"), node("b")]);
        presence.absent(&folders(&["b", "c"]), HOUR);
        assert_eq!(presence.seen.keys().cloned().collect::<Vec<_>>(), [node("b"), node("c")]);
    }
}
