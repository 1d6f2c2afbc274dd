//! What it says of itself, of rules and of programs.

use kvtier_proto::v1::admin_server::Admin;
use kvtier_proto::v1::programs_server::Programs;
use kvtier_proto::v1::{self, Outcome};
use tonic::codegen::BoxStream;
use tonic::{Request, Response, Status};

use super::{Answer, Asked, FakeDaemon};

#[tonic::async_trait]
impl Admin for FakeDaemon {
    async fn nodes(&self, _: Request<v1::NodesRequest>) -> Answer<v1::NodesReply> {
        Err(Status::unimplemented("this daemon is alone"))
    }

    async fn drain(&self, _: Request<v1::DrainRequest>) -> Answer<BoxStream<v1::DrainEvent>> {
        Err(Status::unimplemented("this daemon is alone"))
    }

    async fn status(&self, _request: Request<v1::StatusRequest>) -> Answer<v1::StatusReply> {
        if self.hangs {
            std::future::pending::<()>().await;
        }
        Ok(Response::new(status()))
    }

    async fn rules(&self, _: Request<v1::RulesRequest>) -> Answer<v1::RulesReply> {
        Ok(Response::new(rules("")))
    }

    async fn reload_rules(&self, _: Request<v1::ReloadRulesRequest>) -> Answer<v1::RulesReply> {
        Ok(Response::new(rules("line 3, column 8: no such type")))
    }

    async fn explain_rules(&self, request: Request<v1::ExplainRulesRequest>) -> Answer<v1::ExplainRulesReply> {
        let key = request.into_inner().key;
        if !self.blocks.lock().expect("a fake works").contains_key(key.as_ref()) {
            return Ok(Response::new(v1::ExplainRulesReply { outcome: Outcome::Missing.into(), ..Default::default() }));
        }
        let decision = |field: &str, value: &str, rule: &str, line| v1::RuleDecision {
            field: field.to_owned(),
            value: value.to_owned(),
            rule: rule.to_owned(),
            line,
        };
        Ok(Response::new(v1::ExplainRulesReply {
            outcome: Outcome::Applied.into(),
            semantic: v1::SemanticType::SystemPrompt.into(),
            model: "tiny-llama".to_owned(),
            tenant: "shared".to_owned(),
            decisions: vec![decision("priority", "90", "system prompts stay", 9), decision("ttl", "none", "", 0)],
            ..Default::default()
        }))
    }
}

fn rules(error: &str) -> v1::RulesReply {
    v1::RulesReply {
        file: "/etc/kvtier/rules.toml".to_owned(),
        text: "[[rule]]\nname = \"a\"\n".to_owned(),
        error: error.to_owned(),
        generation: 2,
    }
}

#[tonic::async_trait]
impl Programs for FakeDaemon {
    async fn place(&self, request: Request<v1::PlaceRequest>) -> Answer<v1::PlaceReply> {
        self.note(Asked::Place(request.into_inner()))?;
        let cost = v1::PlaceCost { node_id: "node-2".to_owned(), host_tokens: 320, known: true, ..Default::default() };
        let started = v1::PlaceStarted {
            kind: v1::PlaceWork::Prefetch.into(),
            node_id: "node-2".to_owned(),
            blocks: 20,
            bytes: 5 << 20,
            operation_id: "7".to_owned(),
        };
        Ok(Response::new(v1::PlaceReply {
            node_id: "node-2".to_owned(),
            reason: v1::PlaceReason::State.into(),
            explanation: "the context is nearest to node-2".to_owned(),
            costs: vec![cost],
            started: vec![started],
        }))
    }

    async fn signal(&self, request: Request<v1::SignalRequest>) -> Answer<v1::SignalReply> {
        self.note(Asked::Signal(request.into_inner()))?;
        let node = v1::NodeOutcome {
            node_id: "node-2".to_owned(),
            outcome: Outcome::Deferred.into(),
            reason: "away: it is told once it is back".to_owned(),
            ..Default::default()
        };
        let outcome = Outcome::Applied.into();
        Ok(Response::new(v1::SignalReply {
            outcome,
            blocks: 5,
            bytes: 5 << 20,
            nodes: vec![node],
            ..Default::default()
        }))
    }

