//! What the aggregator tells an agent to count, and against what.

use std::collections::HashMap;

use coalmine_proto::{names::TenantName, rule, v1};

use crate::tenant::Rule;

/// Latency limits and rules for tenants, as the aggregator pushed them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Settings {
    /// The version that the aggregator gave them; 0 before the first.
    pub version: u64,
    /// For tenants that are not listed, in microseconds; 0 for none.
    pub default_us: u64,
    /// For tenants that are listed; they always have a place.
    pub by_tenant: HashMap<TenantName, u64>,
    /// Where a request's tenant stands.
    pub rules: PushedRules,
}

/// The rules that the aggregator pushed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum PushedRules {
    /// It pushed none: those that the agent was started with hold.
    #[default]
    None,
    /// These hold instead.
    Rules(Vec<Rule>),
    /// One of them, or the list, cannot be used: all are refused, and those in force stay.
    Refused(String),
}

// === impl Settings ===

impl Settings {
    /// Reads the settings from a message; limits of names that are not allowed are left out.
    pub fn from_wire(config: &v1::Config) -> Self {
        let listed = config.limits.iter().filter_map(|limit| {
            let name = TenantName::parse_counted(&limit.tenant).ok()?;
            Some((name, limit.limit_us))
        });
        Self {
            version: config.version,
            default_us: config.default_limit_us,
            by_tenant: listed.collect(),
            rules: PushedRules::from_wire(&config.tenant_rules),
        }
    }

    /// Whether the policy names the tenant.
    pub(super) fn lists(&self, name: &str) -> bool {
        self.by_tenant.contains_key(name)
    }
}

// === impl PushedRules ===

impl PushedRules {
    fn from_wire(rules: &[String]) -> Self {
        if rules.is_empty() {
            return Self::None;
        }
        match rule::parse_list(rules.iter().map(String::as_str)) {
            Ok(rules) => Self::Rules(rules),
            Err(why) => Self::Refused(why.to_string()),
        }
    }
}
