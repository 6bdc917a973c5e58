//! `coalmine token`: the file of tokens that tools present to the aggregator.
//!
//! The file has only hashes. A token is printed once, when it is made, and cannot be shown again.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write as _},
    os::unix::fs::{MetadataExt as _, OpenOptionsExt as _, fchown},
    path::{Path, PathBuf},
};

use clap::{Args, Subcommand};
use coalmine_judge::chain::Hash;
use jiff::Timestamp;
use serde_json::json;

use super::{Exit, Failure, Output, say, tell};
use crate::{
    access::{
        Scope,
        file::{self, Entry, Grant},
    },
    clock, disk,
};

/// The token to present, for whoever gives no file.
const TOKEN_VARIABLE: &str = "COALMINE_TOKEN";

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Make a token and print it; it is kept nowhere, and cannot be shown again
    Create(Create),
    /// List the tokens of a file
    List {
        /// The file
        #[arg(long, value_name = "FILE")]
        file: PathBuf,
    },
    /// Take a token out of a file; the aggregator knows it no more within two seconds
    Revoke {
        /// The token's name
        name: String,
        /// The file
        #[arg(long, value_name = "FILE")]
        file: PathBuf,
    },
}

#[derive(Debug, Args)]
pub(super) struct Create {
    /// Who has it; stands in records as the actor
    #[arg(long, value_parser = file::name)]
    name: String,
    /// What it is good for; repeat it for several scopes
    #[arg(long, required = true, value_delimiter = ',')]
    scope: Vec<Scope>,
    /// For which service, where * stands for any characters; repeat it for several
    #[arg(long, required = true, value_delimiter = ',', value_parser = file::service)]
    service: Vec<String>,
    /// When it stops being good, as in 2027-01-01T00:00:00Z
    #[arg(long, value_name = "TIME", value_parser = file::until)]
    until: Option<Timestamp>,
    /// Add the token's line to this file
    #[arg(long, value_name = "FILE")]
    file: Option<PathBuf>,
}

pub(super) fn run(command: Command, output: Output) -> Result<Exit, Failure> {
    match command {
        Command::Create(options) => create(options)?,
        Command::List { file } => list(&file, output)?,
        Command::Revoke { name, file } => revoke(&name, &file)?,
    }
    Ok(Exit::Good)
}

/// The token that a command presents: what is in this file, or in the environment; none if there is neither.
pub(super) fn presented(file: Option<&Path>) -> Result<Option<String>, Failure> {
    let Some(path) = file else {
        let token = std::env::var(TOKEN_VARIABLE).unwrap_or_default();
        return Ok(Some(token.trim().to_owned()).filter(|token| !token.is_empty()));
    };
    let text = file::read(path).map_err(|error| unreadable(path, &error))?;
    let token = text.trim();
    if token.is_empty() {
        let problem = format!("{}: there is no token in it", path.display());
        return Err(Failure::usage(problem));
    }
    Ok(Some(token.to_owned()))
}

fn create(options: Create) -> Result<(), Failure> {
    let Create {
        name,
        scope,
        service,
        until,
        file,
    } = options;
    let grant = Grant {
        name: name.into(),
        scopes: scope.into_iter().collect(),
        services: service,
        until,
    };
    if grant.has_expired(clock::now_ms()) {
        return Err(Failure::usage("--until is a time that is over"));
    }
    let token = file::make();
    let token =
        token.map_err(|error| Failure::new(Exit::Unknown, format!("cannot make a token: {error}")))?;
    let entry = Entry {
        line: 0,
        hash: Hash::of(token.as_bytes()),
        grant,
    };
    match &file {
        None => tell(&format_args!("add this line to the file of --tokens:\n{entry}")),
        Some(path) => edit(path, |text, entries| {
            if let Some(other) = named(entries, &entry.grant.name) {
                let problem = format!(
                    "{}:{}: there is a token of that name; revoke it first, or give this one another",
                    path.display(),
                    other.line
                );
                return Err(Failure::usage(problem));
            }
            let end = if text.is_empty() || text.ends_with('\n') {
                ""
            } else {
                "\n"
            };
            Ok(format!("{text}{end}{entry}\n"))
        })?,
    }
    say(&token);
    Ok(())
}

