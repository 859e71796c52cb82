//! Why policy steers a destination or leaves it alone, in words, and where the configuration says so: pure.

use crate::{
    config::Config,
    routable::Routable,
    rules::{self, Verdict},
};
use serde::Serialize;
use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
};

/// See the module.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Reason {
    /// Whether policy has it steered, wherever the proxy is.
    pub(crate) steered: bool,
    /// One sentence.
    pub(crate) because: String,
    /// The part of the policy that says so, as the configuration has it; none for what no policy can have meant.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) rule: Option<String>,
    /// Where it is written; neither is there for what is built in.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) file: Option<PathBuf>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) line: Option<u64>,
}

impl Reason {
    /// What the policy of a service says of a TCP connection.
    pub(crate) fn of(config: &Config, routable: &Routable, service: &str, destination: SocketAddr) -> Self {
        Self::new(&config.file, &rules::decide(config.policy(service), routable, destination))
    }

    /// A verdict of a policy of the configuration in a file.
    pub(crate) fn new(file: &Path, verdict: &Verdict<'_>) -> Self {
        let because = match verdict {
            Verdict::Steered(rule) => format!("`{rule}` covers it"),
            Verdict::Excluded(rule) => format!("`{rule}` covers it, and no include is more specific"),
            Verdict::NotIncluded(_) => "no include covers it".to_owned(),
            Verdict::Local => "this host, its link, a group or nobody: never steered".to_owned(),
        };
        let line = verdict.rule().and_then(rules::Rule::line);
        Self {
            steered: verdict.is_steered(),
            because,
            rule: verdict.rule().map(ToString::to_string),
            file: line.map(|_| file.to_owned()),
            line,
        }
    }

    /// `FILE:LINE` of what is written there, or that it is built in.
    pub(crate) fn place(&self) -> String {
        match (&self.file, self.line) {
            (Some(file), Some(line)) => format!("{}:{line}", file.display()),
            _ => "built in".to_owned(),
        }
    }
}
