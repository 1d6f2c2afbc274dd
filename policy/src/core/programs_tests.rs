//! Programs and what their signals free, against hand-made situations.

use kvtier_types::{BlockHints, BlockKey, Location, Outcome, RecordMeta, RequestHints, TenantId, Tier};

use super::tests::{Bench, NOW, key};
use super::*;
use crate::evict::Standing;
use crate::holders::{HolderKind, HolderName};

/// Programs `main` (blocks 1 to 5), its child `left` (1 to 3, then 11 to 13) and `other` (1, 2, then 21).
pub(super) struct Family(pub(super) Bench);

pub(super) fn name(id: &str) -> HolderName {
    HolderName::program(&TenantId::shared(), id)
}

pub(super) fn hints(program: &str, session: &str, parent: &str) -> RequestHints {
    RequestHints {
        block: BlockHints { program_id: program.into(), ..BlockHints::default() },
        session_id: session.into(),
        parent_program_id: parent.into(),
        ..RequestHints::default()
    }
}

fn keys(numbers: &[u8]) -> Vec<BlockKey> {
    numbers.iter().map(|n| key(*n)).collect()
}

impl Family {
    pub(super) fn new() -> Self {
        let mut this = Self(Bench::new(32, true));
        this.write(&hints("main", "talk", ""), &[1, 2, 3, 4, 5]);
        this.write(&hints("left", "", "main"), &[1, 2, 3, 11, 12, 13]);
        this.write(&hints("other", "", ""), &[1, 2, 21]);
        this.offload();
        this
    }

    fn reserve(&mut self, hints: &RequestHints, chain: &[u8]) -> Vec<Reservation> {
        let request = ReserveRequest {
            attachment: self.0.who,
            parent: None,
            group: 0,
            first_block: 0,
            keys: keys(chain),
            tenant: TenantId::shared(),
            hints: hints.clone(),
        };
        self.0.core.reserve(NOW, &request).unwrap()
    }

    fn write(&mut self, hints: &RequestHints, chain: &[u8]) {
        for (n, answer) in chain.iter().zip(self.reserve(hints, chain)) {
            let Reservation::Granted(frames) = answer else { continue };
            let seal = SealRequest { key: key(*n), shard: 0, frame: frames[0], checksum: 1, abandoned: false };
            assert_eq!(self.0.core.seal(self.0.who, &[seal]).unwrap(), [SealOutcome::Applied]);
        }
        while self.0.core.settle_holders() {}
    }

    /// A request looks these blocks up.
    fn call(&mut self, hints: &RequestHints, chain: &[u8]) {
        let range = LookupRange { group: 0, first_block: 0, keys: keys(chain) };
        let request = LookupRequest {
            attachment: self.0.who,
            request_id: "r".into(),
            ranges: vec![range],
            local_tokens: 0,
            tenant: TenantId::shared(),
            hints: hints.clone(),
        };
        self.0.core.lookup(NOW, request).unwrap();
    }

    fn offload(&mut self) {
        let mut offset = 1000;
        while let Some(action) = self.0.core.poll_action() {
            if let Action::Offload { id, .. } = action {
                offset += 1;
                self.0.core.moved(id, MoveEnd::Done(Some(Location { segment: 1, offset })));
            }
        }
    }

    fn signal(&mut self, program: &str, kind: SignalKind, children: &[&str]) -> (Outcome, u64) {
        let children = children.iter().map(|c| name(c)).collect();
        let signal = Signal { program: name(program), parent: None, kind, children, returns_in: None };
        let answer = self.0.core.signal(NOW, &signal);
        let mut blocks = 0;
        for name in &answer.abandoned {
            loop {
                let freed = self.0.core.abandon_program(name);
                blocks += freed.blocks;
                if !freed.more {
                    assert_eq!(freed.cancelled.unwrap().0, *name);
                    break;
                }
            }
        }
        (answer.outcome, blocks)
    }

    /// Which of these blocks are here, on both tiers or on none.
    fn here(&self, numbers: &[u8]) -> Vec<u8> {
        let tiers = |n: &u8| self.0.core.locate(&key(*n)).map_or(0, |view| view.replicas.len());
        assert!(numbers.iter().all(|n| matches!(tiers(n), 0 | 2)), "one tier kept what another lost");
        numbers.iter().copied().filter(|n| tiers(n) > 0).collect()
    }

    fn standing(&self, n: u8) -> Standing {
        self.0.core.catalog.get(self.0.core.catalog.find_all(&key(n))[0]).standing
    }
}

