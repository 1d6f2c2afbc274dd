//! One server's connection: made when it is needed, dropped when it fails, not tried again before a pause.
//!
//! A server that is alone and says that it is a replica fails like one that says nothing: the name it was found by may
//! lead to another by now, and the next attempt resolves it again.
//!
//! *Bounds*: one connection and one attempt at a time; during the pause after a failure every call fails at once, so
//! that calls never pile up before a server that is away.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use redis::aio::MultiplexedConnection;
use redis::io::tcp::TcpSettings;
use redis::{
    AsyncConnectionConfig, Client, ConnectionAddr, IntoConnectionInfo, Pipeline, RedisError, ServerError, Value,
};
use tokio::time::{Instant, timeout_at};

use super::place::Address;
use super::scripts::Scripts;
use crate::directory::DirectoryError;

/// First pause after a failure; doubled by each further one.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
/// Longest pause.
const LONGEST_PAUSE: Duration = Duration::from_secs(2);

/// How to log in.
#[derive(Clone, Default)]
pub(super) struct Login {
    pub(super) user: Option<String>,
    pub(super) password: Option<String>,
}

impl std::fmt::Debug for Login {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Login").field("user", &self.user).finish_non_exhaustive()
    }
}

/// A server.
#[derive(Debug)]
pub(super) struct Server {
    pub(super) address: Address,
    login: Login,
    scripts: Arc<Scripts>,
    /// Whether it is none of a cluster, whose map says who is a master.
    alone: bool,
    state: Mutex<State>,
    /// Held by whoever connects.
    connecting: tokio::sync::Mutex<()>,
}

#[derive(Debug, Default)]
struct State {
    /// Connections made so far: the number of the present one.
    made: u64,
    connection: Option<MultiplexedConnection>,
    failures: u32,
    pause_until: Option<Instant>,
    reason: String,
}

impl Server {
    pub(super) fn new(address: Address, login: Login, scripts: Arc<Scripts>, alone: bool) -> Self {
        Self { address, login, scripts, alone, state: Mutex::default(), connecting: tokio::sync::Mutex::default() }
    }

    /// Sends commands and returns their answers, errors of single commands among them.
    pub(super) async fn exchange(&self, commands: &Pipeline, deadline: Instant) -> Result<Vec<Value>, DirectoryError> {
        let (number, mut connection) = self.connection(deadline).await?;
        let count = commands.len();
        let reason = match timeout_at(deadline, connection.send_packed_commands(commands, 0, count)).await {
            Ok(Ok(values)) if values.len() == count => match self.no_longer_master(&values) {
                None => return Ok(values),
                Some(reason) => reason,
            },
            Ok(Ok(values)) => format!("{} answers to {count} commands", values.len()),
            Ok(Err(error)) => error.to_string(),
            Err(_) => "no answer in time".to_owned(),
        };
        self.failed(number, &reason);
        Err(self.away(reason))
    }

    /// What a server that is alone says where it became a replica.
    fn no_longer_master(&self, values: &[Value]) -> Option<String> {
        let said = |value: &Value| match value {
            Value::ServerError(error) if says(error, "READONLY") || says(error, "MASTERDOWN") => {
                Some(format!("it is a replica ({error})"))
            }
            _ => None,
        };
        if self.alone { values.iter().find_map(said) } else { None }
    }

    /// Forgets the connection, so that the next one loads the scripts again.
    pub(super) fn renew(&self) {
        self.state.lock().connection = None;
    }

    pub(super) fn away(&self, reason: impl Into<String>) -> DirectoryError {
        DirectoryError::Away { place: self.address.to_string(), reason: reason.into() }
    }

    pub(super) fn refused(&self, reason: impl Into<String>) -> DirectoryError {
        DirectoryError::Refused { place: self.address.to_string(), reason: reason.into() }
    }

    pub(super) fn full(&self, reason: impl Into<String>) -> DirectoryError {
        DirectoryError::Full { place: self.address.to_string(), reason: reason.into() }
    }

