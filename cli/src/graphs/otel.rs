//! From spans to declared programs: each trace is a program, each model call a step.
//!
//! A step comes after the calls that had ended when it began, as far as no other of them came in between. Calls inside a span
//! that others lie in (an agent's run, say) come after what was before that span; what runs beside it is not before them.
//! How long a call took is what it is expected to take, and what lies between it and the last one before it is the tool's
//! time.
//!
//! *Bounds*: those of a declaration; what is beyond is left out and said. [`MAX_DEPTH`] levels of spans: what lies deeper
//! counts as an outermost span.

use std::collections::BTreeMap;

use kvtier_proto::v1;

use super::spans::{Found, Span};

/// Steps of one program, steps before one, and bytes of a name, as the daemon bounds them.
const MAX_STEPS: usize = 4096;
const MAX_BEFORE: usize = 64;
const MAX_NAME_BYTES: usize = 128;
/// Levels of spans that lie in each other.
const MAX_DEPTH: usize = 64;
/// Names of skipped operations that are told.
const NAMED: usize = 8;

/// The programs of a file's traces, in the order in which they begin, and what is to be said on the side.
pub(super) fn programs(found: Found) -> (Vec<v1::DeclareRequest>, Vec<String>) {
    let mut notes: Vec<String> =
        found.left_out.iter().map(|(why, count)| format!("{count} spans {why}: left out")).collect();
    let mut traces: BTreeMap<String, Vec<Span>> = BTreeMap::new();
    let mut others: BTreeMap<String, usize> = BTreeMap::new();
    for span in found.spans {
        if !span.is_call {
            *others.entry(span.name.clone()).or_default() += 1;
        }
        traces.entry(span.trace.clone()).or_default().push(span);
    }
    if !others.is_empty() {
        let named: Vec<String> = others.iter().take(NAMED).map(|(name, count)| format!("{name} {count}")).collect();
        let more = if others.len() > NAMED { ", ..." } else { "" };
        let count: usize = others.values().sum();
        notes.push(format!("{count} spans are no model calls, skipped: {}{more}", named.join(", ")));
    }
    let mut programs = Vec::new();
    for (trace, spans) in traces {
        if trace.len() > MAX_NAME_BYTES {
            notes.push(format!("a trace's id is longer than {MAX_NAME_BYTES} bytes: left out"));
            continue;
        }
        let mut tree = Tree::new(spans);
        let begins = tree.spans.first().map(|s| s.start_us);
        let steps = tree.steps(&trace);
        notes.extend(tree.notes(&trace));
        if !steps.is_empty() {
            programs.push((begins, v1::DeclareRequest { program_id: trace, steps, ..Default::default() }));
        }
    }
    programs.sort_by(|a, b| (a.0, &a.1.program_id).cmp(&(b.0, &b.1.program_id)));
    (programs.into_iter().map(|(_, program)| program).collect(), notes)
}

/// The spans of one trace, earliest first, and how they lie in each other.
#[derive(Debug)]
struct Tree {
    spans: Vec<Span>,
    children: Vec<Vec<usize>>,
    roots: Vec<usize>,
    /// When the calls of each span and those inside it begin and end; `None` where there are none.
    reach: Vec<Option<(i64, i64)>>,
    /// For each step, those before it.
    before: BTreeMap<usize, Vec<usize>>,
    twice: usize,
    outer: usize,
    beyond: usize,
    trimmed: usize,
}

impl Tree {
    fn new(mut spans: Vec<Span>) -> Self {
        spans.sort_by_key(|span| (span.start_us, span.end_us));
        let all = spans.len();
        let mut seen = std::collections::BTreeSet::new();
        spans.retain(|span| seen.insert(span.id.clone()));
        let by_id: BTreeMap<&str, usize> = spans.iter().enumerate().map(|(n, s)| (s.id.as_str(), n)).collect();
        let named = |n: usize| spans[n].parent.as_deref().and_then(|id| by_id.get(id).copied());
        // A call that had ended when another began does not hold it, whatever it is called: they follow each other.
        let follows = |n: usize, above: usize| spans[above].is_call && spans[above].end_us <= spans[n].start_us;
        let parent = |n: usize| {
            std::iter::successors(named(n), |above| named(*above)).take(MAX_DEPTH).find(|above| !follows(n, *above))
        };
        let mut children = vec![Vec::new(); spans.len()];
        let (mut roots, mut depths) = (Vec::new(), Vec::new());
        for n in 0..spans.len() {
            // Parents that lie in each other in a circle are as deep as can be.
            let depth = std::iter::successors(parent(n), |n| parent(*n)).take(MAX_DEPTH + 1).count();
            match parent(n).filter(|_| depth <= MAX_DEPTH) {
                Some(above) => children[above].push(n),
                None => roots.push(n),
            }
            depths.push((depth, n));
        }
        depths.sort_unstable();
        let mut reach: Vec<Option<(i64, i64)>> = vec![None; spans.len()];
        for (_, n) in depths.into_iter().rev() {
            let below = children[n].iter().filter_map(|c: &usize| reach[*c]);
            let own = spans[n].is_call.then_some((spans[n].start_us, spans[n].end_us));
            // What lies in a call stands for it.
            reach[n] = below.reduce(|a, b| (a.0.min(b.0), a.1.max(b.1))).or(own);
        }
        let twice = all - spans.len();
        Self { spans, children, roots, reach, before: BTreeMap::new(), twice, outer: 0, beyond: 0, trimmed: 0 }
    }

