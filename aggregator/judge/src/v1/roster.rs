//! Who is judged: tenants by number, in the order of their admission, and by name.

use coalmine_proto::names::TenantName;

/// The tenants of a rollout.
#[derive(Debug, Clone, Default)]
pub(super) struct Roster {
    /// By number.
    names: Vec<TenantName>,
    /// Numbers in the order of the names.
    order: Vec<u32>,
    /// Of which tenants, by number, something is to be said.
    notable: Vec<bool>,
}

impl Roster {
    pub(super) fn is_empty(&self) -> bool {
        self.names.is_empty()
    }

    /// Admits tenants that are not there yet; they get the next numbers.
    pub(super) fn admit(&mut self, newcomers: Vec<TenantName>) {
        let first = self.names.len() as u32;
        self.names.extend(newcomers);
        self.notable.resize(self.names.len(), false);
        self.order.extend(first..self.names.len() as u32);
        let names = &self.names;
        // Two sorted runs; the sort finds them.
        self.order
            .sort_by(|a, b| names[*a as usize].cmp(&names[*b as usize]));
    }

    /// The names, by number.
    pub(super) fn names(&self) -> &[TenantName] {
        &self.names
    }

    /// The number of a tenant.
    pub(super) fn find(&self, name: &TenantName) -> Option<u32> {
        self.find_from(&mut 0, name)
    }

    /// The number of a tenant that does not come before place `from`, which moves on: names that are looked up in their
    /// order are found in a few steps each.
    pub(super) fn find_from(&self, from: &mut usize, name: &TenantName) -> Option<u32> {
        let rest = self.order.get(*from..)?;
        let is_before = |number: &u32| self.names[*number as usize] < *name;
        // Doubles its stride until it is past the name, then halves.
        let mut reach = 1;
        while rest.get(reach - 1).is_some_and(is_before) {
            reach *= 2;
        }
        let start = reach / 2;
        let end = reach.min(rest.len());
        let place = start + rest.get(start..end)?.partition_point(is_before);
        *from += place;
        let number = *rest.get(place)?;
        (self.names[number as usize] == *name).then_some(number)
    }

    /// Says whether something is to be said of a tenant.
    pub(super) fn note(&mut self, number: u32, is_notable: bool) {
        self.notable[number as usize] = is_notable;
    }

    /// The tenants of which something is to be said, by name.
    pub(super) fn notable(&self) -> impl Iterator<Item = (&TenantName, u32)> {
        let numbers = self.order.iter().copied();
        numbers
            .filter(|number| self.notable[*number as usize])
            .map(|number| (&self.names[number as usize], number))
    }

    pub(super) fn memory_bytes(&self) -> usize {
        self.names.len() * (size_of::<TenantName>() + size_of::<u32>() + size_of::<bool>())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(number: u32) -> TenantName {
        TenantName::parse(format!("tenant-{number:03}").as_bytes()).unwrap()
    }

    #[test]
    fn tenants_are_found_wherever_one_begins() {
        let mut roster = Roster::default();
        assert!(roster.is_empty() && roster.find(&name(1)).is_none());
        // Even numbers first, backwards, then some odd ones.
        roster.admit((0..50).rev().map(|number| name(2 * number)).collect());
        roster.admit([1, 51, 97].map(name).into());
        assert!(!roster.is_empty());
        for number in 0..50 {
            assert_eq!(roster.find(&name(2 * number)), Some(49 - number));
        }
        assert_eq!(
            [1, 51, 97].map(|number| roster.find(&name(number))),
            [Some(50), Some(51), Some(52)]
        );
        assert_eq!([3, 99, 200].map(|number| roster.find(&name(number))), [None; 3]);
        for step in [1, 3, 17, 60] {
            let mut from = 0;
            for number in (0..110).step_by(step) {
                assert_eq!(
                    roster.find_from(&mut from, &name(number)),
                    roster.find(&name(number)),
                    "{number}"
                );
            }
        }
    }

    #[test]
    fn the_notable_come_by_name() {
        let mut roster = Roster::default();
        roster.admit([5, 1, 3].map(name).into());
        roster.admit(vec![name(2)]);
        for number in [0, 1, 3] {
            roster.note(number, true);
        }
        roster.note(1, false);
        let notable: Vec<_> = roster.notable().collect();
        assert_eq!(notable, [(&name(2), 3), (&name(5), 0)]);
        assert!(roster.memory_bytes() >= 4 * size_of::<TenantName>());
    }
}
