//! Families of programs, gathered in steps: who descends from whom.

use std::ops::Bound;

use rustc_hash::FxHashSet;

use super::{HolderId, HolderName, Holders};

/// Holders and those below them, each once. Names, since who is behind a number may change between two steps.
#[derive(Debug)]
pub(crate) struct Kin {
    members: Vec<HolderName>,
    seen: FxHashSet<HolderName>,
    /// The member whose children come next, and the last of them that was taken.
    next: usize,
    child: Option<HolderName>,
}

impl Kin {
    /// Of these.
    pub(crate) fn of(names: impl IntoIterator<Item = HolderName>) -> Self {
        let mut kin = Self { members: Vec::new(), seen: FxHashSet::default(), next: 0, child: None };
        names.into_iter().for_each(|name| kin.add(name));
        kin
    }

    fn add(&mut self, name: HolderName) {
        if self.seen.insert(name.clone()) {
            self.members.push(name);
        }
    }

    /// Those gathered, parents before their children.
    pub(crate) fn into_members(self) -> Vec<HolderName> {
        self.members
    }
}

/// A holder and those above it.
#[derive(Debug)]
pub(crate) struct Line {
    seen: FxHashSet<HolderName>,
    next: Option<HolderName>,
}

impl Line {
    /// Of this one.
    pub(crate) fn of(name: HolderName) -> Self {
        Self { seen: FxHashSet::default(), next: Some(name) }
    }

    /// Whether a name is among those gathered so far.
    pub(crate) fn has(&self, name: &HolderName) -> bool {
        self.seen.contains(name)
    }
}

impl Holders {
    /// Gathers more of a family, each taken off `left`. Answers whether some are left.
    pub(crate) fn kin_some(&self, kin: &mut Kin, left: &mut usize) -> bool {
        while let Some(member) = kin.members.get(kin.next) {
            if *left == 0 {
                return true;
            }
            *left -= 1;
            let child = self.find(member).and_then(|id| self.child_after(id, kin.child.as_ref()));
            if let Some(child) = child {
                kin.child = Some(child.clone());
                kin.add(child);
            } else {
                kin.child = None;
                kin.next += 1;
            }
        }
        false
    }

    fn child_after(&self, id: HolderId, last: Option<&HolderName>) -> Option<HolderName> {
        let start = last.map_or(Bound::Unbounded, Bound::Excluded);
        let mut rest = self.get(id).children.range((start, Bound::Unbounded));
        rest.find(|child| self.find(child).is_some()).cloned()
    }

    /// Gathers more of a line, each taken off `left`. Answers whether some are left.
    pub(crate) fn line_some(&self, line: &mut Line, left: &mut usize) -> bool {
        while let Some(name) = line.next.take() {
            if *left == 0 {
                line.next = Some(name);
                return true;
            }
            *left -= 1;
            let parent = self.find(&name).and_then(|id| self.get(id).parent.clone());
            line.next = parent.filter(|p| !line.seen.contains(p) && *p != name);
            line.seen.insert(name);
        }
        false
    }
}