    async fn connection(&self, deadline: Instant) -> Result<(u64, MultiplexedConnection), DirectoryError> {
        if let Some(present) = self.present()? {
            return Ok(present);
        }
        let waited = timeout_at(deadline, self.connecting.lock()).await;
        let Ok(_turn) = waited else { return Err(self.away("still connecting")) };
        if let Some(present) = self.present()? {
            return Ok(present);
        }
        let made = match timeout_at(deadline, self.connect()).await {
            Ok(Ok(connection)) => Ok(connection),
            Ok(Err(error)) if denied(&error) => Err(self.refused(format!("{error}: check user and password"))),
            Ok(Err(error)) => Err(self.away(error.to_string())),
            Err(_) => Err(self.away("no connection in time")),
        };
        let mut state = self.state.lock();
        match made {
            Ok(connection) => {
                state.made += 1;
                state.connection = Some(connection.clone());
                Ok((state.made, connection))
            }
            Err(error) => {
                state.pause(&error.to_string());
                Err(error)
            }
        }
    }

    /// The connection there is, `None` where one may be made now.
    fn present(&self) -> Result<Option<(u64, MultiplexedConnection)>, DirectoryError> {
        let state = self.state.lock();
        if let Some(connection) = &state.connection {
            return Ok(Some((state.made, connection.clone())));
        }
        match state.pause_until {
            Some(until) if until > Instant::now() => Err(self.away(format!("{} (not tried again yet)", state.reason))),
            _ => Ok(None),
        }
    }

    async fn connect(&self) -> Result<MultiplexedConnection, RedisError> {
        let address = ConnectionAddr::Tcp(self.address.host.clone(), self.address.port);
        let info = address.into_connection_info()?;
        let mut login = info.redis_settings().clone().set_skip_set_lib_name();
        if let Some(user) = &self.login.user {
            login = login.set_username(user);
        }
        if let Some(password) = &self.login.password {
            login = login.set_password(password);
        }
        let info = info.set_redis_settings(login).set_tcp_settings(TcpSettings::default().set_nodelay(true));
        // Deadlines are the callers': they differ by call.
        let config = AsyncConnectionConfig::new().set_connection_timeout(None).set_response_timeout(None);
        let mut connection = Client::open(info)?.get_multiplexed_async_connection_with_config(&config).await?;
        let load = self.scripts.load();
        for value in connection.send_packed_commands(&load, 0, load.len()).await? {
            value.extract_error()?;
        }
        self.state.lock().failures = 0;
        Ok(connection)
    }

    /// Takes note that connection `number` failed.
    fn failed(&self, number: u64, reason: &str) {
        let mut state = self.state.lock();
        if state.made == number && state.connection.take().is_some() {
            state.pause(reason);
        }
    }
}

impl State {
    fn pause(&mut self, reason: &str) {
        let pause = FIRST_PAUSE.saturating_mul(1 << self.failures.min(16)).min(LONGEST_PAUSE);
        self.failures += 1;
        self.pause_until = Some(Instant::now() + pause);
        reason.clone_into(&mut self.reason);
    }
}

/// Whether an error has this code, or tells of one that has: servers before version 7 put what a script met into the
/// text of a general error.
pub(super) fn says(error: &ServerError, code: &str) -> bool {
    let tells = |details: &str| details.split(|c: char| !c.is_ascii_alphanumeric()).any(|word| word == code);
    error.code() == code || (error.code() == "ERR" && error.details().is_some_and(tells))
}

/// Whether the server answered, and will have nothing to do with us.
fn denied(error: &RedisError) -> bool {
    error.kind() == redis::ErrorKind::AuthenticationFailed
        || matches!(error.code(), Some("NOAUTH" | "WRONGPASS" | "NOPERM"))
}

#[cfg(test)]
mod tests {
    use redis::{ServerError, Value, parse_redis_value};

    use super::says;

    fn error(line: &str) -> ServerError {
        match parse_redis_value(format!("-{line}\r\n").as_bytes()) {
            Ok(Value::ServerError(error)) => error,
            other => panic!("no error: {other:?}"),
        }
    }

    #[test]
    fn what_a_script_met_is_read_from_errors_of_old_and_new_servers() {
        let of_old = |said: &str| error(&format!("ERR Error running script (call to f_0a): @user_script:5: -{said}"));
        for (code, said) in [
            ("OOM", "OOM command not allowed when used memory > 'maxmemory'."),
            ("READONLY", "READONLY You can't write against a read only replica."),
            ("MASTERDOWN", "MASTERDOWN Link with MASTER is down and replica-serve-stale-data is set to 'no'."),
        ] {
            assert!(says(&error(said), code), "{said}");
            assert!(says(&error(&format!("{said} script: 0a, on @user_script:5.")), code), "{said}");
            assert!(says(&of_old(said), code), "{said}");
            assert!(!says(&error(&format!("OTHER {said}")), code), "{said}");
        }
        assert!(!says(&error("ERR wrong number of arguments"), "OOM"));
    }
}
