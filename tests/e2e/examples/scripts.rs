//! What the examples run, run: the script, the steps of the GitHub action, the job of GitLab, the Job of Argo.

use std::{
    ffi::OsString,
    fs,
    io::{BufRead as _, BufReader, Lines, Read as _, Write as _},
    net::TcpListener,
    path::Path,
    process::{Child, ChildStderr, Command, Output, Stdio},
    thread,
};

use coalmine_tests::{
    process::{free_addresses, program},
    tools::tool,
};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use super::{Stand, at, document, documents, example, list, read, text};

/// What the command is found by.
fn search_path() -> OsString {
    let mut path = program("coalmine").parent().unwrap().as_os_str().to_owned();
    path.push(":");
    path.push(std::env::var_os("PATH").unwrap_or_default());
    path
}

/// A shell that asks this server, and has nothing of the test's own variables for it.
fn shell(shell: &str, server: &str, token: &str) -> Command {
    let mut command = Command::new(shell);
    command
        .stdin(Stdio::null())
        .env("PATH", search_path())
        .env("COALMINE_SERVER", server)
        .env("COALMINE_TOKEN", token);
    command
}

/// The script as a pipeline runs it.
fn gate(server: &str, token: &str, key: &str) -> Command {
    let mut command = shell("sh", server, token);
    command
        .arg(example("ci/gate.sh"))
        .env("GATE_SERVICE", "checkout")
        .env("GATE_VERSION", "v2")
        .env("GATE_KEY", key)
        .env("GATE_TIMEOUT", "1s")
        .env("GATE_PATIENCE", "0");
    command
}

/// Runs it to its end: its exit code, and what it has said on either side.
fn run(mut command: Command) -> (Option<i32>, String, String) {
    let Output {
        status,
        stdout,
        stderr,
    } = command.output().unwrap();
    let [out, err] = [stdout, stderr].map(|bytes| String::from_utf8(bytes).unwrap());
    (status.code(), out, err)
}

/// Runs it until it asks about a rollout; gives that, and what is said from then on.
fn begin(mut script: Command) -> (Child, String, Lines<BufReader<ChildStderr>>) {
    script.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = script.spawn().unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    let asks = |line: String| {
        line.strip_prefix("gate: asking about rollout ")
            .map(str::to_owned)
    };
    let rollout = lines.by_ref().map_while(Result::ok).find_map(asks);
    (child, rollout.expect("a rollout is begun"), lines)
}

/// Tells a process, and nobody else, that it is to end; gives its exit code.
fn cancel(child: Child, lines: Lines<BufReader<ChildStderr>>) -> Option<i32> {
    let pid = i32::try_from(child.id()).unwrap();
    kill_process(Pid::from_raw(pid).unwrap(), Signal::TERM).unwrap();
    // So that it is never kept waiting by what nobody reads.
    let said: Vec<_> = lines.map_while(Result::ok).collect();
    let output = child.wait_with_output().unwrap();
    assert!(said.iter().any(|line| line.contains("cancelled")), "{said:?}");
    output.status.code()
}

#[test]
fn the_script_ends_with_the_code_of_the_verdict() {
    let stand = Stand::start();
    let server = stand.server();
    for (verdict, said, code) in [
        ("approve", "APPROVE ", 0),
        ("rollback", "ROLLBACK ", 1),
        ("hold", "HOLD ", 2),
    ] {
        let rollout = stand.begin(verdict, None);
        stand.decide(&rollout, verdict);
        let (ended, out, err) = run(gate(&server, &stand.token, verdict));
        assert_eq!(ended, Some(code), "{verdict}: {out}{err}");
        assert!(
            out.starts_with(said) && out.lines().count() == 1,
            "{verdict}: {out}"
        );
        assert_eq!(stand.state(&rollout), "ended", "the next version needs the place");
    }
}

#[test]
fn the_script_leaves_a_rollback_to_whoever_carries_it_out() {
    let stand = Stand::start();
    let canary = json!({ "kind": "Canary", "namespace": "shop", "name": "checkout" });
    let rollout = stand.begin("halt", Some(canary));
    stand.decide(&rollout, "rollback");
    let mut script = gate(&stand.server(), &stand.token, "halt");
    script.env("GATE_WORKLOAD", "Canary/shop/checkout");
    let (code, out, err) = run(script);
    assert_eq!(code, Some(1), "{out}{err}");
    assert!(err.contains(&format!("coalmine rollout end {rollout}")), "{err}");
    assert_ne!(stand.state(&rollout), "ended");
}

