//! What the names that are routed resolve to in DNS, for those who steer by address. The hosts file is left out: it may map
//! the names to this proxy.

use crate::{model::VirtualHost, names::is_virtual, snapshot::Current};
use arc_swap::ArcSwap;
use hickory_resolver::{
    ResolverBuilder, TokioResolver,
    config::ResolveHosts,
    net::{DnsError, NetError, NoRecords, runtime::TokioRuntimeProvider},
    proto::{op::ResponseCode, rr::RecordType},
};
use std::{
    collections::{HashMap, HashSet},
    net::IpAddr,
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::{
    task::JoinSet,
    time::{MissedTickBehavior, interval, timeout},
};

/// How often it is looked for names whose time has come.
const TICK: Duration = Duration::from_secs(1);
/// How long an answer holds, whatever its TTL says.
const HOLDS: [Duration; 2] = [Duration::from_secs(5), Duration::from_secs(300)];
/// How long the answer holds that there is no address, where it does not say.
const NEGATIVE: Duration = Duration::from_secs(30);
/// Pause after a failure.
const RETRY: Duration = Duration::from_secs(10);
/// How long a name may take, with all of its search domains.
const NAME_TIMEOUT: Duration = Duration::from_secs(30);
/// Names that are asked about at once.
const MAX_AT_ONCE: usize = 16;
/// Addresses of a name; more are left out.
const MAX_ADDRESSES: usize = 64;

/// By name; addresses sorted, each once.
pub(crate) type Addresses = HashMap<String, Vec<IpAddr>>;
/// What is known now.
pub(crate) type Resolved = ArcSwap<Addresses>;

/// Resolves until the task is dropped.
pub(crate) async fn run(snapshot: Arc<Current>, resolved: Arc<Resolved>) {
    let mut tick = interval(TICK);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut known = HashMap::new();
    let (mut resolver, mut due, mut asking) = (None, Vec::new(), JoinSet::new());
    loop {
        tokio::select! {
            _ = tick.tick() => {
                publish(&known, &resolved);
                due = due_names(wanted(&snapshot), &mut known, Instant::now());
                // Read each time: it changes under a process that stays.
                resolver = if due.is_empty() { None } else { system_resolver() };
            }
            Some(Ok((name, answer))) = asking.join_next() => record(&mut known, name, answer, Instant::now()),
        }
        while asking.len() < MAX_AT_ONCE
            && let Some(name) = due.pop()
        {
            begin(&mut known, &name, Instant::now());
            asking.spawn(ask(resolver.clone(), name));
        }
    }
}

/// Those of the names whose time has come; what is no longer wanted is forgotten.
fn due_names(names: HashSet<String>, known: &mut HashMap<String, Known>, now: Instant) -> Vec<String> {
    known.retain(|name, _| names.contains(name));
    names.into_iter().filter(|name| known.get(name).is_none_or(|known| known.until <= now)).collect()
}

/// A name that is being asked about is not asked about again meanwhile.
fn begin(known: &mut HashMap<String, Known>, name: &str, now: Instant) {
    let until = now + 2 * NAME_TIMEOUT;
    match known.get_mut(name) {
        Some(known) => known.until = until,
        None => _ = known.insert(name.to_owned(), Known { addresses: Vec::new(), until }),
    }
}

fn record(known: &mut HashMap<String, Known>, name: String, answer: Answer, now: Instant) {
    let before = known.remove(&name);
    known.insert(name, Known::of(answer, before, now));
}

fn wanted(snapshot: &Current) -> HashSet<String> {
    let snapshot = snapshot.load();
    if !snapshot.config.resolve_domains {
        return HashSet::new();
    }
    snapshot.config.virtual_hosts.iter().flat_map(VirtualHost::names).map(str::to_owned).collect()
}

fn publish(known: &HashMap<String, Known>, resolved: &Resolved) {
    let addresses = known.iter().map(|(name, known)| (name.clone(), known.addresses.clone()));
    let addresses: Addresses = addresses.filter(|(_, addresses)| !addresses.is_empty()).collect();
    if **resolved.load() != addresses {
        resolved.store(Arc::new(addresses));
    }
}

/// What was heard last of a name.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Known {
    addresses: Vec<IpAddr>,
    until: Instant,
}

