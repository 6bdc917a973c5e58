//! Replay: judges the recorded evidence again and compares the bytes.
//!
//! Nothing is needed but the log's records and the blobs that they name.

use std::{collections::BTreeMap, sync::Arc};

use crate::{
    chain::Hash,
    evidence::Window,
    history::History,
    manifest::{Manifest, Snapshot},
    policy::Policy,
    record::{Anomaly, Body, Decision, Finding, HoldDeadline, MAX_ANOMALIES, Record, RolloutStart},
    v1::{self, Judge, Outcome, State, UnitReport},
};

/// Where blobs come from. An implementation checks the digest of what it returns.
pub trait Blobs {
    /// The content of a blob.
    fn bytes(&self, digest: &Hash) -> Result<Vec<u8>, String>;

    /// The content of a blob that is text.
    fn text(&self, digest: &Hash) -> Result<String, String> {
        String::from_utf8(self.bytes(digest)?).map_err(|_| "is not UTF-8".to_owned())
    }
}

/// What became of a record when it was judged again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Replayed {
    /// No decision; nothing to judge.
    Other,
    /// The same bytes.
    Same,
    /// Something differs or is missing.
    Different {
        /// The decision or rollout.
        name: String,
        /// What differs, or why it could not be judged.
        problem: String,
    },
}

/// Replays a log, record by record, in order.
#[derive(Debug, Default)]
pub struct Replay {
    rollouts: BTreeMap<String, Result<Judged, String>>,
}

/// A rollout as it stands after the records taken so far.
#[derive(Debug)]
pub struct Judged {
    /// How it began.
    pub start: RolloutStart,
    /// Its judge.
    pub judge: Judge,
    /// What the judge said last.
    pub outcome: Option<Outcome>,
    /// What the last decision rests on.
    pub manifest: Manifest,
}

impl Judged {
    /// A rollout that begins, with the texts of its policy and its history.
    pub fn begin(start: &RolloutStart, policy: &str, history: Option<&str>) -> Result<Self, String> {
        Ok(Self {
            judge: judge_for(start, policy, history, None)?,
            start: start.clone(),
            outcome: None,
            manifest: Manifest::begin(start.clone()),
        })
    }

    /// The same with the blobs that have the texts.
    pub fn begin_with(start: &RolloutStart, blobs: &dyn Blobs) -> Result<Self, String> {
        let (policy, history) = texts(start, blobs)?;
        Self::begin(start, &policy, history.as_deref())
    }

    /// A rollout as a decision left it, from what the decision rests on and nothing else. Where that begins with a
    /// snapshot, the snapshot is believed.
    pub fn resume(manifest: Manifest, blobs: &dyn Blobs) -> Result<Self, String> {
        let start = &manifest.rollout;
        let (policy, history) = texts(start, blobs)?;
        let snapshot = manifest.snapshot.map(|snapshot| {
            let state = blobs.bytes(&snapshot.state);
            state.map_err(|error| format!("its snapshot {} {error}", snapshot.state))
        });
        let judge = judge_for(
            start,
            &policy,
            history.as_deref(),
            snapshot.transpose()?.as_deref(),
        )?;
        if judge.last_window() != manifest.snapshot.map(|snapshot| snapshot.window) {
            return Err("its snapshot is that of another window".to_owned());
        }
        let mut judged = Self {
            start: start.clone(),
            judge,
            outcome: None,
            manifest: manifest.clone(),
        };
        for digest in &manifest.windows {
            judged.step(digest, blobs)?;
        }
        Ok(judged)
    }

    /// Judges the next window.
    fn step(&mut self, evidence: &Hash, blobs: &dyn Blobs) -> Result<(), String> {
        let text = text(blobs, "evidence", evidence)?;
        let window = Window::from_json(&text).map_err(|error| format!("its evidence is refused: {error}"))?;
        let start = &self.start;
        let place = (self.judge.last_window().unwrap_or(0) + 1, start.window_ms);
        let begin = start.start_ms.checked_add((place.0 - 1).saturating_mul(place.1));
        if (window.number, window.len_ms) != place || Some(window.start_ms) != begin {
            return Err(format!("its evidence is not that of window {}", place.0));
        }
        self.outcome = Some(self.judge.step(&window).map_err(|error| error.to_string())?);
        Ok(())
    }

