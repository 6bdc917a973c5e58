//! Streams whose requests or answers are not complete.

use std::hash::BuildHasher;

use coalmine_proto::names::Outcome;
use foldhash::quality::RandomState;

use super::{
    super::{Sink, TenantId, Times},
    response::{Answer, GRPC_UNKNOWN},
};

/// A table without streams keeps this many places: enough for a connection that is in use.
const KEPT_PLACES: usize = 32;

const FIRST_PLACES: usize = 4;

/// Stands for a number that a request does not say.
pub(super) const NOT_SAID: u64 = u64::MAX;

/// One stream of the client.
#[derive(Debug)]
pub(super) struct Stream {
    pub(super) id: u32,
    /// None if nothing is to be counted (any more).
    pub(super) tenant: Option<TenantId>,
    pub(super) kind: Kind,
    pub(super) has_request_ended: bool,
    pub(super) has_answer_ended: bool,
    /// Bytes of the body that are to come, or [`NOT_SAID`].
    pub(super) body_left: u64,
    /// How long the caller waits for the whole answer, or [`NOT_SAID`].
    pub(super) timeout_ns: u64,
    started_ns: u64,
    /// When the head of the answer began, once it is complete.
    answered_ns: Option<u64>,
    /// 0 until the head of the answer is complete, and if it has no status.
    status: u16,
    /// The length of the answer says nothing about speed.
    is_stream: bool,
}

/// Where a request's outcome stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// In the status.
    Http,
    /// In `grpc-status`, which is a trailer, or a header of an answer without a body.
    Grpc,
    /// In the status, and where it is good the stream is a tunnel from then on.
    Tunnel,
}

/// Streams by their number: a table of places, a power of two, of which at most three quarters are taken.
/// A stream stands in the place that the hash of its number says, or the next that was free.
#[derive(Debug, Default)]
pub(super) struct Streams {
    places: Vec<Option<Stream>>,
    count: usize,
    /// Clients choose the numbers, and must not be able to choose places that are all one after the other.
    hasher: RandomState,
}

// === impl Stream ===

impl Stream {
    /// A stream that was just opened, with nothing to count.
    pub(super) fn new(id: u32, started_ns: u64) -> Self {
        Self {
            id,
            tenant: None,
            kind: Kind::Http,
            has_request_ended: false,
            has_answer_ended: false,
            body_left: NOT_SAID,
            timeout_ns: NOT_SAID,
            started_ns,
            answered_ns: None,
            status: 0,
            is_stream: false,
        }
    }

    /// Whether the head of the answer is complete.
    pub(super) fn is_answering(&self) -> bool {
        self.answered_ns.is_some()
    }

    /// The head of the answer is complete, and perhaps all of it.
    pub(super) fn answer(&mut self, answer: &Answer, is_last: bool, started_ns: u64) {
        let is_conversation = self.kind == Kind::Grpc && !self.has_request_ended && !is_last;
        self.answered_ns = Some(started_ns);
        self.status = answer.status.filter(|_| !answer.is_interim()).unwrap_or(0);
        self.is_stream = answer.is_event_stream || is_conversation;
    }

    /// Whether the answer opened a tunnel: nothing that follows is part of it.
    pub(super) fn is_tunnel(&self) -> bool {
        self.kind == Kind::Tunnel && matches!(self.status, 200..300)
    }

    /// The outcome of an answer that is complete, with the gRPC status that stood at its end.
    pub(super) fn outcome(&self, grpc_status: Option<u32>) -> Outcome {
        match (self.kind, self.status, grpc_status) {
            // No client accepts an answer without a status.
            (_, 0, _) => Outcome::ServerError,
            (Kind::Grpc, 200, code) => Outcome::of_grpc_status(code.unwrap_or(GRPC_UNKNOWN)),
            // Callers of gRPC read other statuses as grpc/doc/http-grpc-status-mapping.md says: they believe
            // the gRPC status first (not all believe OK there), and take 401 for UNAUTHENTICATED, 403 for
            // PERMISSION_DENIED, and all others for what is the service's failure.
            (Kind::Grpc, _, Some(code @ 1..)) => Outcome::of_grpc_status(code),
            (Kind::Grpc, 401 | 403, _) => Outcome::ClientError,
            (Kind::Grpc, _, _) => Outcome::ServerError,
            (_, status, _) => Outcome::of_http_status(status),
        }
    }