    fn holds_calls(&self, n: usize) -> bool {
        self.children[n].iter().any(|c| self.reach[*c].is_some())
    }

    /// The steps, earliest first.
    fn steps(&mut self, trace: &str) -> Vec<v1::GraphStep> {
        let roots = std::mem::take(&mut self.roots);
        self.visit(&roots, &[]);
        let numbers: Vec<usize> = self.before.keys().copied().collect();
        let agents: std::collections::BTreeSet<&str> = numbers.iter().map(|n| self.spans[*n].agent.as_str()).collect();
        let has_branches = agents.len() > 1;
        let named = |n: &&usize| (1..=MAX_NAME_BYTES).contains(&self.spans[**n].id.len());
        let kept: Vec<usize> = numbers.iter().filter(named).take(MAX_STEPS).copied().collect();
        self.beyond = numbers.len() - kept.len();
        let all: std::collections::BTreeSet<usize> = kept.iter().copied().collect();
        kept.iter().map(|n| self.step(*n, (trace, has_branches), &all)).collect()
    }

    fn step(
        &self,
        n: usize,
        (trace, has_branches): (&str, bool),
        kept: &std::collections::BTreeSet<usize>,
    ) -> v1::GraphStep {
        let span = &self.spans[n];
        let before = &self.before[&n];
        let last = before.iter().map(|b| self.spans[*b].end_us).max();
        let ms = |us: i64| u64::try_from(us / 1000).unwrap_or(0);
        let branch = format!("{trace}/{}", span.agent);
        let is_branch = has_branches && !span.agent.is_empty() && branch.len() <= MAX_NAME_BYTES;
        let kind = if span.agent.is_empty() { &span.name } else { &span.agent };
        v1::GraphStep {
            step_id: span.id.clone(),
            program_id: if is_branch { branch } else { String::new() },
            after: before.iter().filter(|b| kept.contains(b)).map(|b| self.spans[*b].id.clone()).collect(),
            expected_ms: ms(span.end_us - span.start_us).max(1),
            tool_gap_ms: last.map_or(0, |end| ms(span.start_us - end)),
            tokens: span.tokens,
            kind: if kind.len() <= MAX_NAME_BYTES { kind.clone() } else { String::new() },
            shares: v1::SemanticType::Unspecified.into(),
            shared_context: None,
        }
    }

    /// Finds what is before the steps of spans that lie side by side; `outside` is before all of them.
    fn visit(&mut self, siblings: &[usize], outside: &[usize]) {
        let mut by_end: Vec<(i64, i64, usize)> =
            siblings.iter().filter_map(|n| self.reach[*n].map(|(start, end)| (end, start, *n))).collect();
        by_end.sort_unstable();
        // The latest beginning of those that ended first.
        let latest: Vec<i64> = by_end
            .iter()
            .scan(i64::MIN, |latest, (_, start, _)| {
                *latest = (*latest).max(*start);
                Some(*latest)
            })
            .collect();
        for (_, start, n) in by_end.iter().copied() {
            let ended = by_end.partition_point(|(end, ..)| *end <= start);
            let before = if ended == 0 {
                outside.to_vec()
            } else {
                let from = by_end.partition_point(|(end, ..)| *end <= latest[ended - 1]);
                let last: Vec<usize> = by_end[from..ended].iter().flat_map(|(.., n)| self.exits(*n)).collect();
                self.bounded(last)
            };
            if self.holds_calls(n) {
                self.outer += usize::from(self.spans[n].is_call);
                let inside = std::mem::take(&mut self.children[n]);
                self.visit(&inside, &before);
                self.children[n] = inside;
            } else {
                self.before.insert(n, before);
            }
        }
    }