    async fn declare(&self, request: Request<v1::DeclareRequest>) -> Answer<v1::DeclareReply> {
        let message = request.into_inner();
        let steps = u32::try_from(message.steps.len()).unwrap_or(0);
        let outcome = if message.program_id == "full" { Outcome::Rejected } else { Outcome::Applied };
        self.note(Asked::Declare(message))?;
        let (outcome, reason) = (outcome.into(), "as the fake says".to_owned());
        Ok(Response::new(v1::DeclareReply { outcome, reason, steps, revision: 7, ..Default::default() }))
    }

    async fn progress(&self, request: Request<v1::ProgressRequest>) -> Answer<v1::ProgressReply> {
        self.note(Asked::Progress(request.into_inner()))?;
        Ok(Response::new(v1::ProgressReply { outcome: Outcome::Applied.into(), steps: 1, ..Default::default() }))
    }

    async fn get_graph(&self, request: Request<v1::GetGraphRequest>) -> Answer<v1::GetGraphReply> {
        let program_id = request.into_inner().program_id;
        if program_id == "nobody" {
            return Ok(Response::new(v1::GetGraphReply::default()));
        }
        let step = v1::GraphStep {
            step_id: "b".to_owned(),
            after: ["a", "c", "d", "e"].map(str::to_owned).to_vec(),
            ..Default::default()
        };
        let (state, takes_ms, rank_ms) = ("ready".to_owned(), 1500, 12_300);
        let steps = vec![v1::GraphStepState { step: Some(step), state, takes_ms, rank_ms }];
        let graph = v1::Graph { program_id, tenant: "shared".to_owned(), revision: 7, steps, ..Default::default() };
        Ok(Response::new(v1::GetGraphReply { graphs: vec![graph] }))
    }

    async fn next_steps(&self, request: Request<v1::NextStepsRequest>) -> Answer<v1::NextStepsReply> {
        self.note(Asked::Next(request.into_inner()))?;
        let step = v1::NextStep {
            program_id: "p".to_owned(),
            step_id: "b".to_owned(),
            priority: 1_700_000_000_000,
            reason: "critical path: 12.3 s to the end of p".to_owned(),
            ..Default::default()
        };
        Ok(Response::new(v1::NextStepsReply { steps: vec![step], truncated: true, admission: None }))
    }

    async fn list_programs(&self, _: Request<v1::ListProgramsRequest>) -> Answer<v1::ListProgramsReply> {
        if let Some(code) = self.refuses {
            return Err(Status::new(code, "the fake refuses"));
        }
        let program = |id: &str, blocks| v1::Program {
            program_id: id.to_owned(),
            state: "active".to_owned(),
            blocks,
            exclusive_blocks: 1,
            ..Default::default()
        };
        let programs = vec![program("p-small", 2), program("p-large", 70)];
        Ok(Response::new(v1::ListProgramsReply { programs, ..Default::default() }))
    }
}

/// The status it gives.
pub(crate) fn status() -> v1::StatusReply {
    let count = |name: &str, value| v1::Count { name: name.to_owned(), value };
    v1::StatusReply {
        node_id: "node-1".to_owned(),
        version: "0.1.0".to_owned(),
        incarnation: 3,
        uptime_ms: 3_725_000,
        state: "serving".to_owned(),
        tiers: vec![
            v1::TierStatus {
                tier: v1::Tier::Host.into(),
                state: "ok".to_owned(),
                detail: "hugepages".to_owned(),
                capacity_bytes: 4 << 30,
                used_bytes: 1 << 30,
                blocks: 1_000,
                pending_writes: 0,
            },
            v1::TierStatus { tier: v1::Tier::Object.into(), state: "absent".to_owned(), ..v1::TierStatus::default() },
        ],
        attachments: vec![v1::AttachmentStatus {
            engine_id: "engine-a".to_owned(),
            role: "worker".to_owned(),
            rank: 0,
            pid: 42,
            model: "tiny-llama".to_owned(),
            leases: 2,
            reservations: 1,
            age_ms: 61_000,
        }],
        ledger: vec![count("host", 600), count("disk", 150), count("novel", 250)],
        looked_up_tokens: 1_000,
        blocks_loaded: vec![count("host", 40), count("disk", 10)],
        corrupt_blocks: 1,
        notes: vec!["disk: recovered 12 records".to_owned()],
        ..v1::StatusReply::default()
    }
}
