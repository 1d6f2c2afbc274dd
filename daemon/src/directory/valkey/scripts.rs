//! The scripts that run in the server.

use redis::{Cmd, Pipeline, Script, cmd};

/// All of them; every connection loads them before it is used.
#[derive(Debug)]
pub(super) struct Scripts {
    pub(super) apply: Code,
    pub(super) reap: Code,
    pub(super) heartbeat: Code,
    pub(super) leave: Code,
}

/// One script: its text and the name the server knows it by.
#[derive(Debug)]
pub(super) struct Code {
    text: &'static str,
    hash: String,
}

impl Code {
    fn new(text: &'static str) -> Self {
        Self { text, hash: Script::new(text).get_hash().to_owned() }
    }

    /// Runs it over one key; arguments are to be added.
    pub(super) fn run(&self, key: &str) -> Cmd {
        let mut command = cmd("EVALSHA");
        command.arg(&self.hash).arg(1).arg(key);
        command
    }
}

impl Scripts {
    pub(super) fn new() -> Self {
        Self {
            apply: Code::new(include_str!("apply.lua")),
            reap: Code::new(include_str!("reap.lua")),
            heartbeat: Code::new(include_str!("heartbeat.lua")),
            leave: Code::new(include_str!("leave.lua")),
        }
    }

    /// Commands that load them.
    pub(super) fn load(&self) -> Pipeline {
        let mut load = Pipeline::new();
        for code in [&self.apply, &self.reap, &self.heartbeat, &self.leave] {
            load.cmd("SCRIPT").arg("LOAD").arg(code.text);
        }
        load
    }
}
