//! What happened on a path, by what the prober saw, and whether that is what policy says: pure.

use super::{Family, PATIENCE, Probe, Seen, Way};
use crate::explain::{Explained, Outcome, Situation};
use serde::Serialize;
use std::net::SocketAddr;

/// What really happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Happened {
    /// The echo was reached by somebody else: the proxy.
    Steered,
    /// The echo was reached by the prober itself.
    Passed,
    Refused,
    TimedOut,
    /// It ended in another way.
    Failed,
    /// The kernel has no such path.
    Unavailable,
    /// There is nowhere to send it.
    NotProbed,
}

/// One path.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Tried {
    pub(crate) path: Way,
    pub(crate) family: Family,
    pub(crate) happened: Happened,
    pub(crate) detail: String,
    /// None where nothing happened.
    pub(crate) agrees: Option<bool>,
    /// What was asked, and what policy says of it; none where nothing was asked.
    #[serde(flatten)]
    pub(crate) explained: Option<Explained>,
}

impl Tried {
    pub(super) fn new(situation: &Situation<'_>, probe: &Probe, seen: &Seen) -> Self {
        let Probe { way, family, to, name } = probe;
        let explained = Explained { name: name.clone(), ..situation.of_socket(*to, way.proto()) };
        let (happened, detail) = judge(seen);
        let agrees = expected(explained.decision, happened);
        Self { path: *way, family: *family, happened, detail, agrees, explained: Some(explained) }
    }

    pub(super) fn not_probed(path: Way, family: Family, detail: String) -> Self {
        Self { path, family, happened: Happened::NotProbed, detail, agrees: None, explained: None }
    }
}

/// What happened, and how it shows.
fn judge(seen: &Seen) -> (Happened, String) {
    match seen {
        Seen::Answered { own, seen } if is_same(*own, *seen) => {
            (Happened::Passed, format!("the echo was reached from {seen}, which is the prober itself"))
        }
        Seen::Answered { own, seen } => {
            (Happened::Steered, format!("the echo was reached from {seen}, and the prober is {own}"))
        }
        Seen::Led => {
            (Happened::Steered, "the hosts file leads it to where the proxy listens for it".to_owned())
        }
        Seen::NotLed(why) => (Happened::Passed, why.clone()),
        Seen::Refused(why) => (Happened::Refused, why.clone()),
        Seen::TimedOut => (Happened::TimedOut, format!("nothing within {} s", PATIENCE.as_secs())),
        Seen::Failed(why) => (Happened::Failed, why.clone()),
        Seen::Unavailable(why) => (Happened::Unavailable, why.clone()),
    }
}

/// A socket that is not connected knows its port alone.
fn is_same(own: SocketAddr, seen: SocketAddr) -> bool {
    let (address, other) = (own.ip().to_canonical(), seen.ip().to_canonical());
    own.port() == seen.port() && (address.is_unspecified() || address == other)
}

/// Whether it is what was decided; none where nothing happened.
fn expected(decision: Outcome, happened: Happened) -> Option<bool> {
    if matches!(happened, Happened::Unavailable | Happened::NotProbed) {
        return None;
    }
    Some(match decision {
        Outcome::Steered | Outcome::Query => happened == Happened::Steered,
        Outcome::Refused => happened == Happened::Refused,
        _ => happened == Happened::Passed,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answered(own: &str, seen: &str) -> Seen {
        Seen::Answered { own: own.parse().unwrap(), seen: seen.parse().unwrap() }
    }

    #[test]
    fn who_reached_the_echo_tells_what_happened() {
        let cases = [
            (answered("10.0.0.1:4000", "10.0.0.1:4000"), Happened::Passed),
            (answered("[::ffff:10.0.0.1]:4000", "10.0.0.1:4000"), Happened::Passed),
            (answered("0.0.0.0:4000", "10.0.0.1:4000"), Happened::Passed),
            (answered("[::]:4000", "10.0.0.1:4000"), Happened::Passed),
            (answered("0.0.0.0:4000", "10.0.0.1:4001"), Happened::Steered),
            (answered("127.0.0.1:4000", "10.0.0.1:4000"), Happened::Steered),
            (answered("10.0.0.1:4000", "10.0.0.1:4001"), Happened::Steered),
            (Seen::TimedOut, Happened::TimedOut),
            (Seen::Unavailable("ENOSYS".into()), Happened::Unavailable),
        ];
        for (seen, happened) in cases {
            assert_eq!(judge(&seen).0, happened, "{seen:?}");
        }
    }

    #[test]
    fn what_is_not_there_neither_agrees_nor_disagrees() {
        let cases = [
            (Outcome::Steered, Happened::Steered, Some(true)),
            (Outcome::Steered, Happened::Passed, Some(false)),
            (Outcome::Query, Happened::Steered, Some(true)),
            (Outcome::PassedByRule, Happened::Passed, Some(true)),
            (Outcome::PassedProxyAbsent, Happened::Refused, Some(false)),
            (Outcome::Ignored, Happened::Steered, Some(false)),
            (Outcome::Observed, Happened::Passed, Some(true)),
            (Outcome::Refused, Happened::Refused, Some(true)),
            (Outcome::Refused, Happened::TimedOut, Some(false)),
            (Outcome::Steered, Happened::Unavailable, None),
        ];
        for (decision, happened, agrees) in cases {
            assert_eq!(expected(decision, happened), agrees, "{decision:?} {happened:?}");
        }
    }
}
