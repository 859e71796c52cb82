//! Results for people: aligned, coloured on a terminal.

use crate::{
    api::{self, Outcome, Transport},
    check::{Findings, Line},
    cleanup::{Cleaned, Left, Thing},
    explain::{Explained, Explanations, Now},
    mode::{self, Mode},
    paths::{Family, Happened, Report, Tried},
};
use std::{
    fmt::Write as _,
    io::IsTerminal as _,
    time::{Duration, UNIX_EPOCH},
};

const BOLD: &str = "1";
const GREEN: &str = "32";
const RED: &str = "31";

/// The table of `status`.
pub(crate) fn status(status: &api::Status) -> String {
    let mut text = String::new();
    let proxy = &status.proxy;
    let place = match (&proxy.cgroup, proxy.attached) {
        (Some(cgroup), true) => cgroup.clone(),
        (Some(cgroup), false) => format!("{cgroup}, not attached: nothing is steered yet"),
        (None, _) => "not running: nothing is steered".to_owned(),
    };
    let _infallible = writeln!(text, "{} · proxy on port {} in {place}", status.mode, proxy.port);
    for version in &status.retiring {
        let _infallible =
            writeln!(text, "ABI version {version} is still there, for connections that it steered");
    }
    if status.services.is_empty() {
        return text + "no service is enabled\n" + &drift(&status.drift);
    }
    let head = [
        "SERVICE",
        "SCOPE",
        "FAILURE",
        "STEERED",
        "QUERIES",
        "OBSERVED",
        "BY RULE",
        "NO PROXY",
        "REFUSED",
        "ERRORS",
        "FROM BEFORE",
        "SINCE",
    ];
    let mut rows = vec![head.map(str::to_owned)];
    rows.extend(status.services.iter().flat_map(service_rows));
    text + &table(&rows) + &drift(&status.drift)
}

/// What is not as it is wanted, and what to do.
fn drift(drift: &[api::Drift]) -> String {
    let mut text = String::new();
    for api::Drift { service, finding, remedy } in drift {
        let of = service.as_ref().map(|service| format!("{service}: ")).unwrap_or_default();
        let _infallible = writeln!(text, "{} {of}{finding}; {remedy}", paint(RED, "NOT AS WANTED"));
    }
    text
}

/// What `cleanup` removed, and what it could not.
pub(crate) fn cleaned(cleaned: &Cleaned) -> String {
    let removed = cleaned.removed.iter().map(|Thing { kind, name }| format!("removed {kind} {name}\n"));
    let left = cleaned
        .left
        .iter()
        .map(|Left { thing: Thing { kind, name }, error }| format!("left    {kind} {name}: {error}\n"));
    let end = match cleaned.left.len() {
        0 => "nothing of mesh-redirect is left on this host\n".to_owned(),
        count => format!("{count} of mesh-redirect's things are left; the journal names them\n"),
    };
    removed.chain(left).chain([notes("", &cleaned.notes), end]).collect()
}

fn service_rows(service: &api::Service) -> Vec<[String; 12]> {
    let scope = |scope: &api::Scope| {
        if scope.attached { scope.cgroup.clone() } else { format!("{} (not attached)", scope.cgroup) }
    };
    let mut scopes = service.scopes.iter().map(scope);
    let api::Counters { steered, passed_by_rule, passed_proxy_absent, refused, errors, observed, queries } =
        service.counters;
    let [steered, queries, observed, by_rule, absent, refused, errors] =
        [steered, queries, observed, passed_by_rule, passed_proxy_absent, refused, errors]
            .map(|count| count.to_string());
    // One that is not enabled is here for commands that run as it.
    let name = match (service.enabled, service.observe) {
        (true, false) => service.name.clone(),
        (true, true) => format!("{} (observed)", service.name),
        (false, _) => format!("{} (commands)", service.name),
    };
    let unsteered = service.unsteered.map_or_else(|| "-".to_owned(), |count| count.to_string());
    let since = utc(service.since);
    let scope = scopes.next().unwrap_or_else(|| "(not running)".to_owned());
    let first = [
        name,
        scope,
        service.failure.clone(),
        steered,
        queries,
        observed,
        by_rule,
        absent,
        refused,
        errors,
        unsteered,
        since,
    ];
    let further = scopes.map(|scope| {
        let mut row: [String; 12] = Default::default();
        row[1] = scope;
        row
    });
    [first].into_iter().chain(further).collect()
}

