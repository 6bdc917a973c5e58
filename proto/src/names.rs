//! Names that cross the wire, and the outcomes that a request can have.
//!
//! A tenant's name comes from a request, so it is hostile input: it is checked here, once, and the
//! rest of the system only handles [`TenantName`]s.

use std::{borrow::Borrow, fmt, sync::Arc};

/// Longest name that is accepted, in bytes.
pub const MAX_NAME_BYTES: usize = 128;

/// Tenant of requests that no rule gave a tenant.
pub const NO_TENANT: &str = "__none__";

/// Tenant that takes the requests of all tenants beyond the agent's limit of distinct ones.
pub const OVERFLOW_TENANT: &str = "__overflow__";

/// Why a name is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// The name has no bytes.
    #[error("is empty; give 1 to {MAX_NAME_BYTES} bytes")]
    Empty,
    /// The name has more than [`MAX_NAME_BYTES`] bytes.
    #[error("is {0} bytes long; at most {MAX_NAME_BYTES} are allowed")]
    TooLong(usize),
    /// The name has a byte outside the allowed set.
    #[error("has the character {0:?}; allowed are letters, digits and . _ - : @ / + = ~")]
    BadCharacter(char),
    /// The name begins with two underscores, which are kept for Coalmine's own.
    #[error("begins with \"__\", which is kept for names that Coalmine gives itself")]
    Reserved,
}

/// Checks that `name` may be used for a service, a version, an agent or a tenant.
pub fn check_name(name: &[u8]) -> Result<&str, NameError> {
    if name.is_empty() {
        return Err(NameError::Empty);
    }
    if name.len() > MAX_NAME_BYTES {
        return Err(NameError::TooLong(name.len()));
    }
    match std::str::from_utf8(name) {
        Ok(text) => match text.chars().find(|c| !is_name_character(*c)) {
            None => Ok(text),
            Some(c) => Err(NameError::BadCharacter(c)),
        },
        Err(_) => Err(NameError::BadCharacter(char::REPLACEMENT_CHARACTER)),
    }
}

const fn is_name_character(c: char) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-' | ':' | '@' | '/' | '+' | '=' | '~')
}

/// The validated name of a tenant; cheap to clone, ordered by its bytes.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TenantName(Arc<str>);

impl TenantName {
    /// Validates a name that came from a request or a file. Reserved names are refused.
    pub fn parse(name: &[u8]) -> Result<Self, NameError> {
        let text = check_name(name)?;
        if text.starts_with("__") {
            return Err(NameError::Reserved);
        }
        Ok(Self(text.into()))
    }

    /// Validates a name that came from an agent or from evidence: [`NO_TENANT`] and [`OVERFLOW_TENANT`] are allowed.
    pub fn parse_counted(name: &str) -> Result<Self, NameError> {
        if name == NO_TENANT || name == OVERFLOW_TENANT {
            return Ok(Self(name.into()));
        }
        Self::parse(name.as_bytes())
    }

    /// [`NO_TENANT`].
    pub fn none() -> Self {
        Self(NO_TENANT.into())
    }

    /// [`OVERFLOW_TENANT`].
    pub fn overflow() -> Self {
        Self(OVERFLOW_TENANT.into())
    }

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl Borrow<str> for TenantName {
    fn borrow(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for TenantName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for TenantName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", &*self.0)
    }
}

/// Which side of a rollout an agent measures.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Arm {
    /// The new version.
    Canary,
    /// The version that users have today.
    Baseline,
}

/// The label that says which arm a pod is of.
pub const ARM_LABEL: &str = "coalmine.dev/arm";

/// What the label says where Flagger rolls out: it gives the primary's pods the labels of the canary's, all but the one
/// that its Deployment selects by, which is one of these, and ends in this.
const FLAGGER: &str = "flagger";
const FLAGGER_SELECTS_BY: [&str; 3] = ["app", "name", "app.kubernetes.io/name"];
const FLAGGER_PRIMARY: &str = "-primary";

impl Arm {
    /// The arm that a pod's labels say; none if they say nothing of it.
    pub fn of_labels<'l>(label: impl Fn(&str) -> Option<&'l str>) -> Option<Result<Self, String>> {
        let said = label(ARM_LABEL)?;
        if said != FLAGGER {
            return Some(said.parse());
        }
        let mut selects = FLAGGER_SELECTS_BY.iter().filter_map(|name| label(name));
        let is_primary = selects.any(|value| value.ends_with(FLAGGER_PRIMARY));
        Some(Ok(if is_primary { Self::Baseline } else { Self::Canary }))
    }

    /// Both arms, in the order in which they are listed everywhere.
    pub const ALL: [Self; 2] = [Self::Canary, Self::Baseline];

    /// The arm's name in files, labels and answers.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Canary => "canary",
            Self::Baseline => "baseline",
        }
    }

    /// The arm as messages carry it.
    pub const fn to_wire(self) -> crate::v1::Arm {
        match self {
            Self::Canary => crate::v1::Arm::Canary,
            Self::Baseline => crate::v1::Arm::Baseline,
        }
    }

    /// Reads the arm from a message; none if it is not given.
    pub const fn from_wire(arm: crate::v1::Arm) -> Option<Self> {
        match arm {
            crate::v1::Arm::Canary => Some(Self::Canary),
            crate::v1::Arm::Baseline => Some(Self::Baseline),
            crate::v1::Arm::Unspecified => None,
        }
    }
}

