//! The book as bytes, in pieces that change on their own: what a roll-up of the write-ahead log consists of, and what
//! the database holds.
//!
//! ```text
//! key                                what
//! agents                             who reported, how far, and their running totals
//! counts                             windows received, late and missing requests, latency of all that is in no slot, and
//!                                    what happened at the pools since the beginning
//! names/S                            names of the tenants S*4096 and following, in the order of their numbers
//! slot/START/ARM/S/VERSION           what these tenants did in a slot that may still be judged
//! pools/START/ARM/S/VERSION          what agents reported of their pools in such a slot; S is the CRC-32 of the agent's
//!                                    instance, modulo 64
//! totals/ARM/S/VERSION               what these tenants did since the beginning
//! ```
//!
//! A payload is a protobuf message and says itself what it is of; the key only names it. Numbers of tenants are those of
//! `names`. A tenant without requests has no row.

use std::collections::{BTreeMap, BTreeSet};

use coalmine_proto::{
    histogram::Histogram,
    names::{Arm, Outcomes, TenantName},
    v1::{Histogram as WireHistogram, TenantRow, Totals},
};
use prost::Message;

use super::{
    Agent, Book, Build, Introduction, Service, Speaker,
    cell::Cell,
    context::Said,
    pool::{PoolEventsImage, PoolsImage, SlotPools},
};

/// Tenants in one piece.
const SHARD: usize = 4_096;

/// A part of the book.
#[derive(Clone, PartialEq, Eq, Hash, Message)]
pub struct Piece {
    /// The service.
    #[prost(string, tag = "1")]
    pub service: String,
    /// Which part of it.
    #[prost(string, tag = "2")]
    pub key: String,
    /// The content.
    #[prost(bytes = "vec", tag = "3")]
    pub payload: Vec<u8>,
}

/// What changed since the last time.
#[derive(Debug, Default)]
pub struct Changes {
    /// Pieces that are new or other than before.
    pub pieces: Vec<Piece>,
    /// Service and key of pieces that are no more.
    pub removed: Vec<(String, String)>,
}

impl Changes {
    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.pieces.is_empty() && self.removed.is_empty()
    }
}

/// Which piece.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Part {
    Agents,
    Counts,
    Names(usize),
    Slot(u64, Build, usize),
    Pools(u64, Build, u32),
    Totals(Build, usize),
}

impl Part {
    fn key(&self) -> String {
        match self {
            Self::Agents => "agents".to_owned(),
            Self::Counts => "counts".to_owned(),
            Self::Names(shard) => format!("names/{shard}"),
            Self::Slot(start, build, shard) => {
                format!("slot/{start}/{}/{shard}/{}", build.arm, build.version)
            }
            Self::Pools(start, build, shard) => {
                format!("pools/{start}/{}/{shard}/{}", build.arm, build.version)
            }
            Self::Totals(build, shard) => format!("totals/{}/{shard}/{}", build.arm, build.version),
        }
    }
}

/// Which pieces changed, where that is asked for.
#[derive(Debug, Default)]
pub(super) struct Journal {
    changed: BTreeSet<Part>,
    removed: BTreeSet<String>,
}

impl Journal {
    pub(super) fn note(&mut self, part: Part) {
        self.changed.insert(part);
    }

    /// Notes what a batch has changed: rows of these tenants, of one build, in this slot if it is kept.
    pub(super) fn note_rows(&mut self, build: &Build, slot: Option<u64>, tenants: impl Iterator<Item = u32>) {
        let shards: BTreeSet<usize> = tenants.map(|tenant| tenant as usize / SHARD).collect();
        for shard in shards {
            self.note(Part::Totals(build.clone(), shard));
            if let Some(slot) = slot {
                self.note(Part::Slot(slot, build.clone(), shard));
            }
        }
    }

    pub(super) fn note_name(&mut self, number: u32) {
        self.note(Part::Names(number as usize / SHARD));
    }

    /// Notes that a slot is no more.
    pub(super) fn forget_slot(&mut self, slot: u64, build: &Build, tenants: usize) {
        for shard in 0..tenants.div_ceil(SHARD) {
            let part = Part::Slot(slot, build.clone(), shard);
            self.forget(&part);
        }
    }

