//! The directory in which podman and CRI-O look for hooks (oci-hooks(5)), and our hook in it.

use super::program;
use crate::{durable, fault};
use serde_json::{Value, json};
use std::{
    env, fs, io,
    path::{Path, PathBuf},
};

const FILE: &str = "50-mesh-redirect.json";
/// The first and the last arguments of every hook of ours, by which any later version knows it.
const NAME: &str = "mesh-redirect";
const STEP: [&str; 2] = ["attach", "--oci"];

/// Our hook for a configuration, in a directory.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Hook<'c> {
    pub(crate) dir: &'c Path,
    /// The configuration, when it is not the default one.
    pub(crate) config: Option<&'c Path>,
}

impl<'c> Hook<'c> {
    /// The one at a path; none where no hook of ours can be.
    pub(crate) fn at(file: &'c Path, config: Option<&'c Path>) -> Option<Self> {
        let dir = file.parent().filter(|_| file.file_name().is_some_and(|name| name == FILE))?;
        Some(Self { dir, config })
    }

    /// Where it is.
    pub(crate) fn path(self) -> PathBuf {
        self.dir.join(FILE)
    }

    /// The file's path and content.
    pub(crate) fn file(self) -> io::Result<(PathBuf, String)> {
        Ok((self.path(), content(&program::path()?, self.config)))
    }

    /// Whether anybody looks there: the directory is podman's and CRI-O's, and below theirs.
    pub(crate) fn is_of_use(self) -> bool {
        let path = env::var_os("PATH").unwrap_or_default();
        let is_installed = |runtime| env::split_paths(&path).any(|dir| dir.join(runtime).is_file());
        self.dir.ancestors().take(3).any(Path::is_dir) || ["podman", "crio"].into_iter().any(is_installed)
    }

    /// Whether it is there as it shall be.
    pub(crate) fn is_written(self) -> io::Result<bool> {
        let (path, text) = self.file()?;
        Ok(durable::read(&path).is_ok_and(|present| present == text.as_bytes()))
    }

    /// Whether it is there. Another configuration's is not ours to remove.
    pub(crate) fn is_there(self) -> bool {
        durable::read(&self.path()).is_ok_and(|text| is_of(&text, self.config))
    }

    /// Writes it, unless it is there.
    pub(crate) fn write(self) -> io::Result<()> {
        if self.is_written()? {
            return Ok(());
        }
        let (path, text) = self.file()?;
        fs::create_dir_all(self.dir)?;
        fault::point("hook", "directory made");
        // Runtimes read what ends with `.json`, which what is written beside it does not.
        durable::replace(&path, text.as_bytes(), "hook")
    }

    /// Removes it, and its directories where nothing else is in them. False where it was not there.
    pub(crate) fn remove(self) -> io::Result<bool> {
        let path = self.path();
        let removed =
            if self.is_there() { durable::remove(&path, "hook") } else { durable::remove_beside(&path) };
        let removed = removed?;
        for dir in self.dir.ancestors().take(2) {
            let _others_are_in_it = fs::remove_dir(dir);
        }
        Ok(removed)
    }
}

fn content(program: &Path, config: Option<&Path>) -> String {
    let hook = json!({
        "version": "1.0.0",
        "hook": { "path": program, "args": arguments(config) },
        "when": { "always": true },
        "stages": ["createRuntime"],
    });
    format!("{hook:#}\n")
}

fn arguments(config: Option<&Path>) -> Vec<String> {
    let config = config.map(|config| ["--config".to_owned(), config.to_string_lossy().into_owned()]);
    let step = STEP.map(str::to_owned);
    [NAME.to_owned()].into_iter().chain(config.into_iter().flatten()).chain(step).collect()
}

/// Whether a file is our hook for a configuration, wherever the program was when it was written.
fn is_of(text: &[u8], config: Option<&Path>) -> bool {
    let hook: Value = serde_json::from_slice(text).unwrap_or_default();
    hook["hook"]["args"] == json!(arguments(config))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hook_is_for_every_container_and_removed_only_by_its_own_configuration() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("hooks.d");
        let hook = |config| Hook { dir: &dir, config };
        hook(None).write().unwrap();
        hook(None).write().unwrap();
        let text = fs::read_to_string(dir.join(FILE)).unwrap();
        let read: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(read["hook"]["args"], json!(["mesh-redirect", "attach", "--oci"]));
        assert_eq!(read["when"], json!({ "always": true }));
        hook(Some(Path::new("/a.yaml"))).remove().unwrap();
        assert!(dir.join(FILE).exists());
        hook(None).remove().unwrap();
        assert!(!dir.exists());
        hook(None).remove().unwrap();
    }

    #[test]
    fn a_file_that_is_not_ours_stays() {
        let root = tempfile::tempdir().unwrap();
        for text in ["", "{}", r#"{"hook":{"args":["other","attach","--oci"]}}"#] {
            fs::write(root.path().join(FILE), text).unwrap();
            Hook { dir: root.path(), config: None }.remove().unwrap();
            assert_eq!(fs::read_to_string(root.path().join(FILE)).unwrap(), text);
        }
    }
}
