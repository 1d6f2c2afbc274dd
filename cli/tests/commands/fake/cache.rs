//! Its verbs about blocks.

use kvtier_proto::v1::kv_cache_server::KvCache;
use kvtier_proto::v1::{self, Outcome};
use tonic::codegen::BoxStream;
use tonic::{Request, Response, Status};

use super::{Answer, Asked, FakeDaemon, long, packed};

/// The page size of lists that complete prefixes.
const PREFIX_PAGE: u32 = 1_000;

#[tonic::async_trait]
impl KvCache for FakeDaemon {
    async fn locate(&self, request: Request<v1::LocateRequest>) -> Answer<v1::LocateReply> {
        self.note(Asked::Locate(request.get_ref().clone()))?;
        let blocks = self.blocks.lock().expect("a fake works");
        let missing = |key: &[u8]| v1::BlockInfo {
            key: key.to_vec().into(),
            outcome: Outcome::Missing.into(),
            ..v1::BlockInfo::default()
        };
        let keys = request.into_inner().keys;
        let found = keys.iter().map(|key| blocks.get(key.as_ref()).cloned().unwrap_or_else(|| missing(key)));
        Ok(Response::new(v1::LocateReply { node_id: "node-1".to_owned(), blocks: found.collect() }))
    }

    async fn list(&self, request: Request<v1::ListRequest>) -> Answer<v1::ListReply> {
        let request = request.into_inner();
        // Prefixes are completed by a list without any filter.
        if request.page_size != PREFIX_PAGE {
            self.note(Asked::List(request.clone()))?;
        }
        let page = self.page.min(request.page_size as usize);
        let blocks = self.blocks.lock().expect("a fake works");
        let mut matching: Vec<v1::BlockInfo> = blocks
            .iter()
            .filter(|(key, _)| key.as_slice() > request.page_token.as_ref())
            .filter(|(_, b)| request.tier == 0 || b.replicas.iter().any(|r| r.tier == request.tier))
            .filter(|(_, b)| b.model.contains(&request.model_contains))
            .map(|(_, b)| b.clone())
            .take(page + 1)
            .collect();
        let more = matching.len() > page;
        matching.truncate(page);
        let next_page_token = matching.last().filter(|_| more).map(|b| b.key.clone()).unwrap_or_default();
        Ok(Response::new(v1::ListReply { blocks: matching, next_page_token }))
    }

    async fn evict(&self, request: Request<v1::EvictRequest>) -> Answer<v1::EvictReply> {
        let request = request.into_inner();
        self.note(Asked::Evict(request.clone()))?;
        if self.journal_fails {
            return Err(Status::unavailable("nothing was evicted: the journal cannot be written"));
        }
        let mut blocks = self.blocks.lock().expect("a fake works");
        let mut outcomes = Vec::new();
        let whole = request.targets.iter().all(|t| packed(std::slice::from_ref(t)).is_empty());
        for key in packed(&request.targets) {
            let (outcome, reason) = if key.as_ref() == self.leased.as_slice() {
                (Outcome::Deferred, "1 lease")
            } else if blocks.contains_key(key.as_ref()) {
                if !request.dry_run {
                    blocks.remove(key.as_ref());
                }
                (Outcome::Applied, "")
            } else {
                (Outcome::Missing, "")
            };
            outcomes.push(v1::TargetOutcome {
                key,
                outcome: outcome.into(),
                reason: reason.to_owned(),
                ..Default::default()
            });
        }
        drop(blocks);
        if whole {
            outcomes = self.outcomes(&request.targets);
        }
        let node = v1::NodeOutcome {
            node_id: "node-2".to_owned(),
            outcome: Outcome::Applied.into(),
            blocks: 1,
            bytes: 65_536,
            ..Default::default()
        };
        let nodes = if request.everywhere { vec![node] } else { Vec::new() };
        Ok(Response::new(v1::EvictReply { outcomes, nodes }))
    }

    async fn pin(&self, request: Request<v1::PinRequest>) -> Answer<v1::ClaimReply> {
        let request = request.into_inner();
        self.note(Asked::Pin(request.clone()))?;
        Ok(Response::new(self.claimed(&request.targets)))
    }

    async fn retain(&self, request: Request<v1::RetainRequest>) -> Answer<v1::ClaimReply> {
        let request = request.into_inner();
        self.note(Asked::Retain(request.clone()))?;
        Ok(Response::new(self.claimed(&request.targets)))
    }

    async fn unpin(&self, request: Request<v1::UnpinRequest>) -> Answer<v1::ClaimReply> {
        let request = request.into_inner();
        self.note(Asked::Unpin(request.clone()))?;
        Ok(Response::new(self.claimed(&request.targets)))
    }

    async fn list_claims(&self, request: Request<v1::ListClaimsRequest>) -> Answer<v1::ListClaimsReply> {
        let request = request.into_inner();
        self.note(Asked::Claims(request.clone()))?;
        let claim = |n: u64| v1::Claim {
            claim_id: format!("claim-{n}"),
            owner: "operator".to_owned(),
            tenant: "shared".to_owned(),
            revision: 1,
            kind: v1::ClaimKind::Pin.into(),
            tier: v1::Tier::Host.into(),
            remaining_ms: 90_000,
            blocks: n,
            bytes: n << 20,
            resident_bytes: n << 20,
            ..Default::default()
        };
        // Two pages of two.
        let (claims, next_page_token) = if request.page_token.is_empty() {
            (vec![claim(1), claim(2)], bytes::Bytes::from_static(b"2"))
        } else {
            (vec![claim(3), claim(4)], bytes::Bytes::new())
        };
        let budgets =
            vec![v1::ClaimBudget { tier: v1::Tier::Host.into(), claimed_bytes: 10 << 20, budget_bytes: 1 << 30 }];
        Ok(Response::new(v1::ListClaimsReply { claims, next_page_token, budgets }))
    }