    /// The same for the pools in it.
    pub(super) fn forget_pools(&mut self, slot: u64, build: &Build, pools: &SlotPools) {
        for shard in pools.shards() {
            self.forget(&Part::Pools(slot, build.clone(), shard));
        }
    }

    fn forget(&mut self, part: &Part) {
        self.changed.remove(part);
        self.removed.insert(part.key());
    }
}

#[derive(Clone, PartialEq, Message)]
struct AgentsImage {
    #[prost(message, repeated, tag = "1")]
    agents: Vec<AgentImage>,
}

#[derive(Clone, PartialEq, Message)]
struct AgentImage {
    #[prost(string, tag = "1")]
    instance: String,
    #[prost(uint32, tag = "2")]
    arm: u32,
    #[prost(string, tag = "3")]
    version: String,
    #[prost(fixed64, tag = "4")]
    epoch: u64,
    #[prost(uint64, tag = "5")]
    applied_seq: u64,
    #[prost(bool, tag = "6")]
    gone: bool,
    #[prost(uint64, tag = "7")]
    first_start_ms: u64,
    #[prost(uint64, tag = "8")]
    sealed_until_ms: u64,
    /// A hole without an end has `u64::MAX` there; none has two zeros.
    #[prost(uint64, tag = "9")]
    hole_from_ms: u64,
    #[prost(uint64, tag = "10")]
    hole_to_ms: u64,
    #[prost(uint64, tag = "11")]
    last_seen_ms: u64,
    #[prost(bool, tag = "12")]
    based: bool,
    #[prost(uint64, tag = "13")]
    requests: u64,
    #[prost(uint64, tag = "14")]
    errors: u64,
    #[prost(uint64, tag = "15")]
    gap_requests: u64,
    #[prost(uint64, tag = "16")]
    session: u64,
    #[prost(bool, tag = "17")]
    connected: bool,
    #[prost(uint64, tag = "18")]
    gap_errors: u64,
}

#[derive(Clone, PartialEq, Message)]
struct CountsImage {
    #[prost(message, repeated, tag = "1")]
    arms: Vec<ArmImage>,
    #[prost(uint64, tag = "2")]
    judged_until_ms: u64,
    #[prost(uint64, tag = "3")]
    windows: u64,
    #[prost(uint64, tag = "4")]
    tenant_windows: u64,
    #[prost(uint64, tag = "5")]
    duplicates: u64,
    #[prost(message, repeated, tag = "6")]
    pools: Vec<PoolEventsImage>,
}

#[derive(Clone, PartialEq, Message)]
struct ArmImage {
    #[prost(uint32, tag = "1")]
    arm: u32,
    #[prost(uint64, tag = "2")]
    gap_requests: u64,
    #[prost(uint64, tag = "3")]
    late_requests: u64,
    #[prost(message, optional, tag = "4")]
    latency: Option<WireHistogram>,
}

#[derive(Clone, PartialEq, Message)]
struct NamesImage {
    #[prost(uint64, tag = "1")]
    first: u64,
    #[prost(string, repeated, tag = "2")]
    names: Vec<String>,
}

/// Rows of one build. In a slot, `latency` is there where any was counted, and `limit_us` is 0 where it was not always
/// the same.
#[derive(Clone, PartialEq, Message)]
struct RowsImage {
    #[prost(uint32, tag = "1")]
    arm: u32,
    #[prost(string, tag = "2")]
    version: String,
    #[prost(uint64, optional, tag = "3")]
    slot_ms: Option<u64>,
    #[prost(message, repeated, tag = "4")]
    rows: Vec<TenantRow>,
}

/// The names that an open session has introduced: later batches refer to them.
#[derive(Clone, PartialEq, Message)]
struct SpeakerImage {
    #[prost(uint64, tag = "1")]
    session: u64,
    #[prost(string, tag = "2")]
    instance: String,
    #[prost(uint32, repeated, tag = "3")]
    refs: Vec<u32>,
    #[prost(uint32, repeated, tag = "4")]
    numbers: Vec<u32>,
}

fn arm_of(number: u32) -> Result<Arm, String> {
    Arm::ALL
        .into_iter()
        .find(|arm| *arm as u32 == number)
        .ok_or_else(|| format!("there is no arm {number}"))
}