    /// What is recorded of a hold deadline that the last window has reached.
    pub fn hold_deadline(&self) -> Option<HoldDeadline> {
        let outcome = self.outcome.as_ref()?;
        let deadline = outcome.deadline?;
        Some(HoldDeadline {
            rollout: self.start.rollout.clone(),
            decision: self.start.decision_id(outcome.window),
            held_ms: deadline.held_ms,
            on_deadline: deadline.action.as_str().to_owned(),
            verdict: outcome.verdict.as_str().to_owned(),
        })
    }
}

/// The texts of a rollout's policy and history.
fn texts(start: &RolloutStart, blobs: &dyn Blobs) -> Result<(String, Option<String>), String> {
    let history = start.history.map(|digest| text(blobs, "history", &digest));
    Ok((text(blobs, "policy", &start.policy)?, history.transpose()?))
}

/// A judge for a rollout, from its record, the texts of its policy and its history, and a saved state to go on with.
fn judge_for(
    start: &RolloutStart,
    policy: &str,
    history: Option<&str>,
    saved: Option<&[u8]>,
) -> Result<Judge, String> {
    if start.judge != v1::ID {
        return Err(format!(
            "was judged by {}, which this program does not have (it has {})",
            start.judge,
            v1::ID
        ));
    }
    let policy = Policy::parse(policy).map_err(|error| format!("its policy is refused: {error}"))?;
    let history = match history {
        Some(text) => {
            let history = History::parse(text).map_err(|error| format!("its history is refused: {error}"))?;
            if history.service != start.service {
                return Err(format!(
                    "its history is that of service {}, and it is a rollout of {}",
                    history.service, start.service
                ));
            }
            Some(Arc::new(history))
        }
        None => None,
    };
    match saved {
        None => Judge::new(policy, history, Some(start.max_windows)).map_err(|error| error.to_string()),
        Some(saved) => Judge::restore(policy, history, Some(start.max_windows), saved)
            .map_err(|error| format!("its snapshot {error}")),
    }
}

/// Judges one decision again, from what it rests on and nothing else.
pub fn replay_decision(decision: &Decision, blobs: &dyn Blobs) -> Result<Judged, String> {
    let manifest = Manifest::parse(&text(blobs, "manifest", &decision.manifest)?)?;
    let start = &manifest.rollout;
    let named = (&decision.rollout, &decision.policy, &decision.judge);
    if named != (&start.rollout, &start.policy, &start.judge) {
        return Err("its manifest is of another rollout, policy or judge".to_owned());
    }
    if manifest.windows.last() != Some(&decision.evidence) {
        return Err("its manifest does not end with its evidence".to_owned());
    }
    if manifest.snapshot.map(|snapshot| snapshot.state) != decision.snapshot {
        return Err("its manifest begins with another snapshot".to_owned());
    }
    let judged = Judged::resume(manifest, blobs)?;
    let outcome = judged.outcome.as_ref().ok_or("its manifest has no window")?;
    match decision.finding.difference(&Finding::of(outcome)) {
        None => Ok(judged),
        Some(difference) => Err(difference),
    }
}

/// The text of a blob that a rollout needs.
fn text(blobs: &dyn Blobs, what: &str, digest: &Hash) -> Result<String, String> {
    blobs
        .text(digest)
        .map_err(|error| format!("its {what} {digest} {error}"))
}

