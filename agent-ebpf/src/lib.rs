//! The boundary between the agent and its eBPF programs: the keys and values of every map, and the decisions.
//!
//! Everything here compiles for the kernel and for the host, so that both sides share one definition and the
//! decisions are unit-tested where tests run. Values are native endian unless said otherwise; ports are in host
//! order; addresses are in network order, IPv4 in the first four of sixteen bytes.

#![cfg_attr(not(test), no_std)]

pub mod decide;
pub mod watch;

/// Version of everything in this crate that outlives a process: map names, keys, values and their meaning.
///
/// Pins live below a directory that bears it, so two versions never mistake each other's maps. Whoever changes it keeps
/// to what lets one version take over from another, and remove it:
///
/// - `PINS/vN/{maps,programs,links/SCOPE}/NAME` and nothing else; maps are `MR_…`, programs and links `mr_…`; SCOPE is
///   `proxy-CGROUP` or `service-ID-CGROUP`, with the cgroup's id.
/// - A program of a name in [`programs`] is for the hook that stands there. [`programs::LAST`] is pinned after all others
///   and removed before them: with it the version can be attached, without it it cannot.
/// - `MR_SCOPES` is cgroup storage of one u32, the id of a service, for every program at a hook that rewrites.
/// - A key of `MR_CONNECTIONS`, of any size, is a steered connection that is still open.
/// - Maps in [`maps::SHARED`] have the same meaning wherever their keys and values have the same sizes.
pub const ABI_VERSION: u32 = 4 + CHANGED as u32;

/// Built as another version of itself, for tests.
const CHANGED: bool = cfg!(feature = "changed-abi");
/// How long what is reserved in some values is: what makes their sizes differ in a changed ABI.
pub const RESERVED: usize = if CHANGED { 3 } else { 1 };

/// `AF_INET`, the same on every Linux architecture.
pub const AF_INET: u16 = 2;
/// `AF_INET6`, the same on every Linux architecture.
pub const AF_INET6: u16 = 10;

/// `SOL_IP`: the level at which a proxy asks for an IPv4 `SO_ORIGINAL_DST`.
pub const SOL_IP: i32 = 0;
/// `SOL_IPV6`: the level at which a proxy asks for an IPv6 `IP6T_SO_ORIGINAL_DST`.
pub const SOL_IPV6: i32 = 41;
/// `SO_ORIGINAL_DST` and `IP6T_SO_ORIGINAL_DST` (linux/netfilter_ipv4.h and linux/netfilter_ipv6/ip6_tables.h).
pub const SO_ORIGINAL_DST: i32 = 80;
/// The private `getsockopt` level of this project ("MR").
pub const SOL_MESH_REDIRECT: i32 = 0x4d52;
/// On an accepted socket, at [`SOL_MESH_REDIRECT`]: answers an [`OriginOption`].
pub const MESH_REDIRECT_ORIGIN: i32 = 1;
/// On a listening socket, at [`SOL_MESH_REDIRECT`]: "this listener is being served"; answers nothing.
pub const MESH_REDIRECT_HEARTBEAT: i32 = 2;

/// On a datagram socket that serves DNS, at [`SOL_MESH_REDIRECT`]: answers a [`ResolverOption`].
pub const MESH_REDIRECT_RESOLVER: i32 = 3;

/// Where resolvers listen (RFC 1035 §4.2).
pub const DNS_PORT: u16 = 53;
/// Resolvers of one family that can be told apart at once: each has a port of the proxy's, from [`Service::dns_port`] on.
///
/// A connected datagram socket tells no hook its own port, so what the proxy needs to know has to be in the address.
pub const RESOLVER_PORTS: u16 = 16;

/// First byte of the virtual IPv4 addresses that the proxy gives to names: 241.0.0.0/8, which is nobody's (RFC 1112 §4).
pub const VIRTUAL_V4: u8 = 241;
/// First bytes of the virtual IPv6 addresses: fdb2:6c1e:9d04::/48, a unique local block (RFC 4193).
pub const VIRTUAL_V6: [u8; 6] = [0xfd, 0xb2, 0x6c, 0x1e, 0x9d, 0x04];

