//! The terminal of the live view: taken as a whole, and given back as it was.
//!
//! *Invariants*: the terminal is given back however the view ends: by a key, an error, a panic, Ctrl-C, SIGTERM, SIGHUP or
//! SIGQUIT, and for as long as it is suspended by Ctrl-Z.

use std::io::{self, IsTerminal, Stdin, Write};
use std::sync::Once;
use std::time::Duration;

use rustix::process::{Signal as Kind, getpid, kill_process};
use rustix::termios::{LocalModes, OptionalActions, SpecialCodeIndex, Termios, tcgetattr, tcgetwinsize, tcsetattr};
use tokio::signal::unix::{Signal, SignalKind, signal};

/// The other screen, without a cursor.
const ENTER: &str = "\x1b[?1049h\x1b[?25l";
/// The screen as it was, with its cursor.
const LEAVE: &str = "\x1b[?25h\x1b[?1049l";
/// How often keys are looked for: they wait unnoticed that long.
const KEYS_EVERY: Duration = Duration::from_millis(50);
/// A terminal that does not tell its size.
const USUAL_SIZE: Size = Size { rows: 24, columns: 80 };

/// Rows and columns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Size {
    pub(super) rows: usize,
    pub(super) columns: usize,
}

/// What happened at the terminal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Event {
    Quit,
    /// Somebody wants to see news now.
    Look,
    /// The size is another.
    Redraw,
    Suspend,
}

/// The terminal while the view has it.
#[derive(Debug)]
pub(super) struct Screen {
    /// Keys, and how the terminal was; nothing where standard input is no terminal.
    keys: Option<(Stdin, Termios)>,
    ends: [Signal; 4],
    resized: Signal,
    suspended: Signal,
}

impl Screen {
    /// Takes the terminal.
    pub(super) fn open() -> io::Result<Self> {
        let stdin = io::stdin();
        let keys = if stdin.is_terminal() {
            let modes = tcgetattr(&stdin)?;
            Some((stdin, modes))
        } else {
            None
        };
        let ends = [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup(), SignalKind::quit()];
        let [interrupt, terminate, hangup, quit] = ends;
        let ends = [signal(interrupt)?, signal(terminate)?, signal(hangup)?, signal(quit)?];
        let resized = signal(SignalKind::window_change())?;
        let suspended = signal(SignalKind::from_raw(Kind::TSTP.as_raw()))?;
        say_panics_on_the_first_screen();
        // From here on it is given back when it is dropped, even when taking it fails half-way.
        let screen = Self { keys, ends, resized, suspended };
        screen.take()?;
        Ok(screen)
    }

    fn take(&self) -> io::Result<()> {
        if let Some((stdin, modes)) = &self.keys {
            let mut raw = modes.clone();
            raw.local_modes.remove(LocalModes::ICANON | LocalModes::ECHO);
            // A read gives what there is, so that it never waits.
            raw.special_codes[SpecialCodeIndex::VMIN] = 0;
            raw.special_codes[SpecialCodeIndex::VTIME] = 0;
            tcsetattr(stdin, OptionalActions::Now, &raw)?;
        }
        write(ENTER)
    }

    fn give_back(&self) {
        // A terminal that is gone needs nothing.
        write(LEAVE).ok();
        if let Some((stdin, modes)) = &self.keys {
            tcsetattr(stdin, OptionalActions::Flush, modes).ok();
        }
    }

    /// Its size.
    pub(super) fn size(&self) -> Size {
        match tcgetwinsize(io::stdout()) {
            Ok(size) if size.ws_row > 0 && size.ws_col > 0 => {
                Size { rows: size.ws_row.into(), columns: size.ws_col.into() }
            }
            _ => USUAL_SIZE,
        }
    }

    /// Shows lines in place of what was there; they fit the terminal.
    pub(super) fn draw(&self, lines: &[String]) -> io::Result<()> {
        write(&format!("\x1b[H{}\x1b[K\x1b[J", lines.join("\x1b[K\n")))
    }

    /// Gives the terminal back and stops, as Ctrl-Z asks for; takes it again once somebody lets it go on.
    pub(super) fn suspend(&self) -> io::Result<()> {
        self.give_back();
        kill_process(getpid(), Kind::STOP)?;
        self.take()
    }

    /// Waits for a key or a signal. May be dropped at any time.
    pub(super) async fn event(&mut self) -> Event {
        let Self { keys, ends: [interrupt, terminate, hangup, quit], resized, suspended } = self;
        tokio::select! {
            _ = interrupt.recv() => Event::Quit,
            _ = terminate.recv() => Event::Quit,
            _ = hangup.recv() => Event::Quit,
            _ = quit.recv() => Event::Quit,
            _ = resized.recv() => Event::Redraw,
            _ = suspended.recv() => Event::Suspend,
            event = key(keys.as_ref().map(|(stdin, _)| stdin)) => event,
        }
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        self.give_back();
    }
}

/// The next key that means something; never without a keyboard.
async fn key(stdin: Option<&Stdin>) -> Event {
    let Some(stdin) = stdin else { return std::future::pending().await };
    loop {
        let mut typed = [0u8; 16];
        // A keyboard that is gone has no keys.
        let count = rustix::io::read(stdin, &mut typed).unwrap_or(0);
        if let Some(event) = typed.iter().take(count).find_map(meaning) {
            return event;
        }
        tokio::time::sleep(KEYS_EVERY).await;
    }
}

const fn meaning(key: &u8) -> Option<Event> {
    match key {
        b'q' | b'Q' => Some(Event::Quit),
        b' ' | b'\n' | b'\r' => Some(Event::Look),
        _ => None,
    }
}

fn write(text: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()
}

/// A panic's message would go with the other screen.
fn say_panics_on_the_first_screen() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let say = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            write(LEAVE).ok();
            say(panic);
        }));
    });
}
