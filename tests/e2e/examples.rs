//! The examples for deploy tools: they parse, call what is there, wait as long as an aggregator may be away, and read
//! the gate's answers as they should. What they run is run.

#![allow(clippy::print_stderr, reason = "says what could not be tested")]

mod calls;
mod numbers;
mod scripts;
mod verdicts;

use std::{fs, path::PathBuf};

use coalmine_tests::{
    components::{Aggregator, POLICY},
    http::Answer,
    process::{coalmine, repository},
};
use serde_json::{Value, json};
use tempfile::TempDir;

/// The directories of the examples that are looked at here, each of one tool.
const TOOLS: [&str; 6] = ["argo", "ci", "flagger", "github", "gitlab", "spinnaker"];

/// What stands for the token in files that others fill in.
const TOKEN: &str = "${COALMINE_TOKEN}";

fn example(name: &str) -> PathBuf {
    let examples = repository().canonicalize().unwrap().join("deploy/examples");
    examples.join(name)
}

fn read(name: &str) -> String {
    let path = example(name);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The documents of a YAML or JSON file.
fn documents(name: &str) -> Vec<Value> {
    let text = read(name);
    if name.ends_with(".json") {
        return vec![serde_json::from_str(&text).unwrap_or_else(|error| panic!("{name}: {error}"))];
    }
    serde_saphyr::from_multiple(&text).unwrap_or_else(|error| panic!("{name}: {error}"))
}

/// The first document.
fn document(name: &str) -> Value {
    documents(name).swap_remove(0)
}

/// All files with these endings, as `TOOL/FILE`.
fn files(endings: &[&str]) -> Vec<String> {
    let mut found = Vec::new();
    for tool in TOOLS {
        for entry in fs::read_dir(example(tool)).unwrap() {
            let name = entry.unwrap().file_name().into_string().unwrap();
            if endings.iter().any(|ending| name.ends_with(ending)) {
                found.push(format!("{tool}/{name}"));
            }
        }
    }
    found.sort();
    found
}

fn at<'v>(value: &'v Value, pointer: &str) -> &'v Value {
    let found = value.pointer(pointer);
    found.unwrap_or_else(|| panic!("no {pointer} in {value}"))
}

fn text<'v>(value: &'v Value, pointer: &str) -> &'v str {
    let found = at(value, pointer).as_str();
    found.unwrap_or_else(|| panic!("{pointer} is no text in {value}"))
}

fn number(value: &Value, pointer: &str) -> u64 {
    let found = at(value, pointer).as_u64();
    found.unwrap_or_else(|| panic!("{pointer} is no number in {value}"))
}

fn list<'v>(value: &'v Value, pointer: &str) -> &'v [Value] {
    let found = at(value, pointer).as_array();
    found.unwrap_or_else(|| panic!("{pointer} is no list in {value}"))
}

/// An aggregator with a policy for each service in the examples. It knows two tokens: one of the scopes that they ask
/// for, and one of the test itself.
struct Stand {
    directory: TempDir,
    aggregator: Aggregator,
    token: String,
    /// May do everything.
    own_token: String,
}

/// Makes a token; it is in the file from then on.
fn create_token(file: &str, wanted: &str) -> String {
    let words = ["token", "create", "--file", file].into_iter();
    let created = coalmine(words.chain(wanted.split(' ')));
    let said = String::from_utf8_lossy(&created.stderr);
    assert!(created.status.success(), "{said}");
    String::from_utf8(created.stdout).unwrap().trim().to_owned()
}

impl Stand {
    fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let place = |name: &str| directory.path().join(name).display().to_string();
        let [tokens, search] = ["tokens", "search.yaml"].map(place);
        fs::write(&search, POLICY.replace("service: checkout", "service: search")).unwrap();
        let of_examples = "--name examples --scope gate --scope rollout --service checkout --service search";
        let token = create_token(&tokens, of_examples);
        let own_token = create_token(
            &tokens,
            "--name test --scope gate,rollout,override,audit --service *",
        );
        let arguments: [&str; 4] = ["--tokens", &tokens, "--policy", &search];
        let mut aggregator = Aggregator::prepare(directory.path()).with_arguments(&arguments);
        aggregator.launch();
        Self {
            directory,
            aggregator,
            token,
            own_token,
        }
    }

    /// A path as it is for the test.
    fn path(&self, path: &str) -> String {
        format!("/t/{}{path}", self.own_token)
    }

    fn get(&self, path: &str) -> Value {
        self.aggregator.get(&self.path(path))
    }

    fn post(&self, path: &str, body: &Value) -> Answer {
        self.aggregator.post(&self.path(path), body)
    }

    fn server(&self) -> String {
        format!("http://{}", self.aggregator.http)
    }

    /// Begins a rollout of checkout v2 under a key, so that whoever begins it again finds it.
    fn begin(&self, key: &str, workload: Option<Value>) -> String {
        let mut request = json!({ "service": "checkout", "canary_version": "v2", "key": key });
        if let Some(workload) = workload {
            request["workload"] = workload;
        }
        let answer = self.post("/v1/rollouts", &request);
        assert_eq!(answer.status, 201, "{}", answer.body);
        text(&answer.json(), "/id").to_owned()
    }

    /// Decides in the judge's place.
    fn decide(&self, rollout: &str, verdict: &str) {
        let decision = json!({ "verdict": verdict, "reason": "the test says so" });
        let path = format!("/v1/rollouts/{rollout}/override");
        let answer = self.post(&path, &decision);
        assert_eq!(answer.status, 200, "{}", answer.body);
    }

    fn state(&self, rollout: &str) -> String {
        let view = self.get(&format!("/v1/rollouts/{rollout}"));
        text(&view, "/state").to_owned()
    }

    fn end(&self, rollout: &str) {
        let end = json!({ "reason": "the test is through" });
        let answer = self.post(&format!("/v1/rollouts/{rollout}/end"), &end);
        assert_eq!(answer.status, 200, "{}", answer.body);
    }
}

#[test]
fn every_example_parses_and_every_tool_has_a_readme() {
    let files = files(&[".yaml", ".yml", ".json"]);
    assert!(files.len() >= 15, "{files:?}");
    for name in &files {
        let documents = documents(name);
        let whole = documents.iter().all(Value::is_object);
        assert!(whole && !documents.is_empty(), "{name}");
    }
    for tool in TOOLS {
        let lines = read(&format!("{tool}/README.md")).lines().count();
        assert!((5..=45).contains(&lines), "{tool}/README.md has {lines} lines");
    }
}