/// What each mode can do, and which of them this host has and gets.
fn capabilities(possible: &[Mode], chosen: Option<Mode>) -> String {
    let head = |mode: Mode| match possible.contains(&mode) {
        _ if chosen == Some(mode) => format!("{mode} (used here)"),
        true => mode.to_string(),
        false => format!("{mode} (not possible here)"),
    };
    let [first, second, third] = mode::ALL.map(head);
    let mut rows = vec![[String::new(), first, second, third]];
    for (what, [first, second, third]) in mode::CAPABILITIES {
        rows.push([what, first, second, third].map(str::to_owned));
    }
    format!("\n{}", table(&rows))
}

fn table<const N: usize>(rows: &[[String; N]]) -> String {
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..N).map(width).collect();
    let mut text = String::new();
    for (index, row) in rows.iter().enumerate() {
        let cells: Vec<String> =
            row.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}")).collect();
        let line = cells.join("  ").trim_end().to_owned();
        text.push_str(&if index == 0 { paint(BOLD, &line) } else { line });
        text.push('\n');
    }
    text
}

/// The outcome of `enable` and `disable`.
pub(crate) fn changed(verb: &str, changed: &api::Changed) -> String {
    let mut text = String::new();
    for api::ChangedService { service, changed: anew } in &changed.services {
        let already = if *anew { "" } else { "already " };
        let _infallible = match &changed.difference {
            Some(_) if *anew => writeln!(text, "{service} would be {verb}"),
            _ => writeln!(text, "{service} is {already}{verb}"),
        };
    }
    let existing = changed.existing.iter().flatten().filter_map(existing).collect::<String>();
    text + &notes("", &changed.notes) + &existing + changed.difference.as_deref().unwrap_or_default()
}

/// What became of connections that were open.
fn existing(of: &api::OfService) -> Option<String> {
    let api::OfService { service, steered, count, reset, open, .. } = of;
    let how = if *steered { "still steered" } else { "not steered" };
    match (count, open) {
        (0, _) => None,
        (_, 0) => {
            let ended = count.saturating_sub(*reset);
            Some(format!(
                "{service}: connections that were open and {how}: {reset} closed, {ended} ended by themselves\n"
            ))
        }
        _ => Some(format!(
            "note: connections of {service} that are open from before and {how}: {open}; --existing=drain or --existing=reset ends them\n"
        )),
    }
}

/// What is waited for.
pub(crate) fn draining(found: &api::Found, patience: Duration) -> String {
    let waits = found.existing.iter().filter(|of| of.count > 0);
    let each: Vec<String> = waits.map(|of| format!("{} of {}", of.count, of.service)).collect();
    format!(
        "waiting up to {} for open connections to end: {}; interrupt to leave them alone\n",
        humantime::format_duration(patience),
        each.join(", ")
    )
}

/// The outcome of `reload`.
pub(crate) fn reloaded(reloaded: &api::Reloaded) -> String {
    let api::Reloaded { reloaded, difference, notes } = reloaded;
    let said = match (reloaded, difference.is_empty()) {
        (true, true) => "the configuration was read anew; nothing of kernel and host has changed\n",
        (true, false) => "the configuration was read anew, and this has changed:\n",
        (false, true) => "nothing of kernel and host would change\n",
        (false, false) => "this would change:\n",
    };
    self::notes("", notes) + said + difference
}

/// What the user should know.
pub(crate) fn notes(prefix: &str, notes: &[String]) -> String {
    notes.iter().map(|note| format!("{prefix}note: {note}\n")).collect()
}

/// The lines of `check`.
pub(crate) fn check(Findings { findings, mode, possible }: &Findings) -> String {
    let width = findings.iter().map(|line| line.subject.len()).max().unwrap_or(0);
    let mut text = String::new();
    for Line { subject, ok, required, finding, remedy } in findings {
        let mark = match (ok, required) {
            (true, _) => paint(GREEN, "ok  "),
            (false, true) => paint(RED, "FAIL"),
            (false, false) => "note".to_owned(),
        };
        let remedy = remedy.as_ref().filter(|_| !ok).map(|remedy| format!("; {remedy}")).unwrap_or_default();
        let _infallible = writeln!(text, "{mark} {subject:width$}  {finding}{remedy}");
    }
    text + &capabilities(possible, *mode)
}

