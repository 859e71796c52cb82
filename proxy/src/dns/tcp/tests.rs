use super::*;
use crate::dns::testing::{Resolver, query, server};
use hickory_proto::{op::Message, rr::RecordType};
use std::sync::Arc;
use tokio::{
    io::AsyncWriteExt as _,
    net::{TcpListener, tcp::OwnedReadHalf},
    time::timeout,
};

const SOON: Duration = Duration::from_secs(5);

struct Client {
    answers: Frames<OwnedReadHalf>,
    write: OwnedWriteHalf,
    server: Arc<Server>,
}

impl Client {
    /// Of a server that takes `resolver` for the one that was asked.
    async fn of(resolver: Option<SocketAddr>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (stream, _) = listener.accept().await.unwrap();
        let server = server();
        let serving = Arc::clone(&server);
        tokio::spawn(async move { converse(&serving, stream, resolver).await });
        let (read, write) = client.into_split();
        Self { answers: Frames::new(read, frames::MAX_MESSAGE), write, server }
    }

    async fn ask(&mut self, query: &[u8]) {
        frames::write(&mut self.write, query, SOON).await.unwrap();
    }

    async fn hear(&mut self) -> Option<Vec<u8>> {
        timeout(SOON, self.answers.next()).await.unwrap().unwrap()
    }

    async fn hear_code(&mut self) -> ResponseCode {
        Message::from_vec(&self.hear().await.unwrap()).unwrap().response_code
    }

