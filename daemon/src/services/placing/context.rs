//! Which blocks a step's context has: as the targets name them, or the latest context of a program or session, as the node
//! knows it that heard of it last.
//!
//! *Tenants*: a program is its tenant's own. Of blocks named by key or by tokens those count that are shared or the
//! caller's; of those that this node does not know, an operator's, and what follows from tokens without a salt, or with one
//! of the caller's own tenant.

use std::sync::Arc;

use kvtier_policy::programs::graphs::SharedPart;
use kvtier_policy::{BlockPlace, ContextTips, Core, HolderKind, prompt_blocks};
use kvtier_proto::v1::target::Target as Kind;
use kvtier_proto::{convert, v1};
use kvtier_types::{BlockKey, Layout, LayoutId, ShardKey, TenantId};
use tokio::time::{Instant, timeout_at};
use tonic::Status;

use super::name;
use super::nodes::Nodes;
use crate::cluster::peers;
use crate::node::Node;
use crate::services::caller::Caller;
use crate::services::targets::{self, KEYS_PER_CORE_CALL};
use crate::services::wire_status;

/// Blocks of one context: as many as Locate takes.
pub(crate) const MAX_BLOCKS: usize = 4096;
/// Targets of one placement: what one prefix is put together from.
const MAX_TARGETS: usize = 64;
/// Shards looked for in one placement: what one call of the directory takes.
const MAX_SHARDS: usize = 65_536;
/// Blocks walked over to find the beginning of a context.
const MAX_WALK: usize = 65_536;
/// Nodes asked for a program's context.
const MAX_ASKED: usize = 64;

/// A block at its place in the context.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Block {
    pub(super) key: BlockKey,
    pub(super) group: u16,
    pub(super) block: u32,
}

/// A context in one layout.
#[derive(Debug, Clone)]
pub(super) struct Context {
    pub(super) layout_id: LayoutId,
    pub(super) layout: Arc<Layout>,
    pub(super) blocks: Vec<Block>,
}

impl Context {
    /// Bytes of all shards of a block, by group.
    pub(super) fn whole_block_bytes(&self) -> Vec<u64> {
        self.layout.block_bytes.iter().map(|bytes| bytes.saturating_mul(u64::from(self.layout.shards))).collect()
    }

    /// Leaves the first blocks of every group, as many as may be looked for.
    fn bounded(mut self) -> Self {
        let most = MAX_BLOCKS.min(MAX_SHARDS / usize::from(self.layout.shards.max(1)));
        if self.blocks.len() > most {
            self.blocks.sort_by_key(|b| b.block);
            self.blocks.truncate(most);
        }
        self
    }
}

/// What a target names, and whose part the caller takes for it.
#[derive(Debug, Clone)]
pub(super) struct Wanted {
    caller: Caller,
    what: What,
}

#[derive(Debug, Clone)]
enum What {
    /// Blocks by key, in prefix order.
    Keys(Vec<BlockKey>),
    /// A prompt.
    Prompt(u32, v1::TokensTarget),
    /// The latest context of a program or session.
    Of(HolderKind, String),
}

/// What a request's context is to be made of.
///
/// # Errors
/// `INVALID_ARGUMENT` for what names nothing, or more than may be looked for.
pub(super) fn wanted(node: &Arc<Node>, caller: &Caller, message: &v1::PlaceRequest) -> Result<Vec<Wanted>, Status> {
    let program = name("program_id", &message.program_id)?;
    if message.targets.is_empty() {
        if program.is_empty() {
            return Err(Status::invalid_argument("neither program_id nor targets are given: say whose step it is"));
        }
        let what = What::Of(HolderKind::Program, program.to_owned());
        return Ok(vec![Wanted { caller: caller.clone(), what }]);
    }
    if message.targets.len() > MAX_TARGETS {
        let many = message.targets.len();
        return Err(Status::invalid_argument(format!(
            "{many} targets in one placement, at most {MAX_TARGETS}: name fewer"
        )));
    }
    let mut left = MAX_BLOCKS;
    let mut out = Vec::with_capacity(message.targets.len());
    for (index, target) in (0..).zip(&message.targets) {
        let caller = caller.acting_for(&target.tenant)?;
        let (what, blocks) = match &target.target {
            Some(Kind::Blocks(blocks)) => {
                let keys = convert::unpack_keys(&blocks.keys).map_err(wire_status)?;
                let count = keys.len();
                (What::Keys(keys), count)
            }
            Some(Kind::Tokens(tokens)) => {
                let blocks = match targets::prompt_of(node, index, tokens)? {
                    Ok((spaces, ids)) => spaces.first().map_or(0, |space| {
                        let of = |tokens: u32| ids.len() / tokens.max(1) as usize;
                        space.layout.groups.iter().map(|group| of(group.block_tokens)).sum()
                    }),
                    Err(_) => 0,
                };
                (What::Prompt(index, tokens.clone()), blocks)
            }
            Some(Kind::Program(program)) => {
                (What::Of(HolderKind::Program, name("program_id", &program.program_id)?.to_owned()), 1)
            }
            Some(Kind::Session(session)) => {
                (What::Of(HolderKind::Session, name("session_id", &session.session_id)?.to_owned()), 1)
            }
            None => return Err(Status::invalid_argument(format!("target {index} is empty"))),
        };
        left = left.checked_sub(blocks).ok_or_else(|| {
            Status::invalid_argument(format!("more than {MAX_BLOCKS} blocks in one placement: name the first ones"))
        })?;
        out.push(Wanted { caller, what });
    }
    Ok(out)
}

