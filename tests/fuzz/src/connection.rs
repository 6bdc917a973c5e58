//! A connection that an observer follows: what each side says, turn by turn, whole and in pieces.
//!
//! ```text
//!   input = seed (4 bytes) turn*
//!   turn  = head (2 bytes, little-endian) bytes
//!           its highest bit says whose turn it is (1: the application's), the others how many bytes follow;
//!           0 is a close of that side, and the largest number a reset, after which nothing follows
//! ```
//!
//! The seed decides how turns are cut into pieces. All pieces of a turn come at the same time of an observer's
//! clock, so that whatever it says must be the same however they are cut: the times too.

use std::collections::BTreeSet;

use coalmine_agent::{
    observer::{Http1, Http2, Observer, Opaque, Sink, TenantId, Times},
    tenant::{Head, Header},
};
use coalmine_proto::names::Outcome;

/// What an observer may hold whatever peers send: two incomplete header blocks, two tables, a list and the streams,
/// each with room to double.
const MOST_BYTES: usize = 1 << 20;

/// The number of a turn that is a reset.
const RESET: usize = 0x7fff;

/// Headers that a sink asks for.
const ASKED: [&str; 4] = ["x-tenant", "host", "authorization", "content-type"];

/// What one side does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Deed<'a> {
    /// It sends bytes.
    Sends(&'a [u8]),
    /// It closes its direction.
    Closes,
    /// It resets the connection.
    Resets,
}

/// One side of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// The one that asks.
    Client,
    /// The one that answers.
    Application,
}

/// What one side does at one time.
pub type Turn<'a> = (Side, Deed<'a>);

/// What an observer says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// A request began, with this number; what its head says of host, target and some headers.
    Began(u32, Vec<Vec<u8>>),
    /// It ended.
    Ended(u32, Outcome, Times),
    /// It cannot be followed.
    Forgotten(u32),
    /// A request that is not followed.
    PassedOver,
    /// A request that is nobody's.
    Malformed,
    /// The connection is not followed any more.
    Opaque(Opaque),
}

/// Takes what an observer says, and checks that it makes sense.
#[derive(Debug, Default)]
pub struct Notes {
    events: Vec<Event>,
    begun: u32,
    open: BTreeSet<u32>,
    is_opaque: bool,
}