    /// The outcome of a request that the client resets. One that has waited until its deadline got no answer
    /// in time.
    pub(super) fn given_up(&self, now_ns: u64) -> Outcome {
        let waited = now_ns.saturating_sub(self.started_ns);
        // gRPC's C core announces up to 3 % more than it waits, and the head was under way for a while.
        let shortest = self.timeout_ns.saturating_sub(self.timeout_ns / 16);
        if self.timeout_ns != NOT_SAID && waited >= shortest {
            Outcome::Timeout
        } else {
            Outcome::ClientAbort
        }
    }

    /// The request ended, if it was not counted before.
    pub(super) fn end(&mut self, outcome: Outcome, now_ns: u64, sink: &mut impl Sink) {
        if let Some(tenant) = self.tenant.take() {
            let first_byte_ns = self.answered_ns.map(|at| at.saturating_sub(self.started_ns));
            let times = Times {
                total_ns: now_ns.saturating_sub(self.started_ns),
                first_byte_ns,
                is_stream: self.is_stream,
            };
            sink.end(tenant, outcome, times);
        }
    }

    /// The request is not counted, if it was not before.
    pub(super) fn forget(&mut self, sink: &mut impl Sink) {
        if let Some(tenant) = self.tenant.take() {
            sink.forget(tenant);
        }
    }

    /// The request turned out to be one that no correct server accepts.
    pub(super) fn spoil(&mut self, sink: &mut impl Sink) {
        if let Some(tenant) = self.tenant.take() {
            sink.malformed(Some(tenant));
        }
    }

    /// Takes bytes of the request's body; false if it said that there would be fewer.
    pub(super) fn take_body(&mut self, length: u64) -> bool {
        if self.body_left == NOT_SAID {
            return true;
        }
        match self.body_left.checked_sub(length) {
            Some(left) => {
                self.body_left = left;
                true
            }
            None => false,
        }
    }

    /// Whether the body may end here.
    pub(super) fn has_body(&self) -> bool {
        matches!(self.body_left, 0 | NOT_SAID)
    }
}

// === impl Streams ===

impl Streams {
    pub(super) fn len(&self) -> usize {
        self.count
    }

    pub(super) fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// How many have a request that is to be counted.
    pub(super) fn pending(&self) -> usize {
        let streams = self.places.iter().flatten();
        streams.filter(|stream| stream.tenant.is_some()).count()
    }

    pub(super) fn get_mut(&mut self, id: u32) -> Option<&mut Stream> {
        let place = self.find(id)?;
        self.places.get_mut(place)?.as_mut()
    }

    /// Adds a stream whose number is not in the table.
    pub(super) fn insert(&mut self, stream: Stream) {
        if self.count.saturating_add(1).saturating_mul(4) > self.places.len().saturating_mul(3) {
            self.grow();
        }
        self.put(stream);
    }

    pub(super) fn remove(&mut self, id: u32) -> Option<Stream> {
        let mut hole = self.find(id)?;
        let removed = self.places.get_mut(hole)?.take();
        self.count = self.count.saturating_sub(1);
        let mask = self.mask()?;
        // Those after it may stand where they do because it stood here.
        let mut place = hole.wrapping_add(1) & mask;
        while let Some(Some(stream)) = self.places.get(place) {
            let from_home = place.wrapping_sub(self.home_of(stream.id)) & mask;
            let from_hole = place.wrapping_sub(hole) & mask;
            if from_home >= from_hole {
                self.places.swap(hole, place);
                hole = place;
            }
            place = place.wrapping_add(1) & mask;
        }
        if self.count == 0 && self.places.len() > KEPT_PLACES {
            self.places = Vec::new();
        }
        removed
    }

    /// Takes all streams out, in the order in which they were opened.
    pub(super) fn take_all(&mut self) -> impl Iterator<Item = Stream> + use<> {
        self.count = 0;
        let places = std::mem::take(&mut self.places);
        let mut streams: Vec<Stream> = places.into_iter().flatten().collect();
        streams.sort_unstable_by_key(|stream| stream.id);
        streams.into_iter()
    }

    /// Bytes of memory.
    pub(super) fn footprint(&self) -> usize {
        let place = size_of::<Option<Stream>>();
        self.places.capacity().saturating_mul(place)
    }

    fn mask(&self) -> Option<usize> {
        self.places.len().checked_sub(1)
    }

    fn find(&self, id: u32) -> Option<usize> {
        let mask = self.mask()?;
        let mut place = self.home_of(id) & mask;
        // There is always a free place.
        while let Some(Some(stream)) = self.places.get(place) {
            if stream.id == id {
                return Some(place);
            }
            place = place.wrapping_add(1) & mask;
        }
        None
    }

