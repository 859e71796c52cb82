//! systemd, by its own command: what units there are, where they run, and a step of ours before they start.

use super::program;
use crate::{durable, fault};
use std::{
    fs, io,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

/// Where the host's own settings of units are.
pub(crate) const UNITS: &str = "/etc/systemd/system";
const DROP_IN: &str = "50-mesh-redirect.conf";
/// First line of every file that is ours, by which any later version knows it.
const MARK: &str = "# Written by mesh-redirect, which removes it on disable and cleanup.";

/// Whether systemd manages this host (sd_booted(3)).
pub(crate) fn is_running() -> bool {
    Path::new("/run/systemd/system").is_dir()
}

/// What systemd knows of a unit.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Unit {
    /// Whether there is one of this name.
    pub(super) is_loaded: bool,
    /// Where it runs, below the cgroup2 mount; none where it does not run.
    pub(super) control_group: Option<String>,
}

/// Units in one call; in a call for each, a thousand of them would take ten seconds.
const AT_ONCE: usize = 500;

/// What systemd knows of these units, in the same order. That it does not answer says nothing of a unit.
pub(super) fn show<'u>(units: &[&'u str]) -> io::Result<Vec<(&'u str, Unit)>> {
    if !is_running() {
        return Ok(units.iter().map(|&unit| (unit, Unit::default())).collect());
    }
    let mut shown = Vec::new();
    for units in units.chunks(AT_ONCE) {
        let options = ["show", "--property=LoadState,ControlGroup", "--"];
        let found = parse(&systemctl(&[&options[..], units].concat())?);
        shown.extend(units.iter().copied().zip(found.into_iter().chain(std::iter::repeat(Unit::default()))));
    }
    Ok(shown)
}

/// Blocks of `NAME=VALUE`, an empty line between two.
fn parse(text: &str) -> Vec<Unit> {
    let value = |block: &str, name: &str| {
        let found = block.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='));
        found.map(str::to_owned).filter(|value| !value.is_empty())
    };
    let unit = |block: &str| Unit {
        is_loaded: value(block, "LoadState").is_some_and(|state| state == "loaded"),
        control_group: value(block, "ControlGroup").filter(|path| path != "/"),
    };
    text.trim_end().split("\n\n").map(unit).collect()
}

/// Names of all service units.
pub(super) fn units() -> Vec<String> {
    let listed = systemctl(&["list-unit-files", "--type=service", "--no-legend", "--no-pager", "--full"]);
    let names = listed.unwrap_or_default();
    names.lines().filter_map(|line| line.split_whitespace().next()).map(str::to_owned).collect()
}

/// A step of ours before a unit's first process starts: systemd makes a new cgroup at each start, and with the old one
/// our links went.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct DropIn {
    pub(crate) unit: String,
    pub(crate) service: String,
    /// Whether the unit must not start unsteered.
    pub(crate) required: bool,
}

impl DropIn {
    /// Where it is.
    pub(crate) fn path(&self) -> PathBuf {
        drop_in_path(&self.unit)
    }

    /// The file's path and content, for a configuration that is not the default one.
    pub(crate) fn file(&self, config: Option<&Path>) -> io::Result<(PathBuf, String)> {
        let text = drop_in(&program::path()?, &self.service, config, self.required);
        Ok((self.path(), text))
    }

    /// Whether the file is there as it shall be.
    pub(crate) fn is_written(&self, config: Option<&Path>) -> io::Result<bool> {
        let (path, text) = self.file(config)?;
        Ok(durable::read(&path).is_ok_and(|present| present == text.as_bytes()))
    }
}

/// Writes those that are not there, and tells systemd once.
pub(crate) fn write_drop_ins(drop_ins: &[DropIn], config: Option<&Path>) -> io::Result<()> {
    let mut written = false;
    for drop_in in drop_ins {
        if drop_in.is_written(config)? {
            continue;
        }
        let (path, text) = drop_in.file(config)?;
        fs::create_dir_all(path.with_file_name(""))?;
        fault::point("drop-in", "directory made");
        durable::replace(&path, text.as_bytes(), "drop-in")?;
        written = true;
    }
    if written { reload() } else { Ok(()) }
}

fn drop_in(program: &Path, service: &str, config: Option<&Path>, required: bool) -> String {
    // "+" runs it as root whatever the unit's user; "-" lets the unit start when it fails.
    let prefix = if required { "+" } else { "+-" };
    let config = config.map(|config| format!(" --config {}", quoted(config))).unwrap_or_default();
    format!("{MARK}\n[Service]\nExecStartPre={prefix}{}{config} attach {service}\n", quoted(program))
}

