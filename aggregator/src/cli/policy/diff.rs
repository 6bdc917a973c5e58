//! `coalmine policy diff`: whose limits change between two policies, and why.

use std::{collections::BTreeSet, path::Path};

use coalmine_judge::{
    history::History,
    policy::Policy,
    quantity::{Share, percent, span, times},
    threshold::{Derivation, Thresholds},
};
use coalmine_proto::names::TenantName;
use serde::Serialize;
use serde_json::json;

use super::{Exit, Failure, Output, history_for};
use crate::{cli::say, server::read_policy};

/// A policy with its history.
pub(super) struct Side {
    pub(super) policy: Policy,
    pub(super) history: Option<History>,
}

/// One thing that is not as it was.
#[derive(Debug, Serialize)]
pub(super) struct Change {
    /// A tenant; `(default)` for those that are not named, `(rollout)` for what concerns all of them together.
    pub(super) who: String,
    pub(super) limit: &'static str,
    pub(super) old: String,
    pub(super) new: String,
    /// The old and the new limit as they are judged, in the units of `Thresholds`; null where there is none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) raw: Option<[Option<u64>; 2]>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) from: Option<String>,
}

/// What changes.
pub(super) struct Changes {
    pub(super) changes: Vec<Change>,
    pub(super) tenants: usize,
    pub(super) tenants_changed: usize,
}

impl Side {
    pub(super) fn read(policy: &Path, history: Option<&Path>) -> Result<Self, Failure> {
        let policy = read_policy(policy).map_err(Failure::usage)?;
        let history = history_for(history, &policy)?;
        Ok(Self { policy, history })
    }

    fn derive<'a>(&'a self, tenant: &'a TenantName) -> Derivation<'a> {
        Derivation::of(&self.policy, self.history.as_ref(), tenant)
    }

    fn thresholds(&self, tenant: &TenantName) -> Thresholds {
        self.derive(tenant).thresholds
    }

    /// The tenants that the policy or the history names.
    fn tenants(&self) -> impl Iterator<Item = TenantName> {
        let learned = self.history.iter().flat_map(|history| history.tenants.keys());
        let learned = learned.filter_map(|name| TenantName::parse(name.as_bytes()).ok());
        self.policy.tenants.keys().cloned().chain(learned)
    }

    /// What concerns all tenants together, as text.
    fn settings(&self) -> Vec<(&'static str, String)> {
        let Policy {
            defaults, rollout, ..
        } = &self.policy;
        let share = |share: Share| percent(u128::from(share.ppm) * 1_000);
        let list = |words: Vec<&str>| format!("[{}]", words.join(", "));
        let coverage = rollout.min_coverage;
        let pool = defaults.pool.map(|pool| {
            let [wait, increase] =
                [pool.max_wait_rate.ppb, pool.max_increase.ppb].map(|ppb| percent(u128::from(ppb)));
            format!(
                "at most {wait} wait, up to {} times the baseline's plus {}pp",
                times(pool.max_ratio.milli),
                increase.trim_end_matches(" %")
            )
        });
        let required = defaults.required.iter().map(|required| required.as_str());
        let rules: Vec<String> = self.policy.tenant_rules.iter().map(ToString::to_string).collect();
        vec![
            ("tenant_rules", list(rules.iter().map(String::as_str).collect())),
            ("pool", pool.unwrap_or_else(|| "not limited".to_owned())),
            ("hold_deadline", span(defaults.hold_deadline.micros)),
            ("on_deadline", defaults.on_deadline.as_str().to_owned()),
            ("required", list(required.collect())),
            ("judge_window", span(defaults.judge_window.micros)),
            ("rollout.alpha", percent(u128::from(rollout.alpha.ppb))),
            ("rollout.rollback_threshold", share(rollout.rollback_threshold)),
            ("rollout.min_windows", rollout.min_windows.to_string()),
            (
                "rollout.warm_up",
                rollout
                    .warm_up
                    .map_or_else(|| "none".to_owned(), |warm_up| span(warm_up.micros)),
            ),
            ("rollout.min_coverage.traffic", share(coverage.traffic)),
            ("rollout.min_coverage.agents", share(coverage.agents)),
            ("rollout.min_coverage.tenants", share(coverage.tenants)),
            ("rollout.min_coverage.requests", coverage.requests.to_string()),
            ("rollout.cohorts", list(rollout.cohorts().collect())),
            (
                "tiers",
                list(self.policy.tiers.keys().map(String::as_str).collect()),
            ),
            (
                "adjust",
                self.policy.adjust.map_or_else(
                    || "none".to_owned(),
                    |adjust| {
                        let [floor, ceiling] =
                            [adjust.floor, adjust.ceiling].map(|factor| times(factor.milli));
                        format!("from_history: {}, {floor}x to {ceiling}x", adjust.from_history)
                    },
                ),
            ),
            (
                "rollout.critical",
                list(rollout.critical().map(TenantName::as_str).collect()),
            ),
        ]
    }
}