/// The addresses, and how long they hold; none where nobody could be asked.
type Answer = Option<(Vec<IpAddr>, Duration)>;

impl Known {
    /// A failure leaves what was known.
    fn of(answer: Answer, before: Option<Self>, now: Instant) -> Self {
        let (addresses, holds) =
            answer.unwrap_or_else(|| (before.map(|before| before.addresses).unwrap_or_default(), RETRY));
        Self { addresses, until: now + holds.clamp(HOLDS[0], HOLDS[1]) }
    }
}

fn system_resolver() -> Option<TokioResolver> {
    let built = TokioResolver::builder_tokio().and_then(build);
    built.inspect_err(|error| tracing::warn!("names cannot be resolved: /etc/resolv.conf: {error}")).ok()
}

fn build(mut builder: ResolverBuilder<TokioRuntimeProvider>) -> Result<TokioResolver, NetError> {
    let options = builder.options_mut();
    options.use_hosts_file = ResolveHosts::Never;
    options.cache_size = 0;
    builder.build()
}

async fn ask(resolver: Option<TokioResolver>, name: String) -> (String, Answer) {
    let Some(resolver) = resolver else { return (name, None) };
    let answer = timeout(NAME_TIMEOUT, look_up(&resolver, &name)).await.unwrap_or_default();
    (name, answer)
}

async fn look_up(resolver: &TokioResolver, name: &str) -> Answer {
    let (ipv4, ipv6) = tokio::join!(
        look_up_one(resolver, name, RecordType::A),
        look_up_one(resolver, name, RecordType::AAAA)
    );
    let ((mut addresses, holds), (more, holds_too)) = (ipv4?, ipv6?);
    addresses.extend(more);
    addresses.retain(|ip| is_elsewhere(*ip));
    addresses.sort_unstable();
    addresses.dedup();
    addresses.truncate(MAX_ADDRESSES);
    Some((addresses, holds.min(holds_too)))
}

/// What is here, or nowhere, is no address of the service: a resolver may answer from the hosts file, or ask this proxy.
fn is_elsewhere(ip: IpAddr) -> bool {
    let ip = ip.to_canonical();
    !(ip.is_loopback() || ip.is_unspecified() || ip.is_multicast() || is_virtual(ip))
}