impl Book {
    /// The whole book with the sessions that are open.
    pub fn image(&self) -> Vec<Piece> {
        let mut pieces = Vec::new();
        for (name, service) in &self.services {
            let piece = |part: &Part| service.piece(name, part);
            pieces.extend(service.parts().iter().filter_map(piece));
        }
        for (session, speaker) in &self.sessions {
            let (refs, numbers) = speaker
                .names
                .iter()
                .collect::<BTreeMap<_, _>>()
                .into_iter()
                .unzip();
            let image = SpeakerImage {
                session: *session,
                instance: speaker.who.instance.clone(),
                refs,
                numbers,
            };
            pieces.push(Piece {
                service: speaker.who.service.clone(),
                key: format!("speaker/{session}"),
                payload: image.encode_to_vec(),
            });
        }
        pieces
    }

    /// Notes from now on which pieces change.
    pub fn keep_journal(&mut self) {
        self.journals = true;
        for service in self.services.values_mut() {
            service.journal.get_or_insert_default();
        }
    }

    /// The pieces that changed since the last time.
    pub fn changes(&mut self) -> Changes {
        let mut changes = Changes::default();
        for (name, service) in &mut self.services {
            let Some(journal) = service.journal.replace(Journal::default()) else {
                continue;
            };
            let piece = |part: &Part| service.piece(name, part);
            changes.pieces.extend(journal.changed.iter().filter_map(piece));
            let removed = journal.removed.into_iter().map(|key| (name.clone(), key));
            changes.removed.extend(removed);
        }
        changes
    }

    /// Puts a piece back. Names come before what refers to them.
    pub fn load(&mut self, piece: &Piece) -> Result<(), String> {
        let kind = piece.key.split('/').next().unwrap_or_default();
        let payload = piece.payload.as_slice();
        let wrong = |error: prost::DecodeError| error.to_string();
        let result = match kind {
            "agents" => AgentsImage::decode(payload)
                .map_err(wrong)
                .and_then(|image| self.service(&piece.service).load_agents(image)),
            "counts" => CountsImage::decode(payload)
                .map_err(wrong)
                .and_then(|image| self.service(&piece.service).load_counts(&image)),
            "names" => NamesImage::decode(payload)
                .map_err(wrong)
                .and_then(|image| self.service(&piece.service).load_names(&image)),
            "slot" | "totals" => RowsImage::decode(payload)
                .map_err(wrong)
                .and_then(|image| self.service(&piece.service).load_rows(&image)),
            "pools" => PoolsImage::decode(payload)
                .map_err(wrong)
                .and_then(|image| self.service(&piece.service).load_pools(image)),
            "speaker" => SpeakerImage::decode(payload)
                .map_err(wrong)
                .and_then(|image| self.load_speaker(&piece.service, image)),
            _ => Err("is of an unknown kind".to_owned()),
        };
        let last = self.services.values().flat_map(|service| service.agents.values());
        self.last_session = last
            .map(|agent| agent.session)
            .max()
            .unwrap_or(0)
            .max(self.last_session);
        result.map_err(|problem| format!("the piece {:?} of service {} {problem}", piece.key, piece.service))
    }

    fn load_speaker(&mut self, service: &str, image: SpeakerImage) -> Result<(), String> {
        let agent = self
            .agent(service, &image.instance)
            .ok_or("is of an agent that is not there")?;
        let who = Introduction {
            service: service.to_owned(),
            instance: image.instance.clone(),
            build: agent.build.clone(),
            epoch: agent.epoch,
            first_seq: agent.applied_seq.saturating_add(1),
        };
        let names = image.refs.into_iter().zip(image.numbers).collect();
        self.last_session = self.last_session.max(image.session);
        self.sessions.insert(image.session, Speaker { who, names });
        Ok(())
    }
}

