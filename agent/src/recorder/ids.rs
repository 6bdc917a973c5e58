//! Finds the slot of a tenant's name.
//!
//! With many tenants a look-up costs what the memory costs. So the table has nothing but the numbers of the slots,
//! four bytes each, and the names are compared where they stand in the slots, in the memory that a request touches
//! anyway.

use std::hash::BuildHasher;

use foldhash::fast::RandomState;
use hashbrown::HashTable;

use super::slot::Slot;
use crate::observer::TenantId;

/// The numbers of the slots that are taken, by name.
#[derive(Debug, Default)]
pub(super) struct Ids {
    hasher: RandomState,
    table: HashTable<TenantId>,
}

impl Ids {
    /// How many names there are.
    pub(super) fn len(&self) -> usize {
        self.table.len()
    }

    /// The slot of the name.
    pub(super) fn find(&self, name: &str, slots: &[Slot]) -> Option<TenantId> {
        let is_it = |id: &TenantId| slots.get(id.0 as usize).is_some_and(|slot| slot.is_of(name));
        self.table.find(self.hasher.hash_one(name), is_it).copied()
    }

    /// Notes the slot of a name that has none.
    pub(super) fn insert(&mut self, id: TenantId, slots: &[Slot]) {
        let Some(slot) = slots.get(id.0 as usize) else {
            return;
        };
        let hash = |id: &TenantId| {
            let slot = slots.get(id.0 as usize);
            slot.map_or(0, |slot| self.hasher.hash_one(slot.name.as_str()))
        };
        self.table
            .insert_unique(self.hasher.hash_one(slot.name.as_str()), id, hash);
    }

    /// Forgets the slot.
    pub(super) fn remove(&mut self, id: TenantId, slots: &[Slot]) {
        let Some(slot) = slots.get(id.0 as usize) else {
            return;
        };
        let hash = self.hasher.hash_one(slot.name.as_str());
        if let Ok(entry) = self.table.find_entry(hash, |other| *other == id) {
            entry.remove();
        }
    }
}
