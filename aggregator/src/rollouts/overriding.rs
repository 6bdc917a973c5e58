//! What somebody has decided in the judge's place.

use coalmine_judge::record::Override;

use super::view::View;

/// What was decided in the judge's place.
#[derive(Debug, Clone, Default)]
pub(super) struct Overriding {
    /// What is in force, with the hash of its record once that is on record.
    in_force: Option<(Override, Option<String>)>,
    /// How often somebody has decided, or given the decision back.
    pub(super) count: u64,
}

impl Overriding {
    pub(super) fn restored(in_force: Option<(Override, String)>, count: u64) -> Self {
        Self {
            in_force: in_force.map(|(change, hash)| (change, Some(hash))),
            count,
        }
    }

    /// What is shown of a view that is the judge's.
    pub(super) fn shown(&self, view: &View) -> View {
        let mut view = view.clone();
        if let Some((change, hash)) = &self.in_force {
            view.override_with(change, hash.as_deref());
        }
        view
    }

    pub(super) fn take(&mut self, change: &Override, hash: Option<String>) {
        self.in_force = change.verdict.is_some().then(|| (change.clone(), hash));
    }
}
