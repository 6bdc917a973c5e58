//! The ports of a pod: which is the application's, and what must change so that the agent takes its name over.
//!
//! A Service finds its target by the name of a port. The agent's port takes that name, and the application's gets
//! another, so the Service and everybody who asks it stay as they are. What the application's own container says
//! about the port by name (probes, hooks) gets the number, and so goes straight to the application.

use serde_json::{Value, json};

use super::{ADMIN_PORT_NAME, AGENT, APP_PORT_NAME, Refusal, Settings, patch::Operation, shown};

/// Most ports that a refusal lists.
const MAX_LISTED: usize = 8;

/// What can speak of a port by its name, within a container.
const HOLDERS: [&str; 5] = [
    "livenessProbe",
    "readinessProbe",
    "startupProbe",
    "lifecycle/postStart",
    "lifecycle/preStop",
];

/// A container, and where it is.
#[derive(Debug, Clone, Copy)]
pub(super) struct Container<'p> {
    list: &'static str,
    index: usize,
    name: &'p str,
    value: &'p Value,
    /// Whether it runs as long as the application does.
    stays: bool,
}

/// A port that a container declares.
#[derive(Debug, Clone, Copy)]
struct Port<'p> {
    container: Container<'p>,
    index: usize,
    name: Option<&'p str>,
    number: u16,
    protocol: &'p str,
    has_host_port: bool,
}

/// The application's port, which has a name that the agent can take.
#[derive(Debug, Clone, Copy)]
pub(super) struct AppPort<'p> {
    container: Container<'p>,
    index: usize,
    pub(super) name: &'p str,
    pub(super) number: u16,
}

/// All containers of a pod.
pub(super) fn containers(spec: &Value) -> Result<Vec<Container<'_>>, Refusal> {
    let mut all = Vec::new();
    for list in ["containers", "initContainers"] {
        for (index, value) in list_of(spec, list, "the pod's spec")?.iter().enumerate() {
            let name = value.get("name").and_then(Value::as_str);
            let name = name.ok_or_else(|| Refusal::malformed(format!("{list}[{index}] has no name")))?;
            let is_sidecar = value.get("restartPolicy").and_then(Value::as_str) == Some("Always");
            all.push(Container {
                list,
                index,
                name,
                value,
                stays: list == "containers" || is_sidecar,
            });
        }
    }
    if all.iter().all(|container| container.list != "containers") {
        return Err(Refusal::malformed("the pod has no containers"));
    }
    Ok(all)
}

/// The application's port: the one that is `wanted` by name or number, or the only one.
pub(super) fn choose<'p>(
    containers: &[Container<'p>],
    wanted: Option<&str>,
    settings: &Settings,
) -> Result<AppPort<'p>, Refusal> {
    let mut ports = Vec::new();
    for container in containers {
        container.add_ports(&mut ports)?;
    }
    let port = match wanted {
        Some(wanted) => find(&ports, wanted)?,
        None => only_one(&ports)?,
    };
    if port.has_host_port {
        return Err(Refusal::HostPort(port.number));
    }
    let name = port.name.ok_or(Refusal::UnnamedPort(port.number))?;
    // A Service looks for the name together with its protocol.
    let mut others = staying(&ports).filter(|other| other.is_tcp() && !other.is(&port));
    if let Some(other) = others.find(|other| other.name == Some(name)) {
        return Err(other.conflict("is there more than once; give each port a name of its own"));
    }
    check_agents_own(&ports, settings)?;
    Ok(AppPort {
        container: port.container,
        index: port.index,
        name,
        number: port.number,
    })
}

/// The port with this name or number.
fn find<'p>(ports: &[Port<'p>], wanted: &str) -> Result<Port<'p>, Refusal> {
    let number = wanted.parse::<u16>().ok();
    let is_wanted = |port: &&Port<'_>| match number {
        Some(number) => port.number == number,
        None => port.name == Some(wanted),
    };
    let found: Vec<Port<'p>> = staying(ports).filter(is_wanted).copied().collect();
    match (one_of_tcp(&found)?, number) {
        (Some(port), _) => Ok(port),
        (None, None) => match found.get(1) {
            Some(second) => {
                Err(second.conflict("is there more than once; say the port's number, or rename one"))
            }
            None => Err(Refusal::NoSuchPort(wanted.to_owned())),
        },
        (None, Some(_)) if found.is_empty() => Err(Refusal::NoSuchPort(wanted.to_owned())),
        (None, Some(_)) => Err(Refusal::AmbiguousPort(list(&found))),
    }
}

/// The only port that can be meant where nobody said which.
fn only_one<'p>(ports: &[Port<'p>]) -> Result<Port<'p>, Refusal> {
    let own: Vec<Port<'p>> = staying(ports)
        .filter(|port| port.container.list == "containers")
        .copied()
        .collect();
    match one_of_tcp(&own)? {
        Some(port) => Ok(port),
        None if own.is_empty() => Err(Refusal::NoPort),
        None => Err(Refusal::AmbiguousPort(list(&own))),
    }
}