impl Replay {
    /// Takes the next record.
    pub fn take(&mut self, record: &Record, blobs: &dyn Blobs) -> Replayed {
        match &record.body {
            Body::Rollout(start) => {
                let judged = Judged::begin_with(start, blobs);
                if self.rollouts.contains_key(&start.rollout) {
                    let problem = "is begun twice".to_owned();
                    return Replayed::Different {
                        name: start.rollout.clone(),
                        problem,
                    };
                }
                let replayed = match &judged {
                    Ok(_) => Replayed::Other,
                    Err(problem) => Replayed::Different {
                        name: start.rollout.clone(),
                        problem: problem.clone(),
                    },
                };
                self.rollouts.insert(start.rollout.clone(), judged);
                replayed
            }
            Body::Decision(decision) => match self.judge(decision, blobs) {
                Ok(()) => Replayed::Same,
                Err(problem) => Replayed::Different {
                    name: decision.id.clone(),
                    problem,
                },
            },
            Body::Deadline(deadline) => match self.check(deadline) {
                Ok(()) => Replayed::Other,
                Err(problem) => Replayed::Different {
                    name: format!("the hold deadline of {}", deadline.decision),
                    problem,
                },
            },
            Body::End(end) => {
                self.rollouts.remove(&end.rollout);
                Replayed::Other
            }
            // What concerns the log alone.
            _ => Replayed::Other,
        }
    }

    /// A rollout as it stands after the records taken so far.
    pub fn judged(&self, rollout: &str) -> Option<&Judged> {
        self.rollouts.get(rollout)?.as_ref().ok()
    }

    /// Takes a rollout out, to be continued live.
    pub fn remove(&mut self, rollout: &str) -> Option<Judged> {
        self.rollouts.remove(rollout)?.ok()
    }

    /// Whether the decision before has reached its hold deadline, as the record says.
    fn check(&self, deadline: &HoldDeadline) -> Result<(), String> {
        let judged = self
            .judged(&deadline.rollout)
            .ok_or_else(|| format!("belongs to rollout {}, which cannot be judged", deadline.rollout))?;
        let replayed = judged.hold_deadline();
        if replayed.as_ref() == Some(deadline) {
            return Ok(());
        }
        Err(match replayed {
            Some(replayed) => format!(
                "differs: recorded {} ms, {}, {}; replayed {} ms, {}, {}",
                deadline.held_ms,
                deadline.on_deadline,
                deadline.verdict,
                replayed.held_ms,
                replayed.on_deadline,
                replayed.verdict
            ),
            None => "is recorded, and the replay reached none".to_owned(),
        })
    }

    fn judge(&mut self, decision: &Decision, blobs: &dyn Blobs) -> Result<(), String> {
        let judged = match self.rollouts.get_mut(&decision.rollout) {
            None => {
                return Err(format!(
                    "belongs to rollout {}, which no record begins",
                    decision.rollout
                ));
            }
            Some(Err(problem)) => return Err(format!("rollout {}: {problem}", decision.rollout)),
            Some(Ok(judged)) => judged,
        };
        let start = &judged.start;
        if (&decision.policy, &decision.judge) != (&start.policy, &start.judge) {
            return Err("names another policy or judge than its rollout".to_owned());
        }
        let manifest = Manifest::parse(&text(blobs, "manifest", &decision.manifest)?)?;
        if judged.manifest.wants_snapshot() {
            judged
                .manifest
                .rest_on(snapshot(&judged.judge, decision, &manifest, blobs)?);
        }
        judged.manifest.windows.push(decision.evidence);
        if manifest != judged.manifest
            || decision.snapshot != manifest.snapshot.map(|snapshot| snapshot.state)
        {
            return Err("its manifest is not of what the rollout was judged by".to_owned());
        }
        judged.step(&decision.evidence, blobs)?;
        let outcome = judged.outcome.as_ref().ok_or("it was not judged")?;
        let difference = decision.finding.difference(&Finding::of(outcome));
        difference.map_or(Ok(()), Err)
    }
}

