//! What is measured of the agent, as Prometheus scrapes it; labels are bounded by what can be enabled. What the kernel
//! counts is read when somebody asks for it, and what happens in the daemon's mind is counted there.

use crate::{api, mode::Mode, redirect::Ready};
use prometheus_client::{
    encoding::{EncodeLabelSet, text},
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram, info::Info},
    registry::{Registry, Unit},
};
use std::{fmt, sync::atomic::AtomicU64, time::Duration};

/// Seconds: from an `apply` that finds nothing to do to one that loads programs and writes a thousand services.
const DURATION_BUCKETS: [f64; 12] = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0];

/// A value that is what it is now.
type Level = Gauge<u64, AtomicU64>;

/// What the daemon's mind has done since it started; clones share it.
#[derive(Clone, Debug)]
pub(crate) struct Tally {
    applies: Family<[(&'static str, &'static str); 1], Counter>,
    durations: Histogram,
    repairs: Counter,
    errors: Family<[(&'static str, &'static str); 1], Counter>,
}

impl Default for Tally {
    fn default() -> Self {
        let tally = Self {
            applies: Family::default(),
            durations: Histogram::new(DURATION_BUCKETS),
            repairs: Counter::default(),
            errors: Family::default(),
        };
        // What never happened is told as well, for rates begin with the first time.
        for outcome in ["unchanged", "changed", "failed"] {
            drop(tally.applies.get_or_create(&[("outcome", outcome)]));
        }
        tally
    }
}

impl Tally {
    /// Kernel and host were compared with what is wanted: whether something was changed, unless that failed.
    pub(crate) fn applied<E>(&self, outcome: &Result<bool, E>, duration: Duration) {
        let outcome = match outcome {
            Ok(false) => "unchanged",
            Ok(true) => "changed",
            Err(_) => "failed",
        };
        self.applies.get_or_create(&[("outcome", outcome)]).inc();
        self.durations.observe(duration.as_secs_f64());
    }

    /// Nobody had asked for anything: whether something was not as it should be.
    pub(crate) fn looked(&self, differed: bool) {
        self.repairs.inc_by(differed.into());
    }

    /// Something could not be done.
    pub(crate) fn failed(&self, kind: &'static str) {
        self.errors.get_or_create(&[("kind", kind)]).inc();
    }
}