/// The table of `explain`.
pub(crate) fn explained(Explanations { service, now, explained }: &Explanations) -> String {
    let mut rows = vec![["DESTINATION", "DECISION", "WHERE", "BECAUSE"].map(str::to_owned)];
    rows.extend(explained.iter().map(explained_row));
    format!("{}\n{}", situation(service, now), table(&rows))
}

/// What decisions rest on.
fn situation(service: &str, now: &Now) -> String {
    let mode = now.mode.map(|mode| format!(" · {mode}")).unwrap_or_default();
    let enabled = match (now.enabled, now.observed) {
        (Some(true), true) => "is observed",
        (Some(true), false) => "is enabled",
        (Some(false), _) => "is not enabled: this is what would be if it were",
        (None, _) => "may be enabled or not: only root may know",
    };
    let proxy = match (now.proxy.any(), now.dns.any()) {
        (true, true) => "the proxy is ready, for DNS too",
        (true, false) => "the proxy is ready",
        (false, _) => "the proxy is not ready",
    };
    format!("{service} {enabled}{mode} · {proxy}")
}

fn explained_row(explained: &Explained) -> [String; 4] {
    let Explained { destination, ports, name, from, decision, reason, .. } = explained;
    let ports = ports.as_ref().map(|ports| format!(" ports {ports}")).unwrap_or_default();
    let destination = match (name, from) {
        (Some(name), Some(from)) if !destination.starts_with(name) => {
            format!("{destination}{ports} ({name}, by {from})")
        }
        (Some(_), Some(from)) => format!("{destination}{ports} (by {from})"),
        _ => format!("{destination}{ports}"),
    };
    [destination, decision.to_string(), reason.place(), reason.because.clone()]
}

/// The lines of `watch`, whose columns become as wide as what was seen.
#[derive(Debug, Default)]
pub(crate) struct Decisions {
    widths: Option<[usize; 8]>,
}

impl Decisions {
    /// One more; the first one comes with a head.
    pub(crate) fn show(&mut self, watched: &api::Watched) -> String {
        let head = ["TIME", "SERVICE", "DECISION", "PID", "COMMAND", "UID", "DESTINATION", "RULE"];
        let head = if self.widths.is_none() {
            paint(BOLD, &self.row(&head.map(str::to_owned)))
        } else {
            String::new()
        };
        head + &match watched {
            api::Watched::Dropped { dropped } => paint(RED, &format!("{dropped} decisions were not shown\n")),
            api::Watched::Decision(decision) => self.row(&cells(decision)),
        }
    }

    fn row(&mut self, cells: &[String; 8]) -> String {
        let widths = self.widths.get_or_insert([27, 0, 8, 7, 15, 5, 21, 0]);
        let mut text = String::new();
        for (cell, width) in cells.iter().zip(widths) {
            *width = (*width).max(cell.chars().count());
            let _infallible = write!(text, "{cell:width$}  ");
        }
        text.trim_end().to_owned() + "\n"
    }
}

fn cells(decision: &api::Decision) -> [String; 8] {
    let api::Decision { time, service, pid, command, uid, destination, transport, decision, rule } = decision;
    let outcome = match decision {
        Outcome::Steered => "steered",
        Outcome::Query => "query",
        Outcome::Observed => "observed",
        Outcome::PassedByRule => "by rule",
        Outcome::PassedProxyAbsent => "no proxy",
        Outcome::Refused => "refused",
        Outcome::Error => "error",
    };
    let transport = match transport {
        Transport::Tcp => "",
        Transport::Udp => "/udp",
    };
    // A program names its threads as it likes.
    let is_strange = |c: char| c.is_control() || c.is_whitespace();
    let command = command.chars().map(|c| if is_strange(c) { '?' } else { c }).collect();
    [
        time.clone(),
        service.clone(),
        outcome.to_owned(),
        pid.to_string(),
        command,
        uid.to_string(),
        format!("{destination}{transport}"),
        rule.clone(),
    ]
}

/// The table of `check SERVICE`.
pub(crate) fn paths(report: &Report) -> String {
    let mut rows = vec![["", "PATH", "TO", "POLICY", "REALLY", ""].map(str::to_owned)];
    rows.extend(report.paths.iter().map(path_row));
    let only_names = match report.now.mode {
        Some(Mode::Hosts) => "in mode hosts only names can be steered\n",
        _ => "",
    };
    format!("{}\n{only_names}{}", situation(&report.service, &report.now), table(&rows))
}