/// The snapshot that a manifest must begin with; its bytes are those of the state as it was replayed.
fn snapshot(
    judge: &Judge,
    decision: &Decision,
    manifest: &Manifest,
    blobs: &dyn Blobs,
) -> Result<Snapshot, String> {
    let named = manifest
        .snapshot
        .ok_or("its manifest has no snapshot, and one is due")?;
    let state = blobs.bytes(&named.state);
    let state = state.map_err(|error| format!("its snapshot {} {error}", named.state))?;
    if decision.snapshot != Some(named.state) || Some(named.window) != judge.last_window() {
        return Err("its snapshot is not the one that is due".to_owned());
    }
    if state != judge.save() {
        return Err(format!(
            "its snapshot {} is not the state that the windows lead to",
            named.state
        ));
    }
    Ok(named)
}

impl Finding {
    /// What a record must say of this outcome.
    pub fn of(outcome: &Outcome) -> Self {
        Self {
            window: outcome.window,
            verdict: outcome.verdict.as_str().to_owned(),
            score_ppm: outcome.score_ppm,
            confidence_ppm: outcome.confidence_ppm,
            reason: outcome.reason.clone(),
            missing: outcome.missing.iter().take(MAX_ANOMALIES).cloned().collect(),
            worst: outcome.worst.as_ref().map(anomaly),
            worst_tenant: outcome
                .worst_tenant
                .as_ref()
                .map(|tenant| tenant.as_str().to_owned()),
            anomalies: anomalies(outcome),
            anomalies_detected: outcome
                .units
                .iter()
                .filter(|report| report.state.is_trouble())
                .count() as u64,
            traffic_ppm: outcome.traffic_ppm,
            tenants_ppm: outcome.tenants_ppm,
            agents_ppm: outcome.agents_ppm,
            tenants_checked: outcome.tenants.total(),
            outcome: Hash::of(outcome.to_json().as_bytes()),
        }
    }

    /// The first field in which a replay differs, with both values.
    fn difference(&self, replayed: &Self) -> Option<String> {
        // Integers, strings and lists always convert.
        let [recorded, replayed] =
            [self, replayed].map(|finding| serde_json::to_value(finding).unwrap_or_default());
        let fields = recorded.as_object()?;
        let (name, value) = fields
            .iter()
            .find(|(name, value)| replayed.get(name.as_str()) != Some(*value))?;
        let other = replayed.get(name).cloned().unwrap_or_default();
        Some(format!("{name} differs: recorded {value}, replayed {other}"))
    }
}

/// What is not in order, as a record lists it: the lowest score first; then what is watched.
fn anomalies(outcome: &Outcome) -> Vec<Anomaly> {
    let by_score = |report: &&UnitReport| (report.score_ppm, report.unit.clone(), report.metric);
    let mut reports: Vec<&UnitReport> = outcome
        .units
        .iter()
        .filter(|report| report.state.is_trouble())
        .collect();
    reports.sort_by_key(by_score);
    let mut watched: Vec<&UnitReport> = outcome.watched.iter().collect();
    watched.sort_by_key(by_score);
    let all = reports.into_iter().chain(watched);
    all.take(MAX_ANOMALIES).map(anomaly).collect()
}