/// Otherwise the next pipeline is told that another rollout is open.
#[test]
fn a_script_that_is_cancelled_ends_its_rollout() {
    let stand = Stand::start();
    for key in ["one", "next"] {
        let mut script = gate(&stand.server(), &stand.token, key);
        script.env("GATE_TIMEOUT", "1m");
        let (child, rollout, lines) = begin(script);
        assert_eq!(cancel(child, lines), Some(143), "{key}");
        assert_eq!(stand.state(&rollout), "ended", "{key}");
    }
}

#[test]
fn a_wrong_question_of_the_script_is_told_apart_from_a_verdict() {
    let stand = Stand::start();
    let cases: [(&str, &str, &str); 9] = [
        ("GATE_SERVICE", "", "GATE_SERVICE"),
        ("GATE_VERSION", "", "GATE_VERSION"),
        ("GATE_KEY", "", "GATE_KEY"),
        ("GATE_PATIENCE", "soon", "GATE_PATIENCE"),
        ("GATE_PATIENCE", "08", "GATE_PATIENCE"),
        ("GATE_PATIENCE", "-1", "GATE_PATIENCE"),
        ("GATE_PATIENCE", "1000000", "GATE_PATIENCE"),
        ("GATE_SERVICE", "unknown", "unknown"),
        ("COALMINE_TOKEN", "cmt_wrong", "token"),
    ];
    for (variable, value, told) in cases {
        let mut script = gate(&stand.server(), &stand.token, "wrong");
        script.env(variable, value);
        let (code, out, err) = run(script);
        assert_eq!((code, out.as_str()), (Some(64), ""), "{variable}={value}: {err}");
        assert!(err.contains(told), "{variable}={value}: {err}");
    }
}

/// Answers every request with the same bytes, as something else than an aggregator does.
fn answering(answer: &'static str) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            // What is asked does not matter; whoever has gone away meanwhile is of no interest.
            if stream.read(&mut [0; 4_096]).is_ok_and(|length| length > 0) {
                stream.write_all(answer.as_bytes()).ok();
            }
        }
    });
    format!("http://{address}")
}

#[test]
fn without_an_answer_the_script_never_approves() {
    let [nobody] = free_addresses();
    let login = "HTTP/1.1 200 OK\r\ncontent-type: text/html\r\ncontent-length: 14\r\nconnection: close\r\n\r\n<html>APPROVE\n";
    let empty = "HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n";
    let broken = "HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\ncontent-length: 16\r\nconnection: close\r\n\r\n{\"detail\":\"no\"}\n";
    for server in [
        format!("http://{nobody}"),
        answering(login),
        answering(empty),
        answering(broken),
    ] {
        let (code, out, err) = run(gate(&server, "cmt_any", "away"));
        assert_eq!((code, out.as_str()), (Some(3), ""), "{server}: {err}");
    }
}

#[test]
fn an_aggregator_that_goes_away_in_the_middle_is_no_verdict() {
    let mut stand = Stand::start();
    let mut script = gate(&stand.server(), &stand.token, "middle");
    script.env("GATE_TIMEOUT", "4s");
    let (child, _, lines) = begin(script);
    stand.aggregator.kill_9();
    // So that it is never kept waiting by what nobody reads.
    let rest: Vec<_> = lines.map_while(Result::ok).collect();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(3), "{rest:?}");
    assert!(output.stdout.is_empty(), "{output:?}");
}

#[test]
fn the_question_by_curl_succeeds_at_an_approval_only() {
    tool("curl", "curl");
    let stand = Stand::start();
    let readme = read("ci/README.md");
    let (_, script) = readme.split_once("```sh\n").unwrap();
    let (script, _) = script.split_once("```").unwrap();
    let asks = |server: &str, token: &str, wanted: i32| {
        let mut command = shell("sh", server, token);
        command
            .args(["-c", script])
            .env("GATE_SERVICE", "checkout")
            .env("GATE_VERSION", "v2")
            // A proxy that this machine may have.
            .env("no_proxy", "*");
        let (code, out, err) = run(command);
        assert_eq!(code, Some(wanted), "{out}{err}");
    };
    let server = stand.server();
    let rollout = stand.begin("curl", None);
    for (verdict, code) in [("hold", 1), ("rollback", 1), ("approve", 0)] {
        stand.decide(&rollout, verdict);
        asks(&server, &stand.token, code);
    }
    let [nobody] = free_addresses();
    asks(&format!("http://{nobody}"), &stand.token, 1);
    asks(&server, "cmt_wrong", 1);
    stand.end(&rollout);
    asks(&server, &stand.token, 1);
}