/// As one word of a unit file (systemd.service(5), "Command lines").
fn quoted(path: &Path) -> String {
    let text = path.to_string_lossy();
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-+:@".contains(c);
    if text.chars().all(plain) {
        return text.into_owned();
    }
    format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\"").replace('%', "%%").replace('$', "$$"))
}

/// Removes the step from units, and tells systemd once.
pub(crate) fn remove_drop_ins<'f>(files: impl IntoIterator<Item = &'f Path>) -> io::Result<()> {
    let mut removed = false;
    for file in files {
        removed |= remove_drop_in(file)?;
    }
    if removed { reload() } else { Ok(()) }
}

/// Removes one that is ours, and its directory where nothing else is in it. False where none was there. systemd is to be told.
pub(crate) fn remove_drop_in(file: &Path) -> io::Result<bool> {
    let Some(dir) = file.parent().filter(|_| file.file_name().is_some_and(|name| name == DROP_IN)) else {
        return Ok(false);
    };
    let removed =
        if is_drop_in(file) { durable::remove(file, "drop-in") } else { durable::remove_beside(file) };
    let removed = removed?;
    let _others_are_in_it = fs::remove_dir(dir);
    fault::point("drop-in", "directory removed");
    Ok(removed)
}

/// Every one that is on this host, whatever wrote it.
pub(crate) fn drop_ins() -> Vec<PathBuf> {
    let dirs = fs::read_dir(UNITS).into_iter().flatten().flatten();
    dirs.map(|dir| dir.path().join(DROP_IN)).filter(|file| is_drop_in(file)).collect()
}

/// Whether a file bears our mark, or the beginning of it: a host may have died before the rest reached its disk.
pub(crate) fn is_drop_in(file: &Path) -> bool {
    let ours = |text: Vec<u8>| text.starts_with(MARK.as_bytes()) || MARK.as_bytes().starts_with(&text);
    durable::read(file).is_ok_and(ours)
}

/// Where a unit's is.
pub(crate) fn drop_in_path(unit: &str) -> PathBuf {
    Path::new(UNITS).join(format!("{unit}.d")).join(DROP_IN)
}

/// Tells systemd of what was written and removed.
pub(crate) fn reload() -> io::Result<()> {
    fault::point("systemd", "about to be told");
    if is_running() { systemctl(&["daemon-reload"]).map(drop) } else { Ok(()) }
}

fn systemctl(arguments: &[&str]) -> io::Result<String> {
    let output =
        Command::new("systemctl").args(arguments).stdin(Stdio::null()).stderr(Stdio::piped()).output()?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let stderr = String::from_utf8_lossy(&output.stderr);
    Err(io::Error::other(format!("systemctl {}: {}", arguments.join(" "), stderr.trim())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_block_is_a_unit_in_the_order_of_the_question() {
        let text = "LoadState=loaded\nControlGroup=/system.slice/a.service\n\nLoadState=not-found\nControlGroup=\n\nControlGroup=/\nLoadState=loaded\n";
        let unit = |is_loaded, path: Option<&str>| Unit { is_loaded, control_group: path.map(str::to_owned) };
        let expected = [unit(true, Some("/system.slice/a.service")), unit(false, None), unit(true, None)];
        assert_eq!(parse(text), expected);
    }

    #[test]
    fn the_drop_in_attaches_before_the_first_process_and_is_optional_unless_required() {
        let optional = drop_in(Path::new("/usr/bin/mesh-redirect"), "shop", None, false);
        assert_eq!(
            optional.lines().skip(1).collect::<Vec<_>>(),
            ["[Service]", "ExecStartPre=+-/usr/bin/mesh-redirect attach shop"]
        );
        let required = drop_in(Path::new("/opt/my tools/mesh-redirect"), "shop", Some(Path::new("/a")), true);
        assert!(
            required.contains("ExecStartPre=+\"/opt/my tools/mesh-redirect\" --config /a attach shop"),
            "{required}"
        );
    }

    #[test]
    fn systemds_answer_tells_of_no_more_units_than_it_has_blocks() {
        let seeds: [&[u8]; 2] = [
            b"LoadState=loaded\nControlGroup=/system.slice/a.service\n\nLoadState=not-found\nControlGroup=\n",
            b"ControlGroup=/\nLoadState=loaded\n",
        ];
        fuzz::damaged!(
            seeds,
            ["LoadState=", "ControlGroup=", "loaded", "=", "\n\n", "/"],
            |input: &[u8]| {
                let text = String::from_utf8_lossy(input);
                let units = parse(&text);
                assert!(units.len() <= 1 + text.matches("\n\n").count());
                let groups = units.iter().filter_map(|unit| unit.control_group.as_deref());
                assert!(groups.into_iter().all(|path| !path.is_empty() && path != "/"));
            }
        );
    }
}