impl Service {
    /// All that there is.
    fn parts(&self) -> Vec<Part> {
        let shards = |rows: usize| 0..rows.div_ceil(SHARD);
        let mut parts = vec![Part::Agents, Part::Counts];
        parts.extend(shards(self.tenants.len()).map(Part::Names));
        for (slot, builds) in &self.slots {
            for (build, cells) in builds {
                parts.extend(shards(cells.len()).map(|shard| Part::Slot(*slot, build.clone(), shard)));
            }
        }
        for (slot, builds) in &self.pools {
            for (build, pools) in builds {
                let shards = pools.shards().into_iter();
                parts.extend(shards.map(|shard| Part::Pools(*slot, build.clone(), shard)));
            }
        }
        for (build, totals) in &self.totals {
            parts.extend(shards(totals.len()).map(|shard| Part::Totals(build.clone(), shard)));
        }
        parts
    }

    /// A piece as it is now; none if it is no more.
    fn piece(&self, service: &str, part: &Part) -> Option<Piece> {
        let payload = match part {
            Part::Agents => {
                let agents = self.agents.iter().map(|(instance, agent)| agent.image(instance));
                let agents = agents.collect();
                AgentsImage { agents }.encode_to_vec()
            }
            Part::Counts => self.counts_image().encode_to_vec(),
            Part::Names(shard) => {
                let names = self.tenants.iter().skip(shard * SHARD).take(SHARD);
                NamesImage {
                    first: (shard * SHARD) as u64,
                    names: names.map(|name| name.as_str().to_owned()).collect(),
                }
                .encode_to_vec()
            }
            Part::Slot(slot, build, shard) => {
                let cells = self.slots.get(slot)?.get(build)?;
                rows_image(build, Some(*slot), *shard, cells.iter().map(Cell::image)).encode_to_vec()
            }
            Part::Pools(slot, build, shard) => {
                let pools = self.pools.get(slot)?.get(build)?;
                pools.image(build, *slot, *shard).encode_to_vec()
            }
            Part::Totals(build, shard) => {
                let totals = self.totals.get(build)?.iter();
                rows_image(build, None, *shard, totals.map(outcomes_image)).encode_to_vec()
            }
        };
        Some(Piece {
            service: service.to_owned(),
            key: part.key(),
            payload,
        })
    }

    fn counts_image(&self) -> CountsImage {
        let arms = Arm::ALL.into_iter().map(|arm| ArmImage {
            arm: arm as u32,
            gap_requests: self.gaps.get(&arm).copied().unwrap_or(0),
            late_requests: self.late.get(&arm).copied().unwrap_or(0),
            latency: self.latency.get(&arm).map(Histogram::to_wire),
        });
        CountsImage {
            arms: arms.collect(),
            judged_until_ms: self.judged_until_ms,
            windows: self.windows,
            tenant_windows: self.tenant_windows,
            duplicates: self.duplicates,
            pools: self
                .pool_events
                .iter()
                .map(|(build, events)| PoolEventsImage {
                    arm: build.arm as u32,
                    version: build.version.clone(),
                    events: *events,
                })
                .collect(),
        }
    }

    fn load_agents(&mut self, image: AgentsImage) -> Result<(), String> {
        self.agents.clear();
        for agent in image.agents {
            let instance = agent.instance.clone();
            self.agents.insert(instance, Agent::of_image(agent)?);
        }
        Ok(())
    }

    fn load_counts(&mut self, image: &CountsImage) -> Result<(), String> {
        for arm in &image.arms {
            let name = arm_of(arm.arm)?;
            self.gaps.insert(name, arm.gap_requests);
            self.late.insert(name, arm.late_requests);
            if let Some(latency) = &arm.latency {
                let latency = Histogram::from_wire(latency).map_err(|error| error.to_string())?;
                self.latency.insert(name, latency);
            }
        }
        for pools in &image.pools {
            let build = Build {
                arm: arm_of(pools.arm)?,
                version: pools.version.clone(),
            };
            self.pool_events.insert(build, pools.events);
        }
        self.judged_until_ms = self.judged_until_ms.max(image.judged_until_ms);
        self.windows = image.windows;
        self.tenant_windows = image.tenant_windows;
        self.duplicates = image.duplicates;
        Ok(())
    }