async fn look_up_one(resolver: &TokioResolver, name: &str, kind: RecordType) -> Answer {
    match resolver.lookup(name, kind).await {
        Ok(found) => {
            let addresses = found.answers().iter().filter_map(|record| record.data.ip_addr()).collect();
            Some((addresses, found.valid_until().saturating_duration_since(Instant::now())))
        }
        Err(NetError::Dns(DnsError::NoRecordsFound(NoRecords {
            response_code: ResponseCode::NoError | ResponseCode::NXDomain,
            negative_ttl,
            ..
        }))) => Some((Vec::new(), negative_ttl.map_or(NEGATIVE, |ttl| Duration::from_secs(ttl.into())))),
        Err(error) => {
            tracing::debug!("resolve {name}: {error}");
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hickory_resolver::{
        config::{NameServerConfig, ResolverConfig},
        proto::{
            op::Message,
            rr::{RData, Record},
        },
    };
    use tokio::net::UdpSocket;

    #[test]
    fn an_answer_holds_for_its_ttl_within_bounds_and_a_failure_leaves_the_one_before() {
        let now = Instant::now();
        let ip: IpAddr = "10.0.0.9".parse().unwrap();
        let seconds = |seconds| Some((vec![ip], Duration::from_secs(seconds)));
        for (ttl, holds) in [(0, 5), (60, 60), (86_400, 300)] {
            let known = Known::of(seconds(ttl), None, now);
            assert_eq!(known, Known { addresses: vec![ip], until: now + Duration::from_secs(holds) });
            let failed = Known::of(None, Some(known), now);
            assert_eq!(failed, Known { addresses: vec![ip], until: now + RETRY });
        }
        assert!(Known::of(None, None, now).addresses.is_empty());
        let gone = Known::of(Some((vec![], NEGATIVE)), Some(Known::of(seconds(5), None, now)), now);
        assert!(gone.addresses.is_empty());
    }

    /// Plays a resolver: two addresses for `both`, one family for `old`, none for `gone`, a failure for the rest.
    async fn played() -> TokioResolver {
        let socket = UdpSocket::bind("127.0.0.53:0").await.unwrap();
        let mut server = NameServerConfig::udp(socket.local_addr().unwrap().ip());
        server.connections[0].port = socket.local_addr().unwrap().port();
        tokio::spawn(async move {
            let mut buffer = [0; 512];
            loop {
                let (len, client) = socket.recv_from(&mut buffer).await.unwrap();
                let answer = answer(&Message::from_vec(&buffer[..len]).unwrap());
                socket.send_to(&answer.to_vec().unwrap(), client).await.unwrap();
            }
        });
        let config = ResolverConfig::from_parts(None, vec![], vec![server]);
        build(TokioResolver::builder_with_config(config, TokioRuntimeProvider::default())).unwrap()
    }

    fn answer(query: &Message) -> Message {
        let mut answer = query.clone().into_response();
        answer.edns = None;
        let question = query.queries[0].clone();
        let mut record = |ip: &str, ttl| {
            let data = match ip.parse().unwrap() {
                IpAddr::V4(ip) => RData::A(ip.into()),
                IpAddr::V6(ip) => RData::AAAA(ip.into()),
            };
            answer.add_answer(Record::from_rdata(question.name().clone(), ttl, data));
        };
        match (question.name().to_ascii().trim_end_matches('.'), question.query_type()) {
            ("both", RecordType::A) => {
                for ip in ["10.0.0.9", "10.0.0.8", "127.0.0.1"] {
                    record(ip, 60);
                }
            }
            ("both", _) => record("fd00::9", 40),
            ("old", RecordType::A) => record("10.0.0.9", 60),
            ("old", _) => {}
            ("gone", _) => answer.metadata.response_code = ResponseCode::NXDomain,
            _ => answer.metadata.response_code = ResponseCode::ServFail,
        }
        answer
    }

    #[tokio::test]
    async fn names_have_the_addresses_of_both_families_for_as_long_as_the_shorter_answer_holds() {
        let resolver = played().await;
        let mut answers = HashMap::new();
        for name in ["both", "old", "gone", "broken"] {
            answers.extend([ask(Some(resolver.clone()), name.to_owned()).await]);
        }
        let of = |name: &str| {
            answers[name].as_ref().map(|(addresses, holds)| {
                let addresses: Vec<String> = addresses.iter().map(IpAddr::to_string).collect();
                (addresses.join(" "), holds.as_secs_f64().round())
            })
        };
        assert_eq!(of("both"), Some(("10.0.0.8 10.0.0.9 fd00::9".to_owned(), 40.0)));
        assert_eq!(of("old"), Some(("10.0.0.9".to_owned(), 30.0)));
        assert_eq!(of("gone"), Some((String::new(), 30.0)));
        assert_eq!(of("broken"), None);
    }

    #[test]
    fn a_name_is_asked_about_when_its_time_has_come_and_not_while_it_is_being_asked_about() {
        let begun = Instant::now();
        let names = || HashSet::from(["a".to_owned(), "b".to_owned()]);
        let mut known = HashMap::new();
        assert_eq!(due_names(names(), &mut known, begun).len(), 2);
        begin(&mut known, "a", begun);
        assert_eq!(due_names(names(), &mut known, begun), ["b"]);
        let holds = Duration::from_secs(60);
        record(&mut known, "a".to_owned(), Some((vec![], holds)), begun);
        record(&mut known, "b".to_owned(), None, begun);
        assert!(due_names(names(), &mut known, begun).is_empty());
        assert_eq!(due_names(names(), &mut known, begun + RETRY), ["b"]);
        assert_eq!(due_names(names(), &mut known, begun + holds).len(), 2);
        assert!(due_names(HashSet::new(), &mut known, begun + holds).is_empty() && known.is_empty());
    }

    #[test]
    fn what_leads_here_is_no_address_of_a_service() {
        for ip in ["127.66.1.2", "::1", "0.0.0.0", "241.1.2.3", "fdb2:6c1e:9d04::1", "224.0.0.1"] {
            assert!(!is_elsewhere(ip.parse().unwrap()), "{ip}");
        }
        assert!(is_elsewhere("10.0.0.9".parse().unwrap()) && is_elsewhere("fd00::9".parse().unwrap()));
    }
}