/// The one TCP port among these, none if there are more or there is no port at all.
fn one_of_tcp<'p>(ports: &[Port<'p>]) -> Result<Option<Port<'p>>, Refusal> {
    let mut tcp = ports.iter().filter(|port| port.is_tcp());
    match (tcp.next(), tcp.next(), ports.first()) {
        (Some(port), None, _) => Ok(Some(*port)),
        (None, _, Some(other)) => Err(Refusal::NotTcp {
            number: other.number,
            protocol: other.protocol.to_owned(),
        }),
        _ => Ok(None),
    }
}

/// The agent's ports and the names that it needs must be free.
fn check_agents_own(ports: &[Port<'_>], settings: &Settings) -> Result<(), Refusal> {
    for port in ports {
        if port.is_tcp() && [settings.listen_port, settings.admin_port].contains(&port.number) {
            return Err(Refusal::ReservedPort {
                number: port.number,
                container: port.container.name.to_owned(),
            });
        }
        if matches!(port.name, Some(APP_PORT_NAME | ADMIN_PORT_NAME)) {
            return Err(port.conflict("is kept for what is injected; choose another"));
        }
    }
    Ok(())
}

fn staying<'a, 'p>(ports: &'a [Port<'p>]) -> impl Iterator<Item = &'a Port<'p>> {
    ports.iter().filter(|port| port.container.stays)
}

fn list(ports: &[Port<'_>]) -> String {
    let tcp = ports.iter().filter(|port| port.is_tcp());
    let texts = tcp.take(MAX_LISTED).map(|port| match port.name {
        Some(name) => format!("{} ({})", shown(name), port.number),
        None => port.number.to_string(),
    });
    texts.collect::<Vec<_>>().join(", ")
}

/// The list with this name; absent and null are empty.
fn list_of<'p>(value: &'p Value, name: &str, place: &str) -> Result<&'p [Value], Refusal> {
    match value.get(name) {
        None | Some(Value::Null) => Ok(&[]),
        Some(Value::Array(list)) => Ok(list),
        Some(_) => Err(Refusal::malformed(format!("{name} of {place} is no list"))),
    }
}

// === impl Container ===

impl<'p> Container<'p> {
    pub(super) fn is_agent(&self) -> bool {
        self.name == AGENT
    }

    /// Whether it asks for some of `cpu` or `memory`. Where it has a limit alone, API servers take that.
    pub(super) fn asks_for(&self, resource: &str) -> bool {
        ["requests", "limits"].iter().any(|group| {
            let amounts = self.value.get("resources").and_then(|all| all.get(group));
            amounts.is_some_and(|amounts| amounts.get(resource).is_some())
        })
    }

    fn add_ports(&self, ports: &mut Vec<Port<'p>>) -> Result<(), Refusal> {
        let place = || format!("the container {}", shown(self.name));
        for (index, port) in list_of(self.value, "ports", &place())?.iter().enumerate() {
            let bad = |what: &str| Refusal::malformed(format!("ports[{index}] of {} {what}", place()));
            let number = port.get("containerPort").and_then(Value::as_u64);
            let number = number.and_then(|number| u16::try_from(number).ok());
            let number = number
                .filter(|number| *number > 0)
                .ok_or_else(|| bad("has no containerPort from 1 to 65535"))?;
            let text = |key: &str| match port.get(key) {
                None | Some(Value::Null) => Ok(None),
                Some(Value::String(text)) => Ok(Some(text.as_str()).filter(|text| !text.is_empty())),
                Some(_) => Err(bad(&format!("has a {key} that is not text"))),
            };
            ports.push(Port {
                container: *self,
                index,
                name: text("name")?,
                number,
                protocol: text("protocol")?.unwrap_or("TCP"),
                has_host_port: port
                    .get("hostPort")
                    .is_some_and(|port| !port.is_null() && *port != 0),
            });
        }
        Ok(())
    }
}

// === impl Port ===

impl Port<'_> {
    fn is_tcp(&self) -> bool {
        self.protocol == "TCP"
    }

    fn is(&self, other: &Self) -> bool {
        (self.container.list, self.container.index, self.index)
            == (other.container.list, other.container.index, other.index)
    }

    fn conflict(&self, why: &'static str) -> Refusal {
        Refusal::PortName {
            name: self.name.unwrap_or_default().to_owned(),
            container: self.container.name.to_owned(),
            why,
        }
    }
}

// === impl AppPort ===

impl AppPort<'_> {
    /// Gives the port its other name, and those who ask for it by name its number.
    pub(super) fn rename(&self, patch: &mut Vec<Operation>) {
        let container = format!("/spec/{}/{}", self.container.list, self.container.index);
        let path = format!("{container}/ports/{}/name", self.index);
        patch.push(Operation::replace(path, json!(APP_PORT_NAME)));
        for holder in HOLDERS {
            for action in ["httpGet", "tcpSocket"] {
                let place = format!("/{holder}/{action}/port");
                let asked = self.container.value.pointer(&place);
                if asked.and_then(Value::as_str) == Some(self.name) {
                    patch.push(Operation::replace(
                        format!("{container}{place}"),
                        json!(self.number),
                    ));
                }
            }
        }
    }

    /// The same in words that do not depend on the order of containers.
    pub(super) fn describe(&self) -> Value {
        json!({ "container": self.container.name, "name": self.name, "number": self.number })
    }
}
