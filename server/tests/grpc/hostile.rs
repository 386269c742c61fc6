//! Peers that mean harm, in hand-written HTTP/2 (RFC 9113): each is shown the door, and nobody else notices.

use std::net::SocketAddr;
use std::time::Duration;

use openlora_engine::EngineStats;
use openlora_server::keys::Role;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio_stream::StreamExt as _;

use crate::harness::{PATIENCE, TestServer, long_request};

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const GOAWAY: u8 = 7;
const CONTINUATION: u8 = 9;
const END_HEADERS: u8 = 4;

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = (payload.len() as u32).to_be_bytes()[1..].to_vec();
    bytes.extend([kind, flags]);
    bytes.extend(stream.to_be_bytes());
    bytes.extend(payload);
    bytes
}

/// The preface and an empty SETTINGS.
fn hello() -> Vec<u8> {
    let mut bytes = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
    bytes.extend(frame(SETTINGS, 0, 0, &[]));
    bytes
}

/// HPACK for a gRPC POST, without Huffman coding (RFC 7541 section 6.2.2: literal, not indexed, new or static name).
fn request_headers() -> Vec<u8> {
    // Static table: 3 `:method POST`, 6 `:scheme http`.
    let mut block = vec![0x83, 0x86];
    let mut literal = |name: &str, value: &str| {
        block.push(0);
        for text in [name, value] {
            block.push(u8::try_from(text.len()).expect("short"));
            block.extend(text.as_bytes());
        }
    };
    literal(":path", "/openlora.v1.Inference/Generate");
    literal(":authority", "test");
    literal("content-type", "application/grpc");
    literal("te", "trailers");
    block
}

/// What the server sent before it closed, as `(kind, payload)`.
async fn frames_until_closed(socket: &mut TcpStream) -> Vec<(u8, Vec<u8>)> {
    let mut bytes = Vec::new();
    // A reset after GOAWAY is as good as an end.
    let _ = tokio::time::timeout(PATIENCE, socket.read_to_end(&mut bytes)).await.expect("closed in time");
    let mut frames = Vec::new();
    let mut rest = bytes.as_slice();
    while let Some((head, tail)) = rest.split_at_checked(9) {
        let len = u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize;
        let Some((payload, tail)) = tail.split_at_checked(len) else { break };
        frames.push((head[3], payload.to_vec()));
        rest = tail;
    }
    frames
}

