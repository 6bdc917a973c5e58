//! What a metric says about a pool: roles, the look-up by name, and `--pool-metric`.

use std::{collections::HashMap, str::FromStr};

use super::{
    exposition::{Sample, is_of_name},
    sources::{ANY_POOL, SOURCES},
};

/// The longest name that `--pool-metric` may give.
const MAX_NAME_BYTES: usize = 200;

/// Who exposes a metric. Where two of them give the same number of one pool, the first in this order counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Source {
    /// The operator, by `--pool-metric`.
    Custom,
    /// HikariCP, by Micrometer or by its own tracker for Prometheus.
    Hikari,
    /// Spring Boot's gauges of any data source.
    Spring,
    /// Go's `database/sql`.
    GoSql,
    /// pgxpool.
    Pgxpool,
    /// OpenTelemetry's `db.client.connection.*`.
    OtelConnection,
    /// OpenTelemetry's `db.client.connections.*`, which came before.
    OtelConnections,
    /// SQLAlchemy, by names in use for its pool's methods.
    SqlAlchemy,
    /// node-postgres, by names in use for its pool's properties.
    NodePostgres,
    /// sqlx, by the names of its pool's methods.
    Sqlx,
    /// bb8, by the names of its pool's state.
    Bb8,
    /// deadpool, by the names of its pool's status.
    Deadpool,
    /// The exporter of PgBouncer.
    PgBouncer,
}

/// What a number says about a pool, whatever the metric is called.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Quantity {
    /// Connections in use.
    Used,
    /// Connections that are open and not in use.
    Idle,
    /// Both.
    Open,
    /// Most connections that the pool may open.
    Max,
    /// Callers that wait now.
    Waiters,
    /// Connections that were asked for.
    Acquires,
    /// Transactions, each of which needs a connection.
    Transactions,
    /// Acquires that had to wait.
    Waits,
    /// Acquires that gave up.
    Timeouts,
    /// Nanoseconds that callers waited.
    WaitNs,
    /// Nanoseconds that asking took, waits or not.
    AcquireNs,
    /// Requests for a connection in a histogram of their time.
    Timed,
    /// Of these, how many were too fast for a wait.
    TimedFast,
}

/// What a metric says about a pool, with its unit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Role {
    /// The number itself.
    Count(Quantity),
    /// A time, in this unit.
    Time(Quantity, Unit),
    /// The buckets of a histogram of how long asking for a connection took, with limits in this unit.
    AcquireBucket(Unit),
}

/// A unit of time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Unit {
    /// ns
    Nanos,
    /// ms
    Millis,
    /// s
    Seconds,
}

/// `ROLE=NAME` or `ROLE=NAME{LABEL=VALUE}`: a metric that only the operator knows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CustomMetric {
    role: Role,
    name: String,
    condition: Option<(String, String)>,
}

/// How samples of one name are read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Rule {
    pub(super) source: Source,
    pub(super) role: Role,
    /// The name without `_total`.
    pub(super) name: String,
    pool: &'static [&'static str],
    except: Option<&'static str>,
    /// One of these labels, if the sample has one, must have this value.
    condition: Option<(Vec<String>, String)>,
}

/// All names that say something about a pool.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Mapping {
    rules: HashMap<String, Vec<Rule>>,
}

/// The roles that the operator may give, by name.
const ROLES: &[(&str, Role)] = &[
    ("used", Role::Count(Quantity::Used)),
    ("idle", Role::Count(Quantity::Idle)),
    ("open", Role::Count(Quantity::Open)),
    ("max", Role::Count(Quantity::Max)),
    ("waiters", Role::Count(Quantity::Waiters)),
    ("acquires", Role::Count(Quantity::Acquires)),
    ("waits", Role::Count(Quantity::Waits)),
    ("timeouts", Role::Count(Quantity::Timeouts)),
    ("wait_seconds", Role::Time(Quantity::WaitNs, Unit::Seconds)),
    ("wait_millis", Role::Time(Quantity::WaitNs, Unit::Millis)),
    ("wait_nanos", Role::Time(Quantity::WaitNs, Unit::Nanos)),
    ("acquire_bucket", Role::AcquireBucket(Unit::Seconds)),
];

// === impl Quantity ===

impl Quantity {
    /// How many there are.
    pub const COUNT: usize = 13;

    /// Whether it is a state, and not a count that only rises.
    pub fn is_gauge(self) -> bool {
        use Quantity::{Idle, Max, Open, Used, Waiters};
        matches!(self, Used | Idle | Open | Max | Waiters)
    }
}

// === impl Role ===

impl Role {
    fn is_gauge(self) -> bool {
        matches!(self, Self::Count(quantity) if quantity.is_gauge())
    }

