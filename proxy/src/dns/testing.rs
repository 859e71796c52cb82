//! What the tests of both transports share.

use super::Server;
use crate::{
    config,
    names::VirtualAddresses,
    observe::Metrics,
    origins::Origins,
    snapshot::{Current, Snapshot},
};
use hickory_proto::{
    op::{Message, MessageType, OpCode, Query},
    rr::{Name, RData, Record, RecordType, rdata::A},
};
use std::{io::Write as _, sync::Arc};
use tokio::sync::watch;

const ROUTED: &str = "\
virtual_hosts: [{ name: v, domains: [catalog], cluster: c }]
clusters: [{ name: c, endpoints: ['10.0.0.1:80'] }]
";

/// One that routes the name `catalog`.
pub(super) fn server() -> Arc<Server> {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(ROUTED.as_bytes()).unwrap();
    let (config, metrics) = (config::load(file.path()).unwrap(), Metrics::default());
    let snapshot = Snapshot::new(config, &VirtualAddresses::default(), &metrics);
    let (drain, draining) = watch::channel(false);
    // It is to stay open for as long as the server: a test ends before the process does.
    std::mem::forget(drain);
    let origins = Origins::at("/nonexistent".into());
    Arc::new(Server::new(Arc::new(Current::from_pointee(snapshot)), metrics, origins, draining))
}

/// A query for a name.
pub(super) fn query(name: &str, kind: RecordType) -> Vec<u8> {
    let mut message = Message::new(0x1234, MessageType::Query, OpCode::Query);
    let mut name = Name::from_ascii(name).unwrap();
    name.set_fqdn(true);
    message.add_query(Query::query(name, kind));
    message.to_vec().unwrap()
}

/// A resolver that is played.
pub(super) struct Resolver;

impl Resolver {
    /// What it answers: one address, whatever was asked.
    pub(super) fn answer(query: &[u8]) -> Vec<u8> {
        let mut answer = Message::from_vec(query).unwrap().into_response();
        let name = answer.queries[0].name().clone();
        answer.add_answer(Record::from_rdata(name, 7, RData::A(A([10, 9, 8, 7].into()))));
        answer.to_vec().unwrap()
    }
}
