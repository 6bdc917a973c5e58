//! The state of a judgement as bytes, so that it can be gone on with, or a decision judged again, from the middle.
//!
//! ```text
//! "judge-fx/1 state 2\n", and then in Borsh: the clock; the names of the tenants in the order of their numbers, and how
//! many were admitted together each time; the tenants; blocks that wait; fleet and cohorts; the service
//! ```
//!
//! What follows from policy and history (tests, budgets, cohorts, totals) is not in it and computed again. Equal states
//! have equal bytes.

use borsh::{BorshDeserialize, BorshSerialize, io};

use super::{Judge, tenant::Tenant};
use crate::{history::History, policy::Policy};
use coalmine_proto::names::TenantName;
use std::{collections::VecDeque, sync::Arc};

/// What a saved state begins with.
const FORM: &[u8] = b"judge-fx/1 state 2\n";

/// Why a state cannot be gone on with.
fn not_sound(problem: &str) -> String {
    format!("is no state of this judge: {problem}")
}

impl Judge {
    /// The state as bytes.
    pub fn save(&self) -> Vec<u8> {
        let mut out = FORM.to_vec();
        let saved = self.save_to(&mut out);
        // Memory takes everything.
        debug_assert!(saved.is_ok());
        out
    }

    fn save_to(&self, out: &mut Vec<u8>) -> io::Result<()> {
        self.clock.serialize(out)?;
        let names: Vec<&str> = self.roster.names().iter().map(TenantName::as_str).collect();
        (&names, &self.groups_admitted, &self.tenants, &self.due).serialize(out)?;
        for group in &self.groups {
            group.save(out)?;
        }
        self.service.save(out)
    }

    /// Goes on with a saved state, under the policy and the history that it was judged by.
    pub fn restore(
        policy: Policy,
        history: Option<Arc<History>>,
        max_windows: Option<u32>,
        saved: &[u8],
    ) -> Result<Self, String> {
        let mut judge = Self::new(policy, history, max_windows).map_err(|error| error.to_string())?;
        let mut rest = saved
            .strip_prefix(FORM)
            .ok_or_else(|| not_sound("it does not begin like one"))?;
        judge
            .restore_from(&mut rest)
            .map_err(|error| not_sound(&error.to_string()))?;
        if !rest.is_empty() {
            return Err(not_sound("more bytes follow"));
        }
        Ok(judge)
    }

    fn restore_from(&mut self, saved: &mut &[u8]) -> io::Result<()> {
        let wrong = |problem: String| io::Error::new(io::ErrorKind::InvalidData, problem);
        self.clock = BorshDeserialize::deserialize(saved)?;
        let names = Vec::<String>::deserialize(saved)?;
        let together = Vec::<u32>::deserialize(saved)?;
        let tenants = Vec::<Tenant>::deserialize(saved)?;
        self.due = VecDeque::deserialize(saved)?;
        if names.len() != tenants.len() || self.due.iter().any(|(_, id, _)| *id as usize >= tenants.len()) {
            return Err(wrong("names and tenants do not match".to_owned()));
        }
        let mut left = names.into_iter().zip(tenants);
        for count in together {
            let mut group = Vec::new();
            for (name, tenant) in left.by_ref().take(count as usize) {
                let name = TenantName::parse_counted(&name);
                let name = name.map_err(|error| wrong(format!("a tenant's name {error}")))?;
                if !tenant.is_sound(self.clock.windows) {
                    return Err(wrong(format!("what is kept of tenant {name}")));
                }
                group.push((name, tenant));
            }
            self.admit_group(group)
                .map_err(|error| wrong(error.to_string()))?;
        }
        if left.next().is_some() {
            return Err(wrong("a tenant was never admitted".to_owned()));
        }
        for (number, tenant) in (0..).zip(&self.tenants) {
            self.roster.note(number, tenant.summary.notable);
        }
        for group in &mut self.groups {
            group.restore(saved)?;
        }
        if !self.service.restore(saved)? {
            return Err(wrong("the policy asks for another metric of the pool".to_owned()));
        }
        Ok(())
    }
}
