//! What commands say with `--json` is what the reference says that they say.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::time::Duration;

use serde_json::Value;
use tests::{Agent, Finished, Mesh, Mode, Place, Sandbox, answers, wait_for};

scenarios![everywhere: every_command_says_what_is_documented];

const SOON: Duration = Duration::from_secs(10);

/// Where what is said is looked for.
#[derive(Clone, Copy)]
enum Said {
    /// On standard output.
    Result,
    /// On standard error.
    Aside,
}
use Said::{Aside, Result};

/// Commands, and how the reference calls what they say. Every command has to be here.
const COMMANDS: &[(&str, &[&str], Said)] = &[
    ("check", &["check"], Result),
    ("check SERVICE", &["check", "shop"], Result),
    ("enable", &["enable", "stock"], Result),
    ("enable", &["enable", "stock", "--observe", "--dry-run"], Result),
    ("status", &["status"], Result),
    ("reload", &["reload"], Result),
    ("explain", &["explain", "shop", "10.77.0.10:8080"], Result),
    ("env", &["env", "catalog"], Result),
    ("exec", &["exec", "shop", "--", "true"], Aside),
    ("disable", &["disable", "stock"], Result),
    ("completions", &["completions", "bash"], Result),
    ("man", &["man"], Result),
    ("man --dir", &["man", "--dir", "DIR"], Result),
    // Refused while a daemon runs.
    ("errors", &["cleanup"], Aside),
    ("errors", &["enable", "nobody"], Aside),
];

/// Those that are run in another place or another way, below.
const ELSEWHERE: [&str; 5] = ["run", "adopt", "attach", "cleanup", "watch"];

fn every_command_says_what_is_documented(sandbox: &Sandbox) {
    let reference = Reference::read();
    let mesh = Mesh::enabled(sandbox, "");
    for (name, args, said) in COMMANDS {
        let folder = sandbox.path("").display().to_string();
        let args: Vec<&str> =
            args.iter().map(|arg| if *arg == "DIR" { folder.as_str() } else { arg }).collect();
        let finished = Agent::command(sandbox, &[&["--json"], &args[..]].concat());
        reference.holds(name, &text(&finished, *said));
    }
    let adopted = sandbox.program(Place::Stock, "sleep").arg("60").serve(sandbox.path("sleep.log"));
    let pid = adopted.pid().to_string();
    reference.holds("adopt", &text(&Agent::command(sandbox, &["--json", "adopt", "shop", &pid]), Result));
    reference.holds("attach", &text(&Agent::command(sandbox, &["--json", "attach", "shop"]), Result));
    drop(adopted);
    if sandbox.mode == Mode::Ebpf {
        let watch = Agent::program(sandbox, &["--json", "watch"]).serve(sandbox.path("watch.log"));
        let line = wait_for(SOON, || {
            answers(sandbox);
            watch.log().split_once('\n').map(|(line, _)| line.to_owned())
        });
        reference.holds("watch", &line.expect("a decision"));
    }

    mesh.agent.stop();
    reference.holds("cleanup", &text(&Agent::command(sandbox, &["--json", "cleanup"]), Result));
    let known: BTreeSet<&str> = COMMANDS.iter().map(|(_, args, _)| args[0]).chain(ELSEWHERE).collect();
    let help = Agent::command(sandbox, &["--help"]).ok().to_owned();
    for command in commands(&help) {
        assert!(known.contains(command), "`{command} --json` is in no test");
    }
}

fn text(finished: &Finished, said: Said) -> String {
    match said {
        Result => finished.stdout.clone(),
        Aside => finished.stderr.clone(),
    }
}

/// What `--help` lists.
fn commands(help: &str) -> impl Iterator<Item = &str> {
    let listed =
        help.split("Commands:\n").nth(1).and_then(|rest| rest.split("\n\n").next()).expect("commands");
    let names = listed.lines().filter_map(|line| line.strip_prefix("  ")?.split(' ').next());
    names.filter(|name| !name.is_empty() && *name != "help")
}

/// The examples of docs/agent.md.
struct Reference(String);

impl Reference {
    fn read() -> Self {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/agent.md");
        Self(fs::read_to_string(path).expect("the reference"))
    }

    /// Something is said as its example has it: with these fields and no others, but for those of which the reference says
    /// that they may be absent.
    #[track_caller]
    fn holds(&self, name: &str, said: &str) {
        let said: Value =
            serde_json::from_str(said).unwrap_or_else(|error| panic!("{name}: {error} in {said:?}"));
        let (example, optional) = self.example(name);
        assert_eq!(said["version"], example["version"], "{name}: {said}");
        let (documented, found) = (fields(&example), fields(&said));
        let unknown: Vec<&String> = found.difference(&documented).collect();
        assert!(unknown.is_empty(), "{name}: not documented: {unknown:?} in {said:#}");
        let has_elements = |path: &String| {
            let list = path.rsplit_once("[]").map(|(list, _)| list);
            list.is_none_or(|list| found.contains(&format!("{list}[]")))
        };
        let is_optional =
            |path: &String| path.rsplit(['.', ']']).next().is_some_and(|field| optional.contains(field));
        let missing =
            documented.difference(&found).filter(|path| has_elements(path) && !path.ends_with("[]"));
        let missing: Vec<&String> = missing.filter(|path| !is_optional(path)).collect();
        assert!(missing.is_empty(), "{name}: documented but absent: {missing:?} in {said:#}");
    }

    /// The example below "`NAME --json`", and the fields that "may be absent".
    #[track_caller]
    fn example(&self, name: &str) -> (Value, BTreeSet<String>) {
        let heading =
            if name == "errors" { "Errors with `--json`".to_owned() } else { format!("`{name} --json`") };
        let found = self.0.split_once(&format!("\n{heading}"));
        let (_, rest) = found.unwrap_or_else(|| panic!("{heading} is not in docs/agent.md"));
        let (introduction, rest) = rest.split_once("```json\n").expect("an example");
        let (example, _) = rest.split_once("```").expect("its end");
        let first = serde_json::Deserializer::from_str(example).into_iter().next().expect("an example");
        let example = first.unwrap_or_else(|error| panic!("{heading}: {error}"));
        let absent = introduction.split_once("may be absent").map(|(fields, _)| fields).unwrap_or_default();
        (example, absent.split('`').skip(1).step_by(2).map(str::to_owned).collect())
    }
}

/// Paths of all fields: `services[].name`; and `services[]` where a list has elements.
fn fields(value: &Value) -> BTreeSet<String> {
    match value {
        Value::Object(fields) => {
            fields.iter().flat_map(|(name, value)| below(&format!(".{name}"), value)).collect()
        }
        Value::Array(elements) => elements.iter().flat_map(|element| below("[]", element)).collect(),
        _ => BTreeSet::new(),
    }
}

fn below(path: &str, value: &Value) -> BTreeSet<String> {
    let deeper = fields(value).into_iter().map(|below| format!("{path}{below}"));
    deeper.chain([path.to_owned()]).collect()
}