/// Sends `attack` over and over until the server has had enough, and gives the error code of its GOAWAY.
async fn goaway_code(addr: SocketAddr, attack: impl Fn(u32) -> Vec<u8>) -> u32 {
    let mut socket = TcpStream::connect(addr).await.expect("connects");
    socket.write_all(&hello()).await.expect("written");
    let (mut reader, mut writer) = socket.into_split();
    // Reading at the same time: the server's answers must not stop it from reading us.
    let reading = tokio::spawn(async move {
        let mut bytes = Vec::new();
        let mut buffer = vec![0; 1 << 16];
        while let Ok(n @ 1..) = reader.read(&mut buffer).await {
            bytes.extend_from_slice(&buffer[..n]);
        }
        bytes
    });
    for round in 0..20_000 {
        if writer.write_all(&attack(round)).await.is_err() {
            break;
        }
    }
    let bytes = tokio::time::timeout(PATIENCE, reading).await.expect("closed in time").expect("read");
    let at = (0..bytes.len().saturating_sub(16)).find(|&at| {
        bytes[at + 3] == GOAWAY && bytes[at..at + 3] == [0, 0, bytes[at + 2]] && bytes[at + 5..at + 9] == [0; 4]
    });
    let at = at.expect("a GOAWAY before the end") + 9 + 4;
    u32::from_be_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

/// Runs an attack while another client's answer streams: it must not even be interrupted.
async fn attacked_while_serving(attack: impl Fn(u32) -> Vec<u8>) -> u32 {
    let server = TestServer::start().await;
    let mut client = server.inference(Role::App).await;
    let mut stream = client.generate_stream(long_request()).await.expect("started").into_inner();
    stream.next().await.expect("a message").expect("a token");
    let mut reading = tokio::spawn(async move {
        while let Some(message) = stream.next().await {
            message.expect("the other client is not disturbed");
        }
    });
    let code = goaway_code(server.addrs.grpc, attack).await;
    assert!(!reading.is_finished() || (&mut reading).await.is_ok());
    reading.abort();
    client.generate(crate::harness::request(crate::harness::text("Hi"), 2)).await.expect("the server is well");
    server.until_idle().await;
    code
}

const PROTOCOL_ERROR: u32 = 1;
const ENHANCE_YOUR_CALM: u32 = 11;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rapid_reset_is_answered_with_goaway() {
    let block = request_headers();
    let code = attacked_while_serving(|round| {
        let mut bytes = Vec::new();
        for i in 0..100 {
            let stream = 1 + 2 * (round * 100 + i);
            bytes.extend(frame(HEADERS, END_HEADERS, stream, &block));
            bytes.extend(frame(RST_STREAM, 0, stream, &8_u32.to_be_bytes()));
        }
        bytes
    })
    .await;
    assert_eq!(code, ENHANCE_YOUR_CALM);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_continuation_flood_is_answered_with_goaway() {
    let block = request_headers();
    let code = attacked_while_serving(|round| match round {
        0 => frame(HEADERS, 0, 1, &block),
        // A literal header, again and again, and never the end of them.
        _ => frame(CONTINUATION, 0, 1, b"\x00\x01a\x01b").repeat(50),
    })
    .await;
    assert!(matches!(code, PROTOCOL_ERROR | ENHANCE_YOUR_CALM), "{code}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_ping_flood_is_answered_with_goaway() {
    let code = attacked_while_serving(|_| frame(PING, 0, 0, &[7; 8]).repeat(50)).await;
    assert_eq!(code, PROTOCOL_ERROR);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_settings_flood_is_answered_with_goaway() {
    let code = attacked_while_serving(|_| frame(SETTINGS, 0, 0, &[]).repeat(50)).await;
    assert_eq!(code, PROTOCOL_ERROR);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_empty_data_flood_is_ended() {
    let block = request_headers();
    let code = attacked_while_serving(|round| match round {
        0 => frame(HEADERS, END_HEADERS, 1, &block),
        _ => frame(DATA, 0, 1, &[]).repeat(50),
    })
    .await;
    assert!(code > 0, "an error");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn headers_over_the_limit_are_refused() {
    let server = TestServer::start().await;
    let mut socket = TcpStream::connect(server.addrs.grpc).await.expect("connects");
    let mut block = request_headers();
    for i in 0..400_u32 {
        block.extend([0, 4]);
        block.extend(format!("x{i:03}").bytes());
        block.push(100);
        block.extend([b'v'; 100]);
    }
    let mut bytes = hello();
    let parts: Vec<_> = block.chunks(16_000).collect();
    for (i, part) in parts.iter().enumerate() {
        let kind = if i == 0 { HEADERS } else { CONTINUATION };
        let flags = if i + 1 == parts.len() { END_HEADERS } else { 0 };
        bytes.extend(frame(kind, flags, 1, part));
    }
    socket.write_all(&bytes).await.expect("written");
    let mut answer = vec![0; 1 << 14];
    let refused = async {
        let mut seen = Vec::new();
        loop {
            let n = socket.read(&mut answer).await.unwrap_or(0);
            seen.extend_from_slice(&answer[..n]);
            // HTTP status 431 (HPACK has no entry for it, so it stands there as text), a reset or the end.
            let status = seen.windows(3).any(|window| window == b"431");
            let reset = seen.windows(9).any(|w| w[3] == RST_STREAM && w[5..9] == [0, 0, 0, 1]);
            if n == 0 || status || reset {
                return;
            }
        }
    };
    tokio::time::timeout(PATIENCE, refused).await.expect("refused in time");
    assert_eq!(server.info().await.running_sequences, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_peer_that_connects_and_says_nothing_is_closed() {
    let timeout = Duration::from_millis(200);
    let server = TestServer::start_with(|setup| {
        setup.server.connections.handshake_timeout = timeout;
        setup.server.connections.http_age_max = timeout;
    })
    .await;
    for addr in [server.addrs.grpc, server.addrs.http] {
        let mut silent = TcpStream::connect(addr).await.expect("connects");
        let frames = frames_until_closed(&mut silent).await;
        assert!(frames.iter().all(|(kind, _)| *kind != HEADERS && *kind != DATA), "nothing was served: {frames:?}");
    }
    // Half a preface, half a request: the same.
    for (addr, half) in
        [(server.addrs.grpc, "PRI * HTTP/2.0\r\n"), (server.addrs.http, "GET /metrics HTTP/1.1\r\nx: y")]
    {
        let mut slow = TcpStream::connect(addr).await.expect("connects");
        slow.write_all(half.as_bytes()).await.expect("written");
        frames_until_closed(&mut slow).await;
    }
    let mut client = server.inference(Role::App).await;
    client.generate(crate::harness::request(crate::harness::text("Hi"), 2)).await.expect("others are served");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_peer_that_stops_answering_is_noticed_and_its_request_ended() {
    let server = TestServer::start_with(|setup| {
        setup.server.connections.keepalive_interval = Duration::from_millis(400);
        setup.server.connections.keepalive_timeout = Duration::from_millis(300);
    })
    .await;
    let mut socket = TcpStream::connect(server.addrs.grpc).await.expect("connects");
    let mut asked = long_request();
    asked.sampling.as_mut().expect("sampling").n = Some(8);
    let message = prost::Message::encode_to_vec(&asked);
    let mut body = vec![0];
    body.extend((message.len() as u32).to_be_bytes());
    body.extend(message);
    let mut block = request_headers();
    let key = &server.keys[&Role::App];
    block.extend([0, 9]);
    block.extend(b"x-api-key");
    block.push(u8::try_from(key.len()).expect("short"));
    block.extend(key.as_bytes());
    let mut bytes = hello();
    bytes.extend(frame(HEADERS, END_HEADERS, 1, &block));
    bytes.extend(frame(DATA, 1, 1, &body));
    socket.write_all(&bytes).await.expect("written");
    // Asked of the engine itself: with these timeouts a slow machine might lose a client as well.
    let until = async |wanted: fn(&EngineStats) -> bool| {
        while !wanted(&server.engine.stats()) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(PATIENCE, until(|stats| stats.generation_tokens_total > 0)).await.expect("runs");
    // The socket stays open and its PINGs stay unanswered, as with a peer that lost its network.
    tokio::time::timeout(PATIENCE, until(|stats| stats.running + stats.waiting == 0)).await.expect("is ended");
    assert!(server.engine.stats().generation_tokens_total < 8 * 16_000, "it was ended, and did not end by itself");
    let frames = frames_until_closed(&mut socket).await;
    assert!(frames.iter().any(|(kind, _)| *kind == PING), "it was asked first: {frames:?}");
}