fn list(path: &Path, output: Output) -> Result<(), Failure> {
    let text = file::read(path).map_err(|error| unreadable(path, &error))?;
    let entries = parse(path, &text)?;
    if output == Output::Table {
        say(&format_args!(
            "{:<24} {:<28} {:<28} UNTIL",
            "NAME", "SCOPES", "SERVICES"
        ));
    }
    for Entry { grant, .. } in &entries {
        let expired = grant.has_expired(clock::now_ms());
        let until = grant.until.map(|until| until.to_string());
        match output {
            Output::Json => say(&json!({
                "name": &*grant.name,
                "scopes": grant.scopes,
                "services": grant.services,
                "until": until,
                "expired": expired,
            })),
            Output::Table => say(&format_args!(
                "{:<24} {:<28} {:<28} {}{}",
                grant.name,
                file::join(&grant.scopes),
                file::join(&grant.services),
                until.as_deref().unwrap_or("-"),
                if expired { " (expired)" } else { "" }
            )),
        }
    }
    Ok(())
}

fn revoke(name: &str, path: &Path) -> Result<(), Failure> {
    edit(path, |text, entries| {
        let Some(entry) = named(entries, name) else {
            let names = file::join(entries.iter().map(|entry| &entry.grant.name));
            let problem = format!(
                "{}: there is no token {name:?}; there are: {names}",
                path.display()
            );
            return Err(Failure::usage(problem));
        };
        // All the others stay as they are, byte for byte.
        let lines = (1..).zip(text.split_inclusive('\n'));
        Ok(lines
            .filter(|(number, _)| *number != entry.line)
            .map(|(_, line)| line)
            .collect())
    })
}

fn named<'a>(entries: &'a [Entry], name: &str) -> Option<&'a Entry> {
    entries.iter().find(|entry| &*entry.grant.name == name)
}

fn parse(path: &Path, text: &str) -> Result<Vec<Entry>, Failure> {
    let entries = file::parse(text);
    entries.map_err(|(line, problem)| Failure::usage(format!("{}:{line}: {problem}", path.display())))
}

fn unreadable(path: &Path, error: &io::Error) -> Failure {
    Failure::usage(format!("cannot read {}: {error}", path.display()))
}

/// Replaces a file of tokens by what `change` makes of it; a file that is not there counts as empty. Two that do this at
/// once wait for each other.
fn edit(path: &Path, change: impl FnOnce(&str, &[Entry]) -> Result<String, Failure>) -> Result<(), Failure> {
    let unwritable = |error: io::Error| Failure::usage(format!("cannot change {}: {error}", path.display()));
    // Where the path is a link, the file that it leads to is meant.
    let place = fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    let directory = match place.parent() {
        Some(directory) if !directory.as_os_str().is_empty() => directory,
        _ => Path::new("."),
    };
    let lock = File::open(directory).map_err(unwritable)?;
    lock.lock().map_err(unwritable)?;
    let text = match file::read(&place) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
        Err(error) => return Err(unreadable(path, &error)),
    };
    let changed = change(&text, &parse(path, &text)?)?;
    parse(path, &changed)?;
    replace(&place, &changed).map_err(unwritable)
}

/// Puts another content in the place of a file at once. It keeps the file's owner and mode, so that whoever could read
/// the old one can read it; a new file is for its owner only.
fn replace(path: &Path, text: &str) -> io::Result<()> {
    let temporary = path.with_added_extension(format!("{}.tmp", std::process::id()));
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&temporary)?;
    let written = keep_rights(&file, path)
        .and_then(|()| file.write_all(text.as_bytes()))
        .and_then(|()| file.sync_all())
        .and_then(|()| fs::rename(&temporary, path));
    if written.is_err() {
        drop(fs::remove_file(&temporary));
    }
    written.and_then(|()| disk::sync_directory(path))
}