#[test]
fn a_child_that_blocks_its_parent_says_so_until_the_parent_calls() {
    let mut f = Family::new();
    f.0.core.take_program_events();
    let child =
        |blocks| RequestHints { agent_role: "coder".into(), blocks_parent: blocks, ..hints("left", "", "main") };
    let blocks = |f: &mut Family| -> Vec<bool> {
        let told = |event| match event {
            ProgramEvent::Blocks { name: who, parent, waits, .. } => {
                assert_eq!((who, parent), (name("left"), name("main")));
                Some(waits)
            }
            _ => None,
        };
        f.0.core.take_program_events().into_iter().filter_map(told).collect()
    };
    f.call(&child(None), &[1, 2]);
    assert!(blocks(&mut f).is_empty());
    f.call(&child(Some(true)), &[1, 2]);
    f.call(&child(Some(true)), &[1, 2]);
    assert_eq!(blocks(&mut f), [true], "it is news once");
    assert_eq!(f.0.core.program_role(&name("left")), "coder");
    f.call(&hints("main", "", ""), &[1, 2]);
    let events = f.0.core.take_program_events();
    assert!(events.iter().any(|e| matches!(e, ProgramEvent::Called { name: who, .. } if *who == name("main"))));
    f.call(&child(Some(true)), &[1, 2]);
    assert_eq!(blocks(&mut f), [true], "the parent waits anew");
    f.call(&child(Some(false)), &[1, 2]);
    assert_eq!(blocks(&mut f), [false]);
    f.signal("left", SignalKind::Cancellation, &[]);
    let events = f.0.core.take_program_events();
    assert!(events.iter().any(|e| matches!(e, ProgramEvent::Ended { role, .. } if role == "coder")), "{events:?}");
}

const ALL: [u8; 9] = [1, 2, 3, 4, 5, 11, 12, 13, 21];

#[test]
fn a_cancelled_branch_frees_what_only_it_holds() {
    let mut f = Family::new();
    assert_eq!(f.here(&ALL), ALL);
    assert_eq!(f.signal("left", SignalKind::Cancellation, &[]), (Outcome::Applied, 3));
    assert_eq!(f.here(&ALL), [1, 2, 3, 4, 5, 21]);
    assert_eq!(f.signal("left", SignalKind::Cancellation, &[]), (Outcome::Missing, 0), "it is told twice");
    assert_eq!(f.signal("main", SignalKind::Cancellation, &[]), (Outcome::Applied, 3));
    assert_eq!(f.here(&ALL), [1, 2, 21], "what another program holds stays");
    let (known, counts) = f.0.core.program_counts();
    assert_eq!((known, counts.freed), (2, 6), "the session's name and the other program are left");
}

#[test]
fn a_cancelled_parent_takes_its_children_along_and_a_join_only_them() {
    let mut f = Family::new();
    assert_eq!(f.signal("main", SignalKind::Join, &["left", "main", "nobody"]), (Outcome::Applied, 3));
    assert_eq!(f.here(&ALL), [1, 2, 3, 4, 5, 21]);
    assert_eq!(f.signal("main", SignalKind::Join, &["left"]), (Outcome::Duplicate, 0));
    let mut f = Family::new();
    assert_eq!(f.signal("main", SignalKind::Cancellation, &[]).1, 6);
    assert_eq!(f.here(&ALL), [1, 2, 21]);
}

#[test]
fn a_fork_holds_its_parents_context_before_it_calls() {
    let mut f = Family::new();
    assert_eq!(f.signal("main", SignalKind::Fork, &["right"]).0, Outcome::Applied);
    assert_eq!(f.signal("main", SignalKind::Fork, &["right"]).0, Outcome::Duplicate);
    let main = name("main");
    let view = |f: &Family, id: &str| {
        let (page, _) = f.0.core.programs_after(NOW, (None, None), 10);
        page.into_iter().find(|p| p.name == name(id)).unwrap()
    };
    assert_eq!((view(&f, "main").blocks, view(&f, "main").exclusive), (5, 0));
    assert_eq!((view(&f, "right").blocks, view(&f, "right").parent), (5, Some(main)));
    let tips = |id: &str| f.0.core.context_tips(NOW + Duration::from_secs(9), &name(id)).unwrap();
    assert_eq!((tips("right").called, tips("right")), (Some(Duration::from_secs(9)), tips("main")));
    assert_eq!(f.signal("right", SignalKind::Cancellation, &[]), (Outcome::Applied, 0));
    assert_eq!(view(&f, "main").exclusive, 2);
}