    /// What the value of a sample says; a bucket says something only together with others.
    pub(super) fn number(self, value: f64) -> Option<(Quantity, u64)> {
        match self {
            Self::Count(quantity) => Some((quantity, whole(value)?)),
            Self::Time(quantity, unit) => Some((quantity, whole(value * unit.ns())?)),
            Self::AcquireBucket(_) => None,
        }
    }
}

/// The whole part of a number that counts something. There is none below zero, nor beyond what any
/// application can have counted.
pub(super) fn whole(value: f64) -> Option<u64> {
    /// 2^63
    const LIMIT: f64 = 9_223_372_036_854_775_808.0;
    (0.0..LIMIT).contains(&value).then_some(value as u64)
}

// === impl Unit ===

impl Unit {
    pub(super) fn ns(self) -> f64 {
        match self {
            Self::Nanos => 1.0,
            Self::Millis => 1e6,
            Self::Seconds => 1e9,
        }
    }
}

// === impl CustomMetric ===

impl FromStr for CustomMetric {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let bad = || format!("{text:?} is not ROLE=NAME, as in waits=app_pool_waits_total");
        let (role, rest) = text.split_once('=').ok_or_else(bad)?;
        let Some((_, role)) = ROLES.iter().find(|(name, _)| *name == role) else {
            let roles: Vec<&str> = ROLES.iter().map(|(name, _)| *name).collect();
            return Err(format!("{role:?} is no role; there are {}", roles.join(", ")));
        };
        let (name, condition) = match rest.split_once('{') {
            Some((name, labels)) => (name, Some(condition(labels).ok_or_else(|| bad_condition(text))?)),
            None => (rest, None),
        };
        if !is_metric_name(name) {
            return Err(format!(
                "{name:?} is no name of a metric, as in app_pool_waits_total"
            ));
        }
        let mut name = name.to_owned();
        if matches!(role, Role::AcquireBucket(_)) && !name.ends_with("_bucket") {
            name.push_str("_bucket");
        }
        Ok(Self {
            role: *role,
            name,
            condition,
        })
    }
}

fn bad_condition(text: &str) -> String {
    format!("{text:?} has a condition that is not {{LABEL=VALUE}}, as in used=app_connections{{state=busy}}")
}

/// `LABEL=VALUE}`, the value with or without quotes.
fn condition(text: &str) -> Option<(String, String)> {
    let (label, value) = text.strip_suffix('}')?.split_once('=')?;
    let quoted = value.strip_prefix('"').and_then(|value| value.strip_suffix('"'));
    let value = quoted.unwrap_or(value);
    let is_plain = !value.contains(['"', '\\', '{', '}', ',']);
    (is_metric_name(label) && is_plain).then(|| (label.to_owned(), value.to_owned()))
}

fn is_metric_name(name: &str) -> bool {
    let starts_well = name.bytes().next().is_some_and(|byte| !byte.is_ascii_digit());
    starts_well && name.len() <= MAX_NAME_BYTES && name.bytes().all(is_of_name)
}

// === impl Rule ===

impl Rule {
    /// The pool that a sample is about, if the rule applies to it.
    pub(super) fn pool<'a>(&self, sample: &'a Sample<'_>) -> Option<&'a str> {
        if let Some((labels, value)) = &self.condition
            && labels.iter().find_map(|label| sample.label(label)) != Some(value.as_str())
        {
            return None;
        }
        let pool = self.pool.iter().find_map(|label| sample.label(label));
        let pool = pool.unwrap_or_default();
        (self.except != Some(pool)).then_some(pool)
    }
}

// === impl Mapping ===

impl Mapping {
    /// What is known, and what the operator says: of a metric that both name, only the latter holds.
    pub(super) fn new(custom: &[CustomMetric]) -> Self {
        let mut new = Self {
            rules: HashMap::new(),
        };
        for known in SOURCES {
            for (name, state, roles) in known.metrics {
                let condition = (!state.is_empty()).then(|| {
                    let labels = known.state.iter().map(|label| (*label).to_owned());
                    (labels.collect(), (*state).to_owned())
                });
                for role in *roles {
                    new.insert(Rule {
                        source: known.source,
                        role: *role,
                        name: (*name).to_owned(),
                        pool: known.pool,
                        except: known.except,
                        condition: condition.clone(),
                    });
                }
            }
        }
        for metric in custom {
            for name in spellings(&metric.name, metric.role) {
                new.rules.remove(&name);
            }
        }
        for metric in custom {
            let condition = metric.condition.clone();
            new.insert(Rule {
                source: Source::Custom,
                role: metric.role,
                name: stem(&metric.name, metric.role).to_owned(),
                pool: ANY_POOL,
                except: None,
                condition: condition.map(|(label, value)| (vec![label], value)),
            });
        }
        new
    }

    /// How samples of this name are read; none if the name says nothing.
    pub(super) fn find(&self, name: &str) -> &[Rule] {
        self.rules.get(name).map(Vec::as_slice).unwrap_or_default()
    }