impl std::str::FromStr for Arm {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "canary" => Ok(Self::Canary),
            "baseline" => Ok(Self::Baseline),
            other => Err(format!("{other:?} is not an arm; say canary or baseline")),
        }
    }
}

impl fmt::Display for Arm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// How a request ended, as the agent saw it from the middle.
///
/// | outcome | seen | an error of the service | has a latency |
/// |---|---|---|---|
/// | `success` | status 1xx to 3xx; gRPC status 0 or one that is the caller's (see [`Outcome::of_grpc_status`]) | no | yes |
/// | `client_error` | status 4xx | no | yes |
/// | `server_error` | status 5xx; gRPC status that is the service's | yes | yes |
/// | `connect_failure` | the application accepted no connection | yes | no |
/// | `upstream_reset` | the application closed or reset before its answer was complete | yes | no |
/// | `timeout` | the agent's idle limit passed, or a gRPC call's deadline, at which its caller gave it up | yes | no |
/// | `client_abort` | the client went away before the answer was complete | not counted | no |
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Outcome {
    /// Answered, and well.
    Success = 0,
    /// Answered: the client was wrong.
    ClientError = 1,
    /// Answered: the service failed.
    ServerError = 2,
    /// The application could not be reached.
    ConnectFailure = 3,
    /// The application broke off.
    UpstreamReset = 4,
    /// No answer in time.
    Timeout = 5,
    /// The client went away; says nothing about the service.
    ClientAbort = 6,
}

impl Outcome {
    /// How many outcomes there are.
    pub const COUNT: usize = 7;

    /// All outcomes, in the order of their numbers.
    pub const ALL: [Self; Self::COUNT] = [
        Self::Success,
        Self::ClientError,
        Self::ServerError,
        Self::ConnectFailure,
        Self::UpstreamReset,
        Self::Timeout,
        Self::ClientAbort,
    ];

    /// The outcome of a request that was answered with this HTTP status.
    pub const fn of_http_status(status: u16) -> Self {
        match status {
            0..400 => Self::Success,
            400..500 => Self::ClientError,
            _ => Self::ServerError,
        }
    }

    /// The outcome of a gRPC call that ended with this status code.
    ///
    /// The service's own failures are UNKNOWN (2), DEADLINE_EXCEEDED (4), RESOURCE_EXHAUSTED (8),
    /// UNIMPLEMENTED (12), INTERNAL (13), UNAVAILABLE (14) and DATA_LOSS (15), and any number that gRPC
    /// does not define; the codes are those of grpc/doc/statuscodes.md.
    pub const fn of_grpc_status(code: u32) -> Self {
        match code {
            0 => Self::Success,
            1 | 3 | 5 | 6 | 7 | 9 | 10 | 11 | 16 => Self::ClientError,
            _ => Self::ServerError,
        }
    }

    /// Whether the service is to blame.
    pub const fn is_error(self) -> bool {
        matches!(
            self,
            Self::ServerError | Self::ConnectFailure | Self::UpstreamReset | Self::Timeout
        )
    }

    /// Whether the request counts at all; an abort by the client says nothing about the service.
    pub const fn is_counted(self) -> bool {
        !matches!(self, Self::ClientAbort)
    }

    /// Whether an answer arrived whole, so that it has a latency.
    pub const fn is_answered(self) -> bool {
        matches!(self, Self::Success | Self::ClientError | Self::ServerError)
    }

    /// The outcome's name in labels and answers.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Success => "success",
            Self::ClientError => "client_error",
            Self::ServerError => "server_error",
            Self::ConnectFailure => "connect_failure",
            Self::UpstreamReset => "upstream_reset",
            Self::Timeout => "timeout",
            Self::ClientAbort => "client_abort",
        }
    }
}

/// Counts of requests by outcome.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Outcomes(pub [u64; Outcome::COUNT]);

impl Outcomes {
    /// Counts one request.
    pub fn record(&mut self, outcome: Outcome) {
        self.0[outcome as usize] += 1;
    }

