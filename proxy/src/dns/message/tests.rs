use super::*;
use crate::model::VirtualHost;
use std::net::IpAddr;

fn addresses() -> VirtualAddresses {
    let domains = ["catalog", "catalog.internal", "a_b.x"].map(str::to_owned).to_vec();
    let host = VirtualHost { name: "catalog".into(), domains, cluster: "c".into(), ports: vec![] };
    VirtualAddresses::assign(&[host], &VirtualAddresses::default())
}

fn message(name: &str, kind: RecordType) -> Message {
    let mut message = Message::new(0x1234, hickory_proto::op::MessageType::Query, OpCode::Query);
    message.metadata.recursion_desired = true;
    let mut name = Name::from_ascii(name).unwrap();
    name.set_fqdn(true);
    message.add_query(Query::query(name, kind));
    message
}

fn query(name: &str, kind: RecordType) -> Vec<u8> {
    message(name, kind).to_vec().unwrap()
}

fn decided(query: &[u8]) -> Decision {
    decide(query, &addresses(), Transport::Udp)
}

#[track_caller]
fn answered(query: &[u8]) -> Message {
    let answer = match decided(query) {
        Decision::Answer(answer) => answer,
        other => panic!("{other:?}"),
    };
    assert!(is_answer(&answer, query), "{answer:?}");
    Message::from_vec(&answer).unwrap()
}

fn data(answer: &Message) -> Vec<String> {
    answer.answers.iter().map(|record| record.data.to_string()).collect()
}

#[test]
fn a_routed_name_has_its_virtual_address_in_any_case_with_the_case_that_was_asked() {
    let address = addresses().of("catalog.internal").unwrap();
    for name in ["catalog.internal", "CATALOG.internal.", "cAtAlOg.InTeRnAl"] {
        let answer = answered(&query(name, RecordType::A));
        assert_eq!(data(&answer), [address.ipv4().to_string()]);
        let asked = name.trim_end_matches('.');
        for said in [answer.queries[0].name(), &answer.answers[0].name] {
            assert_eq!(said.to_ascii(), format!("{asked}."));
        }
        assert_eq!(answer.answers[0].ttl, TTL);
        assert_eq!(data(&answered(&query(name, RecordType::AAAA))), [address.ipv6().to_string()]);
    }
    assert!(answered(&query("catalog", RecordType::A)).authoritative);
}

#[test]
fn flags_are_those_of_a_resolver_that_answers_this_query() {
    let mut asked = message("catalog", RecordType::A);
    asked.metadata.checking_disabled = true;
    let answer = answered(&asked.to_vec().unwrap());
    assert_eq!(answer.id, 0x1234);
    assert!(answer.recursion_desired && answer.recursion_available && answer.checking_disabled);
    assert!(!answer.truncation && !answer.authentic_data && answer.edns.is_none());
    asked.metadata.recursion_desired = false;
    assert!(!answered(&asked.to_vec().unwrap()).recursion_desired);
}

/// The type, and what is answered: a number of records, or nothing where the resolver is asked.
#[test]
fn only_what_concerns_the_address_of_a_routed_name_is_answered_here() {
    let cases = [
        ("catalog", RecordType::A, Some(1)),
        ("catalog", RecordType::AAAA, Some(1)),
        ("catalog", RecordType::ANY, Some(2)),
        ("catalog", RecordType::HTTPS, Some(0)),
        ("catalog", RecordType::SVCB, Some(0)),
        ("_8443._https.catalog", RecordType::HTTPS, Some(0)),
        ("_dns.catalog", RecordType::SVCB, Some(0)),
        ("a_b.x", RecordType::A, Some(1)),
        ("catalog", RecordType::MX, None),
        ("catalog", RecordType::TXT, None),
        ("_http._tcp.catalog", RecordType::SRV, None),
        ("_http._tcp.catalog", RecordType::A, None),
        ("catalog", RecordType::NS, None),
        ("catalog", RecordType::CNAME, None),
        ("catalog", RecordType::PTR, None),
        ("x.catalog", RecordType::A, None),
        ("catalog.internal.example", RecordType::A, None),
        ("example.com", RecordType::A, None),
        ("example.com", RecordType::HTTPS, None),
        (".", RecordType::NS, None),
        (".", RecordType::A, None),
    ];
    for (name, kind, expected) in cases {
        let query = query(name, kind);
        match expected {
            Some(count) => {
                let answer = answered(&query);
                assert_eq!((answer.response_code, answer.answers.len()), (ResponseCode::NoError, count));
            }
            None => assert_eq!(decided(&query), Decision::Forward, "{name} {kind}"),
        }
    }
}

#[test]
fn another_class_is_not_ours() {
    for class in [DNSClass::CH, DNSClass::HS, DNSClass::ANY] {
        let mut asked = message("catalog", RecordType::A);
        asked.queries[0].set_query_class(class);
        assert_eq!(decided(&asked.to_vec().unwrap()), Decision::Forward);
    }
}

