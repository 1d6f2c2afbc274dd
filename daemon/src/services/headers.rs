//! Who a call is about when its message names nobody: by the headers of the request that a router has before it, handed on as
//! metadata.

use kvtier_proto::v1;
use kvtier_types::hints::headers::{Identity, identity};
use tonic::metadata::MetadataMap;

/// Who the metadata of a call names; empty where it names nobody.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct ByHeaders(Identity);

impl ByHeaders {
    /// As the metadata of a call says.
    pub(super) fn of(metadata: &MetadataMap) -> Self {
        Self(identity(|name| metadata.get(name).and_then(|value| value.to_str().ok())).unwrap_or_default())
    }

    /// Names a message's program, where the message does not. Answers whether it did.
    pub(super) fn name_program(self, program_id: &mut String) -> bool {
        let names = program_id.is_empty() && !self.0.program_id.is_empty();
        if names {
            *program_id = self.0.program_id;
        }
        names
    }

    /// Names a signal's program and its parent, where the message does not.
    pub(super) fn name_signaler(mut self, message: &mut v1::SignalRequest) {
        let parent = std::mem::take(&mut self.0.parent_program_id);
        if self.name_program(&mut message.program_id) && message.parent_program_id.is_empty() {
            message.parent_program_id = parent;
        }
    }

    /// Names the context of a placement, where the message names none: the program's, or else the session's.
    pub(super) fn name_context(mut self, message: &mut v1::PlaceRequest) {
        if !message.targets.is_empty() {
            return;
        }
        let session_id = std::mem::take(&mut self.0.session_id);
        self.name_program(&mut message.program_id);
        if message.program_id.is_empty() && !session_id.is_empty() {
            let session = v1::SessionTarget { session_id, ..Default::default() };
            let target = Some(v1::target::Target::Session(session));
            message.targets = vec![v1::Target { target, tenant: String::new() }];
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(headers: &[(&'static str, &'static str)]) -> ByHeaders {
        let mut metadata = MetadataMap::new();
        for (name, value) in headers {
            metadata.insert(*name, value.parse().unwrap());
        }
        ByHeaders::of(&metadata)
    }

    #[test]
    fn headers_name_whom_a_message_does_not() {
        let claude = of(&[("x-claude-code-session-id", "s"), ("x-claude-code-agent-id", "a")]);
        let mut signal = v1::SignalRequest::default();
        claude.clone().name_signaler(&mut signal);
        assert_eq!((signal.program_id.as_str(), signal.parent_program_id.as_str()), ("a", "s"));
        let mut named = v1::SignalRequest { program_id: "own".into(), ..Default::default() };
        claude.clone().name_signaler(&mut named);
        assert_eq!((named.program_id.as_str(), named.parent_program_id.as_str()), ("own", ""));
        let mut place = v1::PlaceRequest::default();
        claude.name_context(&mut place);
        assert_eq!((place.program_id.as_str(), place.targets.len()), ("a", 0));
        let mut place = v1::PlaceRequest::default();
        of(&[("x-session-id", "s")]).name_context(&mut place);
        let wanted = v1::SessionTarget { session_id: "s".into(), ..Default::default() };
        assert_eq!(place.targets[0].target, Some(v1::target::Target::Session(wanted)));
        let mut nobody = v1::PlaceRequest::default();
        of(&[("authorization", "x")]).name_context(&mut nobody);
        assert_eq!(nobody, v1::PlaceRequest::default());
    }
}