    fn insert(&mut self, rule: Rule) {
        for name in spellings(&rule.name, rule.role) {
            self.rules.entry(name).or_default().push(rule.clone());
        }
    }
}

/// The names that a metric may have: OpenMetrics ends a counter's with `_total`, others may not.
fn spellings(name: &str, role: Role) -> Vec<String> {
    let stem = stem(name, role);
    let mut spellings = vec![stem.to_owned()];
    if !role.is_gauge() {
        spellings.push(format!("{stem}_total"));
    }
    spellings
}

/// The name of a counter without `_total`; that of a gauge is left as it is.
fn stem(name: &str, role: Role) -> &str {
    let counter = name.strip_suffix("_total").filter(|_| !role.is_gauge());
    counter.unwrap_or(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rejected(text: &str) -> String {
        text.parse::<CustomMetric>().unwrap_err()
    }

    #[test]
    fn custom_metrics_are_parsed() {
        let metric: CustomMetric = "waits=app_pool_waits_total".parse().unwrap();
        assert_eq!(metric.role, Role::Count(Quantity::Waits));
        assert_eq!(
            (metric.name.as_str(), metric.condition),
            ("app_pool_waits_total", None)
        );
        let busy = Some(("state".to_owned(), "busy".to_owned()));
        for text in ["used=app_conns{state=busy}", "used=app_conns{state=\"busy\"}"] {
            let metric: CustomMetric = text.parse().unwrap();
            assert_eq!((metric.name.as_str(), &metric.condition), ("app_conns", &busy));
        }
        let metric: CustomMetric = "acquire_bucket=app_acquire_seconds".parse().unwrap();
        assert_eq!(metric.name, "app_acquire_seconds_bucket");
        for (role, _) in ROLES {
            assert!(format!("{role}=a").parse::<CustomMetric>().is_ok(), "{role}");
        }
    }

    #[test]
    fn errors_say_what_to_do() {
        assert_eq!(
            rejected("app_pool_waits"),
            "\"app_pool_waits\" is not ROLE=NAME, as in waits=app_pool_waits_total"
        );
        assert!(rejected("wait=a").starts_with("\"wait\" is no role; there are used, idle, open, max, "));
        for text in ["used=", "used=1a", "used=a b", "used=é", "used={state=busy}"] {
            assert!(rejected(text).contains("is no name of a metric"), "{text}");
        }
        let long = format!("used={}", "a".repeat(MAX_NAME_BYTES + 1));
        assert!(rejected(&long).contains("is no name of a metric"));
        for text in [
            "used=a{",
            "used=a{}",
            "used=a{state}",
            "used=a{state=b",
            "used=a{x=1,y=2}",
        ] {
            assert!(rejected(text).contains("{LABEL=VALUE}"), "{text}");
        }
    }

    #[test]
    fn counters_have_two_spellings_and_gauges_one() {
        let mapping = Mapping::new(&[
            "acquires=a_total".parse().unwrap(),
            "used=b_total".parse().unwrap(),
        ]);
        assert_eq!(mapping.find("a").len(), 1);
        assert_eq!(mapping.find("a"), mapping.find("a_total"));
        assert_eq!((mapping.find("b").len(), mapping.find("b_total").len()), (0, 1));
        assert_eq!(mapping.find("go_sql_wait_count").len(), 1);
        assert_eq!(mapping.find("go_sql_wait_count_total").len(), 1);
        assert_eq!(mapping.find("go_sql_idle_connections_total").len(), 0);
    }

    #[test]
    fn the_operator_knows_better() {
        let mapping = Mapping::new(&["timeouts=pgxpool_canceled_acquire_count".parse().unwrap()]);
        let rules = mapping.find("pgxpool_canceled_acquire_count");
        let roles: Vec<_> = rules.iter().map(|rule| (rule.source, rule.role)).collect();
        assert_eq!(roles, [(Source::Custom, Role::Count(Quantity::Timeouts))]);
    }

    #[test]
    fn numbers_that_count_nothing_are_ignored() {
        for value in [
            -1.0,
            -0.001,
            f64::NAN,
            f64::INFINITY,
            f64::NEG_INFINITY,
            1e300,
            9.3e18,
        ] {
            assert_eq!(whole(value), None, "{value}");
        }
        assert_eq!([whole(-0.0), whole(0.9), whole(7.0)], [Some(0), Some(0), Some(7)]);
        let time = Role::Time(Quantity::WaitNs, Unit::Millis);
        assert_eq!(time.number(1.5), Some((Quantity::WaitNs, 1_500_000)));
        assert_eq!(time.number(1e300), None);
    }

    #[test]
    fn quantities_are_numbered() {
        assert_eq!(Quantity::TimedFast as usize + 1, Quantity::COUNT);
    }
}
