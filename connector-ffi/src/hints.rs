//! What requests' clients said, handed on to the daemon once a request, and what became of it.
//!
//! # Bounds
//! `capacity` requests; the oldest make room. Outcomes of one: [`MAX_OUTCOMES`] and [`MAX_OUTCOMES_BYTES`].

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use bytes::Bytes;
use kvtier_proto::v1;
use parking_lot::Mutex;
use serde_json::json;

use crate::error::Error;
use crate::link::Attachment;
use crate::shared::Shared;

/// Most outcomes told of one request; the daemon bounds actions and carriers below it.
const MAX_OUTCOMES: usize = 64;
/// Longest list of outcomes, in bytes; those that do not fit are left out.
pub const MAX_OUTCOMES_BYTES: usize = 60 * 1024;

/// What one request's client said.
#[derive(Debug, Clone)]
pub struct Hints {
    /// Names the request.
    pub request_id: String,
    /// Salt of the request, empty for none.
    pub cache_salt: String,
    /// The carriers, as JSON.
    pub client_hints: Bytes,
}

/// What is known of a request's hints.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum OutcomesPoll {
    /// Nothing, and nothing will be.
    Unknown,
    /// Ask again.
    Pending,
    /// A JSON list.
    Ready(String),
}

#[derive(Debug, Default)]
struct Requests {
    /// Number of the submission, and its answer.
    answers: HashMap<String, (u64, Option<String>)>,
    /// Submissions, oldest first; those that were forgotten are passed over.
    order: VecDeque<(u64, String)>,
    last: u64,
}

impl Requests {
    fn begin(&mut self, request_id: &str, capacity: usize) -> u64 {
        self.last += 1;
        self.answers.insert(request_id.to_owned(), (self.last, None));
        self.order.push_back((self.last, request_id.to_owned()));
        while self.order.len() > capacity {
            if let Some((number, id)) = self.order.pop_front() {
                self.end(&id, number);
            }
        }
        self.last
    }

    fn answer(&mut self, request_id: &str, number: u64, text: String) {
        if let Some((_, answer)) = self.answers.get_mut(request_id).filter(|(current, _)| *current == number) {
            *answer = Some(text);
        }
    }

    fn end(&mut self, request_id: &str, number: u64) {
        if self.answers.get(request_id).is_some_and(|(current, _)| *current == number) {
            self.answers.remove(request_id);
        }
    }
}

/// The hints of one session's requests.
#[derive(Debug)]
pub struct HintTable {
    requests: Mutex<Requests>,
    capacity: usize,
}

impl HintTable {
    /// Room for `capacity` requests.
    #[must_use]
    pub fn new(capacity: usize) -> Self {
        Self { requests: Mutex::new(Requests::default()), capacity }
    }

    /// Begins to hand on; the call runs on `runtime`. Without a daemon nothing is known of it afterwards.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for empty hints.
    pub fn submit(
        self: &Arc<Self>,
        shared: &Arc<Shared>,
        runtime: &tokio::runtime::Handle,
        hints: Hints,
    ) -> Result<(), Error> {
        if hints.client_hints.is_empty() {
            return Err(Error::invalid("hints are empty"));
        }
        shared.counters.hinted.one();
        let Some(attachment) = shared.link.current() else {
            shared.counters.hints_failed.one();
            return Ok(());
        };
        let number = self.requests.lock().begin(&hints.request_id, self.capacity);
        let (table, shared) = (Arc::clone(self), Arc::clone(shared));
        runtime.spawn(async move {
            let request_id = hints.request_id.clone();
            match call(&shared, &attachment, hints).await {
                Some(outcomes) => table.requests.lock().answer(&request_id, number, outcomes),
                None => {
                    shared.counters.hints_failed.one();
                    table.requests.lock().end(&request_id, number);
                }
            }
        });
        Ok(())
    }

    /// What is known of a request's hints, from local state only.
    #[must_use]
    pub fn poll(&self, request_id: &str) -> OutcomesPoll {
        match self.requests.lock().answers.get(request_id) {
            None => OutcomesPoll::Unknown,
            Some((_, None)) => OutcomesPoll::Pending,
            Some((_, Some(text))) => OutcomesPoll::Ready(text.clone()),
        }
    }

    /// Nobody asks for a request's outcomes anymore.
    pub fn forget(&self, request_id: &str) {
        self.requests.lock().answers.remove(request_id);
    }
}

async fn call(shared: &Shared, attachment: &Attachment, hints: Hints) -> Option<String> {
    let request = v1::HintRequest {
        attachment: attachment.token_bytes(),
        request_id: hints.request_id,
        cache_salt: hints.cache_salt,
        client_hints: hints.client_hints,
    };
    let mut client = attachment.client.clone();
    let reply = tokio::time::timeout(shared.spec.call_timeout, client.hint(request)).await.ok()?.ok()?;
    Some(outcomes(&reply.into_inner()))
}

fn outcomes(reply: &v1::HintReply) -> String {
    let row = |row: &v1::HintOutcome| {
        json!({
            "action_id": row.action_id,
            "action_type": row.action_type,
            "outcome": row.outcome().as_str_name(),
            "reason": row.reason,
        })
    };
    let mut rows: Vec<String> = Vec::new();
    let mut room = MAX_OUTCOMES_BYTES - 2;
    for text in reply.outcomes.iter().take(MAX_OUTCOMES).map(|outcome| row(outcome).to_string()) {
        let Some(left) = room.checked_sub(text.len() + 1) else { break };
        room = left;
        rows.push(text);
    }
    format!("[{}]", rows.join(","))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_bounded_and_the_oldest_make_room() {
        let mut requests = Requests::default();
        let first = requests.begin("a", 2);
        requests.begin("b", 2);
        requests.begin("c", 2);
        assert_eq!(requests.answers.len(), 2);
        assert!(!requests.answers.contains_key("a"));
        requests.answer("a", first, "late".into());
        assert_eq!((requests.answers.len(), requests.order.len()), (2, 2));
    }

    #[test]
    fn a_second_submission_of_one_request_is_not_answered_by_the_first() {
        let mut requests = Requests::default();
        let first = requests.begin("a", 8);
        let second = requests.begin("a", 8);
        requests.answer("a", first, "[1]".into());
        assert_eq!(requests.answers["a"], (second, None));
        requests.end("a", first);
        requests.answer("a", second, "[2]".into());
        assert_eq!(requests.answers["a"].1.as_deref(), Some("[2]"));
    }

    #[test]
    fn outcomes_are_told_by_name() {
        let row = v1::HintOutcome {
            action_id: "a1".into(),
            action_type: "kv.retain".into(),
            outcome: v1::Outcome::Clipped.into(),
            reason: "at most 1 h".into(),
        };
        let text = outcomes(&v1::HintReply { outcomes: vec![row] });
        let back: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(back[0]["outcome"], "CLIPPED");
        assert_eq!(back[0]["action_id"], "a1");
    }

    #[test]
    fn outcomes_are_bounded_in_bytes() {
        let row = v1::HintOutcome { action_id: "\u{1}".repeat(300), ..Default::default() };
        let text = outcomes(&v1::HintReply { outcomes: vec![row; 99] });
        let back: Vec<serde_json::Value> = serde_json::from_str(&text).unwrap();
        assert!((20..MAX_OUTCOMES).contains(&back.len()) && text.len() <= MAX_OUTCOMES_BYTES, "{}", text.len());
    }
}
