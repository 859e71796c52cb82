//! Completions and the manual: what the programs say of themselves, and where it is installed.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use tests::{binaries, binary};

const PROGRAMS: [&str; 2] = ["mesh-redirect", "mesh-proxy"];

#[test]
fn bash_completes_commands_options_and_shells() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let script = folder.path().join("completions");
    for (program, words, expected) in [
        ("mesh-redirect", "en", "enable env"),
        ("mesh-redirect", "enable --o", "--observe"),
        ("mesh-redirect", "completions z", "zsh"),
        ("mesh-redirect", "attach --", "--proxy --oci --config --json --help"),
        ("mesh-proxy", "r", "run"),
    ] {
        fs::write(&script, said(&binary(program), &["completions", "bash"])).expect("write the completions");
        let complete = format!(
            r#"source "$0" && registered=$(complete -p {program}) && function=${{registered#*-F }} && function=${{function%% *}}
            COMP_WORDS=({program} {words}) COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
            $function {program} "${{COMP_WORDS[COMP_CWORD]}}" "${{COMP_WORDS[COMP_CWORD - 1]}}" && echo "${{COMPREPLY[@]}}""#
        );
        let mut bash = Command::new("bash");
        bash.args(["--norc", "--noprofile", "-c", &complete]).arg(&script);
        assert_eq!(run(bash).trim(), expected, "{program} {words}");
    }
}

#[test]
fn every_command_has_a_page_that_the_formatter_takes_without_a_warning() {
    for program in PROGRAMS {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let said = said(&binary(program), &["man", "--dir", &folder.path().to_string_lossy()]);
        let mut pages: Vec<PathBuf> = said.lines().map(PathBuf::from).collect();
        pages.sort();
        assert_eq!(pages, files(folder.path()));
        let commands = commands(&binary(program));
        assert_eq!(pages.len(), commands.len() + 1, "{commands:?}");
        for name in commands.iter().map(|command| format!("{program}-{command}")).chain([program.to_owned()])
        {
            let page = folder.path().join(format!("{name}.8"));
            let text = fs::read_to_string(&page).unwrap_or_else(|error| panic!("{name}: {error}"));
            assert!(text.contains(&format!(".TH {name} 8 ")), "{text}");
            let mut groff = Command::new("groff");
            groff.args(["-man", "-Tutf8", "-ww"]).arg(&page);
            let output = groff.output().expect("run groff");
            let complaint = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success() && complaint.is_empty(), "{name}: {complaint}");
        }
    }
    let page = said(&binary("mesh-redirect"), &["man", "enable"]);
    assert!(page.contains(".TH mesh-redirect-enable 8 "), "{page}");
}

#[test]
fn both_are_installed_with_the_programs_and_uninstalled_with_them() {
    let root = tempfile::tempdir().expect("a temporary folder");
    xtask("install", root.path(), &["--bin-dir", &binaries().to_string_lossy()]);
    let share = root.path().join("usr/local/share");
    for program in PROGRAMS {
        for file in [
            format!("bash-completion/completions/{program}"),
            format!("zsh/site-functions/_{program}"),
            format!("fish/vendor_completions.d/{program}.fish"),
            format!("man/man8/{program}.8"),
        ] {
            assert!(fs::metadata(share.join(&file)).is_ok_and(|file| file.len() > 100), "{file}");
        }
    }
    assert!(share.join("man/man8/mesh-redirect-enable.8").exists());
    xtask("uninstall", root.path(), &["--purge"]);
    assert_eq!(files(root.path()), Vec::<PathBuf>::new());
}

/// What `--help` lists.
fn commands(program: &Path) -> Vec<String> {
    let help = said(program, &["--help"]);
    let listed =
        help.split("Commands:\n").nth(1).and_then(|rest| rest.split("\n\n").next()).expect("commands");
    let name = |line: &str| {
        line.strip_prefix("  ")?.split(' ').next().filter(|name| !name.is_empty()).map(str::to_owned)
    };
    listed.lines().filter_map(name).filter(|name| name != "help").collect()
}

fn said(program: &Path, args: &[&str]) -> String {
    let mut command = Command::new(program);
    command.args(args);
    run(command)
}

#[track_caller]
fn run(mut command: Command) -> String {
    let Output { status, stdout, stderr } = command.output().expect("run a command");
    assert!(status.success(), "{command:?}: {}", String::from_utf8_lossy(&stderr));
    String::from_utf8(stdout).expect("text")
}

fn files(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
    let mut files: Vec<PathBuf> =
        entries.flat_map(|path| if path.is_dir() { files(&path) } else { vec![path] }).collect();
    files.sort();
    files
}

fn xtask(command: &str, root: &Path, options: &[&str]) {
    let cargo = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let run = ["run", "--quiet", "--package", "xtask", "--", command, "--root"];
    let output = Command::new(cargo).args(run).arg(root).args(options).output().expect("run cargo");
    assert!(output.status.success(), "cargo xtask {command}: {}", String::from_utf8_lossy(&output.stderr));
}