#[test]
fn what_is_claimed_or_used_without_a_name_stays_with_what_is_above_it() {
    let mut f = Family::new();
    let kind = kvtier_types::ClaimKind::Retain(50);
    let name = kvtier_types::ClaimName { tenant: TenantId::shared(), owner: "o".into(), id: "c".into() };
    let mut survey = Survey::new(kind, keys(&[12]));
    assert!(!f.0.core.survey(&mut survey));
    let claim = ClaimRequest { name, revision: 1, kind, ttl: std::time::Duration::from_secs(60) };
    assert_eq!(f.0.core.claim(NOW, &claim, survey, false).outcome, Outcome::Applied);
    assert_eq!(f.signal("left", SignalKind::Cancellation, &[]), (Outcome::Applied, 1));
    assert_eq!(f.here(&ALL), [1, 2, 3, 4, 5, 11, 12, 21]);
    let mut f = Family::new();
    assert_eq!(f.0.found(&[1, 2, 3, 11]), 4, "a request that says nothing of itself");
    assert_eq!(f.signal("left", SignalKind::Cancellation, &[]), (Outcome::Applied, 2));
    assert_eq!(f.here(&ALL), [1, 2, 3, 4, 5, 11, 21]);
}

#[test]
fn a_session_holds_what_no_program_does_for_it() {
    let mut f = Family::new();
    f.write(&hints("", "chat", ""), &[1, 2, 3, 11, 12]);
    assert_eq!(f.signal("left", SignalKind::Cancellation, &[]), (Outcome::Applied, 1));
    let session = |id: &str| HolderName::session(&TenantId::shared(), id);
    let blocks = |f: &Family, id: &str, tokens| f.0.core.session_blocks(&session(id), tokens).unwrap();
    assert_eq!(blocks(&f, "chat", (0, 0)), keys(&[1, 2, 3, 11, 12]));
    assert_eq!(blocks(&f, "chat", (16, 33)), keys(&[2, 3]));
    assert_eq!(blocks(&f, "chat", (64, 0)), keys(&[12]));
    assert_eq!(blocks(&f, "talk", (0, 0)), keys(&[1, 2, 3, 4, 5]), "a program's session is known too");
    assert_eq!(f.signal("main", SignalKind::Cancellation, &[]), (Outcome::Applied, 2), "and does not hold");
}

#[test]
fn what_a_program_ended_with_goes_first_until_somebody_wants_it() {
    let mut f = Family::new();
    assert_eq!(f.signal("main", SignalKind::Completion, &[]).0, Outcome::Applied);
    assert_eq!(f.signal("main", SignalKind::Completion, &[]).0, Outcome::Duplicate);
    assert_eq!(f.here(&ALL), ALL, "nothing is dropped");
    let first: Vec<u8> = ALL.into_iter().filter(|n| f.standing(*n) == Standing::First).collect();
    assert_eq!(first, [3, 4, 5, 11, 12, 13]);
    f.write(&hints("heir", "", ""), &[1, 2, 3, 4]);
    let first: Vec<u8> = ALL.into_iter().filter(|n| f.standing(*n) == Standing::First).collect();
    assert_eq!(first, [5, 11, 12, 13]);
    assert_eq!(f.signal("main", SignalKind::Cancellation, &[]), (Outcome::Applied, 4));
    assert_eq!(f.here(&ALL), [1, 2, 3, 4, 21]);
}

#[test]
fn after_a_compaction_what_the_next_call_leaves_behind_goes_first() {
    let mut f = Family::new();
    assert_eq!(f.signal("left", SignalKind::Compaction, &[]).0, Outcome::Applied);
    assert_eq!(f.standing(13), Standing::Normal, "until the next call shows what is left");
    f.write(&hints("left", "", ""), &[1, 2, 3, 31]);
    let first: Vec<u8> = ALL.into_iter().filter(|n| f.standing(*n) == Standing::First).collect();
    assert_eq!(first, [11, 12, 13]);
    assert_eq!(f.signal("left", SignalKind::Cancellation, &[]).1, 4, "its former context goes with it");
}

#[test]
fn what_is_in_use_or_being_written_goes_when_that_ends() {
    let mut f = Family::new();
    let range = LookupRange { group: 0, first_block: 0, keys: keys(&[1, 2, 3, 11, 12, 13]) };
    let request = LookupRequest {
        attachment: f.0.who,
        request_id: "r".into(),
        ranges: vec![range],
        local_tokens: 0,
        tenant: TenantId::shared(),
        hints: hints("left", "", ""),
    };
    f.0.core.lookup(NOW, request).unwrap();
    let answers = f.reserve(&hints("left", "", ""), &[1, 2, 3, 11, 12, 13, 14]);
    let Reservation::Granted(frames) = &answers[6] else { panic!("{answers:?}") };
    assert_eq!(f.signal("left", SignalKind::Cancellation, &[]), (Outcome::Applied, 3));
    assert_eq!(f.here(&[11, 12, 13]), [0; 0], "hidden at once");
    let seal = SealRequest { key: key(14), shard: 0, frame: frames[0], checksum: 1, abandoned: false };
    assert_eq!(f.0.core.seal(f.0.who, &[seal]).unwrap(), [SealOutcome::Applied]);
    f.0.release("r", 0, 0);
    f.offload();
    assert_eq!(f.here(&[11, 12, 13, 14]), [0; 0]);
    let left: Vec<u8> =
        f.0.core.catalog.iter_from(0).filter(|(_, e)| e.host.is_some()).map(|(_, e)| e.key.as_bytes()[0]).collect();
    assert_eq!(left, [1, 2, 3, 4, 5, 21]);
    f.write(&hints("left", "", ""), &[1, 2, 3, 11]);
    f.offload();
    assert_eq!(f.here(&[11]), [11], "written anew it is there");
}

