use std::sync::Arc;

use super::*;

#[test]
fn the_own_resolvers_are_those_another_network_has_too() {
    let text = b"search a.b\nnameserver 10.96.0.10\nnameserver 127.0.0.53\n# nameserver 1.1.1.1\n\
                 nameserver fd96::10\nnameserver nonsense\noptions ndots:5\nnameserver ::1\nwhatever\n";
    let expected = ["10.96.0.10:53", "[fd96::10]:53"].map(|text| text.parse().unwrap());
    assert_eq!(resolvers(text), expected);
    assert!(resolvers(b"\xff\xfe").is_empty());
}

#[tokio::test(start_paused = true)]
async fn the_own_resolvers_are_read_again() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let own = Own::new(file.path().to_owned());
    assert!(own.resolvers().is_empty());
    std::fs::write(file.path(), "nameserver 10.96.0.10\n").unwrap();
    assert!(own.resolvers().is_empty(), "not for each question");
    tokio::time::advance(READ_AGAIN_AFTER).await;
    assert_eq!(own.resolvers().len(), 1);
    drop(file);
    tokio::time::advance(READ_AGAIN_AFTER).await;
    assert!(own.resolvers().is_empty());
}

/// A question for `a.` with the number 0x0102, and its answer.
const QUESTION: [u8; 19] = [1, 2, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 1, b'a', 0, 0, 1, 0, 1];
const END: usize = QUESTION.len();

fn answer() -> Vec<u8> {
    let mut answer = QUESTION.to_vec();
    answer[2] |= 0x80;
    answer
}

fn here() -> Arc<Netns> {
    Arc::new(Netns::current().unwrap())
}

#[tokio::test]
async fn a_question_and_its_answer_go_on_as_they_are() {
    let netns = here();
    let outside = Outside { netns: &netns, mark: 0x539 };
    for any in ["127.0.0.1:0", "[::1]:0"] {
        let resolver = UdpSocket::bind(any).await.unwrap();
        let to = [resolver.local_addr().unwrap()];
        let answering = async {
            let mut buffer = [0; 512];
            let (length, client) = resolver.recv_from(&mut buffer).await.unwrap();
            assert_eq!(buffer[..length], QUESTION);
            // What is no answer to it is nothing.
            for wrong in [&[][..], &QUESTION, &[0xff; 40]] {
                resolver.send_to(wrong, client).await.unwrap();
            }
            let large = [answer(), vec![7; 3000]].concat();
            resolver.send_to(&large, client).await.unwrap();
        };
        let (said, ()) = tokio::join!(outside.over_udp(&to, &QUESTION, END), answering);
        assert_eq!(said.expect("needs root").len(), END + 3000);

        let resolver = tokio::net::TcpListener::bind(any).await.unwrap();
        let to = [resolver.local_addr().unwrap()];
        let answering = async {
            let (mut stream, _) = resolver.accept().await.unwrap();
            assert_eq!(read_message(&mut stream).await.unwrap().unwrap(), QUESTION);
            write_message(&mut stream, &[0xff; 40]).await.unwrap();
            write_message(&mut stream, &[answer(), vec![7; 60_000]].concat()).await.unwrap();
        };
        let (said, ()) = tokio::join!(outside.over_tcp(&to, &QUESTION, END), answering);
        assert_eq!(said.unwrap().len(), END + 60_000);
    }
}

#[tokio::test]
async fn a_resolver_that_is_not_there_is_known_at_once_and_the_next_one_asked() {
    let netns = here();
    let outside = Outside { netns: &netns, mark: 0x539 };
    // Ports of the loopback that nobody has any more.
    let gone = UdpSocket::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let error = outside.over_udp(&[gone], &QUESTION, END).await.unwrap_err();
    assert!(matches!(error, ForwardError::Failed(_)), "{error}");
    let error = outside.over_udp(&[], &QUESTION, END).await.unwrap_err();
    assert!(matches!(error, ForwardError::NoResolver), "{error}");
    let resolver = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let answering = async {
        let (_, client) = resolver.recv_from(&mut [0; 512]).await.unwrap();
        resolver.send_to(&answer(), client).await.unwrap();
    };
    let to = [gone, resolver.local_addr().unwrap()];
    let (said, ()) = tokio::join!(outside.over_udp(&to, &QUESTION, END), answering);
    assert_eq!(said.unwrap(), answer());
}

