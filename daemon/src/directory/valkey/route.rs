//! Sends commands to the servers that have their slots: one pipeline a server, all at once.
//!
//! A crate's cluster connection would route a pipeline only if all of it lies on one server, and has deadlines and
//! pauses of its own; this is the part that is needed.
//!
//! *Bounds*: rounds of redirections are counted; a call ends at its deadline. *Cancellation*: commands already sent may
//! take effect.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures::future::join_all;
use parking_lot::Mutex;
use redis::{Cmd, Pipeline, ServerError, Value, cmd};
use tokio::time::{Instant, timeout_at};

use super::place::{Address, MAX_SERVERS, Place};
use super::scripts::Scripts;
use super::server::{Login, Server, says};
use super::slots::{self, SLOTS};
use crate::directory::DirectoryError;

/// Times a command is sent before its redirections count as an answer of its own.
const ROUNDS: u32 = 6;
/// Pause before the second round where a server asked to come again; doubled by each further one.
const COME_AGAIN: Duration = Duration::from_millis(10);
/// Longest that one server is asked for the map of slots.
const ASK_MAP: Duration = Duration::from_millis(300);

/// A command and the slot of its key.
#[derive(Debug)]
pub(super) struct Op {
    pub(super) slot: u16,
    pub(super) command: Cmd,
}

/// Knows the servers, and who has which slot.
#[derive(Debug)]
pub(super) struct Router {
    place: Place,
    login: Login,
    pub(super) scripts: Arc<Scripts>,
    known: Mutex<Known>,
    stale: AtomicBool,
    /// Held by whoever asks for the map.
    asking: tokio::sync::Mutex<()>,
}

#[derive(Debug, Default)]
struct Known {
    servers: BTreeMap<Address, Arc<Server>>,
    /// First slot of a range -> its last, and who has it.
    map: BTreeMap<u16, (u16, Arc<Server>)>,
}

/// An operation that has no answer yet.
struct Pending {
    index: usize,
    /// Where a server said to send it, and whether only to ask there.
    to: Option<(Arc<Server>, bool)>,
}

/// Operations for one server.
type Group = (Arc<Server>, Vec<Pending>);

/// What an error in answer to one command means.
enum Verdict {
    To(Address, bool),
    Again,
    Never(DirectoryError),
}

impl Router {
    pub(super) fn new(place: Place, login: Login) -> Self {
        let stale = AtomicBool::new(place.cluster);
        let (scripts, known, asking) = (Arc::new(Scripts::new()), Mutex::default(), tokio::sync::Mutex::default());
        let router = Self { place, login, scripts, known, stale, asking };
        let seeds: Vec<_> = router.place.seeds.iter().map(|seed| router.server(seed)).collect();
        if !router.place.cluster {
            router.known.lock().map.extend(seeds.into_iter().map(|server| (0, (SLOTS - 1, server))));
        }
        router
    }

    /// Answers to the commands, in their order. Fails as a whole if one fails; others may have taken effect.
    pub(super) async fn run(&self, ops: &[Op], deadline: Instant) -> Result<Vec<Value>, DirectoryError> {
        let mut answers: Vec<Option<Value>> = ops.iter().map(|_| None).collect();
        let mut pending: Vec<_> = (0..ops.len()).map(|index| Pending { index, to: None }).collect();
        let mut last = None;
        for round in 0..ROUNDS {
            if self.stale.load(Ordering::Acquire) {
                self.ask_map(deadline).await?;
            }
            let groups = self.group(ops, pending)?;
            let sent = groups.into_iter().map(|(server, group)| self.send(server, group, ops, deadline));
            pending = Vec::new();
            for outcome in join_all(sent).await {
                let (server, group, values) = outcome?;
                for (one, value) in group.into_iter().zip(values) {
                    let Value::ServerError(error) = value else {
                        answers[one.index] = Some(value);
                        continue;
                    };
                    let to = match self.verdict(&server, &error) {
                        Verdict::Never(error) => return Err(error),
                        Verdict::Again => None,
                        Verdict::To(address, ask) => Some((self.server(&address), ask)),
                    };
                    last = Some(server.away(error.to_string()));
                    pending.push(Pending { index: one.index, to });
                }
            }
            if pending.is_empty() {
                return Ok(answers.into_iter().flatten().collect());
            }
            if pending.iter().any(|p| p.to.is_none()) {
                let until = Instant::now() + COME_AGAIN * (1 << round);
                tokio::time::sleep_until(until.min(deadline)).await;
            }
        }
        Err(last.unwrap_or_else(|| self.away("no answer")))
    }

    /// An error of the directory as a whole.
    pub(super) fn away(&self, reason: impl Into<String>) -> DirectoryError {
        DirectoryError::Away { place: self.name(), reason: reason.into() }
    }

    /// Likewise.
    pub(super) fn refused(&self, reason: impl Into<String>) -> DirectoryError {
        DirectoryError::Refused { place: self.name(), reason: reason.into() }
    }

    fn name(&self) -> String {
        let seeds: Vec<_> = self.place.seeds.iter().map(ToString::to_string).collect();
        seeds.join(",")
    }

    fn server(&self, address: &Address) -> Arc<Server> {
        let alone = !self.place.cluster;
        let make = || Arc::new(Server::new(address.clone(), self.login.clone(), Arc::clone(&self.scripts), alone));
        let mut known = self.known.lock();
        if let Some(server) = known.servers.get(address) {
            return Arc::clone(server);
        }
        let server = make();
        if known.servers.len() < 2 * MAX_SERVERS {
            known.servers.insert(address.clone(), Arc::clone(&server));
        }
        server
    }

