//! What a DNS message is answered with: pure.

use crate::names::{VirtualAddress, VirtualAddresses};
use hickory_proto::{
    op::{Edns, Message, OpCode, Query, ResponseCode},
    rr::{
        DNSClass, Name, RData, Record, RecordType,
        rdata::{A, AAAA, PTR},
    },
    serialize::binary::{BinDecodable as _, BinDecoder},
};
use std::str;

/// Length of a header (RFC 1035 §4.1.1).
const HEADER: usize = 12;
/// Seconds: an answer of ours is as good as the route it stands for, which may go at any time.
const TTL: u32 = 30;
/// What we say that we take by UDP: what no path has to fragment (DNS Flag Day 2020).
const MAX_UDP_PAYLOAD: u16 = 1232;

/// How a message came, which bounds its answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Transport {
    Udp,
    Tcp,
}

/// What is done with a message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Decision {
    /// It is about a name that is routed, and this is the answer.
    Answer(Vec<u8>),
    /// It makes no sense, and this says so.
    Malformed(Vec<u8>),
    /// It is for the resolver that was asked.
    Forward,
    /// It is no query: an answer to it could start a loop.
    Drop,
}

/// Decides on what a client sent. Everything that is not about the address of a routed name is the resolver's to answer.
pub(super) fn decide(query: &[u8], addresses: &VirtualAddresses, transport: Transport) -> Decision {
    let Some(head) = Head::of(query).filter(|head| !head.is_response) else { return Decision::Drop };
    let malformed = || Decision::Malformed(bare_error(query, ResponseCode::FormErr));
    match (head.op_code, head.questions) {
        (OpCode::Query, 1) => {}
        (OpCode::Query, _) | (_, 2..) => return malformed(),
        _ => return Decision::Forward,
    }
    let Some(question) = question(query) else { return malformed() };
    let Some(records) = records(&question, addresses) else { return Decision::Forward };
    let Ok(query) = Message::from_vec(query) else { return malformed() };
    answer(&query, &question, records, transport).map_or_else(malformed, Decision::Answer)
}

/// The answer of a server that cannot say more than this.
pub(super) fn error(query: &[u8], code: ResponseCode) -> Vec<u8> {
    let whole = Message::from_vec(query).ok().and_then(|query| response(&query, code).to_vec().ok());
    whole.unwrap_or_else(|| bare_error(query, code))
}

/// Whether a message answers a query (RFC 5452 §9.1): the same id and question. One that brings no data, such as the
/// FORMERR of a server that did not understand the question, may leave the question out.
pub(super) fn is_answer(answer: &[u8], query: &[u8]) -> bool {
    let (Some(head), Some(asked)) = (Head::of(answer), Head::of(query)) else { return false };
    if !head.is_response || head.op_code != asked.op_code || id(answer) != id(query) {
        return false;
    }
    let is_empty = head.questions == 0 && head.records == 0;
    is_empty || (head.questions == asked.questions && is_about_the_same(answer, query, asked.questions))
}

fn is_about_the_same(answer: &[u8], query: &[u8], questions: u16) -> bool {
    questions == 0 || question(query).is_some_and(|asked| question(answer) == Some(asked))
}

/// A message's id.
pub(super) fn id(message: &[u8]) -> Option<[u8; 2]> {
    message.first_chunk().copied()
}

/// Gives a message an id.
pub(super) fn set_id(message: &mut [u8], id: [u8; 2]) {
    if let Some(place) = message.first_chunk_mut() {
        *place = id;
    }
}

/// What a header says of its message.
struct Head {
    is_response: bool,
    op_code: OpCode,
    questions: u16,
    /// Answers and authorities.
    records: u32,
}

impl Head {
    fn of(message: &[u8]) -> Option<Self> {
        let head: &[u8; HEADER] = message.first_chunk()?;
        let count = |at: usize| u16::from_be_bytes([head[at], head[at + 1]]);
        Some(Self {
            is_response: head[2] & 0x80 != 0,
            op_code: OpCode::from_u8((head[2] >> 3) & 0xf),
            questions: count(4),
            records: u32::from(count(6)) + u32::from(count(8)),
        })
    }
}

fn question(message: &[u8]) -> Option<Query> {
    let mut decoder = BinDecoder::new(message);
    decoder.read_slice(HEADER).ok()?;
    Query::read(&mut decoder).ok()
}

