//! Every map, and what the programs do with each.

use agent_ebpf::{
    AF_INET, Connection, Counter, Counters, DECISIONS_BYTES, Endpoint, Ends, Event, Limit, Listener,
    MAX_CONNECTIONS, MAX_RULES, MAX_SERVICES, MAX_VIRTUAL, Origin, RESERVED, RESOLVER_PORTS, ResolverKey,
    RuleKey, Rules, Service, Track, Tracked, VirtualKey, Watch, decide::Destination,
};
#[expect(
    deprecated,
    reason = "its successor needs Linux 6.2 and answers for the task's cgroup, not the attachment's"
)]
use aya_ebpf::maps::CgroupStorage;
use aya_ebpf::{
    Global,
    bindings::{BPF_F_NO_PREALLOC, BPF_NOEXIST, BPF_RB_NO_WAKEUP, BPF_SK_STORAGE_GET_F_CREATE, bpf_sock},
    btf_maps::SkStorage,
    helpers::generated::bpf_sk_storage_get,
    macros::{btf_map, map},
    maps::{Array, HashMap, LpmTrie, LruHashMap, PerCpuArray, PerCpuHashMap, RingBuf, lpm_trie::Key},
};

#[map]
static MR_SERVICES: HashMap<u32, Service> = HashMap::with_max_entries(MAX_SERVICES, 0);
#[map]
static MR_RULES: LpmTrie<RuleKey, Rules> = LpmTrie::with_max_entries(MAX_RULES, 0);
#[map]
static MR_COUNTERS: PerCpuHashMap<u32, Counters> = PerCpuHashMap::with_max_entries(MAX_SERVICES, 0);
#[map]
static MR_ORIGINS: LruHashMap<u64, Origin> = LruHashMap::with_max_entries(MAX_CONNECTIONS, 0);
#[map]
static MR_CONNECTIONS: LruHashMap<Ends, Connection> = LruHashMap::with_max_entries(MAX_CONNECTIONS, 0);
#[map]
static MR_RESOLVERS: HashMap<ResolverKey, [u8; 16]> = HashMap::with_max_entries(2 * RESOLVER_PORTS as u32, 0);
#[map]
static MR_VIRTUAL: HashMap<VirtualKey, Endpoint> = HashMap::with_max_entries(MAX_VIRTUAL, BPF_F_NO_PREALLOC);
#[map]
#[expect(deprecated, reason = "see the import")]
static MR_SCOPES: CgroupStorage<u32> = CgroupStorage::new();
#[map]
static MR_TRACKED: PerCpuArray<Tracked> = PerCpuArray::with_max_entries(1, 0);
#[map]
static MR_DECISIONS: RingBuf = RingBuf::with_byte_size(DECISIONS_BYTES, 0);
#[map]
static MR_WATCH: Array<Watch> = Array::with_max_entries(1, 0);
#[map]
static MR_LIMITS: PerCpuArray<Limit> = PerCpuArray::with_max_entries(1, 0);
#[btf_map]
static MR_LISTENERS: SkStorage<Listener> = SkStorage::new();

/// Set by the loader where `bpf_get_netns_cookie` exists for every program type here.
#[unsafe(no_mangle)]
static NETNS_COOKIES: Global<u32> = Global::new(0);

/// Whether network namespaces can be told apart.
#[inline(always)]
pub fn netns_cookies() -> bool {
    NETNS_COOKIES.load() != 0
}

/// The id of the service whose cgroup the running program is attached to; zero while it is being attached.
#[inline(always)]
pub fn scope() -> u32 {
    // SAFETY: the kernel allocates the storage when it attaches a program that uses it.
    unsafe { *MR_SCOPES.get_ptr_mut() }
}

/// An enabled service.
#[inline(always)]
pub fn service(id: u32) -> Option<&'static Service> {
    // SAFETY: the agent replaces entries whole (BPF_ANY on a preallocated hash), never in place.
    unsafe { MR_SERVICES.get(id) }
}

/// The rules of the most specific CIDR around an address.
#[inline(always)]
pub fn rules(key: &RuleKey) -> Option<&'static Rules> {
    MR_RULES.get(Key::new(RuleKey::FIXED_BITS + 128, *key))
}

/// Adds one to a counter of a service.
#[inline(always)]
pub fn count(service: u32, counter: Counter) {
    if let Some(counters) = MR_COUNTERS.get_ptr_mut(service) {
        // SAFETY: the value is this CPU's own, and nothing but the counters, in their order.
        unsafe { *counters.cast::<u64>().add(counter as usize) += 1 };
    }
}

/// The origin of a client's socket.
#[inline(always)]
pub fn origin(socket: u64) -> Option<&'static Origin> {
    // SAFETY: entries are replaced whole, and this one only by the socket itself.
    unsafe { MR_ORIGINS.get(socket) }
}

/// Gives a client's socket an origin, in place of the one it has; false when there is no room for it.
#[inline(always)]
pub fn set_origin(socket: u64, origin: &Origin) -> bool {
    put(&MR_ORIGINS, &socket, origin, Track::OriginsAdded)
}

