//! Listening sockets that a supervisor holds and hands to the agent, so that an agent can be replaced
//! without a refused connection: while one stops, the next accepts from the same socket, and what waits
//! in its queue waits on.
//!
//! The protocol is that of sd_listen_fds(3): descriptors from 3 on, `LISTEN_FDS` with their number,
//! `LISTEN_PID` with the process that they are for, and `LISTEN_FDNAMES` with their names, which are
//! `listen` (where clients are accepted) and `admin`. Without names, the first is `listen` and the second
//! `admin`. Sockets that are not handed over are opened as the flags say.
//!
//! Both agents run for a while, so each needs an `--instance` of its own and its own address of the admin
//! server, unless that is handed over too.

use std::{env, fmt, net::TcpListener, process};

use listenfd::ListenFd;
use rustix::net::sockopt;

/// What a supervisor handed over.
#[derive(Debug, Default)]
pub struct Inherited {
    /// Where clients are accepted.
    pub listen: Option<TcpListener>,
    /// Where the admin server is.
    pub admin: Option<TcpListener>,
}

/// What a socket is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    Listen,
    Admin,
}

/// What the environment says.
#[derive(Debug, Clone, Copy, Default)]
struct Announced<'a> {
    process: Option<&'a str>,
    count: Option<&'a str>,
    names: Option<&'a str>,
}

// === impl Inherited ===

impl Inherited {
    /// Takes the sockets, if there are any. To be called once, and before anything else opens files or
    /// starts threads: the descriptors belong to nobody until then, and the environment is changed, so
    /// that no child takes them for its own. An error says what the supervisor did wrong.
    pub fn take() -> Result<Self, String> {
        let [process, count, names] =
            ["LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"].map(|name| env::var(name).ok());
        let announced = Announced {
            process: process.as_deref(),
            count: count.as_deref(),
            names: names.as_deref(),
        };
        let roles = announced.roles(process::id())?;
        let mut inherited = Self::default();
        if roles.is_empty() {
            return Ok(inherited);
        }
        let mut sockets = ListenFd::from_env();
        for (index, role) in roles.into_iter().enumerate() {
            let listener = listener(&mut sockets, index)
                .map_err(|why| format!("the inherited socket {role} cannot be used: {why}"))?;
            match role {
                Role::Listen => inherited.listen = Some(listener),
                Role::Admin => inherited.admin = Some(listener),
            }
        }
        Ok(inherited)
    }
}

/// A socket that accepts connections.
fn listener(sockets: &mut ListenFd, index: usize) -> Result<TcpListener, String> {
    let taken = sockets.take_tcp_listener(index);
    let taken = taken.map_err(|error| format!("{error}; hand over a listening TCP socket"))?;
    let listener = taken.ok_or("there are fewer than LISTEN_FDS says")?;
    let is_listening = sockopt::socket_acceptconn(&listener).map_err(|errno| errno.to_string())?;
    if !is_listening {
        return Err("it does not listen; let the supervisor call listen(2) first".to_owned());
    }
    let prepared = listener.set_nonblocking(true);
    prepared.map_err(|error| error.to_string())?;
    Ok(listener)
}

// === impl Announced ===

impl Announced<'_> {
    /// What each socket is for; none where they are another process', which gave its environment on.
    fn roles(&self, own: u32) -> Result<Vec<Role>, String> {
        let for_us = self.process.and_then(|process| process.parse().ok()) == Some(own);
        let Some(count) = self.count.filter(|_| for_us) else {
            return Ok(Vec::new());
        };
        let count: usize = count
            .parse()
            .map_err(|_| format!("LISTEN_FDS is {count:?}: give the number of inherited sockets"))?;
        let roles = match self.names.filter(|names| !names.is_empty()) {
            Some(names) => names.split(':').map(Role::named).collect::<Result<_, _>>()?,
            None => [Role::Listen, Role::Admin].into_iter().take(count).collect(),
        };
        check(roles, count)
    }
}

fn check(roles: Vec<Role>, count: usize) -> Result<Vec<Role>, String> {
    if count > 2 {
        return Err(format!(
            "{count} sockets are inherited, and the agent has two: hand over listen and admin"
        ));
    }
    if roles.len() != count {
        let names = roles.len();
        return Err(format!(
            "LISTEN_FDNAMES has {names} names for {count} inherited sockets: give each one"
        ));
    }
    if let [one, other] = roles[..]
        && one == other
    {
        return Err(format!(
            "two inherited sockets are called {one}: call one listen and the other admin"
        ));
    }
    Ok(roles)
}

// === impl Role ===

impl Role {
    fn named(name: &str) -> Result<Self, String> {
        match name {
            "listen" => Ok(Self::Listen),
            "admin" => Ok(Self::Admin),
            // Without a name of its own, a socket has that of its unit.
            _ => Err(format!(
                "an inherited socket is called {name:?}: call it listen or admin (in a socket unit, with \
                 FileDescriptorName=)"
            )),
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Listen => "listen",
            Self::Admin => "admin",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWN: u32 = 41;

    fn roles(process: &str, count: &str, names: Option<&str>) -> Result<Vec<Role>, String> {
        let announced = Announced {
            process: Some(process),
            count: Some(count),
            names,
        };
        announced.roles(OWN)
    }

    #[test]
    fn sockets_have_names_or_an_order() {
        use Role::{Admin, Listen};
        for (count, names, expected) in [
            ("0", None, vec![]),
            ("1", None, vec![Listen]),
            ("2", None, vec![Listen, Admin]),
            ("1", Some(""), vec![Listen]),
            ("1", Some("admin"), vec![Admin]),
            ("2", Some("admin:listen"), vec![Admin, Listen]),
        ] {
            assert_eq!(roles("41", count, names).unwrap(), expected, "{count} {names:?}");
        }
    }

    #[test]
    fn sockets_of_another_process_are_left_alone() {
        for process in ["42", "", "all"] {
            assert!(roles(process, "nonsense", Some("x")).unwrap().is_empty());
        }
        assert!(Announced::default().roles(OWN).unwrap().is_empty());
        let without_process = Announced {
            count: Some("1"),
            ..Announced::default()
        };
        assert!(without_process.roles(OWN).unwrap().is_empty());
    }

    #[test]
    fn errors_say_what_to_do() {
        for (count, names, expected) in [
            ("many", None, "LISTEN_FDS is \"many\": give the number"),
            ("-1", None, "give the number"),
            ("3", None, "3 sockets are inherited"),
            ("4294967295", None, "4294967295 sockets are inherited"),
            ("1", Some("agent.socket"), "call it listen or admin"),
            ("1", Some("listen:admin"), "2 names for 1 inherited"),
            ("2", Some("listen"), "1 names for 2 inherited"),
            ("2", Some("admin:admin"), "two inherited sockets are called admin"),
        ] {
            let error = roles("41", count, names).unwrap_err();
            assert!(error.contains(expected), "{error}");
        }
    }
}