/// One unit as a record lists it.
fn anomaly(report: &UnitReport) -> Anomaly {
    let severity = match report.state {
        State::Breach => "critical",
        State::Clear | State::Proven => "info",
        State::Suspect | State::Shared | State::NoData | State::Gap | State::Error => "warning",
    };
    Anomaly {
        unit: report.unit.to_string(),
        metric: report.metric.as_str().to_owned(),
        state: report.state.as_str().to_owned(),
        severity: severity.to_owned(),
        detail: report.seen.clone(),
        limits: report.limits.clone(),
        bits_q32: report.bits,
        budget_q32: report.budget,
        score_ppm: report.score_ppm,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use crate::manifest::SNAPSHOT_EVERY;

    const POLICY: &str = "{ apiVersion: coalmine.dev/v1, kind: SlaBaseline, service: checkout,
        defaults: { errors: { max_rate: 1% }, required: [errors] } }";

    const HISTORY: &str = r#"{"v":1,"service":"checkout","rollouts":0,"windows":0,"first_ms":0,"last_ms":0,
        "sources":[],"arm_difference_tenants":0,"tenants":{}}"#;

    impl Blobs for BTreeMap<Hash, String> {
        fn bytes(&self, digest: &Hash) -> Result<Vec<u8>, String> {
            let text = self.get(digest).ok_or_else(|| "is not there".to_owned());
            text.map(|text| text.clone().into_bytes())
        }
    }

    fn begin(history: Option<&str>) -> Record {
        Record {
            v: 1,
            log: "test".into(),
            seq: 0,
            prev: Hash::ZERO,
            time_ms: 0,
            body: Body::Rollout(RolloutStart {
                rollout: "r".into(),
                key: "k".into(),
                service: "checkout".into(),
                canary_version: "v2".into(),
                baseline_version: None,
                policy: Hash::of(POLICY.as_bytes()),
                history: history.map(|text| Hash::of(text.as_bytes())),
                judge: v1::ID.into(),
                max_windows: 10,
                window_ms: 10_000,
                start_ms: 0,
                actor: "test".into(),
                workload: None,
            }),
        }
    }

    #[test]
    fn a_rollout_is_begun_again_with_its_history() {
        let blobs: BTreeMap<Hash, String> = [POLICY, HISTORY]
            .map(|text| (Hash::of(text.as_bytes()), text.to_owned()))
            .into();
        for history in [None, Some(HISTORY)] {
            let mut replay = Replay::default();
            assert_eq!(replay.take(&begin(history), &blobs), Replayed::Other);
            assert!(replay.judged("r").is_some());
        }
        assert!(
            !begin(None).to_line().contains("history"),
            "an older log stays as it is"
        );
        let line = begin(Some(HISTORY)).to_line();
        assert!(line.contains(&format!("\"history\":\"{}\"", Hash::of(HISTORY.as_bytes()))));
        assert_eq!(serde_json::from_str::<Record>(&line).unwrap().to_line(), line);
    }

    #[test]
    fn a_history_that_is_missing_or_wrong_fails_the_replay() {
        let foreign = HISTORY.replace("checkout", "cart");
        for (history, kept, says) in [
            (HISTORY, false, "its history"),
            ("{}", true, "its history is refused: missing field"),
            (
                foreign.as_str(),
                true,
                "its history is that of service cart, and it is a rollout of checkout",
            ),
        ] {
            let mut blobs = BTreeMap::from([(Hash::of(POLICY.as_bytes()), POLICY.to_owned())]);
            if kept {
                blobs.insert(Hash::of(history.as_bytes()), history.to_owned());
            }
            let mut replay = Replay::default();
            match replay.take(&begin(Some(history)), &blobs) {
                Replayed::Different { name, problem } => {
                    assert!(name == "r" && problem.contains(says), "{problem}");
                    assert!(kept || problem.ends_with("is not there"), "{problem}");
                }
                replayed => panic!("{replayed:?}"),
            }
            assert!(replay.judged("r").is_none());
        }
    }

    type States = BTreeMap<Hash, Vec<u8>>;

    /// A rollout of so many windows as an aggregator records it.
    fn rollout(windows: u64) -> (Vec<Record>, BTreeMap<Hash, String>, States) {
        let mut texts = BTreeMap::from([(Hash::of(POLICY.as_bytes()), POLICY.to_owned())]);
        let mut states = BTreeMap::new();
        let Body::Rollout(start) = begin(None).body else {
            unreachable!()
        };
        let mut records = vec![begin(None)];
        let mut judged = Judged::begin_with(&start, &texts).unwrap();
        for number in 1..=windows {
            if judged.manifest.wants_snapshot() {
                let state = judged.judge.save();
                let snapshot = Snapshot {
                    window: number - 1,
                    state: Hash::of(&state),
                };
                states.insert(snapshot.state, state);
                judged.manifest.rest_on(snapshot);
            }
            let evidence = format!(
                r#"{{"v":1,"window":{number},"start_ms":{},"len_ms":10000,"coverage":{{"canary":{{"expected":1,"reported":1}},"baseline":{{"expected":1,"reported":1}}}},"rows":[{{"tenant":"acme","arm":"canary","requests":{},"errors":1}},{{"tenant":"acme","arm":"baseline","requests":900,"errors":3}}]}}"#,
                (number - 1) * 10_000,
                100 + number
            );
            let digest = Hash::of(evidence.as_bytes());
            texts.insert(digest, evidence);
            judged.manifest.windows.push(digest);
            let manifest = judged.manifest.to_json();
            let named = Hash::of(manifest.as_bytes());
            texts.insert(named, manifest);
            judged.step(&digest, &texts).unwrap();
            let decision = Decision {
                id: start.decision_id(number),
                execution_id: String::new(),
                task: String::new(),
                rollout: start.rollout.clone(),
                service: start.service.clone(),
                canary_version: start.canary_version.clone(),
                finding: Finding::of(judged.outcome.as_ref().unwrap()),
                evidence: digest,
                manifest: named,
                snapshot: judged.manifest.snapshot.map(|snapshot| snapshot.state),
                policy: start.policy,
                judge: start.judge.clone(),
                build: String::new(),
                late: false,
                steps: Vec::new(),
            };
            records.push(Record {
                body: Body::Decision(Box::new(decision)),
                ..begin(None)
            });
        }
        (records, texts, states)
    }

    struct Both<'a>(&'a BTreeMap<Hash, String>, &'a States);

    impl Blobs for Both<'_> {
        fn bytes(&self, digest: &Hash) -> Result<Vec<u8>, String> {
            self.1
                .get(digest)
                .cloned()
                .map_or_else(|| self.0.bytes(digest), Ok)
        }
    }

    fn decision(record: &Record) -> &Decision {
        match &record.body {
            Body::Decision(decision) => decision,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_decision_replays_from_its_manifest_alone_and_the_log_checks_the_snapshots() {
        let (records, texts, states) = rollout(35);
        assert_eq!(states.len(), 3);
        let blobs = Both(&texts, &states);
        let mut replay = Replay::default();
        for record in &records {
            assert!(!matches!(replay.take(record, &blobs), Replayed::Different { .. }));
        }
        for record in &records[1..] {
            let judged = replay_decision(decision(record), &blobs).unwrap();
            assert!(judged.manifest.windows.len() <= SNAPSHOT_EVERY);
            assert_eq!(judged.judge.last_window(), Some(decision(record).finding.window));
        }

        // Another state under the same name is believed by whoever looks at one decision, and found in the whole log.
        let other = {
            let (_, _, other) = rollout(20);
            other.into_values().next().unwrap()
        };
        let mut lying = states.clone();
        let named = decision(&records[25]).snapshot.unwrap();
        lying.insert(named, other);
        let error = replay_decision(decision(&records[25]), &Both(&texts, &lying)).unwrap_err();
        assert!(error.contains("snapshot"), "{error}");
        let mut replay = Replay::default();
        let found = records
            .iter()
            .find_map(|record| match replay.take(record, &Both(&texts, &lying)) {
                Replayed::Different { name, problem } => Some((name, problem)),
                Replayed::Same | Replayed::Other => None,
            });
        let (name, problem) = found.unwrap();
        assert!(
            name == "r-21" && problem.contains("is not the state that the windows lead to"),
            "{name}: {problem}"
        );

        // What a manifest says must be what the rollout was judged by.
        let mut changed = records.clone();
        let Body::Decision(wrong) = &mut changed[14].body else {
            unreachable!()
        };
        wrong.manifest = decision(&records[13]).manifest;
        assert!(replay_decision(decision(&changed[14]), &blobs).is_err());
        let mut replay = Replay::default();
        let results: Vec<_> = changed.iter().map(|record| replay.take(record, &blobs)).collect();
        assert!(
            matches!(&results[14], Replayed::Different { problem, .. } if problem.contains("its manifest"))
        );
    }
}