#[test]
fn a_dot_within_a_label_makes_no_routed_name() {
    let mut name = Name::from_labels([&b"catalog.internal"[..]]).unwrap();
    name.set_fqdn(true);
    let mut asked = message("x", RecordType::A);
    asked.queries[0].set_name(name);
    assert_eq!(decided(&asked.to_vec().unwrap()), Decision::Forward);
}

#[test]
fn a_virtual_address_has_its_name_and_others_are_the_resolvers() {
    let address = addresses().of("catalog.internal").unwrap();
    for ip in [IpAddr::from(address.ipv4()), address.ipv6().into()] {
        let answer = answered(&query(&Name::from(ip).to_ascii(), RecordType::PTR));
        assert_eq!(data(&answer), ["catalog.internal."], "{ip}");
    }
    let reverse = |ip: &str| Name::from(ip.parse::<IpAddr>().unwrap()).to_ascii();
    for name in [reverse("10.0.0.1"), reverse("241.0.0.0"), "241.in-addr.arpa".into(), "x.ip6.arpa".into()] {
        assert_eq!(decided(&query(&name, RecordType::PTR)), Decision::Forward, "{name}");
    }
}

#[test]
fn edns_is_answered_with_edns_and_another_version_refused() {
    let mut asked = message("catalog", RecordType::A);
    let mut edns = Edns::new();
    edns.set_max_payload(4096).set_dnssec_ok(true);
    asked.set_edns(edns.clone());
    let answer = answered(&asked.to_vec().unwrap());
    let said = answer.edns.as_ref().unwrap();
    assert_eq!((said.version(), said.max_payload(), said.flags().dnssec_ok), (0, MAX_UDP_PAYLOAD, true));
    edns.set_version(1);
    asked.set_edns(edns);
    let answer = answered(&asked.to_vec().unwrap());
    // Sixteen, which TSIG calls by another name.
    assert_eq!((u16::from(answer.response_code), answer.answers.len()), (16, 0));
    assert_eq!(answer.edns.as_ref().unwrap().version(), 0);
}

#[test]
fn an_answer_that_does_not_fit_is_truncated_by_udp_only() {
    let records = || vec![RData::A(A([241, 1, 1, 1].into())); 60];
    let asked = message("catalog", RecordType::A);
    for (transport, truncated, count) in [(Transport::Udp, true, 0), (Transport::Tcp, false, 60)] {
        let bytes = answer(&asked, &asked.queries[0], records(), transport).unwrap();
        let answer = Message::from_vec(&bytes).unwrap();
        assert_eq!((answer.truncation, answer.answers.len()), (truncated, count));
        assert!(truncated == (bytes.len() <= 512));
    }
}

/// What came, and the code of what is answered; nothing where nothing is.
#[test]
fn what_is_malformed_is_told_where_there_is_somebody_to_tell() {
    let good = query("catalog", RecordType::A);
    let with = |at: usize, byte: u8| {
        let mut bytes = good.clone();
        bytes[at] = byte;
        bytes
    };
    let mut two_options = message("catalog", RecordType::A).to_vec().unwrap();
    two_options[11] = 2;
    two_options.extend([0, 0, 41, 2, 0, 0, 0, 0, 0, 0, 0].repeat(2));
    for bytes in [
        good[..HEADER].to_vec(),
        good[..good.len() - 1].to_vec(),
        with(5, 0),
        with(5, 2),
        with(12, 0xc0),
        with(11, 1),
        two_options,
    ] {
        let Decision::Malformed(answer) = decided(&bytes) else { panic!("{bytes:?}: {:?}", decided(&bytes)) };
        assert_eq!(answer.len(), HEADER);
        let answer = Message::from_vec(&answer).unwrap();
        assert_eq!((answer.id, answer.response_code), (0x1234, ResponseCode::FormErr), "{bytes:?}");
        assert!(answer.recursion_desired && answer.recursion_available);
    }
    let response = with(2, 0x81);
    for bytes in [&[][..], &good[..HEADER - 1], &response] {
        assert_eq!(decided(bytes), Decision::Drop);
    }
    // Updates, notifications and what is yet to come are the resolver's.
    for op_code in [2, 4, 5, 6, 15] {
        assert_eq!(decided(&with(2, op_code << 3)), Decision::Forward);
    }
}

#[test]
fn an_error_repeats_the_question_where_it_was_understood() {
    let good = query("example.com", RecordType::A);
    let answer = error(&good, ResponseCode::Refused);
    assert!(is_answer(&answer, &good));
    let answer = Message::from_vec(&answer).unwrap();
    assert_eq!((answer.response_code, answer.queries.len()), (ResponseCode::Refused, 1));
    let answer = Message::from_vec(&error(&good[..14], ResponseCode::ServFail)).unwrap();
    assert_eq!((answer.response_code, answer.id), (ResponseCode::ServFail, 0x1234));
}