fn keep_rights(file: &File, path: &Path) -> io::Result<()> {
    let before = match fs::metadata(path) {
        Ok(before) => before,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    let now = file.metadata()?;
    if (now.uid(), now.gid()) != (before.uid(), before.gid()) {
        fchown(file, Some(before.uid()), Some(before.gid()))?;
    }
    file.set_permissions(before.permissions())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    fn options(name: &str, file: &Path) -> Create {
        Create {
            name: name.to_owned(),
            scope: vec![Scope::Gate],
            service: vec!["checkout*".to_owned()],
            until: None,
            file: Some(file.to_owned()),
        }
    }

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().permissions().mode() & 0o777
    }

    #[test]
    fn what_is_there_stays() {
        let directory = tempfile::tempdir().unwrap();
        let (path, link) = (directory.path().join("tokens"), directory.path().join("link"));
        create(options("ci", &path)).unwrap();
        assert_eq!(mode(&path), 0o600);
        let first = fs::read_to_string(&path).unwrap();
        assert!(first.ends_with(" ci gate checkout*\n"), "{first}");

        let commented = format!("# the shop\r\n{first}\n  # without an end");
        fs::write(&path, &commented).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
        std::os::unix::fs::symlink(&path, &link).unwrap();
        create(options("cd", &link)).unwrap();
        assert!(link.is_symlink() && mode(&path) == 0o640);
        let text = fs::read_to_string(&path).unwrap();
        let added = text.strip_prefix(&format!("{commented}\n")).unwrap();
        assert!(added.ends_with(" cd gate checkout*\n"), "{added}");

        let again = create(options("cd", &path)).unwrap_err();
        assert!(
            again.message.contains("tokens:5: there is a token of that name"),
            "{again}"
        );
        let unknown = revoke("ce", &path).unwrap_err();
        assert!(unknown.message.contains("there are: ci,cd"), "{unknown}");
        assert_eq!(fs::read_to_string(&path).unwrap(), text);

        revoke("ci", &link).unwrap();
        let left = fs::read_to_string(&path).unwrap();
        assert_eq!(left, format!("# the shop\r\n\n  # without an end\n{added}"));
        revoke("cd", &path).unwrap();
        assert_eq!(file::parse(&fs::read_to_string(&path).unwrap()), Ok(Vec::new()));
        assert_eq!(
            fs::read_dir(directory.path()).unwrap().count(),
            2,
            "nothing else is left"
        );
    }

    #[test]
    fn a_file_that_cannot_be_used_is_not_touched() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("tokens");
        fs::write(&path, "# ours\nnonsense\n").unwrap();
        for failure in [
            create(options("ci", &path)).unwrap_err(),
            revoke("ci", &path).unwrap_err(),
            list(&path, Output::Table).unwrap_err(),
        ] {
            assert_eq!(failure.exit, Exit::Usage);
            assert!(failure.message.contains("tokens:2: a line has"), "{failure}");
        }
        assert_eq!(fs::read_to_string(&path).unwrap(), "# ours\nnonsense\n");
        let gone = revoke("ci", &directory.path().join("none/tokens")).unwrap_err();
        assert!(gone.message.contains("none/tokens"), "{gone}");
        let mut over = options("ci", &path);
        over.until = Some(Timestamp::UNIX_EPOCH);
        assert!(create(over).unwrap_err().message.contains("--until"));
    }

    #[test]
    fn a_token_file_is_read_to_its_line_break() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("token");
        fs::write(&path, "cmt_a\n").unwrap();
        assert_eq!(presented(Some(&path)).unwrap().as_deref(), Some("cmt_a"));
        fs::write(&path, "\n").unwrap();
        let failure = presented(Some(&path)).unwrap_err();
        assert!(failure.message.contains("no token in it"), "{failure}");
        fs::remove_file(&path).unwrap();
        assert!(
            presented(Some(&path))
                .unwrap_err()
                .message
                .contains("cannot read")
        );
    }
}