    /// The calls with which a span ends: those in it that no other came after.
    fn exits(&self, n: usize) -> Vec<usize> {
        if !self.holds_calls(n) {
            return vec![n];
        }
        let inside = || self.children[n].iter().filter_map(|c| self.reach[*c].map(|reach| (*c, reach)));
        let latest = inside().map(|(_, (start, _))| start).max().unwrap_or(i64::MIN);
        inside().filter(|(_, (_, end))| *end > latest).flat_map(|(c, _)| self.exits(c)).collect()
    }

    /// As many as a step may wait for: those that ended last.
    fn bounded(&mut self, mut before: Vec<usize>) -> Vec<usize> {
        before.sort_by_key(|n| std::cmp::Reverse(self.spans[*n].end_us));
        self.trimmed += before.len().saturating_sub(MAX_BEFORE);
        before.truncate(MAX_BEFORE);
        before.sort_unstable();
        before
    }

    fn notes(&self, trace: &str) -> Vec<String> {
        let said = [
            (self.twice, "spans have the id of another: left out"),
            (self.outer, "calls hold other calls, which stand for them"),
            (self.beyond, "calls are beyond what one program may declare: left out"),
            (self.trimmed, "times a call came before another is not said: a step waits for 64 at most"),
        ];
        said.into_iter()
            .filter(|(count, _)| *count > 0)
            .map(|(count, what)| format!("trace {trace}: {count} {what}"))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::super::spans;
    use super::*;

    /// Spans in the shape of agents' traces: (id, parent, agent, operation, start and end in seconds).
    type Row = (&'static str, &'static str, &'static str, &'static str, f64, f64);

    fn trace(rows: &[Row]) -> String {
        let time = |secs: f64| format!("2026-02-25T12:00:{secs:09.6}");
        let span = |(id, parent, agent, operation, start, end): &Row| {
            serde_json::json!({
                "trace_id": "t", "span_id": id, "parent_span_id": Some(parent).filter(|p| !p.is_empty()),
                "name": format!("{operation} model"), "start_time": time(*start), "end_time": time(*end),
                "attributes": {"gen_ai.operation.name": operation, "gen_ai.usage.prompt_tokens": 50,
                               "gen_ai.usage.completion_tokens": 20},
                "resource_attributes": {"service.name": agent},
            })
        };
        serde_json::json!({"trace_id": "t", "spans": rows.iter().map(span).collect::<Vec<_>>()}).to_string()
    }

    fn after(rows: &[Row]) -> (Vec<(String, String)>, Vec<String>) {
        let (programs, notes) = programs(spans::read(&trace(rows)).unwrap());
        let steps = programs.into_iter().flat_map(|p| p.steps);
        (steps.map(|s| (s.step_id, s.after.join(" "))).collect(), notes)
    }

    fn pairs(steps: &[(String, String)]) -> Vec<(&str, &str)> {
        steps.iter().map(|(id, after)| (id.as_str(), after.as_str())).collect()
    }

    #[test]
    fn calls_come_after_those_that_had_ended() {
        let rows = [
            ("plan", "", "lead", "chat", 0.0, 1.0),
            ("left", "", "left", "chat", 1.25, 4.0),
            ("right", "", "right", "chat", 1.5, 3.0),
            ("right2", "", "right", "chat", 3.25, 3.75),
            ("sum", "", "lead", "chat", 5.0, 6.0),
        ];
        let (steps, notes) = after(&rows);
        let expected = [("plan", ""), ("left", "plan"), ("right", "plan"), ("right2", "right"), ("sum", "left right2")];
        assert_eq!(pairs(&steps), expected);
        assert!(notes.is_empty(), "{notes:?}");
        let (programs, _) = programs(spans::read(&trace(&rows)).unwrap());
        let step = |n: usize| &programs[0].steps[n];
        assert_eq!((programs[0].program_id.as_str(), step(1).program_id.as_str()), ("t", "t/left"));
        assert_eq!((step(1).expected_ms, step(1).tool_gap_ms, step(1).tokens), (2750, 250, 70));
        assert_eq!((step(4).tool_gap_ms, step(4).kind.as_str()), (1000, "lead"));
    }

    #[test]
    fn what_runs_beside_an_agents_run_is_not_before_its_calls() {
        let (steps, notes) = after(&[
            ("plan", "", "a", "chat", 0.0, 1.0),
            ("run1", "", "a", "invoke_agent", 1.0, 9.0),
            ("a1", "run1", "a", "chat", 1.0, 2.0),
            ("a2", "run1", "a", "chat", 5.0, 8.0),
            ("tool", "run1", "a", "execute_tool", 2.0, 5.0),
            ("run2", "", "a", "invoke_agent", 1.0, 7.0),
            ("b1", "run2", "a", "chat", 1.0, 3.0),
            ("b2", "run2", "a", "chat", 3.0, 6.0),
            ("sum", "", "a", "chat", 9.0, 10.0),
        ]);
        let mut told = pairs(&steps);
        told.sort_unstable();
        let expected = [("a1", "plan"), ("a2", "a1"), ("b1", "plan"), ("b2", "b1"), ("plan", ""), ("sum", "b2 a2")];
        let sorted = |text: &str| text.split(' ').map(str::to_owned).collect::<std::collections::BTreeSet<_>>();
        for ((id, after), (id2, after2)) in told.iter().zip(expected) {
            assert_eq!((*id, sorted(after)), (id2, sorted(after2)));
        }
        assert_eq!(notes, ["3 spans are no model calls, skipped: execute_tool 1, invoke_agent 2"]);
    }

    #[test]
    fn calls_named_as_parents_of_later_ones_are_before_them() {
        let (steps, notes) = after(&[
            ("one", "", "a", "chat", 0.0, 1.0),
            ("two", "one", "a", "chat", 1.0, 2.0),
            ("three", "two", "a", "chat", 3.0, 5.0),
            ("inner", "three", "a", "chat", 3.5, 4.0),
        ]);
        assert_eq!(pairs(&steps), [("one", ""), ("two", "one"), ("inner", "two")]);
        assert_eq!(notes, ["trace t: 1 calls hold other calls, which stand for them"]);
    }

    #[test]
    fn whatever_cannot_be_used_is_left_out_and_said() {
        let text = r#"{"resourceSpans": [{"resource": {"attributes": [{"key": "service.name", "value": {"stringValue": "s"}}]},
            "scopeSpans": [{"spans": [
                {"traceId": "t", "spanId": "a", "startTimeUnixNano": "1000000000", "endTimeUnixNano": "3000000000",
                 "attributes": [{"key": "gen_ai.request.model", "value": {"stringValue": "m"}},
                                {"key": "gen_ai.usage.input_tokens", "value": {"intValue": "9"}}]},
                {"traceId": "t", "spanId": "in", "parentSpanId": "out", "startTimeUnixNano": "4000000000",
                 "endTimeUnixNano": "5000000000",
                 "attributes": [{"key": "gen_ai.operation.name", "value": {"stringValue": "chat"}}]},
                {"traceId": "t", "spanId": "out", "parentSpanId": "in", "startTimeUnixNano": "4000000000",
                 "endTimeUnixNano": "6000000000",
                 "attributes": [{"key": "gen_ai.operation.name", "value": {"stringValue": "chat"}}]},
                {"traceId": "t", "spanId": "a", "startTimeUnixNano": "1000000000", "endTimeUnixNano": "3000000000"},
                {"traceId": "t", "spanId": "x", "name": "GET", "startTimeUnixNano": "1000000000", "endTimeUnixNano": "2"},
                {"traceId": "t", "startTimeUnixNano": "1000000000"}, 7
            ]}]}]}"#;
        let (programs, notes) = programs(spans::read(text).unwrap());
        let ids: Vec<&str> = programs[0].steps.iter().map(|s| s.step_id.as_str()).collect();
        assert_eq!(ids, ["a", "in", "out"], "parents in a circle are none");
        assert_eq!((programs[0].steps[0].tokens, programs[0].steps[0].kind.as_str()), (9, "s"));
        assert_eq!(programs[0].steps[1].after, ["a"]);
        let all = notes.join("\n");
        for said in [
            "1 spans without a beginning",
            "2 spans without an end",
            "no model calls",
            "1 spans have the id of another",
        ] {
            assert!(all.contains(said), "{said} is not in\n{all}");
        }
        assert!(spans::read("{}").unwrap_err().contains("resourceSpans"));
    }

    #[test]
    fn the_latest_64_are_waited_for() {
        let mut rows: Vec<(String, f64, f64)> =
            (0..80).map(|n| (format!("s{n:02}"), 0.0, 1.0 + f64::from(n) / 100.0)).collect();
        rows.push(("end".into(), 9.0, 10.0));
        let spans: Vec<Span> = rows
            .into_iter()
            .map(|(id, start, end)| {
                #[expect(clippy::cast_possible_truncation, reason = "small numbers")]
                let us = |secs: f64| (secs * 1e6) as i64;
                Span {
                    trace: "t".into(),
                    id,
                    parent: None,
                    start_us: us(start),
                    end_us: us(end),
                    agent: String::new(),
                    name: "chat".into(),
                    is_call: true,
                    tokens: 0,
                }
            })
            .collect();
        let (programs, notes) = programs(Found { spans, ..Found::default() });
        let last = programs[0].steps.last().unwrap();
        assert_eq!((last.after.len(), last.after[0].as_str()), (64, "s16"));
        assert_eq!(notes.len(), 1, "{notes:?}");
    }
}