#[test]
fn only_a_response_with_the_same_id_and_question_is_an_answer() {
    let asked = query("example.com", RecordType::A);
    let answer = |name: &str, kind: RecordType| {
        let mut message = message(name, kind).into_response();
        message.add_answer(Record::from_rdata(Name::root(), 1, RData::A(A([1, 1, 1, 1].into()))));
        message
    };
    let bytes = |message: &Message| message.to_vec().unwrap();
    let good = answer("EXAMPLE.com", RecordType::A);
    assert!(is_answer(&bytes(&good), &asked));
    let mut other_id = good.clone();
    other_id.metadata.id = 1;
    let mut other_class = good.clone();
    other_class.queries[0].set_query_class(DNSClass::CH);
    let mut no_question = good.clone();
    no_question.queries.clear();
    let mut other_operation = good.clone();
    other_operation.metadata.op_code = OpCode::Status;
    for wrong in [
        asked.clone(),
        bytes(&other_id),
        bytes(&other_class),
        bytes(&other_operation),
        bytes(&no_question),
        bytes(&answer("example.org", RecordType::A)),
        bytes(&answer("example.com", RecordType::AAAA)),
        vec![],
        bytes(&good)[..20].to_vec(),
    ] {
        assert!(!is_answer(&wrong, &asked), "{wrong:?}");
    }
    assert!(is_answer(&bare_error(&asked, ResponseCode::FormErr), &asked));
}

/// What comes out of a small generator (xorshift), as it is and after a good header, and good queries with bytes changed.
#[test]
fn nothing_that_is_sent_makes_it_panic() {
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let mut random = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as usize
    };
    let addresses = addresses();
    let mut edns = message("catalog", RecordType::A);
    edns.set_edns(Edns::new());
    let reverse = Name::from(IpAddr::from(addresses.of("catalog").unwrap().ipv6())).to_ascii();
    let seeds =
        [edns.to_vec().unwrap(), query(&reverse, RecordType::PTR), query("catalog", RecordType::HTTPS)];
    for round in 0..200_000 {
        let mut bytes = seeds[round % seeds.len()].clone();
        match round % 4 {
            0 => bytes = (0..random() % 80).map(|_| random() as u8).collect(),
            1 => bytes.splice(HEADER.., (0..random() % 80).map(|_| random() as u8)).for_each(drop),
            _ => {
                for _ in 0..=random() % 4 {
                    let at = random() % bytes.len();
                    bytes[at] = random() as u8;
                }
                bytes.truncate(random() % 8 * bytes.len() + random() % (bytes.len() + 1));
            }
        }
        for transport in [Transport::Udp, Transport::Tcp] {
            decide(&bytes, &addresses, transport);
        }
        error(&bytes, ResponseCode::ServFail);
        is_answer(&bytes, &seeds[0]);
    }
}

#[test]
fn whatever_is_asked_the_answer_is_one_to_it_and_fits() {
    let mut edns = message("catalog.internal", RecordType::AAAA);
    edns.set_edns(Edns::new());
    let address = addresses().of("catalog").unwrap();
    let seeds = [
        query("catalog", RecordType::A),
        edns.to_vec().unwrap(),
        query("_8443._https.a_b.x", RecordType::HTTPS),
        query(&Name::from(IpAddr::from(address.ipv4())).to_ascii(), RecordType::PTR),
        query("example.com", RecordType::MX),
    ];
    let seeds = seeds.each_ref().map(Vec::as_slice);
    let words = ["\x07catalog", "\0", "\u{c}", "\0\x01", "\0\u{1c}", "\0\x29", "\x04arpa", "\x7f", "_"];
    fuzz::damaged!(seeds, words, |query: &[u8]| {
        let is_query = Head::of(query).is_some_and(|head| !head.is_response);
        for (transport, limit) in [(Transport::Udp, 512), (Transport::Tcp, usize::from(u16::MAX))] {
            match decide(query, &addresses(), transport) {
                Decision::Drop => assert!(!is_query),
                Decision::Forward => assert!(is_query),
                Decision::Malformed(answer) => {
                    assert!(is_query && answer[2] & 0x80 != 0 && id(&answer) == id(query));
                    assert_eq!(answer.len(), HEADER);
                }
                Decision::Answer(answer) => {
                    let asked = Message::from_vec(query).unwrap();
                    assert!(is_query && answer.len() <= limit.max(usize::from(asked.max_payload())));
                    assert!(is_answer(&answer, query));
                    Message::from_vec(&answer).unwrap();
                }
            }
        }
        assert!(!is_query || !is_answer(query, query));
        let error = error(query, ResponseCode::ServFail);
        assert!(error.len() >= HEADER && error[2] & 0x80 != 0 && error[3] & 0xf == 2);
    });
}