    fn put(&mut self, stream: Stream) {
        let Some(mask) = self.mask() else { return };
        let mut place = self.home_of(stream.id) & mask;
        while let Some(Some(_)) = self.places.get(place) {
            place = place.wrapping_add(1) & mask;
        }
        if let Some(free) = self.places.get_mut(place) {
            *free = Some(stream);
            self.count = self.count.saturating_add(1);
        }
    }

    fn grow(&mut self) {
        let places = self.places.len().saturating_mul(2).max(FIRST_PLACES);
        let before = std::mem::take(&mut self.places);
        self.count = 0;
        self.places.resize_with(places, || None);
        for stream in before.into_iter().flatten() {
            self.put(stream);
        }
    }

    /// Where the stream stands if nobody stood there before it, in a table that is large enough.
    fn home_of(&self, id: u32) -> usize {
        usize::try_from(self.hasher.hash_one(id) >> 32).unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::{
        super::{LAST_STREAM, MAX_STREAMS},
        *,
    };

    /// The longest way from a stream's home to where it stands.
    fn longest_way(streams: &Streams) -> usize {
        let mask = streams.mask().unwrap();
        let places = streams.places.iter().enumerate();
        let ways = places.filter_map(|(place, stream)| {
            let home = streams.home_of(stream.as_ref()?.id);
            Some(place.wrapping_sub(home) & mask)
        });
        ways.max().unwrap()
    }

    #[test]
    fn numbers_that_a_client_chooses_do_not_crowd() {
        for step in (1..=20).map(|power| 1_usize << power) {
            let mut streams = Streams::default();
            for id in (1..=LAST_STREAM).step_by(step).take(MAX_STREAMS) {
                streams.insert(Stream::new(id, 0));
            }
            assert!(streams.len() >= MAX_STREAMS / 2, "{step}");
            let longest = longest_way(&streams);
            assert!(longest <= 128, "{longest} places in steps of {step}");
        }
    }

    proptest! {
        /// Whatever is opened and closed, exactly the open streams are found.
        #[test]
        fn open_streams_are_found(
            steps in prop::collection::vec((0_u32..64, any::<bool>(), 0_u32..3), 0..400),
        ) {
            let (mut streams, mut open) = (Streams::default(), BTreeSet::new());
            for (number, opens, spread) in steps {
                let id = ((number << (spread * 4)) << 1) | 1;
                if !opens {
                    let removed = streams.remove(id).map(|stream| stream.id);
                    prop_assert_eq!(removed, open.remove(&id).then_some(id));
                } else if open.insert(id) {
                    streams.insert(Stream::new(id, 0));
                }
                prop_assert_eq!(streams.len(), open.len());
                for id in &open {
                    prop_assert_eq!(streams.get_mut(*id).map(|stream| stream.id), Some(*id));
                }
            }
            let taken: Vec<u32> = streams.take_all().map(|stream| stream.id).collect();
            // In the order in which a client has opened them.
            let open: Vec<u32> = open.into_iter().collect();
            prop_assert_eq!(taken, open);
            prop_assert!(streams.is_empty());
        }
    }

    #[test]
    fn a_caller_gives_up_at_its_deadline_or_before() {
        let mut stream = Stream::new(1, 1000);
        assert_eq!(stream.given_up(u64::MAX), Outcome::ClientAbort);
        stream.timeout_ns = 1600;
        for (now_ns, outcome) in [
            (0, Outcome::ClientAbort),
            (1000, Outcome::ClientAbort),
            (2499, Outcome::ClientAbort),
            (2500, Outcome::Timeout),
            (2600, Outcome::Timeout),
            (u64::MAX, Outcome::Timeout),
        ] {
            assert_eq!(stream.given_up(now_ns), outcome, "at {now_ns}");
        }
    }

    #[test]
    fn an_empty_table_is_small() {
        let mut streams = Streams::default();
        assert_eq!(streams.footprint(), 0);
        for id in 0..1000 {
            streams.insert(Stream::new(id * 2 + 1, 0));
        }
        for id in 0..1000 {
            assert!(streams.remove(id * 2 + 1).is_some());
        }
        assert_eq!(streams.footprint(), 0);
        for id in 0..20 {
            streams.insert(Stream::new(id * 2 + 1, 0));
        }
        for id in 0..20 {
            streams.remove(id * 2 + 1);
        }
        assert!((1..=2048).contains(&streams.footprint()));
    }
}
