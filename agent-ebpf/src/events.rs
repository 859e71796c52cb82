//! What was decided: counted, and told to those who watch.

use crate::maps;
use agent_ebpf::{
    Counter, Event, IPPROTO_TCP, IPPROTO_UDP,
    decide::{Attempt, Transport},
};
use aya_ebpf::helpers::{
    bpf_get_current_comm, bpf_get_current_pid_tgid, bpf_get_current_uid_gid, generated::bpf_ktime_get_ns,
};

/// A decision on a connection of a service, or on a datagram.
#[inline(always)]
pub fn decided(service: u32, attempt: &Attempt, counter: Counter) {
    maps::count(service, counter);
    let Some(watch) = maps::watch() else { return };
    if !watch.is_on() {
        return;
    }
    // SAFETY: takes nothing and returns a number.
    let now_ns = unsafe { bpf_ktime_get_ns() };
    if !watch.covers(service, now_ns) {
        return;
    }
    let Some(limit) = maps::limit() else { return };
    if !limit.allows(watch.rate, now_ns) || !maps::tell(&event(service, attempt, counter, now_ns)) {
        limit.dropped += 1;
    }
}

#[inline(always)]
fn event(service: u32, attempt: &Attempt, counter: Counter, time_ns: u64) -> Event {
    let destination = &attempt.destination;
    Event {
        time_ns,
        addr: destination.addr,
        comm: bpf_get_current_comm().unwrap_or_default(),
        service,
        uid: bpf_get_current_uid_gid() as u32,
        pid: (bpf_get_current_pid_tgid() >> 32) as u32,
        counter: counter as u32,
        family: destination.family,
        port: destination.port,
        transport: if attempt.transport == Transport::Udp { IPPROTO_UDP } else { IPPROTO_TCP },
    }
}