/// What there is to answer a question with; nothing where it is none of ours.
fn records(question: &Query, addresses: &VirtualAddresses) -> Option<Vec<RData>> {
    if question.query_class() != DNSClass::IN {
        return None;
    }
    let of = |name: &str| addresses.of(name);
    let ipv4 = |address: VirtualAddress| RData::A(A(address.ipv4()));
    let ipv6 = |address: VirtualAddress| RData::AAAA(AAAA(address.ipv6()));
    let name = question.name();
    match question.query_type() {
        RecordType::A => Some(vec![ipv4(of(&host_name(name)?)?)]),
        RecordType::AAAA => Some(vec![ipv6(of(&host_name(name)?)?)]),
        RecordType::ANY => of(&host_name(name)?).map(|address| vec![ipv4(address), ipv6(address)]),
        // Those may name another endpoint, which is reached without us (RFC 9460).
        RecordType::HTTPS | RecordType::SVCB => of(service_host(&host_name(name)?)).map(|_| vec![]),
        RecordType::PTR => Some(vec![RData::PTR(PTR(pointer(name, addresses)?))]),
        _ => None,
    }
}

/// A name as configurations have it: lower case, without the final dot; none where it is no host's name.
fn host_name(name: &Name) -> Option<String> {
    let mut host = String::with_capacity(name.len());
    for label in name {
        let label = str::from_utf8(label).ok()?;
        // A dot may stand within a label, and would make two of one.
        if !label.chars().all(|c| c.is_ascii_alphanumeric() || "-_".contains(c)) {
            return None;
        }
        if !host.is_empty() {
            host.push('.');
        }
        host.extend(label.chars().map(|c| c.to_ascii_lowercase()));
    }
    Some(host)
}

/// The host of a service at a port of its own: `_8443._https.catalog` (RFC 9460 §2.3).
fn service_host(name: &str) -> &str {
    match name.split_once('.') {
        Some((label, rest)) if label.starts_with('_') => service_host(rest),
        _ => name,
    }
}

/// The name whose virtual address a reverse name stands for (RFC 1035 §3.5, RFC 3596 §2.5).
fn pointer(reverse: &Name, addresses: &VirtualAddresses) -> Option<Name> {
    let network = reverse.parse_arpa_name().ok()?;
    let address = (network.prefix_len() == network.max_prefix_len()).then(|| network.addr())?;
    let mut name = Name::from_ascii(addresses.name_at(address)?).ok()?;
    name.set_fqdn(true);
    Some(name)
}

fn answer(query: &Message, question: &Query, records: Vec<RData>, transport: Transport) -> Option<Vec<u8>> {
    if query.version() != 0 {
        return response(query, ResponseCode::BADVERS).to_vec().ok();
    }
    let mut answer = response(query, ResponseCode::NoError);
    answer.metadata.authoritative = true;
    let record = |data| Record::from_rdata(question.name().clone(), TTL, data);
    answer.add_answers(records.into_iter().map(record));
    let whole = answer.to_vec().ok()?;
    let limit = match transport {
        Transport::Udp => usize::from(query.max_payload()),
        Transport::Tcp => usize::from(u16::MAX),
    };
    if whole.len() <= limit { Some(whole) } else { answer.truncate().to_vec().ok() }
}

/// A response to a query, with nothing in it yet.
fn response(query: &Message, code: ResponseCode) -> Message {
    let mut response = Message::response(query.id, query.op_code);
    response.metadata.recursion_desired = query.recursion_desired;
    response.metadata.recursion_available = true;
    response.metadata.checking_disabled = query.checking_disabled;
    response.metadata.response_code = code;
    response.add_queries(query.queries.iter().cloned());
    if let Some(asked) = &query.edns {
        let mut edns = Edns::new();
        edns.set_max_payload(MAX_UDP_PAYLOAD).set_dnssec_ok(asked.flags().dnssec_ok);
        response.set_edns(edns);
    }
    response
}

/// A header alone, for a query of which no more can be understood.
fn bare_error(query: &[u8], code: ResponseCode) -> Vec<u8> {
    let mut header = [0; HEADER];
    let flags = query.get(2).copied().unwrap_or_default();
    // The opcode and "recursion desired" are the query's; it is a response, and recursion is available.
    (header[2], header[3]) = (0x80 | (flags & 0x79), 0x80 | code.low());
    set_id(&mut header, id(query).unwrap_or_default());
    header.to_vec()
}

#[cfg(test)]
mod tests;