/// `${{ inputs.NAME }}` and what else the action's variables are made of.
fn expanded(template: &str, inputs: &Value) -> String {
    let mut text = template.to_owned();
    while let Some((before, rest)) = text.split_once("${{ ") {
        let (name, after) = rest.split_once(" }}").unwrap();
        let value = match name.split_once('.').unwrap() {
            ("inputs", name) => inputs[name].as_str().unwrap_or_else(|| panic!("no input {name}")),
            ("github", "run_id") => "4711",
            ("github", "run_attempt") => "1",
            _ => panic!("{name} is not known"),
        };
        text = format!("{before}{value}{after}");
    }
    text
}

/// What a run of the action is given: its defaults, and what has none.
fn inputs(action: &Value, stand: &Stand) -> Value {
    let mut inputs = json!({
        "server": stand.server(), "service": "checkout", "version": "v2", "token": stand.token, "timeout": "1s", "patience": "0",
    });
    for (name, input) in at(action, "/inputs").as_object().unwrap() {
        let required = input["required"] == true;
        assert_eq!(required, input.get("default").is_none(), "{name}");
        if inputs.get(name).is_none() {
            inputs[name] = at(input, "/default").clone();
        }
    }
    inputs
}

/// The steps as the runner runs them, with new outputs and a new summary.
fn steps(action: &Value, stand: &Stand) -> Vec<Command> {
    let inputs = inputs(action, stand);
    let directory = stand.directory.path();
    let [outputs, summary] = ["outputs", "summary"].map(|name| directory.join(name));
    for file in [&outputs, &summary] {
        fs::write(file, "").unwrap();
    }
    let mut steps = Vec::new();
    for step in list(action, "/runs/steps") {
        // Only with an image, which needs docker.
        if step["if"] == "${{ inputs.image != '' }}" {
            continue;
        }
        assert!(step.get("if").is_none(), "{step}");
        let script = directory.join(format!("step-{}.sh", steps.len()));
        fs::write(&script, text(step, "/run")).unwrap();
        assert_eq!(text(step, "/shell"), "bash");
        let mut command = shell("bash", "", "");
        command
            .args(["--noprofile", "--norc", "-eo", "pipefail"])
            .arg(&script)
            .env("RUNNER_TEMP", directory)
            .env("GITHUB_ACTION_PATH", example("github"))
            .env("GITHUB_OUTPUT", &outputs)
            .env("GITHUB_STEP_SUMMARY", &summary);
        for (name, value) in at(step, "/env").as_object().unwrap() {
            command.env(name, expanded(value.as_str().unwrap(), &inputs));
        }
        steps.push(command);
    }
    steps
}

/// Runs the steps; gives the exit code, the outputs and the summary.
fn act(action: &Value, stand: &Stand) -> (Option<i32>, String, String) {
    let mut code = Some(0);
    for step in steps(action, stand) {
        code = run(step).0;
    }
    let [outputs, summary] =
        ["outputs", "summary"].map(|name| fs::read_to_string(stand.directory.path().join(name)).unwrap());
    (code, outputs, summary)
}

#[test]
fn the_action_for_github_ends_as_the_script_does_and_says_why() {
    let stand = Stand::start();
    let action = document("github/action.yml");
    assert_eq!(
        read("github/gate.sh"),
        read("ci/gate.sh"),
        "the copy is another one"
    );
    for (verdict, name, code) in [("approve", "APPROVE", 0), ("rollback", "ROLLBACK", 1)] {
        // The same run is the same rollout, as long as that is open.
        let key = "github/4711/1/checkout";
        let key = if verdict == "approve" {
            key.to_owned()
        } else {
            format!("{key}/again")
        };
        let rollout = stand.begin(&key, None);
        stand.decide(&rollout, verdict);
        let mut action = action.clone();
        let steps = action.pointer_mut("/runs/steps").unwrap().as_array_mut().unwrap();
        let env = steps.last_mut().unwrap().pointer_mut("/env/GATE_KEY").unwrap();
        if verdict != "approve" {
            *env = json!(key);
        }
        let (ended, outputs, summary) = act(&action, &stand);
        assert_eq!(ended, Some(code), "{summary}");
        assert_eq!(outputs, format!("verdict={name}\n"));
        assert!(
            summary.contains("checkout v2") && summary.contains(name),
            "{summary}"
        );
    }
    let uses = document("github/workflow.yml");
    let with = list(&uses, "/jobs/canary/steps")
        .iter()
        .find_map(|step| step.get("with"));
    for name in with.unwrap().as_object().unwrap().keys() {
        assert!(
            action["inputs"].get(name).is_some(),
            "the action has no input {name}"
        );
    }
}