/// The context that targets name, one after the other in one prefix, or why it is not known.
pub(super) async fn find(
    node: &Arc<Node>,
    (wanted, nodes): (Vec<Wanted>, &Nodes),
    until: Instant,
) -> Result<Context, String> {
    let mut context: Option<Context> = None;
    for Wanted { caller, what } in &wanted {
        let further = match what {
            What::Keys(keys) => of_keys(node, caller, keys, context.as_ref()).await?,
            What::Prompt(index, tokens) => of_prompt(node, caller, *index, tokens)?,
            What::Of(HolderKind::Program, id) => of_program(node, caller, (id, nodes), until).await?,
            What::Of(kind, id) => of_holder(node, caller, ((*kind, id), nodes), until).await?,
        };
        match &mut context {
            None => context = Some(further),
            Some(context) if context.layout_id == further.layout_id => context.blocks.extend(further.blocks),
            Some(_) => return Err("the targets name blocks of several layouts".to_owned()),
        }
    }
    context.map(Context::bounded).ok_or_else(|| "no blocks were named".to_owned())
}

const NO_LAYOUT: &str =
    "no engine was attached here with the blocks' layout since the start, so how many tokens a block has is not known";

/// Blocks by key: at the place that is known here, or else each after the one before it.
async fn of_keys(
    node: &Arc<Node>,
    caller: &Caller,
    keys: &[BlockKey],
    before: Option<&Context>,
) -> Result<Context, String> {
    let mut places: Vec<Option<BlockPlace>> = Vec::with_capacity(keys.len());
    let mut counts: Vec<bool> = Vec::with_capacity(keys.len());
    for portion in keys.chunks(KEYS_PER_CORE_CALL) {
        node.read_core(|core| {
            places.extend(core.block_places(portion));
            counts.extend(portion.iter().map(|key| may_know(core, caller, key).unwrap_or(caller.operator)));
        });
        tokio::task::yield_now().await;
    }
    let first = before.map(|c| c.layout_id).or_else(|| places.iter().flatten().map(|place| place.layout).next());
    let (layout_id, layout) = node.read_core(|core| core.known_layout(first.as_ref())).ok_or(NO_LAYOUT)?;
    let mut next = before.and_then(|c| c.blocks.iter().map(|b| b.block).max()).map_or(0, |last| last.saturating_add(1));
    let mut blocks = Vec::with_capacity(keys.len());
    for ((key, place), counts) in keys.iter().zip(places).zip(counts) {
        let place = place.filter(|place| place.layout == layout_id).map_or((0, next), |p| (p.group, p.block));
        next = place.1.saturating_add(1);
        if counts {
            blocks.push(Block { key: *key, group: place.0, block: place.1 });
        }
    }
    Ok(Context { layout_id, layout, blocks })
}

/// Whether a caller may know where a block lies; `None` when this node does not know whose it is.
fn may_know(core: &Core, caller: &Caller, key: &BlockKey) -> Option<bool> {
    let tenant = core.tenant_of(key)?;
    Some(caller.controls(tenant) || *tenant == TenantId::shared())
}

/// The blocks of a prompt, in the layout that was attached last.
fn of_prompt(node: &Arc<Node>, caller: &Caller, index: u32, tokens: &v1::TokensTarget) -> Result<Context, String> {
    let found = targets::prompt_of(node, index, tokens).map_err(|status| status.message().to_owned())?;
    let (spaces, ids) = found.map_err(|(_, reason)| reason)?;
    let space = spaces.first().ok_or(NO_LAYOUT)?;
    let salt = &tokens.cache_salt;
    let is_own = salt.is_empty() || caller.operator || node.tenancy.of_salt(salt) == Some(&caller.tenant);
    let placed = prompt_blocks(space, &ids, salt);
    let mut blocks = Vec::with_capacity(placed.len());
    for portion in placed.chunks(KEYS_PER_CORE_CALL) {
        node.read_core(|core| {
            let counts = |(.., key): &&(u16, u32, BlockKey)| may_know(core, caller, key).unwrap_or(is_own);
            let block = |(group, block, key): &(u16, u32, BlockKey)| Block { key: *key, group: *group, block: *block };
            blocks.extend(portion.iter().filter(counts).map(block));
        });
    }
    Ok(Context { layout_id: space.layout_id, layout: Arc::clone(&space.layout), blocks })
}

