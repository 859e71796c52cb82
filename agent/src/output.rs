//! How results reach whoever asked: as text for people, or as JSON of a documented, versioned form.

use serde::Serialize;
use std::{
    fmt::Display,
    io::{self, Write},
};

/// Version of every JSON form: it changes when a field changes its meaning or goes, not when one is added.
const VERSION: u32 = 1;

/// Which form is wanted.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Output {
    /// JSON instead of text.
    pub(crate) json: bool,
}

/// A JSON form.
#[derive(Debug, Serialize)]
struct Versioned<'a, T> {
    version: u32,
    #[serde(flatten)]
    value: &'a T,
}

impl Output {
    /// A result, to standard output.
    pub(crate) fn result<T: Serialize>(self, value: &T, text: impl FnOnce(&T) -> String) -> io::Result<()> {
        print(&mut io::stdout(), &if self.json { json(value)? } else { text(value) })
    }

    /// One of many results, at once; as JSON on a line of its own. False when nobody reads them any more.
    pub(crate) fn line<T: Serialize>(self, value: &T, text: impl FnOnce(&T) -> String) -> io::Result<bool> {
        let line = if self.json {
            serde_json::to_string(&Versioned { version: VERSION, value })? + "\n"
        } else {
            text(value)
        };
        let mut stdout = io::stdout().lock();
        match stdout.write_all(line.as_bytes()).and_then(|()| stdout.flush()) {
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(false),
            result => result.map(|()| true),
        }
    }

    /// What is no result, to standard error.
    pub(crate) fn aside<T: Serialize>(self, value: &T, text: impl FnOnce(&T) -> String) {
        let text = if self.json { json(value).unwrap_or_default() } else { text(value) };
        let _nobody_is_left_to_tell = print(&mut io::stderr(), &text);
    }

    /// Why there is no result.
    pub(crate) fn error(self, error: &dyn Display) {
        #[derive(Serialize)]
        struct Failure {
            error: String,
        }
        self.aside(&Failure { error: format!("{error:#}") }, |failure| {
            format!("mesh-redirect: {}\n", failure.error)
        });
    }
}

fn json(value: &impl Serialize) -> io::Result<String> {
    Ok(serde_json::to_string_pretty(&Versioned { version: VERSION, value })? + "\n")
}

/// A reader that has seen enough (`| head`) is no failure.
fn print(to: &mut impl Write, text: &str) -> io::Result<()> {
    match to.write_all(text.as_bytes()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        result => result,
    }
}
