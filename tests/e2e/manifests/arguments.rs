//! The arguments: the programs know what the manifests tell them.

use std::{collections::BTreeSet, process::Command};

use coalmine_tests::process::program;
use serde_json::Value;

use super::{all_rendered, containers, deploy, items, pod, read, strings, text};

fn help(name: &str, arguments: &[&str]) -> String {
    let output = Command::new(program(name)).args(arguments).output().unwrap();
    String::from_utf8(output.stdout).unwrap()
}

/// The flags that a program's help lists.
fn flags(help: &str) -> BTreeSet<String> {
    let flags = help.lines().filter_map(|line| {
        let line = line.trim_start();
        // `-V, --agent-version` as well.
        let line = line
            .get(4..)
            .filter(|_| line.get(2..4) == Some(", "))
            .unwrap_or(line);
        let is_of_flag = |c: &char| c.is_ascii_lowercase() || c.is_ascii_digit() || *c == '-';
        let flag: String = line.chars().take_while(is_of_flag).collect();
        flag.starts_with("--").then_some(flag)
    });
    let flags: BTreeSet<_> = flags.collect();
    assert!(flags.len() > 10, "it lists only {flags:?}");
    flags
}

/// Each variable is one that the program reads, or is part of an argument.
fn check_variables(name: &str, container: &Value, help: &str) {
    let arguments = strings(container, "/args").join(" ");
    for variable in items(container, "/env") {
        let variable = text(variable, "/name");
        let is_read = ["=", "]"]
            .iter()
            .any(|end| help.contains(&format!("[env: {variable}{end}")));
        assert!(
            is_read || arguments.contains(&format!("$({variable})")),
            "{name}: nobody reads the variable {variable}"
        );
    }
}

/// Each argument is a flag of the program, or the value of the one before.
fn check_arguments(name: &str, container: &Value, known: &BTreeSet<String>) {
    let variables: Vec<_> = items(container, "/env")
        .iter()
        .map(|variable| text(variable, "/name"))
        .collect();
    let mut has_value = true;
    for argument in strings(container, "/args") {
        if argument == "serve" {
            continue;
        }
        if argument.starts_with("--") {
            let flag = argument.split('=').next().unwrap();
            assert!(known.contains(flag), "{name}: the program has no {flag}");
            has_value = argument.contains('=');
        } else {
            assert!(!has_value, "{name}: {argument} belongs to no flag");
            has_value = true;
        }
        for part in argument.split("$(").skip(1) {
            let variable = part.split(')').next().unwrap();
            assert!(
                variables.contains(&variable),
                "{name}: nothing sets the variable {variable}"
            );
        }
    }
}

#[test]
fn the_programs_know_what_the_manifests_tell_them() {
    let help_of_aggregator = help("coalmine-aggregator", &["serve", "--help"]);
    let aggregator = flags(&help_of_aggregator);
    let agent = flags(&help("coalmine-agent", &["--help"]));
    for (name, objects) in all_rendered() {
        let pods = objects.iter().filter_map(pod);
        for container in pods.flat_map(containers) {
            match text(container, "/name") {
                "aggregator" => {
                    assert_eq!(text(container, "/args/0"), "serve", "{name}");
                    check_arguments(name, container, &aggregator);
                    check_variables(name, container, &help_of_aggregator);
                }
                "coalmine-agent" => check_arguments(name, container, &agent),
                _ => {}
            }
        }
    }
    // In the policy the arguments are parts of an expression, in the chart of a template.
    let policy = read(&deploy("components/admission-policy/policy.yaml"));
    check_text(&policy, "\"", &agent);
    let chart = read(&deploy("helm/coalmine/templates/statefulset.yaml"));
    check_text(&chart, "- ", &aggregator);
    check_text(&chart, "\"", &aggregator);
}

/// What stands after `before` and begins like a flag is one.
fn check_text(source: &str, before: &str, known: &BTreeSet<String>) {
    let mut found = 0;
    for part in source.split(before) {
        let is_of_flag = |c: &char| c.is_ascii_lowercase() || *c == '-';
        let flag: String = part.chars().take_while(is_of_flag).collect();
        if flag.starts_with("--") && flag.len() > 3 {
            assert!(known.contains(&flag), "the program has no {flag}");
            found += 1;
        }
    }
    assert!(found > 0, "no flag was found after {before:?}");
}
