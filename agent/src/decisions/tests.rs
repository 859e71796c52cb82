use super::*;
use crate::config::{Base, Capture, Destinations, Failure, Written};
use agent_ebpf::{AF_INET6, COMM_LEN, IPPROTO_TCP};

fn event(service: u32, counter: Counter, destination: &str) -> Event {
    let destination: SocketAddr = destination.parse().unwrap();
    let mut addr = [0; 16];
    let family = match destination.ip() {
        IpAddr::V4(ip) => {
            addr[..4].copy_from_slice(&ip.octets());
            AF_INET
        }
        IpAddr::V6(ip) => {
            addr = ip.octets();
            AF_INET6
        }
    };
    let mut comm = [0; COMM_LEN];
    comm[..4].copy_from_slice(b"curl");
    Event {
        time_ns: 1,
        addr,
        comm,
        service,
        uid: 1000,
        pid: 42,
        counter: counter as u32,
        family,
        port: destination.port(),
        transport: IPPROTO_TCP,
    }
}

fn snapshot() -> Snapshot {
    let exclude =
        Capture { destinations: Destinations::Block("10.9.0.0/16".parse().unwrap()), ports: vec![] };
    let policy = Policy {
        failure: Failure::Open,
        base: Written::built_in(Base::All),
        include: [].into(),
        exclude: [Written { value: exclude, line: Some(7) }].into(),
        dns: Written::built_in(false),
    };
    let service = |name: &str| Service { name: name.to_owned(), policy: policy.clone() };
    let services = BTreeMap::from([(1, service("shop")), (2, service("stock"))]);
    Snapshot { services, routable: Arc::default(), file: "agent.yaml".into() }
}

fn decision(event: &Event) -> api::Decision {
    Teller::new(Arc::new(snapshot())).decision(event, "now".to_owned()).unwrap()
}

fn watch(services: &[&str], rate: u32) -> api::Watch {
    api::Watch { services: services.iter().map(|name| (*name).to_owned()).collect(), rate }
}

/// The lines that wait, each as the service that it tells of, or as how many it says were dropped.
fn waiting(lines: &mut Lines) -> Vec<String> {
    let mut waiting = Vec::new();
    while let Ok(line) = lines.0.try_recv() {
        waiting.push(match serde_json::from_slice(&line).unwrap() {
            Watched::Decision(decision) => decision.service,
            Watched::Dropped { dropped } => dropped.to_string(),
        });
    }
    waiting
}

#[test]
fn a_decision_says_who_where_what_and_why() {
    let told = decision(&event(1, Counter::PassedByRule, "10.9.1.1:80"));
    assert_eq!(
        serde_json::to_value(&told).unwrap(),
        serde_json::json!({
            "time": "now", "service": "shop", "pid": 42, "command": "curl", "uid": 1000,
            "destination": "10.9.1.1:80", "transport": "tcp", "decision": "passed_by_rule",
            "rule": "`exclude 10.9.0.0/16` covers it, and no include is more specific: agent.yaml:7",
        })
    );
    let steered = decision(&event(2, Counter::Steered, "[fd00::1]:80"));
    assert_eq!(
        (steered.service.as_str(), steered.destination.to_string().as_str()),
        ("stock", "[fd00::1]:80")
    );
    assert!(steered.rule.contains("covers it"), "{}", steered.rule);
    let bound = decision(&event(1, Counter::PassedByRule, "10.8.1.1:80"));
    assert_eq!(bound.rule, "the socket is bound to an interface");
    assert_eq!(decision(&event(7, Counter::Steered, "10.8.1.1:80")).service, "unknown");
}

#[test]
fn every_counter_has_a_decision_and_nothing_else_has() {
    let all = Counter::ALL.map(|counter| decision(&event(1, counter, "10.0.0.1:80")).decision);
    assert_eq!(all.len(), 7);
    let strange = Event { counter: 7, ..event(1, Counter::Steered, "10.0.0.1:80") };
    assert_eq!(Teller::new(Arc::default()).decision(&strange, String::new()), None);
}

#[test]
fn each_watcher_gets_what_it_asked_for() {
    let watchers = Watchers::default();
    let (mut all, mut shop) =
        (watchers.join(watch(&[], 10)).unwrap(), watchers.join(watch(&["shop"], 10)).unwrap());
    for service in [1, 2] {
        watchers.tell(1, decision(&event(service, Counter::Steered, "10.0.0.1:80")));
    }
    assert_eq!(waiting(&mut all), ["shop", "stock"]);
    assert_eq!(waiting(&mut shop), ["shop"]);
}

#[test]
fn the_hooks_are_asked_for_the_union() {
    let watchers = Watchers::default();
    watchers.publish(snapshot());
    assert_eq!(watchers.interest(), None);
    let shop = watchers.join(watch(&["shop", "absent"], 10)).unwrap();
    let interest = watchers.interest().unwrap();
    assert_eq!((interest.services, interest.rate), (Some(BTreeSet::from([1])), 10));
    let all = watchers.join(watch(&[], 50)).unwrap();
    let interest = watchers.interest().unwrap();
    assert_eq!((interest.services, interest.rate), (None, 50));
    drop((shop, all));
    assert_eq!(watchers.interest(), None);
}

#[test]
fn what_exceeds_a_rate_or_a_queue_is_counted_and_told() {
    let watchers = Watchers::default();
    let mut few = watchers.join(watch(&[], 2)).unwrap();
    let mut slow = watchers.join(watch(&[], 100_000)).unwrap();
    let told = decision(&event(1, Counter::Steered, "10.0.0.1:80"));
    for _ in 0..QUEUE + 5 {
        watchers.tell(1, told.clone());
    }
    watchers.tell_dropped(3);
    assert_eq!(waiting(&mut few), ["shop", "shop", &(QUEUE + 5 - 2 + 3).to_string()]);
    // There was no room to say so either; it is said as soon as there is.
    assert_eq!(waiting(&mut slow).len(), QUEUE);
    watchers.tell_dropped(0);
    assert_eq!(waiting(&mut slow), ["8"]);
    watchers.tell_dropped(0);
    assert!(waiting(&mut slow).is_empty() && waiting(&mut few).is_empty());
}

#[test]
fn there_is_room_for_a_few_watchers_and_for_another_when_one_has_left() {
    let watchers = Watchers::default();
    let mut all: Vec<Lines> = (0..MAX_WATCHERS).map(|_| watchers.join(watch(&[], 1)).unwrap()).collect();
    assert!(watchers.join(watch(&[], 1)).is_none());
    all.pop();
    assert!(watchers.join(watch(&[], 1)).is_some());
    watchers.end();
    assert!(!watchers.wait() && !watchers.are_any());
}