    async fn release_claims(&self, request: Request<v1::ReleaseClaimsRequest>) -> Answer<v1::ReleaseClaimsReply> {
        let request = request.into_inner();
        self.note(Asked::Release(request.clone()))?;
        let released = if request.claim_ids.is_empty() { 4 } else { 1 };
        Ok(Response::new(v1::ReleaseClaimsReply { released }))
    }

    async fn taint(&self, request: Request<v1::TaintRequest>) -> Answer<v1::TaintReply> {
        let request = request.into_inner();
        self.note(Asked::Taint(request.clone()))?;
        Ok(Response::new(v1::TaintReply { outcomes: self.outcomes(&request.targets), nodes: Vec::new() }))
    }

    async fn untaint(&self, request: Request<v1::TaintRequest>) -> Answer<v1::TaintReply> {
        let request = request.into_inner();
        self.note(Asked::Untaint(request.clone()))?;
        Ok(Response::new(v1::TaintReply { outcomes: self.outcomes(&request.targets), nodes: Vec::new() }))
    }

    async fn apply_hints(&self, request: Request<v1::ApplyHintsRequest>) -> Answer<v1::ApplyHintsReply> {
        self.note(Asked::Hints(request.into_inner()))?;
        let hint = |id: &str, outcome: Outcome| v1::HintOutcome {
            action_id: id.to_owned(),
            action_type: "kv.retain".to_owned(),
            outcome: outcome.into(),
            ..Default::default()
        };
        let outcomes = vec![hint("a", Outcome::Accepted), hint("b", Outcome::Unsupported)];
        Ok(Response::new(v1::ApplyHintsReply { outcomes }))
    }

    async fn capabilities(&self, _: Request<v1::CapabilitiesRequest>) -> Answer<v1::CapabilitiesReply> {
        let words = |text: &str| text.split_whitespace().map(str::to_owned).collect();
        Ok(Response::new(v1::CapabilitiesReply {
            version: "0.1.0".to_owned(),
            protocol_version: 1,
            verbs: words("Evict Pin"),
            tiers: vec![v1::Tier::Host.into(), v1::Tier::Disk.into()],
            target_kinds: words("blocks session"),
            limits: vec![v1::Limit { name: "keys".to_owned(), value: 65_536 }],
            ..Default::default()
        }))
    }

    async fn watch(&self, request: Request<v1::WatchRequest>) -> Answer<BoxStream<v1::WatchReply>> {
        let request = request.into_inner();
        self.note(Asked::Watch(request.clone()))?;
        Ok(Response::new(long::events(request.after_sequence)))
    }

    async fn r#move(&self, request: Request<v1::MoveRequest>) -> Answer<v1::OperationReply> {
        let request = request.into_inner();
        self.note(Asked::Move(request.clone()))?;
        Ok(Response::new(self.begun("move", &request.targets, request.dry_run)))
    }

    async fn prefetch(&self, request: Request<v1::PrefetchRequest>) -> Answer<v1::OperationReply> {
        let request = request.into_inner();
        self.note(Asked::Prefetch(request.clone()))?;
        Ok(Response::new(self.begun("prefetch", &request.targets, false)))
    }

    async fn replicate(&self, request: Request<v1::ReplicateRequest>) -> Answer<v1::OperationReply> {
        let request = request.into_inner();
        self.note(Asked::Replicate(request.clone()))?;
        Ok(Response::new(self.begun("replicate", &request.targets, false)))
    }

    async fn commit_checkpoint(&self, request: Request<v1::CommitCheckpointRequest>) -> Answer<v1::OperationReply> {
        let request = request.into_inner();
        self.note(Asked::Commit(request.clone()))?;
        Ok(Response::new(self.begun("commit_checkpoint", &request.targets, false)))
    }

    async fn get_operation(&self, request: Request<v1::OperationRequest>) -> Answer<v1::Operation> {
        let request = request.into_inner();
        self.note(Asked::Operation("get", request.clone()))?;
        self.operation(&request.operation_id, |_| {}).map(Response::new)
    }

    async fn wait_operation(&self, request: Request<v1::OperationRequest>) -> Answer<v1::Operation> {
        let request = request.into_inner();
        self.note(Asked::Operation("wait", request.clone()))?;
        let stuck = self.stuck;
        self.operation(&request.operation_id, |o| {
            if !stuck {
                long::step(o)
            }
        })
        .map(Response::new)
    }

    async fn cancel_operation(&self, request: Request<v1::OperationRequest>) -> Answer<v1::Operation> {
        let request = request.into_inner();
        self.note(Asked::Operation("cancel", request.clone()))?;
        let cancel = |o: &mut v1::Operation| o.state = v1::OperationState::Cancelled.into();
        self.operation(&request.operation_id, cancel).map(Response::new)
    }

    async fn list_operations(&self, _: Request<v1::ListOperationsRequest>) -> Answer<v1::ListOperationsReply> {
        let operations = self.operations.lock().expect("a fake works").values().cloned().collect();
        Ok(Response::new(v1::ListOperationsReply { operations }))
    }
}

impl FakeDaemon {
    fn claimed(&self, targets: &[v1::Target]) -> v1::ClaimReply {
        let outcomes = self.outcomes(targets);
        let all = outcomes.iter().all(|o| o.outcome() == Outcome::Applied);
        let (outcome, reason) = if all { (Outcome::Applied, "") } else { (Outcome::Clipped, "the budget ends here") };
        v1::ClaimReply {
            outcome: outcome.into(),
            reason: reason.to_owned(),
            outcomes,
            claimed_bytes: 65_536,
            budget_bytes: 1 << 20,
        }
    }
}
