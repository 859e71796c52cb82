//! systemd, by its own command: what units there are, where they run, and a step of ours before they start.

use std::{
    fs, io,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

const UNITS: &str = "/etc/systemd/system";
const DROP_IN: &str = "50-mesh-redirect.conf";
/// First line of every file that is ours, by which any later version knows it.
const MARK: &str = "# Written by mesh-redirect, which removes it on disable and cleanup.";

/// Whether systemd manages this host (sd_booted(3)).
pub(crate) fn is_running() -> bool {
    Path::new("/run/systemd/system").is_dir()
}

/// Whether a unit of this name exists.
pub(super) fn is_loaded(unit: &str) -> bool {
    show(unit, "LoadState").is_some_and(|state| state == "loaded")
}

/// The cgroup of a unit that runs, below the cgroup2 mount.
pub(super) fn control_group(unit: &str) -> Option<String> {
    show(unit, "ControlGroup").filter(|path| !path.is_empty() && path != "/")
}

/// Names of all service units.
pub(super) fn units() -> Vec<String> {
    let listed = systemctl(&["list-unit-files", "--type=service", "--no-legend", "--no-pager", "--full"]);
    let names = listed.unwrap_or_default();
    names.lines().filter_map(|line| line.split_whitespace().next()).map(str::to_owned).collect()
}

/// Makes a unit attach its cgroup before its first process starts, at each start: systemd makes a new cgroup then, and
/// with the old one our links went. `required`: the unit must not start unsteered.
pub(crate) fn write_drop_in(
    unit: &str,
    service: &str,
    config: Option<&Path>,
    required: bool,
) -> io::Result<()> {
    let text = drop_in(&std::env::current_exe()?, service, config, required);
    let path = drop_in_path(unit);
    if fs::read_to_string(&path).is_ok_and(|present| present == text) {
        return Ok(());
    }
    fs::create_dir_all(path.with_file_name(""))?;
    let next = path.with_extension("next");
    fs::write(&next, text)?;
    fs::rename(&next, &path)?;
    reload()
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

/// Removes the step from a unit.
pub(crate) fn remove_drop_in(unit: &str) -> io::Result<()> {
    if remove(&drop_in_path(unit))? { reload() } else { Ok(()) }
}

/// Removes the step from every unit, whatever wrote it.
pub(crate) fn remove_all_drop_ins() -> io::Result<()> {
    let Ok(dirs) = fs::read_dir(UNITS) else { return Ok(()) };
    let mut removed = false;
    for dir in dirs.flatten() {
        removed |= remove(&dir.path().join(DROP_IN))?;
    }
    if removed { reload() } else { Ok(()) }
}

fn drop_in_path(unit: &str) -> PathBuf {
    Path::new(UNITS).join(format!("{unit}.d")).join(DROP_IN)
}

/// Removes a file that bears our mark, and its directory where nothing else is in it.
fn remove(path: &Path) -> io::Result<bool> {
    if !fs::read_to_string(path).is_ok_and(|text| text.starts_with(MARK)) {
        return Ok(false);
    }
    fs::remove_file(path)?;
    if let Some(dir) = path.parent() {
        let _others_are_in_it = fs::remove_dir(dir);
    }
    Ok(true)
}

fn reload() -> io::Result<()> {
    if is_running() { systemctl(&["daemon-reload"]).map(drop) } else { Ok(()) }
}

fn show(unit: &str, property: &str) -> Option<String> {
    if !is_running() {
        return None;
    }
    let value = systemctl(&["show", "--property", property, "--value", "--", unit]).ok()?;
    Some(value.trim().to_owned())
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
}
