//! What is measured: Prometheus metrics, their labels bounded by construction.

use prometheus_client::{
    encoding::{EncodeLabelSet, text},
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram},
    registry::Registry,
};
use std::{
    cell::RefCell,
    collections::HashSet,
    fmt,
    net::SocketAddr,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

/// Distinct services that get a label of their own; further ones share [`OTHER`].
const MAX_SERVICES: usize = 256;
const OTHER: &str = "other";
/// Seconds: from what a local hop takes to what nobody waits for.
const DURATION_BUCKETS: [f64; 14] =
    [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];

/// All metrics; clones share them.
#[derive(Clone, Debug)]
pub(crate) struct Metrics {
    pub(crate) active: Gauge,
    /// Steered connections whose origin could not be read.
    pub(crate) origin_errors: Counter,
    /// Connections that would have come back to this proxy.
    pub(crate) self_loops: Counter,
    /// Connections to a virtual address that no name has.
    pub(crate) unassigned_addresses: Counter,
    connections: Family<KindLabels, Counter>,
    requests: Family<RequestLabels, Counter>,
    durations: Family<CallLabels, Histogram, fn() -> Histogram>,
    failures: Family<FlagLabels, Counter>,
    tunnels: Family<TunnelLabels, Counter>,
    tunnel_bytes: Family<DirectionLabels, Counter>,
    upstream_connects: Family<ConnectLabels, Counter>,
    dns_queries: Family<DnsLabels, Counter>,
    services: Arc<Mutex<HashSet<Arc<str>>>>,
}

impl Default for Metrics {
    fn default() -> Self {
        Self {
            active: Gauge::default(),
            origin_errors: Counter::default(),
            self_loops: Counter::default(),
            unassigned_addresses: Counter::default(),
            connections: Family::default(),
            requests: Family::default(),
            durations: Family::new_with_constructor(|| Histogram::new(DURATION_BUCKETS)),
            failures: Family::default(),
            tunnels: Family::default(),
            tunnel_bytes: Family::default(),
            upstream_connects: Family::default(),
            dns_queries: Family::default(),
            services: Arc::default(),
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct KindLabels {
    kind: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RequestLabels {
    service: String,
    cluster: String,
    endpoint: String,
    code_class: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct CallLabels {
    service: String,
    cluster: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct FlagLabels {
    service: String,
    flag: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct TunnelLabels {
    service: String,
    outcome: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct DirectionLabels {
    direction: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ConnectLabels {
    cluster: String,
    outcome: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct DnsLabels {
    transport: &'static str,
    outcome: &'static str,
}

/// How connects to a cluster's endpoints ended.
#[derive(Debug)]
pub(crate) struct UpstreamMetrics {
    pub(crate) connected: Counter,
    pub(crate) failed: Counter,
    pub(crate) timed_out: Counter,
}

impl Metrics {
    /// Under the names they are scraped by.
    pub(crate) fn registry(&self) -> Registry {
        let mut registry = Registry::with_prefix("mesh_proxy");
        registry.register("connections", "Connections accepted, by how they came", self.connections.clone());
        registry.register("connections_active", "Connections open now", self.active.clone());
        registry.register("requests", "HTTP requests answered by an endpoint", self.requests.clone());
        registry.register(
            "request_duration_seconds",
            "From a request's head to its response's",
            self.durations.clone(),
        );
        registry.register(
            "failures",
            "Requests that this proxy answered itself, by response flag",
            self.failures.clone(),
        );
        registry.register("tunnels", "Connections relayed as bytes, by how they ended", self.tunnels.clone());
        registry.register("tunnel_bytes", "Bytes relayed", self.tunnel_bytes.clone());
        registry.register("upstream_connects", "Connects to endpoints", self.upstream_connects.clone());
        registry.register(
            "origin_errors",
            "Steered connections whose origin could not be read",
            self.origin_errors.clone(),
        );
        registry.register(
            "self_loops",
            "Connections refused because they led back here",
            self.self_loops.clone(),
        );
        registry.register(
            "unassigned_addresses",
            "Connections refused because no name has the virtual address they were for",
            self.unassigned_addresses.clone(),
        );
        registry.register("dns_queries", "DNS queries, by what became of them", self.dns_queries.clone());
        registry
    }

    /// Counts a connection: `steered`, `direct` where it was made on purpose, `named` where to a name's own address.
    pub(crate) fn connection(&self, kind: &'static str) {
        self.connections.get_or_create(&KindLabels { kind }).inc();
    }

    /// Counts a DNS query.
    pub(crate) fn dns_query(&self, transport: &'static str, outcome: &'static str) {
        self.dns_queries.get_or_create(&DnsLabels { transport, outcome }).inc();
    }

    /// The label of a service.
    pub(crate) fn service(&self, name: &str) -> Arc<str> {
        let mut services = self.services.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = services.get(name) {
            return Arc::clone(known);
        }
        let name: Arc<str> = if services.len() < MAX_SERVICES { name.into() } else { OTHER.into() };
        services.insert(Arc::clone(&name));
        name
    }

    /// The counters of a cluster.
    pub(crate) fn upstream(&self, cluster: &str) -> UpstreamMetrics {
        let counter = |outcome| {
            self.upstream_connects
                .get_or_create_owned(&ConnectLabels { cluster: cluster.to_owned(), outcome })
        };
        UpstreamMetrics {
            connected: counter("connected"),
            failed: counter("failed"),
            timed_out: counter("timed_out"),
        }
    }

    /// Counts a tunnel that ended.
    pub(crate) fn tunnel(&self, service: &str, outcome: &'static str) {
        self.tunnels.get_or_create(&TunnelLabels { service: service.to_owned(), outcome }).inc();
    }

    /// The counters of relayed bytes: to the endpoint, and back.
    pub(crate) fn tunnel_bytes(&self) -> (Counter, Counter) {
        let counter = |direction| self.tunnel_bytes.get_or_create_owned(&DirectionLabels { direction });
        (counter("sent"), counter("received"))
    }
}

/// As Prometheus and OpenMetrics scrapers read it.
pub(crate) fn encode(registry: &Registry) -> Result<String, fmt::Error> {
    let mut text = String::new();
    text::encode(&mut text, registry)?;
    Ok(text)
}

/// Records the requests of one connection. What was looked up once is kept: the next request takes no lock.
#[derive(Debug)]
pub(crate) struct Recorder {
    metrics: Metrics,
    service: Arc<str>,
    calls: RefCell<Vec<Call>>,
}

#[derive(Debug)]
struct Call {
    cluster: String,
    endpoint: Option<SocketAddr>,
    duration: Histogram,
    by_class: [Option<Counter>; 5],
}

impl Recorder {
    pub(crate) fn new(metrics: Metrics, service: Arc<str>) -> Self {
        Self { metrics, service, calls: RefCell::default() }
    }

    /// Whose requests these are, as a label.
    pub(crate) fn service(&self) -> &str {
        &self.service
    }

    /// A request that an endpoint of a cluster answered; no endpoint for one that goes where it was going.
    pub(crate) fn answered(
        &self,
        cluster: &str,
        endpoint: Option<SocketAddr>,
        status: u16,
        duration: Duration,
    ) {
        let mut calls = self.calls.borrow_mut();
        let known = calls.iter().position(|call| call.endpoint == endpoint && call.cluster == cluster);
        let index = known.unwrap_or_else(|| {
            calls.push(self.call(cluster, endpoint));
            calls.len() - 1
        });
        let Some(call) = calls.get_mut(index) else { return };
        call.duration.observe(duration.as_secs_f64());
        let class = usize::from(status / 100).clamp(1, 5) - 1;
        if let Some(slot) = call.by_class.get_mut(class) {
            slot.get_or_insert_with(|| self.counter(cluster, endpoint, class)).inc();
        }
    }

    /// A request that was answered here.
    pub(crate) fn failed(&self, flag: &'static str) {
        self.metrics.failures.get_or_create(&FlagLabels { service: self.service.to_string(), flag }).inc();
    }

    fn call(&self, cluster: &str, endpoint: Option<SocketAddr>) -> Call {
        let labels = CallLabels { service: self.service.to_string(), cluster: cluster.to_owned() };
        let duration = self.metrics.durations.get_or_create_owned(&labels);
        Call { cluster: cluster.to_owned(), endpoint, duration, by_class: Default::default() }
    }

    fn counter(&self, cluster: &str, endpoint: Option<SocketAddr>, class: usize) -> Counter {
        self.metrics.requests.get_or_create_owned(&RequestLabels {
            service: self.service.to_string(),
            cluster: cluster.to_owned(),
            endpoint: endpoint.map_or_else(|| "original".to_owned(), |endpoint| endpoint.to_string()),
            code_class: ["1xx", "2xx", "3xx", "4xx", "5xx"].get(class).copied().unwrap_or("5xx"),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn services_beyond_the_bound_share_a_label() {
        let metrics = Metrics::default();
        for index in 0..MAX_SERVICES {
            assert_eq!(&*metrics.service(&format!("s{index}")), format!("s{index}"));
        }
        assert_eq!(&*metrics.service("one too many"), OTHER);
        assert_eq!(&*metrics.service("s0"), "s0");
    }

    #[test]
    fn requests_are_counted_by_caller_cluster_endpoint_and_class() {
        let metrics = Metrics::default();
        let recorder = Recorder::new(metrics.clone(), metrics.service("shop"));
        let endpoint = Some("10.0.0.1:80".parse().unwrap());
        for status in [200, 204, 503] {
            recorder.answered("catalog", endpoint, status, Duration::from_millis(3));
        }
        recorder.failed("UF");
        let text = encode(&metrics.registry()).unwrap();
        for line in [
            r#"mesh_proxy_requests_total{service="shop",cluster="catalog",endpoint="10.0.0.1:80",code_class="2xx"} 2"#,
            r#"mesh_proxy_requests_total{service="shop",cluster="catalog",endpoint="10.0.0.1:80",code_class="5xx"} 1"#,
            r#"mesh_proxy_request_duration_seconds_count{service="shop",cluster="catalog"} 3"#,
            r#"mesh_proxy_failures_total{service="shop",flag="UF"} 1"#,
        ] {
            assert!(text.contains(line), "{line} is not in\n{text}");
        }
    }
}