    fn group(&self, ops: &[Op], pending: Vec<Pending>) -> Result<Vec<Group>, DirectoryError> {
        let known = self.known.lock();
        let mut groups: BTreeMap<Address, Group> = BTreeMap::new();
        for one in pending {
            let slot = ops[one.index].slot;
            let owner = known.map.range(..=slot).next_back().filter(|(_, (last, _))| slot <= *last);
            let server = match (&one.to, owner) {
                (Some((server, _)), _) | (None, Some((_, (_, server)))) => server,
                (None, None) => {
                    self.stale.store(self.place.cluster, Ordering::Release);
                    return Err(self.away(format!("no server has slot {slot}")));
                }
            };
            let group = groups.entry(server.address.clone()).or_insert_with(|| (Arc::clone(server), Vec::new()));
            group.1.push(one);
        }
        Ok(groups.into_values().collect())
    }

    async fn send(
        &self,
        server: Arc<Server>,
        group: Vec<Pending>,
        ops: &[Op],
        deadline: Instant,
    ) -> Result<(Arc<Server>, Vec<Pending>, Vec<Value>), DirectoryError> {
        let mut commands = Pipeline::with_capacity(group.len());
        let mut asks = Vec::new();
        for one in &group {
            if matches!(one.to, Some((_, true))) {
                asks.push(commands.len());
                commands.cmd("ASKING");
            }
            commands.add_command(ops[one.index].command.clone());
        }
        let answered = server.exchange(&commands, deadline).await;
        if answered.is_err() && self.place.cluster {
            self.stale.store(true, Ordering::Release);
        }
        let mut index = 0;
        let mut values = answered?;
        values.retain(|_| {
            index += 1;
            asks.binary_search(&(index - 1)).is_err()
        });
        Ok((server, group, values))
    }

    fn verdict(&self, server: &Server, error: &ServerError) -> Verdict {
        let details = error.details().unwrap_or_default();
        match error.code() {
            "MOVED" | "ASK" if !self.place.cluster => {
                Verdict::Never(server.refused("it is one of a cluster: use redis+cluster:// in the URL"))
            }
            code @ ("MOVED" | "ASK") => {
                if code == "MOVED" {
                    self.stale.store(true, Ordering::Release);
                }
                let to = details.split_ascii_whitespace().nth(1);
                // A server that does not know the other's host leaves it out: it is its own.
                let whole =
                    to.map(|t| t.strip_prefix(':').map_or(t.to_owned(), |p| format!("{}:{p}", server.address.host)));
                match whole.as_deref().and_then(Address::parse) {
                    Some(address) => Verdict::To(address, code == "ASK"),
                    None => Verdict::Again,
                }
            }
            "NOSCRIPT" => {
                server.renew();
                Verdict::Again
            }
            "TRYAGAIN" | "CLUSTERDOWN" | "LOADING" | "MASTERDOWN" | "BUSY" | "READONLY" => {
                self.stale.store(self.place.cluster, Ordering::Release);
                Verdict::Again
            }
            "WRONGTYPE" | "KVTIERDATA" => Verdict::Never(
                server.refused(format!("another program's data lies under our prefix ({error}): change it")),
            ),
            "KVTIERFORMAT" => Verdict::Never(
                server.refused(format!("data of another version lies under our prefix ({details}): change it")),
            ),
            _ if says(error, "OOM") => Verdict::Never(server.full(error.to_string())),
            _ => Verdict::Never(server.refused(error.to_string())),
        }
    }

    /// Asks for the map of slots, until one server answers. Without an answer the old map stays, if there is one.
    async fn ask_map(&self, deadline: Instant) -> Result<(), DirectoryError> {
        let turn = timeout_at(deadline, self.asking.lock()).await;
        let Ok(_turn) = turn else { return Err(self.away("still asking who has which slot")) };
        if !self.stale.load(Ordering::Acquire) {
            return Ok(());
        }
        let candidates: Vec<_> = {
            let known = self.known.lock();
            let of_map = known.map.values().map(|(_, server)| Arc::clone(server));
            of_map.chain(known.servers.values().cloned()).collect()
        };
        let mut question = Pipeline::new();
        question.add_command(slots_command());
        let mut error = None;
        for server in candidates {
            let until = deadline.min(Instant::now() + ASK_MAP);
            match server.exchange(&question, until).await.map(|mut answer| answer.pop()) {
                Ok(Some(Value::ServerError(said))) => error = Some(server.refused(said.to_string())),
                Ok(answer) => match answer.and_then(|a| slots::parse(&a, &server.address)) {
                    Some(ranges) => {
                        self.take_map(ranges);
                        return Ok(());
                    }
                    None => error = Some(server.away("it knows of no slots")),
                },
                Err(e) => error = Some(e),
            }
            if Instant::now() >= deadline {
                break;
            }
        }
        if self.known.lock().map.is_empty() {
            return Err(error.unwrap_or_else(|| self.away("there is no server")));
        }
        Ok(())
    }

    fn take_map(&self, ranges: Vec<slots::Range>) {
        let map: BTreeMap<_, _> =
            ranges.into_iter().map(|(first, last, master)| (first, (last, self.server(&master)))).collect();
        let mut known = self.known.lock();
        let mut keep: Vec<_> = map.values().map(|(_, server)| server.address.clone()).collect();
        keep.extend(self.place.seeds.iter().cloned());
        keep.sort_unstable();
        keep.dedup();
        known.servers.retain(|address, _| keep.binary_search(address).is_ok());
        known.map = map;
        self.stale.store(false, Ordering::Release);
    }
}

fn slots_command() -> Cmd {
    let mut command = cmd("CLUSTER");
    command.arg("SLOTS");
    command
}
