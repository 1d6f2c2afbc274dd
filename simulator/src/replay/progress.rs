//! A progress bar on standard error, where that is a terminal.

use std::io::{IsTerminal, Write};

/// Characters of the bar.
const WIDTH: usize = 30;

/// How far a replay is.
#[derive(Debug)]
pub(crate) struct Progress {
    shown: bool,
    what: String,
    /// Which of how many runs.
    part: String,
    done: usize,
    all: usize,
    percent: usize,
}

impl Progress {
    pub(crate) fn new(all: usize) -> Self {
        Self {
            shown: std::io::stderr().is_terminal(),
            what: String::new(),
            part: String::new(),
            done: 0,
            all: all.max(1),
            percent: 0,
        }
    }

    /// Says which of several runs comes.
    pub(crate) fn part(&mut self, at: usize, of: usize) {
        self.part = format!("{}/{of} ", at + 1);
    }

    /// Begins anew, with so much to do.
    pub(crate) fn restart(&mut self, all: usize) {
        (self.done, self.all, self.percent) = (0, all.max(1), 0);
    }

    /// Says what is replayed now.
    pub(crate) fn what(&mut self, policy: &str, capacity: usize) {
        self.what = if capacity > 0 { format!("{policy} {capacity}") } else { policy.to_owned() };
        self.draw();
    }

    pub(crate) fn step(&mut self) {
        self.done += 1;
        let percent = self.done * 100 / self.all;
        if percent != self.percent {
            self.percent = percent;
            self.draw();
        }
    }

    fn draw(&self) {
        if self.shown {
            let full = self.percent * WIDTH / 100;
            let bar = format!("{}{}", "#".repeat(full), ".".repeat(WIDTH - full));
            // A terminal that is gone is no reason to stop.
            drop(write!(std::io::stderr(), "\r[{bar}] {:>3} % {}{:<32}", self.percent, self.part, self.what));
        }
    }

    pub(crate) fn end(&self) {
        if self.shown {
            drop(write!(std::io::stderr(), "\r{:<76}\r", ""));
        }
    }
}
