//! `kvtier nodes`: who is in the cluster.

use kvtier_proto::v1;
use serde::Serialize;

use crate::report::Report;
use crate::table::{Align, Table, printable};
use crate::units::bytes_text;

#[derive(Debug, Serialize)]
struct Cluster {
    directory: String,
    directory_state: String,
    unpublished: u64,
    nodes: Vec<Node>,
}

#[derive(Debug, Serialize)]
struct Node {
    node_id: String,
    state: String,
    incarnation: u64,
    peer: String,
    free_host_bytes: u64,
    this: bool,
    transport: String,
    read_bytes: u64,
}

impl From<&v1::NodeInfo> for Node {
    fn from(n: &v1::NodeInfo) -> Self {
        Self {
            node_id: n.node_id.clone(),
            state: n.state.clone(),
            incarnation: n.incarnation,
            peer: n.peer.clone(),
            free_host_bytes: n.free_host_bytes,
            this: n.this,
            transport: n.transport.clone(),
            read_bytes: n.read_bytes,
        }
    }
}

/// The report of an answer; complete when the directory answers.
#[must_use]
pub fn report(reply: &v1::NodesReply) -> Report {
    let cluster = Cluster {
        directory: reply.directory.clone(),
        directory_state: reply.directory_state.clone(),
        unpublished: reply.unpublished,
        nodes: reply.nodes.iter().map(Node::from).collect(),
    };
    Report::new(text(&cluster), &cluster, cluster.directory_state == "ok")
}

fn text(cluster: &Cluster) -> String {
    let head = format!(
        "directory {}: {}; {} changes not published yet\n",
        printable(&cluster.directory),
        printable(&cluster.directory_state),
        cluster.unpublished
    );
    if cluster.nodes.is_empty() {
        return format!("{head}this node is alone: set cluster.directory to join others\n");
    }
    let mut table = Table::new(&[
        ("NODE", Align::Left),
        ("STATE", Align::Left),
        ("START", Align::Right),
        ("PEER ADDRESS", Align::Left),
        ("FREE MEMORY", Align::Right),
        ("READ BY", Align::Left),
        ("READ", Align::Right),
    ]);
    for n in &cluster.nodes {
        let name = if n.this { format!("{} (this)", n.node_id) } else { n.node_id.clone() };
        table.row([
            &name,
            &n.state,
            &n.incarnation.to_string(),
            &n.peer,
            &bytes_text(n.free_host_bytes),
            &n.transport,
            &bytes_text(n.read_bytes),
        ]);
    }
    format!("{head}{}", table.render(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_that_is_away_is_said_and_counts_as_failure() {
        let node = v1::NodeInfo { node_id: "a".into(), this: true, state: "ready".into(), ..Default::default() };
        let mut reply = v1::NodesReply {
            directory: "redis://h:1".into(),
            directory_state: "away for 3 s: refused".into(),
            nodes: vec![node],
            unpublished: 7,
        };
        let report_away = report(&reply);
        assert!(
            report_away.text.contains("away for 3 s") && report_away.text.contains("a (this)"),
            "{}",
            report_away.text
        );
        assert!(!report_away.complete);
        reply.directory_state = "ok".into();
        assert!(report(&reply).complete);
    }
}
