//! Between a sender and its node: loses, repeats, holds and invents questions and answers.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex},
};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    sync::Notify,
};

use crate::anvil::post;

/// Stands for a question's id.
pub(crate) const ID: &str = "\"the question's\"";

/// What happens to one question.
#[derive(Clone)]
pub(crate) enum Fault {
    /// It never reaches the node.
    LoseQuestion,
    /// The node answers, and nobody hears it.
    LoseAnswer,
    /// The node gets it twice; the second answer arrives.
    RepeatQuestion,
    /// The answer arrives twice on the same connection.
    RepeatAnswer,
    /// The node gets it after the other end has gone or `Notify` was told.
    Hold(Arc<Notify>),
    /// This status and body arrive, with the question's id for [`ID`], and the node hears nothing.
    Say(u16, String),
}

#[derive(Default)]
struct State {
    /// Which question next of this method meets which fault.
    faults: VecDeque<(&'static str, Fault)>,
    /// Methods asked for, in order.
    seen: Vec<String>,
}

/// Stops with the test's runtime.
pub(crate) struct Proxy {
    port: u16,
    state: Arc<Mutex<State>>,
}

impl Proxy {
    pub(crate) async fn start(node: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let port = listener.local_addr().expect("bound").port();
        let state = Arc::new(Mutex::new(State::default()));
        let shared = Arc::clone(&state);
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(serve(stream, node, Arc::clone(&shared)));
            }
        });
        Self { port, state }
    }

    /// A URL with what must stay secret.
    pub(crate) fn url(&self, secret: &str) -> String {
        format!("http://user:{secret}@127.0.0.1:{}/v2/{secret}?token={secret}", self.port)
    }

    /// The next question of `method` meets `fault`.
    pub(crate) fn fail(&self, method: &'static str, fault: Fault) {
        self.state.lock().expect("no panic").faults.push_back((method, fault));
    }

    /// How often a method was asked for.
    pub(crate) fn seen(&self, method: &str) -> usize {
        self.state.lock().expect("no panic").seen.iter().filter(|seen| *seen == method).count()
    }

    /// Whether every fault was met.
    pub(crate) fn is_done(&self) -> bool {
        self.state.lock().expect("no panic").faults.is_empty()
    }
}

async fn serve(mut stream: TcpStream, node: u16, state: Arc<Mutex<State>>) {
    while let Some(question) = read(&mut stream).await {
        let asked: serde_json::Value = serde_json::from_slice(&question).expect("JSON");
        let (method, id) = (&asked["method"], &asked["id"]);
        let fault = {
            let mut state = state.lock().expect("no panic");
            state.seen.push(method.as_str().expect("a method").to_owned());
            let at = state.faults.iter().position(|(named, _)| named == method);
            at.and_then(|at| state.faults.remove(at)).map(|(_, fault)| fault)
        };
        let pass = async || {
            let question = question.clone();
            tokio::task::spawn_blocking(move || post(node, &question)).await.expect("anvil answers")
        };
        let (status, answer, times) = match fault {
            None => (200, pass().await, 1),
            Some(Fault::LoseQuestion) => return,
            Some(Fault::LoseAnswer) => {
                pass().await;
                return;
            }
            Some(Fault::RepeatQuestion) => {
                pass().await;
                (200, pass().await, 1)
            }
            Some(Fault::RepeatAnswer) => (200, pass().await, 2),
            Some(Fault::Hold(until)) => {
                let mut byte = [0];
                tokio::select! {
                    () = until.notified() => {}
                    _gone = stream.read(&mut byte) => {}
                }
                (200, pass().await, 1)
            }
            Some(Fault::Say(status, text)) => (status, text.replace(ID, &id.to_string()).into_bytes(), 1),
        };
        let head = format!(
            "HTTP/1.1 {status} Said\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
            answer.len()
        );
        let said = [head.as_bytes(), &answer].concat().repeat(times);
        if stream.write_all(&said).await.is_err() {
            return;
        }
    }
}

/// The body of the next question; nothing at the end.
async fn read(stream: &mut TcpStream) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    loop {
        let head = bytes.windows(4).position(|bytes| bytes == b"\r\n\r\n").map(|at| at + 4);
        if let Some(head) = head {
            let text = String::from_utf8_lossy(&bytes[..head]).to_ascii_lowercase();
            let length =
                text.lines().find_map(|line| line.strip_prefix("content-length:")?.trim().parse::<usize>().ok());
            if bytes.len() >= head + length? {
                return Some(bytes.split_off(head));
            }
        }
        if stream.read_buf(&mut bytes).await.ok()? == 0 {
            return None;
        }
    }
}