/// What all observers can do.
pub trait Follows: Sized {
    /// An observer of a connection on which nothing was sent.
    fn fresh() -> Self;
    /// The client does something.
    fn client(&mut self, deed: Deed<'_>, now_ns: u64, notes: &mut Notes);
    /// The application does something.
    fn application(&mut self, deed: Deed<'_>, now_ns: u64, notes: &mut Notes);
    /// Nothing more will come.
    fn end(&mut self, now_ns: u64, notes: &mut Notes);
    /// Requests that have not ended.
    fn open(&self) -> usize;
    /// Whether nothing is under way.
    fn rests(&self) -> bool;
    /// What it holds, in bytes; 0 where it does not say.
    fn bytes(&self) -> usize;
}

/// An observer that is only told the number of a body's bytes wherever it says that it need not see them, as where
/// the kernel moves them.
#[derive(Debug)]
pub struct Unseen(Observer);

/// Cuts turns into pieces (SplitMix64).
struct Knife {
    state: u64,
    /// Longest piece.
    longest: usize,
}

// === impl Sink for Notes ===

impl Sink for Notes {
    fn begin(&mut self, head: &dyn Head) -> TenantId {
        let number = self.begun;
        self.begun += 1;
        assert!(self.open.insert(number));
        let mut said = vec![format!("{:?}", head.host()).into_bytes(), head.target().to_vec()];
        said.extend(ASKED.iter().map(|name| match head.header(name) {
            Header::Missing => b"<missing>".to_vec(),
            Header::Value(value) => value.to_vec(),
            Header::Differing => b"<differing>".to_vec(),
        }));
        self.events.push(Event::Began(number, said));
        TenantId(number)
    }

    fn end(&mut self, tenant: TenantId, outcome: Outcome, times: Times) {
        assert!(
            self.open.remove(&tenant.0),
            "{tenant:?} has not begun, or has ended"
        );
        assert!(
            times.first_byte_ns.is_none_or(|first| first <= times.total_ns),
            "{times:?}"
        );
        self.events.push(Event::Ended(tenant.0, outcome, times));
    }

    fn forget(&mut self, tenant: TenantId) {
        assert!(
            self.open.remove(&tenant.0),
            "{tenant:?} has not begun, or has ended"
        );
        self.events.push(Event::Forgotten(tenant.0));
    }

    fn passed_over(&mut self) {
        self.events.push(Event::PassedOver);
    }

    fn malformed(&mut self, begun: Option<TenantId>) {
        if let Some(tenant) = begun {
            self.forget(tenant);
        }
        self.events.push(Event::Malformed);
    }

    fn opaque(&mut self, why: Opaque) {
        assert!(!self.is_opaque, "a connection is opaque for one reason");
        self.is_opaque = true;
        self.events.push(Event::Opaque(why));
    }
}

// === impl Follows ===

macro_rules! follows {
    ($observer:ty, $bytes:expr) => {
        impl Follows for $observer {
            fn fresh() -> Self {
                Self::new()
            }

            fn client(&mut self, deed: Deed<'_>, now_ns: u64, notes: &mut Notes) {
                match deed {
                    Deed::Sends(bytes) => self.on_request(bytes, now_ns, notes),
                    Deed::Closes => self.client_closed(),
                    Deed::Resets => self.client_reset(now_ns, notes),
                }
            }

            fn application(&mut self, deed: Deed<'_>, now_ns: u64, notes: &mut Notes) {
                match deed {
                    Deed::Sends(bytes) => self.on_response(bytes, now_ns, notes),
                    Deed::Closes => self.upstream_closed(now_ns, notes),
                    Deed::Resets => self.upstream_reset(now_ns, notes),
                }
            }

            fn end(&mut self, now_ns: u64, notes: &mut Notes) {
                self.end_all(Outcome::ClientAbort, now_ns, notes);
            }

            fn open(&self) -> usize {
                self.pending()
            }

            fn rests(&self) -> bool {
                self.is_quiet()
            }

            fn bytes(&self) -> usize {
                let bytes: fn(&Self) -> usize = $bytes;
                bytes(self)
            }
        }
    };
}

follows!(Http1, |_| 0);
follows!(Http2, |http2| http2.footprint());
follows!(Observer, |_| 0);

impl Follows for Unseen {
    fn fresh() -> Self {
        Self(Observer::new())
    }

    fn client(&mut self, deed: Deed<'_>, now_ns: u64, notes: &mut Notes) {
        let Deed::Sends(bytes) = deed else {
            return self.0.client(deed, now_ns, notes);
        };
        let unseen = self.0.request_body_left().min(bytes.len() as u64);
        if unseen > 0 {
            self.0.skip_request(unseen);
        }
        self.0.on_request(&bytes[unseen as usize..], now_ns, notes);
    }

    fn application(&mut self, deed: Deed<'_>, now_ns: u64, notes: &mut Notes) {
        let Deed::Sends(bytes) = deed else {
            return self.0.application(deed, now_ns, notes);
        };
        let unseen = self.0.response_body_left().min(bytes.len() as u64);
        if unseen > 0 {
            self.0.skip_response(unseen, now_ns, notes);
        }
        self.0.on_response(&bytes[unseen as usize..], now_ns, notes);
    }

    fn end(&mut self, now_ns: u64, notes: &mut Notes) {
        Follows::end(&mut self.0, now_ns, notes);
    }

    fn open(&self) -> usize {
        self.0.pending()
    }

    fn rests(&self) -> bool {
        self.0.is_quiet()
    }

    fn bytes(&self) -> usize {
        0
    }
}

// === impl Knife ===

impl Knife {
    fn length(&mut self, most: usize) -> usize {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut number = self.state;
        number = (number ^ (number >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        number = (number ^ (number >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        let longest = self.longest.min(most) as u64;
        1 + ((number ^ (number >> 31)) % longest) as usize
    }
}

/// Reads the seed and the turns of an input.
pub fn read(data: &[u8]) -> Option<(u32, Vec<Turn<'_>>)> {
    let (seed, mut rest) = data.split_first_chunk()?;
    let mut turns = Vec::new();
    while let Some((head, after)) = rest.split_first_chunk() {
        let head = u16::from_le_bytes(*head);
        let side = if head >> 15 == 0 {
            Side::Client
        } else {
            Side::Application
        };
        let (deed, after) = match usize::from(head & 0x7fff) {
            0 => (Deed::Closes, after),
            RESET => (Deed::Resets, after),
            length => {
                let (bytes, after) = after.split_at(length.min(after.len()));
                (Deed::Sends(bytes), after)
            }
        };
        turns.push((side, deed));
        rest = after;
    }
    Some((u32::from_le_bytes(*seed), turns))
}

/// An input that is read as these turns.
pub fn write(seed: u32, turns: &[Turn<'_>]) -> Vec<u8> {
    let mut data = seed.to_le_bytes().to_vec();
    for (side, deed) in turns {
        let bytes = match deed {
            Deed::Sends(bytes) => *bytes,
            Deed::Closes | Deed::Resets => &[],
        };
        assert!(bytes.len() < RESET);
        let length = if *deed == Deed::Resets { RESET } else { bytes.len() };
        let whose = if *side == Side::Client { 0 } else { 1 << 15 };
        data.extend((length as u16 | whose).to_le_bytes());
        data.extend(bytes);
    }
    data
}

/// A frame of HTTP/2 (RFC 9113, section 4.1).
pub fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    let stream = stream.to_be_bytes();
    [&length[1..], &[kind, flags], &stream, payload].concat()
}

/// What an observer says of these turns, each in one piece.
pub fn whole<O: Follows>(turns: &[Turn<'_>]) -> Vec<Event> {
    play::<O>(turns, usize::MAX, 0)
}

fn play<O: Follows>(turns: &[Turn<'_>], longest: usize, seed: u32) -> Vec<Event> {
    let (mut observer, mut notes) = (O::fresh(), Notes::default());
    let mut knife = Knife {
        state: seed.into(),
        longest,
    };
    let (mut closed, mut now_ns) = (Vec::new(), 0);
    for (side, deed) in turns {
        now_ns += 1_000;
        // Who has closed says nothing more.
        if closed.contains(side) {
            continue;
        }
        let mut tell = |deed: Deed<'_>| {
            match side {
                Side::Client => observer.client(deed, now_ns, &mut notes),
                Side::Application => observer.application(deed, now_ns, &mut notes),
            }
            assert_eq!(observer.open(), notes.open.len());
            assert!(!observer.rests() || notes.open.is_empty());
            let bytes = observer.bytes();
            assert!(bytes <= MOST_BYTES, "the observer holds {bytes} bytes");
        };
        match *deed {
            Deed::Sends(mut rest) => {
                while !rest.is_empty() {
                    let length = if longest == usize::MAX {
                        rest.len()
                    } else {
                        knife.length(rest.len())
                    };
                    let (piece, after) = rest.split_at(length);
                    tell(Deed::Sends(piece));
                    rest = after;
                }
            }
            Deed::Closes => {
                tell(Deed::Closes);
                closed.push(*side);
            }
            Deed::Resets => {
                tell(Deed::Resets);
                break;
            }
        }
    }
    observer.end(now_ns + 1_000, &mut notes);
    assert!(notes.open.is_empty(), "{:?} have not ended", notes.open);
    assert_eq!(observer.open(), 0);
    notes.events
}

/// Whether the bytes of bodies are seen or not, the same must be said of a connection.
pub fn check_unseen(data: &[u8]) {
    let Some((seed, turns)) = read(data) else {
        return;
    };
    same(&whole::<Observer>(&turns), &play::<Unseen>(&turns, 16, seed));
}

/// Whatever the pieces, an observer must say the same of a connection.
pub fn check<O: Follows>(data: &[u8]) {
    let Some((seed, turns)) = read(data) else {
        return;
    };
    let whole = whole::<O>(&turns);
    for longest in [1, 16, 1 << 15] {
        same(&whole, &play::<O>(&turns, longest, seed));
    }
}

/// A head of HTTP/1 that cannot be right is refused as soon as it is looked at: the beginning of it at once, if it
/// comes first in a piece, and what follows only when the head's end has come. Until then both must agree.
fn same(whole: &[Event], pieces: &[Event]) {
    let refused = whole.iter().position(|event| {
        let reasons = [Opaque::NotHttp, Opaque::BadResponse, Opaque::TooManyHeaders];
        matches!(event, Event::Opaque(why) if reasons.contains(why))
    });
    if let Some(mut at) = refused
        && whole != pieces
    {
        while at > 0 && matches!(whole[at - 1], Event::Forgotten(_)) {
            at -= 1;
        }
        assert!(pieces.starts_with(&whole[..at]), "{whole:?} and {pieces:?}");
        return;
    }
    // The same for an answer's head after the client's bytes were given up, which is the reason that is told.
    let given_up = whole.iter().position(|event| matches!(event, Event::Opaque(_)));
    let forgotten = given_up.and_then(|at| {
        let later = whole[at..].iter().position(|event| matches!(event, Event::Forgotten(_)))?;
        Some(at + later)
    });
    if let Some(at) = forgotten
        && whole != pieces
    {
        assert!(pieces.starts_with(&whole[..at]), "{whole:?} and {pieces:?}");
        return;
    }
    assert_eq!(whole, pieces);
}