/// All that is told in one scrape.
#[derive(Clone, Debug)]
pub(crate) struct Measured {
    pub(crate) status: api::Status,
    pub(crate) ready: Ready,
    /// Who watches decisions, and what they were not told.
    pub(crate) watchers: u64,
    pub(crate) dropped: u64,
    pub(crate) tally: Tally,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct DecisionLabels {
    service: String,
    decision: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ServiceLabels {
    service: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct MapLabels {
    map: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ReadyLabels {
    port: &'static str,
    family: &'static str,
}

impl Measured {
    /// As Prometheus and OpenMetrics scrapers read it.
    pub(crate) fn encode(&self) -> Result<String, fmt::Error> {
        let mut registry = Registry::with_prefix("mesh_redirect");
        let info = |name, value: String| Info::new(vec![(name, value)]);
        let version = env!("CARGO_PKG_VERSION").to_owned();
        registry.register("build", "The agent that is running", info("version", version));
        registry.register("mode", "How connections are steered", info("mode", self.status.mode.to_string()));
        self.register_counters(&mut registry);
        self.register_services(&mut registry);
        self.register_proxy(&mut registry);
        self.register_maps(&mut registry);
        self.register_watchers(&mut registry);
        self.tally.register(&mut registry);
        let mut text = String::new();
        text::encode(&mut text, &registry)?;
        Ok(text)
    }

    /// With a hosts file nothing is counted, which is not the same as nothing.
    fn register_counters(&self, registry: &mut Registry) {
        if self.status.mode == Mode::Hosts {
            return;
        }
        let decisions = Family::<DecisionLabels, Counter>::default();
        let queries = Family::<ServiceLabels, Counter>::default();
        for api::Service { name, counters, .. } in &self.status.services {
            for (decision, count) in decided(counters) {
                let labels = DecisionLabels { service: name.clone(), decision };
                decisions.get_or_create(&labels).inc_by(count);
            }
            queries.get_or_create(&ServiceLabels { service: name.clone() }).inc_by(counters.queries);
        }
        registry.register("decisions", "Connections, by what was decided on them", decisions);
        registry.register("dns_queries", "DNS queries sent to the proxy by datagram", queries);
    }

    fn register_services(&self, registry: &mut Registry) {
        let services = Family::<[(&str, &str); 1], Level>::default();
        let states = ["enabled", "observed", "commands"];
        for state in states {
            let count = self.status.services.iter().filter(|service| state_of(service) == state).count();
            services.get_or_create(&[("state", state)]).set(count as u64);
        }
        registry.register("services", "Services of which something is steered", services);
        let cgroups = Family::<[(&str, &str); 1], Level>::default();
        for (label, attached) in [("true", true), ("false", false)] {
            let scopes = self.status.services.iter().flat_map(|service| &service.scopes);
            let count = scopes.filter(|scope| scope.attached == attached).count();
            cgroups.get_or_create(&[("attached", label)]).set(count as u64);
        }
        let healthy = Level::default();
        healthy.set(self.status.healthy.into());
        registry.register("healthy", "Whether everything is as it is wanted, as `status` tells", healthy);
        registry.register("cgroups", "Cgroups of services, by whether all that steers is in place", cgroups);
    }

    fn register_proxy(&self, registry: &mut Registry) {
        let attached = Level::default();
        attached.set(self.status.proxy.attached.into());
        registry.register("proxy_attached", "Whether the proxy's cgroup is there and attached to", attached);
        let ready = Family::<ReadyLabels, Level>::default();
        for (port, families) in [("proxy", self.ready.proxy), ("dns", self.ready.dns)] {
            for (family, is_ready) in ["ipv4", "ipv6"].into_iter().zip(families) {
                ready.get_or_create(&ReadyLabels { port, family }).set(is_ready.into());
            }
        }
        registry.register("proxy_ready", "Whether the proxy listens and says that it is ready", ready);
    }

    fn register_watchers(&self, registry: &mut Registry) {
        let (watchers, dropped) = (Level::default(), Counter::<u64>::default());
        watchers.set(self.watchers);
        dropped.inc_by(self.dropped);
        registry.register("watchers", "Who watches decisions now", watchers);
        registry.register("watch_dropped", "Decisions that watchers were not told", dropped);
    }

    fn register_maps(&self, registry: &mut Registry) {
        let (entries, capacity) =
            (Family::<MapLabels, Level>::default(), Family::<MapLabels, Level>::default());
        let evicted = Family::<MapLabels, Counter>::default();
        for map in &self.status.maps {
            let labels = MapLabels { map: map.name.clone() };
            entries.get_or_create(&labels).set(map.entries);
            capacity.get_or_create(&labels).set(map.capacity);
            if let Some(count) = map.evicted {
                evicted.get_or_create(&labels).inc_by(count);
            }
        }
        registry.register("map_entries", "Entries of the kernel's maps", entries);
        registry.register("map_capacity", "Entries that the kernel's maps have room for", capacity);
        registry.register("map_evictions", "Entries that had to make room for others", evicted);
    }
}

impl Tally {
    fn register(&self, registry: &mut Registry) {
        registry.register(
            "applies",
            "Times that kernel and host were compared with what is wanted, by what came of it",
            self.applies.clone(),
        );
        registry.register_with_unit(
            "apply_duration",
            "How long that took",
            Unit::Seconds,
            self.durations.clone(),
        );
        registry.register(
            "repairs",
            "Times that something was not as it should be without anybody having asked for a change",
            self.repairs.clone(),
        );
        registry.register("errors", "What could not be done, by what went wrong", self.errors.clone());
    }
}

fn decided(counters: &api::Counters) -> [(&'static str, u64); 6] {
    let api::Counters { steered, passed_by_rule, passed_proxy_absent, refused, errors, observed, queries: _ } =
        *counters;
    [
        ("steered", steered),
        ("passed_by_rule", passed_by_rule),
        ("passed_proxy_absent", passed_proxy_absent),
        ("refused", refused),
        ("errors", errors),
        ("observed", observed),
    ]
}

fn state_of(service: &api::Service) -> &'static str {
    match (service.enabled, service.observe) {
        (true, false) => "enabled",
        (true, true) => "observed",
        (false, _) => "commands",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn measured(mode: Mode) -> Measured {
        let service = |name: &str, enabled, observe| api::Service {
            name: name.into(),
            enabled,
            observe,
            mode,
            since: 0,
            failure: "open".into(),
            scopes: vec![api::Scope { cgroup: "/a".into(), attached: enabled }],
            unsteered: None,
            counters: api::Counters { steered: 12, queries: 3, ..api::Counters::default() },
        };
        let status = api::Status {
            mode,
            healthy: true,
            drift: vec![],
            proxy: api::Proxy { port: 15001, cgroup: Some("/p".into()), attached: true },
            services: vec![
                service("shop", true, false),
                service("stock", true, true),
                service("x", false, false),
            ],
            retiring: vec![],
            maps: vec![api::Map { name: "MR_ORIGINS".into(), entries: 3, capacity: 65536, evicted: Some(1) }],
        };
        let ready = Ready { proxy: [true, false], dns: [false; 2] };
        Measured { status, ready, watchers: 1, dropped: 7, tally: Tally::default() }
    }

    #[test]
    fn what_is_known_is_told_with_its_labels() {
        let measured = measured(Mode::Ebpf);
        measured.tally.applied(&Ok::<_, ()>(true), Duration::from_millis(3));
        measured.tally.failed("lock");
        let text = measured.encode().unwrap();
        for line in [
            "mesh_redirect_mode_info{mode=\"ebpf\"} 1",
            "mesh_redirect_decisions_total{service=\"shop\",decision=\"steered\"} 12",
            "mesh_redirect_decisions_total{service=\"stock\",decision=\"refused\"} 0",
            "mesh_redirect_dns_queries_total{service=\"shop\"} 3",
            "mesh_redirect_services{state=\"observed\"} 1",
            "mesh_redirect_cgroups{attached=\"true\"} 2",
            "mesh_redirect_proxy_attached 1",
            "mesh_redirect_healthy 1",
            "mesh_redirect_proxy_ready{port=\"proxy\",family=\"ipv6\"} 0",
            "mesh_redirect_map_entries{map=\"MR_ORIGINS\"} 3",
            "mesh_redirect_map_capacity{map=\"MR_ORIGINS\"} 65536",
            "mesh_redirect_map_evictions_total{map=\"MR_ORIGINS\"} 1",
            "mesh_redirect_applies_total{outcome=\"changed\"} 1",
            "mesh_redirect_applies_total{outcome=\"failed\"} 0",
            "mesh_redirect_apply_duration_seconds_bucket{le=\"0.005\"} 1",
            "mesh_redirect_repairs_total 0",
            "mesh_redirect_watchers 1",
            "mesh_redirect_watch_dropped_total 7",
            "mesh_redirect_errors_total{kind=\"lock\"} 1",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} is not in\n{text}");
        }
        assert!(
            text.contains(&format!(
                "mesh_redirect_build_info{{version=\"{}\"}} 1",
                env!("CARGO_PKG_VERSION")
            ))
        );
    }

    #[test]
    fn where_nothing_is_counted_no_count_is_told() {
        assert!(!measured(Mode::Hosts).encode().unwrap().contains("mesh_redirect_decisions"));
    }
}