    fn load_names(&mut self, image: &NamesImage) -> Result<(), String> {
        if image.first != self.tenants.len() as u64 {
            return Err(format!(
                "begins with name {}, and {} are known",
                image.first,
                self.tenants.len()
            ));
        }
        for name in &image.names {
            let tenant =
                TenantName::parse_counted(name).map_err(|error| format!("has a name that {error}"))?;
            self.add_tenant(&tenant);
        }
        Ok(())
    }

    fn load_pools(&mut self, image: PoolsImage) -> Result<(), String> {
        let build = Build {
            arm: arm_of(image.arm)?,
            version: image.version.clone(),
        };
        let builds = self.pools.entry(image.slot_ms).or_default();
        builds.entry(build).or_default().load(image);
        Ok(())
    }

    fn load_rows(&mut self, image: &RowsImage) -> Result<(), String> {
        let build = Build {
            arm: arm_of(image.arm)?,
            version: image.version.clone(),
        };
        let known = self.tenants.len();
        let unknown = |tenant: u32| format!("has a row of tenant {tenant}, and {known} are known");
        match image.slot_ms {
            Some(slot) => {
                let cells = self.slots.entry(slot).or_default().entry(build).or_default();
                cells.resize_with(known, Cell::default);
                for row in &image.rows {
                    let cell = cells
                        .get_mut(row.tenant as usize)
                        .ok_or_else(|| unknown(row.tenant))?;
                    *cell = Cell::of_image(row)?;
                }
            }
            None => {
                let totals = self.totals.entry(build).or_default();
                totals.resize(known, Outcomes::default());
                for row in &image.rows {
                    let total = totals
                        .get_mut(row.tenant as usize)
                        .ok_or_else(|| unknown(row.tenant))?;
                    *total = Outcomes::from_row(row);
                }
            }
        }
        Ok(())
    }
}

fn rows_image(
    build: &Build,
    slot_ms: Option<u64>,
    shard: usize,
    rows: impl Iterator<Item = Option<TenantRow>>,
) -> RowsImage {
    let numbered = (0_u32..).zip(rows).skip(shard * SHARD).take(SHARD);
    let rows = numbered.filter_map(|(tenant, row)| Some(TenantRow { tenant, ..row? }));
    RowsImage {
        arm: build.arm as u32,
        version: build.version.clone(),
        slot_ms,
        rows: rows.collect(),
    }
}

fn outcomes_image(outcomes: &Outcomes) -> Option<TenantRow> {
    let mut row = TenantRow::default();
    outcomes.to_row(&mut row);
    (!outcomes.is_empty()).then_some(row)
}

impl Agent {
    fn image(&self, instance: &str) -> AgentImage {
        let (hole_from_ms, hole_to_ms) = self.hole.unwrap_or_default();
        AgentImage {
            instance: instance.to_owned(),
            arm: self.build.arm as u32,
            version: self.build.version.clone(),
            epoch: self.epoch,
            applied_seq: self.applied_seq,
            gone: self.gone,
            first_start_ms: self.first_start_ms,
            sealed_until_ms: self.sealed_until_ms,
            hole_from_ms,
            hole_to_ms,
            last_seen_ms: self.last_seen_ms,
            based: self.based,
            requests: self.applied.requests,
            errors: self.applied.errors,
            gap_requests: self.gap_requests,
            session: self.session,
            connected: self.connected,
            gap_errors: self.gap_errors,
        }
    }

    fn of_image(image: AgentImage) -> Result<Self, String> {
        Ok(Self {
            build: Build {
                arm: arm_of(image.arm)?,
                version: image.version,
            },
            epoch: image.epoch,
            applied_seq: image.applied_seq,
            // Whoever reads the image has it from the disk.
            durable_seq: image.applied_seq,
            session: image.session,
            connected: image.connected,
            gone: image.gone,
            first_start_ms: image.first_start_ms,
            sealed_until_ms: image.sealed_until_ms,
            hole: (image.hole_to_ms > 0).then_some((image.hole_from_ms, image.hole_to_ms)),
            last_seen_ms: image.last_seen_ms,
            based: image.based,
            applied: Totals {
                requests: image.requests,
                errors: image.errors,
                gap_requests: image.gap_requests,
            },
            gap_requests: image.gap_requests,
            gap_errors: image.gap_errors,
            recent: std::collections::VecDeque::new(),
            said: Said::default(),
        })
    }
}