/// Nanoseconds after which a listener that has sent heartbeats counts as hung.
pub const HEARTBEAT_EXPIRY_NS: u64 = 3_000_000_000;

/// Bytes of a service's name, NUL padded; a name is at most one byte shorter.
pub const NAME_LEN: usize = 64;
/// Services that can be enabled at once.
pub const MAX_SERVICES: u32 = 4096;
/// CIDR entries of all services together.
pub const MAX_RULES: u32 = 65_536;
/// Port ranges that one CIDR of one service can carry, after ranges that overlap were resolved.
pub const MAX_PORT_RANGES: usize = if CHANGED { 12 } else { 16 };
/// Virtual addresses that can be known at once.
pub const MAX_VIRTUAL: u32 = 131_072;
/// Steered connections that can be open at once. Beyond that the kernel forgets the ones that it used least lately.
pub const MAX_CONNECTIONS: u32 = 65_536;

/// Declares a value that crosses the boundary: `#[repr(C)]`, copyable, of an asserted size.
macro_rules! shared {
    ($(#[$meta:meta])* $name:ident: $size:tt { $($(#[$field_meta:meta])* $field:ident: $type:ty,)+ }) => {
        $(#[$meta])*
        #[repr(C)]
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub struct $name {
            $($(#[$field_meta])* pub $field: $type,)+
        }

        const _: () = assert!(size_of::<$name>() == $size);
        // No implicit padding: a kernel map compares and copies every byte.
        const _: () = assert!(0 $(+ size_of::<$type>())+ == $size);

        // SAFETY: `repr(C)`, no padding, and every bit pattern of the integers and arrays inside is valid.
        #[cfg(feature = "user")]
        #[expect(unsafe_code, reason = "the trait is the promise that the lines above prove")]
        unsafe impl aya::Pod for $name {}
    };
}

shared! {
    /// One enabled service. Value of `MR_SERVICES`, keyed by the service's id (u32, never zero).
    Service: (74 + 2 * RESERVED) {
        /// Which rules apply: the first part of [`RuleKey`]. Replaced together with the rules, in one map update.
        policy: u32,
        /// [`FAILURE_OPEN`] or [`FAILURE_CLOSED`].
        failure: u8,
        /// [`PHASE_ENFORCE`] or [`PHASE_OBSERVE`].
        phase: u8,
        /// Where the proxy listens on 127.0.0.1 and ::1.
        proxy_port: u16,
        /// Where it serves DNS on 127.0.0.1 and ::1; zero where queries are not captured.
        dns_port: u16,
        /// Zero.
        reserved: [u16; RESERVED],
        /// The name, UTF-8, NUL padded.
        name: [u8; NAME_LEN],
    }
}

/// With no proxy listening, connections go where they were going.
pub const FAILURE_OPEN: u8 = 0;
/// With no proxy listening, connections are refused with `ECONNREFUSED`.
pub const FAILURE_CLOSED: u8 = 1;

/// What is to be steered is steered.
pub const PHASE_ENFORCE: u8 = 0;
/// What is to be steered is counted, and goes where it was going.
pub const PHASE_OBSERVE: u8 = 1;

shared! {
    /// What a destination is looked up by: the data of an `LPM_TRIE` key, after its prefix length.
    RuleKey: 24 {
        /// [`Service::policy`].
        policy: u32,
        /// [`AF_INET`] or [`AF_INET6`].
        family: u32,
        /// The destination, network order.
        addr: [u8; 16],
    }
}

impl RuleKey {
    /// Bits of a key that come before the address and always have to match.
    pub const FIXED_BITS: u32 = 64;
}

shared! {
    /// What happens to the ports of one CIDR. Value of `MR_RULES`.
    ///
    /// The ranges are disjoint and sorted; a port in none of them passes.
    Rules: (4 + 8 * MAX_PORT_RANGES) {
        /// How many of `ranges` count.
        len: u32,
        /// The ranges.
        ranges: [PortRange; MAX_PORT_RANGES],
    }
}

shared! {
    /// An inclusive range of ports that is steered, or not.
    PortRange: 8 {
        /// First port.
        first: u16,
        /// Last port.
        last: u16,
        /// [`VERDICT_PASS`] or [`VERDICT_STEER`].
        verdict: u32,
    }
}

shared! {
    /// A port of the proxy's that stands for a resolver. Key of `MR_RESOLVERS`.
    ResolverKey: 4 {
        /// [`AF_INET`] or [`AF_INET6`].
        family: u16,
        /// One of [`RESOLVER_PORTS`], host order.
        port: u16,
    }
}

shared! {
    /// A virtual address. Key of `MR_VIRTUAL`.
    VirtualKey: 20 {
        /// [`AF_INET`] or [`AF_INET6`].
        family: u32,
        /// Network order.
        addr: [u8; 16],
    }
}

shared! {
    /// Where a connection to a virtual address goes that is not steered. Value of `MR_VIRTUAL`.
    Endpoint: 20 {
        /// [`AF_INET`] or [`AF_INET6`].
        family: u16,
        /// Host order.
        port: u16,
        /// Network order.
        addr: [u8; 16],
    }
}

/// The connection is left alone.
pub const VERDICT_PASS: u32 = 0;
/// The connection goes to the proxy.
pub const VERDICT_STEER: u32 = 1;

shared! {
    /// What was asked for and by whom. Value of `MR_ORIGINS`, keyed by the cookie of the client's socket.
    Origin: 40 {
        /// Where the application was going, network order.
        addr: [u8; 16],
        /// [`AF_INET`] or [`AF_INET6`]; an IPv4-mapped IPv6 destination is [`AF_INET`].
        family: u16,
        /// The port it was going to.
        port: u16,
        /// The service's id.
        service: u32,
        /// User id of the process that connected.
        uid: u32,
        /// Process id (thread group) of the process that connected, in the initial namespace.
        pid: u32,
        /// Id of the cgroup of the process that connected.
        cgroup: u64,
    }
}

shared! {
    /// The ends of a connection between a client and the proxy. Key of `MR_CONNECTIONS`.
    Ends: 48 {
        /// Cookie of the network namespace; zero on kernels that do not tell (before 5.15).
        netns: u64,
        /// The client's end, network order.
        client: [u8; 16],
        /// The proxy's end, network order.
        proxy: [u8; 16],
        /// The client's port.
        client_port: u16,
        /// The proxy's port.
        proxy_port: u16,
        /// [`AF_INET`] or [`AF_INET6`].
        family: u32,
    }
}

shared! {
    /// A connection between a client and the proxy. Value of `MR_CONNECTIONS`.
    Connection: (44 + 4 * RESERVED) {
        /// Where it was going.
        origin: Origin,
        /// Nonzero once the proxy's end exists, which owns the entry from then on.
        accepted: u32,
        /// Zero.
        reserved: [u32; RESERVED],
    }
}

shared! {
    /// A listener that the proxy's cgroup opened: its socket storage. Any other listener on the port is a stranger.
    Listener: 8 {
        /// `CLOCK_MONOTONIC` of the last heartbeat in nanoseconds; zero for a proxy that sends none.
        heartbeat_ns: u64,
    }
}

shared! {
    /// The answer to [`MESH_REDIRECT_ORIGIN`].
    OriginOption: 104 {
        /// Version of this answer: 1.
        version: u32,
        /// [`Origin::family`].
        family: u16,
        /// [`Origin::port`].
        port: u16,
        /// [`Origin::addr`].
        addr: [u8; 16],
        /// [`Origin::uid`].
        uid: u32,
        /// [`Origin::pid`].
        pid: u32,
        /// [`Origin::cgroup`].
        cgroup: u64,
        /// [`Service::name`]; empty when the service was disabled meanwhile.
        service: [u8; NAME_LEN],
    }
}

/// [`OriginOption::version`] of this version.
pub const ORIGIN_OPTION_VERSION: u32 = 1;

shared! {
    /// The answer to [`MESH_REDIRECT_RESOLVER`]: for which resolver the queries are that come to a port.
    ResolverOption: 24 {
        /// Version of this answer: 1.
        version: u32,
        /// [`AF_INET`] or [`AF_INET6`].
        family: u16,
        /// [`DNS_PORT`].
        port: u16,
        /// Network order.
        addr: [u8; 16],
    }
}

/// [`ResolverOption::version`] of this version.
pub const RESOLVER_OPTION_VERSION: u32 = 1;

shared! {
    /// What happened to a service's connections. Value of `MR_COUNTERS` for each CPU, keyed by the service's id.
    Counters: 56 {
        /// Sent to the proxy.
        steered: u64,
        /// Left alone because policy says so.
        passed_by_rule: u64,
        /// Left alone because no proxy was listening and the service fails open.
        passed_proxy_absent: u64,
        /// Refused because no proxy was listening and the service fails closed.
        refused: u64,
        /// Should have been steered, but the kernel could not keep the origin; treated as if no proxy listened.
        errors: u64,
        /// Would have been sent to the proxy, were the service not only observed.
        observed: u64,
        /// DNS queries that were sent to the proxy by datagram: one for each datagram, or for each connect.
        queries: u64,
    }
}

/// One of [`Counters`], by its place among them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Counter {
    /// [`Counters::steered`].
    Steered,
    /// [`Counters::passed_by_rule`].
    PassedByRule,
    /// [`Counters::passed_proxy_absent`].
    PassedProxyAbsent,
    /// [`Counters::refused`].
    Refused,
    /// [`Counters::errors`].
    Errors,
    /// [`Counters::observed`].
    Observed,
    /// [`Counters::queries`].
    Queries,
}

impl Counter {
    /// All of them, in the order of [`Counters`].
    pub const ALL: [Self; 7] = [
        Self::Steered,
        Self::PassedByRule,
        Self::PassedProxyAbsent,
        Self::Refused,
        Self::Errors,
        Self::Observed,
        Self::Queries,
    ];
}

const _: () = assert!(size_of::<Counters>() == (Counter::Queries as usize + 1) * size_of::<u64>());

impl Counters {
    /// Nothing happened yet.
    pub const ZERO: Self = Self {
        steered: 0,
        passed_by_rule: 0,
        passed_proxy_absent: 0,
        refused: 0,
        errors: 0,
        observed: 0,
        queries: 0,
    };
}

shared! {
    /// How many entries came into the maps that forget, and how many were taken out of them; what else is missing was
    /// forgotten. The value of `MR_TRACKED` for each CPU.
    Tracked: 32 {
        /// Entries of `MR_ORIGINS` that were added; one that replaces another is none.
        origins_added: u64,
        /// Entries of `MR_ORIGINS` that were removed.
        origins_removed: u64,
        /// Entries of `MR_CONNECTIONS` that were added.
        connections_added: u64,
        /// Entries of `MR_CONNECTIONS` that were removed.
        connections_removed: u64,
    }
}

/// One of [`Tracked`], by its place among them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Track {
    /// [`Tracked::origins_added`].
    OriginsAdded,
    /// [`Tracked::origins_removed`].
    OriginsRemoved,
    /// [`Tracked::connections_added`].
    ConnectionsAdded,
    /// [`Tracked::connections_removed`].
    ConnectionsRemoved,
}

const _: () = assert!(size_of::<Tracked>() == (Track::ConnectionsRemoved as usize + 1) * size_of::<u64>());

/// Bytes of a thread's name (`TASK_COMM_LEN`).
pub const COMM_LEN: usize = 16;

shared! {
    /// A decision, as it is told to those who watch. Record of `MR_DECISIONS`.
    Event: 64 {
        /// `CLOCK_MONOTONIC` in nanoseconds.
        time_ns: u64,
        /// Where the application was going, network order.
        addr: [u8; 16],
        /// Name of the thread that connected, NUL padded.
        comm: [u8; COMM_LEN],
        /// The service's id.
        service: u32,
        /// User id of the process that connected.
        uid: u32,
        /// Process id (thread group), in the initial namespace.
        pid: u32,
        /// The [`Counter`] that counted it.
        counter: u32,
        /// [`AF_INET`] or [`AF_INET6`]; an IPv4-mapped IPv6 destination is [`AF_INET`].
        family: u16,
        /// The port it was going to.
        port: u16,
        /// [`IPPROTO_TCP`] or [`IPPROTO_UDP`].
        transport: u32,
    }
}

/// `IPPROTO_TCP`.
pub const IPPROTO_TCP: u32 = 6;
/// `IPPROTO_UDP`.
pub const IPPROTO_UDP: u32 = 17;

/// Bytes of `MR_DECISIONS`: seven thousand decisions. A power of two, and whole pages of every size.
pub const DECISIONS_BYTES: u32 = 512 << 10;

/// Words of [`Watch::services`].
pub const WATCH_WORDS: usize = MAX_SERVICES as usize / 64;

shared! {
    /// Who watches what. The one value of `MR_WATCH`.
    Watch: 528 {
        /// `CLOCK_MONOTONIC` in nanoseconds until when somebody watches; zero while nobody does. It is put off again and
        /// again, so that nothing is told to a daemon that is dead.
        until_ns: u64,
        /// Which services: one bit for each id, modulo their number.
        services: [u64; WATCH_WORDS],
        /// How many decisions each CPU may tell in a second.
        rate: u32,
        /// Zero.
        reserved: u32,
    }
}

shared! {
    /// What a CPU told to those who watch. The value of `MR_LIMITS` for each CPU.
    Limit: 24 {
        /// `CLOCK_MONOTONIC` in nanoseconds at which the second began that is now.
        since_ns: u64,
        /// Decisions that were told in it.
        told: u64,
        /// Decisions that were not told: there were too many in their second, or the reader was too slow.
        dropped: u64,
    }
}

/// Names of the maps that are pinned, in the kernel (at most 15 bytes) and below the pin directory.
pub mod maps {
    /// Hash: service id → [`Service`](super::Service).
    pub const SERVICES: &str = "MR_SERVICES";
    /// Longest-prefix trie: [`RuleKey`](super::RuleKey) → [`Rules`](super::Rules).
    pub const RULES: &str = "MR_RULES";
    /// Per-CPU hash: service id → [`Counters`](super::Counters).
    pub const COUNTERS: &str = "MR_COUNTERS";
    /// Cgroup storage: the service id of an attachment; zero is "not ready, pass".
    pub const SCOPES: &str = "MR_SCOPES";
    /// LRU hash: cookie of a client's socket → [`Origin`](super::Origin).
    pub const ORIGINS: &str = "MR_ORIGINS";
    /// LRU hash: [`Ends`](super::Ends) → [`Connection`](super::Connection).
    pub const CONNECTIONS: &str = "MR_CONNECTIONS";
    /// Socket storage: [`Listener`](super::Listener).
    pub const LISTENERS: &str = "MR_LISTENERS";

    /// Hash: [`ResolverKey`](super::ResolverKey) → the resolver's address, 16 bytes in network order.
    pub const RESOLVERS: &str = "MR_RESOLVERS";
    /// Hash: [`VirtualKey`](super::VirtualKey) → [`Endpoint`](super::Endpoint).
    pub const VIRTUAL: &str = "MR_VIRTUAL";

    /// Per-CPU array of one: [`Tracked`](super::Tracked).
    pub const TRACKED: &str = "MR_TRACKED";

    /// Ring buffer: [`Event`](super::Event).
    pub const DECISIONS: &str = "MR_DECISIONS";
    /// Array of one: [`Watch`](super::Watch).
    pub const WATCH: &str = "MR_WATCH";
    /// Per-CPU array of one: [`Limit`](super::Limit).
    pub const LIMITS: &str = "MR_LIMITS";

    /// All of them.
    pub const ALL: [&str; 13] = [
        SERVICES,
        RULES,
        COUNTERS,
        SCOPES,
        ORIGINS,
        CONNECTIONS,
        LISTENERS,
        RESOLVERS,
        VIRTUAL,
        TRACKED,
        DECISIONS,
        WATCH,
        LIMITS,
    ];

    /// A map that versions share where the sizes of key and value are these, since it tells of sockets that outlive them.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Shared {
        /// Its name.
        pub name: &'static str,
        /// Bytes of a key.
        pub key: usize,
        /// Bytes of a value.
        pub value: usize,
    }

    /// All of these.
    pub const SHARED: [Shared; 2] = [
        // Keys of socket storage are descriptors.
        Shared { name: LISTENERS, key: size_of::<i32>(), value: size_of::<super::Listener>() },
        Shared { name: RESOLVERS, key: size_of::<super::ResolverKey>(), value: size_of::<[u8; 16]>() },
    ];
}

/// The programs: their names in the kernel, and where they attach.
pub mod programs {
    /// A program and the hook it is for.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Program {
        /// Name of the function, and of the pin.
        pub name: &'static str,
        /// `enum bpf_attach_type` (linux/bpf.h).
        pub attach_type: u32,
    }

    /// Attach types of linux/bpf.h.
    const BPF_CGROUP_SOCK_OPS: u32 = 3;
    /// See [`BPF_CGROUP_SOCK_OPS`].
    pub const BPF_CGROUP_INET4_CONNECT: u32 = 10;
    /// See [`BPF_CGROUP_SOCK_OPS`].
    pub const BPF_CGROUP_INET6_CONNECT: u32 = 11;
    const BPF_CGROUP_UDP4_SENDMSG: u32 = 14;
    const BPF_CGROUP_UDP6_SENDMSG: u32 = 15;
    const BPF_CGROUP_UDP4_RECVMSG: u32 = 19;
    const BPF_CGROUP_UDP6_RECVMSG: u32 = 20;
    const BPF_CGROUP_GETSOCKOPT: u32 = 21;
    const BPF_CGROUP_INET4_GETPEERNAME: u32 = 29;
    const BPF_CGROUP_INET6_GETPEERNAME: u32 = 30;

    const fn program(name: &'static str, attach_type: u32) -> Program {
        Program { name, attach_type }
    }

    /// Attached to every cgroup of an enabled service, in this order: what restores comes before what rewrites.
    pub const SERVICE: [Program; 5] = [
        program("mr_peername4", BPF_CGROUP_INET4_GETPEERNAME),
        program("mr_peername6", BPF_CGROUP_INET6_GETPEERNAME),
        program("mr_client_ops", BPF_CGROUP_SOCK_OPS),
        program("mr_connect4", BPF_CGROUP_INET4_CONNECT),
        program("mr_connect6", BPF_CGROUP_INET6_CONNECT),
    ];

    /// Attached to them too where DNS is captured: datagrams of sockets that are not connected.
    pub const DATAGRAM: [Program; 4] = [
        program("mr_recvmsg4", BPF_CGROUP_UDP4_RECVMSG),
        program("mr_recvmsg6", BPF_CGROUP_UDP6_RECVMSG),
        program("mr_sendmsg4", BPF_CGROUP_UDP4_SENDMSG),
        program("mr_sendmsg6", BPF_CGROUP_UDP6_SENDMSG),
    ];

    /// Attached to the proxy's cgroup. Without them no listener counts as the proxy, so nothing is steered.
    pub const PROXY: [Program; 2] =
        [program("mr_getsockopt", BPF_CGROUP_GETSOCKOPT), program("mr_proxy_ops", BPF_CGROUP_SOCK_OPS)];

    /// All of them, and [`LAST`] at the end.
    pub fn all() -> impl Iterator<Item = Program> {
        DATAGRAM.into_iter().chain(SERVICE).chain(PROXY)
    }

    /// Pinned after all others, and removed before them.
    pub const LAST: Program = PROXY[PROXY.len() - 1];

    /// Hooks that rewrite where a connection or a datagram goes; at all others it is only restored and told.
    pub const REWRITING: [u32; 4] = [
        BPF_CGROUP_INET4_CONNECT,
        BPF_CGROUP_INET6_CONNECT,
        BPF_CGROUP_UDP4_SENDMSG,
        BPF_CGROUP_UDP6_SENDMSG,
    ];
}

/// Name of the constant in the object that says whether `bpf_get_netns_cookie` exists for every program type here (5.15).
pub const NETNS_COOKIES: &str = "NETNS_COOKIES";