    fn counted(&self, outcome: &str) -> bool {
        let text = crate::observe::encode(&self.server.metrics.registry()).unwrap();
        text.contains(&format!(r#"transport="tcp",outcome="{outcome}""#))
    }
}

fn numbered(number: u8, name: &str) -> Vec<u8> {
    let mut query = query(name, RecordType::A);
    message::set_id(&mut query, [0, number]);
    query
}

/// A resolver's listener.
async fn listen() -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind("127.0.0.53:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    (listener, address)
}

async fn accept(listener: &TcpListener) -> (Frames<OwnedReadHalf>, OwnedWriteHalf) {
    let (read, write) = timeout(SOON, listener.accept()).await.unwrap().unwrap().0.into_split();
    (Frames::new(read, frames::MAX_MESSAGE), write)
}

#[tokio::test]
async fn pipelined_queries_share_a_connection_and_are_answered_in_whatever_order() {
    let (listener, resolver) = listen().await;
    let mut client = Client::of(Some(resolver)).await;
    // Three of one id's neighbours; two of the same id, as a careless client may have.
    let queries = [numbered(1, "a.test"), numbered(2, "b.test"), numbered(2, "c.test")];
    for query in &queries {
        client.ask(query).await;
    }
    client.ask(&numbered(4, "catalog")).await;
    assert_eq!(message::id(&client.hear().await.unwrap()), Some([0, 4]));
    let (mut seen, mut answer) = accept(&listener).await;
    let mut asked = Vec::new();
    for query in &queries {
        let seen = seen.next().await.unwrap().unwrap();
        assert_eq!(seen[2..], query[2..]);
        asked.push(seen);
    }
    for index in [2, 0, 1] {
        frames::write(&mut answer, &Resolver::answer(&asked[index]), SOON).await.unwrap();
        assert_eq!(client.hear().await.unwrap(), Resolver::answer(&queries[index]));
    }
    assert!(client.counted("forwarded") && client.counted("answered"));
}

#[tokio::test]
async fn false_answers_are_ignored() {
    let (listener, resolver) = listen().await;
    let mut client = Client::of(Some(resolver)).await;
    let query = numbered(1, "a.test");
    client.ask(&query).await;
    let (mut seen, mut answer) = accept(&listener).await;
    let asked = seen.next().await.unwrap().unwrap();
    let mut other_id = Resolver::answer(&asked);
    other_id[0] ^= 1;
    let other_question = Resolver::answer(&[&asked[..2], &numbered(1, "b.test")[2..]].concat());
    for wrong in [&other_id, &other_question, &asked, &vec![]] {
        frames::write(&mut answer, wrong, SOON).await.unwrap();
    }
    frames::write(&mut answer, &Resolver::answer(&asked), SOON).await.unwrap();
    assert_eq!(client.hear().await.unwrap(), Resolver::answer(&query));
}

#[tokio::test]
async fn an_answer_that_udp_cannot_carry_comes_whole() {
    let (listener, resolver) = listen().await;
    let mut client = Client::of(Some(resolver)).await;
    let query = numbered(1, "a.test");
    client.ask(&query).await;
    let (mut seen, mut answer) = accept(&listener).await;
    let mut long = Resolver::answer(&seen.next().await.unwrap().unwrap());
    long.resize(frames::MAX_MESSAGE, 7);
    frames::write(&mut answer, &long, SOON).await.unwrap();
    let heard = client.hear().await.unwrap();
    assert_eq!((heard.len(), &heard[2..]), (long.len(), &long[2..]));
}

#[tokio::test]
async fn a_resolver_that_ends_early_or_is_not_there_is_told_and_the_next_query_tries_again() {
    let (listener, resolver) = listen().await;
    let mut client = Client::of(Some(resolver)).await;
    client.ask(&numbered(1, "a.test")).await;
    drop(accept(&listener).await);
    assert_eq!(client.hear_code().await, ResponseCode::ServFail);
    let query = numbered(2, "a.test");
    client.ask(&query).await;
    let (mut seen, mut answer) = accept(&listener).await;
    frames::write(&mut answer, &Resolver::answer(&seen.next().await.unwrap().unwrap()), SOON).await.unwrap();
    assert_eq!(client.hear().await.unwrap(), Resolver::answer(&query));
    drop((listener, seen, answer));
    client.ask(&numbered(3, "a.test")).await;
    assert_eq!(client.hear_code().await, ResponseCode::ServFail);
    assert!(client.counted("failed"));
}

#[tokio::test]
async fn without_a_resolver_other_names_are_refused() {
    let mut client = Client::of(None).await;
    client.ask(&numbered(1, "a.test")).await;
    assert_eq!(client.hear_code().await, ResponseCode::Refused);
    client.ask(&numbered(1, "catalog")).await;
    assert_eq!(client.hear_code().await, ResponseCode::NoError);
    client.ask(&numbered(1, "catalog")[..13]).await;
    assert_eq!(client.hear_code().await, ResponseCode::FormErr);
}

#[tokio::test]
async fn a_client_that_has_asked_all_it_wants_still_gets_its_answers() {
    let (listener, resolver) = listen().await;
    let mut client = Client::of(Some(resolver)).await;
    let query = numbered(1, "a.test");
    client.ask(&query).await;
    client.write.shutdown().await.unwrap();
    let (mut seen, mut answer) = accept(&listener).await;
    frames::write(&mut answer, &Resolver::answer(&seen.next().await.unwrap().unwrap()), SOON).await.unwrap();
    assert_eq!(client.hear().await.unwrap(), Resolver::answer(&query));
    assert_eq!(client.hear().await, None);
}

#[tokio::test]
async fn what_is_no_query_or_too_long_ends_the_connection() {
    let mut client = Client::of(None).await;
    client.ask(&Resolver::answer(&numbered(1, "a.test"))).await;
    assert_eq!(client.hear().await, None);
    let mut client = Client::of(None).await;
    client.write.write_all(&[0xff, 0xff]).await.unwrap();
    assert_eq!(client.hear().await, None);
}

#[tokio::test]
async fn queries_beyond_the_bound_are_not_read_before_one_is_answered() {
    let (listener, resolver) = listen().await;
    let mut client = Client::of(Some(resolver)).await;
    for number in 0..=MAX_IN_FLIGHT as u8 {
        client.ask(&numbered(number, "a.test")).await;
    }
    let (mut seen, mut answer) = accept(&listener).await;
    let mut asked = Vec::new();
    for _ in 0..MAX_IN_FLIGHT {
        asked.push(seen.next().await.unwrap().unwrap());
    }
    timeout(Duration::from_millis(50), seen.next()).await.unwrap_err();
    frames::write(&mut answer, &Resolver::answer(&asked[0]), SOON).await.unwrap();
    timeout(SOON, seen.next()).await.unwrap().unwrap().unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_silent_resolver_and_a_silent_client_are_not_waited_for_for_ever() {
    let (_listener, resolver) = listen().await;
    let mut client = Client::of(Some(resolver)).await;
    let begun = Instant::now();
    frames::write(&mut client.write, &numbered(1, "a.test"), SOON).await.unwrap();
    let answer = client.answers.next().await.unwrap().unwrap();
    assert_eq!(Message::from_vec(&answer).unwrap().response_code, ResponseCode::ServFail);
    assert!(begun.elapsed() >= QUERY_TIMEOUT && begun.elapsed() < QUERY_TIMEOUT * 2);
    assert_eq!(client.answers.next().await.unwrap(), None);
    assert!(begun.elapsed() >= IDLE_TIMEOUT && begun.elapsed() < IDLE_TIMEOUT * 2);
    assert!(client.counted("timed_out"));
}
