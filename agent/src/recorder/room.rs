//! Says which tenants have a place of their own, of which there are --max-tenants.
//!
//! A tenant gets a place with its first request while there are places. After that:
//!
//! - Tenants that the policy lists get one all the same, and none is taken from them for others.
//! - All others are counted together, as `__overflow__`, and by name in the sketch.
//! - A tenant without requests for [`IDLE_WINDOWS`] makes room.
//! - Every [`REVIEW_WINDOWS`] there is a **review**: the busiest names of the sketch take the places of the least
//!   busy tenants, where they surely had more than [`ADVANTAGE`] times as many requests since the last review. Less
//!   than that would let tenants of about the same traffic push each other out, and neither could be judged.
//!
//! A place changes hands at a window's border only, and only one without requests under way. So each request is in
//! one row of one window: what the old tenant had is in the windows that were closed, and requests of the new one
//! that are under way are still those of `__overflow__`.
//!
//! Names are hostile: a client can send a new one with each request. Then each costs a look-up and a step of
//! the sketch, and none gets in with fewer than [`MIN_REQUESTS`]. A border looks at a bounded number of slots, in
//! turn.

use std::{cmp::Reverse, collections::BinaryHeap, iter::Chain, ops::Range};

use coalmine_proto::names::TenantName;

use super::{OVERFLOW, OWN_SLOTS, Recorder, slot::Slot};
use crate::observer::TenantId;

/// A tenant without requests for this many windows makes room when the table is full.
pub(super) const IDLE_WINDOWS: u64 = 60;

/// Windows from one review to the next.
pub(super) const REVIEW_WINDOWS: u64 = 10;

/// How many times the requests of a tenant another must have had to take its place.
pub(super) const ADVANTAGE: u64 = 2;

/// The fewest requests since the last review that give anybody a place.
pub(super) const MIN_REQUESTS: u64 = 16;

/// Slots that are looked at for idle tenants, at each border.
const IDLE_LOOKS: usize = 4_096;

/// Slots that are looked at for the least busy tenants, at each review.
const REVIEW_LOOKS: usize = 32_768;

impl Recorder {
    /// Whether a new tenant has no place.
    pub(super) fn is_full(&self) -> bool {
        self.ids.len() >= self.max_tenants.saturating_add(OWN_SLOTS)
    }

    /// Gives a tenant that has none a place.
    pub(super) fn admit(&mut self, name: TenantName) -> TenantId {
        let slot = Slot::new(name, &self.settings, self.windows);
        let id = match self.free.pop() {
            Some(id) => {
                if let Some(free) = self.slot(id) {
                    *free = slot;
                }
                id
            }
            None => {
                self.slots.push(slot);
                TenantId(u32::try_from(self.slots.len() - 1).unwrap_or(OVERFLOW.0))
            }
        };
        self.ids.insert(id, &self.slots);
        id
    }

    /// At a border: forgets idle tenants, and now and then lets busy ones in.
    pub(super) fn make_room(&mut self) {
        debug_assert!(self.active.is_empty(), "places change hands at a border only");
        if self.is_full() {
            self.forget_idle();
        }
        if self.windows.is_multiple_of(REVIEW_WINDOWS) {
            if let Some(sketch) = self.sketch.take() {
                self.let_in(sketch.heavy(MIN_REQUESTS));
            }
            self.review += 1;
        }
    }

    /// Takes the places of tenants that have been idle for long.
    fn forget_idle(&mut self) {
        for at in self.turn(IDLE_LOOKS) {
            let windows = self.windows;
            let is_idle = |slot: &Slot| windows.saturating_sub(slot.last_window) > IDLE_WINDOWS;
            if self.could_leave(at).is_some_and(is_idle) {
                self.evict(at);
            }
        }
    }

    /// Gives names places, those with the most requests first, while they have enough more than those that they
    /// replace.
    fn let_in(&mut self, heavy: Vec<(TenantName, u64)>) {
        if heavy.is_empty() {
            return;
        }
        let mut quiet = self.quietest(heavy.len()).into_iter();
        for (name, requests) in heavy {
            // It may have got a place meanwhile, when there was one.
            if self.ids.find(name.as_str(), &self.slots).is_some() {
                continue;
            }
            if self.is_full() {
                match quiet.next() {
                    Some((begun, at)) if begun.saturating_mul(ADVANTAGE) < requests => self.evict(at),
                    _ => return,
                }
                self.totals.replaced_tenants += 1;
            }
            self.admit(name);
        }
    }

    /// The slots with the fewest requests since the last review, and these, fewest first.
    fn quietest(&mut self, wanted: usize) -> Vec<(u64, usize)> {
        let mut quietest = BinaryHeap::with_capacity(wanted + 1);
        for at in self.turn(REVIEW_LOOKS) {
            let review = self.review;
            let Some(slot) = self.could_leave(at).filter(|slot| !slot.is_listed) else {
                continue;
            };
            quietest.push((slot.begun(review), Reverse(at)));
            if quietest.len() > wanted {
                quietest.pop();
            }
        }
        let sorted = quietest.into_sorted_vec().into_iter();
        sorted.map(|(begun, Reverse(at))| (begun, at)).collect()
    }

    /// The slot, if it is a tenant's and nothing is under way there.
    fn could_leave(&self, at: usize) -> Option<&Slot> {
        let slot = self.slots.get(at).filter(|_| at >= OWN_SLOTS);
        slot.filter(|slot| !slot.is_free && slot.in_flight == 0)
    }

    fn evict(&mut self, at: usize) {
        let Ok(id) = u32::try_from(at).map(TenantId) else {
            return;
        };
        self.ids.remove(id, &self.slots);
        if let Some(slot) = self.slot(id) {
            slot.clear();
            self.free.push(id);
        }
    }

    /// The next slots in turn, at most so many.
    fn turn(&mut self, most: usize) -> Chain<Range<usize>, Range<usize>> {
        let (start, count) = (self.hand, self.slots.len());
        let end = start + most.min(count);
        self.hand = if end < count { end } else { end - count };
        (start..end.min(count)).chain(0..end.saturating_sub(count))
    }
}
