use super::*;
use crate::dns::testing::{Resolver, query, server};
use hickory_proto::{op::Message, rr::RecordType};
use tokio::time::Instant;

/// Plays a resolver at a loopback address: `answers` says what goes back for each query, and whence.
async fn resolver(
    answers: impl Fn(&[u8]) -> Vec<(&'static str, Vec<u8>)> + Send + 'static,
) -> (SocketAddr, tokio::task::JoinHandle<()>) {
    let socket = UdpSocket::bind("127.0.0.53:0").await.unwrap();
    let address = socket.local_addr().unwrap();
    let playing = tokio::spawn(async move {
        let mut buffer = [0; MAX_QUERY];
        loop {
            let (len, client) = socket.recv_from(&mut buffer).await.unwrap();
            for (whence, answer) in answers(&buffer[..len]) {
                if whence == "here" {
                    socket.send_to(&answer, client).await.unwrap();
                } else {
                    UdpSocket::bind(whence).await.unwrap().send_to(&answer, client).await.unwrap();
                }
            }
        }
    });
    (address, playing)
}

#[tokio::test]
async fn a_query_is_sent_on_as_it_is_under_another_id_and_its_answer_comes_back_as_it_is() {
    let (seen, mut queries) = tokio::sync::mpsc::unbounded_channel();
    let (address, _playing) = resolver(move |query| {
        seen.send(query.to_vec()).unwrap();
        vec![("here", Resolver::answer(query))]
    })
    .await;
    let mut asked = query("Example.COM", RecordType::TXT);
    // What no parser knows goes along: a record of a type of its own.
    asked[11] = 1;
    asked.extend([0, 0xff, 0x01, 0, 1, 0, 0, 0, 9, 0, 2, 7, 7]);
    let mut ids = std::collections::HashSet::new();
    for _ in 0..20 {
        let answer = exchange(&asked, address).await.unwrap();
        assert_eq!(answer, Resolver::answer(&asked));
        let seen = queries.recv().await.unwrap();
        assert_eq!(seen[2..], asked[2..]);
        ids.insert(message::id(&seen));
    }
    assert!(ids.len() > 10, "{ids:?}");
}

#[tokio::test]
async fn false_answers_are_ignored_and_the_true_one_is_taken() {
    let (address, _playing) = resolver(|query| {
        let good = Resolver::answer(query);
        let mut other_id = good.clone();
        other_id[1] ^= 1;
        let other_question =
            Resolver::answer(&[&query[..2], &self::query("other.test", RecordType::A)[2..]].concat());
        let mut forged = good.clone();
        *forged.last_mut().unwrap() ^= 1;
        vec![
            ("here", other_id),
            ("here", other_question),
            ("here", query.to_vec()),
            ("here", vec![]),
            ("127.0.0.54:0", forged),
            ("here", good),
        ]
    })
    .await;
    let asked = query("example.com", RecordType::A);
    assert_eq!(exchange(&asked, address).await.unwrap(), Resolver::answer(&asked));
}

#[tokio::test]
async fn a_truncated_answer_is_passed_on() {
    let truncated = |query: &[u8]| {
        let mut answer = Resolver::answer(query);
        answer[2] |= 2;
        answer
    };
    let (address, _playing) = resolver(move |query| vec![("here", truncated(query))]).await;
    let asked = query("example.com", RecordType::A);
    let answer = exchange(&asked, address).await.unwrap();
    assert_eq!(answer, truncated(&asked));
    assert!(Message::from_vec(&answer).unwrap().truncation);
}

#[tokio::test]
async fn a_resolver_that_is_not_there_fails_at_once() {
    let unused = UdpSocket::bind("127.0.0.53:0").await.unwrap().local_addr().unwrap();
    let begun = Instant::now();
    let error = exchange(&query("example.com", RecordType::A), unused).await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
    assert!(begun.elapsed() < QUERY_TIMEOUT / 2);
}

/// The answer to the query before comes after its time: nobody hears it, the next query least of all.
#[tokio::test(start_paused = true)]
async fn a_silent_resolver_is_waited_for_as_long_as_a_query_takes_and_no_longer() {
    let socket = Arc::new(UdpSocket::bind("127.0.0.53:0").await.unwrap());
    let resolver = socket.local_addr().unwrap();
    let asked = query("example.com", RecordType::A);
    let error = exchange(&asked, resolver).await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    let mut buffer = [0; MAX_QUERY];
    let (len, late) = socket.recv_from(&mut buffer).await.unwrap();
    let mut false_answer = Resolver::answer(&buffer[..len]);
    *false_answer.last_mut().unwrap() ^= 1;
    let answering = tokio::spawn({
        let socket = Arc::clone(&socket);
        async move {
            let mut buffer = [0; MAX_QUERY];
            let (len, client) = socket.recv_from(&mut buffer).await.unwrap();
            for client in [late, client] {
                // The kernel may say that nobody is there any more.
                let _refused = socket.send_to(&false_answer, client).await;
            }
            let _refused = socket.send_to(&Resolver::answer(&buffer[..len]), client).await;
        }
    });
    let answer = exchange(&asked, resolver).await;
    answering.await.unwrap();
    assert_eq!(answer.unwrap(), Resolver::answer(&asked));
}

/// A client and a socket that serves it.
async fn served(server: &Arc<Server>) -> (UdpSocket, Arc<UdpSocket>) {
    let socket = Arc::new(UdpSocket::bind("127.0.0.1:0").await.unwrap());
    tokio::spawn(serve(Arc::clone(server), Arc::clone(&socket)));
    let client = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    client.connect(socket.local_addr().unwrap()).await.unwrap();
    (client, socket)
}

async fn hear(client: &UdpSocket) -> Vec<u8> {
    let mut buffer = vec![0; MAX_ANSWER];
    let len = timeout(Duration::from_secs(5), client.recv(&mut buffer)).await.unwrap().unwrap();
    buffer.truncate(len);
    buffer
}

#[tokio::test]
async fn a_socket_that_nobody_steers_to_answers_routed_names_and_refuses_others() {
    let server = server();
    let (client, _socket) = served(&server).await;
    for (name, code) in [("catalog", ResponseCode::NoError), ("example.com", ResponseCode::Refused)] {
        let asked = query(name, RecordType::A);
        client.send(&asked).await.unwrap();
        let answer = hear(&client).await;
        assert!(message::is_answer(&answer, &asked));
        assert_eq!(Message::from_vec(&answer).unwrap().response_code, code, "{name}");
    }
    client.send(&query("x", RecordType::A)[..13]).await.unwrap();
    assert_eq!(Message::from_vec(&hear(&client).await).unwrap().response_code, ResponseCode::FormErr);
}

#[tokio::test]
async fn queries_beyond_the_bound_are_dropped_while_others_are_answered() {
    let server = server();
    let (client, socket) = served(&server).await;
    let all = server.in_flight.acquire_many(crate::dns::MAX_IN_FLIGHT).await.unwrap();
    let asked = query("example.com", RecordType::A);
    let here = client.local_addr().unwrap();
    forward(&server, &socket, &asked, here);
    let silence = tokio::select! {
        _ = hear(&client) => false,
        () = sleep(Duration::from_millis(50)) => true,
    };
    assert!(silence);
    drop(all);
    forward(&server, &socket, &asked, here);
    // Nobody steered it, so no resolver is known for it.
    let answer = Message::from_vec(&hear(&client).await).unwrap();
    assert_eq!(answer.response_code, ResponseCode::Refused);
    let counted = crate::observe::encode(&server.metrics.registry()).unwrap();
    for outcome in ["dropped", "refused"] {
        let line = format!(r#"mesh_proxy_dns_queries_total{{transport="udp",outcome="{outcome}"}} 1"#);
        assert!(counted.contains(&line), "{line} is not in\n{counted}");
    }
}