    /// The count of one outcome.
    pub fn get(&self, outcome: Outcome) -> u64 {
        self.0[outcome as usize]
    }

    /// Adds the counts of another window.
    pub fn add(&mut self, other: &Self) {
        for (mine, theirs) in self.0.iter_mut().zip(other.0) {
            *mine = mine.saturating_add(theirs);
        }
    }

    /// Requests that count for the judge.
    pub fn requests(&self) -> u64 {
        self.sum(Outcome::is_counted)
    }

    /// Requests in which the service failed.
    pub fn errors(&self) -> u64 {
        self.sum(Outcome::is_error)
    }

    /// Every request that was seen, aborted ones included.
    pub fn seen(&self) -> u64 {
        self.sum(|_| true)
    }

    /// Whether nothing was counted.
    pub fn is_empty(&self) -> bool {
        self.0 == [0; Outcome::COUNT]
    }

    fn sum(&self, wanted: impl Fn(Outcome) -> bool) -> u64 {
        Outcome::ALL
            .into_iter()
            .filter(|outcome| wanted(*outcome))
            .fold(0, |sum, outcome| sum.saturating_add(self.get(outcome)))
    }

    /// Writes the counts into a row.
    pub fn to_row(&self, row: &mut crate::v1::TenantRow) {
        [
            row.success,
            row.client_error,
            row.server_error,
            row.connect_failure,
            row.upstream_reset,
            row.timeout,
            row.client_abort,
        ] = self.0;
    }

    /// Reads the counts of a row.
    pub fn from_row(row: &crate::v1::TenantRow) -> Self {
        Self([
            row.success,
            row.client_error,
            row.server_error,
            row.connect_failure,
            row.upstream_reset,
            row.timeout,
            row.client_abort,
        ])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_checked() {
        assert_eq!(TenantName::parse(b"acme-corp").unwrap().as_str(), "acme-corp");
        assert_eq!(TenantName::parse(b""), Err(NameError::Empty));
        assert_eq!(TenantName::parse(&[b'a'; 200]), Err(NameError::TooLong(200)));
        assert_eq!(TenantName::parse(b"a b"), Err(NameError::BadCharacter(' ')));
        assert_eq!(TenantName::parse(b"a\n"), Err(NameError::BadCharacter('\n')));
        assert_eq!(
            TenantName::parse(&[0xff]),
            Err(NameError::BadCharacter('\u{fffd}'))
        );
        assert_eq!(TenantName::parse(b"__none__"), Err(NameError::Reserved));
        assert_eq!(TenantName::parse_counted("__none__").unwrap(), TenantName::none());
        assert_eq!(TenantName::parse_counted("__other"), Err(NameError::Reserved));
    }

    #[test]
    fn outcomes_say_who_is_to_blame() {
        let mut counts = Outcomes::default();
        for status in [200, 204, 302, 404, 500, 503] {
            counts.record(Outcome::of_http_status(status));
        }
        counts.record(Outcome::ClientAbort);
        counts.record(Outcome::UpstreamReset);
        assert_eq!((counts.requests(), counts.errors(), counts.seen()), (7, 3, 8));
        assert_eq!(Outcome::of_grpc_status(5), Outcome::ClientError);
        assert_eq!(Outcome::of_grpc_status(14), Outcome::ServerError);
        assert_eq!(Outcome::of_grpc_status(99), Outcome::ServerError);
    }

    #[test]
    fn labels_say_the_arm_and_flaggers_primary_is_the_baseline() {
        for (labels, expected) in [
            (vec![], None),
            (vec![("app", "checkout")], None),
            (vec![(ARM_LABEL, "canary")], Some(Ok(Arm::Canary))),
            // Nobody but Flagger names a primary like that.
            (
                vec![(ARM_LABEL, "canary"), ("app", "x-primary")],
                Some(Ok(Arm::Canary)),
            ),
            (
                vec![(ARM_LABEL, "flagger"), ("app", "checkout")],
                Some(Ok(Arm::Canary)),
            ),
            (
                vec![(ARM_LABEL, "flagger"), ("app", "checkout-primary")],
                Some(Ok(Arm::Baseline)),
            ),
            (
                vec![(ARM_LABEL, "flagger"), ("app", "a"), ("name", "checkout-primary")],
                Some(Ok(Arm::Baseline)),
            ),
            (
                vec![(ARM_LABEL, "flagger"), ("team", "x-primary")],
                Some(Ok(Arm::Canary)),
            ),
        ] {
            let label = |name: &str| {
                let mut all = labels.iter();
                all.find_map(|(known, value)| (*known == name).then_some(*value))
            };
            assert_eq!(Arm::of_labels(label), expected, "{labels:?}");
        }
        assert!(Arm::of_labels(|_| Some("stable")).unwrap().is_err());
    }
}