/// The limits of one tenant that differ.
fn limits_changed(who: &str, old: &Side, new: &Side, tenant: &TenantName, changes: &mut Vec<Change>) {
    if old.thresholds(tenant) == new.thresholds(tenant) {
        return;
    }
    let pairs = old
        .derive(tenant)
        .limits()
        .into_iter()
        .zip(new.derive(tenant).limits());
    for (old, new) in pairs.filter(|(old, new)| old.raw != new.raw) {
        changes.push(Change {
            who: who.to_owned(),
            limit: new.name,
            old: old.value,
            new: new.value,
            raw: Some([old.raw, new.raw]),
            from: Some(new.from),
        });
    }
}

pub(super) fn compare(old: &Side, new: &Side) -> Changes {
    let mut changes = Vec::new();
    for ((limit, old), (_, new)) in old.settings().into_iter().zip(new.settings()) {
        if old != new {
            changes.push(Change {
                who: "(rollout)".to_owned(),
                limit,
                old,
                new,
                raw: None,
                from: None,
            });
        }
    }
    limits_changed("(default)", old, new, &TenantName::none(), &mut changes);
    let tenants: BTreeSet<TenantName> = old.tenants().chain(new.tenants()).collect();
    let mut tenants_changed = 0;
    for tenant in &tenants {
        let before = changes.len();
        limits_changed(tenant.as_str(), old, new, tenant, &mut changes);
        let [old, new] = [old, new].map(|side| side.policy.cohorts_of(tenant));
        if old != new {
            let text = |cohorts: Vec<String>| format!("[{}]", cohorts.join(", "));
            changes.push(Change {
                who: tenant.as_str().to_owned(),
                limit: "cohorts",
                old: text(old),
                new: text(new),
                raw: None,
                from: None,
            });
        }
        tenants_changed += usize::from(changes.len() > before);
    }
    Changes {
        changes,
        tenants: tenants.len(),
        tenants_changed,
    }
}

pub(super) fn run(old: &Side, new: &Side, output: Output) -> Result<Exit, Failure> {
    if old.policy.service != new.policy.service {
        return Err(Failure::usage(format!(
            "the policies are for two services, {} and {}",
            old.policy.service, new.policy.service
        )));
    }
    let Changes {
        changes,
        tenants,
        tenants_changed,
    } = compare(old, new);
    if output == Output::Json {
        say(&json!({
            "service": new.policy.service,
            "changes": changes,
            "tenants": tenants,
            "tenants_changed": tenants_changed,
        }));
        return Ok(Exit::Good);
    }
    let width =
        |text: fn(&Change) -> &str| changes.iter().map(|change| text(change).len()).max().unwrap_or(0);
    let (who, limit) = (width(|change| &change.who), width(|change| change.limit));
    for change in &changes {
        let from = change
            .from
            .as_ref()
            .map_or_else(String::new, |from| format!("  ({from})"));
        say(&format_args!(
            "{:<who$}  {:<limit$}  {} -> {}{from}",
            change.who, change.limit, change.old, change.new
        ));
    }
    say(&format_args!(
        "{} changes; of {tenants} tenants that are named, {tenants_changed} change and {} do not",
        changes.len(),
        tenants - tenants_changed
    ));
    Ok(Exit::Good)
}
