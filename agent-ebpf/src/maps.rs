//! Every map, and what the programs do with each.

use agent_ebpf::{
    Counters, Handshake, Listener, MAX_HANDSHAKES, MAX_RULES, MAX_SERVICES, Origin, RuleKey, Rules, Service,
};
#[expect(
    deprecated,
    reason = "its successor needs Linux 6.2 and answers for the task's cgroup, not the attachment's"
)]
use aya_ebpf::maps::CgroupStorage;
use aya_ebpf::{
    Global,
    bindings::{BPF_SK_STORAGE_GET_F_CREATE, bpf_sock},
    btf_maps::SkStorage,
    helpers::generated::{bpf_sk_storage_delete, bpf_sk_storage_get},
    macros::{btf_map, map},
    maps::{HashMap, LpmTrie, LruHashMap, PerCpuHashMap, lpm_trie::Key},
};

#[map]
static MR_SERVICES: HashMap<u32, Service> = HashMap::with_max_entries(MAX_SERVICES, 0);
#[map]
static MR_RULES: LpmTrie<RuleKey, Rules> = LpmTrie::with_max_entries(MAX_RULES, 0);
#[map]
static MR_COUNTERS: PerCpuHashMap<u32, Counters> = PerCpuHashMap::with_max_entries(MAX_SERVICES, 0);
#[map]
static MR_HANDSHAKES: LruHashMap<Handshake, Origin> = LruHashMap::with_max_entries(MAX_HANDSHAKES, 0);
#[map]
#[expect(deprecated, reason = "see the import")]
static MR_SCOPES: CgroupStorage<u32> = CgroupStorage::new();
#[btf_map]
static MR_ORIGINS: SkStorage<Origin> = SkStorage::new();
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
pub fn count(service: u32, counter: impl Fn(&mut Counters) -> &mut u64) {
    if let Some(counters) = MR_COUNTERS.get_ptr_mut(service) {
        // SAFETY: the value is this CPU's own.
        *counter(unsafe { &mut *counters }) += 1;
    }
}

/// The origin that a socket carries.
#[inline(always)]
pub fn origin(sk: *mut bpf_sock) -> Option<&'static mut Origin> {
    storage(&MR_ORIGINS, sk)
}

/// Makes a socket carry an origin, in place of the one it has; false when there is no memory for it.
#[inline(always)]
pub fn set_origin(sk: *mut bpf_sock, mut origin: Origin) -> bool {
    match storage_or_insert(&MR_ORIGINS, sk, &mut origin) {
        Some(held) => {
            *held = origin;
            true
        }
        None => false,
    }
}

/// Makes a socket carry no origin.
#[inline(always)]
pub fn clear_origin(sk: *mut bpf_sock) {
    // SAFETY: the verifier accepts only the socket that the context gave.
    unsafe { bpf_sk_storage_delete(map_ptr(&MR_ORIGINS), sk.cast()) };
}

/// The mark of a listener of the proxy.
#[inline(always)]
pub fn listener(sk: *mut bpf_sock) -> Option<&'static mut Listener> {
    storage(&MR_LISTENERS, sk)
}

/// Marks a listener as the proxy's, with the time of its heartbeat.
#[inline(always)]
pub fn mark_listener(sk: *mut bpf_sock, heartbeat_ns: u64) {
    let mut mark = Listener { heartbeat_ns };
    if let Some(listener) = storage_or_insert(&MR_LISTENERS, sk, &mut mark) {
        listener.heartbeat_ns = heartbeat_ns;
    }
}

/// Leaves an origin for the proxy to pick up.
#[inline(always)]
pub fn begin_handshake(handshake: &Handshake, origin: &Origin) -> bool {
    MR_HANDSHAKES.insert(handshake, origin, 0).is_ok()
}

/// Picks up the origin that a client left.
#[inline(always)]
pub fn take_handshake(handshake: &Handshake) -> Option<Origin> {
    // SAFETY: copied at once; the connection's two ends are the only ones that name this entry.
    let origin = unsafe { MR_HANDSHAKES.get(handshake) }.copied();
    forget_handshake(handshake);
    origin
}

/// Drops what nobody will pick up any more.
#[inline(always)]
pub fn forget_handshake(handshake: &Handshake) {
    let _absent_is_fine = MR_HANDSHAKES.remove(handshake);
}

/// Address of a map as helpers want it.
fn map_ptr<T>(map: &'static SkStorage<T>) -> *mut core::ffi::c_void {
    core::ptr::from_ref(map).cast_mut().cast()
}

#[inline(always)]
fn storage<T>(map: &'static SkStorage<T>, sk: *mut bpf_sock) -> Option<&'static mut T> {
    // SAFETY: the verifier accepts only a socket that is held; storage lives as long as its socket.
    unsafe { bpf_sk_storage_get(map_ptr(map), sk.cast(), core::ptr::null_mut(), 0).cast::<T>().as_mut() }
}

#[inline(always)]
fn storage_or_insert<T>(
    map: &'static SkStorage<T>,
    sk: *mut bpf_sock,
    value: &mut T,
) -> Option<&'static mut T> {
    let value = core::ptr::from_mut(value).cast();
    // SAFETY: as above; the value is copied by the helper.
    unsafe {
        bpf_sk_storage_get(map_ptr(map), sk.cast(), value, BPF_SK_STORAGE_GET_F_CREATE.into())
            .cast::<T>()
            .as_mut()
    }
}
