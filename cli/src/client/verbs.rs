//! The verbs that are one question and one answer, each with its name on the command line.

use std::time::Duration;

use kvtier_proto::v1;
use tonic::{Request, Streaming};

use super::Client;
use crate::error::CliError;

/// How long the daemon waits for a cancelled operation to let go.
const LET_GO: Duration = Duration::from_secs(5);

macro_rules! verbs {
    ($($service:ident.$verb:ident($message:ident) -> $reply:ident as $name:literal;)*) => {
        impl Client {
            $(
                #[doc = concat!("Asks `", $name, "` of the daemon.")]
                pub(crate) async fn $verb(&mut self, message: v1::$message) -> Result<v1::$reply, CliError> {
                    let answer = self.$service.$verb(self.request(message)).await;
                    self.settle($name, answer)
                }
            )*
        }
    };
}

verbs! {
    cache.evict(EvictRequest) -> EvictReply as "evict";
    cache.r#move(MoveRequest) -> OperationReply as "move";
    cache.prefetch(PrefetchRequest) -> OperationReply as "prefetch";
    cache.replicate(ReplicateRequest) -> OperationReply as "replicate";
    cache.pin(PinRequest) -> ClaimReply as "pin";
    cache.unpin(UnpinRequest) -> ClaimReply as "unpin";
    cache.retain(RetainRequest) -> ClaimReply as "retain";
    cache.list_claims(ListClaimsRequest) -> ListClaimsReply as "claims";
    cache.release_claims(ReleaseClaimsRequest) -> ReleaseClaimsReply as "claims --release";
    cache.taint(TaintRequest) -> TaintReply as "taint";
    cache.untaint(TaintRequest) -> TaintReply as "untaint";
    cache.apply_hints(ApplyHintsRequest) -> ApplyHintsReply as "apply-hints";
    cache.get_operation(OperationRequest) -> Operation as "operations";
    cache.list_operations(ListOperationsRequest) -> ListOperationsReply as "operations";
    cache.capabilities(CapabilitiesRequest) -> CapabilitiesReply as "capabilities";
    programs.signal(SignalRequest) -> SignalReply as "signal";
    programs.declare(DeclareRequest) -> DeclareReply as "graph declare";
    programs.progress(ProgressRequest) -> ProgressReply as "graph progress";
    programs.get_graph(GetGraphRequest) -> GetGraphReply as "graph show";
    programs.next_steps(NextStepsRequest) -> NextStepsReply as "next";
    programs.place(PlaceRequest) -> PlaceReply as "place";
    programs.list_programs(ListProgramsRequest) -> ListProgramsReply as "programs";
    admin.rules(RulesRequest) -> RulesReply as "rules";
    admin.reload_rules(ReloadRulesRequest) -> RulesReply as "rules reload";
    admin.explain_rules(ExplainRulesRequest) -> ExplainRulesReply as "rules explain";
}

impl Client {
    /// Waits for the end of an operation, at most as long as the message says and `--timeout` on top.
    pub(crate) async fn wait_operation(&mut self, message: v1::OperationRequest) -> Result<v1::Operation, CliError> {
        let longer = Duration::from_millis(message.wait_ms.into());
        let answer = self.cache.wait_operation(self.request_within(message, longer)).await;
        self.settle("wait", answer)
    }

    /// Gives an operation up, which waits a little for it to let go.
    pub(crate) async fn cancel_operation(&mut self, message: v1::OperationRequest) -> Result<v1::Operation, CliError> {
        let answer = self.cache.cancel_operation(self.request_within(message, LET_GO)).await;
        self.settle("cancel", answer)
    }

    /// Commits a checkpoint: the daemon answers at the message's deadline at the latest.
    pub(crate) async fn commit_checkpoint(
        &mut self,
        message: v1::CommitCheckpointRequest,
    ) -> Result<v1::OperationReply, CliError> {
        let longer = Duration::from_millis(message.deadline_ms.into());
        let answer = self.cache.commit_checkpoint(self.request_within(message, longer)).await;
        self.settle("commit-checkpoint", answer)
    }

    /// Opens the stream of events: only its beginning has a deadline.
    pub(crate) async fn watch(&mut self, message: v1::WatchRequest) -> Result<Streaming<v1::WatchReply>, CliError> {
        let (timeout, address) = (self.timeout, self.address.clone());
        let answer = tokio::time::timeout(timeout, self.cache.watch(Request::new(message))).await;
        self.settle("events", answer.map_err(|_| CliError::Late { address, timeout })?)
    }

    /// The next events, or `None` when the daemon ended the stream.
    pub(crate) async fn next_events(
        &self,
        stream: &mut Streaming<v1::WatchReply>,
    ) -> Result<Option<v1::WatchReply>, CliError> {
        let next = stream.message().await;
        self.settle("events", next.map(tonic::Response::new))
    }
}