/// The runner tells the step's shell and nobody else.
#[test]
fn an_action_that_is_cancelled_ends_its_rollout() {
    let stand = Stand::start();
    let mut step = steps(&document("github/action.yml"), &stand).pop().unwrap();
    step.env("GATE_TIMEOUT", "1m");
    let (child, rollout, lines) = begin(step);
    assert_eq!(cancel(child, lines), Some(143));
    assert_eq!(stand.state(&rollout), "ended");
}

/// Whatever is told to kubectl is only noted: no cluster is needed to see what follows from which exit code.
#[test]
fn the_job_for_gitlab_promotes_what_is_approved_and_nothing_else() {
    let stand = Stand::start();
    let jobs = document("gitlab/.gitlab-ci.yml");
    let directory = stand.directory.path();
    fs::create_dir(directory.join("ci")).unwrap();
    fs::copy(example("ci/gate.sh"), directory.join("ci/gate.sh")).unwrap();
    for (job, verdict, code, patched) in [
        ("42", "approve", 0, &["canary", "baseline"][..]),
        ("43", "rollback", 1, &["canary"][..]),
    ] {
        let rollout = stand.begin(&format!("gitlab/17/{job}"), None);
        stand.decide(&rollout, verdict);
        let (ended, said) = run_job(&jobs, job, &stand);
        assert_eq!(ended, Some(code), "{said}");
        let noted = fs::read_to_string(directory.join("noted")).unwrap();
        assert_eq!(patched_arms(&noted), patched, "{noted}");
    }
    let [away] = list(&jobs, "/coalmine/after_script") else {
        panic!("more than one command takes the canary away");
    };
    takes_the_canary_away(away);
}

/// The arms whose Deployments `kubectl` was told to give version v2, one a line.
fn patched_arms(noted: &str) -> Vec<String> {
    let arm = |command: &str| {
        let (target, patch) = command.split_once(" -p ").unwrap();
        let deployment = shipped(target);
        let patch: Value = serde_json::from_str(patch).unwrap();
        let template = at(&patch, "/spec/template");
        // An agent reports the version that the pod's label says; the image says nothing to it.
        let labels = json!({ "app.kubernetes.io/version": "v2" });
        assert_eq!(at(template, "/metadata/labels"), &labels);
        let [container] = list(template, "/spec/containers") else {
            panic!("other containers than that of the application: {template}");
        };
        assert_eq!(text(container, "/image"), "registry.example.com/checkout:v2");
        // One of another name would be added.
        let mut containers = list(&deployment, "/spec/template/spec/containers").iter();
        assert!(
            containers.any(|it| it["name"] == container["name"]),
            "{container}"
        );
        let arm = arm_of(&deployment);
        // The canary may have been taken away before.
        let replicas = patch["spec"]["replicas"].as_u64();
        assert_eq!(replicas, (arm == "canary").then_some(1), "{patch}");
        arm
    };
    noted.lines().map(arm).collect()
}

/// Holds a command to scaling the canary's Deployment to nothing.
fn takes_the_canary_away(command: &Value) {
    let command = command.as_str().unwrap().strip_prefix("kubectl ").unwrap();
    let target = command.strip_suffix(" --replicas=0").unwrap();
    assert_eq!(arm_of(&shipped(target)), "canary");
}

/// The Deployment that a command of `kubectl` is about, as `deploy/examples/checkout` has it.
fn shipped(command: &str) -> Value {
    let words: Vec<_> = command.split(' ').collect();
    let (namespace, name) = match words[..] {
        ["-n", namespace, "patch", "deployment", name] => (namespace, name),
        ["-n", namespace, "scale", object] => (namespace, object.strip_prefix("deployment/").unwrap()),
        _ => panic!("{command} is about no Deployment"),
    };
    let kustomization = document("checkout/kustomization.yaml");
    assert_eq!(namespace, text(&kustomization, "/namespace"));
    let resources = list(&kustomization, "/resources").iter();
    let mut objects = resources.flat_map(|file| documents(&format!("checkout/{}", file.as_str().unwrap())));
    let found = objects.find(|it| it["kind"] == "Deployment" && it["metadata"]["name"] == name);
    found.unwrap_or_else(|| panic!("{command}: there is no such Deployment"))
}

/// The arm of a Deployment's pods, by which their agents know it.
fn arm_of(deployment: &Value) -> String {
    let labels = at(deployment, "/spec/template/metadata/labels");
    labels["coalmine.dev/arm"].as_str().unwrap().to_owned()
}