#[test]
fn a_former_life_is_taken_up_and_what_was_abandoned_is_swept() {
    let mut former = Family::new();
    former.write(&hints("keeper", "", "main"), &[1, 2, 3, 4, 41]);
    former.offload();
    let core = &former.0.core;
    let records: Vec<(RecordMeta, Location)> = ALL
        .iter()
        .chain(&[41])
        .map(|n| {
            let entry = core.catalog.get(core.catalog.find_all(&key(*n))[0]);
            (core.meta(entry, entry.sequence), entry.disk.unwrap())
        })
        .collect();
    let (holders, _) = former.0.core.take_holder_changes(100);
    let up_to = former.0.core.last_sequence();

    let mut next = Family(Bench::new(32, true));
    let core = &mut next.0.core;
    core.cancel_former(name("main"), up_to);
    for (meta, at) in &records {
        core.recover(Tier::Disk, meta, *at);
    }
    for record in holders.iter().filter(|r| r.name != name("main")) {
        core.restore_holder(NOW, record);
    }
    assert_eq!(core.sweep_cancelled(), [name("main")]);
    let here: Vec<u8> = ALL.into_iter().chain([41]).filter(|n| core.locate(&key(*n)).is_some()).collect();
    assert_eq!(here, [1, 2, 3, 4, 11, 12, 13, 21, 41], "5 was held by the abandoned program alone");
    assert_eq!(core.program_blocks(&name("left"), (false, true)), keys(&[11, 12, 13]));
    assert_eq!(core.context_tips(NOW, &name("left")).unwrap().called, None, "what it wrote is here, it was not yet");
    let talk = core.holders_named(HolderKind::Session, "talk", None);
    assert_eq!(core.session_blocks(&talk[0], (0, 0)).unwrap(), keys(&[1, 2, 3, 4]), "as far as it is left");
}

#[test]
fn events_say_what_happened_and_why() {
    let mut f = Family::new();
    let before = f.0.core.last_event();
    f.signal("left", SignalKind::Cancellation, &[]);
    let (events, lost) = f.0.core.events_after(before, true);
    assert_eq!(lost, None);
    let removed: Vec<(&str, Option<Tier>)> =
        events.iter().filter(|e| e.kind == crate::EventKind::Removed).map(|e| (e.reason, e.tier)).collect();
    assert_eq!(removed.len(), 6);
    assert!(removed.iter().all(|(reason, _)| *reason == "abandoned"));
    let ended = events.last().unwrap();
    assert_eq!((ended.kind, ended.program.as_str()), (crate::EventKind::ProgramEnded, "left"));
}

#[test]
fn programs_that_wait_for_an_engine_are_told_from_those_that_do_not() {
    let mut family = Family::new();
    let due = |family: &Family| {
        let due = family.0.core.programs_due(NOW, None, Some(&TenantId::shared()));
        assert_eq!(due.next, None);
        due.turns.into_iter().map(|turn| (turn.name.id, turn.waits, turn.returns)).collect::<Vec<_>>()
    };
    assert_eq!(due(&family), []);
    let say = |family: &mut Family, id: &str, kind, returns_in| {
        let signal = Signal { program: name(id), parent: None, kind, children: Vec::new(), returns_in };
        family.0.core.signal(NOW, &signal);
    };
    say(&mut family, "main", SignalKind::ToolWait, Some(Duration::from_secs(3)));
    say(&mut family, "left", SignalKind::Continuation, None);
    let waits = ("left".to_owned(), Some(NOW), None);
    let returns = ("main".to_owned(), None, Some(NOW + Duration::from_secs(3)));
    assert_eq!(due(&family), [waits, returns]);
    assert_eq!(family.0.core.programs_due(NOW, None, None).under_way, 1, "one waits for a tool");
    assert_eq!(family.0.core.advise(1), 16, "nothing was seen to wait for memory");
    say(&mut family, "left", SignalKind::Completion, None);
    say(&mut family, "main", SignalKind::ToolWait, None);
    assert_eq!(due(&family), []);
    assert!(family.0.core.program_turn(&name("left")).is_some_and(|turn| turn.ended));
    assert_eq!(family.0.core.program_turn(&name("nobody")), None);
}