/// The latest context of a program; of one whose context nobody knows, what it shares with others as was declared.
async fn of_program(
    node: &Arc<Node>,
    caller: &Caller,
    (id, nodes): (&str, &Nodes),
    until: Instant,
) -> Result<Context, String> {
    let shared = node.graphs.with(|graphs| graphs.shared_by(&caller.tenant, id));
    let Some(shared) = shared else {
        return of_holder(node, caller, ((HolderKind::Program, id), nodes), until).await;
    };
    // Whose context it shares is to be found out as well, should its own not be known.
    let now = Instant::now();
    let half = now + until.saturating_duration_since(now) / 2;
    let own = of_holder(node, caller, ((HolderKind::Program, id), nodes), half).await;
    let Err(why) = own else { return own };
    let found = match &shared.part {
        SharedPart::Blocks(keys) => up_to(node, caller, keys).await,
        _ if shared.program == id => Err(why.clone()),
        _ => of_holder(node, caller, ((HolderKind::Program, &shared.program), nodes), until).await,
    };
    let mut context = found.map_err(|_| why)?;
    if let SharedPart::Tokens(_, end @ 1..) = shared.part {
        let groups = &context.layout.groups;
        let is_before = |b: &Block| {
            let tokens = groups.get(usize::from(b.group)).map_or(1, |group| group.block_tokens);
            b.block.saturating_mul(tokens) < end
        };
        context.blocks.retain(is_before);
    }
    Ok(context)
}

/// All up to these blocks, as this node knows them.
async fn up_to(node: &Arc<Node>, caller: &Caller, last: &[BlockKey]) -> Result<Context, String> {
    let places = node.read_core(|core| {
        let known = last.iter().filter(|key| may_know(core, caller, key) == Some(true));
        core.block_places(&known.copied().collect::<Vec<_>>())
    });
    let tips: Vec<ShardKey> =
        places.iter().flatten().map(|p| ShardKey { block: p.key, layout: p.layout, shard: 0 }).collect();
    let layout_id = tips.first().map(|tip| tip.layout).ok_or("what it shares is not here")?;
    let blocks = walk(node, tips.into_iter().filter(|tip| tip.layout == layout_id)).await;
    known_here(node, Here { idle_ms: 0, layout_id, blocks })
}

/// The latest context of a program or session: of all nodes asked, as that one knows it that heard of it last.
async fn of_holder(
    node: &Arc<Node>,
    caller: &Caller,
    ((kind, id), nodes): ((HolderKind, &str), &Nodes),
    until: Instant,
) -> Result<Context, String> {
    let tenant = targets::tenant(caller);
    let (program_id, session_id) = match kind {
        HolderKind::Program => (id.to_owned(), String::new()),
        HolderKind::Session => (String::new(), id.to_owned()),
    };
    let tenant_id = tenant.map(ToString::to_string).unwrap_or_default();
    let request = v1::ContextRequest { program_id, session_id, tenant: tenant_id };
    // The directory has to be asked after that.
    let now = Instant::now();
    let half = now + until.saturating_duration_since(now) / 2;
    let asked = nodes.to_ask(MAX_ASKED).into_iter().map(|number| {
        let request = request.clone();
        async move {
            let ask = async {
                let left = half.saturating_duration_since(Instant::now());
                let mut client = peers::client(node, number, left).await?;
                Ok::<_, anyhow::Error>(client.context(request).await?.into_inner())
            };
            timeout_at(half, ask).await.ok()?.ok().filter(|reply| reply.known)
        }
    });
    let (here, elsewhere) = tokio::join!(here(node, tenant, (kind, id)), futures::future::join_all(asked));
    let latest = elsewhere.into_iter().flatten().min_by_key(|reply| reply.idle_ms);
    match (here, latest) {
        (Some(here), Some(there)) if here.idle_ms <= there.idle_ms => {
            known_here(node, here).or_else(|_| of_reply(node, &there))
        }
        (_, Some(there)) => of_reply(node, &there),
        (Some(here), None) => known_here(node, here),
        (None, None) => {
            let what = if kind == HolderKind::Program { "program" } else { "session" };
            Err(format!("no node that answered knows a context of {what} {id:?}"))
        }
    }
}