/// Forgets the origin of a client's socket.
#[inline(always)]
pub fn clear_origin(socket: u64) {
    take(&MR_ORIGINS, &socket, Track::OriginsRemoved);
}

/// The resolver that a port of the proxy's stands for.
#[inline(always)]
pub fn resolver(key: &ResolverKey) -> Option<&'static [u8; 16]> {
    // SAFETY: entries are added whole and never changed.
    unsafe { MR_RESOLVERS.get(key) }
}

/// Whether a port stands for this resolver; one that stands for none does so from now on.
#[inline(always)]
pub fn stands_for(key: &ResolverKey, addr: &[u8; 16]) -> bool {
    if resolver(key).is_none() {
        let _another_was_first = MR_RESOLVERS.insert(key, addr, BPF_NOEXIST.into());
    }
    resolver(key).is_some_and(|found| found == addr)
}

/// Where a connection to a virtual address goes that is not steered.
#[inline(always)]
pub fn endpoint(destination: &Destination) -> Option<Destination> {
    let key = VirtualKey { family: destination.family.into(), addr: destination.addr };
    // SAFETY: the agent replaces entries whole.
    let Endpoint { family, port, addr } = *unsafe { MR_VIRTUAL.get(key) }?;
    // An IPv4 socket reaches no IPv6 endpoint; an IPv6 socket reaches both.
    (family == AF_INET || destination.family == family).then_some(Destination { family, port, addr })
}

/// The mark of a listener of the proxy.
#[inline(always)]
pub fn listener(sk: *mut bpf_sock) -> Option<&'static mut Listener> {
    listener_storage(sk, core::ptr::null_mut(), 0)
}

/// Marks a listener as the proxy's, with the time of its heartbeat.
#[inline(always)]
pub fn mark_listener(sk: *mut bpf_sock, heartbeat_ns: u64) {
    let mut mark = Listener { heartbeat_ns };
    if let Some(listener) = listener_storage(sk, &raw mut mark, BPF_SK_STORAGE_GET_F_CREATE.into()) {
        listener.heartbeat_ns = heartbeat_ns;
    }
}

#[inline(always)]
fn listener_storage(sk: *mut bpf_sock, value: *mut Listener, flags: u64) -> Option<&'static mut Listener> {
    let map = core::ptr::from_ref(&MR_LISTENERS).cast_mut().cast();
    // SAFETY: the verifier accepts only a socket that is held; the value is copied; storage lives as long as its socket.
    unsafe { bpf_sk_storage_get(map, sk.cast(), value.cast(), flags).cast::<Listener>().as_mut() }
}

/// Lets the proxy find the origin of a connection that is about to reach it; false when there is no room for it.
#[inline(always)]
pub fn add_connection(ends: &Ends, origin: &Origin) -> bool {
    let connection = Connection { origin: *origin, accepted: 0, reserved: [0; RESERVED] };
    put(&MR_CONNECTIONS, ends, &connection, Track::ConnectionsAdded)
}

/// A connection between a client and the proxy.
#[inline(always)]
pub fn connection(ends: &Ends) -> Option<&'static mut Connection> {
    // SAFETY: written by one end at a time: the client's until it is accepted, then the proxy's.
    MR_CONNECTIONS.get_ptr_mut(ends).map(|connection| unsafe { &mut *connection })
}

/// Forgets a connection.
#[inline(always)]
pub fn remove_connection(ends: &Ends) {
    take(&MR_CONNECTIONS, ends, Track::ConnectionsRemoved);
}

const EEXIST: i32 = 17;

/// Puts an entry into a map that forgets, in place of the one that is there; only one that is new is counted.
#[inline(always)]
fn put<K, V>(map: &LruHashMap<K, V>, key: &K, value: &V, added: Track) -> bool {
    match map.insert(key, value, BPF_NOEXIST.into()) {
        Ok(()) => {
            track(added);
            true
        }
        Err(error) => error == -EEXIST && map.insert(key, value, 0).is_ok(),
    }
}

/// Takes an entry out, if it is there.
#[inline(always)]
fn take<K, V>(map: &LruHashMap<K, V>, key: &K, removed: Track) {
    if map.remove(key).is_ok() {
        track(removed);
    }
}

#[inline(always)]
fn track(what: Track) {
    if let Some(tracked) = MR_TRACKED.get_ptr_mut(0) {
        // SAFETY: the value is this CPU's own, and nothing but the counts, in their order.
        unsafe { *tracked.cast::<u64>().add(what as usize) += 1 };
    }
}

/// Who watches what.
#[inline(always)]
pub fn watch() -> Option<&'static Watch> {
    MR_WATCH.get(0)
}

/// What this CPU told.
#[inline(always)]
pub fn limit() -> Option<&'static mut Limit> {
    // SAFETY: the value is this CPU's own.
    MR_LIMITS.get_ptr_mut(0).map(|limit| unsafe { &mut *limit })
}

/// Tells a decision, and wakes nobody up: whoever reads looks again by itself. False when there is no room.
#[inline(always)]
pub fn tell(event: &Event) -> bool {
    MR_DECISIONS.output::<Event>(event, BPF_RB_NO_WAKEUP.into()).is_ok()
}
