//! `List`: the blocks of a node, page by page.

use std::sync::Arc;

use kvtier_policy::limits::MAX_LIST_PAGE;
use kvtier_policy::{HolderKind, Holdings, ListFilter};
use kvtier_proto::{convert, v1};
use kvtier_types::{BlockHints, SemanticType};
use tonic::Status;

use super::block;
use crate::node::Node;
use crate::services::caller::Caller;
use crate::services::wire_status;

/// Page size of a listing that names none.
const DEFAULT_PAGE: usize = 100;

/// One page. It is short where the daemon looked at enough: `next_page_token` says whether there is more.
pub(super) async fn list(
    node: &Arc<Node>,
    caller: &Caller,
    message: &v1::ListRequest,
) -> Result<v1::ListReply, Status> {
    let bad_token = |_| Status::invalid_argument("page_token is not one this daemon gave out");
    let mut next = match message.page_token.len() {
        0 => Some(0),
        _ => Some(u32::from_le_bytes(message.page_token[..].try_into().map_err(bad_token)?)),
    };
    let tenant = (!caller.operator).then(|| caller.tenant.clone());
    let filter = ListFilter { tenant, ..filter(message)? };
    let limit = if message.page_size == 0 { DEFAULT_PAGE } else { (message.page_size as usize).min(MAX_LIST_PAGE) };
    let held = held(node, &filter).await;
    let mut blocks = Vec::new();
    while let Some(from) = next.filter(|_| blocks.len() < limit) {
        let (views, more) = node.read_core(|core| core.list(from, limit - blocks.len(), &filter, held.as_ref()));
        blocks.extend(views.into_iter().map(|view| block(view, &node.config.node_id)));
        next = more;
        tokio::task::yield_now().await;
    }
    let next_page_token = next.map(|n| n.to_le_bytes().to_vec()).unwrap_or_default().into();
    Ok(v1::ListReply { blocks, next_page_token })
}

/// What the programs hold that a filter names, if it names any.
async fn held(node: &Arc<Node>, filter: &ListFilter) -> Option<Holdings> {
    if filter.program.is_empty() {
        return None;
    }
    let names = node.read_core(|core| core.holders_named(HolderKind::Program, &filter.program, filter.tenant.as_ref()));
    let mut held = Holdings::of_programs(names);
    while node.read_core(|core| core.gather(&mut held)) {
        tokio::task::yield_now().await;
    }
    Some(held)
}

fn filter(message: &v1::ListRequest) -> Result<ListFilter, Status> {
    let semantic = match message.semantic {
        0 => None,
        n => Some(u8::try_from(n).map_or(SemanticType::Unspecified, SemanticType::from_number)),
    };
    if semantic == Some(SemanticType::Unspecified) {
        return Err(Status::invalid_argument(format!(
            "semantic {} is not one that this build knows",
            message.semantic
        )));
    }
    let most = BlockHints::MAX_PROGRAM_ID_BYTES;
    Ok(ListFilter {
        tier: convert::tier("tier", message.tier).map_err(wire_status)?,
        model: message.model_contains.clone(),
        semantic,
        program: convert::bounded("program_id", &message.program_id, most).map_err(wire_status)?.to_owned(),
        tenant: None,
    })
}