fn path_row(tried: &Tried) -> [String; 6] {
    let Tried { path, family, happened, detail, agrees, explained } = tried;
    let mark = match agrees {
        Some(true) => "ok",
        Some(false) => "FAIL",
        None => "note",
    };
    let family = match family {
        Family::Ipv4 => "IPv4",
        Family::Ipv6 => "IPv6",
        Family::Mapped => "IPv4-mapped",
    };
    let happened = match happened {
        Happened::Steered => "steered",
        Happened::Passed => "passes",
        Happened::Refused => "refused",
        Happened::TimedOut => "timed out",
        Happened::Failed => "failed",
        Happened::Unavailable => "not here",
        Happened::NotProbed => "not probed",
    };
    let to = |explained: &Explained| explained.name.clone().unwrap_or_else(|| explained.destination.clone());
    let policy = explained.as_ref().map(|explained| explained.decision.to_string());
    [
        mark.to_owned(),
        format!("{}, {family}", path.name()),
        explained.as_ref().map(to).unwrap_or_default(),
        policy.unwrap_or_default(),
        happened.to_owned(),
        detail.clone(),
    ]
}

fn paint(code: &str, text: &str) -> String {
    let colour = std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    if colour { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
}

/// Seconds of the Unix epoch as RFC 3339 in UTC.
fn utc(seconds: u64) -> String {
    humantime::format_rfc3339_seconds(UNIX_EPOCH + Duration::from_secs(seconds)).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn decisions_are_aligned_and_no_command_moves_the_cursor() {
        let decision = |service: &str, command: &str| {
            api::Watched::Decision(api::Decision {
                time: "2026-01-02T03:04:05.123456Z".into(),
                service: service.into(),
                pid: 7,
                command: command.into(),
                uid: 0,
                destination: "10.0.0.1:53".parse().unwrap(),
                transport: Transport::Udp,
                decision: Outcome::PassedProxyAbsent,
                rule: "r".into(),
            })
        };
        let mut shown = Decisions::default();
        let first = shown.show(&decision("a", "\x1b[2J x"));
        let (head, line) = first.split_once('\n').unwrap();
        assert!(head.starts_with("TIME") && line.contains("?[2J?x"), "{first}");
        assert!(line.contains("no proxy") && line.contains("10.0.0.1:53/udp"), "{first}");
        assert_eq!(head.find("DECISION"), line.find("no proxy"));
        let longer = shown.show(&decision("a-longer-name", "x"));
        let after = shown.show(&decision("a", "x"));
        assert_eq!(longer.find("no proxy"), after.find("no proxy"));
        assert_eq!(shown.show(&api::Watched::Dropped { dropped: 3 }), "3 decisions were not shown\n");
    }

    #[test]
    fn a_service_with_no_process_and_one_with_two_scopes_are_both_readable() {
        let service = |name: &str, scopes: &[(&str, bool)]| api::Service {
            name: name.into(),
            enabled: true,
            observe: false,
            mode: Mode::Ebpf,
            since: 0,
            failure: "open".into(),
            scopes: scopes
                .iter()
                .map(|&(cgroup, attached)| api::Scope { cgroup: cgroup.into(), attached })
                .collect(),
            unsteered: Some(3),
            counters: api::Counters { steered: 12, ..api::Counters::default() },
        };
        let shown = status(&api::Status {
            mode: Mode::Ebpf,
            healthy: false,
            drift: vec![api::Drift {
                service: Some("shop".into()),
                finding: "not attached".into(),
                remedy: "wait".into(),
            }],
            proxy: api::Proxy { port: 15001, cgroup: None, attached: false },
            services: vec![service("idle", &[]), service("shop", &[("/a", true), ("/b", false)])],
            maps: vec![],
            retiring: vec![3],
        });
        assert!(
            shown.starts_with("ebpf · proxy on port 15001 in not running: nothing is steered\n"),
            "{shown}"
        );
        assert!(shown.contains("\nABI version 3 is still there"), "{shown}");
        assert!(shown.contains("idle     (not running)"), "{shown}");
        assert!(shown.contains("shop     /a"), "{shown}");
        assert!(shown.contains("         /b (not attached)\n"), "{shown}");
        assert!(shown.ends_with("NOT AS WANTED shop: not attached; wait\n"), "{shown}");
    }
}