#[tokio::test(start_paused = true)]
async fn a_slow_resolver_is_waited_for_as_long_as_clients_do() {
    let netns = here();
    let outside = Outside { netns: &netns, mark: 0x539 };
    let (slow, silent) =
        (UdpSocket::bind("127.0.0.1:0").await.unwrap(), UdpSocket::bind("127.0.0.1:0").await.unwrap());
    let (slow_at, silent_at) = (slow.local_addr().unwrap(), silent.local_addr().unwrap());
    // Others are asked meanwhile, and that does not end it.
    for to in [&[slow_at][..], &[slow_at, silent_at], &[silent_at, slow_at]] {
        let answering = async {
            let (_, client) = slow.recv_from(&mut [0; 512]).await.unwrap();
            tokio::time::sleep(Duration::from_secs(6)).await;
            slow.send_to(&answer(), client).await.unwrap();
        };
        let (said, ()) = tokio::join!(outside.over_udp(to, &QUESTION, END), answering);
        assert_eq!(said.expect("needs root"), answer(), "{to:?}");
        // What it was sent again is not for the next.
        while slow.try_recv_from(&mut [0; 512]).is_ok() {}
    }
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let to = [listener.local_addr().unwrap()];
    let answering = async {
        let (mut stream, _) = listener.accept().await.unwrap();
        read_message(&mut stream).await.unwrap();
        tokio::time::sleep(Duration::from_secs(6)).await;
        write_message(&mut stream, &answer()).await.unwrap();
    };
    let (said, ()) = tokio::join!(outside.over_tcp(&to, &QUESTION, END), answering);
    assert_eq!(said.unwrap(), answer());
}

#[tokio::test(start_paused = true)]
async fn a_lost_datagram_is_sent_again_and_silence_ends() {
    let netns = here();
    let outside = Outside { netns: &netns, mark: 0x539 };
    let resolver = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let to = [resolver.local_addr().unwrap()];
    let answering = async {
        let mut buffer = [0; 512];
        let (_, first) = resolver.recv_from(&mut buffer).await.unwrap();
        let (_, again) = resolver.recv_from(&mut buffer).await.unwrap();
        assert_eq!(first, again, "a late answer to the first would be one");
        resolver.send_to(&answer(), again).await.unwrap();
    };
    let (said, ()) = tokio::join!(outside.over_udp(&to, &QUESTION, END), answering);
    assert_eq!(said.unwrap(), answer());
    let error = outside.over_udp(&to, &QUESTION, END).await.unwrap_err();
    assert!(matches!(error, ForwardError::TimedOut), "{error}");
    // It accepts and says nothing.
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let to = [silent.local_addr().unwrap()];
    let error = outside.over_tcp(&to, &QUESTION, END).await.unwrap_err();
    assert!(matches!(error, ForwardError::TimedOut), "{error}");
}

#[tokio::test]
async fn messages_on_a_connection_are_whole_or_an_error() {
    let mut two: &[u8] = &[0, 3, 1, 2, 3, 0, 0];
    assert_eq!(read_message(&mut two).await.unwrap(), Some(vec![1, 2, 3]));
    assert_eq!(read_message(&mut two).await.unwrap(), Some(vec![]));
    assert_eq!(read_message(&mut two).await.unwrap(), None);
    for torn in [&[0][..], &[0, 3, 1], &[0xff, 0xff]] {
        let mut torn = torn;
        assert_eq!(read_message(&mut torn).await.unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }
    let mut out = Vec::new();
    assert!(write_message(&mut out, &vec![0; 65_536]).await.is_err());
    write_message(&mut out, &[7; 2]).await.unwrap();
    assert_eq!(out, [0, 2, 7, 7]);
}