/// A context as this node knows it.
struct Here {
    /// As [`v1::ContextReply`] has it.
    idle_ms: u64,
    layout_id: LayoutId,
    blocks: Vec<Block>,
}

async fn here(node: &Arc<Node>, tenant: Option<&TenantId>, (kind, id): (HolderKind, &str)) -> Option<Here> {
    let now = node.now();
    let idle_ms = |context: &ContextTips| {
        context.called.map_or(u64::MAX, |ago| u64::try_from(ago.as_millis()).unwrap_or(u64::MAX))
    };
    let context = node.read_core(|core| {
        let names = core.holders_named(kind, id, tenant);
        names.iter().filter_map(|name| core.context_tips(now, name)).min_by_key(idle_ms)
    })?;
    let (idle_ms, tips) = (idle_ms(&context), context.tips);
    let layout_id = tips.first()?.layout;
    Some(Here { idle_ms, layout_id, blocks: walk(node, tips).await })
}

/// Blocks and those before them, in prefix order.
async fn walk(node: &Arc<Node>, tips: impl IntoIterator<Item = ShardKey>) -> Vec<Block> {
    let mut blocks = Vec::new();
    for tip in tips {
        let mut from = Some(tip);
        while let Some(at) = from.filter(|_| blocks.len() < MAX_WALK) {
            let (above, more) = node.read_core(|core| core.context_above(&at));
            blocks.extend(above.iter().map(|p| Block { key: p.key, group: p.group, block: p.block }));
            from = more;
            tokio::task::yield_now().await;
        }
    }
    blocks.reverse();
    blocks
}

fn known_here(node: &Arc<Node>, here: Here) -> Result<Context, String> {
    let (layout_id, layout) = node.read_core(|core| core.known_layout(Some(&here.layout_id))).ok_or(NO_LAYOUT)?;
    Ok(Context { layout_id, layout, blocks: here.blocks })
}

/// A context as another node knows it.
fn of_reply(node: &Arc<Node>, reply: &v1::ContextReply) -> Result<Context, String> {
    let bad = |error: &dyn std::fmt::Display| format!("another node told of a context that makes no sense: {error}");
    let keys = convert::unpack_keys(&reply.keys).map_err(|error| bad(&error))?;
    if keys.len() != reply.groups.len() || keys.len() != reply.blocks.len() || keys.len() > MAX_BLOCKS {
        return Err(bad(&format!("{} keys with {} places", keys.len(), reply.blocks.len())));
    }
    let (layout_id, layout) = match &reply.layout {
        Some(layout) => {
            let layout = convert::layout(layout, 1).map_err(|error| bad(&error))?;
            (layout.id(), Arc::new(layout))
        }
        None => {
            let id = LayoutId::from_slice(&reply.layout_id).map_err(|error| bad(&error))?;
            node.read_core(|core| core.known_layout(Some(&id))).ok_or(NO_LAYOUT)?
        }
    };
    let places = reply.groups.iter().zip(&reply.blocks);
    let block = |(key, (group, block)): (BlockKey, (&u32, &u32))| Block {
        key,
        group: u16::try_from(*group).unwrap_or(u16::MAX),
        block: *block,
    };
    Ok(Context { layout_id, layout, blocks: keys.into_iter().zip(places).map(block).collect() })
}

/// What this node tells another one of a context.
///
/// # Errors
/// `INVALID_ARGUMENT` for what is no name.
pub(in crate::services) async fn of_peer(
    node: &Arc<Node>,
    message: &v1::ContextRequest,
) -> Result<v1::ContextReply, Status> {
    let caller = Caller::operator().acting_for(&message.tenant)?;
    let (kind, id) = match (message.program_id.as_str(), message.session_id.as_str()) {
        (program, "") => (HolderKind::Program, name("program_id", program)?),
        (_, session) => (HolderKind::Session, name("session_id", session)?),
    };
    let Some(here) = here(node, targets::tenant(&caller), (kind, id)).await else {
        return Ok(v1::ContextReply::default());
    };
    let layout = node.read_core(|core| core.known_layout(Some(&here.layout_id)));
    let mut blocks = here.blocks;
    if blocks.len() > MAX_BLOCKS {
        blocks.sort_by_key(|b| b.block);
        blocks.truncate(MAX_BLOCKS);
    }
    Ok(v1::ContextReply {
        known: true,
        idle_ms: here.idle_ms,
        layout_id: here.layout_id.as_bytes().to_vec().into(),
        layout: layout.map(|(_, layout)| v1::Layout::from(&*layout)),
        keys: convert::pack_keys(blocks.iter().map(|b| &b.key)),
        groups: blocks.iter().map(|b| b.group.into()).collect(),
        blocks: blocks.iter().map(|b| b.block).collect(),
    })
}