/// The steps that deploy and promote, with kubectl only noted.
#[test]
fn the_workflow_for_github_labels_what_it_deploys() {
    let workflow = document("github/workflow.yml");
    let directory = tempfile::tempdir().unwrap();
    let step = |name: &str| {
        let mut steps = list(&workflow, "/jobs/canary/steps").iter();
        steps.find(|found| found["name"] == name).unwrap()
    };
    for (name, arm) in [("Deploy the canary", "canary"), ("Promote", "baseline")] {
        let step = step(name);
        let script = format!("kubectl() {{ echo \"$*\"; }}\n{}", text(step, "/run"));
        let mut command = shell("bash", "", "");
        command.args(["-ec", &script]).current_dir(directory.path());
        let (code, out, err) = run_with_version(command, step);
        assert_eq!(code, Some(0), "{out}{err}");
        assert_eq!(patched_arms(&out), [arm], "{out}");
    }
    takes_the_canary_away(at(step("Take the canary away"), "/run"));
}

/// Runs a step of the workflow for version v2.
fn run_with_version(mut command: Command, step: &Value) -> (Option<i32>, String, String) {
    assert_eq!(text(step, "/env/VERSION"), "${{ inputs.version }}");
    command.env("VERSION", "v2");
    run(command)
}

/// Runs the script of the job in the stand's directory; gives its exit code and what it has said.
fn run_job(jobs: &Value, id: &str, stand: &Stand) -> (Option<i32>, String) {
    let directory = stand.directory.path();
    fs::write(directory.join("noted"), "").unwrap();
    let lines: Vec<_> = list(jobs, "/coalmine/script")
        .iter()
        .map(|line| line.as_str().unwrap())
        .collect();
    let mut job = shell("sh", "", &stand.token);
    let script = format!("kubectl() {{ echo \"$*\" >>noted; }}\n{}", lines.join("\n"));
    job.args(["-ec", &script]).current_dir(directory);
    for (name, value) in at(jobs, "/variables").as_object().unwrap() {
        let value = value.as_str().unwrap();
        let value = value.replace("$CI_PIPELINE_ID", "17").replace("$CI_JOB_ID", id);
        job.env(name, value.replace("$CI_COMMIT_SHORT_SHA", "v2"));
    }
    job.env("COALMINE_SERVER", stand.server());
    let (code, out, err) = run(job);
    (code, out + &err)
}

#[test]
fn the_job_of_argo_ends_with_the_code_of_the_verdict() {
    let stand = Stand::start();
    let template = document("argo/analysis-job.yaml");
    let container = at(
        &template,
        "/spec/metrics/0/provider/job/spec/template/spec/containers/0",
    );
    assert_eq!(text(container, "/command/0"), "/coalmine");
    let arguments = list(container, "/args").iter().map(|argument| {
        let argument = argument.as_str().unwrap();
        argument
            .replace("{{args.service}}", "checkout")
            .replace("{{args.version}}", "v2")
    });
    let arguments: Vec<_> = arguments.collect();
    let known = ["COALMINE_SERVER", "COALMINE_TOKEN"];
    let variables = list(container, "/env")
        .iter()
        .map(|variable| text(variable, "/name"));
    assert_eq!(variables.collect::<Vec<_>>(), known);
    let rollout = stand.begin("job", None);
    for (verdict, code) in [("approve", 0), ("rollback", 1)] {
        stand.decide(&rollout, verdict);
        let mut job = Command::new(program("coalmine"));
        job.args(&arguments).stdin(Stdio::null());
        job.env(known[0], stand.server()).env(known[1], &stand.token);
        let (ended, out, err) = run(job);
        assert_eq!(ended, Some(code), "{out}{err}");
    }
}

#[test]
fn the_scripts_are_well_formed() {
    let scripts = super::files(&[".sh"]);
    assert_eq!(scripts, ["ci/gate.sh", "github/gate.sh"]);
    for name in scripts {
        let path = example(&name);
        assert!(read(&name).starts_with("#!/bin/sh\n"), "{name}");
        checks("bash", &["-n"], &path);
        checks("shellcheck", &[], &path);
    }
}

/// Runs a program that checks a script; where it is not installed, that is said.
fn checks(program: &str, arguments: &[&str], script: &Path) {
    match Command::new(program).args(arguments).arg(script).output() {
        Ok(output) => {
            let said = String::from_utf8_lossy(&output.stdout);
            let complaints = String::from_utf8_lossy(&output.stderr);
            assert!(
                output.status.success(),
                "{}: {said}{complaints}",
                script.display()
            );
        }
        Err(error) => eprintln!("NOT TESTED: {} by {program}: {error}", script.display()),
    }
}
